"""``fedge merge``, ``extract``, ``combine`` and ``registry``: from one folder to the next, in JSON, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fedge
from protocol.adapter import Adapter, Factors
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import find
from strategies.methods.registry import shape

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PLAN = Plan.model_validate({"lora": {"target_modules": ["q_proj"]}})


def adapter(folder, seed, plan=PLAN):
    rng = np.random.default_rng(seed)
    base = find("tiny")
    known = shape(base, plan)
    factors = {
        module: Factors(*(0.1 * rng.standard_normal(size).astype(np.float32) for size in ((2, d_in), (d_out, 2))))
        for module, (d_out, d_in) in known.modules.items()
    }
    dense = {name: rng.standard_normal(size).astype(np.float32) for name, size in known.dense.items()}
    write_adapter(folder, Adapter(factors, dense), Manifest(base_digest=base.digest, kind="adapter"), plan)
    return folder


def run(*arguments):
    done = CliRunner().invoke(fedge.app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        fedge.main()
    said = capsys.readouterr()
    assert ended.value.code == 2, said.err
    assert "Traceback" not in said.err
    return said.err


def test_adapters_are_combined_merged_and_extracted_again(tmp_path):
    """Around the circle: the LoRA that comes out of the merged model has the product that went in. Oracle: float64 sums."""
    parts = [adapter(tmp_path / str(at), at) for at in range(2)]
    told = run(
        "combine",
        tmp_path / "sum",
        "--adapter",
        parts[0],
        "--adapter",
        parts[1],
        "--weight",
        1,
        "--weight",
        -0.5,
        "--how",
        "cat",
    )
    assert (told["how"], told["r"]) == ("cat", 4)
    assert [part["weight"] for part in told["adapters"]] == [1, -0.5]
    told = run("merge", tmp_path / "sum", tmp_path / "model", "--dtype", "fp32")
    assert (told["method"], told["dtype"], told["rounding"]) == ("lora", "fp32", 0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    told = run("extract", "tiny", tmp_path / "model", tmp_path / "again", "--rank", 4)
    assert told["energy_kept"] == pytest.approx(1, abs=1e-6)
    assert told["whole"] == []
    assert told["left_out"] == {}
    again, one, two = (read_stored(folder).adapter.factors for folder in (tmp_path / "again", *parts))
    assert again.keys() == one.keys()
    for module, pair in again.items():
        assert np.allclose(pair.product(), one[module].product() - 0.5 * two[module].product(), atol=1e-5)
    energy = run("extract", "tiny", tmp_path / "model", tmp_path / "less", "--energy", 0.5)
    assert 0.5 <= energy["energy_kept"] < 1


def test_versions_are_published_listed_tagged_fetched_and_pruned(tmp_path):
    where = f"file://{tmp_path}/registry"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"data": {"train": "rows.jsonl"}, "lora": {"r": 2}}))
    (tmp_path / "card.json").write_text("{}")
    first = run("registry", "publish", adapter(tmp_path / "1", 1), where, "fees", "--config", tmp_path / "job.yaml")
    assert (first["version"], first["lineage"]["plan"]["lora"]["r"]) == ("1", 2)
    assert str(tmp_path) not in json.dumps(first)
    second = run(
        "registry", "publish", adapter(tmp_path / "2", 2), where, "fees", "--version", "1.5", "--parent", "fees@1",
        "--data-card", tmp_path / "card.json",
    )  # fmt: skip
    assert second["lineage"]["parents"] == ["fees@1"]
    run("registry", "publish", adapter(tmp_path / "3", 3), where, "fees")
    assert run("registry", "tag", where, "fees@1.5", "production")["version"] == "1.5"
    assert run("registry", "list", where)["adapters"] == {
        "fees": {"versions": ["1", "1.5", "2"], "tags": {"latest": "2", "production": "1.5"}, "leading": None}
    }
    assert run("registry", "show", where, "fees@production")["digest"] == second["digest"]
    assert run("registry", "fetch", where, "fees@production", tmp_path / "back")["version"] == "1.5"
    assert read_stored(tmp_path / "back").adapter.digest() == second["lineage"]["adapter_digest"]
    assert run("registry", "prune", where, "--keep", 1) == {
        "removed": [],
        "kept": {"fees@1": "parent of fees@1.5", "fees@1.5": "tag production"},
    }
    run("registry", "tag", where, "fees@1.5", "production", "--remove")
    assert run("registry", "prune", where, "--keep", 1)["removed"] == ["fees@1", "fees@1.5"]


def test_figures_stay_with_their_version_and_the_leading_one_is_told(tmp_path):
    """Oracle: the smallest loss and the largest accuracy, looked up by hand; version 4 was measured on other rows alone."""
    where = tmp_path / "registry"
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump({"data": {"train": "rows.jsonl"}, "lora": {"r": 2}, "training": {"max_steps": 7}})
    )
    for number, (loss, accuracy, rows) in enumerate([(0.5, 0.9, 40), (0.25, 0.7, 40), (0.75, 0.8, 40), (0.01, 1.0, 9)], 1):
        folder = adapter(tmp_path / str(number), number)
        told = {"rows": rows, "results": {"base": {"loss": 9.0}, str(folder): {"loss": loss, "accuracy": accuracy}}}
        if number < 4:
            told["results"]["elsewhere"] = {"loss": 0.0}
        (tmp_path / "figures.json").write_text(json.dumps(told))
        made = run(
            *("registry", "publish", folder, where, "fees", "--config", tmp_path / "job.yaml"),
            *("--figures", tmp_path / "figures.json"),
        )
        assert made["figures"] == {"rows": rows, "values": {"loss": loss, "accuracy": accuracy}}
        leads = run("registry", "list", where)["adapters"]["fees"]["leading"]
        assert leads["version"] == {1: "1", 2: "2", 3: "2", 4: "4"}[number]
        if number == 3:
            by = run("registry", "list", where, "--by", "accuracy")["adapters"]["fees"]["leading"]
            assert by == {"version": "1", "value": 0.9, "rows": 40, "by": "accuracy"}
    assert run("registry", "list", where, "--by", "unheard-of")["adapters"]["fees"]["leading"] is None
    run("registry", "tag", where, "fees@2", "production")
    said = CliRunner().invoke(fedge.app, ["registry", "show", str(where), "fees@2"], catch_exceptions=False).stdout
    for part in (
        "published: 20",
        "tags: production",
        "figures on 40 rows: accuracy 0.7, loss 0.25",
        "plan.training.max_steps: 7",
        "plan.lora.r: 2",
    ):
        assert part in said
    assert "plan.training.batch_size" not in said  # as it is by default
    said = CliRunner().invoke(fedge.app, ["registry", "list", str(where)], catch_exceptions=False).stdout
    assert "4 leads by loss: 0.01 on 9 rows" in said


@pytest.mark.parametrize(
    "raw",
    [
        "{",
        "[]",
        '{"rows": 3, "results": {"a": 1}}',
        '{"rows": 3, "results": {"a": {"loss": "low"}}}',
        '{"rows": -1, "results": {"a": {"loss": 1}}}',
        '{"rows": 3, "results": {"a": {"x\\ny": 1}}}',
        '{"rows": 3, "results": {"a": {}}}',
        '{"rows": 3, "results": {"a": {"loss": 1}, "b": {"loss": 1}}}',
        '{"rows": 3, "results": {"base": {"loss": 1}}}',
    ],
)
def test_figures_that_are_none_or_of_others_are_refused(tmp_path, monkeypatch, capsys, raw):
    (tmp_path / "f.json").write_text(raw)
    call = ["registry", "publish", adapter(tmp_path / "1", 1), tmp_path / "r", "fees", "--figures", tmp_path / "f.json"]
    said = refused(monkeypatch, capsys, *call)
    assert "no figures" in said or "says nothing of" in said


def test_the_words_without_json_say_the_same(tmp_path):
    where = tmp_path / "registry"
    calls = [
        (["registry", "list", where], "nothing is published here"),
        (["registry", "publish", adapter(tmp_path / "1", 1), where, "fees"], "fees@1 "),
        (["registry", "list", where], "fees: 1 (latest 1)"),
        (["registry", "show", where, "fees"], "base_digest"),
        (["registry", "tag", where, "fees", "production"], "production is 1"),
        (["registry", "prune", where, "--keep", 1], "removed: none"),
        (
            ["combine", tmp_path / "c", "--adapter", tmp_path / "1", "--adapter", tmp_path / "1"],
            "svd of 2 adapters, rank 2, 100.0% kept",
        ),
        (["merge", tmp_path / "1", tmp_path / "m", "--dtype", "bf16"], "rounding to bf16 is"),
        (["extract", "tiny", tmp_path / "m", tmp_path / "e", "--rank", 1], "of the change kept"),
    ]
    for arguments, said in calls:
        done = CliRunner().invoke(fedge.app, list(map(str, arguments)), catch_exceptions=False)
        assert said in done.stdout, arguments


def test_what_cannot_be_is_refused_with_its_reason(tmp_path, monkeypatch, capsys):
    one = adapter(tmp_path / "1", 1)
    prompt = Plan.model_validate({"method": "prompt-tuning", "prompt": {"num_virtual_tokens": 3}})
    soft = adapter(tmp_path / "soft", 1, prompt)
    both = ["combine", tmp_path / "out", "--adapter", one, "--adapter", one]
    calls = [
        (["merge", soft, tmp_path / "out"], "cannot be merged"),
        (["merge", one, tmp_path / "out", "--dtype", "int8"], "--dtype: found 'int8', expected one of fp32, bf16, fp16"),
        (["merge", one, tmp_path / "1"], "is there already"),
        (["merge", tmp_path, tmp_path / "out"], "adapter_config.json: no such file"),
        (["extract", "tiny", "tiny", tmp_path / "out"], "nothing that a LoRA could hold has changed"),
        (["extract", "tiny", "tiny", tmp_path / "out", "--energy", "1.5"], "--energy: found 1.5"),
        (["extract", "tiny", "tiny", tmp_path / "out", "--energy", "0.5", "--rank", "2"], "found both"),
        ([*both, "--weight", "1"], "found 1 for 2 adapters"),
        ([*both, "--weight", "nan", "--weight", "1"], "--weight: found nan, expected a finite number"),
        ([*both, "--how", "sum"], "--how: found 'sum'"),
        ([*both, "--how", "ties"], "--density: found None with ties"),
        ([*both, "--how", "cat", "--rank", "2"], "--rank is for svd"),
        (["combine", tmp_path / "out", "--adapter", one, "--adapter", soft], "prompt-tuning adapters do not add up"),
        ([*both, "--how", "dare_linear", "--density", "0.5", "--seed", 2**64], "--seed"),
        (["generate", "fine", "caf\udce9", "--adapter", one], "question 2: is not UTF-8"),
        (["registry", "publish", one, "s3://bucket/x", "fees"], "s3fs"),
        (["registry", "fetch", tmp_path / "registry", "fees", tmp_path / "out"], "no such version or tag"),
        (["registry", "show", tmp_path / "registry", "../x"], "name '../x'"),
    ]
    for arguments, said in calls:
        assert said in refused(monkeypatch, capsys, *arguments), arguments
        assert not (tmp_path / "out").exists(), arguments


def test_a_merged_model_answers_as_the_adapter_does(tmp_path):
    one = adapter(tmp_path / "1", 1)
    run("merge", one, tmp_path / "model", "--dtype", "fp32")
    beside = run("generate", "Where is it?", "--adapter", one, "--max-new-tokens", 6)["answers"]
    alone = run("generate", "Where is it?", "--base-model", tmp_path / "model", "--max-new-tokens", 6)["answers"]
    assert alone["base"] == beside[str(one)]
    assert torch.is_tensor(AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight)
