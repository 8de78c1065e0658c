"""What rows say about a task, in numbers: how many, how long, how often the same, in which script, how near to the base.

Facts are numbers and the names of scripts; no text, no label. They stay on this machine: they are for the selector here, and
nothing sends them.

``similarity`` is ours. A language model that was trained on text like the rows is as sure of them as of what it writes
itself; elsewhere it is less sure. So it is the base's uncertainty about its own samples over that about the rows, in nats a
token (logarithms of the perplexities), 1 at most: a perplexity of 20 on its own text and of 60 on the rows is 3.0 / 4.1 = 0.73.
That the base's own text is the measure makes small and large bases comparable. A base that writes no text has none.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import Base, load, load_tokenizer
from strategies.data.duplicates import exact_duplicates, near_duplicates
from strategies.data.encode import answered_ids, prompt_ids, text_ids
from strategies.data.files import Raw, read
from strategies.data.formats import sharegpt
from strategies.task import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
SHAPES: Mapping[Shape, str] = {
    "answers": "a question with its answer",
    "pairs": "a prompt with two answers",
    "single": "a prompt with an answer that was liked or not",
    "prompts": "something to answer",
    "labels": "a text with a label",
    "numbers": "a text with a number",
    "texts": "a text alone",
}
# Today's tokenizers need 4 to 5 bytes of English for a token and 2 to 4 of Chinese: lengths come out rather too long.
_BYTES_A_TOKEN = 3
_MEASURED_ROWS = 5_000  # lengths and scripts, spread over the file
_LONGEST_ROWS = 50  # of the most characters: one of them has the most tokens
_COMPARED_ROWS = 20_000  # near duplicates, from the beginning
_READ_ROWS, _READ_TOKENS = 64, 256  # by the base
_OWN_TEXTS, _OWN_TOKENS = 8, 128
_HALF = re.compile("[\ud800-\udfff]")
_SPOKEN = ("assistant", "tool_call", "function_call")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row, or of an answer."""

    median: int
    high: int  # 95th percentile
    longest: int


