"""Which rows measure and which train: the same ones in every training, so that what was trained is never measured."""

import hashlib
import json
from collections.abc import Sequence

from edge.runtime.adapting.passes import Example


def apart(rows: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Rows that measure and rows that train, by a hash of what they say.

    So a row that measured in one training measures in the next, whatever came to it; and equal rows stay together, or what was
    trained would be measured.

    Args:
        rows: All of them.
        share: Of them that measures, one at least where there are two.
    """
    if not share or len(rows) < 2:
        return [], list(rows)
    count = max(1, round(share * len(rows)))
    groups: dict[bytes, list[Example]] = {}
    for each in rows:
        groups.setdefault(_digest(each), []).append(each)
    held: list[Example] = []
    trains: list[Example] = []
    for number, key in enumerate(sorted(groups), 1):
        measures = len(held) < count and number < len(groups)  # where nothing trains there is nothing to measure
        (held if measures else trains).extend(groups[key])
    return held, trains


def others(replay: Sequence[Example], rows: Sequence[Example]) -> list[Example]:
    """What is replayed but for what is learnt now: of it some rows measure, and must not train."""
    now = {_digest(each) for each in rows}
    return [each for each in replay if _digest(each) not in now]


def _digest(example: Example) -> bytes:
    return hashlib.sha256(json.dumps([list(row.ids) for row in example]).encode()).digest()
