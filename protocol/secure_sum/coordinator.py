"""The coordinator's half of a secure sum: routes what it cannot read, adds what it cannot tell apart, unmasks the sum.

Whoever does not answer a stage within its deadline is left out from there on:

- before its shares: it was never there;
- after its shares, before its vector: the others' masks with it are taken off with its masking key, from their shares;
- after its vector: it stays in the sum, and its own mask is taken off with its seed, from the others' shares.

Below the threshold at any stage the sum is given up, and nothing that was sent says anything.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.errors import SecureSumError, SignatureError
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.masks import add, agreed
from protocol.secure_sum.messages import Advert, Opening, order_of, survivors_content
from protocol.secure_sum.node import ADVERT, SEALED_BYTES, SURVIVORS, check_adverts, pair_purpose
from protocol.secure_sum.secret_sharing import SHARE_BYTES, recovered
from protocol.secure_sum.terms import Terms
from protocol.signature import verify


class Coordinator:
    """One sum.

    Args:
        terms: What nodes are asked.
        enrolled: Public keys by name.
    """

    def __init__(self, terms: Terms, enrolled: Mapping[str, Ed25519PublicKey]) -> None:
        self.terms = terms
        self.refused: dict[str, str] = {}
        self._enrolled = enrolled
        self._adverts: dict[str, Advert] = {}
        self._shared: frozenset[str] = frozenset()
        self._total: Words = np.zeros(terms.length, np.uint32)
        self._added: set[str] = set()
        self._confirmed: set[str] = set()

    def advertised(self, adverts: Mapping[str, Advert]) -> dict[str, Advert]:
        """The adverts to send round: those that hold.

        Raises:
            SecureSumError: They are too few.
        """
        for name, advert in adverts.items():
            try:
                if name not in self.terms.nodes:
                    raise SignatureError("was not asked")
                verify(advert.signature, ADVERT, advert.content(self.terms.digest, name), [self._enrolled[name]])
            except SignatureError:
                self.refused[name] = "keys are not signed with its enrolled key"
            else:
                self._adverts[name] = advert
        check_adverts(self.terms, self._adverts, self._enrolled)
        return dict(self._adverts)

    def routed(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """What each node is to be sent: by node, the sealed shares of its holders.

        Args:
            sealed: By who sealed them, then by holder.

        Raises:
            SecureSumError: Too few have shared.
        """
        whole = {}
        for name, shares in sealed.items():
            wanted = set(self._holders(name)) - {name} if name in self._adverts else set()
            if wanted and shares.keys() == wanted and all(len(share) == SEALED_BYTES for share in shares.values()):
                whole[name] = shares
            else:
                self.refused[name] = "shares for others than its holders, or of another length"
        self._shared = frozenset(whole)
        self._enough(len(whole), "have shared")
        return {
            name: {sender: shares[name] for sender, shares in whole.items() if name in shares} for name in sorted(self._shared)
        }

    def add(self, name: str, masked: Words) -> None:
        """Adds a node's masked vector.

        Raises:
            SecureSumError: It is none, or the node's second, or the node has not shared.
        """
        if name not in self._shared or name in self._added:
            raise SecureSumError(f"secure sum: a vector of {name}, which has not shared or has sent one already")
        if masked.dtype != np.uint32 or masked.shape != (self.terms.length,):
            raise SecureSumError(f"secure sum: {masked.dtype} {masked.shape}, expected uint32 ({self.terms.length},)")
        self._total += masked
        self._added.add(name)

    def survivors(self) -> frozenset[str]:
        """Those whose vectors were added.

        Raises:
            SecureSumError: They are too few.
        """
        self._enough(len(self._added), "have sent their vectors")
        return frozenset(self._added)

    def confirmed(self, signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """The confirmations to send round.

        Raises:
            SecureSumError: They are too few.
        """
        content = survivors_content(self.terms.digest, order_of(self._adverts), frozenset(self._added))
        held = {}
        for name, signature in signatures.items():
            try:
                if name not in self._added:
                    raise SignatureError("has not stayed")
                verify(signature, SURVIVORS, content, [self._enrolled[name]])
            except SignatureError:
                self.refused[name] = "has not confirmed who has stayed"
            else:
                held[name] = signature
        self._confirmed = set(held)
        self._enough(len(held), "have confirmed who has stayed")
        return held

    def total(self, openings: Mapping[str, Opening]) -> Words:
        """The sum of the vectors that were added, modulo 2**32.

        Raises:
            SecureSumError: Too few shares came for somebody's mask, or they give another secret than was committed to.
        """
        self._enough(len(openings.keys() & self._confirmed), "have opened")
        openings = {name: opening for name, opening in openings.items() if name in self._confirmed}
        total, stayed = self._total.copy(), sorted(self._added)
        seeds = [(self._seed(name, openings), True) for name in stayed]
        for left in sorted(self._shared - self._added):
            key = self._masking_key(left, openings)
            for other in stayed:
                if other in self._holders(left):
                    purpose = pair_purpose(self.terms, b"mask", left, other)
                    # The other added its stream with the sign that is taken back here.
                    seeds.append((agreed(key, self._adverts[other].masking, purpose), not left < other))
        add(total, seeds)
        return total

    def _seed(self, name: str, openings: Mapping[str, Opening]) -> bytes:
        seed = self._recovered(name, {holder: each.seeds.get(name) for holder, each in openings.items()})
        if hashlib.sha256(seed).digest() != self._adverts[name].commitment:
            raise SecureSumError(f"secure sum: the shares of {name}'s mask give another one than it committed to")
        return seed

    def _masking_key(self, name: str, openings: Mapping[str, Opening]) -> X25519PrivateKey:
        raw = self._recovered(name, {holder: each.keys.get(name) for holder, each in openings.items()})
        key = X25519PrivateKey.from_private_bytes(raw)
        if key.public_key().public_bytes_raw() != self._adverts[name].masking:
            raise SecureSumError(f"secure sum: the shares of {name}'s key give another one than it advertised")
        return key

    def _recovered(self, name: str, shares: Mapping[str, bytes | None]) -> bytes:
        holders = self._holders(name)
        places = {
            holders.index(holder) + 1: share
            for holder, share in shares.items()
            if holder in holders and share is not None and len(share) == SHARE_BYTES
        }
        return recovered(places, self.terms.threshold(len(holders)))

    def _holders(self, name: str) -> tuple[str, ...]:
        return self.terms.holders(name, sorted(self._adverts), order_of(self._adverts))

    def _enough(self, count: int, what: str) -> None:
        if count < self.terms.fewest():
            raise SecureSumError(
                f"secure sum: {count} of {len(self.terms.nodes)} nodes {what}, {self.terms.fewest()} are needed; it is "
                "given up, and nothing is revealed"
            )
