"""The replay buffer is a fair, bounded sample that nobody reads without the key, and what a device learns can be sealed too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.runtime.adapting.personal import Personal
from edge.runtime.adapting.replay import ReplayBuffer, Room
from edge.runtime.adapting.sealing import VaultSeal, seal_of
from edge.runtime.adapting.state import State, Trail, packed, unpacked
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError, VaultError
from protocol.vault import Vault

VAULT, OTHER = Vault(bytes(range(32))), Vault(bytes(32))
CANARY = "the patient's own words"


def row(number, text="text"):
    return {"prompt": f"question {number}", "answer": f"{text} {number}"}


def told(rows):
    return {json.dumps(each, sort_keys=True) for each in rows}


@settings(max_examples=25)
@given(
    numbers=st.lists(st.integers(0, 30), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 9),
    rows=st.integers(1, 12),
    size=st.integers(1024, 1600),
)
def test_neither_order_nor_splits_nor_repeats_change_what_is_kept(numbers, cuts, seed, rows, size, tmp_path_factory):
    """Two buffers of one key are given the same rows, one at once and one shuffled, in parts and some of them twice."""
    folder, room = tmp_path_factory.mktemp("replay"), Room(rows, size)
    ReplayBuffer(folder / "one", VAULT, room).add([])
    shutil.copytree(folder / "one", folder / "other")
    one, other = (ReplayBuffer(folder / name, VAULT, room) for name in ("one", "other"))
    one.add(map(row, numbers))
    shuffled = list(np.random.default_rng(seed).permutation([*numbers, *numbers[:5]]).astype(int).tolist())
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True):
        other.add(map(row, shuffled[first:last]))
    assert told(one.rows()) == told(other.rows())
    assert len(one.rows()) == len(told(one.rows())) <= rows
    assert sum(len(json.dumps(each).encode()) for each in one.rows()) <= size
    whole = sum(len(json.dumps(row(number)).encode()) for number in set(numbers))
    if len(set(numbers)) <= rows and whole <= size:
        assert told(one.rows()) == told(map(row, numbers))


def test_every_row_has_the_same_chance_however_often_it_is_given(tmp_path):
    """Of 20 rows 5 are kept: a row is in 75 of 300 buffers, with a standard deviation of 7.5; one is given 50 times."""
    found = np.zeros(20)
    for number in range(300):
        buffer = ReplayBuffer(tmp_path / str(number), VAULT, Room(rows=5))
        assert buffer.add([*map(row, range(20)), *[row(0)] * 50]) == 5
        for each in buffer.rows():
            found[int(each["answer"].split()[-1])] += 1
    assert np.abs(found - 75).max() < 5 * 7.5


def test_a_row_that_would_push_out_many_is_not_kept(tmp_path):
    buffer = ReplayBuffer(tmp_path, VAULT, Room(size_bytes=2048))
    assert buffer.add([row(1), row(2, "x" * 100)]) == 1
    assert buffer.rows() == [row(1)]
    with pytest.raises(ConfigurationError, match="found 0 rows"):
        Room(rows=0)


def test_a_smaller_room_makes_it_smaller_and_a_larger_one_brings_nothing_back(tmp_path):
    ReplayBuffer(tmp_path, VAULT).add(map(row, range(40)))
    ReplayBuffer(tmp_path, VAULT, Room(rows=7)).add([])
    kept = told(ReplayBuffer(tmp_path, VAULT).rows())
    assert len(kept) == 7
    ReplayBuffer(tmp_path, VAULT).add(map(row, range(40)))
    assert told(ReplayBuffer(tmp_path, VAULT).rows()) == kept


def test_rows_are_given_for_the_training_that_can_use_them(tmp_path):
    buffer = ReplayBuffer(tmp_path, VAULT)
    pair, label = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a", "label": "b"}
    buffer.add([row(1), pair, label])
    assert [buffer.rows(task) for task in ("sft", "dpo", "classification")] == [[row(1)], [pair], [label]]


def test_nobody_reads_it_without_the_key(tmp_path):
    folder = tmp_path / "replay"
    ReplayBuffer(folder, VAULT).add([row(1, CANARY)])
    files = [path for path in folder.iterdir() if path.stat().st_size]
    assert [path.name for path in files] == ["replay.sealed"]
    assert CANARY.encode() not in files[0].read_bytes()
    if os.name == "posix":
        assert (folder.stat().st_mode & 0o077, files[0].stat().st_mode & 0o077) == (0, 0)
    ReplayBuffer(folder, VAULT).wipe()
    assert ReplayBuffer(folder, VAULT).rows() == []


HARMS = {
    "cut": lambda held: held[:-1],
    "flipped": lambda held: held[: len(held) // 2] + bytes([held[len(held) // 2] ^ 1]) + held[len(held) // 2 + 1 :],
    "empty": lambda held: b"",
    "of another key": lambda held: OTHER.seal(b"{}", {"kind": "device", "name": "replay"}),
    "of another name": lambda held: VAULT.seal(b"{}", {"kind": "device", "name": "feedback"}),
    "no JSON": lambda held: VAULT.seal(b"{", {"kind": "device", "name": "replay"}),
    "no object": lambda held: VAULT.seal(b"[1]", {"kind": "device", "name": "replay"}),
    "no rows": lambda held: VAULT.seal(b'{"key": 7}', {"kind": "device", "name": "replay"}),
    "no row": lambda held: VAULT.seal(b'{"key": "00", "below": 9, "rows": [7]}', {"kind": "device", "name": "replay"}),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_one_error_and_stays_as_it_is(tmp_path, harm):
    ReplayBuffer(tmp_path, VAULT).add([row(1, CANARY)])
    path = tmp_path / "replay.sealed"
    path.write_bytes(HARMS[harm](path.read_bytes()))
    before = path.read_bytes()
    for ask in (lambda: ReplayBuffer(tmp_path, VAULT).rows(), lambda: ReplayBuffer(tmp_path, VAULT).add([row(2)])):
        with pytest.raises(VaultError) as error:
            ask()
        assert CANARY not in str(error.value)
    assert path.read_bytes() == before


KILLED = """
import sys
from pathlib import Path
from edge.runtime.adapting.replay import ReplayBuffer, Room
from protocol.vault import Vault
buffer = ReplayBuffer(Path(sys.argv[1]), Vault(bytes(range(32))), Room(rows=50))
for number in range(100000):
    buffer.add([{"prompt": f"question {number}", "answer": f"text {number}"}])
    print(number, flush=True)
