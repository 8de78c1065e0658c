"""Time estimates against published training speeds of this stack.

``python -m benchmarks.time`` reads ``time_points.csv``: speeds that others published, each with its address and setting.
``single`` points are one GPU under Hugging Face's libraries and are what counts; ``sharded`` ones several GPUs; ``assumed``
ones need an assumption about the rows' length (the note says which); ``other`` is code that differs from the installed one in
a known way; ``relative`` ones say only how fast one setting is beside another of the same ``pair``. The estimate's constants
were set on the development half. The order is asked of all pairs whose published speeds differ by more than 3 %.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.memory import MODELS as MEMORY_MODELS
from strategies.architecture import read
from strategies.cost import Cost, estimate
from strategies.hardware import rates_of
from strategies.memory import Setup

POINTS = Path(__file__).parent / "time_points.csv"
TIED = 0.03


def _qwen(hidden: int, heads: int, layers: int, inner: int, vocab: int = 151936) -> dict[str, Any]:
    """The first Qwen, whose layers are joined as ChatGLM's are."""
    return {
        "model_type": "chatglm",
        "multi_query_attention": False,
        "add_qkv_bias": True,
        "kv_channels": 128,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_layers": layers,
        "ffn_hidden_size": inner,
        "padded_vocab_size": vocab,
    }


# What counts of each model's published config.json.
MODELS: Mapping[str, Mapping[str, Any]] = {
    **MEMORY_MODELS,
    "qwen-1.8b": _qwen(2048, 16, 24, 5504),
    "qwen-7b": _qwen(4096, 32, 32, 11008),
    "qwen-14b": _qwen(5120, 40, 40, 13696, 152064),
    "qwen-72b": _qwen(8192, 64, 80, 24576, 152064),
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "yi-34b": {
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "phi-1.5": {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
    "stablelm-alpha-3b": {
        "model_type": "gpt_neox",
        "vocab_size": 50688,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
_WORDS = ("method", "optimizer", "loss", "base_dtype", "quantization", "mixed_precision", "attention", "sharding")
_NUMBERS = ("batch", "sequence", "gpus")
_SWITCHES = ("gradient_checkpointing", "kbit_preparation", "packed_experts")


def setup_of(row: Mapping[str, str]) -> Setup:
    values: dict[str, Any] = {name: row[name] for name in _WORDS}
    values |= {name: int(row[name]) for name in _NUMBERS} | {name: row[name] == "1" for name in _SWITCHES}
    if row["rank"]:
        names = row["targets"]
        values |= {"rank": int(row["rank"]), "targets": names if names == "all-linear" else tuple(names.split())}
    values["objective"] = "classification" if row["model"] == "bert-large" else "sft"
    return Setup(**values, lora_dropout=float(row["lora_dropout"]))


def cost_of(row: Mapping[str, str]) -> Cost:
    rates = rates_of(row["gpu"])
    assert rates is not None, row["gpu"]  # noqa: S101 - the table of points names known GPUs only
    return estimate(read(MODELS[row["model"]]), setup_of(row), rates, steps=1, accumulation=int(row["accumulation"]))


def ours(row: Mapping[str, str], found: Cost) -> float:
    """The estimate of what was published."""
    if row["metric"] == "seconds":
        return found.step_seconds
    if row["metric"] == "relative":
        return 1 / found.step_seconds
    return found.tokens_per_second / int(row["gpus"])


def compare() -> dict[str, Any]:
    with POINTS.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    print(
        f"{'id':>3} {'group':9}{'model':18}{'gpu':>12}{'method':>7}{'bits':>7}{'rows':>9} "
        f"{'published':>10}{'estimated':>10}{'error':>8}"
    )
    made = []
    for row in rows:
        found = cost_of(row)
        theirs, mine = float(row["value"]), ours(row, found)
        slower = mine / theirs if row["metric"] == "seconds" else theirs / mine
        made.append((row, slower, found.step_seconds))
        bits = row["base_dtype"] if row["quantization"] == "none" else row["quantization"]
        error = "" if row["metric"] == "relative" else f"{slower - 1:+8.1%}"
        top = ", ".join(
            f"{name} {seconds / found.step_seconds:.0%}"
            for name, seconds in sorted(found.parts.items(), key=lambda item: -item[1])[:3]
        )
        print(
            f"{row['id']:>3} {row['group']:9}{row['model']:18}{_short(row['gpu']):>12}{row['method']:>7}{bits:>7}"
            f"{row['batch']:>4}x{row['sequence']:<4} {theirs:10.4g}{mine:10.4g}{error:>8}  {top}"
        )
    result: dict[str, Any] = {}
    for name in ("single", "sharded", "assumed", "other"):
        result[name] = _summary([slower for row, slower, _ in made if row["group"] == name])
    for half in ("development", "held-out"):
        result[half] = _summary([slower for row, slower, _ in made if row["group"] == "single" and row["half"] == half])
    return result | {"order": _order(made)}


def _summary(ratios: Sequence[float]) -> dict[str, float]:
    errors = [abs(ratio - 1) for ratio in ratios]
    return {
        "points": len(ratios),
        "median": median(errors),
        "mean": mean(errors),
        "worst": max(errors),
        "bias": median(ratios) - 1,
    }


def _order(made: Sequence[tuple[Mapping[str, str], float, float]]) -> dict[str, dict[str, int]]:
    """Of settings published side by side: which of each two is faster; of two methods, and of two forms of one."""
    groups = defaultdict(list)
    for row, _, seconds in made:
        if row["pair"]:
            speed = float(row["value"])
            groups[row["pair"]].append((row, 1 / speed if row["metric"] == "seconds" else speed, 1 / seconds))
    found: dict[str, list[str | None]] = {"methods": [], "forms": []}
    for pair, members in groups.items():
        for (one, theirs, mine), (two, theirs_too, mine_too) in combinations(members, 2):
            if abs(theirs / theirs_too - 1) <= TIED:
                continue
            right = (theirs > theirs_too) == (mine > mine_too)
            of = "methods" if one["method"] != two["method"] else "forms"
            found[of].append(None if right else f"{pair}: {_named(one)} and {_named(two)}, published {theirs / theirs_too:.2f}")
    for of, wrong in found.items():
        print(f"\norder of {of}: {wrong.count(None)} of {len(wrong)} right")
        print("\n".join(f"  wrong: {which}" for which in wrong if which))
    return {of: {"pairs": len(wrong), "right": wrong.count(None)} for of, wrong in found.items()}


def _named(row: Mapping[str, str]) -> str:
    return row["method"] if row["quantization"] == "none" else f"{row['method']} {row['quantization']}"


def _short(gpu: str) -> str:
    return (
        gpu.replace("NVIDIA ", "").replace("GeForce ", "").replace("Tesla ", "").replace("-SXM4", "").replace("-SXM2", "")[:11]
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(json.dumps(compare()))


if __name__ == "__main__":
    main()
