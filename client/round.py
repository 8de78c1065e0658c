"""One round at a node: choose a plan, load, put the global adapter in, train on fresh rows, make the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.node import Node
from protocol.adapter import Adapter, Array
from protocol.errors import BaseMismatchError, DataError
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.records import Call, Offer, Received
from protocol.update import Update
from strategies.base_model import Base, find, load_tokenizer
from strategies.data.encode import is_usable
from strategies.data.formats import LabelledText, Row, load, load_groups
from strategies.data.splits import hold_out, read_on
from strategies.evaluation.measure import measure
from strategies.label_head import last_layer
from strategies.methods import lora
from strategies.selector import Selection, select
from strategies.training import Stretch, fit

_TOLD = ("train-loss", "train-steps")


@dataclass(frozen=True)
class Work:
    """What one round made.

    Attributes:
        update: Goes to the coordinator.
        metrics: Go with it.
        own_metrics: Everything that was measured; seconds and counts of rows speak of hardware and data and stay here.
        position: Where the next round begins to read.
    """

    update: Update
    metrics: dict[str, float]
    own_metrics: dict[str, float]
    position: int


def choose(wish: Plan, node: Node) -> Selection:
    """The plan that this node carries out, with its reasons; the reasons stay here."""
    return select(wish, node.tier, node.max_rank)


def join(call: Call, node: Node) -> Offer:
    """Looks at plan, data and base, and says which adapter this node can train.

    Raises:
        UserError: The base or the data is not there or does not fit the plan.
    """
    plan, base = choose(call.plan, node).chosen, find(call.plan.base_model)
    modules, dense = lora.shapes(base, plan)
    tokenizer = load_tokenizer(base)
    for rows, path in zip(_split(plan, node), (node.train, node.evaluate or node.train), strict=True):
        if not any(is_usable(row, tokenizer, plan.data.max_length) for row in rows):
            raise DataError(_all_too_long(path, plan))
    return Offer(
        name=node.name,
        base_digest=base.digest,
        method=plan.method,
        precision=plan.precision,
        r=plan.lora.r,
        modules=modules,
        dense=dense,
    )


def train(received: Received, node: Node, position: int) -> Work:
    """Trains one round.

    Args:
        received: The coordinator's call and the whole global adapter; this node trains its leading directions.
        node: This node's settings.
        position: Rows that this node has trained on before.

    Raises:
        BaseMismatchError: The adapter is of another base than the one here.
    """
    call = received.call
    plan, base = _at_offered_rank(call, node), _same_base(call)
    rows = training_rows(plan, node)
    own = _own_labels(rows, plan)
    fresh, after = _fresh(rows, plan, call, base, position) if _counts_steps(plan, call) else (rows, position)
    trained = fit(
        # A new seed each round, or directions that a small rank leaves free would start from the same draw for ever.
        plan.model_copy(update={"training": plan.training.model_copy(update={"seed": plan.training.seed + call.round - 1})}),
        base,
        fresh,
        held_out_rows(plan, node) if plan.training.eval_steps else (),
        folder=node.folder / call.federation / f"round-{call.round:04d}" if node.folder else None,
        progress=node.progress,
        start=received.adapter if call.round > 1 else None,
        own_labels=own,
        stretch=_stretch(plan, call),
    )
    manifest = Manifest(
        base_digest=base.digest,
        kind="update",
        method=plan.method,
        r=plan.lora.r,
        precision=plan.precision,
        federation=call.federation,
        round=call.round,
        parent=call.digest,
        num_examples=min(len(fresh), _taken(plan) or len(fresh)),
    )
    update = Update(trained.adapter, manifest, _trained_rows(trained.adapter, own, plan))
    told = {name: value for name, value in trained.metrics.items() if name in _TOLD}
    return Work(update, told, dict(trained.metrics), after)


def evaluate(received: Received, node: Node) -> tuple[dict[str, float], int]:
    """Measures the global adapter on this node's held-out rows; returns metrics and how many rows."""
    plan, base = choose(received.call.plan, node).chosen, _same_base(received.call)
    rows = held_out_rows(plan, node)
    return measure(plan, base, rows, received.adapter), len(rows)


