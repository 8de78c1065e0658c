"""Many simulated devices: what a scenario says of them, and each as a node with rows, speed and spells of its own.

Nothing is held of a device but where its rows lie, two speeds and its spells. Its settings and its file of rows are there while
it is asked something, its state from the first time that it keeps any.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from flwr.app import Context, RecordDict
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from client.allowed import everything
from client.node import Node
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.strict import Strict
from simulations.availability import DAY_SECONDS, MOST_SHARE, Availability, Ints, always, drawn, read_traces
from simulations.partition_settings import Partition, named_parts
from strategies.data.files import read

_RUN_ID = 1
_MACHINE = "phone"  # strategies.hardware.PROFILES: the same rank wherever the simulation runs


class AvailabilitySettings(Strict):
    """When devices charge, lie idle and have an unmetered network: read from a file, or drawn."""

    traces: Path | None = Field(
        None, description="JSONL, a line for each device; dealt out in turn where there are fewer lines"
    )
    period_seconds: PositiveInt = Field(DAY_SECONDS, le=10**8, description="traces: after how long they begin anew")
    share: PositiveFloat | None = Field(
        None, le=MOST_SHARE, description="drawn: mean share of the time that a device is available"
    )
    spell_seconds: PositiveFloat = Field(2400.0, ge=60, description="drawn: mean length of a spell that nothing else ends")

    @model_validator(mode="after")
    def _one_of_both(self) -> "AvailabilitySettings":
        if (self.traces is None) == (self.share is None):
            raise ValueError("give either traces or share, one of them; without availability devices never go")
        return self


class Devices(Strict):
    """Devices made from one file of rows, all with one bundle."""

    bundle: Path = Field(description="with training graphs")
    key: Path = Field(description="public keys whose signature of that bundle counts, one a line")
    partition: Partition = Field(description="their rows; each device holds out a share of its own")
    availability: AvailabilitySettings | None = Field(None, description="when they may work; always")
    rows_per_second: PositiveFloat = Field(0.5, description="median speed of training, forwards and backwards")
    bytes_per_second: PositiveFloat = Field(250_000.0, description="median speed of the network, either way")
    spread: NonNegativeFloat = Field(0.6, le=5, description="standard deviation of the logarithms of both speeds")
    device_bytes: PositiveInt | None = Field(None, description="most bytes of rounds that each spends in 30 days, both ways")
    pause_seconds: NonNegativeFloat = Field(0.0, le=10**8, description="simulated time from one round to the next")
    seed: int = Field(0, ge=0, lt=2**32, description="draws speeds and spells")

    @model_validator(mode="after")
    def _rows_of_their_own(self) -> "Devices":
        if self.partition.evaluate:
            raise ValueError("partition.evaluate: each device holds out a share of its own rows; leave it out")
        return self

    def beside(self, folder: Path) -> "Devices":
        """The same with paths taken from a folder."""
        changes: dict[str, object] = {name: folder / getattr(self, name) for name in ("bundle", "key")}
        changes["partition"] = self.partition.beside(folder)
        if self.availability and self.availability.traces:
            changes["availability"] = self.availability.model_copy(update={"traces": folder / self.availability.traces})
        return self.model_copy(update=changes)


class Fleet:
    """The devices of a scenario, by number from 0.

    Args:
        settings: Paths as they can be opened.
        federation: What they take part in.
        state: Folder for what they remember.
        scratch: Folder for rows, for as long as the fleet is there.

    Attributes:
        availability: Their spells.
        rows_per_second, bytes_per_second: Their speeds, log-normal, ``(devices,)``.

    Raises:
        UserError: The rows or the traces cannot be used.
    """

    def __init__(self, settings: Devices, federation: Federation, state: Path, scratch: Path) -> None:
        self.settings, self._state, self._scratch = settings, state, scratch
        self._rows = scratch / "rows.jsonl"
        self._names, self._offsets, self._counts = _dealt(settings.partition, self._rows)
        self.availability = _availability(settings, len(self))
        rng = np.random.default_rng([settings.seed, 0])
        speeds = np.exp(settings.spread * rng.standard_normal((2, len(self))))
        self.rows_per_second = settings.rows_per_second * speeds[0]
        self.bytes_per_second = settings.bytes_per_second * speeds[1]
        self._allowed = everything([plan for plans in federation.schedules().values() for plan in plans])

    def __len__(self) -> int:
        return len(self._counts)

    def node(self, device: int) -> Node:
        """A device's settings; its rows lie there only within ``asked``."""
        made = self.settings.partition
        return Node(
            name=self._names[device],
            train=self._scratch / f"{device + 1:05d}.jsonl",
            tier=made.tiers[device % len(made.tiers)],
            max_rank=made.max_ranks[device % len(made.max_ranks)] if made.max_ranks else None,
            profile=_MACHINE,
            trial=False,
            state=self._state / f"{device + 1:05d}",
            device=self.settings.bundle,
            device_key=self.settings.key,
            device_battery=0.0,  # of the machine that simulates
            device_bytes=self.settings.device_bytes,
            **self._allowed,
        )

    @contextmanager
    def asked(self, device: int) -> Iterator[Context]:
        """A device while it answers a message, with its rows."""
        node = self.node(device)
        if node.train is None:
            raise ValueError("every device has rows")
        with self._rows.open("rb") as file:
            file.seek(int(self._offsets[device]))
            node.train.write_bytes(file.read(int(self._offsets[device + 1] - self._offsets[device])))
        told = {
            key.replace("_", "-"): str(value) if isinstance(value, Path) else value
            for key, value in node.model_dump(exclude_none=True, exclude={"tasks"}).items()
        }
        try:
            yield Context(run_id=_RUN_ID, node_id=device + 1, node_config=told, state=RecordDict(), run_config={})
        finally:
            node.train.unlink()

    def rows_of(self, device: int, plan: Plan) -> float:
        """Rows that a device reads to train a round."""
        training = plan.training
        if training.max_steps is not None:
            return training.max_steps * training.batch_size * training.gradient_accumulation_steps
        return training.num_train_epochs * float(self._counts[device])

    def held_out_of(self, device: int, plan: Plan) -> float:
        """Rows that a device reads to measure, in those that training would read in the same time: a third of the work each."""
        return plan.data.evaluate_fraction * float(self._counts[device]) / 3


def _dealt(made: Partition, path: Path) -> tuple[list[str], Ints, Ints]:
    """Writes all rows, device after device; names, where each device's begin and how many they are."""
    rows = [row for _, row in read(made.rows)]
    parts = named_parts(made, rows)
    ends = []
    with path.open("wb") as file:
        for part in parts.values():
            file.writelines(json.dumps(rows[at], ensure_ascii=False).encode() + b"\n" for at in part)
            ends.append(file.tell())
    return list(parts), np.array([0, *ends], np.int64), np.array([len(part) for part in parts.values()], np.int64)


def _availability(settings: Devices, devices: int) -> Availability:
    asked = settings.availability
    if asked is None:
        return always(devices)
    if asked.traces:
        return read_traces(asked.traces, asked.period_seconds).dealt(devices)
    return drawn(devices, asked.share or MOST_SHARE, asked.spell_seconds, settings.seed)
