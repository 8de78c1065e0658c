"""Every round on disk: there whole or not at all, with the numbers that were measured."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.configuration import load
from protocol.errors import AdapterError, FederationError
from protocol.federation import Federation
from protocol.files import base_model_of, read_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from server.ledger import Checkpoint, Found, Kept, Ledger, RoundRecord, export, place_of, resumable, write_resume

BASE = "ab" * 32
PLAN = Plan(base_model="some/base", objective="classification")
FEDERATION = Federation(name="f")


def adapter(seed):
    rng = np.random.default_rng(seed)
    pair = Factors(rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32))
    return Adapter({"layers.0.q": pair}, {"score.weight": rng.normal(size=(3, 4)).astype(np.float32)})


def manifest(number):
    return Manifest(base_digest=BASE, kind="global", r=2, federation="f", round=number, num_examples=8)


def record(number, **changes):
    return RoundRecord(
        **{
            "round": number,
            "accepted": {"bank": {"loss": 0.5, "num-examples": 8}},
            "refused": {"clinic 诊所": "round: found '1', expected '2'"},
            "evaluation": {"bank": {"accuracy": 0.75}},
            "merge": {"discarded_energy": 0.125},
            "bytes_sent": 10,
            "bytes_received": 20,
            "seconds": 1.5,
        }
        | changes
    )


def kept(number, name="", **changes):
    return Kept(record(number, adapter=name, **changes), adapter(number), manifest(number), PLAN)


def checkpoint(number, names=("",), **changes):
    arrays = {"rule  momentum": np.full(3, number, dtype=np.float64)}
    return Checkpoint(number, {name: kept(number, name, **changes) for name in names}, {"seconds": number * 1.5}, arrays)


def ledger(tmp_path):
    return Ledger(tmp_path / "run", identity=FEDERATION.identity())


def begun(tmp_path, rounds=3, names=("",)):
    """A ledger of a run that died after some rounds."""
    made = ledger(tmp_path)
    for number in range(1, rounds + 1):
        made.keep(checkpoint(number, names))
    made.describe({"federation": FEDERATION.model_dump(mode="json")})
    return made


def every_file(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip_first(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def seal(folder):
    """Checksums as a folder's own author could make them anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json"]
    sums = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "checksums.json").write_text(json.dumps(sums))


def resealed(path, content):
    path.write_text(content)
    seal(path.parent)


def without(path, name):
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def renamed(run, name):
    """The newest round's adapter under another name, with checksums that hold."""
    newest = run / "rounds" / "0003"
    state = json.loads((newest / "state.json").read_text())
    state["adapters"] = {name: state["adapters"][""]}
    place = newest / "adapters" / name
    place.mkdir(parents=True, exist_ok=True)
    for file in newest.glob("*.*"):
        shutil.copy(file, place / file.name)
    resealed(newest / "state.json", json.dumps(state))


def going_on(tmp_path):
    """What a coordinator does that is started again; its checkpoint, and what it says."""
    made = ledger(tmp_path)
    made.check()
    found = made.newest()
    return found.checkpoint, made.mend(found)


def test_nothing_is_written_before_the_first_round(tmp_path):
    assert going_on(tmp_path) == (None, [])
    assert not (tmp_path / "run").exists()


def test_a_round_is_read_back_as_it_was_kept(tmp_path):
    folder = ledger(tmp_path).keep(checkpoint(1))
    found, described = read_adapter(folder, base_digest=BASE)
    assert folder == tmp_path / "run" / "rounds" / "0001"
    assert found.digest() == adapter(1).digest()
    assert described == manifest(1)
    assert RoundRecord(**json.loads((folder / "round.json").read_text(encoding="utf-8"))) == record(1)
    assert base_model_of(folder) == "some/base"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_every_round_stays_and_adapter_is_the_newest(tmp_path):
    begun(tmp_path)
    rounds = tmp_path / "run" / "rounds"
    assert sorted(path.name for path in rounds.iterdir()) == ["0001", "0002", "0003"]
    for number in (1, 2, 3):
        assert read_adapter(rounds / f"000{number}")[0].digest() == adapter(number).digest()
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(3).digest()
    assert json.loads((tmp_path / "run" / "adapter" / "round.json").read_text(encoding="utf-8"))["round"] == 3


