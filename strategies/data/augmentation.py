"""Further training rows: what is asked, or read, in other words, with the same answer, label or score.

Synonyms come from a given file (Zhang, Zhao, LeCun 2015, "Character-level convolutional networks", section 2.4). Paraphrases
and translations there and back (Sennrich, Haddow, Birch 2016, arXiv:1511.06709) come from a writer: a model on this machine,
or an endpoint. What it said is kept in a file, so that a row is asked for once and every round trains on the same rows.
Placeholders of masked data stay: a text that lost one is not taken.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.data_settings import AugmentationSettings
from protocol.errors import DataError
from protocol.files import write_whole
from strategies.data.formats import LabelledText, Message, PlainText, Row, ScoredText
from strategies.data.language import language
from strategies.data.lexicon import Span, whole_words
from strategies.data.masking import PLACEHOLDER

if TYPE_CHECKING:
    from strategies.writer import Writer

_AT_A_TIME = 32  # asked between two writings of the file
_SEPARATOR = re.compile(r"[,，、;；\t]")
_PARAPHRASE = (
    "Say the following in other words, in the same language. Keep what stands in square brackets. Reply with the text alone."
)
_TRANSLATE = "Translate the following into {language}. Keep what stands in square brackets. Reply with the translation alone."


def augmented(
    rows: Sequence[Row], settings: AugmentationSettings, seed: int, told: Counter[str], writer: "Writer | None" = None
) -> list[Row]:
    """The rows, each followed by those that were made of it.

    Args:
        rows: Training rows; held-out rows stay as they are.
        settings: What to make.
        seed: Of the choice of synonyms.
        told: Counts of what was made are added here: ``synonyms``, ``paraphrase``, ``back-translation``, and ``refused`` for
            what a writer changed too much or not at all.
        writer: In place of the one that the settings name.

    Raises:
        DataError: A file cannot be read.
        EndpointError, ModelError, AdapterError, ConfigurationError: The writer cannot be had, or does not answer.
    """
    texts = [_asked(row) for row in rows]
    made: dict[str, list[str | None]] = {}
    if settings.synonyms is not None:
        sets = read_synonyms(settings.synonyms)
        find = whole_words(sets)
        made["synonyms"] = [_exchanged(text, sets, find, settings.synonyms_share, seed) if text else None for text in texts]
    if settings.paraphrase or settings.back_translation:
        ask = _Asking(settings, writer)
        if settings.paraphrase:
            made["paraphrase"] = ask(_PARAPHRASE, texts)
        if settings.back_translation:
            there = ask(_TRANSLATE.format(language=settings.back_translation), texts)
            back = [_TRANSLATE.format(language=_named(text)) for text in texts]
            made["back-translation"] = ask(back, there)
    return [each for at, row in enumerate(rows) for each in (row, *_copies(row, texts[at], made, at, told))]


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """For each word, in lower case, the others of its sets.

    Raises:
        DataError: No such file, no UTF-8, or no set of two words or more in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({type(error).__name__}); expected sets of synonyms") from None
    found: dict[str, tuple[str, ...]] = {}
    for line in lines:
        words = [] if line.startswith("#") else [word for each in _SEPARATOR.split(line) if (word := each.strip())]
        for word in words:
            others = tuple(other for other in words if other.lower() != word.lower())
            if others:
                found[word.lower()] = tuple(dict.fromkeys((*found.get(word.lower(), ()), *others)))
    if not found:
        raise DataError(f"{path}: no synonyms in it; expected one set a line, with commas between its words")
    return found


def _asked(row: Row) -> str | None:
    """What may be said in other words: the text, or the last thing that the user said."""
    if isinstance(row, LabelledText | ScoredText | PlainText):
        return row.text
    at = _last_of_user(row.prompt)
    return None if at is None else row.prompt[at]["content"]


def _with_asked(row: Row, text: str) -> Row:
    if isinstance(row, LabelledText | ScoredText | PlainText):
        return replace(row, text=text)
    at = _last_of_user(row.prompt)
    changed: list[Message] = [{**one, "content": text} if number == at else one for number, one in enumerate(row.prompt)]
    return replace(row, prompt=tuple(changed))


def _last_of_user(prompt: Sequence[Message]) -> int | None:
    return next((at for at in reversed(range(len(prompt))) if prompt[at]["role"] == "user"), None)


def _copies(row: Row, text: str | None, made: Mapping[str, Sequence[str | None]], at: int, told: Counter[str]) -> list[Row]:
    copies: list[Row] = []
    seen = {text}
    for kind, texts in made.items():
        new = texts[at]
        if not text or new is None:
            continue
        if not new.strip() or new in seen or sorted(PLACEHOLDER.findall(new)) != sorted(PLACEHOLDER.findall(text)):
            told["refused"] += kind != "synonyms"
            continue
        seen.add(new)
        told[kind] += 1
        copies.append(_with_asked(row, new))
    return copies


def _exchanged(
    text: str,
    sets: Mapping[str, tuple[str, ...]],
    find: Callable[[str], Iterator[Span]],
    share: float,
    seed: int,
) -> str | None:
    """The text with some words exchanged, the same for the same seed; at least one where there is one to exchange."""
    lower = text.lower() if len(text.lower()) == len(text) else text
    kept = [found.span() for found in PLACEHOLDER.finditer(text)]
    spans = [(a, b) for a, b in find(lower) if all(b <= start or end <= a for start, end in kept)]
    if not spans:
        return None
    draw = random.Random(f"{seed}/{text}")  # noqa: S311 - no secret
    parts, at = list[str](), 0
    for start, end in sorted(draw.sample(spans, max(1, round(share * len(spans))))):
        word = draw.choice(sets[lower[start:end]])
        parts += [text[at:start], word.capitalize() if text[start].isupper() else word]
        at = end
    return "".join([*parts, text[at:]])


def _named(text: str | None) -> str:
    code = language(text or "")
    return f"the language with ISO 639-1 code {code}" if code else "English"


class _Asking:
    """Asks the writer what its file does not hold yet."""

    def __init__(self, settings: AugmentationSettings, writer: "Writer | None") -> None:
        if settings.written is None or settings.writer is None:
            raise TypeError("the settings were not checked")
        self._path, self._settings, self._writer = settings.written, settings.writer, writer
        self._told = _read_written(self._path)

    def __call__(self, instruction: str | Sequence[str], texts: Sequence[str | None]) -> list[str | None]:
        """An answer to each text; None where there is no text."""
        instructions = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        prompts = [f"{told}\n\n{text}" if text else None for told, text in zip(instructions, texts, strict=True)]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt and self._key(prompt) not in self._told]
        for first in range(0, len(new), _AT_A_TIME):
            part = new[first : first + _AT_A_TIME]
            answers = self._answers([[{"role": "user", "content": prompt}] for prompt in part])
            self._keep({self._key(prompt): answer.strip() for prompt, answer in zip(part, answers, strict=True)})
        return [self._told[self._key(prompt)] if prompt else None for prompt in prompts]

    def _answers(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        if self._writer is None:
            from strategies.writer import writer_of

            self._writer = writer_of(self._settings)
        return self._writer(prompts)

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self._settings.model_dump_json()}\n{prompt}".encode("utf-8", "surrogatepass")).hexdigest()

    def _keep(self, told: Mapping[str, str]) -> None:
        self._told |= told
        lines = (json.dumps({"asked": asked, "said": said}) + "\n" for asked, said in self._told.items())
        write_whole(self._path, "".join(lines), 0o600)


def _read_written(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            found[str(entry["asked"])] = str(entry["said"])
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}: line {number}: not what a writer's file holds; name another file") from None
    return found
