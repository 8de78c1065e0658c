"""What a folder's events add up to, after crashes and repeats."""

import json
import math
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fedge
from protocol.errors import DataError, FederationError, shown
from server.events import Event, EventLog, read_events
from server.story import middle, read_story


def log(folder):
    made = EventLog(folder)
    folder.mkdir(exist_ok=True)
    made.open()
    return made


def test_events_wait_until_there_is_a_folder_and_then_stand_in_order(tmp_path):
    made = EventLog(tmp_path / "run")
    made.note("joined", 0, node="bank")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    made.open()
    made.note("round", 1, accepted=["bank"])
    assert [event.event for event in read_events(tmp_path / "run")] == ["joined", "round"]


def test_a_line_that_a_crash_has_cut_is_left_out_and_a_damaged_one_is_told(tmp_path):
    log(tmp_path).note("joined", 0, node="bank")
    file = tmp_path / "events.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"event": "rou')
    assert len(list(read_events(tmp_path))) == 1
    file.write_text("{}\n" + whole)
    with pytest.raises(DataError, match="line 1 is not an event"):
        list(read_events(tmp_path))


@pytest.mark.parametrize("cut", [b'{"event": "rou', b"\0" * 100, b"\xff\xfe", b""])
def test_what_is_logged_after_a_crash_does_not_run_into_the_line_that_it_cut(tmp_path, cut):
    log(tmp_path).note("joined", 0, node="bank")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(cut)
    log(tmp_path).note("resumed", 3)
    assert [event.event for event in read_events(tmp_path)] == ["joined", "resumed"]


