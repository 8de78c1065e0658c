"""How well a model tells liked answers from others, and how far it went for it: dpo, kto, reward, rl.

A policy ``pi`` implies a reward for every answer, ``r = beta (log pi(y | x) - log pi_ref(y | x))`` (Rafailov et al. 2023,
arXiv:2305.18290, eq. 6): what it finds more likely than its reference did. Held-out losses are those of the papers, whatever
variant trains, so that variants can be compared.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from protocol.adapter import Adapter
from protocol.plan import Objective, Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.log_probs import Pair, answer_log_probs, token_log_probs
from strategies.objectives.kto import mismatched
from strategies.objectives.rewards import rewards_of, scores

MEASURED: tuple[Objective, ...] = ("dpo", "kto", "reward", "rl")


def measure(
    plan: Plan, base: Base, rows: Sequence[dict[str, Any]], adapter: Adapter | None, reference: Adapter
) -> dict[str, float]:
    """Measures once.

    Args:
        plan: Of one of these objectives.
        base: The frozen base.
        rows: Encoded.
        adapter: None for the base as it is.
        reference: The adapter that the model had before the objective began.

    Returns:
        - dpo: ``loss`` (``-log sigma(r_chosen - r_rejected)``), ``reward-accuracy`` (share of pairs with the greater reward for
          the chosen answer; one of equal rewards counts half, so that a model against itself has 0.5), ``reward-margin``
          (mean difference of the two).
        - kto: ``loss`` (arXiv:2402.01306, eq. 8, with ``z_0`` over all rows), ``reward-desirable`` and ``reward-undesirable``
          (means; absent where there are no such rows).
        - reward: ``loss`` and ``accuracy``, as for dpo with the model's own scores.
        - rl: ``reward`` of one answer to each prompt, drawn at the plan's temperature, and ``kl`` to the reference, per token.
    """
    figures = {"dpo": _dpo, "kto": _kto, "reward": _reward, "rl": _rl}[plan.objective]
    return figures(plan, base, list(rows), adapter, reference)


def _dpo(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, float]:
    pairs: list[Pair] = [(row["prompt_ids"], row[ids]) for ids in ("chosen_ids", "rejected_ids") for row in rows]
    implied = [plan.dpo.beta * ratio for ratio in _log_ratios(plan, base, pairs, adapter, reference)]
    margins = [chosen - rejected for chosen, rejected in zip(implied[: len(rows)], implied[len(rows) :], strict=True)]
    return {"loss": _bradley_terry(margins), "reward-accuracy": _won(margins), "reward-margin": fmean(margins)}


def _kto(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, float]:
    settings = plan.kto
    rows = mismatched(rows, len(rows), plan.data.max_length, plan.training.seed)
    pairs: list[Pair] = [(row["prompt_ids"], row[ids]) for ids in ("completion_ids", "KL_completion_ids") for row in rows]
    ratios = _log_ratios(plan, base, pairs, adapter, reference)
    own, z_0 = ratios[: len(rows)], max(0.0, fmean(ratios[len(rows) :]))
    liked = [ratio for ratio, row in zip(own, rows, strict=True) if row["label"]]
    others = [ratio for ratio, row in zip(own, rows, strict=True) if not row["label"]]
    losses = [settings.desirable_weight * _sigmoid(settings.beta * (z_0 - ratio)) for ratio in liked]
    losses += [settings.undesirable_weight * _sigmoid(settings.beta * (ratio - z_0)) for ratio in others]
    means = {"reward-desirable": liked, "reward-undesirable": others}
    return {"loss": fmean(losses)} | {name: settings.beta * fmean(each) for name, each in means.items() if each}


def _reward(
    plan: Plan,
    base: Base,
    rows: list[dict[str, Any]],
    adapter: Adapter | None,
    reference: Adapter,  # noqa: ARG001
) -> dict[str, float]:
    model, tokenizer = with_adapter(plan, base, adapter)
    texts = [row[ids] for ids in ("chosen_ids", "rejected_ids") for row in rows]
    found = scores(model, texts, int(tokenizer.pad_token_id or 0), plan.training.batch_size)
    margins = [chosen - rejected for chosen, rejected in zip(found[: len(rows)], found[len(rows) :], strict=True)]
    return {"loss": _bradley_terry(margins), "accuracy": _won(margins)}


def _rl(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, float]:
    model, tokenizer = with_adapter(plan, base, adapter)
    answers = _drawn(model, tokenizer, [row["prompt_ids"] for row in rows], plan)
    pairs: list[Pair] = [(row["prompt_ids"], answer) for row, answer in zip(rows, answers, strict=True)]
    pad, size = int(tokenizer.pad_token_id or 0), plan.training.batch_size
    own = token_log_probs(model, pairs, pad, size)
    del model
    others = token_log_probs(with_adapter(plan, base, reference)[0], pairs, pad, size)
    # k3 of http://joschu.net/blog/kl-approx.html, which GRPO takes too (arXiv:2402.03300, eq. 4): never negative.
    distances = [float(d) for a, b in zip(own, others, strict=True) for d in (b - a).exp() - (b - a) - 1]
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
    rewards = [reward([row["prompt"] for row in rows], texts) for reward in rewards_of(plan)]
    return {"reward": fmean(map(sum, zip(*rewards, strict=True))), "kl": fmean(distances)}


def _drawn(model: Any, tokenizer: Any, prompts: list[list[int]], plan: Plan) -> list[list[int]]:
    """One answer to each prompt with the token that ends it, the same for the same seed."""
    import torch

    torch.manual_seed(plan.training.seed)
    pad, ends, answers = int(tokenizer.pad_token_id or 0), _ends(model, tokenizer), []
    for first in range(0, len(prompts), plan.training.batch_size):
        part = prompts[first : first + plan.training.batch_size]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=plan.rl.max_completion_length,
                do_sample=True,
                temperature=plan.rl.temperature,
                top_k=0,
                top_p=1.0,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
            )[:, width:].tolist()
        answers += [
            answer[: next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))] for answer in made
        ]
    return answers


def _ends(model: Any, tokenizer: Any) -> set[int]:
    told = model.generation_config.eos_token_id
    return {token for token in (*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id) if token is not None}


def _log_ratios(plan: Plan, base: Base, pairs: list[Pair], adapter: Adapter | None, reference: Adapter) -> list[float]:
    """``log pi(y | x) - log pi_ref(y | x)`` of each pair; only one of the two models is in memory at a time."""

    def likely(held: Adapter | None) -> list[float]:
        model, tokenizer = with_adapter(plan, base, held)
        return answer_log_probs(model, pairs, int(tokenizer.pad_token_id or 0), plan.training.batch_size)

    before = likely(reference)
    same = (adapter or _NOTHING).digest() == reference.digest()
    return [a - b for a, b in zip(before if same else likely(adapter), before, strict=True)]


_NOTHING = Adapter()


def _bradley_terry(margins: list[float]) -> float:
    return fmean(math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0) for margin in margins)


def _won(margins: list[float]) -> float:
    return fmean((margin > 0) + (margin == 0) / 2 for margin in margins)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
