"""One fine-tuning on one machine in one YAML file: a plan, its data and where the result goes."""

from pathlib import Path

from pydantic import Field, model_validator

from protocol.plan import Plan
from strategies.data.formats import distinct_labels


class Job(Plan):
    """A plan with an output folder; its relative data paths are taken from the folder of its file (``beside``)."""

    output: Path = Field(Path("runs/train"), description="folder for the adapter, checkpoints and logs")

    @model_validator(mode="after")
    def _data_is_named(self) -> "Job":
        if self.data.train is None:
            raise ValueError("data.train is missing; name the file with the training rows")
        return self

    def beside(self, path: Path) -> "Job":
        """The same with data paths taken from the folder of the file that names them."""
        folder = path.resolve().parent
        found = {name: folder / value for name in ("train", "evaluate") if (value := getattr(self.data, name))}
        return self.model_copy(update={"data": self.data.model_copy(update=found)})

    def plan(self) -> Plan:
        """The plan alone, with every label listed (from the training rows where the file lists none)."""
        plan = Plan(**{name: getattr(self, name) for name in Plan.model_fields})
        if plan.objective != "classification" or plan.data.labels is not None or self.data.train is None:
            return plan
        return plan.model_copy(update={"data": plan.data.model_copy(update={"labels": distinct_labels(self.data.train)})})
