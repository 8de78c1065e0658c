"""From a tokenizer's jinja template to plain strings, derived by rendering marked conversations and held to it on others."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from edge.runtime.chat_format import ChatTemplate, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Render = Callable[..., str | None]

_DATE = "fedgedatemark"
_SYSTEM, _FIRST, _ANSWER, _SECOND = "fedgesystemmark", "fedgefirstmark", "fedgeanswermark", "fedgesecondmark"
# What templates have been seen to treat otherwise: whitespace at the ends, nothing at all, what other formats escape.
_CONTENTS = ("How much?", " \n a\n\n b \t\n", "", '{{ x }} <b> & "é" \\n', "данные\n", "\n", "None", "0", " assistant")
_SYSTEMS = ("Be short.", " \nBe: {{ kind }}\n\nand <b> \n", "0")


@dataclass(frozen=True)
class Derived:
    """What became of a chat template.

    Attributes:
        template: None where plain strings cannot say it.
        remark: Why there is none, or in what the template differs; empty where there is nothing to say.
    """

    template: ChatTemplate | None
    remark: str = ""


def derive(tokenizer: "PreTrainedTokenizerBase") -> Derived:
    """The template of plain strings that renders conversations as the tokenizer's own does, character by character.

    It is cut out of a few renderings with marks for contents, and then held to the tokenizer's rendering of others: up to five
    turns, with and without a system message, with contents of whitespace, of nothing and of what might be escaped. What
    differs anywhere is not used.

    Args:
        tokenizer: With a chat template.
    """
    render = _renderer(tokenizer)
    alone = render(_talk(_FIRST))
    if alone is None or alone.count(_FIRST) != 1:
        return Derived(None, "its chat template does not render a user's message as it is")
    if _DATE in alone + (render(_talk(_FIRST, system=_SYSTEM)) or ""):
        return Derived(None, "its chat template writes the date of the day; plain strings cannot")
    for template in _candidates(render, tokenizer):
        if _agrees(template, render):
            return Derived(template, _reasoning(template, render))
    return Derived(None, "its chat template does more than to stand around each message; plain strings cannot say it")


def _renderer(tokenizer: "PreTrainedTokenizerBase") -> Render:
    """Renders up to where the assistant begins to speak, with a mark for the date; None where the template refuses."""
    from jinja2 import TemplateError

    dated = re.sub(r"\bstrftime_now\s*\(", f"'{_DATE}'.format(", tokenizer.get_chat_template())

    def render(messages: Sequence[Message], *, generation: bool = True) -> str | None:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=dated, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return None
        return str(text)

    return render


def _talk(*contents: str, system: str | None = None, roles: Sequence[str] = ("user", "assistant")) -> list[Message]:
    """Messages of these roles in turn, a system message before them."""
    said = [] if system is None else [{"role": "system", "content": system}]
    return said + [{"role": roles[at % len(roles)], "content": content} for at, content in enumerate(contents)]


@dataclass(frozen=True)
class _Seams:
    """What stands between contents: each is the end of one part of the template and the beginning of the next.

    Attributes:
        first: Before a user who speaks first.
        last: After a user who speaks last.
        closed: The same where no assistant is to speak; only tells where to cut.
        answer: Between a user and an assistant.
        back: Between an assistant and a user.
        again: Between two users; None where that is refused.
        system: Before a system message, and between it and the user; None where that is refused.
        is_late: Whether the system message stands by the last user.
    """

    first: str
    last: str
    closed: str
    answer: str
    back: str
    again: str | None
    system: tuple[str, str] | None
    is_late: bool


def _seams(render: Render) -> _Seams | None:
    """None where the marks of a plain conversation are not all there."""
    talk = _parts(render(_talk(_FIRST, _ANSWER, _SECOND)), _FIRST, _ANSWER, _SECOND)
    if talk is None:
        return None
    closed = _parts(render(_talk(_FIRST), generation=False), _FIRST)
    again = _parts(render(_talk(_FIRST, _SECOND, roles=("user",))), _FIRST, _SECOND)
    system = _parts(render(_talk(_FIRST, system=_SYSTEM)), _SYSTEM, _FIRST)
    late = _parts(render(_talk(_FIRST, _ANSWER, _SECOND, system=_SYSTEM)), _FIRST, _ANSWER, _SYSTEM, _SECOND)
    return _Seams(
        first=talk[0],
        last=talk[3],
        closed=closed[1] if closed else talk[3],
        answer=talk[1],
        back=talk[2],
        again=again[1] if again else None,
        system=(system[0], system[1]) if system else None,
        is_late=late is not None,
    )


def _parts(text: str | None, *marks: str) -> list[str] | None:
    """What stands around marks; None where they are not there once each and in this order."""
    parts, rest = [], text or ""
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        part, _, rest = rest.partition(mark)
        parts.append(part)
    return [*parts, rest]


def _candidates(render: Render, tokenizer: "PreTrainedTokenizerBase") -> Iterator[ChatTemplate]:
    """Templates that fit the marked conversations, those that allow more before those that allow less."""
    seams = _seams(render)
    if seams is None:
        return
    words = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    begin = str(tokenizer.bos_token or "")
    strip = {role: _strips(render, role) for role in ("system", "user", "assistant")}
    for free in [seams, replace(seams, again=None)] if seams.again is not None else [seams]:
        if seams.system and seams.system[0].startswith(seams.first):
            made = _merging(free, strip, words)
            yield from (made, made.model_copy(update={"strip_merged": True})) if made else ()
        made = _separate(free, strip, words, begin)
        yield from (made,) if made else ()


def _strips(render: Render, role: str) -> bool:
    spaced = "\n {} \n".format
    system = _talk(_FIRST, system=spaced(_SYSTEM))
    talk = system if role == "system" else _talk(spaced(_FIRST), spaced(_ANSWER), _SECOND)
    mark = {"system": _SYSTEM, "user": _FIRST, "assistant": _ANSWER}[role]
    return spaced(mark) not in (render(talk) or "")


def _merging(seams: _Seams, strip: Mapping[str, bool], words: Sequence[str]) -> ChatTemplate | None:
    """The template whose system message stands in a user's turn."""
    turns = _turns(seams, [seams.first, seams.back], strip, words)
    if turns is None or seams.system is None:
        return None
    before, after = seams.system[0][len(seams.first) :], seams.system[1]
    return ChatTemplate(
        start=_cut_end(seams.first, turns.user.before),
        system=Turn(before=before, after=after, strip=strip["system"]),
        system_in="last-user" if seams.is_late else "first-user",
        **turns._asdict(),
        alternating=seams.again is None,
    )


