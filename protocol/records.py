"""Offers, adapters and updates as Flower records, and back. The one file of ``protocol`` that imports flwr.

An ArrayRecord holds what ``protocol.codec`` packed (``A|MODULE`` and ``B|MODULE`` for factor pairs, ``D|NAME`` for dense
tensors, or ``Q|…`` where they are coded) and ``R|NAME`` (uint8) for the trained rows of dense tensors. Everything else is in
one ConfigRecord under ``fedge``. A second ArrayRecord holds the adapter that a call names as its reference, where the node may
not have it. What comes in is untrusted: whatever is wrong with it becomes a MessageError.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from protocol.adapter import Adapter, Array
from protocol.codec import LONGEST_TEXT, MOST_ENTRIES, WireFormat, is_too_much, pack, unpack
from protocol.errors import AdapterError, MessageError, StartMissingError
from protocol.manifest import MOST_EXAMPLES, Manifest
from protocol.plan import Method, Plan, Precision
from protocol.privacy.promise import Promise
from protocol.product_space import trained_part
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.stages import Asked
from protocol.update import Update

PROTOCOL_VERSION = 1
ARRAYS, CONFIG, METRICS, REFERENCE = "adapter", "fedge", "metrics", "reference"
# Beside them, in a round whose updates are only added up: a masked vector, and the basis that the first sum gave.
VECTOR, RANGES = "vector", "ranges"
# Beside any of them, in a federation whose messages are signed (protocol.signed_messages).
SIGNATURE = "signature"
Trains = Literal["both", "A", "B"]
# A round has few, and they are kept and shown with their names. What is averaged over nodes must not overflow.
_MOST_METRICS, _LONGEST_METRIC, _LARGEST_METRIC = 100, 80, 1e30
# Far above what bases have: vocabularies of 262,144 tokens, prefixes as wide as 80 layers' keys and values of 8192 numbers.
LARGEST_DIMENSION, LONGEST_NAME, _MOST_AXES = 2**24, 256, 8
_Name = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME)]
_Dimension = Annotated[int, Field(gt=0, le=LARGEST_DIMENSION)]
M = TypeVar("M", bound=BaseModel)


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(BaseModel):
    """The one field that every version of the protocol keeps; read before a call, whose other keys may be unknown here."""

    protocol_version: int = PROTOCOL_VERSION


class Call(_Wire):
    """What the coordinator asks, with everything a node needs that keeps no state between rounds.

    Attributes:
        federation: Name of the federation.
        round, rounds: Which round, from 1, and the last one of its stage; round 0 asks a node to join.
        first: The first round of the stage: the plan's schedule begins there.
        plan: What the coordinator wishes; the node narrows it.
        adapter: Which of the federation's adapters this is about; empty where there is but one.
        adapters: While it is asked to join: the plans to choose from, by adapter, where there are several.
        r: The rank to train; 0 while it is asked to join.
        trains: Which factor trains; the other stays as it is.
        fresh: All of the adapter stays frozen; a new pair of rank ``r`` trains beside it.
        personal_b: The node keeps its own B and sends only A (FedSA).
        manifest: Of the adapter in this message; its digest is the ``parent`` of the update.
        digest: Of the adapter in this message as it arrives.
        delta_of: Digest of the adapter, held by the node, that the arrays are a difference to; empty where they need none.
            Where it is ``digest`` itself, no arrays travel: the node holds the adapter already.
        reference: dpo, kto, rl: digest of the global adapter before the stage began, which the policy stays near; empty where
            that was the base. No arrays travel for it where it is ``digest``, or where the node should hold it.
        wire: How the update is to travel.
        wire_down: How the coordinator's adapters travel; where they are coded, a node keeps what it receives.
        secure_sum: The update is to go into a secure sum and not to be sent: under which terms.
        privacy: What is promised of differential privacy, and what the update is clipped to for it.
        summed: All updates of this federation go into secure sums: what a node is told before it joins.
        minimum_nodes: Updates without which the federation merges nothing, as its coordinator promises.
    """

    protocol_version: int = PROTOCOL_VERSION
    federation: str
    round: int = Field(ge=0)
    rounds: int = Field(ge=1)
    first: int = Field(1, ge=1)
    plan: Plan
    adapter: str = ""
    adapters: dict[str, Plan] = {}
    r: int = Field(0, ge=0)
    trains: Trains = "both"
    fresh: bool = False
    personal_b: bool = False
    manifest: Manifest | None = None
    digest: str = ""
    delta_of: str = ""
    reference: str = ""
    wire: WireFormat = "fp32"
    wire_down: WireFormat = "fp32"
    secure_sum: Asked | None = None
    privacy: Promise | None = None
    summed: bool = False
    minimum_nodes: int = Field(1, ge=1)

    def alike(self) -> str:
        """Digest, in hexadecimal, of what every node of a round is told alike, whatever its rank and what it holds already."""
        told = self.model_dump(mode="json", exclude={"r", "delta_of", "wire_down", "secure_sum"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Offer(_Wire):
    """The shape of the adapter that a node can train. Neither hardware facts nor data statistics.

    Attributes:
        name: What the node calls itself in reports.
        adapter: Which of the federation's adapters it trains; empty where there is but one.
        base_digest: Of the base model that it holds.
        method, precision, r: What its selector chose.
        modules: ``(d_out, d_in)`` by module name.
        embeddings: Which of them look their weight up by token.
        dense: Shape by name of the dense tensors that it will send.
    """

    name: str = Field(max_length=80)
    adapter: str = Field("", max_length=80)
    base_digest: str = Field(pattern="^[0-9a-f]{64}$")
    method: Method
    precision: Precision
    r: int = Field(ge=1, le=1024)
    modules: dict[_Name, tuple[_Dimension, _Dimension]]
    embeddings: tuple[_Name, ...] = ()
    dense: dict[_Name, Annotated[tuple[_Dimension, ...], Field(max_length=_MOST_AXES)]] = {}


@dataclass(frozen=True)
class Received:
    """An adapter as it arrived, with its call and the adapter that this names as its reference."""

    call: Call
    adapter: Adapter
    reference: Adapter = field(default_factory=Adapter)

    def trained(self) -> Adapter:
        """The part of the adapter that the node trains: what its change is counted from, and coded as a difference to."""
        return trained_part(self.adapter, self.call.r, fresh=self.call.fresh)


def call_records(
    call: Call, arrays: Mapping[str, Array] | None = None, reference: Mapping[str, Array] | None = None
) -> RecordDict:
    """A call with the adapters that it speaks of (already packed)."""
    records = RecordDict({CONFIG: _config(call)})
    if arrays is not None:
        records[ARRAYS] = _arrays(arrays)
    if reference is not None:
        records[REFERENCE] = _arrays(reference)
    return records


def read_asked(records: RecordDict) -> Call:
    """The call alone.

    Raises:
        MessageError: It is none, or of another version of the protocol.
    """
    spoken = _read_config(records, Version, bounded=False).protocol_version
    if spoken != PROTOCOL_VERSION:
        raise MessageError(f"the coordinator speaks protocol {spoken}, this node {PROTOCOL_VERSION}; install the same fedge")
    return _read_config(records, Call, bounded=False)


def read_call(records: RecordDict, held: Callable[[str], Adapter | None] = lambda digest: None) -> Received:
    """The call and its adapter; checks that the adapter is the one that the call names.

    Args:
        records: From a coordinator.
        held: The adapter of a digest, if the node holds it.

    Raises:
        StartMissingError: The node does not hold what the arrays are a difference to, or the call's reference.
        MessageError: Anything else is wrong.
    """
    call = read_asked(records)
    reference = held(call.delta_of) if call.delta_of else None
    if call.delta_of and reference is None:
        raise StartMissingError(f"adapter {call.delta_of[:12]} is not held here; the coordinator must send the whole one")
    if reference is not None and call.delta_of == call.digest:
        adapter = reference
    else:
        adapter = _unpack(_read_arrays(records), reference)[0] if ARRAYS in records else Adapter()
    _check_digest(adapter, call.digest)
    return Received(call, adapter, _read_reference(records, call, adapter, held))


def _read_reference(records: RecordDict, call: Call, adapter: Adapter, held: Callable[[str], Adapter | None]) -> Adapter:
    if call.reference in ("", call.digest):
        return adapter if call.reference else Adapter()
    if REFERENCE in records:
        sent = _unpack(_read_arrays(records, REFERENCE), None)[0]
        _check_digest(sent, call.reference)
        return sent
    found = held(call.reference)
    if found is None:
        raise StartMissingError(f"reference {call.reference[:12]} is not held here; the coordinator must send it")
    return found


def _check_digest(adapter: Adapter, digest: str) -> None:
    if adapter.digest() != (digest or Adapter().digest()):
        raise MessageError("the adapter's digest is not the one that the message names; it was changed on its way")


def offer_records(offer: Offer) -> RecordDict:
    """A node's answer to being asked to join."""
    return RecordDict({CONFIG: _config(offer)})


