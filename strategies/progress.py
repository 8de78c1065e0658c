"""Tells how a training goes: a line for a person, and the whole curve in a file that others can draw."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"
_SEEN = ("loss", "eval_loss", "reward")


def line(entry: Mapping[str, Any], steps: int) -> str:
    """What a person wants to see of one entry of a trainer's log: ``step 20/60 loss 1.23 rate 2.0e-04``; empty if nothing.

    Args:
        entry: As Hugging Face's trainers log it.
        steps: Optimizer steps in all.
    """
    found = [f"{name.replace('eval_', 'held-out ')} {entry[name]:.4g}" for name in _SEEN if name in entry]
    if not found:
        return ""
    if "learning_rate" in entry:
        found.append(f"rate {entry['learning_rate']:.1e}")
    return " ".join([f"step {entry['step']}/{steps}", *found])


def teller(folder: Path, *, aloud: bool) -> Any:
    """A callback that keeps the curve in ``FOLDER/history.jsonl`` while it grows.

    A line of the file is an entry of the trainer's log, in its own words (``step``, ``epoch``, ``loss``, ``learning_rate``,
    ``eval_loss`` …); a number that is none is null. What a training that goes on had logged before comes first.

    Args:
        folder: Where the file goes.
        aloud: Each entry is a line on standard error too.
    """
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.is_world_process_zero:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / HISTORY).write_text("".join(map(_entry, state.log_history)), encoding="utf-8")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.global_step in (1, state.max_steps):  # a short training has a curve too
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            entry = state.log_history[-1]
            if not state.is_world_process_zero or "train_runtime" in entry:
                return
            with (folder / HISTORY).open("a", encoding="utf-8") as file:
                file.write(_entry(entry))
            if aloud and (told := line(entry, state.max_steps)):
                _say(told)

    return Teller()


def bar() -> Any:
    """A progress bar on standard error, without what Hugging Face's writes beside it."""
    from transformers import ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """``teller`` tells it."""

    return Bar()


def _say(text: str) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.write(text, file=sys.stderr)  # goes around a bar, where there is one
    sys.stderr.flush()


def _entry(logged: Mapping[str, Any]) -> str:
    unrepeatable = ("runtime", "_per_second", "num_tokens")  # TRL counts tokens anew where a training goes on
    names = sorted(name for name in logged if not name.endswith(unrepeatable) and name != "step")
    return json.dumps({name: logged[name] if math.isfinite(logged[name]) else None for name in ("step", *names)}) + "\n"
