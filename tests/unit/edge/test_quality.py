"""What quantisation costs a real task and a real text: what each profile promises, measured by the gate of every bundle."""

import json
from itertools import islice
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.make import Request, make_bundle
from edge.runtime.verify import verified
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.formats import load
from strategies.training import fit

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
POINTS = {"q8": 0.003, "q4": 0.015}
RATIO = {"q8": 1.01, "q4": 1.08}


@pytest.fixture(scope="module")
def intents(data, encoder, tmp_path_factory):
    """MiniLM with a LoRA and a head for CLINC150's 150 intents: the plan, and the adapter's folder."""
    labels = json.loads((data / "classify" / "clinc150_labels.json").read_text(encoding="utf-8"))
    plan = Plan.model_validate(
        {
            "base_model": encoder,
            "objective": "classification",
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]},
            "head": {"init": "label-names", "learning_rate": 2e-2},
            "dropout": 0.0,
            "data": {"labels": labels, "max_length": 64},
            "training": {"learning_rate": 2e-3, "batch_size": 32, "max_steps": 150, "lr_scheduler_type": "linear"},
        }
    )
    base = find(encoder)
    trained = fit(plan, base, load(data / "classify" / "clinc150_train.jsonl", plan))
    folder = tmp_path_factory.mktemp("clinc") / "adapter"
    manifest = Manifest(base_digest=base.digest, kind="adapter", method="lora", r=16)
    write_adapter(folder, trained.adapter, manifest, plan)
    return plan, folder


@pytest.mark.slow
@pytest.mark.timeout(2400)  # of minutes on a machine that is busy with other things
@pytest.mark.parametrize("profile", POINTS)
def test_a_classifier_keeps_its_accuracy(intents, data, tmp_path, profile):
    """Issue 6: on CLINC150's 2,244 test rows q8 loses at most 0.3 points, q4 at most 1.5."""
    plan, folder = intents
    rows = data / "classify" / "clinc150_test.jsonl"
    request = Request(plan.base_model, tmp_path / profile, KEY, {"intents": folder}, profile=profile, plan=plan, rows=rows)
    manifest = verified(make_bundle(request), [KEY.public_key()])
    figures = manifest.parity["intents"]
    before, after = figures.metrics["accuracy"]
    print(profile, figures.model_dump(), f"{manifest.size_bytes:,} bytes")  # noqa: T201 (for benchmarks/LOG.md)
    assert figures.rows == 2244
    assert before > 0.9
    assert after >= before - POINTS[profile]
    assert manifest.adapters["intents"].labels == plan.data.labels


@pytest.mark.slow
@pytest.mark.timeout(2400)  # of minutes on a machine that is busy with other things
@pytest.mark.parametrize("profile", RATIO)
def test_a_decoder_of_260_000_parameters_keeps_its_perplexity(data, tmp_path, profile):
    """Issue 6: perplexity within 1 % (q8) and 8 % (q4), with an intermediate size that is no multiple of 32.

    q4 looks at other stories first, and may take a fifth of float32's bytes: the output layer keeps 8 bits then.
    """
    base = find(str(data / "models" / "stories260k-hf"))
    full = 4 * 260_032  # bytes
    plan = Plan.model_validate({"base_model": base.name, "objective": "pretraining", "data": {"max_length": 256}})
    stories = data / "text" / "stories_selfgen_en.jsonl"
    rows, others = part(stories, tmp_path / "rows.jsonl", 0, 100), part(stories, tmp_path / "others.jsonl", 1000, 1032)
    more = {"calibration": others, "largest_bytes": full // 5} if profile == "q4" else {}
    request = Request(base.name, tmp_path / profile, KEY, profile=profile, plan=plan, rows=rows, **more)
    manifest = verified(make_bundle(request), [KEY.public_key()])
    figures = manifest.parity["base"]
    before, after = figures.metrics["perplexity"]
    print(profile, figures.model_dump(), manifest.remarks)  # noqa: T201
    assert json.loads((base.folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"] == 172
    assert after <= RATIO[profile] * before


def part(source: Path, target: Path, first: int, last: int) -> Path:
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, first, last)), encoding="utf-8")
    return target


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_an_embedder_in_8_bits_points_the_same_way(encoder, tmp_path):
    """The least cosine over texts of several languages and kinds."""
    manifest = verified(make_bundle(Request(encoder, tmp_path / "q8", KEY)), [KEY.public_key()])
    assert manifest.kind == "embedder"
    assert manifest.parity["base"].cosine > 0.999
