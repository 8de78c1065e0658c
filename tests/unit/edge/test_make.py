"""The whole pipeline on two layers of the embedded model: what passes is written whole, what does not leaves nothing behind."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file, save_file

import edge.room
from edge.bundle import write_bundle
from edge.described import check_heads
from edge.gate import Gate
from edge.make import Request, add_adapters, make_bundle, requantise
from edge.parity import Probe
from edge.reference import outputs, plan_of
from edge.runtime.manifest import Description
from edge.runtime.model import open as opened
from edge.runtime.verify import verified
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BaseMismatchError, BundleError, ConfigurationError, ModelError
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import find

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUSTED = [KEY.public_key()]
LAYERS = 2
SHAPES = {"q_proj": (128, 128), "v_proj": (64, 128), "down_proj": (128, 384)}  # (d_out, d_in) of the embedded model


def adapter(base: str, folder: Path, seed: int, r: int, *targets: str, base_digest: str | None = None) -> Path:
    """A LoRA on some modules of the base that changes what it says."""
    rng = np.random.default_rng(seed)
    factors = {}
    for layer in range(LAYERS):
        for name in targets:
            part = "mlp" if name == "down_proj" else "self_attn"
            d_out, d_in = SHAPES[name]
            A, B = rng.normal(0, 0.2, (r, d_in)), rng.normal(0, 0.05, (d_out, r))
            factors[f"model.layers.{layer}.{part}.{name}"] = Factors(A.astype(np.float32), B.astype(np.float32))
    plan = Plan.model_validate({"base_model": base, "lora": {"r": r, "lora_alpha": r, "target_modules": list(targets)}})
    manifest = Manifest(base_digest=base_digest or find(base).digest, kind="adapter", method="lora", r=r)
    write_adapter(folder, Adapter(factors), manifest, plan)
    return folder


def rows(path: Path) -> Path:
    asked = [("What is the capital?", "Paris."), ("Who is there?", "Nobody at all."), ("你好吗？", "很好。")]
    lines = (json.dumps({"input_text": question, "target_text": answer}) for question, answer in asked)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The first layers of the embedded model, in a folder with its tokenizer: exported in a third of the time."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "small"
    whole = find("tiny").folder
    AutoModelForCausalLM.from_pretrained(str(whole), num_hidden_layers=LAYERS).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "north": adapter(base, folder / "north", 1, 4, "q_proj", "v_proj"),
        "south": adapter(base, folder / "south", 2, 7, "v_proj", "down_proj"),
    }


def in_torch(base: str, folder: Path | None):
    """What PyTorch puts out for token ids."""
    found, stored = find(base), folder and read_stored(folder)
    return outputs(found, "decoder", plan_of(found, "decoder", stored, None, ()), stored)


@pytest.fixture(scope="module")
def whole(base, adapters, tmp_path_factory):
    """An fp32 bundle with one adapter, compared on given rows."""
    return made_whole(base, adapters, tmp_path_factory.mktemp("bundles"))


def made_whole(base: str, adapters, folder: Path) -> Path:
    plan = Plan.model_validate({"base_model": base})
    given = {"profile": "fp32", "name": "demo", "plan": plan, "rows": rows(folder / "rows.jsonl")}
    return make_bundle(Request(base, folder / "first", KEY, {"north": adapters["north"]}, **given))


def test_a_bundle_carries_the_figures_of_base_and_adapter_and_a_report(whole):
    manifest = verified(whole, TRUSTED)
    assert (manifest.name, manifest.version, manifest.profile, manifest.kind) == ("demo", 1, "fp32", "decoder")
    assert manifest.parity.keys() == {"base", "north"}
    for figures in manifest.parity.values():
        # The bound for rounding in float32, of logits up to 20; prefill, and the last 8 tokens through the cache.
        assert figures.largest_logit_difference <= 1e-5 * max(1, figures.largest_logit)
        assert figures.top1 == 1
        assert figures.rows == 3
        before, after = figures.metrics["perplexity"]
        assert after == pytest.approx(before, rel=1e-4)
    # Nobody asks of the base what the adapter has learnt: that figure is told, and bound for the adapter alone.
    bound = {name: figures.budgets.keys() for name, figures in manifest.parity.items()}
    assert bound["north"] - bound["base"] == {"perplexity_ratio", "metric_loss"}
    assert {"difference", "kl", "top1"} <= bound["base"]
    assert "| north | 3 |" in (whole / "parity.md").read_text(encoding="utf-8")


def test_a_bundle_names_no_path_of_the_machine_that_made_it(whole, base):
    content = b"".join(path.read_bytes() for path in whole.rglob("*") if path.is_file())
    assert verified(whole, TRUSTED).base_model == "small"
    for place in (Path(base).parent, whole.parent, Path(edge.room.__file__).parent.parent):
        assert str(place).encode() not in content


def test_the_bundle_answers_as_pytorch_does_with_the_adapter(whole, base, adapters):
    """Oracle: transformers and PEFT on a text that the gate does not read; float32 rounding of logits up to 20."""
    model = opened(whole, TRUSTED, state=None)
    model.load_adapter("north")
    ids = model.prompt_ids([{"role": "user", "content": "Where is the lighthouse?"}])
    expected = in_torch(base, adapters["north"])(ids)
    assert np.abs(model.outputs(ids, adapter="north") - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(model.outputs(ids) - expected).max() > 0.1  # the adapter does change something


def test_another_adapter_makes_the_next_version_and_leaves_the_graph_as_it_was(whole, base, adapters, tmp_path):
    added = add_adapters(whole, {"south": adapters["south"]}, tmp_path / "second", KEY, base_model=base)
    before, after = verified(whole, TRUSTED), verified(added, TRUSTED)
    assert (after.version, after.adapters.keys()) == (2, {"north", "south"})
    assert {path for path in after.files if before.files.get(path) != after.files[path]} == {
        "adapters/south.onnx_adapter",
        "parity.md",
    }
    assert after.parity["north"] == before.parity["north"]
    assert after.parity["south"].largest_logit_difference <= 1e-5 * max(1, after.parity["south"].largest_logit)


@pytest.mark.parametrize("profile", ["q8", "q4"])
def test_an_fp32_bundle_becomes_smaller_ones_without_its_base(whole, tmp_path, profile):
    made = requantise(whole, profile, tmp_path / profile, KEY)
    before, after = verified(whole, TRUSTED), verified(made, TRUSTED)
    assert after.profile == profile
    assert after.size_bytes < {"q8": 0.5, "q4": 0.4}[profile] * before.size_bytes
    assert after.parity.keys() == {"base", "north"}
    assert all(0 < figures.kl < 0.3 for figures in after.parity.values())


def test_a_bundle_whose_files_have_several_names_is_made_smaller_as_any_other(whole, tmp_path):
    """As after an update that was applied: hard links to the files of the version before; the same bytes come of them."""
    linked = shutil.copytree(whole, tmp_path / "linked", copy_function=os.link)
    assert (linked / "model.onnx.data").stat().st_nlink > 1
    made = requantise(linked, "q8", tmp_path / "q8", KEY)
    assert verified(linked, TRUSTED) == verified(whole, TRUSTED)
    assert verified(made, TRUSTED).profile == "q8"


def test_nothing_is_made_where_something_is_or_in_its_source(whole, base, adapters, tmp_path):
    """Before any work: the base that does not exist would be found out about next."""
    before = verified(whole, TRUSTED)
    for output, said in ((tmp_path, "is there already"), (whole / "next", "lies in"), (whole / "adapters" / "next", "lies in")):
        with pytest.raises(BundleError, match=said):
            requantise(whole, "q8", output, KEY)
        with pytest.raises(BundleError, match=said):
            add_adapters(whole, {"south": adapters["south"]}, output, KEY, base_model=str(tmp_path / "none"))
    assert verified(whole, TRUSTED) == before


def test_a_next_version_without_anything_new_is_refused(whole, base, tmp_path):
    with pytest.raises(ConfigurationError, match="adapters: found none"):
        add_adapters(whole, {}, tmp_path / "next", KEY, base_model=base)
    assert left(tmp_path) == []


def test_an_adapter_of_rank_0_is_refused_by_its_name(base, adapters, tmp_path):
    empty = Path(shutil.copytree(adapters["north"], tmp_path / "empty"))
    shapes = {name: tensor.shape for name, tensor in load_file(empty / "adapter_model.safetensors").items()}
    none = {
        name: np.zeros((0, shape[1]) if ".lora_A." in name else (shape[0], 0), np.float32) for name, shape in shapes.items()
    }
    save_file(none, empty / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"south: .* rank 0"):
        make_bundle(Request(base, tmp_path / "new", KEY, {"south": empty}))
    assert left(tmp_path) == ["empty"]


def test_a_head_that_nobody_trained_is_not_signed_alone(base, adapters, tmp_path):
    """The embedded model is a decoder; PEFT's LoRA for classification brings ``score.weight``, one for answers does not."""
    with pytest.raises(ModelError, match=r"holds no trained score\.weight: its labels would be drawn at random"):
        make_bundle(Request(base, tmp_path / "new", KEY, kind="classifier"))
    assert left(tmp_path) == []
    found = find(base)
    stored = read_stored(adapters["north"])
    with pytest.raises(ModelError, match=r"score\.weight, nor does the adapter north"):
        check_heads(found, "classifier", {"north": stored})
    brings = dataclasses.replace(stored.adapter, dense={"score.weight": np.zeros((2, 128), np.float32)})
    whole = dataclasses.replace(stored, adapter=brings)
    assert "base alone classifies at random" in check_heads(found, "classifier", {"north": whole})[0]
    assert check_heads(found, "decoder", {}) == []


