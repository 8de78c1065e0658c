"""Masks: streams of 32-bit words from 256-bit seeds, added to a vector and taken away again.

AES-256 in counter mode under a key that is used once: each seed is derived for one federation, run, round, phase and pair, so
the counter may begin at zero. The words never touch NumPy's generators.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import SecureSumError
from protocol.secure_sum.fixed_point import Words

_AT_ONCE = 1 << 16  # words: the stream stays in the processor's cache until it is added


def derived(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) from a secret, for one purpose."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=purpose).derive(secret)


def agreed(mine: X25519PrivateKey, theirs: bytes, purpose: bytes) -> bytes:
    """32 bytes that only the holders of two X25519 keys can derive (RFC 7748).

    Raises:
        SecureSumError: ``theirs`` is no public key, or one of small order, with which everybody would agree.
    """
    try:
        return derived(mine.exchange(X25519PublicKey.from_public_bytes(theirs)), purpose)
    except ValueError:
        raise SecureSumError("secure sum: a public key is none to agree with; nothing is sent") from None


def add(total: Words, seeds: Iterable[tuple[bytes, bool]]) -> None:
    """Adds the streams of some seeds to a vector, in place, modulo 2**32.

    Args:
        total: ``(length,)``, contiguous, uint32.
        seeds: 32 bytes each, and whether its stream is taken away instead.
    """
    streams = [(Cipher(AES256(seed), CTR(bytes(16))).encryptor(), minus) for seed, minus in seeds]
    zeros, into = bytes(4 * _AT_ONCE), bytearray(4 * _AT_ONCE)
    buffer = np.frombuffer(into, "<u4")
    for at in range(0, total.size, _AT_ONCE):
        part = total[at : at + _AT_ONCE]
        size = part.size
        for stream, minus in streams:
            stream.update_into(zeros if size == _AT_ONCE else zeros[: 4 * size], into)
            if minus:
                np.subtract(part, buffer[:size], out=part)
            else:
                np.add(part, buffer[:size], out=part)
