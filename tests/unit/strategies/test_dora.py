"""DoRA: the paper's formula by hand is the oracle, for adapters of any rank, of none, and without lengths of their own."""

import numpy as np
import pytest
import torch
from small_bases import logits, saved

from protocol.adapter import Adapter, Factors
from protocol.files import read_adapter, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import lora
from strategies.methods.registry import shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc", "wte"],
    "bert": ["query", "dense", "word_embeddings"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in ("llama", "gpt2", "bert")}


def plan_of(name, r=4, precision="fp32", targets=None, training=None, **settings):
    kind = name.rpartition("/")[2]
    task = {"objective": "classification", "data": {"labels": ["a", "b"]}} if kind == "bert" else {}
    section = {"r": r, "lora_alpha": 2 * r, "use_dora": True, "target_modules": targets or TARGETS[kind], **settings}
    method = "qlora" if precision in ("int8", "nf4") else "lora"
    return Plan.model_validate(
        {"base_model": name, "method": method, "precision": precision, "lora": section, "training": training or {}, **task}
    )


def plain(plan):
    torch.manual_seed(0)
    return load(find(plan.base_model), plan)[0]


def attached(plan):
    torch.manual_seed(0)
    return lora.attach(load(find(plan.base_model), plan)[0], plan)


def drawn(plan, rank, *, lengths=True, seed=0):
    """An adapter whose directions are ordered, as a server sends them, and whose lengths differ from the base's."""
    rng = np.random.default_rng(seed)
    model = plain(plan)
    factors, dense = {}, {}
    for module, (d_out, d_in) in shape(find(plan.base_model), plan).modules.items():
        decay = np.exp(-np.arange(rank))
        pair = Factors(
            A=(0.3 * rng.standard_normal((rank, d_in)) * decay[:, None]).astype(np.float32),
            B=(0.3 * rng.standard_normal((d_out, rank))).astype(np.float32),
            scaling=0.5,
        )
        factors[module] = pair
        if lengths:
            was = np.linalg.norm(upright(model, module), axis=1)
            dense[f"{module}.lora_magnitude_vector"] = (was * rng.uniform(0.5, 1.5, d_out)).astype(np.float32)
    return Adapter(factors, dense)


def upright(model, module):
    layer = model.get_submodule(module)
    weight = layer.weight.detach().double().numpy()
    return weight if isinstance(layer, torch.nn.Linear) else weight.T


