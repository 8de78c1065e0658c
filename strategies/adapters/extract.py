"""A LoRA from a full fine-tune: what two checkpoints of one architecture differ in, as factors.

Of every matrix the change ``W_tuned - W_base`` is cut to its leading directions (``strategies.methods.low_rank``); of all the
products of that rank theirs is nearest to it, and how much of the change's squared norm they keep is said. Weights are read
one at a time: neither model is ever in memory. What has one number for each channel (norms) and heads go whole, beside the
factors; a bias of a layer that has factors, and what else LoRA has no place for, is left out, and is said too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.adapter import Adapter, Factors
from protocol.errors import ModelError
from protocol.manifest import Manifest
from protocol.plan import Objective, Plan
from strategies.base_model import Base, configuration, original_weight, skeleton
from strategies.methods import full
from strategies.methods.dense_tensors import array
from strategies.methods.low_rank import keeping, nearest, product
from strategies.methods.registry import shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kept:
    """One matrix that changed.

    Attributes:
        r: Rank of its factors.
        energy: Share of the change's squared norm that they keep, 0 to 1.
        change: Norm of the change, relative to the base's matrix.
    """

    r: int
    energy: float
    change: float


@dataclass(frozen=True)
class Extracted:
    """What was found.

    Attributes:
        adapter, manifest, plan: As ``protocol.files.write_adapter`` takes them.
        matrices: By module, those that changed; what did not change has no factors.
        whole: Tensors that changed and are beside the factors, whole.
        left_out: Tensors that changed and that a LoRA has no place for: norm of the change, relative to the base's tensor.
        energy_kept: Share of the squared norm of all that changed, of what both checkpoints hold.
    """

    adapter: Adapter
    manifest: Manifest
    plan: Plan
    matrices: Mapping[str, Kept]
    whole: tuple[str, ...]
    left_out: Mapping[str, float]
    energy_kept: float


def extract(base: Base, tuned: Base, *, r: int | None = None, energy: float | None = None) -> Extracted:
    """Compares two checkpoints.

    Args:
        base: The one that the adapter will be put on.
        tuned: The one that was fine-tuned from it.
        r: Rank of every pair of factors; or
        energy: Share of each matrix's change to keep, above 0 and below 1, at the smallest rank that does.

    Raises:
        ModelError: They are not of one shape, or hold the same weights.
    """
    import torch

    if (r is None) == (energy is None) or not (r is None or r >= 1) or not (energy is None or 0 < energy < 1):
        raise ValueError(f"r {r} and energy {energy}: expected one of them, r from 1 or energy between 0 and 1")
    objective, labels = _task(tuned)
    seen = Plan.model_validate({"base_model": base.name, "objective": objective, "method": "full", "data": {"labels": labels}})
    with torch.device("meta"):
        model = full.attach(skeleton(base, objective, labels), seen)
    compared = _Compared(base, tuned, model)
    factors, matrices = {}, {}
    changed = lost = 0.0
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # of the drawn directions: the same two folders give the same adapter
        for module, before, change in compared.matrices():
            if not (size := _energy(change)):
                continue
            pair = nearest(change, r) if r else keeping(change, energy or 0.0)
            away = _energy(change - product(pair, change))
            factors[module] = pair
            matrices[module] = Kept(pair.r, max(0.0, 1 - away / size), _relative(size, before))
            changed, lost = changed + size, lost + away
    whole, left_out, more = compared.others(shape(base, seen).head)
    changed, lost = changed + sum(more.values()), lost + sum(more[name] for name in left_out)
    if not (factors or whole):
        raise ModelError(f"{tuned.folder} holds the weights of {base.folder}: nothing that a LoRA could hold has changed")
    return Extracted(
        Adapter(factors, {name: array(tensor) for name, tensor in whole.items()}),
        _manifest(base, factors, compared.embeddings),
        Plan.model_validate({"base_model": base.name, "objective": objective}),
        matrices,
        tuple(sorted(whole)),
        left_out,
        1 - lost / changed if changed else 1.0,
    )


def _manifest(base: Base, factors: Mapping[str, Factors], embeddings: tuple[str, ...]) -> Manifest:
    return Manifest(
        base_digest=base.digest,
        kind="adapter",
        method="lora",
        r=max((pair.r for pair in factors.values()), default=0),
        precision="fp32",
        embeddings=tuple(name for name in embeddings if name in factors),
    )


def _task(tuned: Base) -> tuple[Objective, tuple[str, ...] | None]:
    """What a checkpoint was made for, and a classifier's labels in the order of its rows."""
    config = configuration(tuned)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return "sft", None
    labels = tuple(str(label) for _, label in sorted(config.id2label.items()))
    return ("classification", labels) if len(labels) > 1 else ("reward", None)


