"""X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148) through PEFT: a router mixes LoRA adapters that were trained apart.

For every token a first pass through the bare base gives the hidden state ``h``, and the router gives each adapter's share
``softmax(router(h))``; a second pass adds the adapters' outputs in these shares (eq. 7 and 8 of the paper). The router alone
trains. Its last layer begins at zero: all shares alike.

What travels and is stored is whole in itself: the router dense, as ``router.layers.N.weight``, and each adapter's factors as
``NUMBER.MODULE``, so that the folders that it was made from may go.
"""

import json
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.files import read_stored
from protocol.plan import Plan
from strategies.base_model import Base
from strategies.methods import float32, lora
from strategies.methods.dense_tensors import check_names, put, taken
from strategies.methods.frozen_base import prepared
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds the adapters that the plan names, their products still zero, and a router over them; only the router trains.

    Raises:
        AdapterError: Fewer than two adapters, or one that is more than plain LoRA.
        ModelError: The base has not the modules that they change.
    """
    import torch
    from peft import TaskType, XLoraConfig, get_peft_model

    model, settings, mixed = prepared(model, plan), plan.xlora, experts(plan)
    model.config.use_cache = False  # each token's shares come from a pass of their own, which PEFT does not keep a cache for
    with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
        folders = {str(number): _blank(expert, Path(scratch) / str(number), model, plan) for number, expert in enumerate(mixed)}
        config = XLoraConfig(
            task_type=TaskType(plan.task_type),
            hidden_size=model.config.get_text_config().hidden_size,
            adapters=folders,
            xlora_depth=settings.xlora_depth,
            xlora_size=settings.xlora_size,
            xlora_dropout_p=settings.xlora_dropout_p,
            layerwise_scalings=settings.layerwise_scalings,
            softmax_temperature=settings.softmax_temperature,
            top_k_lora=min(settings.top_k_lora, len(mixed)) if settings.top_k_lora else None,
        )
        with warnings.catch_warnings():
            # On torch's meta device, where only shapes are wanted, no zero can be copied.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            made: PeftModel = get_peft_model(model, config)
    _show_hidden_states(made)
    layers = [layer for layer in _router(made) if isinstance(layer, torch.nn.Linear)]
    float32.whole(layers[0])
    for layer in layers:
        layer.float()
    with torch.no_grad():
        layers[-1].weight.zero_()
        layers[-1].bias.zero_()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("internal_xlora_classifier" in name)
    return made


def begin(model: "PeftModel", plan: Plan, base: Base) -> Begun:  # noqa: ARG001
    """Puts the adapters' factors in place: they stay as they are, and are no part of the base."""
    for number, expert in enumerate(experts(plan)):
        _fill(model, {f"{number}.{module}": pair for module, pair in expert.factors.items()})
    return NOTHING


def load(model: "PeftModel", adapter: Adapter, *, fresh: bool = False) -> None:  # noqa: ARG001 - nothing low-rank trains
    """Puts a router, and the adapters that it mixes, in place.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    check_names("modules", adapter.factors, modules(model))
    _fill(model, adapter.factors)
    put(dense(model), adapter.dense)


def extract(model: "PeftModel", begun: Begun = NOTHING) -> Adapter:  # noqa: ARG001
    """The router, and the adapters that it mixes."""
    pairs = {name: _pair(layer, number) for name, (layer, number) in _layers(model).items()}
    factors = {name: Factors(*(half.detach().float().cpu().numpy().copy() for half in pair)) for name, pair in pairs.items()}
    return Adapter(factors, taken(dense(model)))


def dense(model: "PeftModel") -> dict[str, Any]:
    """The router's parameters."""
    return {f"router.layers.{name}": parameter for name, parameter in _router(model).named_parameters()}


