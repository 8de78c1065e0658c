"""Linear probes: what each layer of a base already tells of the labels. An analysis before training, never a way to train.

A linear classifier on a layer's output shows what can be read there without going deeper (Alain and Bengio 2016,
arXiv:1610.01644). A row is the mean of its tokens' hidden states; features are standardised; the classifier is a logistic
regression with an L2 penalty. The first entry is the embeddings, before any layer. What the best layer needs beneath it is
there before training: ``frozen_share`` is its place in the stack, the share that method ``freezing`` could keep as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.adapter import Adapter
from protocol.errors import DataError
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.data.formats import LabelledText, Row

_OFTEN = 3  # times that a label must occur to be learnt
_INVERSE_PENALTY = 0.1


@dataclass(frozen=True)
class Layer:
    """One layer's probe.

    Attributes:
        layer: 0 for the embeddings, then the layers from the input to the output.
        accuracy: Share of held-out rows that it labels right.
        error: Standard error of that share.
    """

    layer: int
    accuracy: float
    error: float


@dataclass(frozen=True)
class Probe:
    """All layers of a base.

    Attributes:
        layers: From the embeddings to the output.
        majority: Accuracy of always naming the commonest label of the training rows.
        rows: Rows that the probes learnt from, and were measured on.
        best: The lowest layer whose accuracy is within one standard error of the highest.
        frozen_share: ``best`` over the number of layers, below 1.
    """

    layers: tuple[Layer, ...]
    majority: float
    rows: tuple[int, int]
    best: int
    frozen_share: float


def probe(
    plan: Plan, base: Base, rows: Sequence[Row], held_out: Sequence[Row], adapter: Adapter | None = None, most: int = 2000
) -> Probe:
    """Learns a probe for each layer and measures it on held-out rows.

    Args:
        plan: Of objective classification: its labels, length and batch size.
        base: The base.
        rows: To learn from; of more than ``most``, the first.
        held_out: To measure on; likewise.
        adapter: In place while the rows are read; None for the base as it is.
        most: Rows that are read of each.

    Raises:
        DataError: Fewer than two labels occur often enough to be learnt.
    """
    model, tokenizer = with_adapter(plan, base, adapter)
    learnt, told = (_labelled(part, most) for part in (rows, held_out))
    counts = np.bincount([row.label for row in learnt])
    if (counts >= _OFTEN).sum() < 2:
        raise DataError(f"{len(learnt)} training rows hold fewer than 2 labels {_OFTEN} times; probing needs more rows")
    wanted = np.array([row.label for row in told])
    features = [mean_states(model, tokenizer, [row.text for row in part], plan) for part in (learnt, told)]
    labels = np.array([row.label for row in learnt])
    layers = []
    for number, (own, others) in enumerate(zip(*features, strict=True)):
        accuracy = float((_predicted(own, labels, others) == wanted).mean())
        layers.append(Layer(number, accuracy, math.sqrt(accuracy * (1 - accuracy) / len(wanted))))
    top = max(layers, key=lambda layer: layer.accuracy)
    best = next(layer.layer for layer in layers if layer.accuracy >= top.accuracy - top.error)
    deep = len(layers) - 1
    return Probe(
        tuple(layers),
        float((wanted == counts.argmax()).mean()),
        (len(learnt), len(told)),
        best,
        min(best, deep - 1) / deep,
    )


def mean_states(model: Any, tokenizer: Any, texts: list[str], plan: Plan) -> NDArray[np.float32]:
    """The mean of each text's hidden states, float32, ``(layers + 1, texts, width)``; the first are the embeddings."""
    import torch

    found = []
    for at in range(0, len(texts), plan.training.batch_size):
        part = texts[at : at + plan.training.batch_size]
        batch = tokenizer(part, padding=True, truncation=True, max_length=plan.data.max_length, return_tensors="pt")
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = torch.stack(model(**batch, output_hidden_states=True).hidden_states).float()
        mask = batch["attention_mask"][None, :, :, None]
        found.append(((states * mask).sum(2) / mask.sum(2)).cpu().numpy())
    return np.concatenate(found, axis=1)


def plot(found: Probe, title: str) -> bytes:
    """A PNG of accuracy by layer, with a standard error to each side."""
    import io

    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 3.5), layout="constrained")
    panel = picture.subplots()
    numbers, accuracies = [one.layer for one in found.layers], [one.accuracy for one in found.layers]
    panel.errorbar(numbers, accuracies, [one.error for one in found.layers], marker="o", capsize=3)
    panel.axhline(found.majority, linestyle=":", color="grey", label="commonest label")
    panel.axvline(found.best, linestyle="--", color="grey", label="best")
    panel.set(xlabel="layer (0: embeddings)", ylabel="held-out accuracy", title=title)
    panel.legend()
    made = io.BytesIO()
    picture.savefig(made, format="png", dpi=120)
    return made.getvalue()


def _labelled(rows: Sequence[Row], most: int) -> list[LabelledText]:
    return [row for row in rows[:most] if isinstance(row, LabelledText)]


def _predicted(own: NDArray[Any], labels: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = make_pipeline(StandardScaler(), LogisticRegression(C=_INVERSE_PENALTY, max_iter=2000)).fit(own, labels)
    predicted: NDArray[Any] = made.predict(others)
    return predicted
