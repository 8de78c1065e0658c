"""An adapter as numpy arrays: factor pairs for the LoRA family, dense tensors for everything else.

A LoRA module changes a weight ``W`` of shape ``(d_out, d_in)`` by ``scaling * B @ A`` (Hu et al. 2021,
arXiv:2106.09685, eq. 3) with ``A`` of shape ``(r, d_in)`` and ``B`` of shape ``(d_out, r)``. Module names are those of
the base model (``model.layers.0.self_attn.q_proj``), without PEFT's prefixes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import AdapterError

Array = NDArray[Any]


@dataclass(frozen=True)
class Factors:
    """One module's low-rank change ``scaling * B @ A``.

    Args:
        A: ``(r, d_in)``, float.
        B: ``(d_out, r)``, float.
        scaling: ``lora_alpha / r`` as trained; 1 for factors that carry it inside.

    Raises:
        AdapterError: The two shapes do not share one rank.
    """

    A: Array
    B: Array
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"factors A {self.A.shape} and B {self.B.shape} do not fit; expected (r, d_in) and (d_out, r) of one rank"
            )

    @property
    def r(self) -> int:
        """The rank that the factors have room for."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight that they change."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def product(self) -> Array:
        """The dense change, ``(d_out, d_in)`` in float64. For tests and small models: it forms the dense matrix."""
        return self.scaling * (self.B.astype(np.float64) @ self.A.astype(np.float64))


@dataclass(frozen=True)
class Adapter:
    """Everything that was trained: factor pairs by module name, dense tensors by parameter name."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    dense: Mapping[str, Array] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over names, scalings, dtypes, shapes and bytes in sorted order: the adapter's identity, 64 hex digits."""
        sha = hashlib.sha256()
        for module, pair in sorted(self.factors.items()):
            _absorb_name(sha, b"F", module)
            sha.update(f"{float(pair.scaling)!r}\n".encode())
            _absorb(sha, pair.A)
            _absorb(sha, pair.B)
        for name, tensor in sorted(self.dense.items()):
            _absorb_name(sha, b"D", name)
            _absorb(sha, tensor)
        return sha.hexdigest()

    def ranks(self) -> dict[str, int]:
        """Rank by module name."""
        return {module: pair.r for module, pair in self.factors.items()}

    def nbytes(self) -> int:
        """Bytes of all tensors as they are held."""
        pairs = sum(pair.A.nbytes + pair.B.nbytes for pair in self.factors.values())
        return pairs + sum(tensor.nbytes for tensor in self.dense.values())


def _absorb_name(sha: "hashlib._Hash", kind: bytes, name: str) -> None:
    # Names come from outside: their length goes first, so that none can stand for the bytes of a tensor.
    encoded = name.encode()
    sha.update(kind + len(encoded).to_bytes(8) + encoded)


def _absorb(sha: "hashlib._Hash", tensor: Array) -> None:
    sha.update(f"{tensor.dtype.str}{tensor.shape}".encode())
    sha.update(tensor.tobytes())
