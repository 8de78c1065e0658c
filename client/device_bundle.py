"""A device's bundle, opened once a process: what it can train, and which plans it cannot."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from client.node import Node
from client.round_plan import rows_taken
from edge.runtime import gradient
from edge.runtime.adapting.schedule import SCHEDULES
from edge.runtime.gradient import Gradients
from edge.runtime.manifest import SIGNATURE, TOKENIZER, BundleManifest
from edge.runtime.session import Resources
from edge.runtime.tokens import Tokeniser
from edge.runtime.verify import content
from protocol.adapter import Adapter
from protocol.errors import AdapterError, ConfigurationError, ModelError, shown
from protocol.plan import Method, Objective, Plan, Precision
from protocol.strict import changed

OBJECTIVES: Final[tuple[Objective, ...]] = ("sft", "classification", "dpo")
METHODS: Final[tuple[Method, ...]] = ("lora", "qlora")
_MOST_ROWS: Final = 1_000_000  # days of a small device's time; far more is a mistake, or means to exhaust it
_MOST_PASSES: Final = 10_000
# How many bits a bundle's weights have, in a plan's words.
_HELD: Final[Mapping[str, Precision]] = {"q8": "int8", "int8-dynamic": "int8", "q4": "nf4", "fp16": "fp16", "fp32": "fp32"}
# Settings of a plan that change what is computed, and that the graphs have no place for.
_NOT_HERE: Final[Mapping[str, tuple[str, ...]]] = {
    "lora": ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights"),
    "training": ("packing", "example_privacy", "proximal_mu", "load_best_model_at_end", "early_stopping_patience"),
    "dpo": ("loss_type",),
    "data": ("augmentation",),
    "head": ("init",),
}
# They perturb a training or watch it, and it does without.
_LEFT_OUT: Final[Mapping[str, tuple[str, ...]]] = {"lora": ("lora_dropout",), "training": ("neftune_noise_alpha", "eval_steps")}


@dataclass(frozen=True)
class Opened:
    """A bundle that was verified.

    Attributes:
        gradients: Its training graphs.
        tokens: Its tokenizer.
    """

    gradients: Gradients
    tokens: Tokeniser

    @property
    def manifest(self) -> BundleManifest:
        """What the bundle says of itself."""
        return self.gradients.manifest

    @property
    def precision(self) -> Precision:
        """How its weights are held, as plans and offers say it."""
        return _HELD.get(self.manifest.profile, "int8")

    def modules(self, plan: Plan) -> dict[str, tuple[int, int]]:
        """``(d_out, d_in)`` of what a plan adapts here: every linear layer but the head, or the modules that it names.

        Raises:
            ModelError: It names one that these graphs cannot train.
        """
        wanted, there = plan.lora.target_modules, self.gradients.modules
        if isinstance(wanted, str):
            return {module: (d_out, d_in) for module, (d_in, d_out) in there.items()}
        ends = {end: [module for module in there if module == end or module.endswith(f".{end}")] for end in wanted}
        if strange := [end for end, found in ends.items() if not found]:
            kinds = sorted({module.rpartition(".")[2] for module in there})
            raise ModelError(
                f"lora.target_modules: {len(strange)} of {len(ends)} are none of the {len(there)} modules that this bundle "
                f"trains ({', '.join(kinds)}); the plan must leave them out"
            )
        chosen = {module for found in ends.values() for module in found}
        return {module: (d_out, d_in) for module, (d_in, d_out) in there.items() if module in chosen}

    def check_adapter(self, adapter: Adapter, plan: Plan) -> None:
        """Makes sure that all of an adapter stands where a plan trains: what is left out would be trained against another.

        Raises:
            AdapterError: Some of it does not, or has another shape.
        """
        there = self.modules(plan)
        if strange := sorted(adapter.factors.keys() - there.keys()) + sorted(
            adapter.dense.keys() - self.gradients.dense.keys()
        ):
            raise AdapterError(
                f"{len(strange)} parts of the adapter are none of the {len(there)} modules that the plan trains here ("
                f"{shown(strange[0], 200)} ...); is it of this base?"
            )
        for module, pair in adapter.factors.items():
            if pair.shape != there[module]:
                raise AdapterError(f"{module} changes a weight of shape {pair.shape}; expected {there[module]}")

    def check(self, plan: Plan) -> None:
        """Makes sure that this bundle is for a plan's task.

        Raises:
            ModelError: It answers something else, or has other labels.
        """
        kind = "classifier" if plan.objective == "classification" else "decoder"
        if self.manifest.kind != kind:
            raise ModelError(f"objective {plan.objective} needs a {kind}, and the bundle is a {self.manifest.kind}")
        labels = plan.data.labels or ()
        if kind == "classifier" and labels != self.manifest.labels:
            raise ModelError(
                f"data.labels: the plan has {len(labels)}, the bundle's head {len(self.manifest.labels)}, and they are not the "
                "same in the same order; export a bundle from a base with the plan's labels"
            )


def opened(node: Node) -> Opened:
    """The bundle that a node's settings name.

    Raises:
        BundleError: It does not hold, or has no training graphs; ``SignatureError`` for keys.
        ConfigurationError: The settings name none.
    """
    if node.device is None or node.device_key is None:
        raise ConfigurationError("node config", ["device, device_key: missing; name the bundle and the key that signed it"])
    return _opened(node.device, node.device_key, _stamp(node.device / SIGNATURE), _stamp(node.device_key))


@lru_cache(maxsize=2)
def _opened(folder: Path, key: Path, *_: tuple[int, int] | None) -> Opened:
    found = gradient.open(folder, key, resources=Resources())
    return Opened(found, Tokeniser(content(folder.resolve(), found.manifest, TOKENIZER), found.manifest.tokens))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes when a file does."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None


def check_plan(plan: Plan) -> None:
    """Makes sure that devices can carry out a plan at all.

    Raises:
        ConfigurationError: Everything in it that they cannot.
    """
    if problems := list(_problems(plan)):
        raise ConfigurationError("plan", problems)


def _problems(plan: Plan) -> Iterator[str]:
    if plan.objective not in OBJECTIVES:
        yield f"objective: found {plan.objective}; a device trains {', '.join(OBJECTIVES)}"
    if plan.method not in METHODS:
        yield f"method: found {plan.method}; a device trains {', '.join(METHODS)}"
    for section, names in _NOT_HERE.items():
        for name in (name for name in names if changed(getattr(plan, section), name)):
            yield f"{section}.{name}: a device cannot do it; leave it out of the plan"
    if plan.ai_feedback:
        yield "ai_feedback: a device asks no judge; leave it out of the plan"
    if plan.training.lr_scheduler_type not in SCHEDULES:
        yield f"training.lr_scheduler_type: found {plan.training.lr_scheduler_type}; a device has {', '.join(SCHEDULES)}"
    if plan.training.optim == "sgd":
        yield "training.optim: found sgd; a device has AdamW"
    if rows_taken(plan) > _MOST_ROWS:
        yield f"training: its steps take more than {_MOST_ROWS} rows a round; a device takes no more"
    if plan.training.max_steps is None and plan.training.num_train_epochs > _MOST_PASSES:
        yield f"training.num_train_epochs: found {plan.training.num_train_epochs:g}; a device takes at most {_MOST_PASSES}"


def left_out(plan: Plan) -> dict[str, str]:
    """By dotted field name, what of a plan a device does without, and that it does."""
    found = [
        f"{section}.{name}" for section, names in _LEFT_OUT.items() for name in names if changed(getattr(plan, section), name)
    ]
    found += [name for name, given in (("dropout", plan.dropout), ("forgetting", plan.forgetting)) if given]
    return {name: f"{name}: this device trains without it" for name in found}
