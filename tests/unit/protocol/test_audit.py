"""The audit log: whatever is changed, left out, added, moved or cut off is found, and nothing goes on after it."""

import base64
import hashlib
import json
import multiprocessing
import random

import pytest

from protocol.audit import BEGINNING, AuditLog, read, verify
from protocol.errors import AuditError
from protocol.signature import fingerprint, make_key

KEY = make_key()
TRUSTED = [KEY.public_key()]


def a_log(path, lines=8, key=KEY):
    log = AuditLog(path, key)
    for number in range(lines):
        log.write(
            ("joined", "asked", "refused")[number % 3],
            node=f"bank-{number}",
            round=number,
            figures=[1.5, None],
            names={"b", "a"},
        )
    return log


def broken(path, content, expect=None):
    """The line that is named."""
    path.write_bytes(content)
    with pytest.raises(AuditError) as caught:
        verify(path, TRUSTED, expect)
    return int(str(caught.value).partition(": line ")[2].split(" ", 1)[0])


def test_a_log_that_nobody_touched_holds_and_says_who_signed_it(tmp_path):
    log = a_log(tmp_path / "audit.jsonl")
    report = verify(log.path, TRUSTED)
    assert (report.lines, report.last, report.signers) == (8, log.last, (fingerprint(KEY.public_key()),))
    assert verify(log.path, TRUSTED, expect=log.last).lines == 8
    assert log.path.stat().st_mode & 0o777 == 0o600
    first, *_ = read(log.path)
    assert (first.event, first.facts) == ("joined", {"figures": [1.5, None], "names": ["a", "b"], "node": "bank-0", "round": 0})


def test_a_line_is_what_the_format_says(tmp_path):
    """The oracle checks the chain by the docstring's words alone, and the signature with the key itself."""
    log = a_log(tmp_path / "audit.jsonl", lines=3)
    before = "0" * 64
    for number, raw in enumerate(log.path.read_text().splitlines(), 1):
        told = json.loads(raw)
        assert list(told) == ["n", "time", "event", "facts", "previous", "hash", "signature"]
        body = {key: told[key] for key in ("n", "time", "event", "facts", "previous")}
        assert told["n"] == number
        assert told["previous"] == before
        assert told["hash"] == hashlib.sha256(json.dumps(body).encode()).hexdigest()
        signed = b"fedge-signature-1\0audit-line\0" + bytes.fromhex(told["hash"])
        KEY.public_key().verify(base64.b64decode(told["signature"])[32:], signed)
        before = told["hash"]


def test_every_flipped_byte_is_found_in_its_own_line(tmp_path):
    """All bytes, each with another bit: a newline that is changed breaks the line that it ends."""
    content = a_log(tmp_path / "log", lines=4).path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        assert broken(tmp_path / "log", bytes(changed)) == content[:at].count(b"\n") + 1


def test_every_line_that_is_left_out_swapped_repeated_or_put_in_is_found(tmp_path):
    log = a_log(tmp_path / "log")
    lines = log.path.read_bytes().splitlines(keepends=True)
    other = a_log(tmp_path / "other").path.read_bytes().splitlines(keepends=True)
    for at in range(8):
        missing = lines[:at] + lines[at + 1 :]
        # Of the last line nothing is left to miss it but its hash, known elsewhere.
        assert broken(log.path, b"".join(missing), expect=log.last) == at + 1
        # A first line of another log is a good first line: it is the second that does not follow from it.
        foreign = [*lines[:at], other[at], *lines[at + 1 :]]
        assert broken(log.path, b"".join(foreign)) == max(2, at + 1)
        assert broken(log.path, b"".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])) == at + 2
        for to in range(at + 1, 8):
            swapped = list(lines)
            swapped[at], swapped[to] = lines[to], lines[at]
            assert broken(log.path, b"".join(swapped)) == at + 1


def test_every_cut_is_found(tmp_path):
    """Within a line by itself; between two lines by the hash that is known elsewhere."""
    log = a_log(tmp_path / "log", lines=4)
    content = log.path.read_bytes()
    for length in range(len(content)):
        assert broken(log.path, content[:length], expect=log.last) == content[:length].count(b"\n") + 1


def test_a_log_that_somebody_else_wrote_whole_is_not_signed_by_whom_it_should_be(tmp_path):
    a_log(tmp_path / "theirs", key=make_key())
    with pytest.raises(AuditError, match=r"line 1 has a signature that does not hold \(signed by the key SHA256"):
        verify(tmp_path / "theirs", TRUSTED)
    a_log(tmp_path / "nobodys", key=None)
    with pytest.raises(AuditError, match="line 1 is not signed"):
        verify(tmp_path / "nobodys", TRUSTED)
    assert verify(tmp_path / "nobodys").lines == 8
    lines = a_log(tmp_path / "log").path.read_text().splitlines()
    told = json.loads(lines[-1])
    del told["signature"]
    (tmp_path / "log").write_text("\n".join([*lines[:-1], json.dumps(told)]) + "\n")
    with pytest.raises(AuditError, match="line 8 is not signed"):
        verify(tmp_path / "log", TRUSTED)


