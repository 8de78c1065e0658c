"""From the row shapes that people have to those that objectives take.

| fields | becomes | for |
|---|---|---|
| input_text, target_text | a question and its answer | sft |
| instruction, input (optional), output | the same (Alpaca) | sft |
| messages [{role, content}], tools (optional) | a conversation for every assistant turn: loss on answers only | sft |
| conversations [{from, value}], system and tools (optional) | the same (ShareGPT) | sft |
| text | a text | pretraining |
| text, label | a text and its label; regression: the label is a number | classification, regression |
| prompt, chosen, rejected | two answers, of which the first was preferred | dpo, reward; sft with data.preferred |
| prompt, completion, label | an answer that was liked (true) or not (false) | kto |
| prompt | something to answer | rl; dpo and reward with ai_feedback; distillation from texts |

A prompt is what a user says, or a list of messages. An answer is a text, or a list of messages that ends with it: the answer
alone, or the prompt's messages and it. A row of another objective is refused also where its fields would do: its label, or
its second answer, would be left out in silence.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.data_settings import RowField
from protocol.errors import DataError
from protocol.plan import Objective, Plan
from strategies.data.files import Raw, Read, raise_all, stream

Message = dict[str, str]
_SPOKEN = ("assistant", "tool_call", "function_call")  # what the model says, and so what there is to learn
_SHOWN_COLUMNS = 20
_ROLES = ("system", "user", *_SPOKEN, "tool", "function", "observation")
# Who says it in ShareGPT's words; other roles have their own names there too.
_SHAREGPT = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bard", "bing"), "assistant")}


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


@dataclass(frozen=True)
class ScoredText:
    """A text and the number that belongs to it."""

    text: str
    score: float


@dataclass(frozen=True)
class PlainText:
    """A text to go on reading as the base did while it was made."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Messages up to an answer, the answer that somebody preferred, and the other one."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Feedback:
    """Messages up to an answer, the answer, and whether somebody liked it."""

    prompt: tuple[Message, ...]
    answer: str
    liked: bool


@dataclass(frozen=True)
class Prompt:
    """Messages that the model answers itself."""

    prompt: tuple[Message, ...]


Row = Conversation | LabelledText | ScoredText | PlainText | Preference | Feedback | Prompt


def spoken(row: Row) -> str:
    """All that a row says, in one text: to compare rows, and to count."""
    match row:
        case LabelledText(text) | ScoredText(text) | PlainText(text):
            return text
        case Conversation(prompt, answer) | Feedback(prompt, answer):
            said = [answer]
        case Preference(prompt, chosen, rejected):
            said = [chosen, rejected]
        case Prompt(prompt):
            said = []
    return "\n".join([*(message["content"] for message in prompt), *said])


class _UnusableError(Exception):
    """Why one row cannot be used; names fields, never content."""


@dataclass(frozen=True)
class Group:
    """What there is to learn from one row of a file: every turn of a conversation, else one.

    Attributes:
        line: Of the row.
        rows: In order, at least one.
    """

    line: int
    rows: tuple[Row, ...]


def load(path: Path, plan: Plan) -> list[Row]:
    """Reads a file for the plan's objective, as it is; ``strategies.data.prepared`` also cleans and masks it.

    Raises:
        DataError: The file cannot be read, or rows of it cannot be used, and the plan does not say to skip them.
    """
    return [row for group in groups_of(path, stream(path), plan)[0] for row in group.rows]


