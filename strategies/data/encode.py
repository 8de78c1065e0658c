"""From rows to token ids with labels: loss on the answer only, long rows cut, and how many were cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.errors import DataError
from strategies.data.formats import Conversation, LabelledText, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training.

    Attributes:
        rows: ``input_ids`` and ``labels`` (sft: one per token, -100 where there is no loss; classification: one int).
        cut: Rows that were longer than ``max_length``.
        dropped: Rows of which no answer token was left after cutting.
    """

    rows: list[dict[str, Any]]
    cut: int
    dropped: int


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Tokenises rows of one kind.

    A conversation is rendered by the tokenizer's chat template twice, with and without its answer; the answer begins where
    the two differ, as in TRL.

    Raises:
        DataError: Nothing is left to train on.
    """
    encoded = [_conversation(row, tokenizer) if isinstance(row, Conversation) else _labelled(row, tokenizer) for row in rows]
    cut = sum(len(row["input_ids"]) > max_length for row in encoded)
    kept = [shortened for row in encoded if _has_loss(shortened := _shorten(row, max_length))]
    if not kept:
        raise DataError(f"none of {len(rows)} rows has an answer within {max_length} tokens; raise data.max_length")
    return Encoded(kept, cut, len(encoded) - len(kept))


def is_usable(row: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> bool:
    """Whether anything of the answer is left within ``max_length`` tokens; a labelled text is always usable."""
    return isinstance(row, LabelledText) or _has_loss(_shorten(_conversation(row, tokenizer), max_length))


def prompt_ids(prompt: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", tools: Any = None) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak."""
    return _render(list(prompt), tokenizer, tools, add_generation_prompt=True)


def _conversation(row: Conversation, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    before = prompt_ids(row.prompt, tokenizer, row.tools)
    whole = _render([*row.prompt, {"role": row.role, "content": row.answer}], tokenizer, row.tools)
    shared = next((at for at, (x, y) in enumerate(zip(before, whole, strict=False)) if x != y), min(len(before), len(whole)))
    return {"input_ids": whole, "labels": [IGNORED] * shared + whole[shared:]}


def _render(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", tools: Any, **kwargs: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _labelled(row: LabelledText, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    return {"input_ids": list(tokenizer(row.text, verbose=False)["input_ids"]), "labels": row.label}


def _shorten(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    labels = row["labels"] if isinstance(row["labels"], int) else row["labels"][:max_length]
    return {"input_ids": row["input_ids"][:max_length], "labels": labels}


def _has_loss(row: dict[str, Any]) -> bool:
    return isinstance(row["labels"], int) or any(label != IGNORED for label in row["labels"][1:])