def training_rows(plan: Plan, node: Node) -> list[Row]:
    """Rows that may train: all of the file, or all but the held-out share."""
    return load(node.train, plan) if node.evaluate else _split(plan, node)[0]


def held_out_rows(plan: Plan, node: Node) -> list[Row]:
    """Rows that must not train."""
    return load(node.evaluate, plan) if node.evaluate else _split(plan, node)[1]


def _split(plan: Plan, node: Node) -> tuple[list[Row], list[Row]]:
    """Rows that train and rows that are held out."""
    if node.evaluate:
        return load(node.train, plan), load(node.evaluate, plan)
    groups = load_groups(node.train, plan)
    if len(groups) < 2:
        raise DataError(f"{node.train}: 1 row; holding rows out needs at least 2, or a separate evaluate file")
    # Turns of one conversation stay together: the later ones quote the earlier ones.
    train, held = hold_out(groups, plan.data.evaluate_fraction, plan.training.seed)
    return [row for group in train for row in group], [row for group in held for row in group]


def _counts_steps(plan: Plan, call: Call) -> bool:
    """Whether a round takes a part of the rows; where the plan counts epochs, or there is but one round, it takes all."""
    return plan.training.max_steps is not None and call.rounds > 1


def _fresh(rows: Sequence[Row], plan: Plan, call: Call, base: Base, position: int) -> tuple[list[Row], int]:
    """As many usable rows as the round's steps can take, read on from ``position``, and where the reading stopped."""
    settings, tokenizer, wanted = plan.training, load_tokenizer(base), _taken(plan)
    fresh: list[Row] = []
    for read, at in enumerate(read_on(len(rows), position, settings.seed), 1):
        if is_usable(rows[at], tokenizer, plan.data.max_length):
            fresh.append(rows[at])
        if len(fresh) == wanted:
            return fresh, position + read
        if read == len(rows) and not fresh:
            break
    raise DataError(f"round {call.round}: {len(rows)} rows, none with an answer within {plan.data.max_length} tokens")


def _all_too_long(path: Path, plan: Plan) -> str:
    return f"{path}: no row has any of its answer within {plan.data.max_length} tokens; raise data.max_length"


def _taken(plan: Plan) -> int:
    """Rows that the plan's steps take; 0 where it counts epochs."""
    settings = plan.training
    return (settings.max_steps or 0) * settings.batch_size * settings.gradient_accumulation_steps


def _stretch(plan: Plan, call: Call) -> Stretch:
    steps = plan.training.max_steps
    if steps is None or call.rounds == 1:
        return Stretch()
    climb = round(steps * plan.training.restart_warmup_ratio)
    return Stretch(done=steps * (call.round - 1), total=steps * call.rounds, climb=climb)


def _at_offered_rank(call: Call, node: Node) -> Plan:
    plan = choose(call.plan, node).chosen
    return plan if plan.lora.r == call.r else plan.model_copy(update={"lora": plan.lora.with_rank(call.r)})


def _same_base(call: Call) -> Base:
    base = find(call.plan.base_model)
    if call.manifest and call.manifest.base_digest != base.digest:
        raise BaseMismatchError(
            f"the federation trains base {call.manifest.base_digest[:12]}, {base.folder} is {base.digest[:12]}"
        )
    return base


def _own_labels(rows: Sequence[Row], plan: Plan) -> frozenset[int] | None:
    """Rows of the head that this node has labels for; None where it has all of them, or there is no head."""
    own = frozenset(row.label for row in rows if isinstance(row, LabelledText))
    return own if 0 < len(own) < len(plan.data.labels or ()) else None


def _trained_rows(adapter: Adapter, own: frozenset[int] | None, plan: Plan) -> dict[str, Array]:
    count = len(plan.data.labels or ())
    if own is None:
        return {}
    mask = np.zeros(count, dtype=bool)
    mask[sorted(own)] = True
    shapes = {name: tensor.shape for name, tensor in adapter.dense.items()}
    return dict.fromkeys(last_layer(shapes, count), mask)
