"""What an objective needs to make its trainer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.plan import Plan
from strategies.data.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Work:
    """One training, prepared.

    Attributes:
        model: With what is trainable attached.
        tokenizer: For padding.
        plan: What to do.
        train: Encoded rows.
        held_out: The same, for evaluation while training.
        dense: What trains and is no factor, by the name that adapters give it.
        head: Which of these are a head of the task's own.
        own_labels: Classification: rows of the head that may train; None for all.
        reference: rl: a second model to stay near; None where that is the model with its adapter switched off.
        trainer_class: Makes the trainer class out of the library's (it adds the schedule).
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    plan: Plan
    train: Encoded
    held_out: Encoded | None
    dense: Mapping[str, Any]
    head: frozenset[str]
    own_labels: frozenset[int] | None
    reference: Any
    trainer_class: Callable[[Any], Any]
