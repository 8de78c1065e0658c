"""Adapters that a device made for itself: numbered, one of them in use, the one before it never far.

They never leave the device by anything here. A folder holds ``adapter-NUMBER.state`` (``edge.runtime.adapting.state``) and
``current.json``, which names the one in use; 0 is what the bundle itself brings.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge.runtime.adapting.state import Array, Seal, State, packed, read, unpacked, write
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.files import private_folder

_KEPT: Final = 5
_FILE = re.compile(r"adapter-([1-9][0-9]{0,8})\.state")
_CURRENT = "current.json"


@dataclass(frozen=True)
class Version:
    """One adapter that was kept.

    Attributes:
        number: From 1.
        adapter: Float32.
        facts: What was measured, on which bundle.
    """

    number: int
    adapter: Adapter
    facts: Mapping[str, Any]


class Personal:
    """The adapters of one purpose on one device.

    Args:
        folder: Made by the first one that is kept; for its owner's eyes alone.
        seal: Where the files are to be sealed.
    """

    def __init__(self, folder: Path, seal: Seal | None = None) -> None:
        self.folder, self._seal = folder, seal

    def current(self) -> tuple[Version | None, list[str]]:
        """The one in use, None for the bundle's own; and what was wrong with files, where an older one had to be taken."""
        wrong: list[str] = []
        number = self._pointer(wrong)
        for candidate in sorted((each for each in self.numbers() if each <= number), reverse=True):
            try:
                return self._version(candidate), wrong
            except AdapterError as error:
                wrong.append(f"version {candidate} is damaged ({error}); the one before is used")
        return None, wrong

    def numbers(self) -> list[int]:
        """Of all that are kept, in order."""
        return sorted(int(match[1]) for path in self.folder.glob("*.state") if (match := _FILE.fullmatch(path.name)))

    def keep(self, adapter: Adapter, facts: Mapping[str, Any]) -> int:
        """Puts an adapter into use; gives its number."""
        private_folder(self.folder)
        number = max(self.numbers(), default=0) + 1
        told = {"facts": dict(facts), "scaling": {module: pair.scaling for module, pair in adapter.factors.items()}}
        name = _name(number)
        content = packed(State(told, tensors(adapter)))
        write(self.folder / name, self._seal.seal(content, name) if self._seal else content)
        self._point(number)
        for old in self.numbers()[:-_KEPT]:
            (self.folder / _name(old)).unlink(missing_ok=True)
        return number

    def roll_back(self) -> int:
        """Puts the version before the one in use back; gives its number, 0 for the bundle's own.

        Raises:
            AdapterError: The bundle's own is in use.
        """
        now = self.current()[0]
        if now is None:
            raise AdapterError("the bundle's own adapter is in use; there is nothing to roll back")
        before = max((each for each in self.numbers() if each < now.number), default=0)
        self._point(before)
        return before

    def _version(self, number: int) -> Version:
        name = _name(number)
        content = read(self.folder / name)
        state = unpacked(self._seal.open(content, name) if self._seal else content)
        try:
            scaling, facts, held = state.facts["scaling"], dict(state.facts["facts"]), state.arrays
            labels = facts.get("labels") or []
            factors = {
                module: Factors(held[f"A|{module}"], held[f"B|{module}"], float(each)) for module, each in scaling.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise AdapterError("holds no adapter") from None
        dense = {key[2:]: each for key, each in held.items() if key.startswith("D|")}
        if not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
            raise AdapterError("holds labels that are no texts")
        if not all(each.dtype == np.float32 and np.isfinite(each).all() for each in held.values()):
            raise AdapterError("holds numbers that are not finite float32")
        return Version(number, Adapter(factors, dense), facts)

    def _pointer(self, wrong: list[str]) -> int:
        path = self.folder / _CURRENT
        if not os.path.lexists(path):
            return 0
        try:
            number = json.loads(read(path))["version"]
            if type(number) is int and number >= 0:
                return number
        except (AdapterError, ValueError, KeyError, TypeError, RecursionError):
            pass
        newest = max(self.numbers(), default=0)
        wrong.append(f"{_CURRENT} is damaged; the newest version, {newest}, is used")
        return newest

    def _point(self, number: int) -> None:
        write(self.folder / _CURRENT, json.dumps({"version": number}).encode())


def tensors(adapter: Adapter) -> dict[str, Array]:
    """What is trained of an adapter, by name: ``A|MODULE``, ``B|MODULE``, ``D|NAME``; in order, for sums depend on it."""
    found = {f"{side}|{module}": getattr(pair, side) for module, pair in adapter.factors.items() for side in "AB"}
    return dict(sorted((found | {f"D|{name}": each for name, each in adapter.dense.items()}).items()))


def with_tensors(adapter: Adapter, given: Mapping[str, Array]) -> Adapter:
    """The adapter with other numbers in the same places."""
    factors = {
        module: Factors(given[f"A|{module}"], given[f"B|{module}"], pair.scaling) for module, pair in adapter.factors.items()
    }
    return Adapter(factors, {name: given[f"D|{name}"] for name in adapter.dense})


def on_top(below: Adapter, adapter: Adapter) -> Adapter:
    """One adapter whose change is the sum of both: factors one after the other, the dense tensors of the upper one.

    Where both have a module, its scalings are inside B, whose leading columns are those of ``below``.
    """
    factors = {**below.factors, **adapter.factors}
    for module in below.factors.keys() & adapter.factors.keys():
        first, second = below.factors[module], adapter.factors[module]
        B = np.concatenate([first.scaling * first.B, second.scaling * second.B], axis=1).astype(np.float32)
        factors[module] = Factors(np.concatenate([first.A, second.A]), B)
    return Adapter(factors, {**below.dense, **adapter.dense})


def _name(number: int) -> str:
    return f"adapter-{number}.state"
