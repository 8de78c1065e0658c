"""What a coordinator publishes: the plan that it wishes and how the rounds run."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from protocol.codec import WireFormat
from protocol.plan import Name, Plan, Strict


class RoundSettings(Strict):
    """How many rounds, with whom, and what the server does with updates."""

    count: PositiveInt = Field(5, description="rounds")
    rank_cap: PositiveInt = Field(64, description="largest rank of the global adapter")
    server_learning_rate: PositiveFloat = Field(1.0, description="factor on the merged innovation")
    minimum_nodes: PositiveInt = Field(1, description="a round with fewer updates than this fails")
    wire: WireFormat = Field("fp32", description="numbers on the wire, both ways")
    timeout_seconds: PositiveFloat = Field(3600.0, description="longest wait for the replies of one round")
    join_seconds: PositiveFloat = Field(600.0, description="longest wait for minimum_nodes to connect")
    evaluate_every: NonNegativeInt = Field(1, description="rounds between evaluations through the nodes; 0 = only at the end")


class Federation(Strict):
    """One federation, as its coordinator writes it."""

    name: Name = "federation"
    plan: Plan = Plan()
    rounds: RoundSettings = RoundSettings()
    output: Path = Field(Path("runs/federation"), description="folder that keeps every round")

    @model_validator(mode="after")
    def _a_plan_that_can_be_published(self) -> "Federation":
        if self.plan.data.train or self.plan.data.evaluate:
            raise ValueError("plan.data names files; each node brings its own data, so leave train and evaluate out")
        if self.plan.objective == "classification" and self.plan.data.labels is None:
            raise ValueError("plan.data.labels is missing; nodes must agree on every label and its row in the head")
        return self
