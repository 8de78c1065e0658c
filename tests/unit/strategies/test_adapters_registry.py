"""The registry: versions that never change and never appear half, digests, lineage, tags, retention, hostile locations."""

import hashlib
import json
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError, FedgeError
from protocol.files import read_adapter, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapters.registry import Registry
from strategies.adapters.version import Version

BASE = "ab" * 32


def adapter(folder, seed=0, **manifest):
    """A small adapter whose numbers are its seed's."""
    rng = np.random.default_rng(seed)
    pair = Factors(rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32))
    about = Manifest(base_digest=BASE, kind="adapter", method="lora", r=2, **manifest)
    write_adapter(folder, Adapter({"model.q": pair}), about, Plan(base_model="some/base"))
    return folder


@pytest.fixture(params=["file", "folder", "memory"])
def location(request, tmp_path):
    made = {
        "file": f"file://{tmp_path}/registry",
        "folder": f"{tmp_path}/registry",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return made[request.param]


@pytest.fixture
def there(tmp_path):
    return Registry(str(tmp_path / "registry"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def described(registry, reference):
    name, _, version = reference.partition("@")
    return Path(registry.location, name, "versions", f"{version}.json")


# ---- what is published comes back -------------------------------------------------------------------------------------


def test_what_is_published_is_fetched_to_the_byte(location, tmp_path):
    source = adapter(tmp_path / "a")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "template.jinja").write_text("x")
    made = Registry(location).publish(source, "fees")
    found = Registry(location).fetch("fees", tmp_path / "back")
    assert (made.reference, found) == ("fees@1", made)
    assert (tmp_path / "back" / "tokenizer" / "template.jinja").read_text() == "x"
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
        assert made.files[name].sha256 == hashlib.sha256((source / name).read_bytes()).hexdigest()
    assert read_adapter(tmp_path / "back")[0].digest() == made.lineage.adapter_digest


def test_the_same_version_is_refused_unless_it_is_equal(location, tmp_path):
    registry = Registry(location)
    first = registry.publish(adapter(tmp_path / "a"), "fees", "1.2")
    assert registry.publish(tmp_path / "a", "fees", "1.2") == first
    assert registry.publish(tmp_path / "a", "fees") == first, "the newest, again, is no new version"
    with pytest.raises(AdapterError, match=r"fees@1\.2 is there with other content.*publish it as 2"):
        registry.publish(adapter(tmp_path / "b", seed=1), "fees", "1.2")
    with pytest.raises(AdapterError, match="other content"):  # equal bytes of another origin
        registry.publish(tmp_path / "a", "fees", "1.2", plan=Plan())
    assert registry.show("fees@1.2") == first
    assert registry.publish(tmp_path / "b", "fees").version == "2"
    assert registry.versions("fees") == ["1.2", "2"]


def test_versions_are_ordered_by_number_and_latest_is_the_largest(location, tmp_path):
    registry = Registry(location)
    for seed, version in enumerate(["2", "10", "1.9", "1.10"]):
        registry.publish(adapter(tmp_path / version, seed), "fees", version)
    assert registry.versions("fees") == ["1.9", "1.10", "2", "10"]
    assert registry.tags("fees") == {"latest": "10"}
    registry.tag("fees@1.10", "production")
    registry.tag("fees@production", "shadow")
    assert registry.tags("fees") == {"latest": "10", "production": "1.10", "shadow": "1.10"}
    assert registry.show("fees@production").version == "1.10"
    registry.tag("fees@2", "production")
    assert registry.tag("fees", "shadow", remove=True) == "1.10"
    assert registry.tags("fees") == {"latest": "10", "production": "2"}
    with pytest.raises(AdapterError, match="latest is the newest"):
        registry.tag("fees@2", "latest")
    assert registry.names() == ["fees"]


def test_the_lineage_says_what_it_came_from_and_holds_no_path(location, tmp_path):
    registry = Registry(location)
    registry.publish(adapter(tmp_path / "a"), "mother", "3")
    (tmp_path / "card.json").write_text("{}")
    plan = Plan.model_validate(
        {"base_model": "/srv/models/base", "data": {"train": "/home/me/rows.jsonl"}, "lora": {"target_modules": ["q"]}}
    )
    source = adapter(tmp_path / "b", 1, federation="banks", round=7, parent="cd" * 32, num_examples=42)
    made = registry.publish(source, "child", parents=["mother", "mother@3"], data_card=tmp_path / "card.json", plan=plan)
    told = made.lineage
    assert (told.base_digest, told.base_model, told.parents) == (BASE, "some/base", ("mother@3",))
    assert (told.federation, told.round, told.num_examples, told.parent_digest) == ("banks", 7, 42, "cd" * 32)
    assert told.data_card_digest == hashlib.sha256(b"{}").hexdigest()
    assert (told.method, told.plan["lora"]["target_modules"], told.plan["base_model"]) == ("lora", ["q"], "base")
    assert "/home/me" not in made.model_dump_json()
    assert "/srv" not in made.model_dump_json()
    assert registry.show("child") == made


def test_a_folder_of_plain_peft_needs_its_base_named(tmp_path, there):
    (adapter(tmp_path / "a") / "manifest.json").unlink()
    with pytest.raises(AdapterError, match="--base-model"):
        there.publish(tmp_path / "a", "fees")
    assert there.publish(tmp_path / "a", "fees", base_digest=BASE).lineage.base_digest == BASE


# ---- nothing appears half, nothing is lost ----------------------------------------------------------------------------


class Failing(LocalFileSystem):
    """A disk that fails at the n-th write, in the middle of it."""

    protocol = ("failing",)
    left = 0

    def _open(self, path, mode="rb", **more):
        opened = super()._open(path, mode, **more)
        if "w" in mode:
            Failing.left -= 1
            if Failing.left < 0:
                opened.write(b"half")
                opened.close()
                raise OSError("no space left")
        return opened


fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.mark.parametrize("writes", range(3))
def test_a_crash_in_the_middle_leaves_no_visible_version(tmp_path, monkeypatch, writes):
    """Each of the three files in turn is written by half; then, before the version itself is written, the process dies."""
    registry = Registry(f"failing://{tmp_path}/registry")
    Failing.left = 100
    registry.publish(adapter(tmp_path / "a"), "fees")
    Failing.left = writes
    with pytest.raises(AdapterError, match="no space left"):
        registry.publish(adapter(tmp_path / "b", 1), "fees")
    assert registry.versions("fees") == ["1"]
    Failing.left = 100
    assert registry.publish(tmp_path / "b", "fees").version == "2"
    registry.fetch("fees@2", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "b")


def test_killed_before_the_version_is_written_nothing_is_seen_and_the_rest_is_swept(tmp_path, monkeypatch, there):
    there.publish(adapter(tmp_path / "a"), "fees")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from strategies.adapters import location\n"
        "from strategies.adapters.registry import Registry\n"
        "location.os.link = lambda *paths: os._exit(9)\n"  # the last act of a publisher
        f"Registry({there.location!r}).publish(Path({str(adapter(tmp_path / 'b', 1))!r}), 'fees')\n"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 9
    drawn = Path(there.location, "fees", "files")
    assert (there.versions("fees"), len(list(drawn.iterdir()))) == (["1"], 2)
    there.prune(1)
    assert len(list(drawn.iterdir())) == 2, "it may still be on its way"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 90_000)
    there.prune(1)
    assert [path.name for path in drawn.iterdir()] == [there.show("fees").folder]
    there.fetch("fees", tmp_path / "back")


def race(jobs):
    """Runs all at once; returns what each returned or raised."""
    start, found = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(at):
        start.wait()
        try:
            found[at] = jobs[at]()
        except FedgeError as error:
            found[at] = error

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_many_publishers_at_once_none_loses_a_version(location, tmp_path):
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(8)]
    made = race([lambda folder=folder: Registry(location).publish(folder, "fees") for folder in folders])
    assert sorted(int(version.version) for version in made) == list(range(1, 9))
    for at, version in enumerate(made):
        Registry(location).fetch(version.reference, tmp_path / f"back-{at}")
        assert content(tmp_path / f"back-{at}") == content(folders[at])


