"""How one machine fine-tunes: method, objective, precision, rank, batch, schedule. What YAML holds and training takes.

A plan lives here and not in ``strategies`` because the parties agree on it: the coordinator publishes the plan that it
wishes, each node narrows it to what it can do, and the shape of what was chosen travels back. Learning-rate and schedule
names are Hugging Face's; adapter names are PEFT's.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

Objective = Literal["sft", "pretraining", "classification", "regression", "dpo", "kto", "reward", "rl"]
Method = Literal[
    "full",
    "freezing",
    "lora",
    "qlora",
    "adalora",
    "ia3",
    "bitfit",
    "bottleneck",
    "prompt-tuning",
    "prefix-tuning",
    "p-tuning-v2",
]
Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
LoraStart = Literal["default", "gaussian", "pissa", "pissa_niter_16", "loftq"]
QUANTISED: tuple[Precision, ...] = ("int8", "nf4")
# What they change of a module is a product of two factors, of any rank, and nodes of different ranks work together.
LOW_RANK: tuple[Method, ...] = ("lora", "qlora", "adalora")
# They train weights of the base itself.
ON_THE_BASE: tuple[Method, ...] = ("full", "freezing", "bitfit")
# They send how whole matrices have changed, compressed to factors.
COMPRESSED: tuple[Method, ...] = ("full", "freezing")
# They train keys and values that stand before the text's at every layer.
PREFIXES: tuple[Method, ...] = ("prefix-tuning", "p-tuning-v2")
PROMPTS: tuple[Method, ...] = ("prompt-tuning", *PREFIXES)
# A head of its own beside the base, and how PEFT calls the task.
TASK_TYPES: Mapping[Objective, Literal["CAUSAL_LM", "SEQ_CLS"]] = {
    "sft": "CAUSAL_LM",
    "pretraining": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "dpo": "CAUSAL_LM",
    "kto": "CAUSAL_LM",
    "reward": "SEQ_CLS",
    "rl": "CAUSAL_LM",
}
# They stay near the model that was there before them.
REFERRING: tuple[Objective, ...] = ("dpo", "kto", "rl")
_TAKEN_FROM_THE_BASE: tuple[LoraStart, ...] = ("pissa", "pissa_niter_16", "loftq")
Name = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


def alike(method: Method) -> tuple[Method, ...]:
    """The methods whose adapters are of one kind with those of ``method``, so that their nodes work together."""
    return LOW_RANK if method in LOW_RANK else (method,)


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSettings(Strict):
    """Shape and start of the adapter (Hu et al. 2021, arXiv:2106.09685); names as in ``peft.LoraConfig``."""

    r: PositiveInt = Field(16, le=1024, description="rank; with rank_pattern, the largest")
    lora_alpha: PositiveFloat = Field(32.0, description="the change is lora_alpha / r * B @ A")
    use_rslora: bool = Field(False, description="the change is lora_alpha / sqrt(r) * B @ A (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="a length of its own for every row of the weight (Liu et al. 2024)")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[Name, ...] = Field(
        "all-linear", description="module names (linear layers, embeddings), or every linear layer but the head"
    )
    rank_pattern: dict[Name, PositiveInt] = Field({}, description="smaller ranks, by module name or regular expression")
    alpha_pattern: dict[Name, PositiveFloat] = Field({}, description="other lora_alpha, likewise")
    modules_to_save: tuple[Name, ...] = Field((), description="modules that train whole and are sent dense, as embeddings")
    init_lora_weights: LoraStart = Field("default", description="where the factors begin when the federation sends no start")

    @model_validator(mode="after")
    def _some_target(self) -> "LoraSettings":
        if not self.target_modules:
            raise ValueError("target_modules is empty; name at least one module, or write all-linear")
        return self

    @model_validator(mode="after")
    def _patterns(self) -> "LoraSettings":
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"pattern {key!r} is no regular expression: {error}") from None
        if (largest := max(self.rank_pattern.values(), default=0)) > self.r:
            raise ValueError(f"rank_pattern holds {largest}, more than r; make it r, and name the modules of smaller rank")
        if self.rank_pattern and self.alpha_pattern and list(self.rank_pattern) != list(self.alpha_pattern):
            raise ValueError("rank_pattern and alpha_pattern name different modules; name the same in both, in one order")
        return self

    @model_validator(mode="after")
    def _room_for_the_start(self) -> "LoraSettings":
        if self.init_lora_weights in _TAKEN_FROM_THE_BASE and self.r > 512:
            raise ValueError(f"init_lora_weights {self.init_lora_weights} sends twice the rank; r is {self.r}, at most 512")
        return self

    def with_rank(self, r: int) -> "LoraSettings":
        """The same at another rank; patterns above it are cut to it, and steps keep their length.

        AdamW moves every number of a factor by about the rate, so a product's step grows with the root of its rank. With a
        scaling in proportion to ``1 / sqrt(r)`` (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732) nodes of all ranks move
        alike; with one scaling the largest rank sets the rate for all (benchmarks/LOG.md, E3).
        """
        ranks = {key: min(rank, r) for key, rank in self.rank_pattern.items()}
        alphas = {
            key: self._alpha(alpha, self.rank_pattern.get(key, self.r), ranks.get(key, r)) for key, alpha in self._alphas()
        }
        alpha = self._alpha(self.lora_alpha, self.r, r)
        return self.model_copy(update={"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas})

    def _alphas(self) -> Iterable[tuple[str, float]]:
        """A module with a rank of its own needs an alpha of its own as soon as the others' changes."""
        return (self.alpha_pattern or dict.fromkeys(self.rank_pattern, self.lora_alpha)).items()

    def _alpha(self, alpha: float, before: int, after: int) -> float:
        return alpha if self.use_rslora else alpha * math.sqrt(after / before)


