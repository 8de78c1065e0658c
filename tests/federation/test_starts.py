"""One node's round: where it starts, what of it trains, which rows it reads, and that a round asked again is the same round."""

import json

import numpy as np
import pytest
from flwr.app import RecordDict

from client import round as node_round
from client.app import app
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter, Factors
from protocol.errors import ConfigurationError, DataError
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.product_space import split
from protocol.records import Call, Received
from server.rounds import run
from simulations.grid import InProcessGrid
from strategies.base_model import find
from strategies.data.splits import window
from strategies.evaluation.measure import measure
from strategies.methods.registry import shape

TARGETS = ["q_proj", "down_proj"]
LABELS = ["a", "b", "c"]


def plan_of(training=None, **content):
    lora_settings = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, **content.pop("lora", {})}
    settings = {"learning_rate": 5e-3, "batch_size": 2, "max_steps": 2, **(training or {})}
    return Plan.model_validate({"base_model": "tiny", "lora": lora_settings, "training": settings, **content})


def classification(**content):
    return plan_of(objective="classification", data={"labels": LABELS}, **content)


@pytest.fixture
def node(tmp_path):
    """Eleven rows, so that rounds of four do not end where the rows do."""
    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"Room {n}."} for n in range(11)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Node(name="bank", train=path, evaluate=path)


@pytest.fixture
def labelled(tmp_path):
    """Rows of two of the three labels."""
    rows = [{"text": f"number {n}", "label": "ab"[n % 2]} for n in range(10)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Node(name="bank", train=path, evaluate=path)


@pytest.fixture
def memory(tmp_path):
    return Memory(RecordDict(), "fed", tmp_path / "state")


def asked(plan, number=1, adapter=None, rounds=5, **call):
    adapter = adapter or Adapter()
    content = {"federation": "fed", "round": number, "rounds": rounds, "plan": plan, "r": plan.update_rank}
    return Received(Call(**content | call, digest=adapter.digest()), adapter)


def drawn(plan, rank, zero_b=False, seed=0):
    """A global adapter as a server sends it: scaling 1, float32, not ordered."""
    rng = np.random.default_rng(seed)
    modules = shape(find("tiny"), plan).modules
    return Adapter(
        {
            name: Factors(
                A=rng.standard_normal((rank, d_in)).astype(np.float32) / 8,
                B=rng.standard_normal((d_out, rank)).astype(np.float32) / 8 * (0 if zero_b else 1),
            )
            for name, (d_out, d_in) in modules.items()
        }
    )


# One client is plain PEFT, wherever it starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["embed_tokens"]},
    ],
    ids=["pissa, rslora, patterns", "rslora, patterns, a whole module"],
)
def test_one_client_for_one_round_has_the_merged_weights_of_plain_peft(node, memory, tmp_path, settings):
    """Oracle: PEFT and TRL alone. What is sent is the change of the published base, so base plus product are its weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    plan = plan_of({"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "seed": 3}, lora=settings)
    update = node_round.train(asked(plan, rounds=1), node, memory).update
    base = find("tiny").folder
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(3)
    config = {"target_modules": TARGETS, "r": 4, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | settings
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_steps=6,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            seed=3,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["input_text"]}],
                    "completion": [{"role": "assistant", "content": row["target_text"]}],
                }
                for row in map(json.loads, node.train.read_text().splitlines())
            ]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(**config),
    )
    trainer.train()
    merged = dict(trainer.model.merge_and_unload().named_parameters())
    began = dict(AutoModelForCausalLM.from_pretrained(base, dtype="float32").named_parameters())
    moved = 0.0
    for module, pair in update.adapter.factors.items():
        name = f"{module}.weight"
        moved = max(moved, float(np.abs(pair.product()).max()))
        assert np.abs(began[name].detach().numpy() + pair.product() - merged[name].detach().numpy()).max() <= 1e-5
    for name, tensor in update.adapter.dense.items():
        assert np.abs(tensor - merged[name].detach().numpy()).max() <= 1e-5
    assert moved > 1e-4, "a training that moves nothing proves nothing"


# What trains -----------------------------------------------------------------------------------------------------------


def test_the_start_that_the_server_drew_is_loaded_in_round_one_too_and_the_plans_own_gives_way(node, memory):
    plan = plan_of(lora={"init_lora_weights": "pissa"})
    start = drawn(plan, 4, zero_b=True)
    update = node_round.train(asked(plan, adapter=start, trains="B", r=4), node, memory).update
    for module, pair in update.adapter.factors.items():
        assert np.array_equal(pair.A, start.factors[module].A)
        assert pair.B.any()


@pytest.mark.parametrize(
    ("own", "asked_r", "number", "sent"), [("default", 2, 2, 12), ("pissa", 6, 1, 0), ("pissa", 6, 2, 12)], ids=str
)
def test_an_update_has_no_more_than_the_rank_that_was_asked(node, memory, own, asked_r, number, sent):
    """Of pissa's six, three are trained in the first round, and four in the second: two more come back as they were sent."""
    plan = plan_of({"max_steps": 1}, lora={"init_lora_weights": own})
    adapter = drawn(plan, sent) if sent else Adapter()
    update = node_round.train(asked(plan, number, adapter, r=asked_r), node, memory).update
    assert set(update.adapter.ranks().values()) == {update.manifest.r} == {asked_r}
    assert update.manifest.parent == adapter.digest()


