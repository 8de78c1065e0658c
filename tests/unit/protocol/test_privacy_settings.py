"""Which federations can have secure sums and noise: every rule is in one of two tables; what makes no sense says why."""

from typing import get_args

import pytest
from pydantic import ValidationError

from protocol.errors import PrivacyError
from protocol.federation import AggregationSettings, Federation, RuleName
from protocol.privacy.accounting import epsilon
from protocol.privacy.planned import PlannedRounds
from protocol.privacy_settings import NOT_SUMMED, SUMMED
from server.aggregation.registry import make

STEPS = {"training": {"max_steps": 4, "batch_size": 2}}


def described(**changes):
    content = {"plan": STEPS, "rounds": {"minimum_nodes": 3}, "secure_sum": {"enabled": True}}
    return Federation.model_validate({key: content.get(key, {}) | value for key, value in (content | changes).items()})


def test_every_rule_is_summed_or_says_why_not():
    assert SUMMED.keys() | NOT_SUMMED.keys() == set(get_args(RuleName))
    assert not SUMMED.keys() & NOT_SUMMED.keys()


@pytest.mark.parametrize("rule", sorted(SUMMED))
def test_a_rule_that_needs_only_sums_is_accepted_and_looks_at_no_single_update(rule):
    assert described(aggregation={"rule": rule}).secure_sum.enabled
    assert not make(AggregationSettings(rule=rule)).individual


@pytest.mark.parametrize("rule", sorted(NOT_SUMMED))
def test_any_other_rule_is_refused_with_its_reason(rule):
    with pytest.raises(ValidationError) as told:
        described(aggregation={"rule": rule})
    assert f"secure_sum: {rule} {NOT_SUMMED[rule]}" in str(told.value)
    assert "product-delta" in str(told.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": {"minimum_nodes": 2}}, "hides nobody; raise it to 3"),
        ({"rounds": {"minimum_nodes": 3, "cluster": True}}, "rounds.cluster compares single updates"),
        ({"rounds": {"minimum_nodes": 3, "wire": "int8"}}, "rounds.wire: found int8"),
        ({"secure_sum": {"enabled": True, "neighbours": 3}}, "even number"),
        ({"secure_sum": {"enabled": False, "limit": 3.0}}, "secure_sum.limit: secure_sum.enabled is false"),
        ({"plan": {"training": {"max_steps": None}}}, "secure_sum.examples: missing"),
        ({"secure_sum": {"enabled": True, "share": 0.5}}, "share"),
        ({"secure_sum": {"enabled": True, "limit": 0}}, "limit"),
    ],
)
def test_settings_that_would_hide_nobody_or_say_nothing_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        described(**changes)


def test_it_is_off_by_default_and_what_is_written_can_be_read_again():
    assert not Federation().secure_sum.enabled
    for federation in (Federation(), described()):
        assert Federation.model_validate(federation.model_dump(mode="json")) == federation


def test_where_keys_lie_and_how_long_one_waits_decide_nothing_that_is_computed(tmp_path):
    one = described()
    trust = {"enrolled": str(tmp_path / "enrolled.yaml"), "identity": str(tmp_path / "identity")}
    patient = described(secure_sum={"enabled": True, "timeout_seconds": 5}, trust=trust)
    assert one.identity() == patient.identity()
    assert one.identity() != described(secure_sum={"enabled": True, "limit": 5.0}).identity()


# Differential privacy -------------------------------------------------------------------------------------------------------

PRIVATE = {"enabled": True, "epsilon": 4.0}


def private(**changes):
    content = {"plan": STEPS, "rounds": {"minimum_nodes": 20}, "privacy": PRIVATE}
    return Federation.model_validate({key: content.get(key, {}) | value for key, value in (content | changes).items()})


@pytest.mark.parametrize("rule", sorted(SUMMED))
def test_noise_goes_with_every_rule_that_needs_only_sums(rule):
    planned = PlannedRounds.of(private(aggregation={"rule": rule}))
    assert set(planned.releases) == {2 if rule == "product-delta" else 1}
    assert (planned.nodes, planned.cohort) == (20, 20)


