"""Optimising answers that the model writes itself against a reward, by TRL's GRPOTrainer and RLOOTrainer.

Both take the answers to one prompt as each other's baseline in place of a value model: GRPO (Shao et al. 2024,
arXiv:2402.03300, eq. 3) by their mean and spread, RLOO (Ahmadian et al. 2024, arXiv:2402.14740) by the mean of the others. A
token's probability ratio is clipped at ``1 ± epsilon``, which matters from the second step on the same answers
(``num_iterations``). The distance from the reference is part of GRPO's loss and of RLOO's reward.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.objectives.reference import prepare, switchable
from strategies.objectives.rewards import Reward, rewards_of
from strategies.objectives.work import Work

if TYPE_CHECKING:
    from transformers import Trainer


def prompts_per_step(plan: Plan) -> int:
    """Prompts behind one optimizer step; each is answered ``num_generations`` times."""
    settings = plan.training
    return settings.batch_size * settings.gradient_accumulation_steps // plan.rl.num_generations


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A TRL trainer over prompts; ``arguments`` are fields of ``trl.GRPOConfig`` and ``trl.RLOOConfig``.

    Raises:
        DataError: There are fewer prompts than one step takes.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer.utils import add_fused_lm_head

    settings = work.plan.rl
    if len(work.train.rows) < (needed := prompts_per_step(work.plan)):
        raise DataError(
            f"{len(work.train.rows)} prompt(s), one step takes {needed}; give more, or a smaller training.batch_size"
        )
    prepare(work.model)
    config, kind = (GRPOConfig, GRPOTrainer) if settings.algorithm == "grpo" else (RLOOConfig, RLOOTrainer)
    arguments["per_device_eval_batch_size"] = settings.num_generations
    made: Trainer = work.trainer_class(kind)(
        model=work.model,
        reward_funcs=[_for_trl(reward) for reward in rewards_of(work.plan)],
        args=config(
            **arguments,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            beta=0.0,  # or TRL would make a second adapter or load a second base; it is set below
            epsilon=settings.epsilon,
            num_iterations=settings.num_iterations,
            metric_for_best_model="eval_reward",
            greater_is_better=True,
        ),
        train_dataset=_prompts(work.train.rows, Dataset),
        eval_dataset=_prompts(work.held_out.rows, Dataset) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    if work.reference is not None:
        inner = work.reference.get_base_model() if switchable(work.reference) else work.reference
        add_fused_lm_head(inner, temperature=settings.temperature)
        made.ref_model = made.accelerator.prepare_model(work.reference, evaluation_mode=True)
    made.beta = settings.beta
    return made


def _prompts(rows: Sequence[dict[str, Any]], kind: Any) -> Any:
    return kind.from_list([{"prompt": row["prompt"]} for row in rows])


def _for_trl(reward: Reward) -> Any:
    def scored(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return reward(prompts, [completion[0]["content"] for completion in completions])

    return scored
