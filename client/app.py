"""The ClientApp that a SuperNode starts: routes only. An exception leaves the node as a code, never as text.

Each route imports the work itself: were this file to fail on a missing package, Flower would send the coordinator the
error's text with the node's paths in it.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.arrived import receive
from client.feedback import with_feedback
from client.memory import Memory
from client.node import Node, from_context
from protocol.errors import FedgeError, SecureSumError, StartMissingError
from protocol.records import METRICS, metric_record, offer_records, read_asked, update_records
from strategies.libraries import calm

log = logging.getLogger("flwr")
app = ClientApp()
_ERROR_CODE = 1


@app.query()
def query(message: Message, context: Context) -> Message:
    """Joins a federation: answers with an offer."""

    def work() -> RecordDict:
        from client import round as node_round

        call, node = read_asked(message.content), from_context(context)
        for reason in node_round.choose(node_round.wish(call, node), node).reasons.values():
            log.warning("%s: %s", node.name, reason)  # what is less than was asked for is never silent
        memory = None if node.trial is False else Memory(context.state, call.federation, node.state)
        return offer_records(node_round.join(call, node, memory))

    return _answer(message, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one round: answers with an update."""

    def work() -> RecordDict:
        from client import round as node_round

        node, memory = _node(message, context)
        received = receive(message.content, memory)

        def trained() -> node_round.Work:
            done = node_round.train(received, node, memory)
            log.info("round %d: %s", received.call.round, ", ".join(f"{k} {v:.4g}" for k, v in done.own_metrics.items()))
            return done

        if received.call.secure_sum:
            from client.secure_sum import Party, begin

            party = Party.of(node, context.state, received.call.federation)
            return begin(received, party, lambda: trained().update)
        if node.only_summed:
            raise SecureSumError("asked for an update of its own, and this node's only_summed is true; nothing is trained")
        done = trained()
        update = with_feedback(done.update, received, memory)
        return update_records(update, received.call.wire, done.metrics, received.trained())

    return _answer(message, work)


@app.train("secure_sum")
def secure_sum(message: Message, context: Context) -> Message:
    """Goes on with a round whose updates are only added up: answers as its stage asks."""

    def work() -> RecordDict:
        from client.secure_sum import Party, go_on

        node = from_context(context)
        return go_on(message.content, lambda federation: Party.of(node, context.state, federation))

    return _answer(message, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures the global adapter on held-out rows: answers with metrics."""

    def work() -> RecordDict:
        from client import round as node_round

        node, memory = _node(message, context)
        metrics, count = node_round.evaluate(receive(message.content, memory), node, memory)
        return RecordDict({METRICS: metric_record(metrics, count)})

    return _answer(message, work)


def _node(message: Message, context: Context) -> tuple[Node, Memory]:
    """This node, and what it remembers of the federation that asks."""
    node = from_context(context)
    return node, Memory(context.state, read_asked(message.content).federation, node.state)


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    calm()
    try:
        return Message(work(), reply_to=message)
    except FedgeError as error:
        expected = isinstance(error, StartMissingError)  # the coordinator sends it whole
        log.log(logging.INFO if expected else logging.ERROR, "%s", error)
        code = error.code
    except Exception as error:
        # Whatever a library raises may quote a row: the whole of it stays in this node's own log.
        log.exception("the round failed (%s)", type(error).__name__)
        code = FedgeError.code
    return Message(Error(code=_ERROR_CODE, reason=code), reply_to=message)