class AdaLoraSettings(Strict):
    """How AdaLoRA shares its ranks out while it trains (Zhang et al. 2023, arXiv:2303.10512); ``lora`` says the rest."""

    init_ratio: float = Field(
        1.5, gt=1, le=8, description="rank at the beginning (init_r) over lora.r, which is the mean at the end (target_r)"
    )
    tinit_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks are taken away")
    tfinal_ratio: float = Field(0.5, ge=0, lt=1, description="share of the steps after the last one is taken away")
    delta_t: PositiveInt = Field(1, description="steps between two reallocations")
    orth_reg_weight: PositiveFloat = Field(0.5, description="pull of the factors towards orthogonal rows")


class Ia3Settings(Strict):
    """One factor for every number that keys, values and the inside of the MLP compute (Liu et al. 2022, arXiv:2205.05638)."""

    target_modules: tuple[Name, ...] | None = Field(
        None, description="module names; without them those that PEFT knows for the architecture"
    )
    feedforward_modules: tuple[Name, ...] = Field(
        (), description="which of them scale what they read, not what they compute: the MLP's last layer"
    )

    @model_validator(mode="after")
    def _named_twice(self) -> "Ia3Settings":
        if missing := sorted(set(self.feedforward_modules) - set(self.target_modules or ())):
            raise ValueError(f"feedforward_modules: {', '.join(missing)} must stand in target_modules too")
        return self


class PromptSettings(Strict):
    """Trained vectors before the text: at the input (prompt-tuning) or at every layer (prefix-tuning, p-tuning-v2)."""

    num_virtual_tokens: PositiveInt = Field(20, le=1024)
    init_text: Name | None = Field(None, description="prompt-tuning: begins as this text's embeddings; else as drawn tokens'")
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="prefix-tuning: inner width of the network that makes the prefix; without it the base's"
    )


class BottleneckSettings(Strict):
    """Small networks between layers: down, activation, up, added to what passes (Houlsby et al. 2019, Pfeiffer et al. 2021)."""

    reduction_factor: PositiveInt = Field(16, description="width of the base over width inside")
    placement: Literal["houlsby", "pfeiffer"] = Field("houlsby", description="after attention and MLP, or after the MLP alone")
    activation: Literal["relu", "gelu", "silu"] = "relu"


