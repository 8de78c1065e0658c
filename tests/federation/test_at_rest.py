"""With a vault nothing that a node or a coordinator keeps can be read without its key; without one only its owner can."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import drawn_nodes
import numpy as np
import pytest
from flwr.app import RecordDict
from typer.testing import CliRunner

from client.memory import Memory
from client.node import Node
from fedge import app
from protocol.audit import read as read_audit
from protocol.audit import verify
from protocol.errors import VaultError
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.plan import Plan
from protocol.sealed_folder import SealedFolder, folder_in_memory, sealed_folder
from protocol.vault import Vault, identity_of, is_sealed, make_key_file
from protocol.wiping import wipe
from server.ledger import export, resumable
from server.rounds import run
from simulations.federation import federate
from strategies.base_model import find
from strategies.data.formats import Conversation
from strategies.training import fit
from strategies.training_place import Safe

KEY = bytes(range(32))
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
CANARY = "The vault holds canary 90210 of the northern archive"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def nodes_of(place, **more):
    made = []
    for name in ("bank", "clinic"):
        rows = [{"input_text": f"{CANARY}? {n}", "target_text": f"{name} {n % 5}."} for n in range(12)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {key: value / name if key in ("folder", "state", "whole_model") else value for key, value in more.items()}
        made.append(Node(name=name, train=place / f"{name}.jsonl", **own))
    return made


def federation(output, rule="fedsa", count=2, **training):
    return Federation.model_validate(
        {
            "plan": {
                "base_model": "tiny",
                "lora": LORA,
                "data": {"max_length": 96},
                "training": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2} | training,
            },
            "rounds": {"count": count, "minimum_nodes": 2, "evaluate_every": 0, "retries": 0},
            "aggregation": {"rule": rule},
            "output": output,
        }
    )


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def windows(content):
    """Every 64 bytes that tell anything: what repeats a few bytes could stand anywhere."""
    parts = (content[at : at + 64] for at in range(0, len(content) - 63, 64))
    return [part for part in parts if len(set(part)) > 16]


class Eye:
    """Whenever a node has sealed what it trains: what lies open in memory is the oracle of what the disk must not hold."""

    def __init__(self, disk):
        self.disk, self.looks, self.checkpoints = disk, 0, set()
        self.known, self.seen = {}, {}

    def look(self, place):
        # What libraries write of their own version and the plan's numbers is no secret; tensors and optimizers' states are.
        for path in files(place):
            if path.suffix in (".pt", ".pth", ".safetensors"):
                self.checkpoints.add(path.parent.name)
                self.learn(path.read_bytes())
        self.check()
        self.looks += 1

    def learn(self, content):
        self.known |= {int.from_bytes(window[:8], "little"): window for window in windows(content)}

    def check(self, *, again=False):
        """Every file that is new: at each of its bytes the eight that begin there, against those that begin what is known."""
        starts = np.array(list(self.known), np.uint64)
        for path in (path for folder in self.disk for path in files(folder)):
            about = path.stat()
            if not again and self.seen.get(path) == (about.st_mtime_ns, about.st_size):
                continue
            self.seen[path] = about.st_mtime_ns, about.st_size
            content = path.read_bytes()
            assert b'"dtype"' not in content, path  # a header of safetensors
            assert CANARY.encode() not in content, path
            for offset in range(8):
                words = np.frombuffer(content[offset : len(content) - (len(content) - offset) % 8], np.uint64)
                for hit in words[np.isin(words, starts)]:
                    assert self.known[int(hit)] not in content, path


@pytest.fixture
def eye(tmp_path, monkeypatch):
    """Temporary files of libraries are looked through as well."""
    disk = [tmp_path / "kept", tmp_path / "tmp"]
    for folder in disk:
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    seeing, keep = Eye(disk), SealedFolder.keep

    def kept(self):
        keep(self)
        seeing.look(self.place)

    monkeypatch.setattr(SealedFolder, "keep", kept)
    return seeing


def test_nothing_that_a_node_keeps_shows_a_tensor_or_a_row(tmp_path, eye):
    """Looked at after every checkpoint and at the end: own factors, codecs' debts, checkpoints with optimizer, curve, card."""
    make_key_file(tmp_path / "key")
    nodes = nodes_of(tmp_path, vault=tmp_path / "key", folder=tmp_path / "kept" / "f", state=tmp_path / "kept" / "s")
    outcome = federate(federation(tmp_path / "out", save_steps=1), nodes)
    assert len(outcome.rounds) == 2
    assert eye.looks >= 2 * 2 * 3  # nodes, rounds, two checkpoints and the end
    assert {"checkpoint-1", "checkpoint-2"} <= eye.checkpoints
    assert len(eye.known) > 1000
    # The nodes' own B, as it is in memory, is read back with the key and with nothing else.
    memories = [path for path in files(tmp_path / "kept" / "s") if path.name.startswith("personal")]
    assert len(memories) == 2
    vault = Vault.at(tmp_path / "key")
    own = vault.read(memories[0], identity_of(memories[0]))
    eye.learn(own[2000:])
    eye.check(again=True)
    for path in files(tmp_path / "kept"):
        assert is_sealed(path), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    names = {path.name for path in files(tmp_path / "kept" / "f" / "bank")}
    assert {"checkpoint-2.sealed", "history.jsonl.sealed", "training.json.sealed", "data-card.json.sealed"} <= names
    assert sum(path.stat().st_size for path in files(tmp_path / "tmp")) == 0  # an empty lock


