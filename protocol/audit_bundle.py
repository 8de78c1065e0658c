"""What an auditor is given of a federation: its audit log, its privacy ledger and its events without figures, signed as one.

A bundle is a folder with those files and ``manifest.json`` (the federation, the log's last hash, a SHA-256 of every file),
beside which ``manifest.sig`` holds the coordinator's signature for the purpose ``audit-bundle``. It holds no adapter, metric,
count of rows or reason in words: what an auditor needs to follow who took part, what was released and what it has cost.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.audit import FILE, Report, verify
from protocol.errors import AuditError, SignatureError, shown
from protocol.files import keep_private, whole_folder
from protocol.signature import sign
from protocol.signature import verify as verify_signature

MANIFEST: Final = "manifest.json"
_SIGNATURE, _PURPOSE = "manifest.sig", "audit-bundle"


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    federation: str
    last: str
    files: dict[str, str]


def write_bundle(target: Path, federation: str, files: Mapping[str, bytes], last: str, key: Ed25519PrivateKey) -> None:
    """Writes a bundle, whole or not at all.

    Args:
        target: A new folder.
        federation: Whose.
        files: Contents by name; the audit log is among them.
        last: Its last hash.
        key: The coordinator's.

    Raises:
        FileExistsError: There is something at the target.
    """
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    manifest = _Manifest(federation=federation, last=last, files=sums).model_dump_json(indent=2).encode()
    with whole_folder(target, replaces=False, private=True) as draft:
        for name, content in {**files, MANIFEST: manifest, _SIGNATURE: sign(key, _PURPOSE, manifest)}.items():
            (draft / name).write_bytes(content)
        keep_private(draft)


def verify_bundle(folder: Path, trusted: Collection[Ed25519PublicKey] | None, expect: str | None = None) -> Report:
    """Looks at a bundle: its signature, every file, and the log's chain.

    Args:
        folder: The bundle.
        trusted: Whose signatures count; None where signatures are not to be looked at.
        expect: As of ``protocol.audit.verify``.

    Raises:
        AuditError: Something in it is missing, was changed, is there besides, or is signed by nobody who counts.
    """
    try:
        manifest, signature = (folder / MANIFEST).read_bytes(), (folder / _SIGNATURE).read_bytes()
        told = _Manifest.model_validate_json(manifest)
        if trusted is not None:
            verify_signature(signature, _PURPOSE, manifest, trusted)
    except OSError as error:
        raise AuditError(f"{folder}: no bundle for an auditor ({error.strerror or error})") from None
    except (ValidationError, SignatureError) as error:
        why = error if isinstance(error, SignatureError) else "what it holds is no manifest"
        raise AuditError(f"{folder / MANIFEST}: does not hold ({why}); get the bundle anew") from None
    there = {path.name for path in folder.iterdir()} - {MANIFEST, _SIGNATURE}
    if odd := sorted(there ^ told.files.keys()):
        raise AuditError(f"{folder}: {shown(odd[0], 80)} is {'missing' if odd[0] in told.files else 'not of this bundle'}")
    for name, digest in told.files.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise AuditError(f"{folder / name}: is not what the manifest says; get the bundle anew")
    report = verify(folder / FILE, trusted, expect)
    if report.last != told.last:
        raise AuditError(f"{folder / FILE}: ends with {report.last[:12]}, the manifest says {told.last[:12]}")
    return report


def without_figures(event: Mapping[str, object], *, secret: bool) -> dict[str, object]:
    """One line of ``events.jsonl`` as an auditor may read it: who and when, without measures, sizes and reasons in words.

    Args:
        event: As it is kept.
        secret: Who was drawn for a round is nobody's to know; it is said of how many.
    """
    names = ("accepted", "members", "dropped", "refused", "silent", "paused")
    told = {key: event[key] for key in ("time", "event", "round", "node", "adapter", "method", "r", "stage") if event.get(key)}
    lists = {key: sorted(found) for key in names if isinstance(found := event.get(key), list | tuple | dict) and found}
    return told | {key: len(found) if secret else found for key, found in lists.items()}


def lines(events: list[dict[str, object]]) -> bytes:
    """Events as a file holds them."""
    return "".join(f"{json.dumps(event)}\n" for event in events).encode()
