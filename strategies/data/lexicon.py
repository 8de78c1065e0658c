"""Finds listed words and names in a text: whole words where a script leaves spaces, anywhere where it leaves none."""

import re
from collections.abc import Callable, Iterable, Iterator

EAST_ASIAN = "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
LETTER = f"(?:(?![{EAST_ASIAN}])[^\\W_])"  # East Asian words are written without spaces between them
Span = tuple[int, int]


def whole_words(words: Iterable[str]) -> Callable[[str], Iterator[Span]]:
    """What finds the listed words in a text, the longest first; spans do not overlap. Time does not grow with the list."""
    listed = frozenset(words)
    lengths = sorted({len(word) for word in listed}, reverse=True)
    first = re.compile("[" + re.escape("".join(sorted({word[0] for word in listed}))) + "]")
    letter = re.compile(LETTER)

    def find(text: str) -> Iterator[Span]:
        end = 0
        for begin in first.finditer(text):
            at = begin.start()
            if at < end or (at and letter.match(text, at) and letter.match(text, at - 1)):
                continue
            for length in lengths:
                goes_on = letter.match(text, at + length) and letter.match(text, at + length - 1)
                if text[at : at + length] in listed and not goes_on:
                    end = at + length
                    yield at, end
                    break

    return find
