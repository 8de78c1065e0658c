"""What a registry keeps of one version of an adapter: digests of its files, and what it came from."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import to_jsonable_python

from protocol.errors import AdapterError, shown
from protocol.files import Stored, base_model_of
from protocol.plan import Plan

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
NUMBER = r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){0,3}"
DRAWN = r"[0-9]{1,12}-[0-9a-f]{16}"
_FILE = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,3}"
_DIGEST = "[0-9a-f]{64}"
_MOST_FILES, _LONGEST, _MOST_FIGURES = 256, 500, 256
_FIGURE = r"[A-Za-z0-9][A-Za-z0-9 ._/@-]{0,99}"

_Digest = Annotated[str, StringConstraints(pattern=f"^{_DIGEST}$")]
_Text = Annotated[str, StringConstraints(max_length=_LONGEST)]
_Reference = Annotated[str, StringConstraints(pattern=rf"^{NAME}@{NUMBER}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Frozen):
    """One file of a version."""

    sha256: _Digest
    size_bytes: int = Field(ge=0)


class Lineage(_Frozen):
    """Where a version comes from. Holds names and digests, never data or paths.

    Attributes:
        base_digest, base_model: The base that it changes, and what the adapter calls it.
        adapter_digest: ``protocol.adapter.Adapter.digest`` of its tensors.
        parents: Versions that it was made from, as NAME@VERSION.
        parent_digest: Digest of the adapter that training started from, as its manifest has it; empty if from nothing.
        data_card_digest: SHA-256 of the data card; empty where none was given.
        federation, round, num_examples: As its manifest has them.
        method: What trained it.
        plan: The whole plan without its paths; None where none was given.
    """

    base_digest: _Digest
    base_model: _Text = ""
    adapter_digest: _Digest
    parents: tuple[_Reference, ...] = Field((), max_length=64)
    parent_digest: _Text = ""
    data_card_digest: Literal[""] | _Digest = ""
    federation: _Text = ""
    round: int = Field(0, ge=0)
    num_examples: int = Field(0, ge=0)
    method: _Text = ""
    plan: dict[str, Any] | None = None


class Figures(_Frozen):
    """What was measured of a version, by whoever published it.

    Attributes:
        rows: On how many.
        values: By name, such as ``loss``.
    """

    rows: int = Field(ge=0)
    values: dict[Annotated[str, StringConstraints(pattern=f"^{_FIGURE}$")], float] = Field(
        min_length=1, max_length=_MOST_FIGURES
    )

    @field_validator("values")
    @classmethod
    def _finite(cls, values: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if math.isfinite(value)}


class Version(_Frozen):
    """What ``versions/N.json`` holds.

    Attributes:
        folder: Where its files are, under ``files/``.
        files: Digest and size by path.
        published_seconds: When, since 1970.
        figures: None where none were given.
    """

    format_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
    version: Annotated[str, StringConstraints(pattern=f"^{NUMBER}$")]
    folder: Annotated[str, StringConstraints(pattern=f"^{DRAWN}$")]
    files: dict[Annotated[str, StringConstraints(pattern=f"^{_FILE}$")], File] = Field(min_length=1, max_length=_MOST_FILES)
    lineage: Lineage
    published_seconds: int = Field(ge=0)
    figures: Figures | None = None

    @field_validator("files")
    @classmethod
    def _one_file_each(cls, files: dict[str, File]) -> dict[str, File]:
        if inside := [path for path in files for other in files if path.startswith(f"{other}/")]:
            raise ValueError(f"{inside[0]} lies in what is a file itself")
        if len({path.lower() for path in files}) < len(files):
            raise ValueError("two paths differ by upper and lower case alone")
        return files

    @property
    def reference(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def digest(self) -> str:
        """SHA-256 over paths and digests of its files: equal bytes have equal digests, 64 hex digits."""
        lines = (f"{path}:{file.sha256}\n" for path, file in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def described(source: Path) -> File:
    """Digest and size of a local file."""
    with source.open("rb") as stream:
        return File(sha256=hashlib.file_digest(stream, "sha256").hexdigest(), size_bytes=source.stat().st_size)


def sources(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise AdapterError(
                f"{folder}: {shown(name, 200)} is a link; copy the folder with what its links stand for (cp -rL)"
            )
        if path.is_dir():
            continue
        if not path.is_file() or not re.fullmatch(_FILE, name):
            raise AdapterError(
                f"{folder}: {shown(name, 200)} cannot be published; expected files with names of letters, digits, dots, "
                "hyphens and underscores, at most four folders deep"
            )
        found[name] = path
    if len(found) > _MOST_FILES:
        raise AdapterError(f"{folder}: holds {len(found)} files, more than {_MOST_FILES}; publish the adapter's own folder")
    return found


def figures_of(path: Path, folder: Path) -> Figures:
    """What ``fedge evaluate --json`` or its report says of an adapter.

    Args:
        path: A JSON file with ``rows`` and ``results``: figures by adapter, the base's beside them.
        folder: The adapter; where one alone was measured, it may have lain elsewhere.

    Raises:
        AdapterError: It is no such file, or says nothing of this adapter.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        results = {str(who): values for who, values in told["results"].items() if who != "base"}
        mine = [values for who, values in results.items() if Path(who).resolve() == folder.resolve()]
        if not mine and len(results) == 1:
            mine = list(results.values())
        if mine:
            values = {name: float(value) for name, value in mine[0].items()}
            return Figures(rows=told["rows"], values=values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{path}: no figures ({type(error).__name__}); expected what fedge evaluate --json prints, or its report.json"
        ) from None
    measured = ", ".join(shown(who, 80) for who in results) or "none"
    raise AdapterError(f"{path}: says nothing of {folder}; measured were {measured}")


def lineage_of(
    stored: Stored, base_digest: str | None, parents: Iterable[str], data_card: Path | None, plan: Plan | None
) -> Lineage:
    """What is known of where an adapter comes from.

    Raises:
        AdapterError: Its base is not named by a digest, or is another than ``base_digest``.
    """
    manifest = stored.manifest
    digest = base_digest or (manifest.base_digest if manifest else None)
    if digest is None:
        raise AdapterError(f"{stored.folder}: has no manifest that names its base by digest; give --base-model")
    if manifest and digest != manifest.base_digest:
        raise AdapterError(f"{stored.folder}: was trained on base {manifest.base_digest[:12]}, not on {digest[:12]}")
    base_model = base_model_of(stored.folder)
    if len(base_model) > _LONGEST:
        raise AdapterError(f"{stored.folder}: names a base of {len(base_model)} characters; expected at most {_LONGEST}")
    return Lineage(
        base_digest=digest,
        base_model=_without_paths(base_model),
        adapter_digest=stored.adapter.digest(),
        parents=tuple(dict.fromkeys(parents)),
        parent_digest=manifest.parent if manifest else "",
        data_card_digest=described(data_card).sha256 if data_card else "",
        federation=manifest.federation if manifest else "",
        round=manifest.round if manifest else 0,
        num_examples=manifest.num_examples if manifest else 0,
        method=plan.method if plan else ((manifest.method if manifest else "") or str(stored.settings["method"])),
        plan=to_jsonable_python(_without_paths(plan.model_dump())) if plan else None,
    )


def _without_paths(value: Any) -> Any:
    """What may be published of settings: no path of this machine, and of a name that is one its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items() if not isinstance(inner, Path)}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value if not isinstance(inner, Path)]
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or "\\" in value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
