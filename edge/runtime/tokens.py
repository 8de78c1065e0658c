"""From text to token ids: plain text, and conversations in which nobody's words become control tokens."""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import pairwise

from tokenizers import Encoding, Tokenizer

from edge.runtime.chat_format import Piece
from edge.runtime.manifest import TOKENIZER, Tokens
from protocol.errors import BundleError, DataError, shown

# What ends a program or a generator and is no error: the others that are no Exception are Rust's panics.
LEAVES = (KeyboardInterrupt, SystemExit, GeneratorExit)


class Tokeniser:
    """A bundle's tokenizer; may be used by several threads at once.

    Args:
        content: Of ``tokenizer.json``.
        control: The manifest's.

    Attributes:
        vocabulary: Tokens that it knows.

    Raises:
        BundleError: It is no tokenizer.
    """

    def __init__(self, content: bytes, control: Tokens) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.vocabulary = self._tokenizer.get_vocab_size()
        except LEAVES:
            raise
        except BaseException as error:  # noqa: BLE001 - tokenizers raises nothing narrower, and Rust's panics are no Exception
            raise BundleError(f"{TOKENIZER} holds no tokenizer ({shown(str(error), 200)}); make the bundle anew") from None
        self._bos = control.bos if control.adds_bos else None
        added = {token: one for token, one in self._tokenizer.get_added_tokens_decoder().items() if one.content.strip()}
        # What a tokenizer cannot spell becomes its unknown token, which steers nothing.
        self._control = {token for token, one in added.items() if one.special} - {control.unk}
        self._named = {token: one.content for token, one in added.items() if not one.special}

    def ids(self, text: str) -> list[int]:
        """Token ids of a plain text, with the tokens that the model wants around one.

        Raises:
            DataError: It is no text.
        """
        ids = self._encoded(text, add_special_tokens=True).ids
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def conversation_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of a rendered conversation; control tokens are recognised in the template's own pieces only.

        Control tokens are those that the tokenizer calls special, and others that were added to it where the template uses
        them: not every maker calls the marks of turns special, and some add lines, spaces, or tags that steer nothing. The text
        is tokenised as one, so that tokens may span what a template and a person said, as they do in training. Where a person
        wrote a control token's name, it is cut inside the name, and stays the text that it is.

        Args:
            pieces: From ``ChatTemplate.pieces``.

        Raises:
            DataError: A content holds a control token of a single character, or is no text.
        """
        text = "".join(piece.text for piece in pieces)
        contents = list(_contents(pieces))
        marks = {
            token for token, name in self._named.items() if any(name in each.text for each in pieces if not each.is_content)
        }
        control = self._control | marks
        borders = {0, len(text)}
        while True:
            ids: list[int] = []
            cuts: set[int] = set()
            for start, end in pairwise(sorted(borders)):
                encoded = self._encoded(text[start:end], add_special_tokens=False)
                cuts |= _cuts(text, start, encoded, contents, control)
                ids += encoded.ids
            if not cuts:
                return ids
            borders |= cuts

    def holds_control(self, text: str, template: Sequence[str] = ()) -> bool:
        """Whether a control token's name stands in a text; the template's own texts say which added tokens steer, too.

        Raises:
            DataError: It is no text.
        """
        marks = {token for token, name in self._named.items() if any(name in each for each in template)}
        return not (self._control | marks).isdisjoint(self._encoded(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens; half characters at its end are U+FFFD."""
        with _reading():
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _encoded(self, text: str, *, add_special_tokens: bool) -> Encoding:
        with _reading():
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except LEAVES:
        raise
    except (TypeError, UnicodeEncodeError):
        raise DataError("expected a text, found none or half a surrogate pair in it") from None
    except BaseException as error:  # noqa: BLE001 - as above; its message may quote the text
        raise BundleError(f"{TOKENIZER} breaks on a text ({type(error).__name__}); make the bundle anew") from None


def _cuts(text: str, start: int, encoded: Encoding, contents: Sequence[range], control: AbstractSet[int]) -> set[int]:
    """Where to cut the text so that no control token is made of what a person wrote."""
    found: set[int] = set()
    if control.isdisjoint(encoded.ids):
        return found
    for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
        if token not in control:
            continue
        # Some control tokens swallow the whitespace around them, which is no part of their name.
        name = text[start + first : start + last]
        first += start + len(name) - len(name.lstrip())
        last = first + len(name.strip())
        if any(first < content.stop and content.start < last for content in contents):
            if last - first < 2:
                raise DataError("a message holds a control token of a single character, which no text may; take it out")
            found.add(first + 1)
    return found


def _contents(pieces: Iterable[Piece]) -> Iterable[range]:
    at = 0
    for piece in pieces:
        if piece.is_content:
            yield range(at, at + len(piece.text))
        at += len(piece.text)
