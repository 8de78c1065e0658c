"""From a bundle and an update to the next verified bundle, on the device: the old one stays as it is.

Killed at any moment, there is the old bundle, or the old and the new one; what was half made lies under a name that begins
with a dot, and is removed by a later update. Files that did not change are hard links where the disk knows them: an update
costs what it carries.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.runtime.manifest import MANIFEST, SIGNATURE, BundleManifest, File
from edge.runtime.verify import check_listing, check_version, chunks, signed_manifest, verified
from protocol.durable import to_disk
from protocol.errors import BundleError, shown
from protocol.files import sweep, whole_folder

_SPARE_BYTES = 2**20  # manifest, signature, folders


def apply_update(
    old: Path,
    update: Path,
    target: Path,
    trusted: Iterable[Ed25519PublicKey],
    *,
    lowest_version: int = 0,
    state: Path | None = None,
    copies: bool = False,
) -> BundleManifest:
    """Makes the next version of a bundle; ``old`` is only read.

    Applied a second time it checks what is there and changes nothing.

    Args:
        old: The bundle that the device has.
        update: As ``edge.bundle.write_update`` made it, or a whole bundle; from anywhere.
        target: Folder of the new bundle, beside the old one.
        trusted: Whose signatures count.
        lowest_version: As of ``verify.verified``.
        state: As of ``verify.verified``.
        copies: Whether unchanged files are copied. Else both bundles share them: who writes into one damages the other.

    Returns:
        The new bundle's manifest; every byte of it was checked.

    Raises:
        BundleError: Anything does not hold, the update is not newer or lacks a file that ``old`` has not, or the disk is too
            small; then ``target`` is not there.
    """
    keys = tuple(trusted)
    try:
        before, _, _ = signed_manifest(old, keys)
        after, content, signature = signed_manifest(update, keys)
        if after.name != before.name or after.version <= before.version:
            raise BundleError(
                f"{update}: is version {after.version} of {after.name}; expected one after version {before.version} of "
                f"{before.name}"
            )
        check_version(update, after, lowest_version, state)
        if target.exists():
            return _applied(target, content, keys)
        _check_outside(target, old, update)
        carried = check_listing(update, after, whole=False)
        kept = _kept(old, before, after, carried)
        sweep(target)
        with whole_folder(target, replaces=False) as draft:
            _keep(old, draft, after, kept, copies=copies)
            check_room(target, sum(after.files[path].size_bytes for path in carried))
            for path in sorted(carried):
                placed(draft / path, chunks(update, path, after.files[path]))
            placed(draft / MANIFEST, [content])
            placed(draft / SIGNATURE, [signature])
            _check_whole(draft, old, keys)
            for folder in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
                to_disk(folder)
        to_disk(target.parent)
    except OSError as error:
        raise BundleError(f"{target}: the update was not applied ({type(error).__name__}: {shown(str(error), 200)})") from None
    return after


def placed(path: Path, pieces: Iterable[bytes]) -> File:
    """Writes one file through to the disk; its digest and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for piece in pieces:
            stream.write(piece)
            sha.update(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    path.chmod(0o644)
    return File(sha256=sha.hexdigest(), size_bytes=size)


def check_room(target: Path, size_bytes: int) -> None:
    """Raises ``BundleError`` where the disk has less than that many bytes, and 1 MiB, left."""
    there = next(folder for folder in (target.parent, *target.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < size_bytes + _SPARE_BYTES:
        raise BundleError(f"{there}: {free:,} bytes are free, and {size_bytes + _SPARE_BYTES:,} are needed; make room")


def _applied(target: Path, content: bytes, keys: tuple[Ed25519PublicKey, ...]) -> BundleManifest:
    there, found, _ = signed_manifest(target, keys)
    if found != content:
        raise BundleError(f"{target}: holds version {there.version} of {there.name}; name another folder for the new bundle")
    return verified(target, keys)


def _check_outside(target: Path, *others: Path) -> None:
    for other in others:
        if target.resolve().is_relative_to(other.resolve()):
            raise BundleError(
                f"{target}: lies in {other}, which would hold more than its manifest lists; name a folder beside it"
            )


def _check_whole(draft: Path, old: Path, keys: tuple[Ed25519PublicKey, ...]) -> None:
    try:
        verified(draft, keys)
    except BundleError as error:  # what the update carried was checked when it was copied
        raise BundleError(f"{old}: a file that the update builds upon is damaged ({error}); get the whole bundle") from None


def _kept(old: Path, before: BundleManifest, after: BundleManifest, carried: Iterable[str]) -> dict[str, str]:
    """Where the old bundle holds each file that the update does not carry."""
    held = {file.sha256: path for path, file in before.files.items()}
    wanted = after.files.keys() - set(carried)
    if lacking := [path for path in wanted if after.files[path].sha256 not in held]:
        raise BundleError(
            f"{old}: version {before.version} has not {min(lacking)}, which the update does not carry ({len(lacking)} files); "
            f"get an update from version {before.version}, or the whole bundle"
        )
    return {path: held[after.files[path].sha256] for path in wanted}


def _keep(old: Path, draft: Path, after: BundleManifest, kept: Mapping[str, str], *, copies: bool) -> None:
    for path, source in sorted(kept.items()):
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        if copies or not _linked(old / source, draft / path):
            check_room(draft, after.files[path].size_bytes)
            placed(draft / path, chunks(old, source, after.files[path]))


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another disk, or one that knows no links
        return False
    return True
