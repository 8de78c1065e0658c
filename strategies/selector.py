"""The best way to fine-tune that fits: ``select(task, hardware, architecture, limits)``.

An explicit wish goes before what is feasible, that before what the rules prefer, that before what is cheaper. Candidates are
what the fired rules propose, at each precision and sharding that the machine has kernels for. Each is sized
(``strategies.sizing``); of those that fit, the one of the largest value is chosen:

    value = preference * relaxation * seconds^(-k),    k = 1 fast, 0.15 balanced, 0.02 thorough or critical

``preference`` is the rules' judgement (1 for fast: there the cheapest wins; where quality is critical, times what the method
can learn at best), ``relaxation`` what a shorter sequence or a lower rank loses, and ``seconds`` the training with as much
memory as it likes. So more memory, time or money makes more feasible and nothing less, and never makes the choice worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from protocol.errors import ConfigurationError
from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, QUANTISED, Method, Objective, Plan, Precision
from strategies import rules
from strategies.architecture import Architecture
from strategies.footprint import Machine, biases
from strategies.hardware import Hardware
from strategies.memory import Sharding
from strategies.rules import Rule, Strategy
from strategies.settings import settled, wished
from strategies.sizing import Calibrated, Fit, Problem, needs, size, steps_down
from strategies.task import Limits, Task

_COST_WEIGHT = {"fast": 1.0, "balanced": 0.15, "thorough": 0.02}
_CONSUMER_BYTES = 26e9
_BUILT: tuple[Strategy, ...] = get_args(Method)
# What fewer bits lose, beside the same in 16 bits: QLoRA matches LoRA within noise (Dettmers 2023, table 3), so what speaks
# against it is its time.
_OF_PRECISION: Mapping[Precision, float] = {"fp32": 1.0, "bf16": 1.0, "fp16": 1.0, "nf4": 0.97, "int8": 0.97}
# Whole weights in pure bfloat16: at their small rates most steps round to nothing (benchmarks/LOG.md: 9 % of the weights move).
_SMALL_STEPS_LOST = 0.7
_QUALITY = ((0.93, "high"), (0.85, "good"), (0.75, "fair"), (0.0, "basic"))


@dataclass(frozen=True)
class Candidate:
    """One strategy that fits.

    Attributes:
        name: Method, precision and, beyond one GPU, what is sharded.
        stages: Plans one after the other.
        reasons: By dotted field of the first stage, why it is as it is.
        fits: How each stage fits.
        preference: Of the rules, 0 to 1.
        value: What the choice is made by.
        complexity: 1 to 5.
        rule: Which rule proposed it.
    """

    name: str
    stages: tuple[Plan, ...]
    reasons: Mapping[str, str]
    fits: tuple[Fit, ...]
    preference: float
    value: float
    complexity: int
    rule: Rule

    @property
    def plan(self) -> Plan:
        """The first stage."""
        return self.stages[0]

    @property
    def peak_bytes(self) -> int:
        """What it needs on each device, at its largest stage."""
        return max(fit.estimate.device_bytes for fit in self.fits)

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where the device's rates are not known."""
        return _sum([fit.cost.total_seconds if fit.cost else None for fit in self.fits])

    @property
    def money(self) -> float | None:
        """Of all stages; None without a price or rates."""
        return _sum([fit.cost.money if fit.cost else None for fit in self.fits])

    @property
    def quality(self) -> str:
        """What to expect of it with enough good rows, beside the other strategies: a class, not a measurement."""
        reached = rules.CAPACITY[self.plan.method] * min(fit.relaxation for fit in self.fits)
        return next(name for least, name in _QUALITY if reached >= least)


@dataclass(frozen=True)
class Rejected:
    """One strategy that cannot be taken.

    Attributes:
        name: As a candidate's.
        reason: Why, with the number.
        needs_bytes: At its smallest, where memory is what it lacks.
    """

    name: str
    reason: str
    needs_bytes: int | None = None


@dataclass(frozen=True)
class Rung:
    """A step down for when memory runs out after all.

    Attributes:
        change: What is different.
        plan: To train with.
        needs_bytes: What the estimate says of it.
    """

    change: str
    plan: Plan
    needs_bytes: int