def read_offer(records: RecordDict) -> Offer:
    """The node's offer."""
    return _read_config(records, Offer)


def update_records(
    update: Update, wire: WireFormat, metrics: Mapping[str, float], reference: Adapter | None = None
) -> RecordDict:
    """An update with its metrics; ``num-examples`` among the metrics is the manifest's.

    Args:
        update: Absolute tensors.
        wire: How they travel.
        metrics: Numbers about it.
        reference: What coded formats send a difference to: the part that trained of the adapter that arrived.

    Raises:
        AdapterError: The update cannot travel so.
    """
    rows = {f"R|{name}": mask.astype(np.uint8) for name, mask in update.rows.items()}
    return RecordDict(
        {
            CONFIG: _config(update.manifest),
            ARRAYS: _arrays(pack(update.adapter, wire, reference) | rows),
            METRICS: metric_record(metrics, update.manifest.num_examples),
        }
    )


def read_update(records: RecordDict, reference: Adapter | None = None) -> tuple[Update, dict[str, float]]:
    """The update, with absolute tensors, and its metrics.

    Args:
        records: From a node.
        reference: As in ``update_records``: what that node was sent and trained, as it arrived there.

    Raises:
        MessageError: Anything is wrong with it.
    """
    if more := records.keys() - {CONFIG, ARRAYS, METRICS}:
        raise MessageError(f"records: found {min(more)[:80]!r} too, expected {CONFIG!r}, {ARRAYS!r} and {METRICS!r}")
    manifest = _read_config(records, Manifest)
    adapter, rows = _unpack(_read_arrays(records), reference)
    metrics, num_examples = read_metrics(records)
    if num_examples != manifest.num_examples:
        raise MessageError(f"num-examples: found {num_examples} among metrics, expected the manifest's {manifest.num_examples}")
    return Update(adapter, manifest, rows), metrics


