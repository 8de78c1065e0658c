"""Preferences of people, learnt by DPO from English and from Chinese pairs: held-out reward accuracy over three folds.

    python -m benchmarks.preferences --data DIR [--sets dpo_en dpo_zh_500] [--reader DIR]

Every pair is held out once: three models are trained on two thirds each and measured on the other, so that the figure is of all
pairs that leave something to read. A model has to read before it can prefer, and DPO stays near what it reads:

- English pairs: the teller of stories reads both answers of the training pairs (supervised, LoRA).
- Chinese pairs: the embedded decoder, whose tokens are Chinese characters where the teller's are a third of one, reads other
  Chinese texts once (continued pre-training of the whole model; no text holds a question of the pairs). Of questions only the
  end is kept, so that answers are read nearly whole: what tells them apart lies all over them.

The interval is the bootstrap's over pairs (``strategies.evaluation.bootstrap``); a coin tells 0.5. The last line is JSON.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.base_model import Base, find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.formats import Conversation, PlainText, Preference, load
from strategies.evaluation.bootstrap import draws
from strategies.evaluation.figures import mean
from strategies.evaluation.preferences import figures
from strategies.training import fit

FOLDS = 3
SETS = {"dpo_en": ("dpo_en",), "dpo_zh": ("dpo_zh",), "dpo_zh_500": ("dpo_zh_500_train", "dpo_zh_500_test")}
CHINESE = ("institutions/medical_zh_train", "institutions/legal_zh_train", "instruct/alpaca_zh_demo")
QUESTION = 40  # characters of a Chinese question, from its end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["dpo_en", "dpo_zh_500"])
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--reader", type=Path, help="keeps the reader of Chinese; one that is there is taken")
    options = parser.parse_args()
    told = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.sets:
            begun = time.perf_counter()
            won = _won(name, options.data, options.reader or Path(scratch, "reader"), options.folds)
            found = draws(np.arange(len(won)), count=10_000).estimate(mean(won))
            seconds = time.perf_counter() - begun
            print(f"{name}: {found.value:.3f} of {len(won)} pairs, 95 % {found.low:.3f} to {found.high:.3f}, {seconds:.0f} s")
            accuracy = {"reward_accuracy": found.value, "low": found.low, "high": found.high, "coin": 0.5}
            told.append({"set": name, "pairs": len(won), **accuracy, "seconds": seconds})
    print(json.dumps({"rows": told}))


def _won(name: str, data: Path, reader: Path, folds: list[int]) -> list[float]:
    """Of each pair, when it was held out, whether the answer that people chose had the greater reward."""
    english, won = name == "dpo_en", []
    pairs = _pairs(data, name)
    base = find(str((data / "models" / "stories260k-hf").resolve())) if english else _reader_of_chinese(data, reader)
    long = {"num_train_epochs": 2, "learning_rate": 5e-4, "warmup_steps": 5, "lr_scheduler_type": "linear"}
    training = {"max_steps": 32, "learning_rate": 5e-5} if english else long
    plan = _plan(base.name, "dpo", training, lora={"r": 16, "lora_alpha": 32})
    if not english:
        pairs = [Preference(_ending(pair), pair.chosen, pair.rejected) for pair in pairs]
    for fold in folds:
        train = [pair for at, pair in enumerate(pairs) if at % FOLDS != fold]
        start = _has_read(plan, base, train) if english else Adapter()
        trained = fit(plan, base, train, start=start, reference=start)
        held_out = encode(pairs[fold::FOLDS], load_tokenizer(base), plan.data.max_length, "dpo").rows
        of_pairs = figures(plan, base, held_out, trained.adapter, start)["reward-accuracy"].rows[:, 0]
        print(f"{name}, fold {fold}: {of_pairs.mean():.3f} of {len(of_pairs)} pairs", flush=True)
        won += of_pairs.tolist()
    return won


def _plan(base_model: str, objective: str, training: dict[str, Any], max_length: int = 640, **more: Any) -> Plan:
    told = {"base_model": base_model, "objective": objective, "data": {"max_length": max_length}}
    return Plan.model_validate({**told, **more, "training": {"batch_size": 8, **training}})


def _pairs(data: Path, name: str) -> list[Preference]:
    plan = Plan(objective="dpo")
    rows = [row for file in SETS[name] for row in load(data / "pref" / f"{file}.jsonl", plan)]
    return [row for row in rows if isinstance(row, Preference)]


def _ending(pair: Preference) -> Any:
    return ({"role": "user", "content": str(pair.prompt[-1]["content"])[-QUESTION:]},)


def _has_read(plan: Plan, base: Base, train: list[Preference]) -> Adapter:
    """The base after both answers of the training pairs."""
    reading = _plan(base.name, "sft", {"learning_rate": 1e-3, "max_steps": 40}, lora=plan.lora.model_dump(exclude_unset=True))
    return fit(
        reading, base, [Conversation(pair.prompt, text) for pair in train for text in (pair.chosen, pair.rejected)]
    ).adapter


def _reader_of_chinese(data: Path, folder: Path) -> Base:
    """The embedded decoder after 740 000 tokens of Chinese text, in which no question of the pairs stands."""
    if not folder.is_dir():
        base = find("tiny")
        asked = {str(pair.prompt[-1]["content"]) for name in ("dpo_zh", "dpo_zh_500") for pair in _pairs(data, name)}
        texts = [
            text
            for file in CHINESE
            for text in map(_text, (data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines())
            if not any(question in text for question in asked if len(question) > 12)
        ]
        random.Random(0).shuffle(texts)
        plan = _plan(base.name, "pretraining", {"learning_rate": 2e-3, "max_steps": 120}, max_length=768, method="full")
        fit(plan, base, [PlainText(text) for text in texts], whole=folder)
    return find(str(folder.resolve()))


def _text(line: str) -> str:
    row = json.loads(line)
    question = row.get("input_text") or row["instruction"] + row["input"]
    return f"{question}\n{row.get('target_text') or row['output']}"


if __name__ == "__main__":
    main()
