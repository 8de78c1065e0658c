"""The local server speaks OpenAI's format over a real bundle, and lets nobody in who should not be there.

The oracle of an answer is ``Model.generate`` on the same bundle.
"""

import base64
import contextlib
import json
import logging
import socket
import threading
import time
from dataclasses import asdict

import httpx
import numpy as np
import pytest
from averaging_bundles import averaging
from hypothesis import given, settings
from hypothesis import strategies as st
from served import serving
from small_bundles import KEY, TRUSTED

from edge.bundle import write_bundle
from edge.runtime.listening import Settings
from edge.runtime.manifest import BundledAdapter, DecoderShape, Description, adapter_path
from edge.runtime.model import open as opened
from edge.runtime.server import BundleServer
from protocol.errors import ConfigurationError, EndpointError
from protocol.writer_settings import EndpointSettings
from strategies.endpoint import Endpoint

SAID = "the patient's name"
OPENER = "a-token-of-many-characters"
CLIENT = httpx.Client(trust_env=False, timeout=60)
QUESTION = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def model(exported_decoder, tmp_path_factory):
    """The stories model with two adapters, as a bundle that was signed, verified and opened."""
    from edge import adapter_file, tokenizer
    from edge.chat_template import derive
    from protocol.files import read_stored
    from strategies.base_model import load_tokenizer

    made, scratch = exported_decoder, tmp_path_factory.mktemp("scratch")
    words = load_tokenizer(made.base)
    tokenizer.write(words, scratch / "tokenizer.json", made.base)
    content = {"tokenizer/tokenizer.json": scratch / "tokenizer.json"}
    content |= {path.name: path for path in made.folder.glob("model.onnx*")}
    for name, folder in made.adapters.items():
        stored = read_stored(folder)
        content[adapter_path(name)] = scratch / f"{name}.onnx_adapter"
        given = adapter_file.parameters(stored, made.exported.lora, made.exported.dense, made.base.digest)
        adapter_file.write(content[adapter_path(name)], given)
    described = Description(
        name="stories",
        version=3,
        base_digest=made.base.digest,
        opset=made.exported.opset,
        minimum_onnxruntime="1.31",
        kind="decoder",
        profile="fp32",
        decoder=DecoderShape(**asdict(made.exported.decoder)),
        lora=dict(made.exported.lora),
        dense=dict(made.exported.dense),
        tokens=tokenizer.control_tokens(words, made.base),
        chat=derive(words).template,
        adapters={name: BundledAdapter(digest="cd" * 32) for name in made.adapters},
    )
    folder = tmp_path_factory.mktemp("bundles") / "stories"
    write_bundle(folder, described, content, KEY)
    model = opened(folder, TRUSTED)
    for name in model.manifest.adapters:
        model.load_adapter(name)
    return model


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return opened(averaging(tmp_path_factory.mktemp("embedder") / "mean", "embedder"), TRUSTED)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, parallel=2) as server:
        yield server


def post(server, path, timeout=60, headers=None, **body):
    return CLIENT.post(f"{server.url}/{path}", json=body, timeout=timeout, headers=headers)


