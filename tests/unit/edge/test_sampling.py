"""Sampling: the same tokens may be drawn, with the same probabilities, as by transformers' own logits processors."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edge.runtime.sampling import Draw, Writing, candidates, penalised, writing
from protocol.errors import ConfigurationError, ModelError

VOCABULARY = 3000


def logits(seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, VOCABULARY).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (1.0, 40, 1.0),
        (1.0, 1, 1.0),
        (1.0, 0, 0.9),
        (1.3, 0, 0.5),
        (0.8, 50, 0.95),
        (5.0, 7, 0.01),
    ],
)
def test_what_may_be_drawn_and_how_likely_is_what_transformers_says(seed, temperature, top_k, top_p):
    """Oracle: transformers' warpers in the order of its ``generate``, in float64 so that rounding moves no border."""
    scores = logits(seed)
    told = torch.from_numpy(scores.astype(np.float64))[None]
    told = TemperatureLogitsWarper(temperature)(None, told)
    if top_k:
        told = TopKLogitsWarper(top_k)(None, told)
    if top_p < 1:
        told = TopPLogitsWarper(top_p)(None, told)
    expected = told.softmax(-1)[0].numpy()

    ids, probabilities = candidates(scores, Writing(temperature=temperature, top_k=top_k, top_p=top_p))

    found = np.zeros(VOCABULARY)
    found[ids] = probabilities
    assert set(ids) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)  # sums of 3000 float64 in another order


def test_logits_that_are_all_alike_leave_something_to_draw():
    ids, probabilities = candidates(np.zeros(10, np.float32), Writing(temperature=1, top_p=0.5))

    assert 5 <= len(ids) <= 6  # 0.5 is five tenths, give or take its rounding
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_transformers_own(penalty):
    """Oracle: RepetitionPenaltyLogitsProcessor; exact, since both are one float32 operation per token."""
    scores, seen = logits(0), [3, 4, 4, 99, 2500]

    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.from_numpy(scores.copy())[None])[0]

    np.testing.assert_array_equal(penalised(scores, np.unique(seen), penalty), expected.numpy())
    assert scores[3] == logits(0)[3]  # a copy


def test_a_token_that_was_written_is_penalised_as_one_of_the_prompt():
    scores = np.array([0.0, 2.0, 1.9, 1.8], np.float32)
    draw = Draw(Writing(repetition_penalty=2), prompt=[1], vocabulary=4)

    assert [draw(scores), draw(scores), draw(scores)] == [2, 3, 1]


def test_temperature_zero_takes_the_likeliest():
    draw = Draw(Writing(), [], VOCABULARY)

    assert all(draw(logits(seed)) == logits(seed).argmax() for seed in range(20))


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
@pytest.mark.parametrize("chosen", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_temperature_near_zero_takes_the_likeliest_too(temperature, chosen):
    """Where the logits over the temperature are more than any float: warnings are errors here."""
    draw = Draw(Writing(temperature=temperature, **chosen), [], VOCABULARY)

    assert all(draw(logits(seed)) == logits(seed).argmax() for seed in range(5))


@pytest.mark.parametrize("penalty", [1e-38, 1e-320, 0.009, 101.0])
def test_a_repetition_penalty_that_no_logit_survives_is_refused(penalty):
    with pytest.raises(ConfigurationError, match="repetition_penalty"):
        writing(repetition_penalty=penalty)


def test_draws_follow_the_probabilities():
    """Oracle: the multinomial's own spread, 5 standard deviations; the seed is fixed."""
    scores = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    draw = Draw(Writing(temperature=1, seed=5), [], 4)
    times = 20_000

    counts = np.bincount([draw(scores) for _ in range(times)], minlength=4)

    wanted = np.array([0.5, 0.25, 0.15, 0.1])
    assert (np.abs(counts / times - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / times)).all()


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    def drawn(seed: int) -> list[int]:
        draw = Draw(Writing(temperature=1, seed=seed), [], VOCABULARY)
        return [draw(logits(at)) for at in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_logits_that_are_not_finite_are_refused_however_they_are_used():
    for settings in (Writing(), Writing(temperature=1, top_k=5), Writing(repetition_penalty=1.5)):
        for wrong in (np.nan, np.inf):
            scores = logits(0)
            scores[17] = wrong
            with pytest.raises(ModelError, match="not finite"):
                Draw(settings, [1], VOCABULARY)(scores)


def test_every_setting_out_of_its_bounds_is_named_at_once():
    with pytest.raises(ConfigurationError) as told:
        writing(max_new_tokens=0, temperature=-1.0, top_p=0.0, top_k=-1, repetition_penalty=0.0, stop=("",), beams=4)

    assert len(told.value.problems) == 7
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop.0", "beams"):
        assert any(problem.startswith(name) for problem in told.value.problems)