def test_what_was_rounded_is_not_rounded_again(whole, tmp_path):
    made = requantise(whole, "q8", tmp_path / "q8", KEY)
    with pytest.raises(BundleError, match="is of profile q8"):
        requantise(made, "q4", tmp_path / "q4", KEY)
    assert left(tmp_path) == ["q8"]


def test_a_bundle_beyond_a_bound_is_not_written_and_says_by_how_much(whole, tmp_path):
    stale = tmp_path / ".q4-abcd_123"  # what somebody killed two days ago
    stale.mkdir()
    os.utime(stale, (0, 0))
    with pytest.raises(
        BundleError,
        match=r"(?s)q4 bundle differs too much.*\n  - base: kl is \S+, expected at most 1e-09\n.*--budget NAME=VALUE",
    ):
        requantise(whole, "q4", tmp_path / "q4", KEY, budget={"kl": 1e-9})
    assert left(tmp_path) == []


def test_a_bound_that_was_loosened_stands_in_the_manifest_and_in_the_report(whole, tmp_path):
    made = requantise(whole, "q4", tmp_path / "q4", KEY, budget={"kl": 3.0})
    manifest = verified(made, TRUSTED)
    assert manifest.parity["base"].budgets["kl"] == 3.0
    assert "whoever made this bundle loosened the bound on kl" in manifest.remarks
    assert "loosened" in (made / "parity.md").read_text(encoding="utf-8")