def test_a_fresh_pair_is_sent_alone(node, memory):
    plan = plan_of()
    start = drawn(plan, 6)
    update = node_round.train(asked(plan, 2, start, fresh=True), node, memory).update
    assert set(update.adapter.ranks().values()) == {4}
    bound = {module: np.abs(pair.product()).max() for module, pair in start.factors.items()}
    assert all(np.abs(pair.product()).max() < bound[module] / 5 for module, pair in update.adapter.factors.items())


def test_of_a_module_of_smaller_rank_the_change_is_still_counted_from_what_the_rule_takes_away(node, memory):
    """A rule takes the leading r directions away: of q_proj two of them trained and two came back as they were sent."""
    plan = plan_of(lora={"rank_pattern": {"q_proj": 2}})
    start = drawn(plan, 9)
    update = node_round.train(asked(plan, 2, start), node, memory).update
    for module, pair in update.adapter.factors.items():
        begun = split(start.factors[module], 4)[0]
        assert pair.r == 4
        trained = 2 if module.endswith("q_proj") else 4
        assert np.array_equal(pair.A[trained:], begun.A[trained:])
        # The scaling was folded in and out again.
        assert np.allclose(pair.scaling * pair.B[:, trained:], begun.B[:, trained:], rtol=1e-6, atol=0)
        rank = np.linalg.matrix_rank(pair.product() - begun.product(), tol=1e-6)
        assert 0 < rank <= 2 * trained


# Which rows ------------------------------------------------------------------------------------------------------------


def rows_read(plan, node, number):
    """Line numbers of the node's file."""
    base, rows = find("tiny"), node_round.training_rows(plan, node)
    read = node_round._rows_of(asked(plan, number).call, rows, plan, base)
    return [rows.index(row) for row in read]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_round_reads_on_from_where_the_rounds_before_it_end(node, number):
    plan = plan_of({"seed": 5})
    assert rows_read(plan, node, number) == window(11, (number - 1) * 4, 4, 5)


def test_rows_that_cannot_be_used_are_read_over_and_the_next_round_begins_where_it_would_have(node):
    """Every third row is too long. Oracle: the endless reading without them, from each round's own place."""
    lines = [json.loads(line) for line in node.train.read_text().splitlines()]
    for at in range(0, 11, 3):
        lines[at]["input_text"] += " long" * 60
    node.train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = plan_of(data={"max_length": 48})
    for number in (1, 2, 3):
        assert rows_read(plan, node, number) == [at for at in window(11, (number - 1) * 4, 40, 0) if at % 3][:4]


def test_where_there_is_one_round_it_takes_all_rows(node):
    assert node_round._rows_of(asked(plan_of(), rounds=1).call, list("abc"), plan_of(), find("tiny")) == list("abc")


def test_a_node_whose_rows_are_all_too_long_says_so(node, memory):
    with pytest.raises(DataError, match=r"round 2: 11 rows, none with an answer within 4 tokens"):
        node_round.train(asked(plan_of(data={"max_length": 4}), 2), node, memory)


