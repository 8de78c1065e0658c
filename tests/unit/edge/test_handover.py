"""Files for other runtimes, read back by libraries that know nothing of us; without the extra, an error that names it."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edge.handover import to_genai, to_gguf
from protocol.errors import ConfigurationError, ModelError
from strategies.base_model import find

TEXTS = ("Once upon a time there was a big dog.", "Zoé said: 1 + 1 = 2!\n  Twice.", "The littlest bear shouted and ran away")


@pytest.fixture
def stories(data):
    return find(str(data / "models" / "stories260k-hf"))


def changed(stories, folder: Path, **settings):
    """The same base with other entries in its configuration."""
    shutil.copytree(stories.folder, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    folder.chmod(0o755)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return find(str(folder))


@pytest.mark.parametrize(("convert", "module", "extra"), [(to_gguf, "gguf", "gguf"), (to_genai, "onnxruntime_genai", "genai")])
def test_a_missing_extra_is_named(convert, module, extra, stories, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"needs {module}, which is not installed; pip install 'fedge\[{extra}\]'"):
        convert(stories, tmp_path / "made")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", ["f32", "f16", "q8_0"])
def test_transformers_reads_the_same_model_from_the_gguf_file(held, stories, tmp_path):
    """Oracle: transformers' own GGUF reader. float32 is exact; the others are within rounding (measured .003, .12)."""
    pytest.importorskip("gguf", reason="pip install 'fedge[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM

    path = to_gguf(stories, tmp_path / "made" / "stories.gguf", held)
    ids = torch.tensor([[1, 410, 304, 260, 266, 425, 376]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(str(stories.folder))(ids).logits
        found = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name)(ids).logits
    assert (found - wanted).abs().max() <= {"f32": 1e-5, "f16": 0.02, "q8_0": 0.5}[held]
    assert [each.name for each in tmp_path.iterdir()] == ["made"]


def test_the_file_format_s_own_reader_finds_every_tensor(stories, tmp_path):
    """Matrices that 32 does not divide (172) are held in float16, vectors in float32, the rest in 8 bits."""
    gguf = pytest.importorskip("gguf", reason="pip install 'fedge[gguf]'")
    from safetensors.numpy import load_file

    read = gguf.GGUFReader(to_gguf(stories, tmp_path / "stories.gguf"))
    original = load_file(stories.folder / "model.safetensors")
    tensors = {each.name: each for each in read.tensors}
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.F16
    np.testing.assert_array_equal(
        down.data.astype(np.float32), original["model.layers.0.mlp.down_proj.weight"].astype(np.float16).astype(np.float32)
    )
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert len(tensors) == len(original)
    assert read.fields["llama.attention.head_count_kv"].contents() == 4


def test_the_gguf_vocabulary_splits_text_as_the_tokenizer_does(stories, tmp_path):
    """Oracle: llama.cpp's rule (join the neighbours whose joint token scores highest), written from its description."""
    gguf = pytest.importorskip("gguf", reason="pip install 'fedge[gguf]'")
    from tokenizers import Tokenizer

    fields = gguf.GGUFReader(to_gguf(stories, tmp_path / "stories.gguf")).fields
    words = fields["tokenizer.ggml.tokens"].contents()
    score = dict(zip(words, fields["tokenizer.ggml.scores"].contents(), strict=True))
    own = Tokenizer.from_file(str(stories.folder / "tokenizer.json"))
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    for text in TEXTS:
        symbols = list(("▁" if fields["tokenizer.ggml.add_space_prefix"].contents() else "") + text.replace(" ", "▁"))
        while joins := [(-score[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in score]:
            _, at = min(joins)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        split = [
            piece
            for symbol in symbols
            for piece in ([symbol] if symbol in score else [f"<0x{b:02X}>" for b in symbol.encode()])
        ]
        assert [words.index(piece) for piece in split] == own.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not of the Llama form"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rotary positions of type 'linear'"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised already .bitsandbytes"),
    ],
)
def test_what_the_file_could_not_hold_faithfully_is_refused(settings, says, stories, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'fedge[gguf]'")
    base = changed(stories, tmp_path / "base", **settings)
    with pytest.raises(ModelError, match=says):
        to_gguf(base, tmp_path / "made.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
def test_onnxruntime_genai_answers_from_its_folder_as_the_model_does(stories, tmp_path):
    """Its own builder and its own runtime: greedily the same 16 tokens in float32 as PyTorch."""
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install 'fedge[genai]'")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    )
    torch_model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for tensor in torch_model.parameters():
            tensor.mul_(8)  # so that the likeliest token is the likeliest by far
    torch_model.save_pretrained(tmp_path / "base")
    for file in stories.folder.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "base")
    folder = to_genai(find(str(tmp_path / "base")), tmp_path / "made", "fp32")
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=23, do_sample=False)
    ids = [1, 410, 304, 260, 266, 425, 376]
    writer = genai.Generator(model, settings)
    writer.append_tokens(ids)
    while not writer.is_done():
        writer.generate_next_token()
    wanted = torch_model.generate(torch.tensor([ids]), max_length=23, do_sample=False)
    assert list(writer.get_sequence(0)) == wanted[0].tolist()


def test_heads_that_its_attention_cannot_take_are_refused(stories, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="pip install 'fedge[genai]'")
    with pytest.raises(ModelError, match="heads of 8 numbers; onnxruntime-genai's attention takes multiples of 16"):
        to_genai(stories, tmp_path / "made")


@pytest.mark.slow
def test_a_failed_converter_leaves_nothing(stories, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="pip install 'fedge[genai]'")
    base = changed(stories, tmp_path / "base", architectures=["UnheardOfForCausalLM"], head_dim=16)
    with pytest.raises(ModelError, match="model builder ended with 1"):
        to_genai(base, tmp_path / "made")
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


def test_a_bundle_is_not_made_from_weights_that_were_rounded_before(stories, tmp_path):
    """A folder of bitsandbytes weights is refused before it is loaded; its full-precision base takes the same adapters."""
    from edge.export import export

    base = changed(stories, tmp_path / "base", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"quantised already .bitsandbytes.; rounding twice loses twice, so give"):
        export(base, "decoder")
