"""DP-SGD: the gradients that are summed, the noise on them, the rows that a step draws, and what is refused.

Oracle of the gradients: one row at a time, not padded, through the model in float64, its loss written from the definition.
"""

import json
import math

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from scipy import stats
from typer.testing import CliRunner

from benchmarks.membership import audit, least_epsilon
from fedge import app
from protocol.configuration import parse
from protocol.errors import ConfigurationError, ModelError, PrivacyError
from protocol.plan import Plan
from protocol.privacy.noise import Stream
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.example_budget import Sampled, with_noise
from strategies.example_privacy import Draws, Gradients, drawn
from strategies.methods.registry import method_of
from strategies.training import fit

torch = pytest.importorskip("torch")
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
# What trains, and whether a micro-batch goes through the model as one.
CASES = {
    "lora": ({}, True),
    "rslora": ({"lora": LORA | {"use_rslora": True}}, True),
    "pissa": ({"lora": LORA | {"init_lora_weights": "pissa"}}, True),
    "dora": ({"lora": LORA | {"use_dora": True}}, False),
    "embeddings": ({"lora": LORA | {"target_modules": ["embed_tokens", "q_proj"]}}, False),
    "checkpointed": ({"training": {"gradient_checkpointing": True}}, True),
    "ia3": ({"method": "ia3"}, False),
    "bitfit": ({"method": "bitfit", "bitfit": {"add_missing": True}}, True),
    "bottleneck": ({"method": "bottleneck"}, True),
    "prompt-tuning": ({"method": "prompt-tuning"}, False),
    "prefix-tuning": ({"method": "prefix-tuning"}, False),
    "p-tuning-v2": ({"method": "p-tuning-v2"}, False),
    "classification": ({"objective": "classification", "data": {"labels": ["a", "b", "c"]}}, True),
    "regression": ({"objective": "regression"}, True),
}


def plan_of(own):
    lora = {"lora": LORA} if own.get("method", "lora") == "lora" else {}
    return Plan.model_validate({"base_model": "tiny", **lora, **own})


def model_of(plan):
    """In float64, with what trains moved away from where it begins: a product of zero has no gradient on one side."""
    torch.manual_seed(3)
    model, _ = load(find("tiny"), plan)
    model = method_of(plan).attach(model, plan)
    if plan.method != "bottleneck":  # which computes in float32 whatever the base does
        model = model.double()
        for module in model.modules():  # a head would be given float32
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook.__module__ == "strategies.methods.float32":
                    del module._forward_pre_hooks[key]
    if plan.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model.train()


def rows_of(plan):
    """Rows of 4 to 9 tokens: (token ids, label or answer from which token on)."""
    rng = np.random.default_rng(5)
    rows = []
    for at, tokens in enumerate((9, 4, 7, 5)):
        label = {"sft": 2, "classification": at % 3, "regression": float(at)}[plan.objective]
        rows.append((rng.integers(1, 400, tokens).tolist(), label))
    return rows


def padded(plan, rows):
    width = max(len(ids) for ids, _ in rows)
    fill = [width - len(ids) for ids, _ in rows]
    batch = {
        "input_ids": torch.tensor([ids + [0] * more for (ids, _), more in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * more for (ids, _), more in zip(rows, fill, strict=True)]),
    }
    if plan.objective == "sft":
        labels = [[-100] * first + ids[first:] + [-100] * more for (ids, first), more in zip(rows, fill, strict=True)]
    else:
        labels = [label for _, label in rows]
    return batch | {"labels": torch.tensor(labels)}


def row_gradient(model, plan, ids, label):
    """By parameter, of one row's own loss."""
    model.zero_grad()
    logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    if plan.objective == "sft":
        told = torch.log_softmax(logits[0, -len(ids) :], -1)
        loss = -sum(told[at - 1, ids[at]] for at in range(label, len(ids))) / (len(ids) - label)
    elif plan.objective == "classification":
        loss = -torch.log_softmax(logits[0], -1)[label]
    else:
        loss = (logits[0, 0] - label) ** 2
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def clipped_sum(model, plan, rows, norm):
    total = {}
    for ids, label in rows:
        gradient = row_gradient(model, plan, ids, label)
        length = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        for name, g in gradient.items():
            total[name] = total.get(name, 0) + g * min(1.0, norm / length)
    return total


