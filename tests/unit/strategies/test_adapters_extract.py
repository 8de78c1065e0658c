"""A LoRA from two checkpoints: the best of its rank, its worth told, loaded by plain PEFT; what it cannot hold is said."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_bases import saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from protocol.errors import ModelError
from protocol.files import read_stored, write_adapter
from strategies.adapted import with_adapter
from strategies.adapters.extract import extract
from strategies.base_model import find
from strategies.methods.low_rank import keeping, nearest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    home = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, home / kind) for kind in ("llama", "gpt2")}


def changed(source, folder, changes):
    """A copy of a checkpoint with some tensors changed: ``changes`` maps the end of a name to a function."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for ending, change in changes.items():
            if name.endswith(ending):
                tensors[name] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return find(str(folder))


def noise(scale=0.05, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return lambda tensor: tensor + scale * torch.randn(tensor.shape, generator=draw)


def low_rank(r, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def change(tensor):
        left, right = (torch.randn(size, r, generator=draw) for size in tensor.shape)
        return tensor + 0.05 * left @ right.T

    return change


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 33).reshape(2, 15)).logits


def plain(base, folder, kind=AutoModelForCausalLM, **more):
    return PeftModel.from_pretrained(kind.from_pretrained(base.folder, dtype=torch.float32, **more), folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_change_of_small_rank_comes_back_whole_in_plain_peft(bases, tmp_path, kind):
    """Oracle: the tuned model. Norms go whole; Conv1D and embeddings lie transposed; the output layer shares a weight."""
    base = find(bases[kind])
    ends = {"llama": ("proj.weight", "embed_tokens.weight"), "gpt2": ("c_attn.weight", "c_proj.weight", "wte.weight")}[kind]
    norms = {"llama": ("norm.weight",), "gpt2": ("ln_f.weight", "ln_f.bias", "ln_1.bias")}[kind]
    changes = {ending: low_rank(2, at) for at, ending in enumerate(ends)} | {name: noise(0.1) for name in norms}
    tuned = changed(base.folder, tmp_path / "tuned", changes)
    found = extract(base, tuned, r=2)
    write_adapter(tmp_path / "lora", found.adapter, found.manifest, found.plan)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tuned.folder))
    # Exact SVDs in float32 of widths 32 to some hundreds; logits of order one.
    assert torch.allclose(logits(plain(base, tmp_path / "lora")), wanted, rtol=1e-3, atol=2e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base.folder)), wanted, atol=1e-2)
    stored = read_stored(tmp_path / "lora", base_digest=base.digest)
    ours = with_adapter(stored.on(found.plan), base, stored.adapter)[0]
    assert torch.allclose(logits(ours), wanted, rtol=1e-3, atol=2e-4)
    assert found.energy_kept == pytest.approx(1.0, abs=1e-6)
    assert not found.left_out
    assert "lm_head" in found.matrices
    told = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["base_model_name_or_path"]) == ("LORA", base.name)


