"""From version n to n+1: only what changed travels, and whatever happens, the old bundle or a whole new one is there."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_bundles import KEY, OTHER, TRUSTED, bundle, contents, description, noise

from edge.bundle import write_bundle, write_update
from edge.runtime.manifest import MANIFEST, PURPOSE, SIGNATURE
from edge.runtime.opened_versions import remember
from edge.runtime.update import apply_update
from edge.runtime.verify import verified
from protocol.errors import BundleError, SignatureError
from protocol.signature import sign

THREE = ("north", "south", "west")


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    return bundle(tmp_path / "v1")


@pytest.fixture
def new(tmp_path):
    return bundle(tmp_path / "v2", 2, THREE)


@pytest.fixture
def update(tmp_path, old, new):
    write_update(tmp_path / "update", old, new, TRUSTED)
    return tmp_path / "update"


def refused(old, update, target, trusted=TRUSTED, **how):
    before = {path: everything(path) for path in (old, update) if path.is_dir()}
    with pytest.raises(BundleError) as told:
        apply_update(old, update, target, trusted, **how)
    assert {path: everything(path) for path in before} == before
    assert not [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}-")]
    return str(told.value)


def test_a_new_adapters_update_is_kilobytes_and_only_that(tmp_path, old, new, update):
    """200 kB of weights stay where they are: the update holds the adapter's two files less what is known, and the manifest."""
    carried = everything(update)
    assert set(carried) == {"adapters/west.onnx_adapter", MANIFEST, SIGNATURE}
    assert sum(map(len, carried.values())) < 6_000
    made = apply_update(old, update, tmp_path / "device", TRUSTED)
    assert made.version == 2
    assert everything(tmp_path / "device") == everything(new)
    assert verified(tmp_path / "device", TRUSTED) == made
    assert (tmp_path / "device" / "model.onnx.data").samefile(old / "model.onnx.data")
    verified(old, TRUSTED)
    shutil.rmtree(old)
    verified(tmp_path / "device", TRUSTED)


