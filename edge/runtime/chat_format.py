"""A conversation as one text, put together from plain strings: the chat template without jinja that a manifest carries."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import StringConstraints

from protocol.errors import DataError
from protocol.strict import Strict

MOST_MESSAGES = 1024
Text = Annotated[str, StringConstraints(max_length=16_384)]


class Piece(NamedTuple):
    """A part of a rendered conversation.

    Attributes:
        text: As it stands in the rendering.
        is_content: Whether somebody said it. Control tokens are recognised in the template's own pieces only, so that nobody
            can speak in another one's name.
    """

    text: str
    is_content: bool


class Turn(Strict):
    """What one role's message looks like.

    Attributes:
        before: Stands before the content.
        after: Stands after it.
        strip: Whether whitespace around the content is taken away.
    """

    before: Text = ""
    after: Text = ""
    strip: bool = False


class ChatTemplate(Strict):
    """What stands around each message, and what follows the last one.

    Attributes:
        start: What every conversation begins with, such as the token that begins a text.
        without_system: What follows it where no system message does.
        system: The system message; None: the template takes none.
        system_in: ``turn``: it is a turn of its own. ``first-user``, ``last-user``: it stands before the content of that user's
            turn.
        strip_merged: Whether whitespace is taken away around both together where they are in one turn, and not around each.
        user: A user's turn.
        assistant: An assistant's turn.
        generation: What stands after the last message, for the assistant to go on from.
        alternating: Whether users and assistants must take turns, a user first.
    """

    start: Text = ""
    without_system: Text = ""
    system: Turn | None = None
    system_in: Literal["turn", "first-user", "last-user"] = "turn"
    strip_merged: bool = False
    user: Turn
    assistant: Turn
    generation: Text = ""
    alternating: bool = False

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """The conversation up to where the assistant begins to speak; two pieces of the template never follow each other.

        Args:
            messages: Each with ``role`` (system, user, assistant) and ``content``; the last one is a user's.

        Raises:
            DataError: The template does not take such a conversation.
        """
        system, turns = self._checked(messages)
        made = [Piece(self.start, False)]
        if system is None:
            made.append(Piece(self.without_system, False))
        elif self.system_in == "turn":
            made += _around(self.system, system)
        merged = {"turn": -1, "first-user": 0, "last-user": len(turns) - 1}[self.system_in]
        for at, (role, content) in enumerate(turns):
            if system is not None and at == merged:
                made += self._merged(system, content)
            else:
                made += _around(self.user if role == "user" else self.assistant, content)
        made.append(Piece(self.generation, False))
        return _joined(made)

    def answered(self, messages: Sequence[Mapping[str, str]], answer: str) -> list[Piece]:
        """The conversation with the assistant's answer to it; otherwise as ``pieces``."""
        before = self.pieces(messages)
        *others, last = before
        if self.generation:
            before = [*others, Piece(last.text.removesuffix(self.generation), False)]
        return _joined([*before, *_around(self.assistant, answer)])

    def _merged(self, system: str, content: str) -> list[Piece]:
        """The turn of a user with the system message in it."""
        before, said, after = _around(self.user, content)
        if self.strip_merged:
            return [before, *_stripped([*_around(self.system, system), Piece(content, True)]), after]
        return [before, *_around(self.system, system), said, after]

    def _checked(self, messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
        """The system message, and role and content of each other one."""
        if not 0 < len(messages) <= MOST_MESSAGES:
            raise DataError(f"found {len(messages)} messages; expected 1 to {MOST_MESSAGES}")
        found = [_said(at, message) for at, message in enumerate(messages, 1)]
        system = found.pop(0)[1] if found[0][0] == "system" else None
        if system is not None and self.system is None:
            raise DataError(
                "message 1 is the system's; this model's chat template takes none: say it in the first user's message"
            )
        before = 0 if system is None else 1
        for at, (role, _) in enumerate(found):
            if role == "system":
                raise DataError(f"message {at + 1 + before} is the system's; only the first one may be")
            if self.alternating and role != ("user", "assistant")[at % 2]:
                raise DataError(
                    f"message {at + 1 + before} is of role {role}; in this model's template users and assistants take turns"
                )
        if not found or found[-1][0] != "user":
            raise DataError(f"message {len(messages)}, the last one, is not a user's; expected what is to be answered")
        return system, found


def _said(at: int, message: Mapping[str, str]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise DataError(f"message {at}: expected a role of system, user or assistant")
    if not isinstance(content, str):
        raise DataError(f"message {at}: expected its content as a text")
    if role == "system" and not content.strip():
        raise DataError(f"message {at}: a system message that says nothing; leave it out")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise DataError(f"message {at}: its content holds half a surrogate pair, which is no character")
    return role, content


def _around(turn: Turn | None, content: str) -> list[Piece]:
    turn = turn or Turn()
    return [Piece(turn.before, False), Piece(content.strip() if turn.strip else content, True), Piece(turn.after, False)]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of the template as one, for a control token may reach over both; none is empty."""
    made: list[Piece] = []
    for piece in pieces:
        if made and piece.text and not (made[-1].is_content or piece.is_content):
            made[-1] = Piece(made[-1].text + piece.text, False)
        elif piece.text:
            made.append(piece)
    return made


def _stripped(pieces: list[Piece]) -> list[Piece]:
    """Pieces without the whitespace that their whole text begins or ends with."""
    kept = list(pieces)
    while kept and not kept[0].text.strip():
        del kept[0]
    while kept and not kept[-1].text.strip():
        del kept[-1]
    if kept:
        kept[0] = kept[0]._replace(text=kept[0].text.lstrip())
        kept[-1] = kept[-1]._replace(text=kept[-1].text.rstrip())
    return kept
