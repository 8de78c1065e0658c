"""The plan and the federation that publishes it: what goes together, what does not, and the way through YAML and back."""

import pytest
import yaml
from pydantic import ValidationError

from protocol.configuration import load, parse
from protocol.data_settings import DataSettings
from protocol.errors import ConfigurationError
from protocol.federation import Federation
from protocol.method_settings import LoraSettings
from protocol.plan import Plan
from protocol.training_settings import TrainingSettings


def problems(content, model=Plan):
    with pytest.raises(ConfigurationError) as caught:
        parse(content, model, source="plan.yaml")
    return caught.value.problems


def test_an_empty_plan_is_a_plan():
    assert parse({}, Plan, source="x") == Plan()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(
            base_model="some/model",
            objective="classification",
            method="qlora",
            precision="nf4",
            lora=LoraSettings(
                r=3,
                lora_alpha=7.5,
                lora_dropout=0.1,
                target_modules=("q_proj", "v_proj"),
                use_rslora=True,
                rank_pattern={r"layers\.1\..*": 2, "q_proj": 1},
                alpha_pattern={r"layers\.1\..*": 3.5, "q_proj": 1},
                modules_to_save=("embed_tokens",),
                init_lora_weights="loftq",
            ),
            data=DataSettings(train="a.jsonl", evaluate="b.csv", labels=("yes", "no"), max_length=64),
            training=TrainingSettings(learning_rate=2e-4, max_steps=5, eval_steps=2, early_stopping_patience=3, seed=9),
        ),
    ],
    ids=["default", "everything"],
)
def test_a_plan_comes_back_from_yaml_and_json_as_it_was(plan, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
    assert load(path, Plan) == plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_qlora_on_a_base_that_is_not_quantised_is_refused_with_both_ways_out(precision):
    (line,) = problems({"method": "qlora", "precision": precision})
    assert "nf4" in line
    assert "method lora" in line
    assert precision in line


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_lora_on_a_quantised_base_is_refused_and_qlora_is_named(precision):
    (line,) = problems({"method": "lora", "precision": precision})
    assert "method: qlora" in line
    assert Plan(method="qlora", precision=precision).precision == precision


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"r": 1025}}, "lora.r"),
        ({"lora": {"r": 2.5}}, "lora.r"),
        ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha"),
        ({"lora": {"lora_alpha": float("inf")}}, "lora.lora_alpha"),
        ({"lora": {"lora_alpha": float("nan")}}, "lora.lora_alpha"),
        ({"lora": {"lora_dropout": 1}}, "lora.lora_dropout"),
        ({"lora": {"target_modules": []}}, "lora"),
        ({"lora": {"target_modules": ["q", " "]}}, "lora.target_modules"),
        ({"lora": {"rank_pattern": {"q": 0}}}, "lora.rank_pattern"),
        ({"lora": {"alpha_pattern": {"q": 0}}}, "lora.alpha_pattern"),
        ({"lora": {"modules_to_save": [""]}}, "lora.modules_to_save"),
        ({"lora": {"init_lora_weights": "eva"}}, "lora.init_lora_weights"),
        ({"training": {"proximal_mu": -1}}, "training.proximal_mu"),
        ({"base_model": "  "}, "base_model"),
        ({"objective": "dpoo"}, "objective"),
        ({"precision": "fp8"}, "precision"),
        ({"data": {"evaluate_fraction": 0}}, "data.evaluate_fraction"),
        ({"data": {"evaluate_fraction": 1}}, "data.evaluate_fraction"),
        ({"data": {"labels": ["a", "a"]}}, "data"),
        ({"data": {"labels": ["a", " a "]}}, "data"),
        ({"data": {"labels": ["a"]}}, "data"),
        ({"data": {"labels": []}}, "data"),
        ({"data": {"max_length": 0}}, "data.max_length"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"training": {"learning_rate": -2e-4}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"batch_size": 0}}, "training.batch_size"),
        ({"training": {"max_steps": 0}}, "training.max_steps"),
        ({"training": {"warmup_ratio": 1}}, "training.warmup_ratio"),
        ({"training": {"seed": -1}}, "training.seed"),
        ({"training": {"seed": 2**32}}, "training.seed"),
        ({"training": {"early_stopping_patience": 2}}, "training"),
        ({"training": {"optim": "adam"}}, "training.optim"),
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused_where_it_stands(content, where):
    assert all(line.startswith(where) for line in problems(content))


def test_early_stopping_with_evaluations_is_accepted():
    assert TrainingSettings(early_stopping_patience=2, eval_steps=5).early_stopping_patience == 2


def test_a_plan_cannot_be_changed():
    with pytest.raises(ValidationError):
        Plan().base_model = "other"


@pytest.mark.parametrize("r", [1, 3, 16, 64])
def test_at_another_rank_the_scaling_goes_with_the_root_so_that_steps_keep_their_length(r):
    """Entries that move by one length make a product of ``r`` directions move by ``scaling * sqrt(r)`` of it."""
    before = LoraSettings(r=12, lora_alpha=20, lora_dropout=0.2, target_modules=("q",))
    after = before.with_rank(r)
    assert after.r == r
    steps = [settings.lora_alpha / settings.r * settings.r**0.5 for settings in (before, after)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-14)
    assert (after.lora_dropout, after.target_modules) == (before.lora_dropout, before.target_modules)


