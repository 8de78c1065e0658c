"""The ServerApp that ``flwr run`` starts: reads the federation's file and hands over to the round loop."""

import logging
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from protocol.configuration import load
from protocol.errors import ConfigurationError
from protocol.federation import Federation, without_plan
from server.ledger import RoundRecord, newest_place
from server.rounds import run

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation whose file the run config names under ``federation``."""
    file = _find(str(context.run_config["federation"]))
    federation = load(file, Federation)
    if problems := without_plan(federation):
        raise ConfigurationError(str(file), problems)
    outcome = run(grid, federation, watch=_tell)
    for node, reason in outcome.left_out.items():
        log.warning("%s took no part: %s", node, reason)
    log.info("ended: %s", outcome.ended)
    for name, kept in outcome.kept.items():
        log.info("global adapter of rank %d in %s", kept.manifest.r, newest_place(federation, name).resolve())


def _tell(record: RoundRecord) -> None:
    log.info("%s: merged %d update(s) in %.1f s", record.title, len(record.accepted), record.seconds)
    for what, said in record.merge.get("details", {}).items():
        if said not in ("", 0):
            log.info("%s: %s: %s", record.title, what, said)
    for node, reason in {**record.refused, **record.silent, **record.paused}.items():
        log.warning("%s: without %s: %s", record.title, node, reason)
    for node, reason in record.evaluation_refused.items():
        log.warning("%s: not measured by %s: %s", record.title, node, reason)
    for node, metrics in record.evaluation.items():
        log.info("%s: %s: %s", record.title, node, ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items())))


def _find(name: str) -> Path:
    """A path as given, or inside the app's own files: the working directory is the SuperLink's."""
    for folder in ("", *sys.path):
        path = Path(folder, name)
        if path.is_file():
            return path
    raise ConfigurationError("run config", [f"federation: {name!r} is no file here; give an absolute path"])
