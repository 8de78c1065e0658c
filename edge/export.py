"""From a base on disk to one ONNX graph: a decoder, a classifier or an embedder, with adapters as optional inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, NameFixPass

from edge import attention_layout, concat_cache, linear_layers, lora_graph, tracing
from edge.full_precision import check_full_precision
from edge.lora_graph import Size
from edge.room import check_memory
from protocol.configuration import parse
from protocol.errors import ConfigurationError, ModelError, shown
from protocol.plan import Objective, Plan
from strategies.base_model import Base, configuration, heads, load, skeleton
from strategies.label_head import last_layer
from strategies.methods.targets import ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["decoder", "classifier", "embedder"]
Cache = Literal["in-place", "concat"]
Pooling = Literal["mean", "cls"]
_ALL = "all-linear"


@dataclass(frozen=True)
class DecoderShape:
    """What a runtime must know of a decoder to feed it.

    Attributes:
        layers: Pairs ``past.{i}.key`` and ``past.{i}.value``.
        kv_heads, head_dim: Of each of them, ``(batch, kv_heads, capacity, head_dim)``.
        context_tokens: The most positions that the base was made for.
        vocabulary: Width of the logits.
        cache: ``in-place`` where past and present are one buffer of ``capacity`` positions (inputs ``seqlens_k`` and
            ``total_sequence_length``), ``concat`` where the present is the past made longer (input ``attention_mask``).
    """

    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    vocabulary: int
    cache: Cache


@dataclass(frozen=True)
class EncoderShape:
    """What a runtime must know of an encoder to feed it.

    Attributes:
        hidden: Width of its states, and of an embedding.
        context_tokens: The most tokens of a text.
        token_type_ids: Whether the graph takes them.
        pooling: Of an embedder: how its states become one vector, inside the graph, which then has length 1.
    """

    hidden: int
    context_tokens: int
    token_type_ids: bool
    pooling: Pooling | None


@dataclass(frozen=True)
class Exported:
    """A graph, and what can be given to it.

    Attributes:
        model: The graph with its weights, in float32. Written by ``edge.graph_file.save``. Weights of linear layers are
            ``{module}.weight`` as ``(d_in, d_out)`` and the node that uses one is called ``{module}``; the output layer of a
            decoder that shares its weight with the embedding keeps it as ``(vocabulary, hidden)``.
        kind: What it does.
        decoder: Of a decoder only.
        encoder: Of the other kinds.
        lora: ``(d_in, d_out)`` of each module that takes ``lora.{module}.A`` and ``lora.{module}.B``.
        dense: Shape of each parameter that can be given whole as ``dense.{parameter}``; ``"labels"`` stands for the rows of a
            classifier's last layer, of which an adapter may bring any number.
        base: What was exported.
        labels: Of the base's own head, if it is a classifier.
        opset: Of the graph.
        remarks: What a user should know of this graph.
    """

    model: onnx_ir.Model
    kind: Kind
    decoder: DecoderShape | None
    encoder: EncoderShape | None
    lora: Mapping[str, tuple[int, int]]
    dense: Mapping[str, tuple[Size, ...]]
    base: Base
    labels: tuple[str, ...] = ()
    opset: int = tracing.OPSET
    remarks: tuple[str, ...] = ()


def export(
    base: Base,
    kind: Kind,
    *,
    targets: Sequence[str] | Literal["all-linear"] = _ALL,
    labels: Sequence[str] | None = None,
    pooling: Pooling = "mean",
) -> Exported:
    """Exports a base once.

    Args:
        base: What to export. One with an adapter merged in is a base like any other (``strategies.adapters.merge``).
        kind: What for.
        targets: Modules that take LoRA, by the ends of their names; by default every linear layer of the body.
        labels: Of a classifier; without them those that the base itself names.
        pooling: Of an embedder: the mean over the mask, or the first token.

    Raises:
        ModelError: The architecture cannot be expressed, or this machine lacks the memory.
    """
    check_full_precision(base)
    plan = _plan(base, kind, labels)
    check_memory(base, skeleton(base, plan.objective, plan.data.labels))
    model = loaded(base, kind, labels)
    remarks: tuple[str, ...] = ()
    shape, encoder = None, None
    if kind == "decoder":
        program, shape, remarks = _decoder(base, model)
    else:
        encoder = _encoder_shape(model, pooling if kind == "embedder" else None)
        program = tracing.encoder(model, encoder.pooling, encoder.context_tokens)
    own = heads(model, plan.objective)
    shapes = _dense(model, own, plan)
    graph, layers, needed = _tidied(program, model, shapes)
    output = _names(model, model.get_output_embeddings())
    body = [layer for layer in layers if layer.module.partition(".")[0] not in own and layer.module not in output]
    lora = lora_graph.add_lora(graph, _targeted(body, targets))
    NameFixPass()(graph)
    dense = {name: given for name, given in shapes.items() if name in needed}
    named = tuple(plan.data.labels or ()) if kind == "classifier" else ()
    return Exported(graph, kind, shape, encoder, lora, dense, base, named, remarks=remarks)


def _tidied(
    program: Any, model: "PreTrainedModel", dense: Mapping[str, tuple[Size, ...]]
) -> tuple[onnx_ir.Model, list[linear_layers.Linear], set[str]]:
    """The graph folded, fused and with the model's names; its linear layers; the names of its dense inputs."""
    linear_layers.parameter_names(program.model)
    held = lora_graph.open_dense(program.model, dense)
    with tracing.quiet():
        program.optimize()
    graph: onnx_ir.Model = program.model
    CommonSubexpressionEliminationPass()(graph)
    attention_layout.flatten(graph)
    layers = linear_layers.settle(graph, _linear_shapes(model), _tied(model))
    return graph, layers, lora_graph.close_dense(graph, held)


