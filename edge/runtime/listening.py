"""HTTP with bounds: who may ask, how much, how slowly, how many at once; what is asked is not known here.

It listens on this machine alone unless it has a token. What comes from outside is bounded in bytes, time and number: head
and body, seconds until a request is whole, connections. A browser cannot be made to use it: a page of another origin cannot
send JSON without being allowed to, which nobody is, and a name that is made to point here is refused by its Host header. Logs
and errors hold nothing of what was asked or answered. There is no TLS: beyond this machine, put a proxy that has it in front.
"""

import hashlib
import hmac
import io
import ipaddress
import json
import logging
import re
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from edge.runtime.tokens import LEAVES
from protocol.errors import ConfigurationError, DataError, FedgeError

HEAD_BYTES: Final = 32 * 1024
SHORTEST_TOKEN: Final = 16
_LINGER_BYTES, _LINGER_SECONDS = 2**24, 1.0
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


class RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class GoneError(Exception):
    """Nobody waits for the answer any more."""


class BoundedServer(ThreadingHTTPServer):
    """Listens where its settings say, with as many connections as they let.

    Args:
        settings: Where and how.
        connection: What answers one.

    Raises:
        ConfigurationError: It cannot listen there.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, settings: Settings, connection: "type[Connection]") -> None:
        self.settings = settings
        self._key = hashlib.sha256(settings.token.encode()).digest() if settings.token else None
        self._connections = threading.BoundedSemaphore(settings.connections)
        there = _ip(settings.address)
        self.address_family = socket.AF_INET6 if there and there.version == 6 else socket.AF_INET
        try:
            super().__init__((str(there), settings.port), connection)
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


class Connection(BaseHTTPRequestHandler):
    """One request of one connection: what answers it knows its routes, ``_get`` and ``_post``."""

    server: BoundedServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Bounds what the connection brings."""
        super().setup()
        self.rfile.close()
        self._arriving = _Arriving(self.connection, self.server.settings.request_seconds)
        self.rfile = io.BufferedReader(self._arriving)
        self._begun = time.monotonic()
        self._is_answered = self._is_asked = False

    def parse_request(self) -> bool:
        """One request a connection."""
        if not super().parse_request():
            return False
        self.close_connection = True
        if self._arriving.is_over:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return False
        return True

    def do_GET(self) -> None:
        """The standard library's name for it."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """The standard library's name for it."""
        self._guarded(self._post)

    def _get(self) -> None:
        raise NotImplementedError

    def _post(self) -> None:
        raise NotImplementedError

    def _problem(self, error: RefusedError) -> Mapping[str, Any]:
        """How a refusal is told."""
        raise NotImplementedError

    def _took(self) -> str:
        """What the log says of an answer, after its time."""
        return ""

    def version_string(self) -> str:
        """Not which Python this is."""
        return "fedge"

    def log_message(self, *_: Any) -> None:
        """The standard library's own lines quote what was sent."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What the standard library refuses; its message quotes what was sent."""
        self._fail(RefusedError(HTTPStatus(code), HTTPStatus(code).phrase))

    def _guarded(self, answer: Callable[[], None]) -> None:
        try:
            self._check()
            answer()
        except RefusedError as error:
            self._fail(error)
        except (DataError, ConfigurationError) as error:
            self._fail(RefusedError(HTTPStatus.BAD_REQUEST, str(error)))
        except TimeoutError:
            self._fail(RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time"))
        except (GoneError, ConnectionError):
            _log.info("%s: the client went away", self._route)
        except LEAVES:
            raise
        except BaseException as error:  # noqa: BLE001 - a server outlives what one request does to it, and Rust's panics
            _log.error("%s: %s", self._route, error if isinstance(error, FedgeError) else type(error).__name__)
            self._fail(RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, "the model could not answer"))

    @property
    def _route(self) -> str:
        """The path as logs may name it, if it is one that is known: any other may hold anything."""
        raise NotImplementedError

    def _check(self) -> None:
        hosts = self.headers.get_all("host") or []
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "expected one Host header")
        settings = self.server.settings
        if settings.is_local and found[1].lower() not in {"localhost", "127.0.0.1", "[::1]", settings.address}:
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server answers to localhost alone")
        if self.path != "/health" and not self.server.knows(self.headers.get("authorization", "")):
            raise RefusedError(
                HTTPStatus.UNAUTHORIZED, "expected the server's token", "invalid_api_key", **{"WWW-Authenticate": "Bearer"}
            )

    def _body(self) -> bytes:
        kinds = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kinds != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json")
        sizes = self.headers.get_all("content-length") or []
        if "transfer-encoding" in self.headers or len(sizes) != 1 or not re.fullmatch(r"[0-9]{1,18}", sizes[0]):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected one Content-Length, and no Transfer-Encoding")
        size, most = int(sizes[0]), self.server.settings.body_bytes
        if size > most:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{size} bytes; expected at most {most}")
        self._arriving.expect(size)
        body = self.rfile.read(size)
        if len(body) < size:
            raise GoneError
        return body

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

    def _fail(self, error: RefusedError) -> None:
        if self._is_answered:  # half an answer cannot be taken back
            return
        self.close_connection, self.request_version = True, self.protocol_version  # even to what was no HTTP
        self._send(error.status, self._problem(error), **error.headers)
        self._linger()

    def _send(self, status: HTTPStatus, told: Mapping[str, Any], **headers: str) -> None:
        body = encoded(told)
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
        """One line of the log for each answer."""
        _log.info("%s %d: %.2f s%s", self._route, status, time.monotonic() - self._begun, self._took())


def encoded(told: Mapping[str, Any]) -> bytes:
    """JSON as it is sent."""
    return json.dumps(told, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        return None
