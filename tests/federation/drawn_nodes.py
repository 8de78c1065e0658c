"""Nodes that answer in milliseconds: their updates are drawn from node, round and what they were sent, not trained.

Run as a program it is a coordinator with five of them: ``python drawn_nodes.py OUTPUT SEED SECONDS``, where SECONDS is how long
each node takes. The next answer of a node depends on everything that it was sent before it, so that a coordinator that went
on with anything else than what it had before would end elsewhere.
"""

import hashlib
import sys
import time

import numpy as np
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from protocol.adapter import Adapter, Factors
from protocol.errors import StartMissingError
from protocol.federation import Federation
from protocol.manifest import Manifest
from protocol.records import METRICS, Offer, metric_record, offer_records, read_asked, read_call, update_records
from protocol.update import Update
from simulations.grid import InProcessGrid

MODULES = {"layers.0.q": (24, 16), "layers.1.q": (16, 24)}
DENSE = {"score.weight": (6, 16)}
RANKS = (2, 4, 8)
BASE = "ab" * 32


def rank_of(node):
    return RANKS[node % len(RANKS)]


def drawn(call, node, arrived):
    """A change whose every number depends on what was sent."""
    seed = hashlib.sha256(f"{node} {call.round} {arrived.digest()}".encode()).digest()
    rng = np.random.default_rng(list(seed))
    factors = {}
    for module, (d_out, d_in) in MODULES.items():
        a = rng.normal(size=(call.r, d_in)).astype(np.float32)
        b = 0.1 * rng.normal(size=(d_out, call.r)).astype(np.float32)
        if call.trains != "both":
            sent = arrived.factors[module]
            a, b = (a, sent.B[:, : call.r]) if call.trains == "A" else (sent.A[: call.r], b)
        factors[module] = Factors(a, b)
    dense = {name: rng.normal(size=shape).astype(np.float32) for name, shape in DENSE.items()}
    return Update(Adapter(factors, dense), manifest_of(call, int(rng.integers(1, 100))))


def manifest_of(call, num_examples):
    return Manifest(
        base_digest=BASE,
        kind="update",
        method="lora",
        precision="fp32",
        r=call.r,
        federation=call.federation,
        round=call.round,
        parent=call.digest,
        num_examples=num_examples,
    )


class Scripted(InProcessGrid):
    """Nodes that come, go and answer as a test says.

    ``connected(node, last)`` tells whether a node is there after round ``last``; ``edit(message, reply)`` makes another reply,
    or none to leave it. Rounds are counted by what nodes are asked.
    """

    def __init__(self, app, nodes, *, connected=lambda node, last: True, edit=lambda message, reply: None):
        super().__init__(app, [{}] * nodes)
        self.connected, self.edit, self.last = connected, edit, 0

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if self.connected(node, self.last)]

    def answer(self, message):
        if message.metadata.message_type == MessageType.TRAIN:
            self.last = read_asked(message.content).round
        reply = super().answer(message)
        return self.edit(message, reply) or reply


def make_app(seconds=0.0, answer=drawn, adapter_of=lambda node: "", offered=lambda node: {}):
    """A ClientApp of drawn nodes.

    Each takes ``seconds`` to train; ``answer(call, node, arrived)`` makes the update; ``adapter_of(node)`` is the named adapter
    that it takes part in, ``offered(node)`` what else it offers in another way.
    """
    app = ClientApp()
    held = {}

    def receive(message, context):
        received = read_call(message.content, lambda digest: held.get((context.node_id, digest)))
        held[context.node_id, received.call.digest] = received.adapter
        return received

    @app.query()
    def query(message, context):
        facts = {
            "name": f"node-{context.node_id}",
            "adapter": adapter_of(context.node_id),
            "base_digest": BASE,
            "method": "lora",
            "precision": "fp32",
            "r": rank_of(context.node_id),
            "modules": MODULES,
            "dense": DENSE,
        }
        offer = Offer(**facts | offered(context.node_id))
        return Message(offer_records(offer), reply_to=message)

    @app.train()
    def train(message, context):
        try:
            received = receive(message, context)
        except StartMissingError as error:
            return Message(Error(code=1, reason=error.code), reply_to=message)
        time.sleep(seconds)
        update = answer(received.call, context.node_id, received.adapter)
        return Message(update_records(update, "fp32", {"train-loss": 1.0}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        try:
            received = receive(message, context)
        except StartMissingError as error:
            return Message(Error(code=1, reason=error.code), reply_to=message)
        loss = float(np.abs(received.adapter.dense["score.weight"]).mean())
        return Message(RecordDict({METRICS: metric_record({"loss": loss}, 10)}), reply_to=message)

    return app


def federation(output, seed, **changes):
    """Every kind of state that a coordinator has: moments, a published chain, a drawn cohort, norms, measures."""
    content = {
        "name": "drawn",
        "plan": {"training": {"batch_size": 10, "num_train_epochs": 1}},
        "rounds": {"count": 6, "cohort": 4, "over_selection": 0.25, "minimum_nodes": 2, "wire_down": "int8", "seed": seed},
        "aggregation": {"rank_cap": 6, "server_momentum": 0.5},
        "output": str(output),
    }
    for part, values in changes.items():
        content[part] = {**content.get(part, {}), **values} if isinstance(values, dict) else values
    if "adapters" in changes:
        del content["plan"]
    return Federation.model_validate(content)


def main():
    from server.rounds import run

    output, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    app = make_app(seconds)
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    outcome = run(InProcessGrid(app, [{}] * 5), federation(output, seed))
    sys.stdout.write(outcome.adapter.digest() + "\n")


if __name__ == "__main__":
    main()
