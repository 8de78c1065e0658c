"""Compares a base and adapters on the same rows: every figure with an interval, and every difference with its own.

Rows are read and prepared once, in one order for all, so that figures are paired row by row. Models come one after the other
(``turns``); what is written, timed, perturbed and probed is done while a model is there. A judge is loaded when they have gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from protocol.adapter import Adapter
from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import Base, load_tokenizer
from strategies.data.encode import is_usable
from strategies.data.files import stream
from strategies.evaluation import preferences, texts
from strategies.evaluation.bootstrap import Draws, Estimate, draws
from strategies.evaluation.calibration import Bin
from strategies.evaluation.figures import Array, Figure
from strategies.evaluation.harness import Score, scores
from strategies.evaluation.perturbations import perturbed
from strategies.evaluation.reading import NOTHING, Reader, Rows, rows_of
from strategies.evaluation.source import Source
from strategies.evaluation.turns import each
from strategies.evaluation.wanted import Wanted, check
from strategies.evaluation.wins import Wins, contest
from strategies.judge import judge_of
from strategies.writer import Writer, writer_of

Contestants = Mapping[str, tuple[Plan, Adapter | None]]


@dataclass(frozen=True)
class Table:
    """Figures of several models on the same rows.

    Attributes:
        rows: How many.
        figures: By model and name.
        draws: Of the rows, the same for all.
        texts: Where the rows are blocks: how many texts these were cut from.
    """

    rows: int
    figures: Mapping[str, Mapping[str, Figure]]
    draws: Draws
    texts: int | None = None

    @property
    def counted(self) -> str:
        """How much was measured."""
        return f"{self.rows} rows" if self.texts is None else f"{self.texts} texts in {self.rows} blocks"

    @cached_property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Every figure with its interval."""
        return {
            who: {name: self.draws.estimate(figure) for name, figure in each_one.items()}
            for who, each_one in self.figures.items()
        }

    @cached_property
    def differences(self) -> dict[tuple[str, str], dict[str, Estimate]]:
        """By how much each model exceeds each one before it: of both, and by figure."""
        names = list(self.figures)
        return {
            (who, against): {
                name: self.draws.estimate(figure, self.figures[against][name])
                for name, figure in self.figures[who].items()
                if name in self.figures[against]
            }
            for at, against in enumerate(names)
            for who in names[at + 1 :]
        }


