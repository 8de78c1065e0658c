"""An institution's policy: what goes beyond it is refused by the rule's name, contradictions are said, little leaves.

The oracle of the 60 settings is the table itself: each stands beside a setting of the same kind at the rule's very limit, which
passes, and the names that refuse it are those of the rules which the table says, no more and no fewer.
"""

from datetime import UTC, datetime
from typing import get_args

import numpy as np
import pytest
from flwr.app import RecordDict

from client.memory import Memory
from client.policy import Policy, Question, read_policy
from protocol.adapter import Adapter
from protocol.configuration import parse
from protocol.data_settings import EVERY_KIND
from protocol.errors import ConfigurationError, PolicyError
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.policy_rules import RULES, code, refused
from protocol.privacy.promise import Promise
from protocol.records import Call
from protocol.secure_sum.stages import Asked
from protocol.update import Update

KEY, OTHER_KEY = "SHA256:" + "a" * 43, "SHA256:" + "b" * 43
DIGEST, OTHER_DIGEST = "ab" * 32, "cd" * 32
NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)  # a Monday
JUDGE = {"endpoint": {"base_url": "https://judge.example/v1", "model": "m"}}
NODES = ("bank", "clinic", "court", "school", "town")
SUM = {"run": "0" * 32, "kind": "products", "limit": 1.0, "examples": 10, "width": 8, "share": 0.7}
PROMISE = {"epsilon": 4.0, "delta": 1e-6, "clipping_norm": 1.0, "noise_multiplier": 1.0, "noise": "nodes"}
WIDE = {"time_zone": "UTC", "quiet_hours": ["22:00-06:00"]}  # rules that never matter at noon

# What an objective or a method needs beside its name.
NEEDS = {
    "distillation": {"distillation": {"teacher": {"base_model": "big"}}},
    "rl": {"rl": {"reward_model": "ours"}},
    "classification": {"data": {"labels": ["a", "b"]}},
    "kto": {},
    "xlora": {"xlora": {"adapters": ["fees", "cards"]}},
    "qlora": {"precision": "nf4"},
}


def objective(name):
    return {"plan": {"objective": name} | NEEDS.get(name, {})}


def method(name):
    return {"plan": {"method": name} | NEEDS.get(name, {})}


def training(**settings):
    return {"plan": {"training": settings}}


def summed(nodes=NODES, **more):
    return {"secure_sum": Asked(nodes=nodes, **SUM), "summed": True} | more


def private(**changes):
    return summed(privacy=Promise(**PROMISE | changes))


def rows_private(**changes):
    return training(max_steps=5, example_privacy={"epsilon": 2.0, "delta": 1e-6} | changes)


def based_on(digest):
    return {"manifest": Manifest(base_digest=digest, kind="global", num_examples=1)}


RL_FUNCTION = {"plan": {"objective": "rl", "rl": {"reward_functions": ["m:f"]}}}
RL_MODEL = {"plan": {"objective": "rl", "rl": {"reward_model": "ours"}}}
RL_JUDGE = {"plan": {"objective": "rl", "rl": {"judge": JUDGE}}}
FEEDBACK = {"plan": {"objective": "dpo", "ai_feedback": {"judge": JUDGE}}}
WRITTEN = {"plan": {"data": {"augmentation": {"paraphrase": True, "writer": JUDGE, "written": "w.jsonl"}}}}
SFT = objective("sft")
METHODS = [
    "full",
    "freezing",
    "adalora",
    "ia3",
    "bitfit",
    "bottleneck",
    "experts",
    "prompt-tuning",
    "prefix-tuning",
    "p-tuning-v2",
]


