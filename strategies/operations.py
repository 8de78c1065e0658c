"""What one layer computes, moves and starts in its forward pass, counted operation by operation from transformers and PEFT.

The counterpart of ``activations``, for time in place of memory. Three kinds of work take time on a device, and each is counted
apart: multiplications (floating-point operations of matrix products), bytes that the operations between them read and write,
and the operations themselves, which Python starts one by one. ``h`` is the width of the residual stream, ``i`` that inside the
MLP. What is counted, in bytes for each token, ``s`` being those of an element of the stream and ``c`` of what is computed:

- an RMS norm is composed by transformers: to float32 and back (``4 + s`` each, from 16 bits), square, mean, product, weight;
  a layer norm is one kernel;
- rotary positions are composed: two products, a rotated copy, a sum, for queries and for keys;
- a gated MLP reads and writes for its activation and for the product of its two projections;
- attention in single operations writes and reads the matrix of scores seven times, its softmax in float32;
- LoRA casts its input to float32 (autocast: to 16 bits), drops out, multiplies twice, scales, adds, casts back.
"""

from dataclasses import dataclass

from strategies.architecture import Architecture, Block, Linear
from strategies.memory import Setup

_BITSANDBYTES = ("nf4", "nf4-dq", "int8")


@dataclass(frozen=True)
class Product:
    """A product with one weight matrix.

    Attributes:
        d_in: Width of what comes in.
        d_out: Width of what comes out.
        count: How many there are of it.
        bits: Of an element of what is multiplied: 16 or 32.
        share: Of the tokens that go through it; below 1 for an expert.
    """

    d_in: int
    d_out: int
    count: int
    bits: int
    share: float = 1.0

    @property
    def flops(self) -> float:
        """Floating-point operations for each token that comes in: a multiplication and an addition for each weight."""
        return 2.0 * self.d_in * self.d_out * self.count * self.share


@dataclass(frozen=True)
class Work:
    """Forward work of one layer, or of all of them.

    Attributes:
        products: With weights of the base.
        adapters: Of LoRA's factors.
        attention_flops: Of scores and their products with the values, for each token.
        moved_bytes: That the base's other operations read and write, for each token.
        adapter_bytes: Likewise LoRA's.
        operations: That Python starts for the base.
        adapter_operations: Likewise for LoRA.
        cast_weights: Weights that autocast copies to 16 bits in each pass.
        packed_weights: Weights that are dequantised in each pass.
    """

    products: tuple[Product, ...]
    adapters: tuple[Product, ...]
    attention_flops: float
    moved_bytes: float
    adapter_bytes: float
    operations: int
    adapter_operations: int
    cast_weights: int
    packed_weights: int


@dataclass(frozen=True)
class Types:
    """How wide elements are under a setup, in bytes.

    Attributes:
        stream: Of the residual stream.
        compute: Of what linear layers multiply.
        between: Of what they return and the operations between them read; bitsandbytes returns the type of its input.
        head: Of what the output head multiplies.
        autocast: 16-bit copies are made of what is wider.
    """

    stream: int
    compute: int
    between: int
    head: int
    autocast: bool

    @classmethod
    def of(cls, setup: Setup) -> "Types":
        """Those that ``load`` and PEFT's k-bit preparation make: a float32 stream, 16-bit products in quantised layers."""
        stored = 4 if setup.base_dtype == "fp32" else 2
        autocast = setup.mixed_precision != "none"
        stream = 4 if setup.kbit_preparation else stored
        compute = 2 if autocast else stored
        between = 4 if setup.kbit_preparation and setup.quantization in _BITSANDBYTES else compute
        return cls(stream, compute, between, 2 if autocast else stream, autocast)


def of_layer(architecture: Architecture, block: Block, setup: Setup) -> Work:
    """The forward work of one layer.

    Args:
        architecture: The model.
        block: One of its blocks.
        setup: How it is trained.
    """
    types, composed = Types.of(setup), setup.attention == "eager"
    targets = [linear for at, linear in _targets(architecture, setup) if at == block]
    moved, operations = _between(architecture, block, types, setup)
    scores, steps = _scores(architecture, setup, types) if composed else (0.0, 1)
    casts = _casts(block, types)
    quantised = setup.quantization != "none"
    linears = sum(linear.weights for linear in block.linears)
    experts = architecture.expert_weights(block)
    packed = linears + experts * (not setup.packed_experts) if quantised else 0
    stored = 4 if setup.base_dtype == "fp32" else 2
    adapters = [_adapter(linear, setup, types) for linear in targets]
    return Work(
        products=_products(architecture, block, types),
        adapters=tuple(product for adapter in adapters for product in adapter[0]),
        attention_flops=block.attends * _attention_flops(architecture, setup),
        moved_bytes=moved + block.attends * scores + casts,
        adapter_bytes=sum(adapter[1] for adapter in adapters),
        operations=operations + block.attends * steps + len(block.linears) * (1 + 2 * quantised + (casts > 0)),
        adapter_operations=sum(adapter[2] for adapter in adapters),
        cast_weights=linears if types.autocast and stored == 4 and not quantised else 0,
        packed_weights=packed,
    )


