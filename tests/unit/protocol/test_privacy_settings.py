"""Which federations can have secure sums: every rule is in one of two tables; what makes no sense is refused and says why."""

from typing import get_args

import pytest
from pydantic import ValidationError

from protocol.federation import AggregationSettings, Federation, RuleName
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
    patient = described(secure_sum={"enabled": True, "enrolled": str(tmp_path), "timeout_seconds": 5})
    assert one.identity() == patient.identity()
    assert one.identity() != described(secure_sum={"enabled": True, "limit": 5.0}).identity()
