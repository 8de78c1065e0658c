"""Loss, perplexity, accuracy and macro-F1 of a base with or without an adapter, on rows that it has not seen."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from protocol.adapter import Adapter
from protocol.plan import QUANTISED, Plan
from strategies.base_model import Base, load
from strategies.data.encode import IGNORED, encode
from strategies.data.formats import Row
from strategies.methods.registry import method_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_adapter(plan: Plan, base: Base, adapter: Adapter | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The base at the plan's precision, with an adapter of any rank, ready for inference.

    Raises:
        AdapterError: The adapter does not fit the base.
    """
    import torch
    from transformers import set_seed

    set_seed(plan.training.seed)  # a head that nobody trained yet is the one that training would start from
    model, tokenizer = load(base, plan)
    if torch.cuda.is_available() and plan.precision not in QUANTISED:  # a quantised base is there already
        model.to("cuda")
    if adapter is None or not (adapter.factors or adapter.dense):
        return model, tokenizer
    rank = max(adapter.ranks().values(), default=1) or 1
    method = method_of(plan)
    model = method.attach(model, plan.model_copy(update={"lora": plan.lora.with_rank(rank)}))
    method.load(model, adapter)
    model.eval()
    return model, tokenizer


def measure(plan: Plan, base: Base, rows: Sequence[Row], adapter: Adapter | None = None) -> dict[str, float]:
    """Measures once.

    Returns:
        ``loss`` in nats (sft: per answer token; classification: per row), ``accuracy`` (sft: share of rows whose greedy
        answer is the given one, to its last token), ``perplexity`` (sft) or ``macro-f1`` (classification).
    """
    model, tokenizer = with_adapter(plan, base, adapter)
    encoded = encode(rows, tokenizer, plan.data.max_length)
    batches = _batches(encoded.rows, plan.training.batch_size, int(tokenizer.pad_token_id or 0), model.device)
    return _answers(model, batches) if plan.task_type == "CAUSAL_LM" else _labels(model, batches)


def _answers(model: Any, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    import torch
    from torch.nn.functional import cross_entropy

    loss = tokens = right = rows = 0.0
    with torch.inference_mode():
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
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
        if isinstance(part[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in part])
        else:
            labels = [torch.tensor(row["labels"]) for row in part]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        yield {name: tensor.to(device) for name, tensor in batch.items()}
