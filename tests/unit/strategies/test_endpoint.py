"""An endpoint is asked in OpenAI's format, patiently and within bounds; what goes wrong is one error without any content."""

import threading
import time

import pytest
from chat_server import serving, told

from protocol.errors import ConfigurationError, EndpointError
from protocol.writer_settings import EndpointSettings
from strategies import endpoint as endpoints
from strategies.endpoint import Endpoint

CONTENT = "the patient's name"
PROMPT = [{"role": "user", "content": CONTENT}]


def endpoint(chat, **more):
    return Endpoint(EndpointSettings(base_url=chat.url, model="m", **{"retries": 0, **more}))


def ask(chat, count=1, **more):
    return endpoint(chat, **more).answers([PROMPT] * count, temperature=0.5, max_tokens=7, seed=3)


def test_requests_are_in_the_chat_format_and_answers_keep_their_order():
    with serving(lambda request: f"number {request['seed']}") as chat:
        assert ask(chat, 20) == [f"number {seed}" for seed in range(3, 23)]
    request = min(chat.requests, key=lambda request: request["seed"])
    assert request == {"model": "m", "messages": PROMPT, "temperature": 0.5, "max_tokens": 7, "seed": 3}
    assert set(chat.paths) == {"/v1/chat/completions"}


def test_no_more_requests_are_under_way_than_the_plan_says():
    now, most, lock = [0], [0], threading.Lock()

    def rule(request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return "x"

    with serving(rule) as chat:
        ask(chat, 12, parallel=3)
    assert 1 < most[0] <= 3


def test_a_busy_endpoint_is_asked_again():
    waits = [(503, {}, b""), (429, {"Retry-After": "1"}, b"")]
    with serving(lambda request: waits.pop(0) if waits else "at last") as chat:
        begun = time.monotonic()
        assert ask(chat, retries=2) == ["at last"]
    assert time.monotonic() - begun > 1.4  # half a second of ours, then the second that it asked for


def test_a_refusal_is_told_at_once_and_without_content():
    with (
        serving(lambda request: (401, {}, CONTENT.encode())) as chat,
        pytest.raises(EndpointError, match="status 401") as found,
    ):
        ask(chat, retries=5)
    assert len(chat.requests) == 1
    assert CONTENT not in str(found.value)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000]
)
def test_a_reply_that_is_no_answer_is_told(body):
    with serving(lambda request: (200, {}, body)) as chat, pytest.raises(EndpointError, match="chat format"):
        ask(chat)


def test_a_reply_without_end_is_cut_off():
    long = b" " * (endpoints.LONGEST_REPLY_BYTES + 10)
    with serving(lambda request: (200, {}, long)) as chat, pytest.raises(EndpointError, match="more than"):
        ask(chat)


def test_no_redirect_is_followed_with_the_key_in_hand(monkeypatch):
    monkeypatch.setenv("OUR_KEY", "s3cret")
    with serving(lambda request: "elsewhere") as other:
        moved = (307, {"Location": f"{other.url}/chat/completions"}, b"")
        with serving(lambda request: moved) as chat, pytest.raises(EndpointError, match="307"):
            ask(chat, api_key_env="OUR_KEY")
        assert other.requests == []


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OUR_KEY", "s3cret")
    with serving(lambda request: "x") as chat:
        ask(chat, api_key_env="OUR_KEY")
        assert chat.headers[0]["Authorization"] == "Bearer s3cret"
        ask(chat)
        assert "Authorization" not in chat.headers[1]
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(ConfigurationError, match="OUR_KEY: holds no key"):
        ask(chat, api_key_env="OUR_KEY")


def test_who_does_not_answer_in_time_is_given_up():
    done = threading.Event()

    def rule(request):
        done.wait(5)
        return "late"

    with serving(rule) as chat:
        with pytest.raises(EndpointError, match=r"ReadTimeout, 1 time"):
            ask(chat, timeout_seconds=0.2)
        done.set()


def test_who_is_not_there_is_told():
    with serving(lambda request: "x") as chat:
        pass
    with pytest.raises(EndpointError, match=r"ConnectError, 1 time.*see that it runs"):
        ask(chat)


def test_half_a_surrogate_pair_is_no_character():
    body = told("x").replace(b'"x"', b'"\\ud800"')
    with serving(lambda request: (200, {}, body)) as chat:
        assert ask(chat) == ["?"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_url": "ftp://h/v1"}, "no http or https address"),
        ({"base_url": "h/v1"}, "no http or https address"),
        ({"base_url": "http://[::1/v1"}, "no http or https address"),
        ({"base_url": "https://me:key@h/v1"}, "more than an address"),
        ({"base_url": "https://h/v1?key=1"}, "more than an address"),
        ({"base_url": "http://h/v1", "api_key_env": "K"}, "use https"),
        ({"api_key_env": "a b"}, "pattern"),
    ],
)
def test_an_address_that_would_give_a_key_away_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        EndpointSettings.model_validate({"base_url": "https://h/v1", "model": "m", **change})
