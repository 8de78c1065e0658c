"""One strategy's plan, field by field, each with its reason: a wish, else the first rule that says it, else the default."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from protocol.configuration import parse
from protocol.errors import ConfigurationError
from protocol.method_settings import LoraSettings
from protocol.objective_settings import DpoSettings, KtoSettings
from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, QUANTISED, REFERRING, USED_BY, Method, Objective, Plan, Precision
from strategies import rules
from strategies.footprint import targets_of
from strategies.job import REWARD_STAGE
from strategies.rules import Rule
from strategies.sizing import EFFECTIVE_BATCH, Problem, rounded, rows_for
from strategies.task import Limits, Task

# Fewer optimizer steps than these hardly move a model: 21 of them, on 108 rows, learnt nothing that was asked for.
# Preferences are overfitted sooner than answers.
_FEWEST_STEPS, _SMALLEST_BATCH = 60, 4
_MOST_PASSES = {False: 20, True: 5}  # by whether the objective refers to the model before it
_WHY_OBJECTIVE: Mapping[str, str] = {
    "sft": "answers are learnt",
    "dpo": "of two answers, the better is preferred",
    "kto": "answers that were liked are given",
    "reward": "scores answers, for the stage after it",
    "rl": "answers of high reward are given",
}
_OF_OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"dpo.beta": DpoSettings().beta},
    "kto": {"kto.beta": KtoSettings().beta},
}
# Of a rule's settings, those that are for what it would rather have: a rate for whole weights is none for factors.
_OF_THE_FIRST = ("training.learning_rate", "training.weight_decay", "dropout")


# Who reads each section of a plan. ``USED_BY`` leaves out LoRA's, which plans of other methods may hold for want of harm;
# whole weights that have changed are sent in factors of rank ``lora.r``.
_READ_BY = {**USED_BY, "lora": ("method", (*LOW_RANK, "experts")), "lora.r": ("method", (*LOW_RANK, "experts", *COMPRESSED))}
# Far beyond what there is: rows, seconds and prices computed of them stay numbers.
_MOST: Mapping[str, int] = {
    "training.num_train_epochs": 10**6,
    "training.max_steps": 10**12,
    "training.batch_size": 2**20,
    "training.gradient_accumulation_steps": 2**20,
    "data.max_length": 2**30,
}


def wished(wishes: Mapping[str, Any], task: Task | None = None, limits: Limits | None = None) -> None:
    """Refuses wishes that no plan can have, or none for this task within these limits.

    Raises:
        ConfigurationError: All of them at once.
    """
    problems = [
        f"{name}: found {value:g}, expected at most {most}"
        for name, most in _MOST.items()
        if isinstance(value := wishes.get(name), int | float) and value > most
    ]
    if "base_model" in wishes:
        problems.append("base_model: is no wish; give it beside data, task and limits")
    method = found if (found := wishes.get("method")) in get_args(Method) else None
    objective = found if (found := wishes.get("objective")) in get_args(Objective) else None
    problems += filter(None, (unheard(name, method, objective) for name in wishes))
    rank, most = wishes.get("lora.r"), limits.max_rank if limits else None
    if isinstance(rank, int) and most is not None and rank > most:
        problems.append(f"lora.r: found {rank}, limits.max_rank allows {most}")
    scored = {"classification", "regression"} & {objective, task.kind} if task and objective else ()
    if task and scored and objective != task.kind:
        problems.append(
            f"objective {objective}: the task is of kind {task.kind}; give the kind that is meant, or leave one out"
        )
    try:
        _possible(wishes)
    except ConfigurationError as error:
        problems += error.problems
    if problems:
        raise ConfigurationError("wishes", problems)


def implied(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """The wishes, with the method that alone reads what is wished."""
    sections = {name.partition(".")[0] for name in wishes}
    methods = [
        users[0]
        for name in sorted(sections)
        for kind, users in [_READ_BY.get(name, ("", ()))]
        if kind == "method" and len(users) == 1
    ]
    return {**({"method": methods[0]} if methods else {}), **wishes}


def unheard(name: str, method: str | None, *objectives: str | None) -> str:
    """Why a wish says nothing to a strategy: nobody reads its section there; empty where somebody does, or may."""
    kind, users = _READ_BY.get(name) or _READ_BY.get(name.partition(".")[0], ("method", ()))
    found = [one for one in (objectives if kind == "objective" else (method,)) if one is not None]
    if not users or not found or set(found) & set(users):
        return ""
    return f"{name} is for {kind} {' or '.join(users)}, found {' then '.join(found)}"


def _possible(wishes: Mapping[str, Any]) -> None:
    """Refuses wishes that no plan has, whatever else it is; of a section that several read, one reader is enough."""
    values = dict(wishes)
    if values.get("method") == "qlora":
        values.setdefault("precision", "nf4")
    if values.get("precision") in QUANTISED and "method" not in values:
        values["method"] = "qlora"
    tried = [values]
    for section in sorted({name.partition(".")[0] for name in wishes} & set(USED_BY)):
        kind, users = USED_BY[section]
        if kind not in values:
            tried = [{**one, kind: user} for one in tried for user in users]
    refused = None
    for one in tried:
        if one.get("objective") == "rl":
            one.setdefault("rl.reward_model", REWARD_STAGE)
        try:
            parse(nested(one), Plan, source="wishes")
        except ConfigurationError as error:
            refused = refused or error
        else:
            return
    if refused:
        raise refused


def settled(
    method: Method, precision: Precision, objective: Objective, problem: Problem, found: Sequence[Rule]
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
    put(_uncounted(problem), "each row is private: whatever looks at rows, or keeps what they made, would have to be counted")
    put({"method": method, "precision": precision}, "")
    put({"objective": objective}, _WHY_OBJECTIVE.get(objective, f"the task is of kind {problem.task.kind}"))
    preferences = objective in REFERRING
    if objective == "sft" and problem.task.shape == "pairs":
        put({"data.preferred": True}, "the rows are pairs: their better answers come first (Rafailov 2023, section 5)")
    few = _few_rows(values, found, method, objective, problem)
    put(few, f"{rows_for(objective, problem.task)} rows: so that there are about {_FEWEST_STEPS} steps")
    for rule in found:
        if _first(rule, method) and not preferences:
            for name, several in rule.measured.items():
                best = next(one for one in several if problem.architecture.parameters < one.below)
                put({name: best.value}, best.why)
        put(_from(rule, method, problem, preferences=preferences), f"rule {rule.id}")
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
        rate = rules.OWN_RATES[method]
    put({"training.learning_rate": rate}, f"default for {method}{' on preferences' if preferences else ''}")
    put(rules.DEFAULTS, "default")
    put({"training.num_train_epochs": _passes(objective)}, "default")
    put({"training.batch_size": EFFECTIVE_BATCH}, "default")
    put(_OF_OBJECTIVES.get(objective, {}), "default")
    behind = values["training.batch_size"] * values.get("training.gradient_accumulation_steps", 1)
    steps = rows_for(objective, problem.task) * values["training.num_train_epochs"] / behind
    put({"training.eval_steps": min(500, max(1, round(steps / 6)))}, "default: several evaluations in a training")
    if values["training.eval_steps"]:
        put({"training.early_stopping_patience": 3}, "default")
    length = _length(problem)
    put({"data.max_length": length}, _why_length(length, problem))
    _put_rank(values, reasons, problem)
    return parse(nested(_heard(values)), Plan, source="wishes"), {k: why for k, why in reasons.items() if why}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings in mappings.

    Raises:
        ConfigurationError: A name goes into what is given as a single value.
    """
    content: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = content
        for key in path:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigurationError("wishes", [f"{name}: {key} is given as a whole too; leave out one of the two"])
        place[last] = value
    return content


