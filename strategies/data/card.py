"""A data card: what an adapter was trained on, in numbers; no row, no label's name, no path. It stays where the rows are.

The quality score is a product of four shares, so that it is low where one of them is: ``usable`` (rows that could be used, of
those that were read), ``unique`` (rows that are no near duplicate of an earlier one), ``clean`` (rows without control
characters and markup) and ``whole`` (rows that fit into ``data.max_length``). Each is in the card beside it. It says nothing of
whether the answers are right.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.files import write_whole
from protocol.plan import Plan
from strategies.base_model import CHAT_TEMPLATE
from strategies.data.cleaning import without_controls, without_markup
from strategies.data.duplicates import exact_duplicates, near_duplicates
from strategies.data.facts import scripts
from strategies.data.formats import Conversation, Feedback, LabelledText, Preference, Row, ScoredText, spoken
from strategies.data.language import language
from strategies.data.prepared import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD, TEMPLATE = "data-card.json", "chat_template.jinja"  # transformers reads the latter
FORMAT = 1
# Of more rows, some that are spread evenly are looked at; near duplicates are looked for among the first so many.
_COMPARED, _LOOKED_AT = 5000, 1000
_DEFINITIONS = {
    "exact": "rows that say word for word what an earlier one says, training and held-out rows together",
    "near": "rows that say nearly what an earlier one says, exact ones included, training and held-out rows together",
    "held_out_like_training": "of the near ones, held-out rows that say nearly what a training row says: they flatter",
    "like_held_out": "training rows that were left out since they say nearly what a row of the evaluate file says; looked for "
    "only with data.group_near_duplicates",
    "compared": "rows that near duplicates were looked for among",
}
_BYTES_A_TOKEN = 3  # as in strategies.data.facts: rather too many tokens


def card(made: Prepared, plan: Plan, tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict[str, Any]:
    """The card of prepared rows, ready for JSON.

    Args:
        made: From ``strategies.data.prepared.prepare``.
        plan: With which they were prepared.
        tokenizer: Counts tokens; without it every 3 bytes are taken for one, which is rather too many.
    """
    training = made.rows()
    rows = [*training, *made.held_out]
    texts = [spoken(row) for row in rows]
    sample = [texts[at * len(texts) // _LOOKED_AT] for at in range(_LOOKED_AT)] if len(texts) > _LOOKED_AT else texts
    tokens = [_tokens(text, tokenizer) for text in sample]
    repeats = _repeats(training, made.held_out)
    shares = {
        "usable": _share(sum(file.used + sum(file.removed.values()) for file in made.report.files), _read(made)),
        "unique": 1 - repeats["near"] / repeats["compared"],
        "clean": _share(sum(map(_is_clean, sample)), len(sample)),
        "whole": _share(sum(count <= plan.data.max_length for count in tokens), len(tokens)),
    }
    return {
        "format": FORMAT,
        "objective": plan.objective,
        "rows": {"training": len(training), "held_out": len(made.held_out), "tasks": _tasks(made)},
        "digest": _digests(made),
        "characters": _lengths([len(text) for text in sample]),
        "tokens": _lengths(tokens) | {"counted": tokenizer is not None},
        "answer_characters": _lengths([len(answer) for row in rows for answer in _answers(row)]),
        "languages": _languages(sample),
        "scripts": {script: round(part, 4) for script, part in scripts(sample).items()},
        "labels": _labels(rows),
        "duplicates": repeats,
        "definitions": _DEFINITIONS,
        "treatment": _treatment(plan),
        "example_privacy": _promised(plan),
        "masked": dict(sum((Counter(file.masked) for file in made.report.files), Counter[str]())),
        "report": dataclasses.asdict(made.report),
        "quality": {"score": round(math.prod(shares.values()), 4), "formula": "usable * unique * clean * whole"}
        | {name: round(value, 4) for name, value in shares.items()},
    }


def write_beside(folder: Path, made: Prepared, plan: Plan, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Writes what belongs beside an adapter into a folder: ``data-card.json``, and ``chat_template.jinja`` where it is ours.

    A tokenizer without a template was given one (``strategies.base_model.CHAT_TEMPLATE``), and whoever uses the adapter without
    this project needs it. A card of the same rows, treatment and promise is left as it is.

    Args:
        folder: Of the adapter, or of a node's own records.
        made: The rows.
        plan: With which they were prepared.
        tokenizer: The base's, as ``load_tokenizer`` gives it.
    """
    if tokenizer.chat_template == CHAT_TEMPLATE:
        write_whole(folder / TEMPLATE, CHAT_TEMPLATE)
    known = _known(folder / CARD)
    same = {"digest": _digests(made), "treatment": _treatment(plan), "example_privacy": _promised(plan)}
    if any(known.get(name) != value for name, value in same.items()):
        write_card(folder / CARD, card(made, plan, tokenizer))


