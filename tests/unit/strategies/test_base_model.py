"""The frozen base: found by folder or package, known by its digest, held at 32 to 4 bits, and refused with a reason."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ModelError
from protocol.plan import Plan
from strategies.base_model import find, load, original_weight
from strategies.methods import lora
from strategies.methods.registry import shape


@pytest.fixture(scope="module")
def stories(data):
    return data / "models" / "stories260k-hf"


@pytest.fixture
def copy(stories, tmp_path):
    """The model in a folder of its own, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in stories.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def quantised(stories, precision, **training):
    return Plan.model_validate(
        {"base_model": str(stories), "method": "qlora", "precision": precision, "lora": {"r": 4}, "training": training}
    )


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_a_folder_is_found_and_keeps_the_name_that_was_asked_for(stories):
    base = find(str(stories))
    assert (base.name, base.folder) == (str(stories), stories)
    assert len(base.digest) == 64


def test_a_relative_folder_is_found(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert find("copy").digest == find(str(copy)).digest


def test_an_installed_package_that_carries_a_model_is_found(encoder):
    base = find(encoder)
    assert json.loads((base.folder / "config.json").read_text())["model_type"] == "bert"
    assert find(encoder.replace("-", "_")).digest == base.digest


def test_equal_bases_have_equal_digests_wherever_they_lie(stories, copy):
    assert find(str(copy)).digest == find(str(stories)).digest


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_the_digest_changes_with_weights_and_configuration(stories, copy, file):
    before = find(str(copy)).digest
    assert before == find(str(stories)).digest
    if file == "config.json":
        config = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    else:
        flip_one_bit(copy / file)
    assert find(str(copy)).digest != before


def test_the_digest_does_not_change_with_files_that_are_no_model(copy):
    before = find(str(copy)).digest
    (copy / "README.md").write_text("hello")
    assert find(str(copy)).digest == before


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/at/all",
        "./nowhere",
        "~/nowhere",
        "no-such-owner/no-such-model",
        "no-such-package",
        "numpy",
        "sys",
        "__main__",
        "a/b/c/d",
        "not a name at all!",
        "x" * 300,
        "nul\0byte",
        ".",
        "北京",
    ],
    ids=lambda name: repr(name)[:24],
)
def test_a_name_that_is_no_model_is_a_model_error_that_repeats_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        find(name)
    assert repr(name) in str(caught.value)
    assert "expected" in str(caught.value) or "give a folder" in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1, max_size=20).map(lambda text: f"zz{text}"))
def test_any_name_that_is_no_model_is_a_model_error(name):
    with pytest.raises(ModelError):
        find(name)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_part_says_what_belongs_into_it(copy, file):
    (copy / file).unlink()
    with pytest.raises(ModelError, match=r"expected config\.json and \*\.safetensors"):
        find(str(copy))


@pytest.mark.parametrize("spoilt", ["cut weights", "no weights in the file", "other shapes", "broken config", "empty config"])
def test_a_spoilt_model_is_a_model_error_that_names_it(copy, spoilt):
    config, weights = copy / "config.json", copy / "model.safetensors"
    if spoilt == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif spoilt == "no weights in the file":
        weights.write_bytes(b"")
    elif spoilt == "other shapes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 128}))
    else:
        config.write_text("{" if spoilt == "broken config" else "{}")
    with pytest.raises(ModelError) as caught:
        load(find(str(copy)), Plan(base_model=str(copy)))
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("spoilt", ["{", "{}", '{"model_type": "no-such-architecture"}'])
def test_shapes_of_a_model_whose_configuration_is_broken_are_a_model_error(copy, spoilt):
    (copy / "config.json").write_text(spoilt)
    base = find(str(copy))
    with pytest.raises(ModelError):
        shape(base, Plan(base_model=str(copy)))


def test_an_encoder_cannot_be_asked_for_answers(encoder):
    with pytest.raises(ModelError, match="classification"):
        load(find(encoder), Plan(base_model=encoder, objective="sft"))


