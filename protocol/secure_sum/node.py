"""A node's half of a secure sum (Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning").

Five answers to a coordinator that nobody needs to trust:

1. ``advertise``: two fresh X25519 keys and a commitment, signed with the key under which the node is enrolled.
2. ``share``: checks everybody's signature; splits the seed of its own mask and its masking key among its holders, sealed.
3. ``mask``: its words, plus the stream of its own seed, plus or minus one stream for each holder that has shared. The streams
   depend on what the words were made of: those of nodes that were told different things do not cancel.
4. ``confirm``: signs who is said to have stayed.
5. ``open``: having seen enough signatures under the same list, shares of the seeds of those who stayed and of the masking
   keys of those who left. Of one node it never gives both, for both would open its vector.

Each step can be taken once and only after the one before; what is needed later is in ``state``, for every message may find a
new process. A step that raises has sent nothing.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import SecureSumError, SignatureError
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.masks import add, agreed
from protocol.secure_sum.messages import PUBLIC_KEY_BYTES, Advert, Opening, order_of, survivors_content
from protocol.secure_sum.secret_sharing import SHARE_BYTES, shared
from protocol.secure_sum.terms import Terms
from protocol.signature import sign, verify

ADVERT, SURVIVORS = "secure-sum-advert", "secure-sum-survivors"
_NONCE_BYTES = 12
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + 16


@dataclass(frozen=True)
class _Secrets:
    """A node's own, for one sum."""

    sealing: X25519PrivateKey
    masking: X25519PrivateKey
    seed: bytes

    @classmethod
    def drawn(cls) -> Self:
        return cls(X25519PrivateKey.generate(), X25519PrivateKey.generate(), secrets.token_bytes(32))

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Self:
        sealing, masking, seed = (bytes.fromhex(told[name]) for name in ("sealing", "masking", "seed"))
        return cls(X25519PrivateKey.from_private_bytes(sealing), X25519PrivateKey.from_private_bytes(masking), seed)


