"""A loss that leaves all bounds leads back to the last good checkpoint with half the rate, once; then it is an error."""

import json
import math
import re

import pytest

from protocol.errors import DivergenceError
from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.formats import Conversation
from strategies.divergence import Diverged, Watch
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"fee of plan {n}?"},), f"{n} crowns") for n in range(12)]


def noted(losses, factor=5.0, floor=1.0):
    """The step at which the watch cries out, and the last good one; None where it does not."""
    watch = Watch(factor, floor)
    for step, loss in enumerate(losses, 1):
        try:
            watch.note(loss, step)
        except Diverged as found:
            return found.step, found.good
    return None


def test_what_is_not_finite_is_seen_at_once_whatever_the_objective():
    assert noted([1.0, math.nan]) == (2, 1)
    assert noted([1.0, 1.0, math.inf], floor=math.inf) == (3, 2)


def test_the_mean_of_five_steps_is_held_against_the_first_one():
    assert noted([2.0] * 20 + [10.1] * 5) == (25, 15)
    assert noted([2.0] * 20 + [9.9] * 50) is None
    assert noted([2.0] * 20 + [40.0] + [2.0] * 20) is None, "one hard batch: the mean is 9.6"
    assert noted([2.0, 2.0, 3.0, 90.0, 90.0]) == (5, 0), "what explodes within the first five is no beginning"
    assert noted([2.0] * 20 + [50.0]) == (21, 11)


def test_a_training_that_begins_with_next_to_no_loss_may_well_have_more():
    assert noted([0.01] * 5 + [4.9] * 20) is None
    assert noted([0.01] * 5 + [5.1] * 20) is not None
    assert noted([0.0] * 5 + [1e9] * 20, floor=math.inf) is None, "reinforcement learning: its loss is no measure"


def plan(**training):
    settings = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 30, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    return Plan.model_validate({"method": "full", "data": {"max_length": 48}, "training": settings | training})


def rates(folder):
    """Learning rates by step, as the trainer's own log of its last checkpoint tells them."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


def test_an_exploding_training_goes_back_and_comes_to_its_end_with_half_the_rate(tmp_path, caplog):
    """SGD on the whole base; found by trial: at this rate its loss doubles after some steps, at half of it it falls."""
    rate, climb = 0.4, 20
    own = {"optim": "sgd", "max_grad_norm": 1e9, "learning_rate": rate, "divergence_factor": 1.5}
    kept = {"save_steps": 1, "save_total_limit": 99, "logging_steps": 1}
    wanted = plan(**own, **kept, lr_scheduler_type="constant_with_warmup", warmup_steps=climb)
    made = fit(wanted, find("tiny"), ROWS, folder=tmp_path)
    assert made.metrics["rate-halved"] == 1
    assert made.metrics["train-steps"] == 30
    told = r"diverged at step (\d+): its loss is .*; back to .*checkpoint-(\d+), with half the learning rate"
    said = re.search(told, caplog.text)
    seen, back = int(said[1]), int(said[2])
    assert back == seen - 10, "before what the mean of five steps saw"
    expected = {step: rate * min(1, (step - 1) / climb) * (1 if step <= back else 0.5) for step in range(1, 31)}
    assert rates(tmp_path) == pytest.approx(expected)


def test_one_that_diverges_with_half_the_rate_too_is_an_error_and_says_what_to_do():
    with pytest.raises(DivergenceError, match=r"diverged at step \d+ with half the rate too.*lower training\.learning_rate"):
        fit(plan(optim="sgd", max_grad_norm=1e9, learning_rate=1e6), find("tiny"), ROWS)


def test_a_training_that_did_not_diverge_says_nothing_of_it(caplog):
    made = fit(plan(max_steps=2), find("tiny"), ROWS)
    assert "rate-halved" not in made.metrics
    assert "diverged" not in caplog.text
