"""A judge in place of people: which pairs come of its verdicts, where its figures go, and that models learn what it likes."""

import json
from itertools import count

import pytest
from chat_server import preferring, serving, shown
from typer.testing import CliRunner

from fedge import app
from protocol.adapter import Adapter
from protocol.errors import ConfigurationError, DataError
from protocol.files import read_adapter
from protocol.objective_settings import AiFeedbackSettings, DpoSettings
from protocol.plan import Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.ai_feedback import made, pairs, stand_ins
from strategies.data.encode import encode, prompt_ids
from strategies.data.formats import Preference, Prompt
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure
from strategies.evaluation.preferences import figures
from strategies.job import Job
from strategies.training import fit

NOTHING = Adapter()
ROWS = [Prompt(({"role": "user", "content": f"Which room has number {n}?"},)) for n in range(24)]
RULES = """
def vowels(prompts, answers):
    return [10 * sum(c in "aeiou" for c in answer) / max(len(answer), 1) for answer in answers]
"""


def vowels(answer):
    return 10 * sum(c in "aeiou" for c in answer) / max(len(answer), 1)


def endpoint(chat):
    return {"endpoint": {"base_url": chat.url, "model": "m", "retries": 0, "parallel": 8}}


def feedback(chat, **more):
    return AiFeedbackSettings.model_validate({"judge": endpoint(chat), **more})


def plan_of(chat, objective="dpo", training=None, **more):
    return Plan.model_validate(
        {
            "objective": objective,
            "lora": {"r": 4, "lora_alpha": 8},
            "ai_feedback": {"judge": endpoint(chat), "max_new_tokens": 8, **more},
            "training": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2, **(training or {})},
        }
    )


def writing(*answers):
    """A writer that gives these answers, whatever it is asked."""
    return lambda prompts, *, seed=0: [answers[at % len(answers)] for at in range(len(prompts))]


def test_of_two_answers_the_one_that_the_judge_prefers_is_chosen():
    with serving(preferring(len)) as chat:
        found = pairs(ROWS[:2], feedback(chat), 0, writing("long one", "short", "no", "yes"))
    assert found.rows == [Preference(ROWS[0].prompt, "long one", "short"), Preference(ROWS[1].prompt, "yes", "no")]
    assert found.metrics == {"judge-ties": 0, "judge-disagreement": 0, "judge-unreadable": 0}


def test_of_several_answers_those_with_the_most_and_the_fewest_wins_become_a_pair():
    with serving(preferring(len)) as chat:
        found = pairs(ROWS[:1], feedback(chat, answers=4), 0, writing("aa", "a", "aaaa", "aaa"))
        assert len(chat.requests) == 2 * 6  # each two of four, in both orders
    assert found.rows == [Preference(ROWS[0].prompt, "aaaa", "a")]


def test_ties_leave_no_pair_and_are_counted():
    """Equal answers are not shown to the judge; of equally long ones this judge takes the first, which is its place."""
    with serving(preferring(len)) as chat:
        found = pairs(ROWS[:4], feedback(chat), 0, writing("aa", "b", "cc", "cc", "dd", "ee", "", "f"))
        assert len(chat.requests) == 2 * 3
    assert found.rows == [Preference(ROWS[0].prompt, "aa", "b")]
    assert found.metrics == {"judge-ties": 3 / 4, "judge-disagreement": 1 / 3, "judge-unreadable": 0}


def test_a_judge_that_decides_nothing_is_told_with_its_reasons():
    with serving(lambda request: "A") as chat, pytest.raises(DataError, match="2 comparisons, 2 decided by place"):
        pairs(ROWS[:2], feedback(chat), 0, writing("x", "y"))


def test_the_same_seed_gives_the_same_pairs_and_another_gives_others():
    with serving(preferring(vowels)) as chat:
        first, again = (made(ROWS, plan_of(chat), find("tiny"), Adapter(), training=True).rows for _ in range(2))
        others = made(ROWS, plan_of(chat, training={"seed": 1}), find("tiny"), Adapter(), training=True).rows
    assert first == again != others
    assert all(vowels(row.chosen) > vowels(row.rejected) for row in first)


def test_a_reward_models_base_or_a_named_writer_answers_for_it():
    numbers = count()
    with serving(preferring(len)) as chat, serving(lambda request: "x" * (1 + next(numbers))) as author:
        own = made(ROWS[:8], plan_of(chat, "reward"), find("tiny"), Adapter(), training=True).rows
        writer = {**endpoint(author), "temperature": 1.0, "max_new_tokens": 9}
        plan = Plan.model_validate({"objective": "reward", "ai_feedback": {"judge": endpoint(chat), "writer": writer}})
        named = made(ROWS[:8], plan, find("tiny"), Adapter(), training=True).rows
    assert len(named) == 8
    assert all(len(row.chosen) > len(row.rejected) for row in [*own, *named])
    assert all(set(row.chosen) == {"x"} for row in named)