def groups_of(path: Path, found: Iterable[Read], plan: Plan) -> tuple[list[Group], list[tuple[int, str]]]:
    """Rows for the plan's objective, and those that cannot be used: lines, each with why.

    Args:
        path: Whose rows they are, for messages.
        found: From ``strategies.data.files.stream``, treated or not; read once, and not held.
        plan: Its objective, its labels and what it says of bad rows.

    Raises:
        DataError: Rows lack fields, bear labels that the plan does not list or an ``id`` of another row, and the plan does not
            say to skip them; or none is left.
    """
    groups: list[Group] = []
    problems: list[tuple[int, str]] = []
    rows_of, ids = _reader(plan), dict[str | int, int]()
    looks = Counter[Objective | None]()
    for line, raw in found:
        try:
            groups.append(Group(line, _usable(raw, line, ids, rows_of)))
        except _UnusableError as error:
            problems.append((line, str(error)))
            looks[_looks(raw) if isinstance(raw, Mapping) else None] += 1
    if plan.data.on_bad_rows == "refuse" or not groups:
        left = "data.on_bad_rows: skip goes on without them" if groups else "none is left to go on with"
        raise_all(path, problems, len(problems) + len(groups), f"\n{left}{_other_objective(looks, plan)}")
    return groups, problems


def flagged(found: Iterable[Read], plan: Plan) -> Iterator[Read]:
    """Rows as they are, and in place of one that cannot be used for the plan's objective whatever the others are, why.

    So that which rows these are does not depend on what is done to the others first.
    """
    rows_of = _reader(plan)
    for line, raw in found:
        try:
            _usable(raw, line, {}, rows_of)
        except _UnusableError as error:
            yield line, str(error)
        else:
            yield line, raw


def renamed(path: Path, found: Iterable[Read], columns: Mapping[RowField, str]) -> Iterator[Read]:
    """Rows with our names for the columns of a file.

    Args:
        path: Of the file, for messages.
        found: From ``strategies.data.files.stream``.
        columns: The file's name for each of ours; other columns stay as they are.

    Raises:
        DataError: No row has one of the columns; raised when the last has been read.
    """
    missing, there = set(columns.values()), dict[str, None]()
    for line, row in found:
        if not columns or isinstance(row, str):
            yield line, row
            continue
        missing -= row.keys()
        there |= dict.fromkeys(list(map(str, row))[:_SHOWN_COLUMNS])
        rest = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
        yield line, rest | {own: row[name] for own, name in columns.items() if name in row}
    if missing:
        raise DataError(
            f"{path}: data.columns: no row has {', '.join(sorted(missing))}; there are "
            f"{', '.join(sorted(there)[:_SHOWN_COLUMNS]) or 'no columns'}"
        )


def likely_objective(found: Iterable[Read]) -> Objective | None:
    """The objective whose fields most rows have; None where no row has those of any.

    Pairs are taken for dpo, a label for one of several unless it is a number that is not whole.
    """
    looks = Counter(_looks(row) for _, row in found if isinstance(row, Mapping))
    if looks["regression"]:
        looks["regression"] += looks.pop("classification", 0)
    known = [(objective, count) for objective, count in looks.most_common() if objective]
    return known[0][0] if known else None


def _looks(row: Raw) -> Objective | None:
    if "chosen" in row or "rejected" in row:
        return "dpo"
    if "prompt" in row:
        return "kto" if "completion" in row else "rl"
    if any(name in row for name in ("messages", "conversations", "input_text", "target_text", "instruction", "output")):
        return "sft"
    if "text" not in row:
        return None
    if "label" not in row:
        return "pretraining"
    try:
        return "classification" if float(row["label"]).is_integer() else "regression"
    except (ValueError, TypeError, OverflowError):
        return "classification"


_ALIKE: "Mapping[Objective, Objective]" = {"reward": "dpo", "distillation": "sft", "regression": "classification"}


def _other_objective(looks: "Counter[Objective | None]", plan: Plan) -> str:
    """A line that names the objective that rows without the plan's fields are for, or none."""
    made = plan.ai_feedback is not None or plan.distillation is not None or plan.data.preferred
    best = looks.most_common(1)[0][0] if looks else None
    if made or best is None or _ALIKE.get(best, best) == _ALIKE.get(plan.objective, plan.objective):
        return ""
    return f"\nmost of them have the fields of {best} rows; use objective {best} (on the command line --objective {best})"


