"""Verbs that run whole federations in one process: ``fedge demo``, ``fedge simulate`` and, with one client, ``fedge train``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.ledger import RoundRecord
    from server.rounds import Outcome
    from simulations.demo_edge import OnDevice
    from simulations.device_grid import DeviceRound, DeviceTotals
    from simulations.federation import Comparison
    from simulations.scenario import Scenario
    from strategies.job import Job

Json = Annotated[bool, typer.Option("--json", help="Ends with one JSON line instead of tables.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command()(demo)
    app.command()(simulate)
    app.command()(train)


def demo(
    output: Annotated[Path, typer.Option(help="Keeps the institutions' data, every round and the adapter.")] = Path(
        "runs/demo"
    ),
    data_only: Annotated[bool, typer.Option("--data-only", help="Write the data and its YAML files, train nothing.")] = False,
    edge: Annotated[
        bool, typer.Option("--edge", help="Then makes a signed 8-bit bundle of it, and answers from that without PyTorch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Four institutions fine-tune one model together: no download, no GPU, a few minutes."""
    from simulations.demo import prepare, run

    scenario = prepare(output)
    if data_only:
        typer.echo(json.dumps({"scenario": str(scenario)}) if as_json else f"wrote {scenario}")
        return
    with _told_how_to_go_on():
        comparison = run(scenario, watch=_tell, say=_say)
    told: dict[str, Any] = _figures(comparison)
    if not as_json:
        _show(comparison)
        typer.echo(f"global adapter: {output / 'adapter'}")
    if edge:
        from simulations.demo_edge import answer_on_device

        device = answer_on_device(output, _say)
        told["edge"] = _figures_on_device(comparison, device)
        if not as_json:
            _show_device(comparison, device)
    if as_json:
        typer.echo(json.dumps(told))


def simulate(
    config: Annotated[Path, typer.Argument(help="Scenario YAML: the federation and its nodes, a partition or devices.")],
    as_json: Json = False,
) -> None:
    """Runs a federation in this process; no SuperLink, no Ray."""
    from simulations.federation import check, compare, federate
    from simulations.scenario import nodes_of, read_scenario

    scenario = read_scenario(config)
    federation = scenario.federation
    if scenario.devices:
        _simulate_devices(scenario, as_json=as_json)
        return
    check(federation, scenario.nodes)  # the base and listed nodes, before a partition writes anything
    nodes = nodes_of(scenario)
    if scenario.partition:
        check(federation, nodes)
    if scenario.compare:
        with _told_how_to_go_on():
            comparison = compare(federation, nodes, watch=_tell, say=_say)
        if as_json:
            typer.echo(json.dumps(_figures(comparison)))
        else:
            _show(comparison)
        return
    with _told_how_to_go_on():
        outcome = federate(federation, nodes, watch=_tell)
    _show_outcome(scenario, outcome, as_json=as_json)


def train(
    config: Annotated[Path, typer.Argument(help="Job YAML: plan, data and output.")],
    as_json: Json = False,
) -> None:
    """Fine-tunes on this machine: one client, one round, the same round code. What died goes on when it is given again."""
    from protocol.configuration import load
    from protocol.errors import UserError
    from protocol.plan import COMPRESSED
    from simulations.single import train_alone
    from strategies import processes
    from strategies.job import Job
    from strategies.training import follow

    if not processes.is_first():
        follow()
        return
    done: list[tuple[Job, RoundRecord]] = []
    try:
        job = load(config, Job).beside(config)
        with _told_how_to_go_on():
            train_alone(job, progress=True, say=_say, watch=lambda stage, record: done.append((stage, record)))
    except UserError:  # before anything was trained: the other processes wait for work
        processes.hand_out(None)
        raise
    processes.hand_out(None)
    last = done[-1][0]
    made = {"adapter": str(job.output / "adapter")}
    if last.method in COMPRESSED:
        made["model"] = str(last.output / "model")
    if as_json:
        told = [
            {"output": str(stage.output), "objective": stage.objective, **_measured(stage, record)} for stage, record in done
        ]
        stages = {"stages": told} if job.stages else {}
        typer.echo(json.dumps({**made, **stages, **_measured(*done[-1])}))
        return
    for number, (stage, record) in enumerate(done, 1):
        if job.stages:
            typer.echo(f"stage {number}, {stage.objective}: {stage.output}")
        figures = _measured(stage, record)
        held_out = {f"held-out {name}": value for name, value in figures["evaluation"].items()}
        for name, value in {**figures["training"], **held_out}.items():
            typer.echo(f"{name:>28}  {value:.6g}")
    for kind, place in made.items():
        typer.echo(f"{kind}: {place}")


def _simulate_devices(scenario: "Scenario", *, as_json: bool) -> None:
    from dataclasses import asdict

    from simulations.federation import check_devices, federate_devices

    if scenario.devices is None:
        raise ValueError("looked at before")
    check_devices(scenario.federation, scenario.devices)
    with _told_how_to_go_on():
        outcome, totals = federate_devices(scenario.federation, scenario.devices, watch=_tell_devices)
    _say(_spent(totals))
    _show_outcome(scenario, outcome, as_json=as_json, devices=asdict(totals))


