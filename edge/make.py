"""From a base and its adapters to a signed bundle: exported, quantised, opened, compared, and only then there."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge import adapter_file, graph_file, probes, tokenizer
from edge.bundle import Judge, check_new, write_bundle
from edge.described import check_heads, context_tokens, described, fields_of, kind_of, listed, misnamed
from edge.export import Pooling, export
from edge.gate import BASE, Gate, reading
from edge.parity import Kind, Outputs, Probe, limits_of
from edge.quantize import AlgorithmName, Quantised, quantize
from edge.reference import Torch, torch_of
from edge.room import check_disk
from edge.runtime.gradient import Gradients
from edge.runtime.manifest import MODEL, REPORT, TOKENIZER, Description, Parity, adapter_path
from edge.runtime.model import Model
from edge.runtime.model import open as opened
from edge.runtime.verify import verified
from edge.train_graph.gate import check_gradients, check_rounded
from edge.train_graph.make import check_kind, for_training, requantised, trainable
from protocol.errors import AdapterError, BundleError, ConfigurationError
from protocol.files import Stored, read_stored, sweep
from protocol.plan import Plan
from strategies.adapters.merge import merge
from strategies.base_model import Base, find, load_tokenizer
from strategies.evaluation.source import of_file

if TYPE_CHECKING:
    from onnx_ir import Model as Graph
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]
_BYTES = {"fp32": 4.0, "fp16": 2.0, "q8": 1.2, "int8-dynamic": 1.2, "q4": 0.8}  # of a parameter, at most


@dataclass(frozen=True)
class Request:
    """What is to be made.

    Attributes:
        base_model: As ``strategies.base_model.find`` knows it.
        output: Folder of the bundle, which is not there yet.
        key: The signer's.
        adapters: Folders of adapters by the name that each is to have on devices.
        kind: What the graph answers; without it what the adapters were trained for, else what the base was built for.
        profile: How weights are held.
        name: Of this line of bundles; without it the output's.
        version: Higher than that of every bundle of this name before.
        merge: Writes the one adapter into the base, for adapters that no graph takes beside it.
        plan: That the adapters were trained with: gives a classifier's labels, and says what rows are for.
        rows: To compare on, with their answers or labels; without them our own texts are read.
        calibration: Rows that quantisation may look at.
        largest_bytes: Most that the graph's weights may take: the most sensitive layers keep 8 bits within it.
        pooling: Of an embedder.
        budget: Bounds of the parity gate in place of the profile's.
        trainable: Adds graphs with which devices train adapters.
    """

    base_model: str
    output: Path
    key: Ed25519PrivateKey
    adapters: Mapping[str, Path] = field(default_factory=dict)
    kind: Kind | None = None
    profile: str = "q8"
    name: str | None = None
    version: int = 1
    merge: bool = False
    plan: Plan | None = None
    rows: Path | None = None
    calibration: Path | None = None
    largest_bytes: int | None = None
    pooling: Pooling = "mean"
    budget: Mapping[str, float] = field(default_factory=dict)
    trainable: bool = False


@dataclass(frozen=True)
class _Bundle:
    """A float32 bundle, which was compared with PyTorch when it was made."""

    model: Model
    against: str

    def outputs(self, name: str) -> Outputs:
        """Of the base, or of the base with an adapter."""
        return reading(self.model, None if name == BASE else self.model.load_adapter(name))


@dataclass(frozen=True)
class _Draft:
    """A bundle that nobody has opened yet.

    Attributes:
        described: Its manifest but for files and figures.
        files: Where each is, by its path in the bundle.
        original: What it was made from.
        source: The base that was exported: with an adapter merged into it, or as it was published.
    """

    described: Description
    files: Mapping[str, Path]
    original: Torch
    source: Base


def make_bundle(request: Request, say: Say = lambda line: None) -> Path:
    """Makes a bundle whole, or nothing.

    Args:
        request: What.
        say: Called with a line before each stage.

    Returns:
        Its folder.

    Raises:
        ModelError, AdapterError, ConfigurationError, DataError: What was given cannot become a bundle.
        BundleError: The bundle is too far from the model that it was made from, or the output is there already.
    """
    _, loose = _checked(request)
    base = find(request.base_model)
    stored = _read(request.adapters, base)
    if not request.merge:
        for each in stored.values():
            adapter_file.check_method(each)
    words = load_tokenizer(base)
    with _scratch(request.output, base, request.profile) as scratch:
        draft = _drafted(request, base, stored, words, scratch, say)
        original = draft.original
        read = original.read(request.rows, context_tokens(draft.described))
        gate = Gate(original, read, request.budget, original.unbound(), original.check_words)
        remarks = (*draft.described.remarks, *_loosened(loose))
        say("opening the bundle and comparing it with PyTorch")
        told = draft.described.model_copy(update={"remarks": remarks})
        write_bundle(request.output, told, draft.files, request.key, _with_gradients(gate, draft, say))
    return request.output


def add_adapters(
    bundle: Path,
    adapters: Mapping[str, Path],
    output: Path,
    key: Ed25519PrivateKey,
    *,
    base_model: str | None = None,
    plan: Plan | None = None,
    rows: Path | None = None,
    budget: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> Path:
    """The next version of a bundle, with more adapters, or other ones of the same names; the base is not exported again.

    Args:
        bundle: Signed with ``key``.
        adapters: Folders by name.
        output: Folder of the new bundle.
        key: The signer's.
        base_model: Where the base is; without it as the bundle calls it.
        plan: As of ``Request``.
        rows: As of ``Request``.
        budget: As of ``Request``.
        say: Called with a line before each stage.

    Raises:
        AdapterError: One does not fit the bundle.
        BundleError: ``bundle`` is none, or with one of the adapters it is too far from PyTorch.
    """
    check_new(output, bundle)
    wrong = list(misnamed({f"adapters.{name}": name for name in adapters}))
    if not adapters:
        wrong.append("adapters: found none, expected at least one: the next version would be this one again")
    if wrong:
        raise ConfigurationError("bundle", wrong)
    manifest = verified(bundle, [key.public_key()])
    _, loose = limits_of(manifest.profile, budget or {})
    base = find(base_model or manifest.base_model)
    if base.digest != manifest.base_digest:
        raise BundleError(
            f"{bundle}: was made from base {manifest.base_digest[:12]}, and {base.name!r} is {base.digest[:12]}; name the base "
            "that it was made from"
        )
    stored = _read(adapters, base)
    check_heads(base, manifest.kind, stored)
    pooling = manifest.encoder.pooling if manifest.encoder else None
    original = torch_of(base, manifest.kind, manifest.labels, stored, plan, load_tokenizer(base), pooling)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=_parent(output)) as folder:
        files = {path: bundle / path for path in manifest.files if path != REPORT}
        files |= _packed(stored, manifest.lora, manifest.dense, base.digest, Path(folder))
        there = manifest.adapters | {name: listed(each, original.plans[name]) for name, each in stored.items()}
        told = fields_of(manifest) | {"version": manifest.version + 1, "adapters": there, "parity": {}}
        told["remarks"] = (*manifest.remarks, *_loosened(loose))
        kept = {name: figures for name, figures in manifest.parity.items() if name not in stored}
        read = original.read(rows, context_tokens(manifest))
        gate = Gate(original, read, budget or {}, checks=original.check_words, kept=kept)
        say("opening the bundle and comparing the new adapters with PyTorch")
        write_bundle(output, Description(**told), files, key, gate)
    return output


def requantise(
    bundle: Path,
    profile: str,
    output: Path,
    key: Ed25519PrivateKey,
    *,
    largest_bytes: int | None = None,
    budget: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> Path:
    """A bundle of the same base and adapters with fewer bits, from a float32 one and compared with it; needs no PyTorch.

    Args:
        bundle: Of profile fp32, signed with ``key``.
        profile: How weights are to be held.
        output: Folder of the new bundle.
        key: The signer's.
        largest_bytes: As of ``Request``.
        budget: As of ``Request``.
        say: Called with a line before each stage.

    Raises:
        BundleError: ``bundle`` is none or of another profile, or the new one is too far from it.
    """
    check_new(output, bundle)
    _, loose = limits_of(profile, budget or {})
    source = opened(bundle, key.public_key(), state=None)
    manifest = source.manifest
    if manifest.profile != "fp32":
        raise BundleError(
            f"{bundle}: is of profile {manifest.profile}; rounding what was rounded loses twice: give an fp32 bundle"
        )
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=_parent(output)) as folder:
        say(f"holding the weights as {profile}")
        said = None if manifest.chat is None else (lambda text: source.prompt_ids([{"role": "user", "content": text}]))
        own = probes.default(source.prompt_ids, said, context_tokens(manifest))
        made = _quantised(graph_file.load(bundle / MODEL), profile, own, None, largest_bytes)
        graph_file.save(made.model, Path(folder))
        files = {path: bundle / path for path in manifest.files if not path.startswith(MODEL) and path != REPORT}
        if manifest.training:
            files |= _beside(requantised(bundle, manifest, Path(folder)), Path(folder))
        told = fields_of(manifest) | {"profile": profile, "parity": {}}
        told["remarks"] = (*manifest.remarks, *made.remarks, *_loosened(loose))
        original = _Bundle(source, f"version {manifest.version} in float32, which was compared with PyTorch")
        gate = Gate(original, {BASE: own}, budget or {})
        say("opening the bundle and comparing it")
        write_bundle(output, Description(**told), files | _files(Path(folder)), key, _with_rounded(gate, bundle, source, say))
    return output


def _with_rounded(gate: Gate, bundle: Path, source: Model, say: Say) -> Judge:
    """The gate, and behind it a comparison of gradients where both can be trained with."""
    if source.manifest.training is None:
        return gate

    def judge(folder: Path, key: Ed25519PublicKey) -> tuple[Mapping[str, Parity], str]:
        told = gate(folder, key)
        original = Gradients(bundle, source.manifest)
        cosine = check_rounded(folder, key, original)
        original.close()
        say(f"gradients over its weights have cosine {cosine:.4f} to those in float32")
        return told

    return judge


def _drafted(
    request: Request,
    base: Base,
    stored: Mapping[str, Stored],
    words: "PreTrainedTokenizerBase",
    scratch: Path,
    say: Say,
) -> _Draft:
    """Exports, quantises and packs; nothing of the graph stays in memory, for PyTorch will load the model once more."""
    source, kind, remarks = base, request.kind or kind_of(base, list(stored.values())), []
    if request.trainable:
        check_kind(kind, ())
    if request.merge:
        say("merging the adapter into the base")
        stored = {BASE: next(iter(stored.values()))}
        source = find(str(merge(base, stored[BASE], scratch / "merged", plan=request.plan, dtype="fp32").folder))
        remarks = [f"adapter {stored[BASE].adapter.digest()[:12]} is part of the base"]
    beside = {name: each for name, each in stored.items() if name != BASE}
    remarks += check_heads(source, kind, beside)
    say(f"exporting {request.base_model} as a {kind}")
    exported = export(source, kind, pooling=request.pooling)
    original = torch_of(base, kind, exported.labels, stored, request.plan, words, request.pooling)
    adapters = {name: listed(each, original.plans[name]) for name, each in beside.items()}
    name = request.name or request.output.name
    told = described(name, request.version, request.profile, exported, base, words, adapters)
    say(f"holding its weights as {request.profile}")
    rows = original.given(request.calibration, context_tokens(told)) if request.calibration else None
    own = original.own(context_tokens(told))
    made = _quantised(exported.model, request.profile, own, rows, request.largest_bytes)
    graph_file.save(made.model, scratch)
    tokenizer.write(words, scratch / TOKENIZER, base)
    files = _files(scratch) | _packed(beside, exported.lora, exported.dense, base.digest, scratch)
    told = told.model_copy(update={"remarks": (*exported.remarks, *made.remarks, *remarks)})
    if request.trainable:
        say("differentiating its layers")
        more = trainable(exported, scratch)
        files |= _beside(more.files, scratch)
        told = told.model_copy(update={"training": more.described})
    return _Draft(told, files, original, source)


def _with_gradients(gate: Gate, draft: _Draft, say: Say) -> Judge:
    """The gate, and behind it that of the training graphs, where there are any."""
    if draft.described.training is None:
        return gate

    def judge(folder: Path, key: Ed25519PublicKey) -> tuple[Mapping[str, Parity], str]:
        told = gate(folder, key)
        say("comparing its gradients with PyTorch's")
        described = draft.described
        cosine = check_gradients(folder, key, for_training(draft.source, described.kind, described.labels))
        say(f"gradients over its weights have cosine {cosine:.4f} to those over the base's")
        return told

    return judge


def _checked(request: Request) -> tuple[dict[str, float], list[str]]:
    """The bounds and the loosened ones, after everything that can be seen to be wrong without a model."""
    wrong = []
    check_new(request.output)
    if request.merge and len(request.adapters) != 1:
        wrong.append(f"merge: found {len(request.adapters)} adapters, expected the one that is to be part of the base")
    wrong += [
        f"{name}: found no plan; give the job that says what they are for (its objective and labels)"
        for name in ("rows", "calibration")
        if getattr(request, name) and request.plan is None
    ]
    wrong += misnamed({"name": request.name or request.output.name})
    wrong += misnamed({f"adapters.{name}": name for name in request.adapters})
    if wrong:
        raise ConfigurationError("bundle", wrong)
    for path in (request.rows, request.calibration):
        if path and request.plan:
            of_file(request.plan, path)
    return limits_of(request.profile, request.budget)


def _read(adapters: Mapping[str, Path], base: Base) -> dict[str, Stored]:
    """Adapters of a base by name; one without any rank changes nothing, and no graph takes it."""
    stored = {name: read_stored(folder, base_digest=base.digest) for name, folder in adapters.items()}
    for name, each in stored.items():
        if 0 in each.adapter.ranks().values():
            raise AdapterError(
                f"{name}: {each.folder} holds factors of rank 0, which change nothing; train it with r of at least 1"
            )
    return stored


def _packed(
    stored: Mapping[str, Stored], lora: Mapping[str, Any], dense: Mapping[str, Any], digest: str, scratch: Path
) -> dict[str, Path]:
    """Writes adapters as a device reads them; where each is, by its path in a bundle."""
    files = {}
    for name, each in stored.items():
        files[adapter_path(name)] = path = scratch / adapter_path(name)
        path.parent.mkdir(exist_ok=True)
        adapter_file.write(path, adapter_file.parameters(each, lora, dense, digest))
    return files


def _quantised(
    model: "Graph", profile: str, own: Sequence[Probe], rows: Sequence[Probe] | None, largest_bytes: int | None
) -> Quantised:
    """Rows that somebody gave may shape every weight (GPTQ); our own texts only say which weights need more bits."""
    if rows is None and (profile != "q4" or largest_bytes is None):
        return quantize(model, profile, largest_bytes=largest_bytes)
    algorithm: AlgorithmName | None = "k-quant" if rows is None else None
    read = [probe.ids for probe in (own if rows is None else rows)]
    return quantize(model, profile, algorithm=algorithm, calibration=read, largest_bytes=largest_bytes)


def _loosened(loose: Sequence[str]) -> list[str]:
    return [f"whoever made this bundle loosened the bound on {name}" for name in loose]


def _beside(content: Mapping[str, bytes], scratch: Path) -> dict[str, Path]:
    """Writes files into a draft; where each is, by its path in a bundle."""
    for path, held in content.items():
        (scratch / path).parent.mkdir(exist_ok=True)
        (scratch / path).write_bytes(held)
    return {path: scratch / path for path in content}


def _files(scratch: Path) -> dict[str, Path]:
    """The files of a graph and a tokenizer, by their paths in a bundle."""
    paths = [*scratch.glob(f"{MODEL}*"), *scratch.glob(TOKENIZER)]
    return {path.relative_to(scratch).as_posix(): path for path in paths}


@contextmanager
def _scratch(output: Path, base: Base, profile: str) -> Iterator[Path]:
    """A folder beside the output, on a disk that has room for the graph, for what it is made of, and for the bundle."""
    from safetensors import safe_open

    parameters = 0
    for file in base.folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as held:
            parameters += sum(prod(held.get_slice(name).get_shape()) for name in held.keys())  # noqa: SIM118
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=_parent(output)) as folder:
        check_disk(Path(folder), int(parameters * (4 + 2 * _BYTES[profile])))
        yield Path(folder)


def _parent(output: Path) -> Path:
    """Where drafts of a bundle lie, without those that somebody killed long ago."""
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output)
    return output.parent
