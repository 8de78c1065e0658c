"""Seconds, energy and money of training, part by part, from a model's architecture and a device's rates. Pure arithmetic.

A step is the sum of what its parts take on the device, or the time that Python needs to start their operations, whichever is
longer: small batches wait for the processor. Each part is a roofline (Williams 2009, doi:10.1145/1498765.1498785): products at
a share of the device's floating-point rate that grows with the tokens (``utilisation``), everything else at a share of its
memory's bandwidth. What a layer does is counted in ``operations``; the constants below come from public measurements and were
set on the development half of ``benchmarks/time_points.csv``.

A frozen weight costs one product forward and one backward (for the gradient of its input), a trained one a second backward;
checkpointing repeats the forward pass. A quantised weight is dequantised in every pass, whatever the batch: at an equal batch
QLoRA is slower than LoRA of the same arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from strategies import memory
from strategies.architecture import Architecture
from strategies.hardware import Rates, Type
from strategies.memory import OPTIMIZERS, Setup
from strategies.operations import Product, Types, Work, of_head, of_layer

# Share of the largest products' rate that a model's own shapes reach.
_SHAPES = 0.9
# Share of the nominal bandwidth that streaming operations reach.
_STREAMED = 0.8
# Share of the 16-bit rate that fused attention reaches (FlashAttention-2, Dao 2023, arXiv:2307.08691: 50 to 73 % of an A100).
_ATTENTION = 0.55
_ATTENTION_BACKWARD = 2.5  # five products in place of two: the scores are computed again; 2 where they were kept
# Seconds that Python and PyTorch need to start one forward operation. Writing one token at a time takes 0.77 ms for the 40 of
# each layer, the same for 1.8, 7 and 14 billion parameters (Qwen's README, inference performance): 20 us, without autograd.
_START = {"cuda": 30e-6, "cpu": 20e-6}
_BACKWARD_STARTS = 0.6  # the backward pass starts about as many operations, from C++
_MICRO_STEP = {"cuda": 25e-3, "cpu": 10e-3}  # data, loss, and what the trainer does for each batch
# Bytes of traffic that take as long as dequantising one weight. Nothing would need more than 0.5 + 2 for nf4; bitsandbytes'
# kernels need more (litgpt's and SWIFT's published pairs).
_DEQUANTISED = {"none": 0.0, "nf4": 14.0, "nf4-dq": 15.0, "int8": 8.0, "gptq4": 14.0}
_REACHED_LINK = 0.7
_GIGA_HOUR = 3.6e6


@dataclass(frozen=True)
class Prices:
    """What training is paid with; None where it is not said.

    Attributes:
        gpu_hour: One GPU (or the CPU) for an hour.
        kwh: A kilowatt-hour.
    """

    gpu_hour: float | None = None
    kwh: float | None = None


class Calibrated(Protocol):
    """What was measured on this machine (``calibration.Calibration``)."""

    @property
    def source(self) -> str:
        """Where and when."""

    def time_factor(self, setup: Setup) -> float | None:
        """Measured over estimated seconds; None where nothing alike was measured."""


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        step_seconds: Of one optimizer step, accumulation included.
        total_seconds: Of all steps.
        tokens_per_second: Over all GPUs, padding included.
        energy_joules: Of the boards at their limit, so an upper bound; None where the device's power is not known.
        money: None where no price was given, or where the power is not known that a price of energy needs.
        parts: Seconds of one step by part; they sum to ``step_seconds``.
        source: Whether the figures are nominal or were corrected by a calibration, and which.
    """

    step_seconds: float
    total_seconds: float
    tokens_per_second: float
    energy_joules: float | None
    money: float | None
    parts: Mapping[str, float] = field(hash=False)
    source: str


def estimate(
    architecture: Architecture,
    setup: Setup,
    rates: Rates,
    *,
    steps: int,
    accumulation: int = 1,
    completion: int | None = None,
    prices: Prices | None = None,
    calibration: Calibrated | None = None,
) -> Cost:
    """What training takes on ``setup.gpus`` devices of these rates.

    More rows, tokens, rank or steps never take less.

    Args:
        architecture: The model.
        setup: How it is trained.
        rates: Of one GPU, or of the CPU.
        steps: Optimizer steps.
        accumulation: Batches for each of them.
        completion: Reinforcement learning: tokens of a row that the model writes itself; without it half of them.
        prices: For ``money``.
        calibration: Corrects the seconds where it measured something alike.

    Raises:
        ModelError: A LoRA target is no linear layer of this architecture.
    """
    step = _Step(architecture, setup, rates)
    batch = step.of_a_batch(completion)
    parts = {name: accumulation * seconds for name, seconds in batch.items()} | step.of_an_update(batch)
    factor = calibration.time_factor(setup) if calibration else None
    parts = {name: seconds * (factor or 1.0) for name, seconds in parts.items() if seconds}
    seconds = sum(parts.values())
    hours = steps * seconds * setup.gpus / 3600
    joules = None if rates.watts is None else hours * 3600 * rates.watts
    return Cost(
        step_seconds=seconds,
        total_seconds=steps * seconds,
        tokens_per_second=step.tokens * accumulation * setup.gpus / seconds,
        energy_joules=joules,
        money=_money(prices or Prices(), hours, joules),
        parts=parts,
        source=f"calibrated: {calibration.source}" if calibration and factor else f"nominal: {rates.source}",
    )


