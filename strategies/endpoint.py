"""Asks a server that speaks the chat format of OpenAI's API: bounded in time and size, tried again when it is busy.

The address and the key are the institution's own: a plan that comes from outside may name only what a node lists
(``client.allowed``). Prompts go to the endpoint and answers come back; neither appears in an error.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from protocol.errors import ConfigurationError, EndpointError
from protocol.writer_settings import EndpointSettings

LONGEST_REPLY_BYTES = 1_000_000
LONGEST_PAUSE_SECONDS = 60.0
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


class Endpoint:
    """One endpoint, with its key from the environment.

    Args:
        settings: Where it is and how patient to be with it.

    Raises:
        ConfigurationError: The environment holds no such key.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._where = f"endpoint {settings.base_url}"
        self._headers = _authorised(settings)

    def answers(
        self, prompts: Sequence[Sequence[Mapping[str, str]]], *, temperature: float, max_tokens: int, seed: int = 0
    ) -> list[str]:
        """An answer to each prompt, in order; the seed of a prompt is ``seed`` and its place.

        Raises:
            EndpointError: One could not be had; those that nobody asked for yet are not asked for any more.
        """
        limits = httpx.Limits(max_connections=self._settings.parallel)
        with (
            httpx.Client(headers=self._headers, timeout=self._settings.timeout_seconds, limits=limits) as client,
            ThreadPoolExecutor(self._settings.parallel) as pool,
        ):

            def ask(at: int) -> str:
                asked = {"model": self._settings.model, "messages": [dict(message) for message in prompts[at]]}
                wanted = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed + at}
                return self._said(self._patiently(client, asked | wanted))

            asked = [pool.submit(ask, at) for at in range(len(prompts))]
            try:
                return [each.result() for each in asked]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _patiently(self, client: httpx.Client, request: dict[str, Any]) -> bytes:
        """The body of the first reply that is one."""
        for attempt in range(self._settings.retries + 1):
            pause = min(2.0**attempt / 2, LONGEST_PAUSE_SECONDS)
            try:
                status, told, body = self._once(client, request)
            except httpx.TransportError as error:  # never its text: it may quote what was sent
                found = type(error).__name__
            else:
                if status == httpx.codes.OK:
                    return body
                found = f"status {status}"
                if status not in _BUSY:
                    raise EndpointError(f"{self._where}: {found}; look at its address, its model's name and its key")
                pause = max(pause, told)
            if attempt < self._settings.retries:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise EndpointError(f"{self._where}: {found}, {self._settings.retries + 1} time(s); see that it runs, or raise retries")

    def _once(self, client: httpx.Client, request: dict[str, Any]) -> tuple[int, float, bytes]:
        """Status, the pause in seconds that the endpoint asks for, and the body."""
        until = time.monotonic() + self._settings.timeout_seconds
        with client.stream("POST", self._url, json=request) as reply:
            if reply.status_code != httpx.codes.OK:
                return reply.status_code, _seconds(reply.headers.get("retry-after", "")), b""
            body = bytearray()
            for part in reply.iter_bytes():
                body += part
                if len(body) > LONGEST_REPLY_BYTES:
                    raise EndpointError(f"{self._where}: a reply of more than {LONGEST_REPLY_BYTES} bytes; expected one answer")
                if time.monotonic() > until:  # httpx counts its timeout from byte to byte
                    raise httpx.ReadTimeout("too slow")
            return reply.status_code, 0.0, bytes(body)

    def _said(self, body: bytes) -> str:
        try:
            said = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            said = None
        if not isinstance(said, str):
            raise EndpointError(f"{self._where}: a reply without choices[0].message.content; expected OpenAI's chat format")
        return said.encode(errors="replace").decode()  # half a surrogate pair is no character


def _authorised(settings: EndpointSettings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigurationError(
            "environment", [f"{settings.api_key_env}: holds no key for {settings.base_url}; set it before the command runs"]
        )
    return {"Authorization": f"Bearer {key}"}


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0
