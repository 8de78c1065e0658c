"""Holds a message against this node's policy, before anything is loaded or done for it."""

from dataclasses import replace
from datetime import UTC, datetime

from flwr.app import Context, MessageType

from client.asked import SECURE_SUM, Asked
from client.memory import Memory
from client.node import Node
from client.policy import Kind, Question, read_policy
from protocol.records import Call, read_asked
from protocol.signature import fingerprint

_KINDS: dict[str, Kind] = {MessageType.QUERY: "join", MessageType.TRAIN: "train", MessageType.EVALUATE: "evaluate"}
_ALL_FEDERATIONS = ""  # which is no federation's name


def permitted(asked: Asked, context: Context) -> Asked:
    """The message, once the policy allows what it asks, to a node that is as strict as the policy.

    Raises:
        PolicyError: It does not allow it.
        ConfigurationError: The policy's file, or the one of how rows are treated, cannot be used.
    """
    policy, node = read_policy(asked.node.policy), asked.node
    coordinator = fingerprint(asked.coordinator) if asked.coordinator else ""
    if asked.kind == SECURE_SUM:
        policy.check_stage(asked.federation, coordinator)
    elif node.policy:
        day, now = Memory.of(node, context.state, _ALL_FEDERATIONS), datetime.now(UTC)
        asks = question(_KINDS[asked.kind], read_asked(asked.records), asked, coordinator)
        policy.check(asks, now, policy.begun(day, now), lambda: _digest(asks, node))
    fewest = max(node.fewest_summed, policy.fewest_summed or 0)
    stricter = {"fewest_summed": fewest, "only_summed": node.only_summed or policy.secure_sum}
    return replace(asked, policy=policy, node=node.model_copy(update=stricter))


def note_training(asked: Asked, context: Context) -> None:
    """Counts a training of this day, before it begins."""
    asked.policy.note(Memory.of(asked.node, context.state, _ALL_FEDERATIONS), datetime.now(UTC))


def question(kind: Kind, call: Call, asked: Asked, coordinator: str) -> Question:
    """What a call asks of this node, with the rows treated as plan and institution say."""
    from client.round_plan import wish

    plan = wish(call, asked.node) if kind == "join" else call.plan
    return Question(kind, call, plan, asked.node.treating(plan).data.masking.kinds, coordinator)


def _digest(asks: Question, node: Node) -> str:
    if node.device:
        from client.device_bundle import opened

        return opened(node).manifest.base_digest
    from strategies.base_model import find

    return find(asks.plan.base_model).digest
