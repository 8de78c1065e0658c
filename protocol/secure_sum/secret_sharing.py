"""Shamir's secret sharing of 32-byte secrets (Shamir 1979, "How to share a secret").

A secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over the integers modulo the Mersenne prime
2**521 - 1; a share is the value at its holder's place. Any ``threshold`` of them give the secret by Lagrange's formula, and
fewer say nothing.
"""

import secrets
from collections.abc import Mapping, Sequence

from protocol.errors import SecureSumError

SECRET_BYTES, SHARE_BYTES = 32, 66
_PRIME = 2**521 - 1


def shared(secret: bytes, places: Sequence[int], threshold: int) -> dict[int, bytes]:
    """One share of 66 bytes for each place.

    Args:
        secret: 32 bytes.
        places: Different numbers from 1.
        threshold: How many shares give the secret back.

    Raises:
        SecureSumError: More shares would be needed than there are, or none.
    """
    if not 1 <= threshold <= len(places):
        raise SecureSumError(
            f"secret sharing: a threshold of {threshold} among {len(places)} holders; expected 1 to {len(places)}"
        )
    if len(secret) != SECRET_BYTES or len(set(places)) < len(places) or min(places) < 1:
        raise ValueError("expected 32 bytes and different places from 1")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]
    return {place: _at(coefficients, place).to_bytes(SHARE_BYTES) for place in places}


def _at(coefficients: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % _PRIME
    return value


def recovered(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind at least ``threshold`` shares, by place.

    Raises:
        SecureSumError: There are too few, one is no share, or they do not belong together.
    """
    if len(shares) < threshold:
        raise SecureSumError(f"secret sharing: {len(shares)} shares, {threshold} are needed")
    taken = sorted(shares)[:threshold]
    value = 0
    for place in taken:
        share = int.from_bytes(shares[place])
        if len(shares[place]) != SHARE_BYTES or share >= _PRIME:
            raise SecureSumError("secret sharing: not a share of 66 bytes")
        above, below = 1, 1
        for other in taken:
            if other != place:
                above = above * other % _PRIME
                below = below * (other - place) % _PRIME
        value = (value + share * above * pow(below, -1, _PRIME)) % _PRIME
    if value >= 2 ** (8 * SECRET_BYTES):
        raise SecureSumError("secret sharing: the shares do not belong together")
    return value.to_bytes(SECRET_BYTES)
