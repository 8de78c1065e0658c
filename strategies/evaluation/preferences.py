"""How well a model tells liked answers from others, and how far it went for it: dpo, kto, reward, rl.

A policy ``pi`` implies a reward for every answer, ``r = beta (log pi(y | x) - log pi_ref(y | x))`` (Rafailov et al. 2023,
arXiv:2305.18290, eq. 6): what it finds more likely than its reference did. Held-out losses are those of the papers, whatever
variant trains, so that variants can be compared.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

from protocol.adapter import Adapter
from protocol.plan import Objective, Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.evaluation.figures import Figure, mean, ratio
from strategies.log_probs import Pair, answer_log_probs, token_log_probs
from strategies.objectives.kto import mismatched
from strategies.objectives.rewards import rewards_of, scores
from strategies.writer import continuations

MEASURED: tuple[Objective, ...] = ("dpo", "kto", "reward", "rl")


def figures(
    plan: Plan, base: Base, rows: Sequence[dict[str, Any]], adapter: Adapter | None, reference: Adapter
) -> dict[str, Figure]:
    """Measures once, row by row.

    Args:
        plan: Of one of these objectives.
        base: The frozen base.
        rows: Encoded; they keep their order.
        adapter: None for the base as it is.
        reference: The adapter that the model had before the objective began.

    Returns:
        - dpo: ``loss`` (``-log sigma(r_chosen - r_rejected)``), ``reward-accuracy`` (share of pairs with the greater reward for
          the chosen answer; equal rewards do not count, so that a model against itself has 0), ``reward-margin`` (mean
          difference of the two).
        - kto: ``loss`` (arXiv:2402.01306, eq. 8, with ``z_0`` once, over all rows), ``reward-desirable``,
          ``reward-undesirable`` (means; absent where there are no such rows).
        - reward: ``loss`` and ``accuracy``, as for dpo with the model's own scores.
        - rl: ``reward`` of one answer to each prompt, drawn at the plan's temperature, and ``kl`` to the reference at that
          temperature, per token: the mean of ``log pi - log pi_ref`` over what was drawn, which chance may take below zero.
    """
    of = {"dpo": _dpo, "kto": _kto, "reward": _reward, "rl": _rl}[plan.objective]
    return of(plan, base, list(rows), adapter, reference)


def _dpo(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, Figure]:
    pairs: list[Pair] = [(row["prompt_ids"], row[ids]) for ids in ("chosen_ids", "rejected_ids") for row in rows]
    implied = [plan.dpo.beta * ratio for ratio in _log_ratios(plan, base, pairs, adapter, reference)]
    margins = [chosen - rejected for chosen, rejected in zip(implied[: len(rows)], implied[len(rows) :], strict=True)]
    return {"loss": _bradley_terry(margins), "reward-accuracy": _won(margins), "reward-margin": mean(margins)}


def _kto(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, Figure]:
    settings = plan.kto
    order = mismatched([row | {"at": at} for at, row in enumerate(rows)], len(rows), plan.data.max_length, plan.training.seed)
    pairs: list[Pair] = [(row["prompt_ids"], row[ids]) for ids in ("completion_ids", "KL_completion_ids") for row in order]
    ratios = _log_ratios(plan, base, pairs, adapter, reference)
    z_0 = max(0.0, fmean(ratios[len(order) :]))
    own = [one for _, one in sorted(zip((row["at"] for row in order), ratios, strict=False))]
    likes = [bool(row["label"]) for row in rows]
    losses = [
        settings.desirable_weight * _sigmoid(settings.beta * (z_0 - one))
        if liked
        else settings.undesirable_weight * _sigmoid(settings.beta * (one - z_0))
        for liked, one in zip(likes, own, strict=True)
    ]
    found = {"loss": mean(losses, "lower")}
    kinds: tuple[tuple[str, bool, Literal["higher", "lower"]], ...] = (
        ("reward-desirable", True, "higher"),
        ("reward-undesirable", False, "lower"),
    )
    for name, kind, better in kinds:
        if kind in likes:
            chosen = [float(liked is kind) for liked in likes]
            implied = [settings.beta * one * share for one, share in zip(own, chosen, strict=True)]
            found[name] = ratio(implied, chosen, better)
    return found


def _reward(
    plan: Plan,
    base: Base,
    rows: list[dict[str, Any]],
    adapter: Adapter | None,
    reference: Adapter,  # noqa: ARG001
) -> dict[str, Figure]:
    model, tokenizer = with_adapter(plan, base, adapter)
    texts = [row[ids] for ids in ("chosen_ids", "rejected_ids") for row in rows]
    found = scores(model, texts, int(tokenizer.pad_token_id or 0), plan.training.batch_size)
    margins = [chosen - rejected for chosen, rejected in zip(found[: len(rows)], found[len(rows) :], strict=True)]
    return {"loss": _bradley_terry(margins), "accuracy": _won(margins)}


def _rl(plan: Plan, base: Base, rows: list[dict[str, Any]], adapter: Adapter | None, reference: Adapter) -> dict[str, Figure]:
    model, tokenizer = with_adapter(plan, base, adapter)
    settings, size = plan.rl, plan.training.batch_size
    answers = continuations(
        model,
        tokenizer,
        [row["prompt_ids"] for row in rows],
        temperature=settings.temperature,
        max_new_tokens=settings.max_completion_length,
        batch_size=size,
        seed=plan.training.seed,
    )
    pairs: list[Pair] = [(row["prompt_ids"], answer) for row, answer in zip(rows, answers, strict=True)]
    pad = int(tokenizer.pad_token_id or 0)
    own = token_log_probs(model, pairs, pad, size, settings.temperature)
    del model
    others = token_log_probs(with_adapter(plan, base, reference)[0], pairs, pad, size, settings.temperature)
    # Not GRPO's estimate, which is never negative (arXiv:2402.03300, eq. 4): it adds pi_ref / pi - 1, whose mean is zero by
    # tokens that a policy which says one thing hardly ever draws. There it reads up to one nat a token too little.
    distances = [float((a - b).sum()) for a, b in zip(own, others, strict=True)]
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
    rewards = [reward([row["prompt"] for row in rows], texts) for reward in rewards_of(plan)]
    return {
        "reward": mean(map(sum, zip(*rewards, strict=True))),
        "kl": ratio(distances, list(map(len, answers)), "lower", "nats"),
    }


def _log_ratios(plan: Plan, base: Base, pairs: list[Pair], adapter: Adapter | None, reference: Adapter) -> list[float]:
    """``log pi(y | x) - log pi_ref(y | x)`` of each pair; only one of the two models is in memory at a time."""

    def likely(held: Adapter | None) -> list[float]:
        model, tokenizer = with_adapter(plan, base, held)
        return answer_log_probs(model, pairs, int(tokenizer.pad_token_id or 0), plan.training.batch_size)

    before = likely(reference)
    same = (adapter or _NOTHING).digest() == reference.digest()
    return [a - b for a, b in zip(before if same else likely(adapter), before, strict=True)]


_NOTHING = Adapter()


def _bradley_terry(margins: list[float]) -> Figure:
    return mean((math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0) for margin in margins), "lower", "nats")


def _won(margins: list[float]) -> Figure:
    return mean(float(margin > 0) for margin in margins)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