class FreezingSettings(Strict):
    """Which layers stay as they are while the others train whole."""

    frozen_share: float = Field(0.7, ge=0, lt=1, description="of the layers; embeddings go with the bottom")
    order: Literal["bottom-up", "top-down", "alternating"] = Field("bottom-up", description="which are frozen first")
    train: tuple[Name, ...] = Field((), description="parts of the base that train, by name, in place of a share")
    thaw_every: PositiveInt | None = Field(None, description="steps after which one more frozen layer begins to train")

    @model_validator(mode="after")
    def _parts_or_a_share(self) -> "FreezingSettings":
        share = ("frozen_share", "order", "thaw_every")
        if self.train and (named := [name for name in share if getattr(self, name) != type(self).model_fields[name].default]):
            raise ValueError(f"train names what trains, and {', '.join(named)} would choose it; leave one or the other out")
        return self


class BitFitSettings(Strict):
    """Biases alone train (Ben Zaken et al. 2022, arXiv:2106.10199)."""

    add_missing: bool = Field(False, description="linear layers without a bias get one that begins at zero")


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
    num_generations: int = Field(4, ge=2, description="answers to each prompt")
    max_completion_length: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    beta: float = Field(0.05, ge=0, description="pull towards the reference: KL divergence's weight")
    epsilon: PositiveFloat = Field(0.2, description="how far a token's probability ratio counts (clipping)")
    num_iterations: PositiveInt = Field(1, description="steps on the same answers; the ratio begins to differ with the second")


class HeadSettings(Strict):
    """A classifier's new head. It starts from nothing while the base does not, so it has a start and a rate of its own."""

    init: Literal["random", "label-names"] = Field(
        "random", description="label-names: a row starts where the base places the label's own name"
    )
    learning_rate: PositiveFloat | None = Field(None, description="of the head; without it training.learning_rate")
    local: bool = Field(False, description="federations: each node keeps a head of its own, which never leaves it")


class DataSettings(Strict):
    """Where rows come from and how they are read. A coordinator's plan has no paths: each node brings its own."""

    train: Path | None = Field(None, description="JSON, JSONL, CSV or Parquet file")
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")
    evaluate_fraction: float = Field(0.1, gt=0, lt=1, description="share held out when there is no evaluate file")
    labels: tuple[Name, ...] | None = Field(None, description="classification: every label, in the order of the head's rows")
    max_length: PositiveInt = Field(512, description="tokens; longer rows are cut, and counted in the report")

    @model_validator(mode="after")
    def _labels(self) -> "DataSettings":
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels hold the same name twice")
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"labels hold {len(self.labels)} name(s); classification needs at least 2")
        return self


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


