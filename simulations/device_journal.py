"""The journal of a simulated fleet: every question when it is sent, every reply when it is handed over.

It is what a run that died goes on from: its clock, who is still busy and what each device has spent follow from the lines up to
the last round that was kept.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pydantic import ConfigDict, TypeAdapter

from protocol.errors import FederationError
from protocol.files import private_folder, write_whole

FILE: Final = "devices.jsonl"
REPLIED, GONE, LATE, DROPPED = "replied", "gone", "late", "dropped"


@dataclass(frozen=True)
class Question:
    """One message to one device, and what becomes of it.

    Attributes:
        phase: Which sending of many messages it belongs to; counted over the whole run.
        round, kind: Of the call; ``train`` or ``evaluate``.
        device: Number, from 0.
        sent: When, in simulated seconds; as the next two.
        at: When the device is done with it.
        told: When the coordinator hears of it.
        down, up: Bytes to the device and, so far as it is known, from it.
        end: ``replied``, ``gone`` (its spell ended), ``late`` (after the deadline), ``dropped`` (not waited for), or the code
            with which it refused.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    phase: int
    round: int
    kind: str
    device: int
    sent: float
    at: float
    told: float
    down: int
    up: int
    end: str


@dataclass(frozen=True)
class Heard:
    """What came of the open question of a device: how it ended, and the bytes of its answer."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    round: int
    device: int
    end: str
    up: int


_LINE: TypeAdapter[Question | Heard] = TypeAdapter(Question | Heard)


class Journal:
    """The file.

    Args:
        folder: Made with the first line.
        devices: How many there are.
    """

    def __init__(self, folder: Path, devices: int) -> None:
        self._folder, self._devices = folder, devices
        self._path = folder / FILE

    def note(self, line: Question | Heard) -> None:
        """Adds a line."""
        if not self._path.exists():
            private_folder(self._folder)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    def cut(self, number: int) -> list[Question | Heard]:
        """The lines up to the end of a round; what stood behind them is gone.

        Raises:
            FederationError: It does not tell of that round, or is damaged.
        """
        kept = [line for line in self._read() if line.round <= number]
        if not any(line.round == number for line in kept):
            raise FederationError(
                f"{self._path}: does not tell of round {number}, after which this run would go on; the clock and the bytes of "
                "its devices are not known, so move the output folder away to begin anew"
            )
        write_whole(self._path, "".join(json.dumps(asdict(line)) + "\n" for line in kept))
        return kept

    def _read(self) -> list[Question | Heard]:
        lines, asked = list[Question | Heard](), set[int]()
        *whole, _ = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]  # without what a crash has cut
        for number, text in enumerate(whole, 1):
            try:
                line = _LINE.validate_json(text)
            except ValueError:
                line = None
            if line is None or not 0 <= line.device < self._devices or (isinstance(line, Heard) and line.device not in asked):
                raise FederationError(
                    f"{self._path}: line {number} is none of a journal; move the output folder away to begin anew"
                )
            (asked.discard if isinstance(line, Heard) else asked.add)(line.device)
            lines.append(line)
        return lines