"""


def test_killed_at_any_moment_what_was_kept_before_is_there(tmp_path):
    """Each row is told after it was written; the room is larger than what comes in before the kill, but for fast machines."""
    for seconds in (0.0, 0.05, 0.11):
        folder = tmp_path / str(seconds)
        process = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        last = [0, *map(int, process.communicate()[0].split())][-1]
        numbers = {int(each["answer"].split()[-1]) for each in ReplayBuffer(folder, VAULT).rows()}
        assert numbers <= set(range(last + 2))
        assert len(numbers) >= min(last + 1, 50)


def adapter(seed):
    generator = np.random.default_rng(seed)
    draw = generator.standard_normal
    return Adapter({"module": Factors(draw((2, 3)).astype(np.float32), draw((4, 2)).astype(np.float32), 1.0)}, {})


def test_adapters_and_states_are_sealed_and_do_not_open_in_another_place(tmp_path):
    seal = VaultSeal(VAULT)
    own = Personal(tmp_path, seal)
    assert [own.keep(adapter(seed), {"note": CANARY}) for seed in (1, 2)] == [1, 2]
    Trail(tmp_path, seal).keep(State({"step": 1, "note": CANARY}))
    assert all(CANARY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert own.current()[0].adapter.digest() == adapter(2).digest()
    assert Trail(tmp_path, seal).newest()[0].facts["note"] == CANARY
    shutil.copy(tmp_path / "adapter-1.state", tmp_path / "adapter-2.state")
    found, said = own.current()
    assert (found.number, found.adapter.digest()) == (1, adapter(1).digest())
    assert "version 2 is damaged" in said[0]
    with pytest.raises(AdapterError):
        VaultSeal(OTHER).open((tmp_path / "adapter-1.state").read_bytes(), "adapter-1.state")


def test_a_folder_is_opened_with_the_key_it_was_begun_with_or_not_at_all(tmp_path):
    sealed, clear = tmp_path / "sealed", tmp_path / "clear"
    Personal(sealed, VaultSeal(VAULT)).keep(adapter(1), {})
    Personal(clear).keep(adapter(1), {})
    assert seal_of(clear, None) is None
    assert seal_of(tmp_path / "nowhere", VAULT) is not None
    content = unpacked(seal_of(sealed, VAULT).open((sealed / "adapter-1.state").read_bytes(), "adapter-1.state"))
    assert packed(content) == packed(unpacked((clear / "adapter-1.state").read_bytes()))
    for folder, vault, said in ((sealed, None, "--vault"), (sealed, OTHER, "none of its 1"), (clear, VAULT, "without a key")):
        with pytest.raises(VaultError, match=said):
            seal_of(folder, vault)
    Personal(sealed, VaultSeal(VAULT)).keep(adapter(2), {})
    (sealed / "adapter-2.state").write_bytes(b"")  # damaged: the one before it is used, and it is said
    found, said = Personal(sealed, seal_of(sealed, VAULT)).current()
    assert (found.number, len(said)) == (1, 1)
