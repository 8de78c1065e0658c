"""What a node can do with the plan that was published: its tier's limits, then what fits its memory, each with its reason.

A published plan is a wish. Rows behind an optimizer step, objective and kind of method stay as the federation has them; rank,
precision, and how a step is computed may differ from node to node.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from protocol.errors import HardwareError
from protocol.plan import QUANTISED, Plan, Precision
from strategies.architecture import Architecture
from strategies.footprint import Machine
from strategies.hardware import Hardware
from strategies.sizing import Calibrated, Fit, Problem, fewer_bits, needs, size
from strategies.task import Limits, Task

TierName = Literal["large", "medium", "small", "micro"]
# Of two plans that fit, the one whose base keeps its bits is better unless rank or length pay for it.
_FEWER_BITS = 0.9


@dataclass(frozen=True)
class Tier:
    """Limits of a class of hardware, as an institution sets them for a node or a simulation for a make-believe one.

    Attributes:
        max_rank: Largest LoRA rank.
        precision: How the frozen base is held; None leaves the plan's wish.
        why: What the tier stands for; it explains what it decided.
    """

    max_rank: int
    precision: Precision | None
    why: str


BITS: Mapping[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "nf4": 4}
TIERS: Mapping[TierName, Tier] = {
    "large": Tier(1024, None, "a data-centre GPU: room for the plan as published"),
    "medium": Tier(16, None, "a workstation GPU: room for the base, rank kept moderate"),
    "small": Tier(8, "nf4", "a consumer GPU: the base only fits at 4 bits"),
    "micro": Tier(4, "nf4", "a laptop: the base only fits at 4 bits, smallest adapter"),
}


@dataclass(frozen=True)
class Narrowed:
    """A plan that this node can carry out.

    Attributes:
        chosen: The plan.
        reasons: By dotted field name, why it differs from the wish; a field that is not named is as it was wished.
    """

    chosen: Plan
    reasons: Mapping[str, str]


def narrow(wish: Plan, tier: TierName = "large", max_rank: int | None = None) -> Narrowed:
    """Narrows a published plan to a tier and to the institution's own limit.

    Args:
        wish: What the coordinator, or the user, would like.
        tier: Class of this machine.
        max_rank: The institution's own limit, if it has one.

    Returns:
        The chosen plan and a reason for each field that was changed. The adapter's scaling follows its rank.
    """
    limits, reasons, chosen = TIERS[tier], {}, wish
    rank = min(wish.lora.r, limits.max_rank, max_rank or wish.lora.r)
    if rank < wish.lora.r:
        by_tier = limits.max_rank <= (max_rank or limits.max_rank)
        why = f"tier {tier} ({limits.why})" if by_tier else "the node's own max_rank"
        reasons["lora.r"] = f"{rank} instead of {wish.lora.r}: {why}"
        chosen = chosen.model_copy(update={"lora": wish.lora.with_rank(rank)})
    if limits.precision and BITS[wish.precision] > BITS[limits.precision] and wish.method in ("lora", "qlora"):
        reasons["precision"] = f"{limits.precision} instead of {wish.precision}: tier {tier} ({limits.why})"
        if wish.method != "qlora":
            reasons["method"] = f"qlora instead of {wish.method}: LoRA on a {limits.precision} base is QLoRA"
        chosen = chosen.model_copy(update={"precision": limits.precision, "method": "qlora"})
    return Narrowed(chosen, reasons)


def fitted(
    narrowed: Narrowed,
    architecture: Architecture,
    hardware: Hardware,
    calibration: Calibrated | None = None,
    taken_bytes: int = 0,
) -> Narrowed:
    """The same, made to fit this machine's memory; unchanged where it fits as it is.

    Args:
        narrowed: Within the institution's limits.
        architecture: Of the base.
        hardware: Found, or described.
        calibration: What real steps on this machine have shown.
        taken_bytes: Of models that stay in memory beside the one that trains.

    Raises:
        HardwareError: Nothing fits, with how much the smallest needs.
    """
    plan = narrowed.chosen
    problem = _problem(plan, architecture, hardware, calibration, taken_bytes)
    if needs(plan, problem) <= problem.machine.room_bytes:
        return narrowed
    tried: list[tuple[float, Fit]] = []
    for at, precision in enumerate([plan.precision, *fewer_bits(plan, problem.machine)]):
        fit = size(_held(plan, precision), problem)
        tried.append((0.0 if fit.refused else _FEWER_BITS**at * fit.relaxation, fit))
    worth, best = max(tried, key=lambda one: one[0])
    if not worth:
        least = min((fit for _, fit in tried), key=lambda fit: fit.needs_bytes or 0)
        raise HardwareError(f"this node cannot carry out the federation's plan: {least.refused}")
    return Narrowed(best.plan, {**narrowed.reasons, **_changes(plan, best)})


def _problem(
    plan: Plan, architecture: Architecture, hardware: Hardware, calibration: Calibrated | None, taken_bytes: int
) -> Problem:
    # How long answers are is for the rows to say: the ladder looks at them (``client.ladder``).
    task, machine = Task(kind="generation", input_tokens=plan.data.max_length, output_tokens=0), Machine.of(hardware).one
    room = replace(machine, room_bytes=machine.room_bytes - taken_bytes)
    return Problem(task, room, architecture, Limits(), {}, calibration)


def _held(plan: Plan, precision: Precision) -> Plan:
    """The plan with its base in fewer bits."""
    method = "qlora" if plan.method == "lora" and precision in QUANTISED else plan.method
    return plan.model_copy(update={"precision": precision, "method": method})


def _changes(wish: Plan, fit: Fit) -> dict[str, str]:
    plan, told = fit.plan, dict(fit.relaxed)
    pairs = {
        "precision": (wish.precision, plan.precision),
        "method": (wish.method, plan.method),
        "training.batch_size": (wish.training.batch_size, plan.training.batch_size),
        "training.gradient_accumulation_steps": (
            wish.training.gradient_accumulation_steps,
            plan.training.gradient_accumulation_steps,
        ),
        "training.gradient_checkpointing": (wish.training.gradient_checkpointing, plan.training.gradient_checkpointing),
        "training.optim": (wish.training.optim, plan.training.optim),
    }
    why = f"the plan as it was did not fit; this needs {fit.estimate.device_bytes / 1e9:.1f} GB"
    return {f: f"{new} instead of {old}: {why}" for f, (old, new) in pairs.items() if old != new} | told
