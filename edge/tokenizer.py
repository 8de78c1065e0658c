"""The tokenizer as a device reads it: one ``tokenizer.json`` without what cuts or pads, and the control tokens by id."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.runtime.chat_format import ChatTemplate
from edge.runtime.manifest import Tokens
from edge.runtime.tokens import Tokeniser
from protocol.errors import BundleError, ModelError
from strategies.base_model import Base, configuration
from strategies.data.encode import prompt_ids
from strategies.data.formats import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(tokenizer: "PreTrainedTokenizerBase", path: Path, base: Base) -> None:
    """Writes ``tokenizer.json``; what a checkpoint's own file says of cutting and padding is left out.

    Raises:
        ModelError: The tokenizer cannot be written so: transformers has no fast form of it.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise ModelError(
            f"{base.name!r}: {type(tokenizer).__name__} has no tokenizer.json, and transformers has no way to make one; "
            "put a tokenizer.json of the same tokens beside the model"
        )
    backend: Any = tokenizer.backend_tokenizer
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(copy.to_str(pretty=False), encoding="utf-8")


def control_tokens(tokenizer: "PreTrainedTokenizerBase", base: Base) -> Tokens:
    """The control tokens; what ends an answer is what ends it in transformers."""
    plain = list(tokenizer("a", verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return Tokens(
        bos=bos,
        eos=tuple(sorted(_ends(tokenizer, base))),
        pad=tokenizer.pad_token_id,
        unk=tokenizer.unk_token_id,
        adds_bos=bos is not None and plain[:1] == [bos],
    )


def check(tokenizer: "PreTrainedTokenizerBase", reader: Tokeniser, chat: ChatTemplate | None, texts: Sequence[str]) -> None:
    """Makes sure that a device reads texts as transformers does, and what users say as training does.

    Args:
        tokenizer: Of the base.
        reader: Of the bundle.
        chat: Of the bundle.
        texts: To try it on.

    Raises:
        BundleError: There are other tokens.
    """
    for number, text in enumerate(texts, 1):
        said: list[Message] = [{"role": "user", "content": text}]
        if reader.ids(text) != list(tokenizer(text, verbose=False)["input_ids"]):
            wrong = "tokenizer.json"
        elif chat is not None and reader.conversation_ids(chat.pieces(said)) != prompt_ids(said, tokenizer):
            wrong = "the bundle's chat template"
        else:
            continue
        raise BundleError(
            f"text {number} of {len(texts)} has other tokens by {wrong} than by transformers; this tokenizer does more than "
            "its file says, and the bundle would read other texts than it was compared on"
        )


def _ends(tokenizer: "PreTrainedTokenizerBase", base: Base) -> set[int]:
    from transformers import GenerationConfig

    try:
        told = GenerationConfig.from_pretrained(str(base.folder), local_files_only=True).eos_token_id
    except OSError:  # there is no generation_config.json
        told = GenerationConfig.from_model_config(configuration(base)).eos_token_id
    return {token for token in (*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id) if token is not None}
