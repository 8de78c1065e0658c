"""The planner's verbs under careless and hostile questions.

Of every test the claim is the same: what is wrong ends with exit code 2, what cannot be met with 1, no traceback is shown, and
each problem of a question stands in one answer with what would be accepted. The oracle is the question itself, which was
spoilt in places that the test names.
"""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

import fedge

SEVEN = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
SEVEN |= {"num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096}
MIXTURE = SEVEN | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
T5 = {"model_type": "t5", "d_model": 512, "num_layers": 6, "num_heads": 8, "vocab_size": 32128, "d_kv": 64, "d_ff": 2048}
ROWS = "".join(json.dumps({"input_text": f"plan {n}?", "target_text": f"{n} crowns"}) + "\n" for n in range(20))
LABELLED = "".join(json.dumps({"text": f"text {n}", "label": f"label {n % 3}"}) + "\n" for n in range(30))


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Runs a verb in an empty folder; returns its exit code, what it printed (read strictly with ``--json``) and its errors."""
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            fedge.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return ended.value.code or 0, _one_line(said.out) if "--json" in arguments and said.out else said.out, said.err

    return run


def _one_line(text):
    def no_number(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert text.count("\n") == 1
    return json.loads(text, parse_constant=no_number)


def written(content, name="config.json"):
    path = Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path.resolve()


@pytest.fixture
def seven(ask):
    """The planner before a model of 7 B parameters on a card of 24 GB."""

    def run(verb, *more):
        return ask(verb, "--base-model", written(SEVEN), "--gpu-memory", "24GB", *more, "--json")

    return run


# config.json -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        (json.dumps(SEVEN)[:60], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", "found a list"),
        (b'{"model_type": "llama", "x": "' + b"a" * 17_000_000 + b'"}', "over 16 MiB"),
        ({"model_type": "quantum"}, "known are bert"),
        ({"model_type": ["llama"]}, "known are bert"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        (SEVEN | {"hidden_size": 10**30}, "hidden_size is 1000"),
        (SEVEN | {"hidden_size": "4096"}, "hidden_size is '4096'"),
        (SEVEN | {"hidden_size": float("nan")}, "hidden_size is nan"),
        (SEVEN | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to"),
        (SEVEN | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (SEVEN | {"num_key_value_heads": 5}, "5 key and value heads do not divide 32"),
        (SEVEN | {"max_position_embeddings": -5}, "a context of -5"),
        (SEVEN | {"attention_dropout": -3.0}, "dropouts of 0.0 and -3.0"),
        (SEVEN | {"dtype": "float99"}, "float99"),
        (SEVEN | {"cls": 1}, "cls"),
        (MIXTURE | {"num_local_experts": 0}, "0 experts"),
        (MIXTURE | {"num_experts_per_tok": 100}, "100 of 8 experts"),
        (SEVEN | {"model_type": "qwen3_moe", "num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        (SEVEN | {"model_type": "qwen3_moe", "decoder_sparse_step": -1}, "decoder_sparse_step -1"),
        (T5 | {"num_decoder_layers": 0}, "no layers"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_configuration_is_refused_with_what_would_be_one(ask, content, said):
    code, _, err = ask("memory", "--config", written(content), "--json")
    assert code == 2
    assert said in err


def test_every_wrong_size_of_a_configuration_is_told_at_once(ask):
    wrong = {"hidden_size": -1, "num_hidden_layers": None, "vocab_size": 2.5, "intermediate_size": [3], "head_dim": "wide"}
    code, _, err = ask("memory", "--config", written(SEVEN | wrong))
    assert code == 2
    for name in wrong:
        assert f"{name} is " in err, name


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "x" * 5000, "folder", "dangling.json", "loop.json"])
def test_a_base_that_is_not_there_is_refused(ask, place):
    Path("folder").mkdir()
    Path("dangling.json").symlink_to("nowhere")
    Path("loop.json").symlink_to("loop.json")
    code, _, err = ask("plan", "--base-model", place, "--task", "rows=0")
    assert code == 2
    assert "give a folder with config.json, or that file" in err
    assert "rows: input should be greater than 0" in err, "the other problems are told too"


# fedge memory ------------------------------------------------------------------------------------------------------------


def test_targets_that_no_layer_bears_are_told_with_the_other_problems(ask):
    wrong = ("--targets", "q_proj,\x1b[31mzip", "--rank", 0, "--batch-size", 2**60, "--gpus", 4, "--device", "cpu")
    code, _, err = ask("memory", "--config", written(SEVEN), *wrong)
    assert code == 2
    for said in (
        "no linear layer \\x1b[31mzip",
        "q_proj",
        "rank: found 0",
        "batch: found 1152921504606846976",
        "gpus: found 4",
    ):
        assert said in err, said


# Hardware ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        (("--gpus", "-1"), "expected 0 to 1024"),
        (("--gpus", "2"), "give gpu_memory too"),
        (("--profile", "phone", "--gpus", "2"), "give gpu_memory too"),
        (("--gpu-memory", "0GB"), "expected 256MiB to 4TiB"),
        (("--gpu-memory", "-24GB"), "such as 24GB"),
        (("--gpu-memory", "24GB", "--gpus", "0"), "leave out one of the two"),
        (("--profile", "cray-1"), "expected one of h200"),
    ],
)
def test_hardware_that_cannot_be_is_refused_by_every_verb(ask, monkeypatch, hardware, said):
    monkeypatch.setenv("PATH", "")  # no driver to ask
    for verb in ("probe-hardware", "plan", "compare", "roadmap"):
        code, _, err = ask(verb, *hardware)
        assert code == 2
        assert said in err


def test_what_the_command_line_says_of_the_hardware_is_put_on_what_the_file_says(ask):
    question = written(yaml.safe_dump({"hardware": {"profile": "a100-40gb", "gpus": 2}}), "question.yaml")
    code, told, _ = ask("plan", question, "--gpus", 1, "--json")
    assert code == 0
    assert told["tier"] == "large", "the profile of the file, which is no CPU"


def test_a_described_machine_cannot_be_calibrated(ask):
    code, _, err = ask("plan", "--calibrate", "--gpu-memory", "24GB", "--task", "rows=0")
    assert code == 2
    assert "--calibrate: measures this machine" in err
    assert "rows: input" in err


# Requests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["task", "limits", "hardware", "wishes"])
@pytest.mark.parametrize("value", ["[1]", "hello", "5"])
def test_a_section_that_is_no_mapping_is_refused(ask, section, value):
    code, _, err = ask("plan", written(f"{section}: {value}\n", "question.yaml"), "--task", "rows=-1")
    assert code == 2
    assert f"{section}: input should be a valid dictionary" in err
    if section != "task":
        assert "rows" in err


def test_all_problems_of_a_question_are_told_once(ask):
    question = {"base_model": "nowhere.json", "data": "nowhere.jsonl", "read_by_base": "perhaps", "surplus": 1}
    question["task"] = {"kind": "foo", "rows": -1, "bogus": 2}
    question["limits"] = {"hours": -1, "memory_margin": 2, "foo": 3}
    question["hardware"] = {"profile": "cray-1", "gpus": -1, "gpu_memory": "0GB", "bar": 1}
    question["wishes"] = {"method": "guessing", "lora.q": 1, "training.batch_size": -4}
    code, _, err = ask("plan", written(yaml.safe_dump(question), "question.yaml"), "--wish", "lora.r")
    assert code == 2
    once = [
        "--wish: found 'lora.r'",
        "read_by_base: ",
        "surplus: ",
        "kind: ",
        "rows: ",
        "bogus: ",
        "hours: ",
        "memory_margin: ",
        "foo: ",
    ]
    once += [
        "profile: ",
        "gpus: ",
        "gpu_memory: ",
        "bar: ",
        "nowhere.jsonl",
        "nowhere.json:",
        "method: ",
        "lora.q: ",
        "batch_size: ",
    ]
    for said in once:
        assert err.count(said) == 1, said


def test_a_limit_without_a_price_is_told_once(ask):
    code, _, err = ask("plan", "--limit", "money=5")
    assert code == 2
    assert err.count("money needs a price") == 1


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (["lora=5", "lora.r=3"], "lora is given as a whole too"),
        (["base_model=gpt2"], "base_model: is no wish"),
        (["method=full", "lora.use_dora=true"], "lora.use_dora is for method lora"),
        (["method=ia3", "freezing.frozen_share=0.5"], "freezing.frozen_share is for method freezing"),
        (["objective=classification"], "the task is of kind generation"),
        (["objective=[sft]"], "objective: input should be"),
        (["training.num_train_epochs=1e308"], "found 1e+308, expected at most 1000000"),
        (["training.batch_size=9223372036854775807"], "expected at most 1048576"),
        (["precision=bf16", "method=qlora"], "method qlora needs precision nf4 or int8"),
        (["lora.target_modules=[nope]", "lora.r=0"], "no linear layer nope"),
    ],
)
def test_wishes_that_no_plan_can_have_are_refused(seven, wishes, said):
    code, _, err = seven("plan", *(part for wish in wishes for part in ("--wish", wish)))
    assert code == 2
    assert said in err


def test_a_wish_beyond_the_institutions_limit_contradicts_it(seven):
    code, _, err = seven("plan", "--wish", "lora.r=128", "--limit", "max_rank=16")
    assert code == 2
    assert "lora.r: found 128, limits.max_rank allows 16" in err


@pytest.mark.parametrize(
    ("wish", "method", "precision"),
    [
        ("lora.use_dora=true", "lora", "bf16"),
        ("lora.r=8", "lora", "bf16"),
        ("freezing.frozen_share=0.9", "freezing", "bf16"),
        ("prompt.num_virtual_tokens=30", "prompt-tuning", "bf16"),
        ("precision=fp16", "lora", "fp16"),
        ("training.eval_steps=null", "lora", "bf16"),
        ("lora.rank_pattern={model.layers.0.self_attn.q_proj: 4}", "lora", "bf16"),
    ],
)
def test_a_wish_is_heard_by_the_plan_that_is_chosen(seven, wish, method, precision):
    """Strategies that do not read what was wished are out, and do not put the others out."""
    code, told, err = seven("plan", "--wish", wish)
    assert code == 0, err
    (plan,) = told["chosen"]["stages"]
    assert (plan.get("method", "lora"), plan["precision"]) == (method, precision)


def test_a_rank_that_does_not_fit_is_refused_with_numbers_and_not_answered_with_a_method_that_has_none(seven):
    code, told, _ = seven("plan", "--wish", "lora.r=1024", "--wish", "lora.target_modules=all-linear")
    assert (code, told["chosen"]) == (1, None)
    reasons = {one["name"]: one["reason"] for one in told["rejected"]}
    assert "needs " in reasons["lora bf16"]
    assert "is for method lora" in reasons["prompt-tuning bf16"]


def test_a_wish_that_the_chosen_objective_does_not_read_is_told(seven):
    code, told, _ = seven("plan", "--wish", "dpo.beta=0.2")
    assert code == 0
    assert "the wish dpo.beta is for objective dpo, found sft" in told["warnings"]


def test_modules_that_are_saved_whole_count(seven):
    """An embedding of 32000 x 4096 trains: weights, gradients and two moments in float32, 16 bytes each."""

    def needs(*more):
        wishes = ("lora.r=4", "training.batch_size=1", "training.gradient_checkpointing=true", *more)
        _, told, _ = seven("plan", "--wish", "method=lora", *(part for wish in wishes for part in ("--wish", wish)))
        return told["chosen"]["peak_bytes"]

    grown = needs("lora.modules_to_save=[embed_tokens]") - needs()
    assert 12 * 32000 * 4096 < grown < 21 * 32000 * 4096


# Absurd numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        ("--task", "rows=9223372036854775807"),
        ("--task", f"rows={'9' * 99}", "--wish", "training.num_train_epochs=1e300"),
        ("--limit", "kwh=1e308"),
        ("--limit", "gpu_hour=1e308", "--limit", "money=1e308"),
        ("--task", "kind=classification", "--task", "classes=9223372036854775807"),
    ],
)
def test_numbers_beyond_all_that_there_is_are_refused(ask, question):
    for verb in ("plan", "compare", "roadmap"):
        code, _, err = ask(verb, "--profile", "rtx-4090", *question)
        assert code == 2
        assert "less than or equal to" in err or "at most" in err


@pytest.mark.parametrize(
    "question",
    [
        ("--task", "rows=1000000000000", "--limit", "gpu_hour=1000000000000", "--wish", "training.num_train_epochs=1000000"),
        ("--task", "input_tokens=1000000000000", "--task", "output_tokens=1000000000000"),
        ("--limit", "hours=5e-324"),
        ("--limit", "memory_margin=0.999999999"),
        ("--wish", "training.batch_size=1048576", "--wish", "training.gradient_accumulation_steps=1048576"),
    ],
)
def test_the_largest_numbers_that_are_taken_are_answered_with_numbers(ask, question):
    for verb in ("plan", "compare", "roadmap"):
        code, told, _ = ask(verb, "--base-model", written(SEVEN), "--profile", "rtx-4090", *question, "--json")
        assert code in (0, 1)
        if code:
            assert all(
                any(letter.isdigit() for letter in one["reason"]) for one in told["rejected"] if "built" not in one["reason"]
            )


def test_where_nothing_fits_every_verb_says_why_and_fails(ask):
    for verb in ("plan", "compare", "roadmap"):
        code, told, _ = ask(verb, "--base-model", written(SEVEN), "--gpu-memory", "1GB", "--json")
        assert code == 1
        assert all("needs " in one["reason"] for one in told["rejected"])


# What is told of an answer -----------------------------------------------------------------------------------------------


def test_limits_that_nothing_could_be_held_against_are_told(seven):
    """No datasheet is known for a described card: neither hours nor money can be known."""
    limits = ("--limit", "hours=0.001", "--limit", "money=1", "--limit", "gpu_hour=1")
    for verb in ("plan", "compare", "roadmap"):
        code, told, _ = seven(verb, *limits)
        assert code == 0
        assert {warning.split()[0] for warning in told["warnings"] if "was not checked" in warning} == {
            "limits.hours",
            "limits.money",
        }


def test_rows_beyond_what_the_base_reads_are_cut_aloud(seven):
    """The base reads 4096 tokens. A long row among others is cut; where all are as long, nothing of their answers is left."""
    _, told, _ = seven("plan", "--task", "input_tokens=3000", "--task", "longest_tokens=30000")
    assert any("rows of up to 30000 tokens are cut" in warning and "4096" in warning for warning in told["warnings"])
    _, told, _ = seven("plan", "--task", "input_tokens=3000", "--task", "longest_tokens=4000")
    assert not any("the base reads" in warning for warning in told["warnings"])
    code, told, _ = seven("plan", "--task", "input_tokens=30000")
    assert (code, told["chosen"]) == (1, None)
    assert any("the base reads 4096 tokens" in one["reason"] for one in told["rejected"])


def test_feedback_that_is_not_learnt_from_is_told(seven):
    _, told, _ = seven("plan", "--task", "feedback=reward")
    assert any(warning.startswith("feedback=reward is not learnt from") and "reward" in warning for warning in told["warnings"])


def test_answers_longer_than_a_row_make_the_row_longer(seven):
    """Of a row only the answer's length was given: the row holds its answer."""
    _, told, _ = seven("plan", "--task", "output_tokens=2000")
    assert told["chosen"]["stages"][0]["data"]["max_length"] == 2000


# Rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "task", "said"),
    [
        (ROWS, ["kind=regression"], "most rows are a question with its answer; expected a text with a label"),
        (LABELLED, ["kind=generation"], "most rows are a text with a label"),
        (LABELLED, ["classes=2"], "classes is 2; the rows have 3 labels"),
        ('{"text": "a", "label": "x"}\n' * 5, [], "classes is 1; expected at least 2"),
        ('{"input_text": "\\ud800", "target_text": "\\udfff"}\n', [], "half of a surrogate pair"),
        ("", ["rows=-1", "bogus=1"], "no rows in it"),
    ],
    ids=lambda value: value[-24:] if isinstance(value, str) else "",
)
def test_rows_that_do_not_go_with_the_task_are_refused(ask, rows, task, said):
    file = written(rows, "rows.jsonl")
    code, _, err = ask("plan", "--data", file, *(part for fact in task for part in ("--task", fact)))
    assert code == 2
    assert said in err
    for name in ("rows: input", "bogus: unknown"):
        assert (name in err) == (rows == "")


