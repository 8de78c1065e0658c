"""Answers from a bundle: the tokens that transformers writes, however they are asked for, and from many threads at once."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from runtime_bundles import KEY, concat_decoder, of_exported, open_tested

from edge.runtime import decoding
from edge.runtime.latency import measure
from edge.runtime.model import open as opened
from edge.runtime.session import Resources
from protocol.errors import AdapterError, BundleError, ConfigurationError, DataError, HardwareError, ModelError

PROMPTS = [
    "Once upon a time",
    "Lily and Tom went to the park. They saw a big dog and it was very",
    "The",
    "One day, a little cat found a red ball. The cat wanted",
]
NAMES = (None, "narrow", "wide")


@pytest.fixture(scope="module")
def folder(exported_decoder, tmp_path_factory):
    from edge.tokenizer import control_tokens
    from strategies.base_model import load_tokenizer

    base = exported_decoder.base
    tokens = control_tokens(load_tokenizer(base), base)
    place = tmp_path_factory.mktemp("decoder-bundle") / "bundle"
    return of_exported(place, exported_decoder, tokens, base.folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model(folder):
    made = open_tested(folder)
    for name in NAMES[1:]:
        made.load_adapter(name)
    return made


@pytest.fixture(scope="module")
def torch_models(exported_decoder):
    """Oracle: transformers' own model, with each adapter as PEFT itself loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def fresh():
        return AutoModelForCausalLM.from_pretrained(exported_decoder.base.folder).eval()

    made = {None: fresh()}
    for name in NAMES[1:]:
        made[name] = PeftModel.from_pretrained(fresh(), str(exported_decoder.adapters[name])).eval()
    return made


@pytest.fixture(scope="module")
def tokenizer(exported_decoder):
    from strategies.base_model import load_tokenizer

    return load_tokenizer(exported_decoder.base)


def greedy(model, ids, count):
    import torch

    with torch.inference_mode():
        told = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
        )
    return tuple(told[0, len(ids) :].tolist())


@pytest.mark.parametrize("adapter", NAMES)
def test_greedy_answers_are_transformers_own(model, torch_models, tokenizer, adapter):
    for prompt in PROMPTS[:2]:
        ids = tokenizer(prompt)["input_ids"]
        answer = model.generate(prompt, adapter=adapter, max_new_tokens=64)

        assert answer.ids == greedy(torch_models[adapter], ids, 64)
        assert answer.prompt_tokens == len(ids)
        whole = tokenizer.decode([*ids, *answer.ids], skip_special_tokens=True)
        assert prompt + answer.text == whole


def test_questions_are_answered_as_the_project_itself_answers_them(model, torch_models, tokenizer):
    """Oracle: strategies.generation, which training's own figures are made with."""
    from strategies.generation import greedy as answers

    questions = ["Tell me of a cat", "What did Tom see?", "user:\nand who said so?"]
    expected = answers(torch_models["wide"], tokenizer, questions, 24)

    talks = [[{"role": "user", "content": question}] for question in questions]
    found = model.generate_all(talks, adapter="wide", max_new_tokens=24, batch_size=2)

    assert [answer.text.strip() for answer in found] == expected


@pytest.mark.parametrize("adapter", NAMES)
def test_a_batch_of_ragged_prompts_gives_what_each_gives_alone(model, adapter):
    """Rows end at different times (stop texts), so that finished ones stand beside ones that go on."""
    settings = {"max_new_tokens": 48, "stop": (".",), "adapter": adapter}

    together = model.generate_all(PROMPTS, batch_size=4, **settings)

    assert together == [model.generate(prompt, **settings) for prompt in PROMPTS]
    assert len({len(answer.ids) for answer in together}) > 1


def test_long_rows_of_a_batch_and_a_cache_that_grows_change_nothing(model, monkeypatch):
    """Chunks of 7 tokens and a first capacity of 8: prompts are read row by row, and the cache is doubled several times."""
    expected = model.generate_all(PROMPTS, max_new_tokens=60, adapter="narrow")
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(decoding, "_FIRST_CAPACITY", 8)

    assert model.generate_all(PROMPTS, max_new_tokens=60, adapter="narrow") == expected


def test_logits_of_every_token_are_transformers_own(model, torch_models, tokenizer, monkeypatch):
    """2e-6 of the largest logit (17): a few roundings of float32; in chunks as at once."""
    import torch

    ids = tokenizer(" ".join(PROMPTS))["input_ids"]
    with torch.inference_mode():
        expected = torch_models["wide"](torch.tensor([ids])).logits[0].numpy()

    tolerance = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(model.outputs(ids, adapter="wide"), expected, rtol=0, atol=tolerance)
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", 13)
    np.testing.assert_allclose(model.outputs(ids, adapter="wide"), expected, rtol=0, atol=tolerance)


