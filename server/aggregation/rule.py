"""What every aggregation rule is: what nodes start from, and ``begin``, ``add``, ``merge``, ``finalise``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from protocol.adapter import Adapter, Array
from protocol.errors import FederationError
from protocol.product_space import trained_part
from protocol.records import Trains
from protocol.update import Update


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, for the round's record.

    Attributes:
        updates: How many were merged.
        num_examples: Examples behind them.
        discarded_energy: Largest share over modules of squared norm cut off by the rank cap, 0 to 1.
        effective_rank: Mean over modules (Roy and Vetterli 2007); a fall from round to round is a collapse.
        arithmetic: How many modules were merged by which arithmetic (``exact``, ``randomised``, ``incremental``, ``dense``).
        error_bound: Largest relative error over modules that the arithmetic certifies; 0 for an exact one (to rounding).
        details: What else a rule has to say: a clipping norm, a weight by node, who was chosen.
    """

    updates: int
    num_examples: int
    discarded_energy: float
    effective_rank: float
    arithmetic: Mapping[str, int] = field(default_factory=dict)
    error_bound: float = 0.0
    details: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """What a node of one rank is sent, and what of it trains.

    Attributes:
        adapter: Travels to the node.
        r: The rank that the node trains.
        trains: Which factor; the other stays as it is.
        fresh: The whole adapter stays frozen and a new pair of rank ``r`` is trained beside it; otherwise the leading ``r``
            directions train and those beyond are frozen.
    """

    adapter: Adapter
    r: int
    trains: Trains = "both"
    fresh: bool = False

    def trained(self, arrived: Adapter) -> Adapter:
        """The part of the adapter, as it arrived at the node, that the node trains: what its change is counted from."""
        return trained_part(arrived, self.r, fresh=self.fresh)


class Rule(ABC):
    """Merges one round's updates into the next global adapter.

    A round is ``begin``, then any number of ``add`` and ``merge``, then ``finalise``. An update is trusted here: admission
    has checked names, shapes, ranks and values. The result does not depend on the order of ``add`` (to rounding).

    Attributes:
        individual: The rule looks at single updates, not only at their sum; then ``nearest_sum`` is the nearest that does not.
        personal_b: Nodes keep B to themselves; only A is merged.
    """

    individual: ClassVar[bool] = False
    nearest_sum: ClassVar[str] = "product-delta"
    personal_b: ClassVar[bool] = False

    def initial(self, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], seed: int) -> Adapter:  # noqa: ARG002
        """The adapter before the first round. Empty: each node draws its own start.

        Args:
            modules: ``(d_out, d_in)`` by module.
            ranks: Of all nodes that joined.
            seed: Draws what the rule draws.
        """
        return Adapter()

    def start(self, current: Adapter, r: int, number: int) -> Start:  # noqa: ARG002
        """What a node of rank ``r`` is sent in round ``number`` (from 1): all of it, and its leading directions train."""
        return Start(current, r)

    @abstractmethod
    def begin(self, current: Adapter) -> None:
        """Starts a round from the current global adapter (empty before the first)."""

    @abstractmethod
    def add(self, update: Update, start: Adapter, node: str = "") -> None:
        """Adds one update.

        Args:
            update: Absolute tensors as trained; weighted by ``update.manifest.num_examples``.
            start: What the node trained from (``Start.trained``). A module that it lacks counts as a zero product, a
                tensor as untouched.
            node: The name of who sent it, for the report.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Adds what another instance, begun from the same adapter, has gathered (a region's, a worker's)."""

    def merge_partial(self, arrays: Mapping[str, Array]) -> None:  # noqa: ARG002
        """Adds a sum of which nobody here has seen the parts (``protocol.secure_sum.contribution``).

        Raises:
            FederationError: The rule cannot.
        """
        raise FederationError(f"{type(self).__name__} looks at single updates, and there is only their sum")

    @abstractmethod
    def finalise(self) -> tuple[Adapter, MergeReport]:
        """The next global adapter (float32, scaling 1) and what the merge did. Moments of the rule move on."""

    def state(self) -> dict[str, Array]:
        """What must outlive the coordinator beside the adapter (moments, a running median); float64 or integer arrays."""
        return {}

    def restore(self, state: Mapping[str, Array]) -> None:  # noqa: B027 (a rule without moments has nothing to put back)
        """Puts ``state()`` of an earlier process back, between rounds."""
