"""Layer-wise freezing: which parameters train is held against lists that are written out here, and against what has moved."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_bases import LAYERS, saved

from protocol.configuration import parse
from protocol.errors import ConfigurationError, ModelError
from protocol.method_settings import FreezingSettings
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import freezing
from strategies.methods.registry import METHODS, shape
from strategies.training import Stretch, fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def layer(number):
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    return {f"model.layers.{number}.{part}.weight" for part in parts}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return saved("bert", tmp_path_factory.mktemp("bert"))


def plan_of(name, settings, **more):
    return Plan.model_validate({"base_model": name, "method": "freezing", "freezing": settings, "lora": {"r": 2}, **more})


def trainable(plan):
    model = freezing.attach(load(find(plan.base_model), plan)[0], plan)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


SHARES = {
    "half from the bottom": ({"frozen_share": 0.5}, layer(2) | layer(3) | {NORM}),
    "half from the top": ({"frozen_share": 0.5, "order": "top-down"}, layer(0) | layer(1) | {EMBEDDING}),
    "every second": ({"frozen_share": 0.5, "order": "alternating"}, layer(1) | layer(3) | {NORM}),
    "every second and one more": ({"frozen_share": 0.75, "order": "alternating"}, layer(3) | {NORM}),
    "nearly all": ({"frozen_share": 0.99}, layer(3) | {NORM}),
    "none": ({"frozen_share": 0.0}, layer(0) | layer(1) | layer(2) | layer(3) | {EMBEDDING, NORM}),
    "by name": ({"train": ["norm", "layers.1.mlp", "q_proj"]}, {NORM}),
}
SHARES["by name"][1].update(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
SHARES["by name"][1].update(f"model.layers.{number}.self_attn.q_proj.weight" for number in range(LAYERS))


@pytest.mark.parametrize(("settings", "wanted"), SHARES.values(), ids=SHARES.keys())
def test_what_trains_is_what_the_plan_says(llama, settings, wanted):
    assert trainable(plan_of(llama, settings)) == wanted


@pytest.mark.parametrize(("settings", "wanted"), SHARES.values(), ids=SHARES.keys())
def test_what_trains_is_what_travels(llama, settings, wanted):
    found = shape(find(llama), plan_of(llama, settings))
    norms = {name for name in wanted if "norm" in name}
    assert found.dense.keys() == norms
    assert {f"{module}.weight" for module in found.modules} == wanted - norms


def test_a_classifiers_head_always_trains_and_the_pooler_goes_with_the_top(bert):
    task = {"objective": "classification", "data": {"labels": ["a", "b"]}}
    head, pooler = {"classifier.weight", "classifier.bias"}, {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    below = trainable(plan_of(bert, {"frozen_share": 0.5}, **task))
    above = trainable(plan_of(bert, {"frozen_share": 0.5, "order": "top-down"}, **task))
    named = trainable(plan_of(bert, {"train": ["layer.2.output"]}, **task))
    assert head <= below & above & named
    assert pooler <= below - above
    assert {name.partition("encoder.layer.")[2][:1] for name in below - head - pooler} == {"2", "3"}
    assert {name.partition("encoder.layer.")[2][:1] or name.split(".")[1] for name in above - head} == {"0", "1", "embeddings"}
    assert {name.rpartition(".")[0] for name in named - head} == {
        "bert.encoder.layer.2.output.dense",
        "bert.encoder.layer.2.output.LayerNorm",
    }


@given(
    share=st.floats(0, 1, exclude_max=True),
    count=st.integers(1, 100),
    order=st.sampled_from(["bottom-up", "top-down", "alternating"]),
)
def test_an_order_freezes_its_share_of_distinct_layers_and_leaves_one(share, count, order):
    settings = FreezingSettings(frozen_share=share, order=order)
    frozen = freezing.order(settings, count)
    assert len(set(frozen)) == len(frozen) < count
    assert set(frozen) <= set(range(count))
    assert abs(len(frozen) - min(share * count, count - 1)) <= 0.5
    if order == "bottom-up":
        assert frozen == list(range(len(frozen)))
    if order == "top-down":
        assert frozen == list(range(count - 1, count - 1 - len(frozen), -1))
    if order == "alternating":
        assert [number % 2 for number in frozen] == sorted(number % 2 for number in frozen)


# Thawing -------------------------------------------------------------------------------------------------------------------


def moved(plan, **more):
    """Names of parameters that a training has changed: by their factors, or by their value."""
    trained = fit(plan, find(plan.base_model), ROWS, **more)
    before = load(find(plan.base_model), plan)[0]
    names = {f"{module}.weight" for module, pair in trained.adapter.factors.items() if pair.A.any()}
    return names | {
        name
        for name, tensor in trained.adapter.dense.items()
        if not np.array_equal(tensor, before.get_parameter(name).detach().numpy())
    }


@pytest.mark.parametrize(
    ("steps", "done", "wanted"),
    [
        (2, 0, layer(3) | {NORM}),  # the first thaw comes before the third step
        (3, 0, layer(2) | layer(3) | {NORM}),
        (2, 4, layer(1) | layer(2) | layer(3) | {NORM}),  # a later round goes on where the one before left it
        (1, 6, layer(0) | layer(1) | layer(2) | layer(3) | {NORM, EMBEDDING}),
    ],
)
def test_one_more_layer_trains_after_so_many_steps(llama, steps, done, wanted):
    training = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": steps, "warmup_ratio": 0.0}
    plan = plan_of(llama, {"frozen_share": 0.75, "thaw_every": 2}, training=training)
    assert moved(plan, stretch=Stretch(done=done, total=20)) == wanted


def test_what_may_thaw_travels_from_the_beginning(llama):
    """All rounds of a federation must agree on the shape of an adapter."""
    thawing = shape(find(llama), plan_of(llama, {"frozen_share": 0.75, "thaw_every": 2}))
    full = shape(find(llama), Plan(base_model=llama, method="full"))
    assert thawing == full


def test_a_frozen_layer_costs_the_optimizer_nothing(llama):
    """Parameters without a gradient are passed over: no moments are kept for them, and they stay as they were to the bit."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    plan = plan_of(llama, {"frozen_share": 0.75, "thaw_every": 100}, training={"batch_size": 4, "max_steps": 2})
    seen = {}

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            states = {
                id(p) for group in optimizer.optimizer.param_groups for p in group["params"] if optimizer.optimizer.state[p]
            }
            seen.update({name: id(parameter) in states for name, parameter in model.named_parameters()})

    method = METHODS["freezing"]
    base = find(llama)
    model = method.attach(load(base, plan)[0], plan)
    callbacks = [*method.callbacks(model, plan, 0), Look()]
    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir="unused", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    assert {name for name, known in seen.items() if known} == layer(3) | {NORM}


# Refusals ------------------------------------------------------------------------------------------------------------------


def test_a_part_that_the_base_lacks_is_refused_with_those_that_it_has(llama):
    plan = plan_of(llama, {"train": ["norm", "c_attn"]})
    with pytest.raises(ModelError, match=r"nothing in the base is named c_attn; there are .*self_attn"):
        shape(find(llama), plan)


@pytest.mark.parametrize("other", [{"thaw_every": 3}, {"frozen_share": 0.5}, {"order": "top-down"}])
def test_parts_and_a_share_together_are_refused(other):
    with pytest.raises(ConfigurationError, match=rf"train names what trains, and {next(iter(other))} would choose it"):
        parse({"method": "freezing", "freezing": {"train": ["norm"], **other}}, Plan, source="test")


def test_a_base_whose_layers_cannot_be_told_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        both = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=2))
    with pytest.raises(ModelError, match="found 2 lists of 2 layers"):
        freezing.attach(both, Plan(method="freezing"))
