"""Pickles stay what they are, bytes, wherever something from outside is read: none runs, and each place says what is wrong.

A pickle that is loaded makes a file. It is put where a coordinator's message, a node's reply, an adapter, a base, a bundle, a
checkpoint, a round that was kept or a node's memory is read; what reads it is the code that reads the real ones. Checkpoints
are a machine's own and need ``torch.load``; it is told to make tensors and nothing else (``weights_only``), here and in
transformers.
"""

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_nodes import Scripted, federation, make_app
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from client.app import app
from client.memory import Memory
from edge.runtime.verify import verified
from protocol.configuration import load
from protocol.errors import FedgeError
from protocol.federation import Federation
from protocol.files import CONFIG, WEIGHTS, read_adapter
from protocol.plan import Plan
from protocol.records import Call, call_records, read_call, read_vector
from protocol.signature import make_key
from server.ledger import Ledger, _seal
from server.rounds import run
from simulations.grid import InProcessGrid
from strategies.base_model import find, load_tokenizer
from strategies.data.formats import Conversation
from strategies.data.formats import load as load_rows
from strategies.training import fit

PLAN = Plan.model_validate(
    {
        "base_model": "tiny",
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"max_length": 32},
        "training": {"batch_size": 2, "max_steps": 2, "save_steps": 1},
    }
)


class Bomb:
    """Loaded, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class Place:
    """Where one payload goes."""

    def __init__(self, folder):
        self.folder, self.marker = folder, folder / "it-has-run"
        self.bomb = pickle.dumps(Bomb(self.marker))

    def objects(self):
        """A ``.npy`` file of objects."""
        file = io.BytesIO()
        np.save(file, np.array([[Bomb(self.marker)]], dtype=object), allow_pickle=True)
        return file.getvalue()

    def archive(self):
        """An ``.npz`` archive of one."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("arr_0.npy", self.objects())
        return file.getvalue()

    def torch_file(self, path):
        torch.save({"weight": Bomb(self.marker)}, path)


# A coordinator's message at a node ----------------------------------------------------------------------------------------


def at_a_node(place, **edit):
    rows = place.folder / "rows.jsonl"
    rows.write_text(json.dumps({"input_text": "Where?", "target_text": "Here."}) + "\n")
    InProcessGrid(app, [])
    context = Context(run_id=1, node_id=1, node_config={"train": str(rows)}, state=RecordDict(), run_config={})
    records = call_records(Call(federation="f", round=1, rounds=1, plan=PLAN, r=4, digest="ab" * 32))
    for key, record in edit.items():
        records["fedge" if key == "config" else key] = record
    reply = app(Message(records, dst_node_id=1, message_type=MessageType.TRAIN), context)
    assert reply.error.reason == "message"
    read_call(records)  # which says more than a code


def factor(data, stype="numpy.ndarray", dtype="float32"):
    return ArrayRecord({"A|q": Array(dtype=dtype, shape=(1, 1), stype=stype, data=data)})


def call_with_objects(place):
    at_a_node(place, adapter=factor(place.objects(), dtype="object"))


def call_with_a_bare_pickle(place):
    at_a_node(place, adapter=factor(place.bomb))


def call_with_an_archive(place):
    at_a_node(place, adapter=factor(place.archive()))


def call_with_another_type(place):
    at_a_node(place, adapter=factor(place.bomb, stype="pickle"))


def call_with_bytes_for_text(place):
    at_a_node(place, config=ConfigRecord({"json": place.bomb}))


def call_in_the_letters_of_yaml(place):
    at_a_node(place, config=ConfigRecord({"json": f"!!python/object/apply:pathlib.Path.touch [{place.marker}]"}))


# A node's reply at the coordinator ----------------------------------------------------------------------------------------


def update_with_objects(place):
    def forge(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == 1:
            name = next(iter(reply.content["adapter"]))
            reply.content["adapter"][name] = Array(dtype="object", shape=(1, 1), stype="numpy.ndarray", data=place.objects())
        return reply

    rounds = {"count": 1, "cohort": None, "over_selection": 0.0, "wire_down": "fp32"}
    outcome = run(Scripted(make_app(), 4, edit=forge), federation(place.folder / "runs", 0, rounds=rounds))
    assert sorted(outcome.rounds[0].accepted) == ["node-2", "node-3", "node-4"]
    raise FedgeError(outcome.rounds[0].refused["node-1"])


def masked_vector_of_objects(place):
    record = ArrayRecord({"vector": Array(dtype="uint32", shape=(1,), stype="numpy.ndarray", data=place.objects())})
    read_vector(RecordDict({"vector": record}), 1)


# Files from elsewhere -----------------------------------------------------------------------------------------------------


def adapter_folder(place):
    folder = place.folder / "adapter"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps(about))
    return folder


def adapter_as_torch_wrote_it(place):
    folder = adapter_folder(place)
    place.torch_file(folder / "adapter_model.bin")
    read_adapter(folder)


def adapter_with_a_header_of_it(place):
    folder = adapter_folder(place)
    (folder / WEIGHTS).write_bytes(len(place.bomb).to_bytes(8, "little") + place.bomb)
    read_adapter(folder)


