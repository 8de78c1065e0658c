"""docs/deployment.md between machines, block by block: own keys, TLS, signed apps and messages, a node that is revoked."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_superlink import DOCUMENT, ROOT, Terminals, blocks, free_ports

from protocol.certificates import read_certificates
from protocol.enrolment import read_enrolment

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(2400)]
SECTION = "Between machines: a coordinator and three institutions"
STEP = re.compile(r"^### (\w)\. .*?$|^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NODES = ("bank", "clinic", "court")


def steps() -> dict[str, list[str]]:
    """The section's commands by letter."""
    text = DOCUMENT.read_text(encoding="utf-8").split(f"## {SECTION}\n")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    letter = ""
    for title, block in STEP.findall(text):
        letter = title or letter
        if block:
            found.setdefault(letter, []).append(block)
    return found


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    """In a checkout of their own: what is signed must stay as it is."""
    app = tmp_path / "checkout"
    app.mkdir()
    for name in ("client", "edge", "protocol", "server", "strategies"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app)
    env = {name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "http_proxy", "HTTP_PROXY")}
    env |= {"WORK": str(tmp_path), "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    (env["PORT"],) = map(str, free_ports(1))
    (tmp_path / "logs").mkdir()
    terminals = Terminals(f'{blocks()["1"][0]}\ncd "$WORK/checkout"', env, tmp_path / "logs")
    try:
        yield terminals
    finally:
        terminals.close()


def each(block: str) -> str:
    """A block of every institution."""
    return f"for NAME in {' '.join(NODES)}; do\n{block}\ndone"


def test_the_folders_of_a_coordinator_and_three_institutions_are_made_changed_and_checked(
    tmp_path: Path, terminals: Terminals
) -> None:
    found = steps()
    said = terminals.run("\n".join([found["A"][0], each(found["B"][0]), each(found["C"][0]), each(found["D"][0])]))
    assert said.count("runs apps signed by") == 6  # when trust was given, and when it was checked
    authority, coordinator = tmp_path / "coordinator" / "ca.crt", tmp_path / "coordinator"
    enrolment = read_enrolment(coordinator / "enrolled.yaml")
    assert set(enrolment.nodes) == set(NODES)
    assert set(enrolment.coordinators) == {"consortium"}
    names = {"ca.key", "server.key", "identity", "release", "auth", "superexec.secret", "vault.key"}
    files = (path for folder in (coordinator, *(tmp_path / name for name in NODES)) for path in folder.iterdir())
    private = [path for path in files if path.name in names]
    assert len(private) == 5 + 3 * 4
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    (first,) = read_certificates(authority)

    renew, replace_authority = found["K"]
    terminals.run(f"{found['J'][0]}\n{renew}\n{replace_authority}")

    (second,) = read_certificates(authority)
    assert second != first
    assert {len(read_certificates(tmp_path / name / "ca.crt")) for name in NODES} == {2}
    assert set(read_enrolment(coordinator / "enrolled.yaml").revoked) == {"court"}


@pytest.mark.slow
def test_three_institutions_train_under_a_secure_sum_and_a_revoked_one_takes_no_part_any_more(
    tmp_path: Path, terminals: Terminals
) -> None:
    found = steps()
    terminals.run(found["A"][0])
    for step in ("B", "C", "D"):
        terminals.run(each(found[step][0]))
    terminals.start("superlink", found["F"][0])
    terminals.until_up()
    until(lambda: "admitted: court" in terminals.log("superlink"), terminals)
    ports = dict(zip(NODES, free_ports(3), strict=True))
    nodes = {name: terminals.start(name, f"export NAME={name} NODE_PORT={ports[name]}\n{found['H'][0]}") for name in NODES}
    for name in NODES:
        until(lambda name=name: "SuperNode ID" in terminals.log(name), terminals)

    unsigned = terminals.start("unsigned", found["I"][0])
    assert unsigned.wait(timeout=300) is not None
    assert "The FAB could not be verified" in terminals.log("unsigned"), terminals.story()

    terminals.run(found["E"][0])
    time.sleep(6)  # the SuperLink looks every two seconds
    terminals.run(found["I"][0], seconds=1500)

    record = json.loads((tmp_path / "result/rounds/0001/round.json").read_text())
    assert sorted(record["accepted"]) == sorted(NODES), terminals.story()
    looked = terminals.run(found["I"][1])
    assert "every round is done" in looked
    assert "round 1 of three-institutions, signed by" in looked
    assert looked.count("line(s) hold") == 2
    # What nodes call is below one path, and nothing else is: a proxy that lets that through lets nodes in.
    paths = set(re.findall(r'"POST (/v1/\w+)/', terminals.log("superlink")))
    assert paths == {"/v1/fleet", "/v1/control", "/v1/runtime"}

    terminals.run(found["J"][0])
    assert nodes["court"].wait(timeout=180) is not None
    again = terminals.start("court", f"export NAME=court NODE_PORT={ports['court']}\n{found['H'][0]}")
    assert again.wait(timeout=180) != 0
    assert "Failed to activate SuperNode" in terminals.log("court"), terminals.story()
    terminals.run('cp "$WORK/coordinator/enrolled.yaml" "$WORK/court/"')
    again = terminals.start("court", f"export NAME=court NODE_PORT={ports['court']}\n{found['H'][0]}")
    assert again.wait(timeout=180) == 2
    assert "its key was revoked on" in terminals.log("court")
    assert all(nodes[name].is_running() for name in ("bank", "clinic"))


def until(ready, terminals: Terminals, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, terminals.story()
        time.sleep(0.2)
