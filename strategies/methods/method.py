"""What every method of fine-tuning is: how it is attached to a base, started, and taken out again as an adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from protocol.adapter import Adapter, Factors
from protocol.plan import Plan
from strategies.base_model import Base
from strategies.methods.dense_tensors import check_names, put, taken

Begun = Mapping[str, Factors]
NOTHING: Begun = MappingProxyType({})


class Load(Protocol):
    """Puts an adapter in place: ``load(model, adapter, fresh=...)``."""

    def __call__(self, model: Any, adapter: Adapter, *, fresh: bool = False) -> None:  # noqa: D102
        ...


class Extract(Protocol):
    """Takes what was trained out: ``extract(model, begun)``."""

    def __call__(self, model: Any, begun: Begun = NOTHING) -> Adapter:  # noqa: D102
        ...


def starts_with_nothing(model: Any, plan: Plan, base: Base) -> Begun:  # noqa: ARG001
    """The ``begin`` of a method whose start is no part of the base."""
    return NOTHING


def trains_all(model: Any, factor: Literal["both", "A", "B"]) -> None:  # noqa: ARG001
    """The ``train_only`` of a method without factors. Rules that train one factor are refused beside it at configuration."""
    if factor != "both":
        raise ValueError(f"factor {factor}: this method has none")


def no_modules(model: Any) -> dict[str, tuple[int, int]]:  # noqa: ARG001
    """The ``modules`` of a method without factors."""
    return {}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    What trains is held in float32, whatever the base is held in; but weights of the base itself (full, freezing) as the base.

    Attributes:
        attach: ``attach(model, plan)``: the model with what trains in place, everything else frozen. Right after it the
            model computes what the base computes. Draws from torch's global generator; works on torch's meta device.
        load: Puts an adapter of this method in place, to train on from it or to use it. Raises AdapterError where names or
            shapes do not fit the model.
        extract: An adapter of absolute tensors, float32 arrays.
        dense: ``dense(model)``: what trains and is no factor, as parameters by the name that an adapter's ``dense`` gives them.
        modules: ``modules(model)``: ``(d_out, d_in)`` by module whose change travels as factors.
        embeddings: Those of them that look their weight up by token.
        begin: ``begin(model, plan, base)``: starts that are a part of the base; what it returns goes to ``extract``.
        train_only: Freezes one of the two factors.
        callbacks: ``callbacks(model, plan, done)``: trainer callbacks; ``done`` counts the optimizer steps of earlier rounds.
        penalty: ``penalty(plan)``: None, or a function of the model whose value is minimised beside the objective's loss.
        metrics: ``metrics(model)``: figures about what ``extract`` has taken out.
        state: ``state(model)``: what it keeps while it trains and is no trained parameter, as tensors, numbers and texts in
            mappings and lists: a checkpoint holds it.
        restore: ``restore(model, state)``: puts it back.
        trains_base: Weights of the base itself train: an adapter is not all of what was made, the whole model is.
    """

    attach: Callable[[Any, Plan], Any]
    load: Load
    extract: Extract
    dense: Callable[[Any], dict[str, Any]]
    modules: Callable[[Any], dict[str, tuple[int, int]]] = no_modules
    embeddings: Callable[[Any], tuple[str, ...]] = lambda model: ()
    begin: Callable[[Any, Plan, Base], Begun] = starts_with_nothing
    train_only: Callable[[Any, Literal["both", "A", "B"]], None] = trains_all
    callbacks: Callable[[Any, Plan, int], list[Any]] = lambda model, plan, done: []
    penalty: Callable[[Plan], Callable[[Any], Any] | None] = lambda plan: None
    metrics: Callable[[Any], Mapping[str, float]] = lambda model: {}
    state: Callable[[Any], Mapping[str, Any]] = lambda model: {}
    restore: Callable[[Any, Mapping[str, Any]], None] = lambda model, state: None
    trains_base: bool = False


def of_tensors(
    attach: Callable[[Any, Plan], Any], dense: Callable[[Any], dict[str, Any]], load: Load | None = None, **more: Any
) -> Method:
    """A method without factors: its adapters are the named tensors that ``dense`` finds, absolute."""

    def put_in_place(model: Any, adapter: Adapter, *, fresh: bool = False) -> None:  # noqa: ARG001 - it has no directions
        check_names("modules", adapter.factors, ())
        put(dense(model), adapter.dense)

    def take_out(model: Any, begun: Begun = NOTHING) -> Adapter:  # noqa: ARG001 - it begins with no part of the base
        return Adapter({}, taken(dense(model)))

    return Method(attach, load or put_in_place, take_out, dense, **more)
