"""An adapter on disk: its two files (``protocol.formats``) and a manifest beside them.

A folder appears whole or not at all: it is written under a temporary name beside its place and renamed. bfloat16, which
numpy does not have, is widened to float32 on reading (exactly).
"""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from protocol.adapter import Adapter, Array
from protocol.codec import encode
from protocol.configuration import parse
from protocol.errors import AdapterError, BaseMismatchError, shown
from protocol.formats import CONFIG, WEIGHTS, understood, written
from protocol.manifest import Manifest
from protocol.plan import QUANTISED, Plan

MANIFEST = "manifest.json"

_OWNERS_FOLDER, _OWNERS_FILE = 0o700, 0o600
_ABANDONED_SECONDS = 24 * 3600
_NAME = re.compile("[!-~]{1,300}")  # no longer than any base's, and none that steers a terminal
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@contextmanager
def whole_folder(target: Path, *, replaces: bool = True, private: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Args:
        target: Where to.
        replaces: Whether it takes the place of a folder that is there. Else nothing may be, not even when the block ends.
        private: Whether it is for its owner's eyes alone.

    Raises:
        FileExistsError: There is something that is not to be replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield draft
        if private:
            keep_private(draft)
        else:
            draft.chmod(0o755)
        if replaces:
            _swap(draft, target)
        else:
            _place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def private_folder(path: Path) -> None:
    """Makes a folder that only its owner may look into; one that is there is closed to others, those above it are not."""
    if not path.parent.exists():
        private_folder(path.parent)
    path.mkdir(exist_ok=True)
    path.chmod(_OWNERS_FOLDER)


def keep_private(folder: Path) -> None:
    """Closes a folder and all in it to others than its owner; links are left alone."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with suppress(FileNotFoundError):  # a draft of another that has its name now
                path.chmod(_OWNERS_FOLDER if path.is_dir() else _OWNERS_FILE)


def sweep(target: Path) -> None:
    """Removes what writers of ``target`` that were killed left beside it: nobody works on it any more after a day."""
    ours = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}")  # as tempfile names them
    for left in target.parent.glob(".*"):
        with suppress(OSError):
            kind = left.lstat()
            if ours.fullmatch(left.name) and stat.S_ISDIR(kind.st_mode) and time.time() - kind.st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)


def _place(draft: Path, target: Path) -> None:
    """A rename fails where there is a full folder, or a file, since a moment ago: of two writers the first one stays."""
    try:
        if not os.path.lexists(target):  # an empty folder would be replaced
            draft.rename(target)
            return
    except OSError:
        if not os.path.lexists(target):
            raise
    raise FileExistsError(errno.EEXIST, "is there already", str(target))


def _swap(draft: Path, target: Path) -> None:
    """A folder cannot be renamed over a full one: the old one steps aside, and comes back if the new one cannot come in."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    old = aside / target.name
    try:
        if target.exists():
            target.replace(old)
        draft.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


@contextmanager
def full_disks() -> Iterator[None]:
    """What safetensors cannot write is an OSError, as it is of everybody else."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from None


def write_whole(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Writes a file under a temporary name and renames it: readers see the old file or the new one.

    Raises:
        OSError: It cannot be written, or what is there is no file: a device would be replaced by one.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is there already and no ordinary file; name another", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(mode)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def write_adapter(folder: Path, adapter: Adapter, manifest: Manifest, plan: Plan) -> None:
    """Writes a folder that ``peft.PeftModel.from_pretrained`` loads, where PEFT has the method.

    Args:
        folder: Where to; replaced whole if it is there.
        adapter: Float tensors; stored as float32.
        manifest: Stored beside it.
        plan: What it was trained with; its method, that method's settings, its task and its base are stored.

    Raises:
        AdapterError: A value does not fit float32.
    """
    with whole_folder(folder) as draft:
        save_adapter(draft, adapter, manifest, plan)


def save_adapter(folder: Path, adapter: Adapter, manifest: Manifest, plan: Plan) -> None:
    """The three files of ``write_adapter`` into a folder that exists already (a draft of something larger)."""
    tensors, config = written(encode(adapter, "fp32"), plan, manifest.embeddings)
    with full_disks():
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """What an adapter's folder holds.

    Attributes:
        folder: Where it was read.
        adapter: The adapter.
        manifest: Its description if there is one (plain PEFT writes none).
        settings: Of a plan that uses it: ``method``, and that method's section.
        task_type: PEFT's name of the task; empty where the folder does not say.
    """

    folder: Path
    adapter: Adapter
    manifest: Manifest | None
    settings: Mapping[str, Any]
    task_type: str

    def on(self, plan: Plan) -> Plan:
        """A plan to use this adapter with: its method and that method's settings, all else as in ``plan``.

        Raises:
            AdapterError: The plan is for another task.
            ConfigurationError: The base is held in a way that the method does not go with.
        """
        if self.task_type not in ("", plan.task_type):
            raise AdapterError(
                f"{self.folder}: an adapter for {self.task_type}, and objective {plan.objective} is {plan.task_type}; name an "
                "adapter that was trained for this objective, or the objective that it was trained for"
            )
        settings = dict(self.settings)
        if settings["method"] == "lora" and plan.precision in QUANTISED:
            settings["method"] = "qlora"
        objectives = {"head", "dpo", "kto", "rl", "distillation", "ai_feedback"}
        kept = plan.model_dump(include={"base_model", "objective", "precision", "data", *objectives})
        kept["training"] = {"seed": plan.training.seed, "batch_size": plan.training.batch_size}
        return parse(kept | settings, Plan, source=str(self.folder))


def read_stored(folder: Path, *, base_digest: str | None = None) -> Stored:
    """Reads what this project or plain PEFT wrote.

    Args:
        folder: Holds ``adapter_model.safetensors`` and ``adapter_config.json``.
        base_digest: When given, an adapter whose manifest names another base is refused.

    Raises:
        AdapterError: A file is missing or is not what it should be.
        BaseMismatchError: The adapter belongs to another base.
    """
    config, manifest = _read_json(folder / CONFIG), _read_manifest(folder)
    if manifest and base_digest and manifest.base_digest != base_digest:
        raise BaseMismatchError(
            f"{folder}: this adapter was trained on base {manifest.base_digest[:12]}, the base model here is "
            f"{base_digest[:12]}; load the base that it was trained on, or train it anew"
        )
    found = understood(_read_tensors(folder / WEIGHTS), config, folder)
    return Stored(folder, found.adapter, manifest, found.settings, found.task_type)


def read_adapter(folder: Path, *, base_digest: str | None = None) -> tuple[Adapter, Manifest | None]:
    """The adapter of ``read_stored``, and its manifest."""
    stored = read_stored(folder, base_digest=base_digest)
    return stored.adapter, stored.manifest


def base_model_of(folder: Path) -> str:
    """The base that an adapter names in its ``adapter_config.json``.

    Raises:
        AdapterError: There is no such file, or it names none.
    """
    name = _read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{folder / CONFIG}: names no base_model_name_or_path; say which base it belongs to")
    return name


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.model_validate(_read_json(path))
    except ValueError as error:
        raise AdapterError(f"{path}: not a manifest of format version 1 ({type(error).__name__})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; expected a folder with {WEIGHTS} and {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: found a JSON {type(content).__name__}; expected an object")
    return content


def _read_tensors(path: Path) -> dict[str, Array]:
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; expected a folder with {WEIGHTS} and {CONFIG}") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: not a safetensors file ({type(error).__name__})") from None
    tensors = {}
    for name, entry in entries:
        if not _NAME.fullmatch(name):
            raise AdapterError(f"{path}: a tensor is named {shown(name, 80)!r}; expected at most 300 visible ASCII characters")
        if entry["dtype"] not in _DTYPES:
            raise AdapterError(f"{path}: {name} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        raw = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            if not np.isfinite(raw.astype(np.float32)).all():
                raise AdapterError(f"{path}: {name} holds NaN or infinite values, or some that float32 has not")
        tensors[name] = raw
    return tensors