def test_what_is_streamed_is_what_is_written(model):
    for settings in ({"max_new_tokens": 40}, {"temperature": 1.5, "seed": 4, "max_new_tokens": 80}, {"stop": ("day", "a big")}):
        stream = model.stream(PROMPTS[0], **settings)
        pieces = list(stream)

        assert all(pieces)
        assert "".join(pieces) == stream.answer().text == model.generate(PROMPTS[0], **settings).text
        assert stream.answer() == model.generate(PROMPTS[0], **settings)


def test_an_answer_ends_before_a_stop_text_that_lies_across_tokens(model):
    whole = model.generate(PROMPTS[0], max_new_tokens=60).text
    stop = whole[20:27]  # whatever tokens these seven characters are made of

    answer = model.generate(PROMPTS[0], max_new_tokens=60, stop=(stop, "never"))

    assert answer.text == whole[: whole.index(stop)]
    assert answer.reason == "stop"


def test_a_draw_depends_on_its_seed_and_on_no_other_row(model):
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 32}

    together = model.generate_all(PROMPTS, seed=7, batch_size=3, **settings)

    assert [answer.ids for answer in together] == [model.generate(prompt, seed=7, **settings).ids for prompt in PROMPTS]
    assert together[0].ids != model.generate(PROMPTS[0], seed=8, **settings).ids


def test_an_answer_ends_where_the_model_ends_it(model, monkeypatch):
    """The manifest's own end, here a full stop: it belongs to the ids and not to the text."""
    full_stop = model.tokens.ids(".")[-1]
    ended = model.manifest.model_copy(update={"tokens": model.manifest.tokens.model_copy(update={"eos": (2, full_stop)})})
    expected = model.generate(PROMPTS[0], max_new_tokens=64, stop=(".",))
    monkeypatch.setattr(model, "manifest", ended)

    answer = model.generate(PROMPTS[0], max_new_tokens=64)

    assert answer.reason == "end"
    assert answer.ids[-1] == full_stop
    assert answer.text == expected.text


def test_an_answer_ends_where_the_context_does(model):
    """Oracle: transformers on the tokens so far, at the last position that the model was made for."""
    context = model.manifest.decoder.context_tokens
    prompt = (model.tokens.ids(" ".join(PROMPTS)) * 20)[: context - 3]

    answers = model.generate_all([prompt, prompt[:5]], max_new_tokens=20)

    assert answers[0].reason == "length"
    assert len(answers[0].ids) == 3
    assert answers[1] == model.generate(prompt[:5], max_new_tokens=20)


@pytest.mark.parametrize("adapter", [None, "wide"])
def test_a_conversation_answers_as_if_all_of_it_were_read_anew(model, adapter, monkeypatch):
    """And what was read before is not read again: of every turn only what is new goes through the graph."""
    read = []
    talk = model.conversation(adapter=adapter, system="Be kind.")
    row_of = talk._reader._run
    monkeypatch.setattr(
        talk._reader, "_run", lambda binding, ids, *rest: (read.append(ids.shape[1]), row_of(binding, ids, *rest))[1]
    )
    for question in ("Tell me of a dog", "And then?", "Why was it so?"):
        said = [*talk.messages, {"role": "user", "content": question}]

        assert talk.answer(question, max_new_tokens=16) == model.generate(said, adapter=adapter, max_new_tokens=16)
    assert sum(read) < len(model.prompt_ids(said))
    assert [message["role"] for message in talk.messages] == ["system"] + ["user", "assistant"] * 3


def test_a_turn_that_is_broken_off_was_not_said(model):
    talk = model.conversation()
    pieces = talk.stream("Tell me of a dog", max_new_tokens=30)
    next(pieces)
    pieces.close()

    assert talk.messages == []
    expected = model.generate([{"role": "user", "content": "Of a cat"}], max_new_tokens=10)
    assert talk.answer("Of a cat", max_new_tokens=10) == expected


def test_three_adapters_swapped_over_one_session_by_eight_threads_give_no_wrong_answer(folder, exported_decoder, tmp_path):
    """8 threads × 200 calls × the base and 3 adapters (the issue's measure): every logit is the one that is known, bit for bit.

    A call reads a prompt and goes on by one token, so that prompts, cache and adapters of all threads are mixed.
    """
    model = open_tested(folder)
    file = tmp_path / "third.onnx_adapter"
    file.write_bytes((folder / "adapters" / "wide.onnx_adapter").read_bytes())
    names = [None, model.load_adapter("narrow"), model.load_adapter("wide"), model.load_adapter(scaled(file))]
    asked = [(tuple(model.prompt_ids(prompt)), name) for prompt in PROMPTS[:2] for name in names]

    def told(ids: tuple[int, ...], name: str | None) -> np.ndarray:
        reader = model.reader(name)
        return np.concatenate([reader.read([ids]), reader.step([7], [True])])

    known = [told(*asks) for asks in asked]
    assert len({logits.tobytes() for logits in known}) == len(asked)

    def wrong(thread: int) -> int:
        order = np.random.default_rng(thread).integers(len(asked), size=200)
        return sum(not np.array_equal(told(*asked[at]), known[at]) for at in order)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(wrong, range(8))) == [0] * 8


