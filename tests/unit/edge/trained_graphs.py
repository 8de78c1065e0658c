"""Small models of random weights with their training graphs, held with any number of bits, and gradients by PEFT."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge import graph_file
from edge.export import Exported
from edge.quantize import quantize
from edge.runtime.gradient import Gradients
from edge.runtime.manifest import BundleManifest, DecoderShape, EncoderShape, File, Tokens
from edge.runtime.session import Resources
from edge.runtime.training_rows import NOT_LEARNT, Row
from edge.train_graph.make import for_training, graphs_of, held_as
from protocol.adapter import Adapter, Factors

RANKS = (1, 64, 2, 16, 3, 8, 5)


@dataclass(frozen=True)
class Traced:
    """A model and its graphs, which serve every profile."""

    exported: Exported
    model: object
    graphs: dict
    outline: object

    def bundle(self, folder: Path, profile: str = "fp32", pad: int = 0) -> BundleManifest:
        """Writes what a bundle holds but for tokenizer and signature."""
        exported = self.exported
        graph_file.save(quantize(exported.model, profile).model, folder)
        made = held_as(self.model, self.graphs, self.outline, exported, folder)
        content = made.files | {name: (folder / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
        content["tokenizer/tokenizer.json"] = b"{}"
        for path, held in content.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(held)
        return BundleManifest(
            name="small",
            version=1,
            kind=exported.kind,
            base_digest="ab" * 32,
            profile=profile,
            opset=23,
            minimum_onnxruntime="1.31",
            decoder=DecoderShape(**asdict(exported.decoder)) if exported.decoder else None,
            encoder=EncoderShape(**asdict(exported.encoder)) if exported.encoder else None,
            lora=dict(exported.lora),
            dense=dict(exported.dense),
            labels=exported.labels,
            tokens=Tokens(pad=pad),
            training=made.described,
            files={path: File(sha256=hashlib.sha256(held).hexdigest(), size_bytes=len(held)) for path, held in content.items()},
        )

    def gradients(self, folder: Path, profile: str = "fp32", pad: int = 0) -> Gradients:
        return Gradients(folder, self.bundle(folder, profile, pad), Resources(threads=1))


def traced(exported: Exported) -> Traced:
    model = for_training(exported.base, exported.kind, exported.labels)
    shape = exported.decoder or exported.encoder
    return Traced(exported, model, *graphs_of(model, exported.kind == "decoder", exported.dense, shape.context_tokens))


def adapter(gradients: Gradients, seed: int = 0, ranks=RANKS, scaling: float = 1.0, labels: int = 5) -> Adapter:
    """Factors for every module, none of them zero, of mixed ranks; a head of five labels."""
    rng = np.random.default_rng(seed)
    factors = {}
    for at, (module, (d_in, d_out)) in enumerate(gradients.modules.items()):
        r = ranks[at % len(ranks)]
        A, B = rng.normal(0, d_in**-0.5, (r, d_in)), rng.normal(0, 0.2 * r**-0.5, (d_out, r))
        factors[module] = Factors(A.astype(np.float32), B.astype(np.float32), scaling)
    sizes = {name: [labels if size == "labels" else size for size in dims] for name, dims in gradients.dense.items()}
    dense = {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    return Adapter(factors, dense)


def rows(gradients: Gradients, seed: int = 1, lengths=(9, 23, 5, 14), labels: int = 5) -> list[Row]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(5, gradients.vocabulary, min(length, gradients.largest_tokens)).tolist()
        said = [token if rng.random() < 0.6 else NOT_LEARNT for token in ids]
        made.append(Row(ids, said if gradients.manifest.kind == "decoder" else int(rng.integers(labels))))
    return made


def of_peft(folder: Path, adapter: Adapter, kind: str, labels: int = 5):
    """The base of a folder in PEFT with an adapter put into it, and its parameters by our names; pairs of A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "decoder":
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=labels, ignore_mismatched_sizes=True)
    ranks = {module: pair.r for module, pair in adapter.factors.items()}
    alphas = {module: pair.r * pair.scaling for module, pair in adapter.factors.items()}
    targets = sorted(adapter.factors)
    config = LoraConfig(r=1, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    made = get_peft_model(model, config).eval()
    found = {}
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            layer = made.get_base_model().get_submodule(module)
            found[module] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert layer.scaling["default"] == pair.scaling
            found[module][0].copy_(torch.tensor(pair.A))
            found[module][1].copy_(torch.tensor(pair.B))
        for name, tensor in adapter.dense.items():
            found[name] = made.get_base_model().get_parameter(name).requires_grad_(True)
            found[name].copy_(torch.tensor(tensor))
    return made, found


def log_probabilities(model, rows):
    """Of each row, by PyTorch, as one padded batch with its mask: sums, and how much each sums over."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    logits = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, -1)
    if isinstance(rows[0].labels, int):
        return torch.stack([told[row.labels] for told, row in zip(logits, rows, strict=True)]), [1] * len(rows)
    sums, counts = [], []
    for told, row in zip(logits, rows, strict=True):
        learnt = [(at - 1, label) for at, label in enumerate(row.labels) if at and label != NOT_LEARNT]
        sums.append(sum((told[at, label] for at, label in learnt), torch.zeros(())))
        counts.append(len(learnt))
    return torch.stack(sums), counts


def farthest(found: Adapter, parameters) -> tuple[float, str]:
    """The largest relative difference (Frobenius) of any gradient to PyTorch's, and whose."""
    told = []
    for name, expected in parameters.items():
        pairs = [(found.dense[name], expected)] if name in found.dense else []
        if name in found.factors:
            pairs = list(zip((found.factors[name].A, found.factors[name].B), expected, strict=True))
        for ours, tensor in pairs:
            theirs = tensor.grad.numpy()
            told.append((float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-7)), name))
    return max(told)


def flat(found: Adapter) -> np.ndarray:
    parts = [side.reshape(-1) for pair in found.factors.values() for side in (pair.A, pair.B)]
    return np.concatenate([*parts, *(tensor.reshape(-1) for tensor in found.dense.values())])


def cosine(x: Adapter, y: Adapter) -> float:
    x, y = flat(x), flat(y)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
