"""The section of a plan that says how a stretch of training goes: rates, steps, batches. Names are Hugging Face's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from protocol.example_privacy_settings import ExamplePrivacySettings
from protocol.strict import Strict, changed

_NOT_PRIVATE: Mapping[str, str] = {
    "packing": "puts several rows into one block, whose gradients cannot be told apart",
    "train_sampling_strategy": "orders rows; each step draws every row by chance, as the accountant counts",
    "neftune_noise_alpha": "scales its noise by the longest row beside a row",
    "proximal_mu": "adds to each row's loss what is of no row",
    "eval_steps": "chooses by rows that nobody counts",
    "save_steps": "keeps what no ledger has counted yet",
    "max_grad_norm": "is read by nobody there; clipping_norm stands in its place",
    "fsdp": "divides gradients over processes",
    "deepspeed": "divides gradients over processes",
}
# They keep Adam's moments where the GPU may push them out to the host's memory, which takes a GPU.
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")


class TrainingSettings(Strict):
    """One stretch of training; names and meanings are those of ``transformers.TrainingArguments``."""

    learning_rate: PositiveFloat = 2e-4
    batch_size: PositiveInt = Field(8, description="rows of a micro-batch, on each process")
    eval_batch_size: PositiveInt | None = Field(None, description="of evaluations while it trains; without it batch_size")
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: PositiveFloat = Field(3.0, description="used when max_steps is not set")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; in a federation, per round")
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    warmup_steps: NonNegativeInt | None = Field(None, description="in place of warmup_ratio")
    restart_warmup_ratio: float = Field(
        0.5, ge=0, le=1, description="federations: share of a round's steps over which the rate climbs back"
    )
    proximal_mu: float = Field(
        0.0, ge=0, description="federations: pull towards the round's start, mu / 2 * |w - start|^2 (FedProx)"
    )
    packing: bool = Field(
        False, description="sft, distillation: short rows side by side in blocks of data.max_length; batch_size counts blocks"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random", description="order of the rows; group_by_length: a batch holds rows of like length, which saves padding"
    )
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "sgd",
    ] = "adamw_torch"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    example_privacy: ExamplePrivacySettings | None = Field(
        None,
        description="each row's own privacy (DP-SGD): no row tells more of itself than epsilon; without it, no such promise",
    )
    gradient_checkpointing: bool = False
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    neftune_noise_alpha: PositiveFloat | None = Field(
        None, description="noise on the embeddings while it trains (Jain et al. 2023, arXiv:2310.05914)"
    )
    seed: int = Field(0, ge=0, lt=2**32)
    divergence_factor: float = Field(
        5.0, gt=1, description="a loss that grows so many times above where it began has diverged; NaN always has"
    )
    eval_steps: PositiveInt | Literal["epoch"] | None = Field(
        None, description="evaluate every so many steps, or after each epoch; needed for early stopping"
    )
    early_stopping_patience: PositiveInt | None = Field(None, description="stop after so many evaluations without gain")
    load_best_model_at_end: bool = Field(False, description="end with the best of the evaluations; early stopping always does")
    save_steps: PositiveInt | Literal["epoch"] | None = Field(
        None, description="keep a checkpoint every so many steps, or after each epoch; whatever ends with the best: eval_steps"
    )
    save_total_limit: PositiveInt = Field(
        2, description="checkpoints that stay: the best where they were evaluated, else the newest; the newest always does"
    )
    logging_steps: PositiveInt = 10
    tensorboard: bool = False
    fsdp: bool = Field(False, description="several processes: each holds a part of the weights (FSDP)")
    fsdp_config: dict[str, Any] = Field({}, description="as in transformers.TrainingArguments")
    deepspeed: Path | dict[str, Any] | None = Field(None, description="several processes: a DeepSpeed configuration (ZeRO)")

    @property
    def keeps_best(self) -> bool:
        """It ends with the best of what was evaluated."""
        return bool(self.load_best_model_at_end or self.early_stopping_patience)

    @model_validator(mode="after")
    def _together(self) -> "TrainingSettings":
        if wrong := list(self._conflicts()):
            raise ValueError("\n".join(wrong))
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.early_stopping_patience and not self.eval_steps:
            yield "early_stopping_patience needs eval_steps: there is nothing to be patient about"
        if self.load_best_model_at_end and not self.eval_steps:
            yield "load_best_model_at_end needs eval_steps: nothing says which is the best"
        if self.packing and self.train_sampling_strategy == "group_by_length":
            yield "packing leaves nothing to group by length; leave one of packing and train_sampling_strategy out"
        if self.fsdp and self.deepspeed is not None:
            yield "fsdp and deepspeed both divide the weights; leave one of the two out"
        if self.fsdp_config and not self.fsdp:
            yield "fsdp_config is for fsdp: true"
        if self.example_privacy:
            yield from self._against_privacy()

    def _against_privacy(self) -> Iterator[str]:
        """What would let a row tell more than its epsilon, or do what nobody hears."""
        for name, why in _NOT_PRIVATE.items():
            if changed(self, name):
                yield f"example_privacy: {name} {why}; leave one of the two out"
        if self.mixed_precision == "fp16":
            yield "example_privacy: mixed_precision fp16 scales gradients up before they could be shortened; take bf16, or fp32"
