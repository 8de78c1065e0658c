"""Finds personal data in texts and puts placeholders there: ``[EMAIL-1]``, the same for the same as long as one masker lives.

Numbers are found by their written form and then checked by those who know them: python-stdnum (check digits, dates of birth),
phonenumbers (Google's libphonenumber). A form without letters or separators is taken from 10 digits on: shorter ones are
quantities more often than not. A text is looked at until nothing more is found, so masking what was masked changes nothing;
and no value that was taken out holds a placeholder, so putting all back gives the text as it was, but for the separators of a
number that stands there in several writings: it has one placeholder, and comes back in the first of them.
"""

import re
import unicodedata
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from protocol.data_settings import EVERY_KIND, MaskingSettings
from protocol.errors import ConfigurationError, DataError
from strategies.data.lexicon import LETTER, Span, whole_words

NAME = "name"
_LONGEST_NAME = 100
_LEAST_BARE = 10  # digits without letters or separators
# Of our own kinds and with fewer digits than that: what else stands in brackets may be a number of somebody.
PLACEHOLDER = re.compile(rf"\[(?:{'|'.join((*EVERY_KIND, NAME)).upper()})-[1-9][0-9]{{0,{_LEAST_BARE - 2}}}\]")
Finder = Callable[[str], Iterable[Span]]
Value = str | int | float
_DENSE = re.compile(
    r"[0-9](?:[ ./()-]{0,3}[0-9]){6}"
)  # no number of a person has less in one place, but for a few with letters
_SOME = re.compile(r"[0-9]{2}")
_DECIMAL = re.compile(r"\(?[-+]?[0-9]+\.[0-9]+\)?")

# Full width, digits of every script, and the many dashes and spaces, as ASCII: one character for each, so that places stay.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_DIGITS = (code for codes in (range(0x660, 0xFF00), range(0x1D7CE, 0x1D800)) for code in codes if chr(code).isdecimal())
_PLAIN |= {code: ord("0") + unicodedata.decimal(chr(code)) for code in _DIGITS}
_PLAIN |= dict.fromkeys((0xA0, 0x2007, 0x202F, 0x2009, 0x3000), ord(" "))
_PLAIN |= dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212), ord("-"))
_LOCAL = re.compile(f"(?:{LETTER}|[_.%+'&~!-])+\\Z")
_LABEL = f"{LETTER}(?:(?:{LETTER}|-){{0,61}}{LETTER})?"
_DOMAIN = re.compile(f"(?:{_LABEL}\\.)+(?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,63}})(?![A-Za-z0-9])")
_LONGEST_LOCAL, _LONGEST_DOMAIN = 64, 255  # RFC 5321, section 4.5.3.1


class Masker:
    """Masks one file's texts after each other.

    Args:
        settings: What to look for.
        reserved: Placeholders that stand in the file already: no value gets one of them.
        known: Values by placeholder, of an earlier masking that goes on.

    Attributes:
        values: What each placeholder stands for.
        counts: Occurrences that were masked, by kind.

    Raises:
        DataError: A file of names cannot be read.
        ConfigurationError: A region that phonenumbers does not know.
    """

    def __init__(
        self, settings: MaskingSettings, reserved: Iterable[str] = (), known: Mapping[str, Value] | None = None
    ) -> None:
        self._finders = finders(settings)
        self._reserved = frozenset(reserved)
        self._last: Counter[str] = Counter()
        self.values: dict[str, Value] = dict(known or {})
        self._of = {_key(_kind(placeholder), value): placeholder for placeholder, value in self.values.items()}
        self.counts: Counter[str] = Counter()

    def __call__(self, value: Value) -> Value:
        """The text with placeholders in it; a whole number that is personal data becomes one, others stay.

        A column of whole numbers in which one is missing is one of floats for many who write files.
        """
        if isinstance(value, str):
            return self.text(value)
        written = str(value).removesuffix(".0")
        if len(written) >= _LEAST_BARE:
            for way in self._finders:
                if (0, len(written)) in way.find(written):
                    return self._placeholder(way.kind, value)
        return value

    def text(self, text: str) -> str:
        """A text with placeholders in it."""
        while True:
            parts, at = list[str](), 0
            for literal in PLACEHOLDER.finditer(text):
                parts += [self._part(text[at : literal.start()]), literal[0]]
                at = literal.end()
            masked = "".join([*parts, self._part(text[at:])])
            if masked == text:
                return text
            text = masked

    def _part(self, text: str) -> str:
        """A text without placeholders in it, masked once."""
        parts, at = list[str](), 0
        for start, end, kind in _found(self._finders, text):
            parts += [text[at:start], self._placeholder(kind, text[start:end])]
            at = end
        return "".join([*parts, text[at:]])

    def _placeholder(self, kind: str, value: Value) -> str:
        self.counts[kind] += 1
        key = _key(kind, value)
        if key not in self._of:
            self._of[key] = self._next(kind)
            self.values[self._of[key]] = value
        return self._of[key]

    def _next(self, kind: str) -> str:
        while True:
            self._last[kind] += 1
            placeholder = f"[{kind.upper()}-{self._last[kind]}]"
            if placeholder not in self._reserved and placeholder not in self.values:
                return placeholder


