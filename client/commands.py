"""Verbs of an institution's node: ``fedge node keygen | trust | check | run``."""

import shlex
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client.node import Node

Folder = Annotated[Path, typer.Argument(help="The node's folder, as keygen made it.")]
Coordinator = Annotated[
    str, typer.Option(metavar="SHA256:...", help="The coordinator's fingerprint, as told by another way than the list came.")
]
Settings = Annotated[Path | None, typer.Option(help="YAML with the node's settings; else node.yaml in its folder.")]

node = typer.Typer(
    help="An institution's node: its keys, its checks, its SuperNode.", no_args_is_help=True, suggest_commands=False
)


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.add_typer(node, name="node")


@node.command()
def keygen(
    folder: Annotated[Path, typer.Argument(help="Where the keys are to lie.")],
    name: Annotated[str, typer.Argument(help="What the federation is to call this node.")],
) -> None:
    """Makes the keys of a node. The private ones stay here; it says what the coordinator gets."""
    from client import credentials

    identity, auth = credentials.keygen(folder, name)
    typer.echo(f"identity  {identity}")
    typer.echo(f"auth      {auth}")
    typer.echo(f"Send: {folder / credentials.IDENTITY}.pub, {folder / credentials.AUTH}.pub")
    typer.echo("Tell both fingerprints by another way. The coordinator enrols them:")
    typer.echo(f"  fedge coordinator enrol FOLDER {shlex.quote(name)} identity.pub --auth-key auth.pub \\")
    typer.echo(f"    --fingerprint {identity} --fingerprint {auth}")


@node.command()
def trust(
    folder: Folder,
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Of whoever reads apps before they run here.")],
    fingerprint: Annotated[str, typer.Option(metavar="SHA256:...", help="As its owner told it by another way.")] = "",
) -> None:
    """Lets this node run apps that a key has signed; all others are refused."""
    from client import credentials

    typer.echo(f"runs apps signed by  {credentials.trust(folder, key, fingerprint)}")


@node.command()
def check(
    folder: Folder,
    coordinator: Coordinator = "",
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Look at the certificate that answers there, too.")] = "",
    settings: Settings = None,
    days: Annotated[int, typer.Option(min=0, help="How many days certificates must still hold.")] = 30,
) -> None:
    """Keys, modes, authorities, who is enrolled, settings; exit code 2 and the numbers where something is wrong."""
    from datetime import UTC, datetime

    from client import credentials
    from protocol.certificates import dated, days_left, fingerprint
    from protocol.errors import ConfigurationError

    path = settings or folder / credentials.SETTINGS
    found = credentials.check(folder, coordinator=coordinator, least_days=days, own_vault=_own_vault(path))
    typer.echo("\n".join(found.lines))
    if settings or path.exists():
        _settings(path, found.name)
        typer.echo(f"settings  {path}")
    else:
        typer.echo(f"settings  none yet; node run reads {path}")
    if not superlink:
        return
    certificate = credentials.greet(superlink, folder)
    if certificate is None:
        raise ConfigurationError(superlink, ["nothing answers there"])
    if problems := dated("its certificate", certificate, datetime.now(UTC), days):
        raise ConfigurationError(superlink, problems)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}, {days_left(certificate):.0f} days"
    typer.echo(f"SuperLink {superlink}  {fingerprint(certificate)}  until {until}")


@node.command()
def run(
    folder: Folder,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's address.")],
    settings: Settings = None,
    device: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Train with this bundle, without PyTorch (docs/edge.md).")
    ] = None,
    device_key: Annotated[Path | None, typer.Option(metavar="KEY.pub", help="Whose signature of the bundle counts.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="For the node's own processes, on this machine alone.")] = 9094,
    coordinator: Coordinator = "",
    insecure_without_tls: Annotated[
        bool, typer.Option("--insecure-without-tls", help="Nothing is encrypted, and anybody may be the coordinator.")
    ] = False,
    run_unsigned_apps: Annotated[
        bool, typer.Option("--run-unsigned-apps", help="Run whatever code the SuperLink sends, signed or not.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the commands and start nothing.")] = False,
) -> None:
    """Starts Flower's SuperNode with TLS, its own key and signed apps only; says first what would not hold."""
    from client import credentials
    from protocol.together import printed, run_together

    folder = folder.resolve()
    path = settings or folder / credentials.SETTINGS
    found = credentials.check(folder, coordinator=coordinator, unsigned_apps=run_unsigned_apps, own_vault=_own_vault(path))
    here = {name: str(file.resolve()) for name, file in (("device", device), ("device_key", device_key)) if file}
    own = _settings(path, found.name, here)
    if not insecure_without_tls and credentials.greet(superlink, folder) is None:
        typer.echo(f"nothing answers at {superlink} yet; the SuperNode goes on trying", err=True)
    kept = {"state": "state", "vault": credentials.VAULT, "audit": "audit.jsonl"}
    own_choice = own.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    fixed = {"name": found.name, "identity": str(folder / credentials.IDENTITY), "enrolled": str(folder / credentials.ENROLLED)}
    node_config = folder / "node.toml"
    credentials.write_node_config(node_config, {key: str(folder / file) for key, file in kept.items()} | own_choice | fixed)
    commands = credentials.commands(
        folder, superlink, port, node_config, tls=not insecure_without_tls, unsigned_apps=run_unsigned_apps
    )
    for command in commands:
        typer.echo(printed(command))
    if not show:
        raise typer.Exit(run_together(commands, {"FLWR_HOME": str(folder / "flwr")}))


def _own_vault(path: Path) -> bool:
    """Whether settings name a vault's key of their own; what is wrong with the file is told when it is read."""
    from protocol.configuration import read_yaml
    from protocol.errors import ConfigurationError

    try:
        return isinstance(said := read_yaml(path), dict) and bool(said.get("vault"))
    except ConfigurationError:
        return False


def _settings(path: Path, name: str, here: "Mapping[str, str]" = MappingProxyType({})) -> "Node":
    """A node's settings, with paths taken from their folder, once what they name was looked at.

    Args:
        path: YAML.
        name: As which the node is enrolled.
        here: What the command says in place of the file.

    Raises:
        ConfigurationError: Every problem of the file, or of the policies that it names.
    """
    from client.node import Node, beside
    from client.policy import read_policy
    from protocol.configuration import load, parse, read_yaml
    from protocol.data_settings import DataPolicy, is_hub_name
    from protocol.errors import ConfigurationError, shown

    content = read_yaml(path)
    made = parse({**content, **here} if isinstance(content, dict) else content, Node, source=str(path))
    (own,) = beside(path, (made,))
    problems = []
    if "name" in own.model_fields_set and own.name != name:
        problems.append(f"name: {own.name!r}; its key is enrolled as {name!r}")
    named = [(name, getattr(own, name)) for name in ("policy", "data_policy", "vault", "device", "device_key")]
    for task, files in own.sources().items():
        named += [(f"tasks.{task}.{key}" if task else key, file) for key, file in files.files()]
    problems += [
        f"{key}: {shown(str(file), 200)}: no such file; paths are relative to {path.resolve().parent}"
        for key, file in named
        if file and not file.exists() and not is_hub_name(file)
    ]
    if problems:
        raise ConfigurationError(str(path), problems)
    read_policy(own.policy)
    if own.data_policy:
        load(own.data_policy, DataPolicy)
    return own
