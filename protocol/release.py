"""A released adapter's origin: which coordinator signed it, for which round of which run of which federation.

``signature.json`` lies in the adapter's folder. It names the SHA-256 of every file that the coordinator wrote there, and its
signature is over that and the origin in one canonical form. Whoever has the coordinator's public key needs nothing else.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from protocol.errors import AdapterError
from protocol.files import MANIFEST
from protocol.formats import CONFIG, WEIGHTS
from protocol.signature import SIGNATURE_BYTES, sign, verify

SIGNATURE: Final = "signature.json"
_PURPOSE: Final = "released-adapter"
_FILES = (WEIGHTS, CONFIG, MANIFEST)
_LONGEST = 2**20
_Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Release(BaseModel):
    """What a coordinator says of an adapter.

    Attributes:
        federation, run, round: Where it comes from.
        adapter: Which of the federation's adapters; empty where there is but one.
        digest: Of its tensors; the next round's updates name it as their parent.
        files: SHA-256 by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    federation: str
    run: str
    round: int = Field(ge=0)
    adapter: str = ""
    digest: _Sha256
    files: dict[str, _Sha256]


class _Signed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    release: Release
    signature: Annotated[str, StringConstraints(pattern=f"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}$")]


@dataclass(frozen=True)
class Checked:
    """A release whose signature and files hold.

    Attributes:
        release: What was signed.
        coordinator: The key that signed it.
        unsigned: Names of what else lies in the folder, of which the signature says nothing.
    """

    release: Release
    coordinator: Ed25519PublicKey
    unsigned: tuple[str, ...]


def sign_release(
    folder: Path, key: Ed25519PrivateKey, *, federation: str, run: str, number: int, adapter: str, digest: str
) -> None:
    """Writes ``signature.json`` beside an adapter's files.

    Args:
        folder: The adapter's.
        key: The coordinator's.
        federation: Which has made it.
        run: Which of its runs.
        number: Of the round.
        adapter: Its name there.
        digest: Of its tensors.

    Raises:
        OSError: A file cannot be read or written.
    """
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES}
    release = Release(federation=federation, run=run, round=number, adapter=adapter, digest=digest, files=files)
    signed = _Signed(release=release, signature=sign(key, _PURPOSE, _canonical(release)).hex())
    (folder / SIGNATURE).write_text(signed.model_dump_json(indent=2), encoding="utf-8")


def check_release(folder: Path, trusted: Iterable[Ed25519PublicKey]) -> Checked:
    """Where an adapter comes from.

    Args:
        folder: The adapter's.
        trusted: The coordinators whose word counts.

    Raises:
        AdapterError: It has no signature, or a file is not as it was released.
        SignatureError: No trusted key has signed what the signature speaks of.
    """
    try:
        with (folder / SIGNATURE).open("rb") as file:
            signed = _Signed.model_validate_json(file.read(_LONGEST))
    except OSError as error:
        raise AdapterError(
            f"{folder / SIGNATURE}: {error.strerror or error}; a coordinator with a key (trust.identity) releases adapters "
            "with it, so get the adapter from there"
        ) from None
    except ValidationError:
        raise AdapterError(f"{folder / SIGNATURE}: is no signature of a release; get the adapter anew") from None
    release = signed.release
    key = verify(bytes.fromhex(signed.signature), _PURPOSE, _canonical(release), trusted)
    if WEIGHTS not in release.files:
        raise AdapterError(f"{folder}: what was signed holds no {WEIGHTS}")
    for name, digest in release.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise AdapterError(f"{path}: is not as it was released; get the adapter anew")
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return Checked(release, key, tuple(sorted(others - release.files.keys() - {SIGNATURE})))


def _canonical(release: Release) -> bytes:
    return json.dumps(release.model_dump(), sort_keys=True, separators=(",", ":")).encode()