def test_of_many_publishers_of_one_version_one_wins_and_the_others_are_told(location, tmp_path):
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(6)]
    made = race([lambda folder=folder: Registry(location).publish(folder, "fees", "1") for folder in folders])
    won = [at for at, version in enumerate(made) if isinstance(version, Version)]
    assert len(won) == 1
    assert all("other content" in str(made[at]) for at in range(6) if at not in won)
    Registry(location).fetch("fees@1", tmp_path / "back")
    assert content(tmp_path / "back") == content(folders[won[0]])


def test_two_processes_publish_side_by_side(tmp_path, there):
    """Threads share a lock of this process; processes have the file system alone."""
    for seed in range(8):
        adapter(tmp_path / str(seed), seed)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from strategies.adapters.registry import Registry\n"
        "registry = Registry(sys.argv[1])\n"
        "for seed in sys.argv[3:]:\n"
        "    print(registry.publish(Path(sys.argv[2], seed), 'fees').version)\n"
    )
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, there.location, str(tmp_path), *map(str, range(first, 8, 2))],
            cwd=root, stdout=subprocess.PIPE, text=True,
        )
        for first in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert sorted(int(version) for versions in said for version in versions) == list(range(1, 9))
    for first, versions in enumerate(said):
        for seed, version in zip(range(first, 8, 2), versions, strict=True):
            there.fetch(f"fees@{version}", tmp_path / f"back-{version}")
            assert content(tmp_path / f"back-{version}") == content(tmp_path / str(seed))


