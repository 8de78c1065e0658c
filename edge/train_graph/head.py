"""What comes after a model's last layer: log-probabilities of what is to be learnt, and the gradient that goes back from them.

A decoder's head works on single positions and on any part of the vocabulary at a time, a classifier's on whole rows. ``slope``
is the derivative of a loss by each log-probability: every objective that is made of them (likelihood, DPO) shares the graphs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge.train_graph.adapting import adapted, linear, ranks
from edge.train_graph.front import called, canonical, ragged
from edge.train_graph.layer import BATCH, SEQUENCE
from edge.train_graph.recording import giving
from edge.train_graph.traced import flattened, graph

if TYPE_CHECKING:
    from onnx_ir import Model
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """After the last layer.

    Attributes:
        graph: Log-probabilities and gradients.
        runs: Outputs that are asked for together, by what they are for.
        words: Of a decoder, the parameters with a row for each token.
    """

    graph: "Model"
    runs: Mapping[str, tuple[str, ...]]
    words: tuple[str, ...] = ()


def decoder_head(model: "PreTrainedModel", layers: "Mapping[str, Module]", hidden: int) -> Head:
    """A graph over ``x`` ``(1, n, hidden)``, ``targets`` ``(n,)`` and ``weight.{name}`` with rows of some of the tokens.

    It gives of each position ``lse`` (log-sum-exp of these tokens' logits), ``picked`` (the target's logit, 0 where ``inside``
    is 0: it is another part's) and ``top`` (the largest), and of ``slope`` ``dx``, where all tokens are in one part.
    With ``total``, the ``lse`` over all parts, it gives this part's share of it, ``dx_part``: with p the softmax,
    d log p(t) / d logits = e_t - p.
    """
    import torch
    from torch.func import functional_call, grad

    held = _outside(model, layers)
    words = _by_words(model, canonical(model))
    count, vocabulary = ranks(2, {size for tensor in held.values() for size in tensor.shape} | {hidden})
    weights = [
        torch.randn(vocabulary, *tensor.shape[1:]) if name in words else tensor.detach() for name, tensor in held.items()
    ]
    some, rows = torch.export.Dim("positions", min=1), torch.export.Dim("words", min=2)
    place, weights_free = {0: some}, [{0: rows} if name in words else None for name in held]
    x, targets = torch.randn(1, count, hidden), torch.zeros(count, dtype=torch.int64)

    def logits_of(x: Any, weights: Any) -> Any:
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        named = dict(zip(held, weights, strict=True))
        with _no_embedding(model), adapted(model, {}), giving(layers, x):
            return functional_call(model, named, (), {"input_ids": ids, "use_cache": False}).logits[0]

    logits = flattened(f"{type(model).__name__}'s head", logits_of, (x, weights), ({1: some}, weights_free))

    def read(x: Any, targets: Any, inside: Any, weights: Any) -> Any:
        found = logits(x, weights)
        picked = found.gather(1, targets[:, None])[:, 0] * inside
        return found, torch.logsumexp(found, 1), picked, found.amax(1)

    def all_of(x: Any, targets: Any, inside: Any, slope: Any, total: Any, weights: Any) -> Any:
        def whole(x_: Any) -> Any:
            _, lse, picked, top = read(x_, targets, inside, weights)
            return (slope * (picked - lse)).sum(), (lse, picked, top)

        def part(x_: Any) -> Any:
            found, _, picked, _ = read(x_, targets, inside, weights)
            shares = torch.exp(found.detach() - total[:, None])
            return (slope * (picked - (shares * found).sum(1))).sum()

        dx, told = grad(whole, has_aux=True)(x)
        return (*told, dx, grad(part)(x))

    inputs = ["inside", "slope", "total"]
    made = graph(
        f"{type(model).__name__}'s head",
        all_of,
        (x, targets, *(torch.randn(count) for _ in inputs), weights),  # one tensor given twice would become one input
        ({1: some}, place, *(place for _ in inputs), weights_free),
        ["x", "targets", *inputs, *(f"weight.{name}" for name in held)],
        ["lse", "picked", "top", "dx", "dx_part"],
    )
    told = ("lse", "picked", "top")
    return Head(made, {"score": told, "whole": (*told, "dx"), "part": ("dx_part",)}, tuple(sorted(words)))


def classifier_head(
    model: "PreTrainedModel",
    layers: "Mapping[str, Module]",
    hidden: int,
    dense: Mapping[str, tuple[int | str, ...]],
    longest: int,
) -> Head:
    """A graph over ``x`` ``(batch, sequence, hidden)``, ``input_ids``, ``attention_mask``, weights, factors and a head.

    It gives ``logits`` ``(batch, labels)``, and of ``targets`` and ``slope`` ``(batch,)`` the gradients ``dx``,
    ``grad.{module}.A|B`` and ``grad.dense.{name}``.

    Args:
        model: In evaluation mode.
        layers: Of ``recording.layers_of``.
        hidden: Width of the states.
        dense: Shapes of the parameters that are trained whole, ``labels`` where rows are labels.
        longest: Most tokens of a row.
    """
    import torch
    from torch.func import grad

    outside = _outside(model, layers)
    whole = {name: tensor for name, tensor in outside.items() if name in dense}
    held = {name: tensor for name, tensor in outside.items() if name not in dense}
    states, ids = torch.randn(BATCH, SEQUENCE, hidden), torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    given = (states, ids, ragged(ids))
    behind = _behind(model, layers, states, ids)
    modules = {name: shape for name, shape in linear(model).items() if name in behind and f"{name}.weight" in held}
    sizes = {size for tensor in outside.values() for size in tensor.shape} | {hidden}
    labels, *used = ranks(1 + len(modules), sizes)
    heads = [torch.randn([labels if size == "labels" else int(size) for size in dense[name]]) for name in whole]
    factors = [
        torch.randn(shape) for (d_in, d_out), r in zip(modules.values(), used, strict=True) for shape in ((r, d_in), (d_out, r))
    ]
    weights = [tensor.detach() for tensor in held.values()]
    dims = {name: torch.export.Dim(name, max=most) for name, most in (("batch", None), ("sequence", longest), ("labels", None))}
    rows = {0: dims["batch"], 1: dims["sequence"]}
    heads_free = [{at: dims["labels"] for at, size in enumerate(dense[name]) if size == "labels"} for name in whole]
    factors_free = [{at: torch.export.Dim(f"r{number}", min=1)} for number in range(len(modules)) for at in (0, 1)]
    rest, rest_free = (weights, heads, factors), ([None] * len(weights), heads_free, factors_free)

    def logits_of(x: Any, ids: Any, mask: Any, weights: Any, heads: Any, factors: Any) -> Any:
        named = dict(zip([*held, *whole], [*weights, *heads], strict=True))
        pairs = dict(zip(modules, zip(factors[::2], factors[1::2], strict=True), strict=True))
        with _no_embedding(model), adapted(model, pairs), giving(layers, x), _holding(model, named):
            return called(model, ids, mask).logits

    what = f"{type(model).__name__}'s head"
    logits = flattened(what, logits_of, (*given, *rest), (rows, rows, rows, *rest_free))

    def all_of(x: Any, ids: Any, mask: Any, targets: Any, slope: Any, weights: Any, heads: Any, factors: Any) -> Any:
        def weighed(x_: Any, heads_: Any, factors_: Any) -> Any:
            told = logits(x_, ids, mask, weights, heads_, factors_)
            picked = torch.log_softmax(told, 1).gather(1, targets[:, None])[:, 0]
            return (slope * picked).sum(), told

        (dx, by_heads, by_factors), told = grad(weighed, argnums=(0, 1, 2), has_aux=True)(x, heads, factors)
        return (told, dx, *by_heads, *by_factors)

    names = [f"weight.{name}" for name in held] + [f"dense.{name}" for name in whole]
    names += [f"lora.{module}.{side}" for module in modules for side in "AB"]
    grads = [f"grad.dense.{name}" for name in whole] + [f"grad.{module}.{side}" for module in modules for side in "AB"]
    targets, slope, batch = torch.zeros(BATCH, dtype=torch.int64), torch.randn(BATCH), {0: dims["batch"]}
    made = graph(
        what,
        all_of,
        (*given, targets, slope, *rest),
        (rows, rows, rows, batch, batch, *rest_free),
        ["x", "input_ids", "attention_mask", "targets", "slope", *names],
        ["logits", "dx", *grads],
    )
    return Head(made, {"score": ("logits",), "backward": ("dx", *grads)})


def _behind(model: "PreTrainedModel", layers: "Mapping[str, Module]", states: "Tensor", ids: "Tensor") -> set[str]:
    """Linear layers that get something which comes of the last states."""
    import torch

    found: set[str] = set()

    def watch(name: str) -> Any:
        return lambda _, given: found.add(name) if given[0].requires_grad else None

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linear(model)]
    try:
        with torch.enable_grad(), giving(layers, states.clone().requires_grad_(True)):
            called(model, ids, ragged(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _outside(model: "PreTrainedModel", layers: "Mapping[str, Module]") -> "dict[str, Tensor]":
    """Parameters that belong to no layer."""
    names = canonical(model)
    inner = {
        names[f"{layer}.{name}"]
        for layer, module in layers.items()
        for name, _ in module.named_parameters(remove_duplicate=False)
    }
    return {name: tensor for name, tensor in model.named_parameters() if name not in inner}


def _by_words(model: "PreTrainedModel", names: Mapping[str, str]) -> set[str]:
    head = model.get_output_embeddings()
    where = next(name for name, module in model.named_modules() if module is head)
    return {names[f"{where}.{name}"] for name, _ in head.named_parameters()}


@contextmanager
def _no_embedding(model: "PreTrainedModel") -> Iterator[None]:
    """Nothing before the layers counts, and the embedding may be another part of the vocabulary than the ids are of."""
    import torch

    embedding = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    embedding.forward = lambda ids: torch.zeros((*ids.shape, width))
    try:
        yield
    finally:
        del embedding.forward


@contextmanager
def _holding(model: "PreTrainedModel", parameters: "Mapping[str, Tensor]") -> Iterator[None]:
    from torch.nn.utils.stateless import _reparametrize_module

    with _reparametrize_module(model, dict(parameters), tie_weights=True):
        yield
