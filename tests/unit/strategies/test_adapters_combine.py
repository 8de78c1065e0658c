"""Combined adapters equal plain PEFT's and the closed forms; what does not add up is refused."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from small_bases import saved
from transformers import AutoModelForCausalLM

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.files import Stored, read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapters.combine import SPARSE, combine, energy_kept
from strategies.base_model import find
from strategies.methods.registry import shape

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = {"lora": {"target_modules": ["q_proj", "down_proj"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return find(saved("llama", tmp_path_factory.mktemp("base") / "llama"))


def stored(folder, base, seed, r=4, settings=TARGETS, digest=None, dense=None):
    plan = Plan.model_validate({"base_model": str(base.folder), **settings})
    rng = np.random.default_rng(seed)
    known = shape(base, plan)
    factors = {
        module: Factors(*(rng.normal(size=size).astype(np.float32) for size in ((r, d_in), (d_out, r))))
        for module, (d_out, d_in) in known.modules.items()
    }
    drawn = {name: rng.normal(size=size).astype(np.float32) for name, size in known.dense.items()}
    manifest = Manifest(base_digest=digest or base.digest, kind="adapter", embeddings=known.embeddings)
    write_adapter(folder, Adapter(factors, dense or drawn), manifest, plan)
    return read_stored(folder)


@pytest.fixture(scope="module")
def three(base, tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    return [stored(home / str(seed), base, seed) for seed in range(3)]


def by_plain_peft(base, adapters, weights, way, **more):
    """The products of PEFT's own combination, on the whole model."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder), str(adapters[0].folder), adapter_name="a0"
    )
    for at, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter.folder), adapter_name=f"a{at}")
    torch.manual_seed(more.pop("seed", 0))
    names = [f"a{at}" for at in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "made", combination_type=way, **more)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("made").detach().double().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


@pytest.mark.parametrize("way", ["svd", "cat", "linear", *(way for way in SPARSE if not way.startswith("dare"))])
def test_every_way_equals_plain_peft(base, three, way):
    """DARE draws layer by layer in the order of the model, which a folder does not know: it has a test of its own."""
    weights = [0.5, -0.7, 1.3]
    settings = {"density": 0.6} if way in SPARSE else {}
    found = combine(three, weights, way, **settings)
    wanted = by_plain_peft(base, three, weights, way, **settings)
    assert found.factors.keys() == wanted.keys()
    for module, pair in found.factors.items():
        # Sums of some ten products of order one in float32, and an SVD of them.
        np.testing.assert_allclose(pair.product(), wanted[module], atol=2e-4, err_msg=module)


def test_svd_and_cat_and_linear_are_their_closed_forms(three):
    """In float64 from the papers' words: a sum of products; the nearest of rank r; the product of sums of factors."""
    weights = [0.5, -0.7, 1.3]
    made = {way: combine(three, weights, way, r=3 if way == "svd" else None) for way in ("svd", "cat", "linear")}
    for module in made["cat"].factors:
        pairs = [adapter.adapter.factors[module] for adapter in three]
        total = sum(w * pair.product() for w, pair in zip(weights, pairs, strict=True))
        u, s, vt = np.linalg.svd(total)
        np.testing.assert_allclose(made["cat"].factors[module].product(), total, atol=1e-5)
        np.testing.assert_allclose(made["svd"].factors[module].product(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
        roots = [abs(w * pair.scaling) ** 0.5 for w, pair in zip(weights, pairs, strict=True)]
        a = sum(np.sign(w) * root * pair.A.astype(float) for w, root, pair in zip(weights, roots, pairs, strict=True))
        b = sum(root * pair.B.astype(float) for root, pair in zip(roots, pairs, strict=True))
        np.testing.assert_allclose(made["linear"].factors[module].product(), b @ a, atol=1e-5)
        assert made["cat"].factors[module].r == 12


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_energy_that_svd_keeps_is_that_of_the_whole_matrices(three, rank):
    """Oracle: singular values of the summed changes, formed in float64; factors are rounded to float32."""
    weights = [0.7, -0.4, 1.2]
    made = combine(three, weights, "svd", r=rank)
    squares = []
    for module in made.factors:
        pairs = [stored.adapter.factors[module] for stored in three]
        whole = sum(
            w * p.scaling * p.B.astype(np.float64) @ p.A.astype(np.float64) for w, p in zip(weights, pairs, strict=True)
        )
        squares.append(np.linalg.svd(whole, compute_uv=False) ** 2)
    wanted = sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares)
    assert energy_kept(three, weights, made) == pytest.approx(wanted, abs=1e-5)


def test_dare_is_unbiased_and_drops_what_it_says(three):
    """Beside one that counts nothing, 60 seeds: the mean of what is left and scaled is the factor (Yu et al., section 3.2)."""
    pair = next(iter(three[0].adapter.factors.values()))
    module = next(iter(three[0].adapter.factors))
    drawn = [combine(three[:2], [1.0, 0.0], "dare_linear", density=0.5, seed=seed).factors[module] for seed in range(60)]
    share = np.mean([np.count_nonzero(each.A) / each.A.size for each in drawn])
    numbers = 60 * pair.A.size
    assert abs(share - 0.5) < 5 * 0.5 / numbers**0.5
    mean = np.mean([each.A for each in drawn], axis=0)
    # Each entry is 0 or twice itself: its mean over 60 draws has a spread of |a| / sqrt(60); five of them.
    assert (np.abs(mean - pair.A) <= 5 * np.abs(pair.A) / 60**0.5 + 1e-6).all()
    again = [combine(three, [1, 1, 1], "dare_ties_svd", density=0.5, seed=3).digest() for _ in range(2)]
    assert len(set(again)) == 1


def test_the_result_is_a_folder_that_plain_peft_loads(base, three, tmp_path):
    """Oracle: the base with the sum in its weights."""
    made = combine(three, [0.2, 0.3, 0.1], "cat")
    manifest = Manifest(base_digest=base.digest, kind="adapter")
    write_adapter(tmp_path / "made", made, manifest, Plan(base_model=str(base.folder)))
    wanted = AutoModelForCausalLM.from_pretrained(base.folder)
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        for module, pair in made.factors.items():
            wanted.get_submodule(module).weight += torch.from_numpy(pair.product()).float()
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), tmp_path / "made").eval()
        assert torch.allclose(loaded(ids).logits, wanted.eval()(ids).logits, rtol=1e-3, atol=1e-3)


