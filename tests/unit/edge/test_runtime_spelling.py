"""Text from tokens as they come: whole characters, no stop text, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from edge.runtime.spelling import Spelling, StopTexts

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=40)
# Every byte is a token: every character that is not ASCII lies across tokens.
LETTERS = sorted(ByteLevel.alphabet())
BYTES = Tokenizer(BPE({letter: at for at, letter in enumerate(LETTERS)}, []))
BYTES.pre_tokenizer, BYTES.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
FALLBACK = Tokenizer(BPE({"▁": 256} | {f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
FALLBACK.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def spelt(tokenizer: Tokenizer, ids, before=()) -> list[str]:
    spelling = Spelling(tokenizer.decode, before)
    return [*map(spelling.add, ids), spelling.rest()]


@given(TEXTS)
def test_pieces_are_the_text_and_hold_whole_characters_only(text):
    """Oracle: the text itself, of which every byte is a token."""
    for tokenizer, ids in ((BYTES, BYTES.encode(text).ids), (FALLBACK, list(text.encode()))):
        pieces = spelt(tokenizer, ids)

        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@given(TEXTS, TEXTS)
def test_what_stands_before_is_not_told_again(before, text):
    ids = BYTES.encode(text).ids

    assert "".join(spelt(BYTES, ids, BYTES.encode(before).ids)) == text


def test_a_character_that_never_becomes_whole_is_told_at_the_end_as_one_that_is_unknown():
    assert spelt(BYTES, BYTES.encode("aé").ids[:2]) == ["a", "", "\ufffd"]


def test_a_word_that_goes_on_from_a_text_keeps_its_space():
    """SentencePiece's decoders drop the first space of a text: after another token it is no first one."""
    tokenizer = Tokenizer(BPE({"▁a": 0, "▁time": 1}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])

    assert spelt(tokenizer, [1], before=[0]) == [" time", ""]
    assert spelt(tokenizer, [1]) == ["time", ""]


@given(st.lists(st.text("ab<>", max_size=4), max_size=8), st.lists(st.text("ab<>", min_size=1, max_size=3), max_size=3))
def test_what_is_told_ends_before_the_first_stop_text_however_it_is_cut(pieces, stop):
    """Oracle: the text as a whole, cut at the first place where any stop text begins that is whole first.

    Of two that overlap, the one that is whole first ends the text: the other one is not known yet.
    """
    stops = StopTexts(stop)
    told = ["" if stops.found else stops.add(piece) for piece in pieces]
    told.append(stops.rest())

    text = "".join(pieces)
    ends = [(end, min(end - len(word) for word in stop if text[:end].endswith(word))) for end in range(len(text) + 1)
            if any(text[:end].endswith(word) for word in stop)]  # fmt: skip
    assert "".join(told) == (text[: ends[0][1]] if ends else text)
    assert stops.found == bool(ends)


@pytest.mark.parametrize("cut", [["never", " EN", "D more"], ["never ENDEND"], list("never END")])
def test_a_stop_text_is_found_across_pieces(cut):
    stops = StopTexts(["END", "STOP"])

    assert "".join(map(stops.add, cut)) + stops.rest() in ("never ", "never  more")
    assert stops.found


def test_what_only_looked_like_a_stop_text_is_told():
    stops = StopTexts(["</answer>"])

    assert [stops.add("1 <"), stops.add(" 2"), stops.add(" </ans"), stops.rest()] == ["1 ", "< 2", " ", "</ans"]
