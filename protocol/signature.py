"""Who vouches for bytes: Ed25519 (RFC 8032) keys in files, and signatures that hold for one purpose only.

A signature is made over ``fedge-signature-1``, a zero byte, its purpose, a zero byte and the content: what was signed as an
update is no bundle. It is stored as 96 bytes: the signer's key id (SHA-256 of the public key in OpenSSH's form: what
``ssh-keygen -lf`` prints) and the 64 bytes of Ed25519. Trust is a set of public keys, so that a new key can be trusted
beside the old one before the old one is dropped. Keys are files of OpenSSH (``ssh-keygen -t ed25519`` makes them
as well) or PEM.
"""

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from protocol.errors import SignatureError, shown

SIGNATURE_BYTES: Final = 96
_ID_BYTES = 32
_MAGIC = b"fedge-signature-1"
_PURPOSE = r"[a-z0-9-]{1,64}"
_OWNER_ONLY, _ANYONE_READS = 0o600, 0o644
_LONGEST_FILE = 2**16
_PEM = b"-----BEGIN"


def make_key() -> Ed25519PrivateKey:
    """A new private key from the system's source of randomness."""
    return Ed25519PrivateKey.generate()


def write_private(path: Path, key: Ed25519PrivateKey) -> None:
    """Writes a private key that only its owner may read; whatever is there stays.

    Raises:
        SignatureError: There is a file already.
    """
    _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _OWNER_ONLY)


def write_public(path: Path, key: Ed25519PublicKey, comment: str = "") -> None:
    """Writes a public key as one line of OpenSSH; whatever is there stays.

    Args:
        path: Where to.
        key: The key.
        comment: Whose it is; printable, of one line.

    Raises:
        SignatureError: There is a file already.
    """
    line = " ".join(filter(None, [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(), shown(comment, 200)]))
    _create(path, f"{line}\n".encode(), _ANYONE_READS)


