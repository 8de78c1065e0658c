"""What a decoder forgets of its own stories while it learns arithmetic, without and with stories replayed beside it.

    python -m benchmarks.forgetting --data DIR [--steps N] [--shares 0.1 0.2 0.4]

stories260k, LoRA, GSM8K in batches of 8; with replay a share of each batch is stories that it wrote itself, and the rest of it
is arithmetic. Loss per token (nats) on stories and per answer token on questions, both unseen. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.formats import Row
from strategies.data.mixture import general_rows, mixed
from strategies.evaluation.measure import measure
from strategies.training import fit

HELD_OUT = 100


def plan_of(base_model: str, steps: int, share: float) -> Plan:
    return Plan.model_validate(
        {
            "base_model": base_model,
            "lora": {"r": 8, "lora_alpha": 16},
            "data": {"max_length": 256, "replay_share": share or 0.5},
            "training": {"learning_rate": 5e-3, "batch_size": 8, "max_steps": steps},
        }
    )


def run(data: Path, steps: int, shares: tuple[float, ...]) -> list[dict[str, float]]:
    """The base, training without replay (share 0), and with each share."""
    base = find(str((data / "models" / "stories260k-hf").resolve()))
    rows, asked, told = (
        general_rows(data / name, plan_of(base.name, steps, 0))
        for name in ("instruct/gsm8k_train.jsonl", "probes/gsm8k_test.jsonl", "text/stories_selfgen_en.jsonl")
    )
    general, probe = told[:-HELD_OUT], told[-HELD_OUT:]

    def measured(plan: Plan, adapter: Adapter | None) -> dict[str, float]:
        return {"stories": _loss(plan, probe, adapter), "gsm8k": _loss(plan, asked[:HELD_OUT], adapter)}

    found = [{"share": -1.0, **measured(plan_of(base.name, steps, 0), None)}]
    for share in (0.0, *shares):
        plan = plan_of(base.name, steps, share)
        taken = mixed({"": rows}, general if share else [], plan, 8 * steps)
        found.append({"share": share, **measured(plan, fit(plan, base, taken).adapter)})
    return found


def _loss(plan: Plan, rows: list[Row], adapter: Adapter | None) -> float:
    return measure(plan, find(plan.base_model), rows, adapter)["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    options = parser.parse_args()
    base, without, *others = run(options.data, options.steps, tuple(options.shares))
    lost = without["stories"] - base["stories"]
    print(f"{'replayed':>10} {'stories':>8} {'rise':>6} {'of that':>8} {'gsm8k':>7}")
    for row in (base, without, *others):
        rise = row["stories"] - base["stories"]
        name = "base" if row is base else f"{row['share']:.0%}"
        print(f"{name:>10} {row['stories']:8.3f} {rise:6.3f} {rise / lost:8.0%} {row['gsm8k']:7.3f}")
    print(json.dumps({"steps": options.steps, "rows": [base, without, *others]}))


if __name__ == "__main__":
    main()
