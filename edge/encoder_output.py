"""A text's embedding from its tokens' hidden states (Reimers and Gurevych 2019, arXiv:1908.10084, section 3)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def embedding(states: "Tensor", attention_mask: "Tensor", pooling: str) -> "Tensor":
    """Pools and brings to length 1.

    Args:
        states: ``(batch, sequence, hidden)``.
        attention_mask: ``(batch, sequence)``, 1 where a token is.
        pooling: ``mean`` over the tokens of the mask, or ``cls``: the first token's.

    Returns:
        ``(batch, hidden)``.
    """
    import torch

    pooled: Any = states[:, 0]
    if pooling == "mean":
        mask = attention_mask[..., None].to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
    made: Tensor = torch.nn.functional.normalize(pooled, dim=-1)
    return made
