"""What placeholders stand for, sealed so that only who holds the institution's own key can read it (``protocol.vault``)."""

import json
from collections.abc import Mapping
from pathlib import Path

from protocol.vault import Vault

_WHAT = {"kind": "placeholders"}


def seal(path: Path, values: Mapping[str, str | int | float], vault: Vault) -> None:
    """Writes values by placeholder, whole or not at all."""
    vault.write(path, json.dumps(dict(values)).encode(), _WHAT)


def opened(path: Path, vault: Vault) -> dict[str, str | int | float]:
    """Values by placeholder.

    Raises:
        VaultError: No such file, no placeholders, another key's, or not as it was written.
    """
    values: dict[str, str | int | float] = json.loads(vault.read(path, _WHAT))
    return values
