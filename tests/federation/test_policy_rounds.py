"""Institutions' policies in whole federations of real nodes: who refuses is told apart by the rule, and the others go on."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import app
from client.asked import read
from client.node import Node
from client.permitted import permitted
from protocol.errors import FederationError
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.records import Call, call_records, stage_records
from protocol.secure_sum.stages import Next, Share
from protocol.signature import fingerprint, make_key, write_pair
from server.rounds import run
from server.story import read_story
from server.trust import Trust
from simulations.federation import federate
from simulations.grid import InProcessGrid

PLAN = {
    "base_model": "tiny",
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
    "data": {"max_length": 32},
    "training": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 1},
}
REFUSES = "the node's policy refuses it: "


def federation(output, stages=None, **rounds):
    content = {
        "name": "fraud",
        "rounds": {"minimum_nodes": 2, "evaluate_every": 0, "retries": 0, "join_seconds": 1} | rounds,
        "aggregation": {"rank_cap": 8},
        "output": output,
    }
    if stages:
        return Federation.model_validate(content | {"stages": stages})
    content["rounds"].setdefault("count", 1)
    return Federation.model_validate(content | {"plan": PLAN})


def node_of(folder, name, policy=None, **more):
    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"{name} {n % 5}."} for n in range(12)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if policy is not None:
        more["policy"] = folder / f"{name}-policy.yaml"
        more["policy"].write_text(json.dumps(policy))  # which is YAML
    return Node(name=name, train=path, **more)


@pytest.fixture
def three(tmp_path):
    """Two nodes without a policy and a third with the one that is given."""

    def made(policy):
        return [node_of(tmp_path, "bank"), node_of(tmp_path, "clinic"), node_of(tmp_path, "court", policy)]

    return made


# In the round loop ------------------------------------------------------------------------------------------------------


def test_a_node_whose_policy_refuses_does_not_join_and_the_federation_says_which_rules(three, tmp_path):
    outcome = federate(federation(tmp_path / "runs"), three({"rank": 2, "objectives": ["dpo"]}))
    assert dict(outcome.left_out) == {"node-3": f"{REFUSES}objectives, rank"}
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic"]
    assert read_story(tmp_path / "runs").left_out == {"node-3": f"{REFUSES}objectives, rank"}


def test_a_stage_that_goes_beyond_a_policy_is_done_without_its_node(three, tmp_path):
    gentle = PLAN | {"training": PLAN["training"] | {"learning_rate": 1e-3}}
    stages = [{"name": "one", "rounds": 1, "plan": gentle}, {"name": "two", "rounds": 1, "plan": PLAN}]
    outcome = federate(federation(tmp_path / "runs", stages), three({"learning_rate": 1e-3}))
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic", "court"]
    assert sorted(outcome.rounds[1].accepted) == ["bank", "clinic"]
    assert dict(outcome.rounds[1].silent) == {"court": f"{REFUSES}learning_rate"}


def around(hours):
    """Quiet hours about now in UTC, or all but those; an hour of room on either side, so that no test runs into their end."""
    now = datetime.now(UTC)
    begin, end = now - timedelta(hours=hours), now + timedelta(hours=hours)
    return f"{begin:%H:%M}-{end:%H:%M}", f"{end:%H:%M}-{begin:%H:%M}"


def test_in_its_quiet_hours_a_node_joins_and_neither_trains_nor_measures(three, tmp_path):
    quiet, _ = around(2)
    policy = {"time_zone": "UTC", "quiet_hours": [quiet]}
    outcome = federate(federation(tmp_path / "runs", evaluate_every=1), three(policy))
    assert sorted(outcome.offers) == ["bank", "clinic", "court"]
    (record,) = outcome.rounds
    assert dict(record.silent) == dict(record.evaluation_refused) == {"court": f"{REFUSES}quiet_hours"}
    assert sorted(record.evaluation) == ["bank", "clinic"]


def test_outside_its_quiet_hours_a_node_takes_part(three, tmp_path):
    _, quiet = around(2)
    outcome = federate(federation(tmp_path / "runs"), three({"time_zone": "UTC", "quiet_hours": [quiet]}))
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic", "court"]


def test_a_node_trains_no_more_often_on_a_day_than_it_says(three, tmp_path):
    outcome = federate(federation(tmp_path / "runs", count=2), three({"time_zone": "UTC", "rounds_per_day": 1}))
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic", "court"]
    assert dict(outcome.rounds[1].silent) == {"court": f"{REFUSES}rounds_per_day"}


def test_what_is_measured_leaves_as_the_policy_says_and_the_others_as_it_is(three, tmp_path):
    policy = {"metrics": {"loss": 0.5, "train-loss": 0.5}, "examples": 10}
    outcome = federate(federation(tmp_path / "runs", evaluate_every=1), three(policy))
    (record,) = outcome.rounds
    for told in (record.evaluation["court"], record.accepted["court"]):
        assert set(told) in ({"loss", "num-examples"}, {"train-loss", "num-examples"})
        value = next(number for name, number in told.items() if name.endswith("loss"))
        assert value % 0.5 == 0
    assert record.evaluation["court"]["num-examples"] == 10  # of one
    assert record.accepted["court"]["num-examples"] == 4  # which one step of four takes, and everybody knows
    assert {"perplexity", "accuracy"} <= set(record.evaluation["bank"])


def test_a_node_that_does_not_measure_trains(three, tmp_path):
    outcome = federate(federation(tmp_path / "runs", evaluate_every=1), three({"evaluate": False}))
    (record,) = outcome.rounds
    assert sorted(record.accepted) == ["bank", "clinic", "court"]
    assert dict(record.evaluation_refused) == {"court": f"{REFUSES}evaluate"}


def test_an_update_that_is_too_large_does_not_leave(three, tmp_path):
    outcome = federate(federation(tmp_path / "runs"), three({"upload_bytes": 1000}))
    assert dict(outcome.rounds[0].silent) == {"court": f"{REFUSES}upload_bytes"}


def test_a_node_hears_the_coordinators_that_its_policy_lists_by_their_keys(three, tmp_path):
    keys = {name: make_key() for name in ("bank", "clinic", "court", "ours", "theirs")}
    listed, lines = tmp_path / "enrolled.yaml", {}
    for name, key in keys.items():
        public = write_pair(tmp_path / f"{name}.key", key).read_text().strip()
        lines[name] = {"key": public, "role": "coordinator" if name in ("ours", "theirs") else "node"}
    listed.write_text(json.dumps(lines))
    nodes = [
        node.model_copy(update={"identity": tmp_path / f"{node.name}.key", "enrolled": listed, "trial": False})
        for node in three({"coordinators": [fingerprint(keys["ours"].public_key())]})
    ]
    for who, refusing in (("ours", {}), ("theirs", {"node-3": f"{REFUSES}coordinators"})):
        grid = InProcessGrid(app, [config_of(node) for node in nodes])
        outcome = run(grid, federation(tmp_path / who), trust=Trust(keys[who], listed))
        assert dict(outcome.left_out) == refusing
        assert len(outcome.rounds[0].accepted) == 3 - len(refusing)


def test_of_several_adapters_the_policy_looks_at_the_plan_of_its_own(tmp_path):
    """The other is beyond it, and asks somebody else."""
    wide = PLAN | {"lora": PLAN["lora"] | {"r": 6}}
    content = {"name": "fraud", "adapters": {"small": PLAN, "wide": wide}, "aggregation": {"rank_cap": 8}}
    content |= {"rounds": {"count": 1, "minimum_nodes": 1, "join_seconds": 1}, "output": tmp_path / "runs"}
    nodes = [node_of(tmp_path, "bank", adapter="wide"), node_of(tmp_path, "court", {"rank": 4}, adapter="small")]
    outcome = federate(Federation.model_validate(content), nodes)
    assert sorted(name for record in outcome.rounds for name in record.accepted) == ["bank", "court"]
    assert sorted(name for record in outcome.rounds for name in record.evaluation) == ["bank", "court"]


def secured(output, **more):
    content = federation(output, minimum_nodes=3).model_dump() | {"secure_sum": {"enabled": True}} | more
    return Federation.model_validate(content)


def test_a_node_that_wants_sums_takes_part_in_them_and_in_nothing_else(tmp_path):
    policy = {"secure_sum": True, "minimum_nodes": 3, "fewest_summed": 3}
    nodes = [node_of(tmp_path, name, policy) for name in ("bank", "clinic", "court")]
    outcome = federate(secured(tmp_path / "summed"), nodes)
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic", "court"]
    with pytest.raises(FederationError, match=rf"{REFUSES}minimum_nodes, secure_sum"):
        federate(federation(tmp_path / "open"), nodes)


def test_the_coordinator_of_a_sum_is_held_to_the_fewest_of_the_policy_before_anything_is_trained(tmp_path):
    nodes = [node_of(tmp_path, name, {"fewest_summed": 4}) for name in ("bank", "clinic", "court")]
    with pytest.raises(FederationError, match=rf"{REFUSES}fewest_summed"):
        federate(secured(tmp_path / "few"), nodes)


# In each route, before anything is loaded --------------------------------------------------------------------------------


def config_of(node):
    """As Flower is given a node's settings."""
    own = node.model_dump(exclude_none=True)
    return {key.replace("_", "-"): value if isinstance(value, int | str) else str(value) for key, value in own.items()}


