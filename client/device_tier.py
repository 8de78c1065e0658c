"""The selector of a device: what its memory, cores and battery let it do of a plan, with a reason for each. Nothing is sent."""

from dataclasses import dataclass
from typing import Final

from client.node import Node
from edge.runtime.adapting.budget import Senses
from protocol.errors import NotNowError
from protocol.plan import Plan
from strategies.hardware import Hardware
from strategies.narrowing import TIERS, TierName

_GIB: Final = 2**30


@dataclass(frozen=True)
class DeviceTier:
    """A class of devices.

    Attributes:
        name: Of the tier whose largest rank it has (``strategies.narrowing``).
        ram_bytes, cores: What a device has at least: of the machine, which is the same in every round, and not of the moment.
        at_once: Most examples in memory at a time.
    """

    name: TierName
    ram_bytes: int
    cores: int
    at_once: int


# From the largest down; the last takes any device.
DEVICES: Final = (
    DeviceTier("large", 14 * _GIB, 8, 64),
    DeviceTier("medium", 7 * _GIB, 4, 8),
    DeviceTier("small", 3 * _GIB, 2, 4),
    DeviceTier("micro", 0, 0, 1),
)


def tier_of(hardware: Hardware, most: TierName) -> DeviceTier:
    """The first tier that a machine reaches, none above the one that its institution says."""
    names = [tier.name for tier in DEVICES]
    return next(
        tier
        for tier in DEVICES[names.index(most) :]
        if tier is DEVICES[-1] or (hardware.ram_total_bytes >= tier.ram_bytes and hardware.cpu_cores >= tier.cores)
    )


def narrowed(plan: Plan, node: Node, largest_rank: int) -> tuple[Plan, dict[str, str]]:
    """The plan with a rank and a micro-batch for this device; as many rows are behind a step as before.

    Args:
        plan: The federation's.
        node: Its own limits, and the machine that it chooses for.
        largest_rank: Of the bundle's graphs.

    Returns:
        The plan, and a reason for each field that was changed.
    """
    hardware, reasons = node.hardware(), dict[str, str]()
    tier = tier_of(hardware, node.tier)
    limits = {
        f"device tier {tier.name} ({hardware.ram_total_bytes / _GIB:.1f} GiB, {hardware.cpu_cores} cores)": TIERS[
            tier.name
        ].max_rank,
        "the bundle's training graphs": largest_rank,
        "the node's own max_rank": node.max_rank or plan.lora.r,
    }
    why = min(limits, key=lambda name: limits[name])
    if (rank := min(plan.lora.r, limits[why])) < plan.lora.r:
        reasons["lora.r"] = f"lora.r {rank} instead of {plan.lora.r}: {why}"
        plan = plan.model_copy(update={"lora": plan.lora.with_rank(rank)})
    training = plan.training
    if training.batch_size > tier.at_once:
        together = training.batch_size * training.gradient_accumulation_steps
        size = max(each for each in range(1, tier.at_once + 1) if together % each == 0)
        reasons["training.batch_size"] = f"training.batch_size {size} instead of {training.batch_size}: device tier {tier.name}"
        smaller = {"batch_size": size, "gradient_accumulation_steps": together // size}
        plan = plan.model_copy(update={"training": training.model_copy(update=smaller)})
    return plan, reasons


def why_not_now(node: Node, senses: Senses) -> str:
    """Why this device leaves its battery alone at this moment; empty where it need not. One that tells no charge has none."""
    charge = senses.battery_percent()
    if charge is None or charge >= node.device_battery or senses.charging():
        return ""
    return f"the battery is at {charge:g} per cent and not charging; expected at least {node.device_battery:g}, or a charger"


def check_now(node: Node, senses: Senses) -> None:
    """Makes sure that this device may work now.

    Raises:
        NotNowError: Its battery is low.
    """
    if why := why_not_now(node, senses):
        raise NotNowError(f"{why}; nothing is done")