@dataclass(frozen=True)
class Robustness:
    """One perturbation: the rows that it changes, as they were and as they became, as two tables of the same rows."""

    clean: Table
    perturbed: Table

    @cached_property
    def changes(self) -> dict[str, dict[str, Estimate]]:
        """What the perturbation adds to each figure (below 0: takes from it), by model."""
        return {
            who: {name: self.clean.draws.estimate(figure, self.clean.figures[who][name]) for name, figure in each_one.items()}
            for who, each_one in self.perturbed.figures.items()
        }


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured.

    Attributes:
        table: On the rows as they are.
        dropped: Rows that are longer than the plan allows, and were left out.
        robustness: By perturbation.
        probe: On general rows.
        reliability: Bins of each classifier.
        wins: Of each model but the first, against the first.
        harness: By model, task and metric.
        bleu_tokenizer: sacrebleu's, where BLEU was taken.
        max_new_tokens: Longest answer, where answers were written.
    """

    table: Table
    dropped: int = 0
    robustness: Mapping[str, Robustness] = field(default_factory=dict)
    probe: Table | None = None
    reliability: Mapping[str, Sequence[Bin]] = field(default_factory=dict)
    wins: Mapping[str, Wins] = field(default_factory=dict)
    harness: Mapping[str, Mapping[str, Mapping[str, Score]]] = field(default_factory=dict)
    bleu_tokenizer: str | None = None
    max_new_tokens: int | None = None


def compare(
    plan: Plan, base: Base, path: Path | Source, contestants: Contestants, wanted: Wanted, near: Adapter = NOTHING
) -> Comparison:
    """Measures every contestant on the rows of a file.

    Args:
        plan: Says what for; the contestants' plans differ from it in their method alone.
        base: The frozen base.
        path: Of the rows, or the rows.
        contestants: By name; the first is what the others are compared with (the base).
        wanted: What to measure.
        near: dpo, kto, rl: the adapter that the model had before the objective began.

    Raises:
        ConfigurationError: Something wanted cannot be measured for this objective, or lacks a library.
        DataError: Rows cannot be read, or none is left.
        AdapterError: An adapter does not fit the base.
    """
    check(plan, wanted)
    tokenizer = load_tokenizer(base)
    rows, dropped = rows_of(path, plan, tokenizer, base, near)
    turned = _perturbed(rows, plan, tokenizer, wanted)
    probed = None
    if wanted.probe:
        probing = _probing(wanted.probe, plan)
        probed = Reader(
            rows_of(wanted.probe, probing, tokenizer, base)[0], probing, tokenizer, Wanted(draws=wanted.draws, seed=wanted.seed)
        )
    reader = Reader(rows, plan, tokenizer, wanted)
    altered = {kind: reader.on(there) for kind, (_, there) in turned.items()}
    found: dict[str, dict[str, dict[str, Figure]]] = {"": {}, "probe": {}, **{kind: {} for kind in turned}}
    tasks: dict[str, dict[str, dict[str, Score]]] = {}
    if plan.objective in preferences.MEASURED:
        for who, (use, adapter) in contestants.items():
            found[""][who] = reader.chosen(preferences.figures(use, base, reader.encoded, adapter, near))
    if plan.objective not in preferences.MEASURED or wanted.probe or wanted.judge or wanted.harness:
        for who, use, model, _ in each(contestants, base):
            if plan.objective not in preferences.MEASURED:
                found[""][who] = reader.figures(who, model)
            elif wanted.judge:
                reader.write(who, model)
            for kind, other in altered.items():
                found[kind][who] = other.figures(who, model)
            if probed:
                found["probe"][who] = probed.figures(who, model)
            if wanted.harness:
                size = use.training.batch_size
                tasks[who] = scores(model, tokenizer, wanted.harness, size, wanted.harness_folder)
            del model  # or it would still be there when the next one is loaded
    return Comparison(
        _table(found[""], reader.rows.groups, wanted, reader.cut_from),
        dropped,
        {
            kind: Robustness(
                _table(_parts(found[""], places, found[kind]), there.groups, wanted),
                _table(found[kind], there.groups, wanted),
            )
            for kind, (places, there) in turned.items()
        },
        _table(found["probe"], probed.rows.groups, wanted, probed.cut_from) if probed else None,
        reader.reliability,
        _wins(reader, wanted, list(contestants)),
        tasks,
        texts.bleu_tokenizer(reader.given) if reader.texts and reader.given else None,
        reader.longest if reader.written else None,
    )


def _perturbed(rows: Rows, plan: Plan, tokenizer: Any, wanted: Wanted) -> dict[str, tuple[list[int], Rows]]:
    """By perturbation, the places of the rows that it changes, and what they become."""
    writer: Writer | None = writer_of(wanted.writer) if wanted.writer and "paraphrase" in wanted.robustness else None
    found: dict[str, tuple[list[int], Rows]] = {}
    for kind in wanted.robustness:
        made = dict(enumerate(perturbed(rows.rows, kind, wanted.seed, writer)))
        fit = {at: row for at, row in made.items() if row and is_usable(row, tokenizer, plan.data.max_length, plan.objective)}
        if not fit:
            raise DataError(f"robustness {kind}: no changed row is within {plan.data.max_length} tokens; raise data.max_length")
        found[kind] = list(fit), rows.part(list(fit), list(fit.values()))
    return found


def _probing(path: Path, plan: Plan) -> Plan:
    """The plan to read a probe with: a decoder answers questions or reads texts, whatever it was trained for."""
    if plan.task_type == "SEQ_CLS":
        return plan
    _, first = next(stream(path), (0, ""))
    objective = "pretraining" if "text" in first else "sft"
    return plan.model_copy(update={"objective": objective, "ai_feedback": None, "distillation": None})


def _parts(
    figures: Mapping[str, Mapping[str, Figure]], places: Sequence[int], like: Mapping[str, Mapping[str, Figure]]
) -> dict[str, dict[str, Figure]]:
    """The figures of some rows, of those names that ``like`` has."""
    return {who: {name: figures[who][name].part(places) for name in there} for who, there in like.items()}


def _table(figures: Mapping[str, Mapping[str, Figure]], groups: Array, wanted: Wanted, texts: int | None = None) -> Table:
    return Table(len(groups), figures, draws(groups, wanted.draws, wanted.seed), texts)


def _wins(reader: Reader, wanted: Wanted, names: Sequence[str]) -> dict[str, Wins]:
    if wanted.judge is None:
        return {}
    judge, written = judge_of(wanted.judge), reader.written
    return {who: contest(judge, reader.questions, written[who], written[names[0]]) for who in names[1:]}
