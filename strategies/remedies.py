"""What would fit where nothing does: the same without one wish, or the same on the next larger GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import ConfigurationError
from strategies.architecture import Architecture
from strategies.hardware import PROFILES, Hardware
from strategies.selector import Candidate, Rejected, Selection, select
from strategies.sizing import Calibrated
from strategies.task import Limits, Task


def remedies(
    task: Task,
    hardware: Hardware,
    architecture: Architecture,
    limits: Limits,
    wishes: Mapping[str, Any],
    calibration: Calibrated | None,
    found: Selection,
) -> list[str]:
    """The nearest ways out, a line each, of what ``selector.select`` answered to the same; none where something was chosen."""
    if found.chosen is not None:
        return []

    def chosen(rest: Mapping[str, Any]) -> Candidate | None:
        try:
            return select(task, hardware, architecture, limits, rest, calibration=calibration).chosen
        except ConfigurationError:
            return None

    told = [
        f"without the wish {name}={value}: {_fits(one)}"
        for name, value in wishes.items()
        if (one := chosen({other: wishes[other] for other in wishes if other != name}))
    ]
    if wishes and not told and (one := chosen({})):
        told.append(f"without all of these wishes: {_fits(one)}")
    return told or _larger(found.rejected, limits)


def _fits(one: Candidate) -> str:
    rows = one.plan.training.batch_size
    return f"{one.name} would fit, {one.peak_bytes / 1e9:.1f} GB with {rows} rows at a time"


def _larger(rejected: Sequence[Rejected], limits: Limits) -> list[str]:
    """The machine by name that would do for what needs least."""
    sized = [one for one in rejected if one.needs_bytes]
    # Of little use would be what needs least of all, if it learns least of all.
    near = [one for one in sized if one.name.startswith(("lora", "qlora"))] or sized
    least = min(near, key=lambda one: one.needs_bytes or 0, default=None)
    if least is None or least.needs_bytes is None:
        return []
    rooms = {
        name: machine.gpus[0].total_bytes * (1 - limits.memory_margin) for name, machine in PROFILES.items() if machine.gpus
    }
    enough = [name for name in rooms if rooms[name] >= least.needs_bytes]
    where = f"one {min(enough, key=rooms.__getitem__)} has room for it" if enough else "no GPU that is known by name holds it"
    return [f"nearest: {least.name} needs {least.needs_bytes / 1e9:.1f} GB at its smallest; {where}"]
