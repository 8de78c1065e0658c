"""Opens a bundle that is about to be signed, and lets it pass only if it answers as the model that it was made from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.parity import Array, Outputs, Probe, check, compare, limits_of, measured
from edge.report import report
from edge.runtime.manifest import Parity
from edge.runtime.model import Model
from edge.runtime.model import open as opened
from protocol.errors import BundleError

BASE = "base"
_STEPS = 8  # tokens of every text that are read one by one, through the cache


class Original(Protocol):
    """What a bundle is compared with."""

    @property
    def against(self) -> str:
        """How a report calls it."""

    def outputs(self, name: str) -> Outputs:
        """Of the base (``base``) or of the base with one of the adapters."""


@dataclass(frozen=True)
class Gate:
    """The judge of ``edge.bundle.write_bundle``.

    Attributes:
        original: What the bundle was made from.
        probes: What is read, by name; what has no entry reads that of ``base``.
        budget: Bounds in place of the profile's.
        unbound: Figures that say nothing, by name: the likeliest label of a head that nobody trained.
        checks: Called with the opened bundle first.
        kept: Figures that are known already: of adapters that were compared over the same graph.
    """

    original: Original
    probes: Mapping[str, Sequence[Probe]]
    budget: Mapping[str, float] = field(default_factory=dict)
    unbound: Mapping[str, frozenset[str]] = field(default_factory=dict)
    checks: Callable[[Model], None] = lambda model: None
    kept: Mapping[str, Parity] = field(default_factory=dict)

    def __call__(self, folder: Path, key: Ed25519PublicKey) -> tuple[dict[str, Parity], str]:
        """Figures by name, and the report.

        Raises:
            BundleError: A bound is not kept.
        """
        model = opened(folder, key, state=None)
        manifest = model.manifest
        self.checks(model)
        limits, loose = limits_of(manifest.profile, self.budget)
        told = dict(self.kept)
        for name in (BASE, *manifest.adapters):
            if name not in told:
                told[name] = self._compared(model, name, limits)
        check(manifest.profile, told)
        return told, report(manifest, self.original.against, told, loose)

    def _compared(self, model: Model, name: str, limits: Mapping[str, float]) -> Parity:
        adapter = None if name == BASE else model.load_adapter(name)
        probes = self.probes.get(name, self.probes[BASE])
        try:
            found = compare(model.manifest.kind, self.original.outputs(name), reading(model, adapter), probes)
        except BundleError as error:
            raise BundleError(f"{name}: {error}") from None
        bound = measured(found).keys() - self.unbound.get(name, frozenset())
        held = {figure: limit for figure, limit in limits.items() if figure in bound}
        return found.model_copy(update={"budgets": held})


def reading(model: Model, adapter: str | None) -> Outputs:
    """A bundle's outputs as of ``edge.parity.compare``; a decoder reads the last tokens of a text through its cache."""

    def read(ids: Sequence[int]) -> Array:
        first = max(1, len(ids) - _STEPS)
        if model.manifest.kind != "decoder" or first == len(ids):
            return model.outputs(ids, adapter=adapter)
        reader = model.reader(adapter)
        told = [np.array(reader.every(ids[:first]))]
        told += [np.array(reader.step([token], [True])) for token in ids[first:]]
        return np.concatenate(told)

    return read