def test_several_adapters_lie_side_by_side_under_their_names(tmp_path):
    begun(tmp_path, 2, ("legal", "medical/part-1"))
    for place in (tmp_path / "run", tmp_path / "run" / "rounds" / "0002"):
        for name in ("legal", "medical/part-1"):
            assert read_adapter(place / "adapters" / name)[0].digest() == adapter(2).digest()


def test_a_round_that_is_kept_again_is_replaced_whole(tmp_path):
    made = begun(tmp_path, 2)
    stale = tmp_path / "run" / "rounds" / "0002" / "stale"
    stale.write_text("x")
    made.keep(Checkpoint(2, {"": kept(9)}))
    assert read_adapter(stale.parent)[0].digest() == adapter(9).digest()
    assert not stale.exists()


def test_a_round_that_cannot_be_written_to_its_end_leaves_everything_as_it_was(tmp_path):
    made = begun(tmp_path, 1)
    before = every_file(tmp_path)
    # An object that JSON does not know makes it fail after the weights are written.
    with pytest.raises(TypeError):
        made.keep(checkpoint(2, merge={"report": object()}))
    assert every_file(tmp_path) == before
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(1).digest()


def test_no_hidden_drafts_are_left(tmp_path):
    begun(tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_an_earlier_runs_rounds_are_moved_aside_whole(tmp_path):
    begun(tmp_path, 3).end(3, "every round is done")
    ledger(tmp_path).keep(checkpoint(1))
    assert sorted(path.name for path in (tmp_path / "run" / "rounds").iterdir()) == ["0001"]
    assert sorted(path.name for path in (tmp_path / "run" / "before-1" / "rounds").iterdir()) == ["0001", "0002", "0003"]
    assert (tmp_path / "run" / "before-1" / "ended.json").is_file()


def test_round_json_is_json_for_every_reader(tmp_path):
    """NaN is no JSON; other programs refuse a file that holds it."""
    folder = ledger(tmp_path).keep(checkpoint(1, merge={"effective_rank": math.nan}))

    def refuse(constant):
        raise AssertionError(f"{constant} in round.json")

    json.loads((folder / "round.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_was_published_is_described_and_replaced(tmp_path):
    made = ledger(tmp_path)
    made.describe({"offers": {"bank": {"r": 1}}})
    made.describe({"offers": {"银行": {"r": 2}}, "output": tmp_path})
    found = json.loads((tmp_path / "run" / "federation.json").read_text(encoding="utf-8"))
    assert found == {"identity": FEDERATION.identity(), "offers": {"银行": {"r": 2}}, "output": str(tmp_path)}


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_run_that_died_goes_on_after_its_newest_round_with_all_that_it_knew(tmp_path):
    begun(tmp_path)
    found, said = going_on(tmp_path)
    assert (found.round, said) == (3, [])
    assert found.kept[""].adapter.digest() == adapter(3).digest()
    assert (found.kept[""].manifest, found.kept[""].record, found.kept[""].plan) == (manifest(3), record(3), PLAN)
    assert found.state == {"seconds": 4.5}
    assert found.arrays["rule  momentum"].tolist() == [3.0, 3.0, 3.0]


def test_pairs_without_directions_and_of_zeros_come_back_as_they_were(tmp_path):
    """PEFT's files know no rank 0; a pair of zeros could never learn again, for neither factor would have a gradient."""
    pairs = {f"q{r}": Factors(np.zeros((r, 5), np.float32), np.zeros((4, r), np.float32)) for r in (0, 1)}
    ledger(tmp_path).keep(Checkpoint(1, {"": Kept(record(1), Adapter(pairs), manifest(1), PLAN)}))
    assert going_on(tmp_path)[0].kept[""].adapter.digest() == Adapter(pairs).digest()


@pytest.mark.parametrize("end", ["ended", "another federation"])
def test_a_run_that_ended_or_was_another_is_not_gone_on_with(tmp_path, end):
    made = begun(tmp_path)
    if end == "ended":
        made.end(3, "every round is done")
    else:
        made = Ledger(tmp_path / "run", identity="another")
    assert made.newest() == Found(another=0 if end == "ended" else 3)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (
            "adapter_model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        ),
        ("state.json", lambda path: path.write_text("{}")),
        ("state.safetensors", lambda path: path.unlink()),
        ("checksums.json", lambda path: path.write_text("")),
        ("checksums.json", lambda path: path.unlink()),
        ("checksums.json", lambda path: path.write_text("{}")),
        ("checksums.json", lambda path: path.write_text("null")),
        ("checksums.json", lambda path: path.write_text("[" * 100_000)),
        ("checksums.json", lambda path: without(path, "state.json")),
        ("round.json", lambda path: path.write_text("[]")),
        ("round.json", lambda path: resealed(path, "[1]")),
        ("state.json", lambda path: resealed(path, "[]")),
        ("state.json", lambda path: resealed(path, "[" * 100_000)),
        ("state.safetensors", lambda path: resealed(path, "garbage")),
        ("adapter_config.json", lambda path: resealed(path, '{"peft_type": 1}')),
        ("state.json", lambda path: (path.unlink(), path.mkdir())),
        ("state.json", lambda path: (path.rename(path.parent / "other"), path.symlink_to("other"))),
    ],
)
def test_a_damaged_round_is_moved_aside_by_name_and_the_one_before_it_is_taken(tmp_path, file, damage):
    begun(tmp_path)
    damage(tmp_path / "run" / "rounds" / "0003" / file)
    found, (told,) = going_on(tmp_path)
    assert found.round == 2
    assert found.kept[""].adapter.digest() == adapter(2).digest()
    assert told.startswith("round 3 is damaged")
    assert (tmp_path / "run" / "damaged" / "0003-1").is_dir()
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(2).digest()


def test_a_run_of_which_every_round_is_damaged_begins_anew_and_says_so(tmp_path):
    begun(tmp_path)
    for folder in (tmp_path / "run" / "rounds").iterdir():
        (folder / "checksums.json").unlink()
    found, said = going_on(tmp_path)
    assert found is None
    assert [line.partition(" is ")[0] for line in said] == ["round 3", "round 2", "round 1"]


@pytest.mark.parametrize("damage", [Path.unlink, flip_first, lambda path: path.write_text("[" * 100_000)])
def test_a_description_that_is_lost_or_damaged_loses_no_round(tmp_path, damage):
    """The rounds say themselves which federation's they are."""
    begun(tmp_path)
    damage(tmp_path / "run" / "federation.json")
    found, (told,) = going_on(tmp_path)
    assert found.round == 3
    assert told.startswith("federation.json is missing or damaged")


@pytest.mark.parametrize("name", ["0003.bak", "0003 (copy)", "٠٠٠٤"])
def test_a_copy_that_somebody_made_of_a_round_is_no_round(tmp_path, name):
    begun(tmp_path)
    rounds = tmp_path / "run" / "rounds"
    shutil.copytree(rounds / "0003", rounds / name)
    assert going_on(tmp_path)[0].round == 3
    assert export(tmp_path / "run", tmp_path / "new") == 3
    assert (rounds / name).is_dir()


def test_what_a_killed_coordinator_had_begun_to_write_is_taken_away_when_the_run_goes_on(tmp_path):
    begun(tmp_path, names=("legal",))
    before = every_file(tmp_path)
    run = tmp_path / "run"
    for draft in (run / "rounds" / ".0004-x", run / ".federation.json-x", run / "adapters" / ".legal-old-x" / "legal"):
        draft.mkdir(parents=True)
        (draft / "state.json").write_text("{")
    going_on(tmp_path)
    assert every_file(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


def test_a_newest_adapter_that_was_not_copied_any_more_is_copied_when_the_run_goes_on(tmp_path):
    begun(tmp_path)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    going_on(tmp_path)
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(3).digest()


def test_a_full_disk_is_told_with_the_last_good_round_and_leaves_it_as_it_was(tmp_path, monkeypatch):
    """The write that fails is the operating system's: the name of a folder where the file should be created is taken."""
    made = begun(tmp_path, 2)
    before = every_file(tmp_path)
    rounds = tmp_path / "run" / "rounds"
    rounds.chmod(0o500)
    try:
        if os.access(rounds, os.W_OK):  # root may write everywhere
            monkeypatch.setattr("tempfile.mkdtemp", full)
        with pytest.raises(FederationError, match=r"round 3 cannot be kept .*; the last good one is 2; make room"):
            made.keep(checkpoint(3))
    finally:
        rounds.chmod(0o700)
    monkeypatch.undo()
    assert every_file(tmp_path) == before
    assert ledger(tmp_path).newest().checkpoint.round == 2


@contextmanager
def files_of_at_most(size):
    """Every write beyond fails as on a full disk, whichever library makes it; Python ignores SIGXFSZ, so they see an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 700, 1200])
def test_wherever_the_disk_gets_full_the_last_good_round_stays_and_the_next_can_be_kept_later(tmp_path, size):
    made = begun(tmp_path, 2)
    before = every_file(tmp_path)
    with (
        files_of_at_most(size),
        pytest.raises(FederationError, match=r"round 3 cannot be kept .* the last good one is 2; make"),
    ):
        made.keep(checkpoint(3))
    assert every_file(tmp_path) == before
    made.keep(checkpoint(3))
    assert going_on(tmp_path)[0].round == 3


@pytest.mark.parametrize("what", ["federation.json", "ended.json"])
def test_what_describes_a_run_needs_room_as_well_and_says_so(tmp_path, what):
    made = begun(tmp_path, 2)
    with (
        files_of_at_most(0),
        pytest.raises(FederationError, match=f"{what} cannot be kept .* the last good one is 2; make room"),
    ):
        made.describe({}) if what == "federation.json" else made.end(2, "done")


def test_a_round_that_files_would_give_back_as_another_is_not_kept(tmp_path):
    """A tensor named as a module's factor is read as that factor: the module would come back with other numbers."""
    made = begun(tmp_path, 1)
    before = every_file(tmp_path)
    hostile = Adapter(adapter(2).factors, {"layers.0.q.lora_A.weight": np.zeros((2, 5), np.float32)})
    with pytest.raises(FederationError, match=r"round 2 cannot be kept .*; the last good round is 1; .* without the nodes"):
        made.keep(Checkpoint(2, {"": Kept(record(2), hostile, manifest(2), PLAN)}))
    assert every_file(tmp_path) == before


@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "gone"])
def test_an_output_that_cannot_be_written_is_told_before_anybody_trains(tmp_path, output):
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "else")
    before = every_file(tmp_path)
    with pytest.raises(FederationError, match=r"cannot be written \(.*\); name another folder"):
        Ledger(tmp_path / output, identity="this").check()
    assert every_file(tmp_path) == before


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# What the commands do with it -----------------------------------------------------------------------------------------


