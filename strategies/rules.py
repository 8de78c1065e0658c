"""The selection rules as data: when each holds, what it prefers, how it sets that up, and where it comes from.

A rule prefers; it never decides alone. What does not fit the machine is out, whatever prefers it, and an explicit wish goes
before any rule (``strategies.selector``). Order is by how specific a rule is: of the settings that several rules give, the
first one's hold.

Sources: Hu 2021 (LoRA), arXiv:2106.09685; Dettmers 2023 (QLoRA), arXiv:2305.14314; Zhang 2023 (AdaLoRA), arXiv:2303.10512;
Lester 2021 (soft prompts), arXiv:2104.08691; Li and Liang 2021 (prefixes), arXiv:2101.00190; Liu 2021 (P-tuning v2),
arXiv:2110.07602; Ben Zaken 2022 (BitFit), arXiv:2106.10199; Rafailov 2023 (DPO), arXiv:2305.18290; Ethayarajh 2024 (KTO),
arXiv:2402.01306; Ouyang 2022 (InstructGPT), arXiv:2203.02155; Bai 2022 (constitutional AI), arXiv:2212.08073; Raffel 2020
(T5, mixing), arXiv:1910.10683; Lee 2019 (freezing), arXiv:1911.03090; Wu 2024 (X-LoRA-like mixtures), arXiv:2404.13628;
Sun 2019 (fine-tuning BERT), arXiv:1905.05583. ``fedge`` marks what this project was asked to hold.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from protocol.plan import Method, Objective
from strategies.task import Task

# Where LoRA attaches, by role; ``strategies.targets`` knows what an architecture calls them.
Targets = Literal["query-value", "query-key-value-dense", "attention", "all-linear"]


@dataclass(frozen=True)
class Condition:
    """One fact that must hold.

    Attributes:
        field: Of ``Task``, or ``gpus``, ``parameters``, ``kind`` of the architecture (``model_kind``) or ``consumer``.
        op: How it is compared.
        value: With what.
    """

    field: str
    op: Literal["is", "in", "<=", "<", ">", ">="]
    value: Any = None

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether it does; of a fact that is not known (None), no comparison does."""
        found, value = facts[self.field], self.value
        if self.op == "is":
            return bool(found == value)
        if found is None:
            return False
        if self.op == "in":
            return found in value
        return bool({"<=": found <= value, "<": found < value, ">": found > value, ">=": found >= value}[self.op])

    def __str__(self) -> str:
        said = " or ".join(map(str, self.value)) if self.op == "in" else str(self.value).lower()
        return f"{self.field} {'is' if self.op == 'in' else self.op} {said}"


