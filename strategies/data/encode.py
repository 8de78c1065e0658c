"""From rows to token ids: loss on the answer only, long rows cut as TRL cuts them, and how many were cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.errors import DataError
from protocol.plan import Objective
from strategies.data.formats import (
    Conversation,
    Feedback,
    LabelledText,
    Message,
    PlainText,
    Preference,
    Prompt,
    Row,
    ScoredText,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training.

    Attributes:
        rows: By objective:

            - sft, distillation: ``input_ids`` and ``labels``, one per token, -100 where there is no loss; of a text beside them
              there is loss on all of it.
            - pretraining: the same with loss everywhere: blocks of ``max_length`` tokens, cut from all texts in one line.
            - classification, regression: ``input_ids`` and ``labels``, one int or float.
            - dpo: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
            - reward: ``chosen_ids``, ``rejected_ids``, each with its prompt.
            - kto: ``prompt_ids``, ``completion_ids`` (not cut: other prompts leave it other room), ``label``.
            - rl: ``prompt`` (messages), ``prompt_ids``.
        cut: Rows that were longer than ``max_length``.
        dropped: Rows of which nothing was left to learn from.
        longest: Tokens of the longest row, before it was cut.
    """

    rows: list[dict[str, Any]]
    cut: int
    dropped: int
    longest: int


@dataclass(frozen=True)
class _One:
    """One row, None where nothing is left of it, and how long it was."""

    row: dict[str, Any] | None
    tokens: int


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, objective: Objective = "sft") -> Encoded:
    """Tokenises rows of one kind.

    A conversation is rendered by the tokenizer's chat template twice, with and without its answer; the answer begins where
    the two differ, as in TRL. Of two answers to one prompt both begin where the first of them differs from it. A reward model
    reads an answer at its end, so a pair that is too long for it is dropped and not cut, as in TRL.

    Args:
        rows: All of the kind that the objective takes (``strategies.data.formats``).
        tokenizer: With a chat template.
        max_length: Tokens.
        objective: What they are for.

    Raises:
        DataError: Nothing is left to train on.
    """
    if objective == "pretraining":
        made = list(_packed(rows, tokenizer, max_length))
    else:
        made = [_encoded(row, tokenizer, max_length, objective) for row in rows]
    kept = [one.row for one in made if one.row is not None]
    if not kept:
        raise DataError(
            f"none of {len(rows)} rows leaves anything to learn from within {max_length} tokens; raise data.max_length"
        )
    cut = sum(one.tokens > max_length for one in made)
    return Encoded(kept, cut, len(made) - len(kept), max(one.tokens for one in made))


def is_usable(row: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int, objective: Objective = "sft") -> bool:
    """Whether anything is left to learn from within ``max_length`` tokens; of a text there always is."""
    return isinstance(row, LabelledText | ScoredText | PlainText) or (
        _encoded(row, tokenizer, max_length, objective).row is not None
    )


def prompt_ids(prompt: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", tools: Any = None) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak."""
    return _render(list(prompt), tokenizer, tools, add_generation_prompt=True)


def answered_ids(
    prompt: Sequence[Message], answer: str, tokenizer: "PreTrainedTokenizerBase", tools: Any = None, role: str = "assistant"
) -> list[int]:
    """Token ids of a conversation with its answer."""
    return _render([*prompt, {"role": role, "content": answer}], tokenizer, tools)


def text_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text that ends with the end-of-text token."""
    end = tokenizer.eos_token or ""
    return list(tokenizer(text if text.endswith(end) else text + end, verbose=False)["input_ids"])


def _encoded(row: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int, objective: Objective) -> _One:
    match row:
        case Conversation():
            return _conversation(row, tokenizer, max_length)
        case LabelledText(text, label):
            return _labelled(text, label, tokenizer, max_length)
        case ScoredText(text, score):
            return _labelled(text, score, tokenizer, max_length)
        case Preference() if objective == "reward":
            return _pair_for_a_reader(row, tokenizer, max_length)
        case Preference(prompt, chosen, rejected):
            return _answers(prompt, {"chosen_ids": chosen, "rejected_ids": rejected}, tokenizer, max_length)
        case Feedback(prompt, answer, liked):
            one = _answers(prompt, {"completion_ids": answer}, tokenizer, max_length, whole=True)
            return _One(one.row and one.row | {"label": liked}, one.tokens)
        case Prompt(prompt):
            ids = prompt_ids(prompt, tokenizer)
            return _One({"prompt": list(prompt), "prompt_ids": ids} if len(ids) <= max_length else None, len(ids))
        case PlainText(text):
            ids = text_ids(text, tokenizer)
            return _One({"input_ids": ids[:max_length], "labels": ids[:max_length]} if len(ids) > 1 else None, len(ids))


def _conversation(row: Conversation, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> _One:
    before = prompt_ids(row.prompt, tokenizer, row.tools)
    whole = answered_ids(row.prompt, row.answer, tokenizer, row.tools, row.role)
    shared = _shared(before, whole)
    labels = ([IGNORED] * shared + whole[shared:])[:max_length]
    has_loss = any(label != IGNORED for label in labels[1:])
    return _One({"input_ids": whole[:max_length], "labels": labels} if has_loss else None, len(whole))


def _labelled(text: str, label: float, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> _One:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return _One({"input_ids": ids[:max_length], "labels": label}, len(ids))


def _answers(
    prompt: Sequence[Message],
    answers: dict[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    whole: bool = False,
) -> _One:
    before = prompt_ids(prompt, tokenizer)
    answered = {name: answered_ids(prompt, answer, tokenizer) for name, answer in answers.items()}
    shared = min(_shared(before, ids) for ids in answered.values())
    longest = max(map(len, answered.values()))
    if shared >= max_length:
        return _One(None, longest)
    end = None if whole else max_length
    return _One({"prompt_ids": before[:shared]} | {name: ids[shared:end] for name, ids in answered.items()}, longest)


def _pair_for_a_reader(row: Preference, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> _One:
    ids = {
        "chosen_ids": answered_ids(row.prompt, row.chosen, tokenizer),
        "rejected_ids": answered_ids(row.prompt, row.rejected, tokenizer),
    }
    longest = max(map(len, ids.values()))
    return _One(None if longest > max_length else ids, longest)


def _packed(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Iterable[_One]:
    """Blocks of one endless line, each text closed by the end-of-text token; what is left at the end is a short block."""
    line: list[int] = []
    for row in rows:
        line += text_ids(row.text if isinstance(row, PlainText) else "", tokenizer)
    for at in range(0, len(line), max_length):
        block = line[at : at + max_length]
        yield _One({"input_ids": block, "labels": block} if len(block) > 1 else None, len(block))


def _shared(ids: list[int], others: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), min(len(ids), len(others)))


def _render(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", tools: Any = None, **kwargs: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
