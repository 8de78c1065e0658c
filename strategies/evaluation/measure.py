"""What a base with or without an adapter is worth, on rows that it has not seen: each objective's own figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from protocol.adapter import Adapter
from protocol.plan import Objective, Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base, load_tokenizer
from strategies.data.encode import IGNORED, encode
from strategies.data.formats import Row
from strategies.evaluation import preferences

_NOTHING = Adapter()
# The one figure to compare by.
LEADING: Mapping[Objective, str] = {
    "sft": "accuracy",
    "pretraining": "perplexity",
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

        - sft: ``loss`` per answer token, ``perplexity``, ``accuracy`` (share of rows whose greedy answer is the given one, to
          its last token). pretraining: ``loss`` per token and ``perplexity``.
        - classification: ``loss`` per row, ``accuracy``, ``macro-f1``.
        - regression: ``mse``, ``mae``, ``pearson`` (0 where all labels, or all predictions, are the same).
        - dpo, kto, reward, rl: ``strategies.evaluation.preferences``.
    """
    tokenizer = load_tokenizer(base)
    encoded = encode(rows, tokenizer, plan.data.max_length, plan.objective).rows
    if plan.objective in preferences.MEASURED:
        return preferences.measure(plan, base, encoded, adapter, reference)
    model, _ = with_adapter(plan, base, adapter)
    batches = _batches(encoded, plan.training.batch_size, int(tokenizer.pad_token_id or 0), model.device)
    if plan.objective == "regression":
        return _numbers(model, batches)
    if plan.task_type == "SEQ_CLS":
        return _labels(model, batches)
    figures = _answers(model, batches)
    if plan.objective == "pretraining":
        del figures["accuracy"]  # nobody expects a block of text to be guessed whole
    return figures


def _answers(model: Any, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    import torch
    from torch.nn.functional import cross_entropy

    loss = tokens = right = rows = 0.0
    with torch.inference_mode():
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]  # a soft prompt's positions come before the text's
            counted = labels != IGNORED
            loss += float(cross_entropy(logits[counted].double(), labels[counted], reduction="sum"))
            tokens += float(counted.sum())
            # Greedy decoding gives the answer exactly when each of its tokens is the most likely one after the one before.
            right += float(((logits.argmax(-1) == labels) | ~counted).all(1).sum())
            rows += len(labels)
    mean = loss / tokens
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / rows}


def _labels(model: Any, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    import torch
    from sklearn.metrics import f1_score
    from torch.nn.functional import cross_entropy

    loss, found, wanted = 0.0, [], []
    with torch.inference_mode():
        for batch in batches:
            labels = batch.pop("labels")
            logits = model(**batch).logits
            loss += float(cross_entropy(logits.double(), labels, reduction="sum"))
            found += logits.argmax(-1).tolist()
            wanted += labels.tolist()
    right = sum(x == y for x, y in zip(found, wanted, strict=True))
    return {
        "loss": loss / len(wanted),
        "accuracy": right / len(wanted),
        "macro-f1": float(f1_score(wanted, found, average="macro", labels=sorted(set(wanted)))),
    }


def _numbers(model: Any, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    import torch

    pairs = []
    with torch.inference_mode():
        for batch in batches:
            labels = batch.pop("labels").double()
            pairs.append(torch.stack([model(**batch).logits[:, 0].double(), labels]).cpu())
    found, wanted = torch.cat(pairs, dim=1)
    pearson = float(torch.corrcoef(torch.stack([found, wanted]))[0, 1])
    return {
        "mse": float((found - wanted).square().mean()),
        "mae": float((found - wanted).abs().mean()),
        "pearson": pearson if math.isfinite(pearson) else 0.0,
    }


def _batches(rows: list[dict[str, Any]], size: int, pad: int, device: Any) -> Iterator[dict[str, Any]]:
    """Right-padded batches of rows of like length."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    for at in range(0, len(order), size):
        part = order[at : at + size]
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
        yield {name: tensor.to(device) for name, tensor in batch.items()}
