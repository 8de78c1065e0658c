"""One fine-tuning on one machine in one YAML file: a plan, its data and where the result goes."""

from pathlib import Path

from pydantic import Field, model_validator

from protocol.plan import Plan
from strategies.data.formats import distinct_labels


class Job(Plan):
    """A plan with an output folder; its relative data paths are taken from the folder of its file (``beside``)."""

    output: Path = Field(Path("runs/train"), description="folder for the adapter, checkpoints and logs")
    start: Path | None = Field(None, description="adapter folder to go on from")

    @model_validator(mode="after")
    def _data_is_named(self) -> "Job":
        if self.data.train is None:
            raise ValueError("data.train is missing; name the file with the training rows")
        return self

    def beside(self, path: Path) -> "Job":
        """The same with paths taken from the folder of the file that names them; a reward model may have a hub name instead."""
        folder = path.resolve().parent
        found = {name: folder / value for name in ("train", "evaluate") if (value := getattr(self.data, name))}
        start = folder / self.start if self.start else None
        rl = self.rl
        if rl.reward_model and (folder / rl.reward_model).is_dir():
            rl = rl.model_copy(update={"reward_model": str(folder / rl.reward_model)})
        return self.model_copy(update={"data": self.data.model_copy(update=found), "start": start, "rl": rl})

    def plan(self) -> Plan:
        """The plan alone, with every label listed (from the training rows where the file lists none)."""
        plan = Plan(**{name: getattr(self, name) for name in Plan.model_fields})
        if plan.objective != "classification" or plan.data.labels is not None or self.data.train is None:
            return plan
        return plan.model_copy(update={"data": plan.data.model_copy(update={"labels": distinct_labels(self.data.train)})})