def stage_records(
    told: BaseModel | None, *, vector: Words | None = None, ranges: Mapping[str, Array] | None = None
) -> RecordDict:
    """What is said at a stage of a secure sum (``protocol.secure_sum.stages``), with its arrays."""
    records = RecordDict({} if told is None else {CONFIG: _config(told)})
    if vector is not None:
        records[VECTOR] = _arrays({VECTOR: vector})
    if ranges is not None:
        records[RANGES] = _arrays(ranges)
    return records


def read_stage(records: RecordDict, model: type[M]) -> M:
    """What the other side said at a stage.

    Raises:
        MessageError: It is none of this kind.
    """
    return _read_config(records, model)


def read_vector(records: RecordDict, length: int) -> Words:
    """A masked vector.

    Raises:
        MessageError: It is none of so many words.
    """
    if more := records.keys() - {VECTOR}:
        raise MessageError(f"records: found {min(more)[:80]!r} too, expected {VECTOR!r}")
    found = _read_arrays(records, VECTOR)
    vector = found.get(VECTOR)
    if vector is None or len(found) != 1 or vector.dtype != np.uint32 or vector.shape != (length,):
        told = ", ".join(f"{array.dtype} {array.shape}" for array in list(found.values())[:3]) or "nothing"
        raise MessageError(f"vector: found {told}, expected uint32 ({length},)")
    return np.ascontiguousarray(vector)