def table():
    """``(rules, policy, beyond, within)``: settings that go beyond one rule each, beside their twins."""
    yield "federations", {"federations": ["fraud", "aml"]}, {"federation": "Fraud"}, {"federation": "aml"}
    yield "coordinators", {"coordinators": [KEY]}, {"coordinator": OTHER_KEY}, {"coordinator": KEY}
    yield "coordinators", {"coordinators": [KEY]}, {"coordinator": ""}, {"coordinator": KEY}
    yield "base_models", {"base_models": ["tiny"]}, {"plan": {"base_model": "huge"}}, {"plan": {"base_model": "tiny"}}
    yield "base_models", {"base_models": ["tiny"]}, {"plan": {"base_model": "./tiny"}}, {}
    yield "base_digests", {"base_digests": [DIGEST]}, based_on(OTHER_DIGEST), based_on(DIGEST)
    yield "base_digests", {"base_digests": [DIGEST]}, {"here": OTHER_DIGEST}, {"here": DIGEST}
    for name in ("pretraining", "distillation", "regression", "dpo", "kto", "reward", "rl"):
        allowed = objective("classification") if name != "kto" else SFT
        yield "objectives", {"objectives": ["sft", "classification"]}, objective(name), allowed
    for name in METHODS:
        yield "methods", {"methods": ["lora", "qlora"]}, method(name), method("lora")
    yield "methods", {"methods": ["lora"]}, method("xlora"), method("lora")
    for name in ("bf16", "fp16", "int8"):
        plan = {"precision": name} | ({"method": "qlora"} if name == "int8" else {})
        yield "precisions", {"precisions": ["fp32", "nf4"]}, {"plan": plan}, method("qlora")
    yield "rank", {"rank": 16}, {"plan": {"lora": {"r": 17}}}, {"plan": {"lora": {"r": 16}}}
    pissa = {"plan": {"lora": {"r": 16, "init_lora_weights": "pissa"}}}  # which sends twice the rank
    yield "rank", {"rank": 31}, pissa, {"plan": {"method": "ia3", "lora": {"r": 99}}, "r": 99}
    yield "rounds", {"rounds": 20}, {"rounds": 21}, {"rounds": 20}
    yield "rounds", {"rounds": 20}, {"rounds": 20, "round": 21}, {"rounds": 20, "round": 20}
    yield "local_steps", {"local_steps": 50}, training(max_steps=51), training(max_steps=50)
    yield "local_steps", {"local_steps": 50}, training(num_train_epochs=0.1), training(max_steps=50)
    yield "epochs", {"epochs": 1}, training(num_train_epochs=1.5), training(num_train_epochs=1)
    yield "epochs", {"epochs": 1}, training(max_steps=1), training(num_train_epochs=0.5)
    yield "learning_rate", {"learning_rate": 1e-3}, training(learning_rate=1.1e-3), training(learning_rate=1e-3)
    heads = [NEEDS["classification"] | {"objective": "classification", "head": {"learning_rate": rate}} for rate in (0.1, 1e-3)]
    yield "learning_rate", {"learning_rate": 1e-3}, *({"plan": plan} for plan in heads)
    yield "max_length", {"max_length": 256}, {"plan": {"data": {"max_length": 257}}}, {"plan": {"data": {"max_length": 256}}}
    yield "masking", {"masking": "all"}, {"masked": ("email",)}, {"masked": EVERY_KIND}
    yield "masking", {"masking": ["email", "iban"]}, {"masked": ("email",)}, {"masked": ("iban", "email")}
    yield "reward_functions", {"reward_functions": False}, RL_FUNCTION, RL_MODEL
    yield "endpoints", {"endpoints": False}, RL_JUDGE, RL_FUNCTION
    yield "endpoints", {"endpoints": False}, FEEDBACK, objective("dpo")
    yield "endpoints", {"endpoints": False}, WRITTEN, SFT
    for name in ("full", "bitfit"):
        yield "whole_model", {"whole_model": False}, method(name), method("ia3")
    yield "minimum_nodes", {"minimum_nodes": 5}, {"minimum_nodes": 4}, {"minimum_nodes": 5}
    yield "secure_sum", {"secure_sum": True}, {"summed": True}, summed()
    yield "secure_sum", {"secure_sum": True}, {"kind": "join"}, {"kind": "join", "summed": True}
    yield "fewest_summed", {"fewest_summed": 5}, summed(NODES[:4]), summed()
    yield "fewest_summed", {"fewest_summed": 5}, summed((*NODES[:4], "bank")), summed()
    private_rule = {"epsilon": 4, "delta": 1e-6}
    yield "epsilon", private_rule, summed(), private()
    yield "epsilon", private_rule, private(epsilon=4.1), private()
    yield "delta", private_rule, private(delta=1e-5), private()
    yield "noise", private_rule | {"noise": "nodes", "secure_sum": True}, private(noise="coordinator"), private()
    by_row = {"example_epsilon": 2, "example_delta": 1e-6}
    yield "example_epsilon", by_row, training(max_steps=5), rows_private()
    yield "example_epsilon", by_row, rows_private(epsilon=2.5), rows_private()
    yield "example_delta", by_row, rows_private(delta=1e-5), rows_private()
    yield "evaluate", {"evaluate": False}, {"kind": "evaluate"}, {"kind": "train"}