def _plan(base: Base, kind: Kind, labels: Sequence[str] | None) -> Plan:
    """A float32 plan whose objective loads the model for the kind."""
    objective: Objective = "sft"
    data: dict[str, Any] = {}
    if kind != "decoder":  # an embedder is a classifier's body, under the names that its adapters have
        named = list(labels or configuration(base).id2label.values())
        objective = "classification" if len(named) > 1 else "reward"
        data = {"labels": named} if len(named) > 1 else {}
    try:
        return parse({"base_model": base.name, "objective": objective, "data": data}, Plan, source="export")
    except ConfigurationError as error:
        raise ModelError(f"{base.name!r}: {error}") from None


def loaded(base: Base, kind: Kind, labels: Sequence[str] | None) -> "PreTrainedModel":
    """A base in float32 and evaluation mode; a head that nobody trained yet is the one that training would start from."""
    import torch

    plan = _plan(base, kind, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.training.seed)
        model, _ = load(base, plan)
    return model


def _decoder(base: Base, model: "PreTrainedModel") -> tuple[Any, DecoderShape, tuple[str, ...]]:
    """The graph with a cache in place, or else with one that grows and the reason."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dimensions = tracing.Decoder(
        config.num_hidden_layers, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    )
    context_tokens = _context_tokens(model)
    cache: Cache = "in-place"
    remarks: tuple[str, ...] = ()
    try:
        program = tracing.decoder(model, dimensions)
    except ModelError as first:
        try:
            program, dimensions = concat_cache.decoder(base)
        except ModelError as second:
            raise ModelError(f"{base.name!r} cannot be exported. {first}. The second route: {second}") from second
        cache = "concat"
        remarks = (f"the cache grows by copies: {shown(str(first), 300)}",)
    shape = DecoderShape(
        dimensions.layers, dimensions.kv_heads, dimensions.head_dim, context_tokens, int(config.vocab_size), cache
    )
    return program, shape, remarks


def _encoder_shape(model: "PreTrainedModel", pooling: Pooling | None) -> EncoderShape:
    return EncoderShape(
        hidden=model.config.hidden_size,
        context_tokens=_context_tokens(model),
        token_type_ids=tracing.takes_token_types(model),
        pooling=pooling,
    )


def _context_tokens(model: "PreTrainedModel") -> int:
    """RoBERTa counts its positions from behind the padding's id."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise ModelError(f"{type(model).__name__}: its configuration names no max_position_embeddings; add it to config.json")
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padded = [module.padding_idx for module in tables if getattr(module, "padding_idx", None) is not None]
    return found - (padded[0] + 1 if padded else 0)


def _linear_shapes(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """``(d_in, d_out)`` of every linear layer by name."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found[name] = (int(module.in_features), int(module.out_features))
        elif isinstance(module, Conv1D):
            found[name] = (int(module.nx), int(module.nf))
    return found


def _names(model: "PreTrainedModel", wanted: Any) -> list[str]:
    return [name for name, module in model.named_modules() if wanted is not None and module is wanted]


def _tied(model: "PreTrainedModel") -> list[str]:
    """An output layer that shares its weight with the embedding."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return _names(model, output) if output is not None and output.weight is inputs.weight else []


def _targeted(
    body: Sequence[linear_layers.Linear], targets: Sequence[str] | Literal["all-linear"]
) -> list[linear_layers.Linear]:
    if isinstance(targets, str) and targets == _ALL:
        return list(body)
    wanted = [targets] if isinstance(targets, str) else targets
    if missing := [target for target in wanted if not any(ends(layer.module, target) for layer in body)]:
        there = ", ".join(sorted({layer.module.rpartition(".")[2] for layer in body}))
        raise ModelError(f"targets: no linear layer of the body is named {', '.join(missing)}; there are {there}")
    return [layer for layer in body if any(ends(layer.module, target) for target in wanted)]


def _dense(model: "PreTrainedModel", own: Sequence[str], plan: Plan) -> dict[str, tuple[Size, ...]]:
    """What trains whole beside low-rank factors: biases, and a head with a row for each of an adapter's labels."""
    shapes = {name: tuple(int(size) for size in tensor.shape) for name, tensor in model.named_parameters()}
    found: dict[str, tuple[Size, ...]] = {
        name: shape for name, shape in shapes.items() if name.endswith("bias") or name.partition(".")[0] in own
    }
    if own:
        for name in last_layer(shapes, len(plan.data.labels or ("score",))):
            found[name] = ("labels", *shapes[name][1:])
    return found
