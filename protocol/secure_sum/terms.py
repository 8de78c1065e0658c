"""What everybody in a secure sum holds to: what is added up, by whom, how many must stay. All keys are bound to its digest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from math import ceil

from protocol.errors import SecureSumError
from protocol.secure_sum.fixed_point import FixedPoint

# Of two values neither is hidden: who knows one and the sum knows the other.
FEWEST_NODES = 3


@dataclass(frozen=True)
class Terms:
    """The terms of one sum.

    Args:
        federation, run: Names; a key made for one run serves no other.
        round, phase: Which sum of the run; a round may have several.
        length: Values in each vector.
        limit: Largest size of a value.
        nodes: Names of those who are asked.
        neighbours: With how many others each node shares masks and secrets; 0: with all. Even. A graph of fewer neighbours is
            that of SecAgg+ (Bell et al. 2020, IACR ePrint 2020/704): nodes on a ring, in an order that nobody chose.
        share: Part of a node's holders, itself among them, that gives its secrets back. With ``t`` of ``n`` holders, a
            coordinator that lies and has ``c`` of them on its side learns nothing while ``2 t > n + c`` (Bonawitz et al. 2017,
            section 6.2).
        promise: What is promised beside, as text (``protocol.privacy.promise``): nobody is told more noise than others.
        asked: Digest of everything else that all are told alike: a sum in which the others were asked for nothing, or to weigh
            nothing, would be one node's update (Pasquini et al. 2022, arXiv:2111.07380).

    Raises:
        SecureSumError: Terms under which a node would not be hidden, or a sum could overflow.
    """

    federation: str
    run: str
    round: int
    phase: int
    length: int
    limit: float
    nodes: tuple[str, ...]
    neighbours: int = 0
    share: float = 2 / 3
    promise: str = ""
    asked: str = ""

    def __post_init__(self) -> None:
        problems = []
        if len(set(self.nodes)) < FEWEST_NODES:
            problems.append(f"{len(set(self.nodes))} nodes, expected at least {FEWEST_NODES}: of fewer a sum hides nobody")
        if self.neighbours and (self.neighbours % 2 or self.neighbours < 2):
            problems.append(f"{self.neighbours} neighbours, expected an even number or 0 for all")
        if not 0.5 < self.share <= 1:
            problems.append(f"a share of {self.share:g}, expected more than a half: two halves could be told two stories")
        if self.length < 1:
            problems.append(f"{self.length} values, expected at least one")
        if problems:
            raise SecureSumError(f"secure sum: {'; '.join(problems)}")
        self.fixed_point  # noqa: B018 - says what is wrong with the limit

    @cached_property
    def fixed_point(self) -> FixedPoint:
        """How values become words."""
        return FixedPoint(self.limit, len(self.nodes))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it: nodes that were told different terms agree on no key."""
        told = asdict(self) | {"nodes": sorted(self.nodes), "limit": self.limit.hex(), "share": self.share.hex()}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()

    def threshold(self, holders: int) -> int:
        """How many of so many holders give a secret back."""
        return min(holders, ceil(self.share * holders - 1e-9))

    def fewest(self) -> int:
        """How many nodes must stay at every stage."""
        return max(FEWEST_NODES, self.threshold(len(self.nodes)))

    def holders(self, name: str, present: Sequence[str], order: bytes) -> tuple[str, ...]:
        """Who holds shares of a node's secrets and masks its vector, itself included; symmetric.

        Args:
            name: The node.
            present: All who have advertised keys.
            order: Digest of their adverts, which places them on the ring: nobody knows it before all have.
        """
        if not self.neighbours or len(present) <= self.neighbours + 1:
            return tuple(sorted(present))
        ring = _ring(tuple(sorted(present)), order)
        at, reach = ring.index(name), self.neighbours // 2
        return tuple(sorted(ring[(at + step) % len(ring)] for step in range(-reach, reach + 1)))


@lru_cache(maxsize=4)
def _ring(present: tuple[str, ...], order: bytes) -> tuple[str, ...]:
    return tuple(sorted(present, key=lambda each: hashlib.sha256(order + each.encode()).digest()))
