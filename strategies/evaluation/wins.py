"""How often a judge prefers a model's answers to another's."""

from collections.abc import Sequence
from dataclasses import dataclass

from strategies.data.formats import Message
from strategies.evaluation.figures import Figure, mean
from strategies.judge import Judge


@dataclass(frozen=True)
class Wins:
    """One contest over all rows.

    Attributes:
        rate: Share of rows won; a tie counts half, so that two equal models have 0.5.
        ties: Share of rows on which neither wins.
        disagreement: Share of rows on which the judge preferred the other answer when the two changed places; they are ties.
        unreadable: Judgements, two for each row, that named neither answer.
    """

    rate: Figure
    ties: float
    disagreement: float
    unreadable: int


def contest(judge: Judge, questions: Sequence[Sequence[Message]], answers: Sequence[str], others: Sequence[str]) -> Wins:
    """Lets the judge compare two models' answers, each pair in both orders. The same text twice is a tie that needs no judge.

    Raises:
        EndpointError: The judge is an endpoint and gave no answer.
    """
    apart = [at for at, (answer, other) in enumerate(zip(answers, others, strict=True)) if answer != other]
    verdicts = judge.compare([questions[at] for at in apart], [answers[at] for at in apart], [others[at] for at in apart])
    preferred = [0] * len(answers)
    for at, verdict in zip(apart, verdicts.preferred, strict=True):
        preferred[at] = verdict
    return Wins(
        mean((verdict + 1) / 2 for verdict in preferred),
        preferred.count(0) / len(preferred),
        verdicts.disagreed / len(preferred),
        verdicts.unreadable,
    )
