"""The ClientApp that a SuperNode starts: routes only. An exception leaves the node as a code, never as text.

Each route imports the work itself: were this file to fail on a missing package, Flower would send the coordinator the
error's text with the node's paths in it.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client import cursor
from client.node import from_context
from protocol.errors import FedgeError
from protocol.records import METRICS, metric_record, offer_records, read_call, update_records
from strategies.libraries import calm

log = logging.getLogger("flwr")
app = ClientApp()
_ERROR_CODE = 1


@app.query()
def query(message: Message, context: Context) -> Message:
    """Joins a federation: answers with an offer."""

    def work() -> RecordDict:
        from client import round as node_round

        call, node = read_call(message.content).call, from_context(context)
        for reason in node_round.choose(call.plan, node).reasons.values():
            log.info("this node chose %s", reason)
        return offer_records(node_round.join(call, node))

    return _answer(message, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one round: answers with an update."""

    def work() -> RecordDict:
        from client import round as node_round

        received, node = read_call(message.content), from_context(context)
        name = received.call.federation
        done = node_round.train(received, node, cursor.position(context, name, node.state))
        log.info("round %d: %s", received.call.round, ", ".join(f"{k} {v:.4g}" for k, v in done.own_metrics.items()))
        records = update_records(done.update, received.call.wire, done.metrics)
        cursor.advance(context, name, done.position, node.state)
        return records

    return _answer(message, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures the global adapter on held-out rows: answers with metrics."""

    def work() -> RecordDict:
        from client import round as node_round

        metrics, count = node_round.evaluate(read_call(message.content), from_context(context))
        return RecordDict({METRICS: metric_record(metrics, count)})

    return _answer(message, work)


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    calm()
    try:
        return Message(work(), reply_to=message)
    except FedgeError as error:
        log.error("%s", error)
        code = error.code
    except Exception as error:
        # Whatever a library raises may quote a row: the whole of it stays in this node's own log.
        log.exception("the round failed (%s)", type(error).__name__)
        code = FedgeError.code
    return Message(Error(code=_ERROR_CODE, reason=code), reply_to=message)
