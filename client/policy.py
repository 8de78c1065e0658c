"""What this institution allows, in a file of its own: looked at before any model is loaded, whatever a coordinator asks.

A policy says what may be asked. What is asked within it, this node still makes smaller where its machine or its settings say so
(``client.node``, ``strategies.narrowing``); what a plan may name of this machine's is listed there too (``client.allowed``).
A rule that is left out allows everything. Of a refusal only the names of the rules leave (``protocol.policy_rules``).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, field_validator, model_validator

from client.allowed import used
from client.memory import Memory
from protocol.configuration import load
from protocol.data_settings import EVERY_KIND, MaskKind
from protocol.errors import PolicyError, shown
from protocol.federation import MOST_NODES
from protocol.plan import COMPRESSED, LOW_RANK, ON_THE_BASE, QUANTISED, Method, Objective, Plan, Precision
from protocol.policy_rules import RULES
from protocol.records import Call
from protocol.secure_sum.stages import MOST_SUMMED
from protocol.secure_sum.terms import FEWEST_NODES
from protocol.strict import Name, Strict
from protocol.update import Update

Kind = Literal["join", "train", "evaluate"]
_Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[_Day, ...] = get_args(_Day)
_MINUTES = 24 * 60
_Fingerprint = Annotated[str, StringConstraints(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
_Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_HOURS = re.compile(r"([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)")
_MEMORY = "policy day"


def _of(rule: str, default: Any = None, **bounds: Any) -> Any:
    return Field(default, description=RULES[rule], **bounds)


_Names = Annotated[tuple[Name, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Question:
    """What somebody asks of this node, as far as a policy looks at it.

    Attributes:
        kind: To join, to train, or to measure.
        call: As it came.
        plan: The one of the adapter that this node trains.
        masked: Kinds of personal data that would be masked: what plan and ``data_policy`` say together.
        coordinator: Fingerprint of the key that signed the message; empty where none did.
    """

    kind: Kind
    call: Call
    plan: Plan
    masked: tuple[MaskKind, ...]
    coordinator: str = ""


@dataclass(frozen=True)
class Refusal:
    """One rule that does not allow what was asked."""

    rule: str
    asked: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.rule}: asked for {self.asked}, allowed {self.allowed}"


class Policy(Strict):
    """What one institution allows. Each key is a rule, in the order in which they are looked at."""

    federations: _Names | None = _of("federations")
    coordinators: Annotated[tuple[_Fingerprint, ...], Field(min_length=1)] | None = _of("coordinators")
    base_models: _Names | None = _of("base_models")
    base_digests: Annotated[tuple[_Digest, ...], Field(min_length=1)] | None = _of("base_digests")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] | None = _of("objectives")
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] | None = _of("methods")
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] | None = _of("precisions")
    rank: PositiveInt | None = _of("rank")
    rounds: PositiveInt | None = _of("rounds")
    local_steps: PositiveInt | None = _of("local_steps")
    epochs: PositiveFloat | None = _of("epochs")
    learning_rate: PositiveFloat | None = _of("learning_rate")
    max_length: PositiveInt | None = _of("max_length")
    masking: tuple[MaskKind, ...] = _of("masking", ())
    reward_functions: bool = _of("reward_functions", True)
    endpoints: bool = _of("endpoints", True)
    whole_model: bool = _of("whole_model", True)
    minimum_nodes: PositiveInt | None = _of("minimum_nodes", le=MOST_NODES)
    secure_sum: bool = _of("secure_sum", False)
    fewest_summed: PositiveInt | None = _of("fewest_summed", ge=FEWEST_NODES)
    epsilon: PositiveFloat | None = _of("epsilon")
    delta: PositiveFloat | None = _of("delta", lt=1)
    noise: Literal["nodes"] | None = _of("noise")
    example_epsilon: PositiveFloat | None = _of("example_epsilon")
    example_delta: PositiveFloat | None = _of("example_delta", lt=1)
    time_zone: Name | None = Field(None, description="where its days and hours are counted, such as Europe/Zurich")
    days: Annotated[tuple[_Day, ...], Field(min_length=1)] | None = _of("days")
    quiet_hours: tuple[Name, ...] = _of("quiet_hours", ())
    rounds_per_day: PositiveInt | None = _of("rounds_per_day")
    evaluate: bool = _of("evaluate", True)
    upload_bytes: PositiveInt | None = _of("upload_bytes")
    metrics: dict[Name, PositiveFloat] | None = Field(
        None, description="metrics that may leave, by name, each rounded to a multiple of its number; {} = none"
    )
    measured_rows: PositiveInt | None = Field(
        None, description="metrics of fewer rows do not leave; a loss on one row tells of it"
    )
    examples: PositiveInt | None = Field(None, description="counts of rows leave as multiples of it")

    @field_validator("masking", mode="before")
    @classmethod
    def _every(cls, kinds: Any) -> Any:
        return EVERY_KIND if kinds == "all" else kinds

    @field_validator("time_zone")
    @classmethod
    def _known(cls, zone: str | None) -> str | None:
        try:
            return zone and ZoneInfo(zone).key
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no time zone of this machine's database; expected a name such as Europe/Zurich") from None

    @field_validator("quiet_hours")
    @classmethod
    def _readable(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [hours for hours in found if not _HOURS.fullmatch(hours)]:
            raise ValueError(f"found {', '.join(wrong)}; expected two times of a day such as 22:00-06:00")
        return found

    @model_validator(mode="after")
    def _without_contradictions(self) -> "Policy":
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        for name, value in self:
            if isinstance(value, tuple) and (twice := sorted({str(each) for each in value if value.count(each) > 1})):
                yield f"{name}: {', '.join(twice)} stands twice; write it once"
        yield from self._methods_that_no_plan_has()
        yield from self._sums_that_cannot_be()
        for epsilon, delta in (("epsilon", "delta"), ("example_epsilon", "example_delta")):
            if (getattr(self, epsilon) is None) != (getattr(self, delta) is None):
                yield f"{epsilon} and {delta} are one promise; give both or neither"
        yield from self._hours_that_leave_some()

    def _methods_that_no_plan_has(self) -> Iterator[str]:
        methods, precisions = self.methods or (), self.precisions or get_args(Precision)
        if "qlora" in methods and not set(precisions) & set(QUANTISED):
            yield f"methods: qlora needs precision {' or '.join(QUANTISED)}, and precisions lists neither; add one of them"
        plain = [method for method in methods if method in ("lora", *ON_THE_BASE)]
        if plain and set(precisions) <= set(QUANTISED):
            yield (
                f"methods: {', '.join(plain)} needs a base of fp32, bf16 or fp16, and precisions lists none of them; add one"
            )
        if not self.whole_model and (base := [method for method in methods if method in ON_THE_BASE]):
            yield f"methods: lists {', '.join(base)}, which whole_model: false refuses; leave out one of the two"

    def _sums_that_cannot_be(self) -> Iterator[str]:
        if self.noise and not self.secure_sum:
            yield "noise: nodes share it out inside a secure sum, and secure_sum is false; set secure_sum: true"
        if self.noise and self.epsilon is None:
            yield "noise: says who keeps the promise of epsilon, and epsilon is missing; give epsilon and delta"
        for name in ("minimum_nodes", "fewest_summed"):
            if self.secure_sum and (getattr(self, name) or 0) > MOST_SUMMED:
                yield f"{name}: found {getattr(self, name)}, and a secure sum has at most {MOST_SUMMED} nodes; lower it"
        if self.secure_sum and not self.evaluate and (self.metrics or self.measured_rows or self.examples):
            yield (
                "metrics, measured_rows, examples: nothing measured leaves beside a secure sum, and evaluate is false; leave "
                "them out, or let it measure"
            )
        if self.secure_sum and self.minimum_nodes and (self.fewest_summed or 0) > self.minimum_nodes:
            yield (
                f"fewest_summed: found {self.fewest_summed}, and minimum_nodes allows federations that go on with "
                f"{self.minimum_nodes}; raise minimum_nodes to it"
            )

    def _hours_that_leave_some(self) -> Iterator[str]:
        timed = [name for name in ("days", "quiet_hours", "rounds_per_day") if getattr(self, name)]
        if timed and self.time_zone is None:
            yield f"time_zone: missing, and {timed[0]} is counted somewhere; name a place such as Europe/Zurich"
        if self.time_zone and not timed:
            yield "time_zone: nothing here is counted in days or hours; leave it out"
        quiet = [_minutes(hours) for hours in self.quiet_hours]
        for hours, (begin, end) in zip(self.quiet_hours, quiet, strict=True):
            if begin == end:
                yield f"quiet_hours: {hours} ends as it begins; write 00:00-24:00 for a day, or leave it out"
        if quiet and all(any(_within(minute, hours) for hours in quiet) for minute in range(_MINUTES)):
            yield "quiet_hours: cover the whole day, so that it never trains; leave an hour open"

    # What may be asked --------------------------------------------------------------------------------------------------

    def check(self, question: Question, now: datetime, begun: int, base_digest: Callable[[], str]) -> None:
        """Makes sure that every rule allows what is asked.

        Args:
            question: What is asked.
            now: A moment, with a time zone.
            begun: Trainings that were begun on this day.
            base_digest: Of the base on this machine. Not called where another rule refuses, or none looks at it.

        Raises:
            PolicyError: Every rule that does not, but ``base_digests`` only where all others do.
        """
        found = [*self.refusals(question), *self._when(question, now, begun)]
        if not found and self.base_digests and (digest := base_digest()) not in self.base_digests:
            found = [Refusal("base_digests", digest[:16], _listed(each[:16] for each in self.base_digests))]
        _raise(found)

    def refusals(self, question: Question) -> list[Refusal]:
        """The rules, whatever the hour and the base here, that do not allow what is asked."""
        asked_of = self._who(question), self._what(question), self._rows(question), self._privacy(question)
        return [refusal for part in asked_of for refusal in part]

    def check_stage(self, federation: str, coordinator: str) -> None:
        """Makes sure that who goes on with a secure sum may; what was to be trained for it has been looked at.

        Raises:
            PolicyError: The rules that do not allow it.
        """
        _raise(self._asker(federation, coordinator))

    def check_upload(self, size: int) -> None:
        """Makes sure that an answer is not too large to leave.

        Raises:
            PolicyError: It holds more bytes of arrays.
        """
        _raise(_at_most("upload_bytes", size, self.upload_bytes))

    def _asker(self, federation: str, coordinator: str) -> Iterator[Refusal]:
        yield from _one_of("federations", federation, self.federations)
        yield from _one_of("coordinators", coordinator or "nobody who signs", self.coordinators)

    def _who(self, question: Question) -> Iterator[Refusal]:
        yield from self._asker(question.call.federation, question.coordinator)

    def _what(self, question: Question) -> Iterator[Refusal]:
        call, plan = question.call, question.plan
        yield from _one_of("base_models", plan.base_model, self.base_models)
        if call.manifest and self.base_digests:
            yield from _one_of("base_digests", call.manifest.base_digest, self.base_digests)
        yield from _one_of("objectives", plan.objective, self.objectives)
        yield from _one_of("methods", plan.method, self.methods)
        yield from _one_of("precisions", plan.precision, self.precisions)
        if plan.method in (*LOW_RANK, *COMPRESSED):  # others have none
            yield from _at_most("rank", max(plan.update_rank, call.r), self.rank)
        yield from _at_most("rounds", max(call.rounds, call.round), self.rounds)
        yield from self._work(plan)
        yield from _at_most("learning_rate", max(plan.training.learning_rate, plan.head.learning_rate or 0), self.learning_rate)
        if not self.whole_model and (asked := _of_the_base(plan)):
            yield Refusal("whole_model", asked, "only what trains beside the base")

    def _work(self, plan: Plan) -> Iterator[Refusal]:
        steps, epochs = plan.training.max_steps, plan.training.num_train_epochs
        if self.local_steps is None and self.epochs is None:
            return
        if steps is not None and self.local_steps is None:
            yield Refusal("epochs", f"{steps} steps", f"plans that count epochs, {self.epochs:g} at most")
        elif steps is not None:
            yield from _at_most("local_steps", steps, self.local_steps)
        elif self.epochs is None:
            yield Refusal("local_steps", f"{epochs:g} epochs", f"plans that count steps, {self.local_steps} at most")
        else:
            yield from _at_most("epochs", epochs, self.epochs)

    def _rows(self, question: Question) -> Iterator[Refusal]:
        plan, named = question.plan, used(question.plan)
        yield from _at_most("max_length", plan.data.max_length, self.max_length)
        if bare := [kind for kind in self.masking if kind not in question.masked]:
            more = f" and {len(bare) - 5} kinds more" if len(bare) > 5 else ""
            yield Refusal("masking", f"rows with {_listed(bare[:5])}{more} as they are", "masked ones")
        for rule in ("reward_functions", "endpoints"):
            if named[rule] and not getattr(self, rule):
                yield Refusal(rule, _listed(named[rule]), "none")

    def _privacy(self, question: Question) -> Iterator[Refusal]:
        call = question.call
        yield from _at_least("minimum_nodes", call.minimum_nodes, self.minimum_nodes)
        if question.kind == "evaluate":
            if not self.evaluate:
                yield Refusal("evaluate", "metrics of its held-out rows", "none")
            return
        summed = call.summed or call.secure_sum is not None if question.kind == "join" else call.secure_sum is not None
        if self.secure_sum and not summed:
            yield Refusal("secure_sum", "an update of its own", "sums of updates")
        if summed:
            among = len(set(call.secure_sum.nodes)) if call.secure_sum else call.minimum_nodes
            yield from _at_least("fewest_summed", among, self.fewest_summed)
        yield from self._promises(question)

    def _promises(self, question: Question) -> Iterator[Refusal]:
        promised = question.call.privacy
        if self.epsilon and self.delta:
            if promised is None:
                yield Refusal("epsilon", "updates without differential privacy", f"epsilon {self.epsilon:g} at most")
            else:
                yield from _at_most("epsilon", promised.epsilon, self.epsilon)
                yield from _at_most("delta", promised.delta, self.delta)
                yield from _one_of("noise", promised.noise, self.noise and (self.noise,))
        own = question.plan.training.example_privacy
        if self.example_epsilon and self.example_delta:
            if own is None:
                yield Refusal("example_epsilon", "training without noise", f"epsilon {self.example_epsilon:g} at most")
            else:
                yield from _at_most("example_epsilon", own.epsilon, self.example_epsilon)
                yield from _at_most("example_delta", own.delta, self.example_delta)

    # When ---------------------------------------------------------------------------------------------------------------

    def _when(self, question: Question, now: datetime, begun: int) -> Iterator[Refusal]:
        """An offer may be made at any time."""
        if question.kind == "join" or self.time_zone is None:
            return
        here = now.astimezone(ZoneInfo(self.time_zone))
        if self.days and (day := _DAYS[here.weekday()]) not in self.days:
            yield Refusal("days", f"work on {day}", _listed(self.days))
        minute = here.hour * 60 + here.minute
        if quiet := [hours for hours in self.quiet_hours if _within(minute, _minutes(hours))]:
            yield Refusal("quiet_hours", f"work at {here:%H:%M}", f"none from {_listed(quiet)} ({self.time_zone})")
        if question.kind == "train":
            yield from _at_most("rounds_per_day", begun + 1, self.rounds_per_day)

    def begun(self, memory: Memory, now: datetime) -> int:
        """Trainings of this day so far, of all federations: ``memory`` is none of theirs."""
        kept = memory.read(_MEMORY)
        return int(kept["day"][1]) if kept and kept["day"][0] == self._day(now) else 0

    def note(self, memory: Memory, now: datetime) -> None:
        """Counts a training."""
        if self.rounds_per_day:
            memory.keep(_MEMORY, {"day": np.array([self._day(now), self.begun(memory, now) + 1], np.int64)})

    def _day(self, now: datetime) -> int:
        return now.astimezone(ZoneInfo(self.time_zone or "UTC")).toordinal()

    # What may leave -----------------------------------------------------------------------------------------------------

    def told(self, metrics: Mapping[str, float], rows: int) -> dict[str, float]:
        """The metrics over so many rows that may leave, as coarse as they must be; one that is not finite never leaves."""
        if rows < (self.measured_rows or 0):
            return {}
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if self.metrics is None:
            return finite
        return {name: _rounded(finite[name], step) for name, step in self.metrics.items() if name in finite}

    def counted(self, rows: int) -> int:
        """A count of rows as it may leave: the nearest multiple, and of few rows the first."""
        return max(1, round(rows / self.examples)) * self.examples if self.examples and rows else rows

    def coarse(self, update: Update, plan: Plan) -> Update:
        """An update with its rows counted so; what a plan's steps take is known, and is never exceeded."""
        settings = plan.training
        most = (settings.max_steps or 0) * settings.batch_size * settings.gradient_accumulation_steps
        rows = self.counted(update.manifest.num_examples)
        return replace(update, manifest=update.manifest.model_copy(update={"num_examples": min(rows, most) if most else rows}))


