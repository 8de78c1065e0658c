"""Processes that live and end together: Flower's own, which a coordinator or a node starts side by side."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Final

# No usage reports, no look for updates, no installing of packages when a run starts; whoever wants them sets them.
QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0


def run_together(
    commands: Sequence[Sequence[str]], env: Mapping[str, str], meanwhile: Callable[[], None] = lambda: None
) -> int:
    """Runs them until one ends, or until this process is asked to end; then all are ended.

    Args:
        commands: Each with its arguments.
        env: What is set for them beside, or in place of, what is set here.
        meanwhile: Called again and again while they run.

    Returns:
        The exit code of the one that ended; 0 where all were asked to.
    """
    processes: list[subprocess.Popen[bytes]] = []
    # Ctrl-C too: a shell without job control starts what is in the background deaf to it.
    before = {number: signal.signal(number, _interrupted) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for command in commands:
            processes += [subprocess.Popen(command, env={**QUIET, **os.environ, **env})]
        while True:
            for process in processes:
                if (code := process.poll()) is not None:
                    return code or 1  # neither is to end of itself
            meanwhile()
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return 0
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def printed(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(command)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
