"""The gate's figures against scipy's in float64, and that no bundle with a figure beyond its bound, or none at all, passes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from edge.parity import BUDGETS, Probe, check, compare, limits_of, missed
from edge.runtime.manifest import Parity
from protocol.errors import BundleError, ConfigurationError

PERFECT = Parity(
    rows=10,
    positions=100,
    largest_logit_difference=0.0,
    largest_logit=5.0,
    kl=0.0,
    top1=1.0,
    perplexity_ratio=1.0,
    metrics={"accuracy": (0.9, 0.9), "perplexity": (3.0, 3.0)},
)


def held(figures, profile, **changes):
    """Figures, some of them others, with a profile's bounds."""
    return figures.model_copy(update={"budgets": limits_of(profile, {})[0], **changes})


def models(seed, vocabulary=11, noise=0.1, outputs=None):
    """Two functions of token ids whose outputs differ by noise; both the same whenever the same ids come."""

    def made(ids, extra):
        rng = np.random.default_rng([seed, *ids])
        shape = (len(ids), vocabulary) if outputs is None else outputs
        return (rng.normal(0, 3, shape) + extra * rng.normal(0, 1, shape)).astype(np.float32)

    return (lambda ids: made(ids, 0.0)), (lambda ids: made(ids, noise))


@given(st.integers(0, 2**20), st.lists(st.lists(st.integers(0, 10), min_size=2, max_size=9), min_size=1, max_size=4))
def test_a_decoders_figures_are_those_of_their_definitions(seed, texts):
    """Oracle: scipy's log_softmax and rel_entr on all positions at once, in float64; sums of at most 40 numbers, so 1e-9."""
    model, bundle = models(seed)
    figures = compare("decoder", model, bundle, [Probe(ids) for ids in texts])
    p, q = (np.concatenate([each(ids) for ids in texts]).astype(np.float64) for each in (model, bundle))
    assert figures.kl == pytest.approx(rel_entr(softmax(p, axis=1), softmax(q, axis=1)).sum(1).mean(), abs=1e-9)
    assert figures.top1 == (p.argmax(1) == q.argmax(1)).mean()
    assert figures.largest_logit_difference == np.abs(p - q).max()
    assert figures.largest_logit == np.abs(p).max()
    nats = [
        np.concatenate([log_softmax(each(ids)[:-1].astype(np.float64), axis=1)[range(len(ids) - 1), ids[1:]] for ids in texts])
        for each in (model, bundle)
    ]
    assert figures.perplexity_ratio == pytest.approx(math.exp(nats[0].mean() - nats[1].mean()), rel=1e-9)
    assert (figures.rows, figures.positions) == (len(texts), sum(map(len, texts)))


def test_an_answer_is_right_where_all_of_its_tokens_are_the_likeliest():
    def says(*tokens):
        return lambda ids: np.eye(7, dtype=np.float32)[list(tokens)[: len(ids)]]

    probe = Probe([1, 2, 3, 4], [-100, -100, 3, 4])  # the answer is 3 4; what stands before it does not count
    figures = compare("decoder", says(0, 3, 4, 0), says(6, 3, 5, 0), [probe])
    assert figures.metrics["accuracy"] == (1.0, 0.0)
    before, after = figures.metrics["perplexity"]
    # Logits of 1 for one token of 7 and 0 for the rest: it has e / (e + 6), the others 1 / (e + 6).
    assert before == pytest.approx((math.e + 6) / math.e)
    assert after == pytest.approx((math.e + 6) / math.sqrt(math.e))


def test_a_classifiers_accuracy_is_the_share_of_right_labels():
    model, bundle = models(3, outputs=(4,), noise=3.0)
    probes = [Probe([n], n % 4) for n in range(40)]
    figures = compare("classifier", model, bundle, probes)
    assert figures.metrics["accuracy"] == tuple(
        np.mean([each([n]).argmax() == n % 4 for n in range(40)]) for each in (model, bundle)
    )
    assert figures.positions == 40
    assert figures.perplexity_ratio is None


