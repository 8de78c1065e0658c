"""The checkpoints of one training: whole or unseen, of this very training or moved aside, the best of them kept.

A checkpoint counts once its seal lies in it, which is written last and holds a SHA-256 of every file: one that a crash left
half written, or a disk has damaged, is passed over for the one before.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.files import write_whole

log = logging.getLogger(__name__)
_SEAL, _TRAINING, _BEFORE = "sealed.json", "training.json", "before"


@dataclass(frozen=True)
class Sealed:
    """A checkpoint that is whole.

    Attributes:
        path: Its folder.
        step: Optimizer steps that it was made after.
        facts: What ``Checkpoints.seal`` was given.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]


class Checkpoints:
    """The folder ``checkpoint-N`` lie in, as Hugging Face's trainers call them.

    Args:
        folder: Created when there is something to keep.
        identity: Of the training: its plan, its data and what it began with.
        limit: How many stay.
        keep: Called whenever a checkpoint is whole and after some went, for a folder that does not outlive the process.
    """

    def __init__(self, folder: Path, identity: str, limit: int, keep: Callable[[], None] = lambda: None) -> None:
        self._folder, self._identity, self._limit, self._keep = folder, identity, limit, keep

    def begin(self) -> None:
        """Readies the folder: what a crash left half written goes for good, what is of another training moves aside."""
        known = _json(self._folder / _TRAINING).get("identity")
        if known != self._identity:
            if any(_is_sealed(path) for path in self._paths()):
                aside = self._move_aside()
                log.warning(
                    "%s holds checkpoints of another plan, other data or another start; they were moved to %s, and training "
                    "begins anew",
                    self._folder,
                    aside,
                )
            self._write(halved=False)
        for path in self._paths():
            if not _is_sealed(path):
                shutil.rmtree(path)

    @property
    def halved(self) -> bool:
        """The training has diverged once and goes on with half the rate."""
        return bool(_json(self._folder / _TRAINING).get("halved"))

    def newest(self) -> Sealed | None:
        """The one to go on from; None where there is none that holds."""
        for path in reversed(self._paths()):
            facts = _json(path / _SEAL)
            if facts and _digests(path) == facts["files"]:
                return Sealed(path, _step(path), facts)
            log.warning("%s is damaged and passed over", path)
        return None

    def seal(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Marks a checkpoint as whole, then removes those that need not stay.

        Args:
            path: Its folder, with all of its files.
            facts: JSON; ``score`` is its evaluation, where more is better, or None.
        """
        write_whole(path / _SEAL, json.dumps({**facts, "files": _digests(path)}))
        there = [other for other in self._paths() if _is_sealed(other)]
        scores = {other: score for other in there if (score := _json(other / _SEAL).get("score")) is not None}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True) + [o for o in reversed(there) if o not in scores]
        for other in set(there) - set(ranked[: self._limit]) - {there[-1]}:
            shutil.rmtree(other)
        self._keep()

    def go_back(self, step: int) -> None:
        """Forgets what was kept after a step: the training had begun to diverge. From here on the rate is half."""
        for path in self._paths():
            if _step(path) > step:
                shutil.rmtree(path)
        self._write(halved=True)
        self._keep()

    def _write(self, *, halved: bool) -> None:
        write_whole(self._folder / _TRAINING, json.dumps({"identity": self._identity, "halved": halved}))

    def _paths(self) -> list[Path]:
        return sorted((p for p in self._folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=_step)

    def _move_aside(self) -> Path:
        number = 1
        while (aside := self._folder / (f"{_BEFORE}-{number}" if number > 1 else _BEFORE)).exists():
            number += 1
        aside.mkdir()
        for path in self._paths():
            path.rename(aside / path.name)
        return aside


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _is_sealed(path: Path) -> bool:
    return (path / _SEAL).is_file()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _SEAL:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