CASES = list(table())


def question(kind="train", masked=(), coordinator="", plan=None, **call):
    facts = {"federation": "fraud", "round": 1, "rounds": 2} | call
    plan = Plan.model_validate({"base_model": "tiny", "lora": {"r": 8}} | (plan or {}))
    return Question(kind, Call(plan=plan, **facts), plan, masked, coordinator)


def ask(policy, here=DIGEST, now=NOON, begun=0, **asked):
    parse(policy, Policy, source="policy.yaml").check(question(**asked), now, begun, lambda: here)


def test_there_are_sixty_settings_beyond_a_policy():
    assert len(CASES) == 60


@pytest.mark.parametrize("case", CASES, ids=[f"{at:02d}-{case[0]}" for at, case in enumerate(CASES)])
def test_a_setting_beyond_the_policy_is_refused_by_the_rules_name_and_its_twin_within_it_is_not(case):
    rule, policy, beyond, within = case
    ask(policy | WIDE, **within)
    with pytest.raises(PolicyError) as found:
        ask(policy | WIDE, **beyond)
    assert found.value.rules == (rule,)
    assert found.value.code == f"policy.{rule}"
    assert f"{rule}: asked for " in str(found.value)
    assert ", allowed " in str(found.value)


@pytest.mark.parametrize(
    ("beyond", "within"),
    [
        ({"lora": {"r": 8, "modules_to_save": ["q_proj", "up_proj"]}}, {"lora": {"r": 8}}),
        ({"method": "experts"}, {"method": "experts", "experts": {"train": "experts"}}),
        ({"method": "experts", "experts": {"train": "router"}}, {"method": "experts", "experts": {"train": "experts"}}),
    ],
)
def test_no_method_beside_the_base_is_a_way_to_train_the_base(beyond, within):
    """What trains whole beside factors is the base as well: all of it, if a plan names all of its modules."""
    ask({"whole_model": False}, plan=within)
    with pytest.raises(PolicyError) as found:
        ask({"whole_model": False}, plan=beyond)
    assert found.value.rules == ("whole_model",)


def test_without_a_policy_everything_is_allowed():
    for _, _, beyond, within in CASES:
        for asked in (beyond, within):
            read_policy(None).check(question(**{k: v for k, v in asked.items() if k != "here"}), NOON, 99, lambda: "")


def test_every_rule_that_refuses_at_once_is_named_and_the_message_says_all():
    with pytest.raises(PolicyError) as found:
        ask({"rank": 4, "objectives": ["dpo"], "rounds": 1})
    assert found.value.code == "policy.objectives,rank,rounds"
    assert str(found.value).count("asked for") == 3


def test_the_base_on_this_machine_is_looked_at_after_everything_else_and_only_where_a_rule_asks():
    looked = []

    def digest():
        looked.append(1)
        return DIGEST

    for policy in ({"rank": 4, "base_digests": [DIGEST]}, {"rank": 8}):
        with pytest.raises(PolicyError) if policy["rank"] == 4 else _nothing():
            parse(policy, Policy, source="p").check(question(), NOON, 0, digest)
    assert not looked


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


# When -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "zone", "clock", "quiet"),
    [
        ("22:00-06:00", "UTC", (21, 59), False),
        ("22:00-06:00", "UTC", (22, 0), True),
        ("22:00-06:00", "UTC", (0, 0), True),
        ("22:00-06:00", "UTC", (5, 59), True),
        ("22:00-06:00", "UTC", (6, 0), False),
        ("08:00-18:00", "UTC", (8, 0), True),
        ("08:00-18:00", "UTC", (18, 0), False),
        ("18:00-24:00", "UTC", (23, 59), True),
        ("22:00-06:00", "Europe/Zurich", (21, 0), True),  # an hour ahead in November
        ("22:00-06:00", "Europe/Zurich", (5, 30), False),
        ("22:00-06:00", "Asia/Shanghai", (14, 0), True),  # eight hours
        ("22:00-06:00", "Asia/Shanghai", (22, 0), False),
    ],
)
def test_quiet_hours_are_those_of_their_place_and_go_over_midnight(hours, zone, clock, quiet):
    policy, now = {"time_zone": zone, "quiet_hours": [hours]}, NOON.replace(hour=clock[0], minute=clock[1])
    ask(policy, now=now, kind="join")
    for kind in ("train", "evaluate"):
        with pytest.raises(PolicyError, match="quiet_hours: asked for work at") if quiet else _nothing():
            ask(policy, now=now, kind=kind)


