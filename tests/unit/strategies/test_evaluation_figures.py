"""Figures, intervals and calibration: the oracles are scikit-learn, sacrebleu and rouge-score called directly, and formulas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.evaluation import calibration, texts
from strategies.evaluation.bootstrap import draws
from strategies.evaluation.figures import macro_f1, mean, pearson, perplexity, ratio

ENGLISH = [
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("A fee of 3 crowns.", "The fee is 3 crowns."),
    ("No.", "Nobody knows the answer to it."),
    ("The limit is 500, per day, for every card.", "The limit is 500 per day for every card."),
    ("", "Ask at the counter."),
]
CHINESE = [
    ("北京是中国的首都。", "中国的首都是北京。"),
    ("每天限额500元。", "每日限额为500元。"),
    ("我不知道 GPU", "请问柜台 GPU 是什么"),
    ("合同自签字之日起生效", "合同自双方签字之日起生效"),
]


def alone(count):
    return np.arange(count)


def pairs_of(rows):
    return [answer for answer, _ in rows], [wanted for _, wanted in rows]


def labelled(seed=0, count=60, labels=4):
    rng = np.random.default_rng(seed)
    wanted = rng.integers(labels, size=count)
    found = np.where(rng.random(count) < 0.6, wanted, rng.integers(labels, size=count))
    return found, wanted


# Figures ----------------------------------------------------------------------------------------------------------------


def test_macro_f1_is_scikit_learns_over_the_labels_that_the_rows_bear():
    from sklearn.metrics import f1_score

    found, wanted = labelled()
    found[0] = 9  # a label that no row bears is never right, and has no F1 of its own
    expected = f1_score(wanted, found, average="macro", labels=sorted(set(wanted.tolist())))
    assert macro_f1(found, wanted).value == pytest.approx(expected, abs=1e-12)


def test_perplexity_is_exp_of_nats_per_token_and_stays_a_number():
    assert perplexity([3.0, 1.0], [2, 6]).value == pytest.approx(math.exp(0.5))
    assert math.isfinite(perplexity([1e9], [1]).value)


def test_pearson_is_numpys_far_from_zero_too():
    rng = np.random.default_rng(0)
    x = 1e6 + rng.standard_normal(50)
    y = x + rng.standard_normal(50)
    assert pearson(x, y).value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert pearson(np.ones(5), y[:5]).value == 0


FIGURES = {
    "mean": lambda rng, n: (mean, [rng.random(n)]),
    "ratio": lambda rng, n: (ratio, [rng.random(n), rng.integers(1, 9, n)]),
    "perplexity": lambda rng, n: (perplexity, [rng.random(n), rng.integers(1, 9, n)]),
    "macro-f1": lambda rng, n: (macro_f1, [rng.integers(3, size=n), rng.integers(3, size=n)]),
    "pearson": lambda rng, n: (pearson, [rng.random(n), rng.random(n)]),
}


@pytest.mark.parametrize("name", FIGURES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_weighting_of_rows_gives_the_figure_of_rows_repeated_so_often(name, seed):
    """Oracle: the figure of a list in which each row stands as often as its weight says."""
    rng = np.random.default_rng(seed)
    make, columns = FIGURES[name](rng, 12)
    figure, weights = make(*columns), rng.integers(0, 4, 12)
    weights[:3] += 1
    repeated = make(*(np.repeat(column, weights) for column in columns))
    assert figure.weighted(weights[None])[0] == pytest.approx(repeated.value, rel=1e-9, abs=1e-9)
    left = figure.without(np.repeat(np.arange(6), 2))
    assert left[2] == pytest.approx(make(*(np.delete(column, [4, 5]) for column in columns)).value, rel=1e-9, abs=1e-9)
    some = [1, 3, 5, 8, 9, 10]
    assert figure.part(some).value == pytest.approx(make(*(column[some] for column in columns)).value, rel=1e-9, abs=1e-9)


# Intervals --------------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Means of 40 skewed numbers, 400 times. Over 1000 trials 93.6 % of such intervals held the mean (benchmarks/LOG.md); four
    standard deviations of 400 trials on either side."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        found = draws(alone(40), count=400, seed=trial).estimate(mean(rng.exponential(size=40)))
        held += found.low <= 1.0 <= found.high
    assert 355 <= held <= 394


def test_a_paired_difference_is_as_sure_as_the_differences_of_the_rows_are():
    """Oracle: the normal interval of the mean of row differences. Hard rows are hard for both: a figure's own is far wider."""
    rng = np.random.default_rng(1)
    hard = rng.standard_normal(500)
    one, other = hard + 0.1 * rng.standard_normal(500), hard + 0.1 * rng.standard_normal(500) + 0.05
    drawn = draws(alone(500), count=2000)
    found = drawn.estimate(mean(other), mean(one))
    apart = other - one
    half = 1.96 * apart.std(ddof=1) / math.sqrt(500)
    assert found.value == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=0.15 * half)
    assert found.differs
    assert drawn.estimate(mean(other)).high - drawn.estimate(mean(other)).low > 5 * (found.high - found.low)


def test_turns_of_one_conversation_are_drawn_together():
    """Oracle: rows that repeat each other ten times tell no more than one of each, so the interval is that of one of each."""
    values = np.random.default_rng(2).random(50)
    each, together = draws(alone(50), seed=3), draws(np.repeat(alone(50), 10), seed=3)
    single, repeated = each.estimate(mean(values)), together.estimate(mean(np.repeat(values, 10)))
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high), abs=1e-6)