def test_an_exported_adapter_is_the_rounds_own(tmp_path):
    begun(tmp_path)
    for wanted, number in ((3, None), (2, 2)):
        target = tmp_path / f"export-{number}"
        assert export(tmp_path / "run", target, number=number) == wanted
        assert read_adapter(target, base_digest=BASE)[0].digest() == adapter(wanted).digest()


def test_an_exported_adapter_tells_nothing_of_the_institutions_unless_it_is_asked_to(tmp_path):
    begun(tmp_path)
    export(tmp_path / "run", tmp_path / "released")
    export(tmp_path / "run", tmp_path / "told", figures=True)
    assert {path.name for path in (tmp_path / "told").iterdir()} - {
        path.name for path in (tmp_path / "released").iterdir()
    } == {"round.json"}
    assert not any("bank" in path.read_bytes().decode(errors="replace") for path in (tmp_path / "released").iterdir())


def test_what_cannot_be_exported_is_refused_with_what_there_is(tmp_path):
    begun(tmp_path, names=("legal", "medical"))
    with pytest.raises(AdapterError, match="expected one of legal, medical"):
        export(tmp_path / "run", tmp_path / "new")
    with pytest.raises(AdapterError, match="no round 7 is kept here; there are 1 to 3"):
        export(tmp_path / "run", tmp_path / "new", "legal", 7)
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        export(tmp_path / "run", tmp_path / "there", "legal")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match=r"cannot be written \(.*\); name another folder"):
        export(tmp_path / "run", tmp_path / "file" / "below", "legal")
    (tmp_path / "run" / "rounds" / "0003" / "state.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"damaged \(state.json is not what was written\); export an earlier round"):
        export(tmp_path / "run", tmp_path / "new", "legal")
    assert not (tmp_path / "new").exists()


def test_a_federation_that_died_can_be_gone_on_with_from_a_file_of_its_own(tmp_path):
    """The file is the same federation: what begins with it goes on with the rounds of this folder."""
    begun(tmp_path)
    number, federation, damaged = resumable(tmp_path / "run")
    assert (number, damaged) == (3, [])
    found = load(write_resume(tmp_path / "run", federation), Federation)
    assert (found.identity(), found.output) == (FEDERATION.identity(), tmp_path / "run")


def test_asking_where_a_run_goes_on_changes_nothing(tmp_path):
    """The coordinator of that folder may be running."""
    begun(tmp_path)
    run = tmp_path / "run"
    (run / "rounds" / "0003" / "state.json").write_text("{}")
    (run / "rounds" / ".0004-x").mkdir()
    before = every_file(tmp_path)
    number, _, (told,) = resumable(run)
    assert number == 2
    assert told == "round 3 is damaged (state.json is not what was written)"
    assert every_file(tmp_path) == before
    assert (run / "rounds" / ".0004-x").is_dir()


def test_what_cannot_be_gone_on_with_says_why(tmp_path):
    with pytest.raises(AdapterError, match="name the output folder of a federation"):
        resumable(tmp_path)
    begun(tmp_path).end(3, "every round is done")
    with pytest.raises(AdapterError, match="the run has ended"):
        resumable(tmp_path / "run")


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, '{"federation": [1]}', '{"federation": {"nmae": 1}}', ""])
def test_a_description_that_is_none_is_told_and_never_a_traceback(tmp_path, content):
    begun(tmp_path)
    (tmp_path / "run" / "federation.json").write_text(content)
    with pytest.raises(AdapterError, match="not there or not readable; name the output folder"):
        resumable(tmp_path / "run")


