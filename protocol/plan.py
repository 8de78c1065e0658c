"""How one machine fine-tunes: method, objective, precision, rank, batch, schedule. What YAML holds and training takes.

A plan lives here and not in ``strategies`` because the parties agree on it: the coordinator publishes the plan that it
wishes, each node narrows it to what it can do, and the shape of what was chosen travels back. Learning-rate and schedule
names are Hugging Face's; adapter names are PEFT's.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from pydantic import Field, model_validator

from protocol.data_settings import DataSettings
from protocol.method_settings import (
    TAKEN_FROM_THE_BASE,
    AdaLoraSettings,
    BitFitSettings,
    BottleneckSettings,
    ExpertsSettings,
    FreezingSettings,
    Ia3Settings,
    LoraSettings,
    PromptSettings,
    XLoraSettings,
)
from protocol.mixture_settings import ForgettingSettings
from protocol.objective_settings import (
    AiFeedbackSettings,
    DistillationSettings,
    DpoSettings,
    HeadSettings,
    KtoSettings,
    RlSettings,
)
from protocol.strict import Name, Strict, changed
from protocol.strict import Precision as Precision
from protocol.training_settings import TrainingSettings

Objective = Literal["sft", "pretraining", "distillation", "classification", "regression", "dpo", "kto", "reward", "rl"]
Method = Literal[
    "full",
    "freezing",
    "lora",
    "qlora",
    "adalora",
    "ia3",
    "bitfit",
    "bottleneck",
    "experts",
    "prompt-tuning",
    "prefix-tuning",
    "p-tuning-v2",
    "xlora",
]
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
    "distillation": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "dpo": "CAUSAL_LM",
    "kto": "CAUSAL_LM",
    "reward": "SEQ_CLS",
    "rl": "CAUSAL_LM",
}
# Their rows can be packed into blocks; pretraining fills its blocks without it.
PACKED: tuple[Objective, ...] = ("sft", "distillation")
# They stay near the model that was there before them.
REFERRING: tuple[Objective, ...] = ("dpo", "kto", "rl")


# A row's loss is its own: DP-SGD can shorten its gradient.
PRIVATE_OBJECTIVES: tuple[Objective, ...] = ("sft", "classification", "regression")
_WHY_NOT_PRIVATE: Mapping[Objective, str] = {
    "pretraining": "a block holds parts of several texts, and one text lies in several blocks",
    "distillation": "what a teacher says of a row is another loss, which nobody has made private yet",
    "dpo": "what a reference says of a pair is another loss, which nobody has made private yet",
    "kto": "each row is read with the answer of another",
    "reward": "pairs have another loss, which nobody has made private yet",
    "rl": "answers are held against the others of their group",
}
_UNCLIPPED: Mapping[Method, str] = {
    "full": "trains whole weights, which the noise on so many values drowns",
    "freezing": "trains whole weights, which the noise on so many values drowns",
    "adalora": "adds to the loss what is of no row",
    "experts": "chooses among experts, and how is balanced over the rows of a batch",
    "xlora": "mixes adapters that were trained without this promise",
}


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)


def alike(method: Method) -> tuple[Method, ...]:
    """The methods whose adapters are of one kind with those of ``method``, so that their nodes work together."""
    return LOW_RANK if method in LOW_RANK else (method,)


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
    experts: ExpertsSettings = ExpertsSettings()
    freezing: FreezingSettings = FreezingSettings()
    bitfit: BitFitSettings = BitFitSettings()
    xlora: XLoraSettings = XLoraSettings()
    head: HeadSettings = HeadSettings()
    dpo: DpoSettings = DpoSettings()
    kto: KtoSettings = KtoSettings()
    rl: RlSettings = RlSettings()
    distillation: DistillationSettings | None = None
    ai_feedback: AiFeedbackSettings | None = Field(
        None, description="dpo, reward: the rows are prompts, and a judge labels the model's own answers"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="of the base while it trains; without it the base's own")
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    forgetting: ForgettingSettings | None = None

    @property
    def update_rank(self) -> int:
        """Largest rank of an update.

        Twice the trained one where the factors begin with a part of the base: that part must be taken away again, or it
        would count as change (``s B A - s B_0 A_0``). AdaLoRA may leave a module all the directions that it began with.
        """
        if self.method == "adalora":
            return math.ceil(self.lora.r * self.adalora.init_ratio)
        start = self.lora.init_lora_weights
        taken = start in TAKEN_FROM_THE_BASE and (start != "loftq" or self.precision in QUANTISED)
        return self.lora.r * (2 if taken else 1)

    @property
    def task_type(self) -> Literal["CAUSAL_LM", "SEQ_CLS"]:
        """PEFT's name of the task: whether the model answers or scores."""
        return TASK_TYPES[self.objective]

    def without_rows(self) -> "Plan":
        """The same without the files of rows that it names, which are for one machine alone."""
        forgetting = self.forgetting and self.forgetting.model_copy(update={"probe": None})
        data = self.data.model_copy(update={"train": None, "evaluate": None, "tasks": {}, "replay": None})
        return self.model_copy(update={"data": data, "forgetting": forgetting})

    @model_validator(mode="after")
    def _together(self) -> "Plan":
        if wrong := list(self.conflicts()):
            raise ValueError("; ".join(wrong))
        return self

    def conflicts(self) -> Iterator[str]:
        """What does not go together, a line each."""
        yield from self._precisions()
        yield from self._prompts()
        yield from self._batches()
        yield from self._unread()
        yield from self._against_adalora()
        yield from self._beside()
        yield from self._mixtures()
        yield from self._private_rows()

    def _precisions(self) -> Iterator[str]:
        quantised = self.precision in QUANTISED
        if self.method == "qlora" and not quantised:
            yield f"method qlora needs precision nf4 or int8, found {self.precision}; or choose method lora"
        if self.method == "lora" and quantised:
            yield f"method lora on a {self.precision} base is qlora; write method: qlora"
        if self.method in ON_THE_BASE and quantised:
            yield f"method {self.method} trains the base, which {self.precision} weights cannot; choose bf16 or qlora"
        if self.method in COMPRESSED and self.precision == "fp16":
            yield (
                f"method {self.method} on fp16 weights: their gradients leave its range; hold them as bf16, or as fp32 with "
                "training.mixed_precision fp16"
            )

    def _prompts(self) -> Iterator[str]:
        if self.prompt.init_text and self.method != "prompt-tuning":
            yield f"prompt.init_text is for method prompt-tuning, found {self.method}"
        if self.prompt.encoder_hidden_size and self.method != "prefix-tuning":
            yield f"prompt.encoder_hidden_size is for method prefix-tuning, found {self.method}"
        if self.training.gradient_checkpointing and self.method in PREFIXES:
            yield (
                f"training.gradient_checkpointing leaves out the cache that {self.method} lives in; switch it off, or choose "
                "prompt-tuning"
            )

    def _mixtures(self) -> Iterator[str]:
        if self.method != "xlora":
            return
        if not self.xlora.adapters:
            yield "method xlora mixes adapters that were trained apart; name their folders in xlora.adapters"
        if self.task_type != "CAUSAL_LM":
            yield f"method xlora mixes adapters of models that write, and objective {self.objective} scores; choose method lora"
        if self.training.gradient_checkpointing:
            yield "training.gradient_checkpointing would mix anew, with other shares, on the way back; switch it off for xlora"

    def _batches(self) -> Iterator[str]:
        settings = self.training
        if settings.packing and self.objective not in PACKED:
            yield f"training.packing is for objective {' or '.join(PACKED)}, found {self.objective}; leave it out"
        if settings.packing and self.method in PROMPTS:
            yield f"training.packing would show the vectors of {self.method} to the first row of a block alone; leave it out"
        if settings.train_sampling_strategy != "random" and self.objective in (*REFERRING, "reward"):
            yield f"training.train_sampling_strategy: {self.objective} has an order of its own; leave it out"
        if self.objective == "kto" and settings.batch_size < 2:
            yield "training.batch_size is 1; kto needs 2 or more: it reads each prompt with another row's answer"
        if self.objective == "distillation" and self.distillation is None:
            yield "objective distillation needs a teacher; give distillation.teacher"
        if self.objective != "rl":
            return
        if not (self.rl.reward_model or self.rl.reward_functions or self.rl.judge):
            yield "objective rl needs a reward; give rl.reward_model, rl.reward_functions or rl.judge"
        answers = settings.batch_size * settings.gradient_accumulation_steps
        if answers % self.rl.num_generations:
            yield (
                f"training.batch_size times gradient_accumulation_steps is {answers}, which rl.num_generations "
                f"{self.rl.num_generations} does not divide; a step takes whole groups of answers"
            )

    def _private_rows(self) -> Iterator[str]:
        """What DP-SGD does not hold for, and what would let one row train as several."""
        if self.training.example_privacy is None:
            return
        here = "training.example_privacy"
        if self.objective not in PRIVATE_OBJECTIVES:
            yield f"{here} is for objective {_or(PRIVATE_OBJECTIVES)}: {_WHY_NOT_PRIVATE[self.objective]}"
        if self.method in _UNCLIPPED:
            yield f"{here}: method {self.method} {_UNCLIPPED[self.method]}; choose another"
        repeated = {"data.tasks": self.data.tasks, "data.replay": self.data.replay}
        for name in (name for name, value in repeated.items() if value):
            yield f"{here}: {name} draws rows several times, and each is promised to count once; leave it out"
        if changed(self.data, "augmentation"):
            yield f"{here}: data.augmentation makes several rows out of one, and each is promised to count once; leave it out"

    def _unread(self) -> Iterator[str]:
        for name, (kind, users) in USED_BY.items():
            if (found := getattr(self, kind)) not in users and getattr(self, name) != Plan.model_fields[name].default:
                yield f"{name} is for {kind} {' or '.join(users)}, found {found}"
        if self.method not in ("lora", "qlora") and (self.lora.init_lora_weights, self.lora.use_dora) != ("default", False):
            yield f"lora.init_lora_weights and lora.use_dora are for method lora or qlora, found {self.method}"

    def _beside(self) -> Iterator[str]:
        if self.data.tasks and (self.data.train or self.data.evaluate):
            yield "data.tasks stand in place of data.train and data.evaluate; leave one or the other out"
        if self.data.preferred and self.objective != "sft":
            yield f"data.preferred is for objective sft, found {self.objective}; leave it out"
        if self.forgetting is None:
            return
        if self.task_type == "SEQ_CLS":
            yield f"forgetting asks how likely the model finds a text, and {self.objective} has a head in place of that"
        if self.training.fsdp or self.training.deepspeed:
            yield "forgetting goes back to weights that one process holds; leave training.fsdp and training.deepspeed out"

    def _against_adalora(self) -> Iterator[str]:
        if self.method != "adalora":
            return
        lora = self.lora
        for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
            if getattr(lora, name):
                yield f"lora.{name}: adalora shares the ranks out itself; leave it out"
        if self.update_rank > 1024:
            yield f"lora.r {lora.r}: adalora begins with rank {self.update_rank}, more than 1024; lower one of the two"


# Sections that only some methods or objectives read: elsewhere they would be wishes that nobody hears.
USED_BY: Mapping[str, tuple[Literal["method", "objective"], tuple[str, ...]]] = {
    "adalora": ("method", ("adalora",)),
    "ia3": ("method", ("ia3",)),
    "prompt": ("method", PROMPTS),
    "bottleneck": ("method", ("bottleneck",)),
    "experts": ("method", ("experts",)),
    "freezing": ("method", ("freezing",)),
    "bitfit": ("method", ("bitfit",)),
    "xlora": ("method", ("xlora",)),
    "head": ("objective", ("classification",)),
    "dpo": ("objective", ("dpo",)),
    "kto": ("objective", ("kto",)),
    "rl": ("objective", ("rl",)),
    "distillation": ("objective", ("distillation",)),
    "ai_feedback": ("objective", ("dpo", "reward")),
}
