"""What a plan from outside may use of an institution's own: functions, models beside the base, files, endpoints with keys.

A plan that reaches a node may name anything. A function runs, a folder is read, rows go to an endpoint and a variable of the
environment goes with them as its key: each only where the node's own settings list it.
"""

from collections.abc import Iterable, Mapping

from client.node import Node
from protocol.errors import ConfigurationError
from protocol.plan import Plan
from protocol.writer_settings import second_models


def check(plan: Plan, node: Node) -> None:
    """Makes sure that the node allows what a plan names.

    Raises:
        ConfigurationError: All that it does not list.
    """
    problems = []
    for field, names in used(plan).items():
        allowed = {" ".join(entry.split()) for entry in (getattr(node, field) or "").split(",")}
        if unlisted := [name for name in names if name not in allowed]:
            problems.append(
                f"{field}: the plan names {', '.join(unlisted)}, which it does not list; add what may be used here, with "
                "commas between"
            )
    if problems:
        raise ConfigurationError("node config", problems)


def used(plan: Plan) -> Mapping[str, list[str]]:
    """What a plan names, by the node's field that allows it; an endpoint as ``URL`` or, with a key, ``URL VARIABLE``."""
    models = second_models(plan)
    beside = [name for model in models for name in (model.base_model, model.adapter)]
    endpoints = [model.endpoint for model in models if model.endpoint]
    return {
        "reward_functions": list(plan.rl.reward_functions),
        "models": [name for name in (plan.rl.reward_model, *beside, *plan.xlora.adapters) if name],
        "files": [str(path) for path in plan.data.files().values()],
        "endpoints": [" ".join(filter(None, (each.base_url, each.api_key_env))) for each in endpoints],
    }


def everything(plans: Iterable[Plan]) -> dict[str, str | None]:
    """The fields of a node whose own user wrote the plans: all that they name."""
    found: dict[str, dict[str, None]] = {}
    for plan in plans:
        for field, names in used(plan).items():
            found.setdefault(field, {}).update(dict.fromkeys(names))
    return {field: ",".join(names) or None for field, names in found.items()}
