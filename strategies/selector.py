"""The best way to fine-tune that fits: ``select(task, hardware, architecture, limits)``.

An explicit wish goes before what is feasible, that before what the rules prefer, that before what is cheaper. Candidates are
what the fired rules propose, at each precision and sharding that the machine has kernels for. Each is sized
(``strategies.sizing``); of those that fit, the one of the largest value is chosen:

    value = preference * relaxation * seconds^(-k),    k = 1 fast, 0.15 balanced, 0.02 thorough or critical

``preference`` is the rules' judgement (1 for fast: there the cheapest wins; where quality is critical, times what the method
can learn at best), ``relaxation`` what fewer passes, a lower rank or shorter rows lose, and ``seconds`` the training with as
much memory and time as it likes. So more memory, time or money makes more feasible and nothing less, and never makes the
choice worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import ConfigurationError
from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, QUANTISED, Method, Objective, Plan, Precision
from strategies import rules
from strategies.architecture import Architecture
from strategies.footprint import Machine, biases
from strategies.hardware import Hardware
from strategies.memory import Sharding
from strategies.rules import Rule
from strategies.settings import implied, settled, unheard, wished
from strategies.sizing import (
    Calibrated,
    Fit,
    Problem,
    ideal_seconds,
    least_length,
    needs,
    rows_for,
    size,
    steps_down,
    steps_of,
)
from strategies.task import Limits, Task

_COST_WEIGHT = {"fast": 1.0, "balanced": 0.15, "thorough": 0.02}
_CONSUMER_BYTES = 26e9
# What fewer bits lose, beside the same in 16 bits: QLoRA matches LoRA within noise (Dettmers 2023, table 3), so what speaks
# against it is its time. Of two that are as good, 4 bits leave more room than 8.
_OF_PRECISION: Mapping[Precision, float] = {"fp32": 1.0, "bf16": 1.0, "fp16": 1.0, "nf4": 0.97, "int8": 0.95}
# Whole weights in pure bfloat16: at their small rates most steps round to nothing (benchmarks/LOG.md: 9 % of the weights move).
_SMALL_STEPS_LOST = 0.7
_WORTH_A_RUNG = 0.99
_FEW_STEPS = 80
_QUALITY = ((0.93, "high"), (0.85, "good"), (0.75, "fair"), (0.0, "basic"))


@dataclass(frozen=True)
class Candidate:
    """One strategy that fits.

    Attributes:
        name: Method, precision and, beyond one GPU, what is sharded.
        stages: Plans one after the other.
        why: Of each stage, by dotted field, why it is as it is.
        fits: How each stage fits.
        preference: Of the rules, 0 to 1.
        value: What the choice is made by.
        complexity: 1 to 5.
        rule: Which rule proposed it.
    """

    name: str
    stages: tuple[Plan, ...]
    why: tuple[Mapping[str, str], ...]
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
    def reasons(self) -> Mapping[str, str]:
        """Those of the first stage."""
        return self.why[0]

    @property
    def given_up(self) -> tuple[str, ...]:
        """What it does without to fit, of all stages."""
        return tuple(dict.fromkeys(f"{name}: {why}" for fit in self.fits for name, why in fit.relaxed.items()))

    @property
    def kwh(self) -> float | None:
        """Energy of all stages, an upper bound; None where the device's power is not known."""
        joules = _sum([fit.cost.energy_joules if fit.cost else None for fit in self.fits])
        return None if joules is None else joules / 3.6e6

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
        undivided: The name of the same where each of several GPUs holds it whole.
    """

    name: str
    reason: str
    needs_bytes: int | None = None
    undivided: str = ""


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

    method: Method
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
    limits, wishes = limits or Limits(), implied(wishes or {})
    wished(wishes, task, limits)
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
    fit = {one.name for one in feasible}
    # What fits as it is need not be divided over GPUs.
    rejected = [one for one in all_of_them if isinstance(one, Rejected) and not (one.undivided and one.undivided in fit)]
    chosen = feasible[0] if feasible else None
    return Selection(
        chosen,
        tuple(feasible),
        tuple(rejected),
        found,
        (*(f"{rule.advises} (rule {rule})" for rule in found if rule.advises), *_start(machine, chosen)),
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
    method: Method | None = "lora" if wish == "qlora" else wish
    proposals = [(rule, p.method, p.preference, p.stages or (own,)) for rule in found for p in rule.proposes]
    if method and all(name != method for _, name, _, _ in proposals):
        stages = next(stages for _, _, _, stages in proposals)
        proposals.append((found[-1], method, 0.8, stages))
    if "objective" in problem.wishes:
        proposals = [(rule, name, score, (problem.wishes["objective"],)) for rule, name, score, _ in proposals]
    if problem.task.shape in ("single", "prompts"):  # rows that instruction tuning has nothing to learn from
        alone = (
            (rule, name, score, tuple(s for s in stages if s != "sft") or stages) for rule, name, score, stages in proposals
        )
        proposals = list(alone)
    longest = max(len(stages) for _, _, _, stages in proposals)
    for rule, name, score, stages in proposals:
        # Feedback that is there is to be learnt from: leaving its stages out is cheaper, but not what was asked for.
        worth = score * (1.0 if len(stages) == longest else 0.4)
        for precision, factor in _precisions(name, problem):
            for sharding in _shardings(name, precision, problem.machine):
                strategy: Method = "qlora" if name == "lora" and precision in QUANTISED else name
                one = _Wanted(strategy, precision, sharding, stages, worth * factor, rule)
                if wish not in (None, strategy) or problem.wishes.get("precision", precision) != precision:
                    continue
                made.setdefault(one.name, one)
    if not made:
        held = sorted({precision for _, name, _, _ in proposals for precision, _ in _precisions(name, problem)})
        known = f"{wish or 'its strategies'} here can be had in {', '.join(held)}"
        raise ConfigurationError("wishes", [f"precision: found {problem.wishes.get('precision')}; {known}"])
    return list(made.values())


def _objective(task: Task) -> Objective:
    alike: Mapping[str, Objective] = {
        "classification": "classification",
        "regression": "regression",
        "pretraining": "pretraining",
    }
    return alike.get(task.kind, "sft")


def _precisions(method: Method, problem: Problem) -> list[tuple[Precision, float]]:
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
    if problem.wishes.get("method") == "qlora" and "precision" not in problem.wishes:
        packed = packed[:1]  # what the word stands for
    if problem.task.on_device:
        return [(precision, _OF_PRECISION[precision]) for precision in packed]
    wish: Precision | None = problem.wishes.get("precision")
    asked: list[Precision] = [wish] if wish in ("fp32", "fp16") and machine.device == "cuda" and wish != native else []
    return [(precision, _OF_PRECISION[precision]) for precision in (native, *asked, *packed)]


def _shardings(method: Method, precision: Precision, machine: Machine) -> tuple[Sharding, ...]:
    if machine.gpus < 2 or precision in QUANTISED:
        return ("none",)
    return ("none", "zero2", "zero3", "fsdp") if method in COMPRESSED else ("none", "fsdp")


def _refused(wanted: _Wanted, problem: Problem, found: Sequence[Rule]) -> Rejected | None:
    """What rules it out before any size is looked at."""
    task, kind = problem.task, problem.architecture.kind
    for rule in found:
        if wanted.method in rule.forbids:
            return Rejected(wanted.name, f"not here: {rule.source} (rule {rule.id})")
    if told := next(filter(None, (unheard(name, wanted.method) for name in problem.wishes)), ""):
        return Rejected(wanted.name, f"the wish {told}")
    if _objective(task) in ("sft", "pretraining") and kind != "decoder":
        not_here = "which writes no text" if kind == "encoder" else "which fedge does not train to write"
        return Rejected(wanted.name, f"the base is an {kind}, {not_here}; give a decoder, or a task with labels")
    if why := _unlearnable(wanted, problem):
        return Rejected(wanted.name, why)
    if wanted.method == "adalora" and problem.machine.gpus > 1:
        return Rejected(wanted.name, "shares its ranks out in one process; plan for --gpus 1, or take another method")
    if wanted.method == "experts" and not problem.architecture.experts:
        return Rejected(wanted.name, "the base has no experts; give a mixture of experts")
    if wanted.method == "bitfit" and not biases(problem.architecture) and not problem.wishes.get("bitfit.add_missing"):
        return Rejected(wanted.name, "the base has no biases; wish bitfit.add_missing to give it some")
    rewarded = task.feedback == "pairs" or any(name.startswith("rl.reward_") for name in problem.wishes)
    if "rl" in wanted.stages and not rewarded:
        return Rejected(wanted.name, "needs a reward: wish rl.reward_functions (module:function) or rl.reward_model")
    if _judged(wanted, problem) and not any(name.startswith("ai_feedback.judge") for name in problem.wishes):
        return Rejected(wanted.name, "needs a judge: wish ai_feedback.judge.base_model, or ai_feedback.judge.endpoint")
    needed, most = _complexity(wanted), rules.MOST_COMPLEX[task.expertise]
    if needed > most and "method" not in problem.wishes:
        return Rejected(wanted.name, f"complexity {needed} of 5, expertise {task.expertise} is handed up to {most}")
    return None


def _judged(wanted: _Wanted, problem: Problem) -> bool:
    """Whether a judge makes its pairs."""
    return problem.task.feedback == "judge" and "dpo" in wanted.stages


def _unlearnable(wanted: _Wanted, problem: Problem) -> str:
    """Why the rows would teach nothing; empty where they teach something."""
    task, context = problem.task, problem.architecture.context
    if "sft" in wanted.stages and task.shape == "prompts":
        return "the rows are prompts without answers; name answers, or say what judges them (feedback=reward or judge)"
    least = least_length(wanted.stages[0], task)
    if "data.max_length" in problem.wishes or not task.answers or not 0 < context < least:
        return ""
    row = task.median_tokens or task.row_tokens
    return (
        f"the base reads {context} tokens, and rows of {row} have their answers ({task.output_tokens} tokens) at the end: they "
        "would be cut off; shorten the rows, take a base that reads more, or wish data.max_length"
    )


def _complexity(wanted: _Wanted) -> int:
    return max(rules.COMPLEXITY[wanted.method], *(rules.STAGE_COMPLEXITY.get(stage, 1) for stage in wanted.stages))


def _sized(wanted: _Wanted, problem: Problem, found: Sequence[Rule]) -> Candidate | Rejected:
    fits: list[Fit] = []
    reasons: list[Mapping[str, str]] = []
    problem, undivided = replace(problem, sharding=wanted.sharding), ""
    if wanted.sharding != "none":
        undivided = replace(wanted, sharding="none").name
    try:
        stages = [settled(wanted.method, wanted.precision, stage, problem, found) for stage in wanted.stages]
    except ConfigurationError as error:  # what is wished does not go with this strategy
        return Rejected(wanted.name, "; ".join(told.removeprefix("(whole file): ") for told in error.problems))
    ideals = [ideal_seconds(plan, problem) for plan, _ in stages]
    for (plan, why), ideal in zip(stages, ideals, strict=True):
        fit = size(plan, problem, share=ideal / sum(ideals))
        if fit.refused:
            return Rejected(wanted.name, f"{fit.refused}{_packed(plan, problem)}", fit.needs_bytes, undivided)
        fits.append(fit)
        reasons.append({**_why(wanted, problem), **why, **fit.reasons})
    if undivided:
        least = max(fit.estimate.device_bytes for fit in fits)
        said = (
            f"would fit, {_gb(least)} on each of {problem.machine.gpus} GPUs: plans do not divide weights, which was measured "
            "nowhere here; training.fsdp or training.deepspeed do (docs/training.md)"
        )
        return Rejected(wanted.name, said, undivided=undivided)
    relaxation = min(fit.relaxation for fit in fits)
    critical = problem.task.quality == "critical"
    weight = _COST_WEIGHT["thorough" if critical else problem.task.speed]
    preference = wanted.preference * (rules.CAPACITY[wanted.method] if critical else 1.0)
    preference = 1.0 if problem.task.speed == "fast" and not critical else preference
    value = preference * relaxation * max(sum(fit.ideal_seconds for fit in fits), 1e-9) ** -weight
    plans = tuple(fit.plan for fit in fits)
    return Candidate(
        wanted.name, plans, tuple(reasons), tuple(fits), wanted.preference, value, _complexity(wanted), wanted.rule
    )


def _packed(plan: Plan, problem: Problem) -> str:
    """Why fewer bits need more memory."""
    if plan.precision not in QUANTISED or not problem.architecture.experts:
        return ""
    return "; bitsandbytes leaves experts as they are, and PEFT's preparation holds what is not quantised in float32"


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
    if (problem.task.classes or 0) > problem.task.rows:
        told.append(f"{problem.task.classes} labels and {problem.task.rows} rows: labels without a row are not learnt")
    told += _unchecked(problem, chosen)
    told += _unnamed(problem, chosen) if chosen else []
    unused = next((one for one in rejected if " then " in one.name), None)
    if chosen is not None and unused is not None and problem.task.feedback != "none" and len(chosen.stages) == 1:
        told.append(f"feedback={problem.task.feedback} is not learnt from; {unused.name}: {unused.reason}")
    if chosen is not None:
        told += [*_cut(problem, chosen), *_few(problem, chosen)]
        objectives = [stage.objective for stage in chosen.stages]
        told += [f"the wish {why}" for name in problem.wishes if (why := unheard(name, None, *objectives))]
        told += chosen.given_up
    return told


def _cut(problem: Problem, chosen: Candidate) -> list[str]:
    """Rows that lose their ends for other reasons than memory (which ``given_up`` tells)."""
    task, length, context = problem.task, chosen.plan.data.max_length, problem.architecture.context
    if chosen.plan.objective == "pretraining" or (length >= task.longest_row and task.longest_tokens is not None):
        return []
    relaxed = any("data.max_length" in fit.relaxed for fit in chosen.fits)
    cause = "more does not fit" if relaxed else f"the base reads {context} at most"
    cause = "as wished" if "data.max_length" in problem.wishes else cause
    answers = ", and answers stand there" if task.answers else ""
    if length < (row := task.median_tokens or task.row_tokens):
        return [f"MOST ROWS LOSE THEIR END{answers}: rows of {row} tokens are cut to {length} ({cause})"]
    if length < task.row_tokens:
        return [f"more than one row in twenty loses its end{answers}: they are cut to {length} tokens ({cause})"]
    if length < task.longest_row and not relaxed:
        return [f"rows of up to {task.longest_row} tokens are cut to {length} ({cause})"]
    return []


def _few(problem: Problem, chosen: Candidate) -> list[str]:
    told = []
    for plan in chosen.stages:
        steps, passes = steps_of(plan, problem), plan.training.num_train_epochs
        if steps < _FEW_STEPS and not plan.training.max_steps and plan.objective != "rl":
            rows = rows_for(plan.objective, problem.task)
            told.append(
                f"{plan.objective}: {rows} rows give {steps} optimizer steps in {passes:g} passes; so few may teach nothing, "
                "and rows that are read often are learnt by heart: look at held-out figures, and collect more"
            )
    return told


def _unnamed(problem: Problem, chosen: Candidate) -> list[str]:
    """Files that the plan needs and the user has yet to name."""
    told = []
    if problem.task.tasks > 1 and "data.tasks" not in problem.wishes:
        told.append(f"{problem.task.tasks} tasks: the job needs the rows of each under data.tasks (docs/mixtures.md)")
    if problem.task.feedback == "judge" and any(plan.ai_feedback for plan in chosen.stages) and problem.task.shape != "prompts":
        told.append("the stage with a judge reads prompts: name their file as its data.train in the job")
    return told


def _start(machine: Machine, chosen: Candidate | None) -> list[str]:
    """How several GPUs are put to work: one process trains on one."""
    if chosen is None or machine.gpus < 2:
        return []
    return [f"start it with: torchrun --standalone --nproc-per-node {machine.gpus} -m fedge train JOB.yaml (docs/training.md)"]


def _unchecked(problem: Problem, chosen: Candidate | None) -> list[str]:
    """What is not known of the time and its price, and which limits nothing was held against for that."""
    told, limits = [], problem.limits
    if problem.machine.rates is None:
        told.append("how fast this device computes is not known, so hours and money are not")
    elif chosen is not None and chosen.money is None and limits.kwh is not None:
        told.append("money is not known: limits.kwh prices energy, and this device's power is not known; leave kwh out")
    unknown = {"hours": chosen is not None and chosen.seconds is None, "money": chosen is not None and chosen.money is None}
    for name, not_known in unknown.items():
        if not_known and (most := getattr(limits, name)) is not None:
            told.append(
                f"limits.{name} {most:g} was not checked: it is not known what {chosen.name if chosen else 'this'} takes"
            )
    return told


def _ladder(problem: Problem, chosen: Candidate, feasible: Sequence[Candidate]) -> list[Rung]:
    """Each rung needs less than the one above it: what saves most without changing what is learnt comes first."""
    rungs: list[Rung] = []
    lowest = needs(chosen.plan, problem)
    shortest = least_length(chosen.plan.objective, problem.task)
    for change, plan in steps_down(chosen.plan, problem.machine, shortest=shortest):
        if (need := needs(plan, problem)) < _WORTH_A_RUNG * lowest:
            rungs.append(Rung(change, plan, need))
            lowest = need
    for other in feasible:
        if other.plan.method in LOW_RANK and chosen.plan.method in LOW_RANK:
            continue
        smallest = steps_down(other.plan, problem.machine, shortest=shortest)[-1:] or [("", other.plan)]
        plan = smallest[0][1]
        if (need := needs(plan, problem)) < _WORTH_A_RUNG * lowest:
            rungs.append(Rung(f"{plan.method} {plan.precision} instead of {chosen.name}", plan, need))
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
