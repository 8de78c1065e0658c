"""docs/reference.md is what the settings say, docs/benchmarks.md what the benchmarks do."""

from pathlib import Path

from tools import benchmarks
from tools.reference import page


def test_the_page_of_every_key_is_up_to_date():
    """`python -m tools.reference > docs/reference.md` makes it."""
    assert (Path(__file__).parent.parent.parent / "docs" / "reference.md").read_text() == page()


def test_the_page_of_every_benchmark_is_up_to_date():
    """`python -m tools.benchmarks > docs/benchmarks.md` makes it."""
    assert (Path(__file__).parent.parent.parent / "docs" / "benchmarks.md").read_text() == benchmarks.page()
