"""manifest.json: one form for one manifest, and whatever else its bytes are, BundleError and nothing besides."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_bundles import description

from edge.bundle import manifest_of
from edge.runtime.manifest import MOST_BYTES, BundledAdapter, EncoderShape, File, Parity, parsed, written
from protocol.errors import BundleError

FILES = {
    path: File(sha256="ef" * 32, size_bytes=size)
    for size, path in enumerate(
        (
            "model.onnx",
            "model.onnx.data",
            "tokenizer/tokenizer.json",
            "adapters/north.onnx_adapter",
            "adapters/south.onnx_adapter",
        )
    )
}
MANIFEST = manifest_of(description(), FILES)
CONTENT = written(MANIFEST)
FIELDS = json.loads(CONTENT)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def accepted(content):
    """The manifest, or None where it is refused as it should be."""
    try:
        return parsed(content)
    except BundleError:
        return None


def changed(**fields):
    return json.dumps(FIELDS | fields).encode()


def test_a_manifest_comes_back_and_has_one_form():
    assert parsed(CONTENT) == MANIFEST
    assert written(parsed(CONTENT)) == CONTENT
    shuffled = json.dumps(dict(reversed(FIELDS.items())), indent=7).encode()
    assert written(parsed(shuffled)) == CONTENT


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(content):
    assert accepted(content) is None


@settings(max_examples=300)
@given(JSON)
def test_any_json_is_refused(value):
    assert accepted(json.dumps(value).encode()) is None


def places(value, at=()):
    """Where a JSON value holds values."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


@settings(max_examples=300)
@given(st.sampled_from([at for at in places(FIELDS) if at]), JSON)
def test_a_manifest_with_any_value_replaced_is_refused_or_is_another_valid_one(at, value):
    fields = json.loads(CONTENT)
    inner = fields
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    found = accepted(json.dumps(fields).encode())
    if found is not None:
        assert parsed(written(found)) == found


@settings(max_examples=300)
@given(st.data())
def test_a_manifest_with_bytes_cut_out_doubled_or_changed_is_refused_or_is_a_manifest(data):
    start = data.draw(st.integers(0, len(CONTENT)))
    end = data.draw(st.integers(start, min(len(CONTENT), start + 40)))
    found = accepted(CONTENT[:start] + data.draw(st.binary(max_size=8)) + CONTENT[end:])
    if found is not None:
        assert parsed(written(found)) == found


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        changed(parity={"base": {"rows": 1, "largest_logit_difference": float("nan")}}),
        changed(parity={"base": {"rows": 1, "largest_logit_difference": float("inf")}}),
        changed(parity={"base": {"rows": 1, "largest_logit_difference": 0.0, "metrics": {"kl": [0.1, float("nan")]}}}),
        CONTENT.replace(b'"version": 1', b'"version": 1e400'),
        CONTENT.replace(b'"version": 1', b'"version": ' + b"9" * 5_000),
        CONTENT.replace(b'"version": 1', b'"version": true'),
        CONTENT.replace(b'"version": 1', b'"version": "1"'),
        CONTENT.replace(b'"version": 1', b'"version": 1.0'),
        CONTENT.replace(b'"version": 1', b'"version": 0'),
        CONTENT.replace(b'"version": 1', b'"version": 2, "version": 1'),
        CONTENT.replace(
            b'"model.onnx": {', b'"model.onnx": {"sha256": "' + b"0" * 64 + b'", "size_bytes": 3}, "model.onnx": {'
        ),
        b"\xef\xbb\xbf" + CONTENT,
        CONTENT.decode().encode("utf-16"),
        CONTENT.replace(b'"clinic"', b'"clin\xffic"'),
        CONTENT.replace(b'"clinic"', b'"\\ud800"'),
        CONTENT.replace(b'"clinic"', b'"clinic\\n"'),
        CONTENT + b"{}",
        CONTENT + b"\x00",
        CONTENT + b" " * MOST_BYTES,
        changed(format_version=2),
        changed(surprise=1),
        changed(kind="classifier"),
        changed(decoder=None),
        changed(base_digest="AB" * 32),
        changed(profile="../q8"),
        changed(name="a/b"),
        changed(minimum_onnxruntime="1.31; rm"),
        changed(adapters={"base": FIELDS["adapters"]["north"]}),
        changed(adapters=FIELDS["adapters"] | {"west": FIELDS["adapters"]["north"]}),
        changed(adapters={}),
        changed(parity={"east": {"rows": 1, "largest_logit_difference": 0.0}}),
        changed(dense={"score.weight": ["rows", 4]}),
        changed(lora={"a b": [1, 2]}),
        changed(lora={"a": [1, 0]}),
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_only_looks_like_a_manifest_is_refused(content):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        parsed(content)


