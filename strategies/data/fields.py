"""Where a row keeps its texts, whatever its shape (``strategies.data.formats``): to read them all, and to put others there."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from strategies.data.files import Raw, texts

SAID = (
    "system",
    "instruction",
    "input",
    "input_text",
    "prompt",
    "messages",
    "conversations",
    "text",
    "output",
    "target_text",
    "completion",
    "chosen",
    "rejected",
)
_SPOKEN = ("content", "value")  # of a message
# They say what the rest is; with others in their place a row would be another one.
_NAMES = ("label", "role", "from")


def said(row: Raw) -> list[str]:
    """The texts that a model may read or learn; metadata and descriptions of tools are left out."""
    return [text for name in SAID if name in row for text in _said_in(row[name])]


def with_said(row: Raw, change: Callable[[str], str]) -> dict[str, Any]:
    """The row with ``change`` made to each of ``said``."""
    return {name: _changed_in(value, change) if name in SAID else value for name, value in row.items()}


def everything(row: Raw) -> Iterator[str]:
    """Every text of a row that ``with_everything`` may change."""
    return texts({name: value for name, value in row.items() if name not in _NAMES})


def with_everything(row: Raw, change: Callable[[str | int | float], str | int | float]) -> dict[str, Any]:
    """The row with ``change`` made to each text and number in it, but for labels and roles."""
    return {name: value if name in _NAMES else _deep(value, change) for name, value in row.items()}


def _said_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (
            one[name] for one in value if isinstance(one, Mapping) for name in _SPOKEN if isinstance(one.get(name), str)
        )


def _changed_in(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if not isinstance(value, list):
        return value
    return [
        {key: change(each) if key in _SPOKEN and isinstance(each, str) else each for key, each in one.items()}
        if isinstance(one, Mapping)
        else one
        for one in value
    ]


def _deep(value: Any, change: Callable[[str | int | float], str | int | float]) -> Any:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each if name in _NAMES else _deep(each, change) for name, each in value.items()}
    return [_deep(each, change) for each in value] if isinstance(value, list) else value