def scaled(file):
    """The same adapter with all its B turned round: a third one."""
    import onnxruntime

    given = {
        name: np.array(value.numpy()) * (-1 if name.endswith(".B") else 1)
        for name, value in onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters().items()
    }
    made = onnxruntime.AdapterFormat()
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()})
    made.export_adapter(str(file))
    return file


def test_adapters_come_and_go_and_none_is_taken_for_another(folder, tmp_path):
    model = open_tested(folder)
    with pytest.raises(AdapterError, match="no adapter narrow is loaded; loaded are none"):
        model.generate("Once", adapter="narrow")
    with pytest.raises(AdapterError, match="no adapter of this bundle, which has narrow, wide"):
        model.load_adapter("third")
    assert model.load_adapter("narrow") == "narrow"
    with pytest.raises(AdapterError, match="there already"):
        model.load_adapter("narrow")
    stranger = tmp_path / "wide.onnx_adapter"
    stranger.write_bytes((folder / "adapters" / "narrow.onnx_adapter").read_bytes())
    with pytest.raises(AdapterError, match="there already"):  # a file that calls itself as one of the bundle's
        model.load_adapter(stranger)
    model.unload_adapter("narrow")
    assert model.adapters == ()
    with pytest.raises(AdapterError, match="no adapter narrow"):
        model.unload_adapter("narrow")


