"""No training graph is written that was not compared: its gradients with PyTorch's own, on the same weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from edge.runtime.gradient import Gradients
from edge.runtime.training_rows import NOT_LEARNT, Gradient, Row
from edge.runtime.verify import verified
from edge.train_graph.adapting import adapted
from edge.train_graph.front import called
from protocol.adapter import Adapter, Factors
from protocol.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Array = NDArray[Any]
FARTHEST = 1e-4  # Frobenius norm of a gradient's difference, relative to the gradient's: float32, sums in another order
# Cosine of a gradient over the bundle's own weights to that over the base's: rounded weights are another model.
_LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "q8": 0.99, "int8-dynamic": 0.95, "q4": 0.6}
_RANKS = (2, 1, 5, 3)
_LENGTHS = (11, 6, 17)


class OfTorch:
    """A PyTorch model's parameters (``edge.runtime.weights.Source``)."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return tuple(int(size) for size in self._model.get_parameter(name).shape)

    def read(self, name: str, place: str) -> Array:  # noqa: ARG002 (nothing is copied)
        """The parameter itself."""
        found: Array = self._model.get_parameter(name).detach().numpy()
        return found

    def part(self, name: str, first: int, last: int) -> Array:
        """Some rows one after the other."""
        return self.read(name, "")[first:last]

    def rows(self, name: str, numbers: Array) -> Array:
        """Any rows."""
        return np.asarray(self.read(name, "")[numbers])


def check_gradients(folder: Path, key: Ed25519PublicKey, model: "PreTrainedModel") -> float:
    """Compares the gradients of a bundle that is about to be signed.

    Args:
        folder: Its draft.
        key: Who signed the draft.
        model: What its graphs were made of (``make.for_training``).

    Returns:
        The cosine of the gradient over the bundle's weights to that over the model's.

    Raises:
        BundleError: A gradient over the model's own weights is not PyTorch's, or one over the bundle's points elsewhere.
    """
    manifest = verified(folder, [key])
    exact = Gradients(folder, manifest, weights=OfTorch(model))
    adapter = _adapter(exact)
    rows = list(_rows(exact, adapter))
    wanted = in_torch(model, rows, adapter)
    found = exact.loss_and_gradients(rows, adapter)
    name, distance = max(farthest(found.gradients, wanted.gradients), key=lambda each: each[1])
    if not distance <= FARTHEST or not np.isclose(found.loss, wanted.loss, rtol=1e-5, atol=1e-6):
        raise BundleError(
            f"the training graphs are not this model: the gradient of {name} is {distance:.2g} of its length from PyTorch's "
            f"(at most {FARTHEST:g}), the loss {found.loss:.6g} (PyTorch: {wanted.loss:.6g}); leave out --trainable"
        )
    return _checked_cosine(Gradients(folder, manifest), rows, adapter, wanted.gradients)


def check_rounded(folder: Path, key: Ed25519PublicKey, original: Gradients) -> float:
    """Compares a bundle that is about to be signed with the one in more bits that it was made from.

    Args:
        folder: Its draft.
        key: Who signed the draft.
        original: Of the other bundle.

    Returns:
        As ``check_gradients``.

    Raises:
        BundleError: Its gradients point elsewhere.
    """
    adapter = _adapter(original)
    rows = list(_rows(original, adapter))
    wanted = original.loss_and_gradients(rows, adapter).gradients
    return _checked_cosine(Gradients(folder, verified(folder, [key])), rows, adapter, wanted)


def _checked_cosine(gradients: Gradients, rows: Sequence[Row], adapter: Adapter, wanted: Adapter) -> float:
    try:
        cosine = _cosine(gradients.loss_and_gradients(rows, adapter).gradients, wanted)
    finally:
        gradients.close()
    profile = gradients.manifest.profile
    if not cosine >= (least := _LEAST_COSINE[profile]):
        raise BundleError(
            f"gradients over weights of profile {profile} have cosine {cosine:.3f} to those in full precision; expected at "
            f"least {least}: choose a profile of more bits"
        )
    return cosine


