"""What placeholders stand for, kept so that only who holds the node's own key can read it: AES-256-GCM (NIST SP 800-38D).

A vault is ``FEDGE-VAULT-1``, a nonce of 12 random bytes and the sealed JSON object of values by placeholder. The key is 32
random bytes in Base64 in a file that only its owner may read. Whoever has lost it has lost what was masked.
"""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import DataError
from protocol.files import write_whole

_MAGIC = b"FEDGE-VAULT-1"
_NONCE_BYTES, _KEY_BYTES = 12, 32
_OWNER_ONLY = 0o600


def create_key(path: Path) -> None:
    """Writes a new key; an old one is never overwritten.

    Raises:
        DataError: There is a file already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _OWNER_ONLY)
    except FileExistsError:
        raise DataError(
            f"{path}: there is a file already; what it opens would be lost with it, so choose another path"
        ) from None
    with os.fdopen(handle, "wb") as file:
        file.write(base64.b64encode(AESGCM.generate_key(8 * _KEY_BYTES)) + b"\n")


def read_key(path: Path) -> bytes:
    """The 32 bytes of a key.

    Raises:
        DataError: There is none, it is no key, or others than its owner may read it.
    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no readable key ({type(error).__name__}); fedge data key makes one") from None
    if mode & 0o077:
        raise DataError(f"{path}: others than its owner may read this key (mode {mode & 0o777:o}); chmod 600 it")
    try:
        key = base64.b64decode(content.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise DataError(f"{path}: not a key; expected {_KEY_BYTES} bytes in Base64, as fedge data key writes them")
    return key


def seal(path: Path, values: Mapping[str, str | int | float], key: bytes) -> None:
    """Writes a vault, whole or not at all."""
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, json.dumps(dict(values)).encode(), _MAGIC)
    write_whole(path, _MAGIC + nonce + sealed, _OWNER_ONLY)


def opened(path: Path, key: bytes) -> dict[str, str | int | float]:
    """Values by placeholder.

    Raises:
        DataError: No such file, not a vault, another key's, or not as it was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no readable vault ({type(error).__name__}); fedge data mask --key writes one") from None
    nonce, sealed = content[len(_MAGIC) :][:_NONCE_BYTES], content[len(_MAGIC) + _NONCE_BYTES :]
    if not content.startswith(_MAGIC) or len(nonce) < _NONCE_BYTES:
        raise DataError(f"{path}: not a vault of format 1")
    try:
        values: dict[str, str | int | float] = json.loads(AESGCM(key).decrypt(nonce, sealed, _MAGIC))
    except InvalidTag:
        raise DataError(f"{path}: sealed with another key, or changed since; give the key that it was masked with") from None
    return values
