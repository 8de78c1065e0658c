"""A comparison of a base and adapters: the oracles are ``measure`` in rounds, plain transformers, and counts by hand."""

import json
import math

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.errors import ConfigurationError, DataError
from protocol.plan import Plan
from protocol.writer_settings import JudgeSettings
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.data.encode import prompt_ids
from strategies.data.formats import load
from strategies.evaluation import harness
from strategies.evaluation.comparison import compare
from strategies.evaluation.measure import measure
from strategies.evaluation.report import JSON, MARKDOWN, Setting, as_json, write
from strategies.evaluation.wanted import FIGURES, Wanted
from strategies.evaluation.wins import contest
from strategies.judge import Judge
from strategies.methods import registry

CANARY = "Zanzibar-4711"
QUESTIONS = [
    {"input_text": f"Which is it, {n}?\nA. a red ball\nB. a green ball\nC. a dog", "target_text": "ABC"[n % 3]}
    for n in range(6)
]
ANSWERS = [{"input_text": f"Where is {CANARY} number {n}?", "target_text": f"In house {n}, 北京"} for n in range(4)]


def rows_file(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def plan_of(base, objective="sft", **more):
    return Plan.model_validate(
        {"base_model": base, "objective": objective, "lora": {"r": 2}, "training": {"batch_size": 4}, **more}
    )


def drawn(plan, seed):
    rng = np.random.default_rng(seed)
    shape = registry.shape(find(plan.base_model), plan)

    def tensor(*size):
        return (0.1 * rng.standard_normal(size)).astype(np.float32)

    factors = {name: Factors(tensor(2, d_in), tensor(d_out, 2)) for name, (d_out, d_in) in shape.modules.items()}
    return Adapter(factors, {name: tensor(*size) for name, size in shape.dense.items()})


def contestants(plan):
    return {"base": (plan, None), "one": (plan, drawn(plan, 1)), "two": (plan, drawn(plan, 2))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One comparison with all that needs no other model, over the embedded decoder."""
    folder = tmp_path_factory.mktemp("compared")
    path, probe = rows_file(folder, "rows.jsonl", QUESTIONS + ANSWERS), rows_file(folder, "general.jsonl", QUESTIONS)
    plan = plan_of("tiny")
    wanted = Wanted(generate=True, robustness=("options",), probe=probe, draws=200)
    return plan, path, probe, contestants(plan), compare(plan, find("tiny"), path, contestants(plan), wanted)


def test_figures_are_those_of_rounds_on_the_same_rows(written):
    plan, path, probe, models, found = written
    for who, (use, adapter) in models.items():
        for table, rows in ((found.table, path), (found.probe, probe)):
            expected = measure(use, find("tiny"), load(rows, plan), adapter)
            assert {name: table.figures[who][name].value for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found.table.rows == 10


def test_answers_are_those_of_plain_transformers_and_their_length_leaves_room_for_the_right_one(written):
    import torch

    plan, path, _, models, found = written
    rows = load(path, plan)
    model, tokenizer = with_adapter(*models["one"][:1], find("tiny"), models["one"][1])
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
    assert longest + 1 < found.max_new_tokens <= longest + 4
    right = cut = 0
    for row in rows:
        ids = torch.tensor([prompt_ids(row.prompt, tokenizer)])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=found.max_new_tokens
            )
        right += tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip() == row.answer
        cut += len(made[0]) - ids.shape[1] == found.max_new_tokens
    assert found.table.figures["one"]["exact-match"].value == right / len(rows)
    assert found.table.figures["one"]["cut-answers"].value == cut / len(rows)
    assert found.bleu_tokenizer == "zh"


def test_robustness_compares_the_same_rows_before_and_after(written):
    """Oracle: ``measure`` on the rows that have options, and the change is what the perturbed table has more."""
    plan, _, probe, models, found = written
    one = found.robustness["options"]
    assert one.clean.rows == len(QUESTIONS)
    clean = measure(plan, find("tiny"), load(probe, plan), models["two"][1])
    assert one.clean.figures["two"]["loss"].value == pytest.approx(clean["loss"], rel=1e-6)
    for name, change in one.changes["two"].items():
        apart = one.perturbed.figures["two"][name].value - one.clean.figures["two"][name].value
        assert change.value == pytest.approx(apart)
    assert "tokens-per-second" not in one.changes["two"]


def test_every_pair_of_models_has_its_difference(written):
    found = written[-1]
    assert list(found.table.differences) == [("one", "base"), ("two", "base"), ("two", "one")]
    for (of, against), each in found.table.differences.items():
        apart = found.table.figures[of]["loss"].value - found.table.figures[against]["loss"].value
        assert each["loss"].value == pytest.approx(apart)
        assert each["loss"].low <= apart <= each["loss"].high


def test_the_report_holds_every_figure_and_no_text_of_a_row(written, tmp_path):
    plan, path, probe, _, found = written
    (tmp_path / "notes.txt").write_text("keep")
    setting = Setting(plan, find("tiny"), path, probe, 0)
    write(tmp_path, found, setting)
    plots = {"figures.png", "robustness.png", "forgetting.png"}
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", JSON, MARKDOWN, *plots}
    told = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(as_json(found, setting)))
    assert told["results"]["two"]["loss"] == found.table.figures["two"]["loss"].value
    assert set(told["results"]["base"]) == set(FIGURES["sft"])
    low, high = told["intervals"]["two"]["loss"]
    assert low < told["results"]["two"]["loss"] < high
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    for name in (*FIGURES["sft"], "Forgetting", "Robustness: options", "`one`"):
        assert name in text
    assert all(f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert CANARY not in text + (tmp_path / JSON).read_text()
    assert not [value for value in told["results"]["two"].values() if not math.isfinite(value)]


def test_a_classifier_is_compared_with_calibration(tmp_path, encoder):
    """Oracle: probabilities of plain transformers on one row after the other, and scikit-learn's Brier score."""
    import torch
    from sklearn.metrics import brier_score_loss

    plan = plan_of(encoder, "classification", data={"labels": ["a", "b"]})
    texts = ["good", "a bad day", "no", "it is a very good day for it", "yes", "never again, I said"]
    path = rows_file(tmp_path, "rows.jsonl", [{"text": text, "label": "ab"[at % 2]} for at, text in enumerate(texts)])
    models = contestants(plan)
    found = compare(plan, find(encoder), path, models, Wanted(robustness=("case",), draws=100))
    model, tokenizer = with_adapter(plan, find(encoder), models["one"][1])
    with torch.inference_mode():
        sure = [float(model(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(-1)[1]) for text in texts]
    figures = found.table.figures["one"]
    assert figures["brier"].value == pytest.approx(2 * brier_score_loss([0, 1] * 3, sure), rel=1e-4)
    assert set(figures) == set(FIGURES["classification"])
    assert sum(one.rows for one in found.reliability["one"]) == len(texts)
    write(tmp_path / "report", found, Setting(plan, find(encoder), path, None, 0))
    assert (tmp_path / "report" / "reliability.png").is_file()


@pytest.mark.parametrize(
    ("objective", "row", "more"),
    [
        ("pretraining", {"text": "Tim had a red ball. " * 30}, {}),
        ("regression", {"text": "four", "label": 4}, {}),
        ("dpo", {"prompt": "Who?", "chosen": "Tim.", "rejected": "I do not know."}, {}),
        ("kto", {"prompt": "Who?", "completion": "Tim.", "label": True}, {}),
        ("reward", {"prompt": "Who?", "chosen": "Tim.", "rejected": "I do not know."}, {}),
    ],
)
def test_every_objective_is_compared_by_the_figures_of_rounds(tmp_path, objective, row, more):
    plan = plan_of("tiny", objective, data={"max_length": 64}, **more)
    other = {**row, "label": not row["label"]} if objective == "kto" else row
    path = rows_file(tmp_path, "rows.jsonl", [row, other, row])
    models = contestants(plan)
    found = compare(plan, find("tiny"), path, models, Wanted(draws=50))
    for who, (use, adapter) in models.items():
        expected = measure(use, find("tiny"), load(path, plan), adapter)
        assert {name: figure.value for name, figure in found.table.figures[who].items()} == pytest.approx(expected, rel=1e-6)
        assert set(expected) <= set(FIGURES[objective])


def test_a_model_of_preferences_is_probed_and_judged_by_what_it_writes(tmp_path):
    """Oracle: ``measure`` on the general rows, with the same adapter and a plan of objective sft."""
    row = {"prompt": "Who?", "chosen": "Tim.", "rejected": "I do not know."}
    path, probe = rows_file(tmp_path, "rows.jsonl", [row] * 3), rows_file(tmp_path, "general.jsonl", ANSWERS)
    plan = plan_of("tiny", "dpo")
    models = contestants(plan)
    wanted = Wanted(probe=probe, judge=JudgeSettings(base_model="tiny"), draws=50)
    found = compare(plan, find("tiny"), path, models, wanted)
    general = plan_of("tiny")
    for who, (_, adapter) in models.items():
        expected = measure(general, find("tiny"), load(probe, general), adapter)
        assert {name: figure.value for name, figure in found.probe.figures[who].items()} == pytest.approx(expected, rel=1e-6)
    assert list(found.wins) == ["one", "two"]
    assert set(found.table.figures["one"]) == set(FIGURES["dpo"])


def test_only_what_is_named_is_measured_and_nothing_is_written_for_it(tmp_path):
    path = rows_file(tmp_path, "rows.jsonl", ANSWERS)
    plan = plan_of("tiny")
    found = compare(plan, find("tiny"), path, contestants(plan), Wanted(metrics=("perplexity",), draws=50))
    assert [list(each) for each in found.table.figures.values()] == [["perplexity"]] * 3
    assert found.max_new_tokens is None
    found = compare(plan, find("tiny"), path, {"base": (plan, None)}, Wanted(metrics=("rouge-l",), max_new_tokens=3, draws=50))
    assert list(found.table.figures["base"]) == ["rouge-l"]
    assert found.max_new_tokens == 3


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path):
    path = rows_file(tmp_path, "rows.jsonl", [*ANSWERS, {"input_text": "where " * 300, "target_text": "here"}])
    plan = plan_of("tiny", data={"max_length": 100})
    found = compare(plan, find("tiny"), path, {"base": (plan, None)}, Wanted(draws=50))
    assert (found.table.rows, found.dropped) == (4, 1)
    with pytest.raises(DataError, match=r"data\.max_length"):
        compare(plan_of("tiny", data={"max_length": 3}), find("tiny"), path, {"base": (plan, None)}, Wanted(draws=50))


def test_a_win_is_what_the_judge_prefers_in_both_orders():
    """Oracle: counted by hand. This judge likes the longer answer, and of two with a comma the one that it sees first."""

    def ask(prompts, options):
        said = []
        for prompt in prompts:
            text = prompt[-1]["content"]
            one, other = (text.split(f"<answer_{letter}>\n")[1].split("\n</answer")[0] for letter in "ab")
            both = "," in one and "," in other
            said.append([1.0, 0.0] if both or len(one) > len(other) else [0.0, 1.0])
        return said

    judge = Judge(ask, JudgeSettings(base_model="tiny"))
    questions = [({"role": "user", "content": "Why?"},)] * 5
    answers = ["longer than that", "no", "yes, yes, yes", "same", "long answer"]
    others = ["short", "not so", "no, never", "same", "short"]
    found = contest(judge, questions, answers, others)
    assert found.rate.value == (1 + 0 + 0.5 + 0.5 + 1) / 5
    assert (found.ties, found.disagreement, found.unreadable) == (2 / 5, 1 / 5, 0)


def test_a_model_against_itself_wins_half_whoever_judges(tmp_path):
    path = rows_file(tmp_path, "rows.jsonl", ANSWERS)
    plan = plan_of("tiny")
    same = {"base": (plan, None), "again": (plan, Adapter())}
    found = compare(plan, find("tiny"), path, same, Wanted(judge=JudgeSettings(base_model="tiny"), draws=50))
    assert found.wins["again"].rate.value == 0.5
    assert found.wins["again"].ties == 1


def test_what_cannot_be_measured_is_refused_at_once_before_anything_is_read(tmp_path):
    plan = plan_of("tiny", "classification", data={"labels": ["a", "b"]})
    wanted = Wanted(
        metrics=("bleu",),
        generate=True,
        robustness=("noise", "paraphrase"),
        judge=JudgeSettings(base_model="tiny"),
        harness=("arc_easy",),
    )
    with pytest.raises(ConfigurationError) as error:
        compare(plan, find("tiny"), tmp_path / "nowhere.jsonl", {"base": (plan, None)}, wanted)
    for said in ("--metrics bleu", "macro-f1", "--generate", "noise", "--writer", "--judge", "--harness"):
        assert said in str(error.value)
    assert len(error.value.problems) == 6
    with pytest.raises(ConfigurationError, match="robustness is for objective"):
        compare(plan_of("tiny", "dpo"), find("tiny"), tmp_path, {}, Wanted(robustness=("case",)))


def test_a_perturbation_that_changes_no_row_is_refused_with_what_it_needs(tmp_path):
    path, plan = rows_file(tmp_path, "rows.jsonl", ANSWERS), plan_of("tiny")
    with pytest.raises(DataError, match="options A, B"):
        compare(plan, find("tiny"), path, {"base": (plan, None)}, Wanted(robustness=("options",)))


def test_the_harness_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fedge[harness]'" in harness.missing(["arc_easy"])[0]


def test_the_harness_runs_a_task_on_a_model_with_an_adapter(tmp_path):
    """Oracle: which of two continuations plain transformers finds likelier, row by row."""
    pytest.importorskip("lm_eval", reason="pip install 'fedge[harness]'")
    import torch

    choices = [" in the park", " red"]
    rows = [{"question": f"Tim {n} has a ball. It is", "choices": choices, "answer": n % 2} for n in range(6)]
    data = rows_file(tmp_path, "rows.jsonl", rows)
    (tmp_path / "balls.yaml").write_text(
        f"task: balls\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    plan = plan_of("tiny")
    model, tokenizer = with_adapter(plan, find("tiny"), drawn(plan, 3))
    found = harness.scores(model, tokenizer, ["balls"], 2, tmp_path)

    def likely(question, choice):
        before, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
        with torch.inference_mode():
            table = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(table[at - 1, whole[at]]) for at in range(len(before), len(whole)))

    right = [
        likely(row["question"], choices[row["answer"]]) > likely(row["question"], choices[1 - row["answer"]]) for row in rows
    ]
    assert found["balls"]["acc"].value == pytest.approx(np.mean(right))
