"""Verbs of a coordinator's folder: ``fedge coordinator provision | enrol | revoke | rotate | check | sign | serve``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="The coordinator's folder, as provision made it.")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="Name or IP address for the certificate; may be repeated.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the SuperLink's certificate holds.")]
AuthorityDays = Annotated[int, typer.Option(min=1, max=7300, help="How long the authority holds.")]


class Role(StrEnum):
    """``protocol.enrolment.Role``, for the command line."""

    node = "node"
    coordinator = "coordinator"
    auditor = "auditor"


def mount(coordinator: typer.Typer) -> None:
    """Adds the verbs to those of the coordinator."""
    for verb in (provision, enrol, revoke, rotate, check, sign, serve):
        coordinator.command()(verb)


def provision(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    host: Annotated[list[str], typer.Option(help="Name or IP address under which nodes reach it; may be repeated.")],
    name: Annotated[str, typer.Option(help="What the coordinator is enrolled as.")] = "coordinator",
    days: Days = 365,
    authority_days: AuthorityDays = 3650,
) -> None:
    """Makes the authority, the SuperLink's certificate, the coordinator's keys and the list of who is enrolled."""
    from server import provisioning as made

    _say(made.provision(folder, host, name, days, authority_days))
    typer.echo("")
    typer.echo("The authority's, the coordinator's and the release key's owners tell these fingerprints by phone, not by mail.")
    typer.echo(f"Nodes get: {folder / made.CA}, {folder / made.ENROLLED}, {folder / f'{made.RELEASE}.pub'}")
    typer.echo(f"Nobody gets: {made.CA_KEY}, {made.SERVER_KEY}, {made.IDENTITY}, {made.RELEASE}, {made.SECRET}")
    typer.echo(f"Keep elsewhere when done: {folder / made.CA_KEY}, {folder / made.RELEASE}")
    typer.echo("In the federation's file:")
    typer.echo(f"trust: {{enrolled: {folder.resolve() / made.ENROLLED}, identity: {folder.resolve() / made.IDENTITY}}}")


def enrol(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="How everybody calls it.")],
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Its public Ed25519 key: identity.pub.")],
    auth_key: Annotated[
        Path | None, typer.Option(metavar="KEY.pub", help="The key under which the SuperLink admits a node: auth.pub.")
    ] = None,
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.node,
    fingerprint: Annotated[
        list[str] | None, typer.Option(metavar="SHA256:...", help="As its owner told it; once for each key.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="New keys for a name that is there, or that was revoked.")] = False,
) -> None:
    """Adds a name with its public keys to the list; every node needs the new list then."""
    from server import provisioning as made

    found = made.enrol(folder, name, key, role=role.value, auth_key=auth_key, expected=fingerprint or (), replaces=replace)
    if found.replaced:
        typer.echo(f"replaced {found.replaced}")
    for what, told in zip(("identity", "auth"), found.fingerprints, strict=False):
        typer.echo(f"{role.value} {name}  {what}  {told}")
    if not fingerprint:
        typer.echo("Compare with its owner by another way than the keys came; --fingerprint SHA256:... does it here.")
    typer.echo(f"Every node needs the new {folder / made.ENROLLED}")


def revoke(folder: Folder, name: Annotated[str, typer.Argument(help="Whose key counts no more.")]) -> None:
    """From now on a name's key is refused; a SuperLink that runs turns its node away within seconds."""
    from server import provisioning as made

    typer.echo(f"revoked {name}  {made.revoke(folder, name)}")
    typer.echo(f"Every node needs the new {folder / made.ENROLLED}")


def rotate(
    folder: Folder,
    host: Hosts = None,
    days: Days = 365,
    authority: Annotated[bool, typer.Option("--authority", help="A new authority, beside the old one.")] = False,
    authority_days: AuthorityDays = 3650,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Trust the newest authority alone.")] = False,
) -> None:
    """A new key and certificate for the SuperLink; with --authority a new authority, which nodes need first."""
    from protocol.errors import ConfigurationError
    from server import provisioning as made

    if authority and drop_old:
        raise ConfigurationError("command line", ["--authority and --drop-old: one at a time; nodes need the new one between"])
    if authority:
        _say(made.rotate_authority(folder, host or (), authority_days))
        typer.echo(f"1. give every node the new {folder / made.CA}  2. rotate, and start serve again  3. rotate --drop-old")
    elif drop_old:
        _say(made.drop_old_authority(folder))
    else:
        _say(made.rotate_server(folder, host or (), days))
        typer.echo("The new certificate counts when serve, and a proxy before it, are started again.")


def check(
    folder: Folder,
    days: Annotated[int, typer.Option(min=0, help="How many days certificates must still hold.")] = 30,
) -> None:
    """Certificates, keys, modes and the list of who is enrolled; exit code 2 and the numbers where something is wrong."""
    from server import provisioning as made

    _say(made.check(folder, days))


def sign(
    folder: Folder,
    app: Annotated[Path, typer.Option(help="Folder of the Flower app, a checkout of fedge.")] = Path(),
    key: Annotated[Path | None, typer.Option(help="Whose signature; else the folder's release key.")] = None,
) -> None:
    """Signs the app as flwr run sends it: nodes run only what a key that they trust has signed."""
    from server import provisioning as made
    from server.superlink import build

    digest, signer = made.sign(folder, build(app), key)
    typer.echo(f"app {digest}")
    typer.echo(f"signed by {signer}")


def serve(
    folder: Folder,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the SuperLink.")] = 8000,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    expose_control_api: Annotated[
        bool, typer.Option("--expose-control-api", help="Let others reach the port on which runs are started, too.")
    ] = False,
    insecure_without_tls: Annotated[
        bool, typer.Option("--insecure-without-tls", help="Nothing is encrypted, and whoever calls is admitted.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the commands and start nothing.")] = False,
) -> None:
    """Starts Flower's SuperLink with TLS and enrolled nodes only, for this machine: a proxy lets nodes in."""
    from protocol.together import printed, run_together
    from server import superlink
    from server.provisioning import check

    folder = folder.resolve()
    superlink.check_address(host, exposed=expose_control_api)
    if not insecure_without_tls:
        check(folder)
    commands = superlink.commands(folder, host, port, tls=not insecure_without_tls)
    for command in commands:
        typer.echo(printed(command))
    if show:
        return

    def say(line: str) -> None:
        typer.echo(line, err=True)

    in_step = (lambda: None) if insecure_without_tls else superlink.InStep(folder, superlink.reachable(host, port), say)
    raise typer.Exit(run_together(commands, {"FLWR_HOME": str(folder / "flwr")}, in_step))


def _say(lines: list[str]) -> None:
    typer.echo("\n".join(lines))
