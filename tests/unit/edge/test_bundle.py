"""Bundles are written whole or not at all, the same inputs to the same bytes, and not before a judge has opened them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundles import KEY, OTHER, TRUSTED, bundle, contents, description, noise

from edge.bundle import difference, write_bundle, write_update
from edge.runtime.manifest import BundledAdapter, Parity
from edge.runtime.verify import verified
from protocol.errors import BundleError

FIGURES = Parity(rows=2, positions=9, largest_logit_difference=1e-6, kl=1e-9, top1=1.0, budgets={"kl": 1e-7})


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_inputs_give_the_same_bytes_in_another_process_place_and_order(tmp_path):
    here = bundle(tmp_path / "here", weights=5_000)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from small_bundles import *\n"
        "made = dict(reversed(contents(weights=5_000).items()))\n"
        "for path, content in made.items():\n"
        "    (Path(sys.argv[2]) / path.replace('/', '_')).write_bytes(content)\n"
        "made = {path: Path(sys.argv[2]) / path.replace('/', '_') for path in made}\n"
        "about = description(adapters=('south', 'north'))\n"
        "write_bundle(Path(sys.argv[2]) / 'elsewhere' / 'there', about, made, KEY)\n"
    )
    (tmp_path / "sources").mkdir()
    old = os.umask(0o077)
    try:
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "sources")],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])},
        )
    finally:
        os.umask(old)
    there = tmp_path / "sources" / "elsewhere" / "there"
    assert everything(there) == everything(here)
    assert str(tmp_path).encode() not in b"".join(everything(here).values())
    verified(there, TRUSTED)


def test_of_two_writers_of_one_bundle_the_first_stays(tmp_path):
    """The judge of one is where the other one comes in: both have found the place free."""

    def judge(draft, key):
        bundle(tmp_path / "b", 1, weights=10)
        return {}, "report"

    with pytest.raises(BundleError, match="there already"):
        write_bundle(tmp_path / "b", description(2), contents(weights=20), KEY, judge)
    assert verified(tmp_path / "b", TRUSTED).version == 1
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_update_never_lies_in_a_bundle_that_it_is_made_from(tmp_path):
    old, new = bundle(tmp_path / "old", 1, weights=10), bundle(tmp_path / "new", 2, weights=20)
    (tmp_path / "link").symlink_to(new)
    for target in (old / "update", new / "adapters" / "update", tmp_path / "link" / "update"):
        with pytest.raises(BundleError, match="lies in"):
            write_update(target, old, new, TRUSTED)
    assert verified(old, TRUSTED).version + verified(new, TRUSTED).version == 3


def test_a_bundle_does_not_change(tmp_path):
    folder = bundle(tmp_path / "b", weights=10)
    before = everything(folder)
    for occupied in (folder, folder / "model.onnx"):
        with pytest.raises(BundleError, match="there already"):
            bundle(occupied, 2, weights=10)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="there already"):
        bundle(tmp_path / "dangling", weights=10)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.pop("tokenizer/tokenizer.json"), "tokenizer"),
        (lambda made: made.pop("adapters/north.onnx_adapter"), "north"),
        (lambda made: made.update({"../x": b""}), "files"),
        (lambda made: made.update({"a b": b""}), "files"),
        (lambda made: made.update({"MODEL.ONNX": b""}), "upper and lower"),
        (lambda made: made.update({"manifest.json": b""}), "own digest"),
        (lambda made: made.update({"model.onnx.data": Path("/nowhere/model.onnx.data")}), "no such file"),
        (lambda made: made.clear(), "files"),
    ],
)
def test_what_cannot_be_a_bundle_is_refused_and_nothing_is_written(tmp_path, change, said):
    made = contents(weights=10)
    change(made)
    with pytest.raises(BundleError, match=said):
        write_bundle(tmp_path / "b", description(), made, KEY)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_said_with_numbers_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(BundleError, match=r"100,000 bytes are free, and 1,\d\d\d,\d\d\d are needed"):
        bundle(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_judge_opens_the_bundle_and_its_figures_are_signed(tmp_path):
    seen = []

    def judge(folder, key):
        manifest = verified(folder, [key])
        seen.append(manifest.parity)
        with pytest.raises(BundleError):
            verified(folder, TRUSTED)  # nothing of the signer's key is there yet
        assert folder != tmp_path / "b"
        return {"base": FIGURES, "north": FIGURES}, "# Parity\n"

    signed = write_bundle(tmp_path / "b", description(), contents(weights=10), KEY, judge)
    assert seen == [{}]
    assert verified(tmp_path / "b", TRUSTED) == signed
    assert signed.parity == {"base": FIGURES, "north": FIGURES}
    assert (tmp_path / "b" / "parity.md").read_text() == "# Parity\n"


@pytest.mark.parametrize("ending", [BundleError("kl is 3, and 1e-7 is the most"), ValueError("x"), KeyboardInterrupt()])
def test_what_a_judge_refuses_is_not_written(tmp_path, ending):
    def judge(folder, key):
        raise ending

    with pytest.raises(type(ending)):
        write_bundle(tmp_path / "b", description(), contents(weights=10), KEY, judge)
    assert list(tmp_path.iterdir()) == []


def test_a_judge_that_leaves_a_file_behind_is_found_out(tmp_path):
    def judge(folder, key):
        (folder / "profile.json").touch()
        return {}, ""

    with pytest.raises(BundleError, match=r"profile\.json"):
        write_bundle(tmp_path / "b", description(), contents(weights=10), KEY, judge)
    assert list(tmp_path.iterdir()) == []


def test_figures_of_nobody_are_refused(tmp_path):
    with pytest.raises(BundleError, match="east"):
        write_bundle(tmp_path / "b", description(), contents(weights=10), KEY, lambda *_: ({"east": FIGURES}, ""))
    assert list(tmp_path.iterdir()) == []


def test_a_difference_names_what_changed(tmp_path):
    old = verified(bundle(tmp_path / "a", weights=10), TRUSTED)
    made = contents(("north", "west"), weights=10) | {"adapters/north.onnx_adapter": noise(77, 500)}
    adapters = {name: BundledAdapter(digest="cd" * 32, method="lora", r=r) for name, r in (("north", 8), ("west", 4))}
    write_bundle(
        tmp_path / "b", description(2, adapters=("north", "west")).model_copy(update={"adapters": adapters}), made, OTHER
    )
    new = verified(tmp_path / "b", [OTHER.public_key()])
    told = difference(old, new)
    assert told.described == ("version", "adapters")
    assert told.added == ("adapters/west.json", "adapters/west.onnx_adapter")
    assert told.changed == ("adapters/north.onnx_adapter",)
    assert told.removed == ("adapters/south.json", "adapters/south.onnx_adapter")
    assert told.update_bytes == 500 + 1_000  # west.json has the bytes of north.json
    assert told.whole_bytes == sum(map(len, made.values()))
    assert difference(new, new).update_bytes == 0
