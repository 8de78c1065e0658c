"""One round's steps on a device: the plan's rates, batches and clipping, over a bundle's gradients.

The same again gives the same bits: rows, order and new directions follow from the round's seed alone.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edge.runtime.adapting.adamw import AdamW, shortening
from edge.runtime.adapting.aside import Aside
from edge.runtime.adapting.passes import Example, Passes
from edge.runtime.adapting.personal import tensors, with_tensors
from edge.runtime.adapting.schedule import share
from protocol.adapter import Adapter, Array, Factors
from protocol.errors import DivergenceError, NotNowError
from protocol.plan import Plan
from protocol.product_space import split
from protocol.records import Trains
from strategies.training import Stretch


@dataclass(frozen=True)
class Parts:
    """A round's adapter, divided.

    Attributes:
        start: What trains: the leading directions of each module at the plan's rank, with its scaling; the head.
        frozen: The other directions, which stay as they are.
    """

    start: Adapter
    frozen: Adapter


@dataclass(frozen=True)
class Round:
    """What is trained and how.

    Attributes:
        plan: At the rank that was asked, with the round's seed.
        examples: The round's.
        trains: The factors that train.
        own_labels: The rows of the head that train; None for all.
        stretch: Where on the schedule the round is.
        stop: Why it must end now; empty while it may go on.
        folder: Where moments and gradients lie meanwhile; None for the system's own place.
    """

    plan: Plan
    examples: Sequence[Example]
    trains: Trains
    own_labels: frozenset[int] | None
    stretch: Stretch
    stop: Callable[[], str] = lambda: ""
    folder: Path | None = None


def divided(
    adapter: Adapter, modules: Mapping[str, tuple[int, int]], head: Mapping[str, Array], plan: Plan, *, fresh: bool
) -> Parts:
    """The adapter as it arrived, and new directions where it has fewer than the plan's rank.

    New ones are as PEFT draws them: A uniform within ``1 / sqrt(d_in)``, B zero.

    Args:
        adapter: Of any rank.
        modules: ``(d_out, d_in)`` of what trains.
        head: To begin with where the adapter has none.
        plan: Its rank, its scaling and its seed.
        fresh: All of the adapter stays frozen.
    """
    generator, r = np.random.default_rng(plan.training.seed), plan.lora.r
    scaling = plan.lora.lora_alpha / (math.sqrt(r) if plan.lora.use_rslora else r)
    start, frozen = {}, {}
    for module, (d_out, d_in) in sorted(modules.items()):
        A = (generator.uniform(-1, 1, (r, d_in)) / math.sqrt(d_in)).astype(np.float32)
        B = np.zeros((d_out, r), np.float32)
        if module in adapter.factors:
            own, rest = split(adapter.factors[module], 0 if fresh else r)
            A[: own.r], B[:, : own.r] = own.A, own.B * (own.scaling / scaling)
            if rest.r:
                frozen[module] = rest
        start[module] = Factors(A, B, scaling)
    dense = {name: np.array(adapter.dense.get(name, tensor), np.float32) for name, tensor in head.items()}
    return Parts(Adapter(start, dense), Adapter(frozen))


def fit(passes: Passes, start: Adapter, asked: Round) -> tuple[Adapter, dict[str, float]]:
    """Trains once.

    Returns:
        The adapter, float32, and ``train-loss``, ``train-steps``, ``train-seconds``.

    Raises:
        DivergenceError: Loss or gradient is no number any more.
        NotNowError: It was told to stop.
    """
    begun, plan, settings = time.perf_counter(), asked.plan, asked.plan.training
    size = settings.batch_size * settings.gradient_accumulation_steps
    a_pass = -(-len(asked.examples) // size)
    steps = settings.max_steps or math.ceil(settings.num_train_epochs * a_pass)
    now = {name: each.copy() for name, each in tensors(start).items()}
    masks = _masks(start, asked.own_labels, len(plan.data.labels or ()))
    groups = _groups(now, asked, steps)
    moments = [Aside(asked.folder, optimiser.start({name: now[name] for name in names})) for optimiser, names in groups]
    losses, raw = [], Aside(asked.folder)
    for step in range(steps):
        loss = passes.gradient(with_tensors(start, now), _drawn(asked, step, size, a_pass), raw, asked.stop)
        why = asked.stop()
        if loss is None or why:
            raise NotNowError(f"step {step + 1} of {steps}: {why}; nothing of the round is sent")
        for name, mask in masks.items():
            raw[name] = raw[name] * mask
        shortened = shortening((raw[name] for _, names in groups for name in names), settings.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(shortened)):
            raise DivergenceError(f"step {step + 1}: the loss is no number any more; take a lower training.learning_rate")
        losses.append(loss)
        for (optimiser, names), held in zip(groups, moments, strict=True):
            optimiser.step({name: now[name] for name in names}, raw, held, step + 1, shortened)
        if not all(np.isfinite(each).all() for each in now.values()):
            raise DivergenceError(f"step {step + 1}: a weight is no number any more; take a lower training.learning_rate")
    told = {"train-loss": float(np.mean(losses)), "train-steps": float(steps), "train-seconds": time.perf_counter() - begun}
    return with_tensors(start, now), told


def _drawn(asked: Round, step: int, size: int, a_pass: int) -> list[Example]:
    """The examples of a step: of each pass all, in an order of its own."""
    settings = asked.plan.training
    order = np.arange(len(asked.examples))
    if settings.train_sampling_strategy != "sequential":
        order = np.random.default_rng((settings.seed, step // a_pass)).permutation(order)
    first = (step % a_pass) * size
    return [asked.examples[at] for at in order[first : first + size]]


def _groups(now: Mapping[str, Array], asked: Round, steps: int) -> list[tuple[AdamW, list[str]]]:
    """Optimisers with the tensors of each: a head has its own rate, and no decay where rows of it must stay; biases none."""
    plan, settings = asked.plan, asked.plan.training
    total = asked.stretch.total or steps
    warmup = math.ceil(settings.warmup_ratio * total) if settings.warmup_steps is None else settings.warmup_steps
    factors = "AB" if asked.trains == "both" else asked.trains
    head = [name for name in now if name.startswith("D|")]
    plain = [] if asked.own_labels is not None else [name for name in head if not name.endswith("bias")]
    made = (
        (settings.learning_rate, settings.weight_decay, [name for name in now if name[0] in factors]),
        (plan.head.learning_rate or settings.learning_rate, settings.weight_decay, plain),
        (plan.head.learning_rate or settings.learning_rate, 0.0, [name for name in head if name not in plain]),
    )
    of_step = partial(_share, settings.lr_scheduler_type, asked.stretch, warmup, total)
    betas = settings.adam_beta1, settings.adam_beta2
    return [(AdamW(rate, betas, settings.adam_epsilon, decay, schedule=of_step), names) for rate, decay, names in made if names]


def _share(kind: str, stretch: Stretch, warmup: int, total: int, number: int) -> float:
    """Of the rate, at a step of this round, from 1: the stage's schedule, and the climb back to it."""
    whole = share(kind, number - 1 + stretch.done, warmup, total)
    return whole * min(1.0, number / max(1, stretch.climb)) if stretch.done or stretch.climb else whole


def _masks(start: Adapter, own: frozenset[int] | None, labels: int) -> dict[str, Array]:
    """1 for rows of the head that train, by tensor; nothing where all do."""
    if own is None:
        return {}
    kept = np.zeros(labels, np.float32)
    kept[sorted(own)] = 1
    return {f"D|{name}": kept.reshape(-1, *[1] * (each.ndim - 1)) for name, each in start.dense.items() if len(each) == labels}
