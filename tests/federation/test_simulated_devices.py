"""Many devices in simulated time: who comes first is merged, who goes drops out, bytes have a limit, what died goes on."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from client.device_bytes import update_bytes
from client.node import Node
from fedge import app
from protocol.errors import ConfigurationError, FederationError
from protocol.federation import Federation
from protocol.records import Call
from simulations.device_grid import LOG
from simulations.device_journal import FILE
from simulations.devices import Devices
from simulations.federation import STATE, check, check_devices, federate_devices
from simulations.scenario import read_scenario

PLAN = {
    "base_model": "tiny",
    "lora": {"r": 2, "lora_alpha": 4},
    "data": {"max_length": 64},
    "training": {
        "learning_rate": 1e-2,
        "batch_size": 2,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    },
}
MANY = 60
HOUR = 3600


def federation(folder, **rounds):
    rounds = {"count": 3, "cohort": 6, "over_selection": 0.3, "minimum_nodes": 2, "retries": 0, "evaluators": 4} | rounds
    content = {"name": "devices", "plan": PLAN, "rounds": rounds, "aggregation": {"rank_cap": 4}, "output": str(folder)}
    return Federation.model_validate(content)


def devices(folder, bundle, count=MANY, **more):
    rows = folder / "rows.jsonl"
    told = [{"input_text": f"Where is room {n} of the mill?", "target_text": f"Floor {n // 100}."} for n in range(4 * count)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    content = {"bundle": bundle[0], "key": bundle[1], "partition": {"rows": rows, "nodes": count}, "rows_per_second": 0.02}
    return Devices.model_validate(content | more)


def traces(folder, *spells, period=24 * HOUR):
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps({"idle": each}) + "\n" for each in spells))
    return {"traces": path, "period_seconds": period}


def run(published, simulated, die_after=None):
    """What the devices' rounds were, the records, the outcome and the totals."""
    rounds, records = [], []

    def watch(record, told):
        rounds.append(told)
        records.append(record)
        if record.round == die_after:
            raise KeyboardInterrupt

    outcome, totals = federate_devices(published, simulated, watch)
    return rounds, records, outcome, totals


def journal(folder):
    return [json.loads(line) for line in (folder / STATE / FILE).read_text().splitlines()]


def test_the_first_of_those_that_are_asked_are_merged_and_nobody_trains_for_the_others(tmp_path, trainable_bundle):
    simulated = devices(tmp_path, trainable_bundle, availability={"share": 0.5}, pause_seconds=HOUR)
    rounds, records, outcome, totals = run(federation(tmp_path / "run"), simulated)
    assert outcome.ended == "every round is done"
    for told, record in zip(rounds, records, strict=True):
        assert told.asked == 8
        assert len(record.accepted) == told.replied == 6
        assert told.asked == told.replied + told.gone + told.late + told.dropped + told.refused + told.failed
        assert len(record.dropped) == told.dropped
        # Only what devices and coordinator say in words is on top of the arrays that the coordinator counts.
        assert record.bytes_sent < told.bytes_down < record.bytes_sent + 12 * 5000
        assert told.bytes_up > record.bytes_received
    said = (tmp_path / "run" / STATE / LOG).read_text()
    assert said.count("train-loss") == sum(told.replied for told in rounds)
    assert totals.total == sum(told.bytes_down + told.bytes_up for told in rounds)
    assert totals.mean == pytest.approx(totals.total / totals.asked)
    assert totals.most >= totals.median > 0
    losses = [np.mean([metrics["loss"] for metrics in record.evaluation.values()]) for record in records]
    assert [len(record.evaluation) + len(record.evaluation_refused) for record in records] == [4, 4, 4]
    assert losses[-1] < 0.8 * losses[0]
    first = [(line["told"], line["device"]) for line in journal(tmp_path / "run") if line["round"] == 1 and "sent" in line][:8]
    merged = {f"node-{device + 1:02d}" for _, device in sorted(first)[: 6 + rounds[0].gone]}
    assert records[0].accepted.keys() <= merged
    answered = {line["device"] for line in journal(tmp_path / "run") if line["end"] == "replied" and "sent" not in line}
    folders = {int(each.name) - 1 for each in (tmp_path / "run" / STATE).iterdir() if each.is_dir()}
    assert folders <= answered, "a device that was never needed has left nothing"


