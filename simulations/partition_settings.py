"""How the rows of one file are dealt out to nodes: what a scenario says of it, and which rows each node has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from protocol.errors import ConfigurationError
from protocol.strict import Name, Strict
from simulations import partition
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

    def beside(self, folder: Path) -> "Partition":
        """The same with paths taken from a folder."""
        return self.model_copy(
            update={"rows": folder / self.rows, "evaluate": folder / self.evaluate if self.evaluate else None}
        )


def named_parts(made: Partition, rows: Sequence[Mapping[str, object]]) -> dict[str, list[int]]:
    """Which rows each node has, by its name.

    Raises:
        ConfigurationError: The rows cannot be dealt out so, or a value of the column cannot name a node.
    """
    parts = _parts(made, rows)
    if unfit := [name for name in parts if not name.strip() or len(name) > _LONGEST_NAME]:
        what = f"{len(unfit)} of {len(parts)} values are blank or longer than {_LONGEST_NAME} characters; each names a node"
        raise ConfigurationError(str(made.rows), [f"partition.column {made.column}: {what}"])
    return parts


def _parts(made: Partition, rows: Sequence[Mapping[str, object]]) -> dict[str, list[int]]:
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
