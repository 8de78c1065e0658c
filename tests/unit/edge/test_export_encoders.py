"""Encoders as graphs: logits and embeddings against PyTorch, with PEFT's adapters and heads of any number of labels."""

import numpy as np
import pytest

from edge.adapter_file import parameters
from protocol.errors import AdapterError
from protocol.files import read_stored
from tests.unit.edge.graph_driver import session

TEXTS = ["How do I move money to my savings account?", "card", "The weather is fine today, and tomorrow it will rain again."]


def batch(base, texts=TEXTS):
    from strategies.base_model import load_tokenizer

    return {name: np.asarray(value) for name, value in load_tokenizer(base)(texts, padding=True, return_tensors="np").items()}


def run(folder, given):
    graph = session(folder / "model.onnx")
    known = {put.name for put in [*graph.get_inputs(), *graph.get_overridable_initializers()]}
    return graph.run(None, {name: value for name, value in given.items() if name in known})[0]


def torch_logits(model, given):
    import torch

    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(value) for name, value in given.items()}).logits.numpy()


def base_model(made, rows):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(str(made.base.folder), num_labels=rows)


def test_a_classifier_with_peft_adapter_and_its_own_labels_is_pytorchs(exported_classifier):
    """The adapter's head has five rows, the base's three; a batch of texts of different lengths. fp32: 1e-5."""
    from peft import PeftModel

    made = exported_classifier
    stored = read_stored(made.adapters["five"])
    given = batch(made.base)
    adapter = parameters(stored, made.exported.lora, made.exported.dense, made.base.digest)
    ours = run(made.folder, given | adapter)
    model = PeftModel.from_pretrained(base_model(made, 5), str(made.adapters["five"]))
    assert ours.shape == (3, 5)
    assert np.abs(ours - torch_logits(model, given)).max() <= 1e-5
    without = {name: value for name, value in adapter.items() if name.startswith("dense.")}
    assert np.abs(ours - run(made.folder, given | without)).max() > 1e-2  # the low-rank part is in it


def test_biases_given_whole_replace_the_bases_own(exported_classifier):
    """BitFit's adapters: every bias of body, norms and head. Oracle: the same biases put into the PyTorch model."""
    import torch

    made = exported_classifier
    model = base_model(made, 3)
    rng = np.random.default_rng(2)
    given = {}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or name.startswith("classifier"):
                changed = rng.normal(0, 0.1, tuple(tensor.shape)).astype(np.float32)
                tensor.copy_(torch.tensor(changed))
                given[f"dense.{name}"] = changed
    assert {name.removeprefix("dense.") for name in given} == set(made.exported.dense)
    texts = batch(made.base)
    assert np.abs(run(made.folder, texts | given) - torch_logits(model, texts)).max() <= 1e-5


def test_a_head_that_nobody_trained_is_the_one_that_training_starts_from(exported_classifier):
    from protocol.plan import Plan
    from strategies.adapted import with_adapter

    made = exported_classifier
    plan = Plan(base_model=made.base.name, objective="classification", data={"labels": ["one", "two", "three"]})
    given = batch(made.base)
    expected = torch_logits(with_adapter(plan, made.base, None)[0], given)
    assert np.abs(run(made.folder, given) - expected).max() <= 1e-5
    assert made.exported.labels == ("one", "two", "three")


def test_a_text_alone_and_in_a_batch_has_the_same_logits(exported_classifier):
    together = run(exported_classifier.folder, batch(exported_classifier.base))
    for row, text in enumerate(TEXTS):
        alone = run(exported_classifier.folder, batch(exported_classifier.base, [text]))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Encoders of random weights on disk, by architecture."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    from strategies.base_model import find

    tokenizer = AutoTokenizer.from_pretrained(find("tiny").folder)

    def made(kind):
        folder = tmp_path_factory.mktemp(kind)
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 0}
        if kind == "DistilBert":
            shape |= {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2}
        else:
            shape |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        if kind == "Roberta":
            shape |= {"type_vocab_size": 1}
        if kind in ("Albert", "Electra"):
            shape |= {"embedding_size": 16}
        if kind == "Albert":
            shape |= {"num_hidden_layers": 3}
        if kind == "ModernBert":
            shape |= {"local_attention": 8, "num_hidden_layers": 2, "global_attn_every_n_layers": 2}
            shape |= dict.fromkeys(("bos_token_id", "cls_token_id"), 1) | dict.fromkeys(("eos_token_id", "sep_token_id"), 2)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(
            getattr(transformers, f"{kind}Config")(num_labels=3, **shape)
        )
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(0.1 * torch.randn_like(tensor))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return find(str(folder)), model.eval()

    return made


