"""Preferences of people, learnt by DPO from English and from Chinese pairs: held-out reward accuracy over three folds.

    python -m benchmarks.preferences --data DIR [--sets dpo_en dpo_zh_500]

Every pair is held out once: three models are trained on two thirds each and measured on the other, so that the figure is of all
pairs that leave something to read. First the base reads both answers of the training pairs (supervised), then DPO stays near
that: to a teller of English stories a Chinese character is three bytes that it has never seen, which DPO alone only blurs. The
interval is the bootstrap's over pairs (``strategies.evaluation.bootstrap``); before DPO the accuracy is 0.5 by definition, a
model against itself. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from protocol.plan import Objective, Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.formats import Conversation, Preference, load
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
    parser.add_argument("--reading-steps", type=int, default=40, help="supervised, of 8 answers, before DPO")
    parser.add_argument("--steps", type=int, default=32, help="of DPO, of 8 pairs")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of DPO")
    parser.add_argument("--max-length", type=int, default=640)
    options = parser.parse_args()
    base = find(str((options.data / "models" / "stories260k-hf").resolve()))

    def plan_of(objective: Objective, learning_rate: float, steps: int) -> Plan:
        training = {"learning_rate": learning_rate, "batch_size": 8, "max_steps": steps}
        lora, data = {"r": 16, "lora_alpha": 32}, {"max_length": options.max_length}
        told = {"base_model": base.name, "objective": objective, "lora": lora, "data": data, "training": training}
        return Plan.model_validate(told)

    reading, plan = plan_of("sft", 1e-3, options.reading_steps), plan_of("dpo", options.learning_rate, options.steps)
    told = []
    for name in options.sets:
        pairs = [
            row
            for file in SETS[name]
            for row in load(options.data / "pref" / f"{file}.jsonl", plan)
            if isinstance(row, Preference)
        ]
        begun, won = time.perf_counter(), []
        for fold in options.folds:
            train = [pair for at, pair in enumerate(pairs) if at % FOLDS != fold]
            read = [Conversation(pair.prompt, answer) for pair in train for answer in (pair.chosen, pair.rejected)]
            start = fit(reading, base, read).adapter
            trained = fit(plan, base, train, start=start, reference=start)
            held_out = encode(pairs[fold::FOLDS], load_tokenizer(base), plan.data.max_length, "dpo").rows
            of_pairs = figures(plan, base, held_out, trained.adapter, start)["reward-accuracy"].rows[:, 0]
            print(f"{name}, fold {fold}: {of_pairs.mean():.3f} of {len(of_pairs)} pairs", flush=True)
            won += of_pairs.tolist()
        found = draws(np.arange(len(won)), count=10_000).estimate(mean(won))
        seconds = time.perf_counter() - begun
        print(f"{name}: {found.value:.3f} of {len(won)} pairs, 95 % {found.low:.3f} to {found.high:.3f}, {seconds:.0f} s")
        accuracy = {"reward_accuracy": found.value, "low": found.low, "high": found.high, "base": 0.5}
        told.append({"set": name, "pairs": len(won), **accuracy, "seconds": seconds})
    print(json.dumps({"rows": told}))


if __name__ == "__main__":
    main()
