"""Bounds what a reply may become in memory before Flower inflates it.

A message lies at the SuperLink as a tree of objects, each a head (its kind and the ids of its children) and a body, and
``HttpGrid`` makes objects of the bodies. The SuperLink checks heads alone: a body is whatever its node wrote. An Array's body
lists its chunks, one of them as often as it likes, so that five megabytes that were sent become as many as the list is long.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry  # private: who inflates which kind

from protocol.errors import MessageError

# Everything but numbers: names, ids, manifests, metrics. A tensor takes about 400 bytes (two ids of 64 digits in its record,
# shape and dtype, its name), so this is for some 16,000 of them; a base of 70 billion weights has 600 modules.
MOST_TEXT = 2**23
_CHUNK = "ArrayChunk"


@contextmanager
def bounded(array_bytes: int) -> Iterator[None]:
    """While the block lasts, what Flower inflates is one reply whose arrays hold no more than ``array_bytes``.

    Raises:
        MessageError: (in the block) The reply holds more, more than ``MOST_TEXT`` beside it, or what is no object.
    """
    registry: dict[str, Any] = inflatable_class_registry
    known, room = dict(registry), _Room(array_bytes)
    registry.update({name: _Bounded(kind, room) for name, kind in known.items()})
    try:
        yield
    finally:
        registry.update(known)


class _Room:
    def __init__(self, array_bytes: int) -> None:
        self.array_bytes = array_bytes
        self._text = self._arrays = 0

    def take_text(self, count: int) -> None:
        self._text += count
        if self._text > MOST_TEXT:
            raise MessageError(f"the reply: found more than {MOST_TEXT} bytes beside its arrays, expected no more")

    def take_array(self, count: int) -> None:
        self._arrays += count
        self.check(self._arrays)

    def check(self, count: int) -> None:
        if count > self.array_bytes:
            raise MessageError(f"the reply: found {count} bytes of arrays, expected at most {self.array_bytes}")


class _Bounded:
    """Stands in for a class of Flower's in its registry, and inflates as that does."""

    def __init__(self, kind: Any, room: _Room) -> None:
        self._kind, self._room = kind, room

    def inflate(self, object_content: bytes, children: Mapping[str, Any] | None = None) -> Any:
        name = self._kind.__qualname__
        try:
            if name != _CHUNK:  # it is as long as it was when it was sent
                self._room.take_text(len(object_content))
            if name == Array.__qualname__:
                self._room.take_array(_size(object_content, children or {}))
            found = self._kind.inflate(object_content, children=children)
            if isinstance(found, ArrayRecord):  # which may name one array many times, and each is read
                self._room.check(sum(len(array.data) for array in found.values()))
        except MessageError:
            raise
        except Exception as error:  # noqa: BLE001 - bytes from outside: Flower and protobuf may raise anything on them
            raise MessageError(f"the reply: its {name} cannot be read ({type(error).__name__})") from None
        return found


def _size(content: bytes, chunks: Mapping[str, Any]) -> int:
    """Bytes of an Array once its chunks are in it."""
    ids = get_object_children_ids_from_object_content(content)
    return sum(len(chunks[ids[at]].data) for at in json.loads(get_object_body(content, Array))["arraychunk_ids"])
