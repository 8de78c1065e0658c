"""Seconds, energy and money of training: operations counted by hand and by torch, and published speeds."""

import json
import math
from dataclasses import replace

import pytest

from protocol.errors import ModelError
from strategies.architecture import read
from strategies.cost import Prices, estimate, utilisation
from strategies.hardware import _RATES, Rates, rates_of
from strategies.memory import Setup

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
A100 = rates_of("NVIDIA A100-SXM4-80GB")
# One operation a second and memory without end: seconds are operations, over the share of the rate that is reached.
COUNTING = Rates(bandwidth=1e30, flops={"fp32": 1.0, "bf16": 1.0, "fp16": 1.0}, source="counting")
REACHED = utilisation(COUNTING, 1e12, 32)
ROWS, TOKENS = 3, 32


def counted(config, **setup):
    """Floating-point operations of a step by part, attention without a fused kernel."""
    setup = {"batch": ROWS, "sequence": TOKENS, "attention": "eager", "base_dtype": "fp32", "loss": "hf", **setup}
    parts = estimate(read(config), Setup(**setup), COUNTING, steps=1).parts
    return {name: seconds * REACHED for name, seconds in parts.items()}


def by_torch(config, *, lora_targets=None):
    """Operations of a real step's forward and backward pass, counted as torch dispatches them."""
    torch = pytest.importorskip("torch", reason="counts operations")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}),
        attn_implementation="eager",
    ).train()
    if lora_targets:
        from peft import LoraConfig, get_peft_model

        made = get_peft_model(made, LoraConfig(r=8, target_modules=lora_targets, fan_in_fan_out=False))
    ids = torch.randint(0, 400, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as forward:
        loss = made(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_a_llama_costs_the_operations_that_are_on_paper():
    """A token: 2 for each weight of q, o (64x64), k, v (64x32), MLP (3 of 64x160), 4 s h of attention, 2 h V of the head."""
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160
    forward = ROWS * TOKENS * (3 * (2 * weights + 4 * TOKENS * 64) + 2 * 64 * 1000)
    found = counted(LLAMA, method="full")
    assert found["forward"] == pytest.approx(forward, rel=1e-9)
    assert found["backward"] == pytest.approx(2 * forward, rel=1e-9)


def test_a_gpt2_costs_the_operations_that_are_on_paper():
    """A token: 24 h^2 in each layer (12 h^2 weights), 4 s h of attention, 2 h V of the head, which is the embedding again."""
    forward = ROWS * TOKENS * (2 * (24 * 48**2 + 4 * TOKENS * 48) + 2 * 48 * 500)
    assert counted(GPT2, method="full")["forward"] == pytest.approx(forward, rel=1e-9)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_operations_are_those_that_torch_dispatches(config):
    """The oracle is torch's own counter over a real step; its two norms and its embedding have no products."""
    forward, backward = by_torch(config)
    found = counted(config, method="full")
    assert found["forward"] == pytest.approx(forward, rel=1e-9)
    assert found["backward"] == pytest.approx(backward, rel=1e-9)


def test_lora_leaves_out_the_gradients_of_the_frozen_weights():
    """As torch counts it, but for the gradient of the first layer's input, which nobody asks for: under a third of a layer."""
    forward, backward = by_torch(LLAMA, lora_targets="all-linear")
    found = counted(LLAMA, method="lora", rank=8, targets="all-linear")
    one_layer = ROWS * TOKENS * 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)
    pairs = ROWS * TOKENS * 2 * 8 * 3 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 160))  # forward, of every pair of factors
    assert found["forward"] + pairs == pytest.approx(forward, rel=1e-9)
    assert found["adapter overhead"] == pytest.approx(3 * pairs, rel=1e-9)
    ours = found["backward"] + 2 * pairs
    assert backward <= ours <= backward + one_layer / 3
    assert counted(LLAMA, method="full")["backward"] > 1.8 * found["backward"]


def test_checkpointing_repeats_the_layers_and_not_the_head():
    found = counted(LLAMA, method="full", gradient_checkpointing=True)
    head = ROWS * TOKENS * 2 * 64 * 1000
    assert found["recomputation"] == pytest.approx(found["forward"] - head, rel=1e-9)
    assert "recomputation" not in counted(LLAMA, method="full")


def test_a_token_goes_through_its_own_experts_only():
    """Two of eight experts, each three matrices; the router is one more."""
    mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    config = {**LLAMA, **mixtral}
    attention = 64 * 64 * 2 + 2 * 64 * 32
    token = 3 * (2 * (attention + 2 * 3 * 64 * 160 + 64 * 8) + 4 * TOKENS * 64) + 2 * 64 * 1000
    assert counted(config, method="full")["forward"] == pytest.approx(ROWS * TOKENS * token, rel=1e-9)


def test_dpo_passes_twice_as_many_rows_and_asks_its_reference():
    """Two answers a row; the reference passes them once more, forward alone."""
    one = counted(LLAMA, method="lora", rank=8)
    two = counted(LLAMA, method="lora", rank=8, objective="dpo", reference="adapter-off")
    assert two["forward"] == pytest.approx(2 * one["forward"], rel=1e-9)
    assert two["reference"] == pytest.approx(two["forward"], rel=1e-9)
    precomputed = counted(LLAMA, method="lora", rank=8, objective="dpo", reference="precomputed")
    assert "reference" not in precomputed