@pytest.mark.parametrize("kind", ["pissa", "own b", "own head"])
def test_a_round_that_is_asked_again_gives_the_same_update_to_the_bit(node, labelled, memory, kind):
    """The coordinator that asked first has died; a round was trained before, so that own parts have moved already."""
    plan = {
        "pissa": plan_of(lora={"init_lora_weights": "pissa", "lora_dropout": 0.2}),
        "own head": classification(head={"local": True}),
    }.get(kind, plan_of(lora={"lora_dropout": 0.2}))
    who, start, own_b = labelled if kind == "own head" else node, drawn(plan, 6), kind == "own b"
    if kind == "pissa":
        start = Adapter()
    began = node_round.train(asked(plan, 1, start, personal_b=own_b), who, memory).update
    first, again = (node_round.train(asked(plan, 3, start, personal_b=own_b), who, memory).update for _ in range(2))
    assert first.adapter.digest() == again.adapter.digest() != began.adapter.digest()
    anew = node_round.train(asked(plan, 1, start, personal_b=own_b), who, memory).update
    assert anew.adapter.digest() == began.adapter.digest(), "a run that begins anew finds nothing of the run before it"
    assert first.manifest == again.manifest
    assert {name: mask.tolist() for name, mask in first.rows.items()} == {n: mask.tolist() for n, mask in again.rows.items()}


# What never leaves -----------------------------------------------------------------------------------------------------


def test_an_own_b_stays_and_a_goes_with_zeros_beside_it(node, memory):
    plan = plan_of()
    start = drawn(plan, 4, zero_b=True)
    update = node_round.train(asked(plan, 1, start, personal_b=True), node, memory).update
    for module, pair in update.adapter.factors.items():
        assert pair.shape == start.factors[module].shape
        assert not pair.B.any()
    own = {name: array for name, array in memory.read("personal/").items() if name.startswith("after/B|")}
    assert len(own) == len(start.factors)
    assert all(array.any() for array in own.values())


def test_an_own_b_is_what_the_next_round_starts_from_and_what_is_measured(node, memory):
    """Oracle: the same training and measurement, told to share everything, with the kept B put in by hand."""
    plan = plan_of()
    first = drawn(plan, 4, zero_b=True)
    node_round.train(asked(plan, 1, first, personal_b=True), node, memory)
    own = {name.removeprefix("after/B|"): array for name, array in memory.read("personal/").items() if "after/B|" in name}
    second = drawn(plan, 4, zero_b=True, seed=7)
    joined = Adapter({module: Factors(pair.A, own[module]) for module, pair in second.factors.items()})
    wanted = node_round.train(asked(plan, 2, joined), node, memory).update
    rows = node_round.held_out_rows(plan, node)
    assert node_round.evaluate(asked(plan, 1, second, personal_b=True), node, memory)[0] == pytest.approx(
        measure(plan, find("tiny"), rows, joined), rel=1e-6
    )
    found = node_round.train(asked(plan, 2, second, personal_b=True), node, memory).update
    after = memory.read("personal/")
    for module, pair in wanted.adapter.factors.items():
        assert np.allclose(found.adapter.factors[module].A, pair.A, rtol=0, atol=1e-6)
        assert np.allclose(after[f"after/B|{module}"], pair.scaling * pair.B, rtol=0, atol=1e-6)


def test_a_head_of_its_own_is_neither_offered_nor_sent(labelled, memory):
    plan = classification(head={"local": True}, lora={"modules_to_save": ["model.norm"]})
    offer = node_round.join(asked(plan, 0, r=0).call, labelled)
    update = node_round.train(asked(plan, 1), labelled, memory).update
    assert offer.dense.keys() == update.adapter.dense.keys() == {"model.norm.weight"}
    assert not update.rows
    assert memory.read("personal/")["after/D|score.weight"].shape == (3, 128)


def test_a_head_of_its_own_goes_on_from_where_it_was_and_is_measured(labelled, memory):
    plan, shared = classification(head={"local": True}), classification()
    first = node_round.train(asked(plan, 1), labelled, memory).update
    head = memory.read("personal/")["after/D|score.weight"]
    whole = Adapter(first.adapter.factors, {"score.weight": head})
    rows = node_round.held_out_rows(plan, labelled)
    found, _ = node_round.evaluate(asked(plan, 1, first.adapter), labelled, memory)
    assert found == pytest.approx(measure(shared, find("tiny"), rows, whole), rel=1e-6)
    node_round.train(asked(plan, 2, first.adapter), labelled, memory)
    wanted = node_round.train(asked(shared, 2, whole), labelled, memory).update
    assert np.array_equal(memory.read("personal/")["after/D|score.weight"], wanted.adapter.dense["score.weight"])


