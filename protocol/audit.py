"""The audit log: what happened, in lines of which each holds the hash of the one before and its own signature.

A line of ``audit.jsonl`` is JSON with exactly these keys in this order: ``n`` (from 1), ``time`` (seconds since 1970),
``event``, ``facts``, ``previous`` (the hash of the line before; 64 zeros in the first), ``hash`` (SHA-256 over the line's JSON
without ``hash`` and ``signature``) and, where the log has a key, ``signature`` (Ed25519 over the 32 bytes of the hash for the
purpose ``audit-line``, in Base64). Nothing in it can be changed, left out, added or moved without ``verify`` naming the line.
Lines cut off at the end leave a log that holds in itself: who keeps the hash of a last line elsewhere gives it to ``verify``.

Facts are names, counts, digests and codes of errors: never values of data, paths, or texts of exceptions.
"""

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.durable import alone, to_disk
from protocol.errors import AuditError, SignatureError, shown
from protocol.signature import SIGNATURE_BYTES, fingerprint, sign
from protocol.signature import verify as verify_signature

FILE: Final = "audit.jsonl"
BEGINNING: Final = "0" * 64
TORN: Final = "torn"
_PURPOSE = "audit-line"
_EVENT = r"[a-z][a-z-]{0,39}"
_LONGEST_TEXT, _MOST_FACTS = 200, 1000
_OWNER_ONLY = 0o600
_LAST_TIME = 2**37  # in the year 6325, which every calendar has


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        n: From 1, without gaps.
        time: Seconds since 1970.
        event: What happened, in one word.
        facts: About it.
        hash: Of this line and, by the one before, of all.
        signature: 96 bytes, or none.
    """

    n: int
    time: float
    event: str
    facts: Mapping[str, Any]
    hash: str
    signature: bytes = b""


@dataclass(frozen=True)
class Report:
    """What a log that holds says of itself.

    Attributes:
        lines: How many.
        last: The last one's hash; 64 zeros of an empty log. To be kept elsewhere: it is what tells of a cut.
        signers: Fingerprints of those who signed; empty where signatures were not asked for.
    """

    lines: int
    last: str
    signers: tuple[str, ...] = ()


class AuditLog:
    """Appends to an audit log; several processes may, one line after the other.

    Args:
        path: Created with the first line, for its owner's eyes alone.
        key: Signs each line; without one they are chained only, and whoever can write the file can write all of it anew.
        expect: The hash of a line that was written before, where that is known: lines that were cut off are missed by it.

    Raises:
        AuditError: What is there is no whole chain, or the expected line is not in it; names the line. Nothing is written.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey | None = None, expect: str | None = None) -> None:
        self.path, self._key = path, key
        self._count, self._last, self._bytes = 0, BEGINNING, 0
        known = {BEGINNING}
        with self._locked(create=False) as handle:
            if handle is not None:
                self._catch_up(handle, known)
        _hold(known, expect, path, self._count)

    @property
    def last(self) -> str:
        """The hash of the last line."""
        return self._last

    def write(self, event: str, **facts: Any) -> str:
        """Appends a line; when this returns it is on the disk.

        Args:
            event: Lower case letters and hyphens.
            facts: JSON. Texts are cut at 200 characters and what steers a terminal is escaped.

        Returns:
            The line's hash.

        Raises:
            AuditError: The log was changed meanwhile.
            OSError: The disk does not take it.
        """
        if not re.fullmatch(_EVENT, event):
            raise ValueError(f"event {event!r}: expected lower case letters and hyphens")
        with self._locked(create=True) as handle:
            if torn := self._catch_up(handle):
                os.ftruncate(handle, self._bytes)
                self._append(handle, TORN, {"bytes": torn})
            return self._append(handle, event, _plain(facts))

    def _append(self, handle: int, event: str, facts: Any) -> str:
        body = {"n": self._count + 1, "time": round(time.time(), 3), "event": event, "facts": facts, "previous": self._last}
        line, digest = _line(body, self._key)
        written = 0
        while written < len(line):
            written += os.write(handle, line[written:])
        os.fsync(handle)
        if not self._count:
            to_disk(self.path.parent)
        self._count, self._last, self._bytes = self._count + 1, digest, self._bytes + len(line)
        return digest

    def _catch_up(self, handle: int, hashes: set[str] | None = None) -> int:
        """Reads what was written since, and notes its hashes; returns how many bytes at the end are no whole line."""
        size = os.fstat(handle).st_size
        if size < self._bytes:
            raise AuditError(f"{self.path}: line {self._count} is gone, the file was cut; put the whole log back from a copy")
        content = b""
        while len(content) < size - self._bytes:
            content += (read := os.pread(handle, size - self._bytes - len(content), self._bytes + len(content)))
            if not read:
                break
        whole = content[: content.rfind(b"\n") + 1]
        for line in _chain(whole, self.path, self._count, self._last):
            self._count, self._last = line.n, line.hash
            if hashes is not None:
                hashes.add(line.hash)
        self._bytes += len(whole)
        return len(content) - len(whole)

    @contextmanager
    def _locked(self, *, create: bool) -> Iterator[Any]:
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        elif not self.path.exists():
            yield None
            return
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), _OWNER_ONLY)
        try:
            alone(handle)
            yield handle
        finally:
            os.close(handle)  # and the lock with it


