"""Reads a model on rows that were prepared once for all models: every wanted figure, row by row in one order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from protocol.adapter import Adapter
from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import Base
from strategies.data.ai_feedback import made
from strategies.data.encode import IGNORED, encode, is_usable, prompt_ids
from strategies.data.formats import Conversation, Message, Row
from strategies.evaluation import calibration, latency, measure, texts
from strategies.evaluation.figures import Array, Figure, mean
from strategies.evaluation.source import Source, of_file
from strategies.evaluation.wanted import FIGURES, TIMED, WRITTEN, Wanted
from strategies.evaluation.wanted import answers as has_answers
from strategies.writer import continuations

NOTHING = Adapter()


@dataclass(frozen=True)
class Rows:
    """Rows that a model can be measured on, each with the number of the file's row that it came from."""

    rows: list[Row]
    groups: Array

    def part(self, places: Sequence[int], rows: list[Row]) -> "Rows":
        """Other forms of some of them."""
        return Rows(rows, np.unique(self.groups[np.asarray(places, int)], return_inverse=True)[1])


def rows_of(path: Path | Source, plan: Plan, tokenizer: Any, base: Base, near: Adapter = NOTHING) -> tuple[Rows, int]:
    """Rows that leave something to measure within the plan's length, and how many do not; cleaned and masked as in training.

    Args:
        path: Of the rows, or the rows.
        plan: What they are for.
        tokenizer: Of the base.
        base: Answers where the plan's rows are made by models.
        near: Its adapter then.

    Raises:
        DataError: They cannot be read, or none is left.
    """
    source = path if isinstance(path, Source) else of_file(plan, path)
    read_in = [(row, number) for number, group in enumerate(source.groups) for row in group.rows]
    measured = made([row for row, _ in read_in], plan, base, near, training=False).rows
    numbers = [number for _, number in read_in] if len(measured) == len(read_in) else range(len(measured))
    read_in = list(zip(measured, numbers, strict=True))
    kept = [one for one in read_in if is_usable(one[0], tokenizer, plan.data.max_length, plan.objective)]
    if not kept:
        raise DataError(
            f"{source.name}: none of {len(read_in)} rows leaves anything to measure within {plan.data.max_length} tokens; "
            "raise data.max_length"
        )
    groups_kept = np.unique([number for _, number in kept], return_inverse=True)[1]
    return Rows([row for row, _ in kept], groups_kept), len(read_in) - len(kept)


class Reader:
    """Reads every model on the same prepared rows."""

    def __init__(self, rows: Rows, plan: Plan, tokenizer: Any, wanted: Wanted) -> None:
        self.plan, self.tokenizer, self.wanted = plan, tokenizer, wanted
        self.encoded = encode(rows.rows, tokenizer, plan.data.max_length, plan.objective).rows
        self.cut_from: int | None = None
        if plan.objective == "pretraining":  # texts have become blocks
            self.cut_from = len(rows.rows)
            rows = Rows(rows.rows, np.arange(len(self.encoded)))
        self.rows = rows
        self.pad = int(tokenizer.pad_token_id or 0)
        self.texts = has_answers(plan.objective) and wanted.any_of(WRITTEN, wanted.generate)
        self.timed = has_answers(plan.objective) and wanted.any_of(TIMED, wanted.generate)
        self.given = [row.answer for row in rows.rows if isinstance(row, Conversation)]
        self.written: dict[str, list[str]] = {}
        self.reliability: dict[str, Sequence[calibration.Bin]] = {}

    def on(self, rows: Rows) -> "Reader":
        """The same for rows in another form: nothing is timed or judged, and answers may be as long as on the clean rows."""
        longest = self.longest if self.texts else None
        wanted = self.wanted
        metrics = tuple(name for name in wanted.metrics if name not in TIMED)
        made = Reader(rows, self.plan, self.tokenizer, replace(wanted, metrics=metrics, max_new_tokens=longest, judge=None))
        made.timed = False
        return made

    @property
    def longest(self) -> int:
        """Tokens of an answer: one more than the longest that was given has, so that a right one has room to end."""
        if self.plan.objective == "rl":
            return self.wanted.max_new_tokens or self.plan.rl.max_completion_length
        return self.wanted.max_new_tokens or max(map(_answer_tokens, self.encoded)) + 1

    @property
    def questions(self) -> list[tuple[Message, ...]]:
        """The messages up to each answer."""
        return [row.prompt for row in self.rows.rows]  # type: ignore[union-attr]

    def figures(self, who: str, model: Any) -> dict[str, Figure]:
        """Every wanted figure of one model."""
        plan, found = self.plan, {}
        if plan.objective == "classification":
            logits, labels = measure.label_logits(plan, model, self.pad, self.encoded)
            shares = calibration.softmax(logits)
            found = measure.of_labels(logits, labels) | dict(calibration.figures(shares, labels))
            self.reliability[who] = calibration.reliability(shares, labels)
        elif self.wanted.any_of(("loss", "perplexity", "accuracy", *FIGURES["regression"]), otherwise=True):
            found = measure.figures(plan, model, self.pad, self.encoded)
        if self.texts or self.wanted.judge:
            cut = self.write(who, model)
            if self.texts:
                found |= texts.figures(self.written[who], self.given) | {"cut-answers": cut}
        if self.timed:
            found |= latency.figures(model, self.tokenizer, self._prompts())
        return self.chosen(found)

    def write(self, who: str, model: Any) -> Figure:
        """Lets a model write its answers, and returns the share of those that were cut off."""
        size, longest = self.plan.training.batch_size, self.longest
        made = continuations(model, self.tokenizer, self._prompts(), max_new_tokens=longest, batch_size=size)
        self.written[who] = [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in made]
        return mean((float(len(ids) == longest) for ids in made), "lower")

    def chosen(self, found: Mapping[str, Figure]) -> dict[str, Figure]:
        """Those that were asked for."""
        return {name: figure for name, figure in found.items() if name in (self.wanted.metrics or found)}

    def _prompts(self) -> list[list[int]]:
        return [prompt_ids(row.prompt, self.tokenizer, getattr(row, "tools", None)) for row in self.rows.rows]  # type: ignore[union-attr]


def _answer_tokens(row: Mapping[str, Any]) -> int:
    """Of an encoded row's given answer: of the preferred one where there are two."""
    if "labels" in row:
        return sum(label != IGNORED for label in row["labels"])
    return len(row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"])