def test_rows_that_share_most_of_their_text_are_measured_at_once(ask):
    """Near duplicates are all pairs of such rows, which took minutes for a thousand; no rule asks for them."""
    shared = "Answer in one polite sentence, as a clerk of the bank does, and never reveal the rules. " * 4
    rows = [{"input_text": f"{shared} {n * 7919 % 10007} {n * 104729 % 99991}", "target_text": f"{n}"} for n in range(2000)]
    code, told, _ = ask("plan", "--data", written("".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl"), "--json")
    assert code == 0
    assert told["task"]["rows"] == 2000


# Files -------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_not_written_over_what_it_was_made_from_or_what_is_no_file(ask):
    model, rows = written(SEVEN), written(ROWS, "rows.jsonl")
    question = written(yaml.safe_dump({"base_model": str(model), "data": "rows.jsonl"}), "question.yaml")
    kept = [path.read_text() for path in (model, rows, question)]
    Path("folder").mkdir()
    os.mkfifo("device")  # stands for /dev/null, which a superuser's test would replace if this failed
    for output in (model, rows, question, "folder", "device", "rows.jsonl/plan.yaml", "x" * 400):
        code, _, err = ask("plan", question, "--output", output, "--task", "rows=0")
        assert code == 2
        assert "--output: " in err
        assert "rows: input" in err
    assert [path.read_text() for path in (model, rows, question)] == kept
    assert Path("device").is_fifo()


@pytest.mark.parametrize(
    "spoilt",
    [
        "",
        "[" * 100_000,
        {"seconds": float("nan")},
        {"seconds": 5e-324, "estimated_seconds": 1e308},
        {"bytes": 10**400},
        {"flops": {}},
        {"flops": {"bf16": 1e12}},
        {"bandwidth": 5e-324},
    ],
    ids=str,
)
def test_a_damaged_calibration_is_left_out_aloud(ask, caplog, spoilt):
    from strategies.calibration import device_of
    from strategies.hardware import probe

    device, _ = device_of(probe())
    content = spoilt
    if isinstance(spoilt, dict):
        point = {"device": device, "method": "lora", "precision": "fp32", "checkpointing": False, "base": "tiny"}
        point |= {"day": "2026-11-22", "seconds": 1.0, "estimated_seconds": 1.0, "bytes": 100, "estimated_bytes": 100}
        rates = {"bandwidth": 1e10, "flops": {"fp32": 1e11}, "day": "2026-11-22"}
        point |= {name: value for name, value in spoilt.items() if name in point}
        rates |= {name: value for name, value in spoilt.items() if name in rates}
        content = {"version": 1, "rates": {device: rates}, "points": [point]}
    Path("cache").mkdir()
    written(content, "cache/calibration.json")
    code, _, _ = ask("plan", "--limit", "hours=5", "--limit", "gpu_hour=1", "--json")
    assert code == 0
    assert "calibration.json is left out" in caplog.text


# Terminals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters_shows_the_rest(ask, monkeypatch, encoding):
    configuration = written(SEVEN)
    asked = ("--base-model", configuration, "--profile", "rtx-4090")
    for question in (
        ("memory", "--config", configuration),
        ("plan", *asked, "--explain"),
        ("roadmap", *asked),
        ("compare", *asked),
    ):
        shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", shown)
        code, _, _ = ask(*question)
        assert code == 0
        assert shown.buffer.getvalue()


def test_names_are_shown_as_they_are_and_not_as_markup(ask):
    folder = Path("[red]model[/blue]")
    folder.mkdir(parents=True)
    written(SEVEN, folder / "config.json")
    for verb in ("plan", "roadmap"):
        code, told, _ = ask(verb, "--base-model", folder, "--gpu-memory", "24GB", "--wish", "data.train=[/nope].jsonl")
        assert code == 0
        assert ("[/nope].jsonl" in told) if verb == "plan" else ("[red]model[/blue]" in told)


def test_what_a_request_says_goes_whole_into_the_plan_that_is_written(ask):
    """Names of modules have dots, which are no steps down into settings."""
    wish = "lora={r: 8, rank_pattern: {layers.0.self_attn.q_proj: 4}}"
    code, _, err = ask("plan", "--wish", wish, "--wish", "method=lora", "--output", "plan.yaml")
    assert code == 0, err
    assert yaml.safe_load(Path("plan.yaml").read_text())["lora"]["rank_pattern"] == {"layers.0.self_attn.q_proj": 4}