def test_an_adapter_that_was_changed_since_the_bundle_was_opened_is_refused(exported_decoder, tmp_path, folder):
    import shutil

    place = tmp_path / "bundle"
    shutil.copytree(folder, place)
    model = open_tested(place)
    file = place / "adapters" / "wide.onnx_adapter"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)

    with pytest.raises(BundleError, match="not as it was signed"):
        model.load_adapter("wide")


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "why"),
    [
        ("", {}, DataError, "empty"),
        ([], {}, DataError, "empty"),
        (PROMPTS[0], {"max_new_tokens": 0}, ConfigurationError, "max_new_tokens"),
        (PROMPTS[0], {"temperatur": 1}, ConfigurationError, "temperatur"),
        (PROMPTS[0], {"adapter": "none"}, AdapterError, "no adapter none is loaded; loaded are narrow, wide"),
        ([5] * 512, {}, DataError, "has 512 tokens, and the context of 512"),
        ([5] * 600, {}, DataError, "has 600 tokens, and the context of 512"),
        ([5, 512], {}, DataError, "from 5 to 512; expected 0 to 511"),
        ([{"role": "robot", "content": "x"}], {}, DataError, "role"),
        ([{"role": "assistant", "content": "x"}], {}, DataError, "not a user's"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_numbers(model, prompt, settings, error, why):
    with pytest.raises(error, match=why):
        model.generate(prompt, **settings)


def test_a_decoder_neither_classifies_nor_embeds(model):
    for asks in (model.classify, model.embed):
        with pytest.raises(ModelError, match="can generate"):
            asks(["a text"])


def test_a_model_or_a_cache_that_memory_cannot_hold_is_refused_with_the_numbers(folder):
    with pytest.raises(HardwareError, match="needs about 65 MiB, and 10 MiB are there"):
        open_tested(folder, memory_bytes=10 * 2**20)
    model = open_tested(folder, memory_bytes=66 * 2**20)
    with pytest.raises(HardwareError, match="keys and values of 512 tokens need 10 MiB, and 1 MiB"):
        model.generate_all([[5] * 400] * 16, batch_size=16)


def test_an_onnxruntime_that_is_too_old_and_a_graph_that_is_another_are_refused(
    exported_decoder, folder, tmp_path, monkeypatch
):
    import onnxruntime

    manifest = open_tested(folder).manifest
    from edge.runtime.model import Model

    with pytest.raises(BundleError, match=r"lacks 2 inputs that the manifest promises, such as lora\.model\.layers\.9"):
        Model(folder, manifest.model_copy(update={"lora": {**manifest.lora, "model.layers.9": (64, 64)}}))
    with pytest.raises(BundleError, match="past"):
        Model(folder, manifest.model_copy(update={"decoder": manifest.decoder.model_copy(update={"layers": 6})}))
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.9")
    with pytest.raises(ModelError, match=r"needs onnxruntime 1.31 or newer, found 1.30.9"):
        open_tested(folder)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(threads):
    with pytest.raises(ConfigurationError, match="threads"):
        Resources(threads=threads)


def test_a_newer_version_that_was_opened_bars_an_older_one(folder, tmp_path):
    import shutil

    from edge.runtime.opened_versions import FOLDER

    shutil.copytree(folder, tmp_path / "bundle")
    opened(tmp_path / "bundle", KEY.public_key())
    assert (tmp_path / FOLDER / "tested.1").exists()
    (tmp_path / FOLDER / "tested.2").touch()

    with pytest.raises(BundleError, match="this device has opened 2"):
        opened(tmp_path / "bundle", KEY.public_key())


def test_a_process_that_runs_a_bundle_imports_no_training_library(folder):
    """The device's install has none of them; here they could be imported, and must not be."""
    code = f"""
import json, sys
from pathlib import Path
from edge.runtime.latency import measure
from edge.runtime.model import open
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
key = Ed25519PublicKey.from_public_bytes(bytes.fromhex({KEY.public_key().public_bytes_raw().hex()!r}))
model = open(Path({str(folder)!r}), key, state=None)
model.load_adapter("wide")
text = model.generate("Once upon a time", adapter="wide", max_new_tokens=5, temperature=1.0).text
model.conversation().answer("hello", max_new_tokens=5)
measure(model, prompt_tokens=4, new_tokens=2, repeats=1)
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert not imported & {
        "torch",
        "transformers",
        "peft",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "flwr",
        "strategies",
        "jinja2",
        "yaml",
    }
    assert {"numpy", "onnxruntime", "tokenizers"} <= imported


def test_a_latency_report_has_a_row_for_the_base_and_each_adapter(model):
    report = measure(model, prompt_tokens=16, new_tokens=4, repeats=1)

    told = json.loads(report.to_json())
    assert [row["adapter"] for row in told["rows"]] == [None, "narrow", "wide"]
    assert all(row["first_token_seconds"] > 0 and row["decode_tokens_per_second"] > 0 for row in told["rows"])
    assert told["peak_rss_bytes"] > 2**20
    assert len(report.table().splitlines()) == 6
    with pytest.raises(DataError, match="512"):
        measure(model, prompt_tokens=600)


TABLE = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
PLACES = np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)


def by_hand(ids) -> np.ndarray:
    """Oracle: the small decoder's logits after every token, in float64."""
    table, places = TABLE.astype(np.float64), PLACES.astype(np.float64)
    values, keys = table[ids], table[ids] + places[: len(ids)]
    scores = np.where(np.tri(len(ids), dtype=bool), keys @ keys.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values @ table.T


def test_a_cache_that_is_handed_on_gives_what_all_tokens_at_once_give(tmp_path):
    """The second kind of graph, whose keys and values come back longer than they went in; 1e-5 is float32's rounding."""
    model = open_tested(concat_decoder(tmp_path / "bundle", TABLE, PLACES))
    reader, ids = model.reader(), [2, 3, 4]

    np.testing.assert_allclose(model.outputs([2, 3, 4, 5]), by_hand([2, 3, 4, 5]), atol=1e-5)
    np.testing.assert_allclose(reader.read([ids])[0], by_hand(ids)[-1], atol=1e-5)
    for token in (5, 5, 2, 0):
        ids.append(token)
        np.testing.assert_allclose(reader.step([token], [True])[0], by_hand(ids)[-1], atol=1e-5)
    np.testing.assert_allclose(reader.read([[*ids, 3, 3]])[0], by_hand([*ids, 3, 3])[-1], atol=1e-5)
    np.testing.assert_allclose(reader.read([[2, 4]])[0], by_hand([2, 4])[-1], atol=1e-5)  # another beginning
    np.testing.assert_allclose(reader.read([[2, 4]])[0], by_hand([2, 4])[-1], atol=1e-5)  # the same again


def test_answers_over_such_a_cache_are_greedy_and_end_with_the_context(tmp_path):
    model = open_tested(concat_decoder(tmp_path / "bundle", TABLE, PLACES))
    expected = [2, 3]
    while len(expected) < 12:
        expected.append(int(by_hand(expected)[-1].argmax()))

    answers = model.generate_all(["a b", "c"], max_new_tokens=50)

    assert answers[0].ids == tuple(expected[2:])
    assert answers[0].reason == answers[1].reason == "length"
    with pytest.raises(ModelError, match="no chat template"):
        model.generate([{"role": "user", "content": "a"}])