def write_pair(path: Path, key: Ed25519PrivateKey, comment: str = "") -> Path:
    """Writes a private key, and its public one beside it as ``PATH.pub``: both or none.

    Args:
        path: Where the private key goes.
        key: The private key.
        comment: As of ``write_public``.

    Returns:
        Where the public key is.

    Raises:
        SignatureError: One of both files is there already.
        OSError: One cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    write_private(path, key)
    try:
        write_public(public, key.public_key(), comment)
    except BaseException:
        path.unlink()
        raise
    return public


def read_private(path: Path) -> Ed25519PrivateKey:
    """The private key of a file.

    Raises:
        SignatureError: There is none, it is no Ed25519 key without a passphrase, or others than its owner may read it.
    """
    content = _content(path, "fedge edge keygen makes one")
    if content.startswith((b"ssh-", _PEM + b" PUBLIC")):
        raise SignatureError(f"{path}: is a public key; expected the private one, which lies beside it without .pub")
    mode = path.stat().st_mode
    if mode & 0o077:
        raise SignatureError(f"{path}: others than its owner may read this private key (mode {mode & 0o777:o}); chmod 600 it")
    load = load_ssh_private_key if b"OPENSSH" in content[:64] else load_pem_private_key
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(
            f"{path}: no private Ed25519 key without a passphrase; expected one as fedge edge keygen or ssh-keygen -t ed25519 "
            "writes it"
        )
    return key


def read_trusted(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """Every public key of a file: lines of OpenSSH (empty ones and those that begin with # are passed over), or one PEM.

    Raises:
        SignatureError: There is no such file, it holds no key, or something that is no public Ed25519 key.
    """
    content = _content(path, "expected the public keys of those whom you trust, as they gave them to you").strip()
    if content.startswith(_PEM):
        return (read_public(content, path, "the file"),)
    lines = [(number, line.strip()) for number, line in enumerate(content.splitlines(), 1)]
    keys = [read_public(line, path, f"line {number}") for number, line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise SignatureError(f"{path}: holds no key; expected lines such as ssh-ed25519 AAAA... NAME")
    return tuple(keys)


def read_public(text: bytes, path: Path, where: str) -> Ed25519PublicKey:
    """The public key of one line of OpenSSH, or of a PEM.

    Args:
        text: The line.
        path: The file that it stands in, for the error.
        where: At what place there.

    Raises:
        SignatureError: It is no public Ed25519 key.
    """
    load = load_pem_public_key if text.startswith(_PEM) else load_ssh_public_key
    try:
        key = load(text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path}: {where} is no public Ed25519 key; expected ssh-ed25519 AAAA... NAME, or PEM")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """What two people compare: ``SHA256:`` and 43 characters, as ``ssh-keygen -lf`` prints it."""
    return _printed(key_id(key))


def key_id(key: Ed25519PublicKey) -> bytes:
    """SHA-256 of the public key in OpenSSH's form, 32 bytes."""
    blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split(b" ")[1]
    return hashlib.sha256(base64.b64decode(blob)).digest()


def sign(key: Ed25519PrivateKey, purpose: str, content: bytes) -> bytes:
    """The 96 bytes that vouch for ``content``; the same key, purpose and content give the same.

    Args:
        key: The signer's.
        purpose: What the content is, as ``bundle-manifest``: lower case letters, digits and hyphens.
        content: Exactly these bytes.
    """
    return key_id(key.public_key()) + key.sign(_signed(purpose, content))


def verify(signature: bytes, purpose: str, content: bytes, trusted: Iterable[Ed25519PublicKey]) -> Ed25519PublicKey:
    """Whose signature it is, if it holds.

    Args:
        signature: As ``sign`` made it; from anywhere.
        purpose: What the content is taken for.
        content: Exactly these bytes.
        trusted: Whose signatures count.

    Raises:
        SignatureError: It is none, it is of no trusted key, or of other bytes or another purpose.
    """
    by_id = {key_id(key): key for key in trusted}
    if len(signature) != SIGNATURE_BYTES:
        raise SignatureError(f"found a signature of {len(signature)} bytes; expected {SIGNATURE_BYTES}")
    signer = signature[:_ID_BYTES]
    if signer not in by_id:
        ours = ", ".join(map(_printed, by_id)) or "none"
        raise SignatureError(
            f"signed by the key {_printed(signer)}, which is not trusted here (trusted: {ours}); if its owner confirms this "
            "fingerprint, trust the key as well"
        )
    try:
        by_id[signer].verify(signature[_ID_BYTES:], _signed(purpose, content))
    except InvalidSignature:
        raise SignatureError(
            f"the signature of {_printed(signer)} does not hold for these bytes as {purpose}: they were changed, or signed as "
            "something else; get them anew"
        ) from None
    return by_id[signer]


def _signed(purpose: str, content: bytes) -> bytes:
    if not re.fullmatch(_PURPOSE, purpose):
        raise ValueError(f"purpose {purpose!r}: expected lower case letters, digits and hyphens")
    return b"\0".join([_MAGIC, purpose.encode("ascii"), content])  # no part but the last holds a zero byte


def _printed(identity: bytes) -> str:
    return "SHA256:" + base64.b64encode(identity).decode("ascii").rstrip("=")


def _content(path: Path, advice: str) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes into it
        raise SignatureError(f"{path}: is no ordinary file; {advice}")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise SignatureError(f"{path}: no readable key ({type(error).__name__}); {advice}") from None
    if len(content) > _LONGEST_FILE:
        raise SignatureError(f"{path}: longer than {_LONGEST_FILE:,} bytes; expected a key")
    return content


def _create(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never over a file that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(mode)
        _settle(draft, path)
    except FileExistsError:
        raise SignatureError(
            f"{path}: there is a file already, and what it signed or opens would be lost with it; choose another path"
        ) from None
    finally:
        draft.unlink(missing_ok=True)


def _settle(draft: Path, path: Path) -> None:
    """Gives a whole file its name; ``FileExistsError`` where that is taken."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a disk that knows no links: its name is claimed first, and then replaced
        path.touch(mode=_OWNER_ONLY, exist_ok=False)
        try:
            draft.replace(path)
        except BaseException:
            path.unlink()
            raise
