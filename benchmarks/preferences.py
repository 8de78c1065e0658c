"""Preferences of people, learnt by DPO from English and from Chinese pairs: held-out reward accuracy over three folds.

    python -m benchmarks.preferences --data DIR [--sets dpo_en dpo_zh_500]

Every pair is held out once: three models are trained on two thirds each and measured on the other, so that the figure is of all
pairs that leave something to read. The interval is the bootstrap's over pairs (``strategies.evaluation.bootstrap``); before
training the accuracy is 0.5 by its definition, a model against itself. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from protocol.plan import Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.formats import load
from strategies.evaluation.bootstrap import draws
from strategies.evaluation.figures import mean
from strategies.evaluation.preferences import figures
from strategies.training import fit

FOLDS = 3
SETS = {"dpo_en": ("dpo_en",), "dpo_zh": ("dpo_zh",), "dpo_zh_500": ("dpo_zh_500_train", "dpo_zh_500_test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["dpo_en", "dpo_zh_500"])
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--method", default="lora")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=64, help="of 8 pairs")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=768)
    options = parser.parse_args()
    base = find(str((options.data / "models" / "stories260k-hf").resolve()))
    plan = Plan.model_validate(
        {
            "base_model": base.name,
            "objective": "dpo",
            "method": options.method,
            "lora": {"r": 8, "lora_alpha": 16},
            "dpo": {"beta": options.beta},
            "data": {"max_length": options.max_length},
            "training": {"learning_rate": options.learning_rate, "batch_size": 8, "max_steps": options.steps},
        }
    )
    told = []
    for name in options.sets:
        rows = [row for file in SETS[name] for row in load(options.data / "pref" / f"{file}.jsonl", plan)]
        begun, won = time.perf_counter(), []
        for fold in options.folds:
            held_out = encode(rows[fold::FOLDS], load_tokenizer(base), plan.data.max_length, "dpo").rows
            trained = fit(plan, base, [row for at, row in enumerate(rows) if at % FOLDS != fold])
            of_pairs = figures(plan, base, held_out, trained.adapter, type(trained.adapter)())["reward-accuracy"].rows[:, 0]
            print(f"{name}, fold {fold}: {of_pairs.mean():.3f} of {len(of_pairs)} pairs", flush=True)
            won += of_pairs.tolist()
        found = draws(np.arange(len(won)), count=10_000).estimate(mean(won))
        seconds = time.perf_counter() - begun
        print(
            f"{name}: {found.value:.3f} of {len(won)} pairs, 95 % {found.low:.3f} to {found.high:.3f}, {seconds:.0f} s",
            flush=True,
        )
        accuracy = {"reward_accuracy": found.value, "low": found.low, "high": found.high, "base": 0.5}
        told.append({"set": name, "pairs": len(won), **accuracy, "seconds": seconds})
    print(json.dumps({"rows": told}))


if __name__ == "__main__":
    main()
