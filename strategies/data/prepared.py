"""The one way from files to rows for training: read, clean, mask, group, hold out, augment; and a report of what went and why.

The same file and the same settings give the same rows. What was made is kept as long as this process lives and the files stay
as they are: a round does not compare all rows anew. With every setting at its default, rows are the file's, in its order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from protocol.data_settings import CleaningSettings
from protocol.errors import DataError
from protocol.plan import Plan
from strategies.data.augmentation import augmented
from strategies.data.cleaning import Cleaned, cleaned
from strategies.data.duplicates import near_groups
from strategies.data.fields import with_everything
from strategies.data.files import Read, stream
from strategies.data.formats import Group, Row, flagged, groups_of, renamed, spoken
from strategies.data.masking import Masker
from strategies.data.splits import hold_out, hold_out_groups

_SHOWN = 20
_KEPT_FILES, _KEPT_SPLITS = 32, 16
_OF_ROWS = (
    "on_bad_rows",
    "columns",
    "preferred",
    "group_near_duplicates",
    "cleaning",
    "masking",
    "augmentation",
    "labels",
    "evaluate_fraction",
)


@dataclass(frozen=True)
class FileReport:
    """What became of one file's rows; numbers, lines and reasons, no content.

    Attributes:
        file: Its name, without its folder.
        read: Rows that were there.
        used: Rows that are left.
        skipped: Rows that could not be used.
        why_skipped: The first of them, each with its line.
        removed: Rows that cleaning left out, by why (``strategies.data.cleaning.Cleaned``).
        changed: Rows of which cleaning took something out, by what.
        masked: What was masked, by kind.
    """

    file: str
    read: int
    used: int
    skipped: int
    why_skipped: tuple[str, ...]
    removed: Mapping[str, int]
    changed: Mapping[str, int]
    masked: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What became of all rows; stays on this machine.

    Attributes:
        files: One each.
        training, held_out: Rows (every answer of a conversation is one), before augmentation.
        like_held_out: Rows of the training file that were left out because they nearly repeat a held-out row.
        augmented: Further training rows, by how they were made.
        tasks: Rows that train and rows that are held out, by task; empty where there are none.
        replayed: Of the training rows, the general ones.
    """

    files: tuple[FileReport, ...]
    training: int
    held_out: int
    like_held_out: int
    augmented: Mapping[str, int]
    tasks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    replayed: int = 0


@dataclass(frozen=True)
class Prepared:
    """Rows that train, rows that must not, and the report.

    Of several tasks, ``training`` is what is drawn from their rows: a row may be in it several times, or not at all.
    """

    training: tuple[Row, ...]
    held_out: tuple[Row, ...]
    report: Report

    def rows(self) -> tuple[Row, ...]:
        """The training rows, each once."""
        return tuple({id(row): row for row in self.training}.values())


@dataclass(frozen=True)
class _Asked:
    """A plan, equal to every other that makes the same rows of the same files."""

    key: str
    plan: Plan = field(compare=False)


def prepare(plan: Plan, train: Path, evaluate: Path | None = None) -> Prepared:
    """Rows of a training file, and those of the held-out file or a share of the former.

    Args:
        plan: Says what is done to the rows; its own paths of data are not looked at.
        train: The training rows.
        evaluate: The held-out rows; without it ``plan.data.evaluate_fraction`` of the training rows is held out.

    Raises:
        DataError: A file cannot be read, rows cannot be used, or too few are left.
        EndpointError, ModelError, AdapterError, ConfigurationError: A writer that augments cannot be had.
    """
    return _prepared(_asked(plan, train, evaluate), train, evaluate)


def summary(report: Report) -> list[str]:
    """What a person should hear of: rows that were not used as they are, a line for each file; counts and lines, no content."""
    lines = []
    for file in report.files:
        counts = {"could not be used": file.skipped, **{f"left out ({why})": count for why, count in file.removed.items()}}
        counts |= {f"changed ({what})": count for what, count in file.changed.items()}
        said = [f"{count} {what}" for what, count in counts.items() if count]
        if file.masked:
            said.append("masked: " + ", ".join(f"{count} {kind}" for kind, count in sorted(file.masked.items())))
        if said:
            first = f"; the first: {file.why_skipped[0]}" if file.why_skipped else ""
            lines.append(f"{file.file}: of {file.read} rows " + ", ".join(said) + first)
    lines += [f"task {name}: {learnt} rows train, {held} are held out" for name, (learnt, held) in report.tasks.items()]
    if report.like_held_out:
        lines.append(f"{report.like_held_out} training rows left out: they nearly repeat held-out rows")
    return lines


def file_rows(plan: Plan, path: Path) -> tuple[list[Row], FileReport]:
    """Rows of one file, cleaned and masked as the plan says; none is held out or made.

    Raises:
        DataError: The file cannot be read, or rows cannot be used.
    """
    groups, report = file_groups(plan, path)
    return _rows(groups), report


def file_groups(plan: Plan, path: Path) -> tuple[tuple[Group, ...], FileReport]:
    """The same, with the rows of one row of the file kept together."""
    return _file(_asked(plan, path), path)