@pytest.mark.parametrize("rule", sorted(NOT_SUMMED))
def test_any_other_rule_is_refused_with_noise_too(rule):
    with pytest.raises(ValidationError, match=f"privacy: {rule} .* noise hides in a sum alone; take product-delta"):
        private(aggregation={"rule": rule})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"epsilon": None}}, r"privacy\.epsilon: missing"),
        ({"privacy": {"enabled": False}}, r"privacy\.epsilon: privacy\.enabled is false"),
        ({"privacy": {"delta": 0.06}}, r"privacy\.delta: found 0\.06, expected below 1/20 = 0\.05"),
        ({"privacy": {"nodes": 100, "delta": 0.02}}, r"expected below 1/100 = 0\.01"),
        (
            {"privacy": {"noise_multiplier": 2.0}},
            r"5 rounds at a noise multiplier of 2 end at 4\.98\d, the budget is 4 and buys 3 such rounds",
        ),
        ({"privacy": {"quantile": 0.5, "bit_noise": 0.1}}, r"privacy\.bit_noise: found 0\.1 nodes, whose votes alone cost"),
        ({"privacy": {"noise": "nodes"}}, r"privacy\.noise: found nodes without secure_sum\.enabled"),
        ({"privacy": {"colluders": 2}}, r"privacy\.colluders: found beside the coordinator's noise"),
        (
            {"privacy": {"noise": "nodes", "colluders": 14}, "secure_sum": {"enabled": True}},
            r"privacy\.colluders: found 14, and of 20 nodes 14 make a sum",
        ),
        ({"privacy": {"bit_noise": 2.0}}, r"privacy\.bit_noise: found without privacy\.quantile"),
        ({"privacy": {"quantile_rate": 0.5}}, r"privacy\.quantile_rate: found without privacy\.quantile"),
        ({"privacy": {"width": 8}, "aggregation": {"rule": "rolora"}}, r"privacy\.width: rolora adds tensors up"),
        ({"secure_sum": {"enabled": True, "limit": 3.0}}, r"secure_sum\.limit: found beside privacy"),
        ({"secure_sum": {"enabled": True, "width": 8}}, r"secure_sum\.width: found beside privacy"),
        ({"secure_sum": {"enabled": True, "examples": 8}}, r"secure_sum\.examples: found beside privacy"),
        ({"rounds": {"minimum_nodes": 20, "cohort": 20, "over_selection": 0.5}}, r"rounds\.over_selection: who is late"),
        ({"rounds": {"minimum_nodes": 20, "cluster": True}}, r"rounds\.cluster compares single updates"),
        ({"stop": {"metric": "loss", "target": 1.0}}, r"stop\.metric: what nodes measure has no noise"),
        ({"privacy": {"nodes": 10}}, r"privacy\.nodes: found 10, fewer than"),
        ({"privacy": {"sampling": "poisson"}}, r"privacy\.sampling: poisson needs rounds\.cohort and privacy\.nodes"),
        (
            {
                "privacy": {"sampling": "fixed", "nodes": 50},
                "rounds": {"minimum_nodes": 20, "cohort": 20},
                "secure_sum": {"enabled": True},
            },
            r"privacy\.sampling: fixed beside secure_sum, whose nodes are told who else is in it",
        ),
        ({"plan": {"method": "ia3"}}, r"plan\.method: ia3 trains tensors whose start nodes draw"),
        (
            {"plan": {"objective": "classification", "data": {"labels": ["a", "b"]}}},
            r"plan\.objective: classification trains a head whose start nodes draw",
        ),
        ({"privacy": {"epsilon": 0.0}}, "epsilon"),
        ({"privacy": {"clipping_norm": 0.0}}, "clipping_norm"),
        ({"privacy": {"delta": 1.0}}, "delta"),
        ({"privacy": {"quantile": 1.0}}, "quantile"),
    ],
)
def test_a_promise_that_could_not_be_kept_is_refused_with_numbers(changes, said):
    content = {key: value if key != "privacy" else PRIVATE | value for key, value in changes.items()}
    with pytest.raises(ValidationError, match=said):
        private(**content)


