"""How a tensor's numbers travel: fp32 as they are, or fp16 at half the bytes. bfloat16 is widened before it gets here."""

from typing import Literal

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError

WireFormat = Literal["fp32", "fp16"]
_DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}


def encode(adapter: Adapter, wire: WireFormat) -> Adapter:
    """The adapter in the dtype of ``wire``, scalings folded into B so that no number is lost beside the tensors.

    Folding happens in float64, so that factors held in half precision are rounded once, to the wire.

    Raises:
        AdapterError: A value does not fit the format (fp16 ends at 65504); send fp32 instead.
    """
    dtype = _DTYPES[wire]
    factors = {
        module: Factors(A=_cast(pair.A, dtype, module), B=_cast(pair.scaling * pair.B.astype(np.float64), dtype, module))
        for module, pair in adapter.factors.items()
    }
    return Adapter(factors, {name: _cast(tensor, dtype, name) for name, tensor in adapter.dense.items()})


def _cast(tensor: Array, dtype: type[np.floating], name: str) -> Array:
    limit = float(np.finfo(dtype).max)
    largest = float(np.max(np.abs(tensor), initial=0.0))
    if largest > limit:
        raise AdapterError(f"{name}: |{largest:.3g}| does not fit {np.dtype(dtype).name} (at most {limit:.3g}); send fp32")
    return np.asarray(tensor, dtype=dtype, order="C")
