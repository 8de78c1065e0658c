"""A LoRA step from a bundle on a device beside a step in PyTorch: peak memory, seconds, bytes on disk.

    python -m benchmarks.device_training [--folder DIR] [--models 100m 200m 500m] [--rows NAME ...] [--targets MODULE ...]

- 100m: a drawn Llama of 100 million weights (12 layers of 768, 32000 tokens, tied).
- 200m: the same with twice the layers (185 million): a device's peak is to grow by 5 % at most.
- 500m: a drawn Qwen2 of 494 million weights (24 layers of 896, 151936 tokens, tied): a step from 4 bits within 1 GB.

Every step is of 4 rows of 128 tokens, all of them learnt, LoRA of rank 8 on every linear layer, AdamW. Every row is a process
of its own with one thread. Its peak is resident memory (``VmHWM``) above what there was once the libraries were imported, the
model's loading included; its seconds are the median of steps after the first, its CPU seconds the processor's time of the
same, which other processes disturb less. The first loss is the same of all rows but for the rounding of weights.

- torch, torch-checkpointing: float32, without and with gradient checkpointing.
- torch-nf4: over a base in nf4 (bitsandbytes, ``prepare_model_for_kbit_training``), with checkpointing.
- fp32, q8, q4: bundles. q4-whole-head: the head at once in place of parts of the vocabulary. int8-dynamic: layers forward over
  integers as they are stored.

``--folder`` keeps models and bundles, and uses those that are there. Making one needs its float32 weights in memory three times
over. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TORCH = ("torch", "torch-checkpointing", "torch-nf4")
BUNDLES = ("fp32", "q8", "q4", "q4-whole-head", "int8-dynamic")
ROWS = {"100m": (*TORCH, *BUNDLES), "200m": ("fp32", "q8", "q4"), "500m": ("q4",)}
PEAK, TIME, GROWTH, BYTES = 0.40, 1.6, 1.05, 10**9  # what 4 bits are to keep beside checkpointing; of depth; of 500m


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep models and bundles here, and use those that are there")
    parser.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--rows", nargs="+", default=[*TORCH, *BUNDLES], choices=[*TORCH, *BUNDLES])
    parser.add_argument("--targets", nargs="+", default=[], help="modules that are adapted; by default every linear layer")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, after one that is not")
    parser.add_argument("--prepare", action="store_true", help="make models and bundles, and measure nothing")
    asked = parser.parse_args(given)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedge-device-training-") as scratch:
        folder = (asked.folder or Path(scratch)).resolve()
        for model in asked.models:
            called("prepare", model, "", folder, asked.steps)
            for name in () if asked.prepare else ROWS[model]:
                if name in asked.rows:
                    rows.append(called("row", model, name, folder, asked.steps, asked.targets))
                    _print(rows[-1])
    for line in verdicts({row["name"]: row for row in rows}):
        print(line)
    print(json.dumps({"rows": rows}))


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Each goal with what was found, of those whose rows are there."""
    found = []
    if {"100m torch-checkpointing", "100m q4"} <= rows.keys():
        ours, theirs = rows["100m q4"], rows["100m torch-checkpointing"]
        found.append(_said("q4's peak, of checkpointing's", ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], PEAK))
        found.append(_said("q4's seconds, of checkpointing's", ours["seconds_per_step"] / theirs["seconds_per_step"], TIME))
    found += [
        _said(f"{name}'s peak at twice the depth", rows[f"200m {name}"]["peak_rss_bytes"] / row["peak_rss_bytes"], GROWTH)
        for name in BUNDLES
        if (row := rows.get(f"100m {name}")) and f"200m {name}" in rows
    ]
    if "500m q4" in rows:
        found.append(_said("500m's peak in 4 bits, GB", rows["500m q4"]["peak_rss_bytes"] / BYTES, 1.0))
    return found


def _said(what: str, found: float, most: float) -> str:
    return f"{what}: {found:.3f}, at most {most:g}{'' if found <= most else '  MISSED'}"


def called(what: str, model: str, name: str, folder: Path, steps: int, targets: Sequence[str] = ()) -> dict[str, Any]:
    """A process of its own with one thread; what it prints last is what it found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.device_training_row", what, model, name, str(folder), str(steps), *targets]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:<25} peak {row['peak_rss_bytes'] / 1e6:7.0f} MB  {row['seconds_per_step']:6.2f} s a step "
        f"({row['cpu_seconds_per_step']:.2f} of CPU)  {row['disk_bytes'] / 1e6:7.1f} MB on disk  "
        f"first loss {row['first_loss']:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
