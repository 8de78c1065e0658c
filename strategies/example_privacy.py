"""DP-SGD: a trainer whose steps tell little of any one row (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

A step takes every row with the same chance, by bits that nobody can foretell. The gradient of each row's own loss is shortened
to ``clipping_norm``, over all that trains as one vector; the sum of them gets noise of ``noise_multiplier * clipping_norm``
(``protocol.privacy.noise``) and is divided by the rows that a step has in the mean, not by those that it had. Whatever an
optimizer makes of that is nobody's secret. A step of no rows is a step of noise.

A row's loss is its own: the mean over its answer's tokens (sft), its cross-entropy (classification), the square of its error
(regression). A gradient that is not finite counts as zero. Losses, and the rows that steps had, are told to nobody: no log, no
metric, no watch for divergence looks at them. Dropout draws from a seed that nobody knows: which units a row goes without
depends on the rows beside it, and from a published seed others' gradients would tell whether it was there.

Rows' own gradients come from one pass over a micro-batch where every tensor that trains is a linear layer's (LoRA's A and B,
heads): of ``y = x W'`` row i has ``sum_t dy_it x_it'``, which is small where the layer is (Goodfellow 2015, arXiv:1510.01799;
Li et al. 2021, arXiv:2110.05679, section 4, save the need for its trick). Elsewhere (DoRA's lengths, prompts, biases), and in
bases that do not keep a batch's rows along the first axis, rows go through the model one at a time: the same, and slower.
Float rounding of a row's gradient depends on the rows padded beside it; as everywhere, that is not accounted for.
"""

import contextlib
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from protocol.plan import Objective, Plan
from protocol.privacy.noise import Stream, noised
from strategies.data.encode import IGNORED
from strategies.example_budget import batch_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)
Batch = Mapping[str, Any]
_PROBED_ROWS, _PROBED_TOKENS, _AGREE = 3, 5, 1e-3


