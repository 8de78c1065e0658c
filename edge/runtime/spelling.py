"""From token ids to text as they come: whole characters only, up to the first stop text."""

from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"


class Spelling:
    """The text of a growing sequence of tokens.

    Args:
        text: Of token ids (``Tokeniser.text``).
        before: Token ids that the sequence goes on from: whether a word begins with a space depends on them.
    """

    def __init__(self, text: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._text = text
        self._ids = list(before)
        self._told, self._told_tokens = text(self._ids), len(self._ids)

    def add(self, token: int) -> str:
        """What the token adds; nothing while the last character is not whole."""
        self._ids.append(token)
        text = self._text(self._ids)
        if len(text) <= len(self._told) or text.endswith(_HALF):
            return ""
        new = text[len(self._told) :]
        # The next token is looked at after those of this step alone: what they say is whole characters.
        self._ids = self._ids[self._told_tokens :]
        self._told, self._told_tokens = self._text(self._ids), len(self._ids)
        return new

    def rest(self) -> str:
        """What is left at the end: a half character is U+FFFD."""
        return self._text(self._ids)[len(self._told) :]


class StopTexts:
    """Lets text through up to the first stop text, wherever the borders of tokens lie in it.

    Args:
        stop: None of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be told now; the beginning of what may become a stop text is held back."""
        self._held += text
        places = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            _, at = min(places)  # of several the one that is whole first, as if letters came one by one
            told, self._held = self._held[:at], ""
            return told
        held = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - held
        told, self._held = self._held[:cut], self._held[cut:]
        return told

    def rest(self) -> str:
        """What was held back, at the end."""
        told, self._held = self._held, ""
        return told


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop text begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
