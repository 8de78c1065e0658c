"""The command: what the user can mend ends with code 2, found / expected / what to do, no traceback, and nothing written."""

import json
import logging
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import fedge
from protocol.files import read_adapter

ROWS = [{"input_text": f"Where is number {at}?", "target_text": f"In house {at}."} for at in range(6)]
LABELLED = [{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(6)]
CANARY = "Zanzibar-4711"


@pytest.fixture(scope="module")
def stories(data):
    return str(data / "models" / "stories260k-hf")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command as its entry point does; an exception that escapes is a traceback, and fails the test."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedge", *map(str, arguments)])
        for handler in logging.getLogger("flwr").handlers:  # in a process of its own it writes to this stderr
            if isinstance(handler, logging.StreamHandler):
                monkeypatch.setattr(handler, "stream", sys.stderr)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            fedge.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return ended.value.code or 0, said.out, said.err

    return run


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def job(folder, base, **changes):
    """A small job over ``rows.jsonl`` of the folder."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", LABELLED if changes.get("objective") == "classification" else ROWS)
    content = {
        "base_model": base,
        "lora": {"r": 2, "lora_alpha": 4},
        "data": {"train": "rows.jsonl"},
        "training": {"batch_size": 2, "max_steps": 1},
        "output": str(folder / "out"),
    }
    return write_yaml(folder / "job.yaml", content | changes)


def scenario(folder, base, nodes=None, **changes):
    if nodes is None and "partition" not in changes:
        write_rows(folder / "rows.jsonl", ROWS)
        nodes = [{"name": "one", "train": "rows.jsonl"}, {"name": "two", "train": "rows.jsonl", "max_rank": 1}]
    plan = {"base_model": base, "lora": {"r": 2}, "training": {"batch_size": 2, "max_steps": 1}} | changes.pop("plan", {})
    content = {"federation": {"plan": plan, "rounds": {"count": 1}, "output": str(folder / "out")}} | changes
    return write_yaml(folder / "scenario.yaml", content | ({"nodes": nodes} if nodes else {}))


def refused(call, folder, *arguments):
    """The message of a command that must end with code 2 and must leave no trace."""
    code, out, err = call(*arguments)
    assert code == 2, err
    assert out == ""
    assert not (folder / "out").exists(), sorted((folder / "out").rglob("*"))
    assert CANARY not in err
    return err


# Data -----------------------------------------------------------------------------------------------------------------


def csv_with_wrong_columns(folder):
    (folder / "rows.csv").write_text("input_text,target_text\nwhere,here\nonly one\n")
    return "rows.csv"


def csv_with_other_fields(folder):
    (folder / "rows.csv").write_text(f"question,reply\n{CANARY},{CANARY}\n")
    return "rows.csv"


def not_utf8(folder):
    (folder / "rows.jsonl").write_bytes('{"input_text": "北京", "target_text": "上海"}\n'.encode("gb18030"))
    return "rows.jsonl"


def truncated_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    content = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(content[: len(content) // 2])
    return "rows.parquet"


def a_row_without_its_answer(folder):
    write_rows(folder / "rows.jsonl", [*ROWS, {"input_text": CANARY}])
    return "rows.jsonl"


def empty(folder):
    (folder / "rows.jsonl").write_text("")
    return "rows.jsonl"


def one_row_alone(folder):
    write_rows(folder / "rows.jsonl", ROWS[:1])
    return "rows.jsonl"


DATA = [
    (lambda folder: "nowhere.jsonl", ["nowhere.jsonl", "no such file", "give the path"]),
    (empty, ["rows.jsonl", "no rows", "expected at least one"]),
    (one_row_alone, ["rows.jsonl", "1 row", "at least 2", "evaluate"]),
    (a_row_without_its_answer, ["rows.jsonl", "1 of 7 rows", "line 7", "target_text", "expected text"]),
    (csv_with_wrong_columns, ["rows.csv", "line 3", "2 columns"]),
    (csv_with_other_fields, ["rows.csv", "line 2", "question, reply", "expected input_text and target_text"]),
    (not_utf8, ["rows.jsonl", "UTF-8", "save the file as"]),
    (truncated_parquet, ["rows.parquet", "Parquet"]),
]
NAMES = [
    "missing",
    "empty",
    "one row alone",
    "a row without its answer",
    "CSV with wrong columns",
    "CSV with other fields",
    "not UTF-8",
    "truncated Parquet",
]


@pytest.mark.parametrize(("spoil", "said"), DATA, ids=NAMES)
def test_data_that_cannot_train_is_refused(call, tmp_path, stories, spoil, said):
    config = job(tmp_path, stories, data={"train": spoil(tmp_path)})
    err = refused(call, tmp_path, "train", config)
    assert [part for part in said if part not in err] == [], err


@pytest.mark.parametrize(("spoil", "said"), DATA, ids=NAMES)
def test_a_simulated_node_with_such_data_is_refused_in_its_own_words(call, tmp_path, stories, spoil, said):
    write_rows(tmp_path / "good.jsonl", ROWS)
    nodes = [{"name": "good", "train": "good.jsonl"}, {"name": "poor", "train": spoil(tmp_path)}]
    err = refused(call, tmp_path, "simulate", scenario(tmp_path, stories, nodes))
    assert [part for part in said if part not in err] == [], err


def test_a_label_that_the_plan_does_not_list_is_refused(call, tmp_path, stories):
    write_rows(tmp_path / "rows.jsonl", [*LABELLED, {"text": CANARY, "label": CANARY}])
    config = job(tmp_path, stories, objective="classification", data={"train": "rows.jsonl", "labels": ["a", "b"]})
    err = refused(call, tmp_path, "train", config)
    assert "line 7: label is none of the labels that the plan lists (2 are known)" in err


def test_classification_with_one_label_alone_is_refused(call, tmp_path, stories):
    write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}] * 4)
    err = refused(call, tmp_path, "train", job(tmp_path, stories, objective="classification"))
    assert "label" in err


def test_a_wrong_held_out_file_is_refused_before_anything_is_trained(call, tmp_path, stories):
    write_rows(tmp_path / "held.jsonl", [{"input_text": CANARY}])
    err = refused(call, tmp_path, "train", job(tmp_path, stories, data={"train": "rows.jsonl", "evaluate": "held.jsonl"}))
    assert "held.jsonl" in err
    assert "target_text" in err


def test_rows_of_which_no_answer_is_within_max_length_are_refused_with_the_key_to_raise(call, tmp_path, stories):
    config = job(tmp_path, stories, data={"train": "rows.jsonl", "max_length": 4})
    assert "data.max_length" in refused(call, tmp_path, "train", config)


def test_text_that_no_tokenizer_can_take_is_refused(call, tmp_path, stories):
    lone = [{"input_text": f"{CANARY} \ud800", "target_text": "x"}, ROWS[0], ROWS[1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lone))
    assert "line 1" in refused(call, tmp_path, "train", job(tmp_path, stories))


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "simulate", "evaluate"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("lora: {r: 4\nfoo: [", "line "),
        ("a: 1\na: 2\n", "stands twice"),
        ("", "empty file"),
        ("- a\n- b\n", "found a list"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("base_modle: x\n", "base_modle: unknown key"),
        ("a: &a [*a]\n", "unknown key"),
        ("? [1, 2]\n: 3\n", "plain text"),
        ("key: \x07\n", "broken YAML"),
    ],
    ids=["missing", "broken", "key twice", "empty", "list", "not UTF-8", "unknown key", "endless alias", "list key", "bell"],
)
def test_a_file_that_is_no_configuration_is_refused(call, tmp_path, verb, content, said):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    err = refused(call, tmp_path, verb, path)
    assert said in err
    assert str(path) in err


def test_all_mistakes_of_a_job_are_told_at_once_with_the_keys_that_were_meant(call, tmp_path, stories):
    config = job(tmp_path, stories, lora={"rank": 4, "r": 0}, trainnig={}, precision="nf4")
    err = refused(call, tmp_path, "train", config)
    assert "trainnig: unknown key; did you mean 'training'?" in err
    assert "lora.rank: unknown key" in err
    assert "lora.r: " in err


def test_a_pair_of_keys_that_makes_no_sense_is_refused_with_the_remedy(call, tmp_path, stories):
    err = refused(call, tmp_path, "train", job(tmp_path, stories, precision="nf4"))
    assert "write method: qlora" in err


def test_modules_that_the_base_lacks_are_refused_with_those_that_it_has(call, tmp_path, stories):
    err = refused(call, tmp_path, "train", job(tmp_path, stories, lora={"target_modules": ["query"]}))
    assert "no layer of the base is named query" in err
    assert "q_proj" in err


@pytest.mark.parametrize(
    "arguments", [["fly"], ["train"], ["train", "x.yaml", "--nope"], ["generate", "hi", "--max-new-tokens", "0"]]
)
def test_a_command_line_that_makes_no_sense_ends_with_code_2(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert err


def test_an_unknown_precision_is_refused_with_those_that_there_are(call, tmp_path):
    err = refused(call, tmp_path, "generate", "hi", "--precision", "int3")
    assert "nf4" in err


# Models and adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "no-such-owner/no-such-model"])
def test_a_model_that_is_not_there_is_refused(call, tmp_path, name):
    err = refused(call, tmp_path, "train", job(tmp_path, name))
    assert name in err
    err = refused(call, tmp_path, "simulate", scenario(tmp_path, name))
    assert name in err
    err = refused(call, tmp_path, "generate", "hi", "--base-model", name)
    assert name in err


def test_a_partition_over_a_model_that_is_not_there_writes_no_nodes(call, tmp_path):
    write_rows(tmp_path / "all.jsonl", ROWS)
    config = scenario(tmp_path, "./nowhere", partition={"rows": "all.jsonl", "nodes": 2})
    assert "nowhere" in refused(call, tmp_path, "simulate", config)


def test_a_model_with_cut_weights_is_refused(call, tmp_path, stories):
    from pathlib import Path

    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(stories).iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 500_000 if file.suffix == ".safetensors" else None])
    assert "model" in refused(call, tmp_path, "train", job(tmp_path, str(folder)))


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    """A folder with a job, what it trained, and what the command said about it."""
    folder = tmp_path_factory.mktemp("trained")
    # A warm-up would spend the only steps at a learning rate of zero.
    training = {"batch_size": 2, "max_steps": 3, "warmup_ratio": 0.0}
    config = job(folder, stories, data={"train": "rows.jsonl", "evaluate": "rows.jsonl"}, training=training)
    return folder, config


def test_train_says_one_json_line_and_leaves_an_adapter(call, trained):
    folder, config = trained
    code, out, _ = call("train", config, "--json")
    assert code == 0
    (line,) = out.splitlines()
    told = json.loads(line)
    assert told["training"]["train-steps"] == 3
    assert told["evaluation"]["loss"] > 0
    adapter, manifest = read_adapter(folder / "out" / "adapter")
    assert told["adapter"] == str(folder / "out" / "adapter")
    assert max(adapter.ranks().values()) == 2
    assert manifest.round == 1
    assert not list((folder / "out").rglob(".*"))


def test_evaluate_says_one_json_line_with_the_base_and_each_adapter(call, trained):
    folder, config = trained
    code, out, _ = call("evaluate", config, "--adapter", folder / "out" / "adapter", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["rows"] == len(ROWS)
    assert list(told["results"]) == ["base", str(folder / "out" / "adapter")]
    assert all(set(values) == {"loss", "perplexity", "accuracy"} for values in told["results"].values())


def test_generate_says_one_json_line_with_an_answer_for_every_question(call, trained, stories):
    adapter = trained[0] / "out" / "adapter"
    code, out, _ = call("generate", "Hi", "你好", "--adapter", adapter, "--max-new-tokens", "4", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["questions"] == ["Hi", "你好"]
    assert {who: len(texts) for who, texts in told["answers"].items()} == {"base": 2, str(adapter): 2}


def test_simulate_says_one_json_line_with_what_each_node_chose(call, tmp_path, stories):
    code, out, _ = call("simulate", scenario(tmp_path, stories), "--json")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    assert told["plans"] == {
        "one": {"method": "lora", "precision": "fp32", "r": 2},
        "two": {"method": "lora", "precision": "fp32", "r": 1},
    }
    assert told["evaluation"].keys() == told["plans"].keys()
    assert read_adapter(tmp_path / "out" / "adapter")[1].round == 1


def test_a_comparison_says_one_json_line_with_a_figure_for_every_way_of_training(call, tmp_path, stories):
    code, out, _ = call("simulate", scenario(tmp_path, stories, compare=True), "--json")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    assert told["institutions"].keys() == told["plans"].keys() == {"one", "two"}
    for figures in [told["mean"], *told["institutions"].values()]:
        assert {"base", "local", "local_mean", "federated", "centralised"} <= figures.keys()
        assert all(0 <= value <= 1 for value in figures.values())


def test_an_adapter_of_another_base_is_refused(call, trained, tmp_path, encoder):
    adapter = trained[0] / "out" / "adapter"
    for arguments in (
        ["generate", "hi", "--adapter", adapter, "--base-model", encoder],
        ["evaluate", job(tmp_path, encoder, data={"train": "rows.jsonl", "evaluate": "rows.jsonl"}), "--adapter", adapter],
    ):
        err = refused(call, tmp_path, *arguments)
        assert "was trained on base" in err
        assert "load the base that it was trained on" in err


@pytest.mark.parametrize("missing", ["nothing at all", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_not_whole_is_refused(call, trained, tmp_path, stories, missing):
    folder = tmp_path / "adapter"
    if missing != "nothing at all":
        folder.mkdir()
        for file in (trained[0] / "out" / "adapter").iterdir():
            if file.name != missing:
                (folder / file.name).write_bytes(file.read_bytes())
    err = refused(call, tmp_path, "generate", "hi", "--adapter", folder, "--base-model", stories)
    assert "no such file" in err
    assert "expected a folder with adapter_model.safetensors and adapter_config.json" in err


def test_evaluate_without_rows_to_measure_on_takes_the_share_that_training_holds_out(call, tmp_path, stories):
    code, out, err = call("evaluate", job(tmp_path, stories), "--json")
    assert (code, json.loads(out)["rows"]) == (0, 1), err


def test_a_training_that_is_refused_leaves_an_older_result_as_it_was(call, tmp_path, stories):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    code, _, _ = call("train", job(tmp_path, stories, data={"train": "nowhere.jsonl"}))
    assert code == 2
    assert [path.name for path in out.rglob("*")] == ["precious.txt"]


# Debugging ------------------------------------------------------------------------------------------------------------


def test_debug_lets_the_exception_through(monkeypatch, tmp_path):
    from protocol.errors import ConfigurationError

    monkeypatch.setattr(sys, "argv", ["fedge", "train", str(tmp_path / "nowhere.yaml"), "--debug"])
    with pytest.raises(ConfigurationError):
        fedge.main()
