"""A bundle that runs: answers, classes and embeddings, with adapters that are swapped from call to call."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.runtime import encoding
from edge.runtime.adapters import Adapter, bound, read
from edge.runtime.answering import Answer, Row, Terms, write
from edge.runtime.conversation import Conversation
from edge.runtime.decoding import Reader, reader
from edge.runtime.manifest import TOKENIZER, BundleManifest, DecoderShape, adapter_path
from edge.runtime.opening import RESOURCES, STATE, Trusted, opened_bundle
from edge.runtime.sampling import Writing, writing
from edge.runtime.session import Resources, Session
from edge.runtime.tokens import Tokeniser
from edge.runtime.verify import content
from protocol.adapter import Adapter as Trained
from protocol.errors import AdapterError, DataError, ModelError, shown

Array = NDArray[Any]
Messages = Sequence[Mapping[str, str]]
# A text to go on from, a conversation to answer, or token ids as they are.
Prompt = str | Messages | Sequence[int]
_MOST_CHARACTERS: Final = 32  # of a token, on average; of ordinary text it has four


@dataclass(frozen=True)
class Classified:
    """What a classifier says of texts.

    Attributes:
        names: Of the labels.
        probabilities: ``(texts, labels)`` float32; rows sum to 1.
    """

    names: tuple[str, ...]
    probabilities: Array

    @property
    def labels(self) -> list[str]:
        """The likeliest label of each text."""
        return [self.names[at] for at in self.probabilities.argmax(1)]


def open(  # noqa: A001 - model.open says what it does
    folder: Path | str,
    trusted: Trusted,
    *,
    lowest_version: int = 0,
    name: str | None = None,
    state: Path | None = STATE,
    resources: Resources = RESOURCES,
) -> "Model":
    """Opens a bundle, if every byte of it is as a trusted key signed it; only then anything of it is parsed.

    Args:
        folder: The bundle.
        trusted: Whose signature counts: keys, or the path of a file of them.
        lowest_version: Older ones are refused.
        name: The one bundle that is expected; None: any that is signed.
        state: Where this device remembers the newest version that it opened, so that an older one is refused; relative to the
            folder that the bundle lies in. None: nowhere.
        resources: Threads and memory.

    Raises:
        BundleError: Anything does not hold, or the graph is not what the manifest says; ``SignatureError`` for keys.
        ModelError: This onnxruntime is older than the bundle needs.
        HardwareError: The model does not fit into memory.
    """
    return opened_bundle(Model, folder, trusted, lowest_version=lowest_version, name=name, state=state, resources=resources)


class Model:
    """An opened bundle; every method may be called from several threads at once.

    Attributes:
        manifest: What the bundle says of itself.
        tokens: Its tokenizer.
    """

    def __init__(self, folder: Path, manifest: BundleManifest, resources: Resources = RESOURCES) -> None:
        """Opens a folder whose files were verified (``open`` does it)."""
        self.manifest = manifest
        self._folder = folder
        self._session = Session(folder, manifest, resources)
        self.tokens = Tokeniser(content(folder, manifest, TOKENIZER), manifest.tokens)
        self._adapters: dict[str, Adapter] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._adapters)

    def load_adapter(self, adapter: str | Path, *, labels: Sequence[str] = ()) -> str:
        """Loads an adapter; gives its name.

        Args:
            adapter: The id of one of the bundle's, or the path of an ``.onnx_adapter`` file, whose name is the file's. Such a
                file is not signed: load only one whose origin is known.
            labels: Of the classifier's rows of such a file; empty: the base's own.

        Raises:
            AdapterError: There is none, it does not fit, it is not finite, or one of that name is loaded.
            BundleError: It is not as it was signed.
        """
        listed = self.manifest.adapters.get(str(adapter))
        path = self._folder / adapter_path(str(adapter)) if listed else Path(adapter)
        if listed is None and path.suffix != ".onnx_adapter":
            raise AdapterError(
                f"{shown(str(adapter), 100)}: no adapter of this bundle, which has {_named(self.manifest.adapters)}, and no "
                ".onnx_adapter file"
            )
        name = path.stem
        if name in self._adapters or (listed is None and name in {"base", *self.manifest.adapters}):
            raise AdapterError(f"an adapter {shown(name, 100)} is there already; unload it, or give the file another name")
        if listed is not None:
            content(self._folder, self.manifest, adapter_path(name))  # as it was signed, now as well
        named = listed.labels if listed else tuple(labels)
        made = read(path, self.manifest, self._session.dtypes, named)
        if self._adapters.setdefault(name, made) is not made:
            raise AdapterError(f"an adapter {shown(name, 100)} was loaded by somebody else meanwhile")
        return name

    def use_adapter(self, name: str, adapter: Trained, *, labels: Sequence[str] = ()) -> None:
        """Loads an adapter that this device trained, under a name; one that is loaded under it gives way.

        Raises:
            AdapterError: It does not fit, is not finite, or the name is one of the bundle's own.
        """
        if name in {"base", *self.manifest.adapters}:
            raise AdapterError(f"{shown(name, 100)} is a name of the bundle's own; choose another one")
        self._adapters[name] = bound(adapter, self.manifest, self._session.dtypes, tuple(labels))

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; calls that use it end well.

        Raises:
            AdapterError: None of that name is loaded.
        """
        self._adapter(name)
        self._adapters.pop(name, None)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as this project's training makes them.

        Raises:
            DataError: The prompt is empty, or the chat template does not take such a conversation.
            ModelError: The bundle has no chat template.
        """
        parts = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        if not isinstance(parts, Sequence) or isinstance(parts, bytes | bytearray | memoryview):
            raise DataError(f"the prompt is of {type(prompt).__name__}; expected a text, messages or token ids")
        if not len(parts):
            raise DataError("the prompt is empty; expected a text, messages or token ids")
        self._check_length(parts)
        if isinstance(parts, str):
            return self.tokens.ids(parts)
        ids = [int(part) for part in parts if isinstance(part, int | np.integer) and not isinstance(part, bool)]
        messages = [part for part in parts if isinstance(part, Mapping)]
        if len(parts) not in (len(ids), len(messages)):
            raise DataError("the prompt is no text, and neither messages alone nor token ids alone")
        if ids:
            return ids
        if self.manifest.chat is None:
            raise ModelError(f"this bundle has no chat template ({self.manifest.chat_remark}); give a plain text")
        return self.tokens.conversation_ids(self.manifest.chat.pieces(messages))

    def generate(self, prompt: Prompt, *, adapter: str | None = None, **settings: Any) -> Answer:
        """Writes one answer.

        Args:
            prompt: A text to go on from, messages (each with ``role`` and ``content``) to answer, or token ids.
            adapter: A loaded adapter's name; None for the base.
            settings: Of ``sampling.Writing``: max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop, seed.

        Raises:
            DataError: The prompt is empty, or leaves no room in the context.
            ConfigurationError: A setting is unknown or out of its bounds.
            AdapterError: No such adapter is loaded.
            ModelError: This is no decoder.
        """
        return self.generate_all([prompt], adapter=adapter, **settings)[0]

    def generate_all(
        self, prompts: Sequence[Prompt], *, adapter: str | None = None, batch_size: int = 8, **settings: Any
    ) -> list[Answer]:
        """Writes answers to several prompts, ``batch_size`` at a time; otherwise as ``generate``."""
        shape, inputs, asked = self._decoder(), self._adapter(adapter).inputs, writing(**settings)
        made = [self._row(prompt, asked) for prompt in prompts]
        size = 1 if shape.cache == "concat" else _positive(batch_size)
        # Rows of like length: what waits for others is little.
        order = sorted(range(len(made)), key=lambda at: len(made[at].prompt))
        for start in range(0, len(order), size):
            rows = [made[at] for at in order[start : start + size]]
            for _ in write(reader(self._session, shape, inputs, len(rows)), rows):
                pass
        return [row.answer() for row in made]

    def stream(self, prompt: Prompt, *, adapter: str | None = None, **settings: Any) -> "Stream":
        """An answer as it is written; otherwise as ``generate``, which raises what this raises, before the first piece."""
        return Stream(self.row(prompt, **settings), self.reader(adapter))

    def conversation(self, *, adapter: str | None = None, system: str | None = None) -> Conversation:
        """A conversation that is read only once: each turn goes on from the one before.

        Raises:
            AdapterError: No such adapter is loaded.
            ModelError: This is no decoder, or it has no chat template.
        """
        return Conversation(self.row, self.reader(adapter), system)

    def reader(self, adapter: str | None = None) -> Reader:
        """What reads token ids and gives logits; for one thread."""
        return reader(self._session, self._decoder(), self._adapter(adapter).inputs)

    def row(self, prompt: Prompt, **settings: Any) -> Row:
        """An answer that is yet to be written."""
        return self._row(prompt, writing(**settings))

    def classify(self, texts: Sequence[str], *, adapter: str | None = None, batch_size: int = 16) -> Classified:
        """Probabilities of the labels for each text.

        Raises:
            DataError: There is no text, or one is longer than the model reads.
            AdapterError: No such adapter is loaded.
            ModelError: This is no classifier.
        """
        self._check_kind("classifier")
        used = self._adapter(adapter)
        logits = self._encoded(self._read(texts), used, batch_size)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return Classified(used.labels or self.manifest.labels, powers / powers.sum(1, keepdims=True))

    def embed(self, texts: Sequence[str], *, adapter: str | None = None, batch_size: int = 16) -> Array:
        """Embeddings ``(texts, hidden)`` float32; raises as ``classify``."""
        self._check_kind("embedder")
        return self._encoded(self._read(texts), self._adapter(adapter), batch_size)

    def outputs(self, ids: Sequence[int], *, adapter: str | None = None) -> Array:
        """What the graph itself gives for token ids, float32: ``(tokens, vocabulary)``, ``(labels,)`` or ``(hidden,)``."""
        if self.manifest.kind == "decoder":
            return self.reader(adapter).every(ids)
        return np.asarray(self._encoded([ids], self._adapter(adapter), 1)[0])

    def _row(self, prompt: Prompt, asked: Writing) -> Row:
        shape = self._decoder()
        terms = Terms(frozenset(self.manifest.tokens.eos), shape.context_tokens, shape.vocabulary)
        goes_on = isinstance(prompt, str)
        return Row(self.prompt_ids(prompt), asked, self.tokens, terms, goes_on=goes_on)

    def _check_length(self, prompt: Sequence[Any]) -> None:
        """Refuses what would only be tokenised to be refused."""
        said = [prompt] if isinstance(prompt, str) else [part.get("content") for part in prompt if isinstance(part, Mapping)]
        characters = sum(len(text) for text in said if isinstance(text, str))
        context = (self.manifest.decoder or self.manifest.encoder).context_tokens  # type: ignore[union-attr] # one is there
        if characters > _MOST_CHARACTERS * context:
            raise DataError(
                f"the text has {characters} characters; expected at most {_MOST_CHARACTERS * context}, for the context holds "
                f"{context} tokens; shorten it"
            )

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise DataError("expected a list of texts, found one text")
        for text in texts:
            self._check_length([{"content": text}])
        return [self.tokens.ids(text) for text in texts]

    def _encoded(self, rows: Sequence[Sequence[int]], adapter: Adapter, batch_size: int) -> Array:
        shape = self.manifest.encoder
        if shape is None:
            raise ModelError(f"{self.manifest.name} is a decoder, which gives no classes and no embeddings")
        pad = self.manifest.tokens.pad or 0
        return encoding.outputs(self._session, shape, adapter.inputs, rows, pad, _positive(batch_size))

    def _adapter(self, name: str | None) -> Adapter:
        if name is None:
            return Adapter({})
        found = self._adapters.get(name)
        if found is None:
            raise AdapterError(
                f"no adapter {shown(name, 100)} is loaded; loaded are {_named(self._adapters)}: load_adapter first"
            )
        return found

    def _decoder(self) -> DecoderShape:
        self._check_kind("decoder")
        return self.manifest.decoder  # type: ignore[return-value] # the manifest of a decoder has one

    def _check_kind(self, wanted: str) -> None:
        kind = self.manifest.kind
        if kind != wanted:
            does = {"decoder": "generate", "classifier": "classify", "embedder": "embed"}
            raise ModelError(f"{self.manifest.name} (kind: {kind}) can {does[kind]}; to {does[wanted]} needs a {wanted}")


class Stream(Iterator[str]):
    """Pieces of an answer, none of them empty, none of them with half a character; together they are its text."""

    def __init__(self, row: Row, source: Reader) -> None:
        self._row = row
        self._steps = write(source, [row])

    def __next__(self) -> str:
        """The next piece."""
        for _ in self._steps:
            if self._row.new:
                return self._row.new
        raise StopIteration

    def answer(self) -> Answer:
        """The whole answer; for after the last piece."""
        return self._row.answer()


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size: found {batch_size}, expected at least 1")
    return batch_size


def _named(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:20]) or "none"