def test_a_log_goes_on_after_a_restart_and_with_a_new_key(tmp_path):
    last, other = a_log(tmp_path / "log").last, make_key()
    again = AuditLog(tmp_path / "log", other, expect=last)
    assert again.last == last
    again.write("ended")
    assert verify(tmp_path / "log", [*TRUSTED, other.public_key()], expect=last).lines == 9


def test_nothing_is_written_after_a_broken_chain(tmp_path):
    log = a_log(tmp_path / "log")
    content = log.path.read_bytes()
    changed = content.replace(b"bank-2", b"bank-7")
    log.path.write_bytes(changed)
    with pytest.raises(AuditError, match="line 3 is not what was written"):
        AuditLog(log.path, KEY)
    log.path.write_bytes(b"".join(content.splitlines(keepends=True)[:5]))
    with pytest.raises(AuditError, match="line 8 is gone"):
        log.write("ended")
    with pytest.raises(AuditError, match="line 6 is missing"):
        AuditLog(log.path, KEY, expect=log.last)
    assert log.path.read_bytes().count(b"\n") == 5


def test_a_line_that_a_crash_has_cut_is_taken_away_and_told(tmp_path):
    log = a_log(tmp_path / "log", lines=2)
    with log.path.open("ab") as file:
        file.write(b'{"n": 3, "time"')
    again = AuditLog(log.path, KEY)
    again.write("ended")
    assert [(line.event, dict(line.facts)) for line in read(log.path)[2:]] == [("torn", {"bytes": 15}), ("ended", {})]
    assert verify(log.path, TRUSTED, expect=log.last).lines == 4


def _append(path, name):
    log = AuditLog(path, KEY)
    for _ in range(20):
        log.write("asked", node=name)


def test_writers_at_the_same_time_make_one_chain(tmp_path):
    workers = [multiprocessing.Process(target=_append, args=(tmp_path / "log", name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    report = verify(tmp_path / "log", TRUSTED)
    assert report.lines == 60
    assert {line.facts["node"] for line in read(tmp_path / "log")} == set("abc")


def test_facts_are_short_and_steer_no_terminal(tmp_path):
    log = AuditLog(tmp_path / "log", KEY)
    log.write("left-out", node="x\x1b[2J\n" + "y" * 500, count=float("nan"), at=2**70, some={"k": {1.0: "v"}})
    (line,) = read(log.path)
    assert len(line.facts["node"]) == 200
    assert line.facts["node"].startswith("x\\x1b[2J\\ny")
    assert (line.facts["count"], line.facts["at"], line.facts["some"]) == ("nan", 2**70, {"k": {"1.0": "v"}})
    assert log.path.read_bytes().count(b"\n") == 1
    with pytest.raises(ValueError, match="expected lower case"):
        log.write("Left out")


@pytest.mark.parametrize(
    "odd",
    [{"event": "\x1b[2Jjoined"}, {"event": 7}, {"time": "noon"}, {"time": 1e300}, {"time": None}, {"facts": ["a"]}],
    ids=["escape", "number", "word", "far", "none", "list"],
)
def test_a_chain_of_what_could_steer_a_terminal_or_is_no_fact_does_not_hold(tmp_path, odd):
    """Whoever has no key can still chain lines of his own; the hash is made here as the format says."""
    body = {"n": 1, "time": 1.0, "event": "joined", "facts": {}, "previous": "0" * 64} | odd
    body["hash"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    path = tmp_path / "audit.jsonl"
    path.write_text(json.dumps(body) + "\n", encoding="utf-8")
    for look in (verify, read):
        with pytest.raises(AuditError, match="line 1 "):
            look(path)


def test_an_empty_log_and_none_at_all(tmp_path):
    (tmp_path / "empty").touch()
    assert verify(tmp_path / "empty", TRUSTED).last == BEGINNING
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(AuditError, match="cannot be read"):
            verify(path, TRUSTED)


def test_two_hundred_random_edits_of_a_longer_log_are_all_found(tmp_path):
    log = a_log(tmp_path / "log", lines=40)
    content, rng = log.path.read_bytes(), random.Random(7)
    for _ in range(200):
        at, length = rng.randrange(len(content)), rng.randrange(1, 300)
        changed = content[:at] + rng.randbytes(rng.choice([0, 1, length])) + content[at + length :]
        if changed != content:
            assert broken(log.path, changed, expect=log.last) >= 1
