"""Knowledge distillation from a larger teacher (Hinton et al. 2015, arXiv:1503.02531), over TRL's SFTTrainer.

From the teacher's probabilities: on each token of the rows' answers the student minimises ``T^2 KL(p_T || q_T)``, where ``p_T``
and ``q_T`` are the softmax of the teacher's and of its own logits over ``T`` (section 2; the factor ``T^2`` keeps gradients of
one size whatever ``T``), beside a share of the usual loss on the answer itself. From the teacher's texts (Kim and Rush 2016,
arXiv:1606.07947, section 3.2) it is supervised fine-tuning on answers that the teacher wrote (``strategies.data.ai_feedback``).
"""

from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from strategies.objectives import sft
from strategies.objectives.work import Work
from strategies.writer import second_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Trainer


def trainer(work: Work, callbacks: list[Any], **arguments: Any) -> "Trainer":
    """A TRL trainer over rows that are encoded already; ``arguments`` are fields of ``trl.SFTConfig``.

    Raises:
        ModelError: The teacher is not there, or its vocabulary is not the student's.
    """
    settings = work.plan.distillation
    if settings is None or settings.kind == "text":
        return sft.trainer(work, callbacks, **arguments)
    teacher, reads = second_model(settings.teacher)
    check_vocabularies(work.tokenizer, reads)
    if work.plan.training.packing:
        sft.check_apart(teacher)
    return sft.trainer(work, callbacks, kind=_distilled(teacher, settings.temperature, settings.hard_weight), **arguments)


def check_vocabularies(student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase") -> None:
    """Makes sure that both mean the same by each token id.

    Raises:
        ModelError: They do not.
    """
    own, others = student.get_vocab(), teacher.get_vocab()
    if own != others:
        alike = len(own.items() & others.items())
        raise ModelError(
            f"distillation.teacher: its vocabulary has {len(others)} tokens, the student's {len(own)}, {alike} are the same: "
            "their probabilities cannot be compared; write kind: text, where the teacher writes answers"
        )


def soft_loss(student: "Tensor", teacher: "Tensor", temperature: float) -> "Tensor":
    """``T^2 KL(p_T || q_T)`` of each token, float32.

    Args:
        student: Logits (tokens, vocabulary). Some bases pad theirs; what only one of the two models has is left out.
        teacher: The same of the teacher.
        temperature: ``T``.
    """
    from torch.nn.functional import kl_div, log_softmax

    width = min(student.shape[-1], teacher.shape[-1])
    own, told = (log_softmax(logits[:, :width].float() / temperature, dim=-1) for logits in (student, teacher))
    return kl_div(own, told, reduction="none", log_target=True).sum(-1) * temperature**2


def _distilled(teacher: Any, temperature: float, hard_weight: float) -> Any:
    import torch
    from torch.nn.functional import cross_entropy
    from trl import SFTTrainer

    class Distilled(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            read = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
            wanted = inputs["labels"][:, 1:]
            counted = wanted != -100
            outputs = model(**read, use_cache=False)
            with torch.no_grad():
                told = teacher(**read, use_cache=False)
            # Methods that put trained vectors before the text answer for these too.
            student, others = (each.logits[:, -wanted.shape[1] - 1 : -1][counted] for each in (outputs, told))
            loss = (1 - hard_weight) * soft_loss(student, others, temperature).sum()
            loss = loss + hard_weight * cross_entropy(student.float(), wanted[counted], reduction="sum")
            loss = loss / torch.as_tensor(counted.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # which averages over processes what was divided by all tokens
            return (loss, outputs) if return_outputs else loss

    return Distilled