def in_torch(model: "PreTrainedModel", rows: Sequence[Row], adapter: Adapter) -> Gradient:
    """Loss and gradients by PyTorch, row by row, so that nothing is padded; ``scored`` is left empty."""
    import torch

    given = {
        module: (torch.tensor(pair.A, requires_grad=True), torch.tensor(pair.B, requires_grad=True))
        for module, pair in adapter.factors.items()
    }
    scaled = {module: (a, b * adapter.factors[module].scaling) for module, (a, b) in given.items()}
    dense = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in adapter.dense.items()}
    with torch.enable_grad(), adapted(model, scaled), _holding(model, dense):
        told = [_losses(model, row) for row in rows]
        loss = torch.cat(told).mean()
        loss.backward()
    factors = {
        module: Factors(a.grad.numpy(), b.grad.numpy(), adapter.factors[module].scaling) for module, (a, b) in given.items()
    }
    found = Adapter(factors, {name: tensor.grad.numpy() for name, tensor in dense.items()})
    return Gradient(loss.item(), found, None)  # type: ignore[arg-type] # nobody asks


def farthest(found: Adapter, wanted: Adapter) -> Iterator[tuple[str, float]]:
    """How far each gradient is from what is wanted, relative to it; of one that is next to nothing, to the largest of all."""
    floor = 1e-6 * max(float(np.linalg.norm(array)) for _, array in _tensors(wanted))
    for (name, x), (_, y) in zip(_tensors(found), _tensors(wanted), strict=True):
        yield name, float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(y)), floor)


def _losses(model: "PreTrainedModel", row: Row) -> "Tensor":
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.tensor([list(row.ids)])
    if isinstance(row.labels, int):
        return cross_entropy(called(model, ids, torch.ones_like(ids)).logits, torch.tensor([row.labels]), reduction="none")
    labels = torch.tensor(list(row.labels))[1:]
    told = cross_entropy(called(model, ids, None).logits[0, :-1], labels, ignore_index=NOT_LEARNT, reduction="none")
    return told[labels != NOT_LEARNT]


def _adapter(gradients: Gradients) -> Adapter:
    """Factors of mixed ranks for everything, none of them zero, and the base's own head."""
    rng = np.random.default_rng(7)
    factors = {}
    for number, (module, (d_in, d_out)) in enumerate(gradients.modules.items()):
        r = _RANKS[number % len(_RANKS)]
        A, B = rng.normal(0, d_in**-0.5, (r, d_in)), rng.normal(0, 0.1 * r**-0.5, (d_out, r))
        factors[module] = Factors(A.astype(np.float32), B.astype(np.float32), 0.5)
    return Adapter(factors, gradients.start_dense())


def _rows(gradients: Gradients, adapter: Adapter) -> Iterator[Row]:
    """Rows of different lengths, so that some are padded; of a decoder every third token is not learnt."""
    rng = np.random.default_rng(8)
    classes, vocabulary = gradients.classes(adapter), gradients.vocabulary
    lowest = min(5, vocabulary - 1)  # beyond the ids of padding and of what else is special
    for length in _LENGTHS:
        ids = rng.integers(lowest, vocabulary, min(length, gradients.largest_tokens)).tolist()
        labels = [NOT_LEARNT if at % 3 == 0 else token for at, token in enumerate(ids)]
        yield Row(ids, labels if classes is None else int(rng.integers(classes)))


def _cosine(found: Adapter, wanted: Adapter) -> float:
    x, y = (np.concatenate([array.reshape(-1) for _, array in _tensors(each)]) for each in (found, wanted))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    for module, pair in adapter.factors.items():
        yield f"{module}.A", pair.A
        yield f"{module}.B", pair.B
    yield from adapter.dense.items()


def _holding(model: "PreTrainedModel", dense: "dict[str, Tensor]") -> Any:
    from torch.nn.utils.stateless import _reparametrize_module

    return _reparametrize_module(model, dense)
