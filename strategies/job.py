"""One fine-tuning on one machine in one YAML file: a plan or several stages, their data and where the results go."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from protocol.data_settings import located
from protocol.plan import LOW_RANK, Plan, alike
from protocol.writer_settings import beside
from strategies.aliases import respelt
from strategies.base_model import EMBEDDED
from strategies.data.formats import distinct_labels

# Stands for the adapter of the job's own reward stage.
REWARD_STAGE = "stage:reward"


class Job(Plan):
    """A plan with an output folder; its relative data paths are taken from the folder of its file (``beside``).

    With stages, the rest of the plan is what they have in common: each says what it has of its own, and that is laid over it.
    """

    output: Path = Field(Path("runs/train"), description="folder for the adapter, checkpoints and logs")
    start: Path | None = Field(None, description="adapter folder to go on from")
    stages: tuple[Plan, ...] = Field((), description="plans one after the other, each laid over the rest of this one")

    @classmethod
    def respelt(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A file's content in a plan's own words, with every stage in full, and what is wrong with its words."""
        found, problems = respelt(content)
        stages = found.get("stages")
        if isinstance(stages, list):
            for number, stage in enumerate(stages):
                if isinstance(stage, dict):
                    stages[number], more = respelt(stage, f"stages.{number}.")
                    problems += more
        return _in_full(found), problems

    @model_validator(mode="before")
    @classmethod
    def _overlaid(cls, content: Any) -> Any:
        return _in_full(content) if isinstance(content, dict) else content

    def conflicts(self) -> Iterator[str]:
        """What does not go together in the plan, and between its stages."""
        yield from super().conflicts()
        if not self.stages and not self.data.train and not self.data.tasks:
            yield "data.train is missing; name the file with the training rows"
        if len(self.stages) > 1 and any(stage.training.example_privacy for stage in self.stages):
            yield "training.example_privacy beside stages: what one keeps of a row, another may tell; make each a job"
        for number, stage in enumerate(self.stages):
            if not stage.data.train and not stage.data.tasks:
                yield f"stages.{number}.data.train is missing; name the file with the training rows"
            if (before := self._before(number)) is not None:
                yield from _breaks(number, stage, before, self.stages[before])
            if stage.rl.reward_model == REWARD_STAGE and self._reward_before(number) is None:
                yield f"stages.{number}.rl.reward_model names the reward stage, and there is none before it; add one"
        if self.rl.reward_model == REWARD_STAGE and not self.stages:
            yield "rl.reward_model names the reward stage, and the job has no stages; name a reward adapter's folder"

    def beside(self, path: Path) -> "Job":
        """The same with paths taken from the folder of the file that names them; a reward model may have a hub name instead."""
        folder = path.resolve().parent
        stages = tuple(_placed(stage, folder) for stage in self.stages)
        start = folder / self.start if self.start else None
        return _placed(self, folder).model_copy(update={"start": start, "stages": stages})

    def jobs(self) -> tuple["Job", ...]:
        """A job for each stage, in order; the job itself where it has none.

        A stage that answers goes on from the adapter of the last one before it that does; one that scores begins afresh. The
        result of stage 2, objective dpo, goes to ``OUTPUT/2-dpo``.
        """
        if not self.stages:
            return (self,)
        return tuple(self._job(number) for number in range(len(self.stages)))

    def plan(self) -> Plan:
        """The plan alone, the last one of several, with every label listed (from the rows where the file lists none)."""
        last = self.jobs()[-1]
        plan = Plan(**{name: getattr(last, name) for name in Plan.model_fields})
        if plan.objective != "classification" or plan.data.labels is not None or last.data.train is None:
            return plan
        labels = distinct_labels(last.data.train, skip=last.data.on_bad_rows == "skip", columns=last.data.columns)
        return plan.model_copy(update={"data": plan.data.model_copy(update={"labels": labels})})

    def _job(self, number: int) -> "Job":
        stage = self.stages[number]
        own = {name: getattr(stage, name) for name in Plan.model_fields}
        before = self._before(number)
        start = self._folder(before) / "adapter" if before is not None else self.start if number == 0 else None
        if stage.rl.reward_model == REWARD_STAGE and (reward := self._reward_before(number)) is not None:
            own["rl"] = stage.rl.model_copy(update={"reward_model": str(self._folder(reward) / "adapter")})
        return Job(**own, output=self._folder(number), start=start)

    def _folder(self, number: int) -> Path:
        return self.output / f"{number + 1}-{self.stages[number].objective}"

    def _before(self, number: int) -> int | None:
        """The stage from whose adapter another goes on."""
        answering = [at for at in range(number) if self.stages[at].task_type == "CAUSAL_LM"]
        return answering[-1] if answering and self.stages[number].task_type == "CAUSAL_LM" else None

    def _reward_before(self, number: int) -> int | None:
        return next((at for at in reversed(range(number)) if self.stages[at].objective == "reward"), None)


def _in_full(content: dict[str, Any]) -> dict[str, Any]:
    stages = content.get("stages")
    if not isinstance(stages, list | tuple):
        return content
    common = {name: value for name, value in content.items() if name in Plan.model_fields}
    return content | {"stages": [_laid_over(common, stage) if isinstance(stage, Mapping) else stage for stage in stages]}


def _laid_over(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(common) | dict(own)
    for key in common.keys() & own.keys():
        if isinstance(common[key], Mapping) and isinstance(own[key], Mapping):
            both[key] = _laid_over(common[key], own[key])
    return both


def _breaks(number: int, stage: Plan, before: int, earlier: Plan) -> Iterator[str]:
    """Why a stage cannot go on from another's adapter."""
    if stage.base_model != earlier.base_model:
        yield f"stages.{number}.base_model is another than that of stage {before}, from whose adapter it goes on"
    if stage.method not in alike(earlier.method):
        yield (
            f"stages.{number}.method is {stage.method}, and the adapter of stage {before}, from which it goes on, is "
            f"{earlier.method}'s; take {' or '.join(alike(earlier.method))}"
        )
    elif stage.method in LOW_RANK and stage.lora.target_modules != earlier.lora.target_modules:
        yield f"stages.{number}.lora.target_modules are others than those of stage {before}, from whose adapter it goes on"


P = TypeVar("P", bound=Plan)


def _placed(plan: P, folder: Path) -> P:
    rl, training = plan.rl, plan.training
    if rl.reward_model and (folder / rl.reward_model).is_dir():
        rl = rl.model_copy(update={"reward_model": str(folder / rl.reward_model)})
    if isinstance(training.deepspeed, Path):
        training = training.model_copy(update={"deepspeed": folder / training.deepspeed})
    guard = plan.forgetting
    if guard is not None and guard.probe:
        guard = guard.model_copy(update={"probe": located(folder, guard.probe)})
    mixed = plan.xlora.model_copy(update={"adapters": tuple(str(folder / name) for name in plan.xlora.adapters)})
    changes: dict[str, Any] = {
        "data": plan.data.beside(folder),
        "rl": rl,
        "training": training,
        "forgetting": guard,
        "xlora": mixed,
    }
    base = folder / plan.base_model
    if base.is_dir() and plan.base_model != EMBEDDED:
        changes["base_model"] = str(base)
    placed = plan.model_copy(update=changes)
    return beside(placed, folder)
