"""Verbs of a coordinator: ``fedge coordinator status | watch | rounds | resume | export``. They read a federation's folder."""

import json
import sys
from collections.abc import Mapping, Sequence
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

_WORDS = ("node", "adapter", "stage", "last refused")

coordinator = typer.Typer(
    help="What a federation's folder says, and how it goes on.", no_args_is_help=True, suggest_commands=False
)


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

    from server.events import FILE
    from server.story import read_story

    console = _console()
    if not (folder / FILE).exists():
        typer.echo(f"no round is kept in {shown(str(folder))} yet; waiting for the first (Ctrl-C ends)", err=True)
    while not (folder / FILE).exists():
        time.sleep(every)
    with Live(console=console, refresh_per_second=4) as live:
        while not (story := read_story(folder)).ended:
            live.update(Group(*_status_tables(story)))
            time.sleep(every)
        live.update(Group(*_status_tables(story)))
    if not console.is_terminal:
        console.print()


@coordinator.command()
def rounds(folder: Folder, as_json: Json = False) -> None:
    """Every round: how many were merged, refused and silent, what was measured and cut off, effective rank, bytes, seconds."""
    from server.events import finite
    from server.story import read_story

    story = read_story(folder)
    if as_json:
        typer.echo(json.dumps([finite(event.model_dump(exclude_unset=True)) for event in story.rounds]))
        return
    _console().print(*_rounds_tables(story), sep="\n")


@coordinator.command()
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="New folder for the adapter; PEFT loads it.")],
    adapter: Annotated[str, typer.Option(help="Which, where the federation has several.")] = "",
    number: Annotated[int | None, typer.Option("--round", help="Which round; else the newest.")] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="round.json too: every institution's name, row count, losses and norms.")
    ] = False,
    vault: Annotated[
        Path | None, typer.Option(help="Key file of rounds that are sealed; else the one that the federation names.")
    ] = None,
    passphrase_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key file's passphrase.")
    ] = None,
) -> None:
    """Copies one round's adapter to a folder of its own, after its checksums were held against it; the audit log tells it."""
    import shutil

    from protocol.files import read_adapter
    from protocol.vault import Vault
    from server.audited import exported
    from server.ledger import export as copy
    from server.ledger import published, vault_of

    federation = published(folder)
    own = vault_of(federation) if federation and not vault else None
    found = copy(folder, target, adapter, number, figures=figures, vault=Vault.at(vault, passphrase_env) if vault else own)
    try:
        exported(folder, found, adapter, read_adapter(target)[0].digest())
    except BaseException:
        shutil.rmtree(target)
        raise
    typer.echo(f"round {found}: {target}")


@coordinator.command()
def resume(
    folder: Folder,
    connection: Annotated[
        str | None, typer.Option("--run", metavar="CONNECTION", help="Starts it on this connection of flwr's config.toml.")
    ] = None,
    app: Annotated[Path, typer.Option(help="With --run: the folder of the Flower app, a checkout of fedge.")] = Path(),
) -> None:
    """Says after which round a federation that died goes on, and how; with --run it starts it on a SuperLink."""
    import subprocess

    from server.ledger import resumable, write_resume

    number, federation, damaged = resumable(folder)
    for what in damaged:
        typer.echo(what, err=True)
    typer.echo(f"goes on after round {number}")
    if connection is None:
        typer.echo("if it was a simulation: fedge simulate, with its scenario's file")
        typer.echo(f"if it was on a SuperLink: fedge coordinator resume {folder} --run CONNECTION")
        return
    file = write_resume(folder, federation)
    command = ["flwr", "run", str(app), connection, "--run-config", f'federation="{file}"']
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _console() -> "Console":
    """Takes text as it is: names and reasons come from nodes, and could hold what rich would read as its markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _status_tables(story: "Story") -> "list[Table]":
    from rich.table import Table

    head = Table(title=story.name, show_header=False)
    for name, value in story.summary().items():
        if not isinstance(value, dict | list) and value != "":
            head.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else shown(str(value)))
    facts = ("adapter", "method", "r", "accepted", "refused")
    nodes = {"node": list(story.nodes)} | {fact: [str(node.get(fact, "")) for node in story.nodes.values()] for fact in facts}
    nodes = {{"accepted": "rounds", "refused": "last refused"}.get(name, name): cells for name, cells in nodes.items()}
    measured = {"node": list(story.evaluation)} | {
        {"num-examples": "rows"}.get(metric, metric): [_number(found.get(metric)) for found in story.evaluation.values()]
        for metric in [*story.metrics(), "num-examples"]
    }
    tables = [head, _table("nodes", nodes)]
    return [*tables, _table("measured by the nodes, newest round", measured)] if story.evaluation else tables


def _rounds_tables(story: "Story") -> "list[Table]":
    """Two of them: what was merged, and what was measured, for 80 columns are not enough for both."""
    from server.story import middle

    events, metrics = story.rounds, story.metrics()
    which = {
        "round": [str(event.round) for event in events],
        "stage": [event.stage for event in events],
        "adapter": [event.adapter for event in events],
    }
    merged = {
        "merged": [str(len(event.accepted)) for event in events],
        **{
            kind: [str(len(getattr(event, kind)) or "") for event in events]
            for kind in ("refused", "silent", "paused", "dropped")
        },
        "cut off": [_number(event.merge.get("discarded_energy"), ".1e") for event in events],
        "rank": [_number(event.merge.get("effective_rank"), ".1f") for event in events],
        "epsilon": [_number(event.privacy.get("epsilon")) for event in events],
        "MB": [f"{(event.bytes_sent + event.bytes_received) / 1e6:.1f}" for event in events],
        "s": [f"{event.seconds:.1f}" for event in events],
    }
    measured = {metric: [_number(middle(event, metric)) for event in events] for metric in metrics}
    tables = [_table(story.name, which | merged)]
    return [*tables, _table("measured: the middle of the nodes", which | measured)] if metrics else tables


def _table(title: str, columns: Mapping[str, Sequence[str]]) -> "Table":
    """Columns in which nothing stands are left out; where there is no room words go on in another line, numbers never."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    there = {name: cells for name, cells in columns.items() if any(cells)}
    for name in there:
        table.add_column(shown(name), overflow="fold", no_wrap=name not in _WORDS)
    for row in zip(*there.values(), strict=True):
        table.add_row(*map(shown, row))
    return table


def _number(value: Any, form: str = ".4g") -> str:
    """Of whatever the log holds: a whole number may be larger than any float."""
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return ""
    return f"{value:{form}}" if value else "0"
