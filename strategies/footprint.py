"""From a plan, an architecture and a machine to what memory and cost are estimated from. Pure arithmetic."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, QUANTISED, REFERRING, Plan
from strategies.architecture import Architecture
from strategies.hardware import Hardware, Kernel, Rates
from strategies.memory import Objective, Setup, Sharding

# Where LoRA attaches, by role.
Role = Literal["query-value", "query-key-value-dense", "attention", "all-linear"]
_ALIKE: Mapping[str, Objective] = {"pretraining": "sft", "distillation": "sft", "regression": "classification", "kto": "dpo"}


@dataclass(frozen=True)
class Machine:
    """What training may use.

    Attributes:
        device: Where the model computes.
        gpus: How many of them; 0 on a CPU.
        total_bytes: Memory of the smallest.
        room_bytes: What of it may be filled: free, less the margin.
        bf16: Computes in bfloat16.
        kernels: What bitsandbytes has for it.
        rates: Of one GPU, or of the CPU where they were measured; None where they are not known.
    """

    device: Literal["cuda", "cpu"]
    gpus: int
    total_bytes: int
    room_bytes: int
    bf16: bool
    kernels: frozenset[Kernel]
    rates: Rates | None

    @classmethod
    def of(cls, hardware: Hardware, margin: float = 0.1) -> "Machine":
        """The GPUs of a machine, as many as it has; without any, its CPU.

        Args:
            hardware: Found or described.
            margin: Share of the free memory that stays free.
        """
        if not hardware.gpus:
            free = int(hardware.ram_free_bytes * (1 - margin))
            kernels: frozenset[Kernel] = frozenset({"nf4", "int8"})  # bitsandbytes computes both on a CPU
            return cls("cpu", 0, hardware.ram_total_bytes, free, False, kernels, None)
        least = min(hardware.gpus, key=lambda gpu: gpu.free_bytes)
        return cls(
            "cuda",
            len(hardware.gpus),
            min(gpu.total_bytes for gpu in hardware.gpus),
            int(least.free_bytes * (1 - margin)),
            all(gpu.bf16 for gpu in hardware.gpus),
            frozenset.intersection(*(gpu.bitsandbytes for gpu in hardware.gpus)),
            least.rates,
        )

    @property
    def one(self) -> "Machine":
        """What one process trains on: a single GPU, or the CPU."""
        return replace(self, gpus=min(1, self.gpus))


def setup_of(plan: Plan, architecture: Architecture, machine: Machine, sharding: Sharding = "none") -> Setup:
    """What training a plan on a machine amounts to, with what each of several GPUs holds a share of."""
    t, quantised = plan.training, plan.precision in QUANTISED
    whole, low_rank = plan.method in COMPRESSED, plan.method in LOW_RANK
    rank = plan.update_rank if plan.method == "adalora" else plan.lora.r
    held = ("bf16" if machine.bf16 else "fp32") if quantised else plan.precision
    sent = plan.prompt.num_virtual_tokens if plan.method == "prompt-tuning" else 0
    values: dict[str, Any] = {
        "method": "full" if whole else ("qlora" if quantised else "lora") if low_rank else "adapter",
        "rank": rank,
        "targets": plan.lora.target_modules,
        "lora_dropout": plan.lora.lora_dropout,
        "trained_parameters": beside(plan, architecture),
        "frozen_share": plan.freezing.frozen_share if plan.method == "freezing" else 0.0,
        "batch": t.batch_size,
        "sequence": plan.data.max_length + sent,
        "gradient_checkpointing": t.gradient_checkpointing,
        "accumulates": t.gradient_accumulation_steps > 1,
        "optimizer": t.optim,
        "objective": _ALIKE.get(plan.objective, plan.objective),
        # A teacher's probabilities are met with whole logits; its weights: ``strategies.residents``.
        "loss": "hf" if plan.objective == "distillation" else "chunked",
        "reference": _reference(plan),
        "base_dtype": held,
        "quantization": {"nf4": "nf4-dq", "int8": "int8"}.get(plan.precision, "none"),
        "mixed_precision": "none" if t.mixed_precision == "fp32" else t.mixed_precision,
        "dropout": plan.dropout is None or plan.dropout > 0,
        "gpus": max(1, machine.gpus),
        "sharding": sharding,
        "kbit_preparation": quantised,
        "folded_experts": plan.method == "experts" and plan.experts.train != "router",
        "device": machine.device,
    }
    return Setup(**values)


def beside(plan: Plan, architecture: Architecture) -> int:
    """Parameters that a plan trains beside LoRA's factors and the base: prompts, vectors, biases, bottlenecks, a head."""
    a, h = architecture, architecture.hidden
    width = a.kv_heads * a.head_dim
    tokens = plan.prompt.num_virtual_tokens
    inner = plan.prompt.encoder_hidden_size or h
    small = max(1, h // plan.bottleneck.reduction_factor)
    places = 2 if plan.bottleneck.placement == "houlsby" else 1
    own = {
        "prompt-tuning": tokens * h,
        "p-tuning-v2": tokens * a.layers * 2 * width,
        "prefix-tuning": tokens * width + width * inner + inner + (inner + 1) * a.layers * 2 * width,
        "ia3": sum(block.count * (2 * width + max(block.intermediate, block.expert_intermediate)) for block in a.blocks),
        "bitfit": biases(a, everywhere=plan.bitfit.add_missing),
        "experts": experts_of(plan, a),
        "xlora": router_of(plan, a),
        "bottleneck": a.layers * places * (2 * h * small + small + h),
    }
    head = h * len(plan.data.labels or (0, 0)) if plan.objective == "classification" else 0
    saved = saved_whole(plan.lora.modules_to_save, a) if plan.method in LOW_RANK else 0
    return own.get(plan.method, 0) + saved + (h if plan.objective in ("regression", "reward") else head)


def saved_whole(names: Sequence[str], a: Architecture) -> int:
    """Parameters of modules that train whole beside LoRA; what is no linear layer of a block is an embedding, or as large."""
    sizes = Counter[str]()
    for block, linear in a.each_linear():
        sizes[linear.name] += block.count * linear.parameters
    return sum(sizes.get(name.rpartition(".")[2], a.vocab * a.hidden) for name in names)


def experts_of(plan: Plan, a: Architecture) -> int:
    """Factors of every expert's matrices and whole routers, as the plan has them train."""
    inside = (3 if a.gated else 2) * plan.lora.r  # gate and up are packed into one matrix, of twice the outputs
    by_block = [
        (block.count, a.experts * (inside * block.expert_intermediate + 2 * plan.lora.r * a.hidden), a.experts * a.hidden)
        for block in a.blocks
        if block.expert_intermediate
    ]
    train = plan.experts.train
    return sum(count * ((train != "router") * factors + (train != "experts") * router) for count, factors, router in by_block)


def router_of(plan: Plan, a: Architecture) -> int:
    """What weighs the adapters of a mixture, at most: as if they changed every linear layer."""
    settings = plan.xlora
    mixed = len(settings.adapters)
    shares = mixed * sum(block.count for block, _ in a.each_linear()) if settings.layerwise_scalings else mixed
    if settings.xlora_depth == 1:
        return (a.hidden + 1) * shares
    inner = settings.xlora_size
    return (a.hidden + 1) * inner + (settings.xlora_depth - 2) * (inner + 1) * inner + (inner + 1) * shares


def targets_of(role: Role, architecture: Architecture) -> Literal["all-linear"] | tuple[str, ...]:
    """The names that an architecture has for the layers of a role; where one layer projects several, that one.

    A name that other layers bear as well (BERT's ``dense``) brings these with it, as PEFT matches names.
    """
    if role == "all-linear":
        return role
    names: list[str] = []
    for block in architecture.blocks:
        inputs = [linear.name for linear in block.linears if linear.reads == "states"]
        out = [linear.name for linear in block.linears if linear.reads == "attended"]
        wanted = [inputs[0], inputs[2]] if role == "query-value" and len(inputs) >= 3 else inputs
        names += wanted if role == "query-value" else [*wanted, *out]
    return tuple(dict.fromkeys(names)) or "all-linear"


def _reference(plan: Plan) -> str:
    """What an objective compares with: the base without its adapter; where the base itself trains, what it said before."""
    if plan.objective not in REFERRING:
        return "none"
    if plan.method not in ON_THE_BASE:
        return "adapter-off"
    return "model" if plan.objective == "rl" else "precomputed"


def biases(a: Architecture, *, everywhere: bool = False) -> int:
    """Elements of a base's biases, those of its layer norms included; ``everywhere``: of every linear layer's."""
    norms = a.norms * a.hidden * a.layers if a.norm == "layer" else 0
    return norms + sum(block.count * linear.d_out for block, linear in a.each_linear() if linear.bias or everywhere)
