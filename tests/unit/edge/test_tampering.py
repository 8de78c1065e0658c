"""Nothing of a bundle that is not as it was signed is opened: every change is refused before onnxruntime sees a byte.

The bundle computes something, and is opened as any device opens it (``edge.runtime.model.open``); constructions of
``onnxruntime.InferenceSession`` are counted, and the one test that changes nothing counts one.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundles import KEY, OTHER, TRUSTED, bundle, contents, description, embedder, noise, working

from edge.bundle import write_bundle
from edge.runtime import model
from edge.runtime.manifest import MANIFEST, MOST_BYTES, PURPOSE, SIGNATURE
from edge.runtime.opened_versions import FOLDER, highest, remember
from edge.runtime.verify import content, verified
from protocol.errors import BundleError, SignatureError
from protocol.signature import key_id, sign

FILES = ["model.onnx", "model.onnx.data", "tokenizer/tokenizer.json", MANIFEST, SIGNATURE]
FILES += [f"adapters/{name}.onnx_adapter" for name in ("north", "south")]
OTHER_ID, KEY_ID = key_id(OTHER.public_key()), key_id(KEY.public_key())
ORDER = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's group, RFC 8032


@pytest.fixture
def sessions(monkeypatch):
    """Every construction of a session from here on."""
    made = []

    class Counted(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **named):
            made.append(arguments[0])
            super().__init__(*arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    return made


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return working(tmp_path_factory.mktemp("parts") / "made")


@pytest.fixture
def folder(tmp_path, parts):
    write_bundle(tmp_path / "clinic", embedder(), parts, KEY)
    return tmp_path / "clinic"


def refused(folder, trusted=TRUSTED, **how):
    with pytest.raises(BundleError) as told:
        model.open(folder, list(trusted), **how)
    return str(told.value)


def sealed(folder, manifest, key=KEY, purpose=PURPOSE):
    """Puts another manifest into a bundle, signed."""
    (folder / MANIFEST).write_bytes(manifest)
    (folder / SIGNATURE).write_bytes(sign(key, purpose, manifest))


def fields(folder, **changes):
    return json.dumps(json.loads((folder / MANIFEST).read_bytes()) | changes).encode()


def test_what_nobody_changed_is_opened_and_answers(folder, sessions):
    """The control."""
    opened = model.open(folder, TRUSTED)
    assert len(sessions) == 1
    plain = opened.embed(["w3 w5"])
    opened.load_adapter("north")
    assert (opened.embed(["w3 w5"], adapter="north") == 2 * plain).all()  # doubling is exact
    assert plain.any()


def test_one_byte_flipped_at_500_places_over_every_file_is_refused(folder, sessions):
    draw = random.Random(6)
    for turn in range(500):
        path = folder / FILES[turn % len(FILES)]
        good = path.read_bytes()
        wrong = bytearray(good)
        wrong[draw.randrange(len(good))] ^= draw.randrange(1, 256)
        path.write_bytes(wrong)
        refused(folder)
        path.write_bytes(good)
    assert sessions == []
    verified(folder, TRUSTED)


def test_bytes_all_over_manifest_and_signature_count(folder):
    for name, step in ((MANIFEST, 5), (SIGNATURE, 1)):
        good = (folder / name).read_bytes()
        for at in range(0, len(good), step):
            (folder / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(BundleError):
                verified(folder, TRUSTED)
        (folder / name).write_bytes(good)
    verified(folder, TRUSTED)


def test_a_file_cut_or_longer_by_one_byte_or_two_exchanged_are_refused(folder, sessions):
    for name in FILES:
        path, good = folder / name, (folder / name).read_bytes()
        for wrong in (good[:-1], good + b"\0", b"", good[1:], good + good):
            path.write_bytes(wrong)
            refused(folder)
        path.write_bytes(good)
    one, two = (folder / f"adapters/{name}.onnx_adapter" for name in ("north", "south"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert "adapters/north.onnx_adapter" in refused(folder)
    assert sessions == []


def resigned(**changes):
    """By a key that is not trusted."""
    return lambda folder: sealed(folder, fields(folder, **changes), OTHER)


def claimed(folder):
    """Another key's signature under the trusted key's id."""
    manifest = fields(folder, version=2)
    (folder / MANIFEST).write_bytes(manifest)
    (folder / SIGNATURE).write_bytes(KEY_ID + sign(OTHER, PURPOSE, manifest)[32:])


def swapped(both, **other):
    """Manifest of another bundle that the trusted key has signed, with its signature or without."""

    def change(folder):
        there = folder.parent / "other"
        write_bundle(there, description(**other), contents(weights=2_001), KEY)
        for name in (MANIFEST, SIGNATURE) if both else (MANIFEST,):
            shutil.copy(there / name, folder / name)

    return change


def resealed(edit):
    """A manifest that the trusted key has signed after it was edited by hand."""

    def change(folder):
        good = (folder / MANIFEST).read_bytes()
        assert edit(good) != good
        sealed(folder, edit(good))

    return change


def signature(edit):
    return lambda folder: (folder / SIGNATURE).write_bytes(edit((folder / SIGNATURE).read_bytes()))


def listed(path, **entry):
    def edit(manifest):
        found = json.loads(manifest)
        found["files"][path] = {"sha256": "00" * 32, "size_bytes": 1} | entry
        return json.dumps(found).encode()

    return resealed(edit)


def unlisted(path):
    def edit(manifest):
        found = json.loads(manifest)
        del found["files"][path]
        return json.dumps(found).encode()

    return resealed(edit)


def malleable(made):
    return made[:64] + (int.from_bytes(made[64:], "little") + ORDER).to_bytes(32, "little")


FORGERIES = {
    "re-signed as it was": resigned(),
    "re-signed, newer": resigned(version=9),
    "re-signed, older": resigned(version=1),
    "re-signed, other name": resigned(name="bank"),
    "re-signed, other kind": resigned(kind="classifier"),
    "re-signed, other base": resigned(base_digest="00" * 32),
    "re-signed, no files": resigned(files={}),
    "re-signed, other profile": resigned(profile="fp32"),
    "re-signed, no adapters": resigned(adapters={}),
    "re-signed, more labels": resigned(labels=["yes"]),
    "another's signature under a trusted id": claimed,
    "signed as an update": lambda folder: sealed(folder, fields(folder), purpose="update"),
    "signed as nothing": lambda folder: sealed(folder, fields(folder), purpose="bundle-manifest-2"),
    "manifest of another bundle": swapped(False),
    "manifest of another version": swapped(False, version=2),
    "manifest of another name": swapped(False, name="bank"),
    "manifest and signature of another bundle": swapped(True),
    "manifest and signature of a newer one": swapped(True, version=2),
    "manifest and signature of another profile": swapped(True, profile="q4"),
    "no signature": lambda folder: (folder / SIGNATURE).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty signature": signature(lambda made: b""),
    "a signature of zeros": signature(lambda made: bytes(len(made))),
    "zeros under a trusted id": signature(lambda made: made[:32] + bytes(64)),
    "a signature without its id": signature(lambda made: made[32:]),
    "a signature as text": signature(lambda made: made.hex().encode()),
    "a signature and more": signature(lambda made: made + b"\n"),
    "halves of a signature exchanged": signature(lambda made: made[:32] + made[64:] + made[32:64]),
    "a signature in another form": signature(malleable),
    "white space changed": lambda folder: (folder / MANIFEST).write_bytes(fields(folder)),
    "CRLF": lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b"\n", b"\r\n")),
    "signed: a key twice": resealed(lambda made: made.replace(b'"version": 1', b'"version": 9, "version": 1')),
    "signed: NaN": resealed(lambda made: made.replace(b'"parity": {}', b'"parity": {"base": {"rows": NaN}}')),
    "signed: nested deeply": resealed(lambda made: made.replace(b'"labels": []', b'"labels": ' + b"[" * 100_000)),
    "signed: no UTF-8": resealed(lambda made: made.replace(b'"clinic"', b'"cli\xffnic"')),
    "signed: no JSON": resealed(lambda made: b"\x00" * 100),
    "signed: empty": resealed(lambda made: b""),
    "signed: longer than is read": resealed(lambda made: made + b" " * MOST_BYTES),
    "signed: a parent's file": listed("../outside"),
    "signed: an absolute path": listed("/etc/passwd"),
    "signed: a path within a file": listed("model.onnx/inner"),
    "signed: a path in another case": listed("MODEL.onnx"),
    "signed: itself": listed(MANIFEST),
    "signed: a file that is not there": listed("absent"),
    "signed: a file of a petabyte": listed("model.onnx.data", size_bytes=2**50),
    "signed: a file of less than nothing": listed("model.onnx.data", size_bytes=-1),
    "signed: without the weights": unlisted("model.onnx.data"),
    "signed: without the tokenizer": unlisted("tokenizer/tokenizer.json"),
    "signed: an adapter without tensors": unlisted("adapters/north.onnx_adapter"),
    "signed: another format": resealed(lambda made: made.replace(b'"format_version": 1', b'"format_version": 2')),
}


def test_there_are_forty_forgeries():
    assert len(FORGERIES) >= 40


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(folder, sessions, forge):
    (folder.parent / "outside").write_bytes(b"\0")
    forge(folder)
    refused(folder)
    assert sessions == []


def test_a_trusted_key_signs_for_its_own_bundle_only(folder, sessions):
    """Of two bundles that one key has signed, one is not the other where a name is expected."""
    assert "expected bank" in refused(folder, name="bank")
    with pytest.raises(SignatureError, match="not trusted"):
        verified(folder, [OTHER.public_key()])
    with pytest.raises(SignatureError, match="trusted: none"):
        verified(folder, [])
    assert sessions == []
    verified(folder, [OTHER.public_key(), *TRUSTED], name="clinic")


def replaced(path, make):
    def change(folder):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        make(target)

    return change


def linked_to_a_copy(folder_of):
    """A link to the very bytes that were signed is a link all the same."""

    def change(folder):
        there = folder.parent / "copy"
        shutil.copytree(folder, there)
        replaced(folder_of, lambda target: target.symlink_to(there / folder_of))(folder)

    return change


def unix_socket(path):
    there = socket.socket(socket.AF_UNIX)
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # the path of a socket has a short limit
        there.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)
        there.close()


INTRUDERS = {
    "an unlisted file": lambda folder: (folder / "extra").write_bytes(b""),
    "a hidden file": lambda folder: (folder / ".hidden").write_bytes(b""),
    "a file in a folder": lambda folder: (folder / "adapters" / "extra.onnx_adapter").write_bytes(b""),
    "an empty folder": lambda folder: (folder / "empty").mkdir(),
    "a folder in a folder": lambda folder: (folder / "adapters" / "deep" / "deeper").mkdir(parents=True),
    "a name that is no text": lambda folder: (folder / os.fsdecode(b"\xff\xfe")).write_bytes(b""),
    "a name that steers a terminal": lambda folder: (folder / "\x1b[2J\n").write_bytes(b""),
    "another case": lambda folder: (folder / "Model.onnx").write_bytes(b""),
    "a link beside": lambda folder: (folder / "link").symlink_to("model.onnx"),
    "a link that leads nowhere": lambda folder: (folder / "link").symlink_to("nowhere"),
    "a link to itself": lambda folder: (folder / "link").symlink_to("."),
    "a link in a folder": lambda folder: (folder / "adapters" / "up").symlink_to(".."),
    **{f"a link in place of {name}": linked_to_a_copy(name) for name in [*FILES, "adapters", "tokenizer"]},
    **{f"a pipe in place of {name}": replaced(name, os.mkfifo) for name in FILES},
    **{f"a folder in place of {name}": replaced(name, lambda target: target.mkdir()) for name in FILES},
    "a socket": replaced("model.onnx", unix_socket),
    "a link to a device": replaced("model.onnx", lambda target: target.symlink_to("/dev/zero")),
    "a device as the manifest": replaced(MANIFEST, lambda target: target.symlink_to("/dev/zero")),
    "a file in place of a folder": replaced("adapters", lambda target: target.write_bytes(b"")),
    "a folder is missing": lambda folder: shutil.rmtree(folder / "adapters"),
    **{f"{name} is missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    "everything is missing": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "the folder is missing": shutil.rmtree,
    "the folder is a file": lambda folder: [shutil.rmtree(folder), folder.write_bytes(b"x")],
}


@pytest.mark.timeout(60)  # a pipe that is opened without care waits for ever
@pytest.mark.parametrize("intrude", INTRUDERS.values(), ids=INTRUDERS)
def test_what_does_not_belong_into_a_folder_is_refused(folder, sessions, intrude):
    intrude(folder)
    assert refused(folder).isprintable()
    assert sessions == []


def test_a_path_that_no_system_has_is_refused(tmp_path):
    for name in ("a\0b", "x" * 5_000):
        with pytest.raises(BundleError):
            verified(tmp_path / name, TRUSTED)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_terabyte_is_refused_unread(folder, sessions, name):
    """A hole in a file: were it read, the time limit of the test would end it."""
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)
    assert "bytes" in refused(folder)
    assert sessions == []


def test_digests_are_taken_in_constant_memory(tmp_path):
    """48 MiB of weights with less than 4 MiB of Python's own."""
    made = contents() | {"model.onnx.data": bytes(48 * 2**20)}
    write_bundle(tmp_path / "large", description(), made, KEY)
    del made
    tracemalloc.start()
    verified(tmp_path / "large", TRUSTED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_files_are_not_left_open(folder):
    def handles():
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    verified(folder, TRUSTED)
    before = handles()
    for name in FILES:
        good = (folder / name).read_bytes()
        for wrong in (good, good[:-1] + b"\xff", good + b"x"):
            (folder / name).write_bytes(wrong)
            with suppress(BundleError):
                verified(folder, TRUSTED)
        (folder / name).write_bytes(good)
    assert handles() == before


@settings(max_examples=60)
@given(st.binary(max_size=2_000), st.binary(max_size=120))
def test_any_bytes_as_manifest_and_signature_are_refused(tmp_path_factory, manifest, made):
    folder = tmp_path_factory.mktemp("any")
    (folder / MANIFEST).write_bytes(manifest)
    for signed in (made, sign(KEY, PURPOSE, manifest)):
        (folder / SIGNATURE).write_bytes(signed)
        with pytest.raises(BundleError):
            verified(folder, TRUSTED)


def test_a_file_is_given_from_the_bytes_that_were_checked(folder, parts):
    manifest = verified(folder, TRUSTED)
    assert content(folder, manifest, "tokenizer/tokenizer.json") == parts["tokenizer/tokenizer.json"]
    for change in (
        lambda path: path.write_bytes(parts["tokenizer/tokenizer.json"].replace(b"w9", b"w0")),
        lambda path: path.unlink(),
    ):
        change(folder / "tokenizer" / "tokenizer.json")
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            content(folder, manifest, "tokenizer/tokenizer.json")
    with pytest.raises(BundleError, match="lists no"):
        content(folder, manifest, "../clinic/model.onnx")


def test_an_older_version_is_refused_where_a_newer_one_was_opened(tmp_path, sessions):
    state = tmp_path / FOLDER
    versions = {number: bundle(tmp_path / f"v{number}", number, weights=10) for number in (1, 2, 9, 10, 11)}
    for number in (1, 2, 10):
        verified(versions[number], TRUSTED, state=state)
        remember(state, verified(versions[number], TRUSTED))
    for number in (1, 2, 9):
        assert "opened 10" in refused(versions[number])  # beside the bundle, where a device looks unless told otherwise
        assert "lowest that is allowed" in refused(versions[number], state=None, lowest_version=10)
        assert "opened 10" in refused(versions[number], lowest_version=5)
    assert sessions == []
    for number in (10, 11):
        verified(versions[number], TRUSTED, state=state, lowest_version=10)
    remember(state, verified(versions[2], TRUSTED))
    assert highest(state, "clinic") == 10
    verified(bundle(tmp_path / "bank", 1, weights=10, name="bank"), TRUSTED, state=state)  # another line of bundles


def test_a_version_that_never_opened_bars_no_other(tmp_path, sessions):
    """These graphs are noise: onnxruntime refuses them, so nothing is remembered."""
    refused(bundle(tmp_path / "v9", 9, weights=10))
    assert len(sessions) == 1
    assert highest(tmp_path / FOLDER, "clinic") == 0


def test_versions_opened_at_the_same_moment_leave_the_highest(tmp_path):
    """20 threads, and what is remembered never falls while they run."""
    base = verified(bundle(tmp_path / "v1", weights=10), TRUSTED)
    manifests = [base.model_copy(update={"version": number}) for number in range(1, 201)]
    random.Random(3).shuffle(manifests)
    seen = []

    def one(manifest):
        remember(tmp_path / "state", manifest)
        seen.append(highest(tmp_path / "state", "clinic") >= manifest.version)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(one, manifests))
    assert all(seen)
    assert highest(tmp_path / "state", "clinic") == 200