def test_embeddings_are_compared_by_their_least_cosine():
    model, bundle = models(5, outputs=(8,), noise=1.0)
    figures = compare("embedder", model, bundle, [Probe([n]) for n in range(6)])
    pairs = [(model([n]).astype(float), bundle([n]).astype(float)) for n in range(6)]
    assert figures.cosine == pytest.approx(min(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs))
    assert figures.kl is None


def test_of_one_score_per_text_the_scores_of_all_texts_are_compared():
    """A softmax over one number is 1 whatever the number: KL would let anything pass."""
    figures = compare(
        "classifier", lambda ids: np.float32([ids[0]]), lambda ids: np.float32([-ids[0]]), [Probe([1]), Probe([2])]
    )
    assert figures.cosine == pytest.approx(-1)
    assert list(missed(held(figures, "q4")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["decoder", "classifier", "embedder"])
def test_outputs_that_are_no_numbers_pass_nowhere(kind, value):
    model, _ = models(1, outputs=None if kind == "decoder" else (4,))

    def broken(ids):
        found = model(ids).copy()
        found.flat[1] = value
        return found

    for one, other in ((model, broken), (broken, model)):
        with pytest.raises(BundleError, match="NaN or infinite"):
            compare(kind, one, other, [Probe([1, 2, 3])])


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(BundleError, match=r"\[3, 12\] numbers .* \[3, 11\]"):
        compare("decoder", models(1)[0], models(1, vocabulary=12)[0], [Probe([1, 2, 3])])


@pytest.mark.parametrize("profile", BUDGETS)
def test_what_is_perfect_passes_and_each_figure_alone_stops_a_bundle(profile):
    perfect = held(PERFECT, profile)
    check(profile, {"base": perfect})
    worse = {"kl": 9.0, "top1": 0.1, "perplexity_ratio": 2.0, "metrics": {"accuracy": (0.9, 0.7)}}
    for name, value in worse.items():
        with pytest.raises(BundleError, match=rf"adapter: {'metric_loss' if name == 'metrics' else name} is"):
            check(profile, {"base": perfect, "adapter": held(PERFECT, profile, **{name: value})})


def test_there_is_no_parity_of_nothing():
    with pytest.raises(BundleError, match="no text"):
        compare("decoder", *models(1), [])
    zero = np.zeros(4, np.float32)
    with pytest.raises(BundleError, match="cosine"):
        compare("embedder", lambda ids: zero, lambda ids: zero, [Probe([1])])


@pytest.mark.parametrize("name", ["kl", "top1", "perplexity_ratio", "cosine"])
def test_a_figure_that_is_no_number_keeps_no_bound(name):
    with pytest.raises(BundleError, match=f"{name} is nan"):
        check("q4", {"base": held(PERFECT, "q4", **{name: math.nan})})


def test_a_float32_difference_is_held_against_the_size_of_the_logits():
    """Rounding grows with the numbers that are rounded: 1e-4 beside logits of 30 is the same as 3e-6 beside logits of 1."""
    small = held(PERFECT, "fp32", largest_logit_difference=1e-4, largest_logit=1.0)
    assert list(missed(small)) == ["difference is 0.0001, expected at most 1e-05"]
    assert not list(missed(small.model_copy(update={"largest_logit": 30.0})))


def test_one_answer_of_few_rows_may_turn_but_not_two():
    assert not list(missed(held(PERFECT, "q8", rows=20, metrics={"accuracy": (0.95, 0.9)})))
    assert list(missed(held(PERFECT, "q8", rows=20, metrics={"accuracy": (0.95, 0.85)})))


def test_bounds_may_be_changed_and_the_looser_ones_are_named():
    limits, loose = limits_of("q8", {"kl": 0.5, "top1": 0.999, "perplexity_ratio": 1.02, "difference": 0.1})
    assert (limits["kl"], limits["top1"], limits["difference"]) == (0.5, 0.999, 0.1)
    assert loose == ["kl", "perplexity_ratio"]


@pytest.mark.parametrize("changes", [{"klx": 1.0}, {"kl": math.nan}, {"top1": -1.0}, {"kl": math.inf}])
def test_a_bound_that_is_none_is_refused(changes):
    with pytest.raises(ConfigurationError, match="budget"):
        limits_of("q8", changes)
