"""LoRA through PEFT: what goes in comes out, a lower rank in a higher changes no product, and shapes need no weights."""

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import Plan
from protocol.product_space import at_rank
from strategies.base_model import find, load
from strategies.methods import lora
from strategies.methods.registry import shape

TARGETS = ["q_proj", "down_proj"]
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def stories(data):
    return str(data / "models" / "stories260k-hf")


def plan_of(name, r=8, targets=TARGETS, labels=None, **more):
    content = {"base_model": name, "lora": {"r": r, "lora_alpha": 12, "target_modules": targets}, **more}
    if labels:
        content |= {"objective": "classification", "data": {"labels": labels}}
    return Plan.model_validate(content)


def tensors_of(known):
    return known.modules, known.dense


def attached(plan):
    import torch

    torch.manual_seed(0)
    return lora.attach(load(find(plan.base_model), plan)[0], plan)


@pytest.fixture(scope="module")
def eight(stories):
    return attached(plan_of(stories))


@pytest.fixture(scope="module")
def shapes(stories):
    return shape(find(stories), plan_of(stories)).modules


def random_adapter(shapes, rank, scaling, seed):
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            module: Factors(
                A=rng.standard_normal((rank, d_in)).astype(np.float32),
                B=rng.standard_normal((d_out, rank)).astype(np.float32),
                scaling=scaling,
            )
            for module, (d_out, d_in) in shapes.items()
        }
    )


def assert_same_products(found, wanted):
    assert found.factors.keys() == wanted.factors.keys()
    for module, pair in wanted.factors.items():
        product = pair.product()
        scale = max(float(np.abs(product).max()), 1e-9)
        assert np.abs(found.factors[module].product() - product).max() <= 1e-5 * scale


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank=st.integers(0, 8), scaling=st.floats(0.01, 10), seed=st.integers(0, 1000))
def test_an_adapter_of_lower_rank_in_a_higher_keeps_its_product(stories, shapes, rank, scaling, seed):
    adapter = random_adapter(shapes, rank, scaling, seed)
    model = attached(plan_of(stories))
    lora.load(model, adapter)
    assert_same_products(lora.extract(model), adapter)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_loaded_at_its_own_rank_comes_out_again(eight, shapes, seed):
    adapter = random_adapter(shapes, 8, 12 / 8, seed)
    lora.load(eight, adapter)
    out = lora.extract(eight)
    assert out.digest() == adapter.digest()
    lora.load(eight, out)
    assert lora.extract(eight).digest() == out.digest()


def test_free_directions_of_a_higher_rank_still_can_learn(stories, shapes):
    model = attached(plan_of(stories))
    lora.load(model, random_adapter(shapes, 3, 1.0, 0))
    for pair in lora.extract(model).factors.values():
        assert np.abs(pair.A[3:]).min(axis=1).max() > 0
        assert not pair.B[:, 3:].any()


def test_a_loaded_adapter_answers_as_the_same_adapter_in_plain_peft(stories, eight, shapes):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(shapes, 3, 0.05, 5)
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32),
        LoraConfig(r=3, lora_alpha=0.15, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            layer = plain.get_submodule(f"base_model.model.{module}")
            layer.lora_A["default"].weight.copy_(torch.from_numpy(pair.A))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(pair.B))
        fresh = attached(plan_of(stories))
        lora.load(fresh, adapter)
        ids = torch.arange(3, 60)[None]
        assert torch.allclose(fresh.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-4)


def test_a_head_that_is_loaded_comes_out_again(stories):
    plan = plan_of(stories, labels=LABELS)
    modules, dense = tensors_of(shape(find(stories), plan))
    assert dense == {"score.weight": (3, 64)}
    head = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    adapter = Adapter(random_adapter(modules, 8, 1.5, 1).factors, {"score.weight": head})
    model = attached(plan)
    lora.load(model, adapter)
    assert lora.extract(model).digest() == adapter.digest()


def real_shapes(plan):
    made = lora.extract(attached(plan))
    return {name: pair.shape for name, pair in made.factors.items()}, {name: t.shape for name, t in made.dense.items()}