def test_without_a_vault_only_its_owner_may_look_and_a_round_that_is_trained_is_wiped_where_that_is_wished(tmp_path):
    nodes = nodes_of(tmp_path, folder=tmp_path / "kept" / "f", state=tmp_path / "kept" / "s")
    nodes[1] = nodes[1].model_copy(update={"wipe": True})
    output = tmp_path / "out" / "run"
    federate(federation(output, count=1, save_steps=1), nodes)
    bank, clinic = (tmp_path / "kept" / "f" / name / "federation" for name in ("bank", "clinic"))
    assert {"checkpoint-1", "checkpoint-2", "history.jsonl"} <= {path.name for path in (bank / "round-0001").iterdir()}
    assert [path.name for path in clinic.iterdir()] == ["data-card.json"]
    for top in (tmp_path / "kept", output):
        for path in (top, *top.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_training_goes_on_from_sealed_checkpoints_to_the_same_bit(tmp_path):
    """The oracle is a training that nobody interrupted, without a vault."""
    rows = [Conversation(({"role": "user", "content": f"Room {n}?"},), f"It is {n % 5}.") for n in range(12)]
    plan = federation(tmp_path).plan
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"max_steps": 3, "save_steps": 1})})
    base, safe = find("tiny"), Safe(Vault(KEY), {"federation": "f", "round": 1})
    wanted = fit(plan, base, rows).adapter.digest()
    assert fit(plan, base, rows, folder=tmp_path / "kept", safe=safe).adapter.digest() == wanted
    (tmp_path / "kept" / "checkpoint-3.sealed").unlink()  # it died in the third step
    assert fit(plan, base, rows, folder=tmp_path / "kept", safe=safe).adapter.digest() == wanted
    for other in (Safe(Vault(bytes(32)), safe.what), Safe(safe.vault, {"federation": "f", "round": 2})):
        with pytest.raises(VaultError):
            fit(plan, base, rows, folder=tmp_path / "kept", safe=other)