def _targets(architecture: Architecture, setup: Setup) -> tuple[tuple[Block, Linear], ...]:
    return architecture.targets(setup.targets) if setup.method in ("lora", "qlora") else ()


def _products(a: Architecture, block: Block, types: Types) -> tuple[Product, ...]:
    bits = 8 * types.compute
    made = [Product(linear.d_in, linear.d_out, 1, bits) for linear in block.linears]
    if block.expert_intermediate:
        share = a.experts_per_token / a.experts
        made += [
            Product(a.hidden, block.expert_intermediate, a.experts * (2 if a.gated else 1), bits, share),
            Product(block.expert_intermediate, a.hidden, a.experts, bits, share),
            Product(a.hidden, a.experts, 1, bits),
        ]
    return tuple(made)


def _attention_flops(a: Architecture, setup: Setup) -> float:
    """Two products over the row for each head; one kernel leaves out the half that a decoder's mask hides."""
    seen = 0.5 if a.kind == "decoder" and setup.attention != "eager" else 1.0
    return 4.0 * a.heads * a.head_dim * setup.sequence * seen


def _scores(a: Architecture, setup: Setup, types: Types) -> tuple[float, int]:
    """Attention in single operations: scores, mask, softmax, dropout, and repeated keys and values."""
    softmax = (types.compute + 4) * 2 + 8 if a.upcasts or types.autocast else 2 * types.compute
    matrix = (1 + 2 + 1 + 3 * (a.attention_dropout > 0 and setup.dropout)) * types.compute + softmax
    return matrix * a.heads * setup.sequence + 4 * (a.heads - a.kv_heads) * a.head_dim * types.between, 8


def _between(a: Architecture, block: Block, types: Types, setup: Setup) -> tuple[float, int]:
    """Norms, positions, activations, residual sums, dropouts: bytes for each token, and operations."""
    s, c, h = types.stream, types.between, a.hidden
    norms = a.norms + block.attends - 1
    if a.norm == "rms":
        each, steps = (24 + 6 * s if s == 2 else 28), 6
        moved, operations = norms * each * h, norms * steps
        width = (a.heads + a.kv_heads) * a.head_dim
        moved += 10 * c * width + a.qk_norm * each * width
        operations += 12 + 2 * steps * a.qk_norm
    else:
        moved, operations = norms * (2 * s + 4 * (types.autocast and s == 2)) * h, norms
    moved += (1 + block.attends) * (2 * s + c) * h
    operations += 1 + block.attends + 6  # residual sums; views, which Python starts all the same
    wide = {"fused": 2, "composed": 18, "relu": 2}[a.activation]
    inner = block.intermediate + a.experts_per_token * block.expert_intermediate
    moved += (wide + 3 * a.gated) * c * inner
    operations += (9 if a.activation == "composed" else 1) + a.gated
    if a.dropout and setup.dropout:
        moved += (1 + block.attends) * (2 * c + 1) * h
        operations += 1 + block.attends
    if block.expert_intermediate:
        moved += a.experts_per_token * 6 * c * h
        operations += 20 + 6 * (not setup.packed_experts) * a.experts
    return moved, operations


def _casts(block: Block, types: Types) -> float:
    """A 16-bit copy of each linear layer's input where the stream is wider, and back where what is between is wide too."""
    if types.stream == 2 or types.compute == 4:
        return 0.0
    if types.between == 4:
        return sum(6.0 * (linear.d_in + linear.d_out) for linear in block.linears)
    return sum(6.0 * linear.d_in for linear in block.linears if linear.reads in ("states", "normed", "encoded"))


def _adapter(linear: Linear, setup: Setup, types: Types) -> tuple[tuple[Product, Product], float, int]:
    """One LoRA pair: products, bytes for each token, operations."""
    drops = setup.lora_dropout > 0
    wide = 2 if types.autocast else 4
    came = types.stream if linear.reads in ("states", "normed", "encoded") else types.between
    cast = 0 if came == wide else came + wide
    base = types.between
    back = 0 if base == wide else wide + base
    moved = linear.d_in * (cast + (2 * wide + 1) * drops) + linear.d_out * (2 * wide + base + 2 * wide + back)
    products = (
        Product(linear.d_in, setup.rank, 1, 8 * wide),
        Product(setup.rank, linear.d_out, 1, 8 * wide),
    )
    return products, moved, 4 + drops + (cast > 0) + (back > 0)


def of_head(architecture: Architecture, setup: Setup) -> tuple[Product, float]:
    """The output head with its loss: the product, and bytes for each token in both directions.

    Transformers' loss casts logits to float32, takes a log-softmax, gathers; its backward pass fills a gradient, goes back
    through the log-softmax and casts. Tiles do the same a part at a time; Liger's kernel does it in place.
    """
    types, v = Types.of(setup), architecture.vocab
    cast = 2 * (types.head + 4) if types.head == 2 else 0
    moved = {"hf": 32 + cast + 3 * types.head, "chunked": 32 + cast + 3 * types.head, "liger": 8 * types.head}[setup.loss]
    return Product(architecture.hidden, v, 1, 8 * types.head), float(moved * v)