def test_a_run_that_died_goes_on_to_the_same_bit_with_its_clock_and_its_bytes(tmp_path, trainable_bundle):
    more = {"availability": {"share": 0.4}, "pause_seconds": HOUR, "device_bytes": 450_000}
    simulated = devices(tmp_path, trainable_bundle, **more)
    whole = run(federation(tmp_path / "whole", cohort=4, evaluators=2), simulated)
    with pytest.raises(KeyboardInterrupt):
        run(federation(tmp_path / "died", cohort=4, evaluators=2), simulated, die_after=2)
    # As of a process that was killed in the third round: asked, counted, not merged.
    path = tmp_path / "died" / STATE / FILE
    last = next(line for line in journal(tmp_path / "died") if line["round"] == 2 and "sent" in line)
    path.write_text(path.read_text() + json.dumps(last | {"round": 3, "phase": 99}) + "\n" + '{"round": 3, "dev')
    resumed = run(federation(tmp_path / "died", cohort=4, evaluators=2), simulated)
    assert [told.round for told in resumed[0]] == [3]
    assert resumed[0][0] == whole[0][2]
    assert resumed[2].adapter.digest() == whole[2].adapter.digest()
    assert resumed[3] == whole[3]


def test_a_reply_takes_the_bytes_over_the_network_and_the_rows_over_the_speed(tmp_path, trainable_bundle):
    """Without spread all devices are equally fast: closed form, to the rounding of a sum."""
    simulated = devices(tmp_path, trainable_bundle, 4, spread=0, rows_per_second=0.5, bytes_per_second=1000, pause_seconds=100)
    rounds, *_ = run(federation(tmp_path / "run", count=2, cohort=None, evaluate_every=0, evaluators=1), simulated)
    lines = [line for line in journal(tmp_path / "run") if line.get("kind") == "train"]
    up = update_bytes(
        Call(federation="f", round=1, rounds=2, plan=federation("x").plan, r=2),
        Node(name="x", train=tmp_path, device=trainable_bundle[0], device_key=trainable_bundle[1]),
    )
    assert [line["sent"] for line in lines if line["round"] == 1] == [0.0] * 4
    for line in lines:
        assert line["told"] - line["sent"] == pytest.approx((line["down"] + up) / 1000 + 2 / 0.5, rel=1e-9)
    ended = max(line["told"] for line in lines if line["round"] == 1)
    assert {line["sent"] for line in lines if line["round"] == 2} == {ended + 100}
    assert rounds[0].hours == ended / 3600


def test_a_device_that_goes_before_its_reply_is_there_drops_out_and_a_round_begins_when_enough_have_come(
    tmp_path, trainable_bundle
):
    """Three devices from three o'clock on, of which one goes after a minute; a step takes 100 s."""
    stays, goes = [[3 * HOUR, 9 * HOUR]], [[3 * HOUR, 3 * HOUR + 60]]
    when = traces(tmp_path, stays, goes, stays)
    simulated = devices(tmp_path, trainable_bundle, 3, availability=when, spread=0)
    rounds, records, *_ = run(federation(tmp_path / "run", count=1, cohort=3, over_selection=0, evaluators=1), simulated)
    assert (rounds[0].available, rounds[0].replied, rounds[0].gone) == (3, 2, 1)
    assert list(records[0].silent) == ["node-2"]
    lines = [line for line in journal(tmp_path / "run") if "sent" in line]
    assert lines[0]["sent"] == 3 * HOUR
    (gone,) = [line["told"] for line in lines if line["device"] == 1 and line["kind"] == "train"]
    assert gone == 3 * HOUR + 60 + 60  # two heartbeats


