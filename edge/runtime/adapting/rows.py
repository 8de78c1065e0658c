"""Rows that a device learns from: JSON objects to token ids, as this project's training makes them.

Per line one of

    {"prompt": "…" or messages, "answer": "…"}                     its answer is learnt
    {"messages": […]}                                              the last one, an assistant's, is learnt
    {"text": "…"}                                                  all of it is learnt, by a decoder
    {"text": "…", "label": "…"}                                    by a classifier
    {"prompt": "…" or messages, "chosen": "…", "rejected": "…"}    DPO: the one is preferred to the other

An answer begins where a conversation with it and one without it differ, and what is longer than the device trains on is cut.
What is wrong with a row is told by its line, never by its content.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from edge.runtime.chat_format import MOST_MESSAGES
from edge.runtime.manifest import Description
from edge.runtime.tokens import Tokeniser
from edge.runtime.training_rows import Row
from protocol.errors import DataError

Task = Literal["sft", "classification", "dpo"]
MOST_ROWS: Final = 100_000
MOST_BYTES: Final = 2**28
LONGEST_LINE: Final = 2**20
_IGNORED = -100
_KEYS: Mapping[frozenset[str], str] = {
    frozenset(("prompt", "answer")): "answer",
    frozenset(("messages",)): "messages",
    frozenset(("text",)): "text",
    frozenset(("text", "label")): "label",
    frozenset(("prompt", "chosen", "rejected")): "pair",
}
_NAMED = "; ".join(" + ".join(sorted(keys)) for keys in _KEYS)


@dataclass(frozen=True)
class Examples:
    """What is learnt.

    Attributes:
        task: What kind of rows they are; all of one kind.
        rows: Of each example one row, or chosen and rejected.
        cut: Examples that were longer than the device trains on.
        dropped: Examples of which nothing was left to learn.
    """

    task: Task
    rows: Sequence[tuple[Row, ...]]
    cut: int = 0
    dropped: int = 0


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: It cannot be read, or a line is too long or no object.
    """
    found: list[dict[str, Any]] = []
    size = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE} bytes")
                if (size := size + len(line)) > MOST_BYTES:
                    raise DataError(f"{path}: line {number} ends beyond {MOST_BYTES} bytes; give fewer rows at a time")
                if not line.strip():
                    continue
                if len(found) == MOST_ROWS:
                    raise DataError(f"{path}: more than {MOST_ROWS} rows; give fewer at a time")
                found.append(_object(path, number, line))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not found:
        raise DataError(f"{path}: holds no row")
    return found


def task_of(record: Mapping[str, Any]) -> Task | None:
    """What kind of training a row is for, by its keys alone; None: for none."""
    kind = _KEYS.get(frozenset(record))
    return None if kind is None else "classification" if kind == "label" else "dpo" if kind == "pair" else "sft"


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: line {number} is no JSON; expected one object a line") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: line {number} is no JSON object")
    return found


