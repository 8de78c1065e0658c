"""Adapters that arrived lately, so that the next may come as a difference to one of them, and the reference of a stage."""

from flwr.app import RecordDict

from client.memory import Memory
from protocol.adapter import Adapter, Array
from protocol.codec import CODED, pack, unpack
from protocol.records import Received, read_asked, read_call

_NAME, _REFERENCE = "starts", "reference"
# Rounds train from one adapter and measure the next; a coordinator that died asks with the one before once more.
_KEPT = 2


def receive(records: RecordDict, memory: Memory) -> Received:
    """A call with its adapters, read with what the memory holds.

    Where adapters travel coded they are remembered; the reference always is, so that it travels once for all of a stage.

    Raises:
        StartMissingError: The memory does not hold what the arrays are a difference to, or the call's reference.
        MessageError: Anything else is wrong with the records.
        DataError: The memory is damaged.
    """
    asked = read_asked(records)
    known = f"{_REFERENCE} {asked.adapter}"
    reference = _read(memory, known) if asked.reference else {}
    held = _read(memory, _NAME) if asked.wire_down in CODED else {}
    received = read_call(records, {**held, **reference}.get)
    if asked.reference and asked.reference not in reference:
        _keep(memory, known, {asked.reference: received.reference})
    if asked.wire_down not in CODED:
        return received
    digest = received.call.digest
    if received.adapter.nbytes() and digest not in list(held)[-1:]:
        held.pop(digest, None)
        _keep(memory, _NAME, {**held, digest: received.adapter})
    return received


def _read(memory: Memory, name: str) -> dict[str, Adapter]:
    """Adapters by digest, the newest last."""
    parts: dict[tuple[int, str], dict[str, Array]] = {}
    for key, array in memory.read(name).items():
        place, digest, tensor = key.split(" ", 2)
        parts.setdefault((int(place), digest), {})[tensor] = array
    return {digest: unpack(tensors) for (_, digest), tensors in sorted(parts.items())}


def _keep(memory: Memory, name: str, held: dict[str, Adapter]) -> None:
    memory.keep(
        name,
        {
            f"{place} {digest} {key}": tensor
            for place, (digest, adapter) in enumerate(list(held.items())[-_KEPT:])
            for key, tensor in pack(adapter, "fp32").items()
        },
    )
