"""A real HTTP server on loopback that speaks OpenAI's chat format, with a rule in place of a model."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHOWN = re.compile(r"<(question|answer|answer_a|answer_b)>\n(.*?)\n</\1>", re.DOTALL)


class ChatServer:
    """Answers each request by ``rule(request)``: a text, or (status, headers, body) as they are."""

    def __init__(self, rule: Callable[[dict], str | tuple[int, dict, bytes]]) -> None:
        self.rule = rule
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def serving(rule) -> Iterator[ChatServer]:
    chat = ChatServer(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            chat.requests.append(request)
            chat.headers.append(dict(self.headers))
            chat.paths.append(self.path)
            said = chat.rule(request)
            status, headers, body = said if isinstance(said, tuple) else (200, {}, told(said))
            try:
                self.send_response(status)
                for name, value in ({"content-length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has seen enough

        def log_message(self, *_):
            pass

    chat.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=chat.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()


def told(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def shown(request: dict) -> dict[str, str]:
    """What a judge is shown, by tag."""
    return dict(SHOWN.findall(request["messages"][-1]["content"]))


def preferring(worth: Callable[[str], float]):
    """The rule of a judge that prefers the answer of more worth; of equal ones the first that it sees."""

    def rule(request: dict) -> str:
        seen = shown(request)
        return "A" if worth(seen["answer_a"]) >= worth(seen["answer_b"]) else "B"

    return rule
