"""Sizes a plan to what fits: batch and accumulation, checkpointing, optimizer; only then a shorter sequence and a lower rank.

What changes nothing that is learnt (batch against accumulation, checkpointing) is chosen for time alone, among all that fits.
What does change it is taken only as far as it must be: moments in 8 bits, then a shorter sequence and a lower rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, PREFIXES, QUANTISED, Plan, Precision
from strategies import cost
from strategies.architecture import Architecture
from strategies.footprint import Machine, setup_of
from strategies.hardware import Rates
from strategies.memory import Estimate, Setup, Sharding, estimate
from strategies.task import Limits, Task

# Rows behind one optimizer step, where nobody wishes otherwise: gradients of fewer are noisy, of more are dear.
EFFECTIVE_BATCH = 16
_SHORTEST, _LOWEST = 128, 4
_EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


class Calibrated(cost.Calibrated, Protocol):
    """What real steps on this machine have shown (``calibration.Calibration``)."""

    @property
    def rates(self) -> Rates | None:
        """Of the device, where it was measured for want of a datasheet."""

    def memory_factor(self, setup: Setup) -> float | None:
        """Measured over estimated bytes; None where nothing alike was measured."""


@dataclass(frozen=True)
class Problem:
    """What every strategy is held against.

    Attributes:
        task: What is to be learnt.
        machine: What may be used.
        architecture: Of the base.
        limits: What is allowed.
        wishes: Dotted Plan fields that must stay.
        calibration: What real steps have shown.
        sharding: What each of several GPUs holds a share of.
    """

    task: Task
    machine: Machine
    architecture: Architecture
    limits: Limits
    wishes: Mapping[str, Any]
    calibration: Calibrated | None = None
    sharding: Sharding = "none"


@dataclass(frozen=True)
class Fit:
    """A plan that fits, or why none does.

    Attributes:
        plan: Sized.
        estimate: Of its memory.
        cost: Of its time and money; None where the device's rates are not known.
        relaxation: 1, less what was given up of sequence and rank.
        reasons: By dotted field, why it is as it is.
        relaxed: The same, of what was given up.
        ideal_seconds: Of the plan with as much memory as it likes; by floating-point operations alone without rates.
        refused: Why nothing fits; the rest is then of the smallest plan.
        needs_bytes: Of memory, where that is what lacks.
    """

    plan: Plan
    estimate: Estimate
    cost: cost.Cost | None
    relaxation: float
    reasons: Mapping[str, str]
    relaxed: Mapping[str, str]
    ideal_seconds: float
    refused: str = ""
    needs_bytes: int | None = None


@dataclass(frozen=True)
class _Level:
    """How much is given up."""

    factor: float
    sequence: int
    rank: int
    relaxed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tried:
    plan: Plan
    estimate: Estimate
    needs: int
    cost: cost.Cost | None


def size(plan: Plan, problem: Problem, *, seconds_used: float = 0.0, money_used: float = 0.0) -> Fit:
    """Sizes one plan.

    Args:
        plan: As it would be with all the memory in the world: ``training.batch_size`` holds the rows of an optimizer step.
        problem: What it must fit.
        seconds_used: By the stages before it.
        money_used: By the stages before it.
    """
    ideal = _try(_on_devices(plan, problem), problem, always=True)
    ideal_seconds = ideal.cost.total_seconds if ideal.cost else _operations(plan, problem)
    levels, optimizers = _levels(plan, problem), _optimizers(plan, problem)
    last = [variant for optimizer in optimizers for variant in _variants(_at(plan, levels[-1]), optimizer, problem)]
    rows = min(variant.training.batch_size for variant in last)
    least = min((_try(one, problem) for one in last if one.training.batch_size == rows), key=lambda one: one.needs)
    if least.needs > problem.machine.room_bytes:
        why = _lacks(least, problem, seconds_used, money_used)
        if least.needs < ideal.needs:
            why += f"; {ideal.needs / 1e9:.1f} with {ideal.plan.training.batch_size} rows at a time and nothing saved"
        return Fit(least.plan, least.estimate, None, 0.0, {}, {}, ideal_seconds, why, least.needs)
    fastest = least
    for level in levels:
        relaxed = _at(plan, level)
        for optimizer in optimizers:
            here = [_try(variant, problem) for variant in _variants(relaxed, optimizer, problem)]
            held = [one for one in here if one.needs <= problem.machine.room_bytes]
            if good := [one for one in held if not _lacks(one, problem, seconds_used, money_used)]:
                best = min(good, key=_effort)
                reasons = {**_reasons(best, problem), **level.relaxed}
                return Fit(best.plan, best.estimate, best.cost, level.factor, reasons, level.relaxed, ideal_seconds)
            fastest = min([fastest, *held], key=_effort)
    why = _lacks(fastest, problem, seconds_used, money_used)
    return Fit(fastest.plan, fastest.estimate, fastest.cost, 0.0, {}, {}, ideal_seconds, why)


def needs(plan: Plan, problem: Problem) -> int:
    """Bytes on each device at the peak of a step, corrected by what was measured here."""
    setup = setup_of(plan, problem.architecture, problem.machine, problem.sharding)
    return _corrected(estimate(problem.architecture, setup), setup, problem)


def steps_down(plan: Plan, machine: Machine, usable: Callable[[int], bool] = lambda tokens: True) -> list[tuple[str, Plan]]:
    """What to try when memory runs out after all, each beyond the one before: what changes least of what is learnt first.

    Args:
        plan: To begin with.
        machine: Says in how many bits a base can be held.
        usable: Whether rows of so many tokens leave enough to learn from.
    """
    made: list[tuple[str, Plan]] = []

    def step(said: str, changed: Plan) -> None:
        made.append((said, changed))

    now = plan
    while (batch := now.training.batch_size) > fewest_rows(now):
        half = max(fewest_rows(now), (batch + 1) // 2)
        times = now.training.gradient_accumulation_steps * batch // half
        now = changed(now, {"training.batch_size": half, "training.gradient_accumulation_steps": times})
        step(f"batch {half}, accumulated {times} times", now)
    if not now.training.gradient_checkpointing and _may_checkpoint(now):
        now = changed(now, {"training.gradient_checkpointing": True})
        step("gradient checkpointing", now)
    while now.data.max_length > _SHORTEST and usable(shorter := max(_SHORTEST, now.data.max_length // 2)):
        now = changed(now, {"data.max_length": shorter})
        step(f"rows of at most {now.data.max_length} tokens", now)
    while now.method in LOW_RANK and now.lora.r > _LOWEST:
        now = now.model_copy(update={"lora": now.lora.with_rank(max(_LOWEST, now.lora.r // 2))})
        step(f"rank {now.lora.r}", now)
    for precision in fewer_bits(now, machine):
        method = "qlora" if now.method == "lora" and precision in QUANTISED else now.method
        mixed = "fp32" if machine.device == "cpu" else now.training.mixed_precision
        now = changed(now, {"precision": precision, "method": method, "training.mixed_precision": mixed})
        step(f"base in {precision}", now)
    return made


def fewest_rows(plan: Plan) -> int:
    """Of a batch: KTO reads each prompt with another row's answer too, RL compares a group of answers."""
    return {"kto": 2, "rl": plan.rl.num_generations}.get(plan.objective, 1)


