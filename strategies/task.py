"""What is to be learnt, from what data, for whom: the facts and wishes that the selection rules look at."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from protocol.strict import Strict

Kind = Literal["generation", "classification", "regression", "question-answering", "code", "pretraining"]
Feedback = Literal["none", "pairs", "single", "reward", "judge"]
# What a row is; ``strategies.data.facts`` finds out.
Shape = Literal["answers", "pairs", "single", "labels", "numbers", "texts", "prompts"]
_WITHOUT_ANSWERS = ("classification", "regression", "pretraining")
# Far beyond what there is: seconds and prices computed of them stay numbers.
_MOST = 10**12
Count = Annotated[PositiveInt, Field(le=_MOST)]
Amount = Annotated[PositiveFloat, Field(le=_MOST)]


class Task(Strict):
    """Facts of the data, measured where they can be (``strategies.data.facts``), and what the user wishes of the result.

    Numbers speak of the data and stay on this machine.
    """

    kind: Kind = Field("generation", description="what the model is to do")
    shape: Shape | None = Field(None, description="what most rows are, such as pairs; measured, None where no rows were")
    rows: Count = Field(1000, description="training rows")
    classes: Count | None = Field(None, description="classification: labels")
    input_tokens: Count = Field(256, description="length of a whole row, answer included: 95th percentile")
    longest_tokens: Count | None = Field(None, description="length of the longest row; without it input_tokens")
    median_tokens: Count | None = Field(None, description="length of a row, median; without it input_tokens")
    output_tokens: NonNegativeInt = Field(64, le=_MOST, description="length of an answer, 95th percentile")
    creative: bool = Field(False, description="many answers are good, and style matters")
    shift: Literal["small", "ordinary", "pretraining"] = Field(
        "ordinary", description="how far from the base: a style or format, an ordinary task, or much like its pre-training"
    )
    similarity: float | None = Field(None, ge=0, le=1, description="of the data to what the base was trained on")
    tasks: Count = Field(1, description="tasks learnt together")
    domains: Count = Field(1, description="domains served from one base")
    one_model: bool = Field(False, description="domains share one model of more capacity, and swap no adapters")
    feedback: Feedback = Field(
        "none", description="what says which answer is better: pairs, likes of single answers, a reward function, a judge model"
    )
    preference_pairs: NonNegativeInt = Field(0, le=_MOST, description="rows with a chosen and a rejected answer")
    private: bool = Field(False, description="the rows may not leave where they are")
    on_device: bool = Field(False, description="a phone or the like trains or runs the result")
    quality: Literal["draft", "balanced", "critical"] = "balanced"
    speed: Literal["fast", "balanced", "thorough"] = "balanced"
    expertise: Literal["beginner", "intermediate", "expert"] = "intermediate"
    situation: Literal["prototype", "production"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_feedback(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "feedback" in given or given.get("kind") in _WITHOUT_ANSWERS:
            return given
        pairs = given.get("preference_pairs")
        return given | {"feedback": "pairs"} if isinstance(pairs, int) and pairs > 0 else given

    @model_validator(mode="after")
    def _facts_that_go_together(self) -> "Task":
        wrong = []
        if self.kind == "classification" and self.classes is None:
            wrong.append("classes is missing; classification needs the number of labels")
        if self.kind != "classification" and self.classes is not None:
            wrong.append(f"classes is for kind classification, found {self.kind}")
        if self.classes == 1:
            wrong.append("classes is 1; expected at least 2")
        if self.kind in _WITHOUT_ANSWERS and self.feedback != "none":
            wrong.append(f"feedback {self.feedback} is about answers, which kind {self.kind} has none of; leave it out")
        if self.feedback == "pairs" and not self.preference_pairs:
            wrong.append("preference_pairs is 0; feedback pairs needs some")
        if self.one_model and self.domains == 1 and self.tasks == 1:
            wrong.append("one_model is about several domains; set domains, or leave it out")
        if self.longest_tokens is not None and self.longest_tokens < self.input_tokens:
            wrong.append(f"longest_tokens is {self.longest_tokens}, less than input_tokens {self.input_tokens}")
        if self.median_tokens is not None and self.median_tokens > self.input_tokens:
            wrong.append(
                f"median_tokens is {self.median_tokens}, more than input_tokens {self.input_tokens}, the 95th percentile"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def row_tokens(self) -> int:
        """Of a row: a length of answers that was said by itself, and is more than a row's, is of a row too."""
        said = self.answers and "output_tokens" in self.model_fields_set
        return max(self.input_tokens, self.output_tokens) if said else self.input_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, as far as it is known."""
        return max(self.longest_tokens or 0, self.row_tokens)

    @property
    def answers(self) -> bool:
        """Whether the model writes text (and not a label or a number)."""
        return self.kind not in ("classification", "regression")


class Limits(Strict):
    """What the institution, or the user, allows."""

    memory_margin: float = Field(0.1, ge=0, lt=1, description="share of the memory that stays free")
    hours: Amount | None = Field(None, description="longest training")
    money: Amount | None = Field(None, description="largest price, in the currency of the prices")
    gpu_hour: Amount | None = Field(None, description="price of one GPU for an hour")
    kwh: Amount | None = Field(None, description="price of a kilowatt-hour")
    max_rank: Count | None = Field(None, description="largest LoRA rank")

    @model_validator(mode="after")
    def _a_price_for_the_budget(self) -> "Limits":
        if self.money is not None and self.gpu_hour is None and self.kwh is None:
            raise ValueError("money needs a price: give gpu_hour, or kwh")
        return self
