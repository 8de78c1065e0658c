"""One adapter on its way: the nodes that train it, what it is now, how their updates are merged into it.

A federation has one track, or one for each of its named adapters; a track splits in two where its nodes disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from protocol.adapter import Adapter
from protocol.federation import Federation
from protocol.manifest import Manifest
from protocol.plan import REFERRING, Plan
from protocol.records import Call, Offer, Trains
from server.aggregation.rule import Rule


@dataclass
class Member:
    """A node that has joined.

    Attributes:
        node: Its id.
        name: What reports call it; no other member has it.
        offer: The shape of the adapter that it can train.
    """

    node: int
    name: str
    offer: Offer


@dataclass
class Track:
    """One adapter.

    Attributes:
        root: The federation's own name of this adapter; empty where it has but one.
        name: The same, and for a part of a split which.
        plans: One per round.
        rule: Merges updates.
        members: By node name.
        reference: The offer that others are held against: the first that was accepted, also after a restart.
        adapter, manifest: After the last round.
        before: The adapter before the stage of the last round began; without anything in it the base.
        belonging: Names that belong to this part of a split, also those that are not connected now.
    """

    root: str
    name: str
    plans: tuple[Plan, ...]
    rule: Rule
    members: dict[str, Member] = field(default_factory=dict)
    reference: Offer | None = None
    adapter: Adapter = field(default_factory=Adapter)
    manifest: Manifest | None = None
    before: Adapter = field(default_factory=Adapter)
    belonging: set[str] = field(default_factory=set)

    def plan(self, number: int) -> Plan:
        """What nodes are asked to do in round ``number``; before the first round, the first plan."""
        return self.plans[max(number, 1) - 1]

    def stretch(self, number: int) -> tuple[int, int]:
        """First and last round of the stage that round ``number`` is in: plans that follow each other unchanged."""
        first = last = number
        while first > 1 and self.plan(first - 1) is self.plan(number):
            first -= 1
        while last < len(self.plans) and self.plan(last + 1) is self.plan(number):
            last += 1
        return first, last

    def begin(self, number: int, *, given: bool) -> None:
        """Remembers the adapter from which round ``number`` goes on, if a stage begins with it.

        Args:
            number: Of the round.
            given: The first round goes on from an adapter, too; what a rule draws for it is no change of the base.
        """
        if self.stretch(number)[0] == number:
            self.before = self.adapter if self.manifest or given else Adapter()

    def stays_near(self, number: int) -> Adapter | None:
        """The adapter that round ``number`` stays near; None where its objective looks at none, or at the base."""
        referring = self.plan(number).objective in REFERRING
        return self.before if referring and (self.before.factors or self.before.dense) else None

    def call(
        self,
        federation: Federation,
        number: int,
        digest: str,
        r: int,
        *,
        reference: str = "",
        trains: Trains = "both",
        fresh: bool = False,
    ) -> Call:
        """What nodes are asked in round ``number`` about this adapter.

        Args:
            federation: Says how numbers travel.
            number: Of the round.
            digest: Of the adapter as it arrives.
            r: The rank to train.
            reference: Digest of the adapter to stay near, as it arrives.
            trains: Which factor trains.
            fresh: All of the adapter is frozen and a new pair trains.
        """
        first, last = self.stretch(number)
        return Call(
            federation=federation.name,
            round=number,
            first=first,
            rounds=last,
            plan=self.plan(number),
            adapter=self.root,
            r=r,
            trains=trains,
            fresh=fresh,
            personal_b=self.rule.personal_b,
            manifest=self.manifest,
            digest=digest,
            reference=reference,
            wire=federation.rounds.wire,
            summed=federation.secure_sum.enabled,
            minimum_nodes=federation.rounds.minimum_nodes,
        )


def draw(names: Iterable[str], size: int | None, seed: int, number: int) -> list[str]:
    """The names that are asked in a round: the same for the same seed, round and names, with no state between.

    Where only some are asked their order is drawn as well, so that of nodes alike none is always the late one.
    """
    ordered = sorted(names)
    if size is None:
        return ordered
    rng = np.random.default_rng([seed, number])
    return [ordered[at] for at in rng.permutation(len(ordered))[:size]]
