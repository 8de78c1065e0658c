"""What ``training/plan.json`` says: which graph each layer runs through, and where in the bundle each of its weights lies.

The weights are those that inference reads: packed levels and scales in ``model.onnx.data``. Norms, biases and whatever else
the inference graph holds in another form lie in ``training/weights.data``, in float32.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from edge.runtime.manifest import Count, Frozen, Parameter
from protocol.errors import BundleError, shown

FOLDER: Final = "training"
PLAN: Final = f"{FOLDER}/plan.json"
SMALL: Final = "training/weights.data"
LARGE: Final = "model.onnx.data"
FRONT: Final = f"{FOLDER}/front.onnx"
MOST_BYTES: Final = 2**24
BLOCK: Final = 32  # weights of a row that share a scale
LARGEST_RANK: Final = 256

Form = Literal["float32", "float16", "rows4", "rows8", "channels8"]
_FLOAT_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2}


class Part(Frozen):
    """Bytes of a file of the bundle, from ``offset`` on."""

    file: Literal["model.onnx.data", "training/weights.data"]
    offset: Annotated[int, Field(ge=0, le=2**40)]


class Held(Frozen):
    """How one parameter is held.

    Attributes:
        form: ``float32`` and ``float16`` as they are; ``rows4`` and ``rows8`` in blocks of 32 along a row, as ``MatMulNBits``
            reads them, with scales and perhaps zero points; ``channels8`` int8 with a scale for each column.
        shape: As PyTorch has it.
        turned: Whether it is held the other way round.
        spread: Whether each zero point has a byte of its own.
        parts: The levels or numbers; float32 scales; zero points.
    """

    form: Form
    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)]
    turned: bool = False
    spread: bool = False
    parts: Annotated[tuple[Part, ...], Field(min_length=1, max_length=3)]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        most = {"float32": (1, 1), "float16": (1, 1), "channels8": (2, 2)}.get(self.form, (2, 3))
        if not most[0] <= len(self.parts) <= most[1]:
            raise ValueError(f"{self.form} with {len(self.parts)} parts")
        if len(self.shape) != 2 and (self.turned or self.form not in _FLOAT_BYTES):
            raise ValueError(f"{self.form} of {len(self.shape)} dimensions")
        return self

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape in which it is held."""
        return self.shape[::-1] if self.turned else self.shape

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.rows[-1] // BLOCK)

    def sizes(self) -> tuple[int, ...]:
        """Bytes of each part."""
        if self.form in _FLOAT_BYTES:
            return (prod(self.shape) * _FLOAT_BYTES[self.form],)
        rows, columns = self.rows
        if self.form == "channels8":
            return rows * columns, 4 * columns
        bits = 4 if self.form == "rows4" else 8
        zeros = self.blocks if self.spread else -(-self.blocks * bits // 8)
        told = rows * self.blocks * BLOCK * bits // 8, 4 * rows * self.blocks, rows * zeros
        return told[: len(self.parts)]


class Layer(Frozen):
    """One call of a layer: the number of its graphs, and the module whose weights it takes."""

    kind: Annotated[int, Field(ge=0, le=255)]
    module: Parameter


class TrainingPlan(Frozen):
    """The whole of it.

    Attributes:
        layers: In the order in which they run.
        embedding: The table that token ids are looked up in.
        words: Of a decoder, the parameters of its head that have a row for each token.
        tensors: By the parameter's name in the model.
    """

    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=10_000)]
    embedding: Parameter
    words: Annotated[tuple[Parameter, ...], Field(max_length=4)] = ()
    tensors: Annotated[dict[Parameter, Held], Field(min_length=1, max_length=100_000)]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if missing := {self.embedding, *self.words} - self.tensors.keys():
            raise ValueError(f"{min(missing)} is held nowhere")
        if len(self.tensors[self.embedding].shape) != 2 or self.tensors[self.embedding].turned:
            raise ValueError(f"{self.embedding} has no row for each token")
        return self


def forward_path(kind: int) -> str:
    """Of the graph that runs a layer."""
    return f"{FOLDER}/layer-{kind}-forward.onnx"


def integers_path(kind: int) -> str:
    """Of the graph that runs a layer over integers; of a bundle that holds them so."""
    return f"{FOLDER}/layer-{kind}-integers.onnx"


def backward_path(kind: int) -> str:
    """Of the graph that runs it again and back."""
    return f"{FOLDER}/layer-{kind}-backward.onnx"


def head_path(what: str) -> str:
    """Of a graph behind the layers."""
    return f"{FOLDER}/head-{what}.onnx"


def form_path(form: str) -> str:
    """Of the graph that turns levels into float32."""
    return f"{FOLDER}/{form}.onnx"


def written(plan: TrainingPlan) -> bytes:
    """The one way to write it."""
    return (plan.model_dump_json(exclude_defaults=True) + "\n").encode()


def parsed(content: bytes, sizes: Mapping[str, int]) -> TrainingPlan:
    """A plan from bytes of any origin, whose weights lie within the files that there are.

    Args:
        content: Of ``training/plan.json``.
        sizes: Bytes of the bundle's files.

    Raises:
        BundleError: It is none; the only thing that is raised.
    """
    if len(content) > MOST_BYTES:
        raise BundleError(f"{PLAN} is longer than {MOST_BYTES:,} bytes; make the bundle anew")
    try:
        plan = TrainingPlan.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = shown(".".join(map(str, first["loc"])), 120) or "JSON"
        raise BundleError(f"{PLAN}: not a plan ({where}: {shown(first['msg'], 200)}); make the bundle anew") from None
    for name, held in plan.tensors.items():
        for part, size in zip(held.parts, held.sizes(), strict=True):
            if part.offset + size > sizes.get(part.file, 0):
                raise BundleError(
                    f"{PLAN}: {shown(name, 100)} ends at byte {part.offset + size:,} of {part.file}, which has "
                    f"{sizes.get(part.file, 0):,}; make the bundle anew"
                )
    return plan