def divided(plan: Plan, train: Path, evaluate: Path | None = None) -> tuple[Sequence[Group], Sequence[Group]]:
    """What of these files trains and what is held out, as ``prepare`` has it, before further rows are made of any.

    Raises:
        DataError: As for ``prepare``.
    """
    groups, _ = file_groups(plan, train)
    if evaluate is None:
        return _split(groups, plan, train)
    held, _ = file_groups(plan, evaluate)
    return _unlike(groups, held, plan), held


@lru_cache(maxsize=_KEPT_SPLITS)
def _prepared(asked: _Asked, train: Path, evaluate: Path | None) -> Prepared:
    plan = asked.plan
    groups, report = _file(_asked(plan, train), train)
    reports, like_held_out = [report], 0
    learnt: Sequence[Group]
    held: Sequence[Group]
    if evaluate is None:
        learnt, held = _split(groups, plan, train)
    else:
        held, more = _file(_asked(plan, evaluate), evaluate)
        reports.append(more)
        learnt = _unlike(groups, held, plan)
        like_held_out = len(groups) - len(learnt)
        if not learnt:
            raise DataError(f"{train}: every row nearly repeats one of {evaluate}; nothing is left to train on")
    rows, made = _rows(learnt), Counter[str]()
    settings = plan.data.augmentation
    training = augmented(rows, settings, plan.training.seed, made) if settings.kinds else rows
    held_out = _rows(held)
    told = Report(tuple(reports), len(rows), len(held_out), like_held_out, dict(made))
    return Prepared(tuple(training), tuple(held_out), told)


@lru_cache(maxsize=_KEPT_FILES)
def _file(asked: _Asked, path: Path) -> tuple[tuple[Group, ...], FileReport]:
    plan = asked.plan
    data, told = plan.data, Cleaned()
    masker = Masker(data.masking) if data.masking.kinds or data.masking.names else None
    read = _Counted(renamed(path, stream(path), data.columns))
    known = read if data.cleaning == CleaningSettings() else flagged(read, plan)
    found: Iterator[Read] = cleaned(known, data.cleaning, told)
    if masker is not None:
        found = _masked(found, masker)
    groups, problems = groups_of(path, found, plan)
    if not groups:
        raise DataError(f"{path}: cleaning leaves none of {read.count} rows; loosen data.cleaning")
    report = FileReport(
        file=path.name,
        read=read.count,
        used=len(groups),
        skipped=len(problems),
        why_skipped=tuple(f"line {line}: {why}" for line, why in problems[:_SHOWN]),
        removed=dict(told.removed),
        changed=dict(told.changed),
        masked=dict(masker.counts) if masker else {},
    )
    return tuple(groups), report


class _Counted:
    """Counts what passes."""

    def __init__(self, found: Iterable[Read]) -> None:
        self._found = found
        self.count = 0

    def __iter__(self) -> Iterator[Read]:
        for one in self._found:
            self.count += 1
            yield one


def _masked(found: Iterable[Read], masker: Masker) -> Iterator[Read]:
    for line, row in found:
        yield line, row if isinstance(row, str) else with_everything(row, masker)


def _split(groups: Sequence[Group], plan: Plan, path: Path) -> tuple[list[Group], list[Group]]:
    """Groups that train and that are held out. Turns of one conversation stay together: later ones quote earlier ones."""
    if len(groups) < 2:
        raise DataError(f"{path}: 1 row; holding rows out needs at least 2, or a separate evaluate file")
    data, seed = plan.data, plan.training.seed
    if not data.group_near_duplicates:
        return hold_out(groups, data.evaluate_fraction, seed)
    alike = near_groups([_text(group) for group in groups], data.cleaning.similarity)
    if len(set(alike)) < 2:
        raise DataError(
            f"{path}: all {len(groups)} rows are near duplicates of each other, so none can be held out; give a separate "
            "evaluate file, or leave out data.group_near_duplicates"
        )
    held = hold_out_groups(alike, data.evaluate_fraction, seed)
    return [one for one, out in zip(groups, held, strict=True) if not out], [
        one for one, out in zip(groups, held, strict=True) if out
    ]


def _unlike(groups: Sequence[Group], held: Sequence[Group], plan: Plan) -> Sequence[Group]:
    """Groups that train beside a file of held-out ones: where near duplicates must not cross, those like none of these."""
    if not plan.data.group_near_duplicates:
        return groups
    alike = near_groups([_text(group) for group in (*held, *groups)], plan.data.cleaning.similarity)
    of_held = set(alike[: len(held)])
    return [group for group, kind in zip(groups, alike[len(held) :], strict=True) if kind not in of_held]


def _text(group: Group) -> str:
    return spoken(group.rows[-1])  # of a conversation, the whole of it


def _rows(groups: Iterable[Group]) -> list[Row]:
    return [row for group in groups for row in group.rows]


def _asked(plan: Plan, *paths: Path | None) -> _Asked:
    settings = plan.data.model_dump_json(include=set(_OF_ROWS))
    files = [*paths, *plan.data.masking.names, plan.data.augmentation.synonyms]
    return _Asked(repr((plan.objective, plan.training.seed, settings, [_stamp(path) for path in files])), plan)


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    """Changes when a file does."""
    if path is None or not path.is_file():
        return None
    told = path.stat()
    return str(path.resolve()), told.st_size, told.st_mtime_ns
