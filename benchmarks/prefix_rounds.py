"""Prefix-tuning over rounds that each begin at a prefix: through a fresh network, or bare; GSM8K over a 260 k story teller.

    python -m benchmarks.prefix_rounds --data DIR

One node, so that nothing but the start of a round is compared: held-out loss per answer token (nats) of the base, after one
training in one piece, and after the same number of steps in rounds. Bare is p-tuning-v2 from the second round on. The last
line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

from protocol.adapter import Adapter
from protocol.plan import Method, Plan
from simulations.scenario import write_rows
from strategies.base_model import find
from strategies.data.files import read
from strategies.data.formats import Row, load
from strategies.evaluation.measure import measure
from strategies.training import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per round, batches of 8")
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-3, 3e-3, 1e-2))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    taken = options.steps * 8
    with tempfile.TemporaryDirectory(prefix="fedge-prefix-") as scratch:
        file = Path(scratch) / "rows.jsonl"
        every = [dict(row) for _, row in read(options.data / "instruct" / "gsm8k_train.jsonl")]
        write_rows(file, every[: options.rounds * taken + 40])
        base_model = str((options.data / "models" / "stories260k-hf").resolve())
        rows = load(file, _plan(base_model, 1e-3, 1, 0))
    train, held = rows[:-40], rows[-40:]
    figures = {}
    for rate in options.rates:
        plans = [_plan(base_model, rate, options.steps, options.seed + at) for at in range(options.rounds)]
        figures[f"{rate:g}"] = {
            "base": _loss(plans[0], held, Adapter()),
            "one piece": _loss(plans[0], held, _whole(base_model, rate, options, train)),
            "through a network": _loss(plans[0], held, _in_rounds(plans, train, taken, "prefix-tuning")),
            "bare": _loss(plans[0], held, _in_rounds(plans, train, taken, "p-tuning-v2")),
        }
        print(f"{rate:8g}" + "".join(f"  {kind} {loss:.4f}" for kind, loss in figures[f"{rate:g}"].items()), flush=True)
    print(json.dumps(figures))


def _plan(base_model: str, rate: float, steps: int, seed: int) -> Plan:
    training = {
        "learning_rate": rate,
        "batch_size": 8,
        "max_steps": steps,
        "seed": seed,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    }
    return Plan.model_validate(
        {"base_model": base_model, "method": "prefix-tuning", "data": {"max_length": 160}, "training": training}
    )


def _whole(base_model: str, rate: float, options: argparse.Namespace, train: list[Row]) -> Adapter:
    plan = _plan(base_model, rate, options.rounds * options.steps, options.seed)
    return fit(plan, find(base_model), train).adapter


def _in_rounds(plans: list[Plan], train: list[Row], taken: int, later: Method) -> Adapter:
    adapter = Adapter()
    for at, plan in enumerate(plans):
        of_round = plan if at == 0 else plan.model_copy(update={"method": later})
        adapter = fit(of_round, find(plan.base_model), train[at * taken : (at + 1) * taken], start=adapter).adapter
    return adapter


def _loss(plan: Plan, held: list[Row], adapter: Adapter) -> float:
    return round(measure(plan, find(plan.base_model), held, adapter)["loss"], 4)


if __name__ == "__main__":
    main()
