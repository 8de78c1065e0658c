"""Methods in a federation and alone: rounds improve what is held out, and one client is plain training with the same seed."""

import gc
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.node import Node
from protocol.adapter import Adapter, Factors
from protocol.federation import AggregationSettings, Federation
from protocol.files import read_adapter
from protocol.plan import Plan
from server.aggregation.registry import make
from server.track import Track
from server.training_round import start_of
from simulations.federation import federate
from simulations.single import train_alone
from strategies.base_model import CHAT_TEMPLATE, find, load
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure
from strategies.job import Job
from strategies.methods import bottleneck
from strategies.methods.registry import method_of

SEED = 7
TRAINING = {"learning_rate": 1e-2, "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "weight_decay": 0.01}
QUESTIONS = [f"Which room has number {n}?" for n in range(40)]
METHODS = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "freezing": {"method": "freezing", "freezing": {"frozen_share": 0.5}},
    "thawing": {"method": "freezing", "freezing": {"frozen_share": 0.5, "thaw_every": 4}},
    "bitfit": {"method": "bitfit", "bitfit": {"add_missing": True}},
    "bottleneck": {"method": "bottleneck", "bottleneck": {"reduction_factor": 4}},
    "adalora": {"method": "adalora"},
    "dora": {"method": "lora", "lora": {"r": 4, "lora_alpha": 8, "use_dora": True}},
}

# They share all but one list of names with full; rounds of LoRA are in many other tests.
SLOW = ("freezing", "thawing", "lora")


