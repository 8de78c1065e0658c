"""Who takes part: asks connected nodes to join, holds their offers against each other, gives each a name and a track."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from protocol.errors import FederationError, MessageError, shown
from protocol.federation import Federation
from protocol.privacy.promise import Promise
from protocol.records import Call, Offer, call_records, read_offer
from server.admission import check_offer, check_shape, check_size, memory_bytes
from server.exchange import Exchange
from server.track import Member, Track


class Membership:
    """The nodes of a federation and why others are none.

    Args:
        grid: Reaches the nodes.
        federation: What they are asked to join.
        tracks: By name; members are put into them.
        note: Called with an event and its facts.
        named: Offers are signed, so that a name belongs to its key. Otherwise it is what a node calls itself, and a second one
            of a name gets another.
        promise: Of differential privacy, which nodes look at before they join.
    """

    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        tracks: dict[str, Track],
        note: Callable[..., None],
        *,
        named: bool = False,
        promise: Callable[[], Promise | None] = lambda: None,
    ) -> None:
        self._grid = grid
        self._federation = federation
        self._tracks = tracks
        self._note = note
        self._named = named
        self._promise = promise
        self._exchange = Exchange(grid, lambda _, reply: read_offer(reply.content))
        self._known: set[int] = set()
        self._names: dict[int, str] = {}
        self._offers: dict[int, Offer] = {}
        self._left_out: dict[int, tuple[str, str]] = {}
        self._told: dict[int, tuple[str, str]] = {}

    def gather(self) -> None:
        """Waits for enough nodes and lets them join.

        Raises:
            FederationError: Too few connected in time, or too few of them can take part.
        """
        rounds = self._federation.rounds
        deadline = time.monotonic() + rounds.join_seconds
        while len(connected := sorted(self._grid.get_node_ids())) < rounds.minimum_nodes:
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(connected)} of {rounds.minimum_nodes} nodes connected within {rounds.join_seconds:g} s; "
                    "start the missing nodes, or lower rounds.minimum_nodes"
                )
            time.sleep(0.5)
        self._ask(connected)
        self._let_in(set(connected), wait=True)
        joined = len(self.offers())
        if joined < rounds.minimum_nodes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()) or "none was refused"
            raise FederationError(f"{joined} node(s) can take part, {rounds.minimum_nodes} are needed ({reasons})")

    def refresh(self) -> set[int]:
        """Lets nodes join that have connected since; returns the ids of all that are connected now.

        While there are enough members nobody is waited for: whoever takes its time to answer joins before a later round.
        """
        connected = set(self._grid.get_node_ids())
        self._ask(sorted(connected - self._known))
        present = sum(member.node in connected for member in self._members())
        self._let_in(connected, wait=present < self._federation.rounds.minimum_nodes)
        return connected

    @property
    def left_out(self) -> dict[str, str]:
        """Reason by name, of the nodes that take no part."""
        return dict(self._left_out.values())

    @property
    def base_digest(self) -> str:
        """Of the base that the members hold; empty while there are none."""
        return next((track.reference.base_digest for track in self._tracks.values() if track.reference), "")

    def state(self) -> dict[str, str]:
        """What must outlive the coordinator: names by node id."""
        return {str(member.node): name for track in self._tracks.values() for name, member in sorted(track.members.items())}

    def restore(self, state: Mapping[str, str]) -> None:
        """Puts ``state()`` of an earlier process back: nobody who comes in the meantime can take a member's name."""
        self._names = {int(node): name for node, name in state.items()}

    def offers(self) -> dict[str, Offer]:
        """What each member offered, by its name."""
        return {member.name: member.offer for member in self._members()}

    def _ask(self, nodes: Iterable[int]) -> None:
        nodes = list(nodes)
        self._known |= set(nodes)
        records = call_records(self._call())
        messages = {node: Message(records, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes}
        self._exchange.ask(messages, self._federation.rounds.timeout_seconds)

    def _let_in(self, connected: set[int], *, wait: bool) -> None:
        heard = self._exchange.hear(wait=wait)
        for node, reason in sorted((heard.refused | heard.silent).items()):
            self._leave_out(node, f"node-{node}", reason)
        offered = self._by_name(heard.results, connected) if self._named else heard.results
        if not offered:
            return
        self._offers = offers = self._undecided() | offered
        base = self.base_digest or Counter(offer.base_digest for offer in offers.values()).most_common(1)[0][0]
        # What most offer on the federation's base comes first: others are held against it, and no single node sets it.
        alike = Counter(_shape(offer) for offer in offers.values() if offer.base_digest == base)
        for node in sorted(offers, key=lambda node: (node not in self._names, -alike[_shape(offers[node])], node)):
            if node in self._offers:
                self._admit(node, offers[node], base, connected)

    def _by_name(self, offers: Mapping[int, Offer], connected: set[int]) -> dict[int, Offer]:
        """One offer of each name: a second node with the key of one that is connected is asked again when that has gone."""
        holders = {member.name: member.node for member in self._members() if member.node in connected}
        for node in sorted(offers):
            if holders.setdefault(name := offers[node].name, node) != node:
                self._leave_out(node, name, f"another node with the key of {name} is connected")
                self._known.discard(node)
        self._offers = {node: offer for node, offer in self._offers.items() if holders.get(offer.name, node) == node}
        return {node: offer for node, offer in offers.items() if holders[offer.name] == node}

    def _undecided(self) -> dict[int, Offer]:
        """Offers for adapters that have merged nothing yet: what most offer is decided anew then, whoever came first."""
        tracks = {track.root: track for track in self._tracks.values() if not track.manifest}
        for track in tracks.values():
            track.members.clear()
            track.belonging.clear()
            track.reference = None
        return {node: offer for node, offer in self._offers.items() if offer.adapter in tracks}

    def _admit(self, node: int, offer: Offer, base_digest: str, connected: set[int]) -> None:
        taken = {member.name for member in self._members() if member.node in connected}
        name = offer.name if self._named else self._names.get(node, shown(offer.name, 80))
        while name in taken:
            name = f"{name}-{node}"
        try:
            track = self._track_of(name, offer)
            reference = track.reference or offer.model_copy(update={"base_digest": base_digest})
            check_offer(offer, reference, track.plan(1).method)
            check_size(offer, memory_bytes())
            if track.reference is None:
                check_shape(offer, track.plan(1))
        except MessageError as error:
            self._leave_out(node, name, str(error))
            return
        for other in self._tracks.values():  # a node that comes back under a new id takes its own place again
            if away := other.members.pop(name, None):
                self._known.discard(away.node)  # if it was another's, that one is asked again when it is back
                self._offers.pop(away.node, None)
        track.reference = track.reference or offer
        # Equal, as was checked, and as long as the model has layers: ten thousand members share one.
        shared = {name: getattr(track.reference, name) for name in ("base_digest", "modules", "dense")}
        offer = offer.model_copy(update=shared)
        track.members[name] = Member(node, name, offer)
        track.belonging.add(name)
        self._left_out.pop(node, None)
        for stranger, (told, reason) in self._left_out.items():
            if told == name:  # which is a member's now
                self._left_out[stranger] = (f"{name}-{stranger}", reason)
        if self._told.get(node) != (name, ""):
            self._told[node] = (name, "")
            self._note("joined", node=name, adapter=track.name, method=offer.method, precision=offer.precision, r=offer.r)

    def _members(self) -> list[Member]:
        return [member for track in self._tracks.values() for member in track.members.values()]

    def _track_of(self, name: str, offer: Offer) -> Track:
        """Its own part of a split; a newcomer goes to the part with the most members."""
        parts = [track for track in self._tracks.values() if track.root == offer.adapter]
        if not parts:
            known = ", ".join(sorted({track.root for track in self._tracks.values()})) or "none has a name"
            raise MessageError(f"adapter: found {offer.adapter[:80]!r}, expected one of the federation's ({known})")
        own = [track for track in parts if name in track.belonging]
        return own[0] if own else max(parts, key=lambda track: len(track.belonging))

    def _leave_out(self, node: int, name: str, reason: str) -> None:
        """Under a name that is nobody else's: of a node that is none of the federation nothing else is known."""
        self._left_out.pop(node, None)
        taken = self.left_out.keys() | {member.name for member in self._members()}
        while name in taken:
            name = f"{name}-{node}"
        self._left_out[node] = (name, reason)
        if self._told.get(node) != (name, reason):
            self._told[node] = (name, reason)
            self._note("left-out", node=name, reason=reason)

    def _call(self) -> Call:
        federation, schedules = self._federation, self._federation.schedules()
        return Call(
            federation=federation.name,
            round=0,
            rounds=max(len(plans) for plans in schedules.values()),
            plan=next(iter(schedules.values()))[0],
            adapters=dict(federation.adapters),
            summed=federation.secure_sum.enabled,
            minimum_nodes=federation.rounds.minimum_nodes,
            privacy=self._promise(),
        )


def _shape(offer: Offer) -> Hashable:
    parts = offer.modules.items(), offer.dense.items(), offer.embeddings
    return offer.base_digest, offer.adapter, *(tuple(sorted(part)) for part in parts)
