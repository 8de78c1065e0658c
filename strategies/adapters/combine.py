"""One adapter from several LoRAs of one base: PEFT's weighted combinations, without a base in memory.

Let adapter k change a weight by ``s_k B_k A_k`` and count ``w_k``. Two ways add the changes themselves: ``cat`` exactly, at
the sum of the ranks, and ``svd`` as near to ``sum_k w_k s_k B_k A_k`` as one rank can be. PEFT forms the whole matrix for that;
its SVD comes from the factors (``protocol.product_space``), at a fraction of the work. The others are PEFT's own: ``linear``
adds A to A and B to B, which holds the cross terms ``B_1 A_2`` too and is the sum of the changes only where adapters share a
factor; TIES (Yadav et al. 2023, arXiv:2306.01708) keeps each one's largest numbers and outvotes signs, DARE (Yu et al. 2024,
arXiv:2311.03099) drops numbers at random and scales up the others, each on the factors or, ``…_svd``, on the whole changes.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError, shown
from protocol.files import Stored
from protocol.product_space import compress, inner, squared_norm

Way = Literal[
    "svd",
    "cat",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
# They keep a share of the numbers.
SPARSE = tuple(way for way in get_args(Way) if way.startswith(("ties", "dare", "magnitude_prune")))


def combine(
    adapters: Sequence[Stored],
    weights: Sequence[float],
    way: Way = "svd",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    """Combines LoRA adapters of one base.

    Args:
        adapters: At least one.
        weights: One for each; may be negative.
        way: PEFT's name of the combination.
        r: svd and ``…_svd``: rank of the result; without it the largest there is.
        density: ties, dare and magnitude_prune: share of the numbers that stay, above 0, at most 1.
        seed: Of what dare drops.

    Returns:
        Float32 factors, scaling 1 or as PEFT says; tensors that one adapter alone has, as they are.

    Raises:
        AdapterError: One of them is no LoRA, they are of different bases or shapes, or hold the same tensor whole.
    """
    if len(adapters) != len(weights) or not adapters or not np.isfinite(weights).all():
        raise ValueError(f"{len(adapters)} adapters and weights {list(weights)}; expected finite ones, as many, at least one")
    if (density is not None) != (way in SPARSE) or not (density is None or 0 < density <= 1):
        raise ValueError(f"{way} with density {density}; expected a share above 0 for {', '.join(SPARSE)}, else none")
    if r is not None and not (way.endswith("svd") and r >= 1):
        raise ValueError(f"{way} with rank {r}; a rank of 1 or more is for svd and what ends in _svd, else it follows")
    _check(adapters)
    shapes = _shapes(adapters)
    dense = {name: tensor for stored in adapters for name, tensor in stored.adapter.dense.items()}
    if way == "svd":
        rank = r or max(max(stored.adapter.ranks().values(), default=1) for stored in adapters)
        terms = {module: _terms(module, adapters, weights) for module in shapes}
        return Adapter({m: _float32(compress(terms[m], shapes[m], rank).factors) for m in shapes}, dense)
    return Adapter(_by_peft(adapters, weights, way, r, density, seed, shapes), dense)


def energy_kept(adapters: Sequence[Stored], weights: Sequence[float], made: Adapter) -> float:
    """The squared norm of what ``svd`` made over that of the sum of the changes, over all matrices: 1 if nothing was cut off.

    Args:
        adapters: That were combined.
        weights: One for each.
        made: Of them, by ``svd``: what it cuts off is orthogonal to what it keeps.
    """
    terms = [_terms(module, adapters, weights) for module in made.factors]
    whole = sum(inner(each, each) for each in terms)
    return min(sum(map(squared_norm, made.factors.values())) / whole, 1.0) if whole else 1.0


def _check(adapters: Sequence[Stored]) -> None:
    whole: dict[str, Stored] = {}
    bases = {stored.manifest.base_digest: stored for stored in adapters if stored.manifest}
    if len(bases) > 1:
        said = ", ".join(f"{stored.folder} of base {digest[:12]}" for digest, stored in bases.items())
        raise AdapterError(f"adapters of different bases cannot be combined: {said}")
    if len({stored.task_type for stored in adapters}) > 1:
        raise AdapterError(f"adapters for different tasks: {', '.join(stored.task_type or 'none' for stored in adapters)}")
    for stored in adapters:
        if stored.task_type not in ("", "CAUSAL_LM", "SEQ_CLS"):
            raise AdapterError(f"{stored.folder}: an adapter for {shown(stored.task_type, 80)}; expected CAUSAL_LM or SEQ_CLS")
        if stored.settings["method"] != "lora" or stored.settings["lora"]["use_dora"]:
            kind = "dora" if stored.settings["method"] == "lora" else stored.settings["method"]
            raise AdapterError(f"{stored.folder}: {kind} adapters do not add up; expected LoRA (lora, qlora, adalora)")
        if not stored.adapter.factors:
            raise AdapterError(f"{stored.folder}: holds no factors, so there is nothing to combine; leave it out")
        for name in stored.adapter.dense:
            if name in whole:
                raise AdapterError(
                    f"{whole[name].folder} and {stored.folder} both hold {name} whole, of which there can be one; leave one "
                    "adapter out, or train the head anew on their combination"
                )
            whole[name] = stored


def _shapes(adapters: Sequence[Stored]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for stored in adapters:
        for module, pair in stored.adapter.factors.items():
            if shapes.setdefault(module, pair.shape) != pair.shape:
                raise AdapterError(
                    f"{stored.folder}: {module} has shape {pair.shape}, in an earlier adapter {shapes[module]}; expected "
                    "adapters of one base"
                )
    for name in shapes:  # names that begin other names, dot by dot, are those of blocks
        parts = name.split(".")
        if not all(parts) or any(".".join(parts[:at]) in shapes for at in range(1, len(parts))):
            raise AdapterError(
                f"{name}: has no name of a layer, or lies in one that has factors; expected adapters of one base"
            )
    return shapes


def _terms(module: str, adapters: Sequence[Stored], weights: Sequence[float]) -> list[tuple[float, Factors]]:
    pairs = ((weight, stored.adapter.factors.get(module)) for stored, weight in zip(adapters, weights, strict=True))
    return [(weight, pair) for weight, pair in pairs if pair is not None]


def _float32(pair: Factors) -> Factors:
    return Factors(pair.A.astype(np.float32), pair.B.astype(np.float32), pair.scaling)


def _by_peft(
    adapters: Sequence[Stored],
    weights: Sequence[float],
    way: Way,
    r: int | None,
    density: float | None,
    seed: int,
    shapes: dict[str, tuple[int, int]],
) -> dict[str, Factors]:
    """``add_weighted_adapter`` on layers that have the adapters' shapes and weights of nothing."""
    import torch
    from peft import LoraConfig, LoraModel

    names = [f"adapter{at}" for at in range(len(adapters))]
    ranks = [max(stored.adapter.ranks().values(), default=1) or 1 for stored in adapters]
    if not way.endswith("svd") and way != "cat" and len(set(ranks)) > 1:
        raise AdapterError(
            f"{way} puts factors on each other and needs one rank, found {', '.join(map(str, ranks))}; use svd or cat"
        )
    configs = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(stored.adapter.factors))
        for name, rank, stored in zip(names, ranks, adapters, strict=True)
    }
    made: Any = LoraModel(_layers(shapes), configs[names[0]], names[0])
    for name in names[1:]:
        made.peft_config[name] = configs[name]
        made.inject_adapter(made.model, name)
    layers = {name: made.model.get_submodule(name) for name in shapes}
    for name, stored in zip(names, adapters, strict=True):
        for module, pair in stored.adapter.factors.items():
            _fill(layers[module], name, pair)
    settings: dict[str, Any] = {"density": density} if density is not None else {}
    if way.endswith("svd"):
        settings |= {"svd_rank": r, "svd_full_matrices": False}
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        made.add_weighted_adapter(names, list(map(float, weights)), "combined", combination_type=way, **settings)
    return {
        module: Factors(
            _array(layer.lora_A["combined"].weight),
            _array(layer.lora_B["combined"].weight),
            float(layer.scaling["combined"]),
        )
        for module, layer in layers.items()
    }


def _layers(shapes: dict[str, tuple[int, int]]) -> Any:
    """Linear layers under the modules' names. Their weights are one zero each, seen as often as need be."""
    import torch

    root = torch.nn.Module()
    for name, (d_out, d_in) in shapes.items():
        *path, last = name.split(".")
        inner = root
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, torch.nn.Module())
            inner = inner.get_submodule(part)
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = d_in, d_out
        layer.weight = torch.nn.Parameter(torch.zeros(()).expand(d_out, d_in), requires_grad=False)
        inner.add_module(last, layer)
    return root


def _fill(layer: Any, name: str, pair: Factors) -> None:
    """Puts factors in place; what the rank has room for beyond theirs is nothing."""
    import torch

    with torch.no_grad():
        for into, half in ((layer.lora_A[name].weight, pair.A), (layer.lora_B[name].weight, pair.B)):
            into.zero_()
            rows, columns = half.shape
            into[:rows, :columns] = torch.from_numpy(np.array(half, np.float32))
    layer.scaling[name] = pair.scaling


def _array(tensor: Any) -> Array:
    made: Array = tensor.detach().float().cpu().numpy().copy()
    return made
