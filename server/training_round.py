"""One round of training: draw the cohort, send each node its start, hold what comes back, let in what may be, merge it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from protocol.adapter import Adapter
from protocol.errors import StartMissingError
from protocol.federation import Federation
from protocol.manifest import Manifest
from protocol.plan import COMPRESSED
from protocol.records import Call, payload_bytes, read_update
from protocol.update import Update
from server.admission import Change, check, most_bytes
from server.aggregation.innovation import gram
from server.aggregation.rule import MergeReport, Start
from server.clustering import bipartition
from server.exchange import Collected, collect
from server.held import Held
from server.publishing import Published, Publisher
from server.standing import Standing, weights
from server.track import Member, Track, draw


@dataclass
class Trained:
    """What a round of training did to one track.

    Attributes:
        accepted: Metrics by node name, of the updates that were merged.
        refused: Reason by node name, of the quarantined ones.
        silent: Reason by node name, of the nodes of which nothing came that could be read.
        paused: Reason by node name, of the nodes that were not asked though they are connected.
        dropped: Names of the nodes that were asked beyond the cohort and not waited for.
        norms: Size of each accepted change.
        bytes_sent, bytes_received: Of adapters, as packed on the wire; what was refused unread is no adapter.
        seconds: From the first message to the merged adapter.
        adapter, report: The next global adapter; None where too few updates could be used.
        split: Names of the members that should go on apart, where the updates disagree.
        given_up: Why there is no secure sum.
        privacy: What the release was noised with, and what it and all before it have cost (``server.spending``).
    """

    accepted: dict[str, Mapping[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    paused: dict[str, str] = field(default_factory=dict)
    dropped: Sequence[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    adapter: Adapter | None = None
    report: MergeReport | None = None
    split: tuple[frozenset[str], frozenset[str]] | None = None
    given_up: str = ""
    privacy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """What nodes of one rank are asked, and the part of their start that a change is counted from."""

    call: Call
    published: Published
    reference: Published | None
    trained: Adapter


@dataclass(frozen=True)
class AskedNode:
    """One node in one round."""

    member: Member
    track: Track
    sent: Sent


@dataclass(frozen=True)
class Admitted:
    """An update that may be merged, but for the update.

    Attributes:
        change: How far it is from what it began from.
        metrics, num_examples: As its node says.
    """

    change: Change
    metrics: Mapping[str, float]
    num_examples: int


class TrainingRound:
    """Runs rounds of training over any number of tracks at once.

    Args:
        grid: Reaches the nodes.
        federation: How rounds run.
        publisher: Packs global adapters and knows who holds which.
        standing: What was learnt about nodes and their updates.
    """

    def __init__(self, grid: Grid, federation: Federation, publisher: Publisher, standing: Standing) -> None:
        self._grid = grid
        self._federation = federation
        self._rounds = federation.rounds
        self._publisher = publisher
        self._standing = standing

    def run(self, number: int, tracks: Mapping[str, Track], connected: set[int]) -> dict[str, Trained]:
        """One round; what it did to each track. Tracks change nothing themselves."""
        begun = time.monotonic()
        done = {name: Trained() for name in tracks}
        asked: dict[int, AskedNode] = {}
        for name, track in tracks.items():
            asked |= self._draw(track, number, connected, done[name])
        for name in self._carried_out(number, tracks, asked, done):
            done[name].seconds = time.monotonic() - begun
        return done

    def _carried_out(
        self,
        number: int,  # noqa: ARG002
        tracks: Mapping[str, Track],
        asked: Mapping[int, AskedNode],
        done: dict[str, Trained],
    ) -> Iterator[str]:
        """Asks, hears and merges; yields the name of each track once it is done."""
        with Held() as held:
            heard = self._exchange(asked, held, done)
            for name, track in tracks.items():
                self._merge(track, asked, heard, held, done[name])
                yield name

    def _barred(self, name: str, number: int) -> str | None:
        """Why a member is not asked; None if it is."""
        return self._standing.paused(name, number)

    def _draw(self, track: Track, number: int, connected: set[int], done: Trained) -> dict[int, AskedNode]:
        ranks = {member.offer.r for member in track.members.values() if member.node in connected}
        starts = {r: start_of(track, r, number) for r in ranks}
        available = {}
        for name, member in track.members.items():
            if member.node not in connected:
                continue
            start = starts[member.offer.r]
            if reason := self._barred(name, number):
                done.paused[name] = reason
            elif start.r > member.offer.r:
                done.paused[name] = f"the rule trains rank {start.r}, this node offered {member.offer.r}"
            else:
                available[name] = member
        drawn = [available[name] for name in self._chosen(available, track, number)]
        sent = {r: self._sent(track, starts[r], number) for r in sorted({member.offer.r for member in drawn})}
        return {member.node: AskedNode(member, track, sent[member.offer.r]) for member in drawn}

    def _chosen(self, available: Mapping[str, Member], track: Track, number: int) -> list[str]:  # noqa: ARG002
        """Names of those that are asked, of those that could be."""
        size = self._rounds.cohort
        size = None if size is None else round(size * (1 + self._rounds.over_selection))
        return draw(available, size, self._rounds.seed, number)

    def _sent(self, track: Track, start: Start, number: int) -> Sent:
        key = track.name if start.adapter is track.adapter else f"{track.name}/rank-{start.r}"
        published = self._publisher.publish(key, start.adapter)
        reference = self._publisher.reference(track.name, track.stays_near(number))
        call = track.call(
            self._federation,
            number,
            published.digest,
            start.r,
            reference=reference.digest if reference else "",
            trains=start.trains,
            fresh=start.fresh,
        )
        return Sent(call, published, reference, start.trained(published.adapter))

    def _exchange(self, asked: Mapping[int, AskedNode], held: Held, done: Mapping[str, Trained]) -> Collected[Admitted]:
        def message(node: int, *, whole: bool = False) -> Message:
            return self._message(asked[node], done[asked[node].track.name], whole=whole)

        def read(node: int, reply: Message) -> Admitted:
            one = asked[node]
            update, metrics = read_update(reply.content, one.sent.trained)
            change = check(update, one.member.offer, one.sent.call, one.sent.trained)
            # Not before: what is no update would use up the federation's budget, and one node could end it.
            done[one.track.name].bytes_received += payload_bytes(reply.content)
            self._publisher.holds(node, one.sent.published.digest, one.sent.call.reference)
            held.put(node, update)
            return Admitted(change, metrics, update.manifest.num_examples)

        def again(node: int, reason: str) -> Message | None:
            return message(node, whole=True) if reason == StartMissingError.code else None

        return collect(
            self._grid,
            {node: message(node) for node in asked},
            read,
            seconds=self._rounds.timeout_seconds,
            enough=lambda results: self._enough(asked, results),
            array_bytes=lambda node: most_bytes(asked[node].member.offer, asked[node].sent.call),
            again=again,
        )

    def _message(self, one: AskedNode, done: Trained, *, whole: bool = False) -> Message:
        """What a node is asked to train, in the smallest form that it can read."""
        sent, node = one.sent, one.member.node
        records = self._publisher.records(sent.call, sent.published, node, reference=sent.reference, whole=whole)
        done.bytes_sent += payload_bytes(records)
        return Message(records, dst_node_id=node, message_type=MessageType.TRAIN)

    def _enough(self, asked: Mapping[int, AskedNode], results: Iterable[int]) -> bool:
        """Whether every track has the updates of a whole cohort; without a cohort everyone is waited for."""
        if self._rounds.cohort is None:
            return False
        counts: dict[str, int] = {one.track.name: 0 for one in asked.values()}
        for node in results:
            counts[asked[node].track.name] += 1
        return all(count >= self._rounds.cohort for count in counts.values())

    @staticmethod
    def _note(own: Mapping[int, AskedNode], heard: Collected[Admitted], done: Trained) -> dict[int, str]:
        """Tells a track's story of who has not answered as they should; names by node."""
        names = {node: one.member.name for node, one in own.items()}
        done.refused |= {names[node]: reason for node, reason in sorted(heard.refused.items()) if node in own}
        done.silent |= {names[node]: reason for node, reason in sorted(heard.silent.items()) if node in own}
        done.dropped = sorted(names[node] for node in heard.dropped if node in own)
        return names

    def _merge(
        self, track: Track, asked: Mapping[int, AskedNode], heard: Collected[Admitted], held: Held, done: Trained
    ) -> None:
        own = {node: one for node, one in asked.items() if one.track is track}
        names = self._note(own, heard, done)
        admitted = {node: one for node, one in heard.results.items() if node in own}
        outliers = self._standing.outliers({node: one.change.norm for node, one in admitted.items()})
        outliers = self._standing.cancelling({node: one.change.apart for node, one in admitted.items()}) | outliers
        done.refused |= {names[node]: reason for node, reason in sorted(outliers.items())}
        usable = sorted(admitted.keys() - outliers.keys(), key=lambda node: names[node])
        done.accepted = {names[node]: _with_count(admitted[node]) for node in usable}
        done.norms = {names[node]: admitted[node].change.norm for node in usable}
        if len(usable) < self._rounds.minimum_nodes:
            return
        track.rule.begin(track.adapter)
        counted = weights({node: admitted[node].num_examples for node in usable})
        kept = []
        for node in usable:
            update = _counting(held.take(node), counted[node])
            track.rule.add(update, own[node].sent.trained, names[node])
            if self._rounds.cluster:
                kept.append((update, own[node].sent.trained))
        done.adapter, done.report = track.rule.finalise()
        if self._rounds.cluster and (parts := bipartition(gram(kept), [counted[node] for node in usable])):
            left, right = (frozenset(names[usable[at]] for at in part) for part in parts)
            done.split = (left, right)


def start_of(track: Track, r: int, number: int) -> Start:
    """What the rule sends; a change of whole weights is compressed by itself, or it would share its rank with what was sent."""
    start = track.rule.start(track.adapter, r, number)
    return replace(start, fresh=True) if track.plan(number).method in COMPRESSED else start


def _with_count(admitted: Admitted) -> dict[str, float]:
    return {**admitted.metrics, "num-examples": admitted.num_examples}


def _counting(update: Update, num_examples: int) -> Update:
    """The update with the weight that it is given, which may be less than it claims."""
    return replace(update, manifest=update.manifest.model_copy(update={"num_examples": num_examples}))


def described(track: Track, number: int, base_digest: str, federation: str, adapter: Adapter, report: MergeReport) -> Manifest:
    """The manifest of a track's next adapter."""
    return Manifest(
        base_digest=base_digest,
        kind="global",
        r=max(adapter.ranks().values(), default=0),
        federation=federation,
        round=number,
        parent=track.adapter.digest() if track.adapter.factors or track.adapter.dense else "",
        num_examples=report.num_examples,
        embeddings=track.reference.embeddings if track.reference else (),
    )
