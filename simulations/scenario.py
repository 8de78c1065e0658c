"""A whole federation in one YAML file: what the coordinator publishes, and the nodes or how to make them from one file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, model_validator

from client.allowed import everything
from client.node import Node, beside
from protocol.configuration import load
from protocol.federation import Federation, without_plan
from protocol.files import write_whole
from protocol.strict import Strict
from simulations.devices import Devices
from simulations.partition_settings import Partition, named_parts
from strategies.data.files import read


class Scenario(Strict):
    """What ``fedge simulate`` runs."""

    federation: Federation
    nodes: tuple[Node, ...] = ()
    partition: Partition | None = None
    devices: Devices | None = Field(None, description="many devices, in place of nodes")
    compare: bool = Field(False, description="also measure base, local-only and centralised training")

    @model_validator(mode="after")
    def _without_conflicts(self) -> "Scenario":
        if problems := list(self._conflicts()):
            raise ValueError("\n".join(problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        if sum(map(bool, (self.nodes, self.partition, self.devices))) != 1:
            yield "give either nodes or partition or devices, one of them"
        if len({node.name for node in self.nodes}) != len(self.nodes):
            yield "nodes: two nodes have the same name; give each its own"
        yield from (f"federation.{problem}" for problem in without_plan(self.federation))
        if self.compare and (self.federation.stages or self.federation.adapters):
            yield "compare: found beside stages or adapters, and it compares the training of one plan; leave it out"
        if self.devices:
            yield from self._beside_devices()

    def _beside_devices(self) -> Iterator[str]:
        federation = self.federation
        if self.compare:
            yield "compare: found beside devices, of which there are too many to train each alone; leave it out"
        if federation.adapters:
            yield "federation.adapters: found beside devices, which all train one; give federation.plan"
        if federation.secure_sum.enabled:
            yield "federation.secure_sum: found beside devices, which have no keys; leave it out, or list nodes with a device"
        if federation.trust.signed or federation.trust.enrolled:
            yield "federation.trust: found beside devices, which have no keys; leave it out, or list nodes with a device"


def read_scenario(path: Path) -> Scenario:
    """A scenario with paths taken from the folder of its file (its output stays where the command runs).

    Raises:
        ConfigurationError: Every problem of the file.
    """
    scenario = load(path, Scenario)
    changes: dict[str, object] = {"nodes": beside(path, scenario.nodes)}
    folder = path.resolve().parent
    if scenario.partition:
        changes["partition"] = scenario.partition.beside(folder)
    if scenario.devices:
        changes["devices"] = scenario.devices.beside(folder)
    return scenario.model_copy(update=changes)


def nodes_of(scenario: Scenario) -> tuple[Node, ...]:
    """The nodes; those of a partition are written to ``OUTPUT/nodes/0001/`` … first, as real nodes have files."""
    made = scenario.partition
    if made is None:
        return scenario.nodes
    rows = [dict(row) for _, row in read(made.rows)]
    held_out = [dict(row) for _, row in read(made.evaluate)] if made.evaluate else []
    nodes = []
    # Whoever wrote the scenario asks their own machine.
    plans = [plan for plans in scenario.federation.schedules().values() for plan in plans]
    allowed = everything(plans)
    for number, (name, part) in enumerate(named_parts(made, rows).items()):
        # By number: a value may look like a path, or like another value.
        folder = scenario.federation.output.resolve() / "nodes" / f"{number + 1:04d}"
        train, evaluate = folder / "train.jsonl", folder / "evaluate.jsonl"
        write_rows(train, [rows[at] for at in part])
        own = [row for row in held_out if made.kind != "column" or str(row.get(made.column or "")) == name]
        if own:
            write_rows(evaluate, own)
        nodes.append(
            Node(
                name=name,
                train=train,
                evaluate=evaluate if own else None,
                tier=made.tiers[number % len(made.tiers)],
                max_rank=made.max_ranks[number % len(made.max_ranks)] if made.max_ranks else None,
                **allowed,
            )
        )
    return tuple(nodes)


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Rows as JSONL, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