def unmasked(value: str, values: Mapping[str, Value]) -> Value:
    """A text with what its placeholders stand for; those that nobody put there stay. What was a number is one again."""
    if isinstance(number := values.get(value), int | float):
        return number
    return PLACEHOLDER.sub(lambda found: str(values.get(found[0], found[0])), value)


class Way(NamedTuple):
    """How one kind is found.

    Attributes:
        kind: Which.
        find: Says where it is in a text.
        needs: What a text must hold for that to be worth while.
    """

    kind: str
    find: Finder
    needs: re.Pattern[str] | None = None


def finders(settings: MaskingSettings) -> list[Way]:
    """What finds each kind, the surest first: of two that overlap the earlier one counts.

    Raises:
        DataError: A file of names cannot be read.
        ConfigurationError: A region that phonenumbers does not know.
    """
    wanted = settings.kinds
    found = [Way("email", _emails)] if "email" in wanted else []
    found += [_number(*row) for row in _LONG if row[0] in wanted]
    if "phone" in wanted:
        found.append(Way("phone", partial(_phones, _regions(settings.phone_regions)), _DENSE))
    found += [_number(*row) for row in _SHORT if row[0] in wanted]
    if settings.names:
        found.append(Way(NAME, whole_words(name.translate(_PLAIN) for path in settings.names for name in read_names(path))))
    return found


def _number(kind: str, form: str, check: str) -> Way:
    return Way(kind, partial(_forms, re.compile(form), _check(check)), _SOME if kind in _LETTERED else _DENSE)


def read_names(path: Path) -> list[str]:
    """Names, one a line; empty lines and those that begin with # are none.

    Raises:
        DataError: No such file, no UTF-8, no name in it, or one of a single character or of more than 100.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({type(error).__name__}); expected names, one a line") from None
    names = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if short := [number for number, name in names if len(name) < 2]:
        raise DataError(f"{path}: line {short[0]}: a name of one character would be found everywhere; leave it out")
    if long := [number for number, name in names if len(name) > _LONGEST_NAME]:
        raise DataError(f"{path}: line {long[0]}: has more than {_LONGEST_NAME} characters; expected one name a line")
    if not names:
        raise DataError(f"{path}: no names in it; expected one a line")
    return [name for _, name in names]


def _key(kind: str, value: Value) -> tuple[str, str, Value]:
    """A placeholder for each writing of a number: what was masked must come back to the letter."""
    return kind, type(value).__name__, value  # 1 and 1.0 are equal, and written in two ways


def _kind(placeholder: str) -> str:
    return placeholder[1:-1].rpartition("-")[0].lower()


def _found(ways: Iterable[Way], text: str) -> list[tuple[int, int, str]]:
    """Spans that do not overlap, in order, with their kinds."""
    plain, taken = text.translate(_PLAIN), list[tuple[int, int, str]]()
    holds = {needed: needed is None or needed.search(plain) is not None for needed in (None, _SOME, _DENSE)}
    for way in ways:
        for start, end in way.find(plain) if holds[way.needs] else ():
            after = bisect_left(taken, (start,))
            if (after == 0 or taken[after - 1][1] <= start) and (after == len(taken) or end <= taken[after][0]):
                insort(taken, (start, end, way.kind))
    return taken


# What finds each kind -------------------------------------------------------------------------------------------------


def _emails(text: str) -> Iterator[Span]:
    """What stands around each @ (RFC 5321, without quoted and numeric forms); letters of any script but East Asian ones."""
    at, end = text.find("@"), 0
    while at >= 0:
        local = _LOCAL.search(text, max(end, at - _LONGEST_LOCAL), at)
        domain = _DOMAIN.match(text, at + 1, at + 1 + _LONGEST_DOMAIN)
        if local and domain and (start := at - len(local[0].lstrip(".'&~!-+%"))) < at:
            end = domain.end()
            yield start, end
        at = text.find("@", at + 1)


def _phones(regions: tuple[str, ...], text: str) -> Iterator[Span]:
    """Numbers with a country code or a trunk 0, and those of the regions that are grouped as in their country.

    Else sums and differences of numbers would be phone numbers. Digits without a separator are, from 10 on and where they can
    be a mobile's.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in regions or (None,):
        loose = [match for match in PhoneNumberMatcher(text, region) if not _DECIMAL.fullmatch(match.raw_string)]
        yield from (_tight(match) for match in loose if match.raw_string.startswith(("+", "0", "(0", "(+")))
        if any(not match.raw_string.startswith(("+", "0")) for match in loose):
            for match in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
                if not match.raw_string.isdigit() or _may_be_mobile(match):
                    yield _tight(match)


