"""Intervals that hold the truth as often as they say, beside plain percentiles; and answers in batches beside one by one.

    python -m benchmarks.evaluation

Rows are drawn from known distributions, so the truth of each figure is known (of F1 and calibration error from a million rows).
Answers are the embedded decoder's. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.evaluation import calibration
from strategies.evaluation.bootstrap import draws
from strategies.evaluation.figures import Figure, macro_f1, mean, perplexity
from strategies.writer import continuations

Draw = Callable[[np.random.Generator, int], Figure]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    coverage = {}
    for name, (make, count, truth) in _KNOWN.items():
        known = truth if truth is not None else make(np.random.default_rng(10**6), 10**6).value
        coverage[name] = _held(make, count, known, options.trials)
        print(f"{name:22s} {count:4d} rows  " + "  ".join(f"{kind} {share:.3f}" for kind, share in coverage[name].items()))
    answers = _answers()
    print("  ".join(f"{name} {value:.3g}" for name, value in answers.items()))
    print(json.dumps({"coverage": coverage, "answers": answers}))


def _held(make: Draw, count: int, truth: float, trials: int) -> dict[str, float]:
    """Share of trials in which an interval of 95 % holds the truth."""
    held = {"corrected": 0, "percentiles": 0}
    for trial in range(trials):
        figure = make(np.random.default_rng(trial), count)
        drawn = draws(np.arange(count), 400, trial)
        found = drawn.estimate(figure)
        low, high = np.quantile(figure.weighted(drawn.weights), [0.025, 0.975])
        held["corrected"] += int(found.low <= truth <= found.high)
        held["percentiles"] += int(low <= truth <= high)
    return {kind: times / trials for kind, times in held.items()}


def _answers() -> dict[str, float]:
    """Seconds for 64 answers of 32 tokens."""
    model, tokenizer = with_adapter(Plan(base_model="tiny"), find("tiny"), None)
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None  # every answer has all of its tokens
    asked: Any = [tokenizer("What is the fee of plan " + "and " * (at % 17) + f"{at}?")["input_ids"] for at in range(64)]
    continuations(model, tokenizer, asked[:2], max_new_tokens=4, batch_size=2)
    seconds, made = {}, {}
    for size in (1, 8, 32):
        begin = time.perf_counter()
        made[size] = continuations(model, tokenizer, asked, max_new_tokens=32, batch_size=size)
        seconds[f"seconds in batches of {size}"] = time.perf_counter() - begin
    alike = sum(one == other for one, other in zip(made[1], made[32], strict=True)) / len(asked)
    return seconds | {"share of equal answers": alike}


def _perplexity(rng: np.random.Generator, count: int) -> Figure:
    tokens = rng.integers(5, 60, count)
    return perplexity(tokens * rng.exponential(2, size=count), tokens)


def _macro_f1(rng: np.random.Generator, count: int) -> Figure:
    wanted = rng.choice(3, p=[0.6, 0.3, 0.1], size=count)
    return macro_f1(np.where(rng.random(count) < 0.7, wanted, rng.integers(3, size=count)), wanted)


def _ece(rng: np.random.Generator, count: int) -> Figure:
    """Twice as sure as it should be."""
    shares = calibration.softmax(2 * rng.standard_normal((count, 3)))
    wanted = (shares.cumsum(1) > rng.random((count, 1))).argmax(1)
    return calibration.figures(calibration.softmax(2 * np.log(shares)), wanted)["ece"]


_KNOWN: dict[str, tuple[Draw, int, float | None]] = {
    "mean of exponentials": (lambda rng, count: mean(rng.exponential(size=count)), 40, 1.0),
    "accuracy 0.9": (lambda rng, count: mean(rng.random(count) < 0.9), 100, 0.9),
    "perplexity": (_perplexity, 100, float(np.exp(2))),
    "macro-f1": (_macro_f1, 150, None),
    "ece": (_ece, 300, None),
}

if __name__ == "__main__":
    main()
