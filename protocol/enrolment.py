"""Who is enrolled: a YAML file of names, each with its public key, that coordinator and nodes have alike.

    bank: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA... head office
    clinic: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA...

A key is the one line of the file that ``ssh-keygen -t ed25519`` writes beside the private key.
"""

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.configuration import read_yaml
from protocol.errors import ConfigurationError, SignatureError, shown
from protocol.signature import key_id, read_public

Enrolled = Mapping[str, Ed25519PublicKey]


def read_enrolled(path: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys of a file, by name.

    Raises:
        ConfigurationError: Every line that is no name with a public Ed25519 key of its own.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(str(path), ["holds no name; expected lines such as bank: ssh-ed25519 AAAA..."])
    found: dict[str, Ed25519PublicKey] = {}
    owners: dict[bytes, str] = {}
    problems = []
    for name, line in content.items():
        told = shown(str(name), 80)
        try:
            key = read_public(str(line).encode(), path, told)
        except SignatureError as error:
            problems.append(str(error))
            continue
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 80):
            problems.append(f"{told!r}: expected a name of 1 to 80 letters that can be printed")
        # Who signs as two nodes is two of the three that a sum takes.
        elif (owner := owners.setdefault(key_id(key), name)) != name:
            problems.append(f"{told}: has the key of {owner}; each node makes its own")
        else:
            found[name] = key
    if problems:
        raise ConfigurationError(str(path), problems)
    return found