@pytest.mark.parametrize(("max_length", "longest"), [(256, 20), (24, 2)])
def test_stand_ins_are_as_long_as_what_may_be_written_and_as_fits(max_length, longest):
    """A reward model's pair is left out where it is too long: without shorter ones nothing would be tried."""
    with serving(preferring(len)) as chat:
        plan = plan_of(chat, "reward", max_new_tokens=20)
        rows = encode(stand_ins(ROWS[:2], plan), load_tokenizer(find("tiny")), max_length, "reward").rows
        assert chat.requests == []
    asked = len(prompt_ids(ROWS[0].prompt, load_tokenizer(find("tiny"))))
    assert longest <= max(len(row["chosen_ids"]) for row in rows) - asked <= max_length - asked


def job(folder, chat, **more):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": row.prompt[0]["content"]}) + "\n" for row in ROWS))
    plan = plan_of(chat, training={"num_train_epochs": 1, "max_steps": None}).model_dump(exclude_unset=True)
    written = {**plan, "data": {"train": "rows.jsonl"}, "output": str(folder / "out"), **more}
    (folder / "job.yaml").write_text(json.dumps(written))
    return folder / "job.yaml"


def test_a_job_with_prompts_alone_is_labelled_trained_and_measured(tmp_path):
    from protocol.configuration import load
    from simulations.single import train_alone

    with serving(preferring(vowels)) as chat:
        path = job(tmp_path, chat)
        record = train_alone(load(path, Job).beside(path))
    assert 0 <= record.evaluation["local"]["reward-accuracy"] <= 1
    assert not record.accepted["local"].keys() & {"judge-ties", "judge-disagreement"}, "what speaks of data stays at its node"
    assert read_adapter(tmp_path / "out" / "adapter")[0].factors


def test_the_verb_writes_the_pairs_that_a_job_would_train_on(tmp_path):
    with serving(preferring(vowels)) as chat:
        path = job(tmp_path, chat)
        done = CliRunner().invoke(app, ["label", str(path), "--json"], catch_exceptions=False)
        told = json.loads(done.output)
        plan = plan_of(chat)
        wanted = made(ROWS, plan, find("tiny"), Adapter(), training=True).rows
    assert told["rows"] == len(wanted)
    assert set(told) == {"rows", "file", "judge-ties", "judge-disagreement", "judge-unreadable"}
    read = load_rows(tmp_path / "out" / "labelled.jsonl", Plan(objective="dpo"))
    assert read == wanted


def test_the_verb_needs_somebody_who_labels(tmp_path):
    (tmp_path / "job.yaml").write_text("data: {train: rows.jsonl}")
    with pytest.raises(ConfigurationError, match="name who labels"):
        CliRunner().invoke(app, ["label", str(tmp_path / "job.yaml")], catch_exceptions=False)


def test_rows_with_answers_are_refused_beside_a_judge(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with serving(preferring(len)) as chat, pytest.raises(DataError, match="without ai_feedback, or leave them out"):
        load_rows(tmp_path / "rows.jsonl", plan_of(chat))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "sft"}, "ai_feedback is for objective dpo or reward"),
        ({"ai_feedback": {"judge": {"base_model": "tiny"}, "writer": {"base_model": "tiny"}}}, "the same answer every time"),
        (
            {
                "ai_feedback": {
                    "judge": {"base_model": "tiny"},
                    "writer": {"base_model": "tiny", "temperature": 1.0},
                    "temperature": 0.5,
                }
            },
            "the writer has its own",
        ),
    ],
)
def test_a_plan_that_would_leave_out_a_wish_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Plan.model_validate({"objective": "dpo", "ai_feedback": {"judge": {"base_model": "tiny"}}} | change)


def rewarded(training=None, **rl):
    return Plan.model_validate(
        {
            "objective": "rl",
            "lora": {"r": 4, "lora_alpha": 8},
            "rl": {"max_completion_length": 24, "num_generations": 8, **rl},
            "training": {
                "batch_size": 32,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "constant_with_warmup",
                **(training or {}),
            },
        }
    )


