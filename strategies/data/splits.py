"""Which rows train, which are held out, and which a round takes: fixed by the seed, fresh every round."""

import random
from collections.abc import Sequence
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


def window(total: int, position: int, count: int, seed: int) -> list[int]:
    """Row numbers ``position … position + count`` of an endless reading of ``total`` rows, shuffled anew every pass.

    Every row is seen once before any is seen twice, wherever a round begins.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        turn, offset = divmod(position + len(numbers), total)
        order = list(range(total))
        random.Random(f"{seed}/{turn}").shuffle(order)
        numbers += order[offset : offset + count - len(numbers)]
    return numbers
