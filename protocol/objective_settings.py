"""The sections of a plan that say how each objective is set. Names are TRL's where TRL has one."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from protocol.strict import Name, Strict, changed
from protocol.writer_settings import JudgeSettings, WriterSettings


class DpoSettings(Strict):
    """Direct preference optimisation; names as in ``trl.DPOConfig``."""

    beta: PositiveFloat = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down"] = "sigmoid"
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="robust, exo_pair: share of pairs that are the wrong way round"
    )

    @model_validator(mode="after")
    def _smoothing(self) -> "DpoSettings":
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(f"label_smoothing is for loss_type robust or exo_pair, found {self.loss_type}; take robust")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0; its paper takes 1.0e-3")
        return self


class KtoSettings(Strict):
    """Learning from single answers that were liked or not; names as in ``trl.KTOConfig``."""

    beta: PositiveFloat = 0.1
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0


class RlSettings(Strict):
    """Optimising answers that the model writes itself against a reward; names as in ``trl.GRPOConfig``."""

    algorithm: Literal["grpo", "rloo"] = "grpo"
    reward_model: Name | None = Field(None, description="a reward adapter's folder, or a sequence classifier with one output")
    reward_functions: tuple[Name, ...] = Field((), description="module:function, each from prompts and answers to numbers")
    judge: JudgeSettings | None = Field(None, description="a model that marks each answer from 1 to 9, which is its reward")
    num_generations: int = Field(4, ge=2, description="answers to each prompt")
    max_completion_length: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    beta: float = Field(0.05, ge=0, description="pull towards the reference: KL divergence's weight")
    epsilon: PositiveFloat = Field(0.2, description="how far a token's probability ratio counts (clipping)")
    num_iterations: PositiveInt = Field(1, description="steps on the same answers; the ratio begins to differ with the second")


class DistillationSettings(Strict):
    """Learning from a larger model: from its probabilities of each token (logits), or from answers that it writes (text)."""

    teacher: WriterSettings
    kind: Literal["logits", "text"] = "logits"
    temperature: PositiveFloat = Field(2.0, description="logits: softens both models' probabilities; the paper's T")
    hard_weight: float = Field(0.1, ge=0, le=1, description="logits: share of the loss on the rows' own answers")

    @model_validator(mode="after")
    def _together(self) -> "DistillationSettings":
        if wrong := list(self._wrong()):
            raise ValueError("; ".join(wrong))
        return self

    def _wrong(self) -> Iterator[str]:
        if self.kind == "text":
            if unread := changed(self, "temperature", "hard_weight"):
                yield f"{' and '.join(unread)}: kind text has no soft loss; leave out, or mean teacher.temperature"
            return
        if self.teacher.endpoint:
            yield "teacher.endpoint gives texts and no probabilities; write kind: text"
        if unread := changed(self.teacher, "temperature", "max_new_tokens"):
            yield f"teacher.{' and teacher.'.join(unread)}: with kind logits the teacher writes nothing; leave out"


class AiFeedbackSettings(Strict):
    """A judge in place of people: the model answers each prompt several times, and the best and the worst become a pair."""

    judge: JudgeSettings
    writer: WriterSettings | None = Field(
        None, description="who writes the answers; without it the model that trains, and for reward the base"
    )
    answers: int = Field(2, ge=2, le=16, description="to each prompt")
    temperature: PositiveFloat = Field(1.0, description="of the draw of answers; a writer has its own")
    max_new_tokens: PositiveInt = Field(128, description="longest answer; a writer has its own")

    @model_validator(mode="after")
    def _writer(self) -> "AiFeedbackSettings":
        if self.writer is None:
            return self
        unread = changed(self, "temperature", "max_new_tokens")
        wrong = [f"{' and '.join(unread)}: the writer has its own; give it there"] if unread else []
        if not self.writer.temperature:
            wrong.append("writer.temperature is 0, which gives the same answer every time; expected more")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class HeadSettings(Strict):
    """A classifier's new head. It starts from nothing while the base does not, so it has a start and a rate of its own."""

    init: Literal["random", "label-names"] = Field(
        "random", description="label-names: a row starts where the base places the label's own name"
    )
    learning_rate: PositiveFloat | None = Field(None, description="of the head; without it training.learning_rate")
    local: bool = Field(False, description="federations: each node keeps a head of its own, which never leaves it")
