"""What a signature under a message says: to whom it goes, in which round of which run, and that nothing of it was changed.

The coordinator's signature is over its ``Issue`` as it travels (JSON), a zero byte and the SHA-256 of all records
(``protocol.records.digest_of``). ``issued`` only grows, so whoever remembers the highest that it has accepted sees every
replay and every stale round. A node signs its answer over the same issue, with its own name in it, and the digest of what it
answers; nothing of that travels but the 96 bytes, for the coordinator knows what it asked.
"""

from typing import Annotated, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.enrolment import Enrolled
from protocol.errors import MessageError, SignatureError, StaleMessageError
from protocol.signature import sign, verify

_CALL: Final = "round-call"
_ANSWER: Final = "round-answer"
_LONGEST = 2**16


class Issue(BaseModel):
    """What one message is, beside its content.

    Attributes:
        federation, run, round: Where it belongs; a run ends with its last round, however often its coordinator died.
        kind: Flower's message type: a query answers no training.
        to: The Flower node that it is sent to.
        node: Name of that node; empty while it is asked who it is.
        issued: A number of the coordinator's that only grows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str
    run: str
    round: int = Field(ge=0)
    kind: str
    to: int
    node: str
    issued: Annotated[int, Field(ge=1, lt=2**63)]


def sign_call(key: Ed25519PrivateKey, issue: Issue, digest: bytes) -> tuple[str, bytes]:
    """The issue as it travels and the signature beside it."""
    text = issue.model_dump_json()
    return text, sign(key, _CALL, _content(text, digest))


def verify_call(text: str, signature: bytes, digest: bytes, coordinators: Enrolled) -> tuple[Issue, Ed25519PublicKey]:
    """What a coordinator says of its message, and which of its keys says it.

    Args:
        text: The issue as it arrived.
        signature: The bytes beside it.
        digest: Of the other records as they arrived.
        coordinators: Whose signatures count.

    Raises:
        SignatureError: Nobody of these has signed it.
        MessageError: Somebody has, and it is no issue.
    """
    if len(text) > _LONGEST:
        raise MessageError(f"signature: found {len(text)} letters, expected at most {_LONGEST}")
    key = verify(signature, _CALL, _content(text, digest), coordinators.values())
    try:
        return Issue.model_validate_json(text, strict=True), key
    except ValidationError:
        raise MessageError("signature: what is signed is no issue of this version; install the same fedge") from None


def check_issue(issue: Issue, expected: Issue, highest: int) -> None:
    """Refuses what is meant for another node, place or purpose, and what is not newer than all that was accepted.

    Args:
        issue: Of a message whose signature holds.
        expected: What the receiver knows of it by itself; ``run`` and ``issued`` are not looked at.
        highest: The last number that was accepted from the same coordinator for the same federation; 0 if there was none.

    Raises:
        MessageError: It is another's, or of another kind, federation or round.
        StaleMessageError: It is old.
    """
    told, known = issue.model_dump(exclude={"run", "issued"}), expected.model_dump(exclude={"run", "issued"})
    if wrong := [name for name, value in told.items() if value != known[name]]:
        raise MessageError(
            f"signature: found {wrong[0]} {told[wrong[0]]!r}, expected {known[wrong[0]]!r}; it was meant for somebody or "
            "something else"
        )
    if issue.issued <= highest:
        raise StaleMessageError(
            f"signature: message {issue.issued} is not newer than {highest}, the newest from this coordinator; it was sent "
            "before, or the coordinator's clock has gone back and its output folder is another"
        )


def sign_answer(key: Ed25519PrivateKey, issue: Issue, name: str, digest: bytes) -> bytes:
    """A node's 96 bytes under its answer.

    Args:
        key: The node's.
        issue: Of the message that it answers.
        name: The node's own.
        digest: Of what it answers.
    """
    return sign(key, _ANSWER, _content(issue.model_copy(update={"node": name}).model_dump_json(), digest))


def verify_answer(signature: bytes, issue: Issue, name: str, digest: bytes, nodes: Enrolled) -> None:
    """Makes sure that the node of a name has answered this very message so.

    Raises:
        MessageError: It has not.
    """
    try:
        verify(signature, _ANSWER, _content(issue.model_copy(update={"node": name}).model_dump_json(), digest), [nodes[name]])
    except SignatureError:
        raise MessageError(
            f"signature: not made by the key that is enrolled as {name} over this answer to this question (round {issue.round})"
        ) from None


def _content(text: str, digest: bytes) -> bytes:
    return text.encode() + b"\0" + digest  # which JSON does not hold
