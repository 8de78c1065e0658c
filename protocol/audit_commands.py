"""Verbs of an audit log, alike for coordinator and node: ``audit verify | show``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Log = Annotated[Path, typer.Argument(help="The audit log, or the folder that export made.")]
Side = Literal["coordinators", "nodes"]


def audit(side: Side) -> typer.Typer:
    """The verbs, for logs that keys of one side sign.

    Args:
        side: Which keys of an enrolment list count.
    """
    verbs = typer.Typer(help="The audit log: whether it holds, and what it says.", no_args_is_help=True, suggest_commands=False)

    @verbs.command()
    def verify(
        log: Log,
        trusted: Annotated[
            Path | None, typer.Option(help="Whose signatures count: a public key, or the enrolment list (.yaml).")
        ] = None,
        expect: Annotated[
            str | None,
            typer.Option(metavar="HASH", help="A hash that the log must hold, such as the last one verified before."),
        ] = None,
    ) -> None:
        """Looks at every byte; exit code 1 names the first line that was changed, left out, added or moved."""
        from protocol.audit import verify as hold
        from protocol.audit_bundle import verify_bundle

        report = (verify_bundle if log.is_dir() else hold)(log, _keys(trusted, side) if trusted else None, expect)
        typer.echo(f"{report.lines} line(s) hold")
        typer.echo(f"last hash  {report.last}")
        signed = ", ".join(report.signers) if trusted else "not looked at; name whose signatures count with --trusted"
        typer.echo(f"signed by  {signed}")
        if expect is None:
            typer.echo("Lines cut off at the end are missed only by --expect HASH: keep the last hash somewhere else.")

    @verbs.command()
    def show(log: Log, as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each.")] = False) -> None:
        """The lines of a log whose chain holds."""
        import json
        from datetime import UTC, datetime

        from protocol.audit import FILE, read

        for line in read(log / FILE if log.is_dir() else log):
            when = datetime.fromtimestamp(line.time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            if as_json:
                typer.echo(json.dumps({"n": line.n, "time": when, "event": line.event, "facts": dict(line.facts)}))
            else:
                typer.echo(f"{line.n:5d}  {when}  {line.event:10s}  {_words(line.facts)}")

    return verbs


def _keys(trusted: Path, side: Side) -> "list[Ed25519PublicKey]":
    """Keys of a list that count now or counted once: a log is older than the last revocation."""
    from protocol.enrolment import read_enrolment
    from protocol.signature import read_trusted

    if trusted.suffix not in (".yaml", ".yml"):
        return list(read_trusted(trusted))
    enrolment = read_enrolment(trusted)
    current = enrolment.coordinators if side == "coordinators" else enrolment.nodes
    role = side.removesuffix("s")
    return [*current.values(), *(gone.key for gone in enrolment.revoked.values() if gone.role == role)]


def _words(facts: object) -> str:
    import json

    from protocol.errors import shown

    if not isinstance(facts, dict):
        return ""
    return shown("  ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in facts.items()), 2000)
