"""The texts that a bundle is compared on: rows that are given, or a few of our own that any model can read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.parity import Kind, Probe
from protocol.errors import ConfigurationError
from protocol.plan import Plan
from strategies.data.encode import encode, prompt_ids
from strategies.evaluation.source import of_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Callable[[str], list[int]]
# What devices are asked, in several scripts and registers: prose, questions, numbers, lists, code.
TEXTS = (
    "Once upon a time there was a little girl who lived near the sea. Every morning she walked along the beach.",
    "The committee will meet again on Thursday to discuss the budget, which has grown by a third since January.",
    "What are the opening hours of the branch on Market Street, and can I make an appointment for next Tuesday at 10:30?",
    "Please cancel my order 48213 and send the refund of $129.95 to the card that ends in 4417.",
    "Patients over 65 should take one tablet of 20 mg in the morning with food; do not take more than two tablets in 24 hours.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)",
    "1. Switch the router off.\n2. Wait for thirty seconds.\n3. Switch it on again and wait until the green light is steady.",
    "The contract ends three months after either party has given notice in writing, unless both agree on an earlier date.",
    "请问我的账户余额是多少？昨天我转账了五百元，可是还没有到账。",
    "今天天气很好，我们一起去公园散步，看到了许多美丽的花。",
    "La reunión empieza a las nueve de la mañana. ¿Puedes traer los documentos que firmamos la semana pasada?",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; it takes place in the chloroplasts of plants.",
)
_MOST_TOKENS = 256
_READ = ("sft", "pretraining", "distillation", "classification", "regression")


def default(plain: Ids, said: Ids | None, context_tokens: int) -> list[Probe]:
    """Our own texts; to a decoder that is talked to, each is shown both as text and as what a user says.

    Args:
        plain: Token ids of a text.
        said: Token ids of a conversation in which a user says it; None where there is none.
        context_tokens: Most that the model reads.
    """
    read = [each(text) for each in (plain, said) if each for text in TEXTS]
    longest = min(_MOST_TOKENS, context_tokens)
    return [Probe(ids[:longest]) for ids in read if ids]


def plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text by transformers."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def said_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a conversation in which a user says a text, by transformers."""
    return prompt_ids([{"role": "user", "content": text}], tokenizer)


def given(kind: Kind, rows: Path, plan: Plan, tokenizer: "PreTrainedTokenizerBase", context_tokens: int) -> list[Probe]:
    """Rows of a file, encoded as training encodes them.

    Raises:
        ConfigurationError: The plan is for pairs, prompts or judgements, which no single text stands for.
        DataError: They cannot be read, or nothing is left of them.
    """
    if plan.objective not in _READ:
        raise ConfigurationError("rows", [f"found objective {plan.objective}; expected one of {', '.join(_READ)}"])
    longest = min(plan.data.max_length, context_tokens)
    encoded = encode(of_file(plan, rows).rows, tokenizer, longest, plan.objective).rows
    return [Probe(row["input_ids"], None if kind == "embedder" else _wanted(row["labels"])) for row in encoded]


def _wanted(labels: Sequence[int] | float) -> Sequence[int] | int | None:
    return None if isinstance(labels, float) else labels
