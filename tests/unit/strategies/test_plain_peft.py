"""Both ways between this project and plain PEFT and TRL, for every method that they share: the same logits to the last bit."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.methods.registry import shape

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = {"num_virtual_tokens": 4}
LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "lora": lambda **task: peft.LoraConfig(**LINEAR, **task),
    "rslora": lambda **task: peft.LoraConfig(use_rslora=True, **LINEAR, **task),
    "dora": lambda **task: peft.LoraConfig(use_dora=True, **LINEAR, **task),
    "adalora": lambda **task: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=100, target_modules=["q_proj", "down_proj"], **task
    ),
    "ia3": lambda **task: peft.IA3Config(**task),
    "prompt": lambda **task: peft.PromptTuningConfig(**TOKENS, **task),
    "prefix": lambda **task: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **TOKENS, **task),
    "p-tuning v2": lambda **task: peft.PrefixTuningConfig(**TOKENS, **task),
    "p-tuning": lambda **task: peft.PromptEncoderConfig(encoder_hidden_size=16, **TOKENS, **task),
    "p-tuning, lstm": lambda **task: peft.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=2, **TOKENS, **task
    ),
}


def bare(name):
    return AutoModelForCausalLM.from_pretrained(find(name).folder, dtype=torch.float32)


def logits(model):
    with torch.inference_mode():
        ids = torch.arange(3, 33).reshape(2, 15)
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def moved(method, name, folder):
    """A folder of plain PEFT after two real steps, whose gradients reach every trained number."""
    torch.manual_seed(0)
    model = get_peft_model(bare(name), CONFIGS[method](task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    ids = torch.arange(3, 63).reshape(2, 30)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "stories"])
def name(request):
    if request.param == "tiny":
        return "tiny"
    return str(request.getfixturevalue("data") / "models" / "stories260k-hf")


@pytest.mark.parametrize("method", CONFIGS)
def test_what_plain_peft_trained_is_used_here_and_written_back_with_its_logits(tmp_path, name, method):
    folder, base = moved(method, name, tmp_path / "plain"), find(name)
    wanted = logits(PeftModel.from_pretrained(bare(name), folder))
    unlike = logits(bare(name))
    assert not torch.allclose(wanted[:, -unlike.shape[1] :], unlike, atol=1e-3), "a training that moves nothing proves nothing"
    stored = read_stored(folder)
    plan = stored.on(Plan(base_model=name))
    # Scalings are powers of two (adalora: nearly 2, and one multiplication is in another place): float32 roundings.
    exact = method not in ("adalora", "rslora")
    here = logits(with_adapter(plan, base, stored.adapter)[0])
    assert torch.equal(here, wanted) if exact else torch.allclose(here, wanted, rtol=1e-4, atol=1e-4)
    manifest = Manifest(base_digest=base.digest, kind="adapter", embeddings=shape(base, plan).embeddings)
    write_adapter(tmp_path / "ours", stored.adapter, manifest, plan)
    again = logits(PeftModel.from_pretrained(bare(name), tmp_path / "ours"))
    assert torch.equal(again, here)


def test_what_trl_trained_is_used_here(tmp_path):
    """SFT with LoRA, and a reward model with its head: folders as TRL's trainers save them."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    base = find("tiny")
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10,
    }  # fmt: skip
    rows = [{"prompt": f"Where is {n}?", "completion": f" In house {n}."} for n in range(4)]
    trainer = SFTTrainer(
        model=bare("tiny"),
        args=SFTConfig(output_dir=str(tmp_path / "sft"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=CONFIGS["lora"](task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "sft"))
    stored = read_stored(tmp_path / "sft")
    ours = with_adapter(stored.on(Plan()), base, stored.adapter)[0]
    assert torch.equal(logits(ours), logits(PeftModel.from_pretrained(bare("tiny"), tmp_path / "sft")))

    def scorer():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    pairs = [{"chosen": f"{n} is in house {n}.", "rejected": f"{n} is lost."} for n in range(4)]
    trainer = RewardTrainer(
        model=scorer(),
        args=RewardConfig(output_dir=str(tmp_path / "reward"), **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=CONFIGS["lora"](task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "reward"))
    stored = read_stored(tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    ours = with_adapter(stored.on(Plan(objective="reward")), base, stored.adapter)[0]
    assert torch.equal(logits(ours), logits(PeftModel.from_pretrained(scorer(), tmp_path / "reward")))
