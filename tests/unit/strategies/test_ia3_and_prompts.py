"""IA3, soft prompts, prefixes and deep prompts: attached, put in, taken out, read with padding, and written on with."""

import numpy as np
import pytest
from pydantic import ValidationError

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import PROMPTS, Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods.registry import method_of, shape
from strategies.training import fit

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = ("ia3", *PROMPTS)
DECODERS, SCORERS = ("llama", "gpt2"), ("bert", "roberta", "llama-scorer", "gpt2-scorer")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = ["a", "b", "c"]
PAD = 0
# A decoder behind a soft prompt cannot tell padding from text.
PAIRS = [
    (method, kind)
    for method in METHODS
    for kind in (*DECODERS, *SCORERS)
    if not (method == "prompt-tuning" and kind.endswith("-scorer"))
]


def model(kind):
    import torch
    import transformers as t

    torch.manual_seed(0)
    llama = t.LlamaConfig(num_key_value_heads=2, num_labels=3, pad_token_id=PAD, **SIZES)
    gpt2 = t.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=40, num_labels=3, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    made = {
        "llama": lambda: t.LlamaForCausalLM(llama),
        "gpt2": lambda: t.GPT2LMHeadModel(gpt2),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(num_labels=3, **SIZES)),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(num_labels=3, max_position_embeddings=40, **SIZES)
        ),
        "llama-scorer": lambda: t.LlamaForSequenceClassification(llama),
        "gpt2-scorer": lambda: t.GPT2ForSequenceClassification(gpt2),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=4, num_labels=3)
        ),
    }
    return made[kind]().eval()


def plan_of(method, kind="llama", tokens=5, **more):
    content = {"method": method, "base_model": "some/base", "data": {"max_length": 20}} | more
    if method in PROMPTS:
        content["prompt"] = {"num_virtual_tokens": tokens} | content.get("prompt", {})
    if method == "prefix-tuning":
        content["prompt"] = {"encoder_hidden_size": 8} | content["prompt"]
    if kind not in DECODERS:
        content |= {"objective": "classification", "data": {"labels": LABELS} | content["data"]}
    return Plan.model_validate(content)


def attached(method, kind, **more):
    plan = plan_of(method, kind, **more)
    return method_of(plan).attach(model(kind), plan).eval(), plan


def drawn(method, made, seed=1):
    """An adapter of the model's own names and shapes, with every number drawn."""
    rng = np.random.default_rng(seed)
    dense = method_of(plan_of(method)).dense(made)
    return Adapter({}, {n: 0.3 * rng.standard_normal(tuple(t.shape)).astype(np.float32) for n, t in dense.items()})


def logits(made, ids, mask=None):
    import torch

    ids = torch.as_tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    with torch.no_grad():
        return made(input_ids=ids, attention_mask=mask).logits.numpy()


IDS = np.arange(3, 15).reshape(2, 6)


