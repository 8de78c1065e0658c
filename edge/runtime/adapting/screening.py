"""Which words of a user a device may learn from: none that steer the model, drown the others or say the same without end."""

import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from edge.runtime.chat_format import ChatTemplate
from edge.runtime.tokens import Tokeniser
from protocol.errors import DataError

LONGEST: Final = 16_384
SAME: Final = 5
_SPACES: Final = frozenset("\n\r\t")
_NO_TEXT: Final = frozenset(("Cc", "Cs", "Co", "Cn"))  # Unicode's controls, halves of pairs, private and unknown characters
# English takes 0.4 to 0.5 of its bytes when deflated, code and tables 0.15 to 0.35, thirty times the same sentence 0.06.
_LOOP_BYTES, _LOOP_RATIO = 240, 0.12


class Screen:
    """Looks at texts before they are kept and again before they are learnt from.

    Args:
        tokens: The bundle's tokenizer.
        chat: Its template.
        longest: Characters of all texts of a row together.
        same: So many rows may teach the same words; case and spaces make no other ones.
    """

    def __init__(self, tokens: Tokeniser, chat: ChatTemplate, longest: int = LONGEST, same: int = SAME) -> None:
        self._tokens, self._longest, self._same = tokens, longest, same
        turns = [turn for turn in (chat.system, chat.user, chat.assistant) if turn]
        self._template = [chat.start, chat.without_system, chat.generation]
        self._template += [text for turn in turns for text in (turn.before, turn.after)]

    def problem(self, messages: Sequence[Mapping[str, str]], answers: Sequence[str], learnt: str | None) -> str:
        """What is wrong with a row, in numbers and without its words; empty where nothing is.

        Args:
            messages: That were answered.
            answers: The answer, and a better one where there is.
            learnt: Which of them is to be learnt; None: none.
        """
        texts = [message["content"] for message in messages] + list(answers)
        size = sum(map(len, texts))
        if size > self._longest:
            return f"too long: {size} characters, expected at most {self._longest}"
        if count := sum(map(_no_text, texts)):
            return f"no text: {count} characters are controls, halves of pairs or unknown"
        try:
            if count := sum(self._tokens.holds_control(text, self._template) for text in texts):
                return f"control tokens: their names stand in {count} of its {len(texts)} texts"
        except DataError:
            return "no text: the tokenizer does not take it"
        if learnt is not None and not learnt.strip():
            return "empty: 0 characters to learn"
        if learnt is not None and (ratio := _repetition(learnt)) < _LOOP_RATIO:
            return f"a loop: deflates to {ratio:.3f} of its bytes, expected {_LOOP_RATIO} or more"
        return ""

    def flooding(self, learnt: str, before: Counter[str]) -> str:
        """What is wrong with teaching the same words once more; ``before`` counts ``words`` of other rows."""
        count = before[words(learnt)]
        return f"the same answer: {count} rows teach it already, expected at most {self._same}" if count >= self._same else ""


def words(text: str) -> str:
    """A text without what makes copies look different: case, kinds of letters, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _no_text(text: str) -> int:
    return sum(unicodedata.category(each) in _NO_TEXT and each not in _SPACES for each in text)


def _repetition(text: str) -> float:
    content = text.encode()
    return len(zlib.compress(content)) / len(content) if len(content) >= _LOOP_BYTES else 1.0