def _separate(seams: _Seams, strip: Mapping[str, bool], words: Sequence[str], begin: str) -> ChatTemplate | None:
    """The template whose system message is a turn of its own, or that takes none."""
    opening, to_user = seams.system or ("", seams.first)
    turns = _turns(seams, [seams.first, seams.back, to_user], strip, words)
    if turns is None:
        return None
    plain = _cut_end(seams.first, turns.user.before)
    start = plain if seams.system is None else begin if plain.startswith(begin) and opening.startswith(begin) else ""
    system = Turn(before=opening[len(start) :], after=_cut_end(to_user, turns.user.before), strip=strip["system"])
    return ChatTemplate(
        start=start,
        without_system=plain[len(start) :],
        system=system if seams.system else None,
        **turns._asdict(),
        alternating=seams.again is None,
    )


class _Turns(NamedTuple):
    user: Turn
    assistant: Turn
    generation: str


def _turns(seams: _Seams, to_user: Sequence[str], strip: Mapping[str, bool], words: Sequence[str]) -> _Turns | None:
    """The seams cut so that a user's turn is the same wherever it stands; None where it is not.

    Args:
        seams: To cut.
        to_user: Those seams that end where a user's content begins.
        strip: By role.
        words: Control words, which no cut goes through.
    """
    from_user = [text for text in (seams.last, seams.closed, seams.answer, seams.again) if text is not None]
    after = _common_begin(from_user, words)
    before = _common_end(to_user, words) if seams.again is None else _cut_begin(seams.again, after)
    if not all(text.endswith(before) for text in to_user):
        return None
    return _Turns(
        Turn(before=before, after=after, strip=strip["user"]),
        Turn(before=_cut_begin(seams.answer, after), after=_cut_end(seams.back, before), strip=strip["assistant"]),
        _cut_begin(seams.last, after),
    )


def _common_begin(texts: Sequence[str], words: Sequence[str]) -> str:
    found = _common(texts)
    while any(_is_within(text, len(found), words) for text in texts):
        found = found[:-1]
    return found


def _common_end(texts: Sequence[str], words: Sequence[str]) -> str:
    found = _common([text[::-1] for text in texts])[::-1]
    while any(_is_within(text, len(text) - len(found), words) for text in texts):
        found = found[1:]
    return found


def _common(texts: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda each: len({*each}) == 1, zip(*texts, strict=False)))


def _is_within(text: str, at: int, words: Sequence[str]) -> bool:
    """Whether a cut at this place goes through a control word."""
    return any(text.find(word, max(0, at - len(word) + 1), at + len(word) - 1) >= 0 for word in words if word)


def _cut_begin(text: str, begin: str) -> str:
    return text[len(begin) :]


def _cut_end(text: str, end: str) -> str:
    return text[: len(text) - len(end)]


def _agrees(template: ChatTemplate, render: Render) -> bool:
    """Whether both render other conversations alike."""
    orders: list[tuple[str, ...]] = [("user", "assistant")]
    if not template.alternating:
        orders += [("user",), ("assistant", "user", "user"), ("user", "assistant", "assistant", "user", "user")]
    systems = [None] if template.system is None else [None, *_SYSTEMS]
    return all(
        _text(template, talk) == render(talk)
        for roles in orders
        for at, system in enumerate(systems)
        for count in range(1, 6)
        if roles[(count - 1) % len(roles)] == "user"
        for first in range(at, len(_CONTENTS), 2)
        for talk in [_talk(*(_CONTENTS * 2)[first : first + count], system=system, roles=roles)]
    )


def _text(template: ChatTemplate, talk: Sequence[Message]) -> str:
    return "".join(piece.text for piece in template.pieces(talk))


def _reasoning(template: ChatTemplate, render: Render) -> str:
    talk = _talk(_FIRST, f"<think>\n{_SYSTEM}\n</think>\n\n{_ANSWER}", _SECOND)
    if _text(template, talk) == render(talk):
        return ""
    return "its chat template changes earlier answers that hold <think>; give them without their reasoning"
