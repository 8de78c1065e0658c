"""What a node chooses: never more than wished or allowed, always a plan that holds, and a reason for every change."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.plan import QUANTISED, Plan
from strategies.narrowing import TIERS, narrow

PRECISIONS = ["fp32", "bf16", "fp16", "int8", "nf4"]
WISHES = st.builds(
    lambda r, alpha, precision: Plan.model_validate(
        {
            "lora": {"r": r, "lora_alpha": alpha},
            "precision": precision,
            "method": "qlora" if precision in QUANTISED else "lora",
        }
    ),
    st.integers(1, 256),
    st.floats(0.5, 512),
    st.sampled_from(PRECISIONS),
)
TIER_NAMES = st.sampled_from(sorted(TIERS))
LIMITS = st.none() | st.integers(1, 256)


def leaves(value, path=""):
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in leaves(inner, f"{path}.{name}".lstrip(".")).items()}


@given(wish=WISHES, tier=TIER_NAMES, limit=LIMITS)
def test_the_rank_is_the_least_of_wish_tier_and_own_limit(wish, tier, limit):
    chosen = narrow(wish, tier, limit).chosen
    assert chosen.lora.r == min(wish.lora.r, TIERS[tier].max_rank, limit or 10**9)
    assert chosen.lora == wish.lora.with_rank(chosen.lora.r)


@given(wish=WISHES, tier=TIER_NAMES, limit=LIMITS)
def test_every_field_that_changed_has_a_reason_and_no_other(wish, tier, limit):
    selection = narrow(wish, tier, limit)
    before, after = leaves(wish.model_dump()), leaves(selection.chosen.model_dump())
    changed = {key for key in before if before[key] != after[key]} - {"lora.lora_alpha"}  # it follows the rank
    assert changed == set(selection.reasons)
    for key, reason in selection.reasons.items():
        assert str(after[key]) in reason
        assert str(before[key]) in reason


@given(wish=WISHES, tier=TIER_NAMES, limit=LIMITS)
def test_what_is_chosen_is_a_valid_plan(wish, tier, limit):
    chosen = narrow(wish, tier, limit).chosen
    assert Plan.model_validate(chosen.model_dump()) == chosen


@given(wish=WISHES, tier=TIER_NAMES, limit=LIMITS)
def test_choosing_again_changes_nothing(wish, tier, limit):
    once = narrow(wish, tier, limit).chosen
    again = narrow(once, tier, limit)
    assert again.chosen == once
    assert not again.reasons


@given(wish=WISHES, tier=TIER_NAMES)
def test_a_tier_that_names_a_precision_holds_the_base_at_no_more_bits(wish, tier):
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "nf4": 4}
    chosen, limit = narrow(wish, tier).chosen, TIERS[tier].precision
    assert bits[chosen.precision] <= bits[limit or wish.precision]
    if limit is None:
        assert chosen.precision == wish.precision


def test_the_reason_names_whose_limit_it_was():
    wish = Plan.model_validate({"lora": {"r": 32}})
    assert "medium" in narrow(wish, "medium").reasons["lora.r"]
    assert "max_rank" in narrow(wish, "medium", 4).reasons["lora.r"]
