"""How each method's adapter stands in its two files: as in PEFT's where PEFT has the method, else our own (docs/adapters.md).

An adapter's names are the base's own; files add prefixes, and say in ``adapter_config.json`` what to attach before the tensors
are put in. Which modules, which of them whole, how many virtual tokens: that follows from the tensors, here and on reading, so
that a coordinator writes a folder without ever seeing the model.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.configuration import parse
from protocol.errors import AdapterError, ConfigurationError
from protocol.plan import LOW_RANK, PROMPTS, Method, Plan

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT_VERSION = 1
_OWN = "our own"
_MAGNITUDE = ".lora_magnitude_vector"
_SCALE = ".ia3_l"
_PROMPT = "prompt_embeddings"
# PEFT's prompts wrap the base once, its other methods twice.
_ONCE, _TWICE = "base_model.", "base_model.model."
# What PEFT has no format for.
_OURS = tuple(method for method in get_args(Method) if method not in (*LOW_RANK, *PROMPTS, "ia3"))
_REPEATED = re.compile(r"\)[*+?{]")
_HALVES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def written(adapter: Adapter, plan: Plan, embeddings: Iterable[str] = ()) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors of ``adapter_model.safetensors`` and the content of ``adapter_config.json``.

    Args:
        adapter: Scalings of 1.
        plan: What it was trained with: its method, that method's settings, its task and its base.
        embeddings: Modules that look their weight up by token.
    """
    adapter = Adapter({module: _with_room(pair) for module, pair in adapter.factors.items()}, adapter.dense)
    about: dict[str, Any] = {"task_type": plan.task_type, "base_model_name_or_path": plan.base_model}
    if plan.method in LOW_RANK:
        factors = _halves(_TWICE, adapter, frozenset(embeddings))
        return factors | _under(_TWICE, adapter.dense), about | _lora_config(adapter, plan.task_type)
    if plan.method == "ia3":
        return _under(_TWICE, adapter.dense), about | _ia3_config(adapter, plan.task_type)
    if plan.method in PROMPTS:
        prompt = {name: tensor for name, tensor in adapter.dense.items() if name == _PROMPT}
        others = {name: tensor for name, tensor in adapter.dense.items() if name != _PROMPT}
        return prompt | _under(_ONCE, others), about | _prompt_config(adapter, plan)
    own: dict[str, Any] = {"format_version": FORMAT_VERSION, "method": plan.method}
    section = {plan.method: getattr(plan, plan.method).model_dump(mode="json")} if plan.method in Plan.model_fields else {}
    return _halves("", adapter, frozenset()) | dict(adapter.dense), own | section | about


def _under(prefix: str, dense: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{prefix}{name}": tensor for name, tensor in dense.items()}


@dataclass(frozen=True)
class Understood:
    """What the two files say.

    Attributes:
        adapter: The adapter.
        settings: Of a plan that uses it: ``method``, and that method's section.
        task_type: PEFT's name of the task; empty where the files do not say.
    """

    adapter: Adapter
    settings: Mapping[str, Any]
    task_type: str


def understood(tensors: Mapping[str, Array], config: Mapping[str, Any], folder: Path) -> Understood:
    """An adapter from its two files.

    Args:
        tensors: Of ``adapter_model.safetensors``.
        config: Of ``adapter_config.json``.
        folder: Where they are, for messages.

    Raises:
        AdapterError: They are of no method that is known here, or do not fit each other.
    """
    task_type = config.get("task_type") or ""
    kind = config.get("peft_type", _OWN if "method" in config else None)
    if not isinstance(kind, str) or kind not in _READERS or not isinstance(task_type, str):
        known = ", ".join(repr(name) for name in _READERS if name != _OWN)
        raise AdapterError(f"{folder / CONFIG}: peft_type is {str(kind)[:80]!r}; expected {known}, or a method of fedge's own")
    adapter, settings = _READERS[kind](dict(tensors), dict(config), folder)
    try:
        parse(settings, Plan, source=str(folder / CONFIG))
    except ConfigurationError as error:
        raise AdapterError(str(error)) from None
    return Understood(adapter, settings, task_type)


# LoRA and its kin -------------------------------------------------------------------------------------------------------


def _halves(prefix: str, adapter: Adapter, embeddings: frozenset[str]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for module, pair in adapter.factors.items():
        # PEFT holds an embedding's factors as bare parameters under names of their own.
        half = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        tensors[f"{prefix}{module}.{half.format('A')}"] = pair.A
        tensors[f"{prefix}{module}.{half.format('B')}"] = pair.B
    return tensors


def _with_room(pair: Factors) -> Factors:
    """PEFT knows no rank 0: a module without change becomes one of rank 1 that is all zeros."""
    d_out, d_in = pair.shape
    return pair if pair.r else Factors(A=np.zeros((1, d_in), np.float32), B=np.zeros((d_out, 1), np.float32))


def _lora_config(adapter: Adapter, task_type: str) -> dict[str, Any]:
    ranks = adapter.ranks()
    r = max(ranks.values(), default=1)
    # A plain name would be read as that of every module whose path ends so, and its dots as any character.
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != r}
    magnitudes = [name for name in adapter.dense if name.endswith(_MAGNITUDE)]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": bool(magnitudes),
        "target_modules": sorted(ranks),
        "modules_to_save": _whole(adapter.dense.keys() - magnitudes, ranks, task_type) or None,
        "inference_mode": True,
    }