def test_several_adapters_are_refused_and_stages_count_all_their_rounds():
    with pytest.raises(ValidationError, match="adapters: several beside privacy"):
        Federation.model_validate({"adapters": {"a": STEPS, "b": STEPS}, "privacy": PRIVATE})
    staged = {"stages": [{"name": name, "rounds": 3, "plan": STEPS} for name in ("first", "second")], "privacy": PRIVATE}
    assert len(PlannedRounds.of(Federation.model_validate(staged)).releases) == 6


def test_all_problems_are_told_at_once():
    with pytest.raises(ValidationError) as told:
        private(
            aggregation={"rule": "krum"},
            rounds={"minimum_nodes": 20, "cohort": 20, "over_selection": 1},
            privacy=PRIVATE | {"noise": "nodes"},
        )
    assert sum(f"{key}:" in str(told.value) for key in ("privacy", "privacy.noise", "rounds.over_selection")) == 3


def test_a_head_of_its_own_or_one_that_the_start_holds_can_be_private(tmp_path):
    task = {"objective": "classification", "data": {"labels": ["a", "b"]}}
    assert private(plan=STEPS | task | {"head": {"local": True}}).privacy.enabled
    content = {"plan": STEPS | task, "rounds": {"minimum_nodes": 20}, "privacy": PRIVATE, "start": str(tmp_path)}
    assert Federation.model_validate(content).privacy.enabled


def test_without_a_rule_of_its_own_noise_takes_the_one_that_loses_least(tmp_path):
    """Oracle: ``benchmarks.private_quality``. A start keeps the rule that goes on from it."""
    assert private().aggregation.rule == "fedavg"
    assert private(aggregation={"rule": "product-delta"}).aggregation.rule == "product-delta"
    assert private(privacy=PRIVATE, aggregation={}).aggregation.rule == "fedavg"
    assert Federation.model_validate(private().model_dump()) == private()


@pytest.mark.parametrize(
    "sampling", ["all", pytest.param("poisson", marks=pytest.mark.slow), pytest.param("fixed", marks=pytest.mark.slow)]
)
def test_the_noise_that_nobody_names_is_the_least_that_fits(sampling):
    """Of twenty out of a hundred; a multiplier of a hundredth less is not enough."""
    told = PRIVATE | {"delta": 1e-4, "sampling": sampling, "nodes": 100}
    planned = PlannedRounds.of(private(privacy=told, rounds={"minimum_nodes": 3, "cohort": 20, "count": 3}))
    z = planned.noise_multiplier()
    assert epsilon(planned.after(0)(z), 1e-4) <= 4.0 < epsilon(planned.after(0)(0.99 * z), 1e-4)
    assert planned.cohort == (100 if sampling == "all" else 20)  # a known cohort protects nobody


def test_what_is_left_after_some_rounds_needs_the_same_noise_and_after_a_failed_attempt_more():
    """Where rounds were spent as planned the rest needs no other noise, to what a search leaves; also of the last round, of
    which a looser bound would say that nothing is left."""
    planned = PlannedRounds.of(private(rounds={"minimum_nodes": 20, "count": 20}))
    z = planned.noise_multiplier()
    (mechanism,) = planned.after(0)(z)
    for done in (1, 10, 19):
        assert planned.noise_multiplier(done, {mechanism: done}) == pytest.approx(z, rel=1e-3)
    for done in (1, 10):
        assert planned.noise_multiplier(done, {mechanism: done + 1}) > 1.001 * z
    with pytest.raises(PrivacyError, match=r"epsilon is 4 of 4 at a delta of 1e-05, which leaves nothing for 1 rounds"):
        planned.noise_multiplier(19, {mechanism: 20})


def test_where_the_ledger_lies_decides_nothing_that_is_computed(tmp_path):
    one = private()
    other = private(privacy=PRIVATE | {"ledger": str(tmp_path / "spent.jsonl")})
    assert one.identity() == other.identity() != private(privacy=PRIVATE | {"clipping_norm": 0.5}).identity()
    for federation in (one, other):
        assert Federation.model_validate(federation.model_dump(mode="json")) == federation
