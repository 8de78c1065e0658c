"""Supervised fine-tuning on answers, by TRL's SFTTrainer."""

from typing import TYPE_CHECKING, Any

from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(work: Work, callbacks: list[Any], kind: Any = None, **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already; ``arguments`` are fields of ``trl.SFTConfig``.

    Args:
        work: What to train.
        callbacks: Of the trainer.
        kind: A subclass of TRL's trainer in its place.
        arguments: Fields of ``trl.SFTConfig``.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made: Trainer = work.trainer_class(kind or SFTTrainer)(
        model=work.model,
        args=SFTConfig(**arguments, max_length=None, completion_only_loss=False),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    return made