def test_hours_of_summer_are_an_hour_off_those_of_winter():
    policy, summer = {"time_zone": "Europe/Zurich", "quiet_hours": ["22:00-06:00"]}, NOON.replace(month=7)
    with pytest.raises(PolicyError):
        ask(policy, now=summer.replace(hour=20))
    ask(policy, now=NOON.replace(hour=20))


def test_days_are_those_of_their_place():
    policy = {"time_zone": "Asia/Shanghai", "days": ["tue"]}
    with pytest.raises(PolicyError, match="days: asked for work on mon, allowed tue"):
        ask(policy, now=NOON)
    ask(policy, now=NOON.replace(hour=16))  # midnight there


@pytest.mark.parametrize("place", ["state", "folder"])
def test_trainings_of_a_day_are_counted_over_all_federations_and_begin_anew_the_next(place, tmp_path):
    policy = parse({"time_zone": "UTC", "rounds_per_day": 2}, Policy, source="p")
    state = RecordDict()

    def memory():
        return Memory(state, "", tmp_path if place == "folder" else None)

    for _ in range(2):
        policy.check(question(federation="one"), NOON, policy.begun(memory(), NOON), lambda: "")
        policy.note(memory(), NOON)
    with pytest.raises(PolicyError, match="rounds_per_day: asked for 3, allowed 2 at most"):
        policy.check(question(federation="two"), NOON, policy.begun(memory(), NOON), lambda: "")
    policy.check(question(kind="evaluate"), NOON, policy.begun(memory(), NOON), lambda: "")
    assert policy.begun(memory(), NOON.replace(day=24)) == 0


# Between --------------------------------------------------------------------------------------------------------------


def test_a_stage_of_a_secure_sum_is_asked_by_who_may_at_any_hour():
    policy = parse({"federations": ["fraud"], "coordinators": [KEY], "rank": 1} | WIDE, Policy, source="p")
    policy.check_stage("fraud", KEY)
    for federation, key, rule in (("other", KEY, "federations"), ("fraud", "", "coordinators")):
        with pytest.raises(PolicyError) as found:
            policy.check_stage(federation, key)
        assert found.value.rules == (rule,)


def test_an_answer_that_is_too_large_does_not_leave():
    policy = parse({"upload_bytes": 1000}, Policy, source="p")
    policy.check_upload(1000)
    with pytest.raises(PolicyError, match="upload_bytes: asked for 1,001, allowed 1,000 at most"):
        policy.check_upload(1001)


# What may leave -------------------------------------------------------------------------------------------------------


def test_metrics_that_are_not_listed_stay_and_the_others_are_rounded_to_their_step():
    policy = parse({"metrics": {"loss": 0.1, "accuracy": 0.05}}, Policy, source="p")
    told = policy.told({"loss": 1.2345, "accuracy": 0.987, "perplexity": 3.0, "legal/loss": 1.0}, 50)
    assert told == {"loss": 1.2, "accuracy": 1.0}
    assert policy.told({"loss": float("nan"), "accuracy": 0.3 + 1e-9}, 50) == {"accuracy": 0.3}
    floor = parse({"measured_rows": 20}, Policy, source="p")
    assert (floor.told({"loss": 1.0}, 19), floor.told({"loss": 1.0}, 20)) == ({}, {"loss": 1.0})
    assert parse({"metrics": {}}, Policy, source="p").told({"loss": 1.0}, 50) == {}
    assert Policy().told({"loss": 1.2345, "x": float("inf")}, 1) == {"loss": 1.2345}


@pytest.mark.parametrize(
    ("rows", "steps", "told"),
    [(1, None, 100), (149, None, 100), (151, None, 200), (1000, None, 1000), (7, 2, 16), (790, 100, 800), (640, 100, 600)],
)
def test_counts_of_rows_leave_as_multiples_and_never_as_more_than_steps_take(rows, steps, told):
    """A plan of 2 steps of 8 rows takes 16, which its coordinator knows; of 100 steps 800."""
    plan = Plan.model_validate({"training": {"max_steps": steps, "batch_size": 8}})
    update = Update(Adapter(), Manifest(base_digest=DIGEST, kind="update", num_examples=rows))
    assert Policy(examples=100).coarse(update, plan).manifest.num_examples == told
    assert Policy().coarse(update, plan) == update
    assert Policy(examples=100).counted(0) == 0


