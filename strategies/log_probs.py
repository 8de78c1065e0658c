"""How likely a model finds answers that are given to it: log-probabilities, token by token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[Sequence[int], Sequence[int]]


def token_log_probs(model: Any, pairs: Sequence[Pair], pad: int, batch_size: int, temperature: float = 1.0) -> "list[Tensor]":
    """``log p(token | all before it)`` of each answer's tokens.

    Args:
        model: A decoder in evaluation mode, with or without an adapter.
        pairs: Token ids of a prompt and of its answer. An answer without a prompt has no probability for its first token.
        pad: Any token id.
        batch_size: Pairs that are read at once; those of like length go together.
        temperature: What the logits are divided by, as for a draw at this temperature.

    Returns:
        A float64 tensor on the CPU for each pair, with a number per answer token.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    found: dict[int, Tensor] = {}
    order = sorted(range(len(pairs)), key=lambda at: len(pairs[at][0]) + len(pairs[at][1]))
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            ids = [torch.tensor([*pairs[at][0], *pairs[at][1]]) for at in part]
            batch = pad_sequence(ids, batch_first=True, padding_value=pad).to(model.device)
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
            # Methods that put trained vectors before the text answer for these too.
            logits = model(input_ids=batch, attention_mask=mask).logits[:, -batch.shape[1] :]
            for row, at in enumerate(part):
                end, begin = len(ids[row]), max(len(pairs[at][0]), 1)
                told = logits[row, begin - 1 : end - 1].double() / temperature
                losses = cross_entropy(told, batch[row, begin:end], reduction="none")
                found[at] = -losses.cpu()
    return [found[at] for at in range(len(pairs))]


def answer_log_probs(model: Any, pairs: Sequence[Pair], pad: int, batch_size: int) -> list[float]:
    """``log p(answer | prompt)`` in nats, one for each pair; arguments as for ``token_log_probs``."""
    return [float(each.sum()) for each in token_log_probs(model, pairs, pad, batch_size)]
