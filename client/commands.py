"""Verbs of an institution's node: ``fedge node keygen | trust | check | run``."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="The node's folder, as keygen made it.")]
Coordinator = Annotated[
    str, typer.Option(metavar="SHA256:...", help="The coordinator's fingerprint, as told by another way than the list came.")
]

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
    typer.echo(f"  fedge coordinator enrol FOLDER {name} identity.pub --auth-key auth.pub --fingerprint {identity} \\")
    typer.echo(f"    --fingerprint {auth}")


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
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Look at its certificate, too.")] = "",
    days: Annotated[int, typer.Option(min=0, help="How many days certificates must still hold.")] = 30,
) -> None:
    """Keys, modes, authorities and the enrolment list; exit code 2 and the numbers where something is wrong."""
    from datetime import UTC, datetime

    from client import credentials
    from protocol.certificates import dated, days_left, fingerprint
    from protocol.errors import ConfigurationError

    found = credentials.check(folder, coordinator=coordinator, least_days=days)
    typer.echo("\n".join(found.lines))
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
    settings: Annotated[Path | None, typer.Option(help="YAML with the node's settings; else node.yaml in its folder.")] = None,
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
    from client.node import Node, beside
    from protocol.configuration import load
    from protocol.errors import ConfigurationError
    from protocol.together import printed, run_together

    folder = folder.resolve()
    found = credentials.check(folder, coordinator=coordinator, unsigned_apps=run_unsigned_apps)
    path = settings or folder / credentials.SETTINGS
    here = {name: file.resolve() for name, file in (("device", device), ("device_key", device_key)) if file}
    (own,) = beside(path, (load(path, Node),))
    own = Node.model_validate(own.model_dump(exclude_unset=True) | here) if here else own
    if "name" in own.model_fields_set and own.name != found.name:
        raise ConfigurationError(str(path), [f"name: {own.name!r}; its key is enrolled as {found.name!r}"])
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
