"""Processes that were started together end together, whoever ends first, and leave nobody behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from protocol.together import printed, run_together

ROOT = Path(__file__).parents[3]
STAYS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"


def staying(told: Path) -> list[str]:
    """A process that says its number and goes on for a minute."""
    return [sys.executable, "-c", STAYS, str(told)]


def ended(told: Path) -> bool:
    return not psutil.pid_exists(int(told.read_text()))


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (0, 1)])
def test_when_one_ends_the_others_do_and_its_code_is_theirs(tmp_path: Path, code: int, expected: int) -> None:
    """None is to end of itself, so that even a code of 0 is no success."""
    told = tmp_path / "pid"
    leaves = [
        sys.executable,
        "-c",
        f"import pathlib, time\nwhile not pathlib.Path({str(told)!r}).exists(): time.sleep(.05)\nexit({code})",
    ]
    calls: list[int] = []
    assert run_together([staying(told), leaves], {}, lambda: calls.append(1)) == expected
    assert ended(told)
    assert calls


def test_what_is_set_reaches_them_and_flower_is_kept_quiet(tmp_path: Path) -> None:
    told = tmp_path / "env"
    script = (
        f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ['OWN'] + os.environ['FLWR_TELEMETRY_ENABLED'])"
    )
    run_together([[sys.executable, "-c", script]], {"OWN": "own"})
    assert told.read_text() == f"own{os.environ['FLWR_TELEMETRY_ENABLED']}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_is_asked_to_end_takes_all_along(tmp_path: Path, number: signal.Signals) -> None:
    told = [tmp_path / name for name in ("one", "two")]
    script = f"from protocol.together import run_together; exit(run_together({[staying(each) for each in told]!r}, {{}}))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not all(each.exists() and each.read_text() for each in told):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    assert all(map(ended, told))


def test_an_unknown_command_leaves_nobody_behind(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with pytest.raises(FileNotFoundError):
        run_together([staying(told), ["no-such-command-here"]], {})
    assert not told.exists() or ended(told)


def test_a_command_is_printed_as_a_shell_takes_it() -> None:
    assert printed(["a", "b c", "$d"]) == "a 'b c' '$d'"