def test_strange_things_among_remembered_versions_are_passed_over(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    for name in (
        "clinic.0",
        "clinic.-1",
        "clinic.1e9",
        "clinic.٣",
        "clinic.7 ",
        "clinic",
        "clinics.8",
        "clinic.99999999999999999",
    ):
        (state / name).touch()
    assert highest(state, "clinic") == 0
    (state / "clinic.7").touch()
    assert highest(state, "clinic") == 7
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="NotADirectory"):
        highest(tmp_path / "file", "clinic")


def test_a_version_that_cannot_be_remembered_is_said(tmp_path):
    manifest = verified(bundle(tmp_path / "v1", weights=10), TRUSTED)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be"):
        remember(tmp_path / "file" / "state", manifest)


def test_the_whole_device_side_of_trust_imports_no_model_library(folder):
    """A refused bundle costs no import of onnxruntime: nothing of it could have been opened."""
    (folder / "model.onnx").write_bytes(noise(9, (folder / "model.onnx").stat().st_size))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey\n"
        "from edge.runtime.verify import verified\n"
        "from protocol.errors import BundleError\n"
        "try:\n    verified(Path(sys.argv[1]), [Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[2]))])\n"
        "except BundleError as error:\n    print('REFUSED', 'model.onnx' in str(error))\n"
        "print([name for name in ('onnxruntime', 'tokenizers', 'torch', 'flwr', 'onnx') if name in sys.modules])\n"
    )
    public = TRUSTED[0].public_bytes_raw().hex()
    done = subprocess.run([sys.executable, "-c", code, str(folder), public], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["REFUSED True", "[]"]


def test_a_manifest_is_parsed_only_after_its_signature_holds(folder):
    """Bytes that are no JSON are refused for their signature, and as JSON only where a trusted key has signed them."""
    sealed(folder, b"no JSON", OTHER)
    with pytest.raises(SignatureError, match="not trusted"):
        verified(folder, TRUSTED)
    sealed(folder, b"no JSON", KEY)
    with pytest.raises(BundleError, match="not readable as JSON"):
        verified(folder, TRUSTED)
