"""One row of ``benchmarks.edge``, in a process of its own: prepares a model's files, or measures one runtime.

python -m benchmarks.edge_row prepare|row MODEL RUNTIME PROFILE WORK DATA
"""

import io
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

Logits = NDArray[np.float32]
_PROMPT, _LONG, _STEPS, _TRIES = 256, 1024, 32, 3
_TEXTS, _TEXT_TOKENS = 16, 32
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))  # of bundles that live as long as the benchmark
_ADAPTER = "tuned"
# A drawn model prefers no token to speak of: what is likeliest turns with any rounding. The rows tell how far each profile is.
_LOOSE = {"kl": 10.0, "top1": 0.0, "perplexity_ratio": 10.0}
_REFERENCE = "reference.npz"
_SOURCES = {"stories260k": "models/stories260k-hf"}


class Engine(Protocol):
    """A runtime with a model in it."""

    def read(self, ids: Sequence[int]) -> object:
        """Reads a prompt anew."""

    def step(self, token: int) -> object:
        """One more token."""

    def every(self, ids: Sequence[int]) -> Logits:
        """Logits after every token, or of a text."""


# What is measured --------------------------------------------------------------------------------------------------------


def prepare(model: str, work: Path, data: Path) -> dict[str, Any]:
    """The model's folder, its adapter, the ids that everybody reads, and bundles of every profile."""
    from edge.make import Request, make_bundle, requantise

    folder = work / model
    if (folder / "bundles").exists():
        return {}
    folder.mkdir(parents=True)
    plan = {"random-100m": _drawn, "stories260k": _stories, "minilm": _minilm}[model](folder, data)
    whole = folder / "bundles" / "fp32"
    asked = Request(plan.base_model, whole, _KEY, {_ADAPTER: folder / "adapter"}, profile="fp32", name=model, plan=plan)
    make_bundle(asked, lambda line: print(f"{model}: {line}", file=sys.stderr))
    for profile in ("fp16", "q8", "q4", "int8-dynamic"):
        requantise(whole, profile, folder / "bundles" / profile, _KEY, budget=_LOOSE)
    return {}


def row(model: str, runtime: str, profile: str, work: Path) -> dict[str, Any]:
    folder = work / model
    read = json.loads((folder / "ids.json").read_text())
    engine, size, tuned = {"torch": _torch, "fedge": _bundle, "onnxruntime-genai": _genai}[runtime](folder, profile)
    told: dict[str, Any] = {"model": model, "runtime": runtime, "profile": profile, "bytes": size}
    if model == "minilm":
        told |= _texts(tuned or engine, read)
    else:
        told |= _speeds(engine, folder, read)
        told["decode_with_adapter_tokens_per_second"] = None if tuned is None else _decode(tuned, read[0][:_STEPS])
    told["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return told | _distance(
        tuned if model == "minilm" and tuned else engine, folder, read, first=(runtime, profile) == ("torch", "fp32")
    )


def _speeds(engine: Engine, folder: Path, read: list[list[int]]) -> dict[str, float | None]:
    context = json.loads((folder / "about.json").read_text())["context"]
    prompt = (read[0] * _LONG)[: min(_PROMPT, context // 2)]
    long = (read[0] * _LONG)[:_LONG]
    return {
        "prefill_tokens_per_second": len(prompt) / _best(lambda: engine.read(prompt)),
        "first_token_seconds": _best(lambda: engine.read(prompt)),
        "decode_tokens_per_second": _decode(engine, prompt[:_STEPS]),
        "decode_at_1024_tokens_per_second": _decode(engine, long) if context >= _LONG + _STEPS else None,
    }


def _decode(engine: Engine, prompt: Sequence[int]) -> float:
    engine.read(prompt)
    engine.step(prompt[0])
    taken = []
    for _ in range(_TRIES):
        engine.read(prompt)
        begun = time.perf_counter()
        for token in range(_STEPS):
            engine.step(prompt[token % len(prompt)])
        taken.append(time.perf_counter() - begun)
    return _STEPS / min(taken)


def _texts(engine: Engine, read: list[list[int]]) -> dict[str, float | None]:
    together = [(ids * _TEXT_TOKENS)[:_TEXT_TOKENS] for ids in read[:_TEXTS]]
    none = dict.fromkeys(("decode_tokens_per_second", "decode_with_adapter_tokens_per_second", "first_token_seconds"))
    return none | {"prefill_tokens_per_second": _TEXTS * _TEXT_TOKENS / _best(lambda: engine.read(together))}  # type: ignore[arg-type]


def _best(work: Callable[[], object]) -> float:
    work()
    taken = []
    for _ in range(_TRIES):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _distance(engine: Engine, folder: Path, read: list[list[int]], *, first: bool) -> dict[str, float]:
    """Mean KL(torch || runtime) and how often both have the same likeliest token or label."""
    told = np.concatenate([np.atleast_2d(engine.every(ids)) for ids in read]).astype(np.float64)
    if first:
        np.savez(folder / _REFERENCE, logits=told)
    wanted = np.load(folder / _REFERENCE)["logits"]
    p, q = _log_softmax(wanted), _log_softmax(told)
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))
    return {"kl": max(kl, 0.0), "top1": float(np.mean(wanted.argmax(1) == told.argmax(1)))}


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