class Node:
    """One node in one sum.

    Args:
        name: As enrolled.
        terms: Of the sum, from the coordinator; whether they suit the node is the caller's to say (``client.policy``).
        identity: The node's own signing key.
        enrolled: Public keys of everybody that the consortium has enrolled, by name.
        own: Of an earlier message (``restored``); without it new ones.

    Raises:
        SecureSumError: The node is not asked, or a node that is asked is not enrolled.
    """

    def __init__(
        self,
        name: str,
        terms: Terms,
        identity: Ed25519PrivateKey,
        enrolled: Mapping[str, Ed25519PublicKey],
        own: "_Secrets | None" = None,
    ) -> None:
        if name not in terms.nodes:
            raise SecureSumError(f"secure sum: {name} is not among those who are asked")
        if strangers := sorted(set(terms.nodes) - enrolled.keys()):
            raise SecureSumError(f"secure sum: {len(strangers)} of {len(terms.nodes)} nodes are not enrolled; nothing is sent")
        self._name, self._terms, self._identity, self._enrolled = name, terms, identity, enrolled
        self._done = 0
        self._secrets = own or _Secrets.drawn()
        self._adverts: dict[str, Advert] = {}
        self._held: dict[str, bytes] = {}
        self._survivors: frozenset[str] = frozenset()

    @property
    def terms(self) -> Terms:
        """Of the sum."""
        return self._terms

    @property
    def survivors(self) -> frozenset[str]:
        """Whom it has confirmed; empty before."""
        return self._survivors

    # The five answers ---------------------------------------------------------------------------------------------------

    def advertise(self) -> Advert:
        """Fresh public keys, signed."""
        self._step(1)
        raw = Advert(
            self._secrets.sealing.public_key().public_bytes_raw(),
            self._secrets.masking.public_key().public_bytes_raw(),
            hashlib.sha256(self._secrets.seed).digest(),
            b"",
        )
        signature = sign(self._identity, ADVERT, raw.content(self._terms.digest, self._name))
        return Advert(raw.sealing, raw.masking, raw.commitment, signature)

    def share(self, adverts: Mapping[str, Advert]) -> dict[str, bytes]:
        """Sealed shares by holder.

        Raises:
            SecureSumError: Too few have advertised, or one's keys are not signed by whom they say.
        """
        self._step(2)
        check_adverts(self._terms, adverts, self._enrolled)
        mine = adverts.get(self._name)
        if mine is None or mine.masking != self._secrets.masking.public_key().public_bytes_raw():
            raise SecureSumError("secure sum: this node's own keys are not among those that were sent round; nothing is sent")
        self._adverts = dict(adverts)
        holders = self._holders()
        places = {holder: place for place, holder in enumerate(holders, 1)}
        threshold = self._terms.threshold(len(holders))
        seeds = shared(self._secrets.seed, [*places.values()], threshold)
        keys = shared(self._secrets.masking.private_bytes_raw(), [*places.values()], threshold)
        self._held[self._name] = seeds[places[self._name]] + bytes(SHARE_BYTES)  # its own key it would give to nobody
        return {
            holder: self._sealed(holder, seeds[place] + keys[place]) for holder, place in places.items() if holder != self._name
        }

    def mask(self, received: Mapping[str, bytes], words: Words, about: bytes = b"") -> Words:
        """The words under every mask; what is given is overwritten.

        Args:
            received: Sealed shares of this node's holders, by who sealed them.
            words: ``(length,)``, uint32.
            about: What everybody was told since the terms, and the words depend on.

        Raises:
            SecureSumError: Too few have shared, a share cannot be opened, or the length is another.
        """
        self._step(3)
        if words.shape != (self._terms.length,):
            raise SecureSumError(f"secure sum: found {words.shape} words, the terms say {self._terms.length}")
        holders = self._holders()
        if received.keys() - (set(holders) - {self._name}):
            raise SecureSumError("secure sum: shares of nodes that this node does not hold for; nothing is sent")
        if 1 + len(received) < self._terms.threshold(len(holders)):
            raise SecureSumError(
                f"secure sum: {1 + len(received)} of {len(holders)} holders have shared, "
                f"{self._terms.threshold(len(holders))} are needed; nothing is sent"
            )
        self._held |= {sender: self._opened(sender, sealed) for sender, sealed in received.items()}
        seeds = [(self._secrets.seed, False)]
        seeds += [(self._pairwise(other, about), other < self._name) for other in sorted(received)]
        add(words, seeds)
        return words

    def confirm(self, survivors: frozenset[str]) -> bytes:
        """A signature under the list of those whose vectors were added.

        Raises:
            SecureSumError: They are too few, or some of them cannot have sent any.
        """
        self._step(4)
        if self._name not in survivors or survivors - self._adverts.keys():
            raise SecureSumError("secure sum: a list of survivors without this node, or with some who never advertised")
        # Between two who stay there is a mask. Else the sum would fall into parts that hide fewer (Bonawitz et al., figure 4).
        if strangers := survivors.intersection(self._holders()) - self._held.keys():
            raise SecureSumError(
                f"secure sum: {len(strangers)} nodes are said to have stayed whose shares this node was never sent; nothing is "
                "opened"
            )
        if len(survivors) < self._terms.fewest():
            raise SecureSumError(
                f"secure sum: {len(survivors)} of {len(self._terms.nodes)} nodes have stayed, {self._terms.fewest()} are needed"
            )
        self._survivors = survivors
        return sign(self._identity, SURVIVORS, survivors_content(self._terms.digest, self._order(), survivors))

    def open(self, confirmations: Mapping[str, bytes]) -> Opening:
        """Shares that take the masks off the sum.

        Args:
            confirmations: Signatures of survivors under the list that this node has confirmed.

        Raises:
            SecureSumError: Too few of its holders have confirmed the same list, or a signature does not hold.
        """
        self._step(5)
        content = survivors_content(self._terms.digest, self._order(), self._survivors)
        for name, signature in confirmations.items():
            if name not in self._survivors:
                raise SecureSumError("secure sum: a confirmation by a node that has not stayed; nothing is opened")
            try:
                verify(signature, SURVIVORS, content, [self._enrolled[name]])
            except SignatureError:
                raise SecureSumError(f"secure sum: {name} has not confirmed who has stayed; nothing is opened") from None
        holders = set(self._holders())
        agreeing, needed = holders & (confirmations.keys() | {self._name}), self._terms.threshold(len(holders))
        if len(agreeing) < needed:
            raise SecureSumError(
                f"secure sum: {len(agreeing)} of {len(holders)} holders have confirmed who has stayed, {needed} are needed; "
                "nothing is opened"
            )
        stayed = {name: share[:SHARE_BYTES] for name, share in self._held.items() if name in self._survivors}
        left = {name: share[SHARE_BYTES:] for name, share in self._held.items() if name not in self._survivors}
        self._held.clear()
        return Opening(stayed, left)

    # Between messages ---------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """All that the next answer needs. Holds secrets: it stays in the node's memory."""
        told: dict[str, Any] = {
            "done": self._done,
            "sealing": self._secrets.sealing.private_bytes_raw().hex(),
            "masking": self._secrets.masking.private_bytes_raw().hex(),
            "seed": self._secrets.seed.hex(),
            "adverts": {name: [part.hex() for part in _parts(advert)] for name, advert in self._adverts.items()},
            "held": {name: share.hex() for name, share in self._held.items()},
            "survivors": sorted(self._survivors),
            "terms": self._terms.digest.hex(),
        }
        return json.dumps(told).encode()

    @classmethod
    def restored(
        cls, name: str, terms: Terms, identity: Ed25519PrivateKey, enrolled: Mapping[str, Ed25519PublicKey], state: bytes
    ) -> Self:
        """The node as it was when ``state`` was taken.

        Raises:
            SecureSumError: The state belongs to other terms.
        """
        told = json.loads(state)
        if told["terms"] != terms.digest.hex():
            raise SecureSumError("secure sum: asked to go on under other terms than those that it began with; nothing is sent")
        node = cls(name, terms, identity, enrolled, _Secrets.read(told))
        node._done = told["done"]
        node._adverts = {each: Advert(*map(bytes.fromhex, parts)) for each, parts in told["adverts"].items()}
        node._held = {each: bytes.fromhex(share) for each, share in told["held"].items()}
        node._survivors = frozenset(told["survivors"])
        return node

    # Within ---------------------------------------------------------------------------------------------------------------

    def _step(self, number: int) -> None:
        if self._done != number - 1:
            raise SecureSumError(
                f"secure sum: asked for answer {number} after answer {self._done}; each is given once, in order"
            )
        self._done = number

    def _order(self) -> bytes:
        return order_of(self._adverts)

    def _holders(self) -> tuple[str, ...]:
        return self._terms.holders(self._name, sorted(self._adverts), self._order())

    def _pairwise(self, other: str, about: bytes) -> bytes:
        purpose = mask_purpose(self._terms, self._name, other, about)
        return agreed(self._secrets.masking, self._adverts[other].masking, purpose)

    def _cipher(self, other: str) -> AESGCM:
        purpose = pair_purpose(self._terms, b"seal", self._name, other)
        return AESGCM(agreed(self._secrets.sealing, self._adverts[other].sealing, purpose))

    def _sealed(self, holder: str, shares: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher(holder).encrypt(nonce, shares, _direction(self._terms, self._name, holder))

    def _opened(self, sender: str, sealed: bytes) -> bytes:
        if len(sealed) != SEALED_BYTES:
            raise SecureSumError(f"secure sum: shares of {len(sealed)} bytes, expected {SEALED_BYTES}; nothing is sent")
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher(sender).decrypt(nonce, rest, _direction(self._terms, sender, self._name))
        except InvalidTag:
            raise SecureSumError(f"secure sum: shares of {sender} cannot be opened; nothing is sent") from None


def check_adverts(terms: Terms, adverts: Mapping[str, Advert], enrolled: Mapping[str, Ed25519PublicKey]) -> None:
    """Makes sure that everybody is who they say, and that they are enough.

    Raises:
        SecureSumError: They are not.
    """
    if strangers := adverts.keys() - set(terms.nodes):
        raise SecureSumError(f"secure sum: keys of {len(strangers)} nodes that were not asked; nothing is sent")
    if len(adverts) < terms.fewest():
        raise SecureSumError(f"secure sum: keys of {len(adverts)} of {len(terms.nodes)} nodes, {terms.fewest()} are needed")
    keys = [key for advert in adverts.values() for key in (advert.sealing, advert.masking)]
    if len(set(keys)) < len(keys) or any(len(key) != PUBLIC_KEY_BYTES for key in keys):
        raise SecureSumError("secure sum: a key that two nodes give for theirs, or of another length; nothing is sent")
    for name, advert in adverts.items():
        try:
            verify(advert.signature, ADVERT, advert.content(terms.digest, name), [enrolled[name]])
        except SignatureError:
            raise SecureSumError(
                f"secure sum: the keys of {name} are not signed with its enrolled key; nothing is sent"
            ) from None


def pair_purpose(terms: Terms, what: bytes, one: str, other: str) -> bytes:
    """What a pair's key is derived for: the same from both ends."""
    first, second = sorted((one.encode(), other.encode()))
    return b"fedge secure sum " + what + terms.digest + len(first).to_bytes(4) + first + second


def mask_purpose(terms: Terms, one: str, other: str, about: bytes) -> bytes:
    """What the stream between two nodes is derived for."""
    return pair_purpose(terms, b"mask" + hashlib.sha256(about).digest(), one, other)


def _direction(terms: Terms, sender: str, holder: str) -> bytes:
    return terms.digest + len(sender.encode()).to_bytes(4) + sender.encode() + holder.encode()


def _parts(advert: Advert) -> tuple[bytes, ...]:
    return advert.sealing, advert.masking, advert.commitment, advert.signature