def test_a_reply_after_the_deadline_is_none(tmp_path, trainable_bundle):
    simulated = devices(tmp_path, trainable_bundle, 12, spread=2)
    published = federation(tmp_path / "run", count=1, cohort=None, timeout_seconds=150, minimum_nodes=1, evaluate_every=1)
    rounds, records, *_ = run(published, simulated)
    assert rounds[0].late == len(records[0].silent) > 0
    assert all("no reply within 150 s" in why for why in records[0].silent.values())
    assert rounds[0].replied == len(records[0].accepted) > 0


def test_devices_whose_bytes_are_spent_refuse_and_do_not_come_back_that_day(tmp_path, trainable_bundle):
    """From the second round on an adapter of twice an update's rank comes down, so that a round costs three updates: there is
    room for one of them, and not for another."""
    one = update_bytes(
        Call(federation="f", round=1, rounds=2, plan=federation("x").plan, r=2),
        Node(name="x", train=tmp_path, device=trainable_bundle[0], device_key=trainable_bundle[1]),
    )
    simulated = devices(tmp_path, trainable_bundle, 16, device_bytes=round(4.5 * one), spread=0.1)
    published = federation(tmp_path / "run", count=4, evaluate_every=0, evaluators=1, minimum_nodes=1)
    rounds, records, _, totals = run(published, simulated)
    assert rounds[-1].available < 16
    refused = {name for record in records for name, why in record.silent.items() if "not-now" in why}
    assert 0 < len(refused) == sum(told.refused for told in rounds)
    assert len(refused) <= totals.refused, "who measures may refuse too"
    first = min(record.round for record in records if any("not-now" in why for why in record.silent.values()))
    gone = {name for name, why in records[first - 1].silent.items() if "not-now" in why}
    assert not any(gone & {*record.accepted, *record.silent, *record.dropped} for record in records[first:])
    said = (tmp_path / "run" / STATE / LOG).read_text()
    assert f"of {round(4.5 * one)} bytes are spent in 30 days" in said
    # A question that is refused has cost its own bytes, and no update.
    assert totals.most <= 4.5 * one + 2 * one


def test_a_round_that_changed_nothing_is_measured_all_the_same(tmp_path, trainable_bundle):
    """The first step of a schedule that warms up is of rate zero: the global adapter has no direction, and the base's loss."""
    plan = PLAN | {"training": PLAN["training"] | {"warmup_ratio": 0.5, "lr_scheduler_type": "linear"}}
    published = federation(tmp_path / "run", count=2)
    published = published.model_copy(update={"plan": published.plan.model_validate(plan)})
    _, records, *_ = run(published, devices(tmp_path, trainable_bundle, 16))
    assert len(records[0].evaluation) == 4
    assert not records[0].evaluation_refused
    assert set(records[0].norms.values()) == {0.0}


def test_devices_that_are_never_there_together_end_the_run_with_the_number(tmp_path, trainable_bundle):
    when = traces(tmp_path, [[0, 100]], [[200, 300]], [[400, 500]])
    simulated = devices(tmp_path, trainable_bundle, 3, availability=when)
    with pytest.raises(FederationError, match="at most 1 of 3 devices are available at once within two days, and 2 are needed"):
        run(federation(tmp_path / "run"), simulated)


def test_a_journal_that_does_not_tell_of_the_last_round_ends_the_run_before_it_goes_on(tmp_path, trainable_bundle):
    simulated, published = devices(tmp_path, trainable_bundle, 8), federation(tmp_path / "run", count=2, evaluate_every=0)
    with pytest.raises(KeyboardInterrupt):
        run(published, simulated, die_after=1)
    path = tmp_path / "run" / STATE / FILE
    text = path.read_text()
    path.write_text("")
    with pytest.raises(FederationError, match="does not tell of round 1"):
        run(published, simulated)
    asked, heard = text.splitlines()[0], next(line for line in text.splitlines() if "sent" not in line)
    for wrong in ("x", "[]", "{}", heard, asked.replace('"device": ', '"device": 99'), asked.replace('"phase"', '"phrase"')):
        path.write_text(f"{wrong}\n{text}")
        with pytest.raises(FederationError, match="line 1 is none of a journal"):
            run(published, simulated)