def verify(path: Path, trusted: Collection[Ed25519PublicKey] | None = None, expect: str | None = None) -> Report:
    """Looks at every byte of a log.

    Args:
        path: The log.
        trusted: Whose signatures count, one on each line; None where signatures are not to be looked at.
        expect: The hash that some line must have: of the last line that was known elsewhere. Without it nobody can tell whether
            lines were cut off at the end.

    Raises:
        AuditError: A line was changed, left out, added, moved, cut or not signed by whom it should be, or the expected one is
            not there. Names the first.
    """
    content = _content(path)
    whole = content.rfind(b"\n") + 1
    signers: dict[str, None] = {}
    last, lines, known = BEGINNING, 0, {BEGINNING}
    for line in _chain(content[:whole], path, 0, BEGINNING):
        if trusted is not None:
            signers[_signer(line, path, trusted)] = None
        last, lines = line.hash, line.n
        known.add(last)
    if whole < len(content):
        raise AuditError(f"{path}: line {lines + 1} is cut off; a log that is gone on with says so in a line of its own")
    _hold(known, expect, path, lines)
    return Report(lines, last, tuple(signers))


def read(path: Path) -> list[Line]:
    """The lines of a log whose chain holds.

    Raises:
        AuditError: It does not hold, or there is none.
    """
    content = _content(path)
    return list(_chain(content[: content.rfind(b"\n") + 1], path, 0, BEGINNING))


def _hold(known: Collection[str], expect: str | None, path: Path, lines: int) -> None:
    if expect is not None and expect.strip().lower() not in known:
        raise AuditError(
            f"{path}: line {lines + 1} is missing: {lines} lines hold, and none has the hash that was expected; lines were cut "
            "off at the end, or this is another log"
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror or type(error).__name__}); name an audit log") from None


def _chain(content: bytes, path: Path, before: int, last: str) -> Iterator[Line]:
    """Lines that follow from each other, each to the byte as it was written."""
    for number, raw in enumerate(content.splitlines(keepends=True), before + 1):
        line = _parsed(raw, number, last)
        if line is None:
            raise AuditError(
                f"{path}: line {number} is not what was written after line {number - 1}: it was changed, or one was left out, "
                "added or moved; put the log back from a copy, and keep this one as it is"
            )
        last = line.hash
        yield line


def _parsed(raw: bytes, number: int, last: str) -> Line | None:
    try:
        told = json.loads(raw)
        signature = base64.b64decode(told.get("signature", ""), validate=True)
        body = {key: told[key] for key in ("n", "time", "event", "facts", "previous")}
        digest = _digest(body)
        again = _told(body, digest, signature)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if again != raw or body["n"] != number or body["previous"] != last or not _printable(body):
        return None
    return Line(number, body["time"], body["event"], body["facts"], digest, signature)


def _printable(body: Mapping[str, Any]) -> bool:
    """Whether a line, which anybody can chain, is of the types that are shown to people: a word, a time, facts."""
    word, when = body["event"], body["time"]
    return (
        isinstance(word, str)
        and bool(re.fullmatch(_EVENT, word))
        and isinstance(when, int | float)
        and 0 <= when < _LAST_TIME
        and isinstance(body["facts"], dict)
    )


def _line(body: Mapping[str, Any], key: Ed25519PrivateKey | None) -> tuple[bytes, str]:
    digest = _digest(body)
    return _told(body, digest, sign(key, _PURPOSE, bytes.fromhex(digest)) if key else b""), digest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()


def _told(body: Mapping[str, Any], digest: str, signature: bytes) -> bytes:
    signed = {"signature": base64.b64encode(signature).decode("ascii")} if signature else {}
    return json.dumps({**body, "hash": digest, **signed}, allow_nan=False).encode() + b"\n"


def _signer(line: Line, path: Path, trusted: Iterable[Ed25519PublicKey]) -> str:
    try:
        return fingerprint(verify_signature(line.signature, _PURPOSE, bytes.fromhex(line.hash), trusted))
    except SignatureError as error:
        why = "is not signed" if not line.signature else f"has a signature that does not hold ({error})"
        raise AuditError(f"{path}: line {line.n} {why}; expected one by a trusted key, of {SIGNATURE_BYTES} bytes") from None


def _plain(value: Any) -> Any:
    """As JSON will give it back: texts short and harmless, numbers finite, keys in order."""
    if isinstance(value, Mapping):
        return {shown(str(key), _LONGEST_TEXT): _plain(value[key]) for key in sorted(value, key=str)[:_MOST_FACTS]}
    if isinstance(value, str):
        return shown(value, _LONGEST_TEXT)
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return [_plain(each) for each in (sorted(value) if isinstance(value, set | frozenset) else list(value)[:_MOST_FACTS])]