@dataclass(frozen=True)
class Selection:
    """What was found.

    Attributes:
        chosen: None where nothing fits.
        feasible: All that fit, best first; the chosen one leads.
        rejected: The others.
        rules: That fired, in their order.
        advice: What rules say beyond a plan.
        warnings: Wishes that cannot be met, facts that are not known.
        ladder: To climb down from the chosen plan.
        tier: What this machine would be called; a label, nothing depends on it.
    """

    chosen: Candidate | None
    feasible: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    rules: tuple[Rule, ...]
    advice: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ladder: tuple[Rung, ...] = ()
    tier: str = ""


@dataclass(frozen=True)
class _Wanted:
    """A candidate before it is sized."""

    method: Strategy
    precision: Precision
    sharding: Sharding
    stages: tuple[Objective, ...]
    preference: float
    rule: Rule

    @property
    def name(self) -> str:
        stages = "" if len(self.stages) == 1 else f", {' then '.join(self.stages)}"
        shard = "" if self.sharding == "none" else f", {self.sharding}"
        return f"{self.method} {self.precision}{shard}{stages}"


def select(
    task: Task,
    hardware: Hardware,
    architecture: Architecture,
    limits: Limits | None = None,
    wishes: Mapping[str, Any] | None = None,
    *,
    calibration: Calibrated | None = None,
) -> Selection:
    """Chooses.

    Args:
        task: What is to be learnt.
        hardware: Found (``probe``) or described.
        architecture: Of the base.
        limits: What is allowed.
        wishes: Dotted Plan fields that must be as given, such as ``{"method": "lora", "lora.r": 8}``.
        calibration: What real steps on this machine have shown.

    Raises:
        ConfigurationError: Every wish that no plan can have, or that contradict each other.
    """
    limits, wishes = limits or Limits(), dict(wishes or {})
    wished(wishes)
    machine = Machine.of(hardware, limits.memory_margin)
    if machine.rates is None and calibration:
        machine = replace(machine, rates=calibration.rates)
    if machine.room_bytes <= 0:
        raise ConfigurationError("hardware", [f"memory: found {machine.total_bytes} bytes, none of them free; expected some"])
    facts = rules.facts_of(
        task,
        model_kind=architecture.kind,
        parameters=architecture.parameters,
        gpus=machine.gpus,
        consumer=machine.device == "cuda" and machine.total_bytes <= _CONSUMER_BYTES,
    )
    found = rules.fired(facts)
    problem = Problem(task, machine, architecture, limits, wishes, calibration)
    all_of_them = [_refused(wanted, problem, found) or _sized(wanted, problem, found) for wanted in _wanted(problem, found)]
    feasible = sorted((one for one in all_of_them if isinstance(one, Candidate)), key=lambda one: (-one.value, one.name))
    rejected = [one for one in all_of_them if isinstance(one, Rejected)]
    chosen = feasible[0] if feasible else None
    return Selection(
        chosen,
        tuple(feasible),
        tuple(rejected),
        found,
        tuple(f"{rule.advises} (rule {rule})" for rule in found if rule.advises),
        tuple(_warnings(problem, chosen, rejected)),
        tuple(_ladder(problem, chosen, feasible)) if chosen else (),
        _tier(machine),
    )


# What comes into question ------------------------------------------------------------------------------------------------


def _wanted(problem: Problem, found: Sequence[Rule]) -> list[_Wanted]:
    """Every proposal at every precision and sharding, each strategy once: as the first rule that names it would have it."""
    own = _objective(problem.task)
    made: dict[str, _Wanted] = {}
    wish: Method | None = problem.wishes.get("method")
    method: Strategy | None = "lora" if wish == "qlora" else wish
    proposals = [(rule, p.method, p.preference, p.stages or (own,)) for rule in found for p in rule.proposes]
    if method and all(name != method for _, name, _, _ in proposals):
        stages = next(stages for _, _, _, stages in proposals)
        proposals.append((found[-1], method, 0.8, stages))
    if "objective" in problem.wishes:
        proposals = [(rule, name, score, (problem.wishes["objective"],)) for rule, name, score, _ in proposals]
    longest = max(len(stages) for _, _, _, stages in proposals)
    for rule, name, score, stages in proposals:
        # Feedback that is there is to be learnt from: leaving its stages out is cheaper, but not what was asked for.
        worth = score * (1.0 if len(stages) == longest else 0.4)
        for precision, factor in _precisions(name, problem):
            for sharding in _shardings(name, precision, problem.machine):
                strategy: Strategy = "qlora" if name == "lora" and precision in QUANTISED else name
                one = _Wanted(strategy, precision, sharding, stages, worth * factor, rule)
                if wish not in (None, strategy) or problem.wishes.get("precision", precision) != precision:
                    continue
                made.setdefault(one.name, one)
    if not made:
        raise ConfigurationError(
            "wishes", [f"method {wish} with precision {problem.wishes.get('precision')}: no such strategy on this machine"]
        )
    return list(made.values())