def test_the_energy_kept_is_that_of_the_singular_values(bases, tmp_path):
    """Oracle: Eckart and Young by numpy in float64."""
    base = find(bases["llama"])
    tuned = changed(base.folder, tmp_path / "tuned", {"q_proj.weight": noise(), "up_proj.weight": noise(0.01, 1)})
    found = extract(base, tuned, r=5)
    before, after = (load_file(each.folder / "model.safetensors") for each in (base, tuned))
    kept = whole = 0.0
    assert len(found.matrices) == 8
    for module, told in found.matrices.items():
        change = after[f"{module}.weight"].double().numpy() - before[f"{module}.weight"].double().numpy()
        values = np.linalg.svd(change, compute_uv=False) ** 2
        # Float32 arithmetic on some thousand numbers.
        assert told.energy == pytest.approx(values[:5].sum() / values.sum(), abs=1e-5)
        relative = np.linalg.norm(change) / np.linalg.norm(before[f"{module}.weight"].double().numpy())
        assert told.change == pytest.approx(relative, rel=1e-4)
        assert told.r == found.adapter.factors[module].r == 5
        kept, whole = kept + values[:5].sum(), whole + values.sum()
    assert found.energy_kept == pytest.approx(kept / whole, abs=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_an_energy_is_kept_at_the_smallest_rank_that_does(bases, tmp_path, energy):
    base = find(bases["llama"])
    tuned = changed(base.folder, tmp_path / "tuned", {"proj.weight": noise()})
    found = extract(base, tuned, energy=energy)
    before, after = (load_file(each.folder / "model.safetensors") for each in (base, tuned))
    for module, told in found.matrices.items():
        change = after[f"{module}.weight"].double().numpy() - before[f"{module}.weight"].double().numpy()
        kept = np.cumsum(np.linalg.svd(change, compute_uv=False) ** 2)
        assert told.energy >= energy - 1e-5
        assert told.r == 1 + int(np.count_nonzero(kept < energy * kept[-1]))
    assert found.energy_kept >= energy - 1e-5


def test_drawn_directions_keep_what_was_asked_at_nearly_the_smallest_rank():
    """A matrix so large that ranks are tried: a spectrum that falls by the power of -1. Oracle: numpy's exact one, float64."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.standard_normal((size, 150)))[0] for size in (400, 300))
    s = 1.0 / np.arange(1, 151)
    matrix = torch.from_numpy((u * s) @ v.T).float()
    for energy in (0.5, 0.95, 0.99):
        pair = keeping(matrix, energy)
        least = 1 + int(np.count_nonzero(np.cumsum(s**2) < energy * (s**2).sum()))
        lost = float((matrix.double() - torch.from_numpy(pair.product())).square().sum() / (s**2).sum())
        assert 1 - lost >= energy - 1e-6
        assert least <= pair.r <= least + 1
        assert np.allclose(pair.product(), nearest(matrix, pair.r).product(), atol=1e-4)


def test_what_a_lora_has_no_place_for_is_said(bases, tmp_path):
    """A bias beside factors cannot be put in PEFT's files as they are; its change counts as lost."""
    base = find(bases["gpt2"])
    tuned = changed(base.folder, tmp_path / "tuned", {"c_attn.weight": low_rank(1), "c_attn.bias": noise(0.1)})
    found = extract(base, tuned, r=1)
    before, after = (load_file(each.folder / "model.safetensors") for each in (base, tuned))
    biases = [name for name in before if name.endswith("c_attn.bias")]
    assert len(biases) == len(found.left_out) == 4
    lost = sum(float((after[name] - before[name]).double().square().sum()) for name in biases)
    moved = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    assert found.energy_kept == pytest.approx(1 - lost / moved, abs=1e-6)
    for name, size in found.left_out.items():
        key = next(each for each in biases if name.endswith(each))
        assert size == pytest.approx(float((after[key] - before[key]).norm() / before[key].norm()), rel=1e-4)


def test_a_classifier_brings_its_head(encoder, tmp_path):
    """A real encoder, fine-tuned by noise: a head that the base has not, and biases and norms everywhere."""
    base = find(encoder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=3, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "value.weight")):
                parameter += 0.1 * torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1])
            if name.endswith("LayerNorm.weight"):
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(base.folder).save_pretrained(tmp_path / "tuned")
    found = extract(base, find(str(tmp_path / "tuned")), r=1)
    write_adapter(tmp_path / "lora", found.adapter, found.manifest, found.plan)
    torch.manual_seed(1)
    loaded = plain(base, tmp_path / "lora", AutoModelForSequenceClassification, num_labels=3)
    # 6 layers of width 384 in float32 after exact SVDs of rank one changes.
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    assert {"classifier.weight", "classifier.bias"} <= set(found.whole)
    assert all(name.startswith("classifier") or "LayerNorm" in name for name in found.whole)
    assert found.energy_kept == pytest.approx(1, abs=1e-5)


def test_two_of_the_same_or_of_other_shapes_are_refused(bases, tmp_path):
    base = find(bases["llama"])
    with pytest.raises(ModelError, match="nothing that a LoRA could hold has changed"):
        extract(base, changed(base.folder, tmp_path / "same", {}), r=2)
    with pytest.raises(ModelError, match="embed_tokens"):
        extract(base, find(saved("llama", tmp_path / "wide", hidden_size=64)), r=2)
    with pytest.raises(ModelError, match="no weight"):
        extract(base, find(bases["gpt2"]), r=2)


def test_the_same_two_give_the_same_adapter(bases, tmp_path):
    base = find(bases["llama"])
    tuned = changed(base.folder, tmp_path / "tuned", {"proj.weight": noise()})
    assert len({extract(base, tuned, r=1).adapter.digest() for _ in range(2)}) == 1
