"""Supervised fine-tuning on answers, by TRL's SFTTrainer; short rows side by side in one block where the plan packs them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from strategies.data.encode import IGNORED
from strategies.objectives.work import Work

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

_CHECKED_TOKENS = 6


def trainer(work: Work, callbacks: list[Any], kind: Any = None, **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already; ``arguments`` are fields of ``trl.SFTConfig``.

    Args:
        work: What to train.
        callbacks: Of the trainer.
        kind: A subclass of TRL's trainer in its place.
        arguments: Fields of ``trl.SFTConfig``.

    Raises:
        ModelError: The plan packs rows, and the base cannot keep them apart.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packing = work.plan.training.packing
    if packing:
        check_apart(work.model)
    made: Trainer = work.trainer_class(kind or SFTTrainer)(
        model=work.model,
        args=SFTConfig(**arguments, max_length=None, completion_only_loss=False),
        train_dataset=packed(work.train.rows, work.plan.data.max_length) if packing else Dataset.from_list(work.train.rows),
        eval_dataset=Dataset.from_list(work.held_out.rows) if work.held_out else None,
        processing_class=work.tokenizer,
        callbacks=callbacks,
    )
    if packing:
        made.data_collator.return_position_ids = True
        made.data_collator = _Blocks(made.data_collator)
    return made


def packed(rows: Sequence[dict[str, Any]], max_length: int) -> "Dataset":
    """Whole rows in blocks of at most ``max_length`` tokens, by TRL's best-fit decreasing (arXiv:2404.10830, section 3).

    Args:
        rows: ``input_ids`` and ``labels``, none longer than a block.
        max_length: Tokens of a block.

    Returns:
        Blocks with ``input_ids``, ``labels`` and ``seq_lengths``, the lengths of the rows in each.
    """
    from datasets import Dataset
    from trl import pack_dataset

    # Nothing comes before a row's first token; in a block it would be told by the last one of another row.
    apart = [{"input_ids": row["input_ids"], "labels": [IGNORED, *row["labels"][1:]]} for row in rows]
    return pack_dataset(Dataset.from_list(apart), max_length, "bfd")


def check_apart(model: Any) -> None:
    """Makes sure that a row in a block knows nothing of the row before it: other tokens there must change nothing here.

    Attention that transformers masks block by block passes. States that run on over tokens (Mamba) and biases that count tokens
    (ALiBi) do not.

    Raises:
        ModelError: They are not apart.
    """
    import torch

    half, training = _CHECKED_TOKENS, model.training
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + 2 * half, device=device).repeat(2, 1)
    ids[1, :half] += 2 * half
    positions = torch.arange(half, device=device).repeat(2)[None].expand(2, -1)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -half:].float()
    except TypeError:
        apart = False
    else:
        # Not to the bit: a kernel may sum one row of a batch in another order than the next.
        rounding = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
        apart = bool((logits[0] - logits[1]).abs().max() <= 8 * rounding * logits.abs().max())
    finally:
        model.train(training)
    if not apart:
        raise ModelError(
            f"training.packing: a {model.config.model_type} base does not keep rows of one block apart; leave packing out, "
            "or set training.train_sampling_strategy: group_by_length"
        )


class _Blocks:
    """Collates blocks without the mask that would join their rows: positions that begin anew tell transformers where they end.

    Padding begins anew at each token, so that each is a row of its own.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collator(examples)
        if "seq_lengths" in examples[0]:  # held-out rows are not packed
            del batch["attention_mask"]
        return batch