def read_ranges(records: RecordDict) -> dict[str, Array]:
    """The basis of a second sum, by module; whether it is one, the sketch says.

    Raises:
        MessageError: It is no float32 matrices.
    """
    found = _read_arrays(records, RANGES)
    if wrong := [name for name, array in found.items() if array.dtype != np.float32 or array.ndim != 2]:
        raise MessageError(f"basis of {wrong[0][:80]}: found {found[wrong[0]].dtype}, expected a matrix of float32")
    return found


def digest_of(records: Mapping[str, Any]) -> bytes:
    """SHA-256 over all that records say, in one pass over the arrays' bytes as they travel.

    Whatever stands in front of bytes says how many they are, so that no two messages are one string of bytes. Order is that of
    names, for none that a message has by itself outlives every transport.

    Raises:
        MessageError: Something in them is no record of Flower's.
    """
    found = hashlib.sha256()

    def take(*told: Any) -> None:
        text = json.dumps(told).encode()
        found.update(len(text).to_bytes(8, "big") + text)

    try:
        for key in sorted(records):
            record = records[key]
            take(type(record).__name__, key, len(record))
            for name in sorted(record):
                value = record[name]
                if isinstance(value, FlowerArray):
                    take(name, value.dtype, list(value.shape), value.stype, len(value.data))
                    found.update(value.data)
                else:
                    take(name, _in_json(value))
    except Exception as error:  # noqa: BLE001 - bytes from outside: records may hold anything
        raise MessageError(f"signature: what is signed holds what is no record ({type(error).__name__})") from None
    return found.digest()


def _in_json(value: Any) -> Any:
    """A value of a ConfigRecord or MetricRecord; bytes as what no other value is."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return [_in_json(each) for each in value] if isinstance(value, list) else value


def with_signature(records: RecordDict, signature: bytes, issue: str = "") -> RecordDict:
    """Records with a signature beside them; the very same records, for several nodes are sent one object."""
    return RecordDict({**records, SIGNATURE: ConfigRecord({"issue": issue, "signature": signature})})


def take_signature(records: RecordDict) -> tuple[RecordDict, bytes, str]:
    """Records without their signature, the signature, and what stands beside it.

    Raises:
        MessageError: There is none.
    """
    said = records.get(SIGNATURE)
    signature, issue = (said.get("signature"), said.get("issue")) if isinstance(said, ConfigRecord) else (None, None)
    if not isinstance(signature, bytes) or not isinstance(issue, str):
        raise MessageError(
            "signature: found none; everybody here is enrolled and signs, so whoever sent this is not, or is not set up"
        )
    return without_signature(records), signature, issue


def without_signature(records: RecordDict) -> RecordDict:
    """Records alone; who checks nobody's signature reads past it."""
    return RecordDict({key: record for key, record in records.items() if key != SIGNATURE})


def payload_bytes(records: RecordDict) -> int:
    """Bytes of a message's arrays as they travel; 0 where it has none."""
    held = [record for key in (ARRAYS, REFERENCE, VECTOR, RANGES) if isinstance(record := records.get(key), ArrayRecord)]
    return sum(len(array.data) for record in held for array in record.values())


