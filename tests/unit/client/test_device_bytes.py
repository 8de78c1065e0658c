"""The bytes that a device spends: counted over restarts for thirty days, held against its limit before anything is trained."""

import json

import pytest
from flwr.app import Message, MessageType, RecordDict

from client import device
from client.app import app
from client.device_bytes import DAYS, DeviceBytes, clock, message_bytes, update_bytes
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.codec import CODED
from protocol.errors import ConfigurationError, DataError, NotNowError
from protocol.plan import Plan
from protocol.records import Call, Received, call_records, update_records
from simulations.grid import InProcessGrid

DAY = 86_400
PLAN = Plan.model_validate(
    {
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"max_length": 64},
        "training": {
            "learning_rate": 1e-2,
            "batch_size": 2,
            "max_steps": 1,
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant",
        },
    }
)


@pytest.fixture
def node(trainable_bundle, tmp_path):
    """A device with rows of its own and a limit that nothing here reaches."""
    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"Room {n}."} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle, key = trainable_bundle
    own = {"train": tmp_path / "rows.jsonl", "state": tmp_path / "state"}
    return Node(name="phone", device=bundle, device_key=key, device_bytes=10**9, trial=False, device_battery=0, **own)


@pytest.fixture
def at():
    """Sets a node's clock, in days."""
    before = clock.set(lambda: 0.0)
    yield lambda day: clock.set(lambda: day * DAY)
    clock.reset(before)


def limited(node, most):
    return node.model_copy(update={"device_bytes": most})


def bytes_of(node):
    """As after a restart: nothing is left but the folder."""
    return DeviceBytes(node, RecordDict())


def asked(node, kind, number=1, **more):
    """The reply of the real ClientApp, and the bytes of the message."""
    call = Call(federation="f", round=number, rounds=3, plan=PLAN, r=4, **more)
    config = {
        key.replace("_", "-"): value if isinstance(value, int | float | str) else str(value)
        for key, value in node.model_dump(exclude_none=True, exclude={"tasks"}).items()
    }
    grid = InProcessGrid(app, [config])
    message = Message(call_records(call), dst_node_id=1, message_type=kind)
    return grid.answer(message), message_bytes(message.content)


def test_what_is_spent_outlives_restarts_and_counts_for_thirty_days(node, at):
    at(100)
    bytes_of(node).count(70)
    bytes_of(node).count(7)
    at(100 + DAYS - 1)
    bytes_of(node).count(1)
    assert bytes_of(node).spent() == 78
    at(100 + DAYS)
    assert bytes_of(node).spent() == 1
    at(90)  # a clock that was set back forgives nothing
    assert bytes_of(node).spent() == 78


def test_a_round_costs_its_message_and_its_update_and_joining_nothing(node):
    reply, _ = asked(node, MessageType.QUERY, 0)
    assert not reply.has_error()
    assert bytes_of(node).spent() == 0
    reply, down = asked(node, MessageType.TRAIN)
    assert bytes_of(node).spent() == down + message_bytes(reply.content)


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY])
def test_a_device_whose_bytes_are_spent_refuses_before_it_does_anything(node, kind, monkeypatch, caplog):
    """Work that began would raise; the figures stay in the node's own log, and a code leaves."""
    for work in ("join", "train", "evaluate"):
        monkeypatch.setattr(device, work, lambda *_, **__: pytest.fail("it began"))
    bytes_of(node).count(5000)
    reply, down = asked(limited(node, 4000), kind)
    assert reply.error.reason == NotNowError.code
    down *= kind != MessageType.QUERY
    assert f"{5000 + down} of 4000 bytes" in caplog.text
    assert bytes_of(node).spent() == 5000 + down, "what arrived has cost its bytes"


def test_an_update_for_which_no_bytes_are_left_is_not_trained(node, monkeypatch):
    monkeypatch.setattr(device, "train", lambda *_: pytest.fail("it began"))
    wanted = update_bytes(Call(federation="f", round=1, rounds=3, plan=PLAN, r=4), node)
    reply, down = asked(limited(node, wanted), MessageType.TRAIN)
    assert reply.error.reason == NotNowError.code
    monkeypatch.undo()
    bytes_of(node).forget()
    reply, again = asked(limited(node, wanted + down), MessageType.TRAIN)
    assert (again, reply.has_error()) == (down, False)
    assert bytes_of(node).spent() <= wanted + down


@pytest.mark.parametrize("wire", ["fp32", "fp16", *CODED])
def test_what_an_update_takes_is_known_before_it_is_trained(node, wire):
    """Never less than it takes; at most a quarter more, but for top-k, whose first update has nothing to leave out."""
    call = Call(federation="f", round=1, rounds=3, plan=PLAN, r=4, wire=wire)
    received = Received(call, Adapter())
    done = device.train(received, node, Memory(RecordDict(), "f", None))
    taken = message_bytes(update_records(done.update, wire, done.metrics, received.trained()))
    assert taken <= update_bytes(call, node)
    assert wire == "top-k" or update_bytes(call, node) < 1.25 * taken


def test_without_a_limit_nothing_is_counted_or_written(node):
    free = node.model_copy(update={"device_bytes": None})
    assert not asked(free, MessageType.TRAIN)[0].has_error()
    assert bytes_of(free).spent() == 0
    assert not [each for each in node.state.rglob("*") if each.is_file()]


@pytest.mark.parametrize(("key", "said"), [("state", "outlives restarts"), ("device", "limit of a device")])
def test_a_limit_that_could_not_be_kept_is_refused(node, key, said):
    lacking = node.model_copy(update={key: None})
    with pytest.raises(ConfigurationError, match=said):
        bytes_of(lacking)
    if key == "state":
        assert asked(lacking, MessageType.TRAIN)[0].error.reason == ConfigurationError.code


def test_a_count_that_was_changed_is_refused(node):
    bytes_of(node).count(5)
    (file,) = node.state.rglob("*.arrays")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        bytes_of(node).spent()
    assert asked(node, MessageType.TRAIN)[0].error.reason == DataError.code
