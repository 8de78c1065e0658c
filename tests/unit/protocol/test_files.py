"""An adapter on disk: what we write PEFT loads, what PEFT wrote we read, and a folder is there whole or not at all."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BaseMismatchError
from protocol.files import base_model_of, read_adapter, sweep, whole_folder, write_adapter, write_whole
from protocol.manifest import Manifest
from protocol.plan import Plan

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASE = "ab" * 32
MANIFEST = Manifest(base_digest=BASE, kind="adapter", method="lora", r=3, num_examples=7)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
PLAN = Plan(base_model="some/base")


def some_adapter(seed=0, scaling=2.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Adapter({Q: Factors(normal(3, 5), normal(4, 3), scaling)}, {"score.weight": normal(2, 5)})


def write(folder, adapter=None, manifest=MANIFEST, objective="sft"):
    write_adapter(folder, adapter or some_adapter(), manifest, Plan(base_model="some/base", objective=objective))
    return folder


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- round trip -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back_bit_by_bit(tmp_path):
    adapter = some_adapter(scaling=1.0)
    found, manifest = read_adapter(write(tmp_path / "a", adapter), base_digest=BASE)
    assert found.digest() == adapter.digest()
    assert manifest == MANIFEST


def test_a_scaling_is_kept_inside_the_product(tmp_path):
    adapter = some_adapter(scaling=0.3)
    found, _ = read_adapter(write(tmp_path / "a", adapter))
    # B is rounded to float32 once after the scaling went in.
    np.testing.assert_allclose(found.factors[Q].product(), adapter.factors[Q].product(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "ranks",
    [
        {"a.q": 1, "a.k": 8, "b.q": 8, "b.k": 3},
        {"q": 2, "a.q": 4, "b.a.q": 3, "k": 4},
        {"a.q": 2, "axq": 4, "a.q.q": 4},
        {"a(q": 2, "[q": 3, ".*": 1, "k": 4},
    ],
    ids=["plain", "names that end alike", "names that a dot matches", "no regular expressions"],
)
def test_mixed_ranks_come_back_as_they_were(tmp_path, ranks):
    """Patterns are regular expressions for the end of a module's path, and a module's own name must match it alone."""
    rng = np.random.default_rng(3)
    adapter = Adapter(
        {m: Factors(np.float32(rng.normal(size=(r, 6))), np.float32(rng.normal(size=(5, r)))) for m, r in ranks.items()}
    )
    found, _ = read_adapter(write(tmp_path / "a", adapter))
    assert found.digest() == adapter.digest()


def test_a_module_of_rank_zero_comes_back_as_no_change(tmp_path):
    nothing = Factors(np.zeros((0, 6), np.float32), np.zeros((5, 0), np.float32), 2.0)
    pair = Factors(np.ones((1, 6), np.float32), np.ones((5, 1), np.float32))
    found, _ = read_adapter(write(tmp_path / "a", Adapter({"a.q": nothing, "a.k": pair})))
    assert "a.q" not in found.factors or not found.factors["a.q"].product().any()
    assert np.array_equal(found.factors["a.k"].product(), pair.product())


def test_dense_tensors_of_every_shape_come_back(tmp_path):
    shapes = {"s.zero": (), "s.one": (3,), "s.two": (2, 3), "s.three": (2, 1, 3), "s.none": (0, 3)}
    adapter = Adapter(dense={name: np.full(shape, 2.5, np.float32) for name, shape in shapes.items()})
    found, _ = read_adapter(write(tmp_path / "a", adapter))
    assert {name: tensor.shape for name, tensor in found.dense.items()} == shapes


def test_half_precision_factors_with_a_scaling_are_stored_at_the_precision_of_float32(tmp_path):
    """What PEFT saved in fp16 is read as fp16; writing it again as float32 must not round it to fp16 once more."""
    rng = np.random.default_rng(4)
    pair = Factors(np.float16(rng.normal(size=(3, 5))), np.float16(rng.normal(size=(4, 3))), 1 / 3)
    found, _ = read_adapter(write(tmp_path / "a", Adapter({Q: pair})))
    error = np.linalg.norm(found.factors[Q].product() - pair.product()) / np.linalg.norm(pair.product())
    assert error <= 1e-6  # float32 rounds at 6e-8, float16 at 5e-4


def test_an_adapter_without_manifest_is_read_whatever_base_is_asked_for(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "manifest.json").unlink()
    assert read_adapter(folder, base_digest="cd" * 32)[1] is None


def test_base_model_of_is_the_name_that_was_written(tmp_path):
    assert base_model_of(write(tmp_path / "a")) == "some/base"


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_that_names_no_base_says_so(tmp_path, name):
    folder = write(tmp_path / "a")
    edit_config(folder, base_model_name_or_path=name)
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        base_model_of(folder)


# ---- PEFT on the other side -------------------------------------------------------------------------------------------


def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


def classifier(kind="bert"):
    import torch
    from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(num_labels=3, **sizes)).eval()
    return RobertaForSequenceClassification(RobertaConfig(num_labels=3, max_position_embeddings=40, **sizes)).eval()


def peft_model(base, **config):
    """PEFT's own model with every trainable tensor drawn at random, so that nothing is zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(**config))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def taken_out(model):
    """The adapter that a PEFT model holds, read from its layers, not from a file."""
    prefix = "base_model.model."
    factors = {
        name.removeprefix(prefix): Factors(
            layer.lora_A["default"].weight.detach().numpy(),
            layer.lora_B["default"].weight.detach().numpy(),
            layer.scaling["default"],
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    dense = {
        name.removeprefix(prefix).replace(".modules_to_save.default", ""): tensor.detach().numpy()
        for name, tensor in model.named_parameters()
        if "modules_to_save" in name
    }
    return Adapter(factors, dense)


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14).reshape(2, 6)).logits.numpy()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 16}},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": True},
    ],
    ids=["all-linear", "mixed ranks", "mixed alphas", "rslora"],
)
def test_peft_loads_what_we_write_with_identical_logits(tmp_path, config):
    from peft import PeftModel

    trained = peft_model(llama(), task_type="CAUSAL_LM", **config)
    folder = write(tmp_path / "a", taken_out(trained))
    # Every scaling here is a power of two, so that moving it into B changes no bit of any product.
    assert np.array_equal(logits(PeftModel.from_pretrained(llama(), folder).eval()), logits(trained))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_peft_loads_a_classifier_that_we_write_with_identical_logits(tmp_path, kind):
    """RoBERTa's head is a module of two layers, BERT's is one."""
    from peft import PeftModel

    trained = peft_model(classifier(kind), task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    folder = write(tmp_path / "a", taken_out(trained), objective="classification")
    assert np.array_equal(logits(PeftModel.from_pretrained(classifier(kind), folder).eval()), logits(trained))


def test_peft_loads_an_adapter_in_which_one_module_has_rank_zero(tmp_path):
    """A module whose merged change is nothing has rank 0 in the global adapter; its folder must still be PEFT's."""
    from peft import PeftModel

    other = "model.layers.1.self_attn.q_proj"
    rng = np.random.default_rng(5)
    pair = Factors(np.float32(rng.normal(size=(2, 16))), np.float32(rng.normal(size=(16, 2))))
    nothing = Factors(np.zeros((0, 16), np.float32), np.zeros((16, 0), np.float32))
    folder = write(tmp_path / "a", Adapter({Q: pair, other: nothing}))
    found = logits(PeftModel.from_pretrained(llama(), folder).eval())
    wanted = llama()
    import torch

    with torch.no_grad():
        wanted.get_submodule(Q).weight += torch.from_numpy(pair.product().astype(np.float32))
    # Adding B A x to W x, or (W + B A) x: float32 rounding over 16 terms.
    np.testing.assert_allclose(found, logits(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "model.layers.0.self_attn.q_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "v_proj": 5},
        },
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"layers\.1\..*": 32}},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj|v_proj": 32}},
    ],
    ids=["plain", "rslora", "patterns by suffix", "pattern as regular expression", "pattern as alternative"],
)
def test_what_plain_peft_wrote_has_the_products_that_peft_computes(tmp_path, config):
    trained = peft_model(llama(), task_type="CAUSAL_LM", **config)
    trained.save_pretrained(tmp_path)
    found, manifest = read_adapter(tmp_path)
    layers = {name.removeprefix("base_model.model."): m for name, m in trained.named_modules() if hasattr(m, "lora_A")}
    assert manifest is None
    assert found.factors.keys() == layers.keys()
    for module, pair in found.factors.items():
        wanted = layers[module].get_delta_weight("default").detach().numpy()
        # PEFT forms its product in float32: a few roundings of 6e-8 over at most 4 terms of order one.
        np.testing.assert_allclose(pair.product(), wanted, rtol=1e-5, atol=1e-6, err_msg=module)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_that_plain_peft_saved_is_read_bit_by_bit(tmp_path, kind):
    trained = peft_model(classifier(kind), task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    trained.save_pretrained(tmp_path)
    assert read_adapter(tmp_path)[0].digest() == taken_out(trained).digest()


def test_bfloat16_is_widened_exactly(tmp_path):
    import torch

    trained = peft_model(llama(), task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"]).to(torch.bfloat16)
    trained.save_pretrained(tmp_path)
    pair = read_adapter(tmp_path)[0].factors[Q]
    layer = trained.get_submodule(f"base_model.model.{Q}")
    assert (pair.A.dtype, pair.B.dtype) == (np.float32, np.float32)
    assert np.array_equal(pair.A, layer.lora_A["default"].weight.detach().float().numpy())
    assert np.array_equal(pair.B, layer.lora_B["default"].weight.detach().float().numpy())


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_float_tensors_are_read_in_the_dtype_that_they_have(tmp_path, dtype):
    folder = write(tmp_path / "a")
    save_file({"base_model.model.score.weight": np.ones((2, 3), dtype)}, folder / WEIGHTS)
    assert read_adapter(folder)[0].dense["score.weight"].dtype == dtype


# ---- what is refused --------------------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in (config | changes).items() if value != "(absent)"}))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named_with_what_was_expected(tmp_path, name):
    folder = write(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(AdapterError, match="expected a folder with") as caught:
        read_adapter(folder)
    assert str(folder / name) in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AdapterError, match="nowhere"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.999])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, share):
    path = write(tmp_path / "a") / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(AdapterError, match="not a safetensors file"):
        read_adapter(path.parent)


