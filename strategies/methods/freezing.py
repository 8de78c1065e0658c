"""Layer-wise freezing: some layers train whole, the others stay; frozen ones may begin to train one after the other.

Which are frozen is a share of the layers in an order, or all but the parts that are named. Embeddings go with the lowest
layer; what follows the layers (a last norm, an output layer of its own) goes with the highest; a classifier's head trains
always. Gradual thawing begins with the layer that was frozen last (Howard and Ruder 2018, arXiv:1801.06146, section 3.3).
What trains at any time travels as for full fine-tuning.
"""

from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from protocol.method_settings import FreezingSettings
from protocol.plan import Plan
from strategies.base_model import heads
from strategies.methods import full
from strategies.methods.layers import stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", plan: Plan) -> "PreTrainedModel":
    """Lets parts train and freezes the others, in place. With thawing all may train; ``callbacks`` holds them back.

    Raises:
        ModelError: A part that is named is not in the base, or its layers cannot be told.
    """
    settings, head = plan.freezing, heads(model, plan.objective)
    names = [name for name, _ in model.named_parameters()]
    if settings.train:
        chosen = {
            name for name in names if name.partition(".")[0] in head or any(_is_in(name, part) for part in settings.train)
        }
        if missing := [part for part in settings.train if not any(_is_in(name, part) for name in names)]:
            there = ", ".join(sorted({part for name in names for part in name.split(".")[:-1] if not part.isdigit()}))
            raise ModelError(f"freezing.train: nothing in the base is named {', '.join(missing)}; there are {there}")
        return full.train(model, plan, chosen)
    held = set() if settings.thaw_every else {name for group in _frozen(model, plan).values() for name in group}
    return full.train(model, plan, set(names) - held)


def callbacks(model: "PreTrainedModel", plan: Plan, done: int) -> list[Any]:
    """The trainer callback that thaws.

    The optimizer knows all parameters from its beginning: one without a gradient is passed over and costs it nothing, and
    every layer follows the one schedule of rates.

    Args:
        model: From ``attach``.
        plan: The one that it was attached with.
        done: Optimizer steps that earlier rounds took: thawing goes on where they left it.
    """
    from transformers import TrainerCallback

    every = plan.freezing.thaw_every
    if every is None:
        return []
    groups = list(reversed(_frozen(model, plan).values()))

    class Thaw(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            for number, group in enumerate(groups, 1):
                for name in group:
                    model.get_parameter(name).requires_grad_((done + state.global_step) // every >= number)

    return [Thaw()]


def _frozen(model: "PreTrainedModel", plan: Plan) -> dict[int, list[str]]:
    """Parameters that begin frozen, by layer, in the order in which layers are frozen."""
    layers = stack(model)
    head = heads(model, plan.objective)
    groups: dict[int, list[str]] = {layer: [] for layer in range(len(layers))}
    below = True
    for name, _ in model.named_parameters():
        if name.partition(".")[0] in head:
            continue
        inside = [layer for layer, module in enumerate(layers) if name.startswith(f"{module}.")]
        below = below and not inside
        groups[inside[0] if inside else 0 if below else len(layers) - 1].append(name)
    return {layer: groups[layer] for layer in order(plan.freezing, len(layers))}


def order(settings: FreezingSettings, count: int) -> list[int]:
    """Which of ``count`` layers (0 is the lowest) are frozen, in that order; at least one always trains.

    ``alternating`` freezes every second layer, from the lowest, before those between them.
    """
    frozen = min(round(settings.frozen_share * count), count - 1)
    layers = list(range(count))
    if settings.order == "top-down":
        layers.reverse()
    if settings.order == "alternating":
        layers = layers[::2] + layers[1::2]
    return layers[:frozen]


def _is_in(name: str, part: str) -> bool:
    """Whether a parameter is a part of the base or lies within it."""
    return f".{part}." in f".{name}."
