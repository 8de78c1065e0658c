"""The coordinator's half of a secure sum: routes what it cannot read, adds what it cannot tell apart, unmasks the sum.

Whoever does not answer a stage within its deadline is left out from there on:

- before its shares: it was never there;
- after its shares, before its vector: the others' masks with it are taken off with its masking key, from their shares;
- after its vector: it stays in the sum, and its own mask is taken off with its seed, from the others' shares.

Below the threshold at any stage the sum is given up, and nothing that was sent says anything.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import combinations, islice

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.errors import SecureSumError, SignatureError
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.masks import add, agreed
from protocol.secure_sum.messages import Advert, Opening, order_of, survivors_content
from protocol.secure_sum.node import ADVERT, SEALED_BYTES, SURVIVORS, check_adverts, mask_purpose
from protocol.secure_sum.secret_sharing import SHARE_BYTES, recovered
from protocol.secure_sum.terms import Terms
from protocol.signature import verify

# Without whose shares a secret is looked for: every two of 31 holders, every one of more. A node that has split another secret
# than it has committed to costs no more than that.
_MOST_TRIED = 512


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
        self._order = b""
        self._shared: frozenset[str] = frozenset()
        self._total: Words = np.zeros(terms.length, np.uint32)
        self._added: set[str] = set()
        self._confirmed: set[str] = set()
        self._liars: set[str] = set()

    def advertised(self, adverts: Mapping[str, Advert]) -> dict[str, Advert]:
        """The adverts to send round: those that hold.

        Raises:
            SecureSumError: They are too few.
        """
        seen: set[bytes] = set()
        for name, advert in sorted(adverts.items()):
            keys = {advert.sealing, advert.masking}
            if reason := self.unusable(name, advert):
                self.refused[name] = reason
            elif keys & seen:
                self.refused[name] = "a key that another node gives for its own"
            else:
                seen |= keys
                self._adverts[name] = advert
        check_adverts(self.terms, self._adverts, self._enrolled)
        self._order = order_of(self._adverts)
        return dict(self._adverts)

    def unusable(self, name: str, advert: Advert) -> str:
        """Why an advert cannot be sent round, with which every other node would give the sum up; empty if it can."""
        try:
            if name not in self.terms.nodes:
                raise SignatureError("was not asked")
            verify(advert.signature, ADVERT, advert.content(self.terms.digest, name), [self._enrolled[name]])
            for key in (advert.sealing, advert.masking):
                agreed(X25519PrivateKey.generate(), key, b"fedge secure sum trial")
        except SignatureError:
            return "keys are not signed with its enrolled key, or for other terms"
        except SecureSumError:
            return "a key that nobody can agree with"
        return "one key for two purposes" if advert.sealing == advert.masking else ""

    def routed(self, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """What each node is to be sent: by node, the sealed shares of its holders.

        Args:
            sealed: By who sealed them, then by holder.

        Raises:
            SecureSumError: Too few have shared.
        """
        whole = {}
        for name, shares in sealed.items():
            if self.is_whole(name, shares):
                whole[name] = shares
            else:
                self.refused[name] = "shares for others than its holders, or of another length"
        self._shared = frozenset(whole)
        self._enough(len(whole), "have shared")
        return {
            name: {sender: shares[name] for sender, shares in whole.items() if name in shares} for name in sorted(self._shared)
        }

    def is_whole(self, name: str, shares: Mapping[str, bytes]) -> bool:
        """Whether a node has sealed shares for each of its holders."""
        wanted = set(self._holders(name)) - {name} if name in self._adverts else set()
        return bool(wanted) and shares.keys() == wanted and all(len(share) == SEALED_BYTES for share in shares.values())

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
        content = survivors_content(self.terms.digest, self._order, frozenset(self._added))
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

    def total(self, openings: Mapping[str, Opening], about: bytes = b"") -> Words:
        """The sum of the vectors that were added, modulo 2**32.

        Args:
            openings: By node.
            about: As for ``Node.mask``.

        Raises:
            SecureSumError: Too few shares came for somebody's mask, or they give another secret than was committed to.
        """
        self._enough(len(openings.keys() & self._confirmed), "have opened")
        openings = {name: opening for name, opening in openings.items() if name in self._confirmed}
        total = self._total.copy()
        seeds = [(self._seed(name, openings), True) for name in sorted(self._added)]
        for left in sorted(self._shared - self._added):
            key = self._masking_key(left, openings)
            for other in sorted(self._added & set(self._holders(left))):
                purpose = mask_purpose(self.terms, left, other, about)
                # The other added its stream with the sign that is taken back here.
                seeds.append((agreed(key, self._adverts[other].masking, purpose), not left < other))
        add(total, seeds)
        return total

    def _seed(self, name: str, openings: Mapping[str, Opening]) -> bytes:
        commitment = self._adverts[name].commitment
        shares = {holder: each.seeds.get(name) for holder, each in openings.items()}
        return self._recovered(name, shares, lambda seed: hashlib.sha256(seed).digest() == commitment)

    def _masking_key(self, name: str, openings: Mapping[str, Opening]) -> X25519PrivateKey:
        public = self._adverts[name].masking
        shares = {holder: each.keys.get(name) for holder, each in openings.items()}

        def is_it(raw: bytes) -> bool:
            return X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw() == public

        return X25519PrivateKey.from_private_bytes(self._recovered(name, shares, is_it))

    def _recovered(self, name: str, shares: Mapping[str, bytes | None], is_it: Callable[[bytes], bool]) -> bytes:
        """A secret that is what its owner has committed to; who gives a wrong share is left out from then on."""
        holders = self._holders(name)
        places = {
            holders.index(holder) + 1: share
            for holder, share in shares.items()
            if holder in holders and share is not None and len(share) == SHARE_BYTES
        }
        threshold = self.terms.threshold(len(holders))
        known = {place for place in places if holders[place - 1] in self._liars}
        others = sorted(places.keys() - known)
        tried = (known.union(more) for count in (0, 1, 2) for more in combinations(others, count))
        for without in islice(tried, _MOST_TRIED):
            left = {place: share for place, share in places.items() if place not in without}
            with suppress(SecureSumError):
                secret = recovered(left, threshold)
                if is_it(secret):
                    self._liars |= {holders[place - 1] for place in without}
                    self.refused |= dict.fromkeys(self._liars, "a share that it was not given")
                    return secret
        if len(places) >= threshold:  # enough of them: who split the secret has split another
            self.refused[name] = "shares that do not give what it has committed to"
        raise SecureSumError(
            f"secure sum: {len(places)} shares of what hides {name}, no {threshold} of which give what it has committed to"
        )

    def _holders(self, name: str) -> tuple[str, ...]:
        return self.terms.holders(name, sorted(self._adverts), self._order)

    def _enough(self, count: int, what: str) -> None:
        if count < self.terms.fewest():
            raise SecureSumError(
                f"secure sum: {count} of {len(self.terms.nodes)} nodes {what}, {self.terms.fewest()} are needed; it is "
                "given up, and nothing is revealed"
            )
