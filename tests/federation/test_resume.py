"""A coordinator that dies goes on where it was, and ends where it would have ended."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn_nodes import Scripted, federation, make_app
from flwr.app import Array, Message, MessageType, RecordDict

from protocol.errors import FederationError
from protocol.records import ARRAYS, METRICS, metric_record
from server.events import Event
from server.rounds import run
from server.story import read_story
from simulations.grid import InProcessGrid

PROGRAM = Path(__file__).with_name("drawn_nodes.py")
SECONDS = 0.02


def uninterrupted(folder, seed, **changes):
    return run(InProcessGrid(make_app(), [{}] * 5), federation(folder, seed, **changes))


def start(output, seed):
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(output), str(seed), str(SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def killed_and_restarted(output, seed, moments):
    """Kills the coordinator with SIGKILL at each of the moments (seconds after its start), then lets it end; its last words."""
    kills = 0
    for moment in moments:
        process = start(output, seed)
        assert process.stdout.readline() == "begun\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
        kills += process.returncode == -signal.SIGKILL
        if said:  # it was done before the kill
            return said.strip(), kills
    said, _ = start(output, seed).communicate(timeout=120)
    return said.split()[-1], kills


@pytest.mark.parametrize(("seed", "count"), [(0, 3), *(pytest.param(seed, 20, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_coordinator_killed_at_any_moment_ends_with_the_same_adapter_to_the_bit(tmp_path, seed, count):
    wanted = uninterrupted(tmp_path / "whole", seed).adapter.digest()
    drawn = random.Random(seed)
    kills = 0
    for at in range(count):
        digest, killed = killed_and_restarted(tmp_path / f"killed-{at}", seed, [drawn.uniform(0, 0.9), drawn.uniform(0, 0.5)])
        kills += killed
        assert digest == wanted
        assert not list((tmp_path / f"killed-{at}").rglob(".*")), "what a kill left half written is taken away"
        assert [event.round for event in read_story(tmp_path / f"killed-{at}").rounds] == [1, 2, 3, 4, 5, 6]
    assert kills >= count // 2, "most of the moments fell into the run"


def died_after(folder, rounds, **changes):
    """A run whose coordinator died after some rounds: its watch raises."""

    def die(record):
        if record.round == rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(InProcessGrid(make_app(), [{}] * 5), federation(folder, 0, **changes), die)


def test_a_run_goes_on_after_its_last_round_and_says_so(tmp_path):
    wanted = uninterrupted(tmp_path / "whole", 0)
    died_after(tmp_path / "run", 4)
    outcome = uninterrupted(tmp_path / "run", 0)
    assert [record.round for record in outcome.rounds] == [5, 6]
    assert outcome.adapter.digest() == wanted.adapter.digest()
    story = read_story(tmp_path / "run")
    assert [event.round for event in story.rounds] == [1, 2, 3, 4, 5, 6]
    assert story.ended == "every round is done"


def test_a_damaged_checkpoint_falls_back_to_the_last_good_one_and_says_so(tmp_path):
    wanted = uninterrupted(tmp_path / "whole", 0)
    died_after(tmp_path / "run", 4)
    weights = tmp_path / "run" / "rounds" / "0004" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    outcome = uninterrupted(tmp_path / "run", 0)
    assert [record.round for record in outcome.rounds] == [4, 5, 6]
    assert outcome.adapter.digest() == wanted.adapter.digest()
    (trouble,) = read_story(tmp_path / "run").troubles
    assert "round 4 is damaged" in trouble


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text(path.read_text()[:-99]), Path.touch])
def test_a_description_that_is_lost_or_cut_loses_no_round_and_is_written_again(tmp_path, damage):
    wanted = uninterrupted(tmp_path / "whole", 0)
    died_after(tmp_path / "run", 4)
    file = tmp_path / "run" / "federation.json"
    before = json.loads(file.read_text())
    damage(file)
    outcome = uninterrupted(tmp_path / "run", 0)
    assert [record.round for record in outcome.rounds] == [5, 6]
    assert outcome.adapter.digest() == wanted.adapter.digest()
    assert json.loads(file.read_text()) == before
    said = ["round 4: damaged: federation.json is missing or damaged; it is written again"] if damage is not Path.touch else []
    assert read_story(tmp_path / "run").troubles == said


def test_a_run_of_which_no_round_is_left_begins_anew_and_says_so(tmp_path):
    wanted = uninterrupted(tmp_path / "whole", 0)
    died_after(tmp_path / "run", 2)
    for number in (1, 2):
        (tmp_path / "run" / "rounds" / f"000{number}" / "checksums.json").write_text("null")
    outcome = uninterrupted(tmp_path / "run", 0)
    assert [record.round for record in outcome.rounds] == [1, 2, 3, 4, 5, 6]
    assert outcome.adapter.digest() == wanted.adapter.digest()
    assert [line.partition(" is damaged")[0] for line in read_story(tmp_path / "run").troubles] == [
        "round 0: damaged: round 2",
        "round 0: damaged: round 1",
    ]


@pytest.mark.parametrize("left", [0, 40], ids=["not begun", "cut"])
def test_a_round_that_was_kept_and_not_logged_any_more_is_told_of_when_the_run_goes_on(tmp_path, left):
    """The coordinator dies between the two, or within the second."""
    died_after(tmp_path / "run", 4)
    file = tmp_path / "run" / "events.jsonl"
    *lines, last = file.read_bytes().splitlines(keepends=True)
    assert json.loads(last)["event"] == "round"
    file.write_bytes(b"".join(lines) + last[:left])
    uninterrupted(tmp_path / "run", 0)
    story = read_story(tmp_path / "run")
    assert [event.round for event in story.rounds] == [1, 2, 3, 4, 5, 6]
    told = story.rounds[3].model_dump(exclude={"time"})
    assert told == Event.model_validate_json(last).model_dump(exclude={"time"})


RULES = ["product-delta", "fedadam", "norm-clipping", "agreement", "geometric-median", "hetlora", "fedex", "rolora"]


@pytest.mark.parametrize("rule", RULES)
def test_every_kind_of_rule_goes_on_to_the_same_bit(tmp_path, rule):
    changes = {"aggregation": {"rule": rule, "server_momentum": 0.0}}
    wanted = uninterrupted(tmp_path / "whole", 0, **changes)
    died_after(tmp_path / "run", 3, **changes)
    assert uninterrupted(tmp_path / "run", 0, **changes).adapter.digest() == wanted.adapter.digest()


def test_a_run_that_ended_begins_anew_and_keeps_the_old_one_aside(tmp_path):
    first = uninterrupted(tmp_path / "run", 0)
    again = uninterrupted(tmp_path / "run", 0)
    assert [record.round for record in again.rounds] == [1, 2, 3, 4, 5, 6]
    assert again.adapter.digest() == first.adapter.digest()
    assert (tmp_path / "run" / "before-1" / "rounds" / "0006").is_dir()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"aggregation": {"rank_cap": 5}}, r"other values of aggregation\.rank_cap\)"),
        ({"rounds": {"count": 9}, "plan": {"lora": {"r": 4}}}, r"other values of plan\.lora\.r, rounds\.count\)"),
    ],
)
def test_another_federation_does_not_touch_the_rounds_of_one_that_has_not_ended_and_says_what_differs(tmp_path, changes, named):
    died_after(tmp_path / "run", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FederationError, match=named):
        run(Scripted(make_app(), 5, edit=pytest.fail), federation(tmp_path / "run", 0, **changes))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_another_federation_begins_where_one_has_ended_and_says_where_its_rounds_are(tmp_path, caplog):
    uninterrupted(tmp_path / "run", 0)
    other = uninterrupted(tmp_path / "run", 0, aggregation={"rank_cap": 5})
    assert [record.round for record in other.rounds] == [1, 2, 3, 4, 5, 6]
    assert f"the rounds of the run before are now in {tmp_path / 'run' / 'before-1'}" in caplog.text


@pytest.mark.parametrize(("rule", "fewest"), [("agreement", 4), ("krum", 5), ("trimmed-mean", 4)])
def test_a_rule_that_sets_nobody_aside_of_so_few_says_so(tmp_path, caplog, rule, fewest):
    """Oracle: a third of the others, floor((n - 1) / 3), is none of three; krum needs 2f + 3 of f = 1 besides."""
    changes = {"aggregation": {"rule": rule, "server_momentum": 0}, "plan": {"lora": {"r": 8}}}
    for cohort in (fewest - 1, fewest):
        caplog.clear()
        rounds = {"count": 1, "cohort": cohort, "over_selection": 0}
        uninterrupted(tmp_path / str(cohort), 0, rounds=rounds, **changes)
        assert ("sets nobody aside" in caplog.text) == (cohort < fewest)


def test_a_longer_patience_or_another_budget_is_still_the_same_federation(tmp_path):
    died_after(tmp_path / "run", 3)
    outcome = uninterrupted(tmp_path / "run", 0, rounds={"timeout_seconds": 7, "retries": 5}, stop={"seconds": 1e6})
    assert [record.round for record in outcome.rounds] == [4, 5, 6]


def test_a_disk_that_is_full_ends_the_run_with_the_last_good_round(tmp_path, monkeypatch):
    wanted = uninterrupted(tmp_path / "whole", 0)

    def fill(record):
        if record.round == 2:
            monkeypatch.setattr("tempfile.mkdtemp", full_disk)

    with pytest.raises(FederationError, match=r"round 3 cannot be kept .* the last good one is 2"):
        run(InProcessGrid(make_app(), [{}] * 5), federation(tmp_path / "run", 0), fill)
    monkeypatch.undo()
    assert uninterrupted(tmp_path / "run", 0).adapter.digest() == wanted.adapter.digest()


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("size", [1200, 4000])
def test_wherever_a_disk_gets_full_the_run_ends_with_one_message_and_goes_on_later(tmp_path, size):
    """A limit on the size of files is met as a full disk is, by every library that writes."""
    wanted = uninterrupted(tmp_path / "whole", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if record.round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        with pytest.raises(FederationError, match="make room, then start the same federation again: it goes on from there"):
            run(InProcessGrid(make_app(), [{}] * 5), federation(tmp_path / "run", 0), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert uninterrupted(tmp_path / "run", 0).adapter.digest() == wanted.adapter.digest()
    assert [event.round for event in read_story(tmp_path / "run").rounds] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300])
def test_an_output_that_cannot_be_written_is_told_before_anybody_is_asked(tmp_path, output):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FederationError, match="cannot be written"):
        run(Scripted(make_app(), 5, edit=pytest.fail), federation(tmp_path / output, 0))


# When it is over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ({"traffic_bytes": 10_000}, "the budget is 10000"),
        ({"seconds": 1e-9}, "the budget is 1e-09"),
        ({"metric": "loss", "target": 1e9}, "the target is 1e+09"),
    ],
)
def test_a_run_stops_at_its_budget_or_target_and_says_why(tmp_path, stop, reason):
    outcome = uninterrupted(tmp_path / "run", 0, stop=stop)
    assert len(outcome.rounds) < 6
    assert reason in outcome.ended
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["reason"] == outcome.ended


def test_a_target_of_accuracy_is_reached_from_below_and_one_that_nobody_measures_never(tmp_path):
    assert len(uninterrupted(tmp_path / "a", 0, stop={"metric": "accuracy", "target": 0.0}).rounds) == 6
    assert len(uninterrupted(tmp_path / "b", 0, stop={"metric": "loss", "target": 0.0}).rounds) == 6


def telling(told):
    """Five nodes, of which node 1 tells another value of a metric than the others' 0.5."""

    def edit(message, reply):
        if message.metadata.message_type != MessageType.EVALUATE:
            return reply
        (name, value), node = next(iter(told.items())), message.metadata.dst_node_id
        return Message(RecordDict({METRICS: metric_record({name: value if node == 1 else 0.5}, 10)}), reply_to=message)

    return Scripted(make_app(), 5, edit=edit)


