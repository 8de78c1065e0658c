"""A model that scores answers as people compare them, by TRL's RewardTrainer.

The Bradley-Terry likelihood of each preference, ``sigma(r(chosen) - r(rejected))`` (Ouyang et al. 2022, arXiv:2203.02155,
eq. 1). The score is read at the answer's last token.
"""

from typing import TYPE_CHECKING, Any

from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already; ``arguments`` are fields of ``trl.RewardConfig``."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    made: Trainer = work.trainer_class(RewardTrainer)(
        model=work.model,
        args=RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    return made
