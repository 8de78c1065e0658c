"""A local server that existing clients of OpenAI's API can talk to: on the standard library, for one bundle.

It listens on this machine alone unless it has a token. What comes from outside is bounded in bytes, time and number: head
and body, seconds until a request is whole, connections, requests that wait. A browser cannot be made to use it: a page of
another origin cannot send JSON without being allowed to, which nobody is, and a name that is made to point here is refused by
its Host header. Logs and errors hold neither prompts nor answers. There is no TLS: beyond this machine, put a proxy that has
it in front.
"""

import hashlib
import hmac
import io
import ipaddress
import json
import logging
import queue
import re
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import unquote

from edge.runtime import openai_format
from edge.runtime.answering import Answer, Row, write
from edge.runtime.decoding import Reader
from edge.runtime.model import Model, Prompt
from edge.runtime.openai_format import ChatAsked, Reply, TextAsked, VectorsAsked, asked
from edge.runtime.tokens import LEAVES
from protocol.errors import ConfigurationError, DataError, FedgeError

BASE: Final = "base"
HEAD_BYTES: Final = 32 * 1024
SHORTEST_TOKEN: Final = 16
_LINGER_BYTES, _LINGER_SECONDS = 2**24, 1.0
_LOOK_SECONDS = 0.25  # between two looks whether who waits is still there
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+)(:[0-9]{1,5})?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Where a server listens and what it lets through.

    Attributes:
        address: An IP address or ``localhost``; one that others reach needs a token.
        port: 0 takes a free one.
        token: What clients send as ``Authorization: Bearer TOKEN``; None: they need none.
        parallel: Answers that are written at once; each holds a cache of its own.
        waiting: Requests that may wait for their turn; more are told to come later.
        connections: Most at once.
        body_bytes: Longest body of a request.
        request_seconds: Until head and body are there, all together.
        answer_seconds: Longest wait for a turn, and longest answer, which then ends as if it had reached its length.
    """

    address: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    parallel: int = 1
    waiting: int = 16
    connections: int = 64
    body_bytes: int = 2**20
    request_seconds: float = 10.0
    answer_seconds: float = 600.0

    def __post_init__(self) -> None:
        wrong = []
        if _ip(self.address) is None:
            wrong.append("address: expected an IP address or localhost")
        elif self.token is None and not self.is_local:
            wrong.append("address: others than this machine reach it; expected a token with it (--token-env), or 127.0.0.1")
        if self.token is not None and not re.fullmatch(rf"[!-~]{{{SHORTEST_TOKEN},1024}}", self.token):
            wrong.append(f"token: expected {SHORTEST_TOKEN} to 1024 printable ASCII characters without spaces")
        least = {"parallel": 1, "waiting": 0, "connections": 1, "body_bytes": 1, "port": 0}
        wrong += [f"{name}: expected at least {most}" for name, most in least.items() if getattr(self, name) < most]
        if wrong:
            raise ConfigurationError("server", wrong)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        found = _ip(self.address)
        return found is not None and found.is_loopback


class _RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


class _Turn:
    """What one answer at a time is written with; the next one goes on from what it has read."""

    def __init__(self) -> None:
        self._adapter: str | None = None
        self._reader: Reader | None = None

    def begin(
        self, model: Model, prompt: Prompt, adapter: str | None, settings: Mapping[str, Any]
    ) -> tuple[Row, Iterator[None]]:
        """An answer and the steps that write it."""
        row = model.row(prompt, **settings)
        if self._reader is None or self._adapter != adapter:
            self._reader, self._adapter = None, adapter  # two caches at once would be one too many
            self._reader = model.reader(adapter)
        return row, write(self._reader, [row])

    def forget(self) -> None:
        """After an error nothing is known of what was read."""
        self._reader = None


class BundleServer(ThreadingHTTPServer):
    """Serves the base as the model ``base`` and each loaded adapter by its name; ``serve_forever`` runs it.

    Args:
        model: Opened, with the adapters that are to be served.
        settings: Where and how.

    Raises:
        ConfigurationError: It cannot listen there, or OpenAI's API has nothing for such a bundle.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, model: Model, settings: Settings) -> None:
        if model.manifest.kind == "classifier":
            raise ConfigurationError("server", ["a classifier has no place in OpenAI's API; ask it with fedge edge run"])
        self.model, self.settings = model, settings
        self.names = (BASE, *model.adapters)
        self.fingerprint = f"{model.manifest.name}-{model.manifest.version}"
        self._key = hashlib.sha256(settings.token.encode()).digest() if settings.token else None
        self._connections = threading.BoundedSemaphore(settings.connections)
        self._room = threading.BoundedSemaphore(settings.parallel + settings.waiting)
        self._turns: queue.LifoQueue[_Turn] = queue.LifoQueue()
        for _ in range(settings.parallel):
            self._turns.put(_Turn())
        there = _ip(settings.address)
        self.address_family = socket.AF_INET6 if there and there.version == 6 else socket.AF_INET
        try:
            super().__init__((str(there), settings.port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError("server", [f"cannot listen on {there} port {settings.port}: {reason}"]) from None

    @property
    def url(self) -> str:
        """The base address that clients are given."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"

    def server_bind(self) -> None:
        """Without asking any name service what this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def knows(self, header: str) -> bool:
        """Whether a request's ``Authorization`` holds the token; takes as long whatever is wrong with it."""
        scheme, _, given = header.partition(" ")
        found = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        return self._key is None or (hmac.compare_digest(found, self._key) and scheme.lower() == "bearer")

    @contextmanager
    def turn(self, is_gone: Callable[[], bool] = lambda: False) -> Iterator[_Turn]:
        """Waits for a turn, if there is room to wait, and as long as who asked does."""
        if not self._room.acquire(blocking=False):
            raise _RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many requests wait; come again", **{"Retry-After": "1"})
        try:
            turn = self._next(is_gone)
            try:
                yield turn
            except BaseException:
                turn.forget()
                raise
            finally:
                self._turns.put(turn)
        finally:
            self._room.release()

    def _next(self, is_gone: Callable[[], bool]) -> _Turn:
        until = time.monotonic() + self.settings.answer_seconds
        while time.monotonic() < until:
            with suppress(queue.Empty):
                return self._turns.get(timeout=_LOOK_SECONDS)
            if is_gone():
                raise _GoneError
        raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "no turn came in time", **{"Retry-After": "5"})

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system gives no more threads
            self._connections.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the standard library's names
        """A connection that broke: no traceback, which may hold what was sent."""
        _log.info("a connection broke")


class _Arriving(io.RawIOBase):
    """A socket's bytes until a moment and up to a number, however slowly they come."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._until, self._left = connection, time.monotonic() + seconds, HEAD_BYTES
        self.is_over = False

    def readable(self) -> bool:
        return True

    def expect(self, size: int) -> None:
        """Lets so many more through."""
        self._left += size

    def readinto(self, buffer: Any, /) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if not self._left:
            self.is_over = True
            return 0
        self._connection.settimeout(left)
        found = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= found
        return found


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: BundleServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._arriving = _Arriving(self.connection, self.server.settings.request_seconds)
        self.rfile = io.BufferedReader(self._arriving)
        self._begun, self._took = time.monotonic(), (0, 0)
        self._is_answered = self._is_asked = False

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.close_connection = True
        if self._arriving.is_over:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return False
        return True

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def version_string(self) -> str:
        return "fedge"

    def log_message(self, *_: Any) -> None:
        """The standard library's own lines quote what was sent."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What the standard library refuses; its message quotes what was sent."""
        self._fail(_RefusedError(HTTPStatus(code), HTTPStatus(code).phrase))

    def _guarded(self, answer: Callable[[], None]) -> None:
        try:
            self._check()
            answer()
        except _RefusedError as error:
            self._fail(error)
        except (DataError, ConfigurationError) as error:
            self._fail(_RefusedError(HTTPStatus.BAD_REQUEST, str(error)))
        except TimeoutError:
            self._fail(_RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time"))
        except (_GoneError, ConnectionError):
            _log.info("%s: the client went away", self._route)
        except LEAVES:
            raise
        except BaseException as error:  # noqa: BLE001 - a server outlives what one request does to it, and Rust's panics
            _log.error("%s: %s", self._route, error if isinstance(error, FedgeError) else type(error).__name__)
            self._fail(_RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, "the model could not answer"))

    @property
    def _route(self) -> str:
        """The path if it is one of ours: any other may hold anything."""
        path = getattr(self, "path", "").partition("?")[0]
        return path if path in {*_POST, "/health", "/v1/models"} else "elsewhere"

    def _check(self) -> None:
        hosts = self.headers.get_all("host") or []
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "expected one Host header")
        settings = self.server.settings
        if settings.is_local and found[1].lower() not in {"localhost", "127.0.0.1", "[::1]", settings.address}:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "this server answers to localhost alone")
        if self.path != "/health" and not self.server.knows(self.headers.get("authorization", "")):
            raise _RefusedError(
                HTTPStatus.UNAUTHORIZED, "expected the server's token", "invalid_api_key", **{"WWW-Authenticate": "Bearer"}
            )

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
            raise _nowhere(path in _POST, "POST")

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        if path not in _POST:
            raise _nowhere(path == "/health" or path.startswith("/v1/models"), "GET")
        kind, answer = _POST[path]
        if self.server.model.manifest.kind != kind:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"this bundle is no {kind}; GET /v1/models tells what is here")
        answer(self, self._body())

    def _body(self) -> bytes:
        kinds = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kinds != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json")
        sizes = self.headers.get_all("content-length") or []
        if "transfer-encoding" in self.headers or len(sizes) != 1 or not re.fullmatch(r"[0-9]{1,18}", sizes[0]):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected one Content-Length, and no Transfer-Encoding")
        size, most = int(sizes[0]), self.server.settings.body_bytes
        if size > most:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{size} bytes; expected at most {most}")
        self._arriving.expect(size)
        body = self.rfile.read(size)
        if len(body) < size:
            raise _GoneError
        return body

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
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "this bundle has no chat template; use /v1/completions")
        reply = Reply(found.model, self.server.fingerprint, chat=chat)
        with self.server.turn(self._is_gone) as turn:
            row, steps = turn.begin(model, prompt, adapter, found.settings())
            pieces = self._pieces(row, steps)
            if found.stream:
                self._stream(reply, pieces, row, found.tells_usage)
                return
            for _ in pieces:
                pass
        self._send(HTTPStatus.OK, reply.whole(self._told(row)))

    def _pieces(self, row: Row, steps: Iterator[None]) -> Iterator[str]:
        """Text as it comes, as long as somebody waits for it and it takes not too long."""
        until = time.monotonic() + self.server.settings.answer_seconds
        for _ in steps:
            if row.new:
                yield row.new
            if self._is_gone():
                raise _GoneError
            if time.monotonic() > until:
                return

    def _stream(self, reply: Reply, pieces: Iterator[str], row: Row, tells_usage: bool) -> None:
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
        self._event(reply.part(None, openai_format.finish(answer)))
        if tells_usage:
            self._event(reply.took(answer))
        self.wfile.write(b"data: [DONE]\n\n")
        self._note(HTTPStatus.OK)

    def _embed(self, body: bytes) -> None:
        found = asked(VectorsAsked, body)
        adapter, model = self._adapter(found.model), self.server.model
        with self.server.turn(self._is_gone):
            vectors = model.embed(found.texts, adapter=adapter)
        self._took = sum(len(model.tokens.ids(text)) for text in found.texts), 0
        packed = found.encoding_format == "base64"
        self._send(HTTPStatus.OK, openai_format.vectors(found.model, vectors, self._took[0], packed=packed))

    def _adapter(self, name: str) -> str | None:
        if name not in self.server.names:
            there = ", ".join(self.server.names[:20])
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"no such model here; there are {there}", "model_not_found")
        return None if name == BASE else name

    def _told(self, row: Row) -> Answer:
        answer = row.answer()
        self._took = answer.prompt_tokens, len(answer.ids)
        return answer

    def _is_gone(self) -> bool:
        ready, _, _ = select.select([self.connection], [], [], 0)
        if not ready or self.connection.recv(1, socket.MSG_PEEK):
            return False
        # Nothing more comes: the client went away, or only says that its request is whole. Who went away refuses what it is
        # sent, and what it is sent first is a word that the others pass over (RFC 9110, section 15.2).
        if not self._is_answered and not self._is_asked and self.request_version == "HTTP/1.1":
            self._is_asked = True
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return bool(self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _event(self, told: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + _json(told) + b"\n\n")

    def _fail(self, error: _RefusedError) -> None:
        if self._is_answered:  # half an answer cannot be taken back
            return
        kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        self.close_connection, self.request_version = True, self.protocol_version  # even to what was no HTTP
        self._send(error.status, openai_format.problem(str(error), kind, error.code), **error.headers)
        self._linger()

    def _send(self, status: HTTPStatus, told: Mapping[str, Any], **headers: str) -> None:
        body = _json(told)
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
        self.wfile.write(body)
        self._note(status)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self._is_answered = True
        self.connection.settimeout(self.server.settings.request_seconds)  # of each write: who reads nothing is let go
        self.send_response(status)
        always = {"Cache-Control": "no-store", "Connection": "close", "X-Content-Type-Options": "nosniff"}
        for name, value in {**headers, **always}.items():
            self.send_header(name, value)
        self.end_headers()

    def _linger(self) -> None:
        """Reads what still comes, for who is sending may otherwise not see why it was refused."""
        left, until = _LINGER_BYTES, time.monotonic() + _LINGER_SECONDS
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_SECONDS)
            while left > 0 and time.monotonic() < until and (found := self.connection.recv(2**16)):
                left -= len(found)

    def _note(self, status: HTTPStatus) -> None:
        seconds = time.monotonic() - self._begun
        _log.info("%s %d: %.2f s, %d + %d tokens", self._route, status, seconds, *self._took)


_POST: dict[str, tuple[str, Callable[[_Handler, bytes], None]]] = {
    "/v1/chat/completions": ("decoder", _Handler._chat),  # noqa: SLF001
    "/v1/completions": ("decoder", _Handler._text),  # noqa: SLF001
    "/v1/embeddings": ("embedder", _Handler._embed),  # noqa: SLF001
}


def _nowhere(is_other: bool, method: str) -> _RefusedError:
    if is_other:
        return _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"expected {method}", Allow=method)
    return _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here; GET /v1/models tells what is")


def _json(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        return None
