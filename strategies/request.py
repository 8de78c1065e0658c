"""What somebody asks of the planner: a base, data or facts about it, a machine, limits and wishes; and what is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, model_validator

from protocol.configuration import parse
from protocol.data_settings import located
from protocol.errors import ConfigurationError, DataError, FedgeError, shown
from protocol.plan import Plan
from protocol.strict import Strict
from strategies.architecture import Architecture, read
from strategies.base_model import find, tokenizer_of
from strategies.calibration import read_calibration
from strategies.hardware import Hardware, conflicts, override, probe
from strategies.remedies import remedies
from strategies.selector import Selection, select
from strategies.settings import nested, wished
from strategies.sizing import Calibrated
from strategies.task import Kind, Limits, Task


class Machine(Strict):
    """Another machine than this one."""

    profile: str | None = Field(None, description="a named machine, such as rtx-4090, a100-80gb, t4, laptop-cpu or phone")
    gpu_memory: str | None = Field(None, description="of each GPU, such as 24GB or 24GiB")
    gpus: int | None = Field(None, strict=True, description="how many; 0 for none")

    @model_validator(mode="after")
    def _possible(self) -> "Machine":
        if wrong := conflicts(**self.model_dump()):
            raise ValueError("\n".join(wrong))
        return self


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
        counted: A tokenizer counted the tokens; True where nothing was to be counted.
    """

    request: Request
    task: Task
    hardware: Hardware
    architecture: Architecture
    selection: Selection
    measured: tuple[str, ...]
    counted: bool = True

    @property
    def assumed(self) -> dict[str, Any]:
        """Facts that nobody gave and nothing was measured for, and that matter to every plan."""
        names = ("kind", "rows", "input_tokens", *(("output_tokens",) if self.task.answers else ()))
        return {name: getattr(self.task, name) for name in names if name not in self.task.model_fields_set}


def answer(request: Request, calibration: Calibrated | None = None) -> Answer:
    """Plans.

    Args:
        request: What is asked.
        calibration: Of this machine; without it the one that was kept, if there is one.

    Raises:
        ConfigurationError: Every problem of the request, all at once.
    """
    problems: list[str] = []
    task, measured, hardware, architecture = _parts(request, problems)
    if problems or task is None or hardware is None or architecture is None:
        raise ConfigurationError("plan", problems)
    described = any(value is not None for value in request.hardware.model_dump().values())
    known = calibration or (None if described else read_calibration())
    question = (task, hardware, architecture, request.limits, flat(request.wishes))
    found = select(*question, calibration=known)
    counted = not measured or tokenizer_of(request.base_model) is not None
    told = [*found.warnings, *remedies(*question, known, found), *_beside(found, described=described, counted=counted)]
    return Answer(
        request=request,
        task=task,
        hardware=hardware,
        architecture=architecture,
        selection=replace(found, warnings=tuple(told)),
        measured=tuple(measured),
        counted=counted,
    )


def _beside(found: Selection, *, described: bool, counted: bool) -> list[str]:
    """What to know of an answer that no rule or size says."""
    told = []
    if found.chosen is not None and found.chosen.seconds is None:
        way = "name a machine with --profile, whose rates are known" if described else "--calibrate measures this machine"
        told.append(f"to know how long it takes: {way}")
    if not counted:
        told.append(
            "the base's tokenizer is not here: lengths are guesses from bytes, without the words that its chat template adds; "
            "look at the cut-rows of fedge train"
        )
    return told


