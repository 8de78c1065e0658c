"""What a base with or without an adapter is worth, on rows that it has not seen: each objective's own figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from protocol.adapter import Adapter
from protocol.plan import Objective, Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base, load_tokenizer
from strategies.data.ai_feedback import made
from strategies.data.encode import IGNORED, encode
from strategies.data.formats import Row
from strategies.evaluation import preferences
from strategies.evaluation.figures import Array, Figure, macro_f1, mean, pearson, perplexity, ratio, values

_NOTHING = Adapter()
# The one figure to compare by.
LEADING: Mapping[Objective, str] = {
    "sft": "accuracy",
    "pretraining": "perplexity",
    "distillation": "perplexity",
    "classification": "accuracy",
    "regression": "mse",
    "dpo": "reward-accuracy",
    "kto": "loss",
    "reward": "accuracy",
    "rl": "reward",
}


def measure(
    plan: Plan, base: Base, rows: Sequence[Row], adapter: Adapter | None = None, reference: Adapter = _NOTHING
) -> dict[str, float]:
    """Measures once.

    Args:
        plan: Says what for.
        base: The frozen base.
        rows: Of the objective's kind.
        adapter: None for the base as it is.
        reference: dpo, kto, rl: the adapter that the model had before the objective began.

    Returns:
        By objective, losses in nats:

        - sft, distillation: ``loss`` per answer token, ``perplexity``, ``accuracy`` (share of rows whose greedy answer is the
          given one, to its last token). pretraining: ``loss`` per token and ``perplexity``.
        - classification: ``loss`` per row, ``accuracy``, ``macro-f1``.
        - regression: ``mse``, ``mae``, ``pearson`` (0 where all labels, or all predictions, are the same).
        - dpo, kto, reward, rl: ``strategies.evaluation.preferences``.
    """
    tokenizer = load_tokenizer(base)
    rows = made(rows, plan, base, reference, training=False).rows
    encoded = encode(rows, tokenizer, plan.data.max_length, plan.objective).rows
    if plan.objective in preferences.MEASURED:
        return values(preferences.figures(plan, base, encoded, adapter, reference))
    model, _ = with_adapter(plan, base, adapter)
    return values(figures(plan, model, int(tokenizer.pad_token_id or 0), encoded))


def figures(plan: Plan, model: Any, pad: int, rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of ``measure`` row by row, of a model that is in memory: sft, pretraining, classification, regression.

    Args:
        plan: Says what for.
        model: In evaluation mode, with or without an adapter.
        pad: Any token id; of a classifier the padding token.
        rows: Encoded; they keep their order.
    """
    if plan.objective == "regression":
        found, wanted = _scored(plan, model, pad, rows)
        apart = found[:, 0] - wanted
        return {
            "mse": mean(apart**2, "lower"),
            "mae": mean(np.abs(apart), "lower"),
            "pearson": pearson(found[:, 0], wanted),
        }
    if plan.objective == "classification":
        return of_labels(*label_logits(plan, model, pad, rows))
    nats, tokens, right = _answers(plan, model, pad, rows)
    likely = {"loss": ratio(nats, tokens, "lower", "nats"), "perplexity": perplexity(nats, tokens)}
    # Nobody expects a block of text to be guessed whole.
    return likely if plan.objective == "pretraining" else likely | {"accuracy": mean(right)}


def label_logits(plan: Plan, model: Any, pad: int, rows: Sequence[dict[str, Any]]) -> tuple[Array, Array]:
    """What a classifier says of each row, ``(n, labels)`` float64, and the label's number, ``(n,)``; as for ``figures``."""
    logits, wanted = _scored(plan, model, pad, rows)
    return logits, wanted.astype(int)


def of_labels(logits: Array, wanted: Array) -> dict[str, Figure]:
    """``loss``, ``accuracy`` and ``macro-f1`` from ``label_logits``."""
    top = logits.max(1)
    nats = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(wanted)), wanted]
    guessed = logits.argmax(1)
    return {
        "loss": mean(nats, "lower", "nats"),
        "accuracy": mean(guessed == wanted),
        "macro-f1": macro_f1(guessed, wanted),
    }


def _answers(plan: Plan, model: Any, pad: int, rows: Sequence[dict[str, Any]]) -> Array:
    """``(3, n)``: nats, tokens, and whether every token is the likeliest, of each row's counted tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    told = np.empty((3, len(rows)))
    with torch.inference_mode():
        for places, batch in _batches(rows, plan.training.batch_size, pad, model.device):
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]  # a soft prompt's positions come before the text's
            counted = labels != IGNORED
            nats = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
            nats[counted] = cross_entropy(logits[counted].double(), labels[counted], reduction="none")
            # Greedy decoding gives the answer exactly when each of its tokens is the most likely one after the one before.
            right = ((logits.argmax(-1) == labels) | ~counted).all(1)
            told[:, places] = torch.stack([nats.sum(1), counted.sum(1).double(), right.double()]).cpu().numpy()
    return told


def _scored(plan: Plan, model: Any, pad: int, rows: Sequence[dict[str, Any]]) -> tuple[Array, Array]:
    """What a model with a head says of each row, ``(n, outputs)``, and the row's label, ``(n,)``, both float64."""
    import torch

    found, wanted = [], np.empty(len(rows))
    order: list[int] = []
    with torch.inference_mode():
        for places, batch in _batches(rows, plan.training.batch_size, pad, model.device):
            wanted[places] = batch.pop("labels").double().cpu().numpy()
            found.append(model(**batch).logits.double().cpu().numpy())
            order += places
    return np.concatenate(found)[np.argsort(order)], wanted


def _batches(rows: Sequence[dict[str, Any]], size: int, pad: int, device: Any) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Right-padded batches of rows of like length, with the rows' places."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"]))
    for first in range(0, len(order), size):
        places = order[first : first + size]
        part = [rows[at] for at in places]
        ids = [torch.tensor(row["input_ids"]) for row in part]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if isinstance(part[0]["labels"], int | float):
            batch["labels"] = torch.tensor([row["labels"] for row in part])
        else:
            labels = [torch.tensor(row["labels"]) for row in part]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        yield places, {name: tensor.to(device) for name, tensor in batch.items()}
