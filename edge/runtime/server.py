"""A local server that existing clients of OpenAI's API can talk to, for one bundle: its routes and what they answer.

Who may ask, and how much: ``edge.runtime.listening``; who waits for what: ``edge.runtime.turns``.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

from edge.runtime import openai_format
from edge.runtime.answering import Answer, Row
from edge.runtime.collecting import Collector
from edge.runtime.listening import BoundedServer, Connection, GoneError, RefusedError, Settings, encoded
from edge.runtime.model import Model, Prompt
from edge.runtime.openai_format import ChatAsked, Reply, TextAsked, VectorsAsked, asked
from edge.runtime.turns import Turns
from protocol.errors import ConfigurationError, FedgeError

BASE: Final = "base"
_FEEDBACK: Final = "/v1/feedback"
_log = logging.getLogger(__name__)


class BundleServer(BoundedServer):
    """Serves the base as the model ``base`` and each loaded adapter by its name; ``serve_forever`` runs it.

    Args:
        model: Opened, with the adapters that are to be served.
        settings: Where and how.
        collector: Takes what users say of answers that they agreed to have kept; without one nothing is remembered.

    Raises:
        ConfigurationError: It cannot listen there, or OpenAI's API has nothing for such a bundle.
    """

    def __init__(self, model: Model, settings: Settings, collector: Collector | None = None) -> None:
        if model.manifest.kind == "classifier":
            raise ConfigurationError("server", ["a classifier has no place in OpenAI's API; ask it with fedge edge run"])
        self.model, self.collector = model, collector
        self.names = (BASE, *model.adapters)
        self.fingerprint = f"{model.manifest.name}-{model.manifest.version}"
        self.turns = Turns(settings.parallel, settings.waiting, settings.answer_seconds)
        super().__init__(settings, _Handler)

    def service_actions(self) -> None:
        """Between requests, every half second: what waits for feedback is forgotten in time even where nobody asks."""
        if self.collector is not None:
            self.collector.let_go()


class _Handler(Connection):
    """One request of one connection."""

    server: BundleServer
    _tokens = (0, 0)  # read and written

    @property
    def _route(self) -> str:
        """The path if it is one of ours: any other may hold anything."""
        path = getattr(self, "path", "").partition("?")[0]
        return path if path in {*_POST, "/health", "/v1/models", _FEEDBACK} else "elsewhere"

    def _problem(self, error: RefusedError) -> Mapping[str, Any]:
        kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return openai_format.problem(str(error), kind, error.code)

    def _took(self) -> str:
        return f", {self._tokens[0]} + {self._tokens[1]} tokens"

    def do_DELETE(self) -> None:  # noqa: N802 - as do_GET
        """The standard library's name for it."""
        self._guarded(self._delete)

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        elif path == "/v1/models":
            self._send(HTTPStatus.OK, openai_format.models(self.server.names))
        elif path.startswith("/v1/models/"):
            name = unquote(path.removeprefix("/v1/models/"))
            self._adapter(name)
            self._send(HTTPStatus.OK, openai_format.one_model(name))
        else:
            raise _nowhere(path in _POST or path == _FEEDBACK, "POST")

    def _delete(self) -> None:
        if self.path != _FEEDBACK:
            raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.NOT_IMPLEMENTED.phrase)
        self._send(HTTPStatus.OK, self._collector().wipe())

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        if path == _FEEDBACK:
            collector = self._collector()
            self._send(HTTPStatus.OK, collector.take(self._body()))
            return
        if path not in _POST:
            raise _nowhere(path == "/health" or path.startswith("/v1/models"), "GET")
        kind, answer = _POST[path]
        if self.server.model.manifest.kind != kind:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"this bundle is no {kind}; GET /v1/models tells what is here")
        answer(self, self._body())

    def _chat(self, body: bytes) -> None:
        found = asked(ChatAsked, body)
        self._write(found, [message.plain() for message in found.messages], chat=True)

    def _text(self, body: bytes) -> None:
        found = asked(TextAsked, body)
        self._write(found, found.text, chat=False)

    def _write(self, found: ChatAsked | TextAsked, prompt: Prompt, *, chat: bool) -> None:
        adapter = self._adapter(found.model)
        model = self.server.model
        if chat and model.manifest.chat is None:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "this bundle has no chat template; use /v1/completions")
        reply = Reply(found.model, self.server.fingerprint, chat=chat)
        with self.server.turns.take(self._is_gone) as turn:
            row, steps = turn.begin(model, prompt, adapter, found.settings())
            pieces = self._pieces(row, steps)
            if found.stream:
                self._stream(reply, pieces, row, found, prompt)
                return
            for _ in pieces:
                pass
        answer = self._told(row)
        self._hold(reply, found, prompt, answer)
        self._send(HTTPStatus.OK, reply.whole(answer))

    def _hold(self, reply: Reply, found: ChatAsked | TextAsked, prompt: Prompt, answer: Answer) -> None:
        """Where who started the server and who asks agree to it."""
        collector = self.server.collector
        if collector is not None and found.store is True and isinstance(found, ChatAsked):
            who = [each[:512] for each in (found.user, found.safety_identifier) if isinstance(each, str)]
            collector.hold(reply.id, prompt, answer.text, " ".join([self.client_address[0], *who]))  # type: ignore[arg-type] # messages

    def _collector(self) -> Collector:
        if self.server.collector is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "this server collects no feedback (fedge edge serve --feedback)")
        return self.server.collector

    def _pieces(self, row: Row, steps: Iterator[None]) -> Iterator[str]:
        """Text as it comes, as long as somebody waits for it and it takes not too long."""
        until = time.monotonic() + self.server.settings.answer_seconds
        for _ in steps:
            if row.new:
                yield row.new
            if self._is_gone():
                raise GoneError
            if time.monotonic() > until:
                return

    def _stream(self, reply: Reply, pieces: Iterator[str], row: Row, found: ChatAsked | TextAsked, prompt: Prompt) -> None:
        self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream"})
        self._event(reply.part(None))
        try:
            for piece in pieces:
                self._event(reply.part(piece))
        except FedgeError:
            _log.error("%s: an answer broke off", self._route)
            self._event(openai_format.problem("the model could not go on", "server_error"))
            return
        answer = self._told(row)
        self._hold(reply, found, prompt, answer)
        self._event(reply.part(None, openai_format.finish(answer)))
        if found.tells_usage:
            self._event(reply.took(answer))
        self.wfile.write(b"data: [DONE]\n\n")
        self._note(HTTPStatus.OK)

    def _embed(self, body: bytes) -> None:
        found = asked(VectorsAsked, body)
        adapter, model = self._adapter(found.model), self.server.model
        with self.server.turns.take(self._is_gone):
            vectors = model.embed(found.texts, adapter=adapter)
        self._tokens = sum(len(model.tokens.ids(text)) for text in found.texts), 0
        packed = found.encoding_format == "base64"
        self._send(HTTPStatus.OK, openai_format.vectors(found.model, vectors, self._tokens[0], packed=packed))

    def _adapter(self, name: str) -> str | None:
        if name not in self.server.names:
            there = ", ".join(self.server.names[:20])
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no such model here; there are {there}", "model_not_found")
        return None if name == BASE else name

    def _told(self, row: Row) -> Answer:
        answer = row.answer()
        self._tokens = answer.prompt_tokens, len(answer.ids)
        return answer

    def _event(self, told: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + encoded(told) + b"\n\n")


_POST: dict[str, tuple[str, Callable[[_Handler, bytes], None]]] = {
    "/v1/chat/completions": ("decoder", _Handler._chat),  # noqa: SLF001
    "/v1/completions": ("decoder", _Handler._text),  # noqa: SLF001
    "/v1/embeddings": ("embedder", _Handler._embed),  # noqa: SLF001
}


def _nowhere(is_other: bool, method: str) -> RefusedError:
    if is_other:
        return RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"expected {method}", Allow=method)
    return RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here; GET /v1/models tells what is")
