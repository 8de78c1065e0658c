"""Keys, lists and nodes whose messages are signed by the real code of node and coordinator; updates are drawn, not trained."""

import json

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from drawn_nodes import make_app
from flwr.app import Error, Message

from client.asked import read
from protocol.errors import FedgeError
from protocol.signature import write_private
from server.trust import Trust
from simulations.grid import InProcessGrid


def key(number):
    """The same in every test process."""
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


COORDINATOR, FORMER, STRANGER = key(1001), key(1002), key(1003)


def line(private):
    return private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def enrol(path, nodes, **more):
    """A list with nodes by name, the coordinator, one that was, and what else is to stand there."""
    told = {name: line(private) for name, private in nodes.items()}
    told["consortium"] = {"key": line(COORDINATOR), "role": "coordinator"}
    told["before"] = {"key": line(FORMER), "role": "coordinator", "revoked": "2026-01-31"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told | more))
    return path


def config(folder, name, private, enrolled, **more):
    """Settings of a node, as Flower hands them over."""
    path = folder / f"{name}-{line(private)[-12:].replace('/', '_')}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, private)
    return {"name": name, "train": "rows.jsonl", "identity": str(path), "enrolled": str(enrolled), **more}


def honest(folder, count=5, **more):
    """Settings of nodes that are enrolled, and the coordinator's side of it."""
    keys = {f"node-{number}": key(number) for number in range(1, count + 1)}
    listed = enrol(folder / "enrolled.yaml", keys)
    return [config(folder, name, private, listed, **more) for name, private in keys.items()], Trust(COORDINATOR, listed)


def signing(app):
    """What ``client.app`` does around its work, around that of drawn nodes."""

    def answered(message, context):
        try:
            asked = read(message, context)
        except FedgeError as error:
            return Message(Error(code=1, reason=error.code), reply_to=message)
        inner = Message(metadata=message.metadata, content=asked.records)
        reply = app(inner, context)
        if reply.has_content():
            reply.content = asked.signed(reply.content)
        return reply

    return answered


class Tampering(InProcessGrid):
    """Lets somebody on the way answer in a node's place: ``edit(message, reply)`` gives another reply."""

    def __init__(self, configs, edit=lambda message, reply: reply, app=None):
        super().__init__(app or signing(make_app(offered=lambda node: {"name": configs[node - 1]["name"]})), configs)
        self.edit, self.seen = edit, []

    def answer(self, message):
        reply = super().answer(message)
        self.seen.append((message, reply.content if reply.has_content() else None))
        return self.edit(message, reply)
