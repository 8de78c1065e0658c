"""What privacy costs in quality: the heterogeneous-ranks benchmark through a secure sum, then noise at epsilon 8, 4 and 1.

    python -m benchmarks.private_quality [--data DIR] [--seeds 0 1 2] [--resume FILE]

Excess is held-out loss over that of centralised training on the same rows, in nats, as in ``benchmarks.heterogeneous_ranks``.

**Secure sum.** Ten nodes of ranks 32 to 2, product-delta at the best rate of that benchmark; in the open, and through both
masked sums of every round with the real masks, fixed point and sketch, at the defaults.

**Differential privacy.** 800 nodes of 8 rows each, of the same domains, of which a round draws each with one chance in twenty
(Poisson); 10 rounds of 2 steps, client level, delta 1e-4, the coordinator's noise, the least multiplier that fits. Joint:
product-delta over nodes of ranks 8 to 1, sketches of one column. Alternating: rolora. Common rank: fedavg. These two train the
lowest rank, 1. ``none`` is the same clipping without noise. Rates, norms and server rates were chosen at a seed that is not
reported (``LOG.md``). The last line is JSON.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import torch

from benchmarks.cohort import RANK_CAP, Cohort, Job, Outcome, Results, Row, Size
from benchmarks.masked_sum import summed
from protocol.adapter import Adapter, Array
from protocol.errors import FederationError
from protocol.federation import AggregationSettings, Federation, RuleName
from protocol.privacy.planned import PlannedRounds
from protocol.privacy.private_sum import PrivateSum, first_vector, own_part, second_vector
from protocol.privacy.promise import Promise
from protocol.privacy_settings import SUMMED, SecureSumSettings
from protocol.secure_sum.contribution import Frame, Layout, words
from protocol.secure_sum.stages import FIRST, SECOND, Asked, Summing
from protocol.update import Update
from server.aggregation.registry import make
from server.aggregation.rule import MergeReport, Rule, Start

OPEN = Size(rounds=16, steps=5, batch_size=4)
OPEN_RATE, CENTRALISED_RATE = 3.2e-2, 2e-3  # the best of benchmarks.heterogeneous_ranks
PRIVATE = Size(rounds=10, steps=2, batch_size=4)
NODES, CHANCE, DELTA = 800, 0.05, 1e-4
RANKS = (8, 4, 2, 1)
WIDTH = 1
EPSILONS = (8.0, 4.0, 1.0)
_RUN = "0" * 32


class SecurelySummed(Rule):
    """A rule that is given nothing but the opened sums of a round.

    Args:
        rule: Merges a sum.
        kind: Its name.
    """

    def __init__(self, rule: Rule, kind: RuleName) -> None:
        self._rule, self._kind = rule, SUMMED[kind]
        self._updates: list[tuple[Update, Adapter]] = []
        self._sent = Start(Adapter(), 1)

    def initial(self, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], seed: int) -> Adapter:
        """The rule's."""
        return self._rule.initial(modules, ranks, seed)

    def start(self, current: Adapter, r: int, number: int) -> Start:
        """The rule's; the adapter that travels is one for all ranks."""
        self._sent = self._rule.start(current, r, number)
        return self._sent

    def begin(self, current: Adapter) -> None:
        """Begins the rule's round."""
        self._updates = []
        self._rule.begin(current)

    def add(self, update: Update, start: Adapter, node: str = "") -> None:  # noqa: ARG002
        """Keeps what a node would put into the sums."""
        self._updates.append((update, start))

    def merge(self, other: Self) -> None:  # noqa: ARG002
        """Sums of nodes are not merged once more here."""
        raise FederationError("a secure sum has one coordinator")

    def finalise(self) -> tuple[Adapter, MergeReport]:
        """The rule's result of the sums, as ``server.secure_round`` gives them to it."""
        settings, count = SecureSumSettings(), len(self._updates)
        asked = Asked(
            run=_RUN,
            nodes=tuple(f"node-{number:02d}" for number in range(count)),
            kind=self._kind,
            limit=settings.limit,
            examples=self._updates[0][0].manifest.num_examples,
            width=2 * RANK_CAP,
            share=settings.share,
        )
        shapes = {name: pair.shape for name, pair in self._updates[0][0].adapter.factors.items()}
        frame = Frame(asked, shapes, {}, self._sent.adapter, self._sent.trains)
        sketch, terms = frame.sketch(), frame.terms("quality", 1)
        own = [frame.innovation(update.adapter, start, {}) for update, start in self._updates]
        weights = [frame.weight(update.manifest.num_examples) for update, _ in self._updates]

        def total(phase: int, vectors: Sequence[Array]) -> Array:
            encoded = (words(terms[phase], vector) for vector in vectors)
            return summed(terms[phase], dict(zip(asked.nodes, encoded, strict=True))).total

        both = list(zip(own, weights, strict=True))
        first = total(FIRST, [sketch.first(each, weight) for each, weight in both])
        ranges, second = sketch.ranges(first), first[:1]
        if len(terms) > SECOND:
            second = total(SECOND, [sketch.second(each, ranges, weight) for each, weight in both])
        self._rule.merge_partial(frame.partial(sketch.totalled(first, ranges, second), count))
        return self._rule.finalise()


