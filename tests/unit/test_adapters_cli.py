"""``fedge evaluate`` and ``fedge generate`` with folders of any method: each is used as it was made, whatever the job says."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from fedge import app
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import prompt_ids
from strategies.methods.registry import shape

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PLANS = {
    "lora": {"lora": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["model.norm"]}},
    "dora": {"method": "lora", "lora": {"use_dora": True, "target_modules": ["v_proj"]}},
    "ia3": {"method": "ia3"},
    "prompt-tuning": {"method": "prompt-tuning", "prompt": {"num_virtual_tokens": 3}},
    "prefix-tuning": {"method": "prefix-tuning", "prompt": {"num_virtual_tokens": 4}},
    "p-tuning-v2": {"method": "p-tuning-v2", "prompt": {"num_virtual_tokens": 5}},
    "full": {"method": "full"},
    "freezing": {"method": "freezing", "freezing": {"frozen_share": 0.5}},
    "bitfit": {"method": "bitfit", "bitfit": {"add_missing": True}},
    "bottleneck": {"method": "bottleneck", "bottleneck": {"placement": "pfeiffer", "reduction_factor": 8}},
}
PEFTS = ("lora", "dora", "ia3", "prompt-tuning", "prefix-tuning", "p-tuning-v2")
ROWS = [{"input_text": f"Where is number {at}?", "target_text": f"In house {at}."} for at in range(4)]


def stored(folder, plan, seed=0):
    """An adapter of a plan's own shapes with drawn numbers, around one where it scales."""
    rng = np.random.default_rng(seed)

    def draw(*size):
        return 0.05 * rng.standard_normal(size).astype(np.float32)

    base = find("tiny")
    known = shape(base, plan)
    factors = {module: Factors(draw(2, d_in), draw(d_out, 2)) for module, (d_out, d_in) in known.modules.items()}
    dense = {name: draw(*size) + np.float32("norm" in name or "_l" in name[-6:]) for name, size in known.dense.items()}
    manifest = Manifest(base_digest=base.digest, kind="adapter", embeddings=known.embeddings)
    write_adapter(folder, Adapter(factors, dense), manifest, plan)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    made = {name: stored(home / name, Plan.model_validate(content)) for name, content in PLANS.items()}
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    job = {"data": {"train": "rows.jsonl", "evaluate": "rows.jsonl", "max_length": 64}, "training": {"batch_size": 3}}
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    return home, made


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(done.stdout.splitlines()[-1])


def named(made):
    return [part for folder in made.values() for part in ("--adapter", folder)]


def plain_model(folder):
    """By plain PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(find("tiny").folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def asked():
    return prompt_ids([{"role": "user", "content": "Where is it?"}], load_tokenizer(find("tiny")))


def test_a_job_measures_adapters_of_every_method_at_once(folders):
    """Oracle: plain PEFT, a row at a time without padding, where PEFT has the method."""
    import torch
    from torch.nn.functional import cross_entropy

    home, made = folders
    told = run("evaluate", home / "job.yaml", *named(made))["results"]
    assert set(told) == {"base", *map(str, made.values())}
    assert len({figures["loss"] for figures in told.values()}) == len(told)
    tokenizer = load_tokenizer(find("tiny"))
    for name in PEFTS:
        loss = tokens = 0.0
        model = plain_model(made[name])
        for row in ROWS:
            said = [{"role": "user", "content": row["input_text"]}]
            before = prompt_ids(said, tokenizer)
            text = tokenizer.apply_chat_template([*said, {"role": "assistant", "content": row["target_text"]}], tokenize=False)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
            answer = slice(len(before), None)
            loss += float(cross_entropy(logits[:-1].double()[len(before) - 1 :], ids[0, answer], reduction="sum"))
            tokens += len(ids[0, answer])
        # float32 logits in batches of another shape; sums of some hundred terms.
        assert told[str(made[name])]["loss"] == pytest.approx(loss / tokens, rel=1e-5), name


def test_a_question_is_answered_by_adapters_of_every_method_without_a_plan(folders):
    """Oracle: plain PEFT, the likeliest token again and again, without a cache."""
    import torch

    _, made = folders
    told = run("generate", "Where is it?", "--max-new-tokens", 6, *named(made))["answers"]
    assert set(told) == {"base", *map(str, made.values())}
    tokenizer = load_tokenizer(find("tiny"))
    for name in PEFTS:
        model, ids = plain_model(made[name]), torch.tensor([asked()])
        begun = ids.shape[1]
        while ids.shape[1] < begun + 6 and int(ids[0, -1]) != tokenizer.eos_token_id:
            with torch.no_grad():
                following = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], 1)
        assert told[str(made[name])] == [tokenizer.decode(ids[0, begun:], skip_special_tokens=True).strip()], name


def test_an_adapter_for_labels_neither_answers_nor_is_measured_on_answers(folders, tmp_path):
    home, _ = folders
    plan = Plan.model_validate({"objective": "classification", "data": {"labels": ["a", "b"]}, "method": "ia3"})
    scorer = stored(tmp_path / "scorer", plan)
    for arguments in (["evaluate", home / "job.yaml", "--adapter", scorer], ["generate", "Hi", "--adapter", scorer]):
        with pytest.raises(AdapterError, match=r"scorer: an adapter for SEQ_CLS.*objective sft is CAUSAL_LM"):
            run(*arguments)


def test_an_adapter_with_other_labels_than_the_jobs_is_refused_by_its_head(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"t {n}", "label": "abc"[n % 3]}) + "\n" for n in range(6))
    )
    job = {"objective": "classification", "data": {"train": "rows.jsonl", "evaluate": "rows.jsonl", "max_length": 32}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    plan = Plan.model_validate({"objective": "classification", "data": {"labels": ["a", "b"]}, "method": "p-tuning-v2"})
    with pytest.raises(AdapterError, match=r"score.weight: found shape \(2, 128\), expected \(3, 128\)"):
        run("evaluate", tmp_path / "job.yaml", "--adapter", stored(tmp_path / "two", plan))
