"""The privacy ledger: what was spent, on disk before anything is released.

``privacy.jsonl`` holds a line for each release, written and synchronised before the release is made. A coordinator that dies
between the two has spent without releasing, and counts it all the same; with noise drawn anew the same round, tried again, is
another release and another line. So the lines are never fewer than the releases, whenever it dies.

Each line ends in the SHA-256 of the line before and of its own content: none can be changed, left out or put elsewhere without
the ledger being refused. A last line that was cut off by a crash is a release that was not made; it is counted nevertheless,
for a disk that lost the end of a line looks the same. Lines that were cut off whole are missed by whoever knows how many
releases there are, and ``begin`` asks.

One process writes a ledger; one that finds more in it than it has read or written writes nothing.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import PositiveInt, TypeAdapter, ValidationError

from protocol.durable import alone, to_disk
from protocol.errors import PrivacyError, shown
from protocol.privacy.accounting import Budget, Mechanism, Rounds, epsilon

FILE = "privacy.jsonl"
_BEGINNING = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One release.

    Attributes:
        number: From 1, without gaps.
        round: Which it was meant for.
        mechanism: What it costs.
        times: How often the mechanism ran for it: the steps of a training whose outcome alone is released.
        damaged: The line was cut off, and counts as the dearest of what came before and was to come.
    """

    number: int
    round: int
    mechanism: Mechanism
    times: PositiveInt = 1
    damaged: bool = False


_ENTRY = TypeAdapter(Entry)


class PrivacyLedger:
    """What a federation has spent, and whether it may go on.

    Args:
        path: Created with the first entry, readable by its owner only.
        budget: That all entries together must stay within.

    Raises:
        PrivacyError: What is there is no ledger, or one that somebody changed.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path = path
        self.budget = budget
        self._entries, self._last, self._whole_bytes, self._size = _read(path)
        self._cut_off = self._size != self._whole_bytes

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every release that was made, or may have been."""
        return tuple(self._entries)

    def spent(self) -> dict[Mechanism, int]:
        """How often each kind of round is counted."""
        found: dict[Mechanism, int] = {}
        for entry in self._entries:
            found[entry.mechanism] = found.get(entry.mechanism, 0) + entry.times
        return found

    def epsilon(self) -> float:
        """What is spent, at the budget's delta."""
        return epsilon(self.spent(), self.budget.delta)

    def begin(self, plan: Rounds, released: int = 0, at_once: int = 1) -> float:
        """Asks whether a plan can end within the budget; to be called before its first round, and after every restart.

        Args:
            plan: The rounds that are still to come.
            released: Releases that are known to have been made (rounds that are kept).
            at_once: How often one release of the plan runs its mechanism.

        Returns:
            Epsilon after the plan's last round.

        Raises:
            PrivacyError: It cannot, or releases are missing.
            OSError: The disk does not take the entry in place of one that was cut off.
        """
        if len(self._entries) + self._cut_off < released:
            raise PrivacyError(
                f"{self.path}: holds {len(self._entries)} releases, and {released} are known to have been made; put the whole "
                "ledger back, for what is missing cannot be counted"
            )
        self.mend(plan, at_once)
        total = self.after(plan)
        if total > self.budget.epsilon:
            already = f" after {self.epsilon():.4g} that are spent" if self._entries else ""
            raise PrivacyError(
                f"privacy: {sum(plan.values())} rounds would end at an epsilon of {total:.4g}{already}, the budget is "
                f"{self.budget.epsilon:g} at a delta of {self.budget.delta:g}; take more noise or fewer rounds (fedge "
                "coordinator budget says which), nothing is sent"
            )
        return total

    def mend(self, plan: Rounds, at_once: int = 1) -> None:
        """Counts a release whose line was cut off as the dearest that it can have been; args as for ``begin``.

        Raises:
            PrivacyError: There is nothing that it could have been.
            OSError: The disk does not take the entry.
        """
        if not self._cut_off:
            return
        known = {**plan, **self.spent()}
        if not known:
            raise PrivacyError(
                f"{self.path}: all that it holds is cut off; say which rounds are to come, it counts as one of them"
            )
        dearest = max(known, key=lambda mechanism: epsilon({mechanism: 1}, self.budget.delta))
        times = max([at_once, *(entry.times for entry in self._entries)])
        self._append(Entry(len(self._entries) + 1, 0, dearest, times, damaged=True))

    def affords(self, mechanism: Mechanism, times: int = 1) -> bool:
        """Whether one more such round stays within the budget."""
        return not self._cut_off and self.after({mechanism: times}) <= self.budget.epsilon

    def spend(self, mechanism: Mechanism, number: int, times: int = 1) -> None:
        """Writes that a round is released. Only when this has returned may it be.

        Args:
            mechanism: What the release costs.
            number: The round's.
            times: How often the mechanism ran for it.

        Raises:
            PrivacyError: The budget does not allow it, or ``begin`` was not asked after a crash; nothing is written.
            OSError: The disk does not take it; the entry may be there or not, and nothing may be released.
        """
        if not self.affords(mechanism, times):
            after = self.after({mechanism: times})
            raise PrivacyError(
                f"privacy: round {number} would bring epsilon from {self.epsilon():.4g} to {after:.4g}, "
                f"the budget is {self.budget.epsilon:g} at a delta of {self.budget.delta:g}; the run ends here"
                if not self._cut_off
                else f"{self.path}: its last line is cut off; begin anew, which counts it"
            )
        self._append(Entry(len(self._entries) + 1, number, mechanism, times))

    def after(self, plan: Rounds) -> float:
        """What all that is spent costs together with what is to come."""
        together = self.spent()
        for mechanism, count in plan.items():
            together[mechanism] = together.get(mechanism, 0) + count
        return epsilon(together, self.budget.delta)

    def _append(self, entry: Entry) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line, digest = _line(entry, self._last)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            alone(handle)
            if self._size not in (None, os.fstat(handle).st_size):
                raise PrivacyError(
                    f"{self.path}: another process has written it; what it has spent must count here too, so begin anew, and "
                    "give federations that run at once a ledger each"
                )
            self._size = None  # of a write that fails
            # Until the new line is whole, the ledger is one whose last line is cut off; that is counted, too.
            self._cut_off = True
            written = 0
            while written < len(line):
                written += os.pwrite(handle, line[written:], self._whole_bytes + written)
            os.ftruncate(handle, self._whole_bytes + len(line))
            os.fsync(handle)
        finally:
            os.close(handle)
        if not self._entries:
            to_disk(self.path.parent)
        self._entries.append(entry)
        self._last, self._whole_bytes, self._cut_off = digest, self._whole_bytes + len(line), False
        self._size = self._whole_bytes