def test_the_gate_notices_an_adapter_that_is_another_one(whole, base, adapters, tmp_path):
    """The tensors of one adapter under the name of another fit the graph, and answer something else."""
    two = add_adapters(whole, adapters, tmp_path / "two", KEY, base_model=base)
    manifest = verified(two, TRUSTED)
    files = {path: two / path for path in manifest.files if path != "parity.md"}
    files["adapters/north.onnx_adapter"] = two / "adapters/south.onnx_adapter"
    described = Description(**{name: getattr(manifest, name) for name in Description.model_fields})

    class Original:
        against = "PyTorch"

        def outputs(self, name):
            return in_torch(base, adapters.get(name))

    with pytest.raises(BundleError, match="north: difference is"):
        write_bundle(tmp_path / "wrong", described, files, KEY, Gate(Original(), {"base": [Probe([1, 5, 9, 30])]}))
    assert left(tmp_path) == ["two"]


def test_outputs_that_are_no_numbers_are_told_with_the_adapter_that_gave_them(whole):
    class Original:
        against = "PyTorch"

        def outputs(self, name):
            return lambda ids: np.full((len(ids), verified(whole, TRUSTED).decoder.vocabulary), np.nan)

    known = {"base": verified(whole, TRUSTED).parity["base"]}
    with pytest.raises(BundleError, match=r"^north: \d+ of \d+ outputs of the model are NaN"):
        Gate(Original(), {"base": [Probe([1, 5, 9])]}, kept=known)(whole, KEY.public_key())


