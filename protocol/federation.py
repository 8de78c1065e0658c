"""What a coordinator publishes: the plans that it wishes, how the rounds run, how updates are merged and when it is over."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from protocol.at_rest_settings import AtRestSettings
from protocol.codec import WireFormat
from protocol.plan import COMPRESSED, LOW_RANK, REFERRING, Objective, Plan, alike
from protocol.privacy_settings import NOT_SUMMED, PrivacySettings, SecureSumSettings
from protocol.secure_sum.terms import FEWEST_NODES
from protocol.strict import Name, Strict, changed
from protocol.trust_settings import TrustSettings

RuleName = Literal[
    "product-delta",
    "fedavg",
    "hetlora",
    "flora",
    "flexlora",
    "ffa",
    "rolora",
    "fedex",
    "fedsa",
    "fedadam",
    "fedyogi",
    "norm-clipping",
    "agreement",
    "krum",
    "multi-krum",
    "geometric-median",
    "trimmed-mean",
    "median",
]


# Far above any federation; a schedule holds a plan for each round, and counts of nodes are multiplied.
MOST_ROUNDS, MOST_NODES = 100_000, 1_000_000
# What nodes measure of each objective (docs/configuration.md), which of it is better when it is less, and the best there is.
MEASURED: Mapping[Objective, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "accuracy"),
    "pretraining": ("loss", "perplexity"),
    "distillation": ("loss", "perplexity", "accuracy"),
    "classification": ("loss", "accuracy", "macro-f1"),
    "regression": ("mse", "mae", "pearson"),
    "dpo": ("loss", "reward-accuracy", "reward-margin"),
    "kto": ("loss", "reward-desirable", "reward-undesirable"),
    "reward": ("loss", "accuracy"),
    "rl": ("reward", "kl"),
}
LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae", "kl", "reward-undesirable")
_BEST = {"perplexity": 1, **dict.fromkeys(("loss", "mse", "mae"), 0)}
_BEST |= dict.fromkeys(("accuracy", "macro-f1", "reward-accuracy", "pearson"), 1)
# A folder of that name holds the adapter.
AdapterName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class AggregationSettings(Strict):
    """How updates become the next global adapter; a rule's own settings are refused beside another rule."""

    rule: RuleName = Field(
        "product-delta",
        description="one of server/aggregation, each named after its paper; under privacy fedavg, but beside start",
    )
    rank_cap: PositiveInt = Field(64, le=16384, description="largest rank of the global adapter")
    server_learning_rate: PositiveFloat | None = Field(
        None, le=1000, description="factor on the merged change, 1; fedadam, fedyogi: length of a step per number, 0.01"
    )
    server_momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is taken again (FedAvgM)")
    beta_1: float | None = Field(None, ge=0, lt=1, description="fedadam, fedyogi: first moment; 0.9")
    beta_2: float | None = Field(None, ge=0, lt=1, description="fedadam, fedyogi: second moment; 0.99")
    tau: PositiveFloat | None = Field(None, le=1000, description="fedadam, fedyogi: adaptivity, added to the root; 1e-3")
    attackers: PositiveInt | None = Field(
        None, le=MOST_NODES, description="krum, multi-krum, trimmed-mean: how many nodes may lie; a third of them"
    )


class RoundSettings(Strict):
    """How many rounds, with whom, how long to wait and in what form numbers travel."""

    count: PositiveInt = Field(5, le=MOST_ROUNDS, description="rounds; with stages, theirs are counted instead")
    minimum_nodes: PositiveInt = Field(
        1, le=MOST_NODES, description="quorum: a round with fewer usable updates changes nothing"
    )
    retries: NonNegativeInt = Field(
        2, le=MOST_ROUNDS, description="how often a round without quorum is tried again before the run gives up"
    )
    cohort: PositiveInt | None = Field(
        None, le=MOST_NODES, description="nodes whose updates a round takes, drawn anew each round; all"
    )
    over_selection: NonNegativeFloat = Field(
        0.0, le=10, description="share of the cohort asked beyond it; the last are dropped"
    )
    timeout_seconds: PositiveFloat = Field(3600.0, description="deadline: longest wait for the replies of one round")
    join_seconds: PositiveFloat = Field(600.0, description="longest wait for minimum_nodes to connect")
    failures_allowed: PositiveInt = Field(
        3, le=MOST_ROUNDS, description="quarantined replies in a row after which a node is left out"
    )
    pause_rounds: PositiveInt = Field(5, le=MOST_ROUNDS, description="rounds that it is left out for")
    wire: WireFormat = Field("fp32", description="numbers of an update on the wire")
    wire_down: WireFormat = Field("fp32", description="numbers of the global adapter on the wire")
    evaluate_every: NonNegativeInt = Field(1, description="rounds between evaluations through the nodes; 0 = only at the end")
    evaluators: PositiveInt | None = Field(
        None, le=MOST_NODES, description="nodes that measure the global adapter, drawn anew each time; all"
    )
    tensorboard: bool = Field(False, description="also write the figures of each round for TensorBoard")
    cluster: bool = Field(False, description="split the nodes where their updates disagree, each part with its own adapter")
    seed: int = Field(0, ge=0, lt=2**32, description="draws the cohorts and what a rule draws")


