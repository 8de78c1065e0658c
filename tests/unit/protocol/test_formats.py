"""Every method's two files: PEFT loads what we write of its methods, we read what it wrote, others come back as they were."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError
from protocol.files import read_adapter, read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MANIFEST = Manifest(base_digest="ab" * 32, kind="adapter")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def base(kind):
    import torch
    import transformers as t

    torch.manual_seed(0)
    made = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **SIZES)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=40)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(num_labels=3, **SIZES)),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(num_labels=3, max_position_embeddings=40, **SIZES)
        ),
    }
    return made[kind]().eval()


def objective(kind):
    return "classification" if kind in ("bert", "roberta") else "sft"


def config(method, kind):
    import peft

    task = {"task_type": "SEQ_CLS" if objective(kind) == "classification" else "CAUSAL_LM"}
    tokens = {"num_virtual_tokens": 5, **task}
    linear = {"target_modules": "all-linear", "r": 3, "lora_alpha": 6, **task}
    if kind == "gpt2":
        linear["fan_in_fan_out"] = True
    return {
        "ia3": lambda: peft.IA3Config(**task),
        "prompt-tuning": lambda: peft.PromptTuningConfig(**tokens),
        "prefix-tuning": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **tokens),
        "p-tuning-v2": lambda: peft.PrefixTuningConfig(**tokens),
        "lora": lambda: peft.LoraConfig(**linear),
        "dora": lambda: peft.LoraConfig(use_dora=True, **linear),
    }[method]()


def plain(method, kind, folder):
    """What plain PEFT saves of a model whose every trainable number was drawn, so that nothing is as it began."""
    import torch
    from peft import get_peft_model

    model = get_peft_model(base(kind), config(method, kind))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


def loaded(kind, folder):
    """Logits of the base with the adapter of a folder, by plain PEFT."""
    import torch
    from peft import PeftModel

    with torch.no_grad():
        ids = torch.arange(2, 14).reshape(2, 6)
        return PeftModel.from_pretrained(base(kind), folder).eval()(input_ids=ids).logits.numpy()


def plan_of(stored, kind):
    return stored.on(Plan(base_model="some/base", objective=objective(kind)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("method", ["ia3", "prompt-tuning", "prefix-tuning", "p-tuning-v2", "dora"])
def test_plain_peft_loads_what_we_write_of_what_it_wrote_with_identical_logits(tmp_path, method, kind):
    """Reading and writing again changes no bit of any logit: names, shapes, heads and which modules are scaled where."""
    folder = plain(method, kind, tmp_path / "plain")
    stored = read_stored(folder)
    write_adapter(tmp_path / "ours", stored.adapter, MANIFEST, plan_of(stored, kind))
    before, after = loaded(kind, folder), loaded(kind, tmp_path / "ours")
    # Of LoRA's kin a scaling moves into B: 6 / 3 is a power of two, which changes no bit.
    assert np.array_equal(before, after)
    bare = base(kind)(input_ids=_ids()).logits.detach().numpy()
    assert not np.allclose(before[:, -bare.shape[1] :], bare), "an adapter that does nothing proves nothing"


def _ids():
    import torch

    return torch.arange(2, 14).reshape(2, 6)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("method", ["ia3", "prompt-tuning", "prefix-tuning", "p-tuning-v2", "lora", "dora"])
def test_an_adapters_names_are_the_bases_own(tmp_path, method, kind):
    """Oracle: each is a prompt, or lies in a module of the base, or beside it under PEFT's name of what it adds."""
    adapter, _ = read_adapter(plain(method, kind, tmp_path))
    modules = dict(base(kind).named_modules())
    assert adapter.factors.keys() <= modules.keys()
    for name in adapter.dense:
        module, _, last = name.rpartition(".")
        assert name == "prompt_embeddings" or (
            module in modules and last in ("weight", "bias", "ia3_l", "lora_magnitude_vector")
        )
    assert ("classifier.weight" in adapter.dense) == (kind == "bert")