def test_an_adapter_of_another_base_is_refused(whole, base, tmp_path, tmp_path_factory):
    foreign = adapter(base, tmp_path_factory.mktemp("foreign") / "foreign", 3, 2, "q_proj", base_digest="ab" * 32)
    for make in (
        lambda: make_bundle(Request(base, tmp_path / "new", KEY, {"foreign": foreign})),
        lambda: add_adapters(whole, {"foreign": foreign}, tmp_path / "new", KEY, base_model=base),
    ):
        with pytest.raises(BaseMismatchError, match="abababababab"):
            make()
    with pytest.raises(BundleError, match="name the base that it was made from"):
        add_adapters(whole, {"foreign": foreign}, tmp_path / "new", KEY, base_model="tiny")
    assert left(tmp_path) == []


def test_what_can_be_seen_without_a_model_is_refused_before_any_work(base, adapters, tmp_path):
    def refused(error, match, **changes):
        fields = {"base_model": base, "output": tmp_path / "new", "key": KEY, "adapters": {"north": adapters["north"]}}
        with pytest.raises(error, match=match):
            make_bundle(Request(**(fields | changes)))

    refused(ConfigurationError, "profile", profile="q5")
    refused(ConfigurationError, "budget", budget={"kl": float("nan")})
    refused(ConfigurationError, "merge: found 2 adapters", merge=True, adapters=adapters)
    refused(ConfigurationError, "rows: found no plan", rows=tmp_path / "rows.jsonl")
    refused(ConfigurationError, "adapters", adapters={"../north": adapters["north"]})
    refused(ConfigurationError, "adapters", adapters={"base": adapters["north"]})
    refused(ConfigurationError, "name", name="a name")
    refused(BundleError, "is there already", output=tmp_path)
    refused(ModelError, "no such folder", base_model=str(tmp_path / "none"))
    refused(AdapterError, "no such file", adapters={"north": tmp_path})
    assert left(tmp_path) == []


def test_a_model_without_a_tokenizer_is_refused(tmp_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(find("tiny").folder / name, base / name)
    with pytest.raises(ModelError, match="tokenizer"):
        make_bundle(Request(str(base), tmp_path / "new", KEY))
    assert left(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(edge.room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ModelError, match=r"takes [\d,]+ bytes, 10 are free"):
        make_bundle(Request("tiny", tmp_path / "new", KEY))
    assert left(tmp_path) == []


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bundle_to_the_byte(whole, base, adapters, tmp_path):
    again = made_whole(base, adapters, tmp_path)
    digests = [
        {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}
        for folder in (whole, again)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_merged_bundle_is_compared_with_base_and_adapter_as_they_were(base, adapters, tmp_path):
    """Merging rounds every weight once more: 1e-5 of the largest logit is still the bound."""
    made = make_bundle(Request(base, tmp_path / "merged", KEY, {"north": adapters["north"]}, profile="fp32", merge=True))
    manifest = verified(made, TRUSTED)
    assert not manifest.adapters
    assert manifest.base_digest != find(base).digest
    assert manifest.parity["base"].largest_logit_difference <= 1e-5 * manifest.parity["base"].largest_logit
    ids = [1, 7, 50, 300, 20]
    expected = in_torch(base, adapters["north"])(ids)
    assert np.abs(opened(made, TRUSTED, state=None).outputs(ids) - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