@pytest.fixture(scope="module")
def bases():
    """The small bases of the unit tests, which lie in another folder."""
    where = Path(__file__).parent.parent / "unit" / "strategies" / "small_bases.py"
    spec = importlib.util.spec_from_file_location("small_bases", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama(bases, tmp_path_factory):
    return bases.saved("llama", tmp_path_factory.mktemp("llama"))


def written(path, questions):
    rows = [{"instruction": question, "output": f"Room {question.split()[-1][:-1]}, on the left."} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def nodes(tmp_path):
    held = written(tmp_path / "held.jsonl", QUESTIONS[32:])
    return [
        Node(name=name, train=written(tmp_path / f"{name}.jsonl", QUESTIONS[at::2][:16]), evaluate=held)
        for at, name in enumerate(("bank", "clinic"))
    ]


@pytest.fixture(autouse=True)
def _quick():
    """A trainer collects garbage before it trains, which takes longer than training if it looks at all libraries."""
    gc.freeze()


# Rounds --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def test_three_rounds_of_two_clients_improve_what_is_held_out(name, llama, nodes, tmp_path):
    training = {"learning_rate": {"full": 5e-3, "adalora": 0.1}.get(name, 2e-2), "batch_size": 4, "max_steps": 4}
    plan = {"base_model": llama, "lora": {"r": 4, "lora_alpha": 8}, "training": training} | METHODS[name]
    federation = Federation.model_validate(
        {"name": name, "plan": plan, "rounds": {"count": 3, "evaluate_every": 0}, "output": tmp_path / "runs"}
    )
    outcome = federate(federation, nodes)
    plan, rows = federation.plan, load_rows(nodes[0].evaluate, federation.plan)
    losses = [measure(plan, find(llama), rows)["loss"], measure(plan, find(llama), rows, outcome.adapter)["loss"]]
    assert losses[1] < losses[0] - 0.1
    assert all(len(record.accepted) == 2 for record in outcome.rounds)
    if name in ("full", "freezing", "thawing"):
        kept = [metrics["energy-kept"] for record in outcome.rounds for metrics in record.accepted.values()]
        assert len(kept) == 6
        assert all(0.2 < share <= 1 for share in kept)
    assert read_adapter(tmp_path / "runs" / "adapter")[0].digest() == outcome.adapter.digest()


@pytest.mark.parametrize(("method", "fresh"), [("full", True), ("freezing", True), ("lora", False), ("adalora", False)])
def test_a_change_of_whole_weights_does_not_share_its_rank_with_what_was_sent(method, fresh):
    track = Track("", "", (Plan.model_validate({"method": method}),), make(AggregationSettings()))
    start = start_of(track, 4, 1)
    assert start.fresh is fresh
    sent = Adapter({"q": Factors(np.ones((6, 3), np.float32), np.ones((2, 6), np.float32))})
    assert {module: pair.r for module, pair in start.trained(sent).factors.items()} == ({} if fresh else {"q": 4})


# One client is plain training ----------------------------------------------------------------------------------------------


def job_of(llama, tmp_path, **more):
    train, held = written(tmp_path / "train.jsonl", QUESTIONS[:24]), written(tmp_path / "held.jsonl", QUESTIONS[32:])
    data = {"train": train, "evaluate": held, "max_length": 120}
    content = {"base_model": llama, "data": data, "training": TRAINING | {"seed": SEED}, "output": tmp_path / "ours"}
    return Job.model_validate(content | more)


def trained_plainly(llama, job, prepare=lambda model: model, **more):
    """A script of transformers and TRL alone, with the same seed; ``prepare`` says what trains."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    rows = [json.loads(line) for line in job.data.train.read_text().splitlines()]
    trainer = SFTTrainer(
        model=prepare(AutoModelForCausalLM.from_pretrained(llama, dtype="float32")),
        args=SFTConfig(
            output_dir=str(job.output.parent / "plain"),
            max_length=120,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=4,
            weight_decay=0.01,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            seed=SEED,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["instruction"]}],
                    "completion": [{"role": "assistant", "content": row["output"]}],
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    return trainer.model


def largest_difference(model, arrays):
    return max(float(np.abs(model.get_parameter(name).detach().numpy() - array).max()) for name, array in arrays.items())


def parameters(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_full_fine_tuning_of_one_client_equals_plain_trl_and_its_model_is_a_base(llama, tmp_path):
    """The saved model is the oracle's to float32 rounding; the adapter is the best of its rank (numpy's SVD, float64)."""
    job = job_of(llama, tmp_path, method="full", lora={"r": 3})
    record = train_alone(job)
    plain = trained_plainly(llama, job)
    whole = job.output / "model"
    ours, before = (load(find(str(folder)), Plan(base_model=str(folder)))[0] for folder in (whole, llama))
    assert largest_difference(before, parameters(plain)) > 1e-3, "a training that moves nothing proves nothing"
    assert largest_difference(ours, parameters(plain)) <= 1e-6
    adapter, _ = read_adapter(job.output / "adapter")
    left = total = 0.0
    for module, pair in adapter.factors.items():
        change = plain.get_parameter(f"{module}.weight") - before.get_parameter(f"{module}.weight")
        change = change.detach().double().numpy()
        change = change.T if "embed" in module else change
        best = float((np.linalg.svd(change, compute_uv=False)[3:] ** 2).sum())
        assert float(((pair.product() - change) ** 2).sum()) <= 1.01 * best + 1e-9
        left, total = left + best, total + float((change**2).sum())
    assert largest_difference(plain, adapter.dense) <= 1e-6
    (told,) = record.accepted.values()
    assert told["energy-kept"] == pytest.approx(1 - left / total, abs=0.01)
    # Nothing was lost on the way to the folder, and the next job begins where this one ended.
    rows = load_rows(job.data.evaluate, job.plan())
    again = job.model_copy(update={"base_model": str(whole), "output": tmp_path / "second"})
    begun = measure(again.plan(), find(str(whole)), rows)["loss"]
    assert begun < measure(job.plan(), find(llama), rows)["loss"] - 0.05
    train_alone(again)
    assert (tmp_path / "second" / "model" / "tokenizer.json").is_file()


def test_freezing_of_one_client_equals_plain_trl_with_the_others_frozen(llama, tmp_path):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.2" in name or "layers.3" in name or name == "model.norm.weight")
        return model

    job = job_of(llama, tmp_path, method="freezing", freezing={"frozen_share": 0.5})
    train_alone(job)
    ours = load(find(str(job.output / "model")), Plan(base_model=str(job.output / "model")))[0]
    assert largest_difference(ours, parameters(trained_plainly(llama, job, freeze))) <= 1e-6


def test_bitfit_of_one_client_equals_plain_trl_with_added_biases(llama, tmp_path):
    def add(model):
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
        return model

    job = job_of(llama, tmp_path, method="bitfit", bitfit={"add_missing": True})
    train_alone(job)
    ours, _ = read_adapter(job.output / "adapter")
    assert all(np.abs(bias).max() > 1e-3 for bias in ours.dense.values())
    # Keys hardly feel their bias (attention weighs differences), and Adam makes full steps of the little that rounding leaves.
    assert largest_difference(trained_plainly(llama, job, add), ours.dense) <= 1e-5


def test_bottlenecks_of_one_client_equal_plain_torch_modules_in_plain_trl(llama, tmp_path):
    """Layers of torch's own, from the same draw, added after the same sub-layers."""
    job = job_of(llama, tmp_path, method="bottleneck", bottleneck={"reduction_factor": 4})
    train_alone(job)
    ours, _ = read_adapter(job.output / "adapter")
    torch.manual_seed(SEED)
    begun = method_of(job.plan()).extract(bottleneck.attach(load(find(llama), job.plan())[0], job.plan())).dense

    def insert(model):
        model.requires_grad_(False)
        for layer in range(4):
            for place in ("self_attn.o_proj", "mlp.down_proj"):
                end = model.get_submodule(f"model.layers.{layer}.{place}")
                end.bottleneck = torch.nn.ModuleDict({"down": torch.nn.Linear(32, 8), "up": torch.nn.Linear(8, 32)})
                end.register_forward_hook(lambda m, i, h: h + m.bottleneck["up"](m.bottleneck["down"](h).relu()))
        with torch.no_grad():
            for name, array in begun.items():
                model.get_parameter(name).copy_(torch.from_numpy(array))
        return model

    plain = trained_plainly(llama, job, insert)
    assert largest_difference(plain, begun) > 1e-3
    assert largest_difference(plain, ours.dense) <= 1e-6


def test_dora_of_one_client_equals_plain_peft_and_trl(llama, tmp_path):
    from peft import LoraConfig

    job = job_of(llama, tmp_path, lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_dora": True})
    train_alone(job)
    ours, _ = read_adapter(job.output / "adapter")
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = trained_plainly(llama, job, peft_config=config)
    worst = 0.0
    for module, pair in ours.factors.items():
        layer = plain.get_submodule(f"base_model.model.{module}")
        worst = max(worst, float(np.abs(layer.get_delta_weight("default").detach().numpy() - pair.product()).max()))
        lengths = layer.lora_magnitude_vector["default"].weight.detach().numpy()
        worst = max(worst, float(np.abs(lengths - ours.dense[f"{module}.lora_magnitude_vector"]).max()))
    assert worst <= 1e-6
