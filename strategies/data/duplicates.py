"""Rows that say the same again, word for word or nearly: by the share of short character sequences that two texts share.

Two texts are near duplicates when the Jaccard similarity of their sets of character sequences reaches a threshold (Broder 1997,
"On the resemblance and containment of documents"). Comparing all pairs would take too long, so MinHash signatures find the
pairs worth comparing: two signatures agree in each place with a probability equal to the similarity, and texts that agree in
all places of some band are compared exactly (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Characters
in place of words: the same for languages that leave no spaces.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Set on planted duplicates (benchmarks/LOG.md): shorter sequences find more of them, and more that are none.
_SEQUENCE = 4
THRESHOLD = 0.6
_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # says as much as a short word: counts twice
_BANDS, _PLACES = 40, 4  # a pair at the threshold is compared with probability 1 - (1 - 0.6^4)^40 > 0.996
_Numbers = NDArray[np.uint64]
_FACTORS, _OFFSETS = (np.random.default_rng(0).integers(1, 2**63, (2, _BANDS * _PLACES), dtype=np.uint64) | np.uint64(1))[
    :, None
]
_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, _SEQUENCE + 1)], dtype=np.uint64)


def exact_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Texts that repeat an earlier one, but for space around them: place by place of the first of the same."""
    first: dict[str, int] = {}
    places = {at: first.setdefault(text.strip(), at) for at, text in enumerate(texts)}
    return {at: earlier for at, earlier in places.items() if earlier != at}


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> dict[int, int]:
    """Texts that nearly repeat an earlier one that stays: place by place of the first such, exact repetitions included.

    Case, punctuation and spaces do not count. Without the texts that are found, no two are near duplicates any more (but for a
    few in a thousand at the threshold itself).

    Args:
        texts: In order; of two that are alike the first stays.
        threshold: Of the Jaccard similarity.
    """
    plain = [normalised(text) for text in texts]
    found: dict[int, int] = {}
    first: dict[str, int] = {}
    kept = list[int]()  # place in ``texts`` of each row of ``signatures``
    signatures = np.empty((len(plain), _BANDS * _PLACES), np.uint32)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for at, text in enumerate(plain):
        if first.setdefault(text, at) != at:
            found[at] = found.get(first[text], first[text])
            continue
        signature = _signature(_sequences(text))
        keys = [(band, part.tobytes()) for band, part in enumerate(signature.reshape(_BANDS, _PLACES))]
        rows = sorted({row for key in keys for row in buckets.get(key, ())})
        likely = (signatures[rows] == signature).mean(axis=1) > threshold - 0.2
        alike = (kept[row] for row, is_likely in zip(rows, likely, strict=True) if is_likely)
        if (earlier := next((one for one in alike if similarity(text, plain[one]) >= threshold), None)) is not None:
            found[at] = earlier
            continue
        signatures[len(kept)] = signature
        for key in keys:
            buckets[key].append(len(kept))
        kept.append(at)
    return found


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two normalised texts: shared sequences over all of them."""
    a, b = _sequences(one), _sequences(other)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def normalised(text: str) -> str:
    """Lower case, one space between words, no punctuation (compatibility forms made one: NFKC)."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def _sequences(text: str) -> _Numbers:
    """A number for each distinct sequence of characters; one for the whole of a shorter text."""
    text = _IDEOGRAPH.sub(r"\g<0>\g<0>", text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if len(codes) < _SEQUENCE:
        codes = np.pad(codes, (0, _SEQUENCE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SEQUENCE)
    return np.unique(_mixed((windows * _POWERS).sum(axis=1, dtype=np.uint64)))


def _signature(sequences: _Numbers) -> NDArray[np.uint32]:
    """The least of each permutation, band after band."""
    least: _Numbers = _mixed(sequences[:, None] * _FACTORS + _OFFSETS).min(axis=0)
    return (least >> np.uint64(32)).astype(np.uint32)


def _mixed(numbers: _Numbers) -> _Numbers:
    """Every bit of a number into every other (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