def test_random_bytes_are_refused(tmp_path):
    path = write(tmp_path / "a") / WEIGHTS
    path.write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(AdapterError, match="not a safetensors file"):
        read_adapter(path.parent)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    path = write(tmp_path / "a") / WEIGHTS
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterError, match="not a safetensors file"):
        read_adapter(path.parent)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["base_model.model.score.weight", f"base_model.model.{Q}.lora_A.weight"])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, name, value):
    path = write(tmp_path / "a") / WEIGHTS
    tensors = load_file(path)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        read_adapter(path.parent)
    assert name in str(caught.value)


def test_a_float64_that_no_float32_holds_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(folder / WEIGHTS).items()}
    first = min(tensors)
    tensors[first][...] = 1e300
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="some that float32 has not"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["\x1b[31mX\n.lora_A.weight", "a" * 301, "a b"])
def test_a_tensor_whose_name_no_base_has_is_refused_and_steers_no_terminal(tmp_path, name):
    folder = write(tmp_path / "a")
    save_file({name: np.ones((2, 2), np.float32)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="visible ASCII") as caught:
        read_adapter(folder)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    """The limit on the size of a file that the system sets stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_nan_is_refused(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    folder = write(tmp_path / "a")
    save_torch({"base_model.model.score.weight": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        read_adapter(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_])
def test_tensors_that_hold_no_floats_are_refused(tmp_path, dtype):
    folder = write(tmp_path / "a")
    save_file({"base_model.model.score.weight": np.ones((2, 3), dtype)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="dtype"):
        read_adapter(folder)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_factor_pair_is_refused_by_name(tmp_path, half):
    path = write(tmp_path / "a") / WEIGHTS
    tensors = load_file(path)
    del tensors[f"base_model.model.{Q}.{half}.weight"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=Q):
        read_adapter(path.parent)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (3, 5, 1)], ids=str)
def test_factors_of_a_wrong_shape_are_refused(tmp_path, shape):
    path = write(tmp_path / "a") / WEIGHTS
    tensors = load_file(path) | {f"base_model.model.{Q}.lora_A.weight": np.ones(shape, np.float32)}
    save_file(tensors, path)
    with pytest.raises(AdapterError):
        read_adapter(path.parent)


@pytest.mark.parametrize("file", [CONFIG, "manifest.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "null", '"x"', "\xff", "{'r': 1}", "[" * 100_000], ids=lambda text: repr(text[:8])
)
def test_wrong_json_is_refused_with_its_path(tmp_path, file, text):
    path = write(tmp_path / "a") / file
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError) as caught:
        read_adapter(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "(absent)"},
        {"lora_alpha": None},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": "16"}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": 3},
        {"alpha_pattern": {"(([a-z.0-9_])+)+!": 4}},
        {"alpha_pattern": {"a?" * 40 + "!": 4}},
        {"alpha_pattern": {"(.|.)" * 40 + "!": 4}},
        {"peft_type": "(absent)"},
        {"peft_type": "ADALORA"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_configuration_from_which_no_scaling_follows_is_refused(tmp_path, change):
    folder = write(tmp_path / "a")
    edit_config(folder, **{"alpha_pattern": {}, "rank_pattern": {}} | change)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert CONFIG in str(caught.value)


def test_an_adapter_of_another_kind_is_refused_though_it_holds_no_factors(tmp_path):
    folder = write(tmp_path / "a")
    save_file({f"base_model.model.{Q}.vera_lambda_b": np.ones(4, np.float32)}, folder / WEIGHTS)
    edit_config(folder, peft_type="VERA")
    with pytest.raises(AdapterError, match="expected 'LORA'"):
        read_adapter(folder)


def test_another_base_is_refused_with_both_digests_and_the_way_out(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="load the base") as caught:
        read_adapter(folder, base_digest="cd" * 32)
    assert BASE[:12] in str(caught.value)
    assert ("cd" * 32)[:12] in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"base_digest": "xyz"}, {"kind": "other"}, {"r": -1}, {"more": 1}], ids=str
)
def test_a_manifest_of_another_make_is_refused(tmp_path, change):
    path = write(tmp_path / "a") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match="not a manifest"):
        read_adapter(path.parent)


# ---- whole or not at all ----------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path):
    with whole_folder(tmp_path / "new") as draft:
        (draft / "one").write_text("1")
        assert not (tmp_path / "new").exists()
    assert left_in(tmp_path) == ["new"]
    assert left_in(tmp_path / "new") == ["one"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("kind", ["full", "empty", "file", "link"])
def test_a_folder_that_is_not_to_replace_anything_does_not(tmp_path, kind, late):
    target = tmp_path / "there"

    def occupy():
        if kind == "file":
            target.write_text("kept")
        elif kind == "link":
            target.symlink_to(tmp_path / "nowhere")
        else:
            target.mkdir()
            if kind == "full":
                (target / "kept").write_text("kept")

    def write():
        with whole_folder(target, replaces=False) as draft:
            (draft / "one").write_text("1")
            if late:
                occupy()

    if not late:
        occupy()
    with pytest.raises(FileExistsError, match="there"):
        write()
    assert left_in(tmp_path) == ["there"]
    assert not (target / "one").exists()


def test_what_killed_writers_left_is_removed_after_a_day_and_nothing_else(tmp_path):
    target = tmp_path / "b.1"
    names = {".b.1-abcd_123", ".b.1-old-abcd_123", ".b.1-next-abcd_123", ".bx1-abcd_123", "b.1-abcd_123", ".b.1-recent12"}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
        if "recent" not in name:
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".b.1-link1234").symlink_to(tmp_path / "b.1-abcd_123")
    os.utime(tmp_path / ".b.1-link1234", (0, 0), follow_symlinks=False)
    sweep(target)
    assert set(left_in(tmp_path)) == names - {".b.1-abcd_123"} | {".b.1-link1234"}


@pytest.mark.parametrize("stop", [StoppedError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_midway_leaves_nothing_new_and_the_old_as_it_was(tmp_path, stop):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("as it was")

    def half(target):
        with whole_folder(target) as draft:
            (draft / "one").write_text("1")
            raise stop

    for name in ("old", "new"):
        with pytest.raises(stop):
            half(tmp_path / name)
    assert left_in(tmp_path) == ["old"]
    assert (tmp_path / "old" / "kept").read_text() == "as it was"


def test_an_adapter_whose_last_file_cannot_be_written_leaves_no_folder(tmp_path):
    # The base's name is no JSON value, which shows only after the weights are on disk.
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "a", some_adapter(), MANIFEST, PLAN.model_copy(update={"base_model": object()}))
    assert left_in(tmp_path) == []


def test_an_adapter_whose_last_file_cannot_be_written_leaves_the_one_before(tmp_path):
    before = some_adapter(scaling=1.0)
    write(tmp_path / "a", before)
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "a", some_adapter(1), MANIFEST, PLAN.model_copy(update={"base_model": object()}))
    assert left_in(tmp_path) == ["a"]
    assert read_adapter(tmp_path / "a")[0].digest() == before.digest()


def test_a_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "stale.txt").write_text("from before")
    after = some_adapter(1, scaling=1.0)
    write(tmp_path / "a", after)
    assert left_in(tmp_path) == ["a"]
    assert left_in(tmp_path / "a") == [CONFIG, WEIGHTS, "manifest.json"]
    assert read_adapter(tmp_path / "a")[0].digest() == after.digest()


def test_the_old_folder_is_back_when_the_disk_refuses_the_last_rename(tmp_path, monkeypatch):
    """Fault injection into the operating system, not into our code: moving the draft into place fails."""
    write(tmp_path / "a", some_adapter(scaling=1.0))
    real = Path.replace

    def refuse(self, target):
        if Path(target) == tmp_path / "a" and (self / WEIGHTS).exists() and self.parent == tmp_path:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a", some_adapter(1))
    monkeypatch.undo()
    assert left_in(tmp_path) == ["a"]
    assert read_adapter(tmp_path / "a")[0].digest() == some_adapter(scaling=1.0).digest()


def test_missing_parents_are_made(tmp_path):
    write(tmp_path / "x" / "y" / "a")
    assert read_adapter(tmp_path / "x" / "y" / "a")[1] == MANIFEST


def test_a_folder_can_be_read_by_others_than_its_writer(tmp_path):
    folder = write(tmp_path / "a")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_text_file_is_replaced_and_leaves_no_draft(tmp_path):
    for text in ("old", "neu: ä 中\n"):
        write_whole(tmp_path / "deep" / "file.json", text)
    assert (tmp_path / "deep" / "file.json").read_text(encoding="utf-8") == "neu: ä 中\n"
    assert left_in(tmp_path / "deep") == ["file.json"]


def test_a_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "file.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file.json", "x" * 100_000 + "\ud800")
    assert left_in(tmp_path) == ["file.json"]
    assert (tmp_path / "file.json").read_text() == "old"
