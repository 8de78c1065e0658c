"""Updates that wait for the end of their round: given back as they came, from memory or from files."""

import resource

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.errors import FederationError
from protocol.manifest import Manifest
from protocol.update import Update
from server.held import Held


def update(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    pair = Factors(rng.normal(size=(2, 5)).astype(dtype), rng.normal(size=(4, 2)).astype(dtype), 1.5)
    names = f"head|{seed} 诊所/../x"  # names come from outside
    dense = {names: rng.normal(size=(3, 4)).astype(dtype), "empty": np.zeros((0, 4), dtype)}
    manifest = Manifest(base_digest="ab" * 32, kind="update", r=2, federation="f", round=1, num_examples=seed)
    return Update(Adapter({"layers.0.q": pair}, dense), manifest, {names: np.array([True, False, True])})


@pytest.mark.parametrize("memory_bytes", [0, 400, 2**20])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_update_comes_back_as_it_was_put_wherever_it_waited(memory_bytes, dtype):
    with Held(memory_bytes) as held:
        for node in (7, 3, 5):
            held.put(node, update(node, dtype))
        assert list(held) == [3, 5, 7]
        for node in (5, 3, 7):
            found, wanted = held.take(node), update(node, dtype)
            assert found.adapter.digest() == wanted.adapter.digest()
            assert found.manifest == wanted.manifest
            assert {name: rows.tolist() for name, rows in found.rows.items()} == {
                name: rows.tolist() for name, rows in wanted.rows.items()
            }
        assert list(held) == []


def fail_while_holding(folder):
    with Held(0) as held:
        held.put(1, update(1))
        assert list(folder.rglob("*.safetensors"))
        raise RuntimeError


def test_no_file_is_left_even_when_the_round_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        fail_while_holding(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_run_with_what_to_do_and_is_no_fault_of_the_nodes():
    """safetensors has an error of its own for it. A limit on the size of files is met as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Held(0) as held:
        held.put(1, update(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(FederationError, match=r"free some room .* TMPDIR"):
                held.put(2, update(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(held) == [1]
