"""The ClientApp that a SuperNode starts: routes only. An exception leaves the node as a code, never as text.

Each route imports the work itself: were this file to fail on a missing package, Flower would send the coordinator the
error's text with the node's paths in it.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from client.arrived import receive
from client.asked import Asked, read
from client.audited import Audited
from client.device_bytes import DeviceBytes
from client.feedback import with_feedback
from client.node import Node, from_context
from client.permitted import note_training, permitted
from protocol.errors import AuditError, FedgeError, SecureSumError, StartMissingError
from protocol.records import METRICS, metric_record, offer_records, payload_bytes, read_asked, update_records
from strategies.libraries import calm

if TYPE_CHECKING:
    from client.round_plan import Work

log = logging.getLogger("flwr")
app = ClientApp()
_ERROR_CODE = 1


@app.query()
def query(message: Message, context: Context) -> Message:
    """Joins a federation: answers with an offer."""

    def work(asked: Asked) -> RecordDict:
        from client.round_plan import wish

        call, node = read_asked(asked.records), asked.node
        DeviceBytes(node, context.state).check()
        carries_out = work_of(node)
        for reason in carries_out.choose(wish(call, node), node).reasons.values():
            log.warning("%s: %s", node.name, reason)  # what is less than was asked for is never silent
        return offer_records(carries_out.join(call, node, None if node.trial is False else asked.memory))

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one round: answers with an update."""

    def work(asked: Asked) -> RecordDict:
        node, memory = asked.node, asked.memory
        received = receive(asked.records, memory)
        DeviceBytes(node, context.state).check_round(received.call)

        def trained() -> "Work":
            note_training(asked, context)
            done: Work = work_of(node).train(received, node, memory)
            log.info("round %d: %s", received.call.round, ", ".join(f"{k} {v:.4g}" for k, v in done.own_metrics.items()))
            return done

        if received.call.secure_sum:
            from client.secure_sum import Party, begin

            party = Party.of(node, context.state, received.call.federation)
            return begin(received, party, lambda: trained().update)
        if node.only_summed:
            raise SecureSumError("asked for an update of its own, and this node's only_summed is true; nothing is trained")
        promise = received.call.privacy
        if promise and promise.noise == "nodes":
            raise SecureSumError(
                "promised noise that nodes add inside a secure sum, and asked for an update; nothing is trained"
            )
        done = trained()
        metrics = {} if promise else asked.policy.told(done.metrics, done.update.manifest.num_examples)
        update = asked.policy.coarse(with_feedback(done.update, received, memory), received.call.plan)
        return update_records(update, received.call.wire, metrics, received.trained())

    return _answer(message, context, work)


@app.train("secure_sum")
def secure_sum(message: Message, context: Context) -> Message:
    """Goes on with a round whose updates are only added up: answers as its stage asks."""

    def work(asked: Asked) -> RecordDict:
        from client.secure_sum import Party, go_on

        return go_on(asked.records, lambda federation: Party.of(asked.node, context.state, federation))

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures the global adapter on held-out rows: answers with metrics."""

    def work(asked: Asked) -> RecordDict:
        DeviceBytes(asked.node, context.state).check()
        metrics, count = work_of(asked.node).evaluate(receive(asked.records, asked.memory), asked.node, asked.memory)
        return RecordDict({METRICS: metric_record(asked.policy.told(metrics, count), asked.policy.counted(count))})

    return _answer(message, context, work)


def work_of(node: Node) -> ModuleType:
    """What carries a round out: PyTorch, or a device's bundle; each joins, chooses, trains and evaluates."""
    return import_module("client.device" if node.device else "client.round")


def _answer(message: Message, context: Context, work: Callable[[Asked], RecordDict]) -> Message:
    """Every message's way through this node; what stops it anywhere leaves as a code."""
    calm()
    told = None
    try:
        told = Audited(from_context(context), context)
        told.arrived(message)
        asked = read(message, context)  # who asks, and whether it is new
        told.asked(asked)
        spent = DeviceBytes(asked.node, context.state)
        if asked.kind != MessageType.QUERY:
            spent.count_message(asked.records)
        asked = permitted(asked, context)
        answer = work(asked)
        asked.policy.check_upload(payload_bytes(answer))
        if asked.kind != MessageType.QUERY:
            spent.count_message(answer)
        told.sent(asked, answer)
        return Message(asked.signed(answer), reply_to=message)
    except FedgeError as error:
        expected = isinstance(error, StartMissingError)  # the coordinator sends it whole
        log.log(logging.INFO if expected else logging.ERROR, "%s", error)
        failed: Exception = error
    except Exception as error:
        # Whatever a library raises may quote a row: the whole of it stays in this node's own log.
        log.exception("the round failed (%s)", type(error).__name__)
        failed = error
    return Message(Error(code=_ERROR_CODE, reason=_code(told, failed)), reply_to=message)


def _code(told: Audited | None, failed: Exception) -> str:
    """What leaves of an error; noted before."""
    code = failed.code if isinstance(failed, FedgeError) else FedgeError.code
    try:
        if told and not isinstance(failed, AuditError):
            told.refused(failed)
    except AuditError as error:
        log.error("%s", error)
        return error.code
    except Exception:  # even a defect of the log leaves as a code
        log.exception("the audit log failed")
    return code
