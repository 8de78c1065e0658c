"""Which rows train, which are held out, and which a round takes: fixed by the seed, fresh every round."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def hold_out(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Splits rows at random into training and held-out rows (at least one of each when there are two).

    Args:
        rows: All rows.
        fraction: Share held out, between 0 and 1.
        seed: The same seed gives the same split.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    held = set(order[:count])
    return [row for at, row in enumerate(rows) if at not in held], [rows[at] for at in sorted(held)]


def hold_out_groups(groups: Sequence[int], fraction: float, seed: int) -> list[bool]:
    """Which rows are held out, so that rows of one group stay together.

    Groups are taken in random order as long as they fit into the share; at least one is held out and one is not.

    Args:
        groups: Group of each row; at least two groups.
        fraction: Share of the rows that is held out, between 0 and 1, where groups allow it.
        seed: The same seed gives the same split.
    """
    sizes = Counter(groups)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    wanted = min(max(1, round(len(groups) * fraction)), len(groups) - 1)
    held = set[int]()
    for group in order:
        if sizes[group] <= wanted:
            held.add(group)
            wanted -= sizes[group]
    if not held:
        held.add(min(order, key=lambda group: sizes[group]))
    if len(held) == len(sizes):
        held.remove(order[0])
    return [group in held for group in groups]


def window(total: int, position: int, count: int, seed: int) -> list[int]:
    """Row numbers ``position … position + count`` of the endless reading (``read_on``)."""
    return list(itertools.islice(read_on(total, position, seed), count))


def read_on(total: int, position: int, seed: int) -> Iterator[int]:
    """Row numbers of an endless reading of ``total`` rows, from ``position`` on.

    The rows are shuffled anew for every pass: each is read once before any is read again.
    """
    turn, offset = divmod(position, total)
    while True:
        order = list(range(total))
        random.Random(f"{seed}/{turn}").shuffle(order)
        yield from order[offset:]
        turn, offset = turn + 1, 0
