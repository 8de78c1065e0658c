"""Rows of a JSON, JSONL, CSV or Parquet file, or of a data set on the hub, each with the line that it came from.

Files are read as a stream: of JSONL and CSV a line is in memory, of Parquet a batch of rows; JSON is one document and is read
whole. A row that cannot be read is told with its line and does not end the stream.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from protocol.data_settings import ENDINGS, is_hub_name
from protocol.errors import DataError

Raw = Mapping[str, Any]
Read = tuple[int, Raw | str]  # a line and its row, or why there is none
# Tokenizers take seconds and gigabytes for more, and no model reads as much at once: such a line is a file in the wrong place.
LONGEST_ROW_BYTES = 16 * 2**20
_TOO_LONG = f"longer than {LONGEST_ROW_BYTES // 2**20} MiB; split it into several rows"
_NOT_UTF8 = "not UTF-8; save the file as UTF-8"
_SHOWN = 5
_BATCH = 1024


def read(path: Path) -> list[tuple[int, Raw]]:
    """Every row with its number: the line in JSONL and CSV, counted from 1 in JSON, Parquet and data sets of the hub.

    Raises:
        DataError: No such file, an unknown ending, nothing in it, or what cannot be parsed (with its lines).
    """
    rows: list[tuple[int, Raw]] = []
    problems: list[tuple[int, str]] = []
    for line, found in stream(path):
        if isinstance(found, str):
            problems.append((line, found))
        else:
            rows.append((line, found))
    raise_all(path, problems, len(problems) + len(rows))
    return rows


def stream(path: Path) -> Iterator[Read]:
    """Every row with its number, one after the other; in place of a row that cannot be read, why.

    Raises:
        DataError: No such file, an unknown ending, nothing in it, or a file of which nothing can be told apart.
    """
    empty = True
    for line, found in _reader(path)(path):
        empty = False
        yield line, _TOO_LONG if any(len(text) > LONGEST_ROW_BYTES for text in texts(found)) else found
    if empty:
        raise DataError(f"{path}: no rows in it; expected at least one")


def texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts(inner)


def raise_all(path: Path, problems: Sequence[tuple[int, str]], total: int, hint: str = "") -> None:
    """Raises a DataError that names the first few rows that cannot be used, if there are any."""
    if not problems:
        return
    shown = "".join(f"\n  - line {line}: {what}" for line, what in problems[:_SHOWN])
    more = f"\n  - and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DataError(f"{path}: {len(problems)} of {total} rows cannot be used{shown}{more}{hint}")


def _reader(path: Path) -> Callable[[Path], Iterator[Read]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the path of a data file")
        return reader
    if is_hub_name(path) and not path.exists():
        return _hub
    raise DataError(
        f"{path}: unknown ending {path.suffix!r}; expected one of {', '.join(ENDINGS)}, or a data set's name on the hub"
    )


def _jsonl(path: Path) -> Iterator[Read]:
    with path.open("rb") as file:
        for line, content in enumerate(_lines(file), 1):
            if content is None:
                yield line, _TOO_LONG
                continue
            try:
                text = content.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield line, f"byte {error.start} of it is {_NOT_UTF8}"
                continue
            if text.strip():
                yield line, _object(text)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines; None for one that is too long, which is never held whole."""
    while content := file.readline(LONGEST_ROW_BYTES + 1):
        if len(content) <= LONGEST_ROW_BYTES:
            yield content
            continue
        while content and not content.endswith(b"\n"):
            content = file.readline(2**20)
        yield None


def _object(text: str) -> Raw | str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({_why(error)})"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__}; expected an object"


def _why(error: ValueError | RecursionError) -> str:
    """Without the text around it."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _json(path: Path) -> Iterator[Read]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        # Bytes that are not UTF-8 become halves of surrogate pairs, and so stay in the row that holds them.
        rows = json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if at := _not_utf8(content):
            raise DataError(f"{path}: line {at}: {_NOT_UTF8}") from None
        raise DataError(f"{path}: not JSON ({_why(error)}); one object a line goes into .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: found a JSON {type(rows).__name__}; expected a list of objects")
    clean = not _not_utf8(content)
    for number, row in enumerate(rows, 1):
        yield number, row if clean or not _escaped(row) else _NOT_UTF8


def _csv(path: Path) -> Iterator[Read]:
    csv.field_size_limit(LONGEST_ROW_BYTES)  # a cell may hold a document
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                if "field larger" not in str(error):  # after a quote that does not end nobody knows where rows begin
                    raise DataError(f"{path}: line {reader.line_num}: broken CSV ({error})") from None
                yield reader.line_num, _TOO_LONG
                continue
            if row is None:
                return
            yield reader.line_num, _cells(row, reader.fieldnames or ())


def _cells(row: dict[Any, Any], columns: Sequence[str]) -> Raw | str:
    if len(row) < len(columns):
        return "two columns have the same name in the first line; expected a name each"
    if None in row or None in row.values():
        return f"not {len(columns)} columns as in the first line"
    return _NOT_UTF8 if _escaped(row) else row


def _parquet(path: Path) -> Iterator[Read]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file, or a part of one ({type(error).__name__})") from None
    with file:
        number = 0
        for group in range(file.num_row_groups):
            last = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group]):
                    for row in _batch(batch):
                        number += 1
                        yield number, row
            except (pyarrow.lib.ArrowException, OSError) as error:
                told = f"in a damaged part of the Parquet file, up to row {last} ({type(error).__name__})"
                yield from ((damaged, told) for damaged in range(number + 1, last + 1))
                number = last


def _batch(batch: Any) -> list[Raw | str]:
    """Rows of a record batch; text in it is not checked by those who write Parquet."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_parquet_row(batch.slice(at, 1)) for at in range(batch.num_rows)]


def _parquet_row(batch: Any) -> Raw | str:
    try:
        row: Raw = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return _NOT_UTF8
    return row


def _hub(path: Path) -> Iterator[Read]:
    """A data set of the hub, which ``datasets`` keeps on disk and maps into memory."""
    import datasets

    name, *rest = path.as_posix().split(":")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) > 1 else None)
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - connection, cache, builder and parser each have errors of their own
        raise DataError(
            f"{path}: no such file, and no data set {name!r}{f' ({config})' if config else ''} with a split {split!r} could be "
            f"had from the hub ({type(error).__name__}); give a file, fetch the data set while there is a network, or "
            "name it as owner/name:config:split"
        ) from None
    yield from enumerate((dict(row) for row in found), 1)


def _not_utf8(content: bytes) -> int:
    """The first line that is not UTF-8; 0 where all are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 0


def _escaped(row: Raw) -> bool:
    """Whether a byte that is not UTF-8 stands in it (as ``surrogateescape`` marks it), in a field's name or in a text."""
    return any(
        "\udc80" <= letter <= "\udcff" for text in (*map(str, row), *texts(row)) if not text.isascii() for letter in text
    )


_READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