def _objective(task: Task) -> Objective:
    alike: Mapping[str, Objective] = {
        "classification": "classification",
        "regression": "regression",
        "pretraining": "pretraining",
    }
    return alike.get(task.kind, "sft")


def _precisions(method: Strategy, problem: Problem) -> list[tuple[Precision, float]]:
    """How the base may be held, each with what it does to the preference."""
    machine = problem.machine
    half: Precision = "bf16" if machine.bf16 else "fp16"
    native: Precision = half if machine.device == "cuda" else "fp32"
    if method in ON_THE_BASE:
        kept = 1.0 if method == "bitfit" else _SMALL_STEPS_LOST
        pure: list[tuple[Precision, float]] = [(half, kept)] if machine.bf16 and machine.device == "cuda" else []
        return [("fp32", 1.0), *pure]
    known: tuple[Precision, ...] = ("nf4", "int8")
    packed = [kernel for kernel in known if kernel in machine.kernels]
    if problem.task.on_device:
        return [(precision, _OF_PRECISION[precision]) for precision in packed]
    return [(precision, _OF_PRECISION[precision]) for precision in (native, *packed)]


def _shardings(method: Strategy, precision: Precision, machine: Machine) -> tuple[Sharding, ...]:
    if machine.gpus < 2 or precision in QUANTISED:
        return ("none",)
    return ("none", "zero2", "zero3", "fsdp") if method in COMPRESSED else ("none", "fsdp")


def _refused(wanted: _Wanted, problem: Problem, found: Sequence[Rule]) -> Rejected | None:
    """What rules it out before any size is looked at."""
    task, kind = problem.task, problem.architecture.kind
    for rule in found:
        if wanted.method in rule.forbids:
            return Rejected(wanted.name, f"not here: {rule.source} (rule {rule.id})")
    if wanted.method not in _BUILT:
        return Rejected(wanted.name, f"{wanted.method} is not built in this version of fedge")
    if _objective(task) in ("sft", "pretraining") and kind != "decoder":
        return Rejected(wanted.name, f"the base is an {kind}, which writes no text; give a decoder, or a task with labels")
    if wanted.method == "bitfit" and not biases(problem.architecture) and not problem.wishes.get("bitfit.add_missing"):
        return Rejected(wanted.name, "the base has no biases; wish bitfit.add_missing to give it some")
    rewarded = task.feedback == "pairs" or any(name.startswith("rl.reward_") for name in problem.wishes)
    if "rl" in wanted.stages and not rewarded:
        return Rejected(wanted.name, "needs a reward: wish rl.reward_functions (module:function) or rl.reward_model")
    needed, most = _complexity(wanted), rules.MOST_COMPLEX[task.expertise]
    if needed > most and "method" not in problem.wishes:
        return Rejected(wanted.name, f"complexity {needed} of 5, expertise {task.expertise} is handed up to {most}")
    return None


def _complexity(wanted: _Wanted) -> int:
    return max(rules.COMPLEXITY[wanted.method], *(rules.STAGE_COMPLEXITY.get(stage, 1) for stage in wanted.stages))


