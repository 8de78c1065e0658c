"""docs/reference.md is what the settings say."""

from pathlib import Path

from tools.reference import page


def test_the_page_of_every_key_is_up_to_date():
    """`python -m tools.reference > docs/reference.md` makes it."""
    assert (Path(__file__).parent.parent.parent / "docs" / "reference.md").read_text() == page()