@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_that_of_every_row_s_own_gradient_shortened(case):
    """A norm between the rows' own lengths, two micro-batches of padded rows; rounding is all that may differ."""
    own, together = CASES[case]
    plan = plan_of(own)
    model, rows = model_of(plan), rows_of(plan)
    lengths = [math.sqrt(sum(float((g**2).sum()) for g in row_gradient(model, plan, *row).values())) for row in rows]
    norm = float(np.median(lengths))
    wanted = clipped_sum(model, plan, rows, norm)
    gradients = Gradients.of(model, plan.objective)
    assert gradients.together is together
    total = gradients.nothing()
    for part in (rows[:3], rows[3:]):
        gradients.add(model, padded(plan, part), norm, total)
    size = math.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
    assert size > 0
    near = 1e-5 if plan.method == "bottleneck" else 1e-9
    for name, found in total.items():
        assert float((found - wanted.get(name, torch.zeros_like(found))).norm()) <= near * size, name


def test_over_a_quantised_base_rows_go_together_too():
    """Against one at a time, which the oracle above holds; in float32."""
    plan = Plan.model_validate({"base_model": "tiny", "method": "qlora", "precision": "nf4", "lora": LORA})
    torch.manual_seed(3)
    model = method_of(plan).attach(load(find("tiny"), plan)[0], plan)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    together, batch = Gradients.of(model, "sft"), padded(plan, rows_of(plan))
    assert together.together
    alone = Gradients(together.trained, together.layers, "sft", together=False).each(model, batch)
    size = math.sqrt(sum(float((g**2).sum()) for g in alone.values()))
    for name, found in together.each(model, batch).items():
        assert float((found - alone[name]).norm()) <= 1e-4 * size


def test_a_row_whose_gradient_is_no_number_counts_as_none_and_spoils_no_other():
    plan = plan_of({})
    model, rows = model_of(plan), rows_of(plan)
    poisoned = rows[1][0][0]
    assert all(poisoned not in ids for at, (ids, _) in enumerate(rows) if at != 1)
    wanted = clipped_sum(model, plan, [rows[0], rows[2], rows[3]], 0.5)
    gradients = Gradients.of(model, "sft")
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, found: found.masked_fill((given[0] == poisoned)[..., None], math.nan)
    )
    total = gradients.nothing()
    gradients.add(model, padded(plan, rows), 0.5, total)
    for name, found in total.items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-6, atol=1e-9)


class Transposed(torch.nn.Module):
    """Tokens along the first axis, rows along the second, as some older models hold them."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(512, 4).requires_grad_(False)
        self.layer = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.layer(self.embedding(input_ids).transpose(0, 1))).mean(0)
        return type("Told", (), {"logits": self.head(x)})


def test_a_base_that_keeps_rows_elsewhere_trains_one_at_a_time():
    torch.manual_seed(0)
    model = Transposed().double()
    gradients = Gradients.of(model, "classification")
    assert not gradients.together
    ids, labels = torch.randint(1, 500, (4, 4)), torch.tensor([0, 1, 2, 0])
    each = gradients.each(model, {"input_ids": ids, "labels": labels})
    for at in range(4):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(ids[at : at + 1]).logits, labels[at : at + 1]).backward()
        torch.testing.assert_close(each["layer.weight"][at], model.layer.weight.grad)


def test_a_base_that_normalises_over_a_batch_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(ModelError, match="normalises over the rows of a batch"):
        Gradients.of(model, "classification")


def test_each_step_takes_every_row_with_the_same_chance_and_by_itself():
    """4,000 draws of a rate of 8/50: a row's count is binomial, the size of a draw too; chi-square at 1e-6."""
    stream, draws = Stream(b"d" * 32), 4000
    taken = np.zeros((draws, 50))
    for at in range(draws):
        taken[at, drawn(50, 8, stream)] = 1
    rate = 8 / 50
    spread = ((taken.sum(0) - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum()
    assert stats.chi2.ppf(1e-6, 50) < spread < stats.chi2.isf(1e-6, 50)
    sizes = ((taken.sum(1) - 8) ** 2 / (50 * rate * (1 - rate))).sum()
    assert abs(sizes / draws - 1) < 5 * math.sqrt(2 / draws)
    assert drawn(5, 8, stream) == [0, 1, 2, 3, 4]


def test_micro_batches_are_bounded_and_an_epoch_is_as_long_as_without_privacy():
    draws = Draws(list(range(40)), 12, 5, lambda rows: {"rows": rows})
    found = list(draws)
    assert len(draws) == len(found) == 4
    assert max(len(part["rows"]) for step in found for part in step) <= 5
    assert found != list(draws)  # new bits every time


def rows(count):
    return [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"{n % 7}.") for n in range(count)]


def private_plan(**own):
    training = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 1}
    privacy = {"epsilon": 1e6, "clipping_norm": 0.5} | own.pop("privacy", {})
    training |= {"batch_size": 4, "gradient_accumulation_steps": 2, "example_privacy": privacy} | own
    return Plan.model_validate({"base_model": "tiny", "lora": LORA, "data": {"max_length": 48}, "training": training})