def test_what_to_attach_follows_from_the_folder(tmp_path):
    found = read_stored(plain("ia3", "llama", tmp_path / "ia3"))
    assert found.task_type == "CAUSAL_LM"
    layers = [f"model.layers.{at}" for at in range(2)]
    down = [f"{layer}.mlp.down_proj" for layer in layers]
    keys = [f"{layer}.self_attn.{name}_proj" for layer in layers for name in "kv"]
    assert found.settings == {
        "method": "ia3",
        "ia3": {"target_modules": sorted(down + keys), "feedforward_modules": down},
    }
    for method in ("prompt-tuning", "prefix-tuning", "p-tuning-v2"):
        found = read_stored(plain(method, "llama", tmp_path / method))
        assert found.settings == {"method": method, "prompt": {"num_virtual_tokens": 5}}
    dora = plan_of(read_stored(plain("dora", "bert", tmp_path / "dora")), "bert")
    assert (dora.method, dora.lora.use_dora, dora.lora.modules_to_save) == ("lora", True, ())  # the head trains whole anyway
    assert not plan_of(read_stored(plain("lora", "llama", tmp_path / "lora")), "llama").lora.use_dora


def test_a_whole_module_beside_the_factors_is_named_and_a_head_is_not(tmp_path):
    pair = Factors(np.ones((1, 6), np.float32), np.ones((5, 1), np.float32))
    dense = {"bert.norm.weight": np.ones(3, np.float32), "classifier.out.weight": np.ones((2, 3), np.float32)}
    write_adapter(tmp_path / "a", Adapter({"bert.q": pair}, dense), MANIFEST, Plan(objective="classification"))
    found = read_stored(tmp_path / "a").settings["lora"]
    assert (found["target_modules"], found["modules_to_save"]) == (["bert.q"], ["bert.norm"])
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"] == ["bert.norm", "classifier"]


