"""A label for a text: cross-entropy over the head's rows, by the Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

from strategies.data.encode import Encoded

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(kind: Any, model: Any, tokenizer: Any, train: Encoded, held_out: Encoded | None, **arguments: Any) -> "Trainer":
    """A Hugging Face trainer over rows that are encoded already; the arguments are those of ``objectives.sft.trainer``."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    callbacks = arguments.pop("callbacks")
    made: Trainer = kind(Trainer)(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(train.rows),
        eval_dataset=Dataset.from_list(held_out.rows) if held_out else None,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    return made
