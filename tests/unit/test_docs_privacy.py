"""The blocks of docs/privacy.md, and that the tests which it names are there."""

import re
import shlex
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from fedge import app
from protocol.configuration import parse
from protocol.federation import Federation
from protocol.signature import make_key

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "privacy.md").read_text()


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def test_the_section_of_a_federation_with_secure_sums_is_read(tmp_path):
    keys = (make_key().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for _ in range(3))
    lines = (f"{name}: {key}\n" for name, key in zip(("bank", "clinic", "law_firm"), keys, strict=True))
    (tmp_path / "enrolled.yaml").write_text("".join(lines))
    told = yaml.safe_load(block("yaml"))
    told["secure_sum"]["enrolled"] = str(tmp_path / "enrolled.yaml")
    about = {"name": "f", "plan": {"base_model": "tiny"}, "output": str(tmp_path / "runs")}
    assert parse(about | told, Federation, source="docs").secure_sum.enabled


def test_the_budget_can_be_asked():
    told = CliRunner().invoke(app, shlex.split(block("bash"))[1:])
    assert told.exit_code == 0
    assert "3.4189" in told.output  # the noise multiplier of the analytic Gaussian mechanism, as in benchmarks/LOG.md


def test_every_test_that_holds_a_promise_is_there():
    names = set(re.findall(r"test_\w+\.py", PAGE))
    assert names <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(names) >= 4