def test_a_metric_of_any_size_can_be_rounded():
    policy = Policy(metrics={"loss": 1e-12})
    assert policy.told({"loss": 1e300}, 50) == {"loss": 1e300}
    assert np.isfinite(policy.told({"loss": -1e8}, 50)["loss"])


# Contradictions ---------------------------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "qlora needs precision": {"methods": ["qlora"], "precisions": ["fp32"]},
    "lora, full needs a base of fp32": {"methods": ["lora", "full"], "precisions": ["nf4", "int8"]},
    "lists bitfit, which whole_model: false refuses": {"methods": ["lora", "bitfit"], "whole_model": False},
    "secure_sum is false; set secure_sum": {"noise": "nodes", "epsilon": 1, "delta": 1e-6},
    "epsilon is missing; give epsilon and delta": {"noise": "nodes", "secure_sum": True},
    "a secure sum has at most 2048 nodes": {"secure_sum": True, "minimum_nodes": 3000},
    "nothing measured leaves": {"secure_sum": True, "evaluate": False, "metrics": {"loss": 0.1}},
    "fewest_summed: found 8": {"secure_sum": True, "minimum_nodes": 5, "fewest_summed": 8},
    "epsilon and delta are one promise": {"epsilon": 1},
    "example_epsilon and example_delta": {"example_delta": 1e-6},
    "time_zone: missing": {"quiet_hours": ["22:00-06:00"]},
    "nothing here is counted in days": {"time_zone": "UTC"},
    "ends as it begins": {"time_zone": "UTC", "quiet_hours": ["06:00-06:00"]},
    "cover the whole day": {"time_zone": "UTC", "quiet_hours": ["22:00-06:00", "05:00-23:00"]},
    "objectives: sft stands twice": {"objectives": ["sft", "dpo", "sft"]},
    "epsilon: input should be greater than 0": {"epsilon": 0, "delta": 1e-6},
    "delta: input should be less than 1": {"epsilon": 1, "delta": 1},
    "no time zone of this machine": {"time_zone": "Zurich/Europe", "rounds_per_day": 1},
    "quiet_hours: found 22-6; expected two times": {"time_zone": "UTC", "rounds_per_day": 1, "quiet_hours": ["22-6"]},
    "metrics.loss: input should be greater than 0": {"metrics": {"loss": 0}},
    "fewest_summed: input should be greater than or equal to 3": {"fewest_summed": 2},
    "did you mean 'learning_rate'?": {"learning_rat": 1},
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_a_contradiction_is_said_when_the_file_is_read(said, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(str(CONTRADICTIONS[said]).replace("True", "true").replace("False", "false"))  # which is YAML
    with pytest.raises(ConfigurationError) as found:
        read_policy(path)
    assert said in str(found.value)
    assert len(found.value.problems) == 1


def test_all_contradictions_are_said_at_once():
    told = {}
    for said in (
        "qlora needs precision",
        "cover the whole day",
        "epsilon and delta are one promise",
        "objectives: sft stands twice",
    ):
        told |= CONTRADICTIONS[said]
    with pytest.raises(ConfigurationError) as found:
        parse(told, Policy, source="p")
    assert len(found.value.problems) == 4


def test_a_metric_that_stands_twice_is_an_error(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("metrics:\n  loss: 0.1\n  loss: 0.2\n")
    with pytest.raises(ConfigurationError, match="'loss' stands twice"):
        read_policy(path)


# The names --------------------------------------------------------------------------------------------------------------


def test_every_rule_is_a_key_of_the_file_and_every_key_that_refuses_a_rule():
    assert set(Policy.model_fields) - set(RULES) == {"time_zone", "metrics", "measured_rows", "examples"}
    assert set(RULES) <= set(Policy.model_fields)
    assert {rule for rule, *_ in CASES} | {"days", "quiet_hours", "rounds_per_day", "upload_bytes"} == set(RULES)


@pytest.mark.parametrize(
    "reason", ["policy", "policy.", "policy.x", "policy.rank,", "policy.rank,rank", "policy.rank\x1b[2J", "data"]
)
def test_a_coordinator_shows_no_rule_that_there_is_not(reason):
    assert refused(reason) is None


def test_a_coordinator_shows_the_rules_that_refused():
    assert refused(code(["rank", "rounds"])) == "the node's policy refuses it: rank, rounds"
    assert len(get_args(Plan.model_fields["objective"].annotation)) == 9  # or the table above lacks one