@pytest.mark.parametrize("steps", [0, 12])
def test_adalora_of_plain_peft_has_the_products_that_peft_computes(tmp_path, steps):
    """Before ranks are taken away, and after: PEFT then saves fewer rows, and still scales by the rank of the beginning."""
    import torch
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    settings = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=5, tinit=1, tfinal=3, deltaT=1, total_step=12, task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(base("llama"), settings)
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    for step in range(steps):
        optimizer.zero_grad()
        model(input_ids=_ids(), labels=_ids()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    stored = read_stored(tmp_path)
    again = PeftModel.from_pretrained(base("llama"), tmp_path)
    layers = {name.removeprefix("base_model.model."): m for name, m in again.named_modules() if hasattr(m, "lora_E")}
    assert stored.settings["method"] == "lora"
    assert stored.adapter.factors.keys() == layers.keys()
    assert (max(stored.adapter.ranks().values()) < 6) == (steps > 0)
    for module, pair in stored.adapter.factors.items():
        wanted = layers[module].get_delta_weight("default").detach().numpy()
        # PEFT multiplies in float32: roundings of 6e-8 over at most 6 terms of order one.
        np.testing.assert_allclose(pair.product(), wanted, rtol=1e-5, atol=1e-6, err_msg=module)


OWN = {
    "full": {},
    "freezing": {"frozen_share": 0.4, "order": "top-down"},
    "bitfit": {"add_missing": True},
    "bottleneck": {"reduction_factor": 8, "placement": "pfeiffer", "activation": "gelu"},
}


def own_plan(method):
    return Plan.model_validate({"method": method, **({method: OWN[method]} if OWN[method] else {})})


def some_adapter():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    factors = {
        "model.embed_tokens": Factors(normal(2, 5), normal(4, 2)),
        "model.layers.0.q": Factors(normal(3, 4), normal(6, 3)),
    }
    return Adapter(factors, {"model.norm.weight": normal(4), "model.layers.0.q.bottleneck.down.weight": normal(1, 4)})


@pytest.mark.parametrize("method", OWN)
def test_what_peft_has_no_format_for_comes_back_bit_by_bit_with_its_settings(tmp_path, method):
    plan = own_plan(method)
    write_adapter(tmp_path / "a", some_adapter(), MANIFEST.model_copy(update={"embeddings": ("model.embed_tokens",)}), plan)
    stored = read_stored(tmp_path / "a")
    assert stored.adapter.digest() == some_adapter().digest()
    used = stored.on(Plan(precision="bf16"))
    assert (used.method, used.precision) == (method, "bf16")
    assert method == "full" or getattr(used, method) == getattr(plan, method)
    told = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert "peft_type" not in told
    assert (told["format_version"], told["base_model_name_or_path"]) == (1, "tiny")


# ---- used with a plan -------------------------------------------------------------------------------------------------


def test_the_folder_says_how_and_the_plan_says_on_what(tmp_path):
    """A job that trained in another way, with settings that only its own method has, measures any adapter of its task."""
    stored = read_stored(plain("p-tuning-v2", "llama", tmp_path))
    job = Plan.model_validate(
        {
            "base_model": "some/base",
            "method": "bottleneck",
            "bottleneck": {"reduction_factor": 4},
            "precision": "bf16",
            "data": {"max_length": 77},
            "training": {"seed": 3, "batch_size": 5, "gradient_checkpointing": True},
        }
    )
    used = stored.on(job)
    assert (used.method, used.prompt.num_virtual_tokens) == ("p-tuning-v2", 5)
    assert (used.base_model, used.precision, used.data.max_length) == ("some/base", "bf16", 77)
    assert (used.training.seed, used.training.batch_size) == (3, 5)


def test_lora_on_a_quantised_base_is_qlora(tmp_path):
    stored = read_stored(plain("lora", "llama", tmp_path))
    assert stored.on(Plan(precision="nf4", method="qlora")).method == "qlora"


def test_an_adapter_for_another_task_is_refused_with_both(tmp_path):
    stored = read_stored(plain("ia3", "bert", tmp_path))
    with pytest.raises(AdapterError, match=r"SEQ_CLS.*objective sft is CAUSAL_LM"):
        stored.on(Plan())


def test_a_method_that_changes_the_base_is_refused_on_a_quantised_one(tmp_path):
    write_adapter(tmp_path / "a", some_adapter(), MANIFEST, own_plan("bitfit"))
    with pytest.raises(ConfigurationError, match="bitfit trains the base"):
        read_stored(tmp_path / "a").on(Plan(precision="nf4", method="qlora"))


# ---- what is refused --------------------------------------------------------------------------------------------------


def changed(folder, **changes):
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format_version is 2; this fedge reads 1"),
        ({"format_version": None}, "format_version is None"),
        ({"method": "lora"}, "method is 'lora'; expected one of full, freezing, bitfit, bottleneck"),
        ({"method": ["bottleneck"]}, "expected one of"),
        ({"method": None}, "expected one of"),
        ({"bottleneck": {"reduction_factor": 0}}, "bottleneck.reduction_factor"),
        ({"bottleneck": {"reduction": 4}}, "bottleneck.reduction: unknown key"),
        ({"bottleneck": 3}, "bottleneck"),
        ({"task_type": 3}, "peft_type"),
        ({"peft_type": "OFT"}, "peft_type is 'OFT'"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"peft_type": "IA3"}, "no tensor is named MODULE.ia3_l"),
        ({"peft_type": "PREFIX_TUNING"}, "prompt_embeddings: found none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_does_not_fit_its_tensors_or_any_plan_is_refused(tmp_path, changes, said):
    write_adapter(tmp_path / "a", some_adapter(), MANIFEST, own_plan("bottleneck"))
    with pytest.raises(AdapterError) as caught:
        read_stored(changed(tmp_path / "a", **changes))
    assert said in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1025, 4)], ids=str)
def test_a_prompt_that_is_no_row_for_each_of_at_most_1024_tokens_is_refused(tmp_path, shape):
    folder = plain("prompt-tuning", "llama", tmp_path)
    save_file({"prompt_embeddings": np.ones(shape, np.float32)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"prompt_embeddings: found shape|num_virtual_tokens"):
        read_stored(folder)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (3, 2)], ids=str)
def test_adaloras_singular_values_of_another_shape_are_refused(tmp_path, shape):
    folder = plain("lora", "llama", tmp_path)
    changed(folder, peft_type="ADALORA", init_r=3)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_E"
    save_file(load_file(folder / WEIGHTS) | {name: np.ones(shape, np.float32)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="one number per row"):
        read_stored(folder)
