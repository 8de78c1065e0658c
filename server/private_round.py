"""One round of training whose updates the coordinator sees, clips, adds up and noises before anything is made of them.

Nothing here looks at one update beside others: no outliers, no weights, no claims of rows. A cohort whose draw is to protect is
drawn from the operating system's randomness, never from the federation's published seed, and merged however many came: a round
that was drawn again until it was large enough would not be the one that was accounted for.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from protocol.errors import FederationError
from protocol.federation import Federation
from protocol.privacy.private_sum import PrivateSum, first_vector, own_part, second_vector
from protocol.privacy_settings import SUMMED
from protocol.secure_sum.contribution import Layout
from protocol.secure_sum.sketch import Vector
from protocol.secure_sum.stages import FIRST, SECOND, Summing
from server.aggregation.rule import Start
from server.exchange import Collected
from server.held import Held
from server.publishing import Publisher
from server.standing import Standing
from server.track import Member, Track
from server.training_round import Admitted, AskedNode, Sent, Trained, TrainingRound, start_of

if TYPE_CHECKING:
    from server.spending import Spending

log = logging.getLogger("flwr")


class PrivateRound(TrainingRound):
    """Rounds whose sums are noised by this coordinator.

    Args:
        grid: Reaches the nodes.
        federation: How rounds run; its ``privacy`` is enabled and ``secure_sum`` is not.
        publisher: Packs global adapters and knows who holds which.
        standing: What was learnt about nodes.
        spending: The budget.
    """

    def __init__(
        self, grid: Grid, federation: Federation, publisher: Publisher, standing: Standing, spending: "Spending"
    ) -> None:
        super().__init__(grid, federation, publisher, standing)
        self._spending = spending
        self._number = 0

    def _sent(self, track: Track, start: Start, number: int) -> Sent:
        sent = super()._sent(track, start, number)
        return replace(sent, call=sent.call.model_copy(update={"privacy": self._spending.promise()}))

    def _chosen(self, available: Mapping[str, Member], track: Track, number: int) -> list[str]:
        settings, cohort = self._spending.settings, self._rounds.cohort
        if settings.sampling == "all" or cohort is None or settings.nodes is None:
            return super()._chosen(available, track, number)
        drawn = secrets.SystemRandom()
        if settings.sampling == "poisson":
            return [name for name in sorted(available) if drawn.random() < cohort / settings.nodes]
        # A place for everybody, whether they are there or not: who is absent and drawn adds nothing.
        names = sorted(track.members)
        places = drawn.sample(range(max(settings.nodes, len(names))), cohort)
        return [names[at] for at in sorted(places) if at < len(names) and names[at] in available]

    def _carried_out(
        self, number: int, tracks: Mapping[str, Track], asked: Mapping[int, AskedNode], done: dict[str, Trained]
    ) -> Iterator[str]:
        self._number = number
        yield from super()._carried_out(number, tracks, asked, done)

    def _enough(self, asked: Mapping[int, AskedNode], results: Iterable[int]) -> bool:  # noqa: ARG002
        """Nobody who was drawn is left out for being late."""
        return False

    def _merge(
        self, track: Track, asked: Mapping[int, AskedNode], heard: Collected[Admitted], held: Held, done: Trained
    ) -> None:
        own = {node: one for node, one in asked.items() if one.track is track}
        self._note(own, heard, done)
        usable = sorted((node for node in heard.results if node in own), key=lambda node: own[node].member.name)
        done.accepted = {own[node].member.name: {} for node in usable}
        sampled = self._spending.settings.sampling != "all"
        if len(usable) < (min(1, len(own)) if sampled else self._rounds.minimum_nodes):
            return
        sums = self._sums(track, own)
        total = self._added(FIRST, sums, usable, own, held)
        self._spending.spend(self._number, sums.releases())
        first = sums.released(FIRST, total)
        ranges = sums.ranges(first)
        second = first[:1]
        if sums.releases() > SECOND:
            second = sums.released(SECOND, self._added(SECOND, sums, usable, own, held, ranges))
        track.rule.begin(track.adapter)
        track.rule.merge_partial(sums.partial(first, ranges, second, len(usable)))
        done.adapter, done.report = track.rule.finalise()
        done.privacy = self._spending.figures()
        self._spending.voted(sums.votes(first), sums.expected)

    def _sums(self, track: Track, own: Mapping[int, AskedNode]) -> PrivateSum:
        reference = track.reference
        if reference is None:
            raise FederationError("privacy: nobody has joined, so there is nothing to add up")
        sent = next((one.sent for one in own.values()), None) or self._sent(
            track, start_of(track, reference.r, self._number), self._number
        )
        promise = self._spending.promise()
        summing = Summing(
            run=secrets.token_hex(16),
            kind=SUMMED[self._federation.aggregation.rule],
            limit=1.0,
            examples=1,
            width=self._spending.width,
        )
        layout = Layout(summing, reference.modules, reference.dense, sent.published.adapter, sent.call.trains, promise)
        return PrivateSum(layout, promise, self._spending.expected(len(own)))

    def _added(
        self,
        phase: int,
        sums: PrivateSum,
        usable: Iterable[int],
        own: Mapping[int, AskedNode],
        held: Held,
        ranges: Mapping[str, Vector] | None = None,
    ) -> Vector:
        """The sum of a phase, without noise; what comes out of here goes nowhere but into ``PrivateSum.released``."""
        total, sketch = sums.empty(phase), replace(sums.layout.sketch(), kept={})
        for node in usable:
            update = held.take(node)
            part = own_part(sums.layout, sums.promise, update.adapter, own[node].sent.trained, update.rows)
            if phase == FIRST:
                total += first_vector(sketch, sums.promise, part)
                held.put(node, update)
            else:
                total += second_vector(sketch, sums.promise, part.innovation, ranges or {})
        return total
