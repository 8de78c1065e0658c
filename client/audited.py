"""A node's own audit log: what it was asked and by whom, what it refused, what left it and whose sums it helped to open.

A line stands on the disk before what it tells of happens: before work begins and before an answer leaves. A log that cannot be
written, or that somebody changed, ends the node's answers until somebody has looked at it.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.asked import SECURE_SUM, Asked
from client.node import Node
from protocol.audit import AuditLog
from protocol.errors import AuditError, FedgeError, PolicyError
from protocol.records import METRICS, digest_of, payload_bytes, read_asked, read_stage
from protocol.secure_sum.stages import Next, Open
from protocol.signature import fingerprint, read_private

_STATE = "fedge/audit"
_UNKNOWN = "message"


class Audited:
    """The lines of one message.

    Args:
        node: Its settings name the log, and the key that signs it; without a log nothing is written.
        context: Remembers the newest line while the SuperNode runs, so that lines cut off at the end are missed.

    Raises:
        AuditError: The log was changed, cut, or cannot be written.
        SignatureError: The key cannot be read.
    """

    def __init__(self, node: Node, context: Context) -> None:
        self._state = context.state
        self._log = None
        self._about: dict[str, str | int] = {"kind": _UNKNOWN}
        if node.audit:
            known = self._state.get(_STATE)
            expect = str(known["last"]) if isinstance(known, ConfigRecord) else None
            try:
                self._log = AuditLog(node.audit, read_private(node.identity) if node.identity else None, expect)
            except OSError as error:
                raise AuditError(f"{node.audit}: cannot be opened ({error.strerror})") from None

    def arrived(self, message: Message) -> None:
        """From here on lines say what kind of message it is; nothing in it is believed yet."""
        self._about = {"kind": message.metadata.message_type}

    def asked(self, asked: Asked) -> None:
        """Somebody who may ask has asked."""
        self._about = {"kind": asked.kind, "federation": asked.federation, "round": asked.round}
        coordinator = fingerprint(asked.coordinator) if asked.coordinator else "unsigned"
        self._write("asked", coordinator=coordinator, **_asked(asked))

    def sent(self, asked: Asked, answer: RecordDict) -> None:
        """An answer leaves."""
        if self._log is None:
            return
        names = sorted(answer[METRICS]) if METRICS in answer else []
        self._write("sent", bytes=payload_bytes(answer), digest=digest_of(answer).hex(), metrics=names)
        if asked.kind == SECURE_SUM and isinstance(question := read_stage(asked.records, Next).question, Open):
            self._write("opened", phase=question.phase, nodes=sorted(question.confirmations))

    def refused(self, error: Exception) -> None:
        """No answer but a code leaves. What else the error says stays here, in the node's own log."""
        code = error.code if isinstance(error, FedgeError) else FedgeError.code
        rules = list(error.rules) if isinstance(error, PolicyError) else []
        self._write("refused", code=code, **({"rules": rules} if rules else {}))

    def _write(self, event: str, **facts: object) -> None:
        if self._log is None:
            return
        try:
            last = self._log.write(event, **self._about, **facts)
        except OSError as error:
            raise AuditError(f"{self._log.path}: cannot be written ({error.strerror})") from None
        self._state[_STATE] = ConfigRecord({"last": last})


def _asked(asked: Asked) -> dict[str, object]:
    """What a message asks for, beside its kind."""
    if asked.kind == SECURE_SUM:
        return {"stage": read_stage(asked.records, Next).question.stage}
    call = read_asked(asked.records)
    told: dict[str, object] = {"rounds": call.rounds, "method": call.plan.method}
    if call.secure_sum:
        told["summed"] = len(call.secure_sum.nodes)
    if call.privacy:
        told["epsilon"] = call.privacy.epsilon
    return told