# Models ------------------------------------------------------------------------------------------------------------------


def _drawn(folder: Path, data: Path) -> Any:  # noqa: ARG001
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from protocol.adapter import Adapter, Factors
    from protocol.plan import Plan
    from strategies.base_model import find, load_tokenizer
    from strategies.methods.registry import shape

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "base")
    load_tokenizer(find("tiny")).save_pretrained(folder / "base")
    plan = Plan.model_validate(
        {"base_model": str(folder / "base"), "lora": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}}
    )
    generator = np.random.default_rng(0)
    modules = shape(find(plan.base_model), plan).modules

    def drawn(*size: int) -> NDArray[np.float32]:
        return np.float32(0.02) * generator.standard_normal(size, dtype=np.float32)

    pairs = {name: Factors(A=drawn(16, d_in), B=drawn(d_out, 16)) for name, (d_out, d_in) in sorted(modules.items())}
    ids = generator.integers(3, 32000, (4, 64))
    return _kept(folder, plan, Adapter(pairs), ids.tolist(), 2048)


def _stories(folder: Path, data: Path) -> Any:
    from benchmarks.methods import decoder
    from strategies.base_model import load_tokenizer
    from strategies.training import fit

    bench = decoder(data, 40)
    plan = bench.plan({}, 5e-3)
    made = fit(plan, bench.base, list(bench.train[:320])).adapter
    words = load_tokenizer(bench.base)
    lines = (data / "text" / "stories_selfgen_en.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in random.Random(0).sample(lines, 40)]
    return _kept(folder, plan, made, [words(text)["input_ids"][:256] for text in texts], 512)


def _minilm(folder: Path, data: Path) -> Any:
    from benchmarks.methods import encoder
    from strategies.base_model import load_tokenizer
    from strategies.training import fit

    bench = encoder(data, 40)
    plan = bench.plan({}, 5e-3)
    made = fit(plan, bench.base, list(bench.train[:320])).adapter
    words = load_tokenizer(bench.base)
    return _kept(folder, plan, made, [words(one.text)["input_ids"] for one in bench.held_out], 512)  # type: ignore[union-attr]


def _kept(folder: Path, plan: Any, adapter: Any, ids: list[list[int]], context: int) -> Any:
    from protocol.files import write_adapter
    from protocol.manifest import Manifest
    from strategies.base_model import find

    base = find(plan.base_model)
    write_adapter(folder / "adapter", adapter, Manifest(base_digest=base.digest, kind="adapter", method="lora"), plan)
    (folder / "ids.json").write_text(json.dumps(ids))
    about = {
        "context": context,
        "plan": plan.model_dump(mode="json"),
        "bytes": sum(f.stat().st_size for f in base.folder.glob("*.safetensors")),
    }
    (folder / "about.json").write_text(json.dumps(about))
    return plan


# Runtimes ----------------------------------------------------------------------------------------------------------------


class _Torch:
    def __init__(self, model: Any, *, decodes: bool) -> None:
        self._model, self._decodes, self._cache = model, decodes, None

    def read(self, ids: Sequence[int]) -> object:
        import torch

        self._cache = None
        with torch.inference_mode():
            if not self._decodes:
                return self._model(input_ids=torch.tensor(ids)).logits
            told = self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = told.past_key_values
        return told.logits

    def step(self, token: int) -> object:
        import torch

        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True).logits

    def every(self, ids: Sequence[int]) -> Logits:
        import torch

        with torch.inference_mode():
            return np.asarray(self._model(input_ids=torch.tensor([list(ids)])).logits[0].numpy())