def test_ranks_and_modules_may_differ_where_the_way_allows_it(base, three, tmp_path):
    """Modules that one adapter alone has are that one's; ranks inside an adapter differ by pattern."""
    other = stored(tmp_path / "other", base, 7, r=2, settings={"lora": {"target_modules": ["q_proj", "up_proj"]}})
    made = combine([three[0], other], [1.0, 2.0], "cat")
    up = next(module for module in other.adapter.factors if "up_proj" in module)
    np.testing.assert_allclose(made.factors[up].product(), 2 * other.adapter.factors[up].product(), atol=1e-5)
    q = next(module for module in other.adapter.factors if "q_proj" in module)
    both = three[0].adapter.factors[q].product() + 2 * other.adapter.factors[q].product()
    for way in ("svd", "cat", "ties_svd"):
        found = combine(
            [three[0], other], [1.0, 2.0], way, **({"density": 1.0} if way in SPARSE else {"r": 6} if way == "svd" else {})
        )
        if way != "ties_svd":
            np.testing.assert_allclose(found.factors[q].product(), both, atol=1e-4)
    with pytest.raises(AdapterError, match=r"needs one rank, found 4, 2; use svd or cat"):
        combine([three[0], other], [1.0, 1.0], "linear")


def test_what_does_not_add_up_is_refused_with_the_reason(base, three, tmp_path):
    dora = stored(tmp_path / "dora", base, 1, settings={"lora": {"use_dora": True, "target_modules": ["q_proj"]}})
    ia3 = stored(tmp_path / "ia3", base, 1, settings={"method": "ia3"})
    alien = stored(tmp_path / "alien", base, 1, digest="cd" * 32)
    labels = {"objective": "classification", "data": {"labels": ["a", "b"]}}
    heads = [stored(tmp_path / f"head{n}", base, n, settings={**TARGETS, **labels}) for n in range(2)]
    for others, said in (
        ([dora], "dora adapters do not add up"),
        ([ia3], "ia3 adapters do not add up"),
        ([alien], "different bases"),
        (heads[:1], "different tasks"),
    ):
        with pytest.raises(AdapterError, match=said):
            combine([three[0], *others], [1.0, 1.0])
    with pytest.raises(AdapterError, match=r"both hold score\.weight whole"):
        combine(heads, [1.0, 1.0])


@pytest.mark.parametrize("way", ["svd", "linear"])
@pytest.mark.parametrize(
    ("modules", "task", "said"),
    [
        ((), "CAUSAL_LM", "holds no factors"),
        (("a", "a.b"), "CAUSAL_LM", "a.b: has no name"),
        (("a..b",), "CAUSAL_LM", "a..b: has no name"),
        (("a",), "TOKEN_CLS", "for TOKEN_CLS"),
    ],
)
def test_folders_of_others_that_cannot_be_combined_are_refused(three, tmp_path, way, modules, task, said):
    pair = Factors(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
    odd = Stored(tmp_path, Adapter(dict.fromkeys(modules, pair)), None, three[0].settings, task)
    with pytest.raises(AdapterError, match=said):
        combine([odd], [1.0], way)


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ([1.0], {}),
        ([], {}),
        ([1, 1, float("nan")], {}),
        ([1, 1, 1], {"density": 0.5}),
        ([1, 1, 1], {"way": "ties"}),
        ([1, 1, 1], {"way": "cat", "r": 2}),
    ],
)
def test_settings_that_nobody_would_hear_are_refused(three, weights, more):
    with pytest.raises(ValueError, match=r"expected|follows"):
        combine(three if weights else [], weights, **more)