def _sized(wanted: _Wanted, problem: Problem, found: Sequence[Rule]) -> Candidate | Rejected:
    fits: list[Fit] = []
    reasons: dict[str, str] = {}
    problem = replace(problem, sharding=wanted.sharding)
    for stage in wanted.stages:
        plan, why = settled(wanted.method, wanted.precision, stage, problem, found)
        costs = [fit.cost for fit in fits if fit.cost]
        fit = size(
            plan,
            problem,
            seconds_used=sum(cost.total_seconds for cost in costs),
            money_used=sum(cost.money or 0.0 for cost in costs),
        )
        if fit.refused:
            return Rejected(wanted.name, fit.refused, fit.needs_bytes)
        fits.append(fit)
        reasons = reasons or {**_why(wanted, problem), **why, **fit.reasons}
    if wanted.sharding != "none":
        least = max(fit.estimate.device_bytes for fit in fits)
        said = f"would fit: {_gb(least)} on each of {problem.machine.gpus} GPUs; sharded training is not built in this version"
        return Rejected(wanted.name, said)
    relaxation = min(fit.relaxation for fit in fits)
    critical = problem.task.quality == "critical"
    weight = _COST_WEIGHT["thorough" if critical else problem.task.speed]
    preference = wanted.preference * (rules.CAPACITY[wanted.method] if critical else 1.0)
    preference = 1.0 if problem.task.speed == "fast" and not critical else preference
    value = preference * relaxation * max(sum(fit.ideal_seconds for fit in fits), 1e-9) ** -weight
    stages = tuple(fit.plan for fit in fits)
    return Candidate(wanted.name, stages, reasons, tuple(fits), wanted.preference, value, _complexity(wanted), wanted.rule)


def _why(wanted: _Wanted, problem: Problem) -> dict[str, str]:
    method = "as wished" if "method" in problem.wishes else f"rule {wanted.rule}"
    return {"method": method, "precision": _why_precision(wanted, problem)}


def _why_precision(wanted: _Wanted, problem: Problem) -> str:
    if "precision" in problem.wishes:
        return "as wished"
    if wanted.precision in QUANTISED:
        return f"{wanted.precision}: the frozen base in fewer bits, for memory"
    if problem.machine.device == "cpu":
        return "fp32: what this CPU computes in"
    return f"{wanted.precision}: what this GPU computes fast in and does not need to unpack"


# What is said about it -----------------------------------------------------------------------------------------------------


def _warnings(problem: Problem, chosen: Candidate | None, rejected: Sequence[Rejected]) -> list[str]:
    told = []
    room = problem.machine.total_bytes
    if problem.task.quality == "critical" and (chosen is None or chosen.plan.method != "full"):
        # Where some way of it fits, another was preferred.
        missing = [r for r in rejected if r.name.startswith("full") and r.needs_bytes]
        if missing:
            least = min(missing, key=lambda r: r.needs_bytes or 0)
            best = chosen.name if chosen else "nothing else fits either"
            told.append(
                f"quality=critical needs {_gb(least.needs_bytes or 0)} here ({least.name}), "
                f"this device has {_gb(room)}; next best: {best}"
            )
    if problem.machine.rates is None:
        told.append("how fast this device computes is not known, so hours and money are not; --calibrate measures it")
    if chosen is not None:
        told += [f"{name}: {why}" for fit in chosen.fits for name, why in fit.relaxed.items()]
    return told


def _ladder(problem: Problem, chosen: Candidate, feasible: Sequence[Candidate]) -> list[Rung]:
    """Each rung needs less than the one above it: what saves most without changing what is learnt comes first."""
    rungs: list[Rung] = []
    lowest = needs(chosen.plan, problem)
    for change, plan in steps_down(chosen.plan, problem.machine):
        if (need := needs(plan, problem)) < lowest:
            rungs.append(Rung(change, plan, need))
            lowest = need
    for other in feasible:
        if other.plan.method in LOW_RANK and chosen.plan.method in LOW_RANK:
            continue
        smallest = steps_down(other.plan, problem.machine)[-1:] or [("", other.plan)]
        plan = smallest[0][1]
        if (need := needs(plan, problem)) < lowest:
            rungs.append(Rung(f"{other.name} instead of {chosen.name}", plan, need))
            lowest = need
    return rungs


def _tier(machine: Machine) -> str:
    if machine.device == "cpu":
        return "micro"
    return next(
        name
        for least, name in ((40e9, "large"), (15e9, "medium"), (6e9, "small"), (0, "micro"))
        if machine.total_bytes >= least
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _sum(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