# ---- put in and taken out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DECODERS, *SCORERS])
def test_ia3_begins_as_the_base_to_the_bit(kind):
    """Every factor is one, and a product with one is exact."""
    made, _ = attached("ia3", kind)
    assert np.array_equal(logits(made, IDS), logits(model(kind), IDS))


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_what_is_put_in_comes_out_and_computes_what_plain_peft_computes(tmp_path, method, kind):
    """Oracle: PEFT loads the same tensors from a folder, with no method of ours."""
    from peft import PeftModel

    made, plan = attached(method, kind)
    adapter = drawn(method, made)
    method_of(plan).load(made, adapter)
    assert method_of(plan).extract(made).digest() == adapter.digest()
    write_adapter(tmp_path / "a", adapter, Manifest(base_digest="ab" * 32, kind="adapter"), plan)
    plain = PeftModel.from_pretrained(model(kind), tmp_path / "a").eval()
    assert np.array_equal(logits(made, IDS), logits(plain, IDS))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_model_is_refused_by_name_and_shape(method):
    made, plan = attached(method, "bert")
    put = method_of(plan).load
    adapter = drawn(method, made)
    first = min(adapter.dense)
    with pytest.raises(AdapterError, match="1 tensors are not in this model"):
        put(made, Adapter({}, {**adapter.dense, "bert.nowhere": np.ones(3, np.float32)}))
    for name, tensor in adapter.dense.items():
        with pytest.raises(AdapterError, match=f"{name}: found shape"):
            put(made, Adapter({}, {**adapter.dense, name: np.ones((*tensor.shape, 1), np.float32)}))
    with pytest.raises(AdapterError, match="1 modules are not in this model"):
        put(made, Adapter({"bert.q": Factors(np.ones((1, 2)), np.ones((2, 1)))}))
    put(made, Adapter({}, {first: adapter.dense[first]}))  # what a node keeps to itself is not sent


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", ["sft", "classification"])
def test_shapes_are_known_without_weights(method, objective, encoder):
    name = "tiny" if objective == "sft" else encoder
    plan = plan_of(method, "llama" if objective == "sft" else "bert", base_model=name)
    base = find(name)
    made = method_of(plan).attach(load(base, plan)[0], plan)
    found = shape(base, plan)
    assert found.dense == {name: tuple(tensor.shape) for name, tensor in method_of(plan).dense(made).items()}
    assert (found.modules, found.embeddings) == ({}, ())
    assert found.head == {name for name in found.dense if name.startswith("classifier")}


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_node_begins_alike_whatever_its_precision(method, precision):
    """Means of prompts need one start. What is drawn is the same; a token's embedding is rounded as the base is held."""
    from transformers import set_seed

    def start(precision):
        plan = plan_of(method, base_model="tiny", precision=precision)
        set_seed(3)
        made = method_of(plan).attach(load(find("tiny"), plan)[0], plan)
        assert all(p.dtype.is_floating_point and str(p.dtype) == "torch.float32" for p in made.parameters() if p.requires_grad)
        return method_of(plan).extract(made).dense

    wanted, found = start("fp32"), start(precision)
    for name, tensor in wanted.items():
        tolerance = 2**-8 if method == "prompt-tuning" and precision == "bf16" else 0.0
        np.testing.assert_allclose(found[name], tensor, rtol=tolerance, atol=0.0, err_msg=name)


def test_a_soft_prompt_can_begin_as_a_text():
    """Oracle: the base's own rows for the text's tokens, from the beginning again where the text is shorter than the prompt."""
    plan = plan_of("prompt-tuning", base_model="tiny", tokens=9, prompt={"init_text": "Answer in one word"})
    bare, tokenizer = load(find("tiny"), plan)
    ids = tokenizer("Answer in one word")["input_ids"]
    rows = bare.get_input_embeddings().weight.detach().numpy()
    made = method_of(plan).attach(bare, plan)
    assert np.array_equal(method_of(plan).extract(made).dense["prompt_embeddings"], rows[(ids * 9)[:9]])


# ---- a prefix and the network that makes it ---------------------------------------------------------------------------


def test_a_training_that_is_sent_a_prefix_begins_at_it_and_moves_it_through_a_network():
    import torch

    made, plan = attached("prefix-tuning", "llama")
    method = method_of(plan)
    sent = drawn("prefix-tuning", made)
    method.load(made, sent)
    method.begin(made, plan, None)
    begun = method.extract(made).dense["prompt_embeddings"]
    # sent - f + f: two roundings of 6e-8 of numbers of order one.
    np.testing.assert_allclose(begun, sent.dense["prompt_embeddings"], rtol=0, atol=5e-7)
    trains = [name for name, p in made.named_parameters() if p.requires_grad]
    assert any(".transform." in name for name in trains), "the prefix itself would train at the network's rate"
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.1)
    made(input_ids=torch.as_tensor(IDS), labels=torch.as_tensor(IDS)).loss.backward()
    optimizer.step()
    moved = method.extract(made).dense["prompt_embeddings"] - begun
    assert np.abs(moved).max() > 1e-6
    assert np.abs(moved).max() < 1.0