def modules(model: "PeftModel") -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` of each adapter's every module."""
    pairs = {name: _pair(layer, number) for name, (layer, number) in _layers(model).items()}
    return {name: (b.shape[0], a.shape[1]) for name, (a, b) in pairs.items()}


def experts(plan: Plan) -> list[Adapter]:
    """The adapters of the plan's folders; a folder that holds a mixture gives all that it mixes.

    Raises:
        AdapterError: A folder cannot be read, or holds more than low-rank changes of layers.
    """
    found: list[Adapter] = []
    for name in plan.xlora.adapters:
        stored = read_stored(Path(name))
        if stored.settings["method"] == "xlora":
            found += _apart(stored.adapter)
        elif stored.settings["method"] != "lora" or stored.adapter.dense or (stored.manifest and stored.manifest.embeddings):
            what = f"method {stored.settings['method']}{' with whole tensors' if stored.adapter.dense else ''}"
            raise AdapterError(f"{name}: found {what}; xlora mixes plain LoRA adapters of linear layers")
        else:
            found.append(stored.adapter)
    if len(found) < 2:
        raise AdapterError(f"xlora.adapters: found {len(found)}; a mixture needs at least 2 adapters")
    return found


def _show_hidden_states(model: "PeftModel") -> None:
    """Hands the router what the first pass made of the tokens: TRL puts a forward of its own into the base, which hides it."""
    seen: list[Any] = []

    def remember(module: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
        seen[:] = [output[0].detach()]

    def show(module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
        return inputs, {**named, "result": SimpleNamespace(hidden_states=(seen.pop(),))}

    model.get_base_model().base_model.register_forward_hook(remember)
    model.base_model.internal_xlora_classifier.register_forward_pre_hook(show, with_kwargs=True)


def _apart(mixture: Adapter) -> list[Adapter]:
    by_number: dict[str, dict[str, Factors]] = {}
    for name, pair in mixture.factors.items():
        number, _, module = name.partition(".")
        by_number.setdefault(number, {})[module] = pair
    return [Adapter(by_number[number]) for number in sorted(by_number, key=lambda number: (len(number), number))]


def _blank(expert: Adapter, folder: Path, model: "PreTrainedModel", plan: Plan) -> str:
    """A folder of zeros for PEFT, which makes an adapter's layers from nothing else; ``begin`` fills them."""
    from safetensors.numpy import save_file

    from strategies.methods import targets

    targets.check(model, list(expert.factors), "xlora.adapters")
    rank = max(expert.ranks().values())
    config = {
        "peft_type": "LORA",
        "task_type": plan.task_type,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(expert.factors),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, pair in expert.factors.items():
        d_out, d_in = pair.shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.zeros((rank, d_in), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.zeros((d_out, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def _fill(model: "PeftModel", factors: Any) -> None:
    import torch

    there = _layers(model)
    with torch.no_grad():
        for name, pair in factors.items():
            layer, number = there[name]
            a, b = _pair(layer, number)
            if pair.shape != (b.shape[0], a.shape[1]) or pair.r > a.shape[0]:
                shape = (b.shape[0], a.shape[1])
                raise AdapterError(f"{name}: found shape {pair.shape}, rank {pair.r}; expected {shape}, at most {a.shape[0]}")
            a.zero_()
            b.zero_()
            a[: pair.r] = torch.from_numpy(np.array(pair.A)).to(a)
            b[:, : pair.r] = torch.from_numpy(np.array(pair.scaling * pair.B)).to(b)


def _router(model: "PeftModel") -> Any:
    return model.base_model.internal_xlora_classifier.layers


def _layers(model: "PeftModel") -> dict[str, tuple[Any, str]]:
    """PEFT's layers, and which of their adapters, by ``NUMBER.MODULE``."""
    found = {}
    for path, layer in lora.layers(model).items():
        for number in layer.lora_A:
            found[f"{number}.{path.removeprefix('base_model.lora_model.model.')}"] = (layer, number)
    return found


def _pair(layer: Any, number: str) -> tuple[Any, Any]:
    return layer.lora_A[number].weight, layer.lora_B[number].weight
