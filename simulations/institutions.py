"""Give the demo four institutions whose private facts nobody else knows, so that what federation adds can be measured.

Every fact is fictional and drawn from a fixed seed. Each fact is asked in eight phrasings: most are for training, the
rest are held out, so a right answer on the test split means that the fact was learnt and not the sentence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal

from simulations.phrasing import RELATIONS, Relation

Split = Literal["train", "test"]

HELD_OUT_PHRASINGS: Final = 2
_FACTS_SEED: Final = 20_240_611


@dataclass(frozen=True)
class Fact:
    """Tie one value to one entity under one relation.

    Attributes:
        relation: Kind of the fact, and the language it is kept in.
        entity: What the fact is about.
        value: The answer, word for word.
    """

    relation: Relation
    entity: str
    value: str


@dataclass(frozen=True)
class Institution:
    """Name one institution and the facts only it holds.

    Attributes:
        name: Identifier, also the folder name of its data.
        title: Name for people, in both languages.
        facts: Private facts, English and Chinese.
    """

    name: str
    title: str
    facts: tuple[Fact, ...]


def _draw_facts(domain: str, per_relation: int) -> tuple[Fact, ...]:
    """Draw the facts of one domain, a fixed number for each kind of fact and language.

    Values within one kind of fact differ, so that no fact can be answered with the value of its neighbour.
    """
    rng = random.Random(f"{_FACTS_SEED}/{domain}")
    facts: list[Fact] = []
    for relation in RELATIONS:
        if relation.domain != domain:
            continue
        values: set[str] = set()
        for entity in rng.sample(relation.entities(), per_relation):
            value = relation.draw_value(rng)
            while value in values:
                value = relation.draw_value(rng)
            values.add(value)
            facts.append(Fact(relation, entity, value))
    return tuple(facts)


INSTITUTIONS: Final[tuple[Institution, ...]] = (
    Institution("bank", "Harbourline Bank / 海岸线银行", _draw_facts("bank", 4)),
    Institution("clinic", "Lindenhof Clinic / 椴园诊所", _draw_facts("clinic", 3)),
    Institution("law_firm", "Quill & Marlow Law Firm / 羽笔律师事务所", _draw_facts("law_firm", 2)),
    Institution("it_helpdesk", "Northgate IT Help Desk / 北门信息服务台", _draw_facts("it_helpdesk", 3)),
)


def institution(name: str) -> Institution:
    """Find an institution by name.

    Raises:
        KeyError: No institution has that name.
    """
    for candidate in INSTITUTIONS:
        if candidate.name == name:
            return candidate
    raise KeyError(name)


def rows(name: str, split: Split, seed: int = 0) -> list[dict[str, str]]:
    """List the questions and answers of one institution.

    Args:
        name: Name of the institution.
        split: ``train``, or ``test`` for the phrasings that are held out of training for that fact.
        seed: Chooses which phrasings of each fact are held out, and the order of the rows; never the facts.

    Returns:
        Rows with the question as ``input_text`` and the answer as ``target_text``.

    Raises:
        KeyError: No institution has that name.
    """
    rng = random.Random(f"{seed}/{name}")
    found: list[dict[str, str]] = []
    for fact in institution(name).facts:
        order = list(range(len(fact.relation.phrasings())))
        rng.shuffle(order)
        chosen = order[:HELD_OUT_PHRASINGS] if split == "test" else order[HELD_OUT_PHRASINGS:]
        found.extend({"input_text": fact.relation.ask(phrasing, fact.entity), "target_text": fact.value} for phrasing in chosen)
    rng.shuffle(found)
    return found