def _whole(names: Iterable[str], adapted: Iterable[str], task_type: str) -> list[str]:
    """Modules that train whole beside the adapted ones.

    PEFT keeps a classifier's head whole, the module at the root, and fails on a module inside it (RoBERTa's has two). What
    lies beside the adapted modules, under the same root, is no head.
    """
    body = {module.partition(".")[0] for module in adapted}
    return sorted(
        {
            root if task_type == "SEQ_CLS" and (root := name.partition(".")[0]) not in body else name.rpartition(".")[0]
            for name in names
        }
    )


def _read_lora(tensors: dict[str, Array], config: dict[str, Any], folder: Path) -> tuple[Adapter, dict[str, Any]]:
    named = {key.removeprefix(_TWICE): tensor for key, tensor in tensors.items()}
    adapter = _paired(named, folder, lambda module, r: _scaling(config, module, r, folder))
    return adapter, {"method": "lora", "lora": _lora_settings(adapter, config)}


def _read_adalora(tensors: dict[str, Array], config: dict[str, Any], folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """PEFT's AdaLoRA changes a weight by ``lora_alpha / init_r * B (E * A)``; here ``E`` goes into ``A``."""
    named = {key.removeprefix(_TWICE): tensor for key, tensor in tensors.items()}
    alpha, init_r = _number(config, "lora_alpha", folder), _number(config, "init_r", folder)
    for name in [name for name in named if name.endswith(".lora_E")]:
        values, half = named.pop(name), f"{name.removesuffix('E')}A"
        if half not in named or values.shape != (*named[half].shape[:1], 1):
            raise AdapterError(f"{folder / WEIGHTS}: {name} has shape {values.shape}; expected one number per row of {half}")
        named[half] = named[half] * values
    if alpha <= 0 or init_r <= 0:
        raise AdapterError(f"{folder / CONFIG}: lora_alpha {alpha:g} and init_r {init_r:g}; expected positive numbers")
    adapter = _paired(named, folder, lambda module, r: alpha / (init_r + 1e-5))  # with PEFT's guard against rank 0
    return adapter, {"method": "lora", "lora": _lora_settings(adapter, config)}


def _paired(named: Mapping[str, Array], folder: Path, scaling: Callable[[str, int], float]) -> Adapter:
    halves: dict[str, dict[str, Array]] = {}
    dense: dict[str, Array] = {}
    for name, tensor in named.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if half in _HALVES:
            halves.setdefault(module, {})[f"lora_{half[-1]}"] = tensor
        else:
            dense[name] = tensor
    factors = {}
    for module, pair in halves.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise AdapterError(f"{folder / WEIGHTS}: {module} holds only {', '.join(pair)}; expected lora_A and lora_B")
        unscaled = Factors(pair["lora_A"], pair["lora_B"])
        factors[module] = replace(unscaled, scaling=scaling(module, unscaled.r))
    return Adapter(factors, dense)


def _lora_settings(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    magnitudes = {name for name in adapter.dense if name.endswith(_MAGNITUDE)}
    body = {module.partition(".")[0] for module in adapter.factors}
    classifies = config.get("task_type") == "SEQ_CLS"
    # A head trains whole in any case, and must not be named.
    others = [n for n in adapter.dense.keys() - magnitudes if not classifies or n.partition(".")[0] in body]
    return {
        "use_dora": bool(magnitudes),
        "target_modules": sorted(adapter.factors) or "all-linear",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in others}),
    }


def _scaling(config: Mapping[str, Any], module: str, r: int, folder: Path) -> float:
    if not r:
        return 1.0
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{folder / CONFIG}: alpha_pattern is a {type(pattern).__name__}; expected a mapping")
    named = next((value for key, value in pattern.items() if _names(key, module, folder)), config.get("lora_alpha"))
    alpha = _number({"lora_alpha": named}, "lora_alpha", folder)
    return float(alpha / (r**0.5 if config.get("use_rslora") else r))


def _number(config: Mapping[str, Any], key: str, folder: Path) -> float:
    found = config.get(key)
    # The comparison takes NaN, infinities and whole numbers beyond any float.
    if not isinstance(found, int | float) or isinstance(found, bool) or not abs(found) <= sys.float_info.max:
        raise AdapterError(f"{folder / CONFIG}: {key} is {str(found)[:80]}; expected a finite number")
    return found