class SuperNode:
    """One node in this process, whose base is not there: to look for it would answer ``model``."""

    def __init__(self, folder, policy):
        InProcessGrid(app, [])  # so that messages can be made here
        config = config_of(node_of(folder, "court", policy, trial=False))
        self.context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})

    def message(self, kind, **changes):
        plan = Plan.model_validate(PLAN | {"base_model": "a base that is nowhere"})
        facts = {"federation": "fraud", "round": 1, "rounds": 3, "r": 4, "plan": plan} | changes
        return Message(call_records(Call(**facts)), dst_node_id=1, message_type=kind)

    def reason(self, message):
        return app(message, self.context).error.reason


ROUTES = [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE]


@pytest.mark.parametrize("kind", ROUTES)
def test_a_policy_is_looked_at_before_the_base_is_looked_for(kind, tmp_path):
    """Oracle: a base that is not there is the answer only once the policy allows the rest."""
    refusing = SuperNode(tmp_path, {"rounds": 2})
    assert refusing.reason(refusing.message(kind)) == "policy.rounds"
    allowing = SuperNode(tmp_path, {"rounds": 3})
    assert allowing.reason(allowing.message(kind)) == "model"


@pytest.mark.parametrize("kind", ROUTES)
def test_the_digest_of_a_base_is_asked_for_last(kind, tmp_path):
    node = SuperNode(tmp_path, {"base_digests": ["ab" * 32], "rounds": 2})
    assert node.reason(node.message(kind)) == "policy.rounds"
    assert node.reason(node.message(kind, rounds=2)) == "model"
    plan = Plan.model_validate(PLAN)
    assert node.reason(node.message(kind, rounds=2, plan=plan)) == "policy.base_digests"


