"""Files that only the holder of a key can read: AES-256-GCM (NIST SP 800-38D) in chunks, bound to what they say they are.

A sealed file is ``FEDGE-SEALED-1`` and a newline, the length of its identity (4 bytes, little-endian), its identity (JSON with
sorted keys: kind, federation, name, round or whatever tells it from others), a salt of 32 random bytes and chunks of 256 KiB,
each with a tag of 16 bytes. The file's own key is HKDF-SHA256 of the vault's key and the salt, so that no nonce is used twice
under one key however many files there are; a chunk's nonce is its number (11 bytes, big-endian) and a byte that is 1 for the
last one, and everything before the chunks is its associated data. So a chunk that was changed, moved, left out or taken from
another file does not open, nor does a file whose end is missing, nor one that is taken for another. The identity can be read
without the key; the content's length too.

A key is 32 random bytes: in Base64 on one line of a file that only its owner may read, or there under a passphrase (scrypt,
RFC 7914; its cost and salt stand beside it). Who destroys the key has destroyed every file that was sealed with it.
"""

import base64
import functools
import io
import json
import os
import re
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from protocol.durable import to_disk
from protocol.errors import VaultError, shown

Identity = Mapping[str, str | int]
KEY_BYTES: Final = 32
MAGIC: Final = b"FEDGE-SEALED-1\n"
SUFFIX: Final = ".sealed"
SHORTEST_PASSPHRASE: Final = 12
_SALT_BYTES, _TAG_BYTES, _NONCE_BYTES = 32, 16, 12
_CHUNK_BYTES = 2**18
_LONGEST_IDENTITY, _LONGEST_KEY_FILE = 4096, 4096
_OWNER_ONLY = 0o600
_KEY_WORD, _INFO = "fedge-key-1", b"fedge sealed file 1"


class Readable(Protocol):
    """Gives bytes."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class Writable(Protocol):
    """Takes bytes."""

    def write(self, content: bytes, /) -> int:
        """All of them."""


# Keys -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one guess at a passphrase costs (scrypt): ``128 * r * 2^log_n`` bytes of memory, and time in proportion to p.

    The defaults are 128 MiB and about half a second. What a file says is bounded: 1 GiB, p 16.
    """

    log_n: int = 17
    r: int = 8
    p: int = 1

    def __post_init__(self) -> None:
        fits = 10 <= self.log_n <= 24 and 1 <= self.r <= 32 and 1 <= self.p <= 16
        if not fits or self.r << (self.log_n + 7) > 2**30:
            raise VaultError(f"scrypt: found N 2^{self.log_n}, r {self.r}, p {self.p}; expected at most 1 GiB and p 16")


_COST = Cost()


def make_key_file(path: Path, passphrase: str | None = None, cost: Cost = _COST) -> None:
    """Writes a new key that only its owner may read; a file that is there is never overwritten.

    Args:
        path: Where to.
        passphrase: Without it nobody can use the file; at least 12 characters. None writes the key as it is.
        cost: Of a guess at the passphrase.

    Raises:
        VaultError: There is a file already, or the passphrase is too short.
    """
    key = os.urandom(KEY_BYTES)
    line = base64.b64encode(key).decode("ascii") if passphrase is None else _under(passphrase, key, cost)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _OWNER_ONLY)
    except FileExistsError:
        raise VaultError(f"{path}: there is a file already, and what it opens would be lost with it; name another") from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())
    to_disk(path.parent)


def read_key_file(path: Path, passphrase: str | None = None) -> bytes:
    """The 32 bytes of a key.

    Raises:
        VaultError: There is none, it is no key, others than its owner may read it, or the passphrase is missing or not its own.
    """
    content = _key_line(path)
    if not content.startswith(_KEY_WORD):
        try:
            key = base64.b64decode(content, validate=True)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise VaultError(f"{path}: no key; expected {KEY_BYTES} bytes in Base64, as fedge vault keygen writes them")
        return key
    told, _, sealed = content.rpartition(" ")
    found = re.fullmatch(rf"{_KEY_WORD} scrypt (\d{{1,2}}) (\d{{1,2}}) (\d{{1,2}}) ([A-Za-z0-9+/]{{43}}=)", told)
    if not found:
        raise VaultError(f"{path}: no key; expected a line as fedge vault keygen --passphrase-env writes it")
    if not passphrase:
        raise VaultError(
            f"{path}: is under a passphrase; name the environment variable that holds it "
            "(--passphrase-env, in a node's settings vault_passphrase_env)"
        )
    log_n, r, p = map(int, found.groups()[:3])
    derived = _derived(passphrase, base64.b64decode(found[4]), Cost(log_n, r, p))
    try:
        raw = base64.b64decode(sealed, validate=True)
        return AESGCM(derived).decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], told.encode())
    except (ValueError, InvalidTag):
        raise VaultError(f"{path}: does not open with this passphrase, or was changed; give the one it was made with") from None


