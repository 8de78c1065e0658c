"""Every key of every YAML file with its default, from the settings themselves: the page ``docs/reference.md``.

python -m tools.reference > docs/reference.md
"""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from client.node import Node
from client.policy import Policy
from protocol.federation import Federation
from simulations.scenario import Scenario
from strategies.job import Job
from strategies.request import Request

_FILES: tuple[tuple[type[BaseModel], str, str], ...] = (
    (
        Job,
        "A job",
        "`fedge train`, `evaluate`, `label`, `probe`. A federation's `plan` has the same but the last three.",
    ),
    (Request, "A request", "`fedge plan`, `compare`, `roadmap`."),
    (Federation, "A federation", "`flwr run`, and `federation` in a scenario."),
    (Node, "A node", "`flower-supernode --node-config`, with dashes for underscores, and `nodes` in a scenario."),
    (Policy, "A policy", "`policy` of a node, and `fedge node policy`."),
    (Scenario, "A scenario", "`fedge simulate`."),
)
_NUMBERS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_SIGNS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))


def page() -> str:
    """The whole page."""
    lines = [
        "# Every key",
        "",
        "Made by `python -m tools.reference`; a test holds it to the code. What the keys are for is told in "
        "[configuration.md](configuration.md) and the pages that it names. A key whose default is none may be left out, one "
        "that is **needed** may not.",
    ]
    shown: set[type[BaseModel]] = set()
    for model, title, used in _FILES:
        lines += ["", f"## {title}", "", used, "", *_table(model, "", shown)]
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel], prefix: str, shown: set[type[BaseModel]]) -> Iterator[str]:
    yield from ("| key | default | takes | |", "|---|---|---|---|")
    yield from _rows(model, prefix, shown)


def _rows(model: type[BaseModel], prefix: str, shown: set[type[BaseModel]]) -> Iterator[str]:
    shown.add(model)
    for name, field in model.model_fields.items():
        inner = [kind for kind in _parts(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        told = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_default(field)} | {_takes(field)} | {told} |"
        if len(inner) == 1 and inner[0] not in shown:
            yield from _rows(inner[0], f"{prefix}{name}.", shown)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "**needed**"
    if isinstance(value, BaseModel):
        return ""
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _takes(field: FieldInfo) -> str:
    kinds = []
    for kind in _parts(field.annotation):
        if get_origin(kind) is Literal:
            kinds += [f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            kinds.append("keys below")
        elif get_origin(kind) in (tuple, list):
            kinds.append("list")
        elif get_origin(kind) is dict or "Mapping" in str(kind):
            kinds.append("names and values")
        else:
            kinds.append(_NUMBERS.get(kind, "path" if "Path" in str(kind) else "text"))
    bounds = [
        f"{word} {getattr(limit, name):g}"
        for limit in field.metadata
        for sign, name, word in _SIGNS
        if isinstance(limit, sign) and isinstance(getattr(limit, name), int | float)
    ]
    return ", ".join(dict.fromkeys([*kinds, *bounds]))


def _parts(kind: Any) -> Iterator[Any]:
    """What a union is made of, without None and without what pydantic notes beside a type."""
    if get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _parts(one)
    elif hasattr(kind, "__metadata__"):
        yield from _parts(kind.__origin__)
    elif kind is not type(None):
        yield kind


if __name__ == "__main__":
    print(page(), end="")
