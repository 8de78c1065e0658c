"""When simulated devices may work: while they charge, lie idle and have an unmetered network, as a trace says or as is drawn.

These are the conditions of Bonawitz et al. 2019 (arXiv:1902.01046, section 2.2); traces of when real devices meet them are what
FedScale replays (Lai et al. 2022, arXiv:2105.11367, section 3.2). Spells are half-open, ``[begin, end)``, in whole seconds, and
all of them begin anew after a period; time 0 is midnight.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigurationError

CONDITIONS: Final = ("charging", "idle", "unmetered")
DAY_SECONDS: Final = 86_400
# Of a night on the charger, how much a device that is drawn lies untouched; more than that is available to nobody.
MOST_SHARE: Final = 0.8
# Most devices at 2 in the morning: with this spread of habits and time zones about four times as many as in the afternoon, as
# is reported of a population in one time zone (Bonawitz et al. 2019, section 9).
_PEAK_SECONDS, _SPREAD_SECONDS = 2 * 3600, 5 * 3600
_DRAWN_DAYS = 3
_LONGEST_LINE, _MOST_SPELLS, _SHOWN = 2**20, 10**7, 20
Ints: TypeAlias = NDArray[np.int64]
Spells: TypeAlias = Sequence[tuple[int, int]]


class Availability:
    """Spells of many devices in four bytes a bound.

    Args:
        begins, ends: All spells, device after device, each device's in order and none touching the next.
        counts: How many of them each device has.
        period: After which all begin anew, in seconds.
    """

    def __init__(self, begins: Ints, ends: Ints, counts: Ints, period: int) -> None:
        self.period = period
        self._begins, self._ends = begins.astype(np.int32), ends.astype(np.int32)
        self._owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self._first) - 1

    @classmethod
    def of(cls, devices: Sequence[Spells], period: int) -> Self:
        """Of each device's spells."""
        flat = [spell for spells in devices for spell in spells]
        bounds = np.array(flat, np.int64).reshape(-1, 2)
        return cls(bounds[:, 0], bounds[:, 1], np.array([len(spells) for spells in devices], np.int64), period)

    def at(self, now: float) -> NDArray[np.bool_]:
        """Which devices are available, ``(devices,)``."""
        moment = now % self.period
        found = np.zeros(len(self), bool)
        found[self._owners[(self._begins <= moment) & (moment < self._ends)]] = True
        return found

    def until(self, device: int, now: float) -> float:
        """When a device's spell ends; ``now`` where it is in none, infinity where it always is in one."""
        moment = now % self.period
        begins, ends = (bounds[self._first[device] : self._first[device + 1]] for bounds in (self._begins, self._ends))
        at = int(np.searchsorted(begins, moment, "right")) - 1
        if at < 0 or ends[at] <= moment:
            return now
        left = float(ends[at] - moment)
        if ends[at] == self.period and begins[0] == 0:  # it goes on over the seam
            if len(begins) == 1:
                return float("inf")
            left += float(ends[0])
        return now + left

    def share(self) -> float:
        """Mean share of the time that a device is available."""
        return float((self._ends.astype(np.int64) - self._begins).sum()) / (self.period * max(1, len(self)))

    def dealt(self, devices: int) -> "Availability":
        """As many devices, to which the spells of these are dealt out in turn."""
        chosen = np.arange(devices) % len(self)
        counts = np.diff(self._first)[chosen]
        at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(self._first[chosen], counts)
        return Availability(self._begins[at], self._ends[at], counts, self.period)


def always(devices: int) -> Availability:
    """Devices that never go."""
    return Availability.of([[(0, DAY_SECONDS)]] * devices, DAY_SECONDS)


def drawn(devices: int, share: float, spell_seconds: float, seed: int) -> Availability:
    """Devices on their chargers by night, each at its own hours, and now and then in somebody's hand.

    A device is plugged in once a day for ``W`` seconds, centred on an hour of its own that is normal around 2 in the morning.
    Within it spells without disturbance and breaks follow each other, exponential with means ``spell_seconds`` and a quarter of
    it, from a state drawn with their proportions: it is undisturbed for a share of ``MOST_SHARE`` of the time in expectation.
    ``W`` is uniform around ``share / MOST_SHARE`` days, a half more or less where a day has room for it, so that the mean share
    over devices is ``share``. The three days of a period differ in their breaks.

    Args:
        devices: How many.
        share: Mean share of the time that a device is available, above 0 and at most ``MOST_SHARE``.
        spell_seconds: Mean length of a spell that nothing else ends.
        seed: Draws all of it.
    """
    rng = np.random.default_rng([seed, 1])
    mean = share / MOST_SHARE
    around = min(0.5, 1 / mean - 1)
    window = mean * DAY_SECONDS * rng.uniform(1 - around, 1 + around, devices)
    begin = rng.normal(_PEAK_SECONDS, _SPREAD_SECONDS, devices) - window / 2
    period, parts = _DRAWN_DAYS * DAY_SECONDS, []
    for day in range(_DRAWN_DAYS):
        owners, *bounds = _undisturbed(window, spell_seconds, rng)
        parts.append((owners, *(np.round(begin[owners] + day * DAY_SECONDS + bound).astype(np.int64) for bound in bounds)))
    owners, begins, ends = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _on_the_circle(owners, begins, ends, devices, period)