def test_a_scenario_of_devices_runs_from_its_file(tmp_path, trainable_bundle, monkeypatch):
    devices(tmp_path, trainable_bundle, 10)
    monkeypatch.chdir(tmp_path)
    content = {
        "federation": federation("run", count=1, evaluators=2).model_dump(mode="json", exclude_unset=True),
        "devices": {
            "bundle": str(trainable_bundle[0]),
            "key": str(trainable_bundle[1]),
            "partition": {"rows": "rows.jsonl", "nodes": 10},
        },
    }
    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(app, ["simulate", "scenario.yaml", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["devices"]["devices"] == 10
    assert "8 of 10 asked: 6 merged, 2 stragglers dropped" in done.stderr
    assert "refused for it" in done.stderr


def test_what_cannot_be_simulated_is_refused_before_anything_runs(tmp_path, trainable_bundle):
    simulated = devices(tmp_path, trainable_bundle, 3)
    with pytest.raises(ConfigurationError, match=r"3 there, rounds.minimum_nodes is 5"):
        check_devices(federation(tmp_path / "run", minimum_nodes=5), simulated)
    (tmp_path / "rows.jsonl").write_text('{"neither": 1}\n' * 12)
    with pytest.raises(Exception, match="neither"):
        check_devices(federation(tmp_path / "run"), simulated)
    assert not (tmp_path / "run").exists()


def test_a_listed_device_is_asked_to_join_as_a_device(tmp_path, trainable_bundle):
    """Its bundle trains sft and no text; a node with PyTorch would do both."""
    devices(tmp_path, trainable_bundle, 2)
    node = Node(name="phone", train=tmp_path / "rows.jsonl", device=trainable_bundle[0], device_key=trainable_bundle[1])
    published = federation(tmp_path / "run", minimum_nodes=1)
    check(published, [node])
    other = published.model_copy(update={"plan": published.plan.model_copy(update={"objective": "pretraining"})})
    with pytest.raises(ConfigurationError, match="phone: objective: found pretraining; a device trains"):
        check(other, [node])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": {"availability": {}}}, "either traces or share"),
        ({"devices": {"availability": {"share": 0.9}}}, "devices.availability.share"),
        ({"devices": {"availability": {"share": 0.1, "traces": "t"}}}, "either traces or share"),
        ({"devices": {"rows_per_second": 0}}, "devices.rows_per_second"),
        ({"devices": {"device_bytes": 0}}, "devices.device_bytes"),
        ({"devices": {"spread": -1}}, "devices.spread"),
        ({"devices": {"partition": {"rows": "r", "nodes": 2, "evaluate": "e"}}}, "holds out a share of its own rows"),
        ({"partition": {"rows": "r", "nodes": 2}}, "nodes or partition or devices"),
        ({"compare": True}, "compare: found beside devices"),
        ({"federation": {"plan": PLAN, "secure_sum": {"enabled": True}, "rounds": {"minimum_nodes": 3}}}, "have no keys"),
        ({"federation": {"plan": PLAN, "trust": {"enrolled": "e", "identity": "i"}}}, "have no keys"),
        ({"federation": {"adapters": {"a": PLAN}}}, "which all train one"),
    ],
)
def test_a_scenario_that_devices_cannot_have_says_which_key_and_why(tmp_path, changes, said):
    content = {
        "federation": {"plan": PLAN},
        "devices": {"bundle": "b", "key": "k", "partition": {"rows": "r", "nodes": 2}} | changes.pop("devices", {}),
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content | changes))
    with pytest.raises(ConfigurationError) as caught:
        read_scenario(tmp_path / "s.yaml")
    assert said in str(caught.value)
