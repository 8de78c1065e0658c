"""From the row shapes that people have to the two that training takes: conversations and labelled texts.

| fields | becomes |
|---|---|
| input_text, target_text | a question and its answer |
| instruction, input (optional), output | the same (Alpaca) |
| messages [{role, content}], tools (optional) | a conversation for every assistant turn: loss on answers only |
| text, label | a labelled text |
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.data.files import Raw, raise_all, read

Message = dict[str, str]
_SPOKEN = ("assistant", "tool_call", "function_call")  # what the model says, and so what there is to learn
_ROLES = ("system", "user", *_SPOKEN, "tool", "function", "observation")


@dataclass(frozen=True)
class Conversation:
    """Messages up to an answer, and the answer.

    Attributes:
        prompt: ``{"role", "content"}`` messages; the last is not the assistant's.
        answer: What the assistant says next; the loss is on this alone.
        tools: Tool descriptions, or None.
        role: Of the answer: ``assistant``, or that of a tool call.
    """

    prompt: tuple[Message, ...]
    answer: str
    tools: Any = None
    role: str = "assistant"


@dataclass(frozen=True)
class LabelledText:
    """A text and the row of its label in the head."""

    text: str
    label: int


Row = Conversation | LabelledText


class _UnusableError(Exception):
    """Why one row cannot be used; names fields, never content."""


def load(path: Path, plan: Plan) -> list[Row]:
    """Reads a file for the plan's objective; see ``load_groups``."""
    return [row for group in load_groups(path, plan) for row in group]


def load_groups(path: Path, plan: Plan) -> list[list[Row]]:
    """Reads a file for the plan's objective: for each of its rows, what there is to learn from it.

    Raises:
        DataError: The file cannot be read, or rows lack fields or bear labels that the plan does not list.
    """
    raw = read(path)
    groups: list[list[Row]] = []
    problems = []
    labels = labels_of(plan) if plan.objective == "classification" else {}
    for line, fields in raw:
        try:
            _check_text(fields)
            groups.append([_labelled(fields, labels)] if labels else list(_conversations(fields)))
        except _UnusableError as error:
            problems.append((line, str(error)))
    raise_all(path, problems, len(raw))
    return groups


def labels_of(plan: Plan) -> dict[str, int]:
    """Row of the head by label."""
    if plan.data.labels is None:
        raise DataError("data.labels is missing; classification needs every label, in the order of the head's rows")
    return {label: row for row, label in enumerate(plan.data.labels)}


def distinct_labels(path: Path) -> tuple[str, ...]:
    """Every label in a file, sorted: for a plan on one machine that lists none."""
    raw = read(path)
    raise_all(path, [(line, "label is missing") for line, row in raw if not _text(row.get("label"))], len(raw))
    labels = tuple(sorted({_text(row["label"]) for _, row in raw}))
    if len(labels) < 2:
        raise DataError(f"{path}: every row has the same label; classification needs at least 2")
    return labels


def _conversations(row: Raw) -> Iterator[Conversation]:
    if "messages" in row:
        yield from _turns(row["messages"], row.get("tools"))
    elif "target_text" in row or "input_text" in row:
        yield _pair(row, "input_text", "target_text")
    elif "instruction" in row or "output" in row:
        extra = row.get("input")
        if extra is not None and not isinstance(extra, str):
            raise _UnusableError(f"input is a {type(extra).__name__}; expected text")
        yield _pair(row, "instruction", "output", f"\n{extra.strip()}" if extra and extra.strip() else "")
    else:
        raise _UnusableError(
            f"fields {', '.join(sorted(map(str, row))[:8]) or '(none)'}; expected input_text and target_text, "
            "instruction and output, or messages"
        )


def _pair(row: Raw, question: str, answer: str, extra: str = "") -> Conversation:
    for name in (question, answer):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise _UnusableError(f"{name} is missing or empty; expected text")
    return Conversation(({"role": "user", "content": row[question].strip() + extra},), row[answer].strip())


def _turns(messages: Any, tools: Any) -> Iterator[Conversation]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _UnusableError("messages is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise _UnusableError(f"message {number} needs a role ({', '.join(_ROLES)}) and a text content")
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    answers = [at for at, message in enumerate(plain) if message["role"] in _SPOKEN and at > 0]
    if not answers:
        raise _UnusableError("no message of role assistant after the first; there is nothing to learn from")
    described = _tools(tools)
    for at in answers:
        yield Conversation(tuple(plain[:at]), plain[at]["content"], described, plain[at]["role"])


def _tools(tools: Any) -> Any:
    """Tool descriptions; many files hold them as JSON text."""
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except (ValueError, RecursionError):
        raise _UnusableError("tools is a text that is not JSON") from None


def _check_text(row: Raw) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise _UnusableError("holds half of a surrogate pair, which is no character") from None
    except (RecursionError, ValueError):
        raise _UnusableError("is nested too deep") from None


def _labelled(row: Raw, labels: dict[str, int]) -> LabelledText:
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise _UnusableError("text is missing or empty; expected text")
    label = _text(row.get("label"))
    if label not in labels:
        found = "missing" if not label else "none of the labels that the plan lists"
        raise _UnusableError(f"label is {found} ({len(labels)} are known)")
    return LabelledText(row["text"], labels[label])


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value) if isinstance(value, int | bool) else ""
