"""One round of training in which the coordinator adds up what it cannot read: two masked sums, and the rule merges their total.

Stages and what they carry: ``protocol.secure_sum.stages``. Each has a deadline of its own, and whoever lets it pass is left out
from there on, as ``protocol.secure_sum.coordinator`` says. Below the threshold the round ends without a merge, nothing of it is
known, and the round loop tries again.

A sum less the same sum without one node is that node. So where somebody of the first sum has no vector in the second, or in
another attempt at the round, as many others are left out of that as it takes to hide them among each other; where too few would
stay, it is given up. Nodes hold the coordinator to it (``client.secure_sum``).

Under differential privacy the sums hold the nodes' noise already, or get the coordinator's before anything is made of them;
what they cost is written before the first of them is opened.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from protocol.adapter import Array
from protocol.enrolment import Enrolled
from protocol.errors import MessageError, SecureSumError, StartMissingError
from protocol.federation import Federation
from protocol.privacy.private_sum import PrivateSum
from protocol.privacy_settings import SUMMED
from protocol.records import payload_bytes, read_stage, read_vector, stage_records
from protocol.secure_sum.contribution import Frame
from protocol.secure_sum.coordinator import Coordinator
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.messages import Advert
from protocol.secure_sum.sketch import Sketch
from protocol.secure_sum.stages import (
    FIRST,
    MOST_SUMMED,
    SECOND,
    Adverts,
    Asked,
    Confirm,
    Confirmation,
    Mask,
    Next,
    Open,
    Opened,
    Share,
    Shares,
    ToldAdvert,
)
from protocol.secure_sum.terms import FEWEST_NODES
from server.admission import most_examples
from server.aggregation.rule import Start
from server.exchange import Collected, collect
from server.publishing import Publisher
from server.standing import Standing
from server.track import Track
from server.training_round import AskedNode, Sent, Trained, TrainingRound

if TYPE_CHECKING:
    from server.spending import Spending

log = logging.getLogger("flwr")
T = TypeVar("T")
_GO_ON = f"{MessageType.TRAIN}.secure_sum"
_BESIDE_A_VECTOR = 4096  # header, name and shape


class SecureRound(TrainingRound):
    """Rounds whose updates are only added up.

    Args:
        grid: Reaches the nodes.
        federation: How rounds run; its ``secure_sum`` is enabled.
        publisher: Packs global adapters and knows who holds which.
        standing: What was learnt about nodes; of single updates there is nothing to learn.
        enrolled: Public keys by node name; nobody else is asked.
        spending: The privacy budget, where sums are noised.
    """

    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        publisher: Publisher,
        standing: Standing,
        enrolled: Enrolled,
        spending: "Spending | None" = None,
    ) -> None:
        super().__init__(grid, federation, publisher, standing)
        self._spending = spending
        self._enrolled = enrolled
        # Of the last round: who spoiled an attempt, and whose updates were in a sum that was opened, by track.
        self._spoiled: dict[str, tuple[int, str]] = {}
        self._opened: dict[str, tuple[int, frozenset[str]]] = {}

    def _barred(self, name: str, number: int) -> str | None:
        if name not in self._enrolled:
            return "its name is not enrolled (trust.enrolled)"
        spoiled, reason = self._spoiled.get(name, (0, ""))
        return f"spoiled an attempt at this round: {reason}" if spoiled == number else super()._barred(name, number)

    def _sent(self, track: Track, start: Start, number: int) -> Sent:
        sent = super()._sent(track, start, number)
        promise = self._spending and self._spending.promise()
        return replace(sent, call=sent.call.model_copy(update={"privacy": promise}))

    def _carried_out(
        self, number: int, tracks: Mapping[str, Track], asked: Mapping[int, AskedNode], done: dict[str, Trained]
    ) -> Iterator[str]:
        for name, track in tracks.items():
            own = {node: one for node, one in asked.items() if one.track is track}
            if own:
                self._track(number, track, own, done[name])
            yield name

    def _track(self, number: int, track: Track, asked: Mapping[int, AskedNode], done: Trained) -> None:
        """One attempt at the sums of one track."""
        try:
            attempt = self._attempt(number, track, asked, done)
            try:
                partial = attempt.run()
            finally:
                if attempt.opened:
                    self._opened[track.name] = (number, attempt.added)
            if len(attempt.added) < self._rounds.minimum_nodes:
                raise SecureSumError(f"secure sum: {len(attempt.added)} updates, {self._rounds.minimum_nodes} are needed")
            track.rule.begin(track.adapter)
            track.rule.merge_partial(partial)
            done.adapter, done.report = track.rule.finalise()
            if self._spending and attempt.private:
                done.privacy = self._spending.figures()
                self._spending.voted(attempt.votes, attempt.private.expected)
        except SecureSumError as error:
            done.given_up = str(error)
            log.warning("round %d%s: %s", number, f" of {track.name}" if track.name else "", error)
            self._spoiled |= {name: (number, reason) for name, reason in done.refused.items()}
        else:
            done.accepted = {name: {} for name in sorted(attempt.added)}
            # Whoever fell silent after its vector is in the sum.
            done.silent = {name: reason for name, reason in done.silent.items() if name not in attempt.added}

    def _attempt(self, number: int, track: Track, asked: Mapping[int, AskedNode], done: Trained) -> "_Attempt":
        settings, reference = self._federation.secure_sum, track.reference
        names = tuple(sorted(one.member.name for one in asked.values()))
        if reference is None or not FEWEST_NODES <= len(names) <= MOST_SUMMED:
            raise SecureSumError(f"secure sum: {len(names)} nodes can be asked, expected {FEWEST_NODES} to {MOST_SUMMED}")
        some = next(iter(asked.values())).sent  # the adapter and what of it trains are the same for all ranks
        terms = Asked(
            run=secrets.token_hex(16),
            nodes=names,
            call=some.call.alike(),
            kind=SUMMED[self._federation.aggregation.rule],
            limit=settings.limit,
            examples=1 if self._spending else settings.examples or most_examples(some.call),
            width=self._spending.width if self._spending else settings.width or 2 * self._federation.aggregation.rank_cap,
            neighbours=settings.neighbours,
            share=settings.share,
        )
        promise = some.call.privacy
        frame = Frame(terms, reference.modules, reference.dense, some.published.adapter, some.call.trains, promise)
        told = {
            one.member.name: replace(one, sent=replace(one.sent, call=one.sent.call.model_copy(update={"secure_sum": terms})))
            for one in asked.values()
        }
        sums = tuple(Coordinator(each, self._enrolled) for each in frame.terms(self._federation.name, number))
        opened, before = self._opened.get(track.name, (0, frozenset()))
        known = before if opened == number else frozenset()
        attempt = _Attempt(self._grid, self._federation, frame, sums, told, done, self._message, self._publisher, known)
        if (spending := self._spending) and promise:
            step = 1 / sums[FIRST].terms.fixed_point.scale
            attempt.private = PrivateSum(frame, promise, spending.expected(len(names)), step)
            attempt.spend = lambda: spending.spend(number, len(sums))
        return attempt


@dataclass
class _Attempt:
    """One attempt at the sums of one track in one round.

    Attributes:
        grid, federation: As for the round.
        frame: What everybody in the sums knows.
        sums: The coordinator's half of each.
        asked: By name.
        done: Is told who is refused or silent, and what travelled.
        message: Makes the first question.
        publisher: Is told who holds the adapter.
        before: Whose updates were in a sum of this round that nodes have opened already; empty if there was none.
        added: Whose updates are in the first sum.
        opened: Nodes were asked to open it.
        private, spend: What is noised, and what writes its cost, where privacy is promised.
        votes: Their sum, noised, where nodes vote.
    """

    grid: Grid
    federation: Federation
    frame: Frame
    sums: tuple[Coordinator, ...]
    asked: Mapping[str, AskedNode]
    done: Trained
    message: Callable[..., Message]
    publisher: Publisher
    before: frozenset[str]
    added: frozenset[str] = frozenset()
    opened: bool = False
    private: PrivateSum | None = None
    spend: Callable[[], None] = lambda: None
    votes: float = 0.0

    def run(self) -> dict[str, Array]:
        """The total, as the rule's ``merge_partial`` takes it.

        Raises:
            SecureSumError: There is none; nothing of it is known.
        """
        try:
            return self._run()
        finally:
            for each in self.sums:
                self.done.refused |= each.refused

    def _run(self) -> dict[str, Array]:
        sketch = self.frame.sketch()
        adverts = self._advertised()
        boxes = self._shared(adverts)
        self._masked(FIRST, boxes[FIRST], self.before)
        self.added = self.sums[FIRST].survivors()
        if self.private:
            return self._run_privately(self.private, boxes)
        first = self._opened(FIRST)
        ranges = sketch.ranges(first)
        second = self._second(boxes, ranges) if len(self.sums) > SECOND else first[:1]
        return self.frame.partial(sketch.totalled(first, ranges, second), len(self.added))

    def _run_privately(self, private: PrivateSum, boxes: list[dict[str, dict[str, bytes]]]) -> dict[str, Array]:
        if len(self.added) < self.federation.rounds.minimum_nodes:  # before it costs anything
            raise SecureSumError(f"secure sum: {len(self.added)} updates, {self.federation.rounds.minimum_nodes} are needed")
        self.spend()
        opened = self._opened(FIRST)
        # Each weighs one, to the rounding of every node.
        if not abs(opened[0] - len(self.added)) <= private.step * len(self.added):
            raise SecureSumError(
                f"secure sum: {len(self.added)} updates weigh {opened[0]:.6g}, expected 1 each; somebody's did not, and whose, "
                "a sum does not tell"
            )
        first = private.released(FIRST, opened)
        self.votes = private.votes(first)
        ranges = private.ranges(first)
        second = first[:1]
        if len(self.sums) > SECOND:
            second = private.released(SECOND, self._second(boxes, ranges))
        deviation = None
        if private.promise.noise == "nodes":
            deviation = max(private.promise.spread(each.terms, len(each.survivors())) for each in self.sums)
        return private.partial(first, ranges, second, len(self.added), deviation)

    def _second(self, boxes: list[dict[str, dict[str, bytes]]], ranges: Mapping[str, Array]) -> NDArray[np.float64]:
        stayed = {name: box for name, box in boxes[SECOND].items() if name in self.added}
        self._masked(SECOND, stayed, self.added, ranges)
        return self._opened(SECOND, Sketch.digest(ranges))

    # Stages ---------------------------------------------------------------------------------------------------------------

    def _advertised(self) -> list[dict[str, Advert]]:
        def read(name: str, reply: Message) -> tuple[Advert, ...]:
            told = read_stage(reply.content, Adverts).adverts
            if len(told) != len(self.sums):
                raise MessageError(f"adverts: found those of {len(told)} sums, expected {len(self.sums)}")
            adverts = tuple(each.advert() for each in told)
            for coordinator, advert in zip(self.sums, adverts, strict=True):
                if reason := coordinator.unusable(name, advert):
                    raise MessageError(reason)
            sent = self.asked[name].sent
            self.publisher.holds(self.asked[name].member.node, sent.published.digest, sent.call.reference)
            return adverts

        rounds = self.federation.rounds
        # Of those beyond the cohort so many are waited for that the sum can begin.
        enough = None if rounds.cohort is None else max(rounds.cohort, self.sums[FIRST].terms.fewest())
        nodes = {one.member.node: one for one in self.asked.values()}
        heard = collect(
            self.grid,
            {node: self.message(one, self.done) for node, one in nodes.items()},
            lambda node, reply: read(nodes[node].member.name, reply),
            seconds=rounds.timeout_seconds,
            enough=lambda results: enough is not None and len(results) >= enough,
            again=lambda node, reason: (
                self.message(nodes[node], self.done, whole=True) if reason == StartMissingError.code else None
            ),
        )
        self.done.dropped = sorted(nodes[node].member.name for node in heard.dropped)
        found = self._noted(heard)
        return [
            each.advertised({name: adverts[phase] for name, adverts in found.items()}) for phase, each in enumerate(self.sums)
        ]

    def _shared(self, adverts: list[dict[str, Advert]]) -> list[dict[str, dict[str, bytes]]]:
        def read(name: str, reply: Message) -> tuple[dict[str, bytes], ...]:
            sealed = read_stage(reply.content, Shares).sealed
            if len(sealed) != len(self.sums) or not all(
                each.is_whole(name, shares) for each, shares in zip(self.sums, sealed, strict=True)
            ):
                raise MessageError("shares for others than its holders, or not of every sum")
            return sealed

        told = tuple({name: ToldAdvert.of(advert) for name, advert in each.items()} for each in adverts)
        question = stage_records(Next(question=Share(federation=self.federation.name, run=self.frame.asked.run, adverts=told)))
        found = self._ask(dict.fromkeys(adverts[FIRST], question), read)
        return [each.routed({name: sealed[phase] for name, sealed in found.items()}) for phase, each in enumerate(self.sums)]

    def _masked(
        self,
        phase: int,
        boxes: Mapping[str, Mapping[str, bytes]],
        before: frozenset[str],
        ranges: Mapping[str, Array] | None = None,
    ) -> None:
        """Adds up vectors of as many as came, but for those that must hide who is missing from the sum ``before``."""
        coordinator, spare = self.sums[phase], dict[str, Words]()

        def read(name: str, reply: Message) -> None:
            vector = read_vector(reply.content, coordinator.terms.length)
            self.done.bytes_received += payload_bytes(reply.content)
            if name in before and len(spare) < FEWEST_NODES - 1:
                spare[name] = vector
            else:
                coordinator.add(name, vector)

        told = {"federation": self.federation.name, "run": self.frame.asked.run, "phase": phase}
        questions = {
            name: stage_records(Next(question=Mask(shares=dict(box), **told)), ranges=ranges)
            for name, box in sorted(boxes.items())
        }
        came = self._ask(questions, read, 4 * coordinator.terms.length + _BESIDE_A_VECTOR)
        apart = len(before ^ came.keys()) if before else 0
        out = max(0, FEWEST_NODES - apart) if apart else 0
        for name, vector in list(spare.items())[out:]:
            coordinator.add(name, vector)

    def _opened(self, phase: int, told: bytes = b"") -> NDArray[np.float64]:
        coordinator = self.sums[phase]
        survivors = coordinator.survivors()
        about = {"federation": self.federation.name, "run": self.frame.asked.run, "phase": phase}
        question = stage_records(Next(question=Confirm(survivors=tuple(sorted(survivors)), **about)))
        signed = self._ask(
            dict.fromkeys(sorted(survivors), question), lambda _, reply: read_stage(reply.content, Confirmation).signature
        )
        confirmed = coordinator.confirmed(signed)
        self.opened = True
        question = stage_records(Next(question=Open(confirmations=confirmed, **about)))
        openings = self._ask(
            dict.fromkeys(sorted(confirmed), question), lambda _, reply: read_stage(reply.content, Opened).opening()
        )
        return coordinator.terms.fixed_point.decode(coordinator.total(openings, told))

    # Messages -------------------------------------------------------------------------------------------------------------

    def _ask(
        self, questions: Mapping[str, RecordDict], read: Callable[[str, Message], T], array_bytes: int = 0
    ) -> dict[str, T]:
        """What nodes answer at a stage, by name."""
        names = {self.asked[name].member.node: name for name in questions}
        messages = {node: Message(questions[name], dst_node_id=node, message_type=_GO_ON) for node, name in names.items()}
        self.done.bytes_sent += sum(payload_bytes(records) for records in questions.values())

        def said(node: int, reply: Message) -> T:
            try:
                return read(names[node], reply)
            except SecureSumError as error:
                raise MessageError(str(error)) from None

        seconds = self.federation.secure_sum.timeout_seconds
        return self._noted(collect(self.grid, messages, said, seconds=seconds, array_bytes=lambda _: array_bytes))

    def _noted(self, heard: Collected[T]) -> dict[str, T]:
        names = {one.member.node: name for name, one in self.asked.items()}
        self.done.refused |= {names[node]: reason for node, reason in sorted(heard.refused.items())}
        self.done.silent |= {names[node]: reason for node, reason in sorted(heard.silent.items())}
        return {names[node]: result for node, result in sorted(heard.results.items())}
