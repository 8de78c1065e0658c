"""Rows that models make: pairs of answers that a judge labelled, answers that a teacher wrote.

A judge in place of people (Lee et al. 2023, arXiv:2309.00267, section 2; Bai et al. 2022, arXiv:2212.08073): the model answers
each prompt several times, the judge compares all answers with each other, and those with the most and the fewest wins become a
pair as people would have given it. Where the judge prefers none there is no pair. Rows of no such plan stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from protocol.adapter import Adapter
from protocol.errors import DataError
from protocol.objective_settings import AiFeedbackSettings
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.data.formats import Conversation, Message, Preference, Prompt, Row
from strategies.judge import Judge, judge_of
from strategies.writer import Writer, model_writer, writer_of


@dataclass(frozen=True)
class Made:
    """Rows to train on or to measure with.

    Attributes:
        rows: Of the objective's kind.
        metrics: Of a judge: ``judge-ties`` (share of prompts without a pair), ``judge-disagreement`` (share of comparisons of
            which it said another thing when the answers stood the other way round), ``judge-unreadable`` (share of its
            judgements that named neither answer). They stay at a node.
    """

    rows: list[Row]
    metrics: Mapping[str, float] = field(default_factory=dict)


def made(rows: Sequence[Row], plan: Plan, base: Base, present: Adapter, *, training: bool) -> Made:
    """What a plan trains on or is measured with, for rows as they were read.

    Args:
        rows: As the plan's file holds them.
        plan: Its seed draws the answers.
        base: The frozen base.
        present: The adapter of the model that answers.
        training: The teacher answers every row; else only those without an answer, and figures are of the rows' own.

    Raises:
        DataError: The judge found no answer better than another.
        UserError, EndpointError: Writer or judge are not there.
    """
    if plan.ai_feedback is not None and rows and isinstance(rows[0], Prompt):
        return pairs(rows, plan.ai_feedback, plan.training.seed, _writer(plan.ai_feedback, plan, base, present))
    if plan.distillation is not None and plan.distillation.kind == "text":
        return Made(_taught(rows, plan, training))
    return Made(list(rows))


def pairs(rows: Sequence[Row], settings: AiFeedbackSettings, seed: int, write: Writer) -> Made:
    """A pair for each prompt of which the judge finds one answer better than another.

    Args:
        rows: Prompts.
        settings: The judge, and how many answers it sees.
        seed: Draws the answers.
        write: Who answers.
    """
    prompts = [row.prompt for row in rows if isinstance(row, Prompt)]
    count = settings.answers
    written = write([prompt for prompt in prompts for _ in range(count)], seed=seed)
    answers = [written[at * count : (at + 1) * count] for at in range(len(prompts))]
    del write  # its model leaves before the judge's comes
    return _judged(prompts, answers, judge_of(settings.judge))


def stand_ins(rows: Sequence[Row], plan: Plan) -> list[Row]:
    """Rows as long as those that a plan's models may make, to try whether they fit into memory: nobody is asked.

    Shorter ones are among them, since a pair that is too long for ``data.max_length`` may be left out.
    """
    if plan.ai_feedback is not None:
        lengths = _lengths((plan.ai_feedback.writer or plan.ai_feedback).max_new_tokens)
        asked = [row.prompt for row in rows if isinstance(row, Prompt)]
        return [Preference(prompt, "yes " * tokens, "no " * tokens) for prompt in asked for tokens in lengths]
    if plan.distillation is not None and plan.distillation.kind == "text":
        lengths = _lengths(plan.distillation.teacher.max_new_tokens)
        asked = [row.prompt for row in rows if isinstance(row, Conversation | Prompt)]
        return [Conversation(prompt, "yes " * tokens) for prompt in asked for tokens in lengths]
    return list(rows)


def _lengths(longest: int) -> list[int]:
    """It, and again and again half of it."""
    return [longest >> halved for halved in range(longest.bit_length())]


def _judged(prompts: Sequence[tuple[Message, ...]], answers: Sequence[Sequence[str]], judge: Judge) -> Made:
    compared = [
        (at, one, other)
        for at, several in enumerate(answers)
        for one, other in combinations(range(len(several)), 2)
        if several[one] != several[other]
    ]
    said = judge.compare(
        [prompts[at] for at, _, _ in compared],
        [answers[at][one] for at, one, _ in compared],
        [answers[at][other] for at, _, other in compared],
    )
    wins = [[0] * len(several) for several in answers]
    for (at, one, other), preferred in zip(compared, said.preferred, strict=True):
        wins[at][one] += preferred
        wins[at][other] -= preferred
    found: list[Row] = []
    for prompt, several, won in zip(prompts, answers, wins, strict=True):
        best, worst = several[won.index(max(won))], several[won.index(min(won))]
        if max(won) > min(won) and best and worst:
            found.append(Preference(prompt, best, worst))
    if not found:
        raise DataError(
            f"the judge found no answer better than another for any of {len(prompts)} prompts "
            f"({len(compared)} comparisons, {said.disagreed} decided by place; {said.unreadable} judgements unreadable); "
            "take another judge, more ai_feedback.answers or a higher temperature"
        )
    metrics = {
        "judge-ties": 1 - len(found) / len(prompts),
        "judge-disagreement": said.disagreement,
        "judge-unreadable": said.unreadable / (2 * len(compared)),
    }
    return Made(found, metrics)


def _writer(settings: AiFeedbackSettings, plan: Plan, base: Base, present: Adapter) -> Writer:
    if settings.writer is not None:
        return writer_of(settings.writer)
    scores = plan.task_type == "SEQ_CLS"  # a reward model writes nothing: its base does
    writes = plan.model_copy(update={"objective": "sft", "head": type(plan.head)()}) if scores else plan
    return model_writer(
        *with_adapter(writes, base, None if scores else present),
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=plan.training.batch_size,
    )


def _taught(rows: Sequence[Row], plan: Plan, training: bool) -> list[Row]:
    """The rows with the teacher's answers; those that it leaves empty are left out."""
    settings = plan.distillation
    asked = [row for row in rows if isinstance(row, Prompt) or (training and isinstance(row, Conversation))]
    if settings is None or not asked:
        return list(rows)
    told = writer_of(settings.teacher)([row.prompt for row in asked], seed=plan.training.seed)
    kept: list[Row] = [row for row in rows if not isinstance(row, Prompt) and not training]
    kept += [Conversation(row.prompt, answer) for row, answer in zip(asked, told, strict=True) if answer]
    if not kept:
        raise DataError(f"the teacher answered none of {len(asked)} prompts; take another distillation.teacher")
    return kept