@pytest.mark.parametrize("content", [CONTENT.replace(b"\n", b"\r\n"), CONTENT.replace(b"\n", b"")])
def test_white_space_is_the_signers_affair(content):
    """The signature is over the bytes: CRLF made on the way does not hold, CRLF that was signed does."""
    assert parsed(content) == MANIFEST


PATHS = [
    "../model.onnx",
    "adapters/../model.onnx",
    "/etc/passwd",
    "//server/share",
    "C:/windows",
    "C:\\windows",
    "adapters\\north",
    "a//b",
    "a/./b",
    "./a",
    "a/",
    "/",
    ".",
    "..",
    "",
    " ",
    ".hidden",
    "-rf",
    "a b",
    "a\x00b",
    "a\nb",
    "a\n",
    "a\x1b[2J",
    "é",
    "a.",
    "a./b",
    "%2e%2e/b",
    "~/x",
    "$HOME",
    "a:stream",
    "a" * 129,
    "a/b/c/d/e",
    "manifest.json",
    "manifest.sig",
    "Manifest.JSON",
    "MODEL.onnx",
    "model.onnx/inner",
    "Adapters/north.onnx_adapter/x",
    "adapters/stray.onnx_adapter",
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_that_leads_elsewhere_or_means_two_files_is_refused(path):
    """Names with meaning to any system: parents, roots, drives, streams, control characters, another case."""
    with pytest.raises(BundleError):
        parsed(changed(files=FIELDS["files"] | {path: {"sha256": "00" * 32, "size_bytes": 1}}))
    with pytest.raises(BundleError):
        manifest_of(description(), FILES | {path: File(sha256="00" * 32, size_bytes=1)})


@pytest.mark.parametrize("size", [-1, 2**40 + 1, 2**64, 1.5, None, "1"])
def test_a_size_that_no_file_has_is_refused(size):
    with pytest.raises(BundleError):
        parsed(changed(files=FIELDS["files"] | {"model.onnx.data": {"sha256": "00" * 32, "size_bytes": size}}))


def test_too_many_files_are_refused_and_too_long_a_manifest_is_not_written():
    """5,000 files are within 1 MiB, and above the 4,096 that are walked."""
    many = FIELDS["files"] | {f"a{n}": {"sha256": "00" * 32, "size_bytes": 1} for n in range(5_000)}
    assert len(changed(files=many)) < MOST_BYTES
    with pytest.raises(BundleError, match="files"):
        parsed(changed(files=many))
    long = description(remarks=("ä" * 1000,) * 256)
    with pytest.raises(BundleError, match="at most"):
        written(manifest_of(long, FILES))


def test_an_encoder_has_its_own_section():
    shape = EncoderShape(hidden=8, context_tokens=16, pooling="mean", normalised=True)
    about = description(kind="embedder", decoder=None, encoder=shape)
    assert parsed(written(manifest_of(about, FILES))).encoder == shape
    with pytest.raises(ValidationError):
        description(kind="embedder", encoder=shape)


def test_figures_of_adapters_and_base_are_kept_to_the_bit():
    figures = Parity(rows=3, positions=40, largest_logit_difference=1.1e-6, kl=5e-324, metrics={"accuracy": (0.1, 1 / 3)})
    about = description(parity={"base": figures, "north": figures})
    assert parsed(written(manifest_of(about, FILES))).parity == {"base": figures, "north": figures}
    with pytest.raises(ValidationError):
        BundledAdapter(digest="short")
