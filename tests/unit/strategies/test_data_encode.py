"""Token ids and where the loss is: the oracle is what TRL's SFTTrainer makes of the same messages."""

import json

import pytest

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import CHAT_TEMPLATE, find, load
from strategies.data.encode import IGNORED, encode, prompt_ids
from strategies.data.formats import Conversation, LabelledText
from strategies.data.formats import load as load_rows

# What a template with tools does: it writes the descriptions out before the first message.
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHAT_TEMPLATE
# One that renders an open turn otherwise than a closed one, so that prompt and whole part before the prompt's end.
OPEN_TEMPLATE = CHAT_TEMPLATE.replace("{{ 'assistant:\\n' }}", "{{ 'assistant: <think>\\n' }}")


@pytest.fixture(scope="module")
def loaded(data):
    plan = Plan(base_model=str(data / "models" / "stories260k-hf"))
    return load(find(plan.base_model), plan)


@pytest.fixture
def tokenizer(loaded):
    before = loaded[1].chat_template
    yield loaded[1]
    loaded[1].chat_template = before


def by_trl(rows, model, tokenizer, max_length, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    columns = [
        {
            "prompt": list(row.prompt),
            "completion": [{"role": "assistant", "content": row.answer}],
            # As text, for Arrow would give all tools the same fields; TRL reads it back.
            "tools": row.tools if isinstance(row.tools, str) else json.dumps(row.tools),
        }
        for row in rows
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), max_length=max_length, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
    )
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


def agree(rows, model, tokenizer, max_length, folder):
    expected = by_trl(rows, model, tokenizer, max_length, folder)
    encoded = encode(rows, tokenizer, max_length)
    assert encoded.rows == expected
    assert encoded.dropped == len(rows) - len(expected)
    return encoded


def turns(path, count):
    """Conversations straight from a file's messages, whatever its roles."""
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        for at, message in enumerate(row["messages"]):
            if at and message["role"] == "assistant":
                yield Conversation(tuple(row["messages"][:at]), message["content"], row["tools"] or None)


@pytest.mark.parametrize("file", ["instruct/gsm8k_train", "institutions/medical_zh_train", "instruct/alpaca_zh_demo"])
def test_questions_and_answers_are_what_trl_makes_of_them(data, loaded, tokenizer, tmp_path, file):
    rows = load_rows(data / f"{file}.jsonl", Plan())[:24]
    encoded = agree(rows, loaded[0], tokenizer, 4096, tmp_path)
    assert encoded.cut == encoded.dropped == 0


@pytest.mark.parametrize("max_length", [40, 120, 300])
def test_cut_rows_are_what_trl_makes_of_them(data, loaded, tokenizer, tmp_path, max_length):
    rows = load_rows(data / "instruct" / "gsm8k_train.jsonl", Plan())[:40]
    rows += [Conversation(({"role": "user", "content": "Hi"},), "Yes.")]
    encoded = agree(rows, loaded[0], tokenizer, max_length, tmp_path)
    lengths = [len(row["input_ids"]) for row in encode(rows, tokenizer, 10_000).rows]
    assert encoded.cut == sum(length > max_length for length in lengths)
    assert encoded.cut > 0


@pytest.mark.parametrize("file", ["toolcall_en", "toolcall_zh"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TOOL_TEMPLATE])
def test_conversations_of_many_turns_with_tools_are_what_trl_makes_of_them(data, loaded, tokenizer, tmp_path, file, template):
    tokenizer.chat_template = template
    rows = list(turns(data / "instruct" / f"{file}.jsonl", 12))
    assert max(len(row.prompt) for row in rows) >= 5
    assert any(row.tools for row in rows)
    agree(rows, loaded[0], tokenizer, 100_000, tmp_path)


def test_tools_given_as_json_text_are_what_trl_makes_of_them(loaded, tokenizer, tmp_path):
    tokenizer.chat_template = TOOL_TEMPLATE
    tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}))
    agree(load_rows(tmp_path / "rows.jsonl", Plan()), loaded[0], tokenizer, 4096, tmp_path)


def test_a_template_that_renders_open_turns_otherwise_begins_the_loss_where_trl_begins_it(loaded, tokenizer, tmp_path):
    tokenizer.chat_template = OPEN_TEMPLATE
    agree([Conversation(({"role": "user", "content": "Rain?"},), "No.")], loaded[0], tokenizer, 4096, tmp_path)


def test_the_loss_is_on_the_answer_and_its_end_alone(data, tokenizer):
    rows = load_rows(data / "instruct" / "gsm8k_train.jsonl", Plan())[:24]
    for row, made in zip(rows, encode(rows, tokenizer, 4096).rows, strict=True):
        assert all(label in (IGNORED, token) for label, token in zip(made["labels"], made["input_ids"], strict=True))
        learnt = [label for label in made["labels"] if label != IGNORED]
        assert tokenizer.eos_token_id in learnt
        assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == row.answer


def test_a_prompt_is_the_beginning_of_what_is_trained_on(data, tokenizer):
    rows = load_rows(data / "instruct" / "gsm8k_train.jsonl", Plan())[:24]
    for row, made in zip(rows, encode(rows, tokenizer, 4096).rows, strict=True):
        ids = prompt_ids(row.prompt, tokenizer)
        assert made["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize("max_length", [3, 8, 64])
def test_labelled_texts_are_the_tokenizers_own_ids_cut_at_the_end(data, tokenizer, max_length):
    texts = [json.loads(line)["text"] for line in (data / "classify" / "snips_train.jsonl").read_text().splitlines()[:20]]
    made = encode([LabelledText(text, at) for at, text in enumerate(texts)], tokenizer, max_length)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert made.rows == [{"input_ids": row[:max_length], "labels": at} for at, row in enumerate(ids)]
    assert made.cut == sum(len(row) > max_length for row in ids)
    assert made.dropped == 0


def test_when_no_answer_is_left_the_remedy_is_named(tokenizer):
    with pytest.raises(DataError, match=r"data\.max_length"):
        encode([Conversation(({"role": "user", "content": "long " * 50},), "Yes.")], tokenizer, 16)
