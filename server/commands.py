"""Verbs of a coordinator: ``fedge coordinator status | watch | rounds | resume | export``. They read a federation's folder."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protocol.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from server.story import Story

Folder = Annotated[Path, typer.Argument(help="Output folder of the federation.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]

coordinator = typer.Typer(help="What a federation's folder says, and how it goes on.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.add_typer(coordinator, name="coordinator")


@coordinator.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Where a federation stands: round, members, what they measured, traffic, who was refused and why."""
    from server.story import read_story

    story = read_story(folder)
    if as_json:
        typer.echo(json.dumps(story.summary()))
        return
    _console().print(*_status_tables(story), sep="\n")


@coordinator.command()
def watch(folder: Folder, every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0) -> None:
    """The same, kept up to date in the terminal until the federation ends."""
    import time

    from rich.console import Group
    from rich.live import Live

    from server.story import read_story

    with Live(console=_console(), refresh_per_second=4) as live:
        while True:
            story = read_story(folder)
            live.update(Group(*_status_tables(story)))
            if story.ended:
                return
            time.sleep(every)


@coordinator.command()
def rounds(folder: Folder, as_json: Json = False) -> None:
    """Every round: who was merged, what was measured, how much was cut off, effective rank, bytes and seconds."""
    from server.events import finite
    from server.story import read_story

    story = read_story(folder)
    if as_json:
        typer.echo(json.dumps([finite(event.model_dump(exclude_unset=True)) for event in story.rounds]))
        return
    _console().print(_rounds_table(story))


@coordinator.command()
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="New folder for the adapter; PEFT loads it.")],
    adapter: Annotated[str, typer.Option(help="Which, where the federation has several.")] = "",
    number: Annotated[int | None, typer.Option("--round", help="Which round; else the newest.")] = None,
) -> None:
    """Copies one round's adapter to a folder of its own, after its checksums were held against it."""
    from server.ledger import export as copy

    found = copy(folder, target, adapter, number)
    typer.echo(f"round {found}: {target}")


@coordinator.command()
def resume(
    folder: Folder,
    run: Annotated[list[str] | None, typer.Option(help="App folder, then the SuperLink's connection: starts flwr run.")] = None,
) -> None:
    """Says after which round a federation that died goes on, and how; with ``--run`` twice it starts it on a SuperLink."""
    import subprocess

    from protocol.errors import ConfigurationError
    from server.ledger import resumable

    number, file, damaged = resumable(folder)
    for what in damaged:
        typer.echo(what, err=True)
    typer.echo(f"goes on after round {number}")
    command = ["flwr", "run", *(run or [".", "CONNECTION"]), "--run-config", f'federation="{file}"']
    if run is None:
        typer.echo("with: " + " ".join(f"'{word}'" if '"' in word else word for word in command))
        return
    if len(run) != 2:
        raise ConfigurationError("--run", [f"found {len(run)} value(s); give the app folder and the connection's name"])
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _console() -> "Console":
    """Takes text as it is: names and reasons come from nodes, and could hold what rich would read as its markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _status_tables(story: "Story") -> "list[Table]":
    from rich.table import Table

    head = Table(title=story.name, show_header=False)
    for name, value in story.summary().items():
        if not isinstance(value, dict | list):
            head.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else shown(str(value)))
    nodes = Table("node", "adapter", "method", "r", "rounds", "last refused", title="nodes")
    for name, about in story.nodes.items():
        cells = (about.get(key, "") for key in ("adapter", "method", "r", "accepted", "refused"))
        nodes.add_row(*(shown(str(cell)) for cell in (name, *cells)))
    metrics = story.metrics()
    measured = Table("node", *map(shown, metrics), title="measured by the nodes, newest round")
    for name, found in story.evaluation.items():
        measured.add_row(shown(name), *(_number(found.get(metric)) for metric in metrics))
    return [head, nodes, *([measured] if story.evaluation else [])]


def _rounds_table(story: "Story") -> "Table":
    from rich.table import Table

    from server.story import middle

    metrics = story.metrics()
    columns = (
        "round",
        "adapter",
        "merged",
        "refused",
        "silent",
        *map(shown, metrics),
        "cut off",
        "effective rank",
        "MB",
        "seconds",
    )
    table = Table(*columns, title=story.name)
    for event in story.rounds:
        table.add_row(
            str(event.round),
            shown(event.adapter),
            *(str(len(names)) for names in (event.accepted, event.refused, event.silent)),
            *(_number(middle(event, metric)) for metric in metrics),
            _number(event.merge.get("discarded_energy")),
            _number(event.merge.get("effective_rank")),
            f"{(event.bytes_sent + event.bytes_received) / 1e6:.1f}",
            f"{event.seconds:.1f}",
        )
    return table


def _number(value: Any) -> str:
    """Of whatever the log holds: a whole number may be larger than any float."""
    return f"{value:.4g}" if isinstance(value, int | float) and abs(value) <= sys.float_info.max else ""
