"""Who is enrolled: a YAML file of names, each with its public key and role, that coordinator and nodes have alike.

    bank: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA... head office
    clinic: {key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA..., revoked: 2026-11-22}
    consortium: {key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA..., role: coordinator}

A key is the one line of the file that ``ssh-keygen -t ed25519`` writes beside the private key; a line alone is a node's.
A revoked key stays in the list: it is known and refused whatever the clock says, no other name may have it, and nobody comes in
under its name until the entry is replaced. Two entries of one role let a new key be trusted before the old one is dropped.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, ValidationError, field_validator

from protocol.configuration import from_yaml, read_text
from protocol.errors import ConfigurationError, SignatureError, shown
from protocol.signature import key_id, read_public
from protocol.strict import Strict

Enrolled = Mapping[str, Ed25519PublicKey]
Role = Literal["node", "coordinator", "auditor"]


class Entry(Strict):
    """What a file says of one name."""

    key: str = Field(max_length=1000)
    role: Role = "node"
    revoked: date | None = None

    @field_validator("revoked", mode="before")
    @classmethod
    def _a_day(cls, found: Any) -> Any:
        """Whoever has written the word means it, also where the day is missing."""
        if found is None:
            raise ValueError("expected a day such as 2026-11-22; leave the word out of a key that counts")
        return found


@dataclass(frozen=True)
class Revoked:
    """A key that counts no more.

    Attributes:
        key: The key.
        role: Whose it was.
        since: As the list says it.
    """

    key: Ed25519PublicKey
    role: Role
    since: date


@dataclass(frozen=True)
class Enrolment:
    """Everybody of a list.

    Attributes:
        nodes, coordinators, auditors: Keys that count, by name.
        revoked: Those that count no more, by name; the name is in none of the others.
    """

    nodes: Enrolled = field(default_factory=dict)
    coordinators: Enrolled = field(default_factory=dict)
    auditors: Enrolled = field(default_factory=dict)
    revoked: Mapping[str, Revoked] = field(default_factory=dict)

    def why_not(self, name: str) -> str:
        """Why a name is no node's that counts."""
        if gone := self.revoked.get(name):
            return f"{shown(name, 80)}: its key was revoked on {gone.since}"
        return f"{shown(name, 80)}: not enrolled as a node"


def read_enrolled(path: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys of the nodes that count, by name.

    Raises:
        ConfigurationError: As ``read_enrolment``.
    """
    return dict(read_enrolment(path).nodes)


def read_enrolment(path: Path) -> Enrolment:
    """Everybody of a file.

    Raises:
        ConfigurationError: Every line that is no name with a public Ed25519 key of its own, a role and a date.
    """
    return _read(path, read_text(path))


@lru_cache(maxsize=4)  # it is asked for with every message, and YAML takes a quarter of a millisecond a name
def _read(path: Path, text: str) -> Enrolment:
    content = from_yaml(text, path)
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(str(path), ["holds no name; expected lines such as bank: ssh-ed25519 AAAA..."])
    keys: dict[Role, dict[str, Ed25519PublicKey]] = {"node": {}, "coordinator": {}, "auditor": {}}
    revoked: dict[str, Revoked] = {}
    owners: dict[bytes, str] = {}
    problems: list[str] = []
    for name, said in content.items():
        told = shown(str(name), 80)
        try:
            entry = Entry.model_validate(said if isinstance(said, dict) else {"key": said})
            key = read_public(entry.key.encode(), path, told)
        except ValidationError as error:
            problems += [f"{told}: {problem}" for problem in _lines(error)]
            continue
        except SignatureError as error:
            problems.append(str(error))
            continue
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 80):
            problems.append(f"{told!r}: expected a name of 1 to 80 letters that can be printed")
        elif unicodedata.normalize("NFC", name).strip() != name:  # it would look like another one
            problems.append(f"{told!r}: expected a name in composed letters (NFC), without blanks around it")
        # Who signs as two nodes is two of the three that a sum takes; and what was revoked comes back under no other name.
        elif (owner := owners.setdefault(key_id(key), name)) != name:
            problems.append(f"{told}: has the key of {owner}; everybody makes an own one")
        elif entry.revoked:
            revoked[name] = Revoked(key, entry.role, entry.revoked)
        else:
            keys[entry.role][name] = key
    if problems:
        raise ConfigurationError(str(path), problems)
    return Enrolment(keys["node"], keys["coordinator"], keys["auditor"], revoked)


def _lines(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        key: Any = problem["loc"][0] if problem["loc"] else ""
        known, why = ", ".join(Entry.model_fields), problem["msg"].removeprefix("Value error, ")
        yield f"{shown(str(key), 80)}: {why[:1].lower()}{why[1:]}; known are {known}"