# ---- retention --------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_newest_the_tagged_and_what_kept_ones_came_from(location, tmp_path):
    registry = Registry(location)
    for version in range(1, 7):
        # 6 was made of 3, and that of 1.
        parents = {3: ["fees@1"], 6: ["fees@3"]}.get(version, [])
        registry.publish(adapter(tmp_path / str(version), version), "fees", str(version), parents=parents)
    registry.publish(adapter(tmp_path / "other", 9), "other", parents=["fees@2"])
    registry.tag("fees@4", "production")
    done = registry.prune(1)
    assert done.removed == ("fees@5",)
    assert done.kept == {
        "fees@1": "parent of fees@3",
        "fees@2": "parent of other@1",
        "fees@3": "parent of fees@6",
        "fees@4": "tag production",
    }
    assert registry.versions("fees") == ["1", "2", "3", "4", "6"]
    registry.tag("fees@production", "production", remove=True)
    assert registry.prune(1).removed == ("fees@4",)
    for version in (1, 2, 3, 6):
        registry.fetch(f"fees@{version}", tmp_path / f"back-{version}")
    with pytest.raises(AdapterError, match=r"fees@5: no such version; there are 1, 2, 3, 6"):
        registry.fetch("fees@5", tmp_path / "back-5")
    with pytest.raises(AdapterError, match="was removed, and versions do not come back"):
        registry.publish(adapter(tmp_path / "new", 11), "fees", "5")


@given(
    parents=st.lists(st.sets(st.integers(0, 9), max_size=3), min_size=1, max_size=8),
    tagged=st.sets(st.integers(0, 7), max_size=3),
    keep=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_pruned_every_reference_of_what_stays_is_there(tmp_path_factory, parents, tagged, keep):
    """Oracle: reachability from the newest and the tagged, computed on the drawn graph alone."""
    folder = tmp_path_factory.mktemp("drawn")
    registry = Registry(f"memory://{uuid.uuid4().hex}")
    edges = {at: {parent for parent in drawn if parent < at} for at, drawn in enumerate(parents)}
    for at in edges:
        registry.publish(
            adapter(folder / str(at), at), "fees", str(at), parents=[f"fees@{parent}" for parent in sorted(edges[at])]
        )
    tags = {at for at in tagged if at in edges}
    for at in tags:
        registry.tag(f"fees@{at}", f"tag-{at}")
    stays = set(sorted(edges)[-keep:]) | tags
    while more := {parent for at in stays for parent in edges[at]} - stays:
        stays |= more
    done = registry.prune(keep)
    assert registry.versions("fees") == [str(at) for at in sorted(stays)]
    assert set(done.removed) == {f"fees@{at}" for at in edges if at not in stays}
    assert registry.prune(keep).removed == ()


def test_a_tag_or_a_child_that_comes_while_pruning_keeps_its_version(tmp_path, location):
    """Each refers or is told that it came too late; in no order is something left that refers to nothing."""
    for turn in range(4):
        registry, name = Registry(location), f"fees-{turn}"
        for version in ("1", "2", "3"):
            registry.publish(adapter(tmp_path / f"{turn}-{version}", int(version)), name, version)
        child = adapter(tmp_path / f"{turn}-child", 9)
        race(
            [
                lambda name=name: Registry(location).prune(1, [name]),
                lambda name=name: Registry(location).tag(f"{name}@1", "production"),
                lambda name=name, child=child: Registry(location).publish(child, f"{name}-c", parents=[f"{name}@2"]),
            ]
        )
        there = registry.versions(name)
        for version in there:
            registry.fetch(f"{name}@{version}", tmp_path / f"{turn}-back-{version}")
        for number in registry.versions(f"{name}-c"):
            assert set(registry.show(f"{name}-c@{number}").lineage.parents) <= {f"{name}@{version}" for version in there}


# ---- what is refused --------------------------------------------------------------------------------------------------


def refused(registry, tmp_path, reference="fees"):
    """One AdapterError, and nothing left where it was to go."""
    with pytest.raises(AdapterError) as caught:
        registry.fetch(reference, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))
    return str(caught.value)