def _torch(folder: Path, profile: str) -> tuple[Engine, int, Engine | None]:
    import torch

    from protocol.files import read_stored
    from protocol.plan import Plan
    from strategies.adapted import with_adapter
    from strategies.base_model import find

    torch.set_num_threads(1)
    about = json.loads((folder / "about.json").read_text())
    plan = Plan.model_validate(about["plan"])
    base, stored, decodes = find(plan.base_model), read_stored(folder / "adapter"), plan.task_type == "CAUSAL_LM"

    def made(adapter: Any) -> tuple[Engine, int]:
        model = with_adapter(stored.on(plan) if adapter else plan, base, adapter)[0].eval()
        size = about["bytes"]
        if profile == "int8-dynamic":
            if adapter:  # PEFT's layers look for the weight that torch hides: the adapter goes into the base first
                model = model.merge_and_unload()
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
            kept = io.BytesIO()
            torch.save(model.state_dict(), kept)
            size = kept.tell()
        return _Torch(model, decodes=decodes), size

    plain, size = made(None)
    beside = profile == "fp32" or not decodes
    return plain, size, made(stored.adapter)[0] if beside else None


class _Bundle:
    def __init__(self, model: Any, adapter: str | None) -> None:
        self._model, self._adapter = model, adapter
        self._reader = model.reader(adapter) if model.manifest.kind == "decoder" else None

    def read(self, ids: Any) -> object:
        if self._reader is None:
            return self._model._encoded(ids, self._model._adapter(self._adapter), _TEXTS)  # noqa: SLF001 (ids, as the others get)
        self._reader = self._model.reader(self._adapter)  # or it would know the prompt already
        return self._reader.read([ids])

    def step(self, token: int) -> object:
        return self._reader.step([token], [True])  # type: ignore[union-attr]

    def every(self, ids: Sequence[int]) -> Logits:
        return np.array(self._model.outputs(ids, adapter=self._adapter))


def _bundle(folder: Path, profile: str) -> tuple[Engine, int, Engine | None]:
    from edge.runtime.model import open as opened
    from edge.runtime.session import Resources

    bundle = folder / "bundles" / profile
    model = opened(bundle, _KEY.public_key(), state=None, resources=Resources(threads=1))
    model.load_adapter(_ADAPTER)
    size = sum(file.stat().st_size for file in bundle.glob("model.onnx*"))
    return _Bundle(model, None), size, _Bundle(model, _ADAPTER)


class _Genai:
    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai  # type: ignore[import-not-found,unused-ignore]

        self._package = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    def read(self, ids: Sequence[int]) -> object:
        settings = self._package.GeneratorParams(self._model)
        settings.set_search_options(max_length=len(ids) + _PROMPT)
        self._generator = self._package.Generator(self._model, settings)
        self._generator.append_tokens(np.array([ids], np.int32))
        return self._generator.get_logits()

    def step(self, token: int) -> object:
        self._generator.append_tokens(np.array([[token]], np.int32))
        return self._generator.get_logits()

    def every(self, ids: Sequence[int]) -> Logits:
        told = [self.read(ids[:1]), *(self.step(token) for token in ids[1:])]
        return np.stack([np.array(logits, np.float32).reshape(-1) for logits in told])


def _genai(folder: Path, profile: str) -> tuple[Engine, int, Engine | None]:  # noqa: ARG001 (int4 alone)
    made = folder / "genai"
    if not made.exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder / "base"), "-o", str(made)]
        options = ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", "int4_accuracy_level=4"]
        subprocess.run([*builder, *options], check=True, stdout=sys.stderr)
    return _Genai(made), sum(file.stat().st_size for file in made.glob("model.onnx*")), None


def main() -> None:
    what, model, runtime, profile, work, data = sys.argv[1:]
    found = prepare(model, Path(work), Path(data)) if what == "prepare" else row(model, runtime, profile, Path(work))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
