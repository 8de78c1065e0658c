"""Every method with every objective: it trains two steps, is saved, loads and predicts what it did, or is refused with why.

Methods and objectives are those that a plan may name, and rows those of the table in docs/configuration.md, so that whatever is
added is here by itself.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from small_bases import saved

from protocol.configuration import parse
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import COMPRESSED, Plan
from strategies.adapted import with_adapter
from strategies.base_model import find, load_tokenizer
from strategies.data.formats import PlainText, load
from strategies.evaluation.measure import measure
from strategies.forgetting import Guard
from strategies.training import fit
from tools.matrix import METHODS, OBJECTIVES, page, plan_of, refusal, two_adapters

DOCS = Path(__file__).parents[3] / "docs"
# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = {"decoder": "llama", "decoder with experts": "mixtral", "encoder": "bert"}
ON = {"decoder": METHODS, "decoder with experts": ("experts",), "encoder": METHODS}
EVERY = [(kind, method, objective) for kind, methods in ON.items() for method in methods for objective in OBJECTIVES]
# Each method once and each objective once, on a decoder.
FEW = {("decoder", method, OBJECTIVES[at % len(OBJECTIVES)]) for at, method in enumerate(METHODS)}
# Two steps of these move little at the others' rate.
RATES = {"adalora": 0.1, "bitfit": 0.1, "ia3": 0.3, "prompt-tuning": 0.3, "p-tuning-v2": 0.3}
PROBE = [PlainText("The bank opens at nine and closes at five.")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: saved(build, tmp_path_factory.mktemp(build)) for kind, build in KINDS.items()}


@pytest.fixture(autouse=True)
def _rewards(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def length(prompts, answers):\n    return [len(answer) for answer in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)


def rows_of(objective, folder):
    """Eight rows of the kinds that the documentation shows."""
    line = re.search(rf"^\| `{objective}` \|.*", (DOCS / "configuration.md").read_text(), re.MULTILINE)[0]
    shown = [json.loads(row) for row in re.findall(r"`(\{.*?\})`(?:,| \|)", line)]
    rows = [dict(shown[at % len(shown)]) for at in range(8)]
    for at, row in enumerate(rows):
        if "label" in row and objective in ("regression", "kto", "classification"):
            row["label"] = {"regression": at / 8, "kto": at % 2 == 0, "classification": "ab"[at % 2]}[objective]
        # One text with both labels, or two answers that hardly differ, teach nothing.
        if objective == "kto":
            row["completion"] += " Yes." if row["label"] else " No."
        if objective == "classification":
            row["text"] += " fees" if row["label"] == "a" else " rooms"
        if "rejected" in row:
            row["rejected"] += " No, not at all."
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def trained_plan(kind, method, objective, bases, adapters):
    """Two steps. Full fine-tuning is sent at full rank, or an adapter would be an approximation by design.

    A model that writes is measured by the check for forgetting, which reads the very model that trained.
    """
    content = plan_of(method, objective, bases[kind], adapters)
    steps = {"batch_size": 4, "max_steps": 2, "eval_steps": 2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    content["training"] = {"learning_rate": RATES.get(method, 5e-2 if kind == "encoder" else 1e-2), **steps}
    if method in COMPRESSED:
        content["lora"] = {"r": 32}
    writes = Plan.model_validate(content).task_type == "CAUSAL_LM"
    return parse(content | ({"forgetting": {"max_rise": 1e9}} if writes else {}), Plan, source="plan")


@pytest.mark.parametrize(
    ("kind", "method", "objective"),
    [pytest.param(*one, marks=() if one in FEW else pytest.mark.slow, id="-".join(one).replace(" ", "-")) for one in EVERY],
)
def test_a_pair_trains_saves_loads_and_predicts_what_it_did_or_is_refused(tmp_path, bases, kind, method, objective):
    """Oracle for what was trained: the loss of the model in the trainer's hands, read before anything was taken out of it.

    5e-5, of logits 1e-5 and 5e-6 of their size: what is taken out, multiplied and put in again are float32 factors.
    """
    base = find(bases[kind])
    adapters = two_adapters(base, tmp_path) if method == "xlora" and kind != "encoder" else ["legal", "medical"]
    if reason := refusal(method, objective, base, adapters):
        assert len(reason) > 20, reason
        return
    plan = trained_plan(kind, method, objective, bases, adapters)
    rows = load(rows_of(objective, tmp_path), plan)
    trained = fit(plan, base, rows, rows, probe=PROBE if plan.forgetting else ())
    assert trained.metrics["train-steps"] == 2
    manifest = Manifest(base_digest=base.digest, kind="adapter", method=plan.method)
    write_adapter(tmp_path / "adapter", trained.adapter, manifest, plan)
    stored = read_stored(tmp_path / "adapter", base_digest=base.digest)
    use = stored.on(plan)

    def logits(plan, adapter):
        import torch

        with torch.no_grad():
            return with_adapter(plan, base, adapter)[0](input_ids=torch.tensor([[5, 9, 20, 31]])).logits.numpy()

    loaded = logits(use, stored.adapter)
    np.testing.assert_allclose(loaded, logits(plan, trained.adapter), rtol=5e-6, atol=1e-5)
    assert np.abs(loaded[:, -4:] - logits(use, None)).max() > 1e-3, "a training that moves nothing proves nothing"
    if plan.forgetting:
        guard = Guard(plan.forgetting, PROBE, load_tokenizer(base), plan)
        found, wanted = (guard.loss(with_adapter(use, base, stored.adapter)[0]), trained.metrics["forgetting-after"])
    else:
        figure = "mse" if objective == "regression" else "loss"
        found, wanted = measure(use, base, rows, stored.adapter)[figure], trained.metrics["eval-loss"]
    assert found == pytest.approx(wanted, abs=5e-5)


def test_the_page_is_what_the_code_says():
    """Refusals and reasons come from plans and from configurations of bases; `python -m tools.matrix > docs/matrix.md`."""
    assert (DOCS / "matrix.md").read_text() == page()
