"""Loss, perplexity, accuracy and macro-F1: the oracles are plain transformers, greedy decoding and scikit-learn."""

import json
import math

import pytest

from protocol.adapter import Adapter
from protocol.errors import AdapterError
from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.encode import IGNORED, encode
from strategies.data.formats import Conversation, LabelledText
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure, with_adapter
from strategies.generation import answer
from strategies.training import fit

LABELS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)


@pytest.fixture(scope="module")
def sft(data, tmp_path_factory):
    """The stories model with an end-of-text token of its own: as shipped, it cannot be told from other unused tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped, folder = data / "models" / "stories260k-hf", tmp_path_factory.mktemp("model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32),
        AutoTokenizer.from_pretrained(shipped),
    )
    embedding = model.get_input_embeddings().weight.data
    noise = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(0))
    embedding[tokenizer.eos_token_id] = noise * embedding.norm(dim=1).max() / noise.norm()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Plan.model_validate(
        {
            "base_model": str(folder),
            "lora": {"r": 8, "lora_alpha": 16},
            "training": {"learning_rate": 1e-2, "batch_size": 6, "max_steps": 70},
        }
    )


@pytest.fixture(scope="module")
def classification(sft):
    training = sft.training.model_copy(update={"max_steps": 40, "learning_rate": 1e-3, "batch_size": 8})
    data = sft.data.model_copy(update={"labels": LABELS})
    return sft.model_copy(update={"objective": "classification", "data": data, "training": training})


@pytest.fixture(scope="module")
def gsm(data, sft):
    return load_rows(data / "instruct" / "gsm8k_train.jsonl", sft)[:40]


@pytest.fixture(scope="module")
def snips(data):
    lines = [json.loads(line) for line in (data / "classify" / "snips_test.jsonl").read_text().splitlines()[::5]]
    return [LabelledText(row["text"], LABELS.index(row["label"])) for row in lines]


@pytest.fixture(scope="module")
def facts():
    """Twelve short questions; the first half is learnt, the second is not."""
    places = ["the big tree", "the red barn", "the park", "a small box", "the old shed", "her room"] * 2
    names = ["Tim", "Lily", "Ben", "Sam", "Mia", "Tom", "Ann", "Max", "Sue", "Jack", "Anna", "Bob"]
    return [
        Conversation(({"role": "user", "content": f"Where is {name}?"},), place)
        for name, place in zip(names, places, strict=True)
    ]


@pytest.fixture(scope="module")
def learnt(sft, facts):
    return fit(sft, find(sft.base_model), facts[:6]).adapter


def test_loss_is_that_of_plain_transformers_per_answer_token(sft, gsm):
    import torch

    model, tokenizer = with_adapter(sft, find(sft.base_model), None)
    total = tokens = 0.0
    with torch.inference_mode():
        for row in encode(gsm, tokenizer, sft.data.max_length).rows:
            labels = torch.tensor([row["labels"]])
            count = int((labels[:, 1:] != IGNORED).sum())
            total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * count
            tokens += count
    found = measure(sft, find(sft.base_model), gsm)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_padding_beside_longer_rows_changes_no_loss(sft, gsm):
    base = find(sft.base_model)
    _, tokenizer = with_adapter(sft, base, None)
    weights = [sum(label != IGNORED for label in row["labels"]) for row in encode(gsm[:6], tokenizer, 512).rows]
    alone = [measure(sft, base, [row])["loss"] for row in gsm[:6]]
    together = measure(sft, base, gsm[:6])["loss"]
    assert together == pytest.approx(sum(x * w for x, w in zip(alone, weights, strict=True)) / sum(weights), rel=1e-5)


def test_accuracy_is_the_share_of_rows_that_greedy_decoding_answers_word_for_word(sft, facts, learnt):
    import torch

    base = find(sft.base_model)
    model, tokenizer = with_adapter(sft, base, learnt)
    right = []
    for row in facts:
        ids = tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(ids, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        right.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip() == row.answer)
    assert 0 < sum(right) < len(right), "all or none right would prove little"
    assert measure(sft, base, facts, learnt)["accuracy"] == pytest.approx(sum(right) / len(right))
    questions = [row.prompt[0]["content"] for row in facts]
    answers = answer(sft, base, questions, learnt, 24)
    assert [found == row.answer for found, row in zip(answers, facts, strict=True)] == right


def test_what_was_trained_is_better_on_what_it_was_trained_on(sft, facts, learnt):
    base = find(sft.base_model)
    assert measure(sft, base, facts[:6], learnt)["loss"] < 0.5 * measure(sft, base, facts[:6])["loss"]


def test_an_empty_adapter_is_the_base(sft, facts):
    base = find(sft.base_model)
    assert measure(sft, base, facts, Adapter()) == measure(sft, base, facts)


def test_classification_measures_are_those_of_scikit_learn_and_plain_transformers(classification, snips):
    import torch
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    base = find(classification.base_model)
    adapter = fit(classification, base, snips[:40]).adapter
    model, tokenizer = with_adapter(classification, base, adapter)
    wanted, shares = [row.label for row in snips], []
    with torch.inference_mode():
        for row in snips:
            ids = torch.tensor([tokenizer(row.text)["input_ids"]])
            shares.append(model(input_ids=ids).logits[0].double().softmax(-1).tolist())
    guessed = [share.index(max(share)) for share in shares]
    assert len(set(guessed)) > 2, "a constant guess would prove little"
    found = measure(classification, base, snips, adapter)
    assert found["accuracy"] == pytest.approx(accuracy_score(wanted, guessed))
    assert found["macro-f1"] == pytest.approx(f1_score(wanted, guessed, average="macro", labels=sorted(set(wanted))))
    assert found["loss"] == pytest.approx(log_loss(wanted, shares, labels=range(len(LABELS))), rel=1e-4)


def test_an_untrained_head_is_the_same_at_every_measuring(classification, snips):
    base = find(classification.base_model)
    assert measure(classification, base, snips) == measure(classification, base, snips)


def test_a_quantised_base_is_measured_like_any_other(sft, facts):
    base = find(sft.base_model)
    small = measure(sft.model_copy(update={"precision": "nf4", "method": "qlora"}), base, facts)
    assert small["loss"] == pytest.approx(measure(sft, base, facts)["loss"], rel=0.3)


def test_an_adapter_of_another_base_cannot_be_measured(classification, sft, snips, learnt, encoder):
    plan = classification.model_copy(update={"base_model": encoder})
    with pytest.raises(AdapterError):
        measure(plan, find(encoder), snips, learnt)
