"""Direct preference optimisation on pairs of answers, by TRL's DPOTrainer (Rafailov et al. 2023, arXiv:2305.18290)."""

from typing import TYPE_CHECKING, Any

from strategies.objectives.reference import nobody, prepare
from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already; ``arguments`` are fields of ``trl.DPOConfig``."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    prepare(work.model)
    settings = work.plan.dpo
    made: Trainer = work.trainer_class(OnIds)(
        model=work.model,
        ref_model=nobody(work.model),
        args=DPOConfig(
            **arguments,
            max_length=None,
            beta=settings.beta,
            loss_type=[settings.loss_type],
            label_smoothing=settings.label_smoothing,
        ),
        train_dataset=Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    made.ref_model = None
    made.precompute_ref_logps = "ref_chosen_logps" in work.train.rows[0]
    return made