def _tight(match: Any) -> Span:
    """Without a bracket that opens before the number and does not close in it."""
    written = match.raw_string
    return match.start + (written.startswith("(") and written.count("(") > written.count(")")), match.end


def _may_be_mobile(match: Any) -> bool:
    from phonenumbers import PhoneNumberType, number_type

    mobile = (PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE)
    return len(match.raw_string) >= _LEAST_BARE and number_type(match.number) in mobile


def _regions(wanted: tuple[str, ...]) -> tuple[str, ...]:
    from phonenumbers import SUPPORTED_REGIONS

    if unknown := [region for region in wanted if region not in SUPPORTED_REGIONS]:
        raise ConfigurationError("data.masking", [f"phone_regions: phonenumbers knows no {', '.join(unknown)}; use ISO 3166-1"])
    return wanted


def _forms(form: re.Pattern[str], check: Callable[[str], bool], text: str) -> Iterator[Span]:
    """Written forms that pass the check; where a longer one does not, one that lacks its last group may."""
    at = 0
    while found := form.search(text, at):
        start, end = found.span()
        while end > start and not check(text[start:end]):
            end = max(start, text.rfind(" ", start, end))
        if end > start:
            yield start, end
        at = end if end > start else start + 1


# Numbers: form and check ----------------------------------------------------------------------------------------------

# Alike on both sides: were a number hidden by its neighbour alone, a row of them would come to light one look at a time.
_ALONE, _ENDS = r"(?<![0-9A-Za-z_+])(?<![0-9][.,])", r"(?![0-9A-Za-z_])(?!(?<=[0-9])[.,][0-9])"


def _check(name: str) -> Callable[[str], bool]:
    """python-stdnum's check of a number, or our own where it says too little."""
    if name in _OWN:
        return _OWN[name]
    module = import_module(f"stdnum.{name}")

    def is_valid(number: str) -> bool:
        try:
            return bool(module.is_valid(number))
        except (LookupError, ValueError):  # a date or a region that its tables do not foresee
            return False

    return is_valid


def _card(number: str) -> bool:
    """Luhn's check digit on a number of those that pay: ISO/IEC 7812-1 gives banks 2 to 6, and some countries use 8 or 9."""
    from stdnum import luhn

    digits = re.sub("[ -]", "", number)
    begins = "456" if len(digits) == 13 else "2345689"  # books have 13 too, and begin with 9
    return len(digits) > 12 and digits[0] in begins and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _chinese(number: str) -> bool:
    """GB 11643: check digit and date of birth. python-stdnum's list of counties lacks some, so a county need not be in it."""
    from stdnum.cn import ric

    number = re.sub("[ -]", "", number)
    try:
        return "1" <= number[0] <= "8" and ric.get_birth_date(number) < date.today() and _ends_as(number, ric)
    except ValueError:
        return False


def _ends_as(number: str, kind: Any) -> bool:
    return bool(kind.calc_check_digit(number.upper()) == number[-1].upper())


def _iban(number: str) -> bool:
    """ISO 13616: length and form of the country, and the check digits; whether there is such a bank does not count."""
    from stdnum import iban

    return bool(iban.is_valid(number, check_country=False))


_OWN: dict[str, Callable[[str], bool]] = {"card": _card, "cn.ric": _chinese, "iban": _iban}
_LETTERED = ("iban", "it-cf", "mx-curp", "in-pan")  # more letters than digits
_TWELVE = r"[0-9]{4}([ -]?)[0-9]{4}\1[0-9]{4}"


