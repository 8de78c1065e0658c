"""Writes bundles and updates: whole or not at all, and the same inputs to the same bytes.

An update is a bundle without the files that the device has already: its manifest and signature are the new bundle's own, so
there is nothing else to sign, and it goes onto any older version that holds the files which it lacks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from edge.runtime.manifest import MANIFEST, PURPOSE, REPORT, SIGNATURE, BundleManifest, Description, File, Parity, written
from edge.runtime.update import check_room, placed
from edge.runtime.verify import check_listing, chunks, signed_manifest, verified
from protocol.errors import BundleError, shown
from protocol.files import whole_folder
from protocol.signature import make_key, sign

# Opens a bundle as a device does, with the key that it is given: figures by adapter id and base, and a report for people.
Judge = Callable[[Path, Ed25519PublicKey], tuple[Mapping[str, Parity], str]]


def write_bundle(
    target: Path,
    description: Description,
    content: Mapping[str, Path | bytes],
    key: Ed25519PrivateKey,
    judge: Judge | None = None,
) -> BundleManifest:
    """Writes a signed bundle.

    With a judge it is whole under a temporary name first, signed with a key that nobody trusts and that is thrown away. What
    the judge raises ends the writing before ``key`` has signed anything; what it returns becomes the manifest's parity and
    ``parity.md``. It leaves nothing in the folder that it is given.

    Args:
        target: Its folder, which is not there yet.
        description: Its manifest but for the files.
        content: Every other file by its path in the bundle: where it is now, or its bytes.
        key: The signer's.
        judge: Opens and compares it; None for what was compared already.

    Returns:
        What was signed.

    Raises:
        BundleError: Something is there already, a file is missing or cannot be part of a bundle, or the disk is too small.
        OSError: It cannot be written; then nothing is.
    """
    check_new(target)
    sizes = {path: _size(path, source) for path, source in content.items()}
    manifest_of(description, {path: File(sha256="0" * 64, size_bytes=size) for path, size in sizes.items()})  # before work
    check_room(target, sum(sizes.values()))
    with _whole(target) as draft:
        files = {path: placed(draft / path, _pieces(source)) for path, source in sorted(content.items())}
        if judge:
            once = make_key()
            _seal(draft, manifest_of(description, files), once)
            parity, report = judge(draft, once.public_key())
            description = description.model_copy(update={"parity": dict(parity)})
            files[REPORT] = placed(draft / REPORT, [report.encode()])
        manifest = manifest_of(description, files)
        _seal(draft, manifest, key)
        check_listing(draft, manifest, whole=True)
    return manifest


def manifest_of(description: Description, files: Mapping[str, File]) -> BundleManifest:
    """A description with its files.

    Raises:
        BundleError: They do not go together: a path that no bundle has, no tokenizer, an adapter without tensors.
    """
    fields = {name: getattr(description, name) for name in Description.model_fields}
    try:
        return BundleManifest(**fields, files=dict(files))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = shown(".".join(map(str, first["loc"])), 120) or "the bundle"
        raise BundleError(f"{where}: {shown(first['msg'], 200)}") from None


@dataclass(frozen=True)
class Difference:
    """What changes from one bundle to another.

    Attributes:
        described: Fields of the manifest that differ, files aside.
        added, changed, removed: Paths.
        update_bytes: What an update carries: files whose bytes the old bundle holds nowhere, manifest and signature aside.
        whole_bytes: All files of the new one.
    """

    described: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    update_bytes: int
    whole_bytes: int


def difference(old: BundleManifest, new: BundleManifest) -> Difference:
    """Compares two bundles by their manifests."""
    there, then = old.files, new.files
    return Difference(
        described=tuple(name for name in Description.model_fields if getattr(old, name) != getattr(new, name)),
        added=tuple(sorted(then.keys() - there.keys())),
        changed=tuple(sorted(path for path in then.keys() & there.keys() if then[path] != there[path])),
        removed=tuple(sorted(there.keys() - then.keys())),
        update_bytes=sum(new.files[path].size_bytes for path in _lacking(old, new)),
        whole_bytes=new.size_bytes,
    )


def write_update(target: Path, old: Path, new: Path, trusted: Iterable[Ed25519PublicKey]) -> Difference:
    """Writes what a device that has ``old`` needs for ``new``: the changed files and the new manifest with its signature.

    Args:
        target: Folder of the update, which is not there yet.
        old: A signed bundle; only its manifest is read.
        new: A later version of it.
        trusted: Who signed both.

    Raises:
        BundleError: One of both does not hold, they are of different names, ``new`` is not newer, or ``target`` is there
            already or lies in one of them.
        OSError: It cannot be written; then nothing is.
    """
    check_new(target, old, new)
    keys = tuple(trusted)
    (before, _, _), (after, _, _) = signed_manifest(old, keys), signed_manifest(new, keys)
    if after.name == before.name and after.version <= before.version:
        than = "older than" if after.version < before.version else "the same as"
        raise BundleError(
            f"{new}: is version {after.version}, {than} version {before.version} in {old}; the bundle that devices have comes "
            "first, the later one second"
        )
    after = verified(new, keys, name=before.name, lowest_version=before.version + 1)
    _, content, signature = signed_manifest(new, keys)
    told = difference(before, after)
    check_room(target, told.update_bytes)
    with _whole(target) as draft:
        for path in _lacking(before, after):
            placed(draft / path, chunks(new, path, after.files[path]))
        placed(draft / MANIFEST, [content])
        placed(draft / SIGNATURE, [signature])
    return told


def _lacking(old: BundleManifest, new: BundleManifest) -> list[str]:
    held = {file.sha256 for file in old.files.values()}
    return sorted(path for path, file in new.files.items() if file.sha256 not in held)


def _seal(draft: Path, manifest: BundleManifest, key: Ed25519PrivateKey) -> None:
    content = written(manifest)
    for path, piece in ((MANIFEST, content), (SIGNATURE, sign(key, PURPOSE, content))):
        (draft / path).unlink(missing_ok=True)
        placed(draft / path, [piece])


def check_new(target: Path, *sources: Path) -> None:
    """Makes sure that there is nothing at ``target`` yet, and that it would lie in none of the bundles that it is made from.

    Raises:
        BundleError: Something is, or it would.
    """
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target}: is there already; bundles do not change, so name another folder or remove it")
    for source in sources:
        if target.resolve().is_relative_to(source.resolve()):
            raise BundleError(
                f"{target}: lies in {source}, which would hold more than its manifest lists; name a folder beside it"
            )


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target``, unless another writer was faster."""
    try:
        with whole_folder(target, replaces=False) as draft:
            yield draft
    except FileExistsError:
        check_new(target)
        raise


def _size(path: str, source: Path | bytes) -> int:
    if isinstance(source, bytes):
        return len(source)
    if not source.is_file():
        raise BundleError(f"{source}: no such file; it was to become {shown(path, 200)} of the bundle")
    return source.stat().st_size


def _pieces(source: Path | bytes) -> Iterable[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while chunk := stream.read(2**20):
            yield chunk
