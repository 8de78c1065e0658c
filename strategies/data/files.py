"""Rows of a JSON, JSONL, CSV or Parquet file, each with the line that it came from."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from protocol.errors import DataError

Raw = Mapping[str, Any]
_SHOWN = 5


def read(path: Path) -> list[tuple[int, Raw]]:
    """Every row with its number: the line in JSONL and CSV, counted from 1 in JSON and Parquet.

    Raises:
        DataError: No such file, an unknown ending, nothing in it, or what cannot be parsed (with its lines).
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; expected one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a data file")
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if not rows:
        raise DataError(f"{path}: no rows in it; expected at least one")
    return rows


def raise_all(path: Path, problems: list[tuple[int, str]], total: int) -> None:
    """Raises a DataError that names the first few rows that cannot be used, if there are any."""
    if not problems:
        return
    shown = "".join(f"\n  - line {line}: {what}" for line, what in problems[:_SHOWN])
    more = f"\n  - and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DataError(f"{path}: {len(problems)} of {total} rows cannot be used{shown}{more}")


def _jsonl(path: Path) -> Iterator[tuple[int, Raw]]:
    problems, rows = [], []
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                problems.append((line, f"not JSON ({getattr(error, 'msg', 'nested too deep')})"))
                continue
            if isinstance(row, dict):
                rows.append((line, row))
            else:
                problems.append((line, f"a JSON {type(row).__name__}; expected an object"))
    raise_all(path, problems, len(problems) + len(rows))
    yield from rows


def _json(path: Path) -> Iterator[tuple[int, Raw]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({getattr(error, 'msg', 'nested too deep')}); one object a line goes into .jsonl"
        ) from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path}: found a JSON {type(content).__name__}; expected a list of objects")
    yield from enumerate(content, 1)


def _csv(path: Path) -> Iterator[tuple[int, Raw]]:
    problems, rows = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)  # a cell may hold a document
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    problems.append((reader.line_num, f"not {len(reader.fieldnames or ())} columns as in the first line"))
                else:
                    rows.append((reader.line_num, row))
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: broken CSV ({error})") from None
    raise_all(path, problems, len(problems) + len(rows))
    yield from rows


def _parquet(path: Path) -> Iterator[tuple[int, Raw]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None
    yield from enumerate(table.to_pylist(), 1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Raw]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