def _reads(rule: Rule, method: Method) -> bool:
    """Whether a rule speaks of a strategy."""
    alike = [p.method for p in rule.proposes]
    return not alike or bool({method, "lora" if method in LOW_RANK else method} & set(alike))


def _first(rule: Rule, method: Method) -> bool:
    """Whether it is what the rule would rather have."""
    return not rule.proposes or rule.proposes[0].method in (method, "lora" if method in LOW_RANK else method)


def _from(rule: Rule, method: Method, problem: Problem, *, preferences: bool) -> dict[str, Any]:
    """What a rule says about a strategy."""
    if not _reads(rule, method):
        return {}
    told = dict(rule.settings)
    if preferences or not _first(rule, method):
        told = {name: value for name, value in told.items() if name not in _OF_THE_FIRST}
    if preferences:
        told.pop("training.num_train_epochs", None)
    role = told.pop("targets", None)
    if method not in LOW_RANK:
        return {name: value for name, value in told.items() if not name.startswith("lora.")}
    return told | ({"lora.target_modules": targets_of(role, problem.architecture)} if role else {})


def _mixed(method: Method, precision: Precision, problem: Problem) -> dict[str, Any]:
    machine = problem.machine
    if machine.device == "cpu":
        return {"training.mixed_precision": "fp32"}
    pure = method in ON_THE_BASE and precision in ("bf16", "fp16")
    # fp16 would scale gradients up before they are shortened row by row.
    wide = pure or bool(not machine.bf16 and _uncounted(problem))
    return {"training.mixed_precision": "fp32" if wide else "bf16" if machine.bf16 else "fp16"}


