"""Classes and embeddings from a bundle: every text gets its own, whatever stands beside it."""

import numpy as np
import pytest
from runtime_bundles import WORDS, embedder, of_exported, open_tested

from protocol.errors import AdapterError, DataError, ModelError

TABLE = np.random.default_rng(0).normal(size=(len(WORDS), 3)).astype(np.float32)
TEXTS = ["one book", "a much longer sentence about the weather in the north of the country", "two books and a lamp", "no"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return open_tested(embedder(tmp_path_factory.mktemp("small") / "bundle", TABLE))


@pytest.fixture(scope="module")
def classifier(exported_classifier, tmp_path_factory):
    from edge.tokenizer import control_tokens
    from strategies.base_model import load_tokenizer

    base = exported_classifier.base
    return open_tested(
        of_exported(
            tmp_path_factory.mktemp("classifier") / "bundle",
            exported_classifier,
            control_tokens(load_tokenizer(base), base),
            base.folder / "tokenizer.json",
            chat=None,
            labels=("one", "two", "three"),
            adapter_labels=tuple("abcde"),
        )
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_texts_of_all_lengths_keep_their_order_and_padding_counts_for_nothing(small, batch_size):
    """Oracle: the mean of the rows of the table, in float64; 1e-6 is float32's rounding of sums of 5."""
    texts = ["a b c d a", "b", "d d", "c a b", "a"]
    expected = [np.mean([TABLE[WORDS.index(word)].astype(np.float64) for word in text.split()], axis=0) for text in texts]

    found = small.embed(texts, batch_size=batch_size)

    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "no text"),
        (["a", ""], "text 2 has no token"),
        (["a " * 9], "has 9 tokens, and the model reads 8"),
        ("a", "a list of"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_with_the_numbers(small, texts, why):
    with pytest.raises(DataError, match=why):
        small.embed(texts)


def test_what_a_bundle_cannot_do_is_said_with_what_it_can(small):
    for asks in (
        lambda: small.classify(["a"]),
        lambda: small.generate("a"),
        lambda: small.stream("a"),
        lambda: small.conversation(),
        lambda: small.generate_all(["a"]),
    ):
        with pytest.raises(ModelError, match=r"small \(kind: embedder\) can embed"):
            asks()


def test_a_batch_of_no_size_is_refused(small):
    with pytest.raises(DataError, match="batch_size"):
        small.embed(["a"], batch_size=0)


def logits_of(found, texts, adapter):
    """Oracle: transformers, with PEFT's own adapter where one is asked for, one text at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(found.base.folder)
    model = AutoModelForSequenceClassification.from_pretrained(found.base.folder, num_labels=5).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(found.adapters[adapter])).eval()
    with torch.inference_mode():
        return np.stack([model(**tokenizer(text, return_tensors="pt")).logits[0].double().numpy() for text in texts])


def test_a_classifier_with_an_adapter_says_what_peft_says_with_the_adapters_labels(classifier, exported_classifier):
    """Probabilities within 1e-5 of PEFT's, as the issue asks of encoders."""
    classifier.load_adapter("five")
    logits = logits_of(exported_classifier, TEXTS, "five")
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    found = classifier.classify(TEXTS, adapter="five", batch_size=3)

    assert found.names == tuple("abcde")
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.labels == ["abcde"[at] for at in expected.argmax(1)]
    classifier.unload_adapter("five")


def test_the_base_classifier_has_its_own_labels_beside_an_adapter_that_is_loaded(classifier):
    before = classifier.classify(TEXTS)
    classifier.load_adapter("five")
    after = classifier.classify(TEXTS)
    classifier.unload_adapter("five")

    assert before.names == ("one", "two", "three")
    np.testing.assert_array_equal(before.probabilities, after.probabilities)
    np.testing.assert_allclose(before.probabilities.sum(1), 1, atol=1e-6)
    with pytest.raises(AdapterError, match="no adapter five is loaded"):
        classifier.classify(TEXTS, adapter="five")


def test_logits_of_token_ids_are_those_of_their_text(classifier):
    ids = classifier.tokens.ids(TEXTS[0])
    logits = classifier.outputs(ids)

    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(classifier.classify(TEXTS[:1]).probabilities[0], expected / expected.sum(), atol=1e-6)
