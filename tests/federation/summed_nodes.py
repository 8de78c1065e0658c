"""Nodes whose drawn updates go into secure sums, by the real code of a node; open ones beside them are the oracle."""

import numpy as np
from drawn_nodes import BASE, DENSE, MODULES, manifest_of, rank_of
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.memory import Memory
from client.secure_sum import Party, begin, go_on
from protocol.adapter import Adapter, Factors
from protocol.errors import FedgeError
from protocol.federation import Federation
from protocol.records import METRICS, Offer, metric_record, offer_records, read_call, update_records
from protocol.signature import make_key
from protocol.update import Update
from simulations.grid import InProcessGrid

NODES = 5
KEYS = {f"node-{node}": make_key() for node in range(1, 13)}
ENROLLED = {name: key.public_key() for name, key in KEYS.items()}
HEAD = np.linspace(-1, 1, 96, dtype=np.float32).reshape(DENSE["score.weight"])  # where every node's head begins


def changed(call, node, arrived):
    """A step away from the start that arrived; nothing in it depends on the start's last bits."""
    rng = np.random.default_rng([node, call.round])
    factors = {}
    for module, (d_out, d_in) in MODULES.items():
        start = arrived.factors.get(module, Factors(np.zeros((0, d_in)), np.zeros((d_out, 0))))
        a, b = 0.3 * rng.standard_normal((call.r, d_in)), 0.1 * rng.standard_normal((d_out, call.r))
        held = min(start.r, call.r)
        if call.trains != "A":
            b[:, :held] = 0.05 * b[:, :held] + start.B[:, :held]
        if call.trains != "B":
            a[:held] = 0.05 * a[:held] + start.A[:held]
        if call.trains != "both":
            a, b = (a, start.B[:, : call.r]) if call.trains == "A" else (start.A[: call.r], b)
        factors[module] = Factors(a.astype(np.float32), b.astype(np.float32))
    rows = np.arange(6) != node % 6 if node % 2 else np.ones(6, bool)
    rows[5] = False  # which nobody trains
    head = arrived.dense.get("score.weight", HEAD) + 0.1 * rows[:, None] * rng.standard_normal(HEAD.shape)
    manifest = manifest_of(call, int(rng.integers(10, 90)))
    return Update(Adapter(factors, {"score.weight": head.astype(np.float32)}), manifest, {"score.weight": rows})


def make_app(answer=changed, fewest=3, rank=rank_of, adapter_of=lambda node: "", dense=DENSE):
    """A ClientApp of nodes that send what they are asked for: their update, or their part of a sum."""
    app = ClientApp()

    def party(context, federation):
        memory = Memory(context.state, federation, None)
        name = f"node-{context.node_id}"
        return Party(name, KEYS[name], ENROLLED, fewest, memory, memory)

    def answered(message, work):
        try:
            return Message(work(), reply_to=message)
        except FedgeError as error:
            return Message(Error(code=1, reason=error.code), reply_to=message)

    @app.query()
    def query(message, context):
        node = context.node_id
        facts = {"base_digest": BASE, "method": "lora", "precision": "fp32", "modules": MODULES, "dense": dense}
        offer = Offer(name=f"node-{node}", r=rank(node), adapter=adapter_of(node), **facts)
        return Message(offer_records(offer), reply_to=message)

    @app.train()
    def train(message, context):
        def work():
            received = read_call(message.content)
            call = received.call
            update = answer(call, context.node_id, received.adapter)
            if call.secure_sum:
                return begin(received, party(context, call.federation), lambda: update)
            return update_records(update, "fp32", {})

        return answered(message, work)

    @app.train("secure_sum")
    def secure_sum(message, context):
        return answered(message, lambda: go_on(message.content, lambda federation: party(context, federation)))

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({METRICS: metric_record({"loss": 1.0}, 10)}), reply_to=message)

    return app


def federation(output, *, secure=True, rule="product-delta", rounds=None, aggregation=None, **changes):
    content = {
        "name": "summed",
        "plan": {"training": {"batch_size": 10, "num_train_epochs": 1}},
        "rounds": {"count": 3, "minimum_nodes": 3, "evaluate_every": 0, "retries": 0} | (rounds or {}),
        "aggregation": {"rule": rule, "rank_cap": 8} | (aggregation or {}),
        "output": str(output),
    }
    if adapters := changes.pop("adapters", None):
        content["adapters"] = dict.fromkeys(adapters, content.pop("plan"))
    if secure:
        content["secure_sum"] = {"enabled": True, "limit": 10.0, "examples": 100} | changes
    return Federation.model_validate(content)


class Watched(InProcessGrid):
    """Lets a test see every message, and answer in a node's place: ``edit(message, reply)`` gives another reply, or none."""

    def __init__(self, app, nodes=NODES, before=lambda message: message, edit=lambda message, reply: reply):
        super().__init__(app, [{}] * nodes)
        self.before, self.edit, self.seen = before, edit, []

    def answer(self, message):
        asked = self.before(message)
        if asked is None:  # it never arrives
            return self.gone(message)
        reply = self.edit(asked, super().answer(asked))
        self.seen.append((asked, reply))
        return reply

    @staticmethod
    def gone(message):
        """What a SuperLink says of a node that has left."""
        return Message(Error(code=1, reason="gone"), reply_to=message)
