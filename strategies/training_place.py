"""Where a training keeps itself: in a folder, in one that is gone afterwards, or sealed, with nothing open on any disk."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.sealed_folder import folder_in_memory, sealed_folder
from protocol.vault import SUFFIX, Identity, Vault


@dataclass(frozen=True)
class Safe:
    """A vault, and as what it seals.

    Attributes:
        vault: Its key.
        what: Tells this training from others: federation and round, or the folder's name.
    """

    vault: Vault
    what: Identity


@dataclass(frozen=True)
class Place:
    """Where a training writes.

    Attributes:
        folder: Checkpoints, logs, the curve.
        whole: The whole model, where one is wanted.
        keep: To be called after every checkpoint: from then on it outlives the process.
    """

    folder: Path
    whole: Path | None
    keep: Callable[[], None]


@contextmanager
def placed(folder: Path | None, whole: Path | None, safe: Safe | None) -> Iterator[Place]:
    """A place for one training.

    Args:
        folder: Keeps it; without one nothing is kept.
        whole: Where the whole model is to go.
        safe: Both are then sealed: each entry of ``folder`` is a file ``NAME.sealed`` there, the model is ``WHOLE.sealed``.

    Raises:
        VaultError: What lies in the folder does not open as what is being trained, or there is no place in memory.
    """
    if safe is None:
        with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
            yield Place(folder or Path(scratch), whole, lambda: None)
        return
    with folder_in_memory() as model, sealed_folder(folder, safe.vault, {**safe.what, "kind": "training"}) as opened:
        inside = model / whole.name if whole else None
        yield Place(opened.place, inside, opened.keep)
        if whole and inside and inside.exists():
            safe.vault.pack(inside, whole.with_name(f"{whole.name}{SUFFIX}"), {**safe.what, "kind": "whole-model"})
