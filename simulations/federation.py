"""Federations in this process, and how they compare: base, own data only, federated, everything in one place."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from client.app import app, work_of
from client.node import Node
from client.round import choose, held_out_rows, training_rows
from protocol.adapter import Adapter
from protocol.errors import ConfigurationError, UserError, shown
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.records import Call
from protocol.signature import make_key, read_private, write_pair
from server.ledger import Ledger, RoundRecord, vault_of
from server.rounds import Outcome, run
from server.trust import Trust
from simulations.device_grid import DeviceGrid, DeviceRound, DeviceTotals
from simulations.devices import Devices, Fleet
from simulations.grid import InProcessGrid
from strategies.base_model import find
from strategies.data.ai_feedback import made
from strategies.data.formats import Row
from strategies.evaluation.measure import LEADING, measure
from strategies.methods import registry
from strategies.narrowing import Narrowed
from strategies.training import fit

Say = Callable[[str], None]
STATE = "node-state"
_ENROLLED, _FOR_EVER = "enrolled.yaml", 1e9


@dataclass(frozen=True)
class Comparison:
    """One metric, per node and way of training, from the same held-out rows.

    Attributes:
        metric: Which.
        base: The base as it is.
        local: Trained on the node's own rows alone.
        local_mean: Mean over all nodes' local-only adapters, on this node's held-out rows.
        federated: The federation's global adapter.
        centralised: Trained on all rows in one place, with as many examples as the federation saw in all.
        outcome: The federation's whole story.
        selections: What each node chose and why.
    """

    metric: str
    base: Mapping[str, float]
    local: Mapping[str, float]
    local_mean: Mapping[str, float]
    federated: Mapping[str, float]
    centralised: Mapping[str, float]
    outcome: Outcome
    selections: Mapping[str, Narrowed]


def check(federation: Federation, nodes: Sequence[Node]) -> None:
    """Looks at the bases, asks every node to join and shows its own words if it cannot; a network would bring but a code.

    Raises:
        UserError: What is wrong with a base or plan.
        ConfigurationError: What is wrong with each node's data or settings, all of them.
    """
    plans = [plans[0] for plans in federation.schedules().values()]
    for plan in plans:
        registry.shape(find(plan.base_model), plan)
    fewest = federation.rounds.minimum_nodes
    problems = [
        f"{count} listed{f' for adapter {adapter}' if adapter else ''}, rounds.minimum_nodes is {fewest}; nobody else can come"
        for adapter, count in Counter(node.adapter for node in nodes).items()
        if count < fewest
    ]
    call = Call(federation=federation.name, round=0, rounds=1, plan=plans[0], adapters=dict(federation.adapters))
    for number, node in enumerate(nodes, 1):
        state = node.state or federation.output.resolve() / STATE / f"{number:04d}"
        try:
            work_of(node).join(call, node.model_copy(update={"state": state}), aloud=False)
        except ConfigurationError as error:
            problems += [f"{node.name}: {problem}" for problem in error.problems]
        except UserError as error:
            problems.append(f"{node.name}: {error}")
    if problems:
        raise ConfigurationError("nodes", problems)


def check_devices(federation: Federation, devices: Devices) -> None:
    """Deals out the rows and asks the first device to join; what is wrong with another's rows shows as a code when it joins.

    Raises:
        UserError: What is wrong with rows, traces, bundle or plan.
    """
    plan = next(iter(federation.schedules().values()))[0]
    with tempfile.TemporaryDirectory(prefix="fedge-devices-") as folder:
        fleet = Fleet(devices, federation, Path(folder) / STATE, Path(folder))
        if len(fleet) < (fewest := federation.rounds.minimum_nodes):
            raise ConfigurationError("devices", [f"{len(fleet)} there, rounds.minimum_nodes is {fewest}; nobody else can come"])
        with fleet.asked(0):
            node = fleet.node(0)
            work_of(node).join(Call(federation=federation.name, round=0, rounds=1, plan=plan), node, aloud=False)


def federate_devices(
    federation: Federation,
    devices: Devices,
    watch: Callable[[RoundRecord, DeviceRound], None] = lambda record, told: None,
) -> tuple[Outcome, DeviceTotals]:
    """Runs a federation over many devices in simulated time; one that died goes on to the same bit.

    In ``OUTPUT/node-state`` each device that keeps anything has a folder, and all share a journal and a log.

    Raises:
        UserError: Rows or traces cannot be used.
        FederationError: Too few devices could take part, or the journal of a run that died is not whole.
    """
    memory = federation.output.resolve() / STATE
    # Deadlines are the grid's, in simulated time: how long this machine computes is none of the devices' business.
    patient = federation.rounds.model_copy(update={"timeout_seconds": _FOR_EVER})

    def forget() -> None:
        if memory.exists():
            shutil.rmtree(memory)

    with tempfile.TemporaryDirectory(prefix="fedge-devices-") as folder:
        grid = DeviceGrid(app, Fleet(devices, federation, memory, Path(folder)), federation.rounds, memory)
        before = Ledger(federation.output, identity=federation.identity(), vault=vault_of(federation)).newest().checkpoint
        if before:
            grid.go_on(before.round)
        published = federation.model_copy(update={"rounds": patient})
        return run(grid, published, lambda record: watch(record, grid.report(record.round)), forget), grid.totals()


def federate(
    federation: Federation, nodes: Sequence[Node], watch: Callable[[RoundRecord], None] = lambda record: None
) -> Outcome:
    """Runs a federation over nodes in this process: the same ClientApp and the same rounds as on a SuperLink.

    A node that names no ``state`` remembers in ``OUTPUT/node-state``, so that a run that died goes on to the same bit; one that
    begins anew finds nothing there. Secure sums, and messages where they are signed, are made with keys for this run alone.

    Raises:
        ConfigurationError: Two nodes have one name, and keys are enrolled by name.
        FederationError: Too few nodes could take part.
    """
    memory = federation.output.resolve() / STATE

    def forget() -> None:
        if memory.exists():
            shutil.rmtree(memory)

    with tempfile.TemporaryDirectory(prefix="fedge-keys-") as folder:
        asked = federation.trust
        signed = federation.secure_sum.enabled or asked.signed or asked.enrolled is not None
        keys, trust = _keys(Path(folder), nodes) if signed else ({}, None)
        configs = [
            {key.replace("_", "-"): str(value) if isinstance(value, Path) else value for key, value in own.items()}
            for own in (
                {
                    "trial": False,
                    "state": memory / f"{number:04d}",
                    **node.model_dump(exclude_none=True),
                    **keys.get(node.name, {}),
                }
                for number, node in enumerate(nodes, 1)
            )
        ]
        return run(InProcessGrid(app, configs), federation, watch, forget, trust=trust)


def _keys(folder: Path, nodes: Sequence[Node]) -> tuple[dict[str, dict[str, Path]], Trust]:
    """Keys for this run alone: settings by node, its own key and the list of all of them, and the coordinator's side of it."""
    twice = [name for name, count in Counter(node.name for node in nodes).items() if count > 1]
    if twice:
        raise ConfigurationError(
            "nodes", [f"name: {shown(twice[0], 80)} found twice, and a key is enrolled by name; rename one"]
        )
    names = [node.name for node in nodes]
    coordinator = next(name for number in count(1) if (name := f"coordinator-{number}") not in names)
    listed, lines, settings = folder / _ENROLLED, dict[str, Any](), dict[str, dict[str, Path]]()
    for number, name in enumerate([coordinator, *names]):
        key, private = make_key(), folder / f"{number}"
        public = write_pair(private, key)
        lines[name] = {"key": public.read_text(encoding="ascii").strip(), "role": "coordinator" if not number else "node"}
        settings[name] = {"identity": private, "enrolled": listed}
    listed.write_text(json.dumps(lines), encoding="utf-8")  # which is YAML
    return settings, Trust(read_private(settings.pop(coordinator)["identity"]), listed)


