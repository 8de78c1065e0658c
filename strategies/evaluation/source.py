"""Which rows are measured: those of a file, or those that training held out; and a warning where they have trained a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from protocol.errors import UserError
from protocol.mixture_settings import TaskFiles
from protocol.plan import Plan
from strategies.data.card import CARD, digest
from strategies.data.formats import Group, Row
from strategies.data.prepared import divided, file_groups


@dataclass(frozen=True)
class Source:
    """Rows to measure.

    Attributes:
        name: How a report calls them.
        groups: The rows, those of one row of the file together.
        held_out: They are a share that training held out, of a file whose other rows train.
    """

    name: str
    groups: tuple[Group, ...]
    held_out: bool = False

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [row for group in self.groups for row in group.rows]


def of_file(plan: Plan, path: Path) -> Source:
    """The rows of a file, cleaned and masked as the plan says.

    Raises:
        DataError: It cannot be read, or rows cannot be used.
    """
    return Source(path.name, file_groups(plan, path)[0])


def of_plan(plan: Plan) -> Source:
    """The rows that training with this plan holds out: its evaluate file, or a share of its training rows; of every task.

    Args:
        plan: Of one machine: it names its rows.

    Raises:
        DataError: They cannot be read, or rows cannot be used.
    """
    files = list(_files(plan).values())
    groups = [each for one in files for each in _held_out(plan, one)]
    shared = any(one.evaluate is None for one in files)
    names = ", ".join((one.evaluate or one.train).name for one in files)
    return Source(f"{names} (held-out share)" if shared else names, tuple(groups), shared)


def doubts(source: Source, plan: Plan, adapters: Sequence[Path]) -> Iterator[str]:
    """What speaks against taking these rows for unseen ones: they trained, or may have.

    The plan's own training rows are compared row by row, the data cards beside the adapters by their digests; what cannot be
    read is passed over.

    Args:
        source: What is measured.
        plan: Its data names the training rows.
        adapters: Folders.
    """
    rows = source.rows
    if not source.held_out:
        learnt = _training(plan)
        seen = sum(digest([row]) in learnt for row in rows)
        if seen:
            yield (
                f"{seen} of {len(rows)} rows of {source.name} are training rows of this job; what is measured there was "
                "learnt by heart"
            )
            return
    whole = digest(rows)
    for folder in adapters:
        told = _card(folder)
        if told.get("objective") != plan.objective:
            continue
        digests = told.get("digest", {})
        if source.held_out and digests.get("held_out") != whole:
            yield (
                f"{folder}: its data card tells of other held-out rows than this job's share (another file, seed or "
                "treatment); some of these may have trained it"
            )
        elif digests.get("training") == whole:
            yield f"{folder}: its data card says that it was trained on these very rows"


def _files(plan: Plan) -> Mapping[str, TaskFiles]:
    data = plan.data
    return data.tasks or ({"": TaskFiles(train=data.train, evaluate=data.evaluate)} if data.train else {})


def _held_out(plan: Plan, files: TaskFiles) -> Sequence[Group]:
    return file_groups(plan, files.evaluate)[0] if files.evaluate else divided(plan, files.train)[1]


def _training(plan: Plan) -> frozenset[str]:
    try:
        parts = [divided(plan, files.train, files.evaluate)[0] for files in _files(plan).values()]
    except (UserError, OSError):
        return frozenset()
    return frozenset(digest([row]) for group in chain.from_iterable(parts) for row in group.rows)


def _card(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
