"""The verb ``fedge coordinator audit export``: what an auditor is given of a federation, signed by its coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from protocol.audit_commands import audit


def mount(coordinator: typer.Typer) -> None:
    """Adds the verbs of the audit log to those of the coordinator."""
    verbs = audit("coordinators")
    verbs.command()(export)
    coordinator.add_typer(verbs, name="audit")


def export(
    folder: Annotated[Path, typer.Argument(help="Output folder of the federation.")],
    target: Annotated[Path, typer.Argument(help="New folder; with --key a sealed file.")],
    identity: Annotated[
        Path | None, typer.Option(help="The coordinator's private key; else the one that the federation names.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="Key file that the auditor has too: what leaves is sealed with it.")
    ] = None,
    passphrase_env: Annotated[
        str | None, typer.Option("--passphrase-env", metavar="NAME", help="Environment variable with its passphrase.")
    ] = None,
) -> None:
    """Packs the audit log, the privacy ledger and the events without figures; audit verify looks at it."""
    from server.audit_export import export_for_auditor

    for name in export_for_auditor(folder, target, identity, key, passphrase_env):
        typer.echo(name)
