"""The bytes of rounds that a device has spent: counted in its state for thirty days, held against its limit before it trains.

A message of a round has cost its bytes when this node sees it, whatever becomes of it: it is counted on arrival, and the answer
before it leaves. What an update will take is known before it is trained. Of joining, a few kilobytes once, nothing is counted.
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from client.memory import Memory
from client.node import Node
from protocol.codec import CODED, WireFormat
from protocol.errors import ConfigurationError, NotNowError
from protocol.records import Call, payload_bytes

log = logging.getLogger("flwr")
DAYS = 30
# Seconds since 1970 as this node counts them; those of simulated nodes pass as the simulation says.
clock: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.time)
_ALL_FEDERATIONS = ""  # which is no federation's name
_NAME, _DAY_SECONDS = "device bytes", 86_400
# Bytes a number, at most: coded forms have a scale of two bytes for 64 numbers, and top-k sends what is new as int8.
_A_NUMBER: dict[WireFormat, float] = {"fp32": 4, "fp16": 2, "int8": 1.04, "top-k": 1.04, "nf4": 0.54, "int4": 0.54}
_A_HEAD, _A_LINE = 320, 120  # beside a module's numbers: the heads of two arrays, or of coded ones a line in their layout
_BESIDE_ALL = 1024  # the manifest


class DeviceBytes:
    """What one node has spent in all federations; without a limit nothing is counted.

    Args:
        node: Its limit, and the folder that keeps the count.
        state: The node's Flower state.

    Raises:
        ConfigurationError: There is a limit, and no folder or no device.
    """

    def __init__(self, node: Node, state: RecordDict) -> None:
        self._node, self.limit = node, node.device_bytes
        if self.limit is not None and (node.state is None or node.device is None):
            what = "state: missing; device_bytes needs a folder in which its count outlives restarts"
            other = "device: missing; device_bytes is the limit of a device, so name its bundle or leave this out"
            raise ConfigurationError("node config", [what if node.state is None else other])
        self._memory = Memory.of(node, state, _ALL_FEDERATIONS)

    def spent(self) -> int:
        """In the last thirty days; 0 where nothing is counted.

        Raises:
            DataError: The count is damaged; ``VaultError``.
        """
        return sum(self._days().values())

    def count(self, number: int) -> None:
        """Counts bytes of this day, on the disk when this returns."""
        if self.limit is None or not number:
            return
        days, today = self._days(), self._today()
        days[today] = days.get(today, 0) + number
        self._memory.keep(_NAME, {"days": np.array(list(days), np.int64), "bytes": np.array(list(days.values()), np.int64)})

    def count_message(self, records: RecordDict) -> None:
        """Counts a message of a round; without a limit it is not looked at."""
        if self.limit is not None:
            self.count(message_bytes(records))

    def forget(self) -> None:
        """Begins anew."""
        self._memory.forget(_NAME)

    def check(self, more: int = 0) -> None:
        """Makes sure that so many bytes may leave.

        Raises:
            NotNowError: They would be more than is left.
        """
        if self.limit is None:
            return
        spent = self.spent()
        log.info("%s: %d of %d bytes spent in %d days, %d to send", self._node.name, spent, self.limit, DAYS, more)
        if spent + more > self.limit:
            raise NotNowError(
                f"device_bytes: {spent} of {self.limit} bytes are spent in {DAYS} days, and this would send {more} more; "
                "nothing is done"
            )

    def check_round(self, call: Call) -> None:
        """Makes sure that the update of a round may leave, before it is trained.

        Raises:
            NotNowError: It is more than is left.
        """
        if self.limit is not None:
            self.check(update_bytes(call, self._node))

    def _days(self) -> dict[int, int]:
        """Bytes by day since 1970, of those that count; of a clock that was set back, later ones too."""
        if self.limit is None:
            return {}
        known, oldest = self._memory.read(_NAME), self._today() - DAYS
        pairs = zip(known["days"].tolist(), known["bytes"].tolist(), strict=True) if known else ()
        return {day: number for day, number in pairs if day > oldest}

    @staticmethod
    def _today() -> int:
        return int(clock.get()() // _DAY_SECONDS)


def message_bytes(records: RecordDict) -> int:
    """Of a message: its arrays as they travel, and the text beside them."""
    texts = [value for record in records.values() if isinstance(record, ConfigRecord) for value in record.values()]
    return payload_bytes(records) + sum(len(text.encode()) for text in texts if isinstance(text, str))


def update_bytes(call: Call, node: Node) -> int:
    """Of the update that a call asks a device for, at most; where updates are only added up, of its masked vector.

    Raises:
        UserError: The bundle does not hold, or cannot train what the plan names.
    """
    from client.device_bundle import opened

    bundle = opened(node)
    modules = bundle.modules(call.plan)
    head = {} if call.plan.head.local else bundle.gradients.start_dense()
    numbers = call.r * sum(d_in + d_out for d_out, d_in in modules.values()) + sum(each.size for each in head.values())
    a_number, beside = (4.0, 0) if call.secure_sum else (_A_NUMBER[call.wire], _A_LINE if call.wire in CODED else _A_HEAD)
    return round(numbers * a_number) + beside * (len(modules) + len(head)) + _BESIDE_ALL
