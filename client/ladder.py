"""A node that runs out of memory goes on with less, and remembers how far it had to climb down."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replaced

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
        name: Under which memory keeps the rung.
        plan: As it was chosen from estimates.
        rungs: ``(what changes, plan)``, downwards.
        memory: Keeps the rung from round to round.
    """

    name: str
    plan: Plan
    rungs: tuple[tuple[str, Plan], ...]
    memory: Memory

    @classmethod
    def of(
        cls, call: Call, plan: Plan, node: Node, memory: Memory, usable: Callable[[int], bool] = lambda tokens: True
    ) -> "Ladder":
        """Below the plan that was chosen for a call; ``usable`` says whether rows of so many tokens leave enough to learn."""
        machine = Machine.of(node.hardware())
        one = replaced(machine, gpus=min(1, machine.gpus))  # one process trains on one GPU
        return cls(f"ladder/{call.adapter}", plan, tuple(steps_down(plan, one, usable)), memory)

    def train(self, attempt: Callable[[Plan], T]) -> tuple[T, Plan]:
        """Trains from the rung that was reached before; climbs down where memory runs out.

        Returns:
            What ``attempt`` returned, and the plan that it was called with.

        Raises:
            HardwareError: The last rung ran out of memory too.
        """
        known = self.memory.read(self.name)
        same = "rung" in known and bytes(known["plan"]) == self._digest()
        reached = min(int(known["rung"][0]), len(self.rungs)) if same else 0
        plan = self.rungs[reached - 1][1] if reached else self.plan
        made, plan, changed = on_ladder(plan, self.rungs[reached:], attempt)
        if changed:
            rung = np.array([reached + len(changed)], np.int64)
            self.memory.keep(self.name, {"rung": rung, "plan": np.frombuffer(self._digest(), np.uint8)})
        return made, plan

    def _digest(self) -> bytes:
        """Of the plan: another one begins at the top."""
        return hashlib.sha256(self.plan.model_dump_json().encode()).digest()
