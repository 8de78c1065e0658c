"""Full fine-tuning: weights of the base train themselves; what travels is how they have changed, as factors.

What trains is held as the plan's ``precision`` says and computed as its ``mixed_precision`` says, as the Hugging Face Trainer
does with a model that it is given: ``fp32`` with ``bf16`` keeps float32 weights beside computation in 16 bits (4 + 4 + 8 bytes
a weight with AdamW), ``bf16`` alone holds weights, gradients and moments in 16 bits (2 + 2 + 4). There a step that is small
beside its weight rounds to nothing: at the usual rates nine numbers in ten never move, and an encoder learns little
(benchmarks/LOG.md); ``weights-moved`` says how many did. There is no copy of the base: what a weight was is read from the
checkpoint, one tensor at a time.

Let ``W`` be a trained matrix, ``W_0`` the checkpoint's, ``G`` the product that the node was sent and ``W_s = round(W_0 + G)``
the weight that training began with. A change is counted from ``P``: nothing in a federation (``fresh``), or the leading ``r``
directions of ``G``. The update is the matrix of rank ``r`` nearest to ``P + (W - W_s)`` (Eckart and Young; found by a
randomised SVD, Halko, Martinsson and Tropp 2011, arXiv:0909.4061): what is added to what was there is then as near to
``W - W_s`` as that rank can bring it, and rounding on the way in is no change. How much of it arrives is reported as
``energy-kept``. Norms, biases and heads travel dense.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.plan import Plan
from protocol.product_space import split
from strategies.base_model import Base, check_weights, find, heads, original_weight
from strategies.methods import dense_tensors
from strategies.methods.dense_tensors import check_names, put, taken
from strategies.methods.frozen_base import prepared
from strategies.methods.low_rank import nearest, product
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_STATE = "fedge_full"


@dataclass
class _State:
    """What is to be known of a model whose own weights train.

    Attributes:
        r: Largest rank of an update.
        matrices: Modules whose weights train and travel as factors.
        start: What was loaded.
        fresh: The server counts a change from nothing.
        changed, lost: Squared norms over all matrices: of what training changed, and of what an update leaves out of it.
        moved, numbers: Numbers of all matrices that training changed, and all of them.
    """

    r: int
    matrices: tuple[str, ...]
    start: Adapter = field(default_factory=Adapter)
    fresh: bool = False
    changed: float = 0.0
    lost: float = 0.0
    moved: int = 0
    numbers: int = 0


def attach(model: "PreTrainedModel", plan: Plan) -> "PreTrainedModel":
    """Lets every parameter train, in place."""
    return train(model, plan, {name for name, _ in model.named_parameters()})


def train(model: "PreTrainedModel", plan: Plan, names: Collection[str]) -> "PreTrainedModel":
    """Lets some parameters train and freezes the others, in place.

    Args:
        model: As loaded.
        plan: Says the rank of updates and the base's dropout.
        names: Parameters; of tied ones the name that comes first in the model.
    """
    model = prepared(model, plan)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    head = heads(model, plan.objective)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = [name for name in trained if name.partition(".")[0] in head or not _is_matrix(model, name)]
    dense_tensors.mark(model, {name: name for name in whole})
    matrices = tuple(name.removesuffix(".weight") for name in trained if name not in whole)
    setattr(model, _STATE, _State(plan.lora.r, matrices))
    return model


def begin(model: "PreTrainedModel", plan: Plan, base: Base) -> Begun:  # noqa: ARG001
    """Makes sure that the checkpoint holds what weights will be compared with, before hours are spent.

    Raises:
        ModelError: It does not.
    """
    check_weights(base, [f"{module}.weight" for module in _matrices(model)], model.base_model_prefix)
    return NOTHING


def load(model: "PreTrainedModel", adapter: Adapter, *, fresh: bool = False) -> None:
    """Adds an adapter's products to the checkpoint's weights and sets the dense tensors.

    Args:
        model: From ``attach``.
        adapter: Of the same base, of any rank; in place of the one that was loaded before.
        fresh: The server counts this node's change from nothing and not from the adapter's leading directions.

    Raises:
        AdapterError: Names or shapes do not fit this model.
        ModelError: The checkpoint lacks a weight.
    """
    state, matrices = _state(model), _matrices(model)
    check_names("modules", adapter.factors, matrices)
    for module, pair in adapter.factors.items():
        shape = tuple(upright(model, module, matrices[module]).shape)
        if pair.shape != shape:
            raise AdapterError(f"{module}: found shape {pair.shape}, expected {shape}")
    put(dense(model), adapter.dense)
    before, state.start, state.fresh = state.start, adapter, fresh
    base = find(model.name_or_path)
    for module in before.factors.keys() | adapter.factors.keys():
        upright(model, module, matrices[module].detach()).copy_(_begun(model, module, base))


def extract(model: "PreTrainedModel", begun: Begun = NOTHING) -> Adapter:  # noqa: ARG001
    """What training made: the change of each matrix at rank ``r``, all else absolute. Counts what the rank left out."""
    state = _state(model)
    state.changed = state.lost = 0.0
    state.moved = state.numbers = 0
    base = find(model.name_or_path)
    factors = {module: _changed(model, module, base) for module in state.matrices}
    return Adapter(factors, taken(dense(model)))


def metrics(model: "PreTrainedModel") -> Mapping[str, float]:
    """What the last ``extract`` has seen, over all matrices, 0 to 1.

    Returns:
        ``energy-kept``, the share of the change's squared norm that the update kept, and ``weights-moved``, the share of
        numbers that training changed at all.
    """
    state = _state(model)
    kept = max(0.0, 1.0 - state.lost / state.changed) if state.changed else 1.0
    return {"energy-kept": kept, "weights-moved": state.moved / max(1, state.numbers)}


def dense(model: "PreTrainedModel") -> dict[str, Any]:
    """What trains and is no matrix of the base: norms, biases, heads, packed experts."""
    return dense_tensors.marked(model)


def modules(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by module whose weight trains."""
    shapes = {module: upright(model, module, weight).shape for module, weight in _matrices(model).items()}
    return {module: (int(d_out), int(d_in)) for module, (d_out, d_in) in shapes.items()}


