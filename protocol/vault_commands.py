"""Verbs of sealed files: ``fedge vault keygen | seal | open | show | wipe``."""

from pathlib import Path
from typing import Annotated

import typer

Key = Annotated[Path, typer.Option("--key", help="Key file, as keygen made it.")]
Words = Annotated[
    str | None, typer.Option("--passphrase-env", metavar="NAME", help="Environment variable with the key file's passphrase.")
]

vault = typer.Typer(help="Seals folders with a key of your own, and opens them.", no_args_is_help=True, suggest_commands=False)


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.add_typer(vault, name="vault")


@vault.command()
def keygen(key: Annotated[Path, typer.Argument(help="New file for the key.")], passphrase_env: Words = None) -> None:
    """Makes a key. Whoever has it can open what it sealed; who loses it cannot."""
    from protocol.vault import make_key_file, passphrase_from

    make_key_file(key, passphrase_from(passphrase_env))
    typer.echo(f"{key}: keep a copy where only you can read it")


@vault.command()
def seal(
    folder: Annotated[Path, typer.Argument(help="Folder or file.")],
    key: Key,
    target: Annotated[Path | None, typer.Option("--to", help="The sealed file; else FOLDER.sealed beside it.")] = None,
    passphrase_env: Words = None,
) -> None:
    """Seals a folder into one file. The folder stays; wipe takes it away."""
    from protocol.errors import VaultError
    from protocol.vault import SUFFIX, Vault

    folder = folder.resolve()
    target = target or folder.with_name(f"{folder.name}{SUFFIX}")
    if not folder.exists() or target.exists():
        raise VaultError(f"{folder}: no such folder" if not folder.exists() else f"{target}: is there already; name another")
    for path, what in (
        (key, "the key would be sealed with itself, and opens nothing any more once the folder is wiped"),
        (target, "the sealed file would be a part of itself"),
    ):
        if path.resolve().is_relative_to(folder):
            raise VaultError(f"{path}: lies in {folder}: {what}; name a place outside")
    Vault.at(key, passphrase_env).pack(folder, target, {"kind": "folder", "name": folder.name})
    typer.echo(f"{target}: sealed; {folder} is still there")


@vault.command(name="open")
def open_(
    sealed: Annotated[Path, typer.Argument(help="The sealed file.")],
    key: Key,
    target: Annotated[Path, typer.Option("--to", help="Folder that what was sealed goes into, under its name.")] = Path(),
    passphrase_env: Words = None,
) -> None:
    """Opens what seal, a node or a coordinator has sealed: all of it or nothing."""
    import tempfile

    from protocol.errors import VaultError
    from protocol.vault import Vault, identity_of

    opens, what = Vault.at(key, passphrase_env), identity_of(sealed)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fedge-", dir=target) as draft:
        opens.unpack(sealed, Path(draft), what)
        (found,) = Path(draft).iterdir()
        place = target / found.name
        if place.exists() or place.is_symlink():
            raise VaultError(f"{place}: is there already; name another folder with --to")
        found.rename(place)
    typer.echo(f"{place}: {_told(what)}")


@vault.command()
def show(sealed: Annotated[Path, typer.Argument(help="The sealed file.")]) -> None:
    """What a sealed file says it is. Without the key nobody vouches for it."""
    from protocol.vault import identity_of

    typer.echo(_told(identity_of(sealed)))


@vault.command()
def wipe(
    path: Annotated[Path, typer.Argument(help="Folder or file to overwrite and remove.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Overwrites files with random bytes and removes them. On flash and where disks copy on write, destroy the key instead."""
    from protocol.errors import VaultError
    from protocol.wiping import wipe as overwrite

    if not path.exists() and not path.is_symlink():
        raise VaultError(f"{path}: there is nothing to wipe")
    if not yes:
        typer.confirm(f"overwrite and remove {path} for good?", abort=True)
    typer.echo(f"{path}: {overwrite(path.resolve() if path.is_dir() else path)} file(s) overwritten and removed")


def _told(what: object) -> str:
    import json

    return json.dumps(what, sort_keys=True)
