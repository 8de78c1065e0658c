"""One row of ``benchmarks.device_training``, in a process of its own: makes a model's files, or measures steps.

python -m benchmarks.device_training_row prepare|row MODEL NAME FOLDER STEPS [TARGET ...]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

if TYPE_CHECKING:
    from edge.parity import Kind
    from strategies.base_model import Base

ROWS, TOKENS, RANK, RATE = 4, 128, 8, 1e-3
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))  # of bundles that live as long as the benchmark
_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MODELS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "100m": (_LLAMA, ("fp32", "q8", "q4", "int8-dynamic")),
    "200m": ({**_LLAMA, "num_hidden_layers": 24}, ("fp32", "q8", "q4")),
    "500m": (_QWEN, ("q4",)),
}


def prepare(config: Mapping[str, Any], profiles: tuple[str, ...], folder: Path) -> None:
    """The base and its trainable bundles."""
    from strategies.base_model import find

    if not (folder / "base" / "tokenizer.json").exists():
        _draw(config, folder / "base")
    bundles(find(str(folder / "base")), "decoder", folder, profiles)


def bundles(base: "Base", kind: "Kind", folder: Path, profiles: tuple[str, ...]) -> None:
    """Trainable bundles that are not there yet; compared with nothing, for the gates of ``edge.make`` and the tests do that."""
    from edge import graph_file, tokenizer
    from edge.bundle import write_bundle
    from edge.described import described
    from edge.export import export
    from edge.quantize import quantize
    from edge.runtime.manifest import MODEL, TOKENIZER
    from edge.train_graph.make import for_training, graphs_of, held_as
    from strategies.base_model import load_tokenizer

    missing = [profile for profile in profiles if not (folder / "bundles" / profile).exists()]
    if not missing:
        return
    words, exported = load_tokenizer(base), export(base, kind)
    model, shape = for_training(base, kind, exported.labels), exported.decoder or exported.encoder
    graphs, outline = graphs_of(model, kind == "decoder", exported.dense, shape.context_tokens if shape else 1)
    for profile in missing:
        print(f"{folder.name}: holding the weights as {profile}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as scratch:
            draft = Path(scratch)
            graph_file.save(quantize(exported.model, profile).model, draft)
            tokenizer.write(words, draft / TOKENIZER, base)
            made = held_as(model, graphs, outline, exported, draft)
            told = described("drawn", 1, profile, exported, base, words, {}).model_copy(update={"training": made.described})
            files = {path.relative_to(draft).as_posix(): path for path in (*draft.glob(f"{MODEL}*"), draft / TOKENIZER)}
            write_bundle(folder / "bundles" / profile, told, {**files, **made.files}, KEY)


def _draw(config: Mapping[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from strategies.base_model import find, load_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    load_tokenizer(find("tiny")).save_pretrained(folder)


def row(model: str, name: str, folder: Path, steps: int, targets: Sequence[str] = ()) -> dict[str, Any]:
    """What one runtime takes for a step; ``name`` as in ``benchmarks.device_training``; no targets are all linear layers."""
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocabulary, (ROWS, TOKENS))
    begin = _torch if name.startswith("torch") else _bundle
    step, size, before = begin(folder, name, ids, targets)
    losses, seconds, cpu = [], [], []
    for _ in range(steps + 1):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - begun_cpu)
    return {
        "name": f"{model} {name}",
        "peak_rss_bytes": _status("VmHWM") - before,
        "seconds_per_step": statistics.median(seconds[1:]),
        "cpu_seconds_per_step": statistics.median(cpu[1:]),
        "disk_bytes": size,
        "first_loss": losses[0],
    }


Step = Callable[[], float]


def _bundle(folder: Path, name: str, ids: Any, targets: Sequence[str]) -> tuple[Step, int, int]:
    from edge.runtime import gradient, head
    from edge.runtime.adapting.adamw import AdamW, shortening
    from edge.runtime.adapting.aside import Aside
    from edge.runtime.adapting.learning import Settings, new_adapter
    from edge.runtime.adapting.passes import Passes
    from edge.runtime.adapting.personal import tensors
    from edge.runtime.session import Resources
    from edge.runtime.training_rows import Row

    profile = name.removesuffix("-whole-head")
    if profile != name:
        for bound in ("_PART_BYTES", "_LOGIT_BYTES"):
            setattr(head, bound, 2**40)
    before = _after_imports()
    bundle = folder / "bundles" / profile
    found = gradient.open(bundle, KEY.public_key(), state=None, resources=Resources(threads=1))
    start = new_adapter(found, Settings(r=RANK, targets=tuple(targets)))
    rows = [(Row(each, each),) for each in ids.tolist()]
    passes, optimiser, now = Passes(found, "sft", ROWS, kept=Aside(folder)), AdamW(RATE), tensors(start)
    moments, gradients, number = Aside(folder, optimiser.start(now)), Aside(folder), 0

    def step() -> float:
        nonlocal number
        number += 1
        loss = passes.gradient(start, rows, gradients)
        optimiser.step(now, gradients, moments, number, shortening(gradients.values(), 1.0))
        return cast("float", loss)

    return step, sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()), before


def _torch(folder: Path, name: str, ids: Any, targets: Sequence[str]) -> tuple[Step, int, int]:
    import bitsandbytes  # noqa: F401 - imported by all three, so that none of them counts it
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    before = _after_imports()
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": small} if name == "torch-nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.float32, **options)
    size = sum({each.data_ptr(): each.nbytes for each in base.state_dict().values()}.values())
    if name == "torch-nf4":
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    elif name == "torch-checkpointing":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    base.config.use_cache = False
    torch.manual_seed(0)
    adapted = list(targets) or "all-linear"
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=16, target_modules=adapted, task_type="CAUSAL_LM")).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    given = torch.tensor(ids)

    def step() -> float:
        loss = model(input_ids=given, labels=given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step, size, before


def _after_imports() -> int:
    """Resident bytes now; the peak begins anew (``man 5 proc``, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def main() -> None:
    what, model, name, folder, steps, *targets = sys.argv[1:]
    if what == "prepare":
        (Path(folder) / model).mkdir(parents=True, exist_ok=True)
        prepare(*MODELS[model], Path(folder) / model)
        print("{}")
    else:
        print(json.dumps(row(model, name, Path(folder) / model, int(steps), targets)))


if __name__ == "__main__":
    main()