def test_the_same_seed_gives_the_same_interval_and_what_never_differs_has_none():
    figure = mean(np.random.default_rng(4).random(30))
    assert draws(alone(30)).estimate(figure) == draws(alone(30)).estimate(figure)
    assert draws(alone(30)).estimate(figure) != draws(alone(30), seed=1).estimate(figure)
    sure = draws(alone(5)).estimate(mean([1.0] * 5))
    assert (sure.value, sure.low, sure.high) == (1, 1, 1)


# Calibration ------------------------------------------------------------------------------------------------------------


def test_calibration_error_and_brier_score_have_their_closed_forms():
    """Ten rows of confidence 0.8, six of them right, and ten of 0.6, all right: errors of 0.2 and 0.4, each of half."""
    shares = np.array([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 10)
    wanted = np.array([0] * 6 + [1] * 4 + [0] * 10)
    found = calibration.figures(shares, wanted)
    assert found["ece"].value == pytest.approx((0.2 + 0.4) / 2)
    assert found["brier"].value == pytest.approx((6 * 2 * 0.2**2 + 4 * 2 * 0.8**2 + 10 * 2 * 0.4**2) / 20)
    low, high = calibration.reliability(shares, wanted)
    assert (low.rows, low.confidence, low.accuracy) == (10, pytest.approx(0.6), 1.0)
    assert (high.rows, high.confidence, high.accuracy) == (10, pytest.approx(0.8), pytest.approx(0.6))
    assert low.above < 0.6 <= low.up_to


def test_the_brier_score_of_two_labels_is_twice_scikit_learns():
    """scikit-learn counts one of the two probabilities."""
    from sklearn.metrics import brier_score_loss

    rng = np.random.default_rng(0)
    sure, wanted = rng.random(40), rng.integers(2, size=40)
    found = calibration.figures(np.stack([1 - sure, sure], 1), wanted)["brier"].value
    assert found == pytest.approx(2 * brier_score_loss(wanted, sure))


def test_a_calibrated_classifier_has_a_small_error_and_one_that_is_always_sure_a_large_one():
    """Labels drawn from the probabilities themselves: what is left of the error is of order sqrt(bins / rows)."""
    rng = np.random.default_rng(5)
    shares = calibration.softmax(2 * rng.standard_normal((5000, 4)))
    wanted = np.array([rng.choice(4, p=share) for share in shares])
    assert calibration.figures(shares, wanted)["ece"].value < math.sqrt(calibration.BINS / 5000)
    certain = np.eye(4)[shares.argmax(1)]
    wrong = float((shares.argmax(1) != wanted).mean())
    assert calibration.figures(certain, wanted)["ece"].value == pytest.approx(wrong)


# Texts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh"), (ENGLISH + CHINESE, "zh")])
def test_bleu_is_sacrebleus_corpus_bleu_of_any_choice_of_rows(rows, tokenizer):
    import sacrebleu

    answers, wanted = pairs_of(rows)
    figure = texts.figures(answers, wanted)["bleu"]
    assert texts.bleu_tokenizer(wanted) == tokenizer
    assert figure.value == pytest.approx(sacrebleu.corpus_bleu(answers, [wanted], tokenize=tokenizer).score, abs=1e-9)
    weights = np.random.default_rng(0).integers(0, 3, (20, len(rows)))
    weights[:, 0] += 1
    for weight, score in zip(weights, figure.weighted(weights), strict=True):
        some, others = pairs_of([row for row, times in zip(rows, weight, strict=True) for _ in range(times)])
        assert score == pytest.approx(sacrebleu.corpus_bleu(some, [others], tokenize=tokenizer).score, abs=1e-9)


def test_rouge_on_english_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    found = texts.figures(*pairs_of(ENGLISH))
    for ours, theirs in names.items():
        expected = np.mean([scorer.score(wanted, answer)[theirs].fmeasure for answer, wanted in ENGLISH])
        assert found[ours].value == pytest.approx(expected, abs=1e-12)


def test_rouge_and_f1_on_chinese_count_characters():
    """Oracle: rouge-score and a count by hand on the same texts with a space around each character; its own tokenizer knows no
    Chinese and gives 0."""
    from rouge_score.rouge_scorer import RougeScorer

    answers, wanted = pairs_of(CHINESE)
    found = texts.figures(answers, wanted)
    numbered: dict[str, str] = {}

    def spelled(text):
        return " ".join(numbered.setdefault(token, f"t{len(numbered)}") for token in texts.tokens(text))

    scorer = RougeScorer(["rougeL"])
    expected = np.mean([scorer.score(spelled(b), spelled(a))["rougeL"].fmeasure for a, b in CHINESE])
    assert scorer.score(wanted[0], answers[0])["rougeL"].fmeasure == 0
    assert found["rouge-l"].value == pytest.approx(expected, abs=1e-12)
    assert texts.tokens("北京 GPU-2 café_x") == ["北", "京", "gpu", "2", "café", "x"]
    # 每 天 限 额 500 元 and 每 日 限 额 为 500 元 share five.
    assert texts.figures(answers[1:2], wanted[1:2])["f1"].value == pytest.approx(2 * 5 / (6 + 7))


def test_exact_match_wants_the_same_text_and_f1_the_same_tokens():
    found = texts.figures([" In house 3. ", "in House 3"], ["In house 3.", "In house 3."])
    assert found["exact-match"].value == 0.5
    assert found["f1"].value == 1