@pytest.mark.parametrize("r", [1, 3, 16, 64])
def test_another_rank_of_rank_stabilised_lora_keeps_alpha(r):
    before = LoraSettings(r=12, lora_alpha=20, use_rslora=True)
    after = before.with_rank(r)
    assert after.lora_alpha == before.lora_alpha


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_refused(key):
    (line,) = problems({"lora": {key: {"q(": 1}}})
    assert "'q(' is no regular expression" in line


def test_a_rank_pattern_above_r_is_refused_with_the_way_out():
    (line,) = problems({"lora": {"r": 4, "rank_pattern": {"q": 8}}})
    assert "rank_pattern holds 8, more than r; make it r" in line


@pytest.mark.parametrize("alphas", [{"k": 1}, {"q": 1}, {"k": 1, "q": 1}])
def test_patterns_that_name_different_modules_are_refused(alphas):
    """With other keys, or in another order, a module could take its rank from one and its alpha from another."""
    (line,) = problems({"lora": {"rank_pattern": {"q": 2, "k": 2}, "alpha_pattern": alphas}})
    assert "name the same in both, in one order" in line


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "loftq"])
def test_a_start_that_is_taken_from_the_base_must_leave_room_to_be_taken_away_again(start):
    """An offer holds a rank of at most 1024."""
    (line,) = problems({"lora": {"r": 513, "init_lora_weights": start}})
    assert "sends twice the rank; r is 513, at most 512" in line


@pytest.mark.parametrize("key", ["train", "evaluate"])
def test_a_federation_that_names_data_files_is_refused(key):
    (line,) = problems({"plan": {"data": {key: "rows.jsonl"}}}, Federation)
    assert "each node brings its own data" in line


def test_a_federation_of_classifiers_must_agree_on_labels():
    (line,) = problems({"plan": {"objective": "classification"}}, Federation)
    assert "plan.data.labels is missing" in line
    good = {"plan": {"objective": "classification", "data": {"labels": ["a", "b"]}}}
    assert parse(good, Federation, source="x").plan.data.labels == ("a", "b")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"rounds": {"count": 0}}, "rounds.count"),
        ({"aggregation": {"rank_cap": 0}}, "aggregation.rank_cap"),
        ({"aggregation": {"server_learning_rate": 0}}, "aggregation.server_learning_rate"),
        ({"aggregation": {"server_learning_rate": float("inf")}}, "aggregation.server_learning_rate"),
        ({"rounds": {"minimum_nodes": 0}}, "rounds.minimum_nodes"),
        ({"rounds": {"wire": "fp8"}}, "rounds.wire"),
        ({"rounds": {"evaluate_every": -1}}, "rounds.evaluate_every"),
        ({"name": ""}, "name"),
    ],
    ids=str,
)
def test_round_settings_out_of_range_are_refused_where_they_stand(content, where):
    (line,) = problems(content, Federation)
    assert line.startswith(where)


LABELLED = {"objective": "classification", "data": {"labels": ["a", "b"]}}


@pytest.mark.parametrize("method", ["full", "freezing", "bitfit", "prompt-tuning", "ia3", "bottleneck"])
@pytest.mark.parametrize("rule", ["flora", "ffa", "rolora", "fedsa", "hetlora", "flexlora", "fedex"])
def test_a_rule_about_factors_is_refused_beside_a_method_that_trains_none(method, rule):
    (line,) = problems({"plan": {"method": method}, "aggregation": {"rule": rule}}, Federation)
    said = f"{rule} merges factors that nodes train, and {method} trains none; take rule product-delta"
    assert line == f"(whole file): plan.method: {said}"


@pytest.mark.parametrize("method", ["full", "freezing"])
def test_a_rule_that_draws_the_start_is_refused_where_whole_weights_train(method):
    (line,) = problems({"plan": {"method": method}, "aggregation": {"rule": "fedavg"}}, Federation)
    assert line.startswith("(whole file): plan.method: fedavg")
    assert parse({"plan": {"method": "bitfit"}, "aggregation": {"rule": "fedavg"}}, Federation, source="x")


def test_stages_go_on_from_each_other_only_with_adapters_of_one_kind():
    stages = [
        {"name": "a", "rounds": 1, "plan": {"method": m, "precision": p}} for m, p in (("qlora", "nf4"), ("adalora", "fp32"))
    ]
    assert parse({"stages": stages}, Federation, source="x")
    stages[1]["plan"] = {"method": "ia3"}
    (line,) = problems({"stages": stages}, Federation)
    assert "take lora or qlora or adalora" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo is for objective dpo, found sft"),
        (
            {"prompt": {"num_virtual_tokens": 3}},
            "prompt is for method prompt-tuning or prefix-tuning or p-tuning-v2, found lora",
        ),
        ({"method": "ia3", "lora": {"use_dora": True}}, "for method lora or qlora, found ia3"),
        ({"method": "full", "precision": "nf4"}, "trains the base, which nf4 weights cannot"),
        (LABELLED | {"freezing": {"frozen_share": 0.5}}, "freezing is for method freezing, found lora"),
    ],
    ids=str,
)
def test_a_section_that_nobody_would_read_is_refused(content, said):
    (line,) = problems(content, Plan)
    assert said in line


def test_a_later_stage_of_more_rank_is_refused_for_nodes_offer_once():
    stages = [{"name": "a", "rounds": 1, "plan": {"lora": {"r": r}}} for r in (8, 16)]
    (line,) = problems({"stages": stages}, Federation)
    assert "give the first stage the largest rank" in line
    assert parse({"stages": stages[::-1]}, Federation, source="x")