def metric_record(metrics: Mapping[str, float], num_examples: int) -> MetricRecord:
    """Metrics of one node; a metric that is not finite is left out, for JSON and averages know no NaN."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return MetricRecord({**finite, "num-examples": int(num_examples)})


def read_metrics(records: RecordDict) -> tuple[dict[str, float], int]:
    """Finite metrics and the number of examples behind them."""
    record = records.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise MessageError(f"no MetricRecord under {METRICS!r}")
    if len(record) > _MOST_METRICS or not all(name.isprintable() and 0 < len(name) <= _LONGEST_METRIC for name in record):
        raise MessageError(
            f"metrics: found {len(record)}, expected at most {_MOST_METRICS}, each with a name of 1 to {_LONGEST_METRIC} "
            "characters that can be printed"
        )
    values = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    num_examples = values.pop("num-examples", None)
    if not isinstance(num_examples, int) or not 0 <= num_examples <= MOST_EXAMPLES:
        raise MessageError("num-examples is missing or is not a whole number from 0 to 2**53")
    for name, value in values.items():
        if _LARGEST_METRIC < abs(value) < math.inf:
            raise MessageError(f"metric {name}: found a number beyond {_LARGEST_METRIC:g}, expected one that can be averaged")
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}, num_examples


def _config(model: BaseModel) -> ConfigRecord:
    return ConfigRecord({"json": model.model_dump_json()})


def _read_config(records: RecordDict, model: type[M], *, bounded: bool = True) -> M:
    """What stands in the ConfigRecord; ``bounded`` where any node may have written it. A plan's labels have no bound."""
    record = records.get(CONFIG)
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise MessageError(f"no text under {CONFIG!r}/'json'; expected a {model.__name__}")
    if bounded and is_too_much(text.encode(errors="replace")):
        raise MessageError(
            f"not a {model.__name__}: found {len(text)} letters, expected at most {LONGEST_TEXT} and {MOST_ENTRIES} commas"
        )
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)[:5]
        where = ", ".join(".".join(str(part) for part in problem["loc"]) or "json" for problem in problems)
        raise MessageError(f"not a {model.__name__}: {where}") from None


def _arrays(tensors: Mapping[str, Array]) -> ArrayRecord:
    return ArrayRecord({key: FlowerArray(np.asarray(tensor, order="C")) for key, tensor in tensors.items()})


def _unpack(tensors: Mapping[str, Array], reference: Adapter | None) -> tuple[Adapter, dict[str, Array]]:
    """The adapter among some tensors, and the rows beside it."""
    rows = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("R|")}
    for name, mask in rows.items():
        if mask.dtype != np.uint8:
            raise MessageError(f"R|{name[:80]}: dtype {mask.dtype}; expected uint8")
        if np.any(mask > 1):
            raise MessageError(f"R|{name[:80]}: found {mask.max()}, expected 0 or 1 for each row")
    try:
        adapter = unpack({key: tensor for key, tensor in tensors.items() if not key.startswith("R|")}, reference)
    except AdapterError as error:
        raise MessageError(str(error)) from None
    return adapter, {name: mask.astype(bool) for name, mask in rows.items()}


def _read_arrays(records: RecordDict, key: str = ARRAYS) -> dict[str, Array]:
    record = records.get(key)
    if not isinstance(record, ArrayRecord):
        raise MessageError(f"no ArrayRecord under {key!r}")
    return {key: _read_tensor(key, array) for key, array in record.items()}


def _read_tensor(key: str, array: Any) -> Array:
    try:
        tensor: Array = array.numpy()
    except Exception as error:  # noqa: BLE001 - bytes from outside: numpy may raise anything on them
        raise MessageError(f"{key[:80]}: not a tensor ({type(error).__name__})") from None
    if not isinstance(tensor, np.ndarray):  # numpy opens a zip archive as a collection of tensors
        raise MessageError(f"{key[:80]}: not a tensor ({type(tensor).__name__})")
    return tensor