@dataclass(frozen=True)
class TaskFacts:
    """Facts of the rows; None where they cannot be measured on such rows.

    Attributes:
        shape: What most rows are: a question with its answer, a pair of answers, a single answer that was liked or not, a text
            with a label or with a number, a text, something to answer.
        rows: That can be used.
        unusable: Rows without the fields of any shape.
        classes: Labels.
        balance: Entropy of the labels over the largest possible: 1 where all are as frequent.
        rarest: Rows of the rarest label.
        row_tokens: Question and answer, or the text; with the base's own template where a tokenizer counted.
        answer_tokens: Of answers, where there are any; of two, the longer.
        counted: A tokenizer counted; else every 3 bytes are taken for a token, which is rather too many.
        exact_duplicates: Rows that repeat an earlier one.
        near_duplicates: Rows that nearly repeat an earlier one, exact repetitions included; of ``compared`` rows.
        compared: Rows from the beginning that were held against each other.
        scripts: Share of the letters by script (``LATIN``, ``CJK``, ``CYRILLIC``), from 1 % on. Languages that share a script
            are not told apart.
        pairs: Rows with a chosen and a rejected answer.
        preference_share: Of all rows.
        liked_share: Of single answers.
        perplexity: Of the base on a sample.
        similarity: See above; 0 to 1.
    """

    shape: Shape
    rows: int
    unusable: int
    classes: int | None
    balance: float | None
    rarest: int | None
    row_tokens: Lengths
    answer_tokens: Lengths | None
    counted: bool
    exact_duplicates: int
    near_duplicates: int
    compared: int
    scripts: Mapping[str, float]
    pairs: int
    preference_share: float
    liked_share: float | None
    perplexity: float | None = None
    similarity: float | None = None

    def of_task(self, kind: str | None = None) -> dict[str, Any]:
        """Fields of ``strategies.task.Task`` that these facts answer.

        Args:
            kind: Of the task where it is known; without it a kind that the rows leave no doubt of is among the answers.
        """
        certain = {"labels": "classification", "numbers": "regression", "texts": "pretraining"}
        said = certain.get(self.shape)
        found: dict[str, Any] = {
            "shape": self.shape,
            "rows": self.rows,
            "input_tokens": self.row_tokens.high,
            "median_tokens": self.row_tokens.median,
            "longest_tokens": self.row_tokens.longest,
            "output_tokens": self.answer_tokens.high if self.answer_tokens else 0,
        }
        if kind is None and said:
            found["kind"] = said
        if (kind or said) == "classification" and self.classes:
            found["classes"] = self.classes
        if (kind or said) not in certain.values():
            found["preference_pairs"] = self.pairs
            if self.shape in ("pairs", "single"):
                found["feedback"] = self.shape
        if self.similarity is not None:
            found["similarity"] = self.similarity
        return found

    def against(self, kind: str, classes: int | None = None) -> list[str]:
        """Why these rows are not for a task of a kind that was given, or with so many labels; empty where they are.

        Args:
            kind: Of the task.
            classes: Labels, where their number was given too.
        """
        answering = tuple(shape for shape in SHAPES if shape not in ("labels", "numbers", "texts"))
        shapes: Mapping[str, tuple[Shape, ...]] = {
            "classification": ("labels", "numbers"),
            "regression": ("labels", "numbers"),
            "pretraining": ("texts",),
        }
        fit = shapes.get(kind, answering)
        if self.shape not in fit:
            return [f"kind {kind}: most rows are {SHAPES[self.shape]}; expected {' or '.join(SHAPES[one] for one in fit)}"]
        if classes is not None and self.classes is not None and classes < self.classes:
            return [f"classes is {classes}; the rows have {self.classes} labels"]
        return []


@dataclass(frozen=True)
class _Row:
    """One row: what goes before, what the model is to say (of several answers each), and what was said of it."""

    shape: Shape
    before: tuple[Message, ...]
    answers: tuple[str, ...]
    label: Any = None
    longer: str = ""  # all of it that is one text
    tools: Any = None

    @property
    def text(self) -> str:
        return "\n".join([*(message["content"] for message in self.before), self.longer])


