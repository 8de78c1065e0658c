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
from protocol.errors import ConfigurationError, DataError
from protocol.plan import Plan
from simulations.single import train_alone
from strategies.base_model import find, load_tokenizer
from strategies.data.card import write_beside
from strategies.data.prepared import prepare
from strategies.data.vault import create_key, opened, read_key, seal
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
    assert json.loads((folder / "card.json").read_text())["rows"] == {"training": 27, "held_out": 3}


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


def test_another_key_an_open_key_and_a_changed_vault_open_nothing(tmp_path):
    create_key(tmp_path / "a")
    create_key(tmp_path / "b")
    key, vault = read_key(tmp_path / "a"), tmp_path / "v"
    seal(vault, {"[EMAIL-1]": "a@b.com", "[PHONE-1]": 13812345678}, key)
    assert opened(vault, key) == {"[EMAIL-1]": "a@b.com", "[PHONE-1]": 13812345678}
    with pytest.raises(DataError, match="another key"):
        opened(vault, read_key(tmp_path / "b"))
    content = bytearray(vault.read_bytes())
    content[-1] ^= 1
    vault.write_bytes(content)
    with pytest.raises(DataError, match="another key, or changed"):
        opened(vault, key)
    vault.write_bytes(b"{}")
    with pytest.raises(DataError, match="not a vault"):
        opened(vault, key)
    with pytest.raises(DataError, match="already"):
        create_key(tmp_path / "a")
    (tmp_path / "a").chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        read_key(tmp_path / "a")
    (tmp_path / "b").write_text("no key")
    with pytest.raises(DataError, match="32 bytes"):
        read_key(tmp_path / "b")


def test_a_file_is_never_overwritten_by_what_was_made_of_it(folder):
    done = CliRunner().invoke(app, ["data", "clean", "rows.jsonl", "--out", "rows.jsonl"])
    assert isinstance(done.exception, ConfigurationError)
    assert "is the file itself" in str(done.exception)
