"""Every promise of docs/threat-model.md names tests, and they are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
TESTS = {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_each_promise_names_a_test_that_is_there():
    table = re.search(r"^## Promises\n\n(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)[1].splitlines()[2:]
    assert len(table) > 15
    for line in table:
        promise, _, held, _ = (cell.strip() for cell in line.strip("|").split("|"))
        named = re.findall(r"`(test_\w+\.py)`", held)
        assert named, promise
        assert TESTS.issuperset(named), promise