def write_card(path: Path, content: dict[str, Any]) -> None:
    """Writes a card, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 over rows in order, 64 hex digits: equal rows have equal digests wherever they lay."""
    sha = hashlib.sha256()
    for row in rows:
        told = {"kind": type(row).__name__, **dataclasses.asdict(row)}
        sha.update(json.dumps(told, sort_keys=True, default=str).encode() + b"\n")
    return sha.hexdigest()


def _digests(made: Prepared) -> dict[str, str]:
    return {"training": digest(made.rows()), "held_out": digest(made.held_out)}


def _tasks(made: Prepared) -> dict[str, dict[str, int]]:
    """Rows of each task, whether they are drawn or not."""
    return {name: {"training": learnt, "held_out": held} for name, (learnt, held) in made.report.tasks.items()}


def _repeats(training: Sequence[Row], held_out: Sequence[Row]) -> dict[str, int]:
    """Rows that repeat others; of many, some of each part are compared."""
    texts = [spoken(row) for row in (*training, *held_out)]
    held = [spoken(row) for row in held_out[: _COMPARED // 5]]
    learnt = [spoken(row) for row in training[: _COMPARED - len(held)]]
    like = near_duplicates([*learnt, *held])
    return {
        "exact": len(exact_duplicates(texts)),
        "near": len(like),
        "held_out_like_training": sum(at >= len(learnt) > earlier for at, earlier in like.items()),
        "compared": len(learnt) + len(held),
    }


def _treatment(plan: Plan) -> dict[str, Any]:
    """The settings, without paths and addresses."""
    told = plan.data.model_dump(mode="json", include={"on_bad_rows", "group_near_duplicates", "cleaning"})
    masking, more = plan.data.masking, plan.data.augmentation
    kinds = {"synonyms": more.synonyms is not None, "paraphrase": more.paraphrase, "back_translation": more.back_translation}
    return told | {
        "masking": {"kinds": list(masking.kinds), "lists_of_names": len(masking.names)},
        "augmentation": [kind for kind, wanted in kinds.items() if wanted],
    }


def _promised(plan: Plan) -> dict[str, Any] | None:
    """What each row was promised of the training; None where nothing was."""
    promised = plan.training.example_privacy
    return promised.model_dump(mode="json", include={"epsilon", "delta", "clipping_norm"}) if promised else None


def _known(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(made: Prepared) -> int:
    return sum(file.read for file in made.report.files)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _is_clean(text: str) -> bool:
    return without_controls(text) == text and (without_markup(text) == text.strip() or "<" not in text)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase | None") -> int:
    if tokenizer is None:
        return max(1, math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_A_TOKEN))
    return len(tokenizer(text, verbose=False)["input_ids"])


def _lengths(counts: Sequence[int]) -> dict[str, int]:
    if not counts:
        return {}
    high = sorted(counts)[math.ceil(0.95 * len(counts)) - 1]
    return {"least": min(counts), "median": int(statistics.median(counts)), "high": high, "most": max(counts)}


def _languages(texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts by language, from 1 % on; ``unknown`` of those of which it cannot be told."""
    found = Counter(language(text) or "unknown" for text in texts)
    return {name: round(count / len(texts), 4) for name, count in found.most_common() if count >= len(texts) / 100}


def _answers(row: Row) -> list[str]:
    match row:
        case Conversation(_, answer) | Feedback(_, answer):
            return [answer]
        case Preference(_, chosen, rejected):
            return [chosen, rejected]
        case _:
            return []


def _labels(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Of labels how many there are and how even; of numbers their range; None of other rows."""
    counts = Counter(row.label for row in rows if isinstance(row, LabelledText))
    if counts:
        shares = [count / counts.total() for count in counts.values()]
        entropy = -sum(share * math.log(share) for share in shares)
        even = entropy / math.log(len(shares)) if len(shares) > 1 else 0.0
        return {"classes": len(counts), "rarest": min(counts.values()), "balance": round(even, 4)}
    scores = [row.score for row in rows if isinstance(row, ScoredText)]
    # Divided first: the sum of the largest numbers is none.
    return (
        {"least": min(scores), "mean": math.fsum(score / len(scores) for score in scores), "most": max(scores)}
        if scores
        else None
    )
