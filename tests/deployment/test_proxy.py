"""The proxy of docs/deployment.md, run by nginx itself: nodes come in, and nothing else does."""

import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_superlink import DOCUMENT, free_ports

from server import provisioning

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(60)]
NGINX = shutil.which("nginx")
# A SuperLink's stand-in, which says what path it was asked for: what reaches it has come through.
ECHO = """
import http.server, ssl, sys
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        told = self.path.encode()
        self.send_response(200); self.send_header("content-length", str(len(told))); self.end_headers(); self.wfile.write(told)
    do_GET = do_POST
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Echo)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of nginx, and the authority that vouches for it."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("proxy")
    coordinator = folder / "coordinator"
    provisioning.provision(coordinator, ["127.0.0.1"], "coordinator", 9, 9)
    outside, inside = free_ports(2)
    (block,) = re.findall(r"^```nginx\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    block = (
        block.replace("/etc/fedge", str(folder))
        .replace("listen 443", f"listen 127.0.0.1:{outside}")
        .replace(":8000", f":{inside}")
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; daemon off; master_process off; events {{}} http {{ access_log off; {places}\n{block} }}"
    )
    echo = [sys.executable, "-c", ECHO, str(inside), str(coordinator / "server.crt"), str(coordinator / "server.key")]
    commands = (echo, [NGINX, "-p", str(folder), "-e", str(folder / "errors"), "-c", str(folder / "nginx.conf")])
    processes = [subprocess.Popen(command) for command in commands]
    try:
        for port in (outside, inside):
            deadline = time.monotonic() + 20
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline, (folder / "errors").read_text()
                time.sleep(0.1)
        yield outside, coordinator
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=10)


def asked(proxy: tuple[int, Path], path: str, method: str = "POST") -> tuple[int, bytes]:
    """The answer to a path exactly as it is written: no client mends it."""
    port, coordinator = proxy
    context = ssl.create_default_context(cafile=str(coordinator / "ca.crt"))
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1") as link:
        link.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        answer = b""
        while data := link.recv(4096):
            answer += data
    return int(answer.split(b" ")[1]), answer.split(b"\r\n\r\n", 1)[1]


@pytest.mark.parametrize("call", ["activate-node", "pull-messages", "push-object", "get-fab"])
def test_what_nodes_call_comes_through(proxy: tuple[int, Path], call: str) -> None:
    assert asked(proxy, f"/v1/fleet/{call}") == (200, f"/v1/fleet/{call}".encode())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//../../control/start-run",
        "//v1//control/start-run",
        "/V1/FLEET/activate-node",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ],
)
def test_nothing_else_does(proxy: tuple[int, Path], path: str) -> None:
    status, told = asked(proxy, path)
    assert status in (400, 404)
    assert b"control" not in told


@pytest.mark.parametrize("path", ["/v1/control/..%2ffleet/get-fab", "/v1/control/../fleet/get-fab"])
def test_what_is_passed_on_is_the_path_that_was_matched(proxy: tuple[int, Path], path: str) -> None:
    assert asked(proxy, path) == (200, b"/v1/fleet/get-fab")


def test_a_node_is_asked_to_post(proxy: tuple[int, Path]) -> None:
    assert asked(proxy, "/v1/fleet/get-fab", "GET")[0] == 403
