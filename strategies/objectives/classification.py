"""A label for a text: cross-entropy over the head's rows, by the Hugging Face Trainer.

Label sets that differ between nodes are a normal case. A node takes the softmax over every label but trains only the rows of
labels that it has: the others stay where the federation put them and act as negatives, so that the encoder learns to keep
away from classes it has never seen, and a node does not unlearn them. (Averaging heads that were trained whole collapses;
restricting the softmax to a node's own labels leaves the label sets uncalibrated against each other: benchmarks/LOG.md.)
"""

from typing import TYPE_CHECKING, Any

from strategies.label_head import last_layer
from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A Hugging Face trainer over rows that are encoded already; ``arguments`` are ``transformers.TrainingArguments``."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, TrainingArguments

    made: Trainer = work.trainer_class(_head_trainer(work))(
        model=work.model,
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        data_collator=DataCollatorWithPadding(work.tokenizer),
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    return made


def _head_trainer(work: Work) -> Any:
    """A Trainer whose head has its own learning rate and trains only the rows of this node's labels."""
    from transformers import Trainer

    rate, labels, own = work.plan.head.learning_rate, len(work.plan.data.labels or ()), work.own_labels
    named = {name: work.dense[name] for name in work.head}

    class HeadTrainer(Trainer):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            head = {id(p) for p in named.values()}
            if own is not None:
                for name in last_layer({name: tuple(p.shape) for name, p in named.items()}, labels):
                    named[name].register_hook(_only(own, labels))
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in head]
                if moved and (rate or own is not None):
                    group["params"] = [p for p in group["params"] if id(p) not in head]
                    # Decay would move the rows that must stay.
                    decay = group["weight_decay"] if own is None else 0.0
                    optimizer.add_param_group({**group, "params": moved, "lr": rate or group["lr"], "weight_decay": decay})
            return optimizer

    return HeadTrainer


def _only(own: frozenset[int], rows: int) -> Any:
    import torch

    mask = torch.zeros(rows)
    mask[sorted(own)] = 1.0
    return lambda gradient: gradient * mask.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1))