def embeddings(model: "PreTrainedModel") -> tuple[str, ...]:
    """Those of them that look their weight up by token or place."""
    from torch.nn import Embedding

    return tuple(sorted(module for module in _matrices(model) if isinstance(model.get_submodule(module), Embedding)))


def _state(model: "PreTrainedModel") -> _State:
    state: _State = getattr(model, _STATE)
    return state


def _matrices(model: "PreTrainedModel") -> dict[str, Any]:
    """Weights that travel as factors, by module."""
    return {module: model.get_submodule(module).weight for module in _state(model).matrices}


def _is_matrix(model: "PreTrainedModel", name: str) -> bool:
    """Whether a parameter is the weight of a layer that PEFT's LoRA knows."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    module, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(module), Embedding | Linear | Conv1D)


def upright(model: "PreTrainedModel", module: str, weight: Any) -> Any:
    """A layer's weight as ``(d_out, d_in)``: a Conv1D and an embedding hold theirs transposed."""
    from torch.nn import Linear

    return weight if isinstance(model.get_submodule(module), Linear) else weight.T


def _begun(model: "PreTrainedModel", module: str, base: Base) -> "Tensor":
    """What training began with, ``(d_out, d_in)``, float32, rounded as it is held: the checkpoint's and what was loaded."""
    weight = model.get_submodule(module).weight
    original = original_weight(base, f"{module}.weight", model.base_model_prefix)
    whole = upright(model, module, original.to(weight.device))
    if module in _state(model).start.factors:
        whole = whole + product(_state(model).start.factors[module], whole)
    return whole.to(weight.dtype).float()


def _changed(model: "PreTrainedModel", module: str, base: Base) -> Factors:
    """The best update of one matrix, of rank at most ``r`` and at least that of what it is counted from."""
    import torch

    state, weight = _state(model), model.get_submodule(module).weight.detach()
    change = upright(model, module, weight).float() - _begun(model, module, base)
    none = Factors(np.zeros((1, change.shape[1]), np.float32), np.zeros((change.shape[0], 1), np.float32))
    counted = none if state.fresh else split(state.start.factors.get(module, none), state.r)[0]
    size = float(change.square().sum(dtype=torch.float64))
    state.moved += int(change.count_nonzero())
    state.numbers += change.numel()
    if not size:
        return counted if counted.r else none  # a server's module without change has no directions, an update's has one
    change += product(counted, change)
    pair = nearest(change, state.r)
    state.changed += size
    state.lost += float((change - product(pair, change)).square().sum(dtype=torch.float64))
    return pair
