"""The ServerApp that ``flwr run`` starts: reads the federation's file and hands over to the round loop."""

import logging
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from protocol.configuration import load
from protocol.errors import ConfigurationError
from protocol.federation import Federation
from server.ledger import RoundRecord, place_of
from server.rounds import run

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation whose file the run config names under ``federation``."""
    federation = load(_find(str(context.run_config["federation"])), Federation)
    outcome = run(grid, federation, watch=_tell)
    for node, reason in outcome.left_out.items():
        log.warning("%s took no part: %s", node, reason)
    log.info("ended: %s", outcome.ended)
    for name, kept in outcome.kept.items():
        log.info("global adapter of rank %d in %s", kept.manifest.r, place_of(federation.output.resolve(), name))


def _tell(record: RoundRecord) -> None:
    of = f" of {record.adapter}" if record.adapter else ""
    log.info("round %d%s: merged %d update(s) in %.1f s", record.round, of, len(record.accepted), record.seconds)
    for what, said in record.merge.get("details", {}).items():
        if said not in ("", 0):
            log.info("round %d%s: %s: %s", record.round, of, what, said)
    for node, reason in {**record.refused, **record.silent, **record.paused}.items():
        log.warning("round %d: without %s: %s", record.round, node, reason)
    for node, reason in record.evaluation_refused.items():
        log.warning("round %d: not measured by %s: %s", record.round, node, reason)
    for node, metrics in record.evaluation.items():
        log.info("round %d: %s: %s", record.round, node, ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items())))


def _find(name: str) -> Path:
    """A path as given, or inside the app's own files: the working directory is the SuperLink's."""
    for folder in ("", *sys.path):
        path = Path(folder, name)
        if path.is_file():
            return path
    raise ConfigurationError("run config", [f"federation: {name!r} is no file here; give an absolute path"])