def _undisturbed(
    window: NDArray[np.float64], spell: float, rng: np.random.Generator
) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
    """Spells within ``[0, window)`` of each device, as owner, begin and end: an alternating renewal process in equilibrium."""
    at, on = np.zeros(len(window)), rng.random(len(window)) < MOST_SHARE
    pause = spell * (1 / MOST_SHARE - 1)
    found: list[tuple[Ints, NDArray[np.float64], NDArray[np.float64]]] = []
    left = np.arange(len(window))
    while len(left):
        end = np.minimum(at[left] + rng.exponential(np.where(on[left], spell, pause)), window[left])
        up = on[left]
        found.append((left[up], at[left][up], end[up]))
        at[left], on[left] = end, ~up
        left = left[end < window[left]]
    owners, begins, ends = (np.concatenate(each) for each in zip(*found, strict=True))
    return owners, begins, ends


def _on_the_circle(owners: Ints, begins: Ints, ends: Ints, devices: int, period: int) -> Availability:
    """Spells anywhere in time, none longer than a period, as those of one: cut at its end, in order, one where they touch."""
    ends = begins % period + (ends - begins)
    begins = begins % period
    over = ends > period
    owners = np.concatenate([owners, owners[over]])
    begins, ends = np.concatenate([begins, 0 * ends[over]]), np.concatenate([np.minimum(ends, period), ends[over] - period])
    order = np.lexsort((begins, owners))
    owners, begins, ends = (each[order] for each in (owners, begins, ends))
    real = ends > begins
    owners, begins, ends = owners[real], begins[real], ends[real]
    # Along one line, on which each device has a stretch of its own, spells that touch are one.
    line = owners * (period + 1)
    reach = np.maximum.accumulate(line + ends)
    fresh = np.ones(len(owners), bool)
    fresh[1:] = (line + begins)[1:] > reach[:-1]
    last = np.append(np.flatnonzero(fresh)[1:], len(owners)) - 1 if len(owners) else np.zeros(0, np.int64)
    ends = (reach - line)[last]
    return Availability(begins[fresh], ends, np.bincount(owners[fresh], minlength=devices), period)


def read_traces(path: Path, period: int) -> Availability:
    """Traces of a JSONL file: a line for each device, ``{"charging": [[0, 21600]], "idle": [[3600, 20000]], "unmetered": …}``.

    Each condition has its spells ``[begin, end)``, in whole seconds within the period and in order. A device is available where
    all of its conditions hold; one that is left out always does.

    Raises:
        ConfigurationError: The file cannot be read, or all that is wrong with its lines.
    """
    devices, problems, spells = list[list[tuple[int, int]]](), list[str](), 0
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                found, wrong = _device(line, period)
                problems += [f"line {number}: {problem}" for problem in wrong]
                devices.append(found)
                spells += len(found)
                if len(problems) > _SHOWN or spells > _MOST_SPELLS or len(line) > _LONGEST_LINE:
                    break
    except OSError as error:
        raise ConfigurationError(str(path), [f"cannot be read ({error.strerror}); name a file of traces"]) from None
    if spells > _MOST_SPELLS:
        problems.append(f"line {number}: over {_MOST_SPELLS} spells in all; expected fewer devices or a shorter period")
    if not problems and not any(devices):
        problems.append("no device is ever available; expected a line for each, with spells in which all its conditions hold")
    if problems:
        more = ["further lines are wrong, or were not read"] if len(problems) > _SHOWN else []
        raise ConfigurationError(str(path), [*problems[:_SHOWN], *more])
    return Availability.of(devices, period)


def _device(line: bytes, period: int) -> tuple[list[tuple[int, int]], list[str]]:
    """The spells of one line, or what is wrong with it."""
    if len(line) > _LONGEST_LINE:
        return [], [f"longer than {_LONGEST_LINE} bytes; expected the conditions of one device"]
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return [], ["no JSON; expected an object with " + ", ".join(CONDITIONS)]
    if not isinstance(told, dict) or not told or not told.keys() <= set(CONDITIONS):
        return [], ["expected an object with " + ", ".join(CONDITIONS) + ", at least one of them, and nothing else"]
    problems = [problem for name, spells in told.items() for problem in _wrong(name, spells, period)]
    if problems:
        return [], problems
    both: list[tuple[int, int]] = [(0, period)]
    for spells in told.values():
        both = _common(both, spells)
    return _joined(both), []


def _wrong(name: str, spells: Any, period: int) -> Iterator[str]:
    if not isinstance(spells, list) or not all(
        isinstance(spell, list) and len(spell) == 2 and all(type(bound) is int for bound in spell) for spell in spells
    ):
        yield f"{name}: expected a list of [begin, end] in whole seconds"
        return
    rules: Mapping[str, Callable[[int, int], bool]] = {
        f"does not lie within 0 to {period}, the period": lambda begin, end: begin < 0 or end > period,
        "ends before it begins": lambda begin, end: end <= begin,
    }
    for what, holds in rules.items():
        if found := [number for number, spell in enumerate(spells, 1) if holds(*spell)]:
            yield f"{name}: spell {found[0]} of {len(spells)} {what}"
    if found := [number for number, (one, other) in enumerate(pairwise(spells), 2) if other[0] < one[1]]:
        yield f"{name}: spell {found[0]} of {len(spells)} begins before the one before it ends; expected them in order"


def _common(some: Spells, others: Spells) -> list[tuple[int, int]]:
    """Where both hold; each is in order."""
    found, one, other = list[tuple[int, int]](), 0, 0
    while one < len(some) and other < len(others):
        begin, end = max(some[one][0], others[other][0]), min(some[one][1], others[other][1])
        if begin < end:
            found.append((begin, end))
        if some[one][1] < others[other][1]:
            one += 1
        else:
            other += 1
    return found


def _joined(spells: Spells) -> list[tuple[int, int]]:
    """The same with those that touch as one."""
    found: list[tuple[int, int]] = []
    for begin, end in spells:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found