def changed(plan: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan with some dotted fields changed; it is checked anew.

    Raises:
        ValueError: It is no plan any more.
    """
    content = plan.model_dump(exclude_unset=False)
    for name, value in values.items():
        *path, last = name.split(".")
        place = content
        for key in path:
            place = place[key]
        place[last] = value
    return Plan.model_validate(content)


def steps_of(plan: Plan, problem: Problem) -> int:
    """Optimizer steps of a plan over the task's rows."""
    t = plan.training
    if t.max_steps:
        return t.max_steps
    rows = problem.task.preference_pairs if plan.objective == "dpo" else problem.task.rows
    each = t.batch_size * t.gradient_accumulation_steps * max(1, problem.machine.gpus)
    return max(1, round(rows * t.num_train_epochs / each))


# Levels and variants -----------------------------------------------------------------------------------------------------


def _levels(plan: Plan, problem: Problem) -> list[_Level]:
    """From nothing given up to as much as can be, by what it loses."""
    lengths = [(plan.data.max_length, 1.0)]
    if "data.max_length" not in problem.wishes:
        usual = rounded(problem.task.input_tokens)
        if usual < plan.data.max_length:
            lengths.append((usual, 0.97))
        shorter = min(usual, plan.data.max_length)
        while shorter > _SHORTEST:
            shorter = max(_SHORTEST, shorter // 2)
            lengths.append((shorter, 0.97 * shorter / usual))
    ranks = [(plan.lora.r, 1.0)]
    while plan.method in LOW_RANK and "lora.r" not in problem.wishes and ranks[-1][0] > _LOWEST:
        lower = max(_LOWEST, ranks[-1][0] // 2)
        ranks.append((lower, (lower / plan.lora.r) ** 0.25))
    made = []
    for length, of_length in lengths:
        for rank, of_rank in ranks:
            told = {}
            if length < plan.data.max_length:
                told["data.max_length"] = (
                    f"{length} tokens instead of {plan.data.max_length}: longer rows do not fit and are cut"
                )
            if rank < plan.lora.r:
                told["lora.r"] = f"rank {rank} instead of {plan.lora.r}: more does not fit"
            made.append(_Level(of_length * of_rank, length, rank, told))
    return sorted(made, key=lambda level: -level.factor)


def _at(plan: Plan, level: _Level) -> Plan:
    lora = plan.lora if level.rank == plan.lora.r else plan.lora.with_rank(level.rank)
    data = plan.data.model_copy(update={"max_length": level.sequence})
    return plan.model_copy(update={"lora": lora, "data": data})


def _optimizers(plan: Plan, problem: Problem) -> Sequence[str]:
    """The plan's own, then those with Adam's moments in 8 bits: as good within noise (Dettmers 2022, arXiv:2110.02861).

    Where few numbers train, they save nothing.
    """
    if "training.optim" in problem.wishes or plan.method not in COMPRESSED:
        return (plan.training.optim,)
    return (plan.training.optim, *(_EIGHT_BIT if "optimizers" in problem.machine.kernels else ()))


def _variants(plan: Plan, optimizer: str, problem: Problem) -> Iterator[Plan]:
    """The same learning in less memory: rows of a step in turns, activations computed again."""
    t = plan.training
    checkpointing: Sequence[bool] = (t.gradient_checkpointing,)
    if "training.gradient_checkpointing" not in problem.wishes and _may_checkpoint(plan):
        checkpointing = (False, True)
    for again in checkpointing:
        for rows, times in _turns(plan, problem):
            values = {"optim": optimizer, "gradient_checkpointing": again, "batch_size": rows}
            settings = t.model_copy(update={**values, "gradient_accumulation_steps": times})
            yield plan.model_copy(update={"training": settings})


def _turns(plan: Plan, problem: Problem) -> Iterator[tuple[int, int]]:
    """Rows on each device and turns that make up an optimizer step."""
    t, gpus = plan.training, max(1, problem.machine.gpus)
    rows = max(fewest_rows(plan), -(-t.batch_size * t.gradient_accumulation_steps // gpus))
    if "training.batch_size" in problem.wishes:
        times = t.gradient_accumulation_steps
        yield t.batch_size, times
        return
    each = rows
    while True:
        yield each, max(1, round(rows / each))
        if each <= fewest_rows(plan):
            return
        each = max(fewest_rows(plan), each // 2)


def _on_devices(plan: Plan, problem: Problem) -> Plan:
    rows, times = next(_turns(plan, problem))
    values = {"batch_size": rows, "gradient_accumulation_steps": times, "gradient_checkpointing": False}
    return plan.model_copy(update={"training": plan.training.model_copy(update=values)})


def _may_checkpoint(plan: Plan) -> bool:
    """Prefixes are keys and values of the past, which checkpointing leaves out (the plan would refuse it)."""
    return plan.method not in PREFIXES


def fewer_bits(plan: Plan, machine: Machine) -> list[Precision]:
    """In what else the base can be held here, in descending order of bits; nothing where the base itself trains."""
    if plan.method in ON_THE_BASE:
        return []
    half: tuple[Precision, ...] = ("fp16",) if plan.precision == "fp16" else ("bf16",) if machine.bf16 else ()
    packed: tuple[Precision, ...] = ("int8", "nf4")
    order: list[Precision] = ["fp32", *half, *(kernel for kernel in packed if kernel in machine.kernels)]
    return order[order.index(plan.precision) + 1 :] if plan.precision in order else []


# What fits ---------------------------------------------------------------------------------------------------------------


def _try(plan: Plan, problem: Problem, *, always: bool = False) -> _Tried:
    """One variant; what it costs only where it fits, unless ``always``."""
    setup = setup_of(plan, problem.architecture, problem.machine, problem.sharding)
    found = estimate(problem.architecture, setup)
    bytes_needed = _corrected(found, setup, problem)
    spent = None
    if problem.machine.rates is not None and (always or bytes_needed <= problem.machine.room_bytes):
        prices = cost.Prices(gpu_hour=problem.limits.gpu_hour, kwh=problem.limits.kwh)
        spent = cost.estimate(
            problem.architecture,
            setup,
            problem.machine.rates,
            steps=steps_of(plan, problem),
            accumulation=plan.training.gradient_accumulation_steps,
            completion=plan.rl.max_completion_length if plan.objective == "rl" else None,
            prices=prices,
            calibration=problem.calibration,
        )
    return _Tried(plan, found, bytes_needed, spent)


def _corrected(found: Estimate, setup: Setup, problem: Problem) -> int:
    """Bytes on the device, with what real steps on this machine have shown."""
    factor = problem.calibration.memory_factor(setup) if problem.calibration else None
    return int(found.device_bytes * (factor or 1.0))


def _lacks(one: _Tried, problem: Problem, seconds_used: float, money_used: float) -> str:
    """What it is that does not suffice, with both numbers; empty where all does."""
    machine, limits = problem.machine, problem.limits
    if one.needs > machine.room_bytes:
        device = "this machine" if machine.device == "cpu" else "this GPU"
        return (
            f"needs {one.needs / 1e9:.1f} GB, {device} has {machine.total_bytes / 1e9:.1f} "
            f"({machine.room_bytes / 1e9:.1f} free beside the margin)"
        )
    if one.cost is None:
        return ""
    hours = (one.cost.total_seconds + seconds_used) / 3600
    if limits.hours is not None and hours > limits.hours:
        return f"takes {hours:.3g} h, allowed are {limits.hours:g}"
    money = None if one.cost.money is None else one.cost.money + money_used
    if limits.money is not None and money is not None and money > limits.money:
        return f"costs {money:.2f}, allowed is {limits.money:g}"
    return ""


def _effort(one: _Tried) -> tuple[float, bool, int]:
    """Least time; where that is not known or equal, no checkpointing and large batches."""
    t = one.plan.training
    return one.cost.total_seconds if one.cost else 0.0, t.gradient_checkpointing, -t.batch_size


def _reasons(one: _Tried, problem: Problem) -> dict[str, str]:
    t, wishes = one.plan.training, problem.wishes
    room = f"{one.needs / 1e9:.1f} of {problem.machine.room_bytes / 1e9:.1f} GB"
    told = {"training.batch_size": f"{t.batch_size} rows at a time: {room}"}
    if t.gradient_accumulation_steps > 1:
        told["training.gradient_accumulation_steps"] = f"{t.gradient_accumulation_steps} turns make up a step"
    if t.gradient_checkpointing:
        told["training.gradient_checkpointing"] = f"activations are computed again: {room}"
    if t.optim in _EIGHT_BIT:
        told["training.optim"] = f"Adam's moments in 8 bits{', which may leave the GPU' if 'paged' in t.optim else ''}: {room}"
    return {name: "as wished" if name in wishes else why for name, why in told.items()}


def _operations(plan: Plan, problem: Problem) -> float:
    """A stand-in for seconds where rates are not known: 6 operations for each trained parameter and token, 4 for others."""
    per_token = problem.architecture.parameters * (6 if plan.method in COMPRESSED else 4)
    return per_token * problem.task.rows * plan.training.num_train_epochs * plan.data.max_length * 1e-13


def rounded(tokens: int) -> int:
    """To a multiple of 8, which kernels like."""
    return -(-tokens // 8) * 8
