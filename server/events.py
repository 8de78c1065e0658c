"""What happened, as it happens: a line of JSON per event, and the same figures for TensorBoard.

``events.jsonl`` is what ``fedge coordinator`` reads. Lines are kept back until there is a folder to keep them in, so that a
federation in which no round succeeds leaves nothing behind.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import DataError, FederationError, shown
from protocol.files import private_folder

FILE, TENSORBOARD = "events.jsonl", "tensorboard"
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class Event(BaseModel):
    """A line of the log, whatever its kind; each kind fills in what it has to say.

    Attributes:
        time: Seconds since 1970.
        event: Its kind: joined, left-out, round, split, no-quorum, damaged, resumed, ended.
        round: The round that it belongs to.
        node, adapter, method, precision, r: Who joined, with what.
        reason, what, members: Why somebody was left out or a run ended, what is damaged, who went apart.
        stage, accepted, refused, silent, paused: Of a round (``server.ledger.RoundRecord``), as is all that follows.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    time: float = 0.0
    event: str
    round: _Count = 0
    node: str = ""
    adapter: str = ""
    method: str = ""
    precision: str = ""
    r: _Count = 0
    reason: str = ""
    what: str = ""
    members: tuple[str, ...] = ()
    stage: str = ""
    accepted: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}
    silent: Mapping[str, str] = {}
    paused: Mapping[str, str] = {}
    dropped: tuple[str, ...] = ()
    evaluation: Mapping[str, Mapping[str, float]] = {}
    evaluation_refused: Mapping[str, str] = {}
    merge: Mapping[str, Any] = {}
    privacy: Mapping[str, float] = {}
    bytes_sent: _Count = 0
    bytes_received: _Count = 0
    seconds: float = 0.0


class EventLog:
    """Appends to ``FOLDER/events.jsonl``, and to ``FOLDER/tensorboard`` where that is wished.

    Each of its methods raises a FederationError where the disk does not take what it writes.

    Args:
        folder: Of the federation.
        tensorboard: Whether figures go to TensorBoard as well.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self._folder = folder
        self._tensorboard = tensorboard
        self._waiting: list[str] = []
        self._open = False
        self._writer: Any = None

    def open(self) -> None:
        """From now on there is a folder to write to; a line that a crash has cut is taken away."""
        path = self._folder / FILE
        with self._disk():
            if path.exists():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._open = True
        self._flush()

    def note(self, event: str, number: int, **facts: Any) -> None:
        """One event of round ``number``; ``facts`` are JSON."""
        line = {"time": round(time.time(), 3), "event": event, "round": number, **finite(facts)}
        self._waiting.append(json.dumps(line, allow_nan=False))
        if self._open:
            self._flush()

    def figures(self, number: int, values: Mapping[str, float]) -> None:
        """Numbers of one round for TensorBoard, by name (``evaluation/bank/accuracy``)."""
        if not (self._tensorboard and self._open):
            return
        with self._disk():
            if self._writer is None:
                from tensorboardX import SummaryWriter

                private_folder(self._folder / TENSORBOARD)
                # Its thread dies of a full disk, and a queue with an end would then be waited for without one.
                self._writer = SummaryWriter(str(self._folder / TENSORBOARD), max_queue=0)
            for name, value in values.items():
                self._writer.add_scalar(name, value, number)
            self._writer.flush()

    def close(self) -> None:
        """Ends the TensorBoard file."""
        if self._writer is not None:
            with self._disk():
                self._writer.close()

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            path = self._folder / FILE
            with self._disk():
                path.touch(mode=0o600)
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FederationError(
                f"{self._folder}: the log cannot be written ({error.strerror or error}); every round that was merged is kept; "
                "make room, then start the same federation again: it goes on from there"
            ) from None


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(folder: Path) -> Iterator[Event]:
    """The events of a federation, oldest first; a last line that a crash has cut is left out.

    Raises:
        DataError: There is no such file, or a line within it is not an event.
    """
    path = folder / FILE
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; name the output folder of a federation that has kept a round"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            yield Event.model_validate_json(line)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"]) or "no JSON"
            raise DataError(
                f"{path}: line {number} is not an event ({shown(where, 80)}); it was changed by hand or by a damaged disk"
            ) from None
    try:
        yield Event.model_validate_json(last)
    except ValidationError:
        return
