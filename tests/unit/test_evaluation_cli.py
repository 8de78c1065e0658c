"""``fedge evaluate`` with its options, and every block and table of docs/evaluation.md."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedge import app, main
from protocol.configuration import parse
from protocol.writer_settings import JudgeSettings
from strategies.evaluation.perturbations import KINDS
from strategies.evaluation.wanted import FIGURES
from strategies.evaluation_commands import evaluate

TEXT = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
CANARY = "Zanzibar-4711"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def write_rows(path, count, question):
    rows = [{"input_text": f"{question} {n}?", "target_text": f"{n} crowns for it, {CANARY}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page's first two blocks leave behind."""
    place = tmp_path_factory.mktemp("docs")
    write_rows(place / "rows.jsonl", 6, "What is the fee of plan")
    write_rows(place / "general.jsonl", 3, "Who keeps number")
    (place / "job.yaml").write_text(blocks("yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train, plain = (call(line) for line in blocks("bash")[0].splitlines())
    assert "adapter" in train
    assert set(json.loads(plain)) == {"rows", "results"}
    assert {frozenset(each) for each in json.loads(plain)["results"].values()} == {
        frozenset({"loss", "perplexity", "accuracy"})
    }
    return place, json.loads(plain)


def call(line):
    done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedge", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_the_documented_commands_compare_and_report(folder, monkeypatch):
    place, plain = folder
    monkeypatch.chdir(place)
    whole, some = blocks("bash")[1].splitlines()
    shown = call(whole)
    for part in ("6 rows of rows.jsonl", "typos: change", "case: change", "forgetting: 3 rows", "tokens-per-second"):
        assert part in shown
    told = json.loads((place / "runs/report/report.json").read_text())
    assert told["rows"] == 6
    for who, figures in plain["results"].items():
        assert {name: told["results"][who][name] for name in figures} == pytest.approx(figures, rel=1e-6)
    assert CANARY not in shown + (place / "runs/report/report.md").read_text() + json.dumps(told)
    named = json.loads(call(some))
    assert [set(each) for each in named["results"].values()] == [{"perplexity", "rouge-l"}] * 2
    assert named["results"]["base"]["perplexity"] == pytest.approx(plain["results"]["base"]["perplexity"], rel=1e-6)
    assert {"rows", "results", "intervals", "differences", "about"} == set(named)


def test_the_documented_python_runs(folder, monkeypatch):
    monkeypatch.chdir(folder[0])
    exec(compile(blocks("python")[0], "docs", "exec"), {})  # noqa: S102


def test_the_documented_judge_is_one():
    parse(yaml.safe_load(blocks("yaml")[1]), JudgeSettings, source="docs")


def test_every_figure_of_every_objective_is_documented():
    rows = [[cell.strip() for cell in line.split(" | ")] for line in re.findall(r"^\| (`.*) \|$", TEXT, re.MULTILINE)]
    told = {objective: set() for objective in FIGURES}
    for names, objectives, *_ in (row for row in rows if len(row) == 4):
        for objective in objectives.split(", "):
            told[objective] |= set(re.findall(r"`(.*?)`", names))
    assert told == {objective: set(names) for objective, names in FIGURES.items()}


def test_every_option_and_perturbation_is_documented():
    import inspect

    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(evaluate).parameters} - {"--config", "--as-json"}
    assert [option for option in options if option not in TEXT] == []
    assert [kind for kind in KINDS if f"| `{kind}` |" not in TEXT] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics", "bleau"], ["--metrics bleau", "rouge-l"]),
        (["--robustness", "noise"], ["noise", "typos"]),
        (["--robustness", "paraphrase"], ["--writer"]),
        (["--probe", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--judge", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--robustness", "options"], ["options A, B"]),
        (["--max-new-tokens", "1"], ["max-new-tokens"]),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_and_leaves_no_report(folder, monkeypatch, capsys, options, said):
    place, _ = folder
    monkeypatch.chdir(place)
    err = refused(monkeypatch, capsys, "job.yaml", *options, "--report", place / "unwritten")
    assert [part for part in said if part not in err] == []
    assert not (place / "unwritten").exists()
    assert CANARY not in err


def test_a_stage_is_measured_by_its_own_objective_and_rows(folder, monkeypatch, capsys):
    """The base alone: what counts is which rows and which figures are taken."""
    place, _ = folder
    monkeypatch.chdir(place)
    pair = {"prompt": "Fee?", "chosen": "3 crowns", "rejected": "None."}
    (place / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 10)
    stages = [
        {"data": {"train": "general.jsonl", "evaluate": "rows.jsonl"}},
        {"objective": "reward", "data": {"train": "pairs.jsonl"}},
    ]
    (place / "staged.yaml").write_text(yaml.safe_dump({"data": {"max_length": 64}, "stages": stages}))
    for named in ("1", "sft"):
        assert json.loads(call(f"fedge evaluate staged.yaml --stage {named} --json"))["rows"] == 6
    last = json.loads(call("fedge evaluate staged.yaml --json"))
    assert (last["rows"], set(last["results"]["base"])) == (1, {"loss", "accuracy"}), "a tenth, held out"
    assert "the job has 1 (sft), 2 (reward)" in refused(monkeypatch, capsys, "staged.yaml", "--stage", "kto")


def test_blocks_of_text_are_not_called_rows_and_few_of_them_have_no_interval(folder, monkeypatch):
    place, _ = folder
    monkeypatch.chdir(place)
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": f"Room {n} is open."}) + "\n" for n in range(6)))
    told = json.loads(call("fedge evaluate job.yaml --metrics loss --probe texts.jsonl --json"))
    assert told["probe"]["texts"] == 6
    assert told["probe"]["rows"] < 5
    assert told["probe"]["intervals"]["base"]["loss"] == [None, None]
    assert None not in told["intervals"]["base"]["loss"]