def _names(key: str, module: str, folder: Path) -> bool:
    """PEFT's rule (``peft.utils.get_pattern_key``): a key is a regular expression for the module or the end of its path.

    Of repeats and choices there may be few: some take time without end, and whoever wrote the file may have wanted that.
    """
    if sum(map(key.count, "*+?{")) > 2 or key.count("(") > 2 or _REPEATED.search(key):
        raise AdapterError(f"{folder / CONFIG}: alpha_pattern has a key with too many repeats; expected names of modules")
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG}: alpha_pattern has a key that is no regular expression ({error})") from None


# IA3 --------------------------------------------------------------------------------------------------------------------


def _ia3_config(adapter: Adapter, task_type: str) -> dict[str, Any]:
    settings = _ia3_settings(adapter)
    others = [name for name in adapter.dense if not name.endswith(_SCALE)]
    return {
        "peft_type": "IA3",
        **settings,
        "modules_to_save": _whole(others, settings["target_modules"], task_type) or None,
        "inference_mode": True,
    }


def _ia3_settings(adapter: Adapter) -> dict[str, Any]:
    """What is scaled as it enters has a row of factors, ``(1, d_in)``; what is scaled as it leaves a column."""
    shapes = {name.removesuffix(_SCALE): tensor.shape for name, tensor in adapter.dense.items() if name.endswith(_SCALE)}
    entering = sorted(module for module, shape in shapes.items() if shape[:1] == (1,))
    return {"target_modules": sorted(shapes), "feedforward_modules": entering}


def _read_ia3(tensors: dict[str, Array], config: dict[str, Any], folder: Path) -> tuple[Adapter, dict[str, Any]]:  # noqa: ARG001
    adapter = Adapter({}, {key.removeprefix(_TWICE): tensor for key, tensor in tensors.items()})
    settings = _ia3_settings(adapter)
    if not settings["target_modules"]:
        raise AdapterError(
            f"{folder / WEIGHTS}: no tensor is named MODULE{_SCALE}; expected one for each module that IA3 scales"
        )
    return adapter, {"method": "ia3", "ia3": settings}


# Prompts ----------------------------------------------------------------------------------------------------------------


def _prompt_config(adapter: Adapter, plan: Plan) -> dict[str, Any]:
    tokens, width = adapter.dense[_PROMPT].shape
    # PEFT takes what is left out here, layers, heads and the keys' width, from the base's own configuration.
    own: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "prefix_projection": plan.method == "prefix-tuning"}
    if plan.method == "prompt-tuning":
        own = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": width}
    return {
        **own,
        "num_virtual_tokens": tokens,
        "modules_to_save": _whole(adapter.dense.keys() - {_PROMPT}, (), plan.task_type) or None,
        "inference_mode": True,
    }


def _read_prompt(tensors: dict[str, Array], config: dict[str, Any], folder: Path) -> tuple[Adapter, dict[str, Any]]:
    prompt = tensors.get(_PROMPT)
    if prompt is None or prompt.ndim != 2:
        found = "none" if prompt is None else f"shape {prompt.shape}"
        raise AdapterError(f"{folder / WEIGHTS}: {_PROMPT}: found {found}, expected a row for each virtual token")
    method: Method = "prompt-tuning"
    if config["peft_type"] == "PREFIX_TUNING":
        method = "prefix-tuning" if config.get("prefix_projection") else "p-tuning-v2"
    adapter = Adapter({}, {key.removeprefix(_ONCE): tensor for key, tensor in tensors.items()})
    return adapter, {"method": method, "prompt": {"num_virtual_tokens": len(prompt)}}


# Our own ----------------------------------------------------------------------------------------------------------------


def _read_own(tensors: dict[str, Array], config: dict[str, Any], folder: Path) -> tuple[Adapter, dict[str, Any]]:
    version, method = config.get("format_version"), config["method"]
    if version != FORMAT_VERSION:
        raise AdapterError(f"{folder / CONFIG}: format_version is {str(version)[:80]}; this fedge reads {FORMAT_VERSION}")
    if method not in _OURS:
        raise AdapterError(f"{folder / CONFIG}: method is {str(method)[:80]!r}; expected one of {', '.join(_OURS)}")
    settings = {"method": method} | {key: value for key, value in config.items() if key == method}
    if method == "xlora" and isinstance(settings.get("xlora"), dict):  # it holds what it mixes
        settings["xlora"] = {**settings["xlora"], "adapters": [str(folder)]}
    return _paired(tensors, folder, lambda module, r: 1.0), settings


_READERS: Mapping[str, Callable[[dict[str, Array], dict[str, Any], Path], tuple[Adapter, dict[str, Any]]]] = {
    "LORA": _read_lora,
    "ADALORA": _read_adalora,
    "IA3": _read_ia3,
    "PROMPT_TUNING": _read_prompt,
    "P_TUNING": _read_prompt,  # saved as the vectors that its network came to, which is what prompt-tuning saves
    "PREFIX_TUNING": _read_prompt,
    _OWN: _read_own,
}
