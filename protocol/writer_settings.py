"""The settings of a model that writes or judges texts beside the one that trains: on this machine, or behind an endpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from protocol.strict import Name, Precision, Strict

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
S = TypeVar("S", bound=Strict)


class EndpointSettings(Strict):
    """A server that speaks the chat format of OpenAI's API (``POST base_url/chat/completions``)."""

    base_url: Name = Field(description="up to and with the version, such as http://127.0.0.1:8000/v1")
    model: Name = Field(description="as the endpoint calls it")
    api_key_env: Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None, description="environment variable that holds the key; a key itself is never written into a file"
    )
    timeout_seconds: PositiveFloat = Field(60.0, description="for one answer; waiting for a connection counts")
    retries: int = Field(3, ge=0, le=10, description="further attempts where the endpoint is busy or out of reach")
    parallel: int = Field(4, ge=1, le=64, description="requests at a time")

    @model_validator(mode="after")
    def _address(self) -> "EndpointSettings":
        if wrong := list(self._wrong()):
            raise ValueError("; ".join(wrong))
        return self

    def _wrong(self) -> Iterator[str]:
        try:
            parts, _ = (found := urlsplit(self.base_url)), found.port
        except ValueError:
            parts = SplitResult("", "", "", "", "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield "base_url is no http or https address; expected one such as http://127.0.0.1:8000/v1"
        if parts.username or parts.password or parts.query or parts.fragment:
            yield "base_url holds more than an address; a key goes into the environment variable that api_key_env names"
        if self.api_key_env and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            yield "api_key_env with a plain http base_url would send the key for all to read; use https"


class SecondModel(Strict):
    """A model beside the one that trains: a base on this machine, with or without an adapter, or an endpoint."""

    base_model: Name | None = Field(None, description="hub name, local folder, installed package, or 'tiny' (embedded)")
    adapter: Name | None = Field(None, description="folder of an adapter of that base")
    precision: Precision = Field("fp32", description="how the base is held")
    batch_size: PositiveInt = Field(8, description="texts at a time on this machine")
    endpoint: EndpointSettings | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "SecondModel":
        if (self.base_model is None) == (self.endpoint is None):
            found = "neither" if self.endpoint is None else "both"
            raise ValueError(f"needs base_model or endpoint, found {found}; name the model on this machine, or the endpoint")
        if self.endpoint and self.adapter:
            raise ValueError("adapter is for a base_model on this machine, and an endpoint holds its own; leave it out")
        return self


class WriterSettings(SecondModel):
    """A model that writes an answer to each prompt."""

    temperature: float = Field(0.0, ge=0, description="0: always the likeliest token")
    max_new_tokens: PositiveInt = Field(256, description="longest answer")


class JudgeSettings(SecondModel):
    """A model that prefers one of two answers, or scores one."""

    constitution: tuple[Name, ...] = Field((), description="principles that the judge is told to go by")
    max_characters: PositiveInt = Field(4000, description="of a question and of each answer that the judge reads")


def second_models(settings: Strict) -> list[SecondModel]:
    """Every model beside the one that trains that a plan, or a section of one, names."""
    found: list[SecondModel] = []

    def seen(model: SecondModel) -> SecondModel:
        found.append(model)
        return model

    _each(settings, seen)
    return found


def beside(settings: S, folder: Path) -> S:
    """The same with the adapters of second models taken from ``folder``."""

    def placed(model: SecondModel) -> SecondModel:
        return model.model_copy(update={"adapter": str(folder / model.adapter)}) if model.adapter else model

    made: S = _each(settings, placed)
    return made


def _each(value: Any, change: Callable[[SecondModel], SecondModel]) -> Any:
    """``value`` with ``change`` made to every second model in it, however deep."""
    if isinstance(value, SecondModel):
        value = change(value)
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    if not isinstance(value, Strict):
        return value
    own = {name: getattr(value, name) for name in type(value).model_fields}
    made = {name: _each(item, change) for name, item in own.items()}
    return value.model_copy(update={name: item for name, item in made.items() if item is not own[name]})
