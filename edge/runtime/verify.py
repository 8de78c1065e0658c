"""Nothing of a bundle is opened before its signature, every file's size and every file's digest hold.

Order: the bytes of ``manifest.json`` are read once and bounded; the signature over exactly these bytes; only then they are
parsed; the version; what lies in the folder (nothing unlisted, no link, nothing but files and folders); sizes; digests, in
constant memory. ONNX graphs, tokenizers and ``.onnx_adapter`` files are parsed by native code that was not written for
hostile input: it sees them after their digests hold, so whoever holds a trusted key is trusted with that code.

What is promised: the files were the signed ones when they were read here. Manifest and signature are used from the bytes that
were checked, and ``content`` gives any other file that fits into memory in the same way. A graph and its weights are opened
by path afterwards: somebody who may write to the folder in between can change them, so it must belong to whom runs the model.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.runtime.manifest import MANIFEST, MOST_BYTES, PURPOSE, SIGNATURE, BundleManifest, File, parsed
from edge.runtime.opened_versions import highest
from protocol.errors import BundleError, shown
from protocol.signature import SIGNATURE_BYTES, verify

CHUNK_BYTES: Final = 2**20


def verified(
    folder: Path,
    trusted: Iterable[Ed25519PublicKey],
    *,
    lowest_version: int = 0,
    state: Path | None = None,
    name: str | None = None,
) -> BundleManifest:
    """The manifest of a bundle of which every byte is as it was signed.

    Args:
        folder: The bundle. Of a link to it, take ``Path.resolve`` first: it may lead elsewhere when the model is opened.
        trusted: Whose signatures count; several while a key is being replaced.
        lowest_version: Older ones are refused.
        state: Where this device remembers the highest version that it opened (``opened_versions``); None: nowhere.
        name: The one bundle that is expected here; None: any that is signed.

    Raises:
        BundleError: Anything does not hold; ``SignatureError`` where it is the signature. Nothing else is raised.
    """
    try:
        manifest, _, _ = signed_manifest(folder, trusted)
        if name is not None and manifest.name != name:
            raise BundleError(f"{folder}: is a bundle {manifest.name}; expected {name}")
        check_version(folder, manifest, lowest_version, state)
        check_listing(folder, manifest, whole=True)
        for path, file in manifest.files.items():
            _check_digest(folder, path, file)
    except (OSError, ValueError) as error:  # ValueError: a path that no system has
        raise BundleError(f"{folder}: not readable ({type(error).__name__}: {shown(str(error), 200)})") from None
    return manifest


def signed_manifest(folder: Path, trusted: Iterable[Ed25519PublicKey]) -> tuple[BundleManifest, bytes, bytes]:
    """The manifest, its bytes and its signature, where a trusted key has made it. No other file is looked at.

    Raises:
        BundleError: One of both files is missing or is not what it should be; ``SignatureError`` where it is the signature.
    """
    content = _bounded(folder, MANIFEST, MOST_BYTES)
    signature = _bounded(folder, SIGNATURE, SIGNATURE_BYTES)
    try:
        verify(signature, PURPOSE, content, trusted)
        return parsed(content), content, signature
    except BundleError as error:  # of bytes that know no place
        raise type(error)(f"{folder}: {error}") from None


def check_version(folder: Path, manifest: BundleManifest, lowest: int, state: Path | None) -> None:
    """Refuses, as ``BundleError``, what is older than ``lowest`` or than what the device has opened."""
    opened = highest(state, manifest.name) if state else 0
    if manifest.version < max(lowest, opened):
        why, back = f"{lowest} is the lowest that is allowed", ""
        if opened >= lowest:
            why, back = f"this device has opened {opened}", ", or go back on purpose with --any-version (state=None)"
        raise BundleError(f"{folder}: is version {manifest.version} of {manifest.name}, and {why}; get the newer bundle{back}")


def check_listing(folder: Path, manifest: BundleManifest, *, whole: bool) -> frozenset[str]:
    """Which of the manifest's files lie in a folder, each of the right size; no file is opened.

    Args:
        folder: A bundle, or an update, which lacks some.
        manifest: Signed.
        whole: Whether a missing file is an error.

    Raises:
        BundleError: There is something else, a link, a device, or a file of another size.
    """
    folders = {parent.as_posix() for path in manifest.files for parent in Path(path).parents}
    found = set()
    for path, kind in _entries(folder):
        listed = manifest.files.get(path)
        if stat.S_ISDIR(kind.st_mode) and path in folders:
            continue
        if listed is None and path not in (MANIFEST, SIGNATURE):
            raise BundleError(f"{folder}: holds {shown(path, 200)}, which its manifest does not list; remove it")
        if not stat.S_ISREG(kind.st_mode):
            raise BundleError(f"{folder}: {path} is a link, a folder or a device; expected a file")
        if listed:
            if kind.st_size != listed.size_bytes:
                raise BundleError(
                    f"{folder}: {path} has {kind.st_size:,} bytes; the manifest says {listed.size_bytes:,}; get the bundle anew"
                )
            found.add(path)
    missing = manifest.files.keys() - found
    if whole and missing:
        raise BundleError(f"{folder}: {min(missing)} is missing ({len(missing)} of {len(manifest.files)} files are)")
    return frozenset(found)


def content(folder: Path, manifest: BundleManifest, path: str) -> bytes:
    """The bytes of one file, checked after they were read: what is parsed is what was signed.

    Args:
        folder: A bundle.
        manifest: What ``verified`` gave.
        path: One of its files, small enough for memory.

    Raises:
        BundleError: It is not listed, or not as it was signed.
    """
    if path not in manifest.files:
        raise BundleError(f"{folder}: its manifest lists no {shown(path, 200)}")
    try:
        return b"".join(chunks(folder, path, manifest.files[path]))
    except OSError as error:
        raise BundleError(f"{folder}: {path} is not readable ({type(error).__name__})") from None


def chunks(folder: Path, path: str, file: File) -> Iterator[bytes]:
    """The bytes of a file, 1 MiB at a time; that they are the signed ones is certain when the last one was taken.

    Raises:
        BundleError: They are not.
        OSError: It cannot be read.
    """
    sha, left = hashlib.sha256(), file.size_bytes
    with regular(folder / path) as stream:
        while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
            sha.update(chunk)
            left -= len(chunk)
            yield chunk
        longer = bool(stream.read(1))
    if left or longer or sha.hexdigest() != file.sha256:
        raise BundleError(f"{folder}: {path} is not as it was signed (its SHA-256 differs); get the bundle anew")


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading: no link is followed, and nothing that is no file is waited for.

    Raises:
        BundleError: It is a link, a folder or a device.
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BundleError(f"{path}: is a link, a folder or a device; expected a file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb", buffering=0) as stream:
        yield stream


def _check_digest(folder: Path, path: str, file: File) -> None:
    for _ in chunks(folder, path, file):
        pass


def _bounded(folder: Path, name: str, most: int) -> bytes:
    path = folder / name
    try:
        with regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            found = b"" if size > most else stream.read(most + 1)
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file; expected the folder of a bundle") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable ({type(error).__name__})") from None
    if max(size, len(found)) > most:
        raise BundleError(f"{path}: {size:,} bytes long; expected at most {most:,}")
    return found


def _entries(folder: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder and its folders, links unfollowed, by path; no deeper than who reads this goes on."""
    with os.scandir(folder / below) as entries:
        for entry in entries:
            path = f"{below}{entry.name}"
            kind = entry.stat(follow_symlinks=False)
            yield path, kind
            if stat.S_ISDIR(kind.st_mode):
                yield from _entries(folder, f"{path}/")
