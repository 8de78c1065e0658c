"""Bundles and files for other runtimes are made from a base's full-precision weights, never from rounded ones."""

from protocol.errors import ModelError
from strategies.base_model import Base, configuration


def check_full_precision(base: Base) -> None:
    """Makes sure that a base's own weights are not quantised yet.

    Raises:
        ModelError: They are.
    """
    found = getattr(configuration(base), "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"{base.name!r}: its weights are quantised already ({method or 'unknown method'}); rounding twice loses twice, so give "
        "the full-precision base that they were made from (adapters fit both)"
    )
