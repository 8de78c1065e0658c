"""A node that runs out of memory goes on with less, and remembers how far it had to climb down."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from client.memory import Memory
from client.node import Node
from protocol.plan import Plan
from protocol.records import Call
from strategies.footprint import Machine
from strategies.ladder import T, on_ladder
from strategies.sizing import steps_down


@dataclass(frozen=True)
class Ladder:
    """The rungs below a node's plan, and the one that it stands on.

    Attributes:
        call: Names the adapter under which memory keeps the rung.
        plan: As it was chosen from estimates.
        node: Whose machine says in how many bits a base can be held.
        memory: Keeps the rung from round to round.
        usable: Whether rows of so many tokens leave enough to learn.
    """

    call: Call
    plan: Plan
    node: Node
    memory: Memory
    usable: Callable[[int], bool] = lambda tokens: True

    @cached_property
    def rungs(self) -> tuple[tuple[str, Plan], ...]:
        """``(what changes, plan)``, downwards. Made when memory has run out: it asks the drivers and reads rows."""
        return tuple(steps_down(self.plan, Machine.of(self.node.hardware()).one, self.usable))

    def train(self, attempt: Callable[[Plan], T]) -> tuple[T, Plan]:
        """Trains from the rung that was reached before; climbs down where memory runs out.

        Returns:
            What ``attempt`` returned, and the plan that it was called with.

        Raises:
            HardwareError: The last rung ran out of memory too.
        """
        name = f"ladder/{self.call.adapter}"
        known = self.memory.read(name)
        same = "rung" in known and bytes(known["plan"]) == self._digest()
        reached = min(int(known["rung"][0]), len(self.rungs)) if same else 0
        plan = self.rungs[reached - 1][1] if reached else self.plan
        made, plan, changed = on_ladder(plan, self._below(reached), attempt)
        if changed:
            rung = np.array([reached + len(changed)], np.int64)
            self.memory.keep(name, {"rung": rung, "plan": np.frombuffer(self._digest(), np.uint8)})
        return made, plan

    def _below(self, reached: int) -> Iterator[tuple[str, Plan]]:
        yield from self.rungs[reached:]

    def _digest(self) -> bytes:
        """Of the plan: another one begins at the top."""
        return hashlib.sha256(self.plan.model_dump_json().encode()).digest()
