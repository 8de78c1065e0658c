"""What one round is of a plan, whatever carries it out: which plan, which rows, where on its schedule, what is an update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from client.node import Node
from protocol.adapter import Adapter, Array
from protocol.errors import ConfigurationError, DataError
from protocol.plan import Plan
from protocol.product_space import split
from protocol.records import Call, Received
from protocol.update import Update
from strategies.data.formats import LabelledText, Row
from strategies.data.splits import read_on
from strategies.label_head import last_layer
from strategies.methods import lora
from strategies.training import Stretch

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What one round made.

    Attributes:
        update: Goes to the coordinator.
        metrics: Go with it.
        own_metrics: Everything that was measured; seconds and counts of rows speak of hardware and data and stay here.
    """

    update: Update
    metrics: dict[str, float]
    own_metrics: dict[str, float]


def wish(call: Call, node: Node) -> Plan:
    """The plan that is published for this node: of several adapters, that of the one that it names.

    Raises:
        ConfigurationError: The node names none of several, or one that there is not.
    """
    if not call.adapters and node.adapter is None:
        return call.plan
    if node.adapter in call.adapters:
        return call.adapters[node.adapter]
    there = (
        f"there are {', '.join(sorted(call.adapters))}" if call.adapters else "there is but one, without a name; leave it out"
    )
    found = "missing" if node.adapter is None else f"found {node.adapter!r}"
    raise ConfigurationError("node config", [f"adapter: {found}; in federation {call.federation} {there}"])


def rows_taken(plan: Plan) -> int:
    """Rows that the plan's steps take; 0 where it counts epochs. Of several answers to one prompt each counts in a batch."""
    settings = plan.training
    answers = plan.rl.num_generations if plan.objective == "rl" else 1
    return (settings.max_steps or 0) * settings.batch_size * settings.gradient_accumulation_steps // answers


def counts_steps(plan: Plan, call: Call) -> bool:
    """Whether a round takes a part of the rows.

    It takes all where the plan counts epochs, where there is but one round, and where each row is private: steps draw from all.
    """
    return plan.training.max_steps is not None and call.rounds > 1 and plan.training.example_privacy is None


def rows_from(rows: Sequence[T], call: Call, plan: Plan, wanted: int, usable: Callable[[T], bool]) -> list[T]:
    """As many usable rows as the round's steps take.

    They are read on from where a federation without unusable rows would stand, ``(round - 1) * rows per round``: a node needs
    no memory for it, and a round that is asked for again gets the same rows.

    Raises:
        DataError: None of the rows is usable.
    """
    found: list[T] = []
    for read, at in enumerate(read_on(len(rows), (call.round - 1) * wanted, plan.training.seed), 1):
        if usable(rows[at]):
            found.append(rows[at])
        if len(found) == wanted:
            return found
        if read == len(rows) and not found:
            break
    raise DataError(f"round {call.round}: {len(rows)} rows, none with an answer within {plan.data.max_length} tokens")


def of_round(plan: Plan, number: int) -> Plan:
    """A new seed each round, or directions that a small rank leaves free would start from the same draw for ever."""
    return plan.model_copy(update={"training": plan.training.model_copy(update={"seed": plan.training.seed + number - 1})})


def stretch(plan: Plan, call: Call) -> Stretch:
    """Where on the schedule of its stage the round is."""
    steps = plan.training.max_steps
    if steps is None or call.rounds == 1:
        return Stretch()
    climb = round(steps * plan.training.restart_warmup_ratio)
    return Stretch(done=steps * (call.round - call.first), total=steps * (call.rounds - call.first + 1), climb=climb)


def at_asked_rank(received: Received, plan: Plan) -> Plan:
    """A node's plan, with so small a rank that its update has no more than the call's."""
    # What begins with a part of the base needs room to take it away again; what is sent a start does not. AdaLoRA always does.
    room = 1 if received.adapter.factors and plan.method != "adalora" else plan.update_rank / plan.lora.r
    rank = max(1, min(plan.lora.r, int(received.call.r / room)))
    return plan if rank == plan.lora.r else plan.model_copy(update={"lora": plan.lora.with_rank(rank)})


def with_what_stayed(trained: Adapter, start: Adapter, r: int) -> Adapter:
    """The trained directions and, up to ``r``, those of the start that stayed frozen because a module's own rank is smaller.

    The rule counts a node's change from the leading ``r`` directions; these did not change.
    """
    factors = dict(trained.factors)
    for module, pair in trained.factors.items():
        if module in start.factors:
            stayed = split(split(start.factors[module], r)[0], pair.r)[1]
            factors[module] = lora.beside((1.0, pair), (1.0, stayed)) if stayed.r else pair
    return Adapter(factors, trained.dense)


def own_labels(rows: Sequence[Row], plan: Plan) -> frozenset[int] | None:
    """Rows of the head that this node has labels for; None where it has all of them, or there is no head."""
    own = frozenset(row.label for row in rows if isinstance(row, LabelledText))
    return own if 0 < len(own) < len(plan.data.labels or ()) else None


def trained_rows(adapter: Adapter, own: frozenset[int] | None, head: frozenset[str], plan: Plan) -> dict[str, Array]:
    """By tensor of the head's last layer, which of its rows trained; nothing where all did."""
    count = len(plan.data.labels or ())
    if own is None:
        return {}
    mask = np.zeros(count, dtype=bool)
    mask[sorted(own)] = True
    shapes = {name: tensor.shape for name, tensor in adapter.dense.items() if name in head}
    return dict.fromkeys(last_layer(shapes, count), mask)
