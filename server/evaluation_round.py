"""One round of measuring: connected members, all or some, measure the global adapter on their own held-out rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from protocol.errors import StartMissingError
from protocol.federation import Federation
from protocol.records import payload_bytes, read_metrics
from server.exchange import collect
from server.publishing import Publisher
from server.track import Member, Track, draw

_EVALUATION = 2**32  # beyond the seeds that a federation may name


@dataclass
class Measured:
    """What the members of one track measured.

    Attributes:
        metrics: By node name; ``num-examples`` among them.
        refused: Reason by node name, of those that could not measure.
        bytes_sent: Of adapters, as packed on the wire.
    """

    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bytes_sent: int = 0


def evaluate(
    grid: Grid, federation: Federation, publisher: Publisher, tracks: Mapping[str, Track], number: int, connected: set[int]
) -> dict[str, Measured]:
    """Asks the members of every track at once, or as many of each as the federation says; what each track's said."""
    done = {name: Measured() for name in tracks}
    asked = {
        member.node: (track, member)
        for track in tracks.values()
        if track.manifest
        for member in _drawn(federation, track, number, connected)
    }
    published = {name: publisher.publish(name, track.adapter) for name, track in tracks.items() if track.manifest}
    near = {name: publisher.reference(name, track.stays_near(number)) for name, track in tracks.items()}
    calls = {
        name: track.call(
            federation, number, published[name].digest, track.manifest.r, reference=each.digest if (each := near[name]) else ""
        )
        for name, track in tracks.items()
        if track.manifest
    }

    def message(node: int, *, whole: bool = False) -> Message:
        track, _ = asked[node]
        records = publisher.records(calls[track.name], published[track.name], node, reference=near[track.name], whole=whole)
        done[track.name].bytes_sent += payload_bytes(records)
        return Message(records, dst_node_id=node, message_type=MessageType.EVALUATE)

    def read(node: int, reply: Message) -> dict[str, float]:
        metrics, count = read_metrics(reply.content)
        name = asked[node][0].name
        publisher.holds(node, published[name].digest, calls[name].reference)
        return metrics | {"num-examples": count}

    heard = collect(
        grid,
        {node: message(node) for node in asked},
        read,
        seconds=federation.rounds.timeout_seconds,
        again=lambda node, reason: message(node, whole=True) if reason == StartMissingError.code else None,
    )
    for node, metrics in heard.results.items():
        track, member = asked[node]
        done[track.name].metrics[member.name] = metrics
    for node, reason in (heard.refused | heard.silent).items():
        track, member = asked[node]
        done[track.name].refused[member.name] = reason
    for one in done.values():
        one.metrics, one.refused = dict(sorted(one.metrics.items())), dict(sorted(one.refused.items()))
    return done


def _drawn(federation: Federation, track: Track, number: int, connected: set[int]) -> list[Member]:
    """Who of a track's connected members measures: by another draw than that of who trains."""
    there = {name: member for name, member in track.members.items() if member.node in connected}
    rounds = federation.rounds
    return [there[name] for name in draw(there, rounds.evaluators, rounds.seed + _EVALUATION, number)]
