"""A number for a text: the mean squared error of a head with one output, by the Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A Hugging Face trainer over rows that are encoded already; ``arguments`` are ``transformers.TrainingArguments``."""
    import transformers
    from datasets import Dataset

    made: Trainer = work.trainer_class(transformers.Trainer)(
        model=work.model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        data_collator=transformers.DataCollatorWithPadding(work.tokenizer),
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    return made
