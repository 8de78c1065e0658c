"""The privacy ledger never counts fewer releases than were made, whenever its process dies; a run stops at its budget."""

import json
import os
import random
import signal
import time
import warnings

import pytest

from protocol.errors import PrivacyError
from protocol.privacy.accounting import Budget, Mechanism, affordable, epsilon
from protocol.privacy.ledger import FILE, PrivacyLedger

ROUND = Mechanism((5.0, 5.0), 20, 20)
WIDE = Budget(500.0, 1e-5)


def release(path, number):
    """What leaves the coordinator: a line that is on disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{number}\n".encode())
    os.fsync(handle)
    os.close(handle)


def released(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def spend_and_release(folder):
    """A coordinator that goes on until it dies."""
    ledger = PrivacyLedger(folder / FILE, WIDE)
    ledger.begin({ROUND: 1}, released(folder / "released"))
    while True:
        number = len(ledger.entries) + 1
        ledger.spend(ROUND, number)
        release(folder / "released", number)


def test_fifty_coordinators_killed_at_random_moments_never_count_too_few(tmp_path):
    """SIGKILL to a process that spends and releases as fast as it can; after each the count is taken as the next would."""
    drawn = random.Random(7)
    epsilon({ROUND: 1}, 1e-5)  # what forked processes need is loaded
    cut_off = 0
    for run in range(50):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child starts none
            child = os.fork()
        if not child:
            try:
                spend_and_release(tmp_path)
            finally:
                os._exit(1)
        time.sleep(drawn.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it died of something else before"
        ledger = PrivacyLedger(tmp_path / FILE, WIDE)
        ledger.begin({ROUND: 1}, released(tmp_path / "released"))
        assert len(ledger.entries) >= released(tmp_path / "released")
        cut_off += sum(entry.damaged for entry in ledger.entries)
        # One for each crash at most: what was written and not released, or begun and not written.
        assert len(ledger.entries) <= released(tmp_path / "released") + run + 1
    assert released(tmp_path / "released") > 0


def test_a_crash_after_any_byte_of_any_entry_counts_every_release(tmp_path):
    """A ledger is only ever appended to: a crash leaves a prefix, with the release of its last whole line or without."""
    path = tmp_path / FILE
    ledger = PrivacyLedger(path, WIDE)
    for number in range(1, 4):
        ledger.spend(ROUND, number)
    content = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    lengths = {length for end in [0, *ends] for length in (end - 1, end, end + 1)} | set(range(0, len(content), 11))
    for length in sorted(lengths & set(range(len(content) + 1))):
        path.write_bytes(content[:length])
        made = content[:length].count(b"\n")  # at most: a release follows its whole line
        found = PrivacyLedger(path, WIDE)
        found.begin({ROUND: 1}, made)
        part = length > 0 and content[length - 1 : length] != b"\n"
        assert len(found.entries) == made + part
        assert [entry.damaged for entry in found.entries] == [False] * made + [True] * part
        found.spend(ROUND, made + 1)
        again = PrivacyLedger(path, WIDE)
        assert again.entries == found.entries
        assert again.epsilon() == found.epsilon() == epsilon({ROUND: made + part + 1}, 1e-5)


@pytest.mark.parametrize("rest", [b"\0" * 4096, b"{", b"\xff\xfe{}", b"x" * 10_000])
def test_what_a_disk_leaves_in_place_of_a_line_counts_as_a_release(tmp_path, rest):
    path = tmp_path / FILE
    ledger = PrivacyLedger(path, WIDE)
    ledger.spend(ROUND, 1)
    path.write_bytes(path.read_bytes() + rest)
    found = PrivacyLedger(path, WIDE)
    with pytest.raises(PrivacyError, match="begin anew"):
        found.spend(ROUND, 2)
    assert not found.affords(ROUND)
    found.begin({ROUND: 3}, released=1)
    assert [entry.damaged for entry in found.entries] == [False, True]
    found.spend(ROUND, 2)
    assert len(PrivacyLedger(path, WIDE).entries) == 3


def test_what_was_cut_off_counts_as_the_dearest_that_it_can_have_been(tmp_path):
    path, dear = tmp_path / FILE, Mechanism((1.0,), 20, 20)
    path.write_bytes(b'{"damaged": fal')
    with pytest.raises(PrivacyError, match="say which rounds"):
        PrivacyLedger(path, WIDE).begin({})
    ledger = PrivacyLedger(path, WIDE)
    ledger.begin({ROUND: 1, dear: 1})
    assert ledger.spent() == {dear: 1}


def test_a_disk_that_is_full_leaves_a_ledger_that_counts_the_attempt(tmp_path):
    """The file cannot be written at all: RLIMIT_FSIZE, in a process of its own."""
    import resource

    path = tmp_path / FILE
    ledger = PrivacyLedger(path, WIDE)
    ledger.spend(ROUND, 1)
    whole = path.stat().st_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, whole + 20))
        try:
            ledger.spend(ROUND, 2)
        except OSError:
            os._exit(0 if not ledger.affords(ROUND) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.stat().st_size == whole + 20
    found = PrivacyLedger(path, WIDE)
    found.begin({ROUND: 1}, released=1)
    assert len(found.entries) == 2


def test_no_line_can_be_changed_left_out_repeated_or_moved(tmp_path):
    path = tmp_path / FILE
    ledger = PrivacyLedger(path, WIDE)
    for number in range(1, 5):
        ledger.spend(ROUND, number)
    lines = path.read_bytes().splitlines(keepends=True)
    cheaper = lines[1].replace(b"[5.0, 5.0]", b"[9.0, 9.0]")
    assert cheaper != lines[1]
    changed = {
        "changed": [lines[0], cheaper, *lines[2:]],
        "left out": [lines[0], *lines[2:]],
        "repeated": [lines[0], lines[0], *lines[1:]],
        "moved": [lines[1], lines[0], *lines[2:]],
        "blank": [lines[0], b"\n", *lines[1:]],
        "no object": [lines[0], b"[]\n"],
        "no number": [lines[0].replace(b'"nodes": 20', b'"nodes": NaN')],
        "deep": [b"[" * 100_000 + b"\n"],
        "pickle": [b"\x80\x04c__builtin__\nprint\n"],
    }
    for what, found in changed.items():
        path.write_bytes(b"".join(found))
        with pytest.raises(PrivacyError, match=r"line \d is not what was written"):
            assert PrivacyLedger(path, WIDE), what


def test_lines_that_were_cut_off_whole_are_missed(tmp_path):
    path = tmp_path / FILE
    ledger = PrivacyLedger(path, WIDE)
    for number in range(1, 5):
        ledger.spend(ROUND, number)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(PrivacyError, match="holds 2 releases, and 4 are known"):
        PrivacyLedger(path, WIDE).begin({ROUND: 1}, released=4)
    path.unlink()
    with pytest.raises(PrivacyError, match="holds 0 releases, and 4 are known"):
        PrivacyLedger(path, WIDE).begin({ROUND: 1}, released=4)


def test_a_plan_that_cannot_end_within_the_budget_does_not_begin(tmp_path):
    budget = Budget(8.0, 1e-5)
    buys = affordable(ROUND, budget)
    ledger = PrivacyLedger(tmp_path / FILE, budget)
    assert ledger.begin({ROUND: buys}) <= 8.0
    with pytest.raises(PrivacyError, match=rf"{buys + 1} rounds would end at an epsilon of 8\.\d+, the budget is 8 at"):
        ledger.begin({ROUND: buys + 1})
    assert not (tmp_path / FILE).exists()
    for number in range(1, 3):
        ledger.spend(ROUND, number)
    with pytest.raises(PrivacyError, match=r"after 1\.555 that are spent"):
        PrivacyLedger(tmp_path / FILE, budget).begin({ROUND: buys - 1})
    PrivacyLedger(tmp_path / FILE, budget).begin({ROUND: buys - 2}, released=2)


def test_a_run_stops_at_its_budget_and_a_new_process_does_not_begin_it_again(tmp_path):
    budget = Budget(8.0, 1e-5)
    ledger = PrivacyLedger(tmp_path / FILE, budget)
    while ledger.affords(ROUND):
        ledger.spend(ROUND, len(ledger.entries) + 1)
    assert len(ledger.entries) == affordable(ROUND, budget)
    content = (tmp_path / FILE).read_bytes()
    for each in (ledger, PrivacyLedger(tmp_path / FILE, budget)):
        with pytest.raises(PrivacyError, match="the run ends here"):
            each.spend(ROUND, 99)
        assert each.epsilon() <= 8.0
    assert (tmp_path / FILE).read_bytes() == content


def test_a_ledger_is_its_owners_and_says_rounds_and_costs_alone(tmp_path):
    ledger = PrivacyLedger(tmp_path / "new" / FILE, WIDE)
    ledger.spend(Mechanism((2.0,), 9, 3, "poisson"), 7)
    assert (ledger.path.stat().st_mode & 0o777) == 0o600
    told = json.loads(ledger.path.read_text())
    assert told.pop("digest")
    mechanism = {"noise_multipliers": [2.0], "nodes": 9, "cohort": 3, "sampling": "poisson", "noise": "gaussian"}
    assert told == {"number": 1, "round": 7, "times": 1, "damaged": False, "mechanism": mechanism}


def test_two_processes_that_write_one_ledger_are_found_out_and_nothing_is_lost(tmp_path):
    """The one that comes second may release nothing; beginning anew it counts what both have spent."""
    first, second = (PrivacyLedger(tmp_path / FILE, WIDE) for _ in range(2))
    first.spend(ROUND, 1)
    with pytest.raises(PrivacyError, match="another process has written it"):
        second.spend(ROUND, 1)
    first.spend(ROUND, 2)
    again = PrivacyLedger(tmp_path / FILE, WIDE)
    again.spend(ROUND, 1)
    assert len(PrivacyLedger(tmp_path / FILE, WIDE).entries) == 3


def test_a_ledger_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(PrivacyError, match="cannot be read"):
        PrivacyLedger(tmp_path, Budget(1.0, 1e-5))
