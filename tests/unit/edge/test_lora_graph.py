"""Adapters as inputs of a graph: names, shapes, ranks of their own, and files that are the same each time."""

import hashlib
import re

import numpy as np
import onnx_ir as ir
import pytest

from edge.export import export
from edge.graph_file import forget_origin, save
from protocol.errors import ModelError
from tests.unit.edge.graph_driver import InPlace, session


def linear_modules(base):
    from torch.nn import Linear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base.folder))
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name != "lm_head"
    }


def test_every_linear_layer_of_the_body_takes_an_adapter_under_its_own_name(exported_decoder):
    assert dict(exported_decoder.exported.lora) == linear_modules(exported_decoder.base)


def test_factors_are_optional_and_each_module_has_a_rank_of_its_own(exported_decoder):
    graph = session(exported_decoder.folder / "model.onnx")
    required = {put.name for put in graph.get_inputs()}
    optional = {put.name: put.shape for put in graph.get_overridable_initializers()}
    assert not any(name.startswith("lora.") for name in required)
    assert len(optional) == 2 * len(exported_decoder.exported.lora)
    inputs = {value.name: value for value in exported_decoder.exported.model.graph.inputs}
    symbols = set()
    for module, (d_in, d_out) in exported_decoder.exported.lora.items():
        a, b = inputs[f"lora.{module}.A"], inputs[f"lora.{module}.B"]
        assert (a.shape[0], b.shape[1]) == (d_in, d_out)
        assert a.shape[1] == b.shape[0]
        symbols.add(str(a.shape[1]))
        assert a.const_value.shape == (d_in, 0)
    assert len(symbols) == len(exported_decoder.exported.lora)


def test_one_module_with_factors_and_all_others_without_is_the_change_of_that_weight(exported_decoder):
    """Oracle: the PyTorch model with the dense product added to one weight."""
    import torch
    from transformers import AutoModelForCausalLM

    name = "model.layers.2.mlp.down_proj"
    rng = np.random.default_rng(0)
    d_in, d_out = exported_decoder.exported.lora[name]
    a, b = rng.normal(0, 0.1, (d_in, 5)).astype(np.float32), rng.normal(0, 0.1, (5, d_out)).astype(np.float32)
    ids = [1, 40, 50, 60, 70]
    ours = InPlace(exported_decoder.folder / "model.onnx", 8, given={f"lora.{name}.A": a, f"lora.{name}.B": b})([ids], 0)[0]
    model = AutoModelForCausalLM.from_pretrained(str(exported_decoder.base.folder)).double()
    with torch.no_grad():
        model.get_submodule(name).weight.add_(torch.tensor((a.astype(np.float64) @ b).T))
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_weights_have_their_modules_names_and_stand_as_d_in_by_d_out(exported_decoder):
    from strategies.base_model import original_weight

    graph, base = exported_decoder.exported.model.graph, exported_decoder.base
    nodes = {node.name: node for node in graph}
    for module, shape in exported_decoder.exported.lora.items():
        weight = graph.initializers[f"{module}.weight"]
        assert tuple(weight.shape) == shape
        assert nodes[module].op_type == "MatMul"
        assert nodes[module].inputs[1] is weight
        np.testing.assert_array_equal(weight.const_value.numpy().T, original_weight(base, f"{module}.weight", "model").numpy())
    factors = [node for node in graph if any(put.name.startswith("lora.") for put in node.inputs if put)]
    assert all(node.name.startswith("lora_") for node in factors)


def test_a_graph_says_nothing_of_the_machine_that_made_it(exported_decoder, tmp_path):
    content = b"".join(path.read_bytes() for path in sorted(exported_decoder.folder.iterdir()))
    assert {path.name for path in exported_decoder.folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    found = re.findall(rb"[ -~]{0,40}(?:/home|/root|/tmp|/work|/usr|site-packages|File \"|\.py\b)[ -~]{0,40}", content)
    assert not found


def test_the_same_graph_gives_the_same_bytes(exported_decoder, tmp_path):
    """Written again, and read and written again."""

    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    first = digests(exported_decoder.folder)
    for name, model in (("again", exported_decoder.exported.model), ("read", ir.load(exported_decoder.folder / "model.onnx"))):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name)
        assert digests(tmp_path / name) == first


def test_a_full_disk_is_told_before_a_byte_is_written(exported_decoder, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ModelError, match=r"takes [\d,]{9,} bytes, 1,000 are free"):
        save(exported_decoder.exported.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(exported_decoder, tmp_path):
    class Broken(ir.LazyTensor):
        pass

    def fail():
        raise OSError("no space left on device")

    model = ir.load(exported_decoder.folder / "model.onnx")
    weight = model.graph.initializers["model.layers.4.mlp.up_proj.weight"]
    weight.const_value = Broken(fail, ir.DataType.FLOAT, weight.shape, name=weight.name)
    with pytest.raises(OSError, match="no space left"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_told_before_weights_are_loaded(data, monkeypatch):
    from edge import room
    from strategies.base_model import find
    from strategies.hardware import override

    small = override(room.probe(), profile=None)
    monkeypatch.setattr(room, "probe", lambda: small.__class__(**{**vars(small), "ram_free_bytes": 10**8}))
    with pytest.raises(ModelError, match=r"takes about 0\.7 GB of memory, 0\.1 GB are free"):
        export(find(str(data / "models" / "stories260k-hf")), "decoder")


def test_forgetting_is_of_what_was_traced_alone(exported_decoder):
    model = ir.load(exported_decoder.folder / "model.onnx")
    names = [node.name for node in model.graph]
    forget_origin(model)
    assert [node.name for node in model.graph] == names
