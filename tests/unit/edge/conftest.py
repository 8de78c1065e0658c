"""Exported models, made once a session: a trained decoder with two adapters of PEFT's, and a real encoder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

# Ranks, targets and scalings all differ: what holds for both does not hold by the form of one of them.
ADAPTERS = {
    "narrow": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "wide": {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3, "layers.1.self_attn.o_proj": 1},
    },
}


def peft_folders(model, settings, folder: Path, task_type: str) -> dict[str, Path]:
    """Folders as PEFT itself writes them, of adapters that change the model visibly."""
    import torch
    from peft import LoraConfig, get_peft_model

    made = None
    torch.manual_seed(3)
    for name, chosen in settings.items():
        config = LoraConfig(task_type=task_type, **chosen)
        if made is None:
            made = get_peft_model(model, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if ".lora_B." in name:
                tensor.normal_(std=0.05)
            elif "modules_to_save" in name:
                tensor.normal_(std=0.2)
    made.save_pretrained(str(folder))
    return {name: folder / name for name in settings}


@pytest.fixture(scope="session")
def exported_decoder(data, tmp_path_factory) -> SimpleNamespace:
    """The stories model: ``exported``, ``folder`` with the graph, ``base`` and ``adapters`` (folders of PEFT's by name)."""
    from transformers import AutoModelForCausalLM

    from edge.export import export
    from edge.graph_file import save
    from strategies.base_model import find

    base = find(str(data / "models" / "stories260k-hf"))
    exported = export(base, "decoder")
    folder = tmp_path_factory.mktemp("decoder")
    save(exported.model, folder)
    model = AutoModelForCausalLM.from_pretrained(str(base.folder))
    adapters = peft_folders(model, ADAPTERS, tmp_path_factory.mktemp("peft"), "CAUSAL_LM")
    return SimpleNamespace(exported=exported, folder=folder, base=base, adapters=adapters)


@pytest.fixture(scope="session")
def exported_classifier(encoder, tmp_path_factory) -> SimpleNamespace:
    """MiniLM with a head of three labels, as ``exported_decoder``; its adapter has a head of five."""
    from transformers import AutoModelForSequenceClassification

    from edge.export import export
    from edge.graph_file import save
    from strategies.base_model import find

    base = find(encoder)
    exported = export(base, "classifier", labels=["one", "two", "three"])
    folder = tmp_path_factory.mktemp("classifier")
    save(exported.model, folder)
    model = AutoModelForSequenceClassification.from_pretrained(str(base.folder), num_labels=5)
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["query", "value", "dense"]}
    adapters = peft_folders(model, {"five": settings}, tmp_path_factory.mktemp("peft"), "SEQ_CLS")
    return SimpleNamespace(exported=exported, folder=folder, base=base, adapters=adapters)


@pytest.fixture(scope="session")
def trainable(trainable_bundle):
    """The embedded base with training graphs, in float32, and the key that signed it."""
    from protocol.signature import read_trusted

    folder, key = trainable_bundle
    return folder, read_trusted(key)[0]
