"""One strategy's plan, field by field, each with its reason: a wish, else the first rule that says it, else the default."""

from collections.abc import Mapping, Sequence
from typing import Any

from protocol.configuration import parse
from protocol.plan import (
    COMPRESSED,
    LOW_RANK,
    ON_THE_BASE,
    QUANTISED,
    REFERRING,
    USED_BY,
    LoraSettings,
    Objective,
    Plan,
    Precision,
)
from strategies import rules
from strategies.footprint import targets_of
from strategies.rules import Rule, Strategy
from strategies.sizing import EFFECTIVE_BATCH, Problem, rounded

# Of a rule's settings, those that are for what it would rather have: a rate for whole weights is none for factors.
_OF_THE_FIRST = ("training.learning_rate", "training.weight_decay", "dropout")
# Stands for the adapter of the stage before, until that has a folder.
REWARD_STAGE = "stage:reward"


def wished(wishes: Mapping[str, Any]) -> None:
    """Refuses wishes that no plan can have.

    Raises:
        ConfigurationError: All of them at once.
    """
    values = dict(wishes)
    if values.get("method") == "qlora":
        values.setdefault("precision", "nf4")
    if values.get("precision") in QUANTISED and "method" not in values:
        values["method"] = "qlora"
    for name in wishes:
        kind, users = USED_BY.get(name.split(".")[0], ("", ()))
        if kind and len(users) == 1:
            values.setdefault(kind, users[0])
    if values.get("objective") == "rl":
        values.setdefault("rl.reward_model", REWARD_STAGE)
    parse(nested(values), Plan, source="wishes")


def settled(
    method: Strategy, precision: Precision, objective: Objective, problem: Problem, found: Sequence[Rule]
) -> tuple[Plan, dict[str, str]]:
    """The plan of a strategy before it is sized, and why each field is as it is.

    Raises:
        ConfigurationError: A wish does not go with the strategy.
    """
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def put(settings: Mapping[str, Any], why: str) -> None:
        for name, value in settings.items():
            if name not in values:
                values[name], reasons[name] = value, why

    put(problem.wishes, "as wished")
    put({"method": method, "precision": precision, "objective": objective}, "")
    preferences = objective in REFERRING
    for rule in found:
        put(_from(rule, method, problem, preferences=preferences), f"rule {rule}")
    if objective == "rl" and problem.task.feedback == "pairs" and "rl.reward_functions" not in values:
        put({"rl.reward_model": REWARD_STAGE}, "trained in the stage before")
    put(_mixed(method, precision, problem), "what this device computes fast in")
    if method == "freezing":
        similarity = problem.task.similarity
        known = "not measured" if similarity is None else f"{similarity:.2f}"
        share = rules.frozen_share(similarity)
        put({"freezing.frozen_share": share}, f"similarity to the base's own data {known}: freeze {share:.0%}")
    rate = rules.LEARNING_RATES[method in COMPRESSED, preferences]
    if method in rules.OWN_RATES and not preferences:
        rate = rules.OWN_RATES[method]  # type: ignore[index]
    put({"training.learning_rate": rate}, f"default for {method}{' on preferences' if preferences else ''}")
    put(rules.DEFAULTS, "default")
    put({"training.num_train_epochs": 1.0 if preferences else 3.0}, "default")
    put({"training.batch_size": EFFECTIVE_BATCH}, "default")
    if method != "prefix-tuning":  # its best prefix no longer fits the network behind it
        steps = problem.task.rows * values["training.num_train_epochs"] / values["training.batch_size"]
        put({"training.eval_steps": min(500, max(1, round(steps / 6)))}, "default: several evaluations in a training")
        put({"training.early_stopping_patience": 3}, "default")
    put({"data.max_length": _length(problem)}, "the longest row, or what the base can read")
    _put_rank(values, reasons, problem)
    return parse(nested(_heard(values)), Plan, source="wishes"), {k: why for k, why in reasons.items() if why}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings in mappings."""
    content: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = content
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return content


def _from(rule: Rule, method: Strategy, problem: Problem, *, preferences: bool) -> dict[str, Any]:
    """What a rule says about a strategy."""
    alike = [p.method for p in rule.proposes]
    asked = "lora" if method in LOW_RANK else method
    if alike and not {method, asked} & set(alike):
        return {}
    told = dict(rule.settings)
    if preferences or (alike and alike[0] not in (method, asked)):
        told = {name: value for name, value in told.items() if name not in _OF_THE_FIRST}
    if preferences:
        told.pop("training.num_train_epochs", None)
    role = told.pop("targets", None)
    if method not in LOW_RANK:
        return {name: value for name, value in told.items() if not name.startswith("lora.")}
    return told | ({"lora.target_modules": targets_of(role, problem.architecture)} if role else {})


def _mixed(method: Strategy, precision: Precision, problem: Problem) -> dict[str, Any]:
    machine = problem.machine
    if machine.device == "cpu":
        return {"training.mixed_precision": "fp32"}
    pure = method in ON_THE_BASE and precision in ("bf16", "fp16")
    return {"training.mixed_precision": "fp32" if pure else "bf16" if machine.bf16 else "fp16"}


def _length(problem: Problem) -> int:
    longest = problem.task.longest_tokens or problem.task.input_tokens
    context = problem.architecture.context or longest
    return max(8, min(rounded(longest), context))


def _put_rank(values: dict[str, Any], reasons: dict[str, str], problem: Problem) -> None:
    """Caps the rank by the institution's own limit, and keeps the length of steps over ranks."""
    cap, r = problem.limits.max_rank, values.get("lora.r", LoraSettings().r)
    if cap is not None and r > cap and reasons.get("lora.r") != "as wished":
        values["lora.r"], reasons["lora.r"] = cap, f"{cap} instead of {r}: the largest rank allowed here"
    if "lora.r" in values and "lora.lora_alpha" not in values:
        values["lora.lora_alpha"] = LoraSettings().with_rank(values["lora.r"]).lora_alpha


def _heard(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections that this method and objective do not read: a plan refuses them."""

    def heard(name: str) -> bool:
        kind, users = USED_BY.get(name.split(".")[0], ("method", (values["method"],)))
        return values[kind] in users

    return {name: value for name, value in values.items() if heard(name)}
