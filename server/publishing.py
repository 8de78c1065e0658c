"""What nodes are sent of the global adapter: packed once for all, as a difference to what they hold where that is coded.

With a coded wire each adapter is the end of a chain. Let ``G_t`` be what the coordinator wishes to publish and ``P_t`` what
arrives:

    P_t = P_{t-1} + Q(G_t - P_{t-1}),     P_0 = 0

The coordinator itself keeps ``P_t``, so the error of one coding is part of the next difference and is repaired there: what
arrives is never further from ``G_t`` than one coding of one difference, however many rounds there were (error feedback, Seide
et al. 2014; with a compressed downlink as in DoubleSqueeze, Tang et al. 2019, arXiv:1905.05957). A node that holds ``P_{t-1}``
is sent the difference, any other the very ``P_t`` in fp32: everyone trains from the same bits.

The SVD that makes ``G_t`` may turn a direction's sign, which would make its difference twice as long as itself: where both of
its vectors point away from those in the same place of ``P_{t-1}``, the direction is turned back first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict

from protocol.adapter import Adapter, Array, Factors
from protocol.codec import CODED, WireFormat, pack, unpack
from protocol.errors import AdapterError, FederationError
from protocol.records import Call, call_records

_REMEMBERED = 2  # by each node: the last that it trained from and the last that it measured (client.app)


@dataclass(frozen=True)
class Published:
    """One adapter as it travels.

    Attributes:
        adapter: What arrives, ``P_t``.
        digest: Of it.
        whole: Arrays that anyone can read.
        delta: Arrays for those that hold ``delta_of``; None where only whole adapters travel.
        delta_of: Digest of ``P_{t-1}``; empty for the first of a chain, which is a difference to nothing.
    """

    adapter: Adapter
    digest: str
    whole: Mapping[str, Array]
    delta: Mapping[str, Array] | None = None
    delta_of: str = ""


@dataclass
class _Chain:
    """The end of a chain and what it was made of; the object itself spares most comparisons their digest."""

    wished: Adapter | None
    digest: str
    published: Published


class Publisher:
    """Packs global adapters and knows who holds which.

    Args:
        wire_down: How adapters travel. fp32 and fp16 need no chain: they are rounded once, from the adapter itself.
    """

    def __init__(self, wire_down: WireFormat) -> None:
        self._wire = wire_down
        self._chains: dict[str, _Chain] = {}
        self._held: dict[int, list[str]] = {}
        self._references: dict[int, str] = {}
        self._round = 0
        self._records: dict[str, RecordDict] = {}

    def publish(self, key: str, adapter: Adapter) -> Published:
        """The next adapter of a chain. The same adapter again is the same publication, under whatever key.

        Args:
            key: Names the chain: adapters that follow each other at the same nodes.
            adapter: What nodes should get.

        Raises:
            FederationError: The adapter does not fit the wire.
        """
        chain = self._chains.get(key)
        if chain is None or chain.wished is not adapter:
            digest = adapter.digest()
            known = [other for other in self._chains.values() if other.digest == digest]
            published = known[0].published if known else self._next(chain.published if chain else None, adapter)
            self._chains[key] = chain = _Chain(adapter, digest, published)
        return chain.published

    def reference(self, key: str, adapter: Adapter | None) -> Published | None:
        """The adapter that nodes of a chain stay near, as it arrived when the chain published it."""
        return self.publish(f"{key}/reference", adapter) if adapter else None

    def records(
        self, call: Call, published: Published, node: int, *, reference: Published | None = None, whole: bool = False
    ) -> RecordDict:
        """A call with its adapters, in the smallest form that the node can read.

        Args:
            call: Names the digest of ``published``.
            published: Its adapter.
            node: To whom it goes.
            reference: The adapter of the call's ``reference``.
            whole: The node has said that it does not hold what it should.
        """
        if whole:
            self._held.pop(node, None)
            self._references.pop(node, None)
        held = self._held.get(node, [])
        known = call.reference in ("", call.digest, self._references.get(node))
        beside = None if reference is None or known else reference.whole
        if not published.whole:
            return self._shared(_told(call, self._wire, ""), None, beside)
        if published.digest in held:
            return self._shared(_told(call, self._wire, published.digest), None, beside)
        if published.delta is not None and not whole and published.delta_of in ("", *held):
            return self._shared(_told(call, self._wire, published.delta_of), published.delta, beside)
        return self._shared(_told(call, self._wire, ""), published.whole, beside)

    def _shared(self, call: Call, arrays: Mapping[str, Array] | None, reference: Mapping[str, Array] | None) -> RecordDict:
        """Records of this round that say the same are one object: a thousand nodes of one rank cost one adapter of memory."""
        if call.round != self._round:
            self._round, self._records = call.round, {}
        said = f"{id(arrays)} {id(reference)} {call.model_dump_json()}"
        if said not in self._records:
            self._records[said] = call_records(call, arrays, reference)
        return self._records[said]

    def holds(self, node: int, digest: str, reference: str = "") -> None:
        """A node has answered a call that brought it the adapters of these digests."""
        self._references[node] = reference
        if self._wire in CODED:
            held = [known for known in self._held.get(node, []) if known != digest]
            self._held[node] = [*held, digest][-_REMEMBERED:]

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """What must outlive the coordinator, as arrays and as JSON."""
        references = {str(node): digest for node, digest in sorted(self._references.items()) if digest}
        if self._wire not in CODED:
            return {}, {"references": references} if references else {}
        arrays: dict[str, Array] = {}
        chains = []
        for at, (key, chain) in enumerate(sorted(self._chains.items())):
            chains.append({"key": key, "digest": chain.digest, "delta_of": chain.published.delta_of})
            arrays |= {f"{at} whole {name}": array for name, array in chain.published.whole.items()}
            arrays |= {f"{at} delta {name}": array for name, array in (chain.published.delta or {}).items()}
        held = {str(node): held for node, held in sorted(self._held.items())}
        return arrays, {"chains": chains, "held": held, "references": references}

    def restore(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Puts ``state()`` of an earlier process back: what follows is what would have followed there, bit by bit."""
        self._held = {int(node): list(held) for node, held in facts.get("held", {}).items()}
        self._references = {int(node): digest for node, digest in facts.get("references", {}).items()}
        self._chains = {}
        for at, chain in enumerate(facts.get("chains", ())):
            whole, delta = _part(arrays, f"{at} whole "), _part(arrays, f"{at} delta ")
            adapter = unpack(whole)
            published = Published(adapter, adapter.digest(), whole, delta, chain["delta_of"])
            self._chains[chain["key"]] = _Chain(None, chain["digest"], published)

    def _next(self, last: Published | None, adapter: Adapter) -> Published:
        try:
            if self._wire not in CODED:
                whole = pack(adapter, self._wire)
                arrived = unpack(whole)
                return Published(arrived, arrived.digest(), whole)
            reference = last.adapter if last else None
            delta = pack(_turned(adapter, reference or Adapter()), self._wire, reference)
            arrived = unpack(delta, reference)
        except AdapterError as error:
            raise FederationError(f"the global adapter cannot be sent: {error} (rounds.wire_down: fp32)") from None
        return Published(arrived, arrived.digest(), pack(arrived, "fp32"), delta, last.digest if last and last.whole else "")


def _told(call: Call, wire: WireFormat, delta_of: str) -> Call:
    return call.model_copy(update={"wire_down": wire, "delta_of": delta_of})


def _part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _turned(adapter: Adapter, last: Adapter) -> Adapter:
    """The adapter with the signs of its directions as in ``last``; its products stay what they are."""
    factors = dict(adapter.factors)
    for module in adapter.factors.keys() & last.factors.keys():
        pair, before = adapter.factors[module], last.factors[module]
        common = min(pair.r, before.r)
        along_a = np.sum(pair.A[:common] * before.A[:common], axis=1)
        along_b = np.sum(pair.B[:, :common] * before.B[:, :common], axis=0)
        sign = np.ones(pair.r, np.float32)
        # Both, so that a rule which averages A alone, beside a B of its nodes' own, never sees its A turned.
        sign[:common][(along_a < 0) & (along_b < 0)] = -1
        factors[module] = Factors(pair.A * sign[:, None], pair.B * sign, pair.scaling)
    return Adapter(factors, adapter.dense)
