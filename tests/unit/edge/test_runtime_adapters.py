"""Adapters on a device: what does not fit the graph, or is no number, is refused; what fits is what the file holds."""

import numpy as np
import onnxruntime
import pytest

from edge.runtime.adapters import read
from edge.runtime.manifest import BundleManifest, EncoderShape, File
from protocol.errors import AdapterError

LORA = {"layer.0.query": (6, 4), "layer.1.query": (6, 4)}
DENSE = {"head.weight": ("labels", 6), "head.bias": ("labels",), "norm.weight": (6,)}


@pytest.fixture
def manifest() -> BundleManifest:
    return BundleManifest(
        name="tested",
        version=1,
        kind="classifier",
        base_digest="ab" * 32,
        profile="fp32",
        opset=23,
        minimum_onnxruntime="1.31",
        encoder=EncoderShape(hidden=6, context_tokens=8),
        lora=LORA,
        dense=DENSE,
        labels=("no", "yes"),
        files={path: File(sha256="ab" * 32, size_bytes=1) for path in ("model.onnx", "tokenizer/tokenizer.json")},
    )


def loaded(tmp_path, manifest, given, labels=()):
    path = tmp_path / "tested.onnx_adapter"
    made = onnxruntime.AdapterFormat()
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()})
    made.export_adapter(str(path))
    inputs = {f"lora.{module}.{side}" for module in LORA for side in "AB"} | {f"dense.{name}" for name in DENSE}
    return read(path, manifest, dict.fromkeys(inputs, np.float32), labels)


def pair(module: str, r: int = 2) -> dict[str, np.ndarray]:
    d_in, d_out = LORA[module]
    drawn = np.random.default_rng(0)
    shapes = {f"lora.{module}.A": (d_in, r), f"lora.{module}.B": (r, d_out)}
    return {name: drawn.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def head(rows: int) -> dict[str, np.ndarray]:
    return {"dense.head.weight": np.ones((rows, 6), np.float32), "dense.head.bias": np.ones(rows, np.float32)}


def test_what_the_file_holds_is_bound_as_it_is(tmp_path, manifest):
    given = pair("layer.0.query") | pair("layer.1.query", r=5) | {"dense.norm.weight": np.ones(6, np.float32)}

    adapter = loaded(tmp_path, manifest, given)

    assert adapter.inputs.keys() == given.keys()
    for name, value in adapter.inputs.items():
        np.testing.assert_array_equal(value.numpy(), given[name])
    assert adapter.labels == ()


def test_a_head_of_its_own_has_labels_of_its_own(tmp_path, manifest):
    assert loaded(tmp_path, manifest, head(2)).labels == ("no", "yes")
    assert loaded(tmp_path, manifest, head(3), labels=("a", "b", "c")).labels == ("a", "b", "c")


FIRST = pair("layer.0.query")
A, B = FIRST


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "holds no tensor"),
        (FIRST | {"lora.layer.9.query.A": FIRST[A]}, "no inputs of this model"),
        (FIRST | {"input_ids": FIRST[A]}, "no inputs of this model"),
        ({A: FIRST[A]}, "only one of A and B"),
        ({A: FIRST[A], B: FIRST[B][:1]}, r"expected \[6, r\] and \[r, 4\]"),
        ({A: FIRST[A].T.copy(), B: FIRST[B]}, r"expected \[6, r\] and \[r, 4\]"),
        ({A: np.ones(6, np.float32), B: FIRST[B]}, r"expected \[6, r\]"),
        ({A: FIRST[A].astype(np.float64), B: FIRST[B]}, "is of float64; expected float32"),
        ({A: FIRST[A] * np.nan, B: FIRST[B]}, "not finite"),
        ({A: FIRST[A], B: np.full_like(FIRST[B], np.inf)}, "not finite"),
        (head(3), "3 rows, and 2 labels are known"),
        ({"dense.head.weight": np.ones((3, 6), np.float32)}, "2 and 3 rows"),
        (head(3) | {"dense.head.bias": np.ones(4, np.float32)}, "3 and 4 rows"),
        ({"dense.head.bias": np.ones((2, 1), np.float32), "dense.head.weight": np.ones((2, 6), np.float32)}, "expected"),
        ({"dense.norm.weight": np.ones(5, np.float32)}, r"is \[5\]; expected \[6\]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(tmp_path, manifest, given, why):
    with pytest.raises(AdapterError, match=why):
        loaded(tmp_path, manifest, given)


def test_bytes_that_are_no_adapter_are_an_adapter_error_and_nothing_else(tmp_path, manifest):
    """Bytes of a whole file changed, cut off or drawn: read well or refused, never another error."""
    loaded(tmp_path, manifest, FIRST)
    path = tmp_path / "tested.onnx_adapter"
    whole, drawn = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for turn in range(300):
        changed = bytearray(whole)
        if turn % 3 == 0:
            changed[drawn.integers(len(changed))] ^= int(drawn.integers(1, 256))
        elif turn % 3 == 1:
            del changed[drawn.integers(len(changed)) :]
        else:
            changed = bytearray(drawn.bytes(int(drawn.integers(200))))
        path.write_bytes(changed)
        try:
            read(path, manifest, {A: np.float32, B: np.float32})
        except AdapterError:
            refused += 1
    assert refused >= 200  # all that were cut or drawn; a changed bit of a weight is a weight


def test_no_file_is_an_adapter_error(tmp_path, manifest):
    with pytest.raises(AdapterError, match="holds no adapter"):
        read(tmp_path / "none.onnx_adapter", manifest, {})
