"""From a first trial to production: phases made from what was selected, each with its needs, its end and its risks."""

from dataclasses import dataclass

from protocol.plan import COMPRESSED, ON_THE_BASE, QUANTISED, Plan
from strategies.request import Answer
from strategies.selector import Candidate
from strategies.task import Task

_TRIAL_ROWS, _TRIAL_PASSES = 500, 3.0
_TIGHT = 0.85
_FEW_ROWS = 500
_METRICS = {
    "classification": "macro-F1",
    "regression": "mean squared error",
    "pretraining": "perplexity",
    "code": "share of tests passed",
    "question-answering": "exact match",
    "generation": "loss per answer token",
}


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        name: What it is called.
        goal: What it is for.
        strategy: What is trained, by the candidate's name; empty where nothing is.
        plan: To train with; None where nothing is.
        rows: That are trained on.
        peak_bytes: On each device.
        hours: Of training; None where the device's rates are not known.
        money: None without a price.
        entry: What must be there before it begins.
        exit: What must hold before the next one begins.
        risks: What can go wrong, and what to look at.
    """

    name: str
    goal: str
    entry: tuple[str, ...]
    exit: tuple[str, ...]
    risks: tuple[str, ...] = ()
    strategy: str = ""
    plan: Plan | None = None
    rows: int = 0
    peak_bytes: int = 0
    hours: float | None = None
    money: float | None = None


def roadmap(answer: Answer) -> tuple[Phase, ...]:
    """The phases of what was chosen; none where nothing fits."""
    chosen = answer.selection.chosen
    if chosen is None:
        return ()
    made = [_trial(answer, chosen), *_training(answer, chosen)]
    if answer.task.private:
        made.append(_federated(answer, chosen))
    if answer.task.on_device:
        made.append(_device(chosen))
    return (*made, _production(answer, chosen))


def _trial(answer: Answer, chosen: Candidate) -> Phase:
    """The first stage itself, on few rows: what else would tell whether its rate, rank and length are right?"""
    task, plan, fit = answer.task, chosen.plan, chosen.fits[0]
    rows = min(_TRIAL_ROWS, task.rows)
    passes = min(plan.training.num_train_epochs, _TRIAL_PASSES)
    trial = plan.model_copy(update={"training": plan.training.model_copy(update={"num_train_epochs": passes})})
    share = rows * passes / (task.rows * plan.training.num_train_epochs)
    held = max(20, round(0.1 * task.rows))
    return Phase(
        "quick validation",
        f"does {answer.request.base_model} learn this from {rows} of {task.rows} rows at all?",
        (f"{held} rows are held out, and none of them is a near duplicate of a training row",),
        (
            f"held-out {_METRICS[task.kind]} is better than the base's on the same rows",
            f"fifty rows, read for twenty passes with the same settings ({chosen.name}), are known by heart: rate, rank and "
            "length can learn",
        ),
        tuple(_data_risks(task)),
        chosen.name,
        trial,
        rows,
        fit.estimate.device_bytes,
        _hours(fit.cost.total_seconds * share) if fit.cost else None,
        fit.cost.money * share if fit.cost and fit.cost.money is not None else None,
    )


def _training(answer: Answer, chosen: Candidate) -> list[Phase]:
    task, made = answer.task, []
    for number, (plan, fit) in enumerate(zip(chosen.stages, chosen.fits, strict=True)):
        first = number == 0
        rows = task.rows if first else task.preference_pairs or task.rows
        entry = (
            ("the quick validation ended well", f"{task.rows} rows are clean: duplicates, markup and personal data are out")
            if first
            else (f"{rows} {_needed(plan)}", f"the adapter of stage {number} is kept, and its held-out rows are known")
        )
        made.append(
            Phase(
                _stage_name(plan),
                f"{chosen.name}: rule {chosen.rule.id}" if first else f"{plan.objective} on what stage {number} learnt",
                entry,
                _exit(plan, task),
                tuple(_plan_risks(plan, fit.estimate.device_bytes, answer)),
                chosen.name,
                plan,
                rows,
                fit.estimate.device_bytes,
                _hours(fit.cost.total_seconds) if fit.cost else None,
                fit.cost.money if fit.cost else None,
            )
        )
    return made


def _federated(answer: Answer, chosen: Candidate) -> Phase:
    return Phase(
        "federated pilot",
        "the same plan at two or three institutions, whose rows stay where they are",
        (
            "each institution's fedge plan finds something that fits, of whatever rank",
            "the nodes' keys are enrolled and TLS is on (docs/deployment.md)",
        ),
        (
            f"held-out {_METRICS[answer.task.kind]} is within 3 % of what one institution reaches with as many rows",
            "every node is better off than with its own rows alone",
        ),
        ("rows of the institutions may differ so much that one adapter serves none: watch rounds.cluster",),
        chosen.name,
        chosen.plan,
        answer.task.rows,
        chosen.peak_bytes,
    )


def _device(chosen: Candidate) -> Phase:
    return Phase(
        "export",
        "the base in 4 or 8 bits with the adapter beside it, on the device",
        ("the held-out figures of the trained adapter are final",),
        ("the exported model gives the same held-out figures within 1 %", "memory and time to the first token suit the device"),
        ("rounding to 4 bits costs quality that training did not see",)
        if chosen.plan.precision not in QUANTISED
        else ("the device's kernels round otherwise than the training's",),
    )


def _production(answer: Answer, chosen: Candidate) -> Phase:
    whole = chosen.plan.method in COMPRESSED
    kept = "model" if whole else "adapter"
    return Phase(
        "production",
        f"the {kept} serves, and is replaced when it no longer does",
        (
            f"the {kept} is published under a version with its base's digest, its plan and a data card",
            "the version before it can be taken again at once",
        ),
        (f"live {_METRICS[answer.task.kind]} stays within the held-out interval for a month, else back to quick validation",),
        (
            f"{'a whole model for each version: ' if whole else ''}"
            f"{answer.architecture.parameters * 2 / 1e9:.1f} GB to keep for each version"
            if whole
            else "the base is updated upstream: an adapter fits only the digest that it was trained on",
        ),
    )


def _exit(plan: Plan, task: Task) -> tuple[str, ...]:
    if plan.objective in ("dpo", "kto"):
        return (
            "the better answer of held-out pairs has the higher reward, above one half by more than its bootstrap interval",
            "held-out loss of the stage before has not risen by more than 5 %",
        )
    if plan.objective == "rl":
        return ("the reward rises and the KL divergence to the reference stays below 10 nats", "people prefer the answers too")
    beyond = "and the general probe loses no more than 2 %: nothing was forgotten" if plan.method in ON_THE_BASE else ""
    return (
        f"held-out {_METRICS[task.kind]} is better than after the quick validation by more than its bootstrap interval",
        *([beyond] if beyond else []),
        f"no gain over {plan.training.early_stopping_patience or 3} evaluations, or "
        f"{plan.training.num_train_epochs:g} passes are done",
    )


def _data_risks(task: Task) -> list[str]:
    told = []
    if task.rows < _FEW_ROWS:
        told.append(f"{task.rows} rows are few: figures on {max(20, round(0.1 * task.rows))} held-out rows are rough")
    if task.classes and task.rows / task.classes < 20:
        told.append(f"{task.rows / task.classes:.0f} rows for each of {task.classes} labels: rare ones may not be learnt")
    if task.similarity is not None and task.similarity < 0.5:
        told.append(f"the data is unlike what the base knows (similarity {task.similarity:.2f}): expect slow first steps")
    return told


def _plan_risks(plan: Plan, peak_bytes: int, answer: Answer) -> list[str]:
    told = []
    free = min((gpu.free_bytes for gpu in answer.hardware.gpus), default=answer.hardware.ram_free_bytes)
    if free and peak_bytes > _TIGHT * free:
        told.append(
            f"{peak_bytes / 1e9:.1f} of {free / 1e9:.1f} GB: little room; on out of memory climb down "
            f"({'; '.join(rung.change for rung in answer.selection.ladder[:3]) or 'nothing is left to climb down to'})"
        )
    if plan.method in COMPRESSED:
        told.append(f"whole weights train at {plan.training.learning_rate:g}: what the base knew may be forgotten")
    if plan.precision in QUANTISED:
        told.append(
            f"the base is in {plan.precision}: slower than 16 bits, and merged weights differ a little from what trained"
        )
    if plan.objective == "rl":
        told.append("the reward may be met without what was meant by it: read answers, not the curve")
    cut = answer.task.longest_row
    if cut > plan.data.max_length:
        told.append(f"rows beyond {plan.data.max_length} tokens are cut (the longest has {cut})")
    return told


def _needed(plan: Plan) -> str:
    return {"dpo": "preference pairs", "kto": "answers that were liked or not", "rl": "prompts and a reward"}.get(
        plan.objective, "rows"
    )


def _stage_name(plan: Plan) -> str:
    return {"sft": "instruction tuning", "dpo": "preferences (DPO)", "kto": "feedback (KTO)", "rl": "reinforcement"}.get(
        plan.objective, plan.objective
    )


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600