class _Compared:
    """Two checkpoints, tensor by tensor; ``model`` is their architecture without weights."""

    def __init__(self, base: Base, tuned: Base, model: "PreTrainedModel") -> None:
        self._base, self._tuned, self._model = base, tuned, model
        self._read = full.modules(model)
        self._output, self._input = _ends(model)
        self.embeddings = full.embeddings(model)

    def matrices(self) -> "Iterator[tuple[str, Tensor, Tensor]]":
        """Module, the base's matrix and its change, ``(d_out, d_in)``, float32.

        An output layer that shares the input's weight comes too: a LoRA on the one does not change the other.
        """
        shared = [self._output] if self._output and self._output not in self._read else []
        for module in [*self._read, *shared]:
            before, change = self._pair(f"{module}.weight")
            yield module, before, full.upright(self._model, module, change)

    def others(self, head: frozenset[str]) -> "tuple[dict[str, Tensor], dict[str, float], dict[str, float]]":
        """What changed and is no matrix.

        Returns:
            Tensors that go whole, by name; relative change of those that are left out; squared norm of each change.
        """
        whole: dict[str, Tensor] = {}
        left_out, more = {}, {}
        for name in full.dense(self._model):
            if name in head:
                whole[name] = original_weight(self._tuned, name, self._model.base_model_prefix)
                continue
            before, change = self._pair(name)
            if not (size := _energy(change)):
                continue
            more[name] = size
            module = name.rpartition(".")[0]
            owner = self._model.get_submodule(module)
            if change.ndim > 1 or module in self._read or any(True for _ in owner.children()):
                left_out[name] = _relative(size, before)
            else:  # PEFT keeps a module whole with all that it holds: a norm's scale and its shift
                inside = (f"{module}.{own}" for own, _ in owner.named_parameters())
                whole |= {each: self._weight(self._tuned, each) for each in inside}
        return whole, left_out, more

    def _pair(self, name: str) -> "tuple[Tensor, Tensor]":
        before, after = self._weight(self._base, name), self._weight(self._tuned, name)
        if before.shape != after.shape:
            raise ModelError(
                f"{self._tuned.folder}: {name} has shape {tuple(after.shape)}, in the base {tuple(before.shape)}; expected two "
                "checkpoints of one architecture and one vocabulary"
            )
        return before, after - before

    def _weight(self, base: Base, name: str) -> "Tensor":
        if name == f"{self._output}.weight" and configuration(base).get_text_config().tie_word_embeddings:
            name = f"{self._input}.weight"
        return original_weight(base, name, self._model.base_model_prefix)


def _ends(model: "PreTrainedModel") -> tuple[str | None, str]:
    """Names of the output layer, if there is one over the vocabulary, and of the input's embeddings."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return None if output is None else names[id(output)], names[id(inputs)]


def _energy(tensor: "Tensor") -> float:
    import torch

    return float(tensor.square().sum(dtype=torch.float64))


def _relative(size: float, before: "Tensor") -> float:
    whole = _energy(before)
    return float((size / whole) ** 0.5) if whole else float("inf")
