"""The parts of a plan that say which rows train side by side, and how much of what the model knew may be lost over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from protocol.strict import Strict

# It stands in names of metrics.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]


class TaskFiles(Strict):
    """The rows of one task; the name of a file stands for its training rows."""

    train: Path
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")

    @model_validator(mode="before")
    @classmethod
    def _a_file(cls, given: Any) -> Any:
        return {"train": given} if isinstance(given, str | Path) else given

    def files(self) -> Iterator[tuple[str, Path]]:
        """Each file by its key."""
        yield "train", self.train
        if self.evaluate:
            yield "evaluate", self.evaluate

    def placed(self, place: Callable[[Path], Path]) -> "TaskFiles":
        """The same with every file where ``place`` says."""
        return TaskFiles(**{key: place(path) for key, path in self.files()})


class MixtureSettings(Strict):
    """Several tasks in one training, and general rows beside them."""

    tasks: dict[TaskName, TaskFiles] = Field({}, description="several tasks, each with its own rows; in place of train")
    temperature: PositiveFloat = Field(
        1.0, description="a task of n rows is drawn in proportion to n^(1/temperature): 1 by size, large evenly"
    )
    replay: Path | None = Field(None, description="general rows that train beside the others, so that they are not forgotten")
    replay_share: float = Field(0.2, gt=0, lt=1, description="replay: its share of all rows that train")

    def placed(self, place: Callable[[Path], Path]) -> Self:
        """The same with every file where ``place`` says."""
        tasks = {name: task.placed(place) for name, task in self.tasks.items()}
        return self.model_copy(update={"tasks": tasks, "replay": place(self.replay) if self.replay else None})


class ForgettingSettings(Strict):
    """A general probe that is measured while the model trains; training ends before it has lost too much there."""

    probe: Path | None = Field(None, description="rows of text, or questions with answers; they never train")
    max_rise: PositiveFloat = Field(0.1, description="nats per token that the probe's loss may rise above what it began with")
    every: PositiveInt = Field(50, description="optimizer steps between two looks; there is one more at the end")