# Differential privacy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How one candidate runs.

    Attributes:
        rule: Of aggregation.
        rate: Highest learning rate of a node.
        clipping_norm: Of a whole change.
        server_learning_rate: By epsilon; less where there is more noise.
    """

    rule: RuleName
    rate: float
    clipping_norm: float
    server_learning_rate: Mapping[float, float]


_SERVER = {math.inf: 1.0, 8.0: 1.0, 4.0: 1.0, 1.0: 0.5}
CHOICES: Mapping[str, Choice] = {
    "alternating": Choice("rolora", 6.4e-2, 2.0, _SERVER),
    "common rank": Choice("fedavg", 6.4e-2, 2.0, _SERVER),
    "joint": Choice("product-delta", 3.2e-2, 1.0, _SERVER),
}


@cache
def noise_multiplier(rule: RuleName, epsilon: float) -> float:
    """The least that keeps all rounds within epsilon, by the federation's own accounting; none without an epsilon."""
    if epsilon == math.inf:
        return 0.0
    federation = Federation.model_validate(
        {
            "rounds": {"count": PRIVATE.rounds, "cohort": round(CHANCE * NODES), "minimum_nodes": 1},
            "aggregation": {"rule": rule},
            "privacy": {"enabled": True, "epsilon": epsilon, "delta": DELTA, "sampling": "poisson", "nodes": NODES},
        }
    )
    return PlannedRounds.of(federation).noise_multiplier()


