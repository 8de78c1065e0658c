"""What a user said of answers, sealed on the device, and the rows that it makes to learn from.

An accepted answer is a row with its prompt; a corrected one is a row with the better answer, and a pair of which it is the
preferred one; one that was only turned down is kept as such and is no row, for it says what not to answer and not what to.
Everything is bounded and looked at twice: when it is said, and before it is learnt from.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edge.runtime.adapting.learning import Settings
from edge.runtime.adapting.screening import Screen, words
from edge.runtime.adapting.sealing import SealedDocument
from edge.runtime.manifest import TOKENIZER, BundleManifest
from edge.runtime.tokens import Tokeniser
from edge.runtime.verify import content
from protocol.errors import DataError, ModelError
from protocol.vault import Vault

FEWEST: Final = 8
HELD_OUT: Final = 0.2
MOST_FORGETTING: Final = 0.1
_NAME: Final = "feedback"
_SALT_BYTES: Final = 16


class Message(BaseModel):
    """Of the conversation that was answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Entry(BaseModel):
    """What was said of one answer.

    Attributes:
        id: Of the completion; a second word on it takes the first one's place.
        client: Who asked; kept as a salted hash.
        messages: What was answered.
        answer: What the model wrote.
        rating: What the user thinks of it.
        correction: What it should have written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    client: str
    messages: tuple[Message, ...]
    answer: str
    rating: Literal["up", "down"] | None = None
    correction: str | None = None

    @property
    def kind(self) -> Literal["accepted", "corrected", "rejected"]:
        """What it says."""
        return "corrected" if self.correction is not None else "accepted" if self.rating == "up" else "rejected"

    @property
    def learnt(self) -> str | None:
        """The answer that it teaches; None: none."""
        return self.correction if self.correction is not None else self.answer if self.rating == "up" else None

    def problem(self, screen: Screen) -> str:
        """What is wrong with it, without its words; empty where nothing is."""
        answers = [self.answer] if self.correction is None else [self.answer, self.correction]
        return screen.problem([message.model_dump() for message in self.messages], answers, self.learnt)


@dataclass(frozen=True)
class Limits:
    """What a store may hold.

    Attributes:
        rows: At most.
        size_bytes: At most, as JSON.
        client_share: Of both, for one client.
    """

    rows: int = 2000
    size_bytes: int = 2**22
    client_share: float = 0.5


_LIMITS: Final = Limits()


@dataclass(frozen=True)
class Learnable:
    """Rows of feedback that may be learnt from.

    Attributes:
        rows: As ``edge.runtime.adapting.rows`` reads them.
        refused: What was wrong with others, without figures, and with how many.
        silent: Entries that are no rows of this kind: turned down without a better answer, or, of pairs, accepted.
    """

    rows: Sequence[dict[str, Any]]
    refused: Counter[str]
    silent: int

    def said(self) -> list[str]:
        """What its user should know."""
        told = [f"feedback: {len(self.rows)} rows to learn from, {self.silent} entries that teach no answer"]
        return told + [f"feedback: {count} rows refused: {why}" for why, count in sorted(self.refused.items())]


class Store:
    """The feedback of a folder.

    Args:
        folder: Made where it is not there; for its owner's eyes alone.
        vault: Under whose key it is sealed; without one there is none.
        limits: What it may hold. What is beyond them is refused: new words must not push out older ones.
    """

    def __init__(self, folder: Path, vault: Vault, limits: Limits = _LIMITS) -> None:
        self._limits = limits
        self._file = SealedDocument(folder, _NAME, vault, 2**30)

    def entries(self) -> list[Entry]:
        """All that are kept, the oldest first.

        Raises:
            VaultError: The file was sealed with another key, or is damaged.
        """
        return self._read()[1]

    def add(self, entry: Entry, screen: Screen) -> Entry:
        """Keeps what was said, or refuses it and changes nothing; gives it as it is kept.

        Raises:
            DataError: It is not to be learnt from, or there is no more room, with the number and without its words.
            VaultError: As of ``entries``.
        """
        if problem := entry.problem(screen):
            raise DataError(f"feedback: {problem}")
        with self._file.alone():
            salt, held = self._read()
            kept = entry.model_copy(update={"client": _client(salt, entry.client)})
            others = [each for each in held if each.id != entry.id]
            self._check(kept, others)
            taught = Counter(words(each.learnt) for each in others if each.learnt is not None)
            if kept.learnt is not None and (problem := screen.flooding(kept.learnt, taught)):
                raise DataError(f"feedback: {problem}")
            entries = [each.model_dump(mode="json") for each in (*others, kept)]
            self._file.write({"salt": salt.hex(), "entries": entries})
        return kept

    def wipe(self) -> int:
        """Overwrites and removes all of it, what cannot be opened too; on flash only destroying the key is a wipe.

        Returns:
            1 if there was a file, else 0.
        """
        with self._file.alone():
            there = self._file.path.exists()
            self._file.wipe()
            return int(there)

    def _check(self, entry: Entry, others: Sequence[Entry]) -> None:
        own = [each for each in others if each.client == entry.client]
        share = self._limits.client_share
        for whose, held, part in (("all clients", others, 1.0), ("one client", own, share)):
            rows, size = len(held) + 1, _size([*held, entry])
            most, most_bytes = int(self._limits.rows * part), int(self._limits.size_bytes * part)
            if rows > most or size > most_bytes:
                raise DataError(
                    f"feedback: no more room: {rows} entries and {size} bytes of {whose}, expected at most {most} and "
                    f"{most_bytes}; learn from them (fedge edge adapt --feedback), then wipe them"
                )

    def _read(self) -> tuple[bytes, list[Entry]]:
        held = self._file.read()
        if not held:
            return os.urandom(_SALT_BYTES), []
        try:
            return bytes.fromhex(held["salt"]), [Entry.model_validate(each) for each in held["entries"]]
        except (KeyError, TypeError, ValueError, ValidationError):
            raise self._file.unknown() from None


def screen_of(bundle: Path, manifest: BundleManifest) -> Screen:
    """What looks at feedback for a bundle whose manifest was verified.

    Raises:
        ModelError: It holds no conversations, so nobody can say anything of its answers.
    """
    if manifest.kind != "decoder" or manifest.chat is None:
        raise ModelError(f"{manifest.name}: feedback is on answers in a conversation, and this {manifest.kind} has none")
    return Screen(Tokeniser(content(bundle, manifest, TOKENIZER), manifest.tokens), manifest.chat)


def learnable(entries: Iterable[Entry], screen: Screen, *, pairs: bool = False) -> Learnable:
    """Rows of what was said.

    Args:
        entries: Of a store.
        screen: Looks at each of them again: what may be learnt may have become less since.
        pairs: Rows of a better and a worse answer (DPO), from corrections alone; else of prompt and answer.
    """
    rows: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    taught: Counter[str] = Counter()
    silent = 0
    for entry in entries:
        if entry.learnt is None or (pairs and entry.correction is None):
            silent += 1
            continue
        if problem := entry.problem(screen) or screen.flooding(entry.learnt, taught):
            refused[problem.partition(":")[0]] += 1
            continue
        taught[words(entry.learnt)] += 1
        rows.append(_row(entry, entry.learnt, pairs=pairs))
    return Learnable(rows, refused, silent)


def guarded(settings: Settings, rows: int) -> Settings:
    """Settings for learning from feedback: a fifth of the rows measures, and what forgets more than a tenth is not kept.

    Raises:
        DataError: There are too few rows for any to be held back, and so nothing would decide.
    """
    if rows < FEWEST:
        raise DataError(f"feedback: {rows} rows to learn from, expected at least {FEWEST}; collect more")
    held_out = max(settings.held_out, HELD_OUT)
    most = MOST_FORGETTING if settings.most_forgetting is None else settings.most_forgetting
    return settings.model_copy(update={"held_out": held_out, "most_forgetting": most})


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """How many of each kind there are, and their bytes."""
    kinds = Counter(entry.kind for entry in entries)
    told = {kind: kinds.get(kind, 0) for kind in ("accepted", "corrected", "rejected")}
    return told | {"clients": len({entry.client for entry in entries}), "size_bytes": _size(entries)}


def _row(entry: Entry, learnt: str, *, pairs: bool) -> dict[str, Any]:
    prompt = [message.model_dump() for message in entry.messages]
    if pairs:
        return {"prompt": prompt, "chosen": learnt, "rejected": entry.answer}
    return {"prompt": prompt, "answer": learnt}


def _size(entries: Iterable[Entry]) -> int:
    return sum(len(entry.model_dump_json().encode()) for entry in entries)


def _client(salt: bytes, name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "replace"), key=salt, digest_size=8).hexdigest()