class Plan(Strict):
    """Everything that training on one machine needs."""

    base_model: Name = Field("tiny", description="hub name, local folder, installed package, or 'tiny' (embedded)")
    objective: Objective = "sft"
    method: Method = "lora"
    precision: Precision = Field("fp32", description="how the frozen base is held")
    lora: LoraSettings = LoraSettings()
    adalora: AdaLoraSettings = AdaLoraSettings()
    ia3: Ia3Settings = Ia3Settings()
    prompt: PromptSettings = PromptSettings()
    bottleneck: BottleneckSettings = BottleneckSettings()
    freezing: FreezingSettings = FreezingSettings()
    bitfit: BitFitSettings = BitFitSettings()
    head: HeadSettings = HeadSettings()
    dpo: DpoSettings = DpoSettings()
    kto: KtoSettings = KtoSettings()
    rl: RlSettings = RlSettings()
    dropout: float | None = Field(None, ge=0, lt=1, description="of the base while it trains; without it the base's own")
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()

    @property
    def update_rank(self) -> int:
        """Largest rank of an update.

        Twice the trained one where the factors begin with a part of the base: that part must be taken away again, or it
        would count as change (``s B A - s B_0 A_0``). AdaLoRA may leave a module all the directions that it began with.
        """
        if self.method == "adalora":
            return math.ceil(self.lora.r * self.adalora.init_ratio)
        start = self.lora.init_lora_weights
        taken = start in _TAKEN_FROM_THE_BASE and (start != "loftq" or self.precision in QUANTISED)
        return self.lora.r * (2 if taken else 1)

    @property
    def task_type(self) -> Literal["CAUSAL_LM", "SEQ_CLS"]:
        """PEFT's name of the task: whether the model answers or scores."""
        return TASK_TYPES[self.objective]

    @model_validator(mode="after")
    def _pairs(self) -> "Plan":
        if self.method == "qlora" and self.precision not in QUANTISED:
            raise ValueError(f"method qlora needs precision nf4 or int8, found {self.precision}; or choose method lora")
        if self.method == "lora" and self.precision in QUANTISED:
            raise ValueError(f"method lora on a {self.precision} base is qlora; write method: qlora")
        if self.method in ON_THE_BASE and self.precision in QUANTISED:
            raise ValueError(
                f"method {self.method} trains the base, which {self.precision} weights cannot; choose bf16 or qlora"
            )
        if self.method in COMPRESSED and self.precision == "fp16":
            raise ValueError(
                f"method {self.method} on fp16 weights: their gradients leave its range; hold them as bf16, or as fp32 with "
                "training.mixed_precision fp16"
            )
        return self

    @model_validator(mode="after")
    def _prompts(self) -> "Plan":
        if self.prompt.init_text and self.method != "prompt-tuning":
            raise ValueError(f"prompt.init_text is for method prompt-tuning, found {self.method}")
        if self.prompt.encoder_hidden_size and self.method != "prefix-tuning":
            raise ValueError(f"prompt.encoder_hidden_size is for method prefix-tuning, found {self.method}")
        if self.training.gradient_checkpointing and self.method in PREFIXES:
            raise ValueError(
                f"training.gradient_checkpointing leaves out the cache that {self.method} lives in; switch it off, or choose "
                "prompt-tuning"
            )
        if self.training.early_stopping_patience and self.method == "prefix-tuning":
            raise ValueError(
                "training.early_stopping_patience goes back to the best prefix, which no longer fits the network behind it; "
                "leave it out, or choose p-tuning-v2"
            )
        return self

    @model_validator(mode="after")
    def _batches(self) -> "Plan":
        settings = self.training
        if self.objective == "kto" and settings.batch_size < 2:
            raise ValueError("training.batch_size is 1; kto needs 2 or more: it reads each prompt with another row's answer")
        if self.objective == "rl":
            if not (self.rl.reward_model or self.rl.reward_functions):
                raise ValueError("objective rl needs a reward; give rl.reward_model or rl.reward_functions")
            answers = settings.batch_size * settings.gradient_accumulation_steps
            if answers % self.rl.num_generations:
                raise ValueError(
                    f"training.batch_size times gradient_accumulation_steps is {answers}, which rl.num_generations "
                    f"{self.rl.num_generations} does not divide; a step takes whole groups of answers"
                )
        return self

    @model_validator(mode="after")
    def _sections_of_what_was_chosen(self) -> "Plan":
        wrong = [
            f"{name} is for {kind} {' or '.join(users)}, found {found}"
            for name, (kind, users) in USED_BY.items()
            if (found := getattr(self, kind)) not in users and getattr(self, name) != Plan.model_fields[name].default
        ]
        if self.method not in ("lora", "qlora") and (self.lora.init_lora_weights, self.lora.use_dora) != ("default", False):
            wrong.append(f"lora.init_lora_weights and lora.use_dora are for method lora or qlora, found {self.method}")
        if self.method == "adalora":
            wrong += self._against_adalora()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _against_adalora(self) -> list[str]:
        lora = self.lora
        found = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if getattr(lora, name)]
        wrong = [f"lora.{name}: adalora shares the ranks out itself; leave it out" for name in found]
        if self.update_rank > 1024:
            wrong.append(f"lora.r {lora.r}: adalora begins with rank {self.update_rank}, more than 1024; lower one of the two")
        return wrong


# Sections that only some methods or objectives read: elsewhere they would be wishes that nobody hears.
USED_BY: Mapping[str, tuple[Literal["method", "objective"], tuple[str, ...]]] = {
    "adalora": ("method", ("adalora",)),
    "ia3": ("method", ("ia3",)),
    "prompt": ("method", PROMPTS),
    "bottleneck": ("method", ("bottleneck",)),
    "freezing": ("method", ("freezing",)),
    "bitfit": ("method", ("bitfit",)),
    "head": ("objective", ("classification",)),
    "dpo": ("objective", ("dpo",)),
    "kto": ("objective", ("kto",)),
    "rl": ("objective", ("rl",)),
}