def _uncounted(problem: Problem) -> dict[str, Any]:
    """What a training whose rows are private goes without; nothing where that is not wished."""
    private = any(name.startswith("training.example_privacy") for name in problem.wishes)
    return {"training.save_steps": None, "training.eval_steps": None} if private else {}


def _passes(objective: Objective) -> float:
    return 1.0 if objective in REFERRING else 3.0


def _few_rows(
    values: Mapping[str, Any], found: Sequence[Rule], method: Method, objective: Objective, problem: Problem
) -> dict[str, Any]:
    """More passes, and of very few rows smaller steps, where training would end before it has begun.

    What rules say of passes is meant for rows in plenty; a wish, and a prototype's haste, stay as they are.
    """
    names = ("training.num_train_epochs", "training.max_steps", "training.batch_size", "training.gradient_accumulation_steps")
    if objective == "rl" or any(name in values for name in names) or problem.task.situation == "prototype":
        return {}
    rows, batch = rows_for(objective, problem.task), EFFECTIVE_BATCH
    told = (_from(rule, method, problem, preferences=objective in REFERRING).get(names[0]) for rule in found)
    passes = next(filter(None, told), _passes(objective))
    if rows * passes >= _FEWEST_STEPS * batch:
        return {}
    most = _MOST_PASSES[objective in REFERRING]
    while batch > _SMALLEST_BATCH and _FEWEST_STEPS * batch > most * rows:
        batch //= 2
    more = float(min(most, max(passes, math.ceil(_FEWEST_STEPS * batch / rows))))
    return {names[0]: more} | ({names[2]: batch} if batch < EFFECTIVE_BATCH else {})


def _why_length(length: int, problem: Problem) -> str:
    task = problem.task
    if length < task.longest_row:
        return f"all that the base reads; rows have up to {task.longest_row} tokens"
    if task.longest_tokens is not None:
        return f"the longest row: {task.longest_tokens} tokens"
    known = "input_tokens" if "input_tokens" in task.model_fields_set else "assumed"
    return f"a whole row with its answer ({known}: {task.row_tokens} tokens, 95th percentile); longer ones are cut"


def _length(problem: Problem) -> int:
    longest = problem.task.longest_row
    context = problem.architecture.context or longest
    return max(8, min(rounded(longest), context))


def _put_rank(values: dict[str, Any], reasons: dict[str, str], problem: Problem) -> None:
    """Caps the rank by the institution's own limit, and keeps the length of steps over ranks."""
    cap, r = problem.limits.max_rank, values.get("lora.r", LoraSettings().r)
    if cap is not None and r > cap and reasons.get("lora.r") != "as wished":
        values["lora.r"], reasons["lora.r"] = cap, f"{cap} instead of {r}: the largest rank allowed here"
    if "lora.r" in values and "lora.lora_alpha" not in values:
        usual = LoraSettings()
        values["lora.lora_alpha"] = round(usual.with_rank(values["lora.r"]).lora_alpha, 2)
        why = f"{usual.lora_alpha:g} at rank {usual.r}, with the root of the rank: steps of one length at every rank"
        reasons["lora.lora_alpha"] = why


def _heard(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections that this method and objective do not read: a plan refuses them."""

    def heard(name: str) -> bool:
        kind, users = USED_BY.get(name.split(".")[0], ("method", (values["method"],)))
        return values[kind] in users

    return {name: value for name, value in values.items() if heard(name)}