@pytest.mark.parametrize(
    ("metric", "target", "reached"),
    [("accuracy", 0.9, False), ("accuracy", 0.4, True), ("loss", 0.1, False), ("loss", 0.6, True)],
)
@pytest.mark.parametrize("value", [1e30, -1e30])
def test_one_node_of_five_neither_ends_a_run_nor_keeps_it_from_ending(tmp_path, metric, target, reached, value):
    """Oracle: what the four others measured."""
    outcome = run(telling({metric: value}), federation(tmp_path, 0, stop={"metric": metric, "target": target}))
    assert len(outcome.rounds) == (1 if reached else 6)
    assert ("more than half of the nodes" in outcome.ended) == reached


def test_what_is_refused_does_not_use_up_the_budget_of_traffic(tmp_path):
    """Its reply holds a megabyte, the budget is less."""

    def junk(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == 1:
            reply.content[ARRAYS]["junk"] = Array(np.zeros(250_000, np.float32))
        return reply

    outcome = run(Scripted(make_app(), 5, edit=junk), federation(tmp_path, 0, stop={"traffic_bytes": 900_000}))
    assert outcome.ended == "every round is done"
    assert any(record.refused for record in outcome.rounds)
    assert sum(record.bytes_received for record in outcome.rounds) < 900_000


def test_a_folder_has_one_coordinator_at_a_time(tmp_path):
    seen = []

    def again(record):
        with pytest.raises(FederationError, match="another coordinator is running in it"):
            run(InProcessGrid(make_app(), [{}] * 5), federation(tmp_path / "run", 0))
        seen.append(record.round)

    run(InProcessGrid(make_app(), [{}] * 5), federation(tmp_path / "run", 0), again)
    assert seen == [1, 2, 3, 4, 5, 6]
