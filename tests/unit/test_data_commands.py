"""``fedge data``: the page on data does what it says, and only the key undoes masking."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from client.node import Node
from client.round import choose, training_rows
from fedge import app
from protocol.configuration import load, parse
from protocol.data_settings import EVERY_KIND, DataPolicy, DataSettings
from protocol.errors import ConfigurationError, DataError, VaultError
from protocol.plan import Plan
from protocol.vault import Vault
from simulations.single import train_alone
from strategies.base_model import find, load_tokenizer
from strategies.data.card import write_beside
from strategies.data.placeholders import opened, seal
from strategies.data.prepared import prepare
from strategies.job import Job

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {kind: [body for of, body in FENCE.findall(PAGE) if of == kind] for kind in ("yaml", "bash")}
WORDS = (
    *("account", "branch", "card", "cash", "cheque", "deposit", "fee", "interest", "loan"),
    *("mortgage", "rate", "savings", "statement", "transfer", "withdrawal"),
)


def rows():
    return [
        {
            "input_text": f"How is my {WORDS[n % 15]} with the {WORDS[n * 7 % 15]} in month {n} of the {WORDS[n * 4 % 13]}?",
            "target_text": f"Ask Ann Lee, clerk{n}@bank.com or 138123400{n:02d}, about the large {WORDS[n * 11 % 15]}.",
        }
        for n in range(30)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "names.txt").write_text("Ann Lee\n")
    (tmp_path / "synonyms.txt").write_text("month, period\n")
    return tmp_path


def fedge(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_the_documented_commands_run_and_what_was_masked_comes_back(folder):
    for line in BLOCKS["bash"][0].splitlines():
        fedge(*shlex.split(line)[1:])
    masked = (folder / "masked.jsonl").read_text()
    assert "bank.com" not in masked
    assert "[PHONE-30]" in masked
    assert (folder / "back.jsonl").read_bytes() == (folder / "clean.jsonl").read_bytes()
    assert (folder / "node.key").stat().st_mode & 0o777 == 0o600
    assert b"bank.com" not in (folder / "masked.jsonl.vault").read_bytes()
    assert json.loads((folder / "card.json").read_text())["rows"] == {"training": 27, "held_out": 3, "tasks": {}}


def test_the_documented_job_trains_on_treated_rows_and_leaves_a_card_beside_the_adapter(folder):
    (folder / "job.yaml").write_text(BLOCKS["yaml"][0])
    train_alone(load(folder / "job.yaml", Job).beside(folder / "job.yaml"))
    adapter = folder / "runs/job/adapter"
    card = json.loads((adapter / "data-card.json").read_text())
    used, told = card["report"]["files"][0]["used"], card["report"]
    assert used >= 10
    assert card["masked"] == {"email": used, "name": used, "phone": used}
    assert told["training"] + told["held_out"] == used
    assert card["rows"]["training"] == 2 * told["training"]  # each with one that has other words
    assert "Ann Lee" not in json.dumps(card)
    assert not (adapter / "chat_template.jinja").exists()  # the base has a template of its own


def test_a_template_that_a_tokenizer_was_given_lies_beside_the_adapter_where_transformers_reads_it(folder):
    """Oracle: transformers' own loading of a tokenizer whose folder holds the file."""
    from transformers import AutoTokenizer

    base = shutil.copytree(find("tiny").folder, folder / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((base / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer, plan = load_tokenizer(find(str(base))), Plan()
    write_beside(folder / "adapter", prepare(plan, folder / "rows.jsonl"), plan, tokenizer)
    shutil.copy(folder / "adapter" / "chat_template.jinja", base)
    asked = [{"role": "user", "content": "Where?"}]
    plain = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    assert plain.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "user:\nWhere?\nassistant:\n"
    assert (folder / "adapter" / "data-card.json").is_file()


def test_every_kind_is_on_the_page_and_every_setting_in_the_block():
    assert set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| `.*?\|", PAGE, re.MULTILINE)))) == set(EVERY_KIND)
    shown = yaml.safe_load(BLOCKS["yaml"][0])["data"]
    assert set(DataSettings.model_fields["cleaning"].default.model_dump()) == set(shown["cleaning"])
    assert set(DataSettings.model_fields["masking"].default.model_dump()) == set(shown["masking"])


def test_the_documented_policy_is_forced_on_whatever_plan_is_published(folder):
    (folder / "policy.yaml").write_text(BLOCKS["yaml"][1])
    parse(yaml.safe_load(BLOCKS["yaml"][1]), DataPolicy, source="docs")
    node = Node(train=folder / "rows.jsonl", data_policy=folder / "policy.yaml")
    found = training_rows(Plan(), node)
    assert not [row for row in found if "bank.com" in row.answer or "138" in row.answer]
    assert [row for row in training_rows(Plan(), node.model_copy(update={"data_policy": None})) if "bank.com" in row.answer]
    (folder / "policy.yaml").write_text("masking: {kinds: [emails]}\ncleaning: {markups: true}\n")
    with pytest.raises(ConfigurationError, match=r"(?s)did you mean .markup.*masking.kinds.0: input should be .email"):
        training_rows(Plan(), node)


def test_a_plan_from_outside_reads_no_file_that_the_node_does_not_list(folder):
    names = str(folder / "names.txt")
    asked = Plan.model_validate({"data": {"masking": {"names": [names]}}})
    node = Node(train=folder / "rows.jsonl")
    with pytest.raises(ConfigurationError, match="files: the plan names"):
        choose(asked, node)
    choose(asked, node.model_copy(update={"files": names}))


def test_check_names_lines_and_ends_with_two(folder):
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"input_text": "no answer"}\n')
    assert "line 31: target_text is missing or empty" in fedge("data", "check", "rows.jsonl", code=2)
    told = json.loads(fedge("data", "check", "rows.jsonl", "--json", code=2))
    assert (told["read"], told["unusable"]) == (31, 1)


BROKEN = (
    {"question": "Where?", "answer": "Here."},
    {"input_text": "Where?", "target_text": ""},
    {"input_text": "How many?", "target_text": 5},
    {"input_text": "Where?", "target_text": ""},  # a duplicate of what cannot be used
)


def test_check_clean_mask_and_card_agree_on_which_rows_are_unusable_and_on_the_way_out(folder):
    """Five lines are broken, one row stands there twice; without --skip-bad each refuses with an advice that works."""
    lines = [json.dumps(row) for row in (*BROKEN, rows()[0])]
    with (folder / "rows.jsonl").open("a") as file:
        file.write("\n".join(["{broken", *lines]) + "\n")
    told = json.loads(fedge("data", "check", "rows.jsonl", "--json", code=2))
    assert (told["read"], told["unusable"], told["objective"]) == (36, 5, "sft")
    assert "line 34: target_text is a number" in str(told["why"])
    for verb in ("clean", "mask", "card"):
        asked = ["data", verb, "rows.jsonl", "--out", f"{verb}.json{'' if verb == 'card' else 'l'}"]
        done = CliRunner().invoke(app, asked)
        assert isinstance(done.exception, DataError)
        assert "5 of 36 rows cannot be used" in str(done.exception)
        assert "--skip-bad goes on" in str(done.exception)
        assert not (folder / asked[-1]).exists()
        fedge(*asked, "--skip-bad")
    assert len((folder / "mask.jsonl").read_text().splitlines()) == 31
    assert json.loads((folder / "card.json").read_text())["report"]["files"][0]["skipped"] == 5
    told = json.loads(
        fedge("data", "clean", "rows.jsonl", "--out", "c.jsonl", "--skip-bad", "--removed", "gone.jsonl", "--json")
    )
    assert (told["read"], told["rows"], told["unusable"], told["removed"]) == (36, 30, 5, {"exact-duplicate": 1})
    gone = [json.loads(line) for line in (folder / "gone.jsonl").read_text().splitlines()]
    assert [one["line"] for one in gone] == [31, 32, 33, 34, 35, 36]
    assert (gone[-1]["why"], gone[-1]["like"], gone[-1]["row"]) == ("exact-duplicate", 1, rows()[0])
    assert gone[0]["row"] is None
    assert gone[1]["row"] == BROKEN[0]
    for verb in ("check", "card"):
        fedge("data", verb, "c.jsonl")


def test_rows_are_read_for_the_objective_whose_fields_they_have(folder):
    kinds = {
        "dpo": {"prompt": "Where?", "chosen": "Here {}.", "rejected": "There."},
        "kto": {"prompt": "Where?", "completion": "Here {}.", "label": True},
        "rl": {"prompt": "Where {}?"},
        "pretraining": {"text": "Once {}."},
        "sft": {"instruction": "Say", "output": "It {}."},
        "classification": {"text": "Once {}.", "label": "a"},
        "regression": {"text": "Once {}.", "label": 1.5},
    }
    for objective, row in kinds.items():
        made = [{k: v.format(n) if isinstance(v, str) else v for k, v in row.items()} for n in "abc"]
        (folder / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
        assert json.loads(fedge("data", "check", "some.jsonl", "--json"))["objective"] == objective
        fedge("data", "clean", "some.jsonl", "--out", "clean.jsonl")
        other = "dpo" if objective == "sft" else "sft"
        done = CliRunner().invoke(app, ["data", "check", "some.jsonl", "--objective", other])
        assert f"use objective {objective}" in str(done.exception)
        assert "skip" not in str(done.exception)  # none would be left


def test_labels_are_counted_and_those_that_are_nearly_the_same_are_named(folder):
    labels = ["Log in", "log in", "login", "card", "card", "fee"]
    (folder / "some.csv").write_text("text,label\n" + "".join(f"row {n},{label}\n" for n, label in enumerate(labels)))
    told = json.loads(fedge("data", "check", "some.csv", "--json"))
    assert told["labels"] == {"card": 2, "Log in": 1, "log in": 1, "login": 1, "fee": 1}
    assert told["labels_alike"] == [["Log in", "log in", "login"]]
    said = fedge("data", "check", "some.csv")
    assert "labels that differ in case or spaces only: 'Log in', 'log in', 'login'" in said
    assert "with one row only: Log in, log in, login, fee" in said


def test_a_job_names_the_columns_of_its_file(folder):
    (folder / "own.csv").write_text("question,answer,note\n" + "".join(f"Where is {n}?,Here {n}.,x\n" for n in range(12)))
    job = {"data": {"train": "own.csv", "columns": {"input_text": "question", "target_text": "answer"}}, "output": "out"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    assert json.loads(fedge("data", "check", "own.csv", "--job", "job.yaml", "--json"))["used"] == 12
    fedge("data", "clean", "own.csv", "--job", "job.yaml", "--out", "ours.jsonl")
    first = json.loads((folder / "ours.jsonl").read_text().splitlines()[0])
    assert first == {"note": "x", "input_text": "Where is 0?", "target_text": "Here 0."}
    job["data"]["columns"]["target_text"] = "reply"
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    done = CliRunner().invoke(app, ["data", "check", "own.csv", "--job", "job.yaml"])
    assert "data.columns: no row has reply; there are answer, note, question" in str(done.exception)
    job["data"]["columns"] = {"questions": "question"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    done = CliRunner().invoke(app, ["data", "check", "own.csv", "--job", "job.yaml"])
    assert isinstance(done.exception, ConfigurationError)


def test_masking_goes_on_with_an_earlier_vault(folder):
    (folder / "more.jsonl").write_text(json.dumps({"text": "clerk29@bank.com, x@y.org, [EMAIL-31]"}) + "\n")
    fedge("data", "key", "k")
    fedge("data", "mask", "rows.jsonl", "--out", "one.jsonl", "--key", "k")
    told = json.loads(
        fedge("data", "mask", "more.jsonl", "--out", "two.jsonl", "--key", "k", "--vault", "one.jsonl.vault", "--json")
    )
    assert json.loads((folder / "two.jsonl").read_text())["text"] == "[EMAIL-30], [EMAIL-32], [EMAIL-31]"
    assert told["masked"] == {"email": 2}
    fedge("data", "unmask", "two.jsonl", "--out", "back.jsonl", "--key", "k", "--vault", "one.jsonl.vault")
    assert (folder / "back.jsonl").read_text() == (folder / "more.jsonl").read_text()


def test_placeholders_are_opened_by_their_own_key_alone_and_taken_for_nothing_else(tmp_path):
    """What a vault refuses otherwise: tests/unit/protocol/test_vault.py."""
    mine, other = Vault(bytes(32)), Vault(bytes(range(32)))
    sealed = tmp_path / "v"
    seal(sealed, {"[EMAIL-1]": "a@b.com", "[PHONE-1]": 13812345678}, mine)
    assert opened(sealed, mine) == {"[EMAIL-1]": "a@b.com", "[PHONE-1]": 13812345678}
    with pytest.raises(VaultError):
        opened(sealed, other)
    mine.write(sealed, b"{}", {"kind": "something else"})
    with pytest.raises(VaultError, match="expected"):
        opened(sealed, mine)


def test_a_vault_is_never_lost_to_another_and_none_is_left_without_its_rows(folder):
    fedge("data", "key", "k")
    fedge("data", "mask", "rows.jsonl", "--out", "one.jsonl", "--key", "k")
    before = (folder / "one.jsonl.vault").read_bytes()
    done = CliRunner().invoke(app, ["data", "mask", "rows.jsonl", "--out", "one.jsonl", "--key", "k"])
    assert isinstance(done.exception, DataError)
    assert "is there already" in str(done.exception)
    assert (folder / "one.jsonl.vault").read_bytes() == before
    (folder / "there.jsonl").mkdir()  # in place of a disk that is full
    done = CliRunner().invoke(app, ["data", "mask", "rows.jsonl", "--out", "there.jsonl", "--key", "k"])
    assert isinstance(done.exception, OSError)
    assert not (folder / "there.jsonl.vault").exists()


def test_what_leaves_no_row_is_refused_and_writes_nothing(folder):
    (folder / "long.yaml").write_text("cleaning: {min_characters: 100000}\n")
    done = CliRunner().invoke(app, ["data", "clean", "rows.jsonl", "--out", "c.jsonl", "--settings", "long.yaml"])
    assert isinstance(done.exception, DataError)
    assert "no row is left" in str(done.exception)
    assert not (folder / "c.jsonl").exists()


def test_a_file_is_never_overwritten_by_what_was_made_of_it(folder):
    done = CliRunner().invoke(app, ["data", "clean", "rows.jsonl", "--out", "rows.jsonl"])
    assert isinstance(done.exception, ConfigurationError)
    assert "itself, which would be lost" in str(done.exception)
