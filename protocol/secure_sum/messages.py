"""What travels in a secure sum, stage by stage. Bytes from outside: whoever reads them checks them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

PUBLIC_KEY_BYTES = 32


@dataclass(frozen=True)
class Advert:
    """A node's public keys for one sum.

    Attributes:
        sealing: X25519 public key, for shares in transit.
        masking: X25519 public key, for pairwise masks.
        commitment: SHA-256 of the seed of the node's own mask: who puts it together from shares knows that it is the one.
        signature: Ed25519, by the key under which the node is enrolled.
    """

    sealing: bytes
    masking: bytes
    commitment: bytes
    signature: bytes

    def content(self, terms: bytes, name: str) -> bytes:
        """What is signed; every part but the name has a fixed length."""
        return terms + self.sealing + self.masking + self.commitment + name.encode()


@dataclass(frozen=True)
class Opening:
    """What a survivor gives away in the end, of each node one thing or the other and never both.

    Attributes:
        seeds: Its shares of the own masks of those who stayed.
        keys: Its shares of the masking keys of those who left after they had shared.
    """

    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


def order_of(adverts: Mapping[str, Advert]) -> bytes:
    """Digest of all adverts."""
    sha = hashlib.sha256()
    for name, advert in sorted(adverts.items()):
        sha.update(len(name.encode()).to_bytes(4) + name.encode() + advert.sealing + advert.masking + advert.commitment)
    return sha.digest()


def survivors_content(terms: bytes, order: bytes, survivors: frozenset[str]) -> bytes:
    """What survivors sign before anything is opened: all must have been told of the same ones."""
    sha = hashlib.sha256()
    for name in sorted(survivors):
        sha.update(len(name.encode()).to_bytes(4) + name.encode())
    return terms + order + sha.digest()