def compare(
    federation: Federation,
    nodes: Sequence[Node],
    metric: str | None = None,
    watch: Callable[[RoundRecord], None] = lambda record: None,
    say: Say = lambda text: None,
    alone_learning_rate: float | None = None,
) -> Comparison:
    """Runs a federation and what it is to be held against, at equal numbers of training examples.

    Args:
        federation: Measured by its nodes only at the end of this comparison, not by itself.
        nodes: At least one.
        metric: One that ``strategies.evaluation.measure`` returns; without it the objective's leading one.
        watch: Called after every round.
        say: Called with a line before each stage.
        alone_learning_rate: For local-only and centralised training, when their best rate is not the federation's.
    """
    plan, base = federation.plan, find(federation.plan.base_model)
    metric = metric or LEADING[plan.objective]
    selections = {node.name: choose(plan, node) for node in nodes}
    held_out = {node.name: made(held_out_rows(plan, node), plan, base, Adapter(), training=False).rows for node in nodes}
    rows = {node.name: training_rows(plan, node) for node in nodes}

    def on_each(adapter: Adapter | None) -> dict[str, float]:
        return {name: measure(plan, base, part, adapter)[metric] for name, part in held_out.items()}

    def alone(plan: Plan, rows: Sequence[Row]) -> dict[str, float]:
        return on_each(fit(plan, base, made(rows, plan, base, Adapter(), training=True).rows).adapter)

    say("base model, as it is")
    before = on_each(None)
    say(f"federated: {len(nodes)} nodes, {federation.rounds.count} rounds")
    outcome = federate(federation, nodes, watch)
    federated = on_each(outcome.adapter)
    local_on: dict[str, dict[str, float]] = {}
    for node in nodes:
        say(f"{node.name}: own data only")
        own = _alone(selections[node.name].chosen, federation.rounds.count, 1, alone_learning_rate)
        local_on[node.name] = alone(own, rows[node.name])
    say("centralised: all rows in one place")
    pooled: list[Row] = [row for name in rows for row in rows[name]]
    together = _alone(plan, federation.rounds.count, len(nodes), alone_learning_rate)
    central = alone(together, pooled)
    return Comparison(
        metric=metric,
        base=before,
        local={name: local_on[name][name] for name in held_out},
        local_mean={name: mean([local_on[other][name] for other in local_on]) for name in held_out},
        federated=federated,
        centralised=central,
        outcome=outcome,
        selections=selections,
    )


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _alone(plan: Plan, rounds: int, nodes: int, learning_rate: float | None) -> Plan:
    """The plan of a training in one stretch that sees as many examples as ``nodes`` nodes do in ``rounds`` rounds."""
    settings = plan.training
    changes: dict[str, float] = {"num_train_epochs": settings.num_train_epochs * rounds}
    if settings.max_steps:
        changes = {"max_steps": settings.max_steps * rounds * nodes}
    if learning_rate:
        changes["learning_rate"] = learning_rate
    return plan.model_copy(update={"training": settings.model_copy(update=changes)})
