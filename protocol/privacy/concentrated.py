"""What concentrated differential privacy promises as epsilon and delta; small enough that a node can hold a coordinator to it.

A sum with Gaussian or discrete Gaussian noise of multiplier ``z`` is ``rho``-concentrated private, ``rho = 1 / (2 z^2)``, and
releases add up, each of which may depend on those before (Bun and Steinke 2016, arXiv:1605.02065). The conversion is that of
Canonne, Kamath and Steinke 2020 (arXiv:2004.00010, proposition 12), least over the order ``a``:

    epsilon = a rho + log(1 - 1/a) - log(a delta) / (a - 1)
"""

import math

import numpy as np
from numpy.typing import NDArray


def rho(noise_multiplier: float) -> float:
    """Of one sum."""
    return 0.5 / noise_multiplier**2


def epsilon(total: float, delta: float) -> float:
    """What so much comes to at a delta; every order gives a bound, and the best of a fine grid is taken.

    Args:
        total: Sum of ``rho`` over all releases.
        delta: Above 0 and below 1.
    """
    if not total:
        return 0.0
    orders = np.logspace(-4, 7, 4000)  # less one
    for _ in range(2):
        found = _bounds(1 + orders, total, delta)
        at = int(np.argmin(found))
        orders = np.linspace(orders[max(at - 1, 0)], orders[min(at + 1, len(orders) - 1)], 4000)
    return max(float(found.min()), 0.0)


def _bounds(orders: NDArray[np.float64], total: float, delta: float) -> NDArray[np.float64]:
    bounds: NDArray[np.float64] = orders * total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return bounds
