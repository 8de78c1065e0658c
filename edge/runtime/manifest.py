"""The one description of a bundle: what its graphs take, what was measured of them, and the digest of every file.

``manifest.json`` is UTF-8 JSON of at most 1 MiB that holds no time stamp and no path of the machine that made it: the same
inputs give the same bytes. ``manifest.sig`` (``protocol.signature``) is over exactly these bytes.
"""

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from edge.runtime.chat_format import ChatTemplate
from protocol.errors import BundleError, shown

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
MODEL: Final = "model.onnx"
TOKENIZER: Final = "tokenizer/tokenizer.json"
ADAPTERS: Final = "adapters"
REPORT: Final = "parity.md"
PURPOSE: Final = "bundle-manifest"  # what the signature is for; one for anything else is none for a bundle
MOST_BYTES: Final = 2**20

_PART = r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?"
_PATH = rf"^{_PART}(/{_PART}){{0,3}}$"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
_LARGEST_FILE, _MOST_FILES = 2**40, 4096

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=_NAME)]
Parameter = Annotated[str, StringConstraints(pattern="^[!-~]{1,300}$")]
Text = Annotated[str, StringConstraints(max_length=1000)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=300)]
FilePath = Annotated[str, StringConstraints(pattern=_PATH, max_length=300)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Labels = Annotated[tuple[Label, ...], Field(max_length=10_000)]


class Frozen(BaseModel):
    """What comes from outside: nothing unknown, nothing converted, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class File(Frozen):
    """One file of a bundle."""

    sha256: Digest
    size_bytes: int = Field(ge=0, le=_LARGEST_FILE)


class DecoderShape(Frozen):
    """What a decoder's graph takes and gives.

    Attributes:
        layers, kv_heads, head_dim: Of ``past.{i}.key|value`` [batch, kv_heads, capacity, head_dim].
        context_tokens: Most tokens of prompt and answer.
        vocabulary: Columns of ``logits``.
        cache: ``in-place``: past and present are one buffer of a fixed capacity; ``concat``: past has its real length.
    """

    layers: Count
    kv_heads: Count
    head_dim: Count
    context_tokens: Count
    vocabulary: Count
    cache: Literal["in-place", "concat"] = "in-place"


class EncoderShape(Frozen):
    """What an encoder's graph takes and gives.

    Attributes:
        hidden: Columns of ``embedding``.
        context_tokens: Most tokens of a text.
        token_type_ids: Whether the graph takes them (zeros for single texts).
        pooling, normalised: How an embedding is made of hidden states, inside the graph; None for a classifier.
    """

    hidden: Count
    context_tokens: Count
    token_type_ids: bool = False
    pooling: Literal["mean", "cls"] | None = None
    normalised: bool = False


class Tokens(Frozen):
    """Control tokens by id; None where the tokenizer has none.

    Attributes:
        eos: Any of them ends an answer.
        adds_bos: Whether plain text gets ``bos`` before it.
    """

    bos: TokenId | None = None
    eos: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    pad: TokenId | None = None
    unk: TokenId | None = None
    adds_bos: bool = False


class BundledAdapter(Frozen):
    """One adapter of a bundle; its tensors are ``adapters/ID.onnx_adapter``.

    Attributes:
        digest: ``protocol.adapter.Adapter.digest`` of what it was made from.
        method: What trained it.
        r: Its largest rank.
        labels: Of its classifier's rows; empty for the base's own.
        objective: What it was trained for.
        remark: What its user should know, such as a prompt format.
    """

    digest: Digest
    method: Text = ""
    r: int = Field(0, ge=0, le=2**20)
    labels: Labels = ()
    objective: Text = ""
    remark: Text = ""


class Parity(Frozen):
    """How far the bundle is from PyTorch on the same texts, for the base or one adapter.

    Attributes:
        rows: Texts that were read.
        positions: Outputs that were compared.
        largest_logit_difference: Largest absolute difference of two numbers that were put out.
        largest_logit: PyTorch's largest number, absolute.
        kl: Mean over positions of KL(PyTorch || bundle), nats.
        top1: Share of positions with the same likeliest token or label.
        perplexity_ratio: The bundle's perplexity over PyTorch's.
        cosine: The least of two embeddings.
        metrics: By name, PyTorch's and the bundle's.
        budgets: The bounds that were held, by name.
    """

    rows: int = Field(ge=0)
    positions: int = Field(0, ge=0)
    largest_logit_difference: float = Field(ge=0)
    largest_logit: float = Field(0.0, ge=0)
    kl: float | None = None
    top1: float | None = Field(None, ge=0, le=1)
    perplexity_ratio: float | None = Field(None, ge=0)
    cosine: float | None = None
    metrics: dict[Text, tuple[float, float]] = Field({}, max_length=64)
    budgets: dict[Text, float] = Field({}, max_length=64)


class Training(Frozen):
    """What the training graphs hold (``training_plan``).

    Attributes:
        layers: Calls of layers, and so states that a step keeps.
        kinds: Forms of layers, each with graphs of its own.
        largest_rank: Of a module's factors.
        largest_tokens: Of a row.
    """

    layers: Count
    kinds: Annotated[int, Field(ge=1, le=256)]
    largest_rank: Count
    largest_tokens: Count


class Description(Frozen):
    """A manifest without its files.

    Attributes:
        name: Of this line of bundles; a device compares versions within it.
        version: Rises with every bundle of that name.
        kind: What the graph answers.
        base_digest: SHA-256 of the base model, as adapters name it.
        base_model: What it is called.
        profile: How weights are held (``q8``, ``q4``, ``int8-dynamic``, ``fp16``, ``fp32``).
        remarks: Of quantisation and export, such as layers that stayed at 8 bits.
        opset: Of the graph.
        minimum_onnxruntime: What the device needs at least, as ``1.31``.
        decoder, encoder: The graph's shape: ``decoder`` for a decoder, ``encoder`` for both other kinds.
        lora: d_in and d_out by module that takes ``lora.MODULE.A|B``.
        dense: Shape by whole tensor that may be given, ``labels`` where rows are the adapter's labels.
        tokens: Control tokens.
        chat: None where the tokenizer's template cannot be said so; ``chat_remark`` tells why.
        labels: Of the base's own classifier.
        adapters: By id.
        parity: By adapter id, and ``base``.
        training: Of a bundle that adapters can be trained with.
    """

    format_version: Literal[1] = 1
    name: Name
    version: int = Field(ge=1, le=2**53)
    kind: Literal["decoder", "classifier", "embedder"]
    base_digest: Digest
    base_model: Text = ""
    profile: Name
    remarks: Annotated[tuple[Text, ...], Field(max_length=256)] = ()
    opset: int = Field(ge=1, le=1000)
    minimum_onnxruntime: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?$")]
    decoder: DecoderShape | None = None
    encoder: EncoderShape | None = None
    lora: dict[Parameter, tuple[Count, Count]] = Field({}, max_length=10_000)
    dense: dict[Parameter, Annotated[tuple[Count | Literal["labels"], ...], Field(max_length=8)]] = Field({}, max_length=10_000)
    tokens: Tokens = Tokens()
    chat: ChatTemplate | None = None
    chat_remark: Text = ""
    labels: Labels = ()
    adapters: dict[Name, BundledAdapter] = Field({}, max_length=1024)
    parity: dict[Name, Parity] = Field({}, max_length=1025)
    training: Training | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.decoder is not None, self.encoder is not None) != (self.kind == "decoder", self.kind != "decoder"):
            raise ValueError(f"{self.kind}: expected the section {'decoder' if self.kind == 'decoder' else 'encoder'} alone")
        if strangers := set(self.parity) - set(self.adapters) - {"base"}:
            raise ValueError(f"figures of {min(strangers)}, which is no adapter here")
        if "base" in self.adapters:
            raise ValueError("an adapter is called base, as the model without one is")
        return self


class BundleManifest(Description):
    """What ``manifest.json`` holds.

    Attributes:
        files: Every file but this one and its signature, by path.
    """

    files: dict[FilePath, File] = Field(min_length=1, max_length=_MOST_FILES)

    @model_validator(mode="after")
    def _lists_what_it_needs(self) -> Self:
        folded = {path.lower() for path in self.files}
        if len(folded) < len(self.files):
            raise ValueError("two paths differ by upper and lower case alone")
        if inside := [path for path in folded if any(path.startswith(f"{other}/") for other in _above(path, folded))]:
            raise ValueError(f"{min(inside)} lies in what is a file itself")
        if reserved := folded & {MANIFEST, SIGNATURE}:
            raise ValueError(f"{min(reserved)} is listed; it cannot hold its own digest")
        held = {path for path in self.files if path.endswith(".onnx_adapter")}
        expected = {MODEL, TOKENIZER} | {adapter_path(name) for name in self.adapters}
        if missing := expected - set(self.files):
            raise ValueError(f"{min(missing)} is not among the files")
        if strange := held - expected:
            raise ValueError(f"{min(strange)} belongs to no adapter of the manifest")
        return self

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest and its signature."""
        return sum(file.size_bytes for file in self.files.values())


def adapter_path(name: str) -> str:
    """Where the tensors of an adapter are in a bundle."""
    return f"{ADAPTERS}/{name}.onnx_adapter"


def written(manifest: BundleManifest) -> bytes:
    """The one way to write a manifest: the same manifest gives the same bytes.

    Raises:
        BundleError: It is longer than a device reads.
    """
    told = manifest.model_dump(mode="json")
    content = (json.dumps(told, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    if len(content) > MOST_BYTES:
        raise BundleError(f"the manifest is {len(content):,} bytes long; expected at most {MOST_BYTES:,}: fewer adapters")
    return content


def parsed(content: bytes) -> BundleManifest:
    """A manifest from bytes of any origin.

    Raises:
        BundleError: They are no manifest of format version 1; the only thing that is ever raised.
    """
    if len(content) > MOST_BYTES:
        raise BundleError(f"{MANIFEST} is longer than {MOST_BYTES:,} bytes; expected a manifest")
    try:
        json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        return BundleManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = shown(".".join(map(str, first["loc"])), 120) or "JSON"
        raise BundleError(
            f"{MANIFEST}: not a manifest of format version 1 ({where}: {shown(first['msg'], 200)}); get the bundle anew"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST}: not readable as JSON ({shown(str(error), 120)}); get the bundle anew") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice, other readers may take the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _above(path: str, among: set[str]) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:depth]) for depth in range(1, len(parts))} & among