def utilisation(rates: Rates, tokens: float, bits: int) -> float:
    """Share of the nominal rate that products with ``tokens`` rows reach.

    A product reads each weight once whatever the rows, so few of them wait for memory: half of the largest share is reached
    where reading the weights takes as long as multiplying with them (the ridge of the roofline, 100 to 250 tokens).

    Args:
        rates: Of the device.
        tokens: Rows of the product, above 0.
        bits: Of an element: 16 or 32.
    """
    most = _most(rates, bits)
    half = most * _rate(rates, bits) * (bits / 8) / (2 * rates.bandwidth)
    return most * tokens / (tokens + half)


def _type(rates: Rates, bits: int) -> Type:
    """What is computed: a device without bfloat16 has float16 or, with neither, float32."""
    if bits == 32:
        return "fp32"
    return next((kind for kind in ("bf16", "fp16") if kind in rates.flops), "fp32")


def _most(rates: Rates, bits: int) -> float:
    return _SHAPES * rates.achieved.get(_type(rates, bits), 1.0)


def _rate(rates: Rates, bits: int) -> float:
    return rates.flops[_type(rates, bits)]


def _money(prices: Prices, hours: float, joules: float | None) -> float | None:
    if prices.gpu_hour is None and prices.kwh is None:
        return None
    if prices.kwh is not None and joules is None:
        return None
    return (prices.gpu_hour or 0.0) * hours + (prices.kwh or 0.0) * (joules or 0.0) / _GIGA_HOUR


