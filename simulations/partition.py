"""Splits one set of rows into the holdings of many nodes: by a column, evenly, by skewed labels, by skewed sizes."""

from collections.abc import Hashable, Sequence

import numpy as np

from protocol.errors import ConfigurationError

_TRIES = 100


def by_column(values: Sequence[Hashable]) -> dict[str, list[int]]:
    """One node per distinct value, in sorted order: the natural split (a domain, an institution)."""
    parts: dict[str, list[int]] = {}
    for at, value in enumerate(values):
        parts.setdefault(str(value), []).append(at)
    return dict(sorted(parts.items()))


def iid(total: int, nodes: int, seed: int) -> list[list[int]]:
    """Rows dealt out at random, sizes differing by at most one."""
    _enough(total, nodes)
    order = np.random.default_rng(seed).permutation(total)
    return [sorted(part.tolist()) for part in np.array_split(order, nodes)]


def dirichlet(labels: Sequence[Hashable], nodes: int, alpha: float, seed: int) -> list[list[int]]:
    """Label skew: each label's rows are dealt out in proportions drawn from Dirichlet(alpha).

    After Hsu et al. 2019, arXiv:1909.06335, section 3. Small ``alpha`` gives nodes few labels; drawn again until no node
    is empty.
    """
    _enough(len(labels), nodes)
    rng = np.random.default_rng(seed)
    groups = by_column(labels).values()
    for _ in range(_TRIES):
        parts: list[list[int]] = [[] for _ in range(nodes)]
        for rows in groups:
            cuts = np.cumsum(rng.dirichlet([alpha] * nodes))[:-1] * len(rows)
            for part, chunk in zip(parts, np.split(rng.permutation(rows), cuts.astype(int)), strict=True):
                part += chunk.tolist()
        if all(parts):
            return [sorted(part) for part in parts]
    raise ConfigurationError(
        "partition", [f"alpha {alpha:g} left a node without rows {_TRIES} times; raise alpha or lower nodes"]
    )


def quantity(total: int, nodes: int, alpha: float, seed: int) -> list[list[int]]:
    """Size skew: rows at random, sizes in proportions drawn from Dirichlet(alpha), every node at least one row."""
    _enough(total, nodes)
    rng = np.random.default_rng(seed)
    sizes = 1 + np.floor(rng.dirichlet([alpha] * nodes) * (total - nodes)).astype(int)
    sizes[np.argmax(sizes)] += total - sizes.sum()
    order = rng.permutation(total)
    return [sorted(part.tolist()) for part in np.split(order, np.cumsum(sizes)[:-1])]


def _enough(total: int, nodes: int) -> None:
    if total < nodes:
        raise ConfigurationError("partition", [f"nodes: {nodes} nodes for {total} rows; every node needs at least one"])