def _table(*rows: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """Kind, form, check; a form stands alone: neither in a word nor in a longer number."""
    return [(kind, f"{_ALONE}(?:{form}){_ENDS}", check) for kind, form, check in rows]


# Forms that are hardly anything else: with letters or separators of their own, or with 13 digits and more.
_LONG = _table(
    ("iban", r"[A-Z]{2}[0-9]{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,4})?", "iban"),
    ("cn-id", r"[0-9]{6}([ -]?)[0-9]{8}\1[0-9]{3}[0-9Xx]", "cn.ric"),
    ("fr-nir", r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}", "fr.nir"),
    ("it-cf", r"[A-Z]{6}[0-9L-NP-V]{2}[A-EHLMPRST][0-9L-NP-V]{2}[A-Z][0-9L-NP-V]{3}[A-Z]", "it.codicefiscale"),
    ("mx-curp", r"[A-Z]{4}[0-9]{6}[HMX][A-Z]{5}[A-Z0-9][0-9]", "mx.curp"),
    ("es-dni", r"[0-9]{8}-?[A-Z]", "es.dni"),
    ("es-nie", r"[XYZ]-?[0-9]{7}-?[A-Z]", "es.nie"),
    ("in-pan", r"[A-Z]{3}[ABCFGHLJPT][A-Z][0-9]{4}[A-Z]", "in_.pan"),
    ("fi-hetu", r"[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-Y]", "fi.hetu"),
    ("za-id", r"[0-9]{13}", "za.idnr"),
    ("ro-cnp", r"[0-9]{13}", "ro.cnp"),
    ("kr-rrn", r"[0-9]{6}-?[0-9]{7}", "kr.rrn"),
    ("ch-ahv", r"756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}|756[0-9]{10}", "ch.ssn"),
    ("th-pin", r"[0-9]-[0-9]{4}-[0-9]{5}-[0-9]{2}-[0-9]|[0-9]{13}", "th.pin"),
    ("card", r"[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?", "card"),
    ("card", r"[0-9]{4}([ -])[0-9]{6}\1[0-9]{4,5}", "card"),
    ("br-cpf", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", "br.cpf"),
    ("be-nn", r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}", "be.nn"),
    ("se-pnr", r"(?:[0-9]{2})?[0-9]{6}[-+][0-9]{4}", "se.personnummer"),
    ("dk-cpr", r"[0-9]{6}-[0-9]{4}", "dk.cpr"),
    ("cz-rc", r"[0-9]{6}/[0-9]{3,4}", "cz.rc"),
    ("my-nric", r"[0-9]{6}-[0-9]{2}-[0-9]{4}", "my.nric"),
    ("us-ssn", r"[0-9]{3}-[0-9]{2}-[0-9]{4}", "us.ssn"),
    ("ca-sin", r"[0-9]{3}([ -])[0-9]{3}\1[0-9]{3}", "ca.sin"),
    ("gb-nhs", r"[0-9]{3} [0-9]{3} [0-9]{4}", "gb.nhs"),
    ("de-idnr", r"[0-9]{2} [0-9]{3} [0-9]{3} [0-9]{3}", "de.idnr"),
    ("no-fnr", r"[0-9]{6} [0-9]{5}", "no.fodselsnummer"),
)
# Digits alone, of which a phone number has as many: it comes first.
_SHORT = _table(
    ("de-idnr", r"[0-9]{11}", "de.idnr"),
    ("no-fnr", r"[0-9]{11}", "no.fodselsnummer"),
    ("be-nn", r"[0-9]{11}", "be.nn"),
    ("tr-tckn", r"[0-9]{11}", "tr.tckimlik"),
    ("pl-pesel", r"[0-9]{11}", "pl.pesel"),
    ("br-cpf", r"[0-9]{11}", "br.cpf"),
    ("ru-inn", r"[0-9]{12}", "ru.inn"),
    ("in-aadhaar", _TWELVE, "in_.aadhaar"),
    ("jp-my-number", _TWELVE, "jp.in_"),
)
BUILT = {"email", "phone", *(kind for kind, _, _ in (*_LONG, *_SHORT))}
if missing := set(EVERY_KIND) - BUILT:  # pragma: no cover
    raise AssertionError(f"kinds without a form: {missing}")
