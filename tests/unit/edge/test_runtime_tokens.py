"""Token ids of texts and conversations: as in training, and nobody's words become control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from edge.runtime.chat_format import ChatTemplate, Piece, Turn
from edge.runtime.manifest import Tokens
from edge.runtime.tokens import Tokeniser
from protocol.errors import BundleError, DataError

CHATML = ChatTemplate(
    system=Turn(before="<|im_start|>system\n", after="<|im_end|>\n"),
    user=Turn(before="<|im_start|>user\n", after="<|im_end|>\n"),
    assistant=Turn(before="<|im_start|>assistant\n", after="<|im_end|>\n"),
    generation="<|im_start|>assistant\n",
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<think>"]
WRITTEN = [*CONTROL, "<|im_", "end|>", "<", "<|im_end|", "\n", "é", "h"]
UNKNOWN = "<unk>"


def byte_level(special: bool = True, extra: tuple[AddedToken, ...] = ()) -> Tokenizer:
    """Every byte is a token, and so are a newline before a letter and the names of three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate([*alphabet, "Ċh"])}, [("Ċ", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(name, special=special, normalized=False) for name in CONTROL] + list(extra))
    return made


def metaspace() -> Tokenizer:
    """SentencePiece's way: a first space, a beginning of text, control tokens that stand in the vocabulary itself."""
    letters = [UNKNOWN, "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz<>|/_:", "\n", "▁u", "▁us"]
    made = Tokenizer(
        models.BPE({letter: at for at, letter in enumerate(letters)}, [("▁", "u"), ("▁u", "s")], unk_token=UNKNOWN)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens([UNKNOWN, "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def reading(tokenizer: Tokenizer, **control) -> Tokeniser:
    return Tokeniser(tokenizer.to_str().encode(), Tokens(**control))


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


@given(st.lists(st.text("héllo \n", max_size=12), min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1))
def test_a_conversation_is_tokenised_as_one_text_as_in_training(contents):
    """Oracle: the tokenizer on the whole rendering. The token of a newline and an h lies across template and content."""
    tokenizer = byte_level()
    pieces = CHATML.pieces(talk(*contents))

    assert reading(tokenizer).conversation_ids(pieces) == tokenizer.encode("".join(piece.text for piece in pieces)).ids


@pytest.mark.parametrize("special", [True, False])
@given(st.lists(st.lists(st.sampled_from(WRITTEN), max_size=6).map("".join), min_size=3, max_size=3))
def test_no_content_becomes_a_control_token_and_all_of_it_is_read(special, contents):
    """Oracle: the control tokens are those of the same conversation with harmless contents, and decoding gives the text back.

    Tokens that are added without being called special steer a model as well where its template uses them; ``<think>`` is not
    among these.
    """
    said = talk(*contents)
    harmless = talk(*("x" for _ in contents))
    tokenizer = byte_level(special)
    reader, added = reading(tokenizer), {tokenizer.token_to_id(name) for name in (CONTROL if special else CONTROL[:2])}

    ids = reader.conversation_ids(CHATML.pieces(said))

    assert [token for token in ids if token in added] == [
        token for token in reader.conversation_ids(CHATML.pieces(harmless)) if token in added
    ]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(piece.text for piece in CHATML.pieces(said))


def test_control_tokens_that_swallow_space_do_not_make_a_content_suspect():
    """Phi's do: what follows ``<|user|>`` is taken with it, and the ids are those of training all the same."""
    tokenizer = byte_level(extra=(AddedToken("<|user|>", special=True, normalized=False, rstrip=True),))
    template = ChatTemplate(user=Turn(before="<|user|>\n", after="<|im_end|>"), assistant=Turn())
    pieces = template.pieces(talk("  two spaces"))

    assert reading(tokenizer).conversation_ids(pieces) == tokenizer.encode("<|user|>\n  two spaces<|im_end|>").ids


@pytest.mark.parametrize("added", ["\n", "\n\n", "  ", "<b>"])
def test_added_tokens_that_steer_nothing_are_read_as_in_training(added):
    """Gemma's tokenizer adds lines, spaces and tags so, and its template has a line after each mark."""
    tokenizer = byte_level(extra=(AddedToken(added, special=False, normalized=False),))
    pieces = CHATML.pieces(talk(f"one{added}two {added}{added}"))

    ids = reading(tokenizer).conversation_ids(pieces)

    assert ids == tokenizer.encode("".join(piece.text for piece in pieces)).ids
    assert tokenizer.token_to_id(added) in ids


def test_a_sentencepiece_vocabulary_that_holds_the_control_tokens_gives_none_away():
    tokenizer = metaspace()

    ids = reading(tokenizer, unk=0).conversation_ids([Piece("<s>", False), Piece("us </s> us", True), Piece("</s>", False)])

    assert [at for at, token in enumerate(ids) if token in (1, 2)] == [0, len(ids) - 1]
    assert len(ids) > 6  # all of the content is there


def test_what_the_tokenizer_does_not_know_stays_unknown_and_steers_nothing():
    tokenizer = metaspace()

    ids = reading(tokenizer, unk=0).conversation_ids([Piece("<s>", False), Piece("<unk> Ω", True)])

    assert 0 in ids
    assert ids.count(1) == 1


def test_a_control_token_of_one_character_in_a_content_is_refused():
    tokenizer = byte_level(extra=(AddedToken("§", special=True, normalized=False),))

    with pytest.raises(DataError, match="single character"):
        reading(tokenizer).conversation_ids([Piece("harmless §", True)])


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_begins_as_the_model_wants_it(adds_bos):
    """Whether the tokenizer's file says so itself or only the library that wrote it."""
    plain = byte_level()
    bos = plain.token_to_id("<think>")

    assert reading(plain, bos=bos, adds_bos=adds_bos).ids("hi") == [bos] * adds_bos + plain.encode("hi").ids
    assert reading(metaspace(), bos=1, adds_bos=adds_bos).ids("us") == metaspace().encode("us").ids


def test_what_a_file_says_of_cutting_and_padding_is_not_done():
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)

    assert len(reading(tokenizer).ids("hello")) == 5


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'])
def test_bytes_that_are_no_tokenizer_are_a_bundle_error(content):
    with pytest.raises(BundleError, match="no tokenizer"):
        Tokeniser(content, Tokens())


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(DataError, match="surrogate"):
        reading(byte_level()).ids("a\ud800")
