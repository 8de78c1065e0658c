"""The section of a plan that says where rows come from, how they are read, and what is done to them before training."""

from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from protocol.strict import Name, Strict


class DataSettings(Strict):
    """Where rows come from and how they are read. A coordinator's plan has no paths: each node brings its own."""

    train: Path | None = Field(None, description="JSON, JSONL, CSV or Parquet file")
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")
    evaluate_fraction: float = Field(0.1, gt=0, lt=1, description="share held out when there is no evaluate file")
    labels: tuple[Name, ...] | None = Field(None, description="classification: every label, in the order of the head's rows")
    max_length: PositiveInt = Field(512, description="tokens; longer rows are cut, and counted in the report")

    @model_validator(mode="after")
    def _labels(self) -> "DataSettings":
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels hold the same name twice")
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"labels hold {len(self.labels)} name(s); classification needs at least 2")
        return self
