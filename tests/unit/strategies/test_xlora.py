"""X-LoRA: where a mixture begins, what it computes, that its router learns which adapter knows, and that it stands alone."""

import shutil

import numpy as np
import pytest
import torch
from small_bases import WIDTH, logits, saved

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import xlora
from strategies.methods.registry import shape
from strategies.training import fit

MODULES = {"model.layers.1.self_attn.q_proj": (WIDTH, WIDTH), "model.layers.3.mlp.down_proj": (WIDTH, 48)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved("llama", tmp_path_factory.mktemp("bases") / "llama")


def written(folder, base, adapter, method="lora"):
    plan = Plan.model_validate({"base_model": base, "method": method})
    write_adapter(folder, adapter, Manifest(base_digest=find(base).digest, kind="adapter", method=method), plan)
    return str(folder)


def drawn(r, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *size: (0.4 * rng.standard_normal(size)).astype(np.float32)  # noqa: E731
    return Adapter({name: Factors(draw(r, d_in), draw(d_out, r), 0.5) for name, (d_out, d_in) in MODULES.items()})


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [written(folder / str(r), base, drawn(r, r)) for r in (2, 3)]


def plan_of(base, adapters, **more):
    return Plan.model_validate({"base_model": base, "method": "xlora", "xlora": {"adapters": adapters, **more}})


def begun(plan):
    model = xlora.attach(load(find(plan.base_model), plan)[0], plan)
    xlora.begin(model, plan, find(plan.base_model))
    return model


def mean_of(base, shares):
    """The base with a fixed mixture in its weights, which is what equal shares at every token amount to."""
    model = load(find(base), Plan.model_validate({"base_model": base}))[0]
    with torch.no_grad():
        for r, share in shares.items():
            for name, pair in drawn(r, r).factors.items():
                change = share * pair.scaling * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
                model.get_submodule(name).weight += torch.from_numpy(change)
    return model


def test_a_mixture_begins_as_the_mean_of_its_adapters_and_its_router_alone_trains(base, two):
    model = begun(plan_of(base, two))
    torch.testing.assert_close(logits(model), logits(mean_of(base, {2: 0.5, 3: 0.5})), rtol=1e-4, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("internal_xlora_classifier" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 2 * WIDTH + 2


def test_a_router_that_has_decided_uses_one_adapter(base, two):
    model = begun(plan_of(base, two))
    with torch.no_grad():
        xlora.dense(model)["router.layers.0.bias"].copy_(torch.tensor([-40.0, 40.0]))
    torch.testing.assert_close(logits(model), logits(mean_of(base, {3: 1.0})), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"xlora_depth": 2, "xlora_size": 8}, {"layerwise_scalings": True}, {"top_k_lora": 1}])
def test_the_shape_is_known_without_reading_a_weight(base, two, more):
    plan = plan_of(base, two, **more)
    model, found = begun(plan), shape(find(base), plan)
    assert found.modules == {f"{number}.{name}": size for number in range(2) for name, size in MODULES.items()}
    assert found.dense == {name: tuple(p.shape) for name, p in xlora.dense(model).items()}


def test_what_was_trained_stands_alone_without_the_folders_that_it_was_made_from(base, two, tmp_path):
    own = [shutil.copytree(folder, tmp_path / str(n)) for n, folder in enumerate(two)]
    plan = plan_of(base, [str(folder) for folder in own])
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"max_steps": 3, "learning_rate": 0.01})})
    rows = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
    trained = fit(plan, find(base), rows).adapter
    assert np.abs(trained.dense["router.layers.0.weight"]).max() > 0
    for number, r in enumerate((2, 3)):
        for name, pair in drawn(r, r).factors.items():
            mixed = trained.factors[f"{number}.{name}"]
            np.testing.assert_allclose(mixed.B @ mixed.A, pair.scaling * pair.B @ pair.A, rtol=1e-5, atol=1e-6)
    first = logits(with_adapter(plan, find(base), trained)[0])
    write_adapter(tmp_path / "made", trained, Manifest(base_digest=find(base).digest, kind="adapter", method="xlora"), plan)
    for folder in own:
        shutil.rmtree(folder)
    stored = read_stored(tmp_path / "made")
    again = with_adapter(stored.on(Plan.model_validate({"base_model": base})), find(base), stored.adapter)[0]
    torch.testing.assert_close(logits(again), first, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_router_learns_which_adapter_knows_the_answer(tmp_path):
    """One adapter has learnt one half of the answers, the other the other half; the mixture must tell both."""
    base, halves = find("tiny"), []
    rows = [
        [Conversation(({"role": "user", "content": f"{place}: which room has number {n}?"},), answer) for n in range(40)]
        for place, answer in (("North", "The red one."), ("South", "The blue one."))
    ]
    learns = {"base_model": "tiny", "lora": {"r": 4}, "training": {"max_steps": 60, "learning_rate": 0.005}}
    for number, half in enumerate(rows):
        plan = Plan.model_validate(learns)
        manifest = Manifest(base_digest=base.digest, kind="adapter", method="lora")
        write_adapter(tmp_path / str(number), fit(plan, base, half).adapter, manifest, plan)
        halves.append(str(tmp_path / str(number)))
    mixture = Plan.model_validate({**learns, "method": "xlora", "xlora": {"adapters": halves}})
    from strategies.evaluation.measure import measure

    both = [*rows[0], *rows[1]]
    trained = fit(mixture, base, both).adapter
    start = Adapter(trained.factors, {name: np.zeros_like(tensor) for name, tensor in trained.dense.items()})
    mean, made = (measure(mixture, base, both, adapter) for adapter in (start, trained))
    assert made["accuracy"] > 0.95
    assert made["loss"] < 0.5 * mean["loss"]


def test_what_cannot_be_mixed_is_refused(base, two, tmp_path):
    with pytest.raises(ValueError, match="name their folders"):
        Plan.model_validate({"base_model": base, "method": "xlora"})
    with pytest.raises(AdapterError, match="at least 2 adapters"):
        shape(find(base), plan_of(base, two[:1]))
    with pytest.raises((AdapterError, ConfigurationError), match="nowhere"):
        shape(find(base), plan_of(base, [*two, str(tmp_path / "nowhere")]))
    whole = written(tmp_path / "bias", base, Adapter({}, {"model.norm.bias": np.zeros(WIDTH, np.float32)}), "bitfit")
    with pytest.raises(AdapterError, match="found method bitfit with whole tensors; xlora mixes plain LoRA adapters"):
        shape(find(base), plan_of(base, [*two, whole]))