def test_a_whole_model_is_sealed_and_opens_as_transformers_wrote_it(tmp_path):
    rows = [Conversation(({"role": "user", "content": f"Room {n}?"},), f"It is {n % 5}.") for n in range(8)]
    plan = Plan.model_validate(
        {"base_model": "tiny", "method": "full", "data": {"max_length": 48}, "training": {"max_steps": 1}}
    )
    fit(plan, find("tiny"), rows, whole=tmp_path / "model", safe=Safe(Vault(KEY), {"federation": "f", "round": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["model.sealed"]
    assert b'"dtype"' not in (tmp_path / "model.sealed").read_bytes()
    Vault(KEY).unpack(tmp_path / "model.sealed", tmp_path, {"kind": "whole-model", "federation": "f", "round": 1})
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "model").iterdir()}


# The node's memory ----------------------------------------------------------------------------------------------------------


def remembering(folder, key=KEY, state=None, federation="f"):
    return Memory(RecordDict() if state is None else state, federation, folder, key and Vault(key))


def test_a_memory_is_read_with_its_key_and_as_what_it_is(tmp_path):
    arrays = {"own": np.arange(600, dtype=np.float32), "round": np.array(3)}
    remembering(tmp_path).keep("personal", arrays)
    found = remembering(tmp_path).read("personal")
    assert {name: array.tolist() for name, array in found.items()} == {name: array.tolist() for name, array in arrays.items()}
    (path,) = files(tmp_path)
    assert arrays["own"].tobytes()[:64] not in path.read_bytes()
    for key, why in ((bytes(32), "does not open"), (None, "names no vault")):
        with pytest.raises(VaultError, match=why):
            remembering(tmp_path, key).read("personal")
    remembering(tmp_path).keep("other", arrays)
    other = next(each for each in files(tmp_path) if each != path)
    other.write_bytes(path.read_bytes())
    with pytest.raises(VaultError, match="expected"):
        remembering(tmp_path).read("other")
    remembering(tmp_path / "plain", None).keep("personal", arrays)
    with pytest.raises(VaultError, match="is not sealed, and this node has a vault"):
        remembering(tmp_path / "plain").read("personal")


def test_an_older_memory_that_is_put_back_is_found_out_while_the_supernode_runs(tmp_path):
    state = RecordDict()
    memory = remembering(tmp_path, state=state)
    memory.keep("issued", {"issued": np.array(1)})
    (path,) = files(tmp_path)
    first = path.read_bytes()
    memory.keep("issued", {"issued": np.array(2)})
    path.write_bytes(first)
    with pytest.raises(VaultError, match="is number 1 of its name, and number 2 was kept here"):
        remembering(tmp_path, state=state).read("issued")
    assert int(remembering(tmp_path).read("issued")["issued"]) == 1  # a SuperNode that began anew cannot know


# The coordinator ------------------------------------------------------------------------------------------------------------


def sealed_federation(folder, **changes):
    if not (folder / "key").exists():
        make_key_file(folder / "key")
    return drawn_nodes.federation(folder / "run", 1, at_rest={"vault": str(folder / "key")}, **changes)


def test_a_coordinator_s_rounds_are_sealed_and_a_run_that_died_goes_on_with_the_key(tmp_path):
    wanted = run(drawn_nodes.Scripted(drawn_nodes.make_app(), 5), drawn_nodes.federation(tmp_path / "open", 1))

    class KilledError(Exception):
        pass

    def die(record):
        if record.round == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(drawn_nodes.Scripted(drawn_nodes.make_app(), 5), sealed_federation(tmp_path), watch=die)
    tensor = wanted.adapter.factors["layers.0.q"].A.tobytes()
    for path in files(tmp_path / "run"):
        assert b'"dtype"' not in path.read_bytes(), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [path.name for path in sorted((tmp_path / "run" / "rounds" / "0003").iterdir())] == [
        "checksums.json",
        "round.sealed",
    ]
    assert not (tmp_path / "run" / "adapter").exists()
    assert resumable(tmp_path / "run")[0] == 3

    (tmp_path / "key").rename(tmp_path / "away")
    with pytest.raises(VaultError, match="no readable key"):
        resumable(tmp_path / "run")
    make_key_file(tmp_path / "key")
    with pytest.raises(VaultError, match="sealed with another key"):
        run(drawn_nodes.Scripted(drawn_nodes.make_app(), 5), sealed_federation(tmp_path))
    assert not (tmp_path / "run" / "damaged").exists()
    (tmp_path / "key").unlink()
    (tmp_path / "away").rename(tmp_path / "key")

    found = run(drawn_nodes.Scripted(drawn_nodes.make_app(), 5), sealed_federation(tmp_path))
    assert found.adapter.digest() == wanted.adapter.digest()
    assert not any(tensor[:64] in path.read_bytes() for path in files(tmp_path / "run"))
    exported = CliRunner().invoke(app, ["coordinator", "export", str(tmp_path / "run"), str(tmp_path / "adapter")])
    assert exported.exit_code == 0, exported.output
    assert read_adapter(tmp_path / "adapter")[0].digest() == wanted.adapter.digest()
    assert verify(tmp_path / "run" / "audit.jsonl").lines > 10
    assert read_audit(tmp_path / "run" / "audit.jsonl")[-1].event == "exported"


def test_a_round_that_is_put_in_another_s_place_is_refused(tmp_path):
    run(drawn_nodes.Scripted(drawn_nodes.make_app(), 5), sealed_federation(tmp_path, rounds={"count": 2}))
    one, two = (tmp_path / "run" / "rounds" / number for number in ("0001", "0002"))
    for name in ("checksums.json", "round.sealed"):
        (two / name).write_bytes((one / name).read_bytes())
    with pytest.raises(VaultError, match="round 1; expected kind round, round 2"):
        export(tmp_path / "run", tmp_path / "adapter", vault=Vault.at(tmp_path / "key"))
    assert not (tmp_path / "adapter").exists()


# Folders and wiping ---------------------------------------------------------------------------------------------------------


def test_a_sealed_folder_follows_what_changes_and_what_goes(tmp_path):
    what = {"federation": "f"}
    with sealed_folder(tmp_path / "kept", Vault(KEY), what) as opened:
        (opened.place / "checkpoint-1").mkdir()
        (opened.place / "checkpoint-1" / "checkpoint-1").write_text("same name")
        (opened.place / "log").write_text("1")
        opened.keep()
        before = (tmp_path / "kept" / "checkpoint-1.sealed").read_bytes()
        (opened.place / "log").write_text("12")
    assert (tmp_path / "kept" / "checkpoint-1.sealed").read_bytes() == before  # nothing new in it
    with sealed_folder(tmp_path / "kept", Vault(KEY), what) as opened:
        assert (opened.place / "checkpoint-1" / "checkpoint-1").read_text() == "same name"
        assert (opened.place / "log").read_text() == "12"
        (opened.place / "log").unlink()
        place = opened.place
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["checkpoint-1.sealed"]
    assert not place.exists()


def test_what_a_killed_process_left_in_memory_is_swept_away_by_the_next():
    code = (
        "import os; from protocol.sealed_folder import folder_in_memory as f\nwith f() as p: print(p, flush=True); os._exit(9)"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    assert Path(left).is_dir()
    with folder_in_memory() as place:
        assert not Path(left).exists()
        with folder_in_memory():
            assert place.is_dir()  # of one that is alive nothing is swept


def test_a_wipe_overwrites_before_it_removes_and_follows_no_link(tmp_path):
    """Seen through a file that is still open: its blocks hold none of what was there."""
    (tmp_path / "outside").write_text("stays")
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "weights").write_bytes(b"SECRET" * 500_000)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    seen = []
    os_ftruncate = os.ftruncate

    def before_it_is_cut(handle, length):
        seen.append(Path(f"/proc/self/fd/{handle}").read_bytes())
        os_ftruncate(handle, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "ftruncate", before_it_is_cut)
        assert wipe(tmp_path / "run") == 1
    assert [len(content) for content in seen] == [3_000_000]
    assert b"SECRET" not in seen[0]
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "outside").read_text() == "stays"


