"""Algebra of the cost: more work never takes less time, a faster device never more, four bits are not faster than sixteen."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.cost import Prices, estimate
from strategies.hardware import _RATES, Rates
from strategies.memory import Setup
from tests.property.test_memory_order import ARCHITECTURES, setups

CPU = Rates(bandwidth=3e10, flops={"fp32": 8e10}, source="a CPU")
DEVICES = [*_RATES.values(), CPU]
# Sums of the same parts in the same order: only rounding may differ.
ALMOST = 1 - 1e-9


def seconds(architecture, setup, rates, steps=1, **more):
    return estimate(architecture, setup, rates, steps=steps, **more).total_seconds


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ARCHITECTURES), setups(), st.sampled_from(DEVICES), st.integers(1, 64))
def test_more_work_never_takes_less_time(architecture, setup, rates, accumulation):
    """Rows, tokens, rank, steps, batches of a step, layers that are computed again."""
    base = seconds(architecture, setup, rates, accumulation=accumulation)
    assert 0 < base < float("inf")
    more = [
        replace(setup, batch=setup.batch + 1),
        replace(setup, sequence=setup.sequence + 64),
        replace(setup, rank=setup.rank * 2),
        replace(setup, gradient_checkpointing=True),
    ]
    for other in more:
        assert seconds(architecture, other, rates, accumulation=accumulation) >= base * ALMOST, other
    assert seconds(architecture, setup, rates, accumulation=accumulation + 1) >= base
    assert seconds(architecture, setup, rates, steps=3, accumulation=accumulation) >= 2.9 * base


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ARCHITECTURES), setups(), st.sampled_from(DEVICES), st.floats(1, 10))
def test_a_faster_device_never_takes_more(architecture, setup, rates, times):
    base = seconds(architecture, setup, rates)
    flops = {kind: times * rate for kind, rate in rates.flops.items()}
    for faster in (replace(rates, bandwidth=times * rates.bandwidth), replace(rates, flops=flops)):
        assert seconds(architecture, setup, faster) <= base / ALMOST


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(DEVICES),
    st.sampled_from(["nf4", "nf4-dq", "int8", "gptq4"]),
    st.integers(1, 64),
    st.integers(16, 8192),
    st.integers(1, 128),
    st.booleans(),
)
def test_qlora_is_slower_than_lora_at_an_equal_batch(architecture, rates, kind, batch, sequence, rank, again):
    """The same arithmetic on the same rows: what is packed has to be unpacked."""
    lora = Setup(method="lora", mixed_precision="bf16", batch=batch, sequence=sequence, rank=rank, gradient_checkpointing=again)
    qlora = replace(lora, method="qlora", quantization=kind)
    assert seconds(architecture, qlora, rates) > seconds(architecture, lora, rates)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ARCHITECTURES), setups(), st.sampled_from(list(_RATES.values())), st.sampled_from([2, 3, 4, 8]))
def test_more_gpus_never_train_fewer_tokens_a_second(architecture, setup, rates, gpus):
    """From two on, whatever is sharded; and from one to two where only an adapter's gradients have to be exchanged."""
    if setup.device == "cpu":
        return
    several = replace(setup, gpus=gpus)
    rate = [estimate(architecture, one, rates, steps=1).tokens_per_second for one in (several, replace(several, gpus=2 * gpus))]
    assert rate[1] >= rate[0] * ALMOST
    if setup.method in ("lora", "qlora") and setup.gpus == 1 and setup.batch * setup.sequence >= 2048:
        alone = estimate(architecture, setup, rates, steps=1).tokens_per_second
        assert estimate(architecture, replace(setup, gpus=2), rates, steps=1).tokens_per_second >= alone


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES), setups(), st.sampled_from(DEVICES), st.floats(0, 100), st.floats(0, 10), st.integers(1, 999)
)
def test_money_grows_with_every_price_and_parts_make_the_whole(architecture, setup, rates, hour, kwh, steps):
    found = estimate(architecture, setup, rates, steps=steps, prices=Prices(gpu_hour=hour))
    assert abs(sum(found.parts.values()) - found.step_seconds) <= 1e-9 * found.step_seconds
    assert all(part > 0 for part in found.parts.values())
    both = estimate(architecture, setup, rates, steps=steps, prices=Prices(gpu_hour=hour, kwh=kwh))
    assert both.money is None if rates.watts is None else both.money >= found.money >= 0
