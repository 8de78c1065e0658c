"""The local server over a graph of a few numbers: clients that say no more than they must, and requests at the bounds."""

import json
import socket

import httpx
import numpy as np
import pytest
from runtime_bundles import concat_decoder, open_tested
from served import serving

TABLE = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
PLACES = np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)
CLIENT = httpx.Client(trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = open_tested(concat_decoder(tmp_path_factory.mktemp("served") / "bundle", TABLE, PLACES))
    with serving(model) as server:
        yield server


def half_closing(server, version: str, **body) -> bytes:
    asked = json.dumps({"model": "base", "prompt": "a b", "max_tokens": 8, "temperature": 0} | body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(2**16):
            found += part
    return found


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_its_half_when_it_has_asked_is_answered(server, version):
    """Oracle: the runtime's own answer. An interim response may come before it where HTTP has such (RFC 9110, 15.2)."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    found = half_closing(server, version)

    assert found.startswith(interim) == (version == "1.1")
    head, _, body = found.removeprefix(interim).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["choices"][0]["text"] == server.model.generate("a b", max_new_tokens=8).text
    assert half_closing(server, version, stream=True).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("changed", "why"), [({"repetition_penalty": 1e-38}, "repetition_penalty"), ({"prompt": "a " * 400_000}, "characters")]
)
def test_settings_and_texts_beyond_their_bounds_are_the_clients_mistake(server, changed, why):
    reply = CLIENT.post(f"{server.url}/completions", json={"model": "base", "prompt": "a", "max_tokens": 4} | changed)

    assert reply.status_code == 400
    assert why in reply.json()["error"]["message"]


def test_a_temperature_near_zero_is_answered_as_zero(server):
    told = [
        CLIENT.post(f"{server.url}/completions", json={"model": "base", "prompt": "a", "temperature": each}).json()["choices"]
        for each in (0, 1e-310)
    ]

    assert told[0] == told[1]


def test_a_tokenizer_that_panics_is_a_server_error_and_the_server_goes_on(server, monkeypatch):
    """By a stand-in for Rust's panics, which are no Exception."""

    def panics(_):
        raise BaseException("a text that was quoted")

    with monkeypatch.context() as patched:
        patched.setattr(server.model.tokens, "ids", panics)
        reply = CLIENT.post(f"{server.url}/completions", json={"model": "base", "prompt": "a"})
    assert reply.status_code == 500
    assert "quoted" not in reply.text
    assert CLIENT.post(f"{server.url}/completions", json={"model": "base", "prompt": "a"}).status_code == 200