def test_folders_are_sealed_opened_and_wiped_by_hand(tmp_path, monkeypatch):
    def call(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    monkeypatch.setenv("WORDS", "four words or so")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    assert call("vault", "keygen", tmp_path / "key").exit_code == 0
    assert call("vault", "seal", tmp_path / "adapter", "--key", tmp_path / "key").exit_code == 0
    assert json.loads(call("vault", "show", tmp_path / "adapter.sealed").output) == {"kind": "folder", "name": "adapter"}
    assert call("node", "wipe", tmp_path / "adapter", "--yes").exit_code == 0
    assert not (tmp_path / "adapter").exists()
    assert call("vault", "open", tmp_path / "adapter.sealed", "--key", tmp_path / "key", "--to", tmp_path).exit_code == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"x" * 1000
    again = call("vault", "open", tmp_path / "adapter.sealed", "--key", tmp_path / "key", "--to", tmp_path)
    assert isinstance(again.exception, VaultError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.sealed", "key"]


def test_a_key_that_would_be_sealed_with_itself_is_refused(tmp_path):
    """A wipe of the folder afterwards would have taken the only key with it."""
    folder = tmp_path / "run"
    folder.mkdir()
    make_key_file(folder / "key")
    make_key_file(tmp_path / "other")
    for words in (["--key", folder / "key"], ["--key", tmp_path / "other", "--to", folder / "run.sealed"]):
        found = CliRunner().invoke(app, ["vault", "seal", str(folder), *map(str, words)])
        assert isinstance(found.exception, VaultError)
    assert [path.name for path in folder.iterdir()] == ["key"]
    assert not (tmp_path / "run.sealed").exists()
