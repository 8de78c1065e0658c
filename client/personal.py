"""The parts of an adapter that stay at a node: its own B (FedSA-LoRA, Guo et al. 2024, arXiv:2410.01463) and its own head.

They live in the node's memory and never leave it: an update holds zeros for B and no tensor of the head. What was there
before the newest round is kept beside what that round made, so that a coordinator that asks for the same round again gets
the same answer. (One that goes further back than that finds the newest parts before the round that this node did last.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from client.memory import Memory
from protocol.adapter import Adapter, Array, Factors
from protocol.product_space import split
from protocol.records import Call

_ROUND = "round"
Parts = Mapping[str, Array]


@dataclass(frozen=True)
class Personal:
    """Says which parts of a federation's adapter this node keeps to itself.

    Attributes:
        name: Under which memory keeps them.
        own_b: Every module's B.
        head: The tensors of the head that is its own; none where the head is everyone's.
    """

    name: str
    own_b: bool
    head: frozenset[str]

    @classmethod
    def of(cls, call: Call, head: frozenset[str]) -> "Personal":
        """What a call and its plan say; ``head`` are the tensors of this node's head."""
        return cls(f"personal/{call.adapter}", call.personal_b, head if call.plan.head.local else frozenset())

    def shared(self, adapter: Adapter) -> Adapter:
        """What may leave: with an own B, A as it is and a B of zeros (the rule averages A alone); with an own head, none."""
        factors = dict(adapter.factors)
        if self.own_b:
            factors = {module: Factors(pair.A, np.zeros_like(pair.B)) for module, pair in factors.items()}
        return Adapter(factors, {name: tensor for name, tensor in adapter.dense.items() if name not in self.head})

    def parts(self, adapter: Adapter) -> dict[str, Array]:
        """What stays, by name; B with its scaling inside, since A is sent without any."""
        kept = {f"D|{name}": tensor for name, tensor in adapter.dense.items() if name in self.head}
        if self.own_b:
            kept |= {f"B|{module}": pair.B * np.float32(pair.scaling) for module, pair in adapter.factors.items()}
        return kept

    def joined(self, adapter: Adapter, parts: Parts) -> Adapter:
        """The global adapter with this node's own parts in their places; those that it has not yet stay as they are."""
        factors = {module: _with_b(pair, parts.get(f"B|{module}")) for module, pair in adapter.factors.items()}
        dense = {name.removeprefix("D|"): tensor for name, tensor in parts.items() if name.startswith("D|")}
        return Adapter(factors, {**adapter.dense, **dense})

    def before(self, memory: Memory, number: int) -> Parts:
        """The parts as they were before round ``number`` was trained; empty before the first."""
        if number == 1 or not (self.own_b or self.head):
            return {}  # in a first round there is nothing yet, whatever an earlier run of that name has left
        known = memory.read(self.name)
        last = int(known.get(_ROUND, np.zeros(1, np.int64))[0])
        when = "after/" if last < number else "before/"
        return {name.removeprefix(when): array for name, array in known.items() if name.startswith(when)}

    def remember(self, memory: Memory, number: int, before: Parts, trained: Adapter) -> None:
        """Keeps what round ``number`` made of the parts, and what it made it from."""
        if self.own_b or self.head:
            both = {"before/": before, "after/": self.parts(trained)}
            arrays = {f"{when}{name}": array for when, parts in both.items() for name, array in parts.items()}
            memory.keep(self.name, {_ROUND: np.array([number], np.int64), **arrays})


def _with_b(pair: Factors, own: Array | None) -> Factors:
    """``pair`` with this node's own B on its leading directions, and no other: nobody else's B is in it."""
    if own is None:
        return pair
    leading, rest = split(Factors(pair.A, np.zeros_like(pair.B)), own.shape[1])
    return Factors(pair.A, np.concatenate([own[:, : leading.r], rest.B], axis=1).astype(np.float32))
