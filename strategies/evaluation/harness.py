"""Tasks of EleutherAI's lm-evaluation-harness by name, on a model that is in memory (extra ``fedge[harness]``).

Most of its tasks fetch their rows from a hub when they are first run.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from protocol.errors import ConfigurationError


@dataclass(frozen=True)
class Score:
    """One metric of a task, with the harness's own standard error where it has one."""

    value: float
    stderr: float | None


def missing(tasks: Sequence[str], folder: Path | None = None) -> list[str]:
    """What stands in the way of running these tasks: a line for each problem.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: Holds tasks of one's own, as YAML.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return ["--harness needs lm-evaluation-harness, which is not installed; pip install 'fedge[harness]'"]
    known = _manager(folder).all_tasks
    return [
        f"--harness {task}: the harness knows no such task; lm-eval ls tasks shows those that it has"
        for task in tasks
        if task not in known
    ]


def scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, folder: Path | None = None
) -> dict[str, dict[str, Score]]:
    """Runs tasks as the harness defines them, with its own few-shot examples, prompts and seeds.

    Args:
        model: A decoder in evaluation mode, with or without an adapter.
        tokenizer: Of its base.
        tasks: Names of tasks, groups or tags.
        batch_size: Texts at a time.
        folder: Holds tasks of one's own, as YAML.

    Returns:
        Metrics by task; a metric has the name that the harness gives it, with its filter where it has one.

    Raises:
        ConfigurationError: The harness or a task is not there, or a task could not be run (its rows could not be fetched).
    """
    if problems := missing(tasks, folder):
        raise ConfigurationError("command line", problems)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    held = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    try:
        told = simple_evaluate(held, tasks=list(tasks), task_manager=_manager(folder), log_samples=False, bootstrap_iters=1000)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise ConfigurationError("--harness", [f"a task of {', '.join(tasks)} could not be run ({what})"]) from None
    return {task: dict(_metrics(found)) for task, found in (told or {"results": {}})["results"].items()}


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """From ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}``."""
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if name.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool) or not kind:
            continue
        error = found.get(f"{name}_stderr,{kind}")
        yield (
            name if kind == "none" else key,
            Score(float(value), float(error) if isinstance(error, int | float) else None),
        )


@lru_cache(maxsize=1)
def _manager(folder: Path | None) -> Any:
    """Looks through thousands of files, for seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)