def chat(server, **body):
    return post(
        server, "chat/completions", **{"model": "base", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | body
    )


def raw(server, sent, seconds=5):
    """What comes back for bytes as they are, to the end of the connection."""
    with socket.create_connection(server.server_address[:2], timeout=seconds) as connection:
        connection.sendall(sent)
        found = b""
        while part := connection.recv(2**16):
            found += part
    return found


def events(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer_is_what_the_runtime_writes_and_its_tokens_are_counted(server, model):
    expected = model.generate(QUESTION, max_new_tokens=24)
    told = chat(server).json()
    assert told["object"] == "chat.completion"
    assert told["system_fingerprint"] == "stories-3"
    assert told["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert told["usage"] == {
        "prompt_tokens": len(model.prompt_ids(QUESTION)),
        "completion_tokens": 24,
        "total_tokens": len(model.prompt_ids(QUESTION)) + 24,
    }


def test_a_stream_says_the_same_piece_by_piece(server):
    whole = chat(server).json()
    found = events(chat(server, stream=True, stream_options={"include_usage": True}))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"]["content"] for event in found[1:-2]]
    assert len(pieces) > 5
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert found[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    assert len({event["id"] for event in found}) == 1


def test_every_adapter_is_a_model_and_many_may_be_asked_at_once(server, model):
    names = [each["id"] for each in CLIENT.get(f"{server.url}/models").json()["data"]]
    assert names == ["base", "narrow", "wide"]
    assert CLIENT.get(f"{server.url}/models/wide").json()["id"] == "wide"
    expected = {
        name: model.generate(QUESTION, adapter=None if name == "base" else name, max_new_tokens=24).text for name in names
    }
    assert len(set(expected.values())) == 3
    found, asked = {}, names * 4
    threads = [
        threading.Thread(target=lambda at=at, name=name: found.update({at: chat(server, model=name).json()}))
        for at, name in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at]["choices"][0]["message"]["content"] for at in range(len(asked))] == [expected[name] for name in asked]


def test_a_text_goes_on_until_it_is_stopped_and_a_seed_repeats_it(server, model):
    asked = {"model": "base", "prompt": "Once upon a time", "max_tokens": 20}
    expected = model.generate("Once upon a time", max_new_tokens=20).text
    told = post(server, "completions", temperature=0, **asked).json()
    assert (told["object"], told["choices"][0]["text"]) == ("text_completion", expected)
    word = expected.split()[3]
    stopped = post(server, "completions", temperature=0, stop=[word], **asked).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (expected[: expected.index(word)], "stop")
    streamed = events(post(server, "completions", temperature=0, stream=True, **asked))
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected
    drawn = [
        post(server, "completions", seed=seed, temperature=1.5, **asked).json()["choices"][0]["text"] for seed in (1, 1, -2, 2)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    direct = model.generate("Once upon a time", max_new_tokens=20, seed=1, temperature=1.5)
    assert drawn[0] == direct.text


def test_what_a_person_says_may_come_in_parts_and_a_developer_is_the_system(server):
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]
    assert chat(server, messages=[{"role": "user", "content": parts}]).json()["choices"] == chat(server).json()["choices"]
    told, of_system, of_developer = (
        chat(server, messages=[*before, *QUESTION]).json()
        for before in ([], *([{"role": role, "content": "Be short."}] for role in ("system", "developer")))
    )
    assert of_system["choices"] == of_developer["choices"]
    assert of_system["usage"] == of_developer["usage"] != told["usage"]


def test_embeddings_are_those_of_the_runtime_as_numbers_and_packed(embedder):
    """By hand: the rows of a are (1, 2), those of b (3, 5), and their mean is (2, 3.5)."""
    with serving(embedder) as server:
        told = post(server, "embeddings", model="base", input=["a", "a b"]).json()
        assert [row["embedding"] for row in told["data"]] == [[1.0, 2.0], [2.0, 3.5]]
        assert told["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        packed = post(server, "embeddings", model="base", input="a b", encoding_format="base64").json()["data"][0]["embedding"]
        assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == [2.0, 3.5]
        assert chat(server).status_code == 400
        assert post(server, "embeddings", model="base", input=["a " * 9]).status_code == 400


def test_our_own_client_of_such_servers_is_answered(server, model):
    """What judges, teachers and paraphrases in training ask."""
    endpoint = Endpoint(EndpointSettings(base_url=server.url, model="narrow", retries=0))
    expected = model.generate(QUESTION, adapter="narrow", max_new_tokens=7).text
    assert endpoint.answers([QUESTION] * 3, temperature=0.0, max_tokens=7) == [expected] * 3
    with pytest.raises(EndpointError, match="404"):
        Endpoint(EndpointSettings(base_url=server.url, model="other", retries=0)).answers(
            [QUESTION], temperature=0, max_tokens=1
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 2}, "n:"),
        ({"temperature": 3}, "temperature:"),
        ({"max_tokens": 0}, "max_tokens:"),
        ({"tools": [{}]}, "tools: not supported here"),
        ({"logprobs": True}, "logprobs:"),
        ({"presence_penalty": 0.5}, "presence_penalty:"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": []}, "messages:"),
        ({"messages": [{"role": "tool", "content": SAID}]}, "messages.0.role:"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SAID}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": SAID}]}, "last one, is not a user's"),
        ({"messages": [{"role": "user", "content": SAID * 100}]}, "tokens"),
        ({SAID: 1}, "not supported here"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_without_what_was_said(change, said, server):
    reply = chat(server, **change)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    if SAID not in change:
        assert SAID not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_request_is_refused(body, server):
    reply = CLIENT.post(f"{server.url}/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("request: ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", f"/{SAID}", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("DELETE", "/v1/models", 501),
        ("OPTIONS", "/v1/chat/completions", 501),
    ],
)
def test_other_places_and_methods_are_refused_without_repeating_them(method, path, status, server):
    reply = CLIENT.request(method, server.url.removesuffix("/v1") + path)
    assert reply.status_code == status
    assert "patient" not in reply.text
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_without_the_token_nobody_learns_or_changes_anything(model):
    with serving(model, token=OPENER) as server:
        assert CLIENT.get(server.url.replace("/v1", "/health")).json() == {"status": "ok"}
        for given in (
            {},
            {"Authorization": f"Bearer {OPENER}x"},
            {"Authorization": OPENER},
            {"Authorization": f"Basic {OPENER}"},
        ):
            encoded = {name: value.encode("latin-1") for name, value in given.items()}
            reply = CLIENT.get(f"{server.url}/models", headers=encoded)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert chat(server, headers=encoded).status_code == 401
        assert chat(server, headers={"Authorization": f"Bearer {OPENER}"}).status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "example.org", "", "127.0.0.1.evil.example"])  # noqa: S104
def test_others_than_this_machine_reach_it_only_with_a_token(address):
    with pytest.raises(ConfigurationError, match="address"):
        Settings(address=address)


@pytest.mark.parametrize(
    "token", ["", "short", "with spaces in between it", "ümlaut-ümlaut-ümlaut", "line\nline-line-line-line"]
)
def test_a_token_that_is_easily_guessed_or_no_header_is_refused(token):
    with pytest.raises(ConfigurationError, match="token"):
        Settings(token=token)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1"]
)
def test_a_name_that_was_made_to_point_here_is_refused(host, server):
    """DNS rebinding: a page's own name leads to this machine, and its browser sends that name."""
    assert CLIENT.get(f"{server.url}/models", headers={"Host": host}).status_code == 403
    assert CLIENT.get(f"{server.url}/models", headers={"Host": "LOCALHOST:1"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_page_may_send_without_asking_is_not_taken(kind, server):
    """Without a preflight, which is refused, a browser sends no JSON to another origin."""
    body = json.dumps({"model": "base", "messages": QUESTION})
    reply = CLIENT.post(f"{server.url}/chat/completions", content=body, headers={"content-type": kind})
    assert reply.status_code == 415


def test_more_than_the_bounds_let_through_is_cut_off(model):
    with serving(model, body_bytes=1000, request_seconds=0.5) as server:
        assert chat(server, messages=[{"role": "user", "content": "x" * 1000}]).status_code == 413
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert b" 411 " in raw(server, head + b"\r\n")
        assert b" 411 " in raw(server, head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n")
        assert b" 411 " in raw(server, head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}")
        assert b" 411 " in raw(server, head + b"Content-Length: -1\r\n\r\n")
        assert b" 413 " in raw(server, head + b"Content-Length: 999999999999\r\n\r\n")
        assert b" 431 " in raw(server, head + b"X: " + b"x" * 40_000 + b"\r\n\r\n")
        assert b" 431 " in raw(server, head + b"".join(b"X%d: 1\r\n" % at for at in range(200)) + b"\r\n")
        assert b" 400 " in raw(server, b"GET /v1/models HTTP/1.1\r\n\r\n")
        assert b" 400 " in raw(server, b"\x16\x03\x01\x02\x00 hello there\r\n\r\n")
        assert b" 408 " in raw(server, head + b"Content-Length: 100\r\n\r\n{")


def test_who_sends_a_byte_at_a_time_is_let_go(model):
    """Each byte comes well within any pause that a socket allows; all together must be there in half a second."""
    with serving(model, request_seconds=0.5) as server:
        begun = time.monotonic()
        with socket.create_connection(server.server_address[:2], timeout=5) as connection, contextlib.suppress(OSError):
            while time.monotonic() - begun < 8:
                connection.sendall(b"G")
                time.sleep(0.05)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1):
                        break
        assert 0.4 < time.monotonic() - begun < 4
        assert chat(server).status_code == 200


def test_more_connections_and_more_waiting_requests_than_agreed_are_sent_away(model):
    with serving(model, waiting=0, connections=3) as server, server.turns.take():
        reply = chat(server)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    with serving(model, connections=3) as server:
        idle = [socket.create_connection(server.server_address[:2]) for _ in range(3)]
        assert not is_served(server)
        for each in idle:
            each.close()
        assert until(lambda: is_served(server))


def until(holds):
    return any(holds() or time.sleep(0.02) for _ in range(500))


def is_served(server):
    with contextlib.suppress(httpx.TransportError):
        return chat(server, max_tokens=1).status_code == 200
    return False


def test_an_answer_that_nobody_waits_for_any_more_is_not_written_to_its_end(model, caplog):
    caplog.set_level(logging.INFO, "edge.runtime")
    asked = json.dumps({"model": "base", "prompt": "One", "max_tokens": 500, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}"
    with serving(model, waiting=0) as server:
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + asked)
        assert until(lambda: "the client went away" in caplog.text)
        assert "200" not in caplog.text
        assert until(lambda: is_served(server))


def test_who_stops_waiting_for_a_turn_leaves_room_for_another(model):
    def waits():
        try:
            return chat(server, timeout=0.1).status_code != 429
        except httpx.ReadTimeout:
            return True

    with serving(model, waiting=1) as server, server.turns.take():
        assert waits()
        assert until(waits)


@settings(max_examples=40)
@given(
    sent=st.binary(max_size=200),
    begins=st.sampled_from([b"", b"GET ", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"]),
)
def test_no_bytes_at_all_bring_it_down(sent, begins, patient):
    found = raw(patient, begins + sent + b"\r\n\r\n")
    assert b" 500 " not in found.partition(b"\r\n")[0]
    assert found == b"" or found.startswith(b"HTTP/1.1 ")


@pytest.fixture(scope="module")
def patient(model):
    with serving(model, request_seconds=0.2) as server:
        yield server


def test_neither_logs_nor_errors_hold_what_was_said(model, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(model) as server:
        chat(server, messages=[{"role": "user", "content": SAID}])
        chat(server, messages=[{"role": SAID, "content": SAID}])
        CLIENT.get(server.url + "/" + SAID)
        raw(server, f"{SAID.replace(' ', '')} / HTTP/1.1\r\n\r\n".encode())
        raw(server, f"GET {SAID} HTTP/1.1\r\n\r\n".encode())
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("edge"))
    assert "/v1/chat/completions 200" in ours
    assert "patient" not in ours
    assert "400" in ours


def test_what_breaks_inside_is_told_without_its_inside(model):
    with serving(model) as server:
        model.unload_adapter("wide")  # between the look at the names and its use
        try:
            reply = chat(server, model="wide")
        finally:
            model.load_adapter("wide")
        assert reply.status_code == 500
        assert reply.json()["error"] == {
            "message": "the model could not answer",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert chat(server, model="wide").status_code == 200


def test_a_port_that_is_taken_is_told(server, model):
    with pytest.raises(ConfigurationError, match="cannot listen"):
        BundleServer(model, Settings(port=server.server_address[1]))
