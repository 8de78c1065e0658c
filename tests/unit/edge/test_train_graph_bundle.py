"""Bundles with training graphs: compared before they are signed, kept by the next version and with fewer bits."""

import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.make import Request, add_adapters, make_bundle, requantise
from edge.runtime.gradient import open as opened
from edge.runtime.verify import verified
from edge.train_graph.gate import check_gradients
from edge.train_graph.make import for_training
from protocol.errors import BundleError, ModelError
from strategies.base_model import find
from tests.unit.edge.test_make import adapter as trained
from tests.unit.edge.trained_graphs import adapter, cosine, rows

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Two layers of the embedded model, which shares its head with its embedding."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "small"
    whole = find("tiny").folder
    AutoModelForCausalLM.from_pretrained(str(whole), num_hidden_layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, folder / name)
    return str(folder)


@pytest.mark.slow
def test_a_trainable_bundle_is_made_quantised_and_extended(base, tmp_path):
    said = []
    first = make_bundle(Request(base, tmp_path / "first", KEY, profile="fp32", name="demo", trainable=True), said.append)
    assert any("gradients over its weights have cosine 1.0000" in line for line in said)
    whole = opened(first, KEY.public_key(), state=None)
    assert whole.manifest.training.layers == 2
    given, batch = adapter(whole), rows(whole)
    expected = whole.loss_and_gradients(batch, given)
    for profile, least in (("q8", 0.999), ("q4", 0.9), ("int8-dynamic", 0.98)):
        smaller = requantise(first, profile, tmp_path / profile, KEY, say=said.append)
        found = opened(smaller, KEY.public_key(), state=None).loss_and_gradients(batch, given)
        assert least <= cosine(found.gradients, expected.gradients) < 1
        sizes = {path: file.size_bytes for path, file in verified(smaller, [KEY.public_key()]).files.items()}
        assert sizes["training/weights.data"] < 0.05 * sizes["model.onnx.data"]
        assert ("training/layer-0-integers.onnx" in sizes) == (profile == "int8-dynamic")
    more = add_adapters(
        first, {"north": trained(base, tmp_path / "north", 1, 4, "q_proj")}, tmp_path / "next", KEY, base_model=base
    )
    again = opened(more, KEY.public_key(), state=None).loss_and_gradients(batch, given)
    assert again.gradients.digest() == expected.gradients.digest()
    model = for_training(find(base), "decoder", ())
    model.model.norm.variance_epsilon = 0.5  # another function of the same weights: that is what the gate is for
    with pytest.raises(BundleError, match="the training graphs are not this model"):
        check_gradients(first, KEY.public_key(), model)


def test_an_embedder_is_refused_before_it_is_exported(encoder, tmp_path):
    with pytest.raises(ModelError, match="only decoders and classifiers"):
        make_bundle(Request(encoder, tmp_path / "bundle", KEY, kind="embedder", trainable=True))
    assert not (tmp_path / "bundle").exists()