def passphrase_from(variable: str | None) -> str | None:
    """A passphrase of the environment; None where no variable is named.

    Raises:
        VaultError: The variable is not set.
    """
    if variable is None:
        return None
    if not (found := os.environ.get(variable)):
        raise VaultError(f"the environment variable {shown(variable, 80)} is not set; it is to hold the vault's passphrase")
    return found


def _key_line(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise VaultError(f"{path}: is no ordinary file; fedge vault keygen makes a key")
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(_LONGEST_KEY_FILE)
    except OSError as error:
        raise VaultError(f"{path}: no readable key ({type(error).__name__}); fedge vault keygen makes one") from None
    if os.name == "posix" and mode & 0o077:
        raise VaultError(f"{path}: others than its owner may read this key (mode {mode & 0o777:o}); chmod 600 it")
    return content.decode("ascii", "replace").strip()


def _under(passphrase: str, key: bytes, cost: Cost) -> str:
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise VaultError(f"passphrase: found {len(passphrase)} characters, expected {SHORTEST_PASSPHRASE} or more; take words")
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    told = f"{_KEY_WORD} scrypt {cost.log_n} {cost.r} {cost.p} {base64.b64encode(salt).decode()}"
    sealed = AESGCM(_derived(passphrase, salt, cost)).encrypt(nonce, key, told.encode())
    return f"{told} {base64.b64encode(nonce + sealed).decode()}"


@functools.lru_cache(maxsize=4)  # a node opens its key several times in a message, and half a second each
def _derived(passphrase: str, salt: bytes, cost: Cost) -> bytes:
    # The same letters may be typed as other code points on another keyboard.
    secret = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogatepass")
    return Scrypt(salt=salt, length=KEY_BYTES, n=2**cost.log_n, r=cost.r, p=cost.p).derive(secret)


# Files ----------------------------------------------------------------------------------------------------------------------


class Vault:
    """Seals and opens with one key.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise VaultError(f"key: found {len(key)} bytes, expected {KEY_BYTES}")
        self._key = key

    @classmethod
    def at(cls, key_file: Path, passphrase_env: str | None = None) -> "Vault":
        """The vault of a key file.

        Raises:
            VaultError: As of ``read_key_file`` and ``passphrase_from``.
        """
        return cls(read_key_file(key_file, passphrase_from(passphrase_env)))

    def seal(self, content: bytes, what: Identity) -> bytes:
        """Bytes, sealed as ``what``."""
        made = io.BytesIO()
        self._sealing(made, what).end(content)
        return made.getvalue()

    def open(self, sealed: bytes, what: Identity, where: str = "sealed bytes") -> bytes:
        """What ``seal`` was given.

        Args:
            sealed: From anywhere.
            what: What it must be.
            where: Names it in errors.

        Raises:
            VaultError: It is something else, of another key, changed or cut off; nothing of it is given out.
        """
        return b"".join(self._opening(io.BytesIO(sealed), what, where))

    def write(self, path: Path, content: bytes, what: Identity) -> None:
        """Writes a sealed file, whole or not at all, for its owner's eyes alone."""
        with _whole_file(path) as file:
            self._sealing(file, what).end(content)

    def read(self, path: Path, what: Identity) -> bytes:
        """The content of a sealed file.

        Raises:
            VaultError: As of ``open``, or there is no such file.
        """
        with _existing(path) as file:
            return b"".join(self._opening(file, what, str(path)))

    def pack(self, folder: Path, path: Path, what: Identity) -> None:
        """Seals a folder, or a file, into one file, under its own name: nothing larger than a chunk is in memory.

        Raises:
            VaultError: There is something else than files and folders in it (a link, a device).
            OSError: It cannot be read, or the sealed file not be written.
        """
        if odd := next(
            (p for p in (folder, *sorted(folder.rglob("*"))) if p.is_symlink() or not (p.is_file() or p.is_dir())), None
        ):
            raise VaultError(f"{odd}: is neither file nor folder; take it away, links are not followed")
        with _whole_file(path) as file:
            sealing: Any = self._sealing(file, what)
            with tarfile.open(fileobj=sealing, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                archive.add(folder, arcname=folder.name, filter=_nobodys)
            sealing.end()

    def unpack(self, path: Path, folder: Path, what: Identity) -> None:
        """Opens what ``pack`` sealed into a folder, whose files are then for their owner's eyes alone.

        Args:
            path: The sealed file.
            folder: Where what was sealed goes, under its name; exists. What went wrong half way has left something in it, and
                whoever made it takes it away.
            what: What it must be.

        Raises:
            VaultError: As of ``open``.
        """
        with _existing(path) as file:
            content: Any = _Reader(self._opening(file, what, str(path)))
            try:
                with tarfile.open(fileobj=content, mode="r|") as archive:
                    archive.extractall(folder, filter=_private)  # noqa: S202 - it sets names and modes
            except tarfile.TarError:
                raise VaultError(f"{path}: holds no folder; it was sealed as something else") from None
            while content.read(_CHUNK_BYTES):  # what follows must hold too, the mark of the last chunk above all
                pass

    def _sealing(self, target: Writable, what: Identity) -> "_Sealing":
        told = json.dumps(dict(what), sort_keys=True).encode()
        if len(told) > _LONGEST_IDENTITY:
            raise VaultError(f"identity: {len(told):,} bytes, expected at most {_LONGEST_IDENTITY:,}")
        salt = os.urandom(_SALT_BYTES)
        head = MAGIC + len(told).to_bytes(4, "little") + told + salt
        target.write(head)
        return _Sealing(target, self._of_file(salt), head)

    def _opening(self, source: Readable, what: Identity | None, where: str) -> Iterator[bytes]:
        head, told = _head(source, where)
        if what is not None and told != dict(what):
            raise VaultError(f"{where}: is {_words(told)}; expected {_words(what)}: put the right file in its place")
        cipher, number = self._of_file(head[-_SALT_BYTES:]), 0
        chunk, following = _full(source), b"."
        while following:
            following = _full(source)
            try:
                yield cipher.decrypt(_nonce(number, last=not following), chunk, head)
            except (InvalidTag, ValueError):  # a chunk without room for a tag
                raise VaultError(
                    f"{where}: does not open: it was sealed with another key, or was changed, cut off or put together since; "
                    "give the key that it was sealed with, or put it back from a copy"
                ) from None
            chunk, number = following, number + 1

    def _of_file(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, _INFO).derive(self._key))


def is_sealed(path: Path) -> bool:
    """Whether a file begins as a sealed one does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def identity_of(path: Path) -> dict[str, str | int]:
    """What a sealed file says it is; nobody has vouched for it until it is opened.

    Raises:
        VaultError: It is no sealed file.
    """
    with _existing(path) as file:
        return _head(file, str(path))[1]


class _Sealing:
    """Takes bytes and writes sealed chunks."""

    def __init__(self, target: Writable, cipher: AESGCM, head: bytes) -> None:
        self._target, self._cipher, self._head = target, cipher, head
        self._waiting, self._number = bytearray(), 0

    def write(self, content: bytes) -> int:
        self._waiting += content
        at = 0
        while len(self._waiting) - at > _CHUNK_BYTES:  # the last chunk waits for the end, however long it is
            self._emit(bytes(self._waiting[at : at + _CHUNK_BYTES]), last=False)
            at += _CHUNK_BYTES
        del self._waiting[:at]
        return len(content)

    def end(self, content: bytes = b"") -> None:
        self.write(content)
        self._emit(bytes(self._waiting), last=True)

    def _emit(self, chunk: bytes, *, last: bool) -> None:
        self._target.write(self._cipher.encrypt(_nonce(self._number, last=last), chunk, self._head))
        self._number += 1


class _Reader:
    """Chunks as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._waiting = chunks, b""

    def read(self, size: int) -> bytes:
        parts, wanted = [self._waiting], size - len(self._waiting)
        while wanted > 0 and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            wanted -= len(chunk)
        whole = b"".join(parts)
        self._waiting = whole[size:]
        return whole[:size]


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(_NONCE_BYTES - 1, "big") + bytes([last])


def _head(source: Readable, where: str) -> tuple[bytes, dict[str, str | int]]:
    begin = source.read(len(MAGIC) + 4)
    length = int.from_bytes(begin[len(MAGIC) :], "little")
    if not begin.startswith(MAGIC) or length > _LONGEST_IDENTITY:
        raise VaultError(f"{where}: is not sealed, or not in this format; expected a file that a vault has written")
    rest = source.read(length + _SALT_BYTES)
    try:
        told = json.loads(rest[:length])
    except (ValueError, RecursionError):
        told = None
    if len(rest) < length + _SALT_BYTES or not isinstance(told, dict):
        raise VaultError(f"{where}: is cut off or damaged at its beginning; put it back from a copy")
    return begin + rest, told


def _full(source: Readable) -> bytes:
    return source.read(_CHUNK_BYTES + _TAG_BYTES)


def _words(told: Mapping[str, Any]) -> str:
    return shown(", ".join(f"{key} {value}" for key, value in sorted(told.items())), 200) or "nothing"


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whose account wrote it is nobody's concern."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _private(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo:
    found = tarfile.data_filter(member, place)
    return found.replace(mode=0o700 if found.isdir() else _OWNER_ONLY, deep=False)


@contextmanager
def _existing(path: Path) -> Iterator[IO[bytes]]:
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes into it
        raise VaultError(f"{path}: cannot be read (no ordinary file); name a sealed file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise VaultError(f"{path}: cannot be read ({error.strerror or type(error).__name__}); name a sealed file") from None
    with file:
        yield file


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # of mode 600
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        to_disk(path.parent)
    finally:
        draft.unlink(missing_ok=True)
