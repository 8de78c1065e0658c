"""How the learning rate goes over a training: Hugging Face's schedules, by their names, as shares of the rate."""

import math
from collections.abc import Callable, Mapping
from typing import Final

# From the share of the way that is behind the warm-up, 0 to 1.
_BEHIND: Final[Mapping[str, Callable[[float], float]]] = {
    "constant": lambda way: 1.0,
    "constant_with_warmup": lambda way: 1.0,
    "cosine": lambda way: max(0.0, 0.5 * (1 + math.cos(math.pi * way))),
    "linear": lambda way: max(0.0, 1 - way),
}
SCHEDULES: Final = tuple(sorted(_BEHIND))


def share(kind: str, step: int, warmup: int, total: int) -> float:
    """Of the rate, before a step.

    Args:
        kind: One of ``SCHEDULES``; a ``constant`` one never warms up, as Hugging Face has it.
        step: From 0.
        warmup: Steps over which the rate climbs from nothing.
        total: Steps of the whole training.
    """
    if kind != "constant" and step < warmup:
        return step / max(1, warmup)
    return _BEHIND[kind]((step - warmup) / max(1, total - warmup))