def read_policy(path: Path | None) -> Policy:
    """The institution's policy; without a file everything is allowed.

    Raises:
        ConfigurationError: Every problem and contradiction of the file.
    """
    return Policy() if path is None else load(path, Policy)


def _of_the_base(plan: Plan) -> str:
    """What a plan trains of the base's own weights; empty where it trains beside them alone."""
    if plan.method in ON_THE_BASE:
        return f"method {plan.method}"
    if plan.method == "experts" and plan.experts.train != "experts":
        return f"experts.train {plan.experts.train}"
    return f"lora.modules_to_save {_listed(plan.lora.modules_to_save[:5])}" if plan.lora.modules_to_save else ""


def _raise(found: Iterable[Refusal]) -> None:
    found = list(found)
    if found:
        raise PolicyError(list(dict.fromkeys(each.rule for each in found)), [shown(str(each)) for each in found])


def _one_of(rule: str, found: str, allowed: Iterable[str] | None) -> Iterator[Refusal]:
    if allowed is not None and found not in allowed:
        yield Refusal(rule, shown(found, 100), _listed(allowed))


def _at_most(rule: str, found: float, most: float | None) -> Iterator[Refusal]:
    if most is not None and not found <= most:
        yield Refusal(rule, _number(found), f"{_number(most)} at most")


def _at_least(rule: str, found: int, fewest: int | None) -> Iterator[Refusal]:
    if fewest is not None and found < fewest:
        yield Refusal(rule, f"{found}", f"{fewest} at least")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _rounded(value: float, step: float) -> float:
    """To a multiple; twelve digits, so that 3 * 0.1 is 0.3."""
    return float(f"{round(value / step) * step:.12g}") if abs(value / step) < 2**53 else value


def _minutes(hours: str) -> tuple[int, int]:
    begin, end = (60 * int(clock[:2]) + int(clock[3:]) for clock in hours.split("-"))
    return begin, end


def _within(minute: int, hours: tuple[int, int]) -> bool:
    """Whether a minute of the day is in a range, which may go over midnight."""
    begin, end = hours
    return begin <= minute < end if begin <= end else minute >= begin or minute < end
