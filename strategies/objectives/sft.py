"""Supervised fine-tuning on answers, by TRL's SFTTrainer."""

from typing import TYPE_CHECKING, Any

from strategies.data.encode import Encoded

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(kind: Any, model: Any, tokenizer: Any, train: Encoded, held_out: Encoded | None, **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already.

    Args:
        kind: Makes a trainer class out of a Trainer class (``strategies.training`` adds the schedule to it).
        model: With trainable factors.
        tokenizer: For padding.
        train: Rows with ``input_ids`` and ``labels``.
        held_out: The same, for evaluation while training.
        arguments: Fields of ``trl.SFTConfig``, and ``callbacks``.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    callbacks = arguments.pop("callbacks")
    made: Trainer = kind(SFTTrainer)(
        model=model,
        args=SFTConfig(**arguments, max_length=None, completion_only_loss=False),
        train_dataset=Dataset.from_list(train.rows),
        eval_dataset=Dataset.from_list(held_out.rows) if held_out else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    return made
