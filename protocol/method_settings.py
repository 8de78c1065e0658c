"""The sections of a plan that say how each method is set: adapters, prompts, biases, layers. Adapter names are PEFT's."""

import math
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from protocol.strict import Name, Strict

LoraStart = Literal["default", "gaussian", "pissa", "pissa_niter_16", "loftq"]
# Starts that are a part of the base, which must be taken away again.
TAKEN_FROM_THE_BASE: tuple[LoraStart, ...] = ("pissa", "pissa_niter_16", "loftq")


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
        if self.init_lora_weights in TAKEN_FROM_THE_BASE and self.r > 512:
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


class ExpertsSettings(Strict):
    """What of a mixture of experts trains; ``lora`` says the rank of an expert's change."""

    train: Literal["both", "experts", "router"] = Field("both", description="experts by low-rank changes, routers whole")


class XLoraSettings(Strict):
    """A router over LoRA adapters that were trained apart; names as in ``peft.XLoraConfig``."""

    adapters: tuple[Name, ...] = Field((), description="folders of LoRA adapters of one base")
    xlora_depth: PositiveInt = Field(1, le=8, description="layers of the router")
    xlora_size: PositiveInt = Field(2048, description="width inside a router of several layers")
    xlora_dropout_p: float = Field(0.2, ge=0, lt=1, description="between them")
    layerwise_scalings: bool = Field(False, description="shares of their own for every adapted layer")
    top_k_lora: PositiveInt | None = Field(None, description="only so many adapters at each token")
    softmax_temperature: PositiveFloat = Field(1.0, description="lower gives sharper shares")
