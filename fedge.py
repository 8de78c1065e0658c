"""The ``fedge`` command: mounts each folder's verbs. Heavy imports happen inside a verb, so that ``--help`` is instant."""

import io
import logging
import sys
from typing import Annotated, Any

import typer
import typer.core

import client.commands
import client.policy_commands
import edge.commands
import protocol.audit_commands
import protocol.vault_commands
import server.audit_commands
import server.commands
import server.privacy_commands
import server.provisioning_commands
import simulations.commands
import strategies.adapter_commands
import strategies.commands
import strategies.data_commands
import strategies.evaluation_commands
import strategies.label_commands
import strategies.planning_commands
import strategies.probing_commands
from protocol.errors import AdapterError, FedgeError, UserError
from strategies.libraries import calm


def _keep_help(argument: typer.core.TyperArgument, **given: Any) -> None:
    """Click 8.5 has a help of its own for arguments, and forgets the one that Typer has set before."""
    _made(argument, **given)
    argument.help = given.get("help")


_made = typer.core.TyperArgument.__init__
typer.core.TyperArgument.__init__ = _keep_help  # type: ignore[assignment, method-assign]
app = typer.Typer(
    name="fedge",
    epilog="--debug anywhere shows the traceback of an error.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
)
simulations.commands.mount(app)
strategies.commands.mount(app)
strategies.data_commands.mount(app)
strategies.adapter_commands.mount(app)
strategies.evaluation_commands.mount(app)
strategies.label_commands.mount(app)
strategies.planning_commands.mount(app)
strategies.probing_commands.mount(app)
edge.commands.mount(app)
server.commands.mount(app)
server.privacy_commands.mount(server.commands.coordinator)
server.provisioning_commands.mount(server.commands.coordinator)
client.commands.mount(app)
client.policy_commands.mount(client.commands.node)
client.commands.node.command()(protocol.vault_commands.wipe)
client.commands.node.add_typer(protocol.audit_commands.audit("nodes"), name="audit")
server.audit_commands.mount(server.commands.coordinator)
protocol.vault_commands.mount(app)
# Verbs that do with less than fedge[client].
_EXTRAS = {"coordinator": "coordinator", "registry": "coordinator", "edge": "export"}


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Prints the version: everyone in a consortium has the same.")
    ] = False,
) -> None:
    """Federated and on-device fine-tuning of language models."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("fedge"))
        raise typer.Exit


def main() -> None:
    """Runs the command: exit code 0, 1 when something failed, 2 for what the user can mend."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    if not debug:
        calm()
        logging.getLogger("flwr").addFilter(_worth_saying)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    try:
        app()
    except FedgeError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError | AdapterError) else 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if debug or missing in sys.modules:
            raise
        typer.echo(f"error: this needs {missing}, which is not installed; pip install 'fedge[{_extra(missing)}]'", err=True)
        sys.exit(2)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        sys.exit(1)


def _extra(missing: str) -> str:
    """The extra of pyproject.toml that brings what a verb has not found."""
    if missing in ("onnxruntime", "tokenizers"):
        return "edge"
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return _EXTRAS.get(verb, "client")


def _worth_saying(record: logging.LogRecord) -> bool:
    """A filter, for Flower sets its logger's level and colours when it is imported."""
    for handler in logging.getLogger("flwr").handlers:
        if hasattr(handler, "colored"):
            handler.colored = sys.stderr.isatty()
    record.exc_info = record.exc_text = None
    return record.levelno >= logging.WARNING


if __name__ == "__main__":
    main()
