"""The section of a plan that says how a stretch of training goes: rates, steps, batches. Names are Hugging Face's."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from protocol.strict import Strict


class TrainingSettings(Strict):
    """One stretch of training; names and meanings are those of ``transformers.TrainingArguments``."""

    learning_rate: PositiveFloat = 2e-4
    batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: PositiveFloat = Field(3.0, description="used when max_steps is not set")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; in a federation, per round")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    restart_warmup_ratio: float = Field(
        0.5, ge=0, le=1, description="federations: share of a round's steps over which the rate climbs back"
    )
    proximal_mu: float = Field(
        0.0, ge=0, description="federations: pull towards the round's start, mu / 2 * |w - start|^2 (FedProx)"
    )
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**32)
    eval_steps: PositiveInt | None = Field(None, description="evaluate every so many steps; needed for early stopping")
    early_stopping_patience: PositiveInt | None = Field(None, description="stop after so many evaluations without gain")
    save_steps: PositiveInt | None = Field(None, description="keep a checkpoint every so many steps")
    save_total_limit: PositiveInt = 2
    logging_steps: PositiveInt = 10
    tensorboard: bool = False

    @model_validator(mode="after")
    def _stopping_needs_evaluations(self) -> "TrainingSettings":
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience needs eval_steps: there is nothing to be patient about")
        return self