@dataclass(frozen=True)
class Proposal:
    """One way that a rule would have it.

    Attributes:
        method: What trains.
        preference: How good the result is expected to be beside the others, 0 to 1: our judgement, not a measurement.
        stages: Objectives one after the other; empty: that of the task.
    """

    method: Method
    preference: float
    stages: tuple[Objective, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What was measured to be better than a source's setting (``benchmarks/LOG.md``).

    Attributes:
        value: To be taken.
        why: With the figures.
        below: Parameters of a base up to which it is.
    """

    value: Any
    why: str
    below: float = math.inf


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: What an explanation cites.
        source: Where it comes from.
        when: All must hold.
        proposes: What it would have done, best first; empty for a rule that only sets or advises.
        settings: Dotted Plan fields, and ``targets`` by role, for the methods in ``proposes`` (for all where that is empty).
        advises: What it has to say beyond a plan.
        forbids: Methods that must not be taken.
        measured: In place of ``settings``, by field: the first that is for a base of this size.
    """

    id: str
    source: str
    when: tuple[Condition, ...]
    proposes: tuple[Proposal, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    advises: str = ""
    forbids: tuple[Method, ...] = ()
    measured: Mapping[str, tuple[Measured, ...]] = field(default_factory=dict)

    def fires(self, facts: Mapping[str, Any]) -> bool:
        """Whether all its conditions hold."""
        return all(condition.holds(facts) for condition in self.when)

    def __str__(self) -> str:
        return f"{self.id} ({self.source})"


def facts_of(task: Task, *, model_kind: str, parameters: int, gpus: int, consumer: bool) -> dict[str, Any]:
    """Everything that conditions look at.

    Args:
        task: What is to be learnt.
        model_kind: ``decoder``, ``encoder`` or ``encoder-decoder``.
        parameters: Of the base.
        gpus: On this machine.
        consumer: The GPU has at most 24 GB.
    """
    return {**task.model_dump(), "answers": task.answers, "model_kind": model_kind, "parameters": parameters} | {
        "gpus": gpus,
        "consumer": consumer,
    }


def fired(facts: Mapping[str, Any], rules: Iterable["Rule"] = ()) -> tuple["Rule", ...]:
    """The rules that hold, in their order."""
    return tuple(rule for rule in rules or RULES if rule.fires(facts))


def _when(**conditions: Any) -> tuple[Condition, ...]:
    """``name=value`` asks for equality, ``name=(op, value)`` for a comparison."""
    return tuple(Condition(name, *(value if isinstance(value, tuple) else ("is", value))) for name, value in conditions.items())


_FULL_ENCODER: tuple[tuple[Proposal, ...], Mapping[str, Any]] = (
    (Proposal("full", 1.0), Proposal("lora", 0.85), Proposal("freezing", 0.8)),
    {
        "training.num_train_epochs": 3.0,
        "training.learning_rate": 1e-5,
        "training.warmup_ratio": 0.1,
        "training.weight_decay": 0.01,
        "dropout": 0.1,
    },
)
_TOO_SLOW = "rule classification-small, but its 2e-5 is for whole weights and moves no factors (benchmarks/LOG.md)"
_SFT_THEN_DPO = "collect pairs of a better and a worse answer: instruction tuning, then DPO on them"

# The more specific first.
RULES: tuple[Rule, ...] = (
    # ---- what must be ----------------------------------------------------------------------------------------------------
    Rule(
        "on-device",
        "fedge: on a device, PEFT and 4 or 8 bits are mandatory",
        _when(on_device=True),
        advises="export the result with 4 or 8 bits; a device trains and holds an adapter, never the base",
        forbids=("full", "freezing", "experts"),
    ),
    Rule(
        "private",
        "fedge: privacy-sensitive rows are trained where they lie",
        _when(private=True),
        advises="train federated (flower-supernode beside the data, fedge simulate to try it) or on the device itself",
    ),
    # ---- alignment -------------------------------------------------------------------------------------------------------
    Rule(
        "reward-reinforcement",
        "Ouyang 2022: reward model and policy optimisation for the highest quality",
        _when(feedback="pairs", quality="critical", expertise="expert"),
        (Proposal("full", 1.0, ("sft", "reward", "rl")), Proposal("lora", 1.0, ("sft", "reward", "rl"))),
    ),
    Rule(
        "preference-pairs",
        "Rafailov 2023: preference pairs and little compute: DPO, after instruction tuning",
        _when(feedback="pairs"),
        (Proposal("lora", 0.95, ("sft", "dpo")), Proposal("full", 0.9, ("sft", "dpo"))),
    ),
    Rule(
        "single-feedback",
        "Ethayarajh 2024: single answers that were liked or not: KTO, after instruction tuning",
        _when(feedback="single"),
        (Proposal("lora", 0.95, ("sft", "kto")),),
    ),
    Rule(
        "reward-function",
        "Ouyang 2022: a reward that can be computed: policy optimisation, after instruction tuning",
        _when(feedback="reward"),
        (Proposal("lora", 0.95, ("sft", "rl")),),
    ),
    Rule(
        "ai-feedback",
        "Bai 2022: no human labels: a judge model labels pairs, then DPO",
        _when(feedback="judge"),
        (Proposal("lora", 0.95, ("sft", "dpo")), Proposal("lora", 0.6, ("sft",))),
        advises="the judge compares the model's own answers to prompts, and the pairs are made of them (docs/objectives.md)",
    ),
    # ---- classification --------------------------------------------------------------------------------------------------
    Rule(
        "near-domain",
        "Lee 2019: data near the base's own: freeze layers (similarity > 0.8)",
        _when(kind="classification", similarity=(">", 0.8)),
        (Proposal("freezing", 1.0), Proposal("lora", 0.9)),
    ),
    Rule(
        "classification-small",
        "fedge: at most 5 classes and fewer than 1000 rows",
        _when(kind="classification", classes=("<=", 5), rows=("<", 1000)),
        (Proposal("lora", 1.0), Proposal("bitfit", 0.8), Proposal("full", 0.6)),
        {"targets": "query-value", "lora.r": 8, "training.num_train_epochs": 5.0, "training.learning_rate": 2e-5},
        measured={
            "training.learning_rate": (
                Measured(1e-3, f"{_TOO_SLOW}: accuracy 0.33 of 5 labels, 0.62 at 2e-4, 1.00 at 1e-3", below=1e9),
                Measured(2e-4, f"{_TOO_SLOW}; the default for LoRA"),
            )
        },
    ),
    Rule(
        "classification-many-classes",
        "Sun 2019, fedge: more than 20 classes: full fine-tuning of an encoder",
        _when(kind="classification", classes=(">", 20)),
        *_FULL_ENCODER,
    ),
    Rule(
        "classification-many-rows",
        "Sun 2019, fedge: more than 10 000 rows: full fine-tuning of an encoder",
        _when(kind="classification", rows=(">", 10_000)),
        *_FULL_ENCODER,
    ),
    Rule(
        "classification-between",
        "fedge: 6 to 20 classes, or 1000 to 10 000 rows",
        _when(kind="classification"),
        (Proposal("lora", 1.0), Proposal("full", 0.8), Proposal("freezing", 0.75), Proposal("bitfit", 0.7)),
        {"targets": "query-key-value-dense", "lora.r": 16},
    ),
    Rule(
        "low-memory-classification",
        "fedge: little memory and labels to learn: LoRA on an encoder",
        _when(kind="classification", consumer=True, model_kind="decoder", parameters=(">", 1_000_000_000)),
        advises="an encoder of 0.1 to 0.4 B parameters learns labels with a tenth of this memory; give its name as the base",
    ),
    Rule(
        "regression",
        "fedge: one number: as classification between few and many",
        _when(kind="regression"),
        (Proposal("lora", 1.0), Proposal("full", 0.9)),
        {"targets": "query-key-value-dense", "lora.r": 16},
    ),
    # ---- several tasks and domains ---------------------------------------------------------------------------------------
    Rule(
        "multi-domain-capacity",
        "Wu 2024, fedge: several domains in one model of more capacity: a mixture of experts",
        _when(domains=(">", 1), one_model=True),
        (Proposal("experts", 1.0), Proposal("lora", 0.8)),
        {"lora.r": 64},
    ),
    Rule(
        "many-domains",
        "fedge: many domains served together: one adapter each",
        _when(domains=(">", 1), one_model=False),
        (Proposal("lora", 1.0),),
        advises="train one adapter for each domain and swap them; a federation keeps them apart under adapters:",
    ),
    Rule(
        "rich-multi-task",
        "Raffel 2020, fedge: plenty of resources and several tasks: full fine-tuning on a mixture",
        _when(tasks=(">", 1), quality="critical", gpus=(">", 1)),
        (Proposal("full", 1.0), Proposal("adalora", 0.9)),
        {"data.temperature": 2.0},
    ),
    Rule(
        "many-tasks",
        "Zhang 2023, Raffel 2020: many tasks: AdaLoRA, or multi-task with temperature sampling",
        _when(tasks=(">", 1)),
        (Proposal("adalora", 1.0), Proposal("lora", 0.95)),
        {"data.temperature": 2.0},
        advises="name each task's rows under data.tasks: small tasks are drawn more often than their size says",
    ),
    # ---- generation ------------------------------------------------------------------------------------------------------
    Rule(
        "code",
        "Zhang 2023, fedge: code: AdaLoRA",
        _when(kind="code"),
        (Proposal("adalora", 1.0), Proposal("lora", 0.95)),
        {"targets": "all-linear"},
    ),
    Rule(
        "question-answering",
        "Hu 2021, fedge: question answering: LoRA",
        _when(kind="question-answering"),
        (Proposal("lora", 1.0),),
        {"targets": "attention", "lora.r": 16},
    ),
    Rule(
        "small-model-prompts",
        "Liu 2021: prompts on a small model: deep ones (P-tuning v2)",
        _when(answers=True, shift="small", parameters=("<", 1_000_000_000)),
        (Proposal("p-tuning-v2", 1.0), Proposal("lora", 0.9), Proposal("prompt-tuning", 0.6)),
    ),
    Rule(
        "style",
        "Lester 2021: a style or a small shift: soft prompts",
        _when(answers=True, shift="small"),
        (Proposal("prompt-tuning", 1.0), Proposal("prefix-tuning", 0.95), Proposal("lora", 0.9), Proposal("ia3", 0.8)),
    ),
    Rule(
        "near-pretraining",
        "Ben Zaken 2022: a task near pre-training: BitFit",
        _when(kind=("in", ("generation", "question-answering", "code")), shift="pretraining"),
        (Proposal("bitfit", 1.0), Proposal("lora", 0.9)),
    ),
    Rule(
        "continued-pretraining",
        "fedge: plain text in plenty: the whole model, else LoRA on all linear layers",
        _when(kind="pretraining"),
        (Proposal("full", 1.0), Proposal("lora", 0.8)),
        {"targets": "all-linear", "lora.r": 64},
    ),
    Rule(
        "creative",
        "fedge: creative: SFT then DPO, full where it fits",
        _when(kind="generation", creative=True),
        (Proposal("full", 0.95), Proposal("lora", 0.9)),
        {"targets": "all-linear", "lora.r": 32},
        advises=_SFT_THEN_DPO,
    ),
    Rule(
        "long-answers",
        "fedge: answers beyond 1024 tokens: SFT then DPO, full where it fits",
        _when(kind="generation", output_tokens=(">", 1024)),
        (Proposal("full", 0.95), Proposal("lora", 0.9)),
        {"targets": "all-linear", "lora.r": 32},
        advises=_SFT_THEN_DPO,
    ),
    Rule(
        "short-answers",
        "Hu 2021, fedge: answers of at most 128 tokens, not creative",
        _when(kind="generation", output_tokens=("<=", 128), creative=False),
        (Proposal("lora", 1.0),),
        {"targets": "attention", "lora.r": 16},
    ),
    Rule(
        "answers",
        "fedge: other answers: LoRA of rank 32 on all linear layers",
        _when(kind="generation"),
        (Proposal("lora", 1.0),),
        {"targets": "all-linear", "lora.r": 32},
    ),
    # ---- resources and situations ----------------------------------------------------------------------------------------
    Rule(
        "full-critical",
        "fedge: full fine-tuning where it fits and quality is critical",
        _when(quality="critical"),
        (Proposal("full", 1.0),),
    ),
    Rule(
        "full-data",
        "fedge: full fine-tuning where it fits and there are about 100 000 good rows",
        _when(rows=(">=", 100_000)),
        (Proposal("full", 0.97), Proposal("freezing", 0.95)),
    ),
    Rule(
        "plenty-of-data",
        "Lee 2019, fedge: middle resources and plenty of data: layer-wise freezing beside LoRA",
        _when(rows=(">=", 20_000)),
        (Proposal("freezing", 0.85),),
    ),
    Rule(
        "consumer-gpu",
        "Dettmers 2023, fedge: one consumer GPU: QLoRA where LoRA does not fit, then DPO",
        _when(gpus=1, consumer=True, answers=True, feedback="none"),
        (Proposal("lora", 0.9),),
        advises="with preference pairs, DPO is the next stage on this GPU: its reference is the base without the adapter",
    ),
    Rule(
        "prototype",
        "Lester 2021, fedge: a fast prototype: instruction tuning with soft prompts or LoRA",
        _when(situation="prototype"),
        (Proposal("lora", 0.9), Proposal("prompt-tuning", 0.85)),
        {"training.num_train_epochs": 1.0},
    ),
    Rule(
        "production",
        "fedge: production: LoRA, versioned, and DPO",
        _when(situation="production"),
        (Proposal("lora", 0.95),),
        advises="publish each adapter under a version, with its base's digest and its data card",
    ),
    Rule(
        "low-memory",
        "Lester 2021, Li and Liang 2021, fedge: where nothing better fits: prefixes or soft prompts",
        _when(answers=True),
        (Proposal("prefix-tuning", 0.5), Proposal("prompt-tuning", 0.45)),
    ),
    Rule(
        "default",
        "Hu 2021, fedge: LoRA unless something speaks against it",
        (),
        (Proposal("lora", 0.8), Proposal("full", 0.55)),
        {"targets": "all-linear", "lora.r": 16},
    ),
)

# Where sources disagree (fedge): by what trains and, for preferences, the objective.
DEFAULTS: Mapping[str, Any] = {
    "training.warmup_ratio": 0.1,
    "training.lr_scheduler_type": "cosine",
    "training.weight_decay": 0.01,
    "training.max_grad_norm": 1.0,
    "training.save_steps": 500,
}
LEARNING_RATES: Mapping[tuple[bool, bool], float] = {
    # (whole weights train, on preferences)
    (False, False): 2e-4,
    (True, False): 1e-5,
    (False, True): 5e-5,
    (True, True): 5e-6,
}
# Prompts hold few numbers and begin far from where they end (Lester 2021 trains them at 0.3 with Adafactor, PEFT's guides at
# 3e-2 and 1e-3); biases and IA3's vectors at 1e-3 and 3e-3 (Ben Zaken 2022, section 3; Liu 2022, arXiv:2205.05638).
OWN_RATES: Mapping[Method, float] = {
    "prompt-tuning": 3e-2,
    "prefix-tuning": 1e-2,
    "p-tuning-v2": 3e-2,
    "bitfit": 1e-3,
    "ia3": 3e-3,
    "bottleneck": 1e-4,
}
FROZEN_BY_SIMILARITY: tuple[tuple[float, float], ...] = ((0.8, 0.7), (0.5, 0.4), (0.0, 0.2))
# What a method can learn at best, beside full fine-tuning: our reading of the comparisons in the papers above.
CAPACITY: Mapping[Method, float] = {
    "full": 1.0,
    "lora": 0.96,
    "qlora": 0.94,
    "adalora": 0.96,
    "freezing": 0.94,
    "bottleneck": 0.93,
    "experts": 0.95,
    "xlora": 0.93,
    "ia3": 0.86,
    "p-tuning-v2": 0.86,
    "prefix-tuning": 0.82,
    "bitfit": 0.82,
    "prompt-tuning": 0.72,
}
# How much a user must know to run it and to see when it goes wrong, 1 to 5; a beginner is not handed more than 2.
COMPLEXITY: Mapping[Method, int] = {
    "lora": 1,
    "qlora": 1,
    "prompt-tuning": 2,
    "prefix-tuning": 2,
    "p-tuning-v2": 2,
    "ia3": 2,
    "bitfit": 2,
    "bottleneck": 2,
    "adalora": 3,
    "freezing": 2,
    "full": 2,
    "experts": 4,
    "xlora": 4,
}
STAGE_COMPLEXITY: Mapping[Objective, int] = {"dpo": 2, "kto": 2, "reward": 3, "rl": 5}
MOST_COMPLEX: Mapping[str, int] = {"beginner": 2, "intermediate": 3, "expert": 5}


def frozen_share(similarity: float | None) -> float:
    """Layers to freeze by how near the data is to the base's own: 70 % above 0.8, 40 % above 0.5, else 20 %."""
    return next(share for above, share in FROZEN_BY_SIMILARITY if (similarity or 0.0) > above or above == 0)
