"""An adapter of the device's own on top of the federation's: after a round, as far as time allows. It never leaves."""

import logging
from collections.abc import Sequence
from pathlib import Path

from client.device_bundle import Opened
from client.node import Node
from edge.runtime.adapting.budget import Budget, Meter
from edge.runtime.adapting.learning import Learning, Settings, new_adapter
from edge.runtime.adapting.passes import Example
from edge.runtime.adapting.personal import Personal, on_top
from edge.runtime.adapting.rows import Examples
from edge.runtime.adapting.sealing import seal_of
from edge.runtime.adapting.state import Trail, alone_in
from protocol.adapter import Adapter, Factors
from protocol.configuration import parse
from protocol.plan import Plan

log = logging.getLogger("flwr")
_RANK = "own-rank"
_MOST_RANK = 8


def adapt(node: Node, bundle: Opened, plan: Plan, examples: Sequence[Example], beneath: Adapter) -> None:
    """Trains the device's own directions on top of what it was sent, and keeps them only if they are better on held-back rows.

    What is kept is the whole of both (``edge.runtime.adapting.adapt.in_use`` serves it); the next round begins from its own
    directions, on top of the adapter that arrives then.

    Args:
        node: Names the folder, and the seconds that it may take.
        bundle: That learns.
        plan: The federation's: task, rate and batch.
        examples: The node's training rows.
        beneath: The adapter as it arrived, which stays as it is.
    """
    if node.device_own is not None:
        with alone_in(node.device_own):
            _adapted(node, node.device_own, bundle, plan, examples, beneath)


def _adapted(node: Node, folder: Path, bundle: Opened, plan: Plan, examples: Sequence[Example], beneath: Adapter) -> None:
    room = bundle.gradients.largest_rank - max(beneath.ranks().values(), default=0)
    if room < 1:
        log.warning("%s: no room for an adapter of its own beside rank %d", node.name, bundle.gradients.largest_rank - room)
        return
    seal = seal_of(folder, node.sealing())
    kept, trail = Personal(folder, seal), Trail(folder, seal)
    asked = {
        "r": min(plan.lora.r, _MOST_RANK, room),
        "learning_rate": plan.training.learning_rate,
        "batch_size": plan.training.batch_size,
        "epochs": 1,
        "evaluate_every": 5,
        "seed": plan.training.seed,
        "beta": plan.dpo.beta,
    }
    settings = parse(asked, Settings, source="plan")
    before, said = kept.current()
    same_base = before is not None and before.facts.get("base_digest") == bundle.manifest.base_digest
    own = _own(before.adapter, before.facts.get(_RANK)) if before and same_base else Adapter()
    fresh = new_adapter(bundle.gradients, settings)
    fits = _shapes(own) == _shapes(fresh) and max(own.ranks().values(), default=0) <= room
    start = Adapter(own.factors if fits else fresh.factors, {})
    task = {"sft": "sft", "dpo": "dpo"}.get(plan.objective, "classification")
    learning = Learning(
        bundle.gradients,
        Examples(task, list(examples)),  # type: ignore[arg-type] # one of the three
        settings,
        start,
        trail,
        frozen=beneath,
    )
    learnt = learning.run(Meter(Budget(seconds=node.device_own_seconds, battery_percent=node.device_battery)))
    used = learning.held_back(start)
    for line in (*said, *learnt.said):
        log.warning("%s: %s", node.name, line)
    if learnt.steps and learnt.after.loss < used.loss:
        rank = max(learnt.adapter.ranks().values(), default=0)
        told = {"base_digest": bundle.manifest.base_digest, "beneath": "", "labels": list(plan.data.labels or ()), _RANK: rank}
        kept.keep(on_top(beneath, learnt.adapter), told)
    if learnt.ended:
        trail.forget()
    log.info("%s: own adapter: loss %.4g on top of the federation's %.4g", node.name, learnt.after.loss, used.loss)


def _shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    return {module: pair.shape for module, pair in adapter.factors.items()}


def _own(adapter: Adapter, rank: object) -> Adapter:
    """The device's own directions of a version that it kept: behind those that it was sent."""
    if type(rank) is not int or rank < 1:
        return Adapter()
    return Adapter(
        {module: Factors(pair.A[-rank:], pair.B[:, -rank:], pair.scaling) for module, pair in adapter.factors.items()}
    )
