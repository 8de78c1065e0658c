"""AdamW in numpy over named tensors, and the two things done to gradients and rates before it: clipping and warm-up."""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), float32 as torch's.

    Args:
        learning_rate: Of a step, after warm-up.
        betas: Of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times rate and tensor, taken off before the step.
        warmup_steps: Over which the rate climbs in a line.
        schedule: What share of the rate a step has beside that; the first is 1.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Callable[[int], float] = lambda step: 1.0

    def rate(self, step: int) -> float:
        """The rate of a step; the first is 1."""
        return self.learning_rate * min(1.0, step / max(1, self.warmup_steps)) * self.schedule(step)

    def start(self, tensors: Tensors) -> dict[str, Array]:
        """Moments of zeros, ``m|NAME`` and ``v|NAME``."""
        return {f"{moment}|{name}": np.zeros_like(tensor) for moment in "mv" for name, tensor in tensors.items()}

    def step(
        self,
        tensors: Tensors,
        gradients: Tensors,
        moments: MutableMapping[str, Array],
        number: int,
        shortened: float = 1.0,
    ) -> None:
        """Takes a step, a tensor at a time: no second set of all of them is ever there.

        Args:
            tensors: Float32; changed where they are.
            gradients: Of each of them.
            moments: From ``start``; changed, and put back.
            number: Of this step, from 1.
            shortened: Factor on the gradients.
        """
        first, second = self.betas
        rate = np.float32(self.rate(number))
        correction, root = np.float32(1 - first**number), np.float32((1 - second**number) ** 0.5)
        for name, tensor in tensors.items():
            gradient = gradients[name] * np.float32(shortened)
            m, v = moments[f"m|{name}"], moments[f"v|{name}"]
            m *= np.float32(first)
            m += np.float32(1 - first) * gradient
            v *= np.float32(second)
            v += np.float32(1 - second) * gradient * gradient
            moments[f"m|{name}"], moments[f"v|{name}"] = m, v
            tensor *= np.float32(1 - float(rate) * self.weight_decay)
            tensor -= rate / correction * m / (np.sqrt(v) / root + np.float32(self.eps))


def shortening(gradients: Iterable[Array], most: float) -> float:
    """The factor that makes the common norm of gradients at most ``most`` (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1).

    NaN where one of them is no number.
    """
    norm = float(sum(float(np.sum(np.square(each, dtype=np.float64))) for each in gradients) ** 0.5)
    if not math.isfinite(norm):
        return math.nan
    return min(1.0, most / norm) if norm else 1.0
