"""The demonstration: four institutions, each with facts that only it knows, fine-tune the embedded model together."""

from collections.abc import Callable
from pathlib import Path

import yaml

from protocol.files import write_whole
from server.ledger import RoundRecord
from simulations.federation import Comparison, Say, compare
from simulations.institutions import INSTITUTIONS, rows
from simulations.scenario import nodes_of, read_scenario, write_rows
from strategies.narrowing import TierName

# One institution on each class of hardware: ranks 16, 8, 4 and, for the law firm, a base held at 4 bits.
TIERS: dict[str, TierName] = {"bank": "large", "clinic": "medium", "law_firm": "small", "it_helpdesk": "micro"}

FEDERATION = {
    "name": "demo",
    "plan": {
        "base_model": "tiny",
        "objective": "sft",
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {"max_length": 128},
        "training": {
            "learning_rate": 1.0e-2,
            "batch_size": 16,
            "max_steps": 12,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
        },
    },
    "rounds": {"count": 8, "minimum_nodes": 4, "evaluate_every": 0},
}


def prepare(output: Path) -> Path:
    """Writes the institutions' rows and the YAML files that ``fedge simulate`` and ``flwr run`` take.

    Args:
        output: ``data/NAME/train.jsonl`` and ``test.jsonl``, ``scenario.yaml``, ``federation.yaml`` and ``nodes.yaml``
            appear in it.

    Returns:
        The scenario file.
    """
    nodes = []
    for institution in INSTITUTIONS:
        for split in ("train", "test"):
            write_rows(
                output / "data" / institution.name / f"{split}.jsonl", [dict(row) for row in rows(institution.name, split)]
            )
        files = {"train": f"data/{institution.name}/train.jsonl", "evaluate": f"data/{institution.name}/test.jsonl"}
        nodes.append({"name": institution.name, "tier": TIERS[institution.name], **files})
    federation = {**FEDERATION, "output": str(output)}
    _write(output / "federation.yaml", federation)
    _write(output / "nodes.yaml", {"nodes": nodes})
    return _write(output / "scenario.yaml", {"federation": federation, "nodes": nodes, "compare": True})


def run(scenario_file: Path, watch: Callable[[RoundRecord], None], say: Say) -> Comparison:
    """Runs the federation and what it is held against."""
    import torch

    torch.set_num_threads(1)  # matrices this small are slower on two threads than on one
    scenario = read_scenario(scenario_file)
    return compare(scenario.federation, nodes_of(scenario), watch=watch, say=say)


def _write(path: Path, content: object) -> Path:
    write_whole(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path