def test_where_there_are_no_hard_links_files_are_copied(tmp_path, old, new, update, monkeypatch):
    def none(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", none)
    apply_update(old, update, tmp_path / "device", TRUSTED)
    assert everything(tmp_path / "device") == everything(new)
    assert (tmp_path / "device" / "model.onnx.data").stat().st_nlink == 1


def test_an_update_goes_onto_any_older_version_that_has_what_it_lacks(tmp_path, old, new):
    write_update(tmp_path / "update", new, bundle(tmp_path / "v3", 3, ("south", "west")), TRUSTED)
    assert set(everything(tmp_path / "update")) == {MANIFEST, SIGNATURE}  # nothing but a removal
    assert "west" in refused(old, tmp_path / "update", tmp_path / "device")
    made = apply_update(new, tmp_path / "update", tmp_path / "device", TRUSTED)
    assert sorted(made.adapters) == ["south", "west"]
    write_update(tmp_path / "update2", old, tmp_path / "v3", TRUSTED)
    apply_update(old, tmp_path / "update2", tmp_path / "device2", TRUSTED)
    assert everything(tmp_path / "device2") == everything(tmp_path / "device") == everything(tmp_path / "v3")


def test_a_whole_bundle_is_an_update_too(tmp_path, old, new):
    apply_update(old, new, tmp_path / "device", TRUSTED)
    assert everything(tmp_path / "device") == everything(new)


def test_a_second_time_changes_nothing_and_still_checks(tmp_path, old, update):
    target = tmp_path / "device"
    first = apply_update(old, update, target, TRUSTED)
    before = everything(target)
    assert apply_update(old, update, target, TRUSTED) == first
    assert everything(target) == before
    (target / "adapters/north.json").write_bytes(b"[]")
    refused(old, update, target)


def test_nothing_older_equal_or_foreign_is_applied(tmp_path, old, new, update):
    assert "after version 2" in refused(new, update, tmp_path / "device")
    assert "after version 2" in refused(new, old, tmp_path / "device")
    assert "of bank" in refused(old, bundle(tmp_path / "bank", 3, name="bank"), tmp_path / "device")
    assert "lowest" in refused(old, update, tmp_path / "device", lowest_version=3)
    remember(tmp_path / "state", verified(bundle(tmp_path / "v7", 7), TRUSTED))
    assert "opened 7" in refused(old, update, tmp_path / "device", state=tmp_path / "state")
    assert not (tmp_path / "device").exists()
    for before, after, said in ((new, old, "version 1, older than version 2"), (new, new, "version 2, the same as version 2")):
        with pytest.raises(BundleError, match=said):
            write_update(tmp_path / "wrong", before, after, TRUSTED)
    with pytest.raises(BundleError, match="expected clinic"):
        write_update(tmp_path / "wrong", old, tmp_path / "bank", TRUSTED)


def test_a_new_key_takes_over_where_both_are_trusted(tmp_path, old):
    later = bundle(tmp_path / "v2b", 2, THREE, key=OTHER)
    both = (*TRUSTED, OTHER.public_key())
    write_update(tmp_path / "update", old, later, both)
    with pytest.raises(SignatureError, match="not trusted"):
        apply_update(old, tmp_path / "update", tmp_path / "device", TRUSTED)
    apply_update(old, tmp_path / "update", tmp_path / "device", both)
    verified(tmp_path / "device", [OTHER.public_key()])


def test_a_flipped_byte_anywhere_in_an_update_is_refused(tmp_path, old, update):
    for name, good in everything(update).items():
        for at in range(0, len(good), max(1, len(good) // 40)):
            (update / name).write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
            refused(old, update, tmp_path / "device")
        (update / name).write_bytes(good)
    assert not (tmp_path / "device").exists()
    apply_update(old, update, tmp_path / "device", TRUSTED)


def test_a_damaged_old_bundle_is_not_built_upon_and_is_named(tmp_path, old, update):
    for name, good in everything(old).items():
        if name in ("adapters/north.json", "adapters/south.json"):
            continue  # two files of the same bytes: either does
        wrong = good[:-1] + bytes([good[-1] ^ 1])
        (old / name).write_bytes(wrong)
        assert str(old) in refused(old, update, tmp_path / "device")
        (old / name).unlink()
        assert str(old) in refused(old, update, tmp_path / "device")
        (old / name).write_bytes(good)
    assert not (tmp_path / "device").exists()


@pytest.mark.timeout(60)
def test_what_does_not_belong_into_an_update_is_refused(tmp_path, old, update):
    carried = update / "adapters/west.onnx_adapter"
    secret = tmp_path / "secret"
    shutil.copy(carried, secret)
    for spoil, mend in (
        (lambda: (update / "extra").touch(), lambda: (update / "extra").unlink()),
        (lambda: (update / "model.onnx").symlink_to(old / "model.onnx"), lambda: (update / "model.onnx").unlink()),
        (lambda: os.mkfifo(update / "model.onnx"), lambda: (update / "model.onnx").unlink()),
        (lambda: [carried.unlink(), carried.symlink_to(secret)], lambda: [carried.unlink(), shutil.copy(secret, carried)]),
        (lambda: [carried.unlink(), carried.mkdir()], lambda: [carried.rmdir(), shutil.copy(secret, carried)]),
        (lambda: [carried.unlink(), carried.touch()], lambda: shutil.copy(secret, carried)),
        (lambda: os.truncate(carried, 2**24), lambda: os.truncate(carried, secret.stat().st_size)),
        (lambda: carried.unlink(), lambda: shutil.copy(secret, carried)),
    ):
        spoil()
        refused(old, update, tmp_path / "device")
        mend()
    assert not (tmp_path / "device").exists()
    apply_update(old, update, tmp_path / "device", TRUSTED)


def test_links_in_the_old_bundle_are_not_carried_over(tmp_path, old, update):
    copy = tmp_path / "copy"
    shutil.copytree(old, copy)
    for name in ("model.onnx.data", "tokenizer"):
        shutil.rmtree(old / name) if (old / name).is_dir() else (old / name).unlink()
        (old / name).symlink_to(copy / name)
    refused(old, update, tmp_path / "device")


def test_a_path_that_leads_out_of_the_bundle_is_refused_though_well_signed(tmp_path, old, update):
    told = json.loads((update / MANIFEST).read_bytes())
    for path in ("../outside", "/tmp/outside", "adapters/../../outside"):  # noqa: S108 (a name, not a place)
        told["files"][path] = told["files"]["adapters/west.onnx_adapter"]
        content = json.dumps(told).encode()
        (update / MANIFEST).write_bytes(content)
        (update / SIGNATURE).write_bytes(sign(KEY, PURPOSE, content))
        refused(old, update, tmp_path / "device")
        del told["files"][path]
    assert not (tmp_path / "outside").exists()


def test_the_target_is_free_and_outside_of_what_is_read(tmp_path, old, new, update):
    assert "version 1" in refused(old, update, old)
    assert "beside" in refused(old, update, old / "inner")
    assert "beside" in refused(old, update, update / "inner")
    other = bundle(tmp_path / "other", 5)
    assert "version 5" in refused(old, update, other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").touch()
    refused(old, update, tmp_path / "full")
    assert (tmp_path / "full" / "letter").exists()
    with pytest.raises(BundleError, match="there already"):
        write_update(update, old, new, TRUSTED)


def test_too_small_a_disk_is_said_with_numbers(tmp_path, old, update, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert "100,000 bytes are free, and 1,049,576 are needed" in refused(old, update, tmp_path / "device")


def test_what_a_killed_update_left_goes_after_a_day(tmp_path, old, update):
    for name, age in ((".device-old_old_", 25), (".device-now_now_", 1), (".device-s-old_old_", 25)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age * 3600,) * 2)
    apply_update(old, update, tmp_path / "device", TRUSTED)
    assert {path.name for path in tmp_path.glob(".device*")} == {".device-now_now_", ".device-s-old_old_"}


# Every step that changes the disk raises one of Python's audit events: the child dies by SIGKILL at the n-th.
KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
from small_bundles import KEY, TRUSTED, contents, description, noise
from edge.bundle import write_bundle
from edge.runtime.update import apply_update
from edge.runtime.verify import verified
from protocol.errors import BundleError

STEPS = ("open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "tempfile.mkdtemp", "shutil.rmtree")
here = Path(sys.argv[3])

def work(target):
    if sys.argv[4] == "update":
        apply_update(here / "v1", here / "update", target, TRUSTED)
    else:
        write_bundle(target, description(adapters=()), contents((), weights=5_000), KEY, lambda *_: ({}, "text"))

def dies_at(step, target):
    seen = [0]
    def hook(event, _):
        if event in STEPS:
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        sys.addaudithook(hook)
        work(target)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

step, outcomes = 0, []
while not outcomes or outcomes[-1] != "ended":
    step += 1
    target = here / f"made-{step}"
    killed = dies_at(step, target)
    if target.exists():
        verified(target, TRUSTED)
    if sys.argv[4] == "update":
        verified(here / "v1", TRUSTED)
    outcomes.append("ended" if not killed else "new" if target.exists() else "none")
    if outcomes[-1] == "none" and step % 5 == 0:
        work(target)  # again, where it was killed: it goes through
        verified(target, TRUSTED)
print(outcomes.count("none"), outcomes.count("new"), outcomes[-1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", ["update", "write"])
def test_killed_at_every_step_there_is_the_old_bundle_and_a_whole_new_one_or_none(tmp_path, old, update, what):
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(here), str(root), str(tmp_path), what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    none, new, last = done.stdout.split()
    assert last == "ended"
    assert int(none) > 20
    assert int(new) >= 1


def test_a_changed_graph_travels_and_nothing_else(tmp_path, old):
    made = contents() | {"model.onnx": noise(50, 3_100)}
    write_bundle(tmp_path / "v2", description(2), made, KEY)
    told = write_update(tmp_path / "update", old, tmp_path / "v2", TRUSTED)
    assert (told.changed, told.update_bytes) == (("model.onnx",), 3_100)
    apply_update(old, tmp_path / "update", tmp_path / "device", TRUSTED)
    assert everything(tmp_path / "device") == everything(tmp_path / "v2")
