"""What somebody asks of the planner: a base, data or facts about it, a machine, limits and wishes; and what is made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from protocol.configuration import parse
from protocol.errors import ConfigurationError, FedgeError
from protocol.plan import Plan
from protocol.strict import Strict
from strategies.architecture import Architecture, read
from strategies.base_model import find
from strategies.calibration import read_calibration
from strategies.hardware import Hardware, override, probe
from strategies.selector import Selection, select
from strategies.settings import nested, wished
from strategies.sizing import Calibrated
from strategies.task import Limits, Task


class Machine(Strict):
    """Another machine than this one."""

    profile: str | None = Field(None, description="a named machine, such as rtx-4090, a100-80gb, t4, laptop-cpu or phone")
    gpu_memory: str | None = Field(None, description="of each GPU, such as 24GB or 24GiB")
    gpus: int | None = Field(None, description="how many; 0 for none")


class Request(Strict):
    """One question to the planner, as YAML."""

    base_model: str = Field("tiny", description="hub name, local folder, config.json, installed package, or 'tiny' (embedded)")
    data: Path | None = Field(None, description="training rows; facts that the task does not name are measured on them")
    read_by_base: bool = Field(False, description="load the base and measure how near the rows are to what it knows")
    task: dict[str, Any] = Field({}, description="facts and wishes; see docs/planning.md")
    limits: Limits = Limits()
    hardware: Machine = Machine()
    wishes: dict[str, Any] = Field({}, description="fields of the plan that must be as given")


class Answer(Strict, arbitrary_types_allowed=True):
    """What was asked, in full, and what was found.

    Attributes:
        request: As it was asked.
        task: With what was measured.
        hardware: Found, or described.
        architecture: Of the base.
        selection: The answer.
        measured: Fields of the task that come from the data.
    """

    request: Request
    task: Task
    hardware: Hardware
    architecture: Architecture
    selection: Selection
    measured: tuple[str, ...]


def answer(request: Request, calibration: Calibrated | None = None) -> Answer:
    """Plans.

    Args:
        request: What is asked.
        calibration: Of this machine; without it the one that was kept, if there is one.

    Raises:
        ConfigurationError: Every problem of the request, all at once.
    """
    problems: list[str] = []
    wishes = flat(request.wishes)
    task, measured = _tried(problems, lambda: _task(request)) or (None, ())
    hardware = _tried(problems, lambda: _hardware(request))
    architecture = _tried(problems, lambda: read(request.base_model))
    _tried(problems, lambda: wished(wishes))
    if problems or task is None or hardware is None or architecture is None:
        raise ConfigurationError("plan", problems)
    described = any(value is not None for value in request.hardware.model_dump().values())
    known = calibration or (None if described else read_calibration())
    found = select(task, hardware, architecture, request.limits, wishes, calibration=known)
    return Answer(
        request=request, task=task, hardware=hardware, architecture=architecture, selection=found, measured=tuple(measured)
    )


def decided(plan: Plan, reasons: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a plan, by dotted name, that have a reason or are not as they would be anyway."""
    every, own = flat(plan.model_dump(mode="json")), flat(plan.model_dump(mode="json", exclude_defaults=True))
    return {name: value for name, value in every.items() if name in own or name in reasons}


def job_of(plan: Plan, reasons: Mapping[str, str], request: Request, output: Path, start: Path | None = None) -> dict[str, Any]:
    """What ``fedge train`` takes: all that was decided."""
    content = {"base_model": request.base_model, **nested(decided(plan, reasons)), "output": str(output)}
    if request.data:
        content["data"] = {"train": str(request.data.resolve()), **content.get("data", {})}
    return content | ({"start": str(start)} if start else {})


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Mappings in mappings as dotted names; the inverse of ``settings.nested``."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def problems_of(content: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the parts of a request, also where it is none as a whole."""
    problems: list[str] = []
    parts: list[tuple[str, Any]] = [("task", Task), ("limits", Limits), ("hardware", Machine)]
    for name, model in parts:
        if (found := content.get(name)) is not None and not (name == "task" and content.get("data")):
            _tried(problems, lambda found=found, model=model, name=name: parse(found, model, source=name))
    machine = _tried([], lambda: parse(content.get("hardware") or {}, Machine, source="hardware"))
    if machine:
        _tried(problems, lambda: override(probe(), **machine.model_dump()))
    if isinstance(base := content.get("base_model", "tiny"), str):
        _tried(problems, lambda: read(base))
    if isinstance(wishes := content.get("wishes") or {}, Mapping):
        _tried(problems, lambda: wished(flat(wishes)))
    problems += [
        f"{name}: unknown key; known here: {', '.join(Request.model_fields)}" for name in content.keys() - Request.model_fields
    ]
    return problems


def _task(request: Request) -> tuple[Task, list[str]]:
    """The task as it was given, with what the data says about the rest."""
    given = dict(request.task)
    if request.data is None:
        return parse(given, Task, source="task"), []
    from strategies.data.facts import facts

    base = find(request.base_model) if request.read_by_base else None
    known = facts(request.data, base=base).of_task(given.get("kind"))
    found = {name: value for name, value in known.items() if name not in given}
    return parse({**found, **given}, Task, source="task"), sorted(found)


def _hardware(request: Request) -> Hardware:
    wanted = request.hardware
    return override(probe(), profile=wanted.profile, gpu_memory=wanted.gpu_memory, gpus=wanted.gpus)


def _tried(problems: list[str], make: Any) -> Any:
    """What is made, or None with its problems noted: all of a request's are told at once."""
    try:
        return make()
    except ConfigurationError as error:
        problems += [f"{error.source}: {problem}" for problem in error.problems]
    except FedgeError as error:
        problems.append(str(error))
    return None