def test_who_may_not_ask_may_not_go_on_with_a_sum_either(tmp_path):
    node = SuperNode(tmp_path, {"federations": ["fraud"]})
    for federation, reason in (("other", "policy.federations"), ("fraud", "configuration")):  # it has no key
        asked = Next(question=Share(federation=federation, run="0" * 32, adverts=({},)))
        assert node.reason(Message(stage_records(asked), dst_node_id=1, message_type="train.secure_sum")) == reason


def test_a_node_is_as_strict_as_its_policy_where_its_settings_are_less(tmp_path):
    node = SuperNode(tmp_path, {"secure_sum": True, "fewest_summed": 5})
    asked = permitted(read(node.message(MessageType.QUERY, summed=True, minimum_nodes=5), node.context), node.context).node
    assert (asked.only_summed, asked.fewest_summed) == (True, 5)


@pytest.mark.parametrize("policy", ["rank: 0", "nothing of this: is known", "- a list", "epsilon: 1", "rank: [", ""])
def test_a_policy_that_cannot_be_used_allows_nothing(policy, tmp_path):
    node = SuperNode(tmp_path, {})
    (tmp_path / "court-policy.yaml").write_text(policy)
    for kind in ROUTES:
        assert node.reason(node.message(kind)) == "configuration"


def test_a_policy_that_is_gone_allows_nothing(tmp_path):
    node = SuperNode(tmp_path, {})
    (tmp_path / "court-policy.yaml").unlink()
    assert node.reason(node.message(MessageType.TRAIN)) == "configuration"


def test_what_a_policy_says_holds_from_the_next_message_on(tmp_path):
    node = SuperNode(tmp_path, {"rounds": 3})
    assert node.reason(node.message(MessageType.TRAIN)) == "model"
    (tmp_path / "court-policy.yaml").write_text("rounds: 2")
    assert node.reason(node.message(MessageType.TRAIN)) == "policy.rounds"
