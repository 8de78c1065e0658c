"""What goes beyond a device's bounds, and a signed bundle that contradicts itself, are refused before they cost anything."""

import json

import numpy as np
import pytest
from runtime_bundles import concat_decoder, open_tested
from tokenizers import Tokenizer, models, pre_tokenizers

from edge.runtime.latency import measure
from edge.runtime.manifest import Tokens
from edge.runtime.model import Model
from edge.runtime.session import Resources, zeros
from edge.runtime.tokens import Tokeniser
from protocol.errors import BundleError, ConfigurationError, DataError, HardwareError

TABLE = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
UNKNOWN = "<unk>"
PLACES = np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return concat_decoder(tmp_path_factory.mktemp("bounds") / "bundle", TABLE, PLACES)


@pytest.fixture(scope="module")
def model(folder):
    return open_tested(folder)


@pytest.mark.parametrize("threads", [5000, 99999999999])
def test_more_threads_than_processors_can_serve_are_refused_with_the_number(threads):
    with pytest.raises(ConfigurationError, match=rf"threads: found {threads}, expected at most \d+ \(\d+ processors"):
        Resources(threads=threads)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", [[2, 6], [-1, 2], [10**30], np.array([2, 99])])
def test_ids_that_are_no_tokens_of_the_model_are_refused_with_a_penalty_or_without(model, prompt, penalty):
    with pytest.raises(DataError, match="expected 0 to 5"):
        model.generate(prompt, repetition_penalty=penalty)


@pytest.mark.parametrize("prompt", [None, 5, b"a b", {"role": "user"}, np.array(3), [True, False], [2.0], [2, "a"]])
def test_what_is_no_prompt_is_a_data_error(model, prompt):
    with pytest.raises(DataError, match="prompt is"):
        model.generate(prompt)


def test_token_ids_may_come_as_an_array(model):
    assert model.generate(np.array([2, 3])) == model.generate([2, 3])


def test_a_tokenizer_that_knows_more_tokens_than_its_model_is_refused_where_they_are_used(tmp_path):
    model = open_tested(concat_decoder(tmp_path / "bundle", TABLE[:4], PLACES))

    assert model.generate("a b").ids
    with pytest.raises(DataError, match="from 2 to 5; expected 0 to 3"):
        model.generate("a d", repetition_penalty=2)
    assert measure(model, prompt_tokens=8, new_tokens=2, repeats=1).rows


@pytest.mark.parametrize(("prompt", "new"), [(10**15, 2), (4, 10**15), (11, 2)])
def test_a_measurement_that_the_context_cannot_hold_is_refused_before_anything_is_made(model, prompt, new):
    with pytest.raises(DataError, match=rf"prompt of {prompt} tokens and an answer of {new} were asked for.* holds 12"):
        measure(model, prompt_tokens=prompt, new_tokens=new)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"layers": 2**31 - 1}, "too few for keys and values of the 2147483647 layers"),
        ({"kv_heads": 2}, "past.0.key is"),
        ({"head_dim": 2**31 - 1}, "past.0.key is"),
        ({"vocabulary": 2**31 - 1}, "logits is"),
    ],
)
def test_a_manifest_that_contradicts_its_graph_is_refused_when_it_is_opened(model, folder, changed, why):
    described = model.manifest.model_copy(update={"decoder": model.manifest.decoder.model_copy(update=changed)})

    with pytest.raises(BundleError, match=why):
        Model(folder, described)


@pytest.mark.parametrize("size", [(2**31, 2**31, 2**31), (2**20, 2**30)])
def test_an_array_that_no_machine_holds_is_a_hardware_error(size):
    with pytest.raises(HardwareError, match="no memory"):
        zeros(size, np.float64)


def tokenizer_file(**changed) -> bytes:
    words = Tokenizer(models.WordLevel({"a": 0, UNKNOWN: 1}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return json.dumps(json.loads(words.to_str()) | changed).encode()


def test_a_tokenizer_on_which_the_library_panics_is_a_bundle_error():
    """Rust's panics are no Exception; what they say may quote a text."""
    with pytest.raises(BundleError, match="holds no tokenizer"):
        Tokeniser(tokenizer_file(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), Tokens())
    with pytest.raises(BundleError, match="PanicException") as told:
        Tokeniser(tokenizer_file(pre_tokenizer={"type": "FixedLength", "length": 0}), Tokens()).ids("secret")
    assert "secret" not in str(told.value)
    with pytest.raises(BundleError, match="breaks on a text"):
        Tokeniser(tokenizer_file(decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5}), Tokens()).text([0])


def test_a_text_that_cannot_fit_is_not_even_tokenised(model, monkeypatch):
    monkeypatch.setattr(model.tokens, "ids", None)

    with pytest.raises(DataError, match="has 1000000 characters; expected at most 384, for the context holds 12 tokens"):
        model.generate("a " * 500_000)
