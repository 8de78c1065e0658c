"""Profiles on small graphs with a float64 oracle, and on a trained decoder: what is quantised, what never is, and how well."""

import tracemalloc
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from edge.blockwise import BLOCK, filled, k_quant, round_to_nearest, unpacked
from edge.calibration import answers, divergence, session
from edge.gptq import gptq
from edge.graph_file import MODEL, WEIGHTS, save
from edge.quantize import PROFILES, quantize, weight_bytes
from protocol.errors import ConfigurationError, ModelError
from tests.unit.edge.small_graphs import INNER, LABELS, VOCABULARY, WIDTH, small_graph

ROWS = [list(np.random.default_rng(i).integers(0, VOCABULARY, 24)) for i in range(6)]
IDS = np.array([ROWS[0]], np.int64)
matrices = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 80)),
    elements=st.floats(-8, 8, width=32).map(lambda x: np.float32(x if abs(x) > 1e-3 else 0)),
)


def numbers(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def run(model: ir.Model, **more: np.ndarray) -> list[np.ndarray]:
    with session(model) as opened:
        return opened.run(None, {"input_ids": IDS, **more})


def oracle(weights: dict[str, np.ndarray], a=None, b=None, whole=None, tied=True) -> list[np.ndarray]:
    """The small graph in float64 from its weights, written from the formula."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["embed.weight"][IDS]
    h = x @ w["up.weight"] + w["dense.up.bias"] + (0 if a is None else x @ a @ b)
    x = x + np.maximum(h, 0) @ w["down.weight"]
    return [x @ w["embed.weight" if tied else "head.weight"].T, x @ (w["dense.head.weight"] if whole is None else whole)]


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: numbers(model, name) for name in model.graph.initializers}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@given(matrices, st.sampled_from([4, 8]))
@settings(max_examples=40)
def test_a_level_is_within_one_step_of_its_weight(weight, bits):
    """Symmetric around the middle, the largest entry of a block is hit exactly; its opposite, clipped, is one step off."""
    found = round_to_nearest(weight, bits)
    step = np.repeat(np.abs(found.scales), BLOCK, axis=1)[:, : weight.shape[1]]
    assert (np.abs(found.floats() - weight) <= step * (1 + 1e-5) + 1e-7).all()


@given(matrices, st.sampled_from([4, 8]))
@settings(max_examples=40)
def test_k_quant_is_never_worse_than_rounding_to_nearest(weight, bits):
    """Block by block, in squared error; also where all entries are of one sign, which onnxruntime's search gets wrong."""
    for block in (weight, np.abs(weight) + 9):
        error = [np.square(filled(how(block, bits).floats() - block)).sum(-1) for how in (k_quant, round_to_nearest)]
        assert (error[0] <= error[1] * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("how", [round_to_nearest, k_quant])
def test_onnx_reads_the_same_weights_from_the_packed_bytes(how, bits):
    """Oracle: DequantizeLinear of the ONNX standard over the very bytes, so that training can start from them."""
    weight = np.random.default_rng(1).standard_normal((6, 96)).astype(np.float32)
    found = how(weight, bits)
    zeros = np.full(found.scales.shape, 1 << (bits - 1), np.uint8)
    if found.zero_points is not None:
        zeros = unpacked(found.zero_points, bits)[:, : found.scales.shape[1]]
    kind = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    held = [
        helper.make_tensor("q", kind, weight.shape, found.packed.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, found.scales.shape, found.scales.tobytes(), raw=True),
        helper.make_tensor("z", kind, zeros.shape, zeros.ravel()),
    ]
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1, block_size=BLOCK)
    graph = helper.make_graph([node], "weight", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found_by_onnx = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[0]
    np.testing.assert_array_equal(found_by_onnx, found.floats())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_quantised_graph_computes_with_the_weights_that_it_stores(profile, tied):
    """Oracle: float64 over what the levels stand for; activations in 8 bits add about 1 % (per row: 2 %) of noise."""
    model = small_graph(tied=tied)
    made = quantize(model, profile).model
    stored = weights(model)
    how = {"q8": (round_to_nearest, 8), "q4": (k_quant, 4)}.get(profile)
    for name in ("embed.weight", "up.weight", "down.weight", "head.weight"):
        if how and name in stored:
            rows = stored[name] if name in ("embed.weight", "head.weight") else stored[name].T
            levels = how[0](np.ascontiguousarray(rows), how[1]).floats()
            stored[name] = levels if name in ("embed.weight", "head.weight") else levels.T
        elif profile == "fp16" and name in stored:
            stored[name] = stored[name].astype(np.float16)
    noise = {"fp32": 2e-6, "fp16": 2e-6, "int8-dynamic": 3e-2}.get(profile, 1.5e-2)
    for found, wanted in zip(run(made), oracle(stored, tied=tied), strict=True):
        assert relative(found, wanted) < noise


@pytest.mark.parametrize("profile", PROFILES)
def test_adapters_stay_in_float32(profile):
    """Factors and tensors given whole act on the quantised graph as on any; oracle: float64 with full weights."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((WIDTH, 7)).astype(np.float32), rng.standard_normal((7, INNER)).astype(np.float32)
    whole = rng.standard_normal((WIDTH, LABELS)).astype(np.float32)
    model = small_graph()
    made = quantize(model, profile).model
    names = {node.name: node.op_type for node in made.graph}
    assert {names[each] for each in ("lora_up_A", "lora_up_B", "labels")} == {"MatMul"}
    assert [each.name for each in made.graph.inputs] == [each.name for each in model.graph.inputs]
    given_whole = {"lora.up.A": a, "lora.up.B": b, "dense.head.weight": whole}
    for found, wanted in zip(run(made, **given_whole), oracle(weights(model), a, b, whole), strict=True):
        assert relative(found, wanted) < {"q4": 0.15, "int8-dynamic": 5e-2}.get(profile, 2e-2)
    assert not any(name.startswith("dense.") for name in quantize(model, profile).bits)


@pytest.mark.parametrize("profile", ["q8", "q4"])
def test_a_tied_head_and_its_embedding_share_the_packed_bytes(profile, tmp_path):
    """One tensor of levels, read by both; nothing of the table is left in float32, and no transpose."""
    made = quantize(small_graph(), profile).model
    readers = {node.op_type for node, _ in made.graph.initializers[f"embed.weight.{profile}"].uses()}
    assert readers == {"MatMulNBits", "GatherBlockQuantized"}
    assert not {"Transpose", "Gather"} & {node.op_type for node in made.graph}
    assert "embed.weight" not in made.graph.initializers
    save(made, tmp_path)
    ids = ir.load(tmp_path / MODEL).graph.initializers
    assert sum(value.const_value.nbytes for name, value in ids.items() if name.startswith("embed.weight.q")) == (
        VOCABULARY * 64 * int(profile[1]) // 8
    )


def test_an_untied_head_and_its_embedding_are_quantised_each_for_itself():
    assert quantize(small_graph(tied=False), "q4").bits == dict.fromkeys(
        ("embed.weight", "up.weight", "down.weight", "head.weight"), 4
    )


def test_the_embedding_looks_up_the_very_levels():
    """Width 40 has a last block that is not full. The levels are exact: no noise of activations in a lookup."""
    model = small_graph()
    made = quantize(model, "q4").model
    flat = next(node for node in made.graph if node.op_type == "Slice").outputs[0]
    flat.type = ir.TensorType(ir.DataType.FLOAT)
    made.graph.outputs.append(flat)
    np.testing.assert_array_equal(run(made)[-1], k_quant(numbers(model, "embed.weight"), 4).floats()[IDS])


@pytest.mark.parametrize("profile", ["q8", "q4", "int8-dynamic"])
def test_a_graph_that_had_none_imports_the_contributed_operators(profile):
    model = small_graph()
    assert "com.microsoft" not in model.graph.opset_imports
    assert quantize(model, profile).model.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_equal_graphs_give_equal_files_and_the_graph_given_stays(profile, tmp_path):
    model = small_graph()
    before = {name: array.tobytes() for name, array in weights(model).items()}
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        save(quantize(model if number else small_graph(), profile).model, tmp_path / str(number))
    for name in (MODEL, WEIGHTS):
        first, second = (tmp_path / str(number) / name for number in range(2))
        if first.exists():  # nothing of the small graph's may be large enough for a file of its own
            assert first.read_bytes() == second.read_bytes()
    assert {name: array.tobytes() for name, array in weights(model).items()} == before


def test_gptq_makes_up_for_a_column_in_the_next_as_least_squares_does():
    """Oracle: with two columns the second's best value after the first's error e is w1 + e H01 / H11 (the normal equation)."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((40, 2)).astype(np.float32)
    x = rng.standard_normal((500, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    gram = x.T @ x
    found = gptq(weight, gram, 4)
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(2)
    scale = found.scales[:, 0].astype(np.float64)
    zero = unpacked(found.zero_points, 4)[:, 0].astype(np.float64)
    first = (np.clip(np.round(weight[:, 0] / scale) + zero, 0, 15) - zero) * scale
    wanted = weight[:, 1] + (weight[:, 0] - first) * damped[0, 1] / damped[1, 1]
    second = (np.clip(np.round(wanted / scale) + zero, 0, 15) - zero) * scale
    np.testing.assert_allclose(found.floats(), np.stack([first, second], 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("columns", [64, 172])
def test_gptq_keeps_a_layers_output_better_than_rounding(columns):
    """Inputs as correlated as a transformer's (a few directions carry most of them): under 0.6 of round to nearest's error."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((48, columns)).astype(np.float32)
    x = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, columns)) + 0.3 * rng.standard_normal((2000, columns))
    x[:, 5] = 0  # an input that never fires must not break the inverse
    error = {
        name: np.linalg.norm(x @ (found.floats() - weight).T)
        for name, found in (
            ("gptq", gptq(weight, x.T @ x, 4)),
            ("k", k_quant(weight, 4)),
            ("rtn", round_to_nearest(weight, 4)),
        )
    }
    assert error["gptq"] < 0.6 * error["rtn"]
    assert error["k"] < error["rtn"]


def test_gptq_on_the_graphs_own_rows_answers_nearer_to_the_full_graph():
    model = small_graph()
    cost = {}
    with session(model) as full:
        expected = answers(full, ROWS)
    for algorithm in ("rtn", "k-quant", "gptq"):
        made = quantize(model, "q4", algorithm=algorithm, calibration=ROWS)
        assert made.algorithm == algorithm
        with session(made.model) as opened:
            cost[algorithm] = divergence(opened, expected, answers(opened, ROWS))
    assert cost["gptq"] < cost["k-quant"] < cost["rtn"]
    assert quantize(model, "q4", calibration=ROWS).algorithm == "gptq"


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"profile": "q5"}, "found 'q5', expected one of q8, q4, int8-dynamic, fp16, fp32"),
        ({"algorithm": "hqq"}, "found 'hqq', expected rtn, k-quant, gptq"),  # ten times slower to decode: not offered
        ({"profile": "fp16", "algorithm": "rtn"}, "fp16 has no choice"),
        ({"algorithm": "gptq"}, "rows: found none; gptq"),
        ({"algorithm": "gptq", "calibration": [[1], []]}, "rows: found an empty one"),
        ({"largest_bytes": 10}, "the weights take at least"),
    ],
)
def test_what_cannot_be_done_says_what_can(settings_, says):
    with pytest.raises(ConfigurationError, match=says):
        quantize(small_graph(), **settings_)


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "fp32"])
def test_a_quantised_graph_is_not_quantised_again(profile):
    with pytest.raises(ModelError, match=r"quantised already|FLOAT16, expected float32"):
        quantize(quantize(small_graph(), profile).model, "q4")


def test_a_graph_in_bfloat16_is_refused():
    """Its file would be written, and no CPU could open it."""
    model = small_graph()
    held = model.graph.initializers["up.weight"]
    held.const_value = ir.tensor(np.zeros((WIDTH, INNER), ir.DataType.BFLOAT16.numpy()), name="up.weight")
    held.type = ir.TensorType(ir.DataType.BFLOAT16)
    with pytest.raises(ModelError, match="BFLOAT16, expected float32"):
        quantize(model, "q8")


def test_a_weight_beyond_float16_is_refused():
    model = small_graph()
    numbers(model, "up.weight")[0, 0] = 70000
    with pytest.raises(ModelError, match="beyond float16's largest"):
        quantize(model, "fp16")


def test_bytes_are_never_underestimated(tmp_path):
    for profile in PROFILES:
        made = quantize(small_graph(), profile).model
        save(made, tmp_path)
        data = tmp_path / WEIGHTS
        assert (data.stat().st_size if data.exists() else 0) <= weight_bytes(made)


@pytest.mark.parametrize("profile", ["q8", "q4", "int8-dynamic", "fp16"])
def test_no_second_copy_of_the_weights_is_held(profile):
    """16 layers of 1 MiB: at its peak less than their 16 MiB is added, what is made (up to 8 MiB) and a few copies of one."""
    graph = small_graph().graph
    x = graph.outputs[0]
    for layer in range(16):
        shape = (VOCABULARY if layer == 0 else 512, 512)
        array = np.full(shape, 0.01, np.float32)
        weight = ir.val(f"w{layer}", ir.DataType.FLOAT, shape, const_value=ir.tensor(array, name=f"w{layer}"))
        graph.register_initializer(weight)
        node = ir.node("MatMul", [x, weight], name=f"layer{layer}")
        node.outputs[0].name, node.outputs[0].type = f"x{layer}", ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        x = node.outputs[0]
    graph.outputs[0] = x
    tracemalloc.start()
    quantize(ir.Model(graph, ir_version=10), profile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.fixture(scope="module")
def stories(exported_decoder, data):
    """The graph, 8 texts to measure with (1.5 k tokens) and 16 others to calibrate with."""
    import json

    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(exported_decoder.base.folder / "tokenizer.json"))
    lines = (data / "text" / "stories_selfgen_en.jsonl").read_text().splitlines()[:24]
    read = [words.encode(json.loads(line)["text"]).ids[:192] for line in lines]
    return exported_decoder.exported.model, read[:8], read[8:]


def perplexity(model: ir.Model, rows) -> float:
    """From the formula, over every next token."""
    total, count = 0.0, 0
    with session(model) as opened:
        for ids, logits in zip(rows, answers(opened, rows), strict=True):
            z = logits.astype(np.float64)[:-1]
            total += sum(np.log(np.exp(row - row[after]).sum()) for row, after in zip(z, ids[1:], strict=True))
            count += len(ids) - 1
    return float(np.exp(total / count))


def test_a_trained_decoder_keeps_its_perplexity_at_8_bits(stories):
    """The issue's bound: 1 %. Of its layers of size 172, the last block is filled up."""
    model, rows, _ = stories
    made = quantize(model, "q8")
    assert made.bits["model.layers.0.mlp.down_proj.weight"] == 8
    assert not made.remarks
    assert perplexity(made.model, rows) < 1.01 * perplexity(model, rows)
    assert weight_bytes(made.model) < 0.30 * weight_bytes(model)


@pytest.mark.slow
def test_a_trained_decoder_keeps_its_perplexity_at_4_bits(stories):
    """The issue's bounds: 8 % within 0.18 of the bytes, by GPTQ and with the most sensitive layers at 8 bits."""
    model, rows, calibration = stories
    largest = int(0.18 * weight_bytes(model))
    made = quantize(model, "q4", calibration=calibration, largest_bytes=largest)
    assert weight_bytes(made.model) <= largest
    assert any("keep 8 bits" in remark for remark in made.remarks)
    assert perplexity(made.model, rows) < 1.08 * perplexity(model, rows)


def test_profiles_of_a_trained_decoder_come_in_the_order_of_their_bits(stories):
    """KL on its own text: fp16 < q8 < int8-dynamic < q4 by gptq < k-quant < round to nearest."""
    model, rows, calibration = stories
    with session(model) as full:
        expected = answers(full, rows)
    cost = []
    for profile, algorithm in (
        ("fp16", None),
        ("q8", None),
        ("int8-dynamic", None),
        ("q4", "gptq"),
        ("q4", "k-quant"),
        ("q4", "rtn"),
    ):
        made = quantize(model, profile, algorithm=algorithm, calibration=calibration[:6] if algorithm == "gptq" else None)
        with session(made.model) as opened:
            cost.append(divergence(opened, expected, answers(opened, rows)))
    assert all(less < more for less, more in pairwise(cost))
    assert cost[0] < 1e-5
    assert cost[1] < 2e-3