class RowReader:
    """Makes token ids of rows.

    Args:
        manifest: Of the bundle that learns.
        tokens: Its tokenizer.
        most_tokens: Longest row; longer ones are cut at their end.
        labels: Of the classifier's rows; empty: the base's own.
    """

    def __init__(self, manifest: Description, tokens: Tokeniser, most_tokens: int, labels: Sequence[str] = ()) -> None:
        self._manifest, self._tokens, self._most = manifest, tokens, most_tokens
        self._labels = {label: at for at, label in enumerate(labels or manifest.labels)}

    def examples(self, records: Sequence[Mapping[str, Any]], source: str = "rows") -> Examples:
        """Token ids of rows; ``source`` is what errors call them.

        Raises:
            DataError: Rows of several kinds, one that is of none or not for such a bundle, or none from which to learn.
        """
        made: list[tuple[Row, ...]] = []
        tasks: dict[Task, int] = {}
        cut = dropped = 0
        for number, record in enumerate(records, 1):
            try:
                task, rows, is_cut = self.example(record)
            except DataError as error:
                raise DataError(f"{source}: row {number}: {error}") from None
            tasks.setdefault(task, number)
            cut += is_cut
            if rows:
                made.append(rows)
            else:
                dropped += 1
        if len(tasks) > 1:
            (one, first), (other, second) = list(tasks.items())[:2]
            raise DataError(f"{source}: row {first} is for {one} and row {second} for {other}; give rows of one kind")
        if not made:
            raise DataError(f"{source}: none of {len(records)} rows leaves anything to learn within {self._most} tokens")
        return Examples(next(iter(tasks)), made, cut, dropped)

    def example(self, record: Mapping[str, Any]) -> tuple[Task, tuple[Row, ...], bool]:
        """What one row is for; its token ids, empty where nothing is left to learn; whether it was cut.

        Raises:
            DataError: It is of no kind, or not for such a bundle.
        """
        task, rows = self._rows(record)
        short = tuple(self._shortened(row) for row in rows)
        return task, short if all(map(_learnable, short)) else (), any(len(row.ids) > self._most for row in rows)

    def _rows(self, record: Mapping[str, Any]) -> tuple[Task, tuple[Row, ...]]:
        kind = _KEYS.get(frozenset(record))
        if kind is None:
            raise DataError(f"has {len(record)} keys that make no kind of row; expected {_NAMED}")
        if (self._manifest.kind == "classifier") != (kind == "label"):
            raise DataError(f"is none that a {self._manifest.kind} learns from")
        if kind == "label":
            return "classification", (self._labelled(record),)
        if kind == "text":
            ids = self._tokens.ids(_text(record, "text"))
            ends = self._manifest.tokens.eos[:1]
            whole = ids if ids[-1:] == list(ends) else [*ids, *ends]
            return "sft", (Row(whole, whole),)
        if kind == "messages":
            *before, last = _messages(record["messages"])
            if last.get("role") != "assistant":
                raise DataError("its last message is not the assistant's; expected what is to be learnt")
            return "sft", (self._answered(before, _text(last, "content")),)
        prompt = record["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
        if kind == "answer":
            return "sft", (self._answered(messages, _text(record, "answer")),)
        return "dpo", tuple(self._answered(messages, _text(record, side)) for side in ("chosen", "rejected"))

    def _labelled(self, record: Mapping[str, Any]) -> Row:
        label = record["label"]
        at = self._labels.get(label) if isinstance(label, str) else None
        if at is None:
            raise DataError(f"its label is none of the {len(self._labels)} that this classifier has")
        return Row(self._tokens.ids(_text(record, "text")), at)

    def _answered(self, messages: Sequence[Mapping[str, str]], answer: str) -> Row:
        chat = self._manifest.chat
        if chat is None:
            raise DataError(f"needs a chat template, and this bundle has none ({self._manifest.chat_remark}); give texts")
        if not answer.strip():
            raise DataError("its answer is empty")
        before = self._tokens.conversation_ids(chat.pieces(messages))
        whole = self._tokens.conversation_ids(chat.answered(messages, answer))
        shared = next(
            (at for at, (x, y) in enumerate(zip(before, whole, strict=False)) if x != y), min(len(before), len(whole))
        )
        return Row(whole, [_IGNORED] * shared + whole[shared:])

    def _shortened(self, row: Row) -> Row:
        labels = row.labels if isinstance(row.labels, int) else row.labels[: self._most]
        return Row(row.ids[: self._most], labels)


def _learnable(row: Row) -> bool:
    return bool(row.ids) and (isinstance(row.labels, int) or any(label != _IGNORED for label in row.labels[1:]))


def _text(record: Mapping[str, Any], key: str) -> str:
    found = record.get(key)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"its {key} is no text, or an empty one")
    return found


def _messages(found: Any) -> list[Mapping[str, str]]:
    if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
        raise DataError("its messages are no list")
    messages = list(found)
    if not 0 < len(messages) <= MOST_MESSAGES or not all(isinstance(each, Mapping) for each in messages):
        raise DataError(f"has {len(messages)} messages; expected 1 to {MOST_MESSAGES}, each with role and content")
    return messages