def private(parent: Any, plan: Plan) -> Any:
    """``parent``, ``transformers.Trainer`` or a subclass, with steps that are private; the plan's noise must be settled."""
    settings = plan.training.example_privacy
    if settings is None or settings.noise_multiplier is None:
        raise ValueError("the plan's noise must be settled (strategies.example_budget.with_noise)")
    norm, std = settings.clipping_norm, settings.noise_multiplier * settings.clipping_norm

    class Private(parent):  # type: ignore[misc]
        def get_train_dataloader(self) -> "Draws":
            import torch

            self._gradients = Gradients.of(self.model, plan.objective)
            torch.manual_seed(secrets.randbits(63))
            largest = plan.training.batch_size if self._gradients.together else 1
            return Draws(self.train_dataset, batch_of(plan.training), largest, self.data_collator)

        def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:  # noqa: ARG002
            return [next(epoch_iterator)], None

        def training_step(self, model: Any, inputs: Sequence[Batch], num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
            import torch

            def rounded(**given: Any) -> Any:
                with self.compute_loss_context_manager():
                    return model(**given)

            model.train()
            total = self._gradients.nothing()
            for batch in inputs:
                self._gradients.add(rounded, self._prepare_inputs(dict(batch)), norm, total)
            rows = min(batch_of(plan.training), len(self.train_dataset))
            _put(noised(_flat(total), std, norm) / rows, self._gradients.trained)
            return torch.zeros((), device=self.args.device)

        def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - it would count a draw's tokens
            return 0

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({name: value for name, value in logs.items() if name not in ("loss", "train_loss")}, *args, **kwargs)

    return Private


class Draws:
    """An epoch of draws: ``len`` of them, each the micro-batches of one optimizer step, with new bits every time.

    Args:
        dataset: Encoded rows.
        batch: Rows of a draw in the mean; of fewer rows all are drawn.
        largest: Rows of a micro-batch at most.
        collate: Makes a micro-batch.
    """

    def __init__(self, dataset: Any, batch: int, largest: int, collate: Callable[[list[Any]], Batch]) -> None:
        self.dataset, self._batch, self._largest, self._collate = dataset, batch, largest, collate

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self._batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        stream = Stream()
        for _ in range(len(self)):
            rows = drawn(len(self.dataset), self._batch, stream)
            parts = (rows[at : at + self._largest] for at in range(0, len(rows), self._largest))
            yield [self._collate([self.dataset[row] for row in part]) for part in parts]


def drawn(rows: int, batch: int, stream: Stream) -> list[int]:
    """Which rows a step takes: each with probability ``batch / rows``, to 2^-64, and none depends on another."""
    if batch >= rows:
        return list(range(rows))
    return [int(row) for row in (stream.words(rows) < batch * 2**64 // rows).nonzero()[0]]


@dataclass(frozen=True)
class Gradients:
    """Each row's own gradient of all that trains.

    Attributes:
        trained: The parameters that train, by name.
        layers: The linear layers that hold them.
        objective: Says what a row's loss is.
        together: A micro-batch goes through the model as one.
    """

    trained: Mapping[str, Any]
    layers: Mapping[str, Any]
    objective: Objective
    together: bool

    @classmethod
    def of(cls, model: Any, objective: Objective) -> "Gradients":
        """Looks at a model, and with made-up tokens at whether it keeps rows apart.

        Raises:
            ModelError: It joins the rows of a batch, or nothing in it trains.
        """
        from torch import nn
        from torch.nn.modules.batchnorm import _BatchNorm

        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise ModelError("training.example_privacy: the base normalises over the rows of a batch, which joins them")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ModelError("training.example_privacy: nothing in the model trains")
        layers = {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and any(p.requires_grad for p in module.parameters())
        }
        inside = {id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad}
        found = cls(trained, layers, objective, together=all(id(p) in inside for p in trained.values()))
        if found.together and not found._apart(model):
            log.warning("training.example_privacy: this base does not keep rows apart; they train one at a time, slower")
            return cls(trained, layers, objective, together=False)
        return found

    def nothing(self) -> "dict[str, Tensor]":
        """A sum of no gradients, in float64."""
        import torch

        return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.trained.items()}

    def add(self, model: Any, batch: Batch, norm: float, total: "dict[str, Tensor]") -> None:
        """Adds the gradients of a micro-batch's rows, each shortened to a norm, to a sum, in place."""
        import torch

        each = self.each(model, batch)
        squares = sum(g.double().flatten(1).square().sum(1) for g in each.values())
        lengths = torch.as_tensor(squares).sqrt()
        factors = (norm / lengths).clamp(max=1.0)
        whole = torch.isfinite(lengths)
        for name, gradient in each.items():
            total[name] += torch.tensordot(factors[whole], gradient[whole].double(), dims=1)

    def each(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        """``(rows, *shape)`` by parameter: row i's is that of its own loss alone."""
        import torch

        if self.together:
            with self._recording() as record:
                losses = row_losses(model, batch, self.objective)
                torch.autograd.backward(losses.sum(), inputs=list(self.trained.values()))
            return record
        rows = [self._one(model, {name: value[at : at + 1] for name, value in batch.items()}) for at in range(_rows(batch))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.trained}

    def _one(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        import torch

        (loss,) = row_losses(model, batch, self.objective)
        found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(self.trained.items(), found, strict=True)}

    @contextlib.contextmanager
    def _recording(self) -> "Iterator[dict[str, Tensor]]":
        """Linear layers compute as ever; on the way back each row's part of their gradient goes into the record alone."""
        record: dict[str, Any] = {}

        def note(name: str) -> Callable[[Any], None]:
            def into(gradient: Any) -> None:  # a layer that is called twice has the sum
                record[name] = record[name] + gradient if name in record else gradient

            return into

        def own(layer: Any, name: str) -> Callable[[Any], Any]:
            tell = {part: note(f"{name}.{part}") for part, p in layer.named_parameters() if p.requires_grad}
            return lambda x: _per_row().apply(x, layer.weight, layer.bias, tell)

        for name, layer in self.layers.items():
            layer.forward = own(layer, name)
        try:
            yield record
        finally:
            for layer in self.layers.values():
                del layer.forward
        if aside := [name for name, p in self.trained.items() if p.grad is not None]:
            raise ModelError(
                f"training.example_privacy: {aside[0]} has a gradient that belongs to no row; choose another method"
            )

    def _apart(self, model: Any) -> bool:
        """Whether made-up rows have the same gradients together as one at a time."""
        import torch

        device = next(model.parameters()).device
        ids = torch.arange(1, 1 + _PROBED_ROWS * _PROBED_TOKENS, device=device).reshape(_PROBED_ROWS, -1)
        labels = {"sft": ids, "classification": ids[:, 0] * 0, "regression": ids[:, 0].float()}[self.objective]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        training = model.training
        model.eval()
        try:
            together = self.each(model, batch)
            alone = Gradients(self.trained, self.layers, self.objective, together=False).each(model, batch)
        except ModelError:
            return False
        finally:
            model.train(training)
        together = {name: torch.zeros_like(gradient) for name, gradient in alone.items()} | together
        if any(together[name].shape != gradient.shape for name, gradient in alone.items()):
            return False
        apart = [(together[name] - gradient).double().norm() for name, gradient in alone.items()]
        whole = [gradient.double().norm() for gradient in alone.values()]
        return bool(torch.stack(apart).norm() <= _AGREE * torch.stack(whole).norm())


def row_losses(model: Any, batch: Batch, objective: Objective) -> "Tensor":
    """``(rows,)``, each of one row alone.

    Args:
        model: A decoder (sft), or one that scores.
        batch: ``input_ids``, ``attention_mask``, ``labels`` and what else the model takes.
        objective: sft: the mean over the row's answer tokens; classification: cross-entropy; regression: squared error.
    """
    from torch.nn.functional import cross_entropy

    labels = batch["labels"]
    given = {name: value for name, value in batch.items() if name != "labels"}
    if objective == "sft":
        logits = model(**given, use_cache=False).logits[:, -labels.shape[1] :]  # some put vectors before the text
        told = cross_entropy(_wide(logits)[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        return told.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
    logits = _wide(model(**given).logits)
    if objective == "regression":
        return (logits.squeeze(-1) - labels).square()
    return cross_entropy(logits, labels, reduction="none")


def _wide(logits: "Tensor") -> "Tensor":
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _flat(total: "Mapping[str, Tensor]") -> "NDArray[np.float64]":
    import torch

    flat: NDArray[np.float64] = torch.cat([part.flatten() for part in total.values()]).cpu().numpy()
    return flat


def _put(told: "NDArray[np.float64]", trained: Mapping[str, Any]) -> None:
    """Makes what may be told what the optimizer sees."""
    import torch

    parts = torch.from_numpy(told).split([p.numel() for p in trained.values()])
    for part, own in zip(parts, trained.values(), strict=True):
        own.grad = part.reshape(own.shape).to(own)


def _rows(batch: Batch) -> int:
    return len(batch["labels"])


@lru_cache(maxsize=1)
def _per_row() -> Any:
    """A linear layer that tells each row's gradient of its weight and bias, and has none of its own."""
    import torch
    from torch.nn.functional import linear

    class PerRow(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, tell: Mapping[str, Callable[[Any], None]]) -> Any:
            ctx.save_for_backward(x, weight)
            ctx.tell = tell
            return linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> tuple[Any, None, None, None]:
            x, weight = ctx.saved_tensors
            rows = x.shape[0]
            y = gradient.to(weight.dtype).reshape(rows, -1, weight.shape[0])
            if "weight" in ctx.tell:
                ctx.tell["weight"](y.transpose(1, 2) @ x.to(weight.dtype).reshape(rows, -1, weight.shape[1]))
            if "bias" in ctx.tell:
                ctx.tell["bias"](y.sum(1))
            back = (gradient.to(weight.dtype) @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
            return back, None, None, None

    return PerRow