def _line(entry: Entry, before: str) -> tuple[bytes, str]:
    told = json.dumps(asdict(entry), sort_keys=True)
    digest = hashlib.sha256(f"{before}{told}".encode()).hexdigest()
    return f'{told[:-1]}, "digest": "{digest}"}}\n'.encode(), digest


def _read(path: Path) -> tuple[list[Entry], str, int, int | None]:
    """The entries, the last one's digest, how many bytes they take, and how many there are."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], _BEGINNING, 0, 0
    except OSError as error:
        raise PrivacyError(
            f"{shown(str(path))}: cannot be read ({type(error).__name__}), and what was spent cannot be told; name a file"
        ) from None
    whole = content.rfind(b"\n") + 1
    entries: list[Entry] = []
    last = _BEGINNING
    for number, line in enumerate(content[:whole].splitlines(keepends=True), 1):
        entry = _entry(line)
        if entry is None or entry.number != number or _line(entry, last)[0] != line:
            raise PrivacyError(
                f"{shown(str(path))}: line {number} is not what was written; expected {number - 1} lines and then one more "
                "that follows from them; put the ledger back from a copy, for what was spent cannot be told"
            )
        last = _line(entry, last)[1]
        entries.append(entry)
    return entries, last, whole, len(content)


def _entry(line: bytes) -> Entry | None:
    try:
        told = json.loads(line)
        return _ENTRY.validate_python({key: value for key, value in told.items() if key != "digest"})
    except (ValueError, AttributeError, RecursionError, ValidationError, PrivacyError):
        return None