def test_a_log_that_the_disk_does_not_take_is_told_and_goes_on_where_there_is_room_again(tmp_path):
    made = log(tmp_path)
    made.note("joined", 0, node="bank")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "events.jsonl").stat().st_size + 10, before[1]))
    try:
        with pytest.raises(FederationError, match=r"the log cannot be written .* make room, then start the same federation"):
            made.note("round", 1, accepted=["bank"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(tmp_path).note("resumed", 1)
    assert [event.event for event in read_events(tmp_path)] == ["joined", "resumed"]


def test_numbers_that_json_does_not_know_are_logged_as_none(tmp_path):
    log(tmp_path).note("round", 1, merge={"effective_rank": math.nan, "discarded_energy": 0.5})
    line = (tmp_path / "events.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["merge"] == {"effective_rank": None, "discarded_energy": 0.5}


ROUND = {"event": "round", "round": 1, "accepted": ["a"], "evaluation": {"a": {"loss": 1.0}}, "bytes_sent": 1, "seconds": 1.0}
WRONG = [
    {"round": None},
    {"round": "x"},
    {"round": [1]},
    {"round": -1},
    {"round": 2**70},
    {"round": math.nan},
    {"event": ["round"]},
    {"event": None},
    {"adapter": 3},
    {"adapter": None},
    {"node": [1]},
    {"reason": 0.5},
    {"members": 3},
    {"members": [3]},
    {"accepted": 3},
    {"accepted": [{}]},
    {"refused": ["x"]},
    {"refused": {"a": 1}},
    {"evaluation": None},
    {"evaluation": [1]},
    {"evaluation": {"a": "x"}},
    {"evaluation": {"a": {"loss": "x"}}},
    {"evaluation": {"a": {"loss": None}}},
    {"evaluation": {"a": {"loss": math.inf}}},
    {"merge": [1]},
    {"seconds": "x"},
    {"bytes_sent": "x"},
    {"bytes_sent": math.inf},
]


@pytest.mark.parametrize("facts", WRONG, ids=str)
def test_a_line_whose_facts_are_of_another_kind_is_no_event(tmp_path, facts):
    (tmp_path / "events.jsonl").write_text(json.dumps(ROUND | facts) + "\n" + json.dumps(ROUND) + "\n")
    with pytest.raises(DataError, match="line 1 is not an event"):
        read_story(tmp_path)


BYTES = [
    b"\xff\xfe\x00\x80garbage",
    b"[" * 100_000,
    b'{"event":"round","merge":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    b'{"event":"round","round":' + b"9" * 5000 + b"}",
    b'{"event":"round","round":1e400}',
    b'{"event":"joined","node":"\\ud800"}',
    b"\0" * 4096,
    b"",
    b'{"event":"x","refused":{"\\u001b[2J":1}}',
]


@pytest.mark.parametrize("line", BYTES, ids=lambda line: str(line[:30]))
def test_bytes_that_are_no_event_are_told_with_their_line_and_nothing_of_them_reaches_the_terminal(tmp_path, line):
    (tmp_path / "events.jsonl").write_bytes(json.dumps(ROUND).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="line 2 is not an event") as caught:
        read_story(tmp_path)
    assert str(caught.value).isprintable()


@given(
    st.dictionaries(
        st.sampled_from(sorted(Event.model_fields)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        ),
        max_size=2,
    )
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_line_says_the_story_is_told_or_the_line_is_refused(facts):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "events.jsonl").write_text(json.dumps(ROUND | facts) + "\n")
        for kind in ("status", "rounds"):
            found = CliRunner().invoke(fedge.app, ["coordinator", kind, folder])
            assert found.exception is None or isinstance(found.exception, DataError)


def test_a_folder_without_events_is_told_what_to_name():
    with pytest.raises(DataError, match="name the output folder of a federation"):
        read_story(__import__("pathlib").Path("nowhere"))


def test_rounds_that_were_done_again_count_as_they_were_done_last(tmp_path):
    made = log(tmp_path)
    made.note("joined", 0, node="bank", adapter="", method="lora", precision="fp32", r=8)
    made.note("left-out", 0, node="clinic", reason="another base")
    made.note("left-out", 0, node="bank", reason="it was mended, and joined then")
    made.note("joined", 0, node="bank", adapter="", method="lora", precision="fp32", r=8)
    made.note("round", 1, adapter="", accepted=["bank"], refused={"law": "norm"}, bytes_sent=10, bytes_received=5, seconds=1.0)
    made.note("round", 2, adapter="", accepted=["bank"], bytes_sent=100)
    made.note("damaged", 1, what="round 2 is damaged")
    made.note("resumed", 1)
    made.note("round", 2, adapter="", accepted=["bank"], bytes_sent=20, evaluation={"bank": {"loss": 2.0, "num-examples": 4}})
    made.note("ended", 2, reason="every round is done")
    story = read_story(tmp_path)
    assert [event.round for event in story.rounds] == [1, 2]
    assert story.nodes["bank"] == {"adapter": "", "method": "lora", "precision": "fp32", "r": 8, "accepted": 2}
    summary = story.summary()
    assert (summary["state"], summary["bytes_sent"], summary["bytes_received"]) == ("every round is done", 30, 5)
    assert summary["refused"] == {"law": "round 1: norm"}
    assert summary["left_out"] == {"clinic": "another base"}
    assert middle(story.rounds[1], "loss") == 2.0
    assert summary["troubles"] == ["round 1: damaged: round 2 is damaged"]
    assert story.metrics() == ["loss"]
    json.dumps(summary)


def test_one_node_does_not_decide_what_a_round_is_said_to_have_reached(tmp_path):
    """Oracle: the middle of five."""
    told = {f"node-{at}": {"accuracy": value} for at, value in enumerate([0.5, 0.6, 1e30, 0.4, 0.7])}
    log(tmp_path).note("round", 1, evaluation=told)
    (event,) = read_story(tmp_path).rounds
    assert middle(event, "accuracy") == 0.6
    assert middle(event, "loss") is None


def test_a_split_that_is_noted_again_after_a_crash_was_one(tmp_path):
    made = log(tmp_path)
    for _ in range(2):
        made.note("split", 3, adapter="part-1", members=["bank", "clinic"])
    assert read_story(tmp_path).troubles == ["round 3: split: bank, clinic"]


HOSTILE = ["bank [/]", "[red]bank[/red] :warning:", "\x1b[2J\x1b]0;owned\x07", "\u202egnp", "[/b]"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verb", ["status", "rounds", "watch"])
def test_what_nodes_call_themselves_and_their_metrics_is_shown_as_it_is(tmp_path, monkeypatch, verb, name):
    """Rich reads brackets as its markup, terminals read escapes: neither may leave the text of a node."""
    monkeypatch.setenv("COLUMNS", "300")
    made = log(tmp_path)
    made.note("joined", 0, node=name, adapter="", method="lora", precision="fp32", r=8)
    made.note("round", 1, adapter=name, accepted=[name], refused={name: f"A|{name}"}, evaluation={name: {name: 1.0}})
    made.note("ended", 1, reason=f"every round is done {name}")
    found = CliRunner().invoke(fedge.app, ["coordinator", verb, str(tmp_path)])
    assert found.exception is None
    assert shown(name) in found.output
    assert not set(found.output) & {"\x1b", "\x07", "\u202e"}


def test_figures_go_to_tensorboard_under_names_of_their_own(tmp_path):
    """Oracle: TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = EventLog(tmp_path, tensorboard=True)
    made.open()
    for number in (1, 2):
        made.figures(number, {"evaluation/bank/loss": 3.0 - number})
    made.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("evaluation/bank/loss")] == [(1, 2.0), (2, 1.0)]
