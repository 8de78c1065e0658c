"""How fast a bundle is on this device: time to the first token, tokens per second with and without adapter, peak memory."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from edge.runtime.model import Model
from protocol.errors import DataError


@dataclass(frozen=True)
class Figures:
    """Medians over repeats, for the base or one adapter.

    Attributes:
        adapter: Its name; None for the base.
        first_token_seconds: From a prompt to the token after it; of an encoder to what it says of a text.
        prefill_tokens_per_second: Tokens of the prompt in that time.
        decode_tokens_per_second: Tokens of the answer after the first one; None for an encoder.
    """

    adapter: str | None
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class LatencyReport:
    """What was measured.

    Attributes:
        name, version, profile: Of the bundle.
        prompt_tokens, new_tokens: Of every repeat.
        rows: The base, then each adapter.
        peak_rss_bytes: Most memory that this process has had so far.
    """

    name: str
    version: int
    profile: str
    prompt_tokens: int
    new_tokens: int
    rows: tuple[Figures, ...]
    peak_rss_bytes: int

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))

    def table(self) -> str:
        """For people."""
        head = f"{'adapter':<20}{'first token':>14}{'prefill':>22}{'decode':>22}"
        lines = [f"{self.name} {self.version} ({self.profile}): {self.prompt_tokens} + {self.new_tokens} tokens", head]
        for row in self.rows:
            decode = "" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:,.1f} tokens/s"
            lines.append(
                f"{row.adapter or 'none':<20}{row.first_token_seconds * 1000:>11,.1f} ms"
                f"{row.prefill_tokens_per_second:>13,.0f} tokens/s{decode:>22}"
            )
        return "\n".join([*lines, f"peak memory of this process: {self.peak_rss_bytes / 2**20:,.0f} MiB"])


def measure(model: Model, *, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 3) -> LatencyReport:
    """Measures the base and every loaded adapter, after one unmeasured turn of each.

    Args:
        model: Opened.
        prompt_tokens: Of a prompt of random tokens.
        new_tokens: Of its answer, at least 2; an encoder writes none.
        repeats: Of which the median is taken.

    Raises:
        DataError: They do not fit into the context.
    """
    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "repeats": (repeats, 1)}
    for name, (found, wanted) in least.items():
        if found < wanted:
            raise DataError(f"{name}: found {found}, expected at least {wanted}")
    _check_context(model, prompt_tokens, new_tokens)
    measured = _decoding if model.manifest.kind == "decoder" else _encoding
    rows = []
    for adapter in (None, *model.adapters):
        turns = [measured(model, adapter, prompt_tokens, new_tokens) for _ in range(repeats + 1)][1:]
        first, step = median(turn[0] for turn in turns), median(turn[1] for turn in turns)
        rows.append(Figures(adapter, first, prompt_tokens / first, 1 / step if step else None))
    manifest = model.manifest
    written = new_tokens if manifest.kind == "decoder" else 0
    return LatencyReport(
        manifest.name, manifest.version, manifest.profile, prompt_tokens, written, tuple(rows), peak_rss_bytes()
    )


def peak_rss_bytes() -> int:
    """Most memory that this process has had in the machine's own memory."""
    told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return told if sys.platform == "darwin" else told * 1024  # kilobytes elsewhere


def _check_context(model: Model, prompt_tokens: int, new_tokens: int) -> None:
    if shape := model.manifest.decoder:
        asked, needed = f"a prompt of {prompt_tokens} tokens and an answer of {new_tokens}", prompt_tokens + new_tokens
        most = shape.context_tokens
    elif encoder := model.manifest.encoder:
        asked, needed, most = f"a text of {prompt_tokens} tokens", prompt_tokens, encoder.context_tokens
    if needed > most:
        raise DataError(f"{asked} were asked for, and the context of {model.manifest.name} holds {most}; take fewer")


def _decoding(model: Model, adapter: str | None, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for each later one."""
    ids = _random_ids(model, prompt_tokens)
    started = time.perf_counter()
    reader = model.reader(adapter)
    token = int(reader.read([ids])[0].argmax())
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(reader.step([token], [True])[0].argmax())
    return first - started, (time.perf_counter() - first) / (new_tokens - 1)


def _encoding(model: Model, adapter: str | None, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:  # noqa: ARG001
    ids = _random_ids(model, prompt_tokens)
    started = time.perf_counter()
    model.outputs(ids, adapter=adapter)
    return time.perf_counter() - started, 0.0


def _random_ids(model: Model, tokens: int) -> list[int]:
    # A tokenizer may know tokens that its model does not.
    known = model.manifest.decoder.vocabulary if model.manifest.decoder else model.tokens.vocabulary
    return [int(token) for token in np.random.default_rng(0).integers(0, known, tokens)]