def _usable(
    raw: "Raw | str", line: int, ids: dict[str | int, int], rows_of: "Callable[[Raw], Iterable[Row]]"
) -> tuple[Row, ...]:
    if isinstance(raw, str):
        raise _UnusableError(raw)
    _check_text(raw)
    own = raw.get("id")
    if isinstance(own, str | int) and own != "" and ids.setdefault(own, line) != line:
        raise _UnusableError(f"id is that of line {ids[own]}; each row needs its own, or none")
    return tuple(rows_of(raw))


def labels_of(plan: Plan) -> dict[str, int]:
    """Row of the head by label."""
    if plan.data.labels is None:
        raise DataError("data.labels is missing; classification needs every label, in the order of the head's rows")
    return {label: row for row, label in enumerate(plan.data.labels)}


def distinct_labels(
    path: Path, *, skip: bool = False, columns: Mapping[RowField, str] | None = None, least: int = 2
) -> tuple[str, ...]:
    """Every label in a file, sorted: for a plan on one machine that lists none.

    Args:
        path: Of the file.
        skip: Go on without rows that cannot be read or bear none.
        columns: The file's name for each of ours (``renamed``).
        least: So many labels there must be.
    """
    found = list(renamed(path, stream(path), columns or {}))
    problems = [
        (line, row if isinstance(row, str) else "label is missing")
        for line, row in found
        if isinstance(row, str) or not _text(row.get("label"))
    ]
    if not skip:
        raise_all(path, problems, len(found))
    labels = tuple(sorted({label for _, row in found if isinstance(row, Mapping) and (label := _text(row.get("label")))}))
    if len(labels) < least:
        raise DataError(f"{path}: every row has the same label; classification needs at least 2")
    return labels


def _reader(plan: Plan) -> "Callable[[Raw], Iterable[Row]]":
    if plan.ai_feedback is not None:
        return _prompts
    if plan.distillation is not None and plan.distillation.kind == "text":
        return _questions
    if plan.data.preferred:
        return _preferred
    if plan.objective != "classification":
        return _READERS[plan.objective]
    labels = labels_of(plan)
    return lambda row: [_labelled(row, labels)]


def _conversations(row: Raw) -> Iterator[Conversation]:
    if "messages" in row:
        yield from _turns(_messages(row["messages"], "messages"), row.get("tools"))
    elif "conversations" in row:
        yield from _turns(_messages(sharegpt(row), "conversations"), row.get("tools"))
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
            "instruction and output, messages, or conversations"
        )


def _pair(row: Raw, question: str, answer: str, extra: str = "") -> Conversation:
    for name in (question, answer):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise _UnusableError(_no_text(row, name))
    return Conversation(({"role": "user", "content": row[question].strip() + extra},), row[answer].strip())


