"""Writes an adapter into the weights of its base: one model that plain transformers loads, and that needs no adapter any more.

PEFT merges what PEFT attached, in float32, into the weights as they were published. Then they are rounded to what they are
saved in; of a change that is small beside its weight, 16 bits keep little, so the size of the rounding is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protocol.configuration import parse
from protocol.errors import AdapterError, ModelError
from protocol.files import Stored, full_disks, whole_folder
from protocol.plan import COMPRESSED, QUANTISED, Method, Plan
from strategies.adapted import attached
from strategies.base_model import Base, configuration, load, original_weight, skeleton
from strategies.label_head import last_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["fp32", "bf16", "fp16"]
_PROMPT = "its vectors stand before every text, and no weight of the base could do the same"
_REFUSED: Mapping[str, str] = {
    "prompt-tuning": _PROMPT,
    "prefix-tuning": _PROMPT,
    "p-tuning-v2": _PROMPT,
    "xlora": "its router weighs the adapters anew for every token",
    "bottleneck": "its networks lie between the layers, where the base's own class has none",
}
# More rows than any list of labels, so that shapes with so many are those of the layer that has a row for each.
_MANY = 7919
# How configurations call it that linear layers have biases.
_BIASES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias")


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folder: The model.
        base_digest: Of the base.
        adapter_digest: Of the adapter.
        method: That trained the adapter.
        dtype: What the weights are saved in.
        rounding: Norm of what rounding to it changed, relative to the norm of the adapter's change, over the tensors that the
            adapter changes and the checkpoint holds.
        remarks: Where the merged model is not what the adapter was trained as.
    """

    folder: Path
    base_digest: str
    adapter_digest: str
    method: Method
    dtype: Dtype
    rounding: float
    remarks: tuple[str, ...]


def merge(base: Base, stored: Stored, target: Path, *, plan: Plan | None = None, dtype: Dtype | None = None) -> Merged:
    """Merges once.

    Args:
        base: The one that the adapter was trained on.
        stored: The adapter.
        target: A folder that is not there yet.
        plan: That trained it: gives a classifier's labels. Without it they are LABEL_0, LABEL_1 …
        dtype: What to save the weights in; without it what the base's configuration names.

    Raises:
        AdapterError: It has no place in the base's weights (prompts, bottlenecks) or does not fit it, or ``target`` is there.
        ModelError: The base's class has no place for what the adapter adds.
    """
    method: Method = stored.settings["method"]
    if method in _REFUSED:
        raise AdapterError(f"{stored.folder}: method {method} cannot be merged: {_REFUSED[method]}; keep it beside its base")
    if target.exists():
        raise AdapterError(f"{target}: is there already; name a new folder")
    use = stored.on(task(base, stored, plan))
    model, tokenizer = load(base, use)
    kept = dtype or _published(base)
    model = _plain(_with(model, use, stored))
    _settle(model, base, use)
    rounding = _round(model, base, kept)
    with whole_folder(target) as draft, full_disks():
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return Merged(target, base.digest, stored.adapter.digest(), method, kept, rounding, tuple(_remarks(stored, method)))


def task(base: Base, stored: Stored, plan: Plan | None) -> Plan:
    """A float32 plan of an adapter's task.

    Args:
        base: The one that the adapter was trained on.
        stored: The adapter.
        plan: That trained it: gives a classifier's labels. Without it they are LABEL_0, LABEL_1 …

    Raises:
        AdapterError: It scores and holds no head.
    """
    if plan:
        told = plan.model_dump(include={"objective", "data"})
    elif stored.task_type != "SEQ_CLS":
        told = {"objective": "sft"}
    elif (rows := _rows(base, stored)) == 1:
        told = {"objective": "reward"}
    else:
        told = {"objective": "classification", "data": {"labels": [f"LABEL_{row}" for row in range(rows)]}}
    return parse({"base_model": base.name, **told}, Plan, source="merge")


def _rows(base: Base, stored: Stored) -> int:
    """How many rows a classifier's last layer has in an adapter."""
    empty = skeleton(base, "classification", [str(row) for row in range(_MANY)])
    layer = last_layer({name: tuple(tensor.shape) for name, tensor in empty.named_parameters()}, _MANY)
    held = [stored.adapter.dense[name] for name in sorted(layer) if name in stored.adapter.dense]
    if not held:
        raise AdapterError(
            f"{stored.folder}: holds no head for {base.name!r}; give the job that it was trained with (--config)"
        )
    return len(held[0])


def _published(base: Base) -> Dtype:
    names: dict[str, Dtype] = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return names.get(str(configuration(base).dtype), "fp32")


def _with(model: "PreTrainedModel", plan: Plan, stored: Stored) -> Any:
    """The base with the adapter; an output layer that shares its weight with the input gets one of its own if need be.

    A LoRA on the embeddings, or embeddings that train whole, leave the output layer as it was, and the other way round.
    """
    import torch

    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {name for name, module in model.named_modules() if module is output or module is inputs}
    changed = stored.adapter.factors.keys() | {name.rpartition(".")[0] for name in stored.adapter.dense}
    if plan.method not in COMPRESSED and ends & changed and output is not None and output.weight is inputs.weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return attached(model, plan, stored.adapter)


def _plain(model: Any) -> "PreTrainedModel":
    """The model of transformers with the adapter in its weights."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise AdapterError(f"cannot be merged: {error}") from None
    vars(model).pop("_keys_to_ignore_on_save", None)  # for checkpoints of training alone
    merged: PreTrainedModel = model
    return merged


def _settle(model: "PreTrainedModel", base: Base, plan: Plan) -> None:
    """Makes sure that the class which the configuration names has a place for every parameter (biases that were added)."""
    made = {name for name, _ in model.named_parameters()}

    def unlike(**flags: bool) -> set[str]:
        empty = skeleton(base, plan.objective, plan.data.labels, **flags)
        known = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        return (made - known) | ({name for name, _ in empty.named_parameters()} - made)

    if not unlike():
        return
    flags = {flag: True for flag in _BIASES if getattr(model.config, flag, True) is False}
    if odd := unlike(**flags):
        raise ModelError(
            f"{base.name!r}: {type(model).__name__} has no place for what the adapter adds ({len(odd)} parameters, the "
            f"first is {min(odd)}); keep the adapter beside its base"
        )
    for flag in flags:
        setattr(model.config, flag, True)


def _round(model: "PreTrainedModel", base: Base, dtype: Dtype) -> float:
    """Rounds the weights in place; returns how much that changed, relative to what the adapter changed."""
    import torch

    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    error = change = 0.0
    if narrow != torch.float32:
        for name, parameter in model.named_parameters():
            wide = parameter.detach()
            try:
                size = _energy(wide - original_weight(base, name, model.base_model_prefix).to(wide))
            except ModelError:  # a head, or a bias that was added: the checkpoint holds none
                continue
            if size:
                change, error = change + size, error + _energy(wide - wide.to(narrow).to(wide))
    model.to(narrow)
    return float((error / change) ** 0.5) if change else 0.0


def _energy(tensor: Any) -> float:
    import torch

    return float(tensor.square().sum(dtype=torch.float64))


def _remarks(stored: Stored, method: Method) -> list[str]:
    said = []
    precision = stored.manifest.precision if stored.manifest else ""
    if precision in QUANTISED:
        said.append(
            f"trained beside a base in {precision}; merged into the weights as published, which differ from those by what "
            f"{precision} rounds"
        )
    if method in COMPRESSED:
        said.append("holds the change at the adapter's rank; what training itself ended with is in OUTPUT/model of fedge train")
    return said