@pytest.fixture
def by_rule(tmp_path, monkeypatch):
    """Measures a policy: the rule's reward and the distance from the base, in nats a token."""
    (tmp_path / "rules_of_the_ai_test.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    plan = rewarded(reward_functions=["rules_of_the_ai_test:vowels"])
    return lambda adapter: measure(plan, find("tiny"), ROWS * 4, adapter)


def drawn(plan, adapter, reference=NOTHING):
    """Of four answers to each prompt: the mean reward, and how far an answer leads away from the reference, in nats."""
    base = find("tiny")
    rows = encode(ROWS * 4, load_tokenizer(base), plan.data.max_length, "rl").rows
    found = figures(plan, base, rows, adapter, reference)
    return found["reward"].value, found["kl"].rows[:, 0].mean()


@pytest.mark.slow
def test_preferences_of_a_judge_raise_what_it_likes_and_ipo_bounds_the_distance(by_rule):
    """RLAIF: no answer and no label of people.

    A judge that never wavers lets DPO's own loss walk away at any beta; IPO (Azar et al. 2023, arXiv:2310.12036, eq. 6) raises
    P(the policy's answer is preferred) - beta KL, which is 1/2 where it begins and never above 1 - beta KL: KL is below
    1 / (2 beta), by TRL's loss per token.
    """
    training, beta = {"max_steps": 40, "learning_rate": 3e-3, "batch_size": 16}, 1.0
    with serving(preferring(vowels)) as chat:
        plan = plan_of(chat, max_new_tokens=24, answers=4, training=training)
        plan = plan.model_copy(update={"dpo": DpoSettings(loss_type="ipo", beta=beta)})
        adapter = fit(plan, find("tiny"), made(ROWS * 4, plan, find("tiny"), Adapter(), training=True).rows).adapter
    before, after = by_rule(NOTHING), by_rule(adapter)
    assert after["reward"] > 1.2 * before["reward"]
    assert 0 < after["kl"] < 1 / (2 * beta)


# RLOO raises E[reward] - beta KL(answer) (arXiv:2402.14740), which is the mean reward where training begins: a policy that is
# worth more than it was is at most (gain of mean reward) / beta nats an answer away.


@pytest.mark.slow
def test_rl_by_a_judges_marks_raises_what_the_judge_likes_and_pays_for_the_distance(by_rule):
    with serving(lambda request: str(min(9, 1 + round(vowels(shown(request)["answer"]))))) as chat:
        plan = rewarded(algorithm="rloo", beta=0.5, judge=endpoint(chat), training={"max_steps": 20})
        adapter = fit(plan, find("tiny"), ROWS).adapter
        (before, _), (after, distance) = drawn(plan, NOTHING), drawn(plan, adapter)
    assert 0 < distance < (after - before) / plan.rl.beta
    assert by_rule(adapter)["reward"] > 1.2 * by_rule(NOTHING)["reward"]


@pytest.mark.slow
def test_sft_then_a_reward_model_then_rl_raises_what_people_like_and_pays_for_the_distance(by_rule, tmp_path):
    """RLHF, each stage on what the one before left: the people are a rule, which the policy never sees."""
    from protocol.files import write_adapter
    from protocol.manifest import Manifest
    from strategies.data.formats import Conversation

    base = find("tiny")
    tuning = Plan.model_validate({"lora": {"r": 4, "lora_alpha": 8}, "training": {"max_steps": 4, "learning_rate": 1e-3}})
    tuned = fit(tuning, base, [Conversation(row.prompt, "It is the room beside the stairs.") for row in ROWS]).adapter
    with serving(preferring(vowels)) as people:
        asked = plan_of(people, max_new_tokens=24, answers=4)
        preferred = made(ROWS * 4, asked, base, tuned, training=True).rows
    training = {"max_steps": 60, "learning_rate": 5e-3, "batch_size": 16}
    reader = Plan.model_validate({"objective": "reward", "lora": {"r": 4, "lora_alpha": 8}, "training": training})
    learnt = fit(reader, base, preferred).adapter
    manifest = Manifest(base_digest=base.digest, kind="global", r=4, federation="x", round=1, parent="", num_examples=1)
    write_adapter(tmp_path / "reward", learnt, manifest, reader)
    distance = {}
    for beta in (0.0, 3.0):
        plan = rewarded(algorithm="rloo", beta=beta, reward_model=str(tmp_path / "reward"), training={"max_steps": 20})
        policy = fit(plan, base, ROWS, start=tuned, reference=tuned).adapter
        (before, _), (after, distance[beta]) = drawn(plan, tuned, tuned), drawn(plan, policy, tuned)
        assert by_rule(policy)["reward"] > 1.2 * by_rule(tuned)["reward"]
    assert 0 < distance[3.0] < (after - before) / 3.0
    assert distance[3.0] < distance[0.0], "without a pull it says the one thing that the reward model likes best"