def decided(plan: Plan, reasons: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a plan, by dotted name, that have a reason or are not as they would be anyway."""
    every, own = flat(plan.model_dump(mode="json")), flat(plan.model_dump(mode="json", exclude_defaults=True))
    return {name: value for name, value in every.items() if name in own or name in reasons}


def job_of(plans: Sequence[Plan], reasons: Sequence[Mapping[str, str]], request: Request, output: Path) -> dict[str, Any]:
    """What ``fedge train`` takes: all that was decided, with a stage for each plan where there are several.

    Paths are written in full, so that the job trains from wherever it lies. A judge's stage reads other rows than the stage
    before it (prompts), and several tasks have files of their own: the data that was measured is not theirs.
    """
    base = Path(request.base_model).expanduser()
    named = str(base.resolve()) if base.is_dir() else request.base_model
    each = []
    for plan, why in zip(plans, reasons, strict=True):
        placed = plan.model_copy(update={"data": plan.data.placed(lambda path: located(Path.cwd(), path))})
        others = placed.data.tasks or (plan.ai_feedback and len(plans) > 1)
        rows = {"data.train": str(request.data.resolve())} if request.data and not others else {}
        each.append({"base_model": named, **rows, **decided(placed, why)})
    if len(each) == 1:
        return nested(each[0]) | {"output": str(output)}
    common = _common(each)
    own = [nested({name: value for name, value in one.items() if name not in common}) for one in each]
    return nested(common) | {"output": str(output), "stages": own}


def _common(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all stages say alike. It is read as a plan of its own too, so a section that is none in part stays with each."""
    missing = object()
    alike = {name: value for name, value in each[0].items() if all(one.get(name, missing) == value for one in each)}
    differing = {name.partition(".")[0] for one in each for name in one if name not in alike}
    whole = {name: value for name, value in alike.items() if name.partition(".")[0] not in differing}
    for common in (alike, whole):
        try:
            Plan.model_validate(nested(common))
        except ValidationError:
            continue
        return common
    return {}


# What a plan holds of free names, which may have dots.
_FREE = ("lora.rank_pattern", "lora.alpha_pattern", "data.tasks", "training.fsdp_config", "training.deepspeed")


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Mappings in mappings as dotted names; the inverse of ``settings.nested``."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and name not in _FREE else {name: value}
    return found


def asked(content: Mapping[str, Any], source: str, problems: Sequence[str] = ()) -> Request:
    """The request that a file and a command line make.

    Args:
        content: Of both.
        source: Where it was read.
        problems: Found before.

    Raises:
        ConfigurationError: All problems at once: those found before, and those of parts that are well-formed though others
            are not.
    """
    told = list(problems)
    try:
        request = parse(dict(content), Request, source=source)
        if not told:
            return request
    except ConfigurationError as error:
        told += error.problems
        wrong = {problem.partition(":")[0].partition(".")[0] for problem in error.problems}
        rest = {name: value for name, value in content.items() if name in Request.model_fields and name not in wrong}
        request = Request.model_validate(rest)
    _parts(request, told)
    raise ConfigurationError(source, told)


def _parts(request: Request, problems: list[str]) -> tuple[Task | None, Sequence[str], Hardware | None, Architecture | None]:
    """What a request speaks of, with the names of what was measured; ``problems`` gains those of each part."""
    wishes = flat(request.wishes)
    task, measured = _tried(problems, lambda: _task(request)) or (None, ())
    hardware = _tried(problems, lambda: _hardware(request))
    architecture = _tried(problems, lambda: read(request.base_model))
    targets = wishes.get("lora.target_modules")
    if architecture and isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        _tried(problems, lambda: architecture.targets(targets))
    _tried(problems, lambda: wished(wishes, task, request.limits))
    return task, measured, hardware, architecture


def _task(request: Request) -> tuple[Task, list[str]]:
    """The task as it was given, with what the data says about the rest."""
    given = dict(request.task)
    if request.data is None:
        return parse(given, Task, source="task"), []
    from strategies.data.facts import facts

    base = find(request.base_model) if request.read_by_base else None
    try:
        known = facts(
            request.data, tokenizer=tokenizer_of(request.base_model), base=base, compared=0
        )  # no rule asks for near duplicates
    except DataError as error:
        raise ConfigurationError("task", [*_of_each(given), f"data: {error}"]) from None
    kind, classes = given.get("kind"), given.get("classes")
    found = {name: value for name, value in known.of_task(kind).items() if name not in given}
    meant = kind or found.get("kind", "generation")
    chosen = "objective" in flat(request.wishes)  # which says what is made of the rows, whatever they are
    wrong = [] if chosen or meant not in get_args(Kind) else known.against(meant, classes if isinstance(classes, int) else None)
    if wrong:
        raise ConfigurationError("task", [*_of_each(given), *wrong])
    return parse({**found, **given}, Task, source="task"), sorted(found)


def _of_each(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with facts one by one; whether they go together is not known without those that are to be measured."""
    try:
        parse(dict(given), Task, source="task")
    except ConfigurationError as error:
        return [problem for problem in error.problems if not problem.startswith("(whole file)")]
    return []


def _hardware(request: Request) -> Hardware:
    wanted = request.hardware
    return override(probe(), profile=wanted.profile, gpu_memory=wanted.gpu_memory, gpus=wanted.gpus)


def _tried(problems: list[str], make: Any) -> Any:
    """What is made, or None with its problems noted: all of a request's are told at once."""
    try:
        return make()
    except ConfigurationError as error:
        problems += [f"{error.source}: {problem.removeprefix('(whole file): ')}" for problem in error.problems]
    except FedgeError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(shown(str(error)))
    return None
