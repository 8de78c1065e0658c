"""Writes docs/benchmarks.md: what each benchmark measures and how it is run, from their docstrings.

python -m tools.benchmarks > docs/benchmarks.md
"""

import ast
import re
from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "benchmarks"
_COMMAND = re.compile(r"python -m benchmarks\.[^`\n]*")
_HEAD = """# Benchmarks

Each prints a table and, last, one JSON line; most have goals and say which was missed. Figures that were measured, the losing
ones too, are in [benchmarks/LOG.md](../benchmarks/LOG.md). `--data` is a folder of public data sets and small models, which
each benchmark's docstring names; `--help` tells the options. They need the whole environment (`make demo` makes it).

| measures | command |
|---|---|
"""


def page() -> str:
    """The page."""
    found = []
    for path in sorted(_FOLDER.glob("*.py")):
        told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        command = _COMMAND.search(told)
        if command and not path.stem.endswith("_row"):
            what, usage = told.splitlines()[0].rstrip("."), command[0].strip().replace("|", "\\|")
            found.append(f"| {what} | `{usage}` |\n")
    return _HEAD + "".join(found)


if __name__ == "__main__":
    print(page(), end="")
