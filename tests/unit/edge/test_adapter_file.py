"""Adapters' folders as inputs of a graph: what fits is transposed and scaled, what does not fit is refused with the reason."""

import hashlib

import numpy as np
import onnxruntime
import pytest

from edge.adapter_file import parameters, write
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BaseMismatchError
from protocol.files import Stored
from protocol.manifest import Manifest

DIGEST = "ab" * 32
LORA = {"model.q": (6, 4), "model.k": (6, 2)}
DENSE = {"model.q.bias": (4,), "head.weight": ("labels", 6), "head.bias": ("labels",)}
RNG = np.random.default_rng(5)


def factors(d_in=6, d_out=4, r=3, scaling=2.0):
    return Factors(RNG.normal(size=(r, d_in)).astype(np.float32), RNG.normal(size=(d_out, r)).astype(np.float32), scaling)


def stored(tmp_path, lora=None, dense=None, method="lora", task_type="", digest=DIGEST):
    manifest = Manifest(base_digest=digest, kind="adapter") if digest else None
    return Stored(tmp_path, Adapter(lora or {}, dense or {}), manifest, {"method": method}, task_type)


def test_factors_are_transposed_and_b_carries_the_scaling(tmp_path):
    """Oracle: the change of a weight, x (scaling B A)^T, in float64."""
    pair = factors(scaling=0.75)
    given = parameters(stored(tmp_path, {"model.q": pair}), LORA, DENSE, DIGEST)
    assert set(given) == {"lora.model.q.A", "lora.model.q.B"}
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in given.values())
    x = RNG.normal(size=(5, 6))
    change = x @ (0.75 * pair.B.astype(np.float64) @ pair.A.astype(np.float64)).T
    ours = (x @ given["lora.model.q.A"].astype(np.float64)) @ given["lora.model.q.B"].astype(np.float64)
    np.testing.assert_allclose(ours, change, rtol=1e-6, atol=1e-7)  # B was rounded once, after scaling


def test_what_is_written_is_read_by_onnxruntime_and_has_the_same_bytes_each_time(tmp_path):
    tensors = {"head.weight": np.ones((9, 6), np.float32), "head.bias": np.zeros(9, np.float32)}
    given = parameters(stored(tmp_path, {"model.k": factors(d_out=2, r=1)}, tensors), LORA, DENSE, DIGEST)
    digests = set()
    for order in (given, dict(reversed(given.items()))):
        write(tmp_path / "a.onnx_adapter", order)
        digests.add(hashlib.sha256((tmp_path / "a.onnx_adapter").read_bytes()).hexdigest())
    assert len(digests) == 1
    read = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(read[name].numpy(), tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx_adapter"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_in_float32_is_refused(tmp_path, bad):
    pair = factors()
    broken = Factors(pair.A.astype(np.float64), pair.B.astype(np.float64))
    broken.B[0, 0] = bad
    with pytest.raises(AdapterError, match=r"model\.q\.B holds NaN or infinite"):
        parameters(stored(tmp_path, {"model.q": broken}), LORA, DENSE, DIGEST)
    tensor = np.array([0, bad, 0, 0], np.float64)
    with pytest.raises(AdapterError, match=r"model\.q\.bias holds NaN or infinite"):
        parameters(stored(tmp_path, dense={"model.q.bias": tensor}, method="bitfit"), LORA, DENSE, DIGEST)


def test_a_scaling_that_leaves_float32_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="infinite"):
        parameters(stored(tmp_path, {"model.q": factors(scaling=1e39)}), LORA, DENSE, DIGEST)


def test_foreign_names_and_shapes_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(AdapterError, match=r"adapts model\.v, which takes no adapter in this graph \(2 modules do\)"):
        parameters(stored(tmp_path, {"model.v": factors()}), LORA, DENSE, DIGEST)
    with pytest.raises(AdapterError, match=r"model\.q changes a weight of shape \(5, 6\); expected \(4, 6\)"):
        parameters(stored(tmp_path, {"model.q": factors(d_out=5)}), LORA, DENSE, DIGEST)
    with pytest.raises(AdapterError, match=r"it holds model\.norm\.weight, which is no input of this graph"):
        parameters(stored(tmp_path, dense={"model.norm.weight": np.ones(6)}), LORA, DENSE, DIGEST)
    with pytest.raises(AdapterError, match=r"head\.weight has shape \(3, 7\); expected \('labels', 6\)"):
        parameters(stored(tmp_path, dense={"head.weight": np.ones((3, 7))}), LORA, DENSE, DIGEST)
    with pytest.raises(AdapterError, match=r"rows for \[3, 4\] labels"):
        parameters(stored(tmp_path, dense={"head.weight": np.ones((3, 6)), "head.bias": np.ones(4)}), LORA, DENSE, DIGEST)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    with pytest.raises(BaseMismatchError, match="cdcdcdcdcdcd, the graph is of base abababababab"):
        parameters(stored(tmp_path, {"model.q": factors()}, digest="cd" * 32), LORA, DENSE, DIGEST)


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ("full", "--merge"),
        ("freezing", "--merge"),
        ("ia3", "--merge"),
        ("bottleneck", "train a lora"),
        ("prompt-tuning", "train a lora"),
        ("prefix-tuning", "train a lora"),
        ("p-tuning-v2", "train a lora"),
        ("xlora", "train a lora"),
        ("experts", "--merge"),
    ],
)
def test_methods_that_no_input_can_carry_are_refused_with_a_way_out(tmp_path, method, way_out):
    with pytest.raises(AdapterError, match=f"method {method} is no input of a graph") as found:
        parameters(stored(tmp_path, method=method), LORA, DENSE, DIGEST)
    assert way_out in str(found.value)


def test_dora_is_refused(tmp_path):
    tensors = {"model.q.lora_magnitude_vector": np.ones(4, np.float32)}
    with pytest.raises(AdapterError, match=r"DoRA rescales the base's own weights.*--merge"):
        parameters(stored(tmp_path, {"model.q": factors()}, tensors), LORA, DENSE, DIGEST)


def test_a_graph_without_a_head_takes_the_body_of_a_classifiers_adapter(tmp_path):
    tensors = {"model.q.bias": np.ones(4), "head.weight": np.ones((3, 6))}
    body = {"model.q.bias": (4,)}
    given = parameters(stored(tmp_path, {"model.q": factors()}, tensors, task_type="SEQ_CLS"), LORA, body, DIGEST)
    assert set(given) == {"dense.model.q.bias", "lora.model.q.A", "lora.model.q.B"}
    with pytest.raises(AdapterError, match="no input of this graph"):
        parameters(stored(tmp_path, {"model.q": factors()}, tensors, task_type="CAUSAL_LM"), LORA, body, DIGEST)
