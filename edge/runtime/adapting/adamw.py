"""AdamW in numpy over named tensors, and the two things done to gradients and rates before it: clipping and warm-up."""

from collections.abc import Callable, Mapping
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
        self, tensors: Tensors, gradients: Tensors, moments: Tensors, number: int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Tensors and moments after a step; nothing that is given changes.

        Args:
            tensors: Float32.
            gradients: Of each of them.
            moments: From ``start`` or the step before.
            number: Of this step, from 1.
        """
        first, second = self.betas
        rate = np.float32(self.rate(number))
        correction, root = np.float32(1 - first**number), np.float32((1 - second**number) ** 0.5)
        stepped: dict[str, Array] = {}
        moved: dict[str, Array] = {}
        for name, tensor in tensors.items():
            gradient = gradients[name]
            m = np.float32(first) * moments[f"m|{name}"] + np.float32(1 - first) * gradient
            v = np.float32(second) * moments[f"v|{name}"] + np.float32(1 - second) * gradient * gradient
            kept = tensor * np.float32(1 - float(rate) * self.weight_decay)
            stepped[name] = kept - rate / correction * m / (np.sqrt(v) / root + np.float32(self.eps))
            moved |= {f"m|{name}": m, f"v|{name}": v}
        return stepped, moved


def clipped(gradients: Tensors, most: float) -> tuple[dict[str, Array], float]:
    """Gradients whose common norm is at most ``most``, and that norm before (Pascanu et al. 2013, arXiv:1211.5063)."""
    norm = float(sum(float(np.sum(np.square(each, dtype=np.float64))) for each in gradients.values()) ** 0.5)
    factor = np.float32(min(1.0, most / norm)) if norm > 0 else np.float32(1)
    return {name: each * factor for name, each in gradients.items()}, norm
