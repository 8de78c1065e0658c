"""Who asks: the coordinator's signature under a message, whether it is new, and this node's own under the answer.

A node whose settings name ``enrolled`` and ``identity`` hears nobody but the coordinators of that list. One without them hears
everybody, and signs nothing.
"""

from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Context, Message, MessageType, RecordDict

from client.memory import Memory
from client.node import Node, from_context
from client.policy import Policy
from protocol.enrolment import Enrolment, read_enrolment
from protocol.errors import ConfigurationError
from protocol.records import digest_of, read_asked, read_stage, take_signature, with_signature, without_signature
from protocol.secure_sum.stages import Next
from protocol.signature import fingerprint, key_id, read_private
from protocol.signed_messages import Issue, check_issue, sign_answer, verify_call

SECURE_SUM = f"{MessageType.TRAIN}.secure_sum"
_ISSUED = "issued"


@dataclass(frozen=True)
class Asked:
    """A message that this node answers.

    Attributes:
        records: What is asked, without signature.
        kind: Flower's message type.
        federation: Which federation asks.
        round: In which round; 0 where that is asked of nobody in particular: to join, or to go on with a secure sum.
        node: This node, by its settings.
        memory: What it remembers of that federation.
        coordinator: The key that asks; None where this node checks nobody's.
        policy: What this institution allows; everything until ``client.permitted`` has looked.
    """

    records: RecordDict
    kind: str
    federation: str
    round: int
    node: Node
    memory: Memory
    coordinator: Ed25519PublicKey | None = None
    _issue: Issue | None = None
    _identity: Ed25519PrivateKey | None = None
    policy: Policy = field(default_factory=Policy)

    def signed(self, answer: RecordDict) -> RecordDict:
        """An answer as it leaves: signed, if this node signs."""
        if self._issue is None or self._identity is None:
            return answer
        return with_signature(answer, sign_answer(self._identity, self._issue, self.node.name, digest_of(answer)))


def read(message: Message, context: Context) -> Asked:
    """The message, once it is clear that a coordinator sent it to this node, now and for this.

    Raises:
        ConfigurationError: This node's key is not the one that is enrolled under its name, or one of its files cannot be read.
        SignatureError: No coordinator that is enrolled here has signed it.
        StaleMessageError: It was sent before, or an answer to a newer one is on its way.
        MessageError: It is unsigned, was meant for somebody or something else, or cannot be read.
    """
    node, kind = from_context(context), message.metadata.message_type
    if node.identity is None or node.enrolled is None:
        records = without_signature(message.content)
        federation, number = _about(records, kind)
        return Asked(records, kind, federation, number, node, Memory.of(node, context.state, federation))
    identity, enrolment = read_private(node.identity), read_enrolment(node.enrolled)
    _check_own(node, identity, enrolment)
    records, signature, text = take_signature(message.content)
    issue, coordinator = verify_call(text, signature, digest_of(records), enrolment.coordinators)
    federation, number = _about(records, kind)
    memory = Memory.of(node, context.state, federation)
    name = f"{_ISSUED} {fingerprint(coordinator)}"
    highest = memory.read(name).get(_ISSUED, np.zeros((), np.int64))
    expected = Issue(
        federation=federation,
        run=issue.run,
        round=issue.round if kind == SECURE_SUM else number,  # a stage names no round, but the attempt that it belongs to
        kind=kind,
        to=context.node_id,
        node="" if kind == MessageType.QUERY else node.name,
        issued=issue.issued,
    )
    check_issue(issue, expected, int(highest))
    memory.keep(name, {_ISSUED: np.array(issue.issued, np.int64)})  # before anything is done: it is answered once
    return Asked(records, kind, federation, issue.round, node, memory, coordinator, issue, identity)


def _about(records: RecordDict, kind: str) -> tuple[str, int]:
    """The federation and the round that a message speaks of."""
    if kind == SECURE_SUM:
        return read_stage(records, Next).question.federation, 0
    call = read_asked(records)
    return call.federation, call.round


def _check_own(node: Node, identity: Ed25519PrivateKey, enrolment: Enrolment) -> None:
    """A node that nobody would believe should say so at home."""
    known = enrolment.nodes.get(node.name)
    if known is None:
        raise ConfigurationError(
            str(node.enrolled), [f"{enrolment.why_not(node.name)}; nobody would believe this node's answers"]
        )
    if key_id(known) != key_id(identity.public_key()):
        raise ConfigurationError(
            "node config",
            [
                f"identity: {node.identity} is the key {fingerprint(identity.public_key())}, and {fingerprint(known)} is "
                f"enrolled as {node.name}; name the right key, or have this one enrolled"
            ],
        )
