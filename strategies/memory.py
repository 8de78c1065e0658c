"""Peak bytes of a training step, part by part, from a model's architecture alone. Pure arithmetic; nothing is loaded.

A step is at its peak in one of five moments, and the estimate is the largest of them: while the loss is computed (all that the
layers keep, and the logits), when the backward pass enters the last layer, when it leaves the first one (all gradients exist
by then), while the optimizer steps, or, in reinforcement learning, while answers are generated. Gradient checkpointing keeps
the input of each layer and all of one layer at a time.

What a layer keeps is counted in ``activations``. The other constants, each from the code of the stack:

==========================  ==========================================================================================
logits, ``hf``              12 V bytes a token: gradient, log-softmax and its input, float32 (transformers ``loss_utils``)
logits, ``chunked``         tiles of 4096 x 32768 logits and float32 gradients (TRL ``kernels/chunked_logprob``)
logits, ``liger``           one tile of the next power of two above ``T h / V`` rows (Liger fused linear cross-entropy)
nf4                         0.5 B and a float32 scale for 64 weights; doubly quantised a byte for 64, a scale for 256 of these
int8                        1 B and a float32 scale for each row; embeddings, norms and the head are left alone; its inputs
                            stay under checkpointing (non-re-entrant), held where its hooks do not reach
experts                     transformers 5 holds them in packed parameters, which bitsandbytes does not quantise; where they
                            are adapted, each layer keeps a changed copy for the backward pass (PEFT ``ParamWrapper``), and
                            one layer has its gradient
k-bit preparation           all that is not quantised in float32 (PEFT ``prepare_model_for_kbit_training``)
LoRA                        float32 factors (PEFT ``autocast_adapter_dtype``)
Adam's step                 one more tensor list of the weights' size (torch ``_multi_tensor_adamw``); none when fused
8-bit optimizers            a byte for each moment, a float32 scale for 256; embeddings keep 32 bits (``Trainer``)
DDP                         a bucket copy of every gradient
ZeRO                        float32 weights and moments in shards (12 B); ZeRO-2 shards gradients too, ZeRO-3 all
FSDP                        everything in shards; trained weights in float32 under autocast; two layers and the root whole
cuBLAS                      two workspaces of 8.1 MiB
==========================  ==========================================================================================
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from protocol.errors import ConfigurationError
from protocol.plan import Plan
from strategies.activations import Arithmetic, Kernel, despite_checkpointing, of_layer
from strategies.architecture import Architecture

Method = Literal["full", "lora", "qlora", "adapter"]
Loss = Literal["hf", "chunked", "liger"]
Objective = Literal["sft", "classification", "dpo", "reward", "rl"]
Reference = Literal["none", "model", "adapter-off", "precomputed"]
Dtype = Literal["fp32", "bf16", "fp16"]
Quantisation = Literal["none", "nf4", "nf4-dq", "int8", "gptq4"]
Sharding = Literal["none", "zero2", "zero3", "fsdp"]
Device = Literal["cuda", "cpu"]

_BYTES: Mapping[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# PyTorch's default: 2 buffers of 4096 KiB and 8 of 16 KiB, for the threads of the forward and of the backward pass.
_WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 1024
# The caching allocator rounds and splits: reserved over allocated bytes of published runs (benchmarks/memory_points.csv).
FRAGMENTATION = 1.06
# glibc's heap around freed tensors: 1.36 to 1.67 measured (benchmarks/LOG.md); ``strategies.allocator`` can do without it.
HEAP = 1.7
# Kernels and handles of a CUDA 12 process, loaded lazily; they were over 1 GB up to CUDA 11.6.
CONTEXT = 500_000_000
_TILE_TOKENS, _TILE_COLUMNS = 4096, 32768
_MOST = 2**40  # of any count in a setup: far beyond every machine, and products of such still fit a float
_BUCKET = 500_000_000  # DeepSpeed's default reduce and gather buckets, in elements


@dataclass(frozen=True)
class Optimizer:
    """What one of ``transformers.OptimizerNames`` holds.

    Attributes:
        states: Tensors of the weights' shape.
        bits: Of an element of these; None for those of the weight itself.
        temporaries: Tensor lists of the weights' size that exist while it steps, on CUDA.
        paged: The states may leave the GPU when memory is short, so they do not count there.
        factored: Keeps sums of rows and columns in place of the second moment.
    """

    states: int
    bits: int | None = None
    temporaries: int = 0
    paged: bool = False
    factored: bool = False


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": Optimizer(2, temporaries=1),
    "adamw_torch_fused": Optimizer(2),
    "adamw_torch_8bit": Optimizer(2, 8),
    "adamw_torch_4bit": Optimizer(2, 4),
    "adamw_8bit": Optimizer(2, 8),
    "adamw_bnb_8bit": Optimizer(2, 8),
    "paged_adamw_32bit": Optimizer(2, 32, paged=True),
    "paged_adamw_8bit": Optimizer(2, 8, paged=True),
    "ademamix": Optimizer(3, 32),
    "ademamix_8bit": Optimizer(3, 8),
    "paged_ademamix_32bit": Optimizer(3, 32, paged=True),
    "paged_ademamix_8bit": Optimizer(3, 8, paged=True),
    "lion_32bit": Optimizer(1, 32),
    "lion_8bit": Optimizer(1, 8),
    "paged_lion_32bit": Optimizer(1, 32, paged=True),
    "paged_lion_8bit": Optimizer(1, 8, paged=True),
    "adafactor": Optimizer(0, factored=True),
    "adagrad": Optimizer(1, temporaries=1),
    "rmsprop": Optimizer(1, temporaries=1),
    "rmsprop_bnb": Optimizer(1, 32),
    "rmsprop_bnb_8bit": Optimizer(1, 8),
    "rmsprop_bnb_32bit": Optimizer(1, 32),
    "sgd": Optimizer(0),
}


@dataclass(frozen=True)
class Setup:
    """How a model is trained; names are those of Hugging Face's libraries.

    Attributes:
        method: ``adapter`` stands for any small set of trained parameters (prompts, IA3, biases): ``trained_parameters``.
        rank: Of LoRA.
        targets: Module names, or every linear layer but the head.
        lora_dropout: Of LoRA's input.
        trained_parameters: Trained besides: of ``adapter``, a classifier's head, embeddings that are saved whole; in float32.
        frozen_share: Of full fine-tuning's layers; those below keep activations all the same here, which is too much.
        batch: Rows of one step on one GPU; a preference pair is one row.
        sequence: Tokens of a row, padding included.
        gradient_checkpointing: Layers are computed again in the backward pass.
        accumulates: Gradients stay while the next rows are computed.
        optimizer: One of ``OPTIMIZERS``.
        loss: How the language model's loss meets the logits.
        reference: What DPO and RL compare with: a second copy of the model, this one without its adapter, stored numbers.
        base_dtype: Of weights that are not quantised.
        quantization: Of the base's linear layers.
        mixed_precision: Autocast's type.
        attention: Kernel.
        dropout: The base drops out while it trains, if its configuration says so.
        kbit_preparation: ``prepare_model_for_kbit_training`` was called.
        folded_experts: Adapted ones: PEFT computes with the sum of each packed parameter and its change, a copy for each layer.
        packed_experts: As transformers 5 holds experts; before, each was a linear layer of its own.
        device: The GPU's allocator and kernels, or a CPU's.
    """

    method: Method = "lora"
    rank: int = 16
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    trained_parameters: int = 0
    frozen_share: float = 0.0
    batch: int = 1
    sequence: int = 512
    gradient_checkpointing: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"
    loss: Loss = "chunked"
    objective: Objective = "sft"
    reference: Reference = "none"
    base_dtype: Dtype = "bf16"
    quantization: Quantisation = "none"
    mixed_precision: Literal["none", "bf16", "fp16"] = "none"
    attention: Kernel = "sdpa"
    dropout: bool = True
    gpus: int = 1
    sharding: Sharding = "none"
    kbit_preparation: bool = False
    packed_experts: bool = True
    folded_experts: bool = False
    device: Device = "cuda"

    def __post_init__(self) -> None:
        if problems := [*self._values(), *self._pairs()]:
            raise ConfigurationError("memory", problems)

    @staticmethod
    def of(plan: Plan, **changes: Any) -> "Setup":
        """The setup that training a plan amounts to; ``changes`` are fields of ``Setup`` that a plan does not say."""
        t, quantised = plan.training, {"nf4": "nf4-dq", "int8": "int8"}.get(plan.precision, "none")
        values = {
            "method": plan.method,
            "rank": plan.lora.r,
            "targets": plan.lora.target_modules,
            "lora_dropout": plan.lora.lora_dropout,
            "batch": t.batch_size,
            "sequence": plan.data.max_length,
            "gradient_checkpointing": t.gradient_checkpointing,
            "accumulates": t.gradient_accumulation_steps > 1,
            "optimizer": t.optim,
            "objective": plan.objective,
            "base_dtype": "bf16" if quantised != "none" else plan.precision,
            "quantization": quantised,
            "mixed_precision": "none" if t.mixed_precision == "fp32" else t.mixed_precision,
            "dropout": plan.dropout is None or plan.dropout > 0,
            "kbit_preparation": quantised != "none",
        }
        return Setup(**(values | changes))

    def _values(self) -> list[str]:
        kinds = {item.name: _HINTS[item.name] for item in fields(self) if item.name in _HINTS}
        problems = [
            f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
            for name, allowed in kinds.items()
            if getattr(self, name) not in allowed
        ]
        whole = {"rank": 1, "batch": 1, "sequence": 1, "gpus": 1, "trained_parameters": 0}
        problems += [
            f"{name}: found {value!r}, expected a whole number from {least} to {_MOST}"
            for name, least in whole.items()
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or not least <= value <= _MOST
        ]
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout: found {self.lora_dropout!r}, expected at least 0 and less than 1")
        if not 0 <= self.frozen_share < 1:
            problems.append(f"frozen_share: found {self.frozen_share!r}, expected at least 0 and less than 1")
        if not self.targets:
            problems.append("targets: empty; name at least one module, or all-linear")
        return problems

    def _pairs(self) -> list[str]:
        quantised, problems = self.quantization != "none", []
        if self.method == "qlora" and not quantised:
            problems.append("method qlora: needs a quantization (nf4, nf4-dq, int8, gptq4), or choose method lora")
        if self.method == "full" and quantised:
            problems.append(
                f"method full: weights held as {self.quantization} cannot be trained; use quantization none, or qlora"
            )
        if self.method == "adapter" and not self.trained_parameters:
            problems.append("method adapter: needs trained_parameters")
        if self.frozen_share and self.method != "full":
            problems.append(f"frozen_share: is for method full, found {self.method}")
        if self.kbit_preparation and not quantised:
            problems.append("kbit_preparation: is for a quantised base; found quantization none")
        if self.reference not in ("none", "precomputed") and self.objective not in ("dpo", "rl"):
            problems.append(f"reference {self.reference}: is for the objectives dpo and rl, found {self.objective}")
        if self.reference == "adapter-off" and self.method == "full":
            problems.append("reference adapter-off: full fine-tuning has no adapter to switch off; use model or precomputed")
        if self.device == "cpu" and self.gpus > 1:
            problems.append(f"gpus: found {self.gpus} on device cpu, expected 1; or choose device cuda")
        if self.sharding != "none" and (self.gpus == 1 or self.device == "cpu"):
            problems.append(f"sharding {self.sharding}: needs several GPUs, found {self.gpus} on {self.device}")
        return problems


_HINTS: Mapping[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "optimizer": tuple(OPTIMIZERS),
    "loss": get_args(Loss),
    "objective": get_args(Objective),
    "reference": get_args(Reference),
    "base_dtype": get_args(Dtype),
    "quantization": get_args(Quantisation),
    "mixed_precision": ("none", "bf16", "fp16"),
    "attention": get_args(Kernel),
    "sharding": get_args(Sharding),
    "device": get_args(Device),
}


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU (or of the process, on a CPU) at the peak of a step.

    Attributes:
        peak_bytes: Allocated (``torch.cuda.max_memory_allocated``); the sum of ``parts``.
        reserved_bytes: With what the allocator cannot reuse (``max_memory_reserved``; on a CPU, what stays resident).
        device_bytes: With the context: what ``nvidia-smi`` shows, and what must fit.
        parts: Bytes by part at the moment of the peak.
        moment: When that is.
        trained_parameters: Elements that train, over all GPUs.
    """

    peak_bytes: int
    reserved_bytes: int
    device_bytes: int
    parts: Mapping[str, int] = field(hash=False)
    moment: str
    trained_parameters: int


