"""A Grid whose messages are signed and whose answers are let through only with the right node's signature (Flower's Grid).

Whoever reads replies behind it reads what an enrolled node has said in answer to this very message. Errors carry no signature:
anybody on the way can make one, and all that it does is that its node counts as silent.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from protocol.errors import MessageError
from protocol.records import digest_of, read_offer, take_signature, with_signature
from protocol.release import sign_release
from protocol.signed_messages import Issue, sign_call, verify_answer
from server.ledger import Kept
from server.trust import Numbers, Trust


class SignedGrid(Grid):
    """Signs for one run of a federation.

    Args:
        grid: Reaches the nodes.
        trust: Who is who.
        numbers: What each message is numbered with.
        federation: Its name.
        run: Names the run; settable, for one that goes on.
    """

    def __init__(self, grid: Grid, trust: Trust, numbers: Numbers, federation: str, run: str) -> None:
        self._grid = grid
        self._trust = trust
        self._numbers = numbers
        self._federation = federation
        self.run_name = run
        self._round = 0
        self._issues: dict[str, Issue] = {}
        self._names: dict[int, str] = {}

    def begin(self, number: int) -> None:
        """What is sent from here on belongs to this round."""
        self._round = number

    def release(self, folder: Path, name: str, kept: Kept) -> None:
        """Signs an adapter that is kept and may leave."""
        sign_release(
            folder,
            self._trust.identity,
            federation=self._federation,
            run=self.run_name,
            number=kept.manifest.round,
            adapter=name,
            digest=kept.adapter.digest(),
        )

    def set_run(self, run: Any) -> None:
        """Flower's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, not yet signed."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Who is connected, without those whose key does not count any more."""
        self._trust.look_again()
        named = ((node, self._names.get(node)) for node in self._grid.get_node_ids())
        return [node for node, name in named if name is None or name in self._trust.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Signs and sends; a message of its own for each node, around records that several may share."""
        messages, digests = list(messages), dict[int, bytes]()
        for message in messages:  # those that are sent the same are sent one object, and it is as long as the adapter
            digests[id(message.content)] = digests.get(id(message.content)) or digest_of(message.content)
        told = [digests[id(message.content)] for message in messages]
        issues = [self._sign(message, digest) for message, digest in zip(messages, told, strict=True)]
        ids = list(self._grid.push_messages(messages))
        self._issues.update(zip(ids, issues, strict=False))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages, without their signatures.

        Raises:
            MessageError: A reply is not signed by the key of the node that was asked, or not over this answer to this message.
        """
        asked = list(message_ids)
        replies = [reply for reply in self._grid.pull_messages(asked) if reply.metadata.reply_to_message_id in asked]
        for reply in replies:
            if not reply.has_error() and reply.has_content():
                self._verify(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not offered: it waits for the last node (``server.exchange``)."""
        raise NotImplementedError

    def _sign(self, message: Message, digest: bytes) -> Issue:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        joining = kind == MessageType.QUERY
        issue = Issue(
            federation=self._federation,
            run=self.run_name,
            round=0 if joining else self._round,
            kind=kind,
            to=node,
            node="" if joining else self._names.get(node, ""),
            issued=self._numbers.next(),
        )
        text, signature = sign_call(self._trust.identity, issue, digest)
        message.content = with_signature(message.content, signature, text)
        return issue

    def _verify(self, reply: Message) -> None:
        issue = self._issues.pop(reply.metadata.reply_to_message_id, None)
        if issue is None:
            raise MessageError("signature: a reply to a message that was answered before")
        records, signature, _ = take_signature(reply.content)
        name = issue.node or read_offer(records).name
        if name not in self._trust.nodes:
            raise MessageError(self._trust.enrolment.why_not(name))
        verify_answer(signature, issue, name, digest_of(records), self._trust.nodes)
        reply.content = records
        self._names[issue.to] = name