@pytest.mark.parametrize("kind", ["Roberta", pytest.param("DistilBert", marks=pytest.mark.slow)])
def test_heads_of_two_layers_and_positions_that_begin_late(small, kind, tmp_path):
    from edge.export import export
    from edge.graph_file import save

    base, model = small(kind)
    exported = export(base, "classifier", targets=["q_lin", "lin1"] if kind == "DistilBert" else ["query"])
    save(exported.model, tmp_path)
    assert exported.encoder.context_tokens == (39 if kind == "Roberta" else 40)
    assert not exported.encoder.token_type_ids
    rng = np.random.default_rng(1)
    longest = exported.encoder.context_tokens
    ids = rng.integers(3, 100, (2, longest))
    mask = np.ones_like(ids)
    ids[1, 9:] = mask[1, 9:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    assert np.abs(run(tmp_path, given) - torch_logits(model, given)).max() <= 1e-5
    heads = {name: shape for name, shape in exported.dense.items() if "labels" in shape}
    last = "classifier.out_proj" if kind == "Roberta" else "classifier"
    assert heads == {f"{last}.weight": ("labels", 32), f"{last}.bias": ("labels",)}
    other = {f"dense.{last}.weight": np.ones((6, 32), np.float32), f"dense.{last}.bias": np.zeros(6, np.float32)}
    assert run(tmp_path, given | other).shape == (2, 6)


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.slow)])
def test_embeddings_are_pooled_over_the_mask_and_have_length_1(small, pooling, tmp_path):
    """Oracle: hidden states of the PyTorch model, pooled row by row without any padding, in float64."""
    import torch

    from edge.export import export
    from edge.graph_file import save

    base, model = small("Bert")
    exported = export(base, "embedder", pooling=pooling)
    save(exported.model, tmp_path)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 100, (2, 12))
    mask = np.ones_like(ids)
    ids[1, 5:] = mask[1, 5:] = 0
    ours = run(tmp_path, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    for row, length in enumerate((12, 5)):
        with torch.no_grad():
            states = model.bert(input_ids=torch.tensor(ids[row : row + 1, :length])).last_hidden_state[0].double()
        pooled = states.mean(0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(ours[row], (pooled / pooled.norm()).numpy(), atol=1e-6)
    assert all(module.startswith("bert.encoder") for module in exported.lora)  # the names that a classifier's adapter has
    assert not any("pooler" in name or "classifier" in name for name in exported.dense)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Albert", "ModernBert", "Electra", "XLMRoberta", "DebertaV2", "MPNet"])
def test_other_encoders_are_pytorchs_with_an_adapter_too(small, kind, tmp_path):
    """ALBERT's layers share their modules: one adapter, used three times."""
    from edge.export import export
    from edge.graph_file import save
    from tests.unit.edge.conftest import peft_folders

    base, model = small(kind)
    exported = export(base, "classifier")
    save(exported.model, tmp_path)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 100, (2, 30))
    mask = np.ones_like(ids)
    ids[1, 20:] = mask[1, 20:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if exported.encoder.token_type_ids:
        given["token_type_ids"] = np.zeros_like(ids)
    assert np.abs(run(tmp_path, given) - torch_logits(model, given)).max() <= 1e-5
    targets = sorted(exported.lora)
    adapters = peft_folders(model, {"one": {"r": 3, "target_modules": targets}}, tmp_path / "peft", "SEQ_CLS")
    adapter = parameters(read_stored(adapters["one"]), exported.lora, exported.dense, base.digest)
    adapted = type(model).from_pretrained(str(base.folder))
    from peft import PeftModel

    expected = torch_logits(PeftModel.from_pretrained(adapted, str(adapters["one"])), given)
    assert np.abs(run(tmp_path, given | adapter) - expected).max() <= 1e-5


@pytest.mark.slow
def test_a_decoder_with_a_head_is_a_classifier_too(tmp_path):
    """It reads its verdict off each row's last token; angles are turned for every row."""
    from edge.export import export
    from edge.graph_file import save
    from protocol.plan import Plan
    from strategies.adapted import with_adapter
    from strategies.base_model import find

    base = find("tiny")
    exported = export(base, "classifier", labels=["a", "b", "c"])
    save(exported.model, tmp_path)
    ids = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    model, _ = with_adapter(Plan(objective="classification", data={"labels": ["a", "b", "c"]}), base, None)
    assert dict(exported.dense) == {"score.weight": ("labels", 128)}
    assert np.abs(run(tmp_path, given) - torch_logits(model, given)).max() <= 1e-5


def test_an_adapter_of_a_module_that_was_not_opened_is_refused(exported_classifier):
    stored = read_stored(exported_classifier.adapters["five"])
    lora = {name: shape for name, shape in exported_classifier.exported.lora.items() if not name.endswith("query")}
    with pytest.raises(AdapterError, match="takes no adapter in this graph"):
        parameters(stored, lora, exported_classifier.exported.dense, exported_classifier.base.digest)