def start_of_a_federation(place):
    folder = adapter_folder(place)
    place.torch_file(folder / "adapter_model.bin")
    content = federation(place.folder / "runs", 0).model_dump() | {"start": folder}
    run(Scripted(make_app(), 4), Federation.model_validate(content))


def copied_base(place):
    folder = place.folder / "base"
    shutil.copytree(find("tiny").folder, folder, copy_function=shutil.copyfile)
    return folder


def weights_of_a_base(place):
    folder = copied_base(place)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    place.torch_file(folder / "pytorch_model.bin")
    find(str(folder))


def tokenizer_of_a_base(place):
    folder = copied_base(place)
    (folder / "tokenizer.json").write_bytes(place.bomb)
    load_tokenizer(find(str(folder)))


def settings_with_a_tag(place):
    path = place.folder / "federation.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch ['{place.marker}']\n")
    load(path, Federation)


def bundle(place):
    folder = place.folder / "bundle"
    folder.mkdir()
    for name in ("manifest.json", "manifest.json.sig"):
        (folder / name).write_bytes(place.bomb)
    verified(folder, [make_key().public_key()])


def rows(place):
    path = place.folder / "rows.parquet"
    path.write_bytes(place.bomb)
    load_rows(path, PLAN)


# What a machine has kept itself --------------------------------------------------------------------------------------------


def resumed(place, name):
    """A checkpoint in which a file was exchanged and the seal made anew: not even that makes it run."""
    folder, some = place.folder / "kept", [Conversation(({"role": "user", "content": f"{n}?"},), f"{n}.") for n in range(4)]
    fit(PLAN, find("tiny"), some, folder=folder)
    shutil.rmtree(folder / "checkpoint-2")
    seal = folder / "checkpoint-1" / "sealed.json"
    place.torch_file(seal.with_name(name))
    facts = json.loads(seal.read_text())
    facts["files"][name] = hashlib.sha256(seal.with_name(name).read_bytes()).hexdigest()
    seal.write_text(json.dumps(facts))
    fit(PLAN, find("tiny"), some, folder=folder)


def checkpoint_weights(place):
    resumed(place, "trained.pt")


def checkpoint_optimizer(place):
    resumed(place, "optimizer.pt")


def round_of_a_ledger(place):
    settings = federation(place.folder / "runs", 0, rounds={"count": 1})
    run(Scripted(make_app(), 5), settings)
    (settings.output / "ended.json").unlink()
    newest = settings.output / "rounds" / "0001"
    arrays = next(path for path in newest.iterdir() if path.suffix == ".safetensors" and "adapter" not in path.name)
    arrays.write_bytes(place.bomb)
    _seal(newest)
    found = Ledger(settings.output, identity=settings.identity()).newest()
    assert found.checkpoint is None
    raise FedgeError(*found.told())


def memory_of_a_node(place):
    memory = Memory(RecordDict(), "f", place.folder / "memory")
    memory.keep("starts", {"a": np.zeros(1)})
    (path,) = (place.folder / "memory").rglob("*.arrays")
    path.write_bytes(hashlib.sha256(place.bomb).digest() + place.bomb)
    memory.read("starts")


PLACES = {
    call_with_objects: "not a tensor",
    call_with_a_bare_pickle: "not a tensor",
    call_with_an_archive: "not a tensor",
    call_with_another_type: "not a tensor",
    call_with_bytes_for_text: "no text under 'fedge'",
    call_in_the_letters_of_yaml: "not a Version: json",
    update_with_objects: "not a tensor",
    masked_vector_of_objects: "not a tensor",
    adapter_as_torch_wrote_it: "no such file; expected a folder with adapter_model.safetensors",
    adapter_with_a_header_of_it: "not a safetensors file",
    start_of_a_federation: "no such file; expected a folder with adapter_model.safetensors",
    weights_of_a_base: "holds no model; expected",
    tokenizer_of_a_base: "no tokenizer that can be read",
    settings_with_a_tag: "could not determine a constructor",
    bundle: "bundle",
    rows: "not a readable Parquet file",
    checkpoint_weights: "holds no tensors",
    checkpoint_optimizer: "holds no tensors",
    round_of_a_ledger: "round 1 is damaged",
    memory_of_a_node: "not what this node writes",
}


def test_there_are_twenty_places():
    assert len(PLACES) == 20


def test_the_payload_does_run_where_somebody_loads_it(tmp_path):
    """Or nothing below would show anything."""
    place = Place(tmp_path)
    for loaded in (
        lambda: pickle.loads(place.bomb),  # noqa: S301 - it is ours
        lambda: np.load(io.BytesIO(place.objects()), allow_pickle=True),
        lambda: torch.load(tmp_path / "file.pt", weights_only=False),
    ):
        place.torch_file(tmp_path / "file.pt")
        loaded()
        assert place.marker.exists()
        place.marker.unlink()


@pytest.mark.parametrize("put", PLACES, ids=[each.__name__ for each in PLACES])
def test_a_pickle_does_not_run_and_is_refused(put, tmp_path):
    place = Place(tmp_path)
    with pytest.raises(FedgeError, match=PLACES[put]):
        put(place)
    assert not place.marker.exists()