def _messages(messages: Any, field: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _UnusableError(f"{field} is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise _UnusableError(f"{field}: message {number} needs a role ({', '.join(_ROLES)}) and a text content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def sharegpt(row: Raw) -> Any:
    """The messages of a row that has ``conversations``; what is none is left for whoever looks at messages."""
    found = row["conversations"]
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        return found
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    turns = [{"role": _role(turn.get("from")), "content": turn.get("value")} for turn in found]
    return first + turns


def _role(name: Any) -> Any:
    return _SHAREGPT.get(name, name) if isinstance(name, str) else None


def _turns(plain: list[Message], tools: Any) -> Iterator[Conversation]:
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
    text, label = _text_of(row), _text(row.get("label"))
    if label not in labels:
        found = "missing" if not label else "none of the labels that the plan lists"
        raise _UnusableError(f"label is {found} ({len(labels)} are known)")
    return LabelledText(text, labels[label])


def _scored(row: Raw) -> Iterator[ScoredText]:
    text, label = _text_of(row), row.get("label")
    try:
        score = math.nan if label is None or isinstance(label, bool) else float(label)
    except (ValueError, TypeError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise _UnusableError(f"label is {'missing' if label in (None, '') else 'no number'}; regression needs a finite number")
    yield ScoredText(text, score)


def _texts(row: Raw) -> Iterator[PlainText]:
    text = _text_of(row)
    if "label" in row:
        raise _UnusableError(
            "label beside text, which pretraining does not look at; use objective classification or regression, or leave it out"
        )
    yield PlainText(text)


def _preferences(row: Raw) -> Iterator[Preference]:
    prompt = _prompt(row)
    chosen, rejected = (_answer(row, name, prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise _UnusableError("chosen and rejected are the same; expected two answers")
    yield Preference(prompt, chosen, rejected)


def _preferred(row: Raw) -> Iterator[Conversation]:
    """What there is to imitate in a pair, where nothing else was collected (Rafailov et al. 2023, section 5)."""
    for pair in _preferences(row):
        yield Conversation(pair.prompt, pair.chosen)


def _feedback(row: Raw) -> Iterator[Feedback]:
    prompt = _prompt(row)
    answer, label = _answer(row, "completion", prompt), _text(row.get("label")).lower()
    if label not in _LIKED:
        raise _UnusableError(f"label is {'neither true nor false' if label else 'missing'}; expected true for liked, or false")
    yield Feedback(prompt, answer, _LIKED[label])


def _prompts(row: Raw) -> Iterator[Prompt]:
    prompt = _prompt(row)
    if ready := [name for name in ("completion", "chosen", "rejected") if name in row]:
        raise _UnusableError(
            f"{' and '.join(ready)} beside prompt, which nobody would look at, since a model writes the answers; use objective "
            f"{'kto' if ready == ['completion'] else 'dpo'} without ai_feedback, or leave them out"
        )
    yield Prompt(prompt)


def _questions(row: Raw) -> Iterator[Conversation | Prompt]:
    """What a teacher answers: prompts, or conversations whose own answers are for measuring."""
    yield from _prompts(row) if "prompt" in row else _conversations(row)


def _prompt(row: Raw) -> tuple[Message, ...]:
    found = row.get("prompt")
    if isinstance(found, str) and found.strip():
        return ({"role": "user", "content": found.strip()},)
    if not found or isinstance(found, str):
        raise _UnusableError(_no_text(row, "prompt", ", or a list of messages"))
    messages = _messages(found, "prompt")
    if messages[-1]["role"] in _SPOKEN:
        raise _UnusableError(f"prompt ends with a message of role {messages[-1]['role']}; expected what is to be answered")
    return tuple(messages)


def _answer(row: Raw, name: str, prompt: tuple[Message, ...]) -> str:
    found = row.get(name)
    if isinstance(found, list):
        *before, last = _messages(found, name)
        if last["role"] != "assistant" or (before and before != list(prompt)):
            raise _UnusableError(f"{name} is not one message of role assistant, alone or after those of prompt")
        found = last["content"]
    if not isinstance(found, str) or not found.strip():
        raise _UnusableError(_no_text(row, name, ", or a list of messages"))
    return found.strip()


def _text_of(row: Raw) -> str:
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise _UnusableError(_no_text(row, "text"))
    return str(row["text"])


def _no_text(row: Raw, name: str, more: str = "") -> str:
    """Why a field is not the text that it should be."""
    found = row.get(name)
    if found is None or isinstance(found, str) or found == []:
        return f"{name} is missing or empty; expected text{more}"
    kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"{name} is {kinds.get(type(found), f'a {type(found).__name__}')}; expected text{more}"


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value) if isinstance(value, int | bool) else ""


_LIKED = {"true": True, "1": True, "false": False, "0": False}
_READERS: "Mapping[Objective, Callable[[Raw], Iterable[Row]]]" = {
    "sft": _conversations,
    "pretraining": _texts,
    "distillation": _conversations,
    "regression": _scored,
    "dpo": _preferences,
    "reward": _preferences,
    "kto": _feedback,
    "rl": _prompts,
}
