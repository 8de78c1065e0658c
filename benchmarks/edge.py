"""Bundles beside what else runs a model on a CPU: bytes, prefill, decode with and without an adapter, memory, fidelity.

    python -m benchmarks.edge --data DIR [--models random-100m stories260k minilm] [--genai FOLDER]

- random-100m: a drawn Llama of 100 million weights (12 layers of 768, 32000 tokens, tied), with a drawn adapter of rank 16.
- stories260k: with an adapter of rank 8 that learnt GSM8K for 40 steps.
- minilm: the encoder as a classifier of the seven intents of SNIPS, its adapter and head learnt in 40 steps; prefill is texts
  of 32 tokens, 16 at a time.

Every row is a process of its own with one thread: torch in float32, torch with dynamic int8 weights, bundles of every profile
(that of fp32 is what onnxruntime does without quantisation), and onnxruntime-genai's own int4 model where the package is found
(``--genai``: where ``pip install --target FOLDER onnxruntime-genai`` put it). Speeds are the best of several tries, for others
use the machine too. KL and agreement are against torch in float32, with the adapter for minilm and without for the others. The
last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELS = ("random-100m", "stories260k", "minilm")
PROFILES = ("fp32", "fp16", "q8", "q4", "int8-dynamic")
_COLUMNS = ("prefill", "decode", "decode_with_adapter", "decode_at_1024")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    parser.add_argument("--genai", type=Path, help="folder that holds onnxruntime-genai")
    parser.add_argument("--work", type=Path, help="keep models and bundles here, and use those that are there")
    asked = parser.parse_args()
    genai = asked.genai or importlib.util.find_spec("onnxruntime_genai")
    with tempfile.TemporaryDirectory(prefix="fedge-edge-") as scratch:
        work = (asked.work or Path(scratch)).resolve()
        rows = []
        for model in asked.models:
            _called("prepare", model, "", "", work, asked)
            wanted = [("torch", "fp32"), ("torch", "int8-dynamic"), *(("fedge", profile) for profile in asked.profiles)]
            if genai and model == "random-100m":
                wanted.append(("onnxruntime-genai", "q4"))
            for runtime, profile in wanted:
                row = _called("row", model, runtime, profile, work, asked)
                rows.append(row)
                _print(row, rows)
    if not genai:
        print("onnxruntime-genai is not installed: its row is missing")
    print(json.dumps({"rows": rows}))


def _called(what: str, model: str, runtime: str, profile: str, work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """A process of its own with one thread; what it prints last is what it found."""
    paths = [str(asked.genai.resolve())] if asked.genai else []
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "benchmarks.edge_row", what, model, runtime, profile, str(work), str(asked.data.resolve())]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _print(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    whole = next(one for one in rows if (one["model"], one["runtime"]) == (row["model"], "torch"))
    plain = next(
        (one for one in rows if (one["model"], one["runtime"], one["profile"]) == (row["model"], "fedge", "fp32")), None
    )
    speeds = " ".join(_number(row.get(f"{name}_tokens_per_second")) for name in _COLUMNS)
    faster = row["decode_tokens_per_second"] and plain and row["decode_tokens_per_second"] / plain["decode_tokens_per_second"]
    first = "-" if row["first_token_seconds"] is None else f"{1e3 * row['first_token_seconds']:.0f} ms"
    print(
        f"{row['model']:>12} {row['runtime']:>17} {row['profile']:<13} {row['bytes'] / 1e6:8.2f} MB "
        f"({row['bytes'] / whole['bytes']:.3f}) "
        f"{speeds} tokens/s, {f'{faster:.2f} x fp32' if faster else '':12} first {first:>8} "
        f"peak {row['peak_rss_bytes'] / 1e6:6.0f} MB  kl {_number(row['kl'], '.1e')} top-1 {_number(row['top1'], '.4f')}",
        flush=True,
    )


def _number(value: float | None, how: str = "9.1f") -> str:
    return f"{'-':>9}" if value is None else format(value, how)


if __name__ == "__main__":
    main()