def facts(
    source: Path | Sequence[Raw],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    base: Base | None = None,
    compared: int = _COMPARED_ROWS,
) -> TaskFacts:
    """Measures rows.

    Args:
        source: A file (``strategies.data.files``), or rows as they stand in one.
        tokenizer: Counts tokens.
        base: Counts tokens too, and says how near the rows are to it: the model is loaded.
        compared: So many rows from the beginning are held against each other for near duplicates. Where rows share much of
            their text and are none (a long prompt before each), that is nearly all pairs, and takes its time.

    Raises:
        DataError: The file cannot be read, or no row of it can be used.
        ModelError: The base cannot be loaded.
    """
    raw = [row for _, row in read(source)] if isinstance(source, Path) else list(source)
    rows = [row for row in map(_understood, raw) if row is not None]
    if not rows:
        raise DataError(
            f"{source if isinstance(source, Path) else 'rows'}: none of {len(raw)} has the fields of a known shape; expected "
            "input_text and target_text, instruction and output, messages, text, or prompt with chosen and rejected"
        )
    if halves := sum(any(map(_HALF.search, (row.text, *row.answers))) for row in rows):
        raise DataError(
            f"{source if isinstance(source, Path) else 'rows'}: {halves} of {len(raw)} hold half of a surrogate pair "
            "(\\ud800 to \\udfff), which is no character and which no tokenizer takes; expected whole ones"
        )
    tokenizer = tokenizer or (load_tokenizer(base) if base else None)
    shape = Counter(row.shape for row in rows).most_common(1)[0][0]
    labels = Counter(_name(row.label) for row in rows if row.shape == "labels")
    if shape == "labels" and _are_numbers(labels):
        shape, labels = "numbers", Counter()
    texts = [row.text for row in rows]
    sample = _spread(rows, _MEASURED_ROWS)
    count = _counter(tokenizer)
    longest = nlargest(_LONGEST_ROWS, rows, key=lambda row: len(row.text))
    alone = _Row("answers", (), ())
    answers = [max(count(alone, answer) for answer in row.answers) for row in sample if row.answers]
    liked = [_name(row.label).lower() in ("true", "1") for row in rows if row.shape == "single"]
    pairs = sum(row.shape == "pairs" for row in rows)
    perplexity, similarity = _nearness(base, _spread(texts, _READ_ROWS)) if base else (None, None)
    return TaskFacts(
        shape=shape,
        rows=len(rows),
        unusable=len(raw) - len(rows),
        classes=len(labels) or None,
        balance=_evenness(list(labels.values())) if labels else None,
        rarest=min(labels.values()) if labels else None,
        row_tokens=_lengths([_whole(row, count) for row in sample], max(_whole(row, count) for row in longest)),
        answer_tokens=_lengths(answers) if answers else None,
        counted=tokenizer is not None,
        exact_duplicates=len(exact_duplicates(texts)),
        near_duplicates=len(near_duplicates(texts[:compared])),
        compared=min(len(texts), compared),
        scripts=scripts(row.text for row in sample),
        pairs=pairs,
        preference_share=pairs / len(rows),
        liked_share=statistics.fmean(liked) if liked else None,
        perplexity=perplexity,
        similarity=similarity,
    )


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Share of letters by script, from 1 % on, the largest first; a script is the first word of a character's Unicode name."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(_script(letter) for letter in text[:2000] if letter.isalpha())
    total = found.total()
    return {script: count / total for script, count in found.most_common() if count >= total / 100}


def _understood(raw: Raw) -> _Row | None:
    """A row of one of the shapes of ``strategies.data.formats``; None where it has none."""
    if "messages" in raw or "conversations" in raw:
        return _conversation(_messages(raw["messages"] if "messages" in raw else sharegpt(raw)), raw.get("tools"))
    for question, answer in (("input_text", "target_text"), ("instruction", "output")):
        if _is_text(raw.get(question)) and _is_text(raw.get(answer)):
            more = f"\n{raw['input']}" if question == "instruction" and _is_text(raw.get("input")) else ""
            return _Row("answers", _asked(raw[question] + more), (raw[answer],), longer=raw[answer])
    if before := _messages(raw.get("prompt")):
        both = [_said(raw.get(name)) for name in ("chosen", "rejected")]
        if all(both):
            return _Row("pairs", before, tuple(both), longer=max(both, key=len))
        if said := _said(raw.get("completion")):
            return _Row("single", before, (said,), raw.get("label"), longer=said)
        return _Row("prompts", before, ())
    if _is_text(raw.get("text")):
        return _Row("labels" if _name(raw.get("label")) else "texts", (), (), raw.get("label"), longer=raw["text"])
    return None


def _conversation(messages: tuple[Message, ...], tools: Any) -> _Row | None:
    spoken = tuple(message["content"] for at, message in enumerate(messages) if at and message["role"] in _SPOKEN)
    return _Row("answers", messages[:-1], spoken, longer=messages[-1]["content"], tools=tools) if spoken else None


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return _asked(value) if value.strip() else ()
    if not isinstance(value, list):
        return ()
    good = all(isinstance(one, dict) and isinstance(one.get("role"), str) and _is_text(one.get("content")) for one in value)
    return tuple({"role": one["role"], "content": one["content"]} for one in value) if good else ()