class Listening(InProcessGrid):
    """Keeps every reply that crosses it."""

    def answer(self, message):
        self.replies = [*getattr(self, "replies", []), super().answer(message)]
        return self.replies[-1]


def everything_in(replies):
    """All that was said, as bytes."""
    said = b""
    for reply in replies:
        assert not reply.has_error(), reply.error.reason
        for key, record in reply.content.items():
            for name, value in record.items():
                said += f"{key} {name} ".encode() + (value.data if hasattr(value, "data") else repr(value).encode())
    return said


@pytest.mark.parametrize(
    ("rule", "plan"),
    [("fedsa", plan_of()), ("product-delta", classification(head={"local": True}))],
    ids=["own b", "own head"],
)
def test_nothing_personal_is_in_any_message_of_a_federation(node, labelled, tmp_path, rule, plan):
    """Two rounds and their evaluations, as packed for the wire; what the node kept is read from its folder afterwards."""
    own = (labelled if plan.head.local else node).model_copy(update={"state": tmp_path / "bank"})
    federation = Federation.model_validate(
        {"name": "fed", "plan": plan, "rounds": {"count": 2}, "aggregation": {"rule": rule}, "output": tmp_path / "runs"}
    )
    told = {"name", "train", "evaluate", "state"}
    grid = Listening(app, [{key: str(value) for key, value in own.model_dump(include=told).items()}])
    outcome = run(grid, federation)
    assert [sorted(record.accepted) for record in outcome.rounds] == [["bank"]] * 2
    said = everything_in(grid.replies)
    kept = Memory(RecordDict(), "fed", own.state).read("personal/")
    parts = {name: array for name, array in kept.items() if name.startswith(("before/", "after/"))}
    assert any(name.startswith("before/") for name in parts)
    for array in parts.values():
        values = array[np.abs(array) > 0].astype(np.float32)
        assert len(values) >= 8
        assert values[:4].tobytes() not in said
        assert np.ascontiguousarray(array).tobytes() not in said
    assert b"adapter A|" in said
    assert b"adapter D|" not in said


# Several adapters in one federation ------------------------------------------------------------------------------------


def joining(adapters):
    return Call(federation="fed", round=0, rounds=3, plan=plan_of(), adapters=adapters)


def test_a_node_offers_the_plan_of_the_adapter_that_it_names(node):
    adapters = {"legal": plan_of(lora={"r": 3}), "medical": plan_of(lora={"r": 7})}
    for name, plan in adapters.items():
        offer = node_round.join(joining(adapters), node.model_copy(update={"adapter": name}))
        assert (offer.adapter, offer.r) == (name, plan.lora.r)
    assert node_round.join(joining({}), node).adapter == ""


@pytest.mark.parametrize("named", [None, "tax"])
def test_a_node_that_names_none_of_several_adapters_is_told_which_there_are(node, named):
    adapters = {"legal": plan_of(), "medical": plan_of()}
    with pytest.raises(ConfigurationError, match=r"adapter: .*there are legal, medical"):
        node_round.join(joining(adapters), node.model_copy(update={"adapter": named}))


def test_a_node_that_names_an_adapter_where_there_is_but_one_is_told_so(node):
    with pytest.raises(ConfigurationError, match=r"found 'legal'.*there is but one, without a name; leave it out"):
        node_round.join(joining({}), node.model_copy(update={"adapter": "legal"}))


def test_the_offer_is_twice_the_rank_where_the_start_is_taken_from_the_base(node):
    for start, precision, wanted in (("default", "fp32", 4), ("pissa", "fp32", 8), ("loftq", "fp32", 4), ("loftq", "nf4", 8)):
        method = "qlora" if precision == "nf4" else "lora"
        plan = plan_of(precision=precision, method=method, lora={"init_lora_weights": start})
        assert node_round.join(asked(plan, 0, r=0).call, node).r == wanted == plan.update_rank
