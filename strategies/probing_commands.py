"""The verb that looks before it trains: ``fedge probe``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def mount(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command()(probe)


def probe(
    config: Annotated[Path, typer.Argument(help="A job of objective classification: its base, labels and data.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; else the base as it is.")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Most rows to learn from, and to measure on.")] = 2000,
    report: Annotated[Path | None, typer.Option(help="Folder for probe.json and a plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
) -> None:
    """Shows how much each layer of a base already tells of the labels, by a linear probe on each."""
    from protocol.configuration import load
    from protocol.errors import ConfigurationError
    from protocol.files import read_stored, write_whole
    from strategies import probing
    from strategies.base_model import find
    from strategies.data.prepared import prepare
    from strategies.evaluation.report import check_plots
    from strategies.job import Job

    job = load(config, Job).beside(config).jobs()[-1]
    if job.objective != "classification" or job.data.train is None:
        raise ConfigurationError(str(config), [f"objective: found {job.objective}; probes learn labels, write classification"])
    if report:
        check_plots()
    plan, base = job.plan(), find(job.base_model)
    stored = read_stored(adapter, base_digest=base.digest) if adapter else None
    prepared = prepare(plan, job.data.train, job.data.evaluate)
    use = stored.on(plan) if stored else plan
    found = probing.probe(use, base, prepared.training, prepared.held_out, stored.adapter if stored else None, rows)
    told = json.dumps(asdict(found))
    if report:
        write_whole(report / "probe.json", f"{told}\n")
        write_whole(report / "probe.png", probing.plot(found, job.base_model))
    if as_json:
        typer.echo(told)
        return
    for one in found.layers:
        bar = "█" * round(30 * one.accuracy)
        typer.echo(f"{one.layer:>3}  {one.accuracy:6.1%} ± {one.error:.1%}  {bar}{'  best' if one.layer == found.best else ''}")
    typer.echo(
        f"always the commonest label: {found.majority:.1%}; {found.rows[0]} rows learnt from, {found.rows[1]} measured on"
    )
    typer.echo(f"worth a try: method freezing with freezing.frozen_share {found.frozen_share:.2f}")
