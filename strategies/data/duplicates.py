"""Rows that say the same again, word for word or nearly: by the share of short character sequences that two texts share.

Two texts are near duplicates when the Jaccard similarity of their sets of character sequences reaches a threshold (Broder 1997,
"On the resemblance and containment of documents"). Comparing all pairs would take too long, so MinHash signatures find the
pairs worth comparing: two signatures agree in each place with a probability equal to the similarity, and texts that agree in
all places of some band are compared exactly (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Characters
in place of words: the same for languages that leave no spaces.

Two texts with other numbers in them are never near duplicates, however alike: the fee of plan 3 is not that of plan 4. Other
names, and numbers that are written as words, are not told from other words.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

# Set on planted duplicates (benchmarks/LOG.md): shorter sequences find more of them, and more that are none.
_SEQUENCE = 4
THRESHOLD = 0.6
_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # says as much as a short word: counts twice
_BANDS, _PLACES = 40, 4  # a pair at the threshold is compared with probability 1 - (1 - 0.6^4)^40 > 0.996
_COMPARED = 32  # exactly, of those that look alike: where these are not, hardly another is
_AT_ONCE = 512  # sequences: their permutations fit into a processor's cache, and a row of megabytes into memory
_Numbers = NDArray[np.uint64]
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
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

    Case, punctuation and spaces do not count; of numbers both have the same ones. Without the texts that are found, no two are
    near duplicates any more (but for a few in a thousand at the threshold itself).

    Args:
        texts: In order; of two that are alike the first stays.
        threshold: Of the Jaccard similarity.
    """
    plain = [normalised(text) for text in texts]
    found: dict[int, int] = {}
    first: dict[tuple[str, str], int] = {}
    index = _Index(len(plain))
    for at, text in enumerate(plain):
        numbers = _numbers(texts[at])
        if (same := first.setdefault((text, numbers), at)) != at:
            found[at] = found.get(same, same)
            continue
        own = _sequences(text)
        signature = _signature(own)
        near = index.likely(signature, numbers, threshold)
        alike = (one for one in near if _shared(own, _sequences(plain[one])) >= threshold)
        if (earlier := next(alike, None)) is not None:
            found[at] = earlier
        else:
            index.add(at, signature, numbers)
    return found


def near_groups(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """The group of each text, named by the place of its first: texts of two groups are not near duplicates.

    Two of one group need not be alike themselves: a chain of near duplicates may lie between them.

    Args:
        texts: In order.
        threshold: Of the Jaccard similarity.
    """
    plain = [normalised(text) for text in texts]
    parent = list(range(len(plain)))
    first: dict[tuple[str, str], int] = {}
    index = _Index(len(plain))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    for at, text in enumerate(plain):
        numbers = _numbers(texts[at])
        if (same := first.setdefault((text, numbers), at)) != at:
            parent[at] = root(same)
            continue
        own = _sequences(text)
        signature = _signature(own)
        for other in index.likely(signature, numbers, threshold):
            one, two = sorted((root(at), root(other)))
            if one != two and _shared(own, _sequences(plain[other])) >= threshold:
                parent[two] = one
        index.add(at, signature, numbers)
    return [root(at) for at in range(len(plain))]


class _Index:
    """Signatures by band and numbers: finds the texts that are worth comparing."""

    def __init__(self, most: int) -> None:
        self._places = list[int]()  # of each row of the signatures
        self._rows: dict[str, list[int]] = defaultdict(list)  # by numbers
        self._signatures = np.empty((most, _BANDS * _PLACES), np.uint32)
        self._buckets: dict[tuple[int, str, bytes], list[int]] = defaultdict(list)

    def likely(self, signature: NDArray[np.uint32], numbers: str, threshold: float) -> list[int]:
        """Places of texts of the same numbers that agree in a band and nearly enough in all places: the nearest, in order."""
        buckets = [self._buckets.get(key, []) for key in _keys(signature, numbers)]
        rows = self._rows.get(numbers, [])
        if sum(map(len, buckets)) < len(rows):  # texts with a long part in common are in many buckets together
            rows = sorted(set(chain(*buckets)))
        agreeing = np.count_nonzero(self._signatures[rows] == signature, axis=1)
        nearest = np.argsort(-agreeing, kind="stable")[:_COMPARED]
        least = (threshold - 0.2) * _BANDS * _PLACES
        return [self._places[rows[at]] for at in sorted(nearest) if agreeing[at] > least]

    def add(self, at: int, signature: NDArray[np.uint32], numbers: str) -> None:
        """Remembers the text at a place."""
        row = len(self._places)
        self._signatures[row] = signature
        self._places.append(at)
        self._rows[numbers].append(row)
        for key in _keys(signature, numbers):
            self._buckets[key].append(row)


def _keys(signature: NDArray[np.uint32], numbers: str) -> list[tuple[int, str, bytes]]:
    return [(band, numbers, part.tobytes()) for band, part in enumerate(signature.reshape(_BANDS, _PLACES))]


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two normalised texts: shared sequences over all of them."""
    return _shared(_sequences(one), _sequences(other))


def _shared(one: _Numbers, other: _Numbers) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def normalised(text: str) -> str:
    """Lower case, one space between words, no punctuation (compatibility forms made one: NFKC)."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def _numbers(text: str) -> str:
    """The numbers of a text, each once, in one order."""
    return " ".join(sorted(set(_NUMBER.findall(unicodedata.normalize("NFKC", text)))))


def _sequences(text: str) -> _Numbers:
    """A number for each distinct sequence of characters; one for the whole of a shorter text.

    A space stands before and after, so that the first and the last word end as those between them do.
    """
    text = " " + _IDEOGRAPH.sub(r"\g<0>\g<0>", text) + " "
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if len(codes) < _SEQUENCE:
        codes = np.pad(codes, (0, _SEQUENCE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SEQUENCE)
    return np.unique(_mixed(windows @ _POWERS))


def _signature(sequences: _Numbers) -> NDArray[np.uint32]:
    """The least of each permutation, band after band."""
    least = np.full(_BANDS * _PLACES, np.iinfo(np.uint64).max, np.uint64)
    for at in range(0, len(sequences), _AT_ONCE):
        np.minimum(least, _mixed(sequences[at : at + _AT_ONCE, None] * _FACTORS + _OFFSETS).min(axis=0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def _mixed(numbers: _Numbers) -> _Numbers:
    """Every bit of a number into every other (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    numbers = numbers ^ (numbers >> np.uint64(30))
    numbers *= np.uint64(0xBF58476D1CE4E5B9)
    numbers ^= numbers >> np.uint64(27)
    numbers *= np.uint64(0x94D049BB133111EB)
    numbers ^= numbers >> np.uint64(31)
    return numbers