def by_hand(plan, adapter):
    """The base with ``m (W + s B A) / |W + s B A|`` in its weights, computed in float64 (Liu et al. 2024, eq. 5)."""
    model = plain(plan)
    tied = model.get_output_embeddings() is not None and "embed_tokens" in str(plan.lora.target_modules)
    for module, pair in adapter.factors.items():
        whole = upright(model, module) + pair.product()
        length = adapter.dense.get(f"{module}.lora_magnitude_vector")
        if length is not None:
            whole = length[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        layer = model.get_submodule(module)
        weight = torch.from_numpy(whole if isinstance(layer, torch.nn.Linear) else whole.T).float()
        layer.weight = torch.nn.Parameter(weight)  # a tied output layer keeps its own: PEFT changes the embedding alone
    assert not tied or model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("kind", TARGETS)
def test_attaching_changes_nothing(bases, kind, precision):
    targets = (
        [name for name in TARGETS[kind] if "embed" not in name and name != "wte"] if precision in ("int8", "nf4") else None
    )
    plan = plan_of(bases[kind], precision=precision, targets=targets)
    # One division and one product for each number that a layer passes on, in the base's type.
    tolerance = {"bf16": 0.03, "fp16": 0.004}.get(precision, 1e-5)
    assert torch.allclose(logits(attached(plan)), logits(plain(plan)), atol=tolerance)


def test_lengths_begin_as_those_of_the_weights_also_where_these_have_16_bits(bases):
    """PEFT rounds them to the base's type and so begins up to 0.4 % away from it."""
    plan = plan_of(bases["gpt2"], precision="bf16")
    base, model = plain(plan), attached(plan)
    for name, found in lora.dense(model).items():
        wanted = np.linalg.norm(upright(base.float(), name.removesuffix(".lora_magnitude_vector")), axis=1)
        assert np.allclose(found.detach().numpy(), wanted, rtol=1e-5)


def test_lengths_travel_dense_under_pefts_own_name(bases):
    plan = plan_of(bases["llama"])
    found = shape(find(bases["llama"]), plan)
    assert found.dense == {f"{module}.lora_magnitude_vector": (d_out,) for module, (d_out, _) in found.modules.items()}
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, use_dora=True, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    kept = get_peft_model_state_dict(get_peft_model(plain(plan), config))
    assert {f"base_model.model.{name}" for name in found.dense} == {name for name in kept if "magnitude" in name}


@pytest.mark.parametrize("rank", [2, 4, 7], ids=["lower", "equal", "higher, partly frozen"])
@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_loaded_answers_as_the_papers_formula(bases, kind, rank):
    plan = plan_of(bases[kind])
    adapter = drawn(plan, rank)
    model = attached(plan)
    lora.load(model, adapter)
    assert not torch.allclose(logits(model), logits(plain(plan)), atol=1e-2), "a change that changes nothing proves nothing"
    assert torch.allclose(logits(model), logits(by_hand(plan, adapter)), atol=1e-4)


@pytest.mark.parametrize("rank", [3, 7], ids=["lower", "higher, partly frozen"])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_without_lengths_answers_as_the_plain_lora_that_it_is(bases, kind, rank):
    plan = plan_of(bases[kind])
    adapter = drawn(plan, rank, lengths=False)
    model = attached(plan)
    lora.load(model, adapter)
    assert torch.allclose(logits(model), logits(by_hand(plan, adapter)), atol=1e-4)


def test_an_adapter_of_nothing_leaves_the_model_as_it_is_and_what_is_loaded_comes_out_again(bases):
    plan = plan_of(bases["llama"])
    model = attached(plan)
    lora.load(model, Adapter())
    assert torch.allclose(logits(model), logits(plain(plan)), atol=1e-5)
    adapter = drawn(plan, 4)
    lora.load(model, adapter)
    made = lora.extract(model)
    assert {name: np.array_equal(tensor, adapter.dense[name]) for name, tensor in made.dense.items()} == dict.fromkeys(
        adapter.dense, True
    )
    for module, pair in made.factors.items():
        assert np.abs(pair.product() - adapter.factors[module].product()).max() <= 1e-6


def test_frozen_directions_count_in_the_lengths_while_training_with_dropout(bases):
    """With dropout PEFT computes the base's part anew from the dropped input: frozen directions must be in that part."""
    plan = plan_of(bases["llama"], lora_dropout=0.5, targets=["q_proj", "down_proj"])
    adapter = drawn(plan, 7)
    frozen, whole = attached(plan), attached(plan_of(bases["llama"], r=7, lora_dropout=0.5, targets=["q_proj", "down_proj"]))
    found = []
    for model in (frozen, whole):
        lora.load(model, adapter)
        model.train()
        torch.manual_seed(1)
        found.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize(("start", "precision"), [("pissa", "fp32"), ("pissa", "nf4"), ("loftq", "nf4")])
def test_starts_that_are_a_part_of_the_base_begin_as_without_dora(bases, start, precision):
    """Factors that begin with a part of the base make the same model with lengths as without them."""
    plan = plan_of(bases["llama"], precision=precision, targets=["q_proj", "down_proj"], init_lora_weights=start)
    without = plan.model_copy(update={"lora": plan.lora.model_copy(update={"use_dora": False})})
    found = []
    for one in (plan, without):
        model = attached(one)
        assert lora.begin(model, one, find(bases["llama"]))
        found.append(logits(model))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_training_moves_directions_and_lengths(bases, precision):
    training = {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 3}
    plan = plan_of(bases["llama"], precision=precision, targets=["q_proj", "down_proj"], training=training)
    before = lora.extract(attached(plan)).dense
    trained = fit(plan, find(bases["llama"]), ROWS, start=drawn(plan, 6, lengths=False)).adapter
    for name, tensor in trained.dense.items():
        assert np.abs(tensor - before[name]).max() > 1e-3
    assert all(pair.r == 4 for pair in trained.factors.values())


def test_a_saved_adapter_answers_in_plain_peft_as_it_does_here(bases, tmp_path):
    from peft import PeftModel

    plan = plan_of(bases["gpt2"])
    adapter = drawn(plan, 4)
    base = find(bases["gpt2"])
    manifest = Manifest(base_digest=base.digest, kind="adapter", embeddings=shape(base, plan).embeddings)
    write_adapter(tmp_path / "adapter", adapter, manifest, plan)
    model = attached(plan)
    lora.load(model, adapter)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain(plan), tmp_path / "adapter")), logits(model), atol=1e-5)
    assert read_adapter(tmp_path / "adapter")[0].dense.keys() == adapter.dense.keys()