def flat(adapter):
    return np.concatenate([part.ravel() for pair in adapter.factors.values() for part in (pair.A, pair.B)])


def test_the_noise_of_a_step_is_normal_of_the_promised_width():
    """Two trainings of one step from one seed differ by their noise and hardly by their draws: 0.5 at most, of which noise has
    50 times that in each of its values. Variance by chi-square, shape by Kolmogorov and Smirnov, both at 1e-4.
    """
    plan = private_plan(privacy={"noise_multiplier": 200.0, "clipping_norm": 0.5})
    one, other = (flat(fit(plan, find("tiny"), rows(24)).adapter) for _ in range(2))
    found = (one - other) / (200.0 * 0.5 / 8 * math.sqrt(2))
    spread = float((found**2).sum())
    assert stats.chi2.ppf(5e-5, found.size) < spread < stats.chi2.isf(5e-5, found.size)
    assert stats.kstest(found, "norm").pvalue > 1e-4


def test_a_training_leaves_no_loss_and_says_what_it_cost(tmp_path):
    plan = private_plan(
        privacy={"noise_multiplier": 1.0}, max_steps=3, optim="adamw_torch", learning_rate=1e-3, logging_steps=1
    )
    done = fit(plan, find("tiny"), rows(24), folder=tmp_path)
    assert done.sampled == Sampled(rows=24, batch=8, noise_multiplier=1.0, steps=3)
    assert "train-loss" not in done.metrics
    assert np.isfinite(flat(done.adapter)).all()
    for path in tmp_path.rglob("history.jsonl"):
        told = [json.loads(line) for line in path.read_text().splitlines()]
        assert told
        assert not [name for entry in told for name in entry if "loss" in name]


def test_two_trainings_from_one_seed_draw_other_rows_and_other_noise():
    plan = private_plan(privacy={"noise_multiplier": 1.0})
    assert not np.allclose(*(flat(fit(plan, find("tiny"), rows(24)).adapter) for _ in range(2)))


@pytest.mark.parametrize(("count", "batch", "steps", "z"), [(1000, 32, 50, 1.1), (60, 16, 9, 3.0), (10, 16, 4, 2.0)])
def test_the_price_is_that_of_sampled_gaussian_noise(count, batch, steps, z):
    """dp-accounting's Renyi accountant, called here, bounds it from above; fewer rows than a batch are all drawn."""
    gaussian = dp_event.GaussianDpEvent(z)
    event = dp_event.PoissonSampledDpEvent(batch / count, gaussian) if batch < count else gaussian
    wanted = rdp.RdpAccountant().compose(dp_event.SelfComposedDpEvent(event, steps)).get_epsilon(1e-5)
    assert 0.7 * wanted < Sampled(count, batch, z, steps).epsilon(1e-5) <= wanted


def test_the_least_noise_keeps_the_promise_over_all_rounds_and_hardly_more():
    plan = private_plan(privacy={"epsilon": 2.0}, max_steps=5)
    z = with_noise(plan, rows=40, rounds=3).training.example_privacy.noise_multiplier
    assert Sampled(40, 8, z, 15).epsilon(1e-5) <= 2.0 < Sampled(40, 8, 0.98 * z, 15).epsilon(1e-5)


