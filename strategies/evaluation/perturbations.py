"""Rows that ask for the same in another form: with typing errors, in other case, with options reordered, or paraphrased.

A model that learnt the task, and not the wording, answers them as well. Only what is asked changes: the last message before
the answer, or the text to be classified. Digits stay as they are, since other numbers would be another question.
"""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from protocol.errors import DataError
from strategies.data.formats import Conversation, LabelledText, Row, ScoredText
from strategies.writer import Writer

KINDS = ("typos", "case", "options", "paraphrase")
_LETTERS_PER_TYPO = 20
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {key: row[max(at - 1, 0) : at] + row[at + 1 : at + 2] for row in _KEYBOARD for at, key in enumerate(row)}
# "A. text", "(A) text", "A) text", "A：text" on a line of its own.
_OPTION = re.compile(r"^(\s*[(（]?)([A-Z])([)）.:：、．]\s*)(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"^([(（]?)([A-Z])(?=$|[)）.:：、．])")
_ASK = (
    "Rewrite the text below in other words and in its own language. Keep its meaning, every name and every number. "
    "Answer with the rewritten text alone.\n\n"
)


def perturbed(rows: Sequence[Row], kind: str, seed: int = 0, writer: Writer | None = None) -> list[Row | None]:
    """Each row in another form; None where this changes nothing in it, or where its answer would no longer be known.

    - ``typos``: for every 20 letters one is dropped, doubled, swapped with the next, or hit on the key beside it.
    - ``case``: all capitals, or none. Writing without case does not change.
    - ``options``: the options of a lettered list in another order, and the letter of the answer with them.
    - ``paraphrase``: what the writer makes of it.

    Args:
        rows: Of sft, classification or regression.
        kind: One of ``KINDS``.
        seed: The same gives the same.
        writer: For ``paraphrase``.

    Raises:
        DataError: No row changes.
    """
    if kind == "paraphrase":
        made = _paraphrased(rows, _needed(writer), seed)
    else:
        # A row's change does not depend on the rows beside it.
        made = [_CHANGES[kind](row, random.Random(f"{seed}:{kind}:{at}")) for at, row in enumerate(rows)]  # noqa: S311
    if not any(made):
        raise DataError(f"robustness {kind}: none of {len(rows)} rows changes; {_NEEDS[kind]}")
    return made


def asked(row: Row) -> str:
    """The text of a row that is perturbed."""
    match row:
        case Conversation():
            return row.prompt[-1]["content"]
        case LabelledText(text) | ScoredText(text):
            return text
    raise TypeError(f"rows of kind {type(row).__name__} are not perturbed")


def _paraphrased(rows: Sequence[Row], writer: Writer, seed: int) -> list[Row | None]:
    texts = writer([({"role": "user", "content": _ASK + asked(row)},) for row in rows], seed=seed)
    return [_asking(row, text.strip()) for row, text in zip(rows, texts, strict=True)]


def _needed(writer: Writer | None) -> Writer:
    if writer is None:
        raise TypeError("paraphrase needs a writer")
    return writer


def _asking(row: Row, text: str) -> Row | None:
    """The row with another text; None where it is the same one, or none."""
    if not text or text == asked(row):
        return None
    if isinstance(row, Conversation):
        return replace(row, prompt=(*row.prompt[:-1], row.prompt[-1] | {"content": text}))
    return replace(row, text=text) if isinstance(row, LabelledText | ScoredText) else None


def _with_typos(row: Row, rng: random.Random) -> Row | None:
    whole = asked(row)
    # Of words: a letter alone may be the name of an option.
    around = zip(["", *whole], whole, [*whole[1:], ""], strict=False)
    letters = [at for at, near in enumerate(around) if _in_a_word(*near)]
    made = whole
    while letters and made == whole:  # two typos can undo each other
        text = list(whole)
        for at in rng.sample(letters, -(-len(letters) // _LETTERS_PER_TYPO)):
            _CARELESS[rng.randrange(len(_CARELESS))](text, at, rng)
        made = "".join(text)
    return _asking(row, made)


def _in_a_word(before: str, letter: str, after: str) -> bool:
    return letter.isalpha() and (before.isalpha() or after.isalpha())


def _swapped(text: list[str], at: int, rng: random.Random) -> None:
    if at + 1 < len(text) and text[at + 1].isalpha() and text[at + 1] != text[at]:
        text[at], text[at + 1] = text[at + 1], text[at]
    else:
        _doubled(text, at, rng)


def _doubled(text: list[str], at: int, rng: random.Random) -> None:  # noqa: ARG001
    text[at] += text[at]


def _dropped(text: list[str], at: int, rng: random.Random) -> None:  # noqa: ARG001
    text[at] = ""


def _beside(text: list[str], at: int, rng: random.Random) -> None:
    key = text[at]
    near = _NEIGHBOURS.get(key.lower())
    if not near:  # no letter of this keyboard
        return _doubled(text, at, rng)
    hit = rng.choice(near)
    text[at] = hit.upper() if key.isupper() else hit
    return None


def _in_other_case(row: Row, rng: random.Random) -> Row | None:
    text = asked(row)
    ways = [changed for changed in (text.upper(), text.lower()) if changed != text]
    return _asking(row, rng.choice(ways)) if ways else None


def _reordered(row: Row, rng: random.Random) -> Row | None:
    if not isinstance(row, Conversation):
        return None
    found = list(_OPTION.finditer(asked(row)))
    letters, options = [match[2] for match in found], [match[4] for match in found]
    if len(found) < 2 or letters != list(string.ascii_uppercase[: len(found)]):
        return None
    order = list(range(len(found)))
    while order == sorted(order):
        rng.shuffle(order)
    placed = iter(order)
    text = _OPTION.sub(lambda match: f"{match[1]}{match[2]}{match[3]}{options[next(placed)]}", asked(row))
    named = _LETTER.match(row.answer)
    if named and named[2] in letters:
        letter = letters[order.index(letters.index(named[2]))]
        row = replace(row, answer=f"{named[1]}{letter}{row.answer[named.end() :]}")
    elif row.answer.strip() not in (option.strip() for option in options):
        return None
    return _asking(row, text)


_CARELESS: Sequence[Callable[[list[str], int, random.Random], None]] = (_swapped, _doubled, _dropped, _beside)
_CHANGES: Mapping[str, Callable[[Row, random.Random], Row | None]] = {
    "typos": _with_typos,
    "case": _in_other_case,
    "options": _reordered,
}
_NEEDS: Mapping[str, str] = {
    "typos": "it needs letters",
    "case": "it needs letters that have a case",
    "options": "it needs options A, B, … on lines of their own, and an answer that is a letter or an option",
    "paraphrase": "the writer gave each text back as it was",
}
