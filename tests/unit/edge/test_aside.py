"""What a training puts aside, and what it says where a disk is full."""

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge.runtime.adapting.aside import Aside
from edge.runtime.adapting.state import State, Trail, check_room
from protocol.errors import HardwareError

ARRAYS = st.one_of(
    arrays(np.float32, array_shapes(max_dims=3, max_side=20)),
    arrays(np.int64, array_shapes(max_dims=2, min_side=0, max_side=9)),
)


@pytest.fixture
def small_files():
    """No file of this process grows beyond 64 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@settings(max_examples=100, deadline=None)
@given(writes=st.lists(st.tuples(st.sampled_from("abc"), ARRAYS), max_size=12))
def test_it_is_a_dictionary_of_copies(tmp_path_factory, writes):
    """Oracle: a dict, for any order of writes, sizes and kinds; equal to the bit, and nobody's change reaches what is aside."""
    folder = tmp_path_factory.getbasetemp()
    oracle, aside = {}, Aside(folder, {})
    for name, array in writes:
        oracle[name] = array.copy()
        aside[name] = array
        aside[name][...] = 1  # of a copy
    assert list(aside) == list(oracle)
    for name, array in oracle.items():
        assert aside[name].dtype == array.dtype
        assert aside[name].shape == array.shape
        assert aside[name].tobytes() == array.tobytes()


def test_what_is_cleared_is_not_read_first():
    """Oracle: the file's own place, which every read moves."""
    aside = Aside(None, {"x": np.zeros(10), "y": np.ones(3)})
    place = aside._file.tell()
    aside.clear()
    assert (list(aside), aside._file.tell()) == ([], place)
    aside["x"] = np.arange(4)
    assert aside["x"].tolist() == [0, 1, 2, 3]


def test_nothing_of_it_has_a_name_or_can_be_read(tmp_path):
    """The file as the system shows it to whoever may look into this process: none of the numbers; the same ones differ."""
    row = np.arange(4096, dtype=np.float32)
    aside = Aside(tmp_path, {"first": row, "second": row})
    assert not list(tmp_path.iterdir())
    held = Path(f"/proc/self/fd/{aside._file.fileno()}").read_bytes()
    assert len(held) == 2 * row.nbytes
    assert row.tobytes()[400:432] not in held
    assert held[: row.nbytes] != held[row.nbytes :]
    before = held
    aside["first"] = row
    assert Path(f"/proc/self/fd/{aside._file.fileno()}").read_bytes() != before  # no counter is used twice


def test_a_disk_that_is_full_is_told_with_the_figures_and_what_was_there_stands(tmp_path, small_files):
    """The system's own refusal of a larger file stands for a full disk."""
    trail = Trail(tmp_path)
    trail.keep(State({"step": 1}, {"x": np.zeros(10)}))
    trail.keep(State({"step": 2}, {"x": np.zeros(10)}))
    with pytest.raises(HardwareError, match=r"80\d{4} bytes could not be written \(File too large\); make room"):
        trail.keep(State({"step": 3}, {"x": np.zeros(100_000)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training-a.state", "training-b.state"]
    state, wrong = Trail(tmp_path).newest()
    assert state is not None
    assert (state.facts["step"], wrong) == (2, [])
    aside = Aside(tmp_path, {"x": np.zeros(10)})
    with pytest.raises(HardwareError, match=r"800000 bytes could not be put aside \(File too large\); make room"):
        aside["x"] = np.zeros(100_000)
    assert "x" not in aside  # half of it may be written over
    with pytest.raises(HardwareError, match="nothing can be put aside there"):
        Aside(tmp_path / "nowhere")


def test_room_is_looked_for_before_anything_is_trained(tmp_path):
    check_room(tmp_path, 1)
    with pytest.raises(HardwareError, match=rf"\d+ bytes are free, and a training keeps {2**62} there"):
        check_room(tmp_path, 2**62)