def test_noise_that_does_not_keep_the_promise_is_refused_with_the_least_that_would():
    with pytest.raises(PrivacyError, match=r"found 0\.5, .* 5 steps of 8 of 8 rows cost .* 2 is promised.*\(\d"):
        with_noise(private_plan(privacy={"epsilon": 2.0, "noise_multiplier": 0.5}, max_steps=5), rows=8)
    with pytest.raises(PrivacyError, match=r"delta: found 0\.1, expected one below 1/40"):
        with_noise(private_plan(privacy={"epsilon": 2.0, "delta": 0.1}), rows=40)


def problems_of(content):
    with pytest.raises(ConfigurationError) as refused:
        parse(content, Plan, source="plan")
    return "\n".join(refused.value.problems)


def test_what_would_break_the_promise_is_refused_all_at_once():
    training = {
        "packing": True,
        "neftune_noise_alpha": 5.0,
        "proximal_mu": 0.1,
        "eval_steps": 5,
        "save_steps": 5,
        "max_grad_norm": 0.3,
        "mixed_precision": "fp16",
        "train_sampling_strategy": "sequential",
    }
    told = problems_of({"training": training | {"example_privacy": {"epsilon": 8}}})
    for name in training:
        assert name in told
    data = {"tasks": {"a": {"train": "a.jsonl"}}, "replay": "b.jsonl", "augmentation": {"copies": 2}}
    told = problems_of({"method": "full", "objective": "pretraining", "training": {"example_privacy": {"epsilon": 8}}})
    assert "method full trains whole weights" in told
    assert "one text lies in several blocks" in told
    del data["augmentation"]
    told = problems_of({"data": data, "training": {"example_privacy": {"epsilon": 8}}})
    assert "data.tasks draws rows several times" in told
    assert "data.replay draws rows several times" in told


def test_the_planner_leaves_out_what_a_private_training_goes_without(monkeypatch, tmp_path):
    """A T4 has no bfloat16, where fp16 would be the default; checkpoints and evaluations are elsewhere."""
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path))
    facts = ["--base-model", "tiny", "--profile", "t4", "--task", "kind=generation", "--task", "rows=2000"]
    told = CliRunner().invoke(app, ["plan", *facts, "--wish", "training.example_privacy.epsilon=8", "--json"])
    (plan,) = json.loads(told.stdout)["chosen"]["stages"]
    training = Plan.model_validate(plan).training
    assert training.example_privacy.epsilon == 8
    assert (training.save_steps, training.eval_steps, training.mixed_precision) == (None, None, "fp32")


@pytest.mark.parametrize("objective", ["pretraining", "distillation", "dpo", "kto", "reward", "rl"])
def test_objectives_whose_rows_cannot_be_told_apart_say_why(objective):
    told = problems_of({"objective": objective, "training": {"example_privacy": {"epsilon": 8}}})
    assert "is for objective sft or classification or regression" in told


@pytest.mark.parametrize("method", ["full", "freezing", "adalora", "experts", "xlora"])
def test_methods_that_it_does_not_hold_for_say_why(method):
    assert f"method {method} " in problems_of({"method": method, "training": {"example_privacy": {"epsilon": 8}}})


@pytest.mark.parametrize(("z", "power"), [(3.0, 0.1), (6.0, 0.0)])
def test_canaries_prove_no_more_than_was_claimed(z, power):
    """Of 1,000 canaries each took part by a coin; the surest tenth of guesses on either side bounds epsilon from below, at 95 %
    (Steinke et al. 2023, theorem 5.2; for delta 0 held against the binomial it names, below). Of eight sampled steps, the whole
    way: draws, clipping, noise, optimizer. A tenth of the noise is found out: the bound would see a claim that is false.
    """
    found = audit(z, canaries=1000)
    assert power <= found["proven"] <= found["claimed"]
    assert audit(z, canaries=1000, added=0.1)["proven"] > found["claimed"]


def test_the_bound_of_canaries_is_that_of_the_binomial_it_comes_from():
    """Delta 0: v of r guesses refute an epsilon at which they would come about once in twenty."""
    for right in (60, 75, 90):
        bound = least_epsilon(right, 100, 1000, 0.0)
        assert stats.binomtest(right, 100, 1 / (1 + math.exp(-bound)), "greater").pvalue == pytest.approx(0.05, rel=1e-6)
    assert least_epsilon(75, 100, 1000, 1e-5) < least_epsilon(75, 100, 1000, 0.0)