def test_a_training_that_is_sent_nothing_trains_pefts_own_network():
    """Oracle: PEFT's prefix of the same seed, from its own state dict."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(5)
    config = PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM")
    bare = model("llama")
    torch.manual_seed(5)
    wanted = get_peft_model_state_dict(get_peft_model(bare, config))["prompt_embeddings"].numpy()
    plan = plan_of("prefix-tuning")
    bare = model("llama")
    torch.manual_seed(5)
    made = method_of(plan).attach(bare, plan)
    method_of(plan).load(made, Adapter())
    method_of(plan).begin(made, plan, None)
    assert np.array_equal(method_of(plan).extract(made).dense["prompt_embeddings"], wanted)


# ---- padding and writing on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_text_has_the_logits_in_a_padded_batch_that_it_has_alone(method, kind):
    made, plan = attached(method, kind)
    method_of(plan).load(made, drawn(method, made))
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[1, 4:], mask[1, 4:] = PAD, 0
    together, alone = logits(made, ids, mask)[1], logits(made, ids[1:, :4])[0]
    if kind in DECODERS:
        together, alone = together[-6:-2], alone[-4:]
    # Masked places add exact zeros to sums; libraries may add in another order.
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_writing_on_is_taking_the_likeliest_token_again_and_again(method, kind):
    """Oracle: the whole text is read anew for every token, without a cache."""
    import torch

    made, plan = attached(method, kind)
    method_of(plan).load(made, drawn(method, made))
    ids = torch.as_tensor(IDS[:1, :3])
    wanted = ids
    for _ in range(6):
        following = logits(made, wanted)[:, -1].argmax(-1)
        wanted = torch.cat([wanted, torch.as_tensor(following)[:, None]], 1)
    found = made.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["ia3", "prompt-tuning"])
def test_checkpointing_changes_nothing_that_is_learnt(method, precision):
    """What is computed twice is the same; beside prefixes, which live in a cache, it is refused."""
    rows = [Conversation(({"role": "user", "content": f"Room {at}?"},), "Here.") for at in range(4)]
    found = []
    for again in (False, True):
        training = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 2, "gradient_checkpointing": again}
        plan = plan_of(method, base_model="tiny", precision=precision, data={"max_length": 60}, training=training)
        found.append(fit(plan, find("tiny"), rows).adapter.dense)
    for name, tensor in found[0].items():
        np.testing.assert_allclose(found[1][name], tensor, rtol=0, atol=1e-6, err_msg=name)


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        ("prompt-tuning", "llama-scorer", "cannot tell padding from text"),
        ("prompt-tuning", "gpt2-scorer", "cannot tell padding from text"),
        ("prefix-tuning", "distilbert", "takes no keys and values from outside"),
        ("p-tuning-v2", "distilbert", "takes no keys and values from outside"),
        ("ia3", "distilbert", "target_modules"),
    ],
)
def test_a_base_that_cannot_is_refused_with_the_reason(method, kind, said):
    with pytest.raises(ModelError, match=said):
        attached(method, kind)


def test_ia3_takes_modules_by_name_and_refuses_those_that_are_not_there():
    settings = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    made, plan = attached("ia3", "llama", ia3=settings)
    shapes = {name.split(".", 3)[3]: t.shape for name, t in method_of(plan).extract(made).dense.items()}
    assert shapes == {"self_attn.k_proj.ia3_l": (8, 1), "mlp.down_proj.ia3_l": (1, 24)}
    with pytest.raises(ModelError, match=r"ia3.target_modules: no layer of the base is named query; there are .*k_proj"):
        attached("ia3", "llama", ia3={"target_modules": ["query"]})


@pytest.mark.parametrize(("kind", "room"), [("gpt2", 40), ("bert", 512), ("roberta", 38)])
@pytest.mark.parametrize("method", PROMPTS)
def test_a_prompt_that_leaves_too_few_positions_is_refused_with_the_length_that_fits(method, kind, room):
    """RoBERTa's first position is its third row. The longest row that fits is then read indeed."""
    with pytest.raises(ModelError, match=f"data.max_length: found {room - 4}, .* expected at most {room - 5}"):
        attached(method, kind, data={"max_length": room - 4})
    made, _ = attached(method, kind, data={"max_length": room - 5})
    assert np.isfinite(logits(made, np.full((1, room - 5), 7))).all()


def test_a_base_that_turns_positions_has_room_for_any_prompt():
    attached("p-tuning-v2", "llama", data={"max_length": 100_000})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"method": "prefix-tuning", "training": {"gradient_checkpointing": True}}, "choose prompt-tuning"),
        ({"method": "p-tuning-v2", "training": {"gradient_checkpointing": True}}, "choose prompt-tuning"),
        ({"method": "p-tuning-v2", "prompt": {"init_text": "Say"}}, "init_text is for method prompt-tuning"),
        ({"method": "p-tuning-v2", "prompt": {"encoder_hidden_size": 4}}, "is for method prefix-tuning"),
        ({"method": "ia3", "ia3": {"feedforward_modules": ["fc2"]}}, "fc2 must stand in target_modules too"),
        ({"method": "lora", "ia3": {"target_modules": ["q"]}}, "ia3 is for method ia3"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_when_it_is_written(content, said):
    with pytest.raises(ValidationError, match=said):
        Plan.model_validate(content)


def test_a_base_whose_configuration_peft_cannot_read_is_refused():
    """DistilBERT names its width and its heads in words of its own."""
    with pytest.raises(ModelError, match="method prompt-tuning and this base"):
        attached("prompt-tuning", "distilbert")
