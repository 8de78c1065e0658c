"""What OpenAI's API asks and what it is answered, as far as a bundle can: requests read strictly, replies as plain dicts.

What would change an answer and cannot be done here is refused by name; what only serves its own books is passed over.
"""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from edge.runtime.answering import Answer
from protocol.errors import ConfigurationError, shown

MOST_INPUTS = 256
_LARGEST_SEED = 2**63 - 1
_No = Annotated[float, Field(ge=0, le=0)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Request = TypeVar("_Request", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Asked(_Frozen):
    model: str
    user: Any = None


class _StreamOptions(_Frozen):
    include_usage: bool = False
    include_obfuscation: Any = None


class _Writing(_Asked):
    """How an answer is to be written; ``top_k`` and ``repetition_penalty`` are what other local servers add."""

    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    stop: _Stop | Annotated[tuple[_Stop, ...], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=_LARGEST_SEED)
    n: Literal[1] | None = None
    frequency_penalty: _No | None = None
    presence_penalty: _No | None = None
    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None

    def settings(self) -> dict[str, Any]:
        """What ``sampling.Writing`` is told; without a temperature answers are drawn, as OpenAI's are."""
        told: dict[str, Any] = {"top_p": self.top_p, "top_k": self.top_k, "repetition_penalty": self.repetition_penalty}
        told |= {"temperature": 1.0 if self.temperature is None else self.temperature, "max_new_tokens": self.longest()}
        told["seed"] = secrets.randbits(63) if self.seed is None else self.seed & _LARGEST_SEED
        told["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        return {name: value for name, value in told.items() if value is not None}

    def longest(self) -> int | None:
        """Tokens of the longest answer."""
        return self.max_tokens

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class _Part(_Frozen):
    type: Literal["text"]
    text: str


class _Message(_Frozen):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=1024)]
    name: Any = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class _TextAlone(_Frozen):
    type: Literal["text"]


class ChatAsked(_Writing):
    """``POST /v1/chat/completions``."""

    messages: list[_Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: Literal[False] | None = None
    response_format: _TextAlone | None = None

    def longest(self) -> int:
        """Without a limit an answer is as long as the context lets it be."""
        return self.max_completion_tokens or self.max_tokens or 2**31 - 1


class TextAsked(_Writing):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def text(self) -> str:
        """What to go on from."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def longest(self) -> int:
        """16 tokens, as OpenAI's, where nothing is said."""
        return self.max_tokens or 16


class VectorsAsked(_Asked):
    """``POST /v1/embeddings``."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def texts(self) -> list[str]:
        """What to embed."""
        return [self.input] if isinstance(self.input, str) else self.input


def asked(kind: type[_Request], body: bytes) -> _Request:
    """A request from bytes of any origin.

    Raises:
        ConfigurationError: It is none; names fields, never what is in them.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = dict.fromkeys(shown(f"{'.'.join(map(str, one['loc'])) or 'body'}: {_told(one)}", 200) for one in found)
        raise ConfigurationError("request", list(problems)[:8]) from None


def _told(problem: Any) -> str:
    return "not supported here; leave it out" if problem["type"] == "extra_forbidden" else str(problem["msg"])


class Reply:
    """The frame that all parts of one reply share.

    Args:
        chat: Whether it is a message, or a text.
        model: As it was asked for.
        fingerprint: Of the bundle.
    """

    def __init__(self, model: str, fingerprint: str, *, chat: bool) -> None:
        self._chat = chat
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._frame: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._frame["system_fingerprint"] = fingerprint

    @property
    def id(self) -> str:
        """Of the completion."""
        return str(self._frame["id"])

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The reply that is not streamed."""
        said: dict[str, Any] = {"text": answer.text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish(answer)}
        return {**self._frame, "choices": [choice], "usage": usage(answer.prompt_tokens, len(answer.ids))}

    def part(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """One event of a stream: a piece of text, or None for the beginning and the end."""
        said: dict[str, Any] = {"text": text or ""}
        if self._chat:
            begins = {"role": "assistant", "content": ""} if reason is None else {}
            said = {"delta": begins if text is None else {"content": text}}
        return {**self._event(), "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def took(self, answer: Answer) -> dict[str, Any]:
        """The last event of a stream, where it was asked for."""
        return {**self._event(), "choices": [], "usage": usage(answer.prompt_tokens, len(answer.ids))}

    def _event(self) -> dict[str, Any]:
        return self._frame | ({"object": "chat.completion.chunk"} if self._chat else {})


def finish(answer: Answer) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if answer.reason == "length" else "stop"


def usage(prompt_tokens: int, written: int | None = None) -> dict[str, int]:
    """What a request took."""
    told = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + (written or 0)}
    return told if written is None else {**told, "completion_tokens": written}


def vectors(model: str, embedded: NDArray[Any], prompt_tokens: int, *, packed: bool) -> dict[str, Any]:
    """Embeddings as numbers, or as little-endian float32 in base64.

    Args:
        model: As it was asked for.
        embedded: ``(texts, hidden)``.
        prompt_tokens: Of all texts.
        packed: Whether in base64.
    """

    def told(row: NDArray[Any]) -> str | list[float]:
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") if packed else row.tolist()

    rows = [{"object": "embedding", "index": at, "embedding": told(row)} for at, row in enumerate(np.asarray(embedded))]
    return {"object": "list", "data": rows, "model": model, "usage": usage(prompt_tokens)}


def models(names: Sequence[str]) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [one_model(name) for name in names]}


def one_model(name: str) -> dict[str, Any]:
    """One model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "fedge"}


def problem(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
