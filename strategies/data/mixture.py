"""Which rows train side by side: tasks drawn by a temperature over their sizes, and general rows replayed beside them.

Of tasks with ``n_i`` rows the next row is one of task i with probability ``n_i^(1/T) / sum_j n_j^(1/T)`` (Raffel et al. 2020,
arXiv:1910.10683, section 3.5.2): in proportion to the sizes at temperature 1, evenly at a large one. Within a task each row is
read once before any is read again. Rows of earlier or general data that are trained on beside new ones keep a model from losing
what it knew of them (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from protocol.errors import DataError
from protocol.mixture_settings import TaskFiles
from protocol.plan import Plan
from strategies.data.files import stream
from strategies.data.formats import Row
from strategies.data.prepared import FileReport, Prepared, Report, file_rows, prepare
from strategies.data.splits import read_on

T = TypeVar("T")


@dataclass(frozen=True)
class Gathered:
    """The rows of a training.

    Attributes:
        prepared: All that train, all that are held out, and what became of every file.
        tasks: The held-out ones by task; empty where there are no tasks.
    """

    prepared: Prepared
    tasks: Mapping[str, Sequence[Row]]


def gathered(plan: Plan, sources: Mapping[str, TaskFiles], replay: Path | None = None, wanted: int = 0) -> Gathered:
    """Reads every file and mixes them.

    Args:
        plan: Says what is done to rows, and in which proportion they train.
        sources: The files of every task; those of a training without tasks under an empty name.
        replay: General rows; none of them is held out.
        wanted: Rows that training is going to take; see ``mixed``.

    Raises:
        UserError: As ``strategies.data.prepared.prepare``.
    """
    parts = {name: prepare(plan, files.train, files.evaluate) for name, files in sources.items()}
    if len(parts) == 1 and replay is None:
        return Gathered(next(iter(parts.values())), {})
    reports = [part.report for part in parts.values()]
    general, more = _replayed(replay, plan) if replay else ([], None)
    report = Report(
        files=(*itertools.chain.from_iterable(each.files for each in reports), *([more] if more else ())),
        training=sum(each.training for each in reports) + len(general),
        held_out=sum(each.held_out for each in reports),
        like_held_out=sum(each.like_held_out for each in reports),
        augmented=sum((Counter(each.augmented) for each in reports), Counter()),
        tasks={name: (part.report.training, part.report.held_out) for name, part in parts.items() if len(parts) > 1},
        replayed=len(general),
    )
    training = mixed({name: part.training for name, part in parts.items()}, general, plan, wanted)
    held_out = tuple(itertools.chain.from_iterable(part.held_out for part in parts.values()))
    return Gathered(
        Prepared(tuple(training), held_out, report), {name: part.held_out for name, part in parts.items() if len(parts) > 1}
    )


def _replayed(replay: Path, plan: Plan) -> tuple[list[Row], FileReport]:
    try:
        return file_rows(general_plan(replay, plan), replay)
    except DataError as error:
        beside = "" if plan.objective == "sft" else f"\nplain text replays beside sft only; {plan.objective} needs its own rows"
        raise DataError(f"data.replay: {error}{beside}") from None


def proportions(sizes: Sequence[int], temperature: float) -> list[float]:
    """The probability of each task, from its number of rows; they sum to 1.

    Args:
        sizes: Rows of each task, at least 1.
        temperature: Above 0.
    """
    largest = max(sizes)
    weights = [math.exp(math.log(size / largest) / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def drawn(sizes: Sequence[int], temperature: float, count: int, seed: int) -> list[tuple[int, int]]:
    """Which task and which of its rows comes next, ``count`` times; the same seed draws the same."""
    tasks = random.Random(f"{seed}/tasks").choices(range(len(sizes)), proportions(sizes, temperature), k=count)  # noqa: S311
    rows = [read_on(size, 0, seed) for size in sizes]
    return [(task, next(rows[task])) for task in tasks]


def mixed(tasks: Mapping[str, Sequence[T]], general: Sequence[T], plan: Plan, wanted: int = 0) -> list[T]:
    """The rows of one pass over a mixture: as many draws as the tasks have rows, and the general rows' share beside them.

    One task alone is each of its rows, in their order; with general rows beside it, each of its rows once, shuffled with them.

    Args:
        tasks: Training rows by name.
        general: Rows to replay; none is a share of none.
        plan: Its ``data`` and its seed.
        wanted: Rows that training is going to take: where that is more than one pass, new draws go on in place of old ones.
    """
    rows, seed, share = list(tasks.values()), plan.training.seed, plan.data.replay_share if general else 0.0
    if len(rows) == 1 and not general:
        return list(rows[0])
    count = max(sum(map(len, rows)), math.ceil(wanted * (1 - share)))
    made = [rows[task][at] for task, at in drawn([len(each) for each in rows], plan.data.temperature, count, seed)]
    if general:
        beside = max(1, round(count * share / (1 - share)))
        made += [general[at] for at in itertools.islice(read_on(len(general), 0, seed), beside)]
        random.Random(f"{seed}/replay").shuffle(made)  # noqa: S311
    return made


def general_plan(path: Path, plan: Plan) -> Plan:
    """The plan to read general rows with: beside answers (sft) these may be plain text, which is then learnt whole.

    Their columns have our names: ``data.columns`` is of the rows that are new.

    Raises:
        DataError: There is no such file, or nothing in it.
    """
    _, first = next(iter(stream(path)))
    plain = plan.objective == "sft" and isinstance(first, Mapping) and "text" in first
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"columns": {}})}) if plan.data.columns else plan
    return plan.model_copy(update={"objective": "pretraining"}) if plain else plan


def general_rows(path: Path, plan: Plan) -> list[Row]:
    """The rows of a file beside the plan's own, cleaned and masked as these are; see ``general_plan``.

    Raises:
        DataError: The file cannot be read, or rows cannot be used.
    """
    return file_rows(general_plan(path, plan), path)[0]


def probe_rows(path: Path, plan: Plan) -> list[Row]:
    """The rows of a probe for forgetting: text, or questions with answers, whatever the plan's objective.

    Raises:
        DataError: The file cannot be read, or rows cannot be used.
    """
    return general_rows(path, plan.model_copy(update={"objective": "sft", "ai_feedback": None, "distillation": None}))
