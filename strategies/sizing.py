"""Sizes a plan to what fits: batch and accumulation, checkpointing, optimizer; then fewer passes, less rank, shorter rows.

What changes nothing that is learnt (batch against accumulation, checkpointing) is chosen for time alone, among all that fits.
What does change it is taken only as far as it must be (``_Search``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, PREFIXES, QUANTISED, Objective, Plan, Precision
from strategies import cost
from strategies.architecture import Architecture
from strategies.footprint import Machine, setup_of
from strategies.hardware import Rates
from strategies.memory import Estimate, Setup, Sharding, estimate
from strategies.task import Limits, Task

# Rows behind one optimizer step, where nobody wishes otherwise: gradients of fewer are noisy, of more are dear.
EFFECTIVE_BATCH = 16
_SHORTEST, _LOWEST, _STEP = 128, 4, 64
_FEWER_PASSES = (15.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
# What is left of a result where one row in twenty loses its end, and where ordinary rows do: our judgement.
_OUTLIERS_CUT, _ROWS_CUT = 0.9, 0.6
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
        relaxation: 1, less what was given up of passes, rank and length.
        reasons: By dotted field, why it is as it is.
        relaxed: The same, of what was given up.
        ideal_seconds: Of the plan with as much memory and time as it likes; by floating-point operations alone without rates.
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
    """How much is given up: 1 is nothing."""

    factor: float
    sequence: int
    rank: int
    epochs: float


@dataclass(frozen=True)
class _Tried:
    plan: Plan
    estimate: Estimate
    needs: int
    cost: cost.Cost | None


def size(plan: Plan, problem: Problem, *, share: float = 1.0) -> Fit:
    """Sizes one plan.

    Args:
        plan: As it would be with all the memory in the world: ``training.batch_size`` holds the rows of an optimizer step.
        problem: What it must fit.
        share: Of the hours and the money that are allowed, what this stage may take.
    """
    ideal = _try(_on_devices(plan, problem), problem, always=True)
    ideal_seconds = _ideal_seconds(ideal, problem)
    search = _Search(plan, problem, share)
    least = search.least()
    if least.needs > problem.machine.room_bytes:
        why = f"{_lacks(least, problem, share)} with {_saved(least.plan, problem)}"
        if least.needs < ideal.needs:
            why += f"; {ideal.needs / 1e9:.1f} with {_saved(ideal.plan, problem)}"
        return Fit(least.plan, least.estimate, None, 0.0, {}, {}, ideal_seconds, why, least.needs)
    found = search.best()
    if found is None:
        fastest = search.fastest()
        why = f"{_lacks(fastest, problem, share)}, and that for {_passes(fastest.plan)}"
        return Fit(fastest.plan, fastest.estimate, fastest.cost, 0.0, {}, {}, ideal_seconds, why)
    level, best = found
    relaxed = search.given_up(level)
    reasons = {**_reasons(best, problem), **relaxed}
    return Fit(best.plan, best.estimate, best.cost, level.factor, reasons, relaxed, ideal_seconds)


def ideal_seconds(plan: Plan, problem: Problem) -> float:
    """Of a plan with as much memory and time as it likes; by floating-point operations alone where rates are not known."""
    return _ideal_seconds(_try(_on_devices(plan, problem), problem, always=True), problem)


def _ideal_seconds(ideal: _Tried, problem: Problem) -> float:
    return ideal.cost.total_seconds if ideal.cost else _operations(ideal.plan, problem)


class _Search:
    """Among all that fits, what gives up least; of that, what is fastest.

    What is given up has a price (``factor``). Passes over the rows come first and cost little: fewer of them (of up to four,
    the later ones add least: Muennighoff 2023, arXiv:2305.16264), then a share of the rows (loss falls with about the tenth
    root of the data: Kaplan 2020, arXiv:2001.08361). Rows longer than nearly all others are cut next. To cut ordinary rows
    costs most, and never below what leaves something of their answers. Prices do not depend on the limits, and whatever fits
    some memory and time fits more of it, so more never makes the choice worse.
    """

    def __init__(self, plan: Plan, problem: Problem, share: float) -> None:
        self._plan, self._problem, self._share = plan, problem, share
        self._full = plan.data.max_length
        fixed = "data.max_length" in problem.wishes
        self._usual = self._full if fixed else min(self._full, rounded(problem.task.row_tokens))
        self._shortest = self._full if fixed else least_length(plan.objective, problem.task)
        self._optimizers = _optimizers(plan, problem)
        self._ranks, self._epochs = _ranks(plan, problem), _epochs(plan, problem)
        self._held: dict[tuple[int, int, str], list[_Tried]] = {}

    def least(self) -> _Tried:
        """What needs the least memory."""
        at = self._lowest()
        last = [v for optimizer in self._optimizers for v in _variants(_at(self._plan, at), optimizer, self._problem)]
        rows = min(variant.training.batch_size for variant in last)
        tried = [_try(one, self._problem) for one in last if one.training.batch_size == rows]
        return min(tried, key=lambda one: one.needs)

    def fastest(self) -> _Tried:
        """What takes least of the time and the money, among all that fits the memory."""
        lengths = {self._lowest().sequence, self._usual, self._full}
        held = [
            one for length in lengths for rank in self._ranks for o in self._optimizers for one in self._in(length, rank, o)
        ]
        return self._shortened(min(held, key=_effort), self._epochs[-1])

    def best(self) -> tuple[_Level, _Tried] | None:
        """What gives up least, of all that fits; None where nothing does."""
        lengths = {self._full, self._usual}
        levels = [self._level(length, rank, epochs) for length in lengths for rank in self._ranks for epochs in self._epochs]
        for level in sorted(levels, key=lambda one: -one.factor):
            if found := self._good(level):
                return level, found
        cut = [one for rank in self._ranks for epochs in self._epochs if (one := self._longest(rank, epochs))]
        below = max(cut, key=lambda one: one.factor, default=None)
        found = self._good(below) if below else None
        return (below, found) if below and found else None

    def given_up(self, level: _Level) -> dict[str, str]:
        """By dotted field, what is less than it would be, and what it is for want of."""
        plan, told = self._plan, {}
        if level.epochs < plan.training.num_train_epochs:
            over = self._over(level)
            told["training.num_train_epochs"] = f"{level.epochs:g} instead of {plan.training.num_train_epochs:g} passes: {over}"
        if level.sequence < self._full:
            why = self._cause(replace(level, sequence=self._full))
            said = "rows" if level.sequence < self._usual else "the longest rows"
            told["data.max_length"] = f"{level.sequence} tokens instead of {self._full}: {said} are cut at the end; {why}"
        if level.rank < plan.lora.r:
            told["lora.r"] = f"rank {level.rank} instead of {plan.lora.r}: {self._cause(replace(level, rank=plan.lora.r))}"
        return told

    def _over(self, level: _Level) -> str:
        """Which limits more passes break."""
        whole = self._fastest_at(replace(level, epochs=self._plan.training.num_train_epochs))
        return _lacks(whole, self._problem, self._share) if whole else "more does not fit"

    def _cause(self, level: _Level) -> str:
        """What keeps a plan from giving up less."""
        if whole := self._fastest_at(level):
            return f"more {_lacks(whole, self._problem, self._share)}"
        return f"more does not fit {self._problem.machine.room_bytes / 1e9:.1f} GB"

    def _fastest_at(self, level: _Level) -> _Tried | None:
        held = [one for optimizer in self._optimizers for one in self._in(level.sequence, level.rank, optimizer)]
        return self._shortened(min(held, key=_effort), level.epochs) if held else None

    def _level(self, length: int, rank: int, epochs: float) -> _Level:
        of_length = 1.0 if length == self._full else _OUTLIERS_CUT
        if length < self._usual:
            of_length = _ROWS_CUT * (_OUTLIERS_CUT if self._usual < self._full else 1.0) * length / self._usual
        of_rank = (rank / self._plan.lora.r) ** 0.25 if rank < self._plan.lora.r else 1.0
        return _Level(of_length * of_rank * self._of_epochs(epochs), length, rank, epochs)

    def _of_epochs(self, epochs: float) -> float:
        whole = max(1.0, self._plan.training.num_train_epochs)
        return float((max(1.0, epochs) / whole) ** 0.03 * min(1.0, epochs) ** 0.1)

    def _lowest(self) -> _Level:
        return self._level(min(self._shortest, self._usual), self._ranks[-1], self._epochs[-1])

    def _longest(self, rank: int, epochs: float) -> _Level | None:
        """The most tokens below an ordinary row that fit: the fewest, or a multiple of 64 above them."""
        lengths = [self._shortest, *range((self._shortest // _STEP + 1) * _STEP, self._usual, _STEP)]
        if self._shortest >= self._usual or not self._good(self._level(lengths[0], rank, epochs)):
            return None
        low, high = 0, len(lengths) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._good(self._level(lengths[middle], rank, epochs)) else (low, middle - 1)
        return self._level(lengths[low], rank, epochs)

    def _good(self, level: _Level) -> _Tried | None:
        for optimizer in self._optimizers:
            held = [self._shortened(one, level.epochs) for one in self._in(level.sequence, level.rank, optimizer)]
            if good := [one for one in held if not _lacks(one, self._problem, self._share)]:
                return min(good, key=_effort)
        return None

    def _in(self, length: int, rank: int, optimizer: str) -> list[_Tried]:
        """What fits the memory, over all passes."""
        key = (length, rank, optimizer)
        if key not in self._held:
            relaxed = _at(self._plan, self._level(length, rank, self._epochs[0]))
            tried = [_try(variant, self._problem) for variant in _variants(relaxed, optimizer, self._problem)]
            self._held[key] = [one for one in tried if one.needs <= self._problem.machine.room_bytes]
        return self._held[key]

    def _shortened(self, one: _Tried, epochs: float) -> _Tried:
        t = one.plan.training
        if epochs == t.num_train_epochs:
            return one
        changes: dict[str, Any] = {"num_train_epochs": epochs}
        if isinstance(t.eval_steps, int) and "training.eval_steps" not in self._problem.wishes:
            changes["eval_steps"] = max(1, round(t.eval_steps * epochs / t.num_train_epochs))
        plan = one.plan.model_copy(update={"training": t.model_copy(update=changes)})
        if one.cost is None:
            return replace(one, plan=plan)
        part = steps_of(plan, self._problem) / steps_of(one.plan, self._problem)
        c = one.cost
        joules, money = (value and value * part for value in (c.energy_joules, c.money))
        less = replace(c, total_seconds=c.total_seconds * part, energy_joules=joules, money=money)
        return replace(one, plan=plan, cost=less)


def least_length(objective: Objective, task: Task) -> int:
    """The fewest tokens of a row that leave something to learn: half of an ordinary answer, which stands at the row's end."""
    if objective == "pretraining" or not task.answers or not task.output_tokens:
        return _SHORTEST
    return max(_SHORTEST, (task.median_tokens or task.row_tokens) - task.output_tokens // 2)


def needs(plan: Plan, problem: Problem) -> int:
    """Bytes on each device at the peak of a step, corrected by what was measured here."""
    setup = setup_of(plan, problem.architecture, problem.machine, problem.sharding)
    return _corrected(estimate(problem.architecture, setup), setup, problem)


def steps_down(
    plan: Plan, machine: Machine, usable: Callable[[int], bool] = lambda tokens: True, shortest: int = _SHORTEST
) -> list[tuple[str, Plan]]:
    """What to try when memory runs out after all, each beyond the one before: what frees most and harms least first.

    Rows lose at most half of their length: beyond that, another method harms less.

    Args:
        plan: To begin with.
        machine: Says in how many bits a base can be held.
        usable: Whether rows of so many tokens leave enough to learn from.
        shortest: Tokens that a row keeps.
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
    for precision in fewer_bits(now, machine):
        method = "qlora" if now.method == "lora" and precision in QUANTISED else now.method
        mixed = "fp32" if machine.device == "cpu" else now.training.mixed_precision
        now = changed(now, {"precision": precision, "method": method, "training.mixed_precision": mixed})
        step(f"base in {precision}", now)
    half = max(shortest, -(-now.data.max_length // (2 * _STEP)) * _STEP)
    if half < now.data.max_length and usable(half):
        now = changed(now, {"data.max_length": half})
        step(f"rows of at most {half} tokens", now)
    while now.method in LOW_RANK and now.lora.r > _LOWEST:
        now = now.model_copy(update={"lora": now.lora.with_rank(max(_LOWEST, now.lora.r // 2))})
        step(f"rank {now.lora.r}", now)
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


def rows_for(objective: Objective, task: Task) -> int:
    """What an objective trains on."""
    return (task.preference_pairs if objective in ("dpo", "reward") else 0) or task.rows


def steps_of(plan: Plan, problem: Problem) -> int:
    """Optimizer steps of a plan over the task's rows."""
    t = plan.training
    if t.max_steps:
        return t.max_steps
    rows = rows_for(plan.objective, problem.task)
    each = t.batch_size * t.gradient_accumulation_steps * max(1, problem.machine.gpus)
    return max(1, round(rows * t.num_train_epochs / each))


# Levels and variants -----------------------------------------------------------------------------------------------------


def _ranks(plan: Plan, problem: Problem) -> list[int]:
    ranks = [plan.lora.r]
    while plan.method in LOW_RANK and "lora.r" not in problem.wishes and ranks[-1] > _LOWEST:
        ranks.append(max(_LOWEST, ranks[-1] // 2))
    return ranks


def _epochs(plan: Plan, problem: Problem) -> list[float]:
    """How often all rows may be read, the wish first; fewer only where something limits it."""
    most = plan.training.num_train_epochs
    limited = problem.limits.hours is not None or problem.limits.money is not None
    if not limited or plan.training.max_steps or "training.num_train_epochs" in problem.wishes:
        return [most]
    return [most, *(fewer for fewer in _FEWER_PASSES if fewer < most)]


def _at(plan: Plan, level: _Level) -> Plan:
    lora = plan.lora
    if level.rank < lora.r:
        lora = lora.with_rank(level.rank)
        lora = lora.model_copy(update={"lora_alpha": round(lora.lora_alpha, 2)})
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


def _lacks(one: _Tried, problem: Problem, share: float) -> str:
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
    of_all = "" if share == 1 else " for this stage"
    hours = one.cost.total_seconds / 3600
    if limits.hours is not None and hours > limits.hours * share:
        return f"takes {hours:.3g} h, allowed are {limits.hours * share:.3g}{of_all} (limits.hours {limits.hours:g})"
    money = one.cost.money
    if limits.money is not None and money is not None and money > limits.money * share:
        return f"costs {money:.3g}, allowed is {limits.money * share:.3g}{of_all} (limits.money {limits.money:g})"
    return ""


def _saved(plan: Plan, problem: Problem) -> str:
    """With what a number was reckoned, so that two of them can be held against each other."""
    t = plan.training
    gpus = f" on each of {problem.machine.gpus} GPUs" if problem.machine.gpus > 1 else ""
    parts = [f"{t.batch_size} row{'s' if t.batch_size > 1 else ''} of {plan.data.max_length} tokens at a time{gpus}"]
    parts += ["checkpointing"] if t.gradient_checkpointing else []
    parts += [f"rank {plan.lora.r}"] if plan.method in LOW_RANK else []
    return ", ".join([*parts, t.optim])


def _passes(plan: Plan) -> str:
    epochs = plan.training.num_train_epochs
    return f"{epochs:g} passes over the rows" if epochs >= 1 else f"{epochs:.0%} of the rows, read once"


def _effort(one: _Tried) -> tuple[float, bool, int]:
    """Least time; where that is not known or equal, no checkpointing and large batches."""
    t = one.plan.training
    return one.cost.total_seconds if one.cost else 0.0, t.gradient_checkpointing, -t.batch_size


def _reasons(one: _Tried, problem: Problem) -> dict[str, str]:
    t, wishes = one.plan.training, problem.wishes
    room = f"{one.needs / 1e9:.1f} of {problem.machine.room_bytes / 1e9:.1f} GB"
    gpus = f" on each of {problem.machine.gpus} GPUs" if problem.machine.gpus > 1 else ""
    told = {"training.batch_size": f"{t.batch_size} row{'s' if t.batch_size > 1 else ''} at a time{gpus}: {room}"}
    if t.gradient_accumulation_steps > 1:
        rows = t.batch_size * t.gradient_accumulation_steps * max(1, problem.machine.gpus)
        told["training.gradient_accumulation_steps"] = f"{t.gradient_accumulation_steps} turns: {rows} rows behind each step"
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
