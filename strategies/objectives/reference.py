"""The model that dpo, kto and rl stay near: what it was before the objective began.

Preference optimisation moves a policy away from a reference ``pi_ref`` and pays for the distance (Rafailov et al. 2023,
arXiv:2305.18290, eq. 3; Ethayarajh et al. 2024, arXiv:2402.01306). The reference is the model that the objective found: the
base, or the base with the adapter of the stage before (supervised fine-tuning). It stays the same for all of the objective,
over all rounds of a federation: one that moved with each round would let the policy walk away step by step, at no price.

It costs no memory wherever that is possible:

- The base itself, under an adapter of PEFT: the adapter is switched off.
- Otherwise, where the answers are given (dpo, kto): their log-probabilities are computed once, before training.
- Where answers are new in every step (rl): a second, frozen model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from protocol.errors import ModelError
from protocol.plan import Objective, Plan
from strategies.log_probs import answer_log_probs

OVER_GIVEN_ANSWERS: tuple[Objective, ...] = ("dpo", "kto")


def switchable(model: Any) -> bool:
    """Whether the model's adapter can be switched off, which leaves the base."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def told(rows: Sequence[dict[str, Any]], model: Any, plan: Plan, pad: int) -> list[dict[str, Any]]:
    """The same rows with the reference's log-probability of each answer, in the columns where TRL looks for them.

    Args:
        rows: Encoded for dpo or kto (with what ``kto.mismatched`` adds).
        model: The reference.
        plan: Its batch size.
        pad: Any token id.
    """
    columns = {
        column: answer_log_probs(model, [(row["prompt_ids"], row[ids]) for row in rows], pad, plan.training.batch_size)
        for ids, column in _COLUMNS.items()
        if ids in rows[0]
    }
    return [row | {column: values[at] for column, values in columns.items()} for at, row in enumerate(rows)]


_COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}


def nobody(model: Any) -> Any:
    """A model without weights, to be given to TRL in place of a reference, or it would make a second adapter or load a base."""
    from torch.nn import Module

    class Nobody(Module):  # type: ignore[misc]
        config = model.config

        def forward(self) -> None:
            raise NotImplementedError

    return Nobody()


def prepare(model: Any) -> None:
    """Lets the adapter be switched off and on again without thawing what was frozen: PEFT makes all of it trainable again.

    Without this, the factor that FFA-LoRA keeps fixed would get gradients and count when they are clipped.

    Raises:
        ModelError: The adapter changes the output layer, whose weight TRL reads by itself: it would never train.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ModelError("the adapter's target_modules name the output layer, which dpo, kto and rl cannot train; leave it out")
    if not switchable(model):
        return
    switch_off = model.disable_adapter

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with switch_off():
            yield
        for parameter, trains in trained:
            parameter.requires_grad_(trains)

    model.disable_adapter = disable_adapter
