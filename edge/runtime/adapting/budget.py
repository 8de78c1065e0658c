"""What learning may take of a device, looked at between micro-batches: time, memory, steps, battery, temperature.

Linux tells battery and temperature under /sys; where a system does not, a limit on them cannot be kept, and is said.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from protocol.strict import Strict

_POWER, _THERMAL = Path("/sys/class/power_supply"), Path("/sys/class/thermal")
_MEMORY = Path("/proc/self/status")
_LOOK_SECONDS = 1.0  # a look costs files; nothing here changes faster


class Budget(Strict):
    """Limits; None is none."""

    seconds: PositiveFloat | None = Field(None, description="of this call")
    steps: PositiveInt | None = Field(None, description="optimiser steps of this call")
    memory_bytes: PositiveInt | None = Field(None, description="of the whole process, as the system counts what is in memory")
    battery_percent: float | None = Field(None, ge=0, le=100, description="stops below it, unless the device is charging")
    celsius: PositiveFloat | None = Field(None, description="stops above it")


@dataclass(frozen=True)
class Senses:
    """What a device knows of itself; each gives None where the system does not tell.

    Attributes:
        battery_percent: Charge of its emptiest battery.
        charging: Whether it hangs on a charger.
        celsius: Of its hottest part.
        memory_bytes: That this process has in memory.
    """

    battery_percent: Callable[[], float | None] = field(default=lambda: _battery(_POWER))
    charging: Callable[[], bool | None] = field(default=lambda: _charging(_POWER))
    celsius: Callable[[], float | None] = field(default=lambda: _celsius(_THERMAL))
    memory_bytes: Callable[[], int | None] = field(default=lambda: _resident(_MEMORY))


class Meter:
    """Holds one call to its budget."""

    def __init__(self, budget: Budget, senses: Senses | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._senses, self._clock = budget, senses or Senses(), clock
        self._begun = clock()
        self._looked, self._said = -_LOOK_SECONDS, ""
        self.steps = 0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._begun

    def unknown(self) -> list[str]:
        """Limits that this device cannot keep, for it does not tell what they are about."""
        budget, senses = self._budget, self._senses
        asked: dict[str, tuple[Any, Callable[[], Any]]] = {
            "battery_percent": (budget.battery_percent, senses.battery_percent),
            "celsius": (budget.celsius, senses.celsius),
            "memory_bytes": (budget.memory_bytes, senses.memory_bytes),
        }
        return [name for name, (limit, sense) in asked.items() if limit is not None and sense() is None]

    def over(self) -> str:
        """Why learning stops now; empty while it may go on."""
        budget = self._budget
        if budget.steps is not None and self.steps >= budget.steps:
            return f"steps: {self.steps} of {budget.steps}"
        if budget.seconds is not None and self.seconds >= budget.seconds:
            return f"seconds: {self.seconds:.0f} of {budget.seconds:g}"
        if self._clock() - self._looked >= _LOOK_SECONDS:
            self._looked, self._said = self._clock(), self._sensed()
        return self._said

    def _sensed(self) -> str:
        budget, senses = self._budget, self._senses
        memory = senses.memory_bytes() if budget.memory_bytes else None
        if memory is not None and budget.memory_bytes and memory > budget.memory_bytes:
            return f"memory: {memory / 1e6:.0f} of {budget.memory_bytes / 1e6:g} MB, Python and its libraries among them"
        charge = senses.battery_percent() if budget.battery_percent is not None else None
        if (
            charge is not None
            and budget.battery_percent is not None
            and charge < budget.battery_percent
            and not senses.charging()
        ):
            return f"battery_percent: {charge:g}, expected {budget.battery_percent:g} or a charger"
        heat = senses.celsius() if budget.celsius else None
        if heat is not None and budget.celsius and heat > budget.celsius:
            return f"celsius: {heat:.0f} of {budget.celsius:g}"
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # not there, or gone with its device
        return ""


def _number(path: Path) -> float | None:
    try:
        found = float(_read(path))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _supplies(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _battery(folder: Path) -> float | None:
    # A keyboard's or a mouse's battery is not the device's.
    own = [each for each in _supplies(folder) if _read(each / "type") == "Battery" and _read(each / "scope") != "Device"]
    # Some drivers tell a little more than 100; what is far from any share tells nothing.
    found = [min(charge, 100.0) for each in own if (charge := _number(each / "capacity")) is not None and 0 <= charge <= 110]
    return min(found, default=None)


def _charging(folder: Path) -> bool | None:
    mains = [_number(each / "online") for each in _supplies(folder) if _read(each / "type") in ("Mains", "USB")]
    known = [state for state in mains if state is not None]
    return any(known) if known else None


def _celsius(folder: Path) -> float | None:
    found = [_number(each / "temp") for each in _supplies(folder) if each.name.startswith("thermal_zone")]
    return max((each / 1000 for each in found if each is not None), default=None)


def _resident(status: Path) -> int | None:
    for line in _read(status).splitlines():
        name, _, value = line.partition(":")
        if name == "VmRSS" and value.split()[:1] and value.split()[0].isdecimal():
            return int(value.split()[0]) * 1024
    return None