@pytest.fixture
def published(tmp_path, there):
    return there.publish(adapter(tmp_path / "a"), "fees")


def test_a_file_that_changed_grew_shrank_or_went_is_refused(tmp_path, there, published):
    place = Path(there.location, "fees", "files", published.folder, "adapter_model.safetensors")
    raw = place.read_bytes()
    place.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "is not what was published" in refused(there, tmp_path)
    place.write_bytes(raw + b"x")
    assert f"more than the {len(raw)} bytes" in refused(there, tmp_path)
    place.write_bytes(raw[:-1])
    assert f"lacks 1 of the {len(raw)} bytes" in refused(there, tmp_path)
    place.unlink()
    assert "is not there" in refused(there, tmp_path)
    place.mkdir()
    refused(there, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["files"].update({"../../../evil": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"/etc/evil": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"a\\..\\evil": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"..": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({".hidden": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"a\nb": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"manifest.json/x": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({"MANIFEST.json": told["files"]["manifest.json"]}),
        lambda told: told["files"].update({f"f{at}": told["files"]["manifest.json"] for at in range(300)}),
        lambda told: told["files"].clear(),
        lambda told: told.update(folder="../../fees"),
        lambda told: told.update(folder="/etc"),
        lambda told: told.update(version="2"),
        lambda told: told.update(name="other"),
        lambda told: told.update(format_version=2),
        lambda told: told.update(extra=1),
        lambda told: told["lineage"].update(parents=["../x@1"]),
        lambda told: told["lineage"].update(base_digest="short"),
        lambda told: told["lineage"].update(base_digest="cd" * 32),
        lambda told: told["lineage"].update(adapter_digest="cd" * 32),
        lambda told: told["files"]["manifest.json"].update(sha256="cd" * 32),
        lambda told: told["files"]["manifest.json"].update(size_bytes=-1),
        lambda told: told["files"]["manifest.json"].update(size_bytes=True),
        lambda told: told["files"]["manifest.json"].update(size_bytes="10"),
        lambda told: told["files"].pop("adapter_model.safetensors"),
    ],
)
def test_a_version_that_lies_is_one_error(tmp_path, there, published, change):
    place = described(there, "fees@1")
    told = json.loads(place.read_text())
    change(told)
    place.write_text(json.dumps(told))
    refused(there, tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"[" * 200_000, b'{"a": 1' + b"0" * 5000 + b"}", b" " * ((1 << 20) + 1)],
    ids=["empty", "cut", "no text", "null", "list", "deep", "long number", "huge"],
)
def test_a_description_that_is_none_is_one_error(tmp_path, there, published, raw):
    described(there, "fees@1").write_bytes(raw)
    said = refused(there, tmp_path)
    assert len(said) < 1000
    with pytest.raises(AdapterError):
        there.prune(1)


@given(raw=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_place_of_a_description_are_one_error(tmp_path_factory, raw):
    registry = Registry(f"memory://{uuid.uuid4().hex}")
    folder = tmp_path_factory.mktemp("drawn")
    registry._location.put("fees/versions/1.json", raw)
    registry._location.put("fees/tags/production", raw)
    with pytest.raises(AdapterError):
        registry.fetch("fees@1", folder / "back")
    with pytest.raises(AdapterError):
        registry.fetch("fees@production", folder / "back")


def test_links_lead_nowhere(tmp_path, there, published):
    """A file of a version, a version and a whole name that are links out of the registry."""
    outside = tmp_path / "outside"
    place = Path(there.location, "fees", "files", published.folder, "manifest.json")
    place.rename(outside)
    place.symlink_to(outside)
    assert "manifest.json is a link" in refused(there, tmp_path)
    described(there, "fees@1").rename(tmp_path / "version")
    described(there, "fees@1").symlink_to(tmp_path / "version")
    assert "1.json is a link" in refused(there, tmp_path)
    Path(there.location, "other").symlink_to(Path(there.location, "fees"), target_is_directory=True)
    assert "other is a link" in refused(there, tmp_path, "other@1")


def test_what_cannot_be_published_is_refused(tmp_path, there):
    with pytest.raises(AdapterError, match="no such file"):
        there.publish(tmp_path, "fees")
    folder = adapter(tmp_path / "a")
    for name in ("", "../fees", "a/b", "a" * 65, "fées", ".hidden"):
        with pytest.raises(AdapterError, match="name '"):
            there.publish(folder, name)
    for version in ("", "v1", "01", "1.2.3.4.5", "../1", "1\n"):
        with pytest.raises(AdapterError, match="version '"):
            there.publish(folder, "fees", version)
    with pytest.raises(AdapterError, match="no such version or tag"):
        there.publish(folder, "fees", parents=["mother"])
    (folder / "card.md").symlink_to("/etc/hostname")
    with pytest.raises(AdapterError, match=r"card\.md is a link"):
        there.publish(folder, "fees")
    (folder / "card.md").unlink()
    (folder / "my rows.jsonl").write_text("secret")
    with pytest.raises(AdapterError, match="cannot be published"):
        there.publish(folder, "fees")
    assert there.names() == []


def test_a_target_that_is_there_stays_as_it_is(tmp_path, there, published):
    (tmp_path / "back").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        there.fetch("fees", tmp_path / "back")


def test_a_location_that_needs_a_package_names_it():
    with pytest.raises(ConfigurationError, match="s3fs"):
        Registry("s3://bucket/adapters")
    for url in ("nothing://bucket", "reference://x"):
        with pytest.raises(ConfigurationError, match="no location that fsspec knows"):
            Registry(url)
    with pytest.raises(ConfigurationError, match="found none; expected a folder or a URL"):
        Registry("")
    with pytest.raises(AdapterError, match="NotImplementedError"):
        Registry("data:,x").names()


def test_a_tag_is_taken_from_the_version_that_bears_it_alone(tmp_path, there):
    for seed in range(2):
        there.publish(adapter(tmp_path / str(seed), seed), "fees")
    there.tag("fees@2", "production")
    with pytest.raises(AdapterError, match="fees@1 does not bear the tag production"):
        there.tag("fees@1", "production", remove=True)
    assert there.tags("fees")["production"] == "2"
    with pytest.raises(AdapterError, match="does not bear the tag shadow"):
        there.tag("fees", "shadow", remove=True)
    assert there.tag("fees@2", "production", remove=True) == "2"
    assert "production" not in there.tags("fees")


def test_a_base_with_a_name_of_pages_is_not_published(tmp_path, there):
    folder = adapter(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x" * 501}))
    with pytest.raises(AdapterError, match="names a base of 501 characters"):
        there.publish(folder, "fees")


def test_a_location_that_would_overwrite_is_refused_for_publishing(tmp_path):
    """fsspec's own way to write a file only where there is none looks first and writes then."""
    from fsspec.spec import AbstractFileSystem

    class Careless(AbstractFileSystem):
        protocol = "careless"

        def ls(self, path, detail=True, **more):
            raise FileNotFoundError(path)

    fsspec.register_implementation("careless", Careless, clobber=True)
    with pytest.raises(ConfigurationError, match="Careless cannot write a file only where there is none"):
        Registry("careless://x").publish(adapter(tmp_path / "a"), "fees")