def test_what_is_loaded_is_the_model_of_plain_transformers(stories):
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    model, tokenizer = load(find(str(stories)), Plan(base_model=str(stories)))
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()(ids).logits
        assert torch.equal(model(ids).logits, plain)
    assert not model.training
    assert tokenizer.pad_token_id is not None
    assert tokenizer.chat_template


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_base_is_held_at_the_precision_of_the_plan(stories, precision, dtype):
    model, _ = load(find(str(stories)), Plan(base_model=str(stories), precision=precision))
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}


def test_a_classifier_has_a_row_for_every_label_in_the_order_of_the_plan(stories):
    labels = ("refund", "card", "北京")
    plan = Plan.model_validate({"base_model": str(stories), "objective": "classification", "data": {"labels": labels}})
    model, _ = load(find(str(stories)), plan)
    assert tuple(model.score.weight.shape) == (3, 64)
    assert tuple(model.config.id2label.values()) == labels


@pytest.mark.parametrize(("precision", "near"), [("nf4", 0.75), ("int8", 0.97)])
def test_a_quantised_base_answers_nearly_as_the_full_one_in_evaluation_and_in_training_mode(stories, precision, near):
    import torch

    ids = torch.arange(3, 60)[None]
    full, _ = load(find(str(stories)), Plan(base_model=str(stories)))
    small, _ = load(find(str(stories)), quantised(stories, precision))
    with torch.no_grad():
        wanted, found, training = full(ids).logits, small(ids).logits, small.train()(ids).logits
    assert torch.isfinite(found).all()
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)) > near
    assert float((found - training).norm() / found.norm()) < 0.02
    kinds = {type(module).__name__ for module in small.modules()}
    assert ("Linear4bit" if precision == "nf4" else "Linear8bitLt") in kinds


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_factors_on_a_quantised_base_receive_gradients_and_the_base_none(stories, precision, checkpointing):
    import torch

    plan = quantised(stories, precision, gradient_checkpointing=checkpointing)
    model, _ = load(find(str(stories)), plan)
    model = lora.attach(model, plan).train()
    ids = torch.arange(3, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_head_that_will_be_trained_stays_in_full_precision(stories, precision):
    plan = Plan.model_validate(
        {
            "base_model": str(stories),
            "objective": "classification",
            "method": "qlora",
            "precision": precision,
            "data": {"labels": ["a", "b"]},
        }
    )
    model, _ = load(find(str(stories)), plan)
    head = lora.extract(lora.attach(model, plan)).dense
    assert {name: tensor.shape for name, tensor in head.items()} == {"score.weight": (2, 64)}
    assert all(np.isfinite(tensor).all() and tensor.std() > 0 for tensor in head.values())


@pytest.mark.parametrize("name", ["bert.encoder.layer.3.output.dense.weight", "encoder.layer.3.output.dense.weight"])
def test_one_weight_of_a_checkpoint_is_read_by_its_name_in_the_model_too(encoder, name):
    """The checkpoint holds the inner model alone, the model that is trained has it under a prefix."""
    model, _ = load(find(encoder), Plan.model_validate(classifier_of(encoder)))
    found = original_weight(find(encoder), name, model.base_model_prefix)
    assert (found == model.get_parameter("bert.encoder.layer.3.output.dense.weight")).all()


def test_a_weight_that_the_checkpoint_lacks_is_named(stories):
    with pytest.raises(ModelError, match=r"no weight 'model.layers.99.weight' in the checkpoint"):
        original_weight(find(str(stories)), "model.layers.99.weight", "model")


def classifier_of(name, **head):
    labels = ["card_arrival", "exchange_rate", "lost_phone"]
    return {"base_model": name, "objective": "classification", "data": {"labels": labels}, "head": head}


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_a_head_that_starts_from_the_names_of_its_labels_knows_them(base, encoder, stories):
    """Each name, read by the base, is nearer to its own row than to any other; the bias measures from the middle of all."""
    import torch

    name = encoder if base == "encoder" else str(stories)
    plan = Plan.model_validate(classifier_of(name, init="label-names"))
    model, tokenizer = load(find(name), plan)
    texts = tokenizer([label.replace("_", " ") for label in plan.data.labels], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**texts).logits
    assert logits.argmax(1).tolist() == [0, 1, 2]
    head = next(module for module in model.modules() if getattr(module, "out_features", 0) == 3)
    assert head.weight.norm(dim=1).tolist() == pytest.approx([2.0] * 3, rel=1e-5)
