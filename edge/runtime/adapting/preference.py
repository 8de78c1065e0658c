"""DPO's loss over pairs of log-probabilities, and its derivative."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Objective = Callable[[Array], tuple[float, Array]]


def dpo(reference: Array, beta: float, pairs: int | None = None) -> Objective:
    """The objective of rows that stand in pairs, chosen before rejected.

    ``-log sigmoid(beta * ((l_c - ref_c) - (l_r - ref_r)))``, the sum over pairs by ``pairs`` (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7).

    Args:
        reference: ``(rows,)`` log-probabilities under what is to be stayed near.
        beta: How near.
        pairs: By how many it is divided; those that are there. Of a micro-batch: those of the whole batch.
    """
    count = pairs or len(reference) // 2

    def objective(log_probabilities: Array) -> tuple[float, Array]:
        gain = log_probabilities - reference
        margin = beta * (gain[0::2] - gain[1::2])
        pull = -beta / (1 + np.exp(np.clip(margin, -500, 500))) / count  # d loss / d chosen
        derivative = np.empty_like(log_probabilities)
        derivative[0::2], derivative[1::2] = pull, -pull
        return float(np.logaddexp(0, -margin).sum() / count), derivative

    return objective