def _asked(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _said(value: Any) -> str:
    messages = _messages(value)
    return messages[-1]["content"] if messages else ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _name(label: Any) -> str:
    return label.strip() if isinstance(label, str) else "" if label is None else str(label)


def _are_numbers(labels: Mapping[str, int]) -> bool:
    """Every label is a number, and one at least is not whole: whole numbers may be names."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return False
    return any(not number.is_integer() for number in numbers if math.isfinite(number))


def _evenness(counts: Sequence[int]) -> float:
    if len(counts) == 1:
        return 0.0
    shares = [count / sum(counts) for count in counts]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))


def _spread(rows: Sequence[T], most: int) -> Sequence[T]:
    if len(rows) <= most:
        return rows
    return [rows[at * len(rows) // most] for at in range(most)]


def _whole(row: _Row, count: Callable[[_Row, str], int]) -> int:
    """Tokens of a row as it trains; of two answers, with the one that has more."""
    return max(count(row, answer) for answer in (row.answers if row.shape == "pairs" else (row.longer,)))


def _lengths(tokens: Sequence[int], longest: int = 0) -> Lengths:
    middle, high = np.percentile(tokens, [50, 95], method="inverted_cdf")
    return Lengths(int(middle), int(high), max([longest, *tokens]))


def _counter(tokenizer: "PreTrainedTokenizerBase | None") -> Callable[[_Row, str], int]:
    """How many tokens a row's messages and what follows them have: with a tokenizer, as training encodes them."""
    if tokenizer is None:
        return lambda row, text: max(
            1, math.ceil(len(" ".join([*(one["content"] for one in row.before), text]).encode()) / _BYTES_A_TOKEN)
        )

    def count(row: _Row, text: str) -> int:
        before = [dict(one) for one in row.before]
        if before and text:
            return len(answered_ids(before, text, tokenizer, row.tools if isinstance(row.tools, list) else None))
        if before:
            return len(prompt_ids(before, tokenizer))
        return max(1, len(text_ids(text, tokenizer) if row.shape == "texts" else tokenizer(text, verbose=False)["input_ids"]))

    return count


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]


# The base's own domain ------------------------------------------------------------------------------------------------


def _nearness(base: Base, texts: Sequence[str]) -> tuple[float | None, float | None]:
    """Perplexity and similarity; (None, None) for a base that writes no text."""
    import torch

    from strategies.architecture import read as architecture_of

    if architecture_of(str(base.folder)).kind != "decoder":
        return None, None
    model, tokenizer = load(base, Plan(base_model=base.name))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    theirs = _nats_a_token(model, [tokenizer(text, verbose=False)["input_ids"][:_READ_TOKENS] for text in texts])
    own = _nats_a_token(model, _own_texts(model, tokenizer))
    return math.exp(theirs), min(1.0, own / theirs) if theirs > 0 else 1.0


def _own_texts(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """What the base writes when nothing is asked: samples of the distribution that it has learnt, neither cut nor sharpened."""
    import torch

    first = next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)
    written = torch.full((_OWN_TEXTS, 1), int(first), device=model.device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        before = None
        for _ in range(_OWN_TOKENS):
            said = model(written[:, -1:], past_key_values=before, use_cache=True)
            before, shares = said.past_key_values, said.logits[:, -1].float().softmax(-1)
            written = torch.cat([written, torch.multinomial(shares, 1)], dim=1)
    ended = [
        row.index(tokenizer.eos_token_id, 1) + 1 if tokenizer.eos_token_id in row[1:] else None for row in written.tolist()
    ]
    return [row[:end] for row, end in zip(written.tolist(), ended, strict=True)]


def _nats_a_token(model: "PreTrainedModel", rows: Iterable[Sequence[int]]) -> float:
    import torch

    total, tokens = 0.0, 0
    for row in rows:
        if len(row) < 2:
            continue
        ids = torch.tensor([row], device=model.device)
        with torch.inference_mode():
            loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
        total, tokens = total + float(loss), tokens + len(row) - 1
    return total / tokens if tokens else 0.0
