"""Takes out of rows what is no text of theirs, and leaves out rows that teach nothing new or nothing at all; counts each."""

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from protocol.data_settings import CleaningSettings
from strategies.data.duplicates import exact_duplicates, near_duplicates
from strategies.data.fields import said, with_said
from strategies.data.files import Raw, Read
from strategies.data.language import language

_LEAST_LINE, _LEAST_ROWS = 20, 5  # of boilerplate
_ELEMENTS = (
    "a|abbr|address|article|aside|b|base|blockquote|body|br|button|canvas|caption|center|cite|code|col|dd|del|details|div|dl|dt|em|"
    "embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|"
    "main|mark|meta|nav|object|ol|option|p|picture|pre|q|s|samp|section|select|small|source|span|strike|strong|sub|summary|sup|svg|"
    "table|tbody|td|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
_UNSEEN = re.compile(
    r"<!--.*?-->|<(script|style|noscript|template)\b[^<>]*>.*?</\1\s*>|<!doctype[^<>]*>", re.DOTALL | re.IGNORECASE
)
_LINES_OF_THEIR_OWN = re.compile(
    r"</?(?:address|article|blockquote|br|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|section|table|td|th|tr|ul)\b[^<>]*>", re.IGNORECASE
)
# Elements of HTML alone: what else stands in angle brackets is a comparison, a type, or a mark that a model was taught.
_ATTRIBUTE = r"""\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"</?(?:{_ELEMENTS})(?:{_ATTRIBUTE})*\s*/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
# Format characters that words of some scripts are written with (joiners), and marks that belong to emoji: these stay.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
_UNBROKEN = str.maketrans(dict.fromkeys("\u00a0\u2007\u202f", " "))  # spaces that nobody sees are others


@dataclass(frozen=True)
class Gone:
    """A row that was left out.

    Attributes:
        line: Of it.
        why: As in ``Cleaned.removed``.
        like: Of a duplicate, the line of the row that stays.
    """

    line: int
    why: str
    like: int | None = None


@dataclass
class Cleaned:
    """What cleaning did; filled while the rows are read.

    Attributes:
        changed: Rows of which something was taken out, by what.
        removed: Rows that were left out, by why: ``empty``, ``too-short``, ``too-long``, ``language``, ``exact-duplicate``,
            ``near-duplicate``.
        gone: Each of these.
    """

    changed: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    gone: list[Gone] = field(default_factory=list)

    def remove(self, line: int, why: str, like: int | None = None) -> None:
        """Counts and lists a row that is left out."""
        self.removed[why] += 1
        self.gone.append(Gone(line, why, like))


def cleaned(found: Iterable[Read], settings: CleaningSettings, told: Cleaned) -> Iterator[Read]:
    """Rows as they should be; rows that cannot be read pass through.

    Only boilerplate and near duplicates need all rows at once.

    Args:
        found: From ``strategies.data.files.stream``.
        settings: What to do.
        told: Counts are added here.
    """
    if settings == CleaningSettings():
        yield from found
        return
    if settings.boilerplate_share is not None:
        found = _without_boilerplate(list(found), settings.boilerplate_share, told)
    kept = _alone(found, settings, told)
    if settings.near_duplicates:
        kept = _unlike(list(kept), settings, told)
    elif settings.exact_duplicates:
        kept = _once(kept, told)
    yield from kept


def without_controls(text: str) -> str:
    """Text with line feeds as line ends, without control characters, invisible spaces and what reverses the text after it.

    A no-break space becomes a space: tokens of the two differ, and no reader sees it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_UNBROKEN)
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        c for c in text if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") or _in_emoji(c)
    )


def without_markup(text: str) -> str:
    """Text as a browser would show it, without HTML's elements; what is no element of HTML stays."""
    text = _UNSEEN.sub("", text)
    text = _TAG.sub("", _LINES_OF_THEIR_OWN.sub("\n", text))
    return re.sub(r"\n{3,}", "\n\n", _ENTITY.sub(lambda found: html.unescape(found[0]), text)).strip()


def _in_emoji(character: str) -> bool:
    return "\U000e0020" <= character <= "\U000e007f"  # flags of regions


def _alone(found: Iterable[Read], settings: CleaningSettings, told: Cleaned) -> Iterator[Read]:
    """What can be said of a row without the others."""
    for line, row in found:
        if isinstance(row, str):
            yield line, row
            continue
        row = _changed(row, settings, told)
        if why := _unfit(row, settings):
            told.remove(line, why)
        else:
            yield line, row


def _changed(row: Raw, settings: CleaningSettings, told: Cleaned) -> Raw:
    found = set[str]()
    controls = ("control-characters", settings.control_characters, without_controls)
    # Twice, since what was an entity may be an invisible character.
    for name, wanted, change in (controls, ("markup", settings.markup, without_markup), controls):
        if wanted and (said(new := with_said(row, change)) != said(row)):
            found.add(name)
            row = new
    told.changed.update(found)
    return row


def _unfit(row: Raw, settings: CleaningSettings) -> str | None:
    texts = said(row)
    count = sum(len(text.strip()) for text in texts)
    if not count and texts:
        return "empty"
    if settings.min_characters and count < settings.min_characters:
        return "too-short"
    if settings.max_characters and count > settings.max_characters:
        return "too-long"
    if settings.languages and (language("\n".join(texts)) or settings.languages[0]) not in settings.languages:
        return "language"
    return None


def _without_boilerplate(found: Sequence[Read], share: float, told: Cleaned) -> Iterator[Read]:
    """Rows without lines that stand in many; a text of one line is all that its row says, so it stays."""
    rows = [row for _, row in found if not isinstance(row, str)]
    counts = Counter(line for row in rows for line in {line for text in said(row) for line in _lines(text)})
    repeated = {line for line, count in counts.items() if count >= max(_LEAST_ROWS, share * len(rows))}

    def without(text: str) -> str:
        if not repeated.intersection(_lines(text)):
            return text
        return "\n".join(line for line in text.split("\n") if line.strip() not in repeated)

    for line, row in found:
        if isinstance(row, str) or said(new := with_said(row, without)) == said(row):
            yield line, row
        else:
            told.changed["boilerplate"] += 1
            yield line, new


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    return [line for each in lines if len(line := each.strip()) >= _LEAST_LINE] if len(lines) > 1 else []


def _once(found: Iterable[Read], told: Cleaned) -> Iterator[Read]:
    """The first of rows that say the same but for space around it; of each that was seen a digest is held.

    Rows of other fields than we know say nothing, and so not the same.
    """
    seen = dict[bytes, int]()
    for line, row in found:
        if not isinstance(row, str) and (texts := said(row)):
            digest = hashlib.sha256("\n".join(texts).strip().encode("utf-8", "surrogatepass")).digest()
            if (first := seen.setdefault(digest, line)) != line:
                told.remove(line, "exact-duplicate", first)
                continue
        yield line, row


def _unlike(found: Sequence[Read], settings: CleaningSettings, told: Cleaned) -> Iterator[Read]:
    """The first of rows that say nearly the same."""
    rows = [(at, row) for at, (_, row) in enumerate(found) if not isinstance(row, str) and said(row)]
    texts = ["\n".join(said(row)) for _, row in rows]
    same = exact_duplicates(texts)
    gone = near_duplicates(texts, settings.similarity)
    for at, first in gone.items():
        why = "exact-duplicate" if at in same else "near-duplicate"
        told.remove(found[rows[at][0]][0], why, found[rows[first][0]][0])
    left_out = {rows[at][0] for at in gone}
    yield from (one for at, one in enumerate(found) if at not in left_out)