def _tell_devices(record: "RoundRecord", told: "DeviceRound") -> None:
    ends = {
        "merged": len(record.accepted),
        "set aside": len(record.refused),
        "stragglers dropped": told.dropped,
        "gone": told.gone,
        "late": told.late,
        "out of bytes": told.refused,
        "failed": told.failed,
    }
    counts = ", ".join(f"{count} {name}" for name, count in ends.items() if count)
    traffic = f"{told.bytes_down / 1e6:.2f} MB down, {told.bytes_up / 1e6:.2f} MB up"
    losses = [metrics["loss"] for metrics in record.evaluation.values() if "loss" in metrics]
    measured = f", loss {sum(losses) / len(losses):.4g} at {len(losses)}" if losses else ""
    _say(f"{record.title}: {told.asked} of {told.available} asked: {counts}; {traffic}; hour {told.hours:.2f}{measured}")


def _spent(totals: "DeviceTotals") -> str:
    return (
        f"{totals.asked} of {totals.devices} devices spent {totals.total / 1e6:.2f} MB: mean {totals.mean / 1e3:.1f} kB, "
        f"median {totals.median / 1e3:.1f} kB, most {totals.most / 1e3:.1f} kB; {totals.refused} refused for it"
    )


def _show_outcome(scenario: "Scenario", outcome: "Outcome", *, as_json: bool, devices: dict[str, Any] | None = None) -> None:
    from server.ledger import newest_place

    places = {name: newest_place(scenario.federation, name) for name in outcome.kept}
    if as_json:
        plans = {name: {"method": o.method, "precision": o.precision, "r": o.r} for name, o in outcome.offers.items()}
        told: dict[str, Any] = {"devices": devices} if devices else {"plans": plans}
        told["ended"] = outcome.ended
        told["adapters"] = {name: str(place) for name, place in places.items()}
        told["evaluation"] = {k: v for kept in outcome.kept.values() for k, v in kept.record.evaluation.items()}
        typer.echo(json.dumps(told))
        return
    typer.echo(outcome.ended)
    for name, place in places.items():
        typer.echo(f"global adapter of rank {outcome.kept[name].manifest.r}: {place}")


def _measured(stage: "Job", record: "RoundRecord") -> dict[str, dict[str, float]]:
    """The figures of the one node, and what they cost each row where that is promised."""
    trained, measured = next(iter(record.accepted.values())), next(iter(record.evaluation.values()), {})
    cost = {}
    if promised := stage.training.example_privacy:
        from client.example_ledger import spent
        from simulations.single import MEMORY

        cost = {"example-epsilon": spent(stage.output / MEMORY, stage), "example-delta": promised.delta}
    return {"training": dict(trained) | cost, "evaluation": dict(measured)}


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on after the last round, or anew where all were done")
        raise typer.Exit(130) from None


def _say(text: str) -> None:
    typer.echo(f"· {text}", err=True)


def _tell(record: "RoundRecord") -> None:
    losses = [f"{name} {metrics['train-loss']:.3f}" for name, metrics in record.accepted.items() if "train-loss" in metrics]
    # Under a secure sum no node tells any.
    _say(f"{record.title}: {record.seconds:.1f} s" + (f", training loss {', '.join(losses)}" if losses else ""))
    if aside := record.merge.get("details", {}).get("set aside"):
        _say(f"{record.title}: set aside {aside}")
    for name, reason in {**record.refused, **record.silent, **record.paused, **record.evaluation_refused}.items():
        _say(f"{record.title}: without {name}: {reason}")


def _figures(comparison: "Comparison") -> dict[str, Any]:
    from simulations.federation import mean

    kinds = ("base", "local", "local_mean", "federated", "centralised")
    institutions = {name: {kind: round(getattr(comparison, kind)[name], 4) for kind in kinds} for name in comparison.base}
    means = {kind: round(mean(list(getattr(comparison, kind).values())), 4) for kind in kinds}
    plans = {
        name: {
            "method": selection.chosen.method,
            "precision": selection.chosen.precision,
            "r": selection.chosen.lora.r,
            "reasons": dict(selection.reasons),
        }
        for name, selection in comparison.selections.items()
    }
    return {"institutions": institutions, "mean": means, "plans": plans}


def _figures_on_device(comparison: "Comparison", device: "OnDevice") -> dict[str, Any]:
    accuracy = {
        name: {"pytorch": round(comparison.federated[name], 4), "bundle": round(share, 4)}
        for name, share in device.accuracy.items()
    }
    return {"bundle": str(device.bundle), "size_bytes": device.size_bytes, "accuracy": accuracy}


def _show_device(comparison: "Comparison", device: "OnDevice") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("institution", "PyTorch", "8-bit bundle", "a question", "the bundle's answer")
    table.title = "the global adapter on a device without PyTorch"
    for name, share in device.accuracy.items():
        table.add_row(name, f"{comparison.federated[name]:.0%}", f"{share:.0%}", *device.example[name])
    Console().print(table)
    typer.echo(f"bundle of {device.size_bytes / 1e6:.1f} MB: {device.bundle} (its public key: {device.bundle}-key.pub)")


def _show(comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    figures = _figures(comparison)
    table = Table("institution", "base", "own data only", "others' adapters too", "federated", "centralised")
    table.title = f"{comparison.metric} on held-out questions"
    rows = {**figures["institutions"], "mean": figures["mean"]}
    for name, values in rows.items():
        table.add_row(
            name, *(f"{value:.0%}" if "accuracy" in comparison.metric else f"{value:.4g}" for value in values.values())
        )
    chosen = Table("institution", "method", "base held at", "rank", "why", title="what each node chose")
    for name, selection in comparison.selections.items():
        plan = selection.chosen
        why = "\n".join(selection.reasons.values()) or "as published"
        chosen.add_row(name, plan.method, plan.precision, str(plan.lora.r), why)
    console = Console()
    console.print(chosen)
    console.print(table)