def test_writing_an_answer_reads_every_weight_for_every_token():
    """Decoding one row waits for memory: 16-bit weights over the bandwidth, for each of the tokens, and never less."""
    model = read(MISTRAL)
    setup = Setup(method="lora", objective="rl", reference="adapter-off", sequence=512)
    seconds = estimate(model, setup, A100, steps=1, completion=256).parts["generation"]
    embedding = 32000 * 4096
    assert seconds >= 256 * 2 * (model.parameters - embedding) / A100.bandwidth
    assert estimate(model, setup, A100, steps=1, completion=128).parts["generation"] == pytest.approx(seconds / 2)


def test_dequantisation_takes_the_same_time_whatever_the_batch():
    model, setup = read(MISTRAL), Setup(method="qlora", quantization="nf4", sequence=512)
    parts = [estimate(model, replace(setup, batch=batch), A100, steps=1).parts for batch in (1, 16)]
    assert parts[0]["dequantisation"] == pytest.approx(parts[1]["dequantisation"])
    again = estimate(model, replace(setup, gradient_checkpointing=True), A100, steps=1).parts
    assert again["dequantisation"] == pytest.approx(1.5 * parts[0]["dequantisation"])


def test_the_share_of_the_rate_grows_from_the_ridge_of_the_roofline():
    """Half of the largest share at the tokens where weights take as long to read as to multiply with; never above it."""
    most = utilisation(A100, 1e9, 16)
    ridge = most * A100.flops["bf16"] * 2 / (2 * A100.bandwidth)
    assert utilisation(A100, ridge, 16) == pytest.approx(most / 2, rel=1e-6)
    assert 0 < utilisation(A100, 1, 16) < utilisation(A100, 4096, 16) < most <= 1


def test_time_energy_and_money_are_simple_sums():
    """300 W over two GPUs for the hours that they run; a kilowatt-hour is 3.6 MJ."""
    model, rates = read(LLAMA), Rates(1e11, {"fp32": 1e12, "bf16": 1e13}, "a", watts=300.0)
    setup = Setup(method="lora", rank=8, gpus=2)
    found = estimate(model, setup, rates, steps=1000, accumulation=4, prices=Prices(gpu_hour=2.0, kwh=0.5))
    assert found.step_seconds == pytest.approx(math.fsum(found.parts.values()))
    assert found.total_seconds == pytest.approx(1000 * found.step_seconds)
    hours = 2 * found.total_seconds / 3600
    assert found.energy_joules == pytest.approx(300 * hours * 3600)
    assert found.money == pytest.approx(2.0 * hours + 0.5 * 0.3 * hours)
    assert found.tokens_per_second == pytest.approx(2 * 4 * setup.batch * setup.sequence / found.step_seconds)


def test_what_is_not_known_has_no_figure():
    model, setup, rates = read(LLAMA), Setup(rank=8), Rates(1e11, {"fp32": 1e12}, "a machine")
    found = estimate(model, setup, rates, steps=10, prices=Prices(kwh=0.5))
    assert found.energy_joules is None
    assert found.money is None
    assert estimate(model, setup, rates, steps=10).money is None
    assert found.source == "nominal: a machine"
    with pytest.raises(ModelError, match="no linear layer nothing"):
        estimate(model, Setup(targets=("nothing",)), rates, steps=1)


def test_a_device_without_bfloat16_computes_in_float16_or_float32():
    """A T4 takes its float16 rate for both; a device of which only the float32 rate is known takes that."""
    model, setup = read(LLAMA), Setup(rank=8, batch=512)
    t4 = rates_of("Tesla T4")
    assert "bf16" not in t4.flops
    one, other = (estimate(model, replace(setup, base_dtype=kind), t4, steps=1).step_seconds for kind in ("bf16", "fp16"))
    assert one == other
    only = Rates(1e11, {"fp32": 1e11}, "a")
    assert estimate(model, setup, only, steps=1).step_seconds > 0


def test_a_calibration_multiplies_every_part():
    class Twice:
        source = "this machine, today"

        def time_factor(self, setup):
            return 2.0 if setup.method == "lora" else None

    model = read(LLAMA)
    for method, factor, source in (("lora", 2, "calibrated: this machine, today"), ("full", 1, f"nominal: {A100.source}")):
        plain, found = (estimate(model, Setup(method=method), A100, steps=3, calibration=known) for known in (None, Twice()))
        assert found.total_seconds == pytest.approx(factor * plain.total_seconds)
        assert found.parts == pytest.approx({name: factor * seconds for name, seconds in plain.parts.items()})
        assert found.source == source


def test_the_table_of_devices_is_in_its_right_units():
    """Watts of boards, up to terabytes a second, 16-bit rates above float32 ones; boosted clocks may pass the datasheet."""
    for name, rates in _RATES.items():
        assert 5e10 < rates.bandwidth < 1e13, name
        assert 1e12 < rates.flops["fp32"] <= rates.flops["fp16"] < 3e15, name
        assert all(0.2 < share <= 1.1 for share in rates.achieved.values()), name
        assert 50 <= rates.watts <= 1500, name
        assert rates.source, name


def test_published_speeds_are_met_and_their_order_is_right(capsys):
    """64 published speeds of one GPU (benchmarks/time_points.csv has the sources), 42 of them no constant was set on.

    The issue asks for a median error of 30 %; a tenth is what there is, so that a mistake would show.
    """
    from benchmarks.time import compare

    found = compare()
    assert found["held-out"]["points"] >= 40
    assert found["held-out"]["median"] <= 0.10
    assert found["single"]["worst"] <= 0.30
    assert found["order"]["methods"]["right"] >= 0.95 * found["order"]["methods"]["pairs"] >= 80
    assert "wrong: " in capsys.readouterr().out
    json.dumps(found)