def estimate(architecture: Architecture, setup: Setup) -> Estimate:
    """The peak of one training step.

    More rows, tokens, rank or trained parameters never need less.

    Raises:
        ModelError: A LoRA target is no linear layer of this architecture.
    """
    step = _Step(architecture, setup)
    moments = {name: {part: math.ceil(size) for part, size in parts.items()} for name, parts in step.moments().items()}
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    peak = sum(parts.values())
    on_gpu = setup.device == "cuda"
    reserved = math.ceil(peak * (FRAGMENTATION if on_gpu else HEAP))
    whole = reserved + (CONTEXT if on_gpu else 0)
    return Estimate(peak, reserved, whole, {part: size for part, size in parts.items() if size}, moment, step.trained)


class _Step:
    """The sizes that the moments of a step share."""

    def __init__(self, architecture: Architecture, setup: Setup) -> None:
        self.a, self.s = architecture, setup
        self.full = setup.method == "full"
        self.kind = OPTIMIZERS[setup.optimizer]
        self.stored = _BYTES[setup.base_dtype]
        self.autocast = setup.mixed_precision != "none"
        pairs = setup.objective in ("dpo", "reward")
        self.tokens = setup.batch * setup.sequence * (2 if pairs else 1)
        self.language = setup.objective in ("sft", "dpo", "rl")
        if setup.sharding == "fsdp" and self.full and self.autocast:
            self.stored = 4  # accelerate keeps trained weights in float32
        # With k-bit preparation embeddings and norms are float32, and so is everything between the quantised layers.
        # FSDP hands out 16-bit weights under mixed precision, so the stream has 16 bits too.
        self.whole_bf16 = setup.sharding == "fsdp" and self.autocast and not setup.kbit_preparation
        self.stream = 4 if setup.kbit_preparation else 2 if self.whole_bf16 else self.stored
        quantised = setup.quantization != "none"
        self.compute = 2 if self.autocast and not quantised else self.stream
        self.adapted = () if setup.method not in ("lora", "qlora") else architecture.targets(setup.targets)
        factors = sum(block.count * setup.rank * (layer.d_in + layer.d_out) for block, layer in self.adapted)
        self.head = architecture.head_parameters if self.language else 0
        self.base = architecture.parameters - architecture.head_parameters + self.head
        self.added = factors + setup.trained_parameters
        layers = sum(architecture.parts[part] for part in ("linears", "experts", "norms"))
        stays = architecture.embedding_parameters * (setup.frozen_share > 0) + setup.frozen_share * layers
        self.base_trained = max(0, math.ceil(self.base - stays)) if self.full else 0
        self.trained = self.base_trained + self.added
        self.shards = setup.gpus if setup.sharding in ("zero3", "fsdp") else 1
        self.arithmetic = self._arithmetic()

    def moments(self) -> dict[str, dict[str, float]]:
        held = self._held()
        gradients = self._gradients()
        always = gradients if self.s.accumulates else 0.0
        if self.s.gpus > 1 and self.s.sharding == "none":
            held["communication"] = held.get("communication", 0.0) + gradients
        kept, one_layer, entering = self._kept()
        head_gradient = self._head_gradient()
        live = self._live()
        found = {
            "loss": held | {"gradients": always, "activations": kept, "logits": self._logits(), "gathered": live},
            "last layer": held | {"gradients": max(always, head_gradient), "activations": entering, "gathered": live},
            "first layer": held | {"gradients": gradients, "activations": one_layer, "gathered": live},
            "optimizer step": held | {"gradients": gradients, "step": self._step_temporaries()},
        }
        if self.s.objective == "rl":
            cache = 2 * 2 * self.a.kv_heads * self.a.head_dim * self.a.layers * self.tokens
            found["generation"] = held | {"gradients": always, "cache": cache, "gathered": live}
        return found

    def _arithmetic(self) -> Arithmetic:
        targets: Counter[tuple[Any, str]] = Counter()
        for block, layer in self.adapted:
            targets[block, layer.reads] += 1
        s = self.s
        return Arithmetic(
            stream=self.stream,
            compute=self.compute,
            autocast=self.autocast,
            trains=self.full,
            keeps_input=s.quantization == "int8",
            rank=s.rank if self.adapted else 0,
            targets=targets,
            adapter_dropout=s.lora_dropout > 0,
            dropout=s.dropout,
            kernel=s.attention,
            fused_dropout=s.device == "cuda",
        )

    def _held(self) -> dict[str, float]:
        """What is there through the whole step."""
        s = self.s
        other = 4 if s.kbit_preparation else self.stored
        weights = self._weights(other)
        held = {
            "weights": weights / self.shards,
            "adapters": 4 * self.added / self.shards,
            "optimizer": self._states(),
        }
        if s.objective in ("dpo", "rl") and s.reference == "model":
            held["reference"] = self._weights(self.stored) / self.shards
        if s.objective == "rl":
            held["reward model"] = self.base * self.stored / self.shards
        if s.device == "cuda":
            held["workspace"] = _WORKSPACE
        if s.sharding == "zero2":
            held["communication"] = 2 * 2 * min(self.trained, _BUCKET)
        return held

    def _weights(self, other: int) -> float:
        """Bytes of the base: linear layers as they are quantised, all else in ``other`` bytes an element."""
        rest = self.base
        total = 0.0
        if self.s.quantization != "none":
            for block, layer in self.a.each_linear():
                rest -= block.count * layer.weights
                total += block.count * self._packed(layer.weights, layer.d_in, layer.d_out)
            if not self.s.packed_experts:
                for block in self.a.blocks:
                    count = self.a.expert_weights(block)
                    rest -= block.count * count
                    total += block.count * self._packed(count, self.a.hidden, max(1, count // self.a.hidden))
        return total + rest * other

    def _packed(self, weights: int, d_in: int, d_out: int) -> float:
        sizes: dict[str, float] = {
            "nf4": weights * (0.5 + 4 / 64),
            "nf4-dq": weights * (0.5 + 1 / 64 + 4 / (64 * 256)),
            "int8": weights + 4 * d_out,
            "gptq4": weights * (0.5 + (2 + 0.5) / 128) + 4 * d_in,  # groups of 128: a 16-bit scale, a 4-bit zero; an index
        }
        return sizes[self.s.quantization]

    def _trained_bytes(self) -> float:
        """Bytes of all that trains, in its own type."""
        return self.base_trained * self.stored + 4 * self.added

    def _gradients(self) -> float:
        sharded = self.s.sharding != "none"
        return self._trained_bytes() / (self.s.gpus if sharded else 1)

    def _head_gradient(self) -> float:
        return (self.head or self.a.vocab * self.a.hidden * self.a.tied * self.language) * self.stored * self.full / self.shards

    def _states(self) -> float:
        s, kind = self.s, self.kind
        if kind.paged:
            return 0.0
        shards = s.gpus if s.sharding != "none" else 1
        if s.sharding in ("zero2", "zero3"):
            # DeepSpeed holds float32 weights beside those that compute.
            return (4 + 4 * kind.states) * self.trained / shards
        if kind.factored:
            return 4 * self._factored() / shards
        if kind.bits is None:
            return kind.states * self._trained_bytes() / shards
        if kind.bits == 32:
            return kind.states * 4 * self.trained / shards
        whole = self.a.vocab * self.a.hidden if self.full and not s.optimizer.startswith("adamw_torch") else 0
        small = kind.bits / 8 + 4 / (256 if kind.bits == 8 else 128)
        return kind.states * (4 * whole + small * (self.trained - whole)) / shards

    def _factored(self) -> float:
        """Sums of rows and columns of every matrix that trains."""
        if not self.full:
            return sum(block.count * (2 * self.s.rank + layer.d_in + layer.d_out) for block, layer in self.adapted)
        linears = sum(block.count * (layer.d_in + layer.d_out) for block, layer in self.a.each_linear())
        return linears + 2 * (self.a.vocab + self.a.hidden)

    def _step_temporaries(self) -> float:
        largest = max([self.a.vocab * self.a.hidden, *(layer.weights for _, layer in self.a.each_linear())])
        if self.kind.factored:
            return 3 * 4 * (largest if self.full else self.s.rank * self.a.intermediate)  # one tensor after the other
        if self.s.device == "cpu":
            return self.kind.temporaries * 2 * 4 * min(largest, self.trained)  # no tensor lists on a CPU
        shards = self.s.gpus if self.s.sharding != "none" else 1
        return self.kind.temporaries * self._trained_bytes() / shards

    def _kept(self) -> tuple[float, float, float]:
        """Activations at the loss, when the first layer's backward pass runs, and when the last one's does."""
        a, s, tokens = self.a, self.s, self.tokens
        layers = [(block.count, of_layer(a, block, self.arithmetic, s.sequence)) for block in a.blocks]
        widest = max(kept.saved + kept.passing for _, kept in layers)
        final = (4 + self.stream if a.norm == "rms" else 2 * self.stream) * a.hidden
        constant = self._constant()
        inputs: float = self.stream * a.hidden * a.layers
        inputs += sum(block.count * despite_checkpointing(a, block, self.arithmetic) for block in a.blocks)
        if s.gradient_checkpointing:
            return (
                tokens * (inputs + final) + constant["forward"],
                tokens * (self.stream * a.hidden + widest) + constant["layer"],
                tokens * (inputs + widest) + constant["layer"],
            )
        saved = sum(count * kept.saved for count, kept in layers)
        passing = max(kept.passing for _, kept in layers)
        return (
            tokens * (saved + final) + constant["forward"],
            tokens * widest + constant["layer"],
            tokens * (saved + passing) + constant["forward"] + constant["layer"],
        )

    def _constant(self) -> dict[str, float]:
        """Copies of weights: in 16 bits under autocast over float32 ones, and of a quantised layer while it computes."""
        copies, folded = self._copies(), self._folded()
        return {moment: copies[moment] + folded[moment] for moment in copies}

    def _folded(self) -> dict[str, float]:
        """Of experts that are adapted: weights with their change, of every layer or (checkpointing) of the one at work."""
        if not self.s.folded_experts:
            return {"forward": 0.0, "layer": 0.0}
        held = 4 if self.s.kbit_preparation else self.stored
        each = [(block.count, held * self.a.expert_weights(block)) for block in self.a.blocks]
        one = max((size for _, size in each), default=0.0)
        if self.s.gradient_checkpointing:
            return {"forward": one, "layer": 2 * one}
        return {"forward": sum(count * size for count, size in each), "layer": one}

    def _copies(self) -> dict[str, float]:
        a, s = self.a, self.s
        largest = max((layer.weights for _, layer in a.each_linear()), default=0)
        if s.quantization != "none":
            return {"forward": 0.0, "layer": self.compute * largest}
        if not (self.autocast and self.stored == 4) or self.whole_bf16:
            return {"forward": 0.0, "layer": 0.0}
        every = 2 * sum(block.count * layer.weights for block, layer in a.each_linear()) / self.shards
        one = 2 * max(sum(layer.weights for layer in block.linears) for block in a.blocks)
        # Autocast keeps copies of weights that train until the forward pass ends; autograd keeps all that it needs.
        keeps = self.full or not s.gradient_checkpointing
        return {"forward": every if keeps else one, "layer": one}

    def _logits(self) -> float:
        a, s, tokens = self.a, self.s, self.tokens
        if not self.language:
            return 0.0
        computed = 2 if self.autocast else self.stream
        head = a.vocab * a.hidden * self.full
        if s.loss == "hf":
            return 12.0 * tokens * a.vocab
        if s.loss == "chunked":
            rows = min(tokens, _TILE_TOKENS)
            tile = rows * _TILE_COLUMNS * computed + 4 * 5 * rows * min(a.vocab, _TILE_COLUMNS) * (s.device == "cpu")
            return tile + (4 + self.stream) * a.hidden * tokens + (4 + self.stored) * head
        rows = 1 << math.ceil(math.log2(max(1, math.ceil(tokens / math.ceil(a.vocab / a.hidden)))))
        return min(rows, 2 * tokens) * a.vocab * computed + self.stream * a.hidden * tokens + self.stored * head

    def _live(self) -> float:
        """Weights that are whole while a sharded model computes: two layers (one is fetched ahead) and the root."""
        if self.shards == 1:
            return 0.0
        other = 2 if self.autocast else self.stored
        layer = max(
            sum(
                self._packed(x.weights, x.d_in, x.d_out) if self.s.quantization != "none" else x.weights * other
                for x in b.linears
            )
            + self.a.expert_weights(b) * other
            for b in self.a.blocks
        )
        return 2 * layer + (self.a.embedding_parameters + self.head) * other


def largest_batch(architecture: Architecture, setup: Setup, room_bytes: int) -> int:
    """The largest batch whose ``device_bytes`` fit; 0 when one row does not."""
    if estimate(architecture, replace(setup, batch=1)).device_bytes > room_bytes:
        return 0
    low, high = 1, 2
    while high <= 2**20 and estimate(architecture, replace(setup, batch=high)).device_bytes <= room_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = estimate(architecture, replace(setup, batch=middle)).device_bytes <= room_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low
