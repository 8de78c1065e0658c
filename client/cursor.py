"""Which rows a node has trained on: a position that outlives the round, so that every round gets fresh rows.

It is kept in the node's Flower state, which a restart of the SuperNode and a new series of runs lose, and in a file where
the node names one. It moves when a node has made its update: a round that failed there is trained on the same rows again.
"""

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context

from protocol.errors import DataError
from protocol.files import write_whole

_KEY = "fedge-cursor"


def position(context: Context, federation: str, file: Path | None) -> int:
    """Rows that this node has trained on in this federation.

    Raises:
        DataError: The file is there and is not a cursor.
    """
    record = context.state.get(_KEY)
    found = record.get(federation, 0) if isinstance(record, ConfigRecord) else 0
    return max(found if isinstance(found, int) else 0, _read(file).get(federation, 0) if file else 0)


def advance(context: Context, federation: str, to: int, file: Path | None) -> None:
    """Remembers a new position."""
    if file:  # the file first: if it cannot be written, the round has failed and nothing has moved
        write_whole(file, json.dumps({**_read(file), federation: to}))
    record = context.state.get(_KEY)
    known = dict(record) if isinstance(record, ConfigRecord) else {}
    context.state[_KEY] = ConfigRecord({**known, federation: to})


def _read(file: Path) -> dict[str, int]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError
        return {str(name): int(value) for name, value in content.items()}
    except (OSError, ValueError, TypeError):
        raise DataError(f"{file}: not a cursor file; expected {{federation: rows}}; delete it to begin anew") from None