@pytest.mark.parametrize(
    "more",
    [
        {"targets": "all-linear"},
        {"targets": TARGETS},
        {"targets": "all-linear", "labels": LABELS},
        {"targets": "all-linear", "method": "qlora", "precision": "nf4"},
        {"targets": "all-linear", "method": "qlora", "precision": "int8"},
        {"targets": "all-linear", "labels": LABELS, "method": "qlora", "precision": "nf4"},
    ],
)
def test_shapes_from_the_configuration_are_those_of_the_real_model(stories, more):
    plan = plan_of(stories, r=3, **more)
    assert tensors_of(shape(find(stories), plan)) == real_shapes(plan)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_shapes_of_an_encoder_are_those_of_the_real_model(encoder, targets):
    plan = plan_of(encoder, r=3, targets=targets, labels=LABELS)
    modules, dense = tensors_of(shape(find(encoder), plan))
    assert (modules, dense) == real_shapes(plan)
    assert dense == {"classifier.weight": (3, 384), "classifier.bias": (3,)}


def test_shapes_read_no_weight(stories, tmp_path):
    for file in find(stories).folder.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    base, plan = find(str(tmp_path)), plan_of(stories)
    (tmp_path / "model.safetensors").unlink()
    assert shape(base, plan) == shape(find(stories), plan)


@pytest.mark.parametrize("how", ["attach", "shapes"])
def test_modules_that_the_base_lacks_are_refused_with_those_that_it_has(stories, how):
    plan = plan_of(stories, targets=["query", "value"])
    base = find(stories)
    model = load(base, plan)[0]
    with pytest.raises(ModelError) as caught:
        lora.attach(model, plan) if how == "attach" else shape(base, plan)
    for name in ("query", "value", "q_proj", "v_proj", "down_proj", "lora.target_modules"):
        assert name in str(caught.value)


def test_an_adapter_of_other_modules_is_refused_with_the_first_of_them(eight):
    adapter = Adapter({"encoder.layer.0.query": Factors(np.zeros((2, 64)), np.zeros((64, 2)))})
    with pytest.raises(AdapterError, match=r"encoder\.layer\.0\.query"):
        lora.load(eight, adapter)


def test_an_adapter_with_tensors_that_the_model_lacks_is_refused(eight, shapes):
    adapter = Adapter(random_adapter(shapes, 2, 1, 0).factors, {"score.weight": np.zeros((3, 64))})
    with pytest.raises(AdapterError, match=r"score\.weight"):
        lora.load(eight, adapter)


def test_a_head_of_another_shape_is_refused(stories):
    model = attached(plan_of(stories, labels=LABELS))
    with pytest.raises(AdapterError, match=r"found shape \(4, 64\), expected \(3, 64\)"):
        lora.load(model, Adapter({}, {"score.weight": np.zeros((4, 64), np.float32)}))


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(65, 64, 2), (64, 65, 2), (64, 1, 2), (1, 64, 2), (65, 64, 0)])
def test_factors_of_another_shape_are_refused_with_found_and_expected(eight, shapes, d_out, d_in, r):
    module = next(name for name, shape in shapes.items() if shape == (64, 64))
    adapter = Adapter({module: Factors(np.zeros((r, d_in), np.float32), np.zeros((d_out, r), np.float32))})
    with pytest.raises(AdapterError, match=rf"found .*\({d_out}, {d_in}\).* expected .*\(64, 64\)"):
        lora.load(eight, adapter)


def logits(model):
    import torch

    with torch.inference_mode():
        return model.eval()(torch.arange(3, 60)[None]).logits


def test_an_adapter_of_higher_rank_answers_whole_and_its_leading_directions_are_trained(stories, shapes):
    drawn = random_adapter(shapes, 20, 0.02, 3)
    adapter = Adapter({module: at_rank(pair, 20) for module, pair in drawn.factors.items()})  # ordered, as a server sends it
    whole, part = attached(plan_of(stories, r=20)), attached(plan_of(stories, r=8))
    lora.load(whole, adapter)
    lora.load(part, adapter)
    assert np.allclose(logits(part), logits(whole), atol=1e-3)
    for module, pair in lora.extract(part).factors.items():
        u, s, vt = np.linalg.svd(adapter.factors[module].product())
        leading = (u[:, :8] * s[:8]) @ vt[:8]
        assert pair.r == 8
        assert np.abs(pair.product() - leading).max() <= 1e-4 * np.abs(leading).max()


def test_loading_an_adapter_puts_it_in_place_of_the_one_before(stories, shapes):
    adapter = random_adapter(shapes, 20, 0.02, 3)
    once, twice = attached(plan_of(stories)), attached(plan_of(stories))
    lora.load(once, adapter)
    for _ in range(2):
        lora.load(twice, adapter)
    assert np.allclose(logits(once), logits(twice), atol=1e-4)
