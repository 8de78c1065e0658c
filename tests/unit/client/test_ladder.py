"""A node that runs out of memory in mid-round goes on with less and loses no round. In the last test the shortage is real."""

import json
import subprocess
import sys

import pytest

from client.ladder import Ladder
from client.memory import Memory
from client.node import Node
from protocol.errors import HardwareError
from protocol.plan import Plan
from protocol.records import Call
from strategies.hardware import PROFILES
from strategies.ladder import on_ladder, out_of_memory
from strategies.narrowing import Narrowed, fitted

PLAN = Plan.model_validate({"lora": {"r": 8}, "data": {"max_length": 256}, "training": {"batch_size": 4}})


def shortage():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def failing(times, error):
    """A training that fails so often, and then returns the plan that it was called with."""
    seen = []

    def train(plan):
        seen.append(plan)
        if len(seen) <= times:
            raise error()
        return len(seen)

    return train


def node(tmp_path, **more):
    return Node(name="bank", train=tmp_path / "rows.jsonl", **more)


def ladder(tmp_path, plan=PLAN):
    from flwr.app import RecordDict

    call = Call(federation="f", round=1, rounds=2, plan=plan, r=8)
    return Ladder(call, plan, node(tmp_path), Memory(RecordDict(), "f", tmp_path / "state"))


def test_each_rung_is_tried_once_and_the_one_that_holds_is_remembered(tmp_path):
    made, plan = ladder(tmp_path).train(failing(3, shortage))
    assert made == 4
    assert (plan.training.batch_size, plan.training.gradient_accumulation_steps) == (1, 4)
    assert plan.training.gradient_checkpointing

    again, same = ladder(tmp_path).train(failing(0, shortage))
    assert (again, same) == (1, plan), "the next round begins where this one ended"
    other = PLAN.model_copy(update={"dropout": 0.1})
    assert ladder(tmp_path, other).train(failing(0, shortage))[1] == other, "another plan begins at the top"


def test_every_rung_keeps_the_rows_of_a_step_and_an_update_that_the_coordinator_expects(tmp_path):
    rungs = ladder(tmp_path).rungs
    assert rungs
    for _, plan in rungs:
        assert plan.training.batch_size * plan.training.gradient_accumulation_steps == 4
        assert plan.lora.r <= PLAN.lora.r
        assert plan.method in ("lora", "qlora")
        assert Plan.model_validate(plan.model_dump()) == plan


def test_at_the_foot_of_the_ladder_it_says_so(tmp_path):
    with pytest.raises(HardwareError, match="out of memory even with the smallest plan"):
        ladder(tmp_path).train(failing(99, shortage))


def test_what_is_no_shortage_is_not_climbed_away_from():
    with pytest.raises(RuntimeError, match="shapes"):
        on_ladder(PLAN, [("less", PLAN)], failing(1, lambda: RuntimeError("shapes do not match")))


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_shortages_are_known_by_class_and_by_torch_s_words(error, wanted):
    assert out_of_memory(error) is wanted


def test_a_plan_that_does_not_fit_is_refused_with_both_numbers():
    from strategies.architecture import read

    seventy = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    seventy |= {"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000}
    with pytest.raises(HardwareError, match=r"needs 4\d\.\d GB, this GPU has 25\.8"):
        fitted(Narrowed(PLAN, {}), read(seventy), PROFILES["rtx-4090"])


def test_a_plan_that_does_not_fit_as_it_is_is_made_to_fit_with_reasons():
    from strategies.architecture import read

    seven = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    seven |= {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
    wish = Plan.model_validate(
        {"precision": "bf16", "lora": {"r": 32}, "training": {"batch_size": 64, "mixed_precision": "bf16"}}
    )
    found = fitted(Narrowed(wish, {}), read(seven), PROFILES["rtx-4090"])
    t = found.chosen.training
    assert t.batch_size * t.gradient_accumulation_steps == 64
    assert t.batch_size < 64
    assert found.chosen.lora == wish.lora
    assert "did not fit" in found.reasons["training.batch_size"]
    small = fitted(Narrowed(wish, {}), read(seven), PROFILES["rtx-4060"])
    assert (small.chosen.method, small.chosen.precision) == ("qlora", "nf4")


SCRIPT = """
import json, resource, sys
from pathlib import Path
from flwr.app import RecordDict
from client.ladder import Ladder
from client.memory import Memory
from client.node import Node
from protocol.plan import Plan
from protocol.records import Call
from strategies.base_model import find
from strategies.data.formats import load
from strategies.training import fit

rows = Path(sys.argv[1])
plan = Plan.model_validate({"lora": {"r": 4}, "data": {"max_length": 512},
                            "training": {"batch_size": 256, "max_steps": 1, "lr_scheduler_type": "constant"}})
small = plan.model_copy(update={"training": plan.training.model_copy(update={"batch_size": 2})})
taken, base = load(rows, plan), find("tiny")
fit(small, base, taken[:2])  # everything is imported and every thread is there
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1500 * 2**20,) * 2)
node = Node(name="n", train=rows)
call = Call(federation="f", round=1, rounds=1, plan=plan, r=4)
seen = []

def attempt(plan):
    seen.append(plan.training.batch_size)
    return fit(plan, base, taken)

made, reached = Ladder(call, plan, node, Memory(RecordDict(), "f", None)).train(attempt)
print(json.dumps({"tried": seen, "steps": made.metrics["train-steps"], "modules": len(made.adapter.factors)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's address space")
def test_a_real_shortage_in_mid_round_loses_no_round(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"input_text": "What is the fee?", "target_text": "Nine crowns. " * 200}
    rows.write_text((json.dumps(row) + "\n") * 256)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(rows)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tried"][0] == 256
    assert told["tried"][-1] < 256
    assert told["steps"] == 1
    assert told["modules"] > 0