# A folder that somebody else made --------------------------------------------------------------------------------------

OUTSIDE = [
    "../photos",
    "../../photos",
    "/photos",
    "legal/../../photos",
    ".",
    "..",
    "legal/photos",
    "a\n",
    "a b",
    "é",
    "x" * 65,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_none_is_no_place(tmp_path, name):
    with pytest.raises(AdapterError, match="found no name of an adapter"):
        place_of(tmp_path, name)


@pytest.mark.parametrize("name", ["../../photos", "ABSOLUTE"])
def test_a_round_whose_adapter_is_named_outside_the_folder_is_damaged_and_nothing_outside_changes(tmp_path, name):
    begun(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "wedding.jpg").write_text("precious")
    renamed(tmp_path / "run", name.replace("ABSOLUTE", str(photos)))
    before = sorted(path.name for path in photos.iterdir())
    assert going_on(tmp_path)[0].round == 2
    assert resumable(tmp_path / "run")[0] == 2
    assert sorted(path.name for path in photos.iterdir()) == before


@pytest.mark.parametrize("link", ["damaged", "adapter", "adapters", "rounds", "events.jsonl", "adapters/legal"])
def test_a_folder_with_links_is_not_written_to(tmp_path, link):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    begun(tmp_path)
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("x")
    if (run / link).is_dir():
        shutil.rmtree(run / link)
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(elsewhere)
    with pytest.raises(FederationError, match="found a link"):
        going_on(tmp_path)
    assert every_file(elsewhere) == ["thesis"]


@pytest.mark.parametrize("name", ["../0002", "PATH", "..", "legal"])
def test_only_what_the_checksums_cover_is_exported(tmp_path, name):
    begun(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run" / "adapter", other)
    with pytest.raises(AdapterError, match=r"no name of an adapter|is not in"):
        export(tmp_path / "run", tmp_path / "new", name.replace("PATH", str(other)))
    assert not (tmp_path / "new").exists()