class StopSettings(Strict):
    """When a run ends before its last round."""

    metric: Name | None = Field(None, description="what nodes measure of a plan's objective: loss, accuracy, macro-f1 …")
    target: float | None = Field(None, description="the run ends when more than half of the nodes have reached it")
    seconds: PositiveFloat | None = Field(None, description="wall-clock budget over all rounds")
    traffic_bytes: PositiveInt | None = Field(None, description="budget of adapter bytes, both ways, all nodes")

    @model_validator(mode="after")
    def _both(self) -> "StopSettings":
        if (self.metric is None) != (self.target is None):
            raise ValueError("metric and target belong together; give both or neither")
        return self


class Stage(Strict):
    """A part of the schedule with a plan of its own; the next stage goes on from its adapter."""

    name: Name
    rounds: PositiveInt = Field(le=MOST_ROUNDS)
    plan: Plan


class Federation(Strict):
    """One federation, as its coordinator writes it."""

    name: Name = "federation"
    plan: Plan = Plan()
    rounds: RoundSettings = RoundSettings()
    aggregation: AggregationSettings = AggregationSettings()
    secure_sum: SecureSumSettings = SecureSumSettings()
    privacy: PrivacySettings = PrivacySettings()
    trust: TrustSettings = TrustSettings()
    at_rest: AtRestSettings = AtRestSettings()
    stages: tuple[Stage, ...] = Field((), description="plans one after the other, in place of plan and rounds.count")
    adapters: dict[AdapterName, Plan] = Field(
        {}, description="several adapters, each over the nodes that name it; in place of plan"
    )
    stop: StopSettings = StopSettings()
    start: Path | None = Field(None, description="adapter folder that the first round goes on from")
    output: Path = Field(Path("runs/federation"), description="folder that keeps every round")

    @model_validator(mode="after")
    def _rule_under_noise(self) -> "Federation":
        """Noise hits one sum of the lowest rank least: the best of three by ``benchmarks.private_quality``."""
        if self.privacy.enabled and not self.start and "rule" not in self.aggregation.model_fields_set:
            chosen = self.aggregation.model_copy(update={"rule": "fedavg"})
            object.__setattr__(self, "aggregation", chosen)  # a default among settings that nobody changes afterwards
        return self

    @model_validator(mode="after")
    def _without_conflicts(self) -> "Federation":
        conflicts = (
            self._plans_that_can_be_published(),
            self._one_schedule(),
            self._stages_that_go_on_from_each_other(),
            self._stop_that_can_come(),
            self._rounds_that_can_be_kept(),
            self._settings_that_fit_their_rule(),
            self._plans_that_fit_the_rule(),
            self._references_that_nodes_share(),
            self._sums_that_hide_someone(),
            self._noise_that_keeps_a_promise(),
        )
        if problems := list(chain.from_iterable(conflicts)):
            raise ValueError("\n".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_replaced(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written can be read again: no plan and no count beside what stands in their place."""
        told: dict[str, Any] = written(self)
        if self.stages or self.adapters:
            told.pop("plan", None)
        if self.stages:
            told.get("rounds", {}).pop("count", None)
        return told

    def _one_schedule(self) -> Iterator[str]:
        if self.stages and self.adapters:
            yield "stages and adapters do not go together; run one federation per stage, or one per adapter"
        for name in ("stages", "adapters"):
            if getattr(self, name) and "plan" in self.model_fields_set:
                yield f"plan: found beside {name}, which stand in its place; write one of the two"
        if self.stages and "count" in self.rounds.model_fields_set:
            yield "rounds.count: found beside stages, which count their own rounds; leave it out"

    def _stop_that_can_come(self) -> Iterator[str]:
        metric, target = self.stop.metric, self.stop.target
        if metric is None or target is None:
            return
        known = dict.fromkeys(name for _, plan in self._plans() for name in MEASURED[plan.objective])
        if metric not in known:
            yield f"stop.metric: found {metric!r}, nodes measure {', '.join(known)}; name one of them"
        best = _BEST.get(metric)
        if best is not None and (target < best if metric in LOWER_IS_BETTER else target > best):
            yield f"stop.target: found {target:g}, and {metric} is never better than {best}; name what it can reach"
        if not self.rounds.evaluate_every:
            yield (
                "stop.metric: rounds.evaluate_every is 0, so it is measured when every round is done; let nodes measure every "
                "few rounds"
            )

    def _plans_that_can_be_published(self) -> Iterator[str]:
        for where, plan in self._plans():
            if plan.without_rows() != plan:
                yield (
                    f"{where} names files; each node brings its own data, so leave out data.train, evaluate, tasks, replay, "
                    "and forgetting.probe"
                )
            if plan.objective == "classification" and plan.data.labels is None:
                yield f"{where}.data.labels is missing; nodes must agree on every label and its row in the head"
        if self.start and self.adapters:
            yield "start is one adapter, and adapters are several; leave one of the two out"

    def _stages_that_go_on_from_each_other(self) -> Iterator[str]:
        first, *others = [stage.plan for stage in self.stages] or [self.plan]
        for number, plan in enumerate(others, 2):
            for key, found, before in (
                ("base_model", plan.base_model, first.base_model),
                ("lora.target_modules", plan.lora.target_modules, first.lora.target_modules),
            ):
                if found != before:
                    yield (
                        f"stages: number {number} has {key} {found}, and the first, whose adapter it goes on from, {before}; "
                        "take the same, or run it as a federation of its own"
                    )
            if plan.lora.r > first.lora.r:
                yield (
                    f"stages: number {number} has rank {plan.lora.r}, more than the first's {first.lora.r}, and nodes offer "
                    "their rank once; give the first stage the largest rank"
                )
            heads = [(each.objective, each.data.labels) if each.task_type == "SEQ_CLS" else None for each in (first, plan)]
            if heads[0] != heads[1]:
                yield (
                    f"stages: number {number} is {plan.objective} and the first {first.objective}, whose adapters differ by a "
                    "head; run it as a federation of its own"
                )
            if plan.method not in alike(first.method):
                yield (
                    f"stages: number {number} has method {plan.method}, whose adapter is of another kind than the first's; "
                    f"take {' or '.join(alike(first.method))}"
                )

    def _rounds_that_can_be_kept(self) -> Iterator[str]:
        for key, path in (("start", self.start), ("output", self.output)):
            if "\0" in str(path):
                yield f"{key}: found a NUL character, which no path holds; write the path without it"
        if (total := sum(stage.rounds for stage in self.stages)) > MOST_ROUNDS:
            yield f"stages: found {total} rounds, expected at most {MOST_ROUNDS}"
        if self.rounds.cohort and self.rounds.cohort < self.rounds.minimum_nodes:
            yield (
                f"rounds.cohort: {self.rounds.cohort} updates a round are fewer than rounds.minimum_nodes, "
                f"{self.rounds.minimum_nodes}; raise the one, or lower the other"
            )

    def _settings_that_fit_their_rule(self) -> Iterator[str]:
        chosen = self.aggregation
        for key, rules in ((key, rules) for keys, rules in _ONLY_FOR.items() for key in keys):
            if getattr(chosen, key) and chosen.rule not in rules:
                nearest = "product-delta" if "product-delta" in rules else rules[0]
                yield f"aggregation.{key} is not for rule {chosen.rule}; leave it out, or take rule {nearest}"
        fewest = _fewest(chosen.rule, chosen.attackers or 0)
        if chosen.attackers and chosen.rule in _AGAINST_ATTACKERS and self.rounds.minimum_nodes < fewest:
            yield (
                f"aggregation.attackers: {chosen.rule} needs {fewest} updates against {chosen.attackers} attacker(s), "
                f"rounds.minimum_nodes is {self.rounds.minimum_nodes}; raise it, or expect fewer attackers"
            )
        if chosen.rule in WITHOUT_STEP and chosen.server_learning_rate not in (None, 1):
            yield (
                f"aggregation.server_learning_rate: found {chosen.server_learning_rate:g}, but {chosen.rule} replaces the "
                "adapter and takes no step; leave it out, or take rule product-delta"
            )
        if self.rounds.cluster and chosen.rule not in _COMPARABLE:
            yield f"rounds.cluster compares products, which {chosen.rule} does not keep; take rule product-delta"
        if self.start and chosen.rule in _DRAWN:
            yield f"start: {chosen.rule} draws a start of its own; leave it out, or take rule product-delta"

    def _plans_that_fit_the_rule(self) -> Iterator[str]:
        chosen = self.aggregation
        for where, plan in self._plans():
            if plan.method == "adalora" and chosen.rule in _DRAWN:
                yield (
                    f"{where}.method: {chosen.rule} merges A and B apart, and adalora shares their directions out anew in each "
                    "round; take rule product-delta"
                )
            if plan.update_rank > plan.lora.r and chosen.rule in _DRAWN:
                yield (
                    f"{where}.lora.init_lora_weights: {plan.lora.init_lora_weights} begins with a part of the base, and "
                    f"{chosen.rule} with a start of its own; leave it out, or take rule product-delta"
                )
            if plan.method not in LOW_RANK and chosen.rule in (_DRAWN_FACTORS if plan.method in COMPRESSED else _OF_FACTORS):
                yield (
                    f"{where}.method: {chosen.rule} merges factors that nodes train, and {plan.method} trains none; "
                    "take rule product-delta"
                )
            if plan.head.local and chosen.rule in ("flora", "fedex"):
                yield (
                    f"{where}.head.local: {chosen.rule} moves every node's change into the shared base, for which a head that "
                    "stays at its node was not trained; take rule product-delta"
                )

    def _references_that_nodes_share(self) -> Iterator[str]:
        later = self._plans()[1:] if self.stages and self.aggregation.rule == "fedsa" else []
        if found := [(where, plan.objective) for where, plan in later if plan.objective in REFERRING]:
            yield (
                f"{found[0][0]}.objective: {found[0][1]} stays near the model before its stage, of which fedsa lets nodes keep "
                "and train a part of their own; take rule product-delta"
            )

    def _sums_that_hide_someone(self) -> Iterator[str]:
        settings, rounds, rule = self.secure_sum, self.rounds, self.aggregation.rule
        if not settings.enabled:
            if said := changed(settings, *type(settings).model_fields):
                yield f"secure_sum.{said[0]}: secure_sum.enabled is false, so nobody looks at it; set that, or leave this out"
            return
        if why := NOT_SUMMED.get(rule):
            yield f"secure_sum: {rule} {why}, and only their sum is there; take rule product-delta"
        if rounds.minimum_nodes < FEWEST_NODES:
            yield (
                f"rounds.minimum_nodes: found {rounds.minimum_nodes}, and of fewer than {FEWEST_NODES} a secure sum hides "
                f"nobody; raise it to {FEWEST_NODES} or more"
            )
        if rounds.cluster:
            yield "rounds.cluster compares single updates, and of a secure sum only the sum is there; leave one of the two out"
        if rounds.wire != "fp32":
            yield f"rounds.wire: found {rounds.wire}, but in a secure sum all numbers travel as 32-bit words; leave it out"
        if settings.neighbours % 2:
            yield f"secure_sum.neighbours: found {settings.neighbours}, expected an even number, half of them on either side"
        for where, plan in self._plans():
            if settings.examples is None and plan.training.max_steps is None and not self.privacy.enabled:
                yield (
                    f"secure_sum.examples: missing, and {where} counts epochs, so that only a node knows its rows; say how "
                    "many weigh as much as an update may"
                )
                break

    def _noise_that_keeps_a_promise(self) -> Iterator[str]:
        settings = self.privacy
        if not settings.enabled:
            if said := changed(settings, *type(settings).model_fields):
                yield f"privacy.{said[0]}: privacy.enabled is false, so nobody looks at it; set that, or leave this out"
            return
        problems = [*self._privacy_of_sums(), *self._privacy_of_cohorts(), *self._privacy_of_starts()]
        if settings.epsilon is None:
            problems.append("privacy.epsilon: missing; say what all rounds together may cost")
        yield from problems or self._privacy_within_the_budget()

    def _privacy_of_sums(self) -> Iterator[str]:
        settings, secure, rule = self.privacy, self.secure_sum, self.aggregation.rule
        if why := NOT_SUMMED.get(rule):
            yield f"privacy: {rule} {why.split('; in a secure sum')[0]}, and noise hides in a sum alone; take product-delta"
        if settings.noise == "nodes" and not secure.enabled:
            yield (
                "privacy.noise: found nodes without secure_sum.enabled; one node's share of the noise hides no update that the "
                "coordinator sees; set that, or take noise: coordinator"
            )
        if settings.colluders and settings.noise != "nodes":
            yield "privacy.colluders: found beside the coordinator's noise, which no node knows; leave it out"
        stay = max(FEWEST_NODES, ceil(secure.share * self.rounds.minimum_nodes - 1e-9))
        if settings.noise == "nodes" and settings.colluders >= stay:
            yield (
                f"privacy.colluders: found {settings.colluders}, and of {self.rounds.minimum_nodes} nodes {stay} make a sum; "
                "the others' noise is all there is; name fewer"
            )
        for key, instead in (("limit", "clipping_norm"), ("width", "width")):
            if secure.enabled and changed(secure, key):
                yield f"secure_sum.{key}: found beside privacy, where privacy.{instead} says it; leave it out"
        if secure.enabled and secure.examples:
            yield "secure_sum.examples: found beside privacy, where all nodes weigh one; leave it out"
        if settings.width and NOT_SUMMED.get(rule) is None and rule != "product-delta":
            yield f"privacy.width: {rule} adds tensors up, which have no other width than theirs; leave it out"
        for key in ("quantile_rate", "bit_noise"):
            if settings.quantile is None and changed(settings, key):
                yield f"privacy.{key}: found without privacy.quantile, so that the norm stays; name that, or leave it out"

    def _privacy_of_cohorts(self) -> Iterator[str]:
        settings, rounds = self.privacy, self.rounds
        if self.adapters:
            yield "adapters: several beside privacy, and a node that changes over spends twice; run one federation for each"
        if rounds.cluster:
            yield "rounds.cluster compares single updates, which no noise hides; leave one of the two out"
        if rounds.over_selection:
            yield "rounds.over_selection: who is late is left out, which may depend on its data; with privacy leave it out"
        if self.stop.metric:
            yield "stop.metric: what nodes measure has no noise, and when a run ends would tell of it; leave one of the two out"
        if settings.nodes and settings.nodes < max(rounds.cohort or 0, rounds.minimum_nodes):
            yield (
                f"privacy.nodes: found {settings.nodes}, fewer than rounds.cohort or rounds.minimum_nodes; name how many "
                "institutions there are to choose from"
            )
        if settings.sampling == "all":
            return
        if rounds.cohort is None or settings.nodes is None:
            yield f"privacy.sampling: {settings.sampling} needs rounds.cohort and privacy.nodes: who is drawn, and of how many"
        if self.secure_sum.enabled:
            yield (
                f"privacy.sampling: {settings.sampling} beside secure_sum, whose nodes are told who else is in it; a cohort "
                "that is known protects nobody; take all"
            )

    def _privacy_of_starts(self) -> Iterator[str]:
        for where, plan in self._plans():
            if plan.task_type == "SEQ_CLS" and not plan.head.local and self.start is None:
                yield (
                    f"{where}.objective: {plan.objective} trains a head whose start nodes draw, and a change that is clipped "
                    "is counted from a start that the coordinator knows; name an adapter with a head as start beside "
                    "product-delta, or set head.local"
                )
            if plan.method not in (*LOW_RANK, *COMPRESSED) and self.start is None:
                yield (
                    f"{where}.method: {plan.method} trains tensors whose start nodes draw, and a change that is clipped is "
                    "counted from a start that the coordinator knows; name an adapter with them as start beside "
                    "product-delta, or take method lora"
                )

    def _privacy_within_the_budget(self) -> Iterator[str]:
        from protocol.privacy.planned import PlannedRounds  # heavy, and of an extra that nodes do without

        yield from PlannedRounds.of(self).problems()

    def schedules(self) -> dict[str, tuple[Plan, ...]]:
        """The plan of each round, first to last, by adapter; the only adapter of a federation without names is ``""``."""
        if self.adapters:
            return {name: (plan,) * self.rounds.count for name, plan in self.adapters.items()}
        if self.stages:
            return {"": tuple(stage.plan for stage in self.stages for _ in range(stage.rounds))}
        return {"": (self.plan,) * self.rounds.count}

    def identity(self) -> str:
        """SHA-256 over all that decides what a run computes: one that died goes on only as the same federation."""
        return hashlib.sha256(json.dumps(_decisive(self), sort_keys=True).encode()).hexdigest()

    def differing(self, other: "Federation") -> list[str]:
        """Keys by which another federation computes something else."""
        own, others = (dict(_flat(_decisive(each))) for each in (self, other))
        return sorted(key for key in own.keys() | others.keys() if own.get(key) != others.get(key))

    def stage(self, number: int) -> str:
        """Name of the stage that round ``number`` is in; empty where there are none."""
        names = [stage.name for stage in self.stages for _ in range(stage.rounds)]
        return names[number - 1] if names else ""

    def _plans(self) -> list[tuple[str, Plan]]:
        named = [(f"adapters.{name}", plan) for name, plan in self.adapters.items()]
        staged = [(f"stages.{number}.plan", stage.plan) for number, stage in enumerate(self.stages)]
        return named or staged or [("plan", self.plan)]


def without_plan(federation: Federation) -> list[str]:
    """What is missing in a file that says nothing of what is to be trained: in a program the default plan may do."""
    said = federation.model_fields_set & {"plan", "stages", "adapters"}
    return [] if said else ["plan: missing; write what nodes are to train, or stages, or adapters"]


def _decisive(federation: Federation) -> dict[str, Any]:
    kept_out: dict[str, Any] = {"output": True, "stop": True, "rounds": _PATIENCE}
    kept_out |= {"secure_sum": {"timeout_seconds"}, "privacy": {"ledger", "evaluate"}, "trust": True, "at_rest": True}
    return federation.model_dump(mode="json", exclude=kept_out)


def _flat(told: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in told.items():
        yield from _flat(value, f"{at}{key}.") if isinstance(value, dict) else [(f"{at}{key}", value)]


def _fewest(rule: RuleName, attackers: int) -> int:
    """Updates below which a rule promises nothing (Blanchard et al. 2017, Yin et al. 2018)."""
    return 2 * attackers + (1 if rule == "trimmed-mean" else 3)


# Means of what nodes hold, not of what they changed: there is no step to lengthen or shorten.
WITHOUT_STEP: tuple[RuleName, ...] = ("hetlora", "flexlora", "fedex")
# How long a coordinator waits and what it writes beside decide nothing that is computed.
_PATIENCE = {"timeout_seconds", "join_seconds", "retries", "tensorboard"}
_COMPARABLE: tuple[RuleName, ...] = ("product-delta", "norm-clipping", "agreement", "krum", "multi-krum", "geometric-median")
# Rules that draw the first start themselves.
_DRAWN: tuple[RuleName, ...] = (
    "fedavg",
    "hetlora",
    "ffa",
    "rolora",
    "fedex",
    "fedsa",
    "fedadam",
    "fedyogi",
    "trimmed-mean",
    "median",
)
# Rules that say how A and B train; the others merge named tensors as well.
_OF_FACTORS: tuple[RuleName, ...] = ("hetlora", "flexlora", "flora", "ffa", "rolora", "fedex", "fedsa")
# No start can be drawn for factors that a change of whole weights is compressed to.
_DRAWN_FACTORS: tuple[RuleName, ...] = (*_DRAWN, "flora", "flexlora")
# The ones that are told how many nodes may lie.
_AGAINST_ATTACKERS: tuple[RuleName, ...] = ("multi-krum", "krum", "trimmed-mean")
# Which of a rule's own settings belong to which rules; the first is the nearest that can.
_ONLY_FOR: dict[tuple[str, ...], tuple[RuleName, ...]] = {
    ("beta_1", "beta_2", "tau"): ("fedadam", "fedyogi"),
    ("attackers",): _AGAINST_ATTACKERS,
    ("server_momentum",): ("product-delta", "norm-clipping", "multi-krum", "geometric-median", "fedavg"),
}
