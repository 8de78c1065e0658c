"""How a bundle is opened, whatever for: verified first, remembered last."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.runtime import opened_versions
from edge.runtime.manifest import BundleManifest
from edge.runtime.session import Resources
from edge.runtime.verify import verified
from protocol.signature import read_trusted

T = TypeVar("T")
Trusted = Ed25519PublicKey | Sequence[Ed25519PublicKey] | Path | str
STATE: Final = Path(opened_versions.FOLDER)
RESOURCES: Final = Resources()


def opened_bundle(
    made: Callable[[Path, BundleManifest, Resources], T],
    folder: Path | str,
    trusted: Trusted,
    *,
    lowest_version: int = 0,
    name: str | None = None,
    state: Path | None = STATE,
    resources: Resources = RESOURCES,
) -> T:
    """What is made of a bundle, if every byte of it is as a trusted key signed it; only then anything of it is parsed.

    Args:
        made: Of its folder, its manifest and ``resources``.
        folder: The bundle.
        trusted: Whose signature counts: keys, or the path of a file of them.
        lowest_version: Older ones are refused.
        name: The one bundle that is expected; None: any that is signed.
        state: Where this device remembers the newest version that it opened, so that an older one is refused; relative to the
            folder that the bundle lies in. None: nowhere.
        resources: Threads and memory.

    Raises:
        BundleError: Anything does not hold; ``SignatureError`` for keys. And whatever ``made`` raises.
    """
    folder = Path(folder).resolve()
    state = state and folder.parent / state
    if isinstance(trusted, str | Path):
        trusted = read_trusted(Path(trusted))
    keys = [trusted] if isinstance(trusted, Ed25519PublicKey) else list(trusted)
    manifest = verified(folder, keys, lowest_version=lowest_version, state=state, name=name)
    what = made(folder, manifest, resources)
    if state:
        opened_versions.remember(state, manifest)
    return what