class Crowd:
    """Hundreds of nodes with few rows.

    Args:
        cohort: Of ``PRIVATE``: models and rows.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort

    def rows(self, seed: int) -> list[list[Row]]:
        """Of each node, all of one domain."""
        own = PRIVATE.steps * PRIVATE.batch_size
        each = NODES // len(self._cohort.domains)
        found = []
        for domain in self._cohort.train:
            mixed = random.Random(f"crowd/{seed}").sample(domain, len(domain))
            found += [[mixed[(node * own + at) % len(mixed)] for at in range(own)] for node in range(each)]
        return found

    def centralised(self, seed: int) -> Outcome:
        """All nodes' rows, pooled: as many as all rounds look at, without noise."""
        pooled = [row for rows in self.rows(seed) for row in rows]
        random.Random(f"pooled/{seed}").shuffle(pooled)
        steps = round(PRIVATE.rounds * CHANCE * NODES * PRIVATE.steps * PRIVATE.batch_size) // PRIVATE.batch_size
        taken = [pooled[at % len(pooled)] for at in range(steps * PRIVATE.batch_size)]
        rates = [CENTRALISED_RATE * (1 - step / steps) * min(1.0, (step + 1) / (steps // 50)) for step in range(steps)]
        return self._cohort.outcome(*self._cohort.trained([Job(Start(Adapter(), RANK_CAP), taken, seed)], rates))

    def federated(self, choice: Choice, epsilon: float, seed: int) -> Outcome:
        """One federation."""
        rule = make(
            AggregationSettings(rule=choice.rule, rank_cap=RANK_CAP, server_learning_rate=choice.server_learning_rate[epsilon])
        )
        rows, z = self.rows(seed), noise_multiplier(choice.rule, epsilon)
        current = rule.initial(self._cohort.modules, RANKS, seed)
        for number in range(1, PRIVATE.rounds + 1):
            drawn = random.Random(f"{seed}/{number}")
            asked = [node for node in range(NODES) if drawn.random() < CHANCE]
            if asked:
                current = self._round(rule, current, choice, z, number, {node: rows[node] for node in asked}, seed)
        return self._cohort.outcome(current)

    def _round(
        self, rule: Rule, current: Adapter, choice: Choice, z: float, number: int, rows: Mapping[int, Sequence[Row]], seed: int
    ) -> Adapter:
        starts = {node: rule.start(current, RANKS[node % len(RANKS)], number) for node in rows}
        jobs = [Job(starts[node], own, 100_000 * seed + 1000 * number + node) for node, own in rows.items()]
        trained = self._cohort.trained(jobs, self._rates(number, choice.rate))
        any_start = jobs[0].start
        promise = Promise(
            epsilon=1.0, delta=DELTA, clipping_norm=choice.clipping_norm, noise_multiplier=z or 1.0, noise="coordinator"
        )
        asked = Summing(run=_RUN[:-4] + f"{number:04x}", kind=SUMMED[choice.rule], limit=1.0, examples=1, width=WIDTH)
        layout = Layout(asked, self._cohort.modules, {}, any_start.adapter, any_start.trains, promise)
        private = PrivateSum(layout, promise, round(CHANCE * NODES))
        own = [
            own_part(layout, promise, adapter, job.start.trained(job.start.adapter), {})
            for adapter, job in zip(trained, jobs, strict=True)
        ]

        def released(phase: int, vectors: Sequence[Array]) -> Array:
            total = private.empty(phase) + np.sum(vectors, axis=0)
            return private.released(phase, total) if z else total

        first = released(FIRST, [first_vector(layout.sketch(), promise, each) for each in own])
        ranges, second, sketch = private.ranges(first), first[:1], layout.sketch()
        if private.releases() > SECOND:
            second = released(SECOND, [second_vector(sketch, promise, each.innovation, ranges) for each in own])
        rule.begin(current)
        rule.merge_partial(private.partial(first, ranges, second, len(own)))
        return rule.finalise()[0]

    @staticmethod
    def _rates(number: int, rate: float) -> list[float]:
        steps = PRIVATE.steps
        done, total = steps * (number - 1), steps * PRIVATE.rounds
        return [rate * (1 - (done + step) / total) * (step + 1) / steps for step in range(steps)]


# What is printed ----------------------------------------------------------------------------------------------------------


def secure(data: Path, seeds: Sequence[int], results: Results) -> dict[str, float]:
    """Excess loss in the open and through secure sums, means over seeds."""
    cohort = Cohort(data, OPEN)
    settings = AggregationSettings(rule="product-delta", rank_cap=RANK_CAP)
    rules: dict[str, Callable[[], Rule]] = {
        "open": lambda: make(settings),
        "secure": lambda: SecurelySummed(make(settings), "product-delta"),
    }
    found: dict[str, list[float]] = {name: [] for name in rules}
    for seed in seeds:
        run = {"part": "secure", "seed": seed}
        base = results.of({**run, "rule": "centralised"}, lambda: cohort.centralised(CENTRALISED_RATE, seed)).loss  # noqa: B023
        for name, rule in rules.items():
            loss = results.of({**run, "rule": name}, lambda: cohort.federated(rule(), OPEN_RATE, seed)).loss  # noqa: B023
            found[name].append(loss - base)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {"lost": means["secure"] / means["open"] - 1}


def private(data: Path, seeds: Sequence[int], results: Results) -> dict[str, dict[str, float]]:
    """Mean excess loss of every candidate by epsilon."""
    crowd = Crowd(Cohort(data, PRIVATE))
    found: dict[str, dict[str, float]] = {}
    for name, choice in CHOICES.items():
        for epsilon in (math.inf, *EPSILONS):
            excess = []
            for seed in seeds:
                run = {"part": "private", "seed": seed}
                base = results.of({**run, "rule": "centralised"}, lambda: crowd.centralised(seed)).loss  # noqa: B023
                key = {**run, "epsilon": str(epsilon), **_told(choice, epsilon)}
                loss = results.of(key, lambda: crowd.federated(choice, epsilon, seed)).loss  # noqa: B023
                excess.append(loss - base)
            found.setdefault(name, {})[_named(epsilon)] = float(np.mean(excess))
    return found


def _told(choice: Choice, epsilon: float) -> dict[str, object]:
    return asdict(choice) | {"server_learning_rate": choice.server_learning_rate[epsilon]}


def _named(epsilon: float) -> str:
    return "none" if epsilon == math.inf else f"{epsilon:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--resume", type=Path, help="JSONL file that keeps what was run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results = Results(options.resume)
    sums = secure(options.data, options.seeds, results)
    print(f"excess in the open {sums['open']:.4f}, through secure sums {sums['secure']:.4f}: {100 * sums['lost']:+.2f} %")
    curve = private(options.data, options.seeds, results)
    epsilons = [_named(epsilon) for epsilon in (math.inf, *EPSILONS)]
    print(f"{'excess at epsilon':>18}" + "".join(f"{name:>18}" for name in epsilons))
    for name, row in curve.items():
        noise = [noise_multiplier(CHOICES[name].rule, epsilon) for epsilon in (math.inf, *EPSILONS)]
        print(f"{name:>18}" + "".join(f"{row[e]:9.3f} (z {z:4.2f})" for e, z in zip(epsilons, noise, strict=True)))
    best = {epsilon: min(curve, key=lambda name: curve[name][epsilon]) for epsilon in epsilons}
    print("best: " + ", ".join(f"epsilon {epsilon}: {name}" for epsilon, name in best.items()))
    print(json.dumps({"secure_sum": sums, "private": curve, "best": best}))


if __name__ == "__main__":
    main()
