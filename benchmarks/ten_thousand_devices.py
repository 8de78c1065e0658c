"""Ten thousand devices that come and go, 200 merged a round, 20 rounds, in this process: memory, dropouts, bytes and learning.

    python -m benchmarks.ten_thousand_devices [--profile q4] [--data ROWS.jsonl]

Each device has a few rows of its own, speeds of its own and a limit of bytes, and is there while it charges, lies idle and has
an unmetered network (``simulations.availability``). Those that are merged really train the embedded decoder's bundle, with
numpy and onnxruntime; everything else is real too: joining, messages, admission, the rule, evaluation by some of them and
checkpoints. Rows that are drawn are questions with one rule behind all answers, so that what devices learn of their own rooms
holds for rooms that nobody has: their held-out loss is measured before and after. ``--data`` takes rows of sft from a file
instead, and holds some out. Begins at midnight of a simulated day, with an hour between rounds. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from benchmarks.device_training_row import KEY, bundles
from client import device
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.federation import Federation
from protocol.records import Call, Received
from protocol.signature import write_public
from server.ledger import RoundRecord
from simulations.device_grid import DeviceRound
from simulations.devices import Devices
from simulations.federation import check_devices, federate_devices
from simulations.scenario import write_rows
from strategies.data.files import read

ROWS_EACH, HELD_OUT = 6, 100
HOUSES = ("harbour", "mill", "orchard", "station")
PLAN: Mapping[str, Any] = {
    "base_model": "tiny",
    "lora": {"r": 4, "lora_alpha": 8},
    "data": {"max_length": 64},
    "training": {
        "learning_rate": 1e-2,
        "batch_size": 2,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    },
}
_COLUMNS = "round  there  asked  merged  straggler  gone  bytes  MB down  MB up   hour    loss  RSS MB       s"


def rooms(count: int) -> list[dict[str, object]]:
    """Questions about rooms, each asked once; floor and side follow from the number."""
    numbered = [(100 + at // len(HOUSES), HOUSES[at % len(HOUSES)]) for at in range(count)]
    return [
        {
            "input_text": f"Where is room {number} of the {house}?",
            "target_text": f"Floor {number // 100}, on the {'left' if number % 2 else 'right'}.",
        }
        for number, house in numbered
    ]


def divided(rows: Sequence[dict[str, object]]) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows for devices, and ``HELD_OUT`` of them, spread evenly, that no device has."""
    every = max(2, len(rows) // HELD_OUT)
    return [row for at, row in enumerate(rows) if at % every], list(rows[::every])[:HELD_OUT]


def prepared(folder: Path, profile: str, rows: Sequence[dict[str, object]]) -> Node:
    """Writes rows and bundle; a node that holds out what no device has."""
    own, held_out = divided(rows)
    for name, part in (("rows", own), ("held-out", held_out)):
        write_rows(folder / f"{name}.jsonl", part)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # which takes PyTorch along when it ends
        pool.apply(_bundle, (folder, profile))
    write_public(folder / "key.pub", KEY.public_key())
    paths = {name: folder / f"{file}.jsonl" for name, file in (("train", "rows"), ("evaluate", "held-out"))}
    return Node(name="judge", device=folder / "bundles" / profile, device_key=folder / "key.pub", **paths)


def _bundle(folder: Path, profile: str) -> None:
    from strategies.base_model import find

    bundles(find("tiny"), "decoder", folder, (profile,))


def held_out_loss(federation: Federation, judge: Node, adapter: Adapter) -> float:
    """On the rows that no device has."""
    call = Call(federation="judge", round=1, rounds=1, plan=federation.plan, r=4, digest=adapter.digest())
    return device.evaluate(Received(call, adapter), judge, Memory(RecordDict(), "judge", None))[0]["loss"]


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One federation; a line for each round as it ends."""
    wanted = options.devices * ROWS_EACH
    rows = [dict(row) for _, row in read(options.data)] if options.data else rooms(wanted + 2 * HELD_OUT)
    judge = prepared(folder, options.profile, rows)
    federation = Federation.model_validate(
        {
            "name": "devices",
            "plan": PLAN,
            "rounds": {
                "count": options.rounds,
                "cohort": options.cohort,
                "over_selection": 0.3,
                "minimum_nodes": max(1, options.cohort // 2),
                "evaluators": max(2, options.cohort // 4),
                "timeout_seconds": 1800,
                "wire": "fp16",
                "wire_down": "fp16",
            },
            "aggregation": {"rank_cap": 8},
            "output": folder / "run",
        }
    )
    devices = Devices.model_validate(
        {
            "bundle": judge.device,
            "key": judge.device_key,
            "partition": {"rows": judge.train, "nodes": options.devices, "tiers": ["medium", "small", "micro"]},
            "availability": {"share": 0.3},
            "rows_per_second": 0.02,
            "bytes_per_second": 20_000,
            "device_bytes": 1_000_000,
            "pause_seconds": 3600,
        }
    )
    check_devices(federation, devices)
    before, begun, found = held_out_loss(federation, judge, Adapter()), time.perf_counter(), list[dict[str, Any]]()
    print(_COLUMNS)

    def watch(record: RoundRecord, told: DeviceRound) -> None:
        losses = [metrics["loss"] for metrics in record.evaluation.values()]
        row = asdict(told) | {
            "merged": len(record.accepted),
            "loss": sum(losses) / max(1, len(losses)),
            "rss_bytes": _resident(),
            "seconds": time.perf_counter() - begun,
        }
        found.append(row)
        print(
            f"{told.round:>5}{told.available:>7}{told.asked:>7}{row['merged']:>8}{told.dropped:>11}{told.gone + told.late:>6}"
            f"{told.refused:>7}{told.bytes_down / 1e6:>9.1f}{told.bytes_up / 1e6:>7.1f}{told.hours:>7.2f}{row['loss']:>8.4f}"
            f"{row['rss_bytes'] / 1e6:>8.1f}{row['seconds']:>8.1f}",
            flush=True,
        )

    cpu = time.process_time()
    outcome, totals = federate_devices(federation, devices, watch)
    late = [row["rss_bytes"] for row in found[len(found) // 2 :]]
    return {
        "devices": asdict(totals),
        "joined": len(outcome.offers),
        "merged": sum(row["merged"] for row in found),
        "ends": {end: sum(row[end] for row in found) for end in ("asked", "dropped", "gone", "late", "refused", "failed")},
        "held_out_loss": [before, held_out_loss(federation, judge, outcome.adapter)],
        "rss_bytes": {"round 5": found[min(4, len(found) - 1)]["rss_bytes"], "second half, most": max(late)},
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "losses": [round(row["loss"], 4) for row in found],
    }


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cohort", type=int, default=200)
    parser.add_argument("--profile", choices=("q8", "q4"), default="q8")
    parser.add_argument("--data", type=Path, help="rows of sft, at least two a device")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedge-devices-") as folder:
        told = run(options, Path(folder))
    before, after = told["held_out_loss"]
    first, most = told["rss_bytes"].values()
    print(f"loss on rows that no device has: {before:.4f} before, {after:.4f} after")
    print(
        f"memory: {first / 1e6:.1f} MB after round 5, at most {most / 1e6:.1f} MB in the second half, {most / first:.3f} of it"
    )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
