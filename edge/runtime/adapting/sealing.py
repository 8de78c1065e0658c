"""What a device learns from and what it has learnt, sealed under a key file of its owner's (``protocol.vault``).

The name of each file is bound to its content, so that one does not open in another's place.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from edge.runtime.adapting.state import MAGIC, Seal
from protocol.durable import alone
from protocol.errors import AdapterError, ConfigurationError, VaultError
from protocol.files import private_folder
from protocol.vault import SUFFIX, Vault, is_sealed
from protocol.wiping import wipe

PASSPHRASE: Final = "FEDGE_VAULT_PASSPHRASE"  # noqa: S105 - the variable's name
_KIND: Final = "device"


class VaultSeal:
    """Seals a device's states and adapters (``state.Seal``).

    Args:
        vault: Of its key.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def seal(self, content: bytes, name: str) -> bytes:
        """Sealed as the file of that name."""
        return self._vault.seal(content, _identity(name))

    def open(self, sealed: bytes, name: str) -> bytes:
        """What was sealed as that file.

        Raises:
            AdapterError: It was not, or not with this key.
        """
        try:
            return self._vault.open(sealed, _identity(name), name)
        except VaultError as error:
            raise AdapterError(str(error)) from None


def vault_at(key_file: Path) -> Vault:
    """The vault of a key file; the passphrase of one that has one is in the environment (``FEDGE_VAULT_PASSPHRASE``).

    Raises:
        VaultError: It does not open.
    """
    return Vault.at(key_file, PASSPHRASE if PASSPHRASE in os.environ else None)


def seal_of(folder: Path, vault: Vault | None) -> Seal | None:
    """How the files of a device's folder are sealed, if the key is the one that it was begun with.

    A damaged file gives way to the one before it. A wrong key would make all of them look damaged, and a folder that was begun
    without one would be learnt anew: both are told instead.

    Raises:
        VaultError: The folder is sealed and there is no key or another one, or it is not sealed and there is one.
    """
    begins = {path: _first(path, len(MAGIC)) for path in sorted(folder.glob("*.state")) if path.is_file()}
    sealed = [path for path in begins if is_sealed(path)]
    if vault is None:
        if sealed:
            raise VaultError(f"{folder}: {len(sealed)} of its files are sealed; give their key (--vault)")
        return None
    if clear := [path for path, begin in begins.items() if begin == MAGIC]:
        raise VaultError(
            f"{folder}: {len(clear)} of its files were written without a key; leave out --vault, or name another folder"
        )
    seal = VaultSeal(vault)
    if sealed and not any(_opens(seal, path) for path in sealed):
        raise VaultError(
            f"{folder}: none of its {len(sealed)} sealed files opens with this key; give the one it was begun with"
        )
    return seal


class SealedDocument:
    """One JSON object in a file that nobody reads without the key; written whole or not at all.

    Args:
        folder: Made by whoever changes it first, and then for its owner's eyes alone; who only reads leaves it as it is.
        name: Of the file, without suffix.
        vault: Its key.
        most_bytes: Longer files are none of ours.

    Raises:
        ConfigurationError: What is there is no folder.
    """

    def __init__(self, folder: Path, name: str, vault: Vault, most_bytes: int) -> None:
        self.path, self._vault, self._most = folder / f"{name}{SUFFIX}", vault, most_bytes
        self._what = _identity(name)
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError("folder", [f"{folder}: is none; name another"])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process or thread reads and writes it meanwhile.

        Raises:
            ConfigurationError: Its folder is none, and cannot be made.
        """
        try:
            private_folder(self.path.parent)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            problem = f"{self.path.parent}: cannot be made or closed to others ({reason}); name another"
            raise ConfigurationError("folder", [problem]) from None
        with self.path.with_name(f".{self.path.name}.lock").open("w", encoding="utf-8") as file:
            alone(file.fileno())
            yield

    def read(self) -> dict[str, Any]:
        """The object; an empty one where there is no file.

        Raises:
            VaultError: It was sealed with another key, was changed or cut off, or holds no object.
        """
        if not self.path.exists():
            return {}
        if self.path.stat().st_size > self._most:
            raise VaultError(f"{self.path}: {self.path.stat().st_size} bytes, expected at most {self._most}")
        try:
            found = json.loads(self._vault.read(self.path, self._what))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.unknown()
        return found

    def unknown(self) -> VaultError:
        """What is to be raised where the seal holds and its content is not understood."""
        return VaultError(f"{self.path}: opens, and holds nothing that this fedge knows; another version may have written it")

    def write(self, found: Mapping[str, Any]) -> None:
        """In place of what was there."""
        self._vault.write(self.path, json.dumps(found).encode(), self._what)

    def wipe(self) -> None:
        """Overwrites and removes the file, and what writers that were killed left beside it."""
        for path in (self.path, *self.path.parent.glob(f".{self.path.name}-*")):
            if path.exists():
                wipe(path)


def _identity(name: str) -> dict[str, str | int]:
    return {"kind": _KIND, "name": name}


def _first(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _opens(seal: Seal, path: Path) -> bool:
    try:
        seal.open(path.read_bytes(), path.name)
    except AdapterError:
        return False
    return True
