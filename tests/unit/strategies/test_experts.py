"""Experts: what trains of a mixture, that it begins as nothing, what it computes, and that it is found again."""

import numpy as np
import pytest
import torch
from small_bases import LAYERS, WIDTH, logits, saved
from transformers import AutoModelForCausalLM

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.adapters.merge import merge
from strategies.architecture import read
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.footprint import beside
from strategies.methods import experts
from strategies.methods.registry import shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
# Which layers are sparse, and how wide an expert is inside.
BUILT = {"mixtral": (range(LAYERS), 48), "qwen3-moe": (range(1, LAYERS), 24)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in (*BUILT, "llama")}


def plan_of(name, train="both", precision="fp32", r=3, **more):
    settings = {"experts": {"train": train}, "precision": precision, "lora": {"r": r, "lora_alpha": 2.0 * r}}
    return Plan.model_validate({"base_model": name, "method": "experts", **settings, **more})


def attached(plan, seed=0):
    base = load(find(plan.base_model), plan)[0]
    torch.manual_seed(seed)
    return experts.attach(base, plan)


def drawn(plan, r, seed=0):
    rng = np.random.default_rng(seed)
    found = shape(find(plan.base_model), plan)
    factors = {
        name: Factors(*(rng.standard_normal(size).astype(np.float32) * 0.2 for size in ((r, d_in), (d_out, r))), 0.5)
        for name, (d_out, d_in) in found.modules.items()
    }
    return Adapter(factors, {name: rng.standard_normal(size).astype(np.float32) for name, size in found.dense.items()})


@pytest.mark.parametrize("kind", BUILT)
def test_each_expert_has_factors_of_its_own_and_each_router_trains_whole(bases, kind):
    sparse, inner = BUILT[kind]
    found = shape(find(bases[kind]), plan_of(bases[kind]))
    sizes = {"gate_up_proj": (2 * inner, WIDTH), "down_proj": (WIDTH, inner)}
    assert found.modules == {
        f"model.layers.{layer}.mlp.experts.{name}.{number}": size
        for layer in sparse
        for name, size in sizes.items()
        for number in range(4)
    }
    assert found.dense == {f"model.layers.{layer}.mlp.gate.weight": (4, WIDTH) for layer in sparse}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train", ["both", "experts", "router"])
def test_attaching_changes_nothing_and_what_trains_is_float32_and_what_was_asked_for(bases, train, precision):
    plan = plan_of(bases["mixtral"], train, precision)
    model = attached(plan)
    plain = load(find(bases["mixtral"]), plan)[0]
    # A router in float32 decides as before, and weighs what experts say a little more finely than one in bfloat16.
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0 if precision == "fp32" else 0.02)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any("lora" in name for name in trained) == (train != "router")
    assert any("gate" in name.split(".") for name in trained) == (train != "experts")


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("r", [2, 3, 5])
def test_an_adapter_of_any_rank_computes_what_a_base_with_the_products_in_its_experts_computes(bases, kind, r):
    plan = plan_of(bases[kind])
    adapter, model = drawn(plan, r), attached(plan)
    experts.load(model, drawn(plan, 5, seed=1))  # of which nothing must be left
    experts.load(model, adapter)
    plain = load(find(bases[kind]), plan)[0]
    with torch.no_grad():
        for name, pair in adapter.factors.items():
            packed, _, number = name.rpartition(".")
            change = pair.scaling * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
            plain.get_parameter(packed)[int(number)] += torch.from_numpy(change)
        for name, tensor in adapter.dense.items():
            plain.get_parameter(name).copy_(torch.from_numpy(tensor))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("train", ["both", "router"])
def test_what_was_trained_is_written_read_and_answers_the_same(bases, tmp_path, train):
    plan = plan_of(bases["mixtral"], train, training={"max_steps": 3, "batch_size": 4, "learning_rate": 0.01})
    base = find(plan.base_model)
    trained = fit(plan, base, ROWS).adapter
    moved = [pair for pair in trained.factors.values() if np.abs(pair.B).max() > 0]
    assert bool(moved) == (train == "both")
    start = {name: load(base, plan)[0].get_parameter(name).detach().numpy() for name in trained.dense}
    assert all(not np.array_equal(start[name], tensor) for name, tensor in trained.dense.items())
    manifest = Manifest(base_digest=base.digest, kind="adapter", method="experts", r=3, precision="fp32")
    write_adapter(tmp_path / "adapter", trained, manifest, plan)
    stored = read_stored(tmp_path / "adapter")
    again = with_adapter(stored.on(plan), base, stored.adapter)[0]
    first = with_adapter(plan, base, trained)[0]
    torch.testing.assert_close(logits(again), logits(first), rtol=1e-5, atol=1e-5)  # the scaling has moved into B
    plain = load(base, plan)[0]
    assert (logits(first) - logits(plain)).abs().max() > 1e-3


def test_merged_experts_answer_in_plain_transformers_as_base_and_adapter_do(bases, tmp_path):
    plan = plan_of(bases["mixtral"])
    adapter, base = drawn(plan, 3), find(bases["mixtral"])
    manifest = Manifest(base_digest=base.digest, kind="adapter", method="experts", r=3, precision="fp32")
    write_adapter(tmp_path / "adapter", adapter, manifest, plan)
    merge(base, read_stored(tmp_path / "adapter"), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(plain), logits(with_adapter(plan, base, adapter)[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", ["both", "router"])
def test_experts_and_routers_train_beside_a_base_in_four_bits(bases, train):
    plan = plan_of(bases["mixtral"], train, "nf4", training={"max_steps": 1, "learning_rate": 0.01})
    begun = {name: tensor.detach().numpy().copy() for name, tensor in experts.dense(attached(plan)).items()}
    trained = fit(plan, find(plan.base_model), ROWS).adapter
    assert all(not np.array_equal(begun[name], tensor) for name, tensor in trained.dense.items())


def test_a_base_without_experts_is_refused_and_so_are_foreign_adapters(bases):
    with pytest.raises(ModelError, match="no experts; choose method lora"):
        shape(find(bases["llama"]), plan_of(bases["llama"]))
    plan = plan_of(bases["mixtral"])
    model, name = attached(plan), "model.layers.0.mlp.experts.down_proj.0"
    wide = Factors(np.zeros((1, 7), np.float32), np.zeros((WIDTH, 1), np.float32))
    with pytest.raises(AdapterError, match=r"found shape \(32, 7\), expected \(32, 48\)"):
        experts.load(model, Adapter({name: wide}))
    with pytest.raises(AdapterError, match="not in this model"):
        experts.load(model, Adapter({f"{name}9": wide}))


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("train", ["both", "experts", "router"])
def test_the_planner_counts_what_trains_from_the_configuration(bases, kind, train):
    plan = plan_of(bases[kind], train)
    trained = sum(parameter.numel() for parameter in attached(plan).parameters() if parameter.requires_grad)
    assert beside(plan, read(bases[kind])) == trained
