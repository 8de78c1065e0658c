"""Who takes part: asks connected nodes to join, holds their offers against each other, gives each a name and a track."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from protocol.errors import FederationError, MessageError, shown
from protocol.federation import Federation
from protocol.records import Call, Offer, call_records, read_offer
from server.admission import check_offer
from server.exchange import collect
from server.track import Member, Track


class Membership:
    """The nodes of a federation and why others are none.

    Args:
        grid: Reaches the nodes.
        federation: What they are asked to join.
        tracks: By name; members are put into them.
        note: Called with an event and its facts.
    """

    def __init__(self, grid: Grid, federation: Federation, tracks: dict[str, Track], note: Callable[..., None]) -> None:
        self._grid = grid
        self._federation = federation
        self._tracks = tracks
        self._note = note
        self._known: set[int] = set()
        self.base_digest = ""
        self.left_out: dict[str, str] = {}

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
        joined = len(self.offers())
        if joined < rounds.minimum_nodes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()) or "none was refused"
            raise FederationError(f"{joined} node(s) can take part, {rounds.minimum_nodes} are needed ({reasons})")

    def refresh(self) -> set[int]:
        """Lets nodes join that have connected since; returns the ids of all that are connected now."""
        connected = set(self._grid.get_node_ids())
        if newcomers := sorted(connected - self._known):
            self._ask(newcomers, connected)
        return connected

    def offers(self) -> dict[str, Offer]:
        """What each member offered, by its name."""
        return {name: member.offer for track in self._tracks.values() for name, member in track.members.items()}

    def _ask(self, nodes: Iterable[int], connected: set[int] | None = None) -> None:
        nodes = list(nodes)
        self._known |= set(nodes)
        records = call_records(self._call())
        messages = {node: Message(records, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes}
        heard = collect(
            self._grid, messages, lambda _, reply: read_offer(reply.content), seconds=self._federation.rounds.timeout_seconds
        )
        for node, reason in sorted((heard.refused | heard.silent).items()):
            self._leave_out(f"node-{node}", reason)
        if heard.results and not self.base_digest:
            self.base_digest = Counter(offer.base_digest for offer in heard.results.values()).most_common(1)[0][0]
        # What most offer on the federation's base comes first: others are held against it, and no single node sets it.
        alike = Counter(_shape(offer) for offer in heard.results.values() if offer.base_digest == self.base_digest)
        for node, offer in sorted(heard.results.items(), key=lambda item: (-alike[_shape(item[1])], item[0])):
            self._admit(node, offer, connected or set(nodes))

    def _admit(self, node: int, offer: Offer, connected: set[int]) -> None:
        members = {name: member for track in self._tracks.values() for name, member in track.members.items()}
        taken = {name for name, member in members.items() if member.node in connected} | self.left_out.keys()
        name = shown(offer.name, 80)
        while name in taken:
            name = f"{name}-{node}"
        for track in self._tracks.values():  # a node that comes back under a new id takes its own place again
            track.members.pop(name, None)
        try:
            track = self._track_of(name, offer)
            _check(offer, track, self.base_digest)
        except MessageError as error:
            self._leave_out(name, str(error))
            return
        track.members[name] = Member(node, name, offer)
        track.belonging.add(name)
        self._note("joined", node=name, adapter=track.name, method=offer.method, precision=offer.precision, r=offer.r)

    def _track_of(self, name: str, offer: Offer) -> Track:
        """Its own part of a split; a newcomer goes to the part with the most members."""
        parts = [track for track in self._tracks.values() if track.root == offer.adapter]
        if not parts:
            known = ", ".join(sorted({track.root for track in self._tracks.values()})) or "none has a name"
            raise MessageError(f"adapter: found {offer.adapter[:80]!r}, expected one of the federation's ({known})")
        own = [track for track in parts if name in track.belonging]
        return own[0] if own else max(parts, key=lambda track: len(track.belonging))

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        self._note("left-out", node=name, reason=reason)

    def _call(self) -> Call:
        federation, schedules = self._federation, self._federation.schedules()
        return Call(
            federation=federation.name,
            round=0,
            rounds=max(len(plans) for plans in schedules.values()),
            plan=next(iter(schedules.values()))[0],
            adapters=dict(federation.adapters),
        )


def _shape(offer: Offer) -> Hashable:
    return offer.base_digest, offer.adapter, tuple(sorted(offer.modules.items())), tuple(sorted(offer.dense.items()))


def _check(offer: Offer, track: Track, base_digest: str) -> None:
    reference = track.reference if track.members else offer.model_copy(update={"base_digest": base_digest})
    check_offer(offer, reference, track.plan(1).method)
