"""Learning from single answers that were liked or not, by TRL's KTOTrainer (Ethayarajh et al. 2024, arXiv:2402.01306).

The loss measures each answer against ``z_0``, the policy's mean distance from the reference, which is estimated on answers that
belong to other prompts (section 4.1): within a batch each prompt is read with the answer of the row before it.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.objectives.reference import nobody, prepare
from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def mismatched(rows: Sequence[dict[str, Any]], batch_size: int, max_length: int, seed: int) -> list[dict[str, Any]]:
    """The rows in a drawn order, each with the answer of the one before it in its batch under ``KL_completion_ids``.

    The order is fixed here, since the trainer must keep batches as they are; files often hold all liked answers first.

    Args:
        rows: Encoded for kto.
        batch_size: At least 2.
        max_length: Tokens of a prompt and its answer; here both answers are cut to it.
        seed: Draws the order.
    """
    drawn = list(rows)
    random.Random(seed).shuffle(drawn)  # noqa: S311 - no secret
    made = []
    for first in range(0, len(drawn), batch_size):
        batch = drawn[first : first + batch_size]
        for at, row in enumerate(batch):
            room = max_length - len(row["prompt_ids"])
            answers = {"completion_ids": row["completion_ids"], "KL_completion_ids": batch[at - 1]["completion_ids"]}
            made.append(row | {name: ids[:room] for name, ids in answers.items()})
    return made


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that ``mismatched`` has seen; ``arguments`` are fields of ``trl.KTOConfig``."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class OnIds(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    prepare(work.model)
    settings = work.plan.kto
    made: Trainer = work.trainer_class(OnIds)(
        model=work.model,
        ref_model=nobody(work.model),
        args=KTOConfig(
            **arguments,
            max_length=None,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        ),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    made.ref_model = None
    made.precompute_ref_logps = "ref_logps" in work.train.rows[0]
    return made