class _Step:
    """What the parts of a step share."""

    def __init__(self, architecture: Architecture, setup: Setup, rates: Rates) -> None:
        self.a, self.s, self.r = architecture, setup, rates
        pairs = setup.objective in ("dpo", "reward")
        self.tokens = setup.batch * setup.sequence * (2 if pairs else 1)
        self.layers = [(block.count, of_layer(architecture, block, setup)) for block in architecture.blocks]
        self.head = of_head(architecture, setup) if setup.objective in ("sft", "dpo", "rl") else None
        self.trained_share = 1.0 - setup.frozen_share if setup.method == "full" else 0.0
        self.trained = memory.estimate(architecture, setup).trained_parameters
        stored = 4 if setup.base_dtype == "fp32" else 2
        self.trained_bytes = self.trained * (stored if setup.method == "full" else 4)
        self.stored = stored

    def of_a_batch(self, completion: int | None) -> dict[str, float]:
        """Seconds of one batch's forward and backward pass on each device, by part."""
        t, again = self.tokens, self.s.gradient_checkpointing
        passes = 2 + again
        parts = {
            "forward": self._forward(t) + self._head(t),
            "recomputation": self._forward(t) * again,
            "backward": self._backward(t) + self._head(t, backward=True),
            "dequantisation": passes * self._dequantised(),
            "adapter overhead": (passes + 1) * self._adapters(t),
        }
        starts = (1 + again + _BACKWARD_STARTS) * self._starts(adapters=True) + _MICRO_STEP[self.s.device]
        if self.s.reference in ("model", "adapter-off"):
            parts["reference"] = self._scored(t)
            starts += self._starts(adapters=False)
        if self.s.objective == "rl":
            parts["reward model"] = self._scored(t)
            starts += self._starts(adapters=False)
        device = sum(parts.values())
        if self.s.sharding in ("zero3", "fsdp"):
            parts["communication"] = max(0.0, self._gathered(passes) - device)
        waits = max(0.0, starts - device - parts.get("communication", 0.0))
        parts["starting operations"] = starts if self.s.device == "cpu" else waits
        if self.s.objective == "rl":
            parts["generation"] = self._generated(completion or self.s.sequence // 2)
        return parts

    def of_an_update(self, batch: Mapping[str, float]) -> dict[str, float]:
        """Seconds of the optimizer step, and of the exchange of gradients that the last batch's backward pass does not hide."""
        sharded = self.s.gpus if self.s.sharding != "none" else 1
        parts = {"optimizer": self._moved(self._updated_bytes() / sharded)}
        if self.s.gpus > 1:
            exchanged = self.trained_bytes * (self.s.gpus - 1) / self.s.gpus
            exchanged *= 1 if self.s.sharding in ("zero3", "fsdp") else 2
            sent = exchanged / (self.r.link * _REACHED_LINK)
            backward = (sum(batch.values()) - batch.get("generation", 0.0)) / 2  # about half of a pass, whatever slows it down
            parts["exchange"] = max(0.0, sent - backward)
        return parts

    def _forward(self, tokens: float) -> float:
        return sum(count * self._layer(work, tokens) for count, work in self.layers)

    def _layer(self, work: Work, tokens: float) -> float:
        products = sum(self._product(product, tokens) for product in work.products)
        attention = tokens * work.attention_flops / self._attention_rate()
        return products + attention + self._moved(tokens * work.moved_bytes + 6 * work.cast_weights)

    def _backward(self, tokens: float) -> float:
        total = 0.0
        for count, work in self.layers:
            products = sum(self._product(product, tokens) for product in work.products) * (1 + self.trained_share)
            again = 2.0 if self.s.attention == "eager" else _ATTENTION_BACKWARD
            attention = again * tokens * work.attention_flops / self._attention_rate()
            total += count * (products + attention + self._moved(2 * tokens * work.moved_bytes))
        return total

    def _head(self, tokens: float, *, backward: bool = False) -> float:
        if self.head is None:
            return 0.0
        product, moved = self.head
        trained = self.trained_share if self.a.head_parameters or self.a.tied else 0.0
        tiles = self.s.loss == "chunked"  # computes them again for the gradient
        return self._product(product, tokens) * (1 + (trained + tiles) * backward) + self._moved(tokens * moved / 2)

    def _scored(self, tokens: float) -> float:
        """A forward pass without an adapter, such as a reference or a reward model needs."""
        return self._forward(tokens) + self._head(tokens) + self._dequantised()

    def _dequantised(self) -> float:
        weights = sum(count * work.packed_weights for count, work in self.layers)
        return self._moved(weights * _DEQUANTISED[self.s.quantization])

    def _adapters(self, tokens: float) -> float:
        total = 0.0
        for count, work in self.layers:
            products = sum(self._product(product, tokens) for product in work.adapters)
            total += count * (products + self._moved(tokens * work.adapter_bytes))
        return total

    def _starts(self, *, adapters: bool) -> float:
        each = sum(count * (work.operations + work.adapter_operations * adapters) for count, work in self.layers)
        return each * _START[self.s.device]

    def _generated(self, tokens: int) -> float:
        """Answers are written a token at a time: each reads every weight and what was written before."""
        rows = self.s.batch
        cache = 2 * 2 * self.a.kv_heads * self.a.head_dim * self.a.layers * self.s.sequence * rows
        one = self._scored(rows) + self._adapters(rows) + self._moved(cache)
        starts = self._starts(adapters=True)
        return tokens * (one + starts if self.s.device == "cpu" else max(one, starts))

    def _product(self, product: Product, tokens: float) -> float:
        """Seconds of a product, forward: at its share of the rate, or as fast as its input and output move."""
        bits, rows = product.bits, tokens * product.share
        rate = _rate(self.r, bits) * _most(self.r, bits)
        ends = rows * (product.d_in + product.d_out) * product.count * bits / 8
        touched = min(1.0, tokens * product.share) if product.share < 1 else 1.0
        weights = product.d_in * product.d_out * product.count * touched * bits / 8
        return max(product.flops * tokens / rate, self._moved(ends)) + weights / self.r.bandwidth

    def _attention_rate(self) -> float:
        compute = Types.of(self.s).compute
        if self.s.attention == "eager":
            return _rate(self.r, 8 * compute) * _most(self.r, 8 * compute)
        return _rate(self.r, 8 * compute) * min(1.0, _most(self.r, 8 * compute)) * _ATTENTION

    def _moved(self, size: float) -> float:
        return size / (self.r.bandwidth * _STREAMED)

    def _gathered(self, passes: int) -> float:
        """Seconds to gather a sharded model's weights for each pass."""
        whole = self.a.parameters * self.stored * (self.s.gpus - 1) / self.s.gpus
        return passes * whole / (self.r.link * _REACHED_LINK)

    def _updated_bytes(self) -> float:
        """Read and written by clipping and the optimizer."""
        kind = OPTIMIZERS[self.s.optimizer]
        each = self.trained_bytes / max(1, self.trained)
        if kind.factored:
            passes = 16 * each
        elif kind.bits is not None:
            passes = 3 * each + 2 * kind.states * kind.bits / 8
        elif kind.temporaries:
            passes = (6 + 7 * kind.states) * each  # a kernel for each arithmetic operation of the formula
        else:
            passes = (3 + 2 * kind.states) * each
        return self.trained * (passes + 3 * each)
