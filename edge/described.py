"""What a bundle's manifest says of a base and its adapters: its kind, its names, its words and its shapes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge import tokenizer
from edge.chat_template import derive
from edge.export import Exported
from edge.gate import BASE
from edge.parity import Kind
from edge.runtime.manifest import BundledAdapter, BundleManifest, DecoderShape, Description, EncoderShape
from protocol.errors import AdapterError, ModelError, shown
from protocol.files import Stored
from protocol.plan import Objective, Plan
from strategies.adapters.version import NAME
from strategies.base_model import Base, check_weights, configuration, heads, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONNXRUNTIME = "1.31"  # the oldest that graphs were tried with


def misnamed(names: Mapping[str, str]) -> Iterator[str]:
    """Names, by where they stand, that no bundle or adapter can have: a line each."""
    for where, name in names.items():
        if name == BASE or not re.fullmatch(NAME, name):
            yield (
                f"{where}: found {shown(name, 80)!r}, expected 1 to 64 letters, digits, hyphens and underscores, and not "
                f"{BASE}, as the model without an adapter is called"
            )


def kind_of(base: Base, stored: Sequence[Stored]) -> Kind:
    """What the adapters were trained for, else what the base was built for.

    Raises:
        AdapterError: They were trained for different tasks.
    """
    tasks = {each.task_type for each in stored if each.task_type}
    if len(tasks) > 1:
        raise AdapterError("some adapters answer and others classify; make a bundle of each kind, over the same base")
    built = getattr(configuration(base), "architectures", None) or ()
    if "SEQ_CLS" in tasks or (not tasks and any(name.endswith("ForSequenceClassification") for name in built)):
        return "classifier"
    writes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in built)
    return "decoder" if tasks or writes else "embedder"


def check_heads(base: Base, kind: Kind, stored: Mapping[str, Stored]) -> list[str]:
    """Makes sure that nothing classifies by a head that was drawn at random.

    Args:
        base: What is exported.
        kind: What for.
        stored: Adapters by name.

    Returns:
        What a user of the bundle must know of its base alone.

    Raises:
        ModelError: The checkpoint holds no head, and nothing or not everything that is given brings one.
    """
    if kind != "classifier" or not (lacking := missing_head(base)):
        return []
    if without := [name for name, each in stored.items() if not lacking <= each.adapter.dense.keys()]:
        raise ModelError(
            f"{base.name!r} holds no trained {min(lacking)}, nor does the adapter {', '.join(without)}; what it says would be "
            "drawn at random: use an adapter that was trained to classify"
        )
    if not stored:
        raise ModelError(
            f"{base.name!r} holds no trained {min(lacking)}: its labels would be drawn at random; give an adapter that was "
            "trained to classify, or export it as an embedder"
        )
    return ["the base alone classifies at random: its head was never trained, every adapter brings one; do not use it without"]


def missing_head(base: Base) -> set[str]:
    """Parameters of a classifier's head that the checkpoint lacks."""
    labels = list(configuration(base).id2label.values())
    objective: Objective = "classification" if len(labels) > 1 else "reward"
    model = skeleton(base, objective, labels)
    own, found = heads(model, objective), set()
    for name, _ in model.named_parameters():
        if name.partition(".")[0] in own:
            try:
                check_weights(base, [name], model.base_model_prefix)
            except ModelError:
                found.add(name)
    return found


def described(
    name: str,
    version: int,
    profile: str,
    exported: Exported,
    base: Base,
    words: "PreTrainedTokenizerBase",
    adapters: Mapping[str, BundledAdapter],
) -> Description:
    """The manifest of a bundle that has no figures and no files yet.

    Args:
        name: Of the line of bundles.
        version: Within it.
        profile: How weights are held.
        exported: The graph.
        base: As it was published.
        words: Its tokenizer.
        adapters: Of ``listed``.
    """
    chat = derive(words) if exported.kind == "decoder" else None
    return Description(
        name=name,
        version=version,
        kind=exported.kind,
        base_digest=exported.base.digest,
        base_model=Path(base.name).name if Path(base.name).is_dir() else base.name,
        profile=profile,
        opset=exported.opset,
        minimum_onnxruntime=ONNXRUNTIME,
        decoder=DecoderShape(**asdict(exported.decoder)) if exported.decoder else None,
        encoder=EncoderShape(**asdict(exported.encoder), normalised=exported.kind == "embedder") if exported.encoder else None,
        lora=dict(exported.lora),
        dense=dict(exported.dense),
        tokens=tokenizer.control_tokens(words, base),
        chat=chat.template if chat else None,
        chat_remark=chat.remark if chat else "",
        labels=exported.labels,
        adapters=dict(adapters),
    )


def listed(stored: Stored, plan: Plan) -> BundledAdapter:
    """What a manifest says of an adapter that is used with a plan."""
    adapter = stored.adapter
    return BundledAdapter(
        digest=adapter.digest(),
        method=stored.settings["method"],
        r=max(adapter.ranks().values(), default=0),
        labels=plan.data.labels or () if plan.task_type == "SEQ_CLS" else (),
        objective=plan.objective,
    )


def fields_of(manifest: BundleManifest) -> dict[str, Any]:
    """A manifest's fields but for its files."""
    return {name: getattr(manifest, name) for name in Description.model_fields}


def context_tokens(manifest: Description) -> int:
    """Most tokens that the model reads."""
    shape = manifest.decoder or manifest.encoder
    return shape.context_tokens if shape else 1
