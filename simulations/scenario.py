"""A whole federation in one YAML file: what the coordinator publishes, and the nodes or how to make them from one file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from client.allowed import everything
from client.node import Node, beside
from protocol.configuration import load
from protocol.errors import ConfigurationError
from protocol.federation import Federation, without_plan
from protocol.files import write_whole
from protocol.strict import Name, Strict
from simulations import partition
from strategies.data.files import read
from strategies.narrowing import TierName

_LONGEST_NAME = 80


class Partition(Strict):
    """Nodes made from one file of rows. ``tiers`` and ``max_ranks`` are dealt out in turn."""

    rows: Path = Field(description="all training rows")
    evaluate: Path | None = Field(None, description="held-out rows; split by the same column, else every node gets all")
    kind: Literal["column", "iid", "dirichlet", "quantity"] = "iid"
    column: Name | None = Field(None, description="column: one node per value; dirichlet: the label whose shares are skewed")
    nodes: PositiveInt | None = Field(None, description="how many nodes; a split by column has as many as values")
    alpha: PositiveFloat = Field(0.5, description="dirichlet, quantity: smaller is more skewed")
    seed: int = 0
    tiers: tuple[TierName, ...] = Field(("large",), min_length=1)
    max_ranks: tuple[PositiveInt, ...] = ()

    @model_validator(mode="after")
    def _needs(self) -> "Partition":
        needed = {"column": self.kind in ("column", "dirichlet"), "nodes": self.kind != "column"}
        if missing := [key for key, needs in needed.items() if needs and not getattr(self, key)]:
            raise ValueError("\n".join(f"a partition of kind {self.kind} needs {key}" for key in missing))
        return self


class Scenario(Strict):
    """What ``fedge simulate`` runs."""

    federation: Federation
    nodes: tuple[Node, ...] = ()
    partition: Partition | None = None
    compare: bool = Field(False, description="also measure base, local-only and centralised training")

    @model_validator(mode="after")
    def _without_conflicts(self) -> "Scenario":
        if problems := list(self._conflicts()):
            raise ValueError("\n".join(problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        if bool(self.nodes) == bool(self.partition):
            yield "give either nodes or partition, one of them"
        if len({node.name for node in self.nodes}) != len(self.nodes):
            yield "nodes: two nodes have the same name; give each its own"
        yield from (f"federation.{problem}" for problem in without_plan(self.federation))
        if self.compare and (self.federation.stages or self.federation.adapters):
            yield "compare: found beside stages or adapters, and it compares the training of one plan; leave it out"


def read_scenario(path: Path) -> Scenario:
    """A scenario with paths taken from the folder of its file (its output stays where the command runs).

    Raises:
        ConfigurationError: Every problem of the file.
    """
    scenario = load(path, Scenario)
    changes: dict[str, object] = {"nodes": beside(path, scenario.nodes)}
    if made := scenario.partition:
        folder = path.resolve().parent
        changes["partition"] = made.model_copy(
            update={"rows": folder / made.rows, "evaluate": folder / made.evaluate if made.evaluate else None}
        )
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
    parts = _parts(made, rows)
    if unfit := [name for name in parts if not name.strip() or len(name) > _LONGEST_NAME]:
        what = f"{len(unfit)} of {len(parts)} values are blank or longer than {_LONGEST_NAME} characters; each names a node"
        raise ConfigurationError(str(made.rows), [f"partition.column {made.column}: {what}"])
    for number, (name, part) in enumerate(parts.items()):
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


def _parts(made: Partition, rows: list[dict[str, object]]) -> dict[str, list[int]]:
    values: list[str] = []
    if made.column:
        lacking = [number for number, row in enumerate(rows, 1) if made.column not in row]
        if lacking:
            raise ConfigurationError(
                str(made.rows),
                [f"partition.column: {len(lacking)} rows have no {made.column!r}, the first is row {lacking[0]}"],
            )
        values = [str(row[made.column]) for row in rows]
    count = made.nodes or 0
    if made.kind == "column":
        return partition.by_column(values)
    if made.kind == "dirichlet":
        parts = partition.dirichlet(values, count, made.alpha, made.seed)
    elif made.kind == "quantity":
        parts = partition.quantity(len(rows), count, made.alpha, made.seed)
    else:
        parts = partition.iid(len(rows), count, made.seed)
    return {f"node-{number:0{len(str(count))}d}": part for number, part in enumerate(parts, 1)}
