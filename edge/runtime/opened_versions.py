"""The highest version of each bundle that a device has opened: older ones, though well signed, are not opened again.

Kept beside bundles and never inside one, as an empty file ``NAME.VERSION`` in a folder: made in one step, so that it is there
or not, and never lowered by another process that opens an older version at the same moment. To go back on purpose, remove it.
Whoever may write there can do so too: it guards against old bundles, not against the device's owner.
"""

import re
from pathlib import Path
from typing import Final

from edge.runtime.manifest import BundleManifest
from protocol.durable import to_disk
from protocol.errors import BundleError

FOLDER: Final = ".fedge-opened-versions"
_NUMBER = r"[1-9][0-9]{0,15}"


def highest(state: Path, name: str) -> int:
    """The highest version of ``name`` that was remembered; 0 for none.

    Raises:
        BundleError: The folder cannot be read.
    """
    try:
        found = [re.fullmatch(rf"{re.escape(name)}\.({_NUMBER})", path.name) for path in state.iterdir()]
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise BundleError(f"{state}: cannot be read ({type(error).__name__}); it holds which versions were opened") from None
    return max((int(match[1]) for match in found if match), default=0)


def remember(state: Path, manifest: BundleManifest) -> None:
    """Remembers that a version was opened. For after the model has opened: a bundle that cannot run bars no other.

    Raises:
        BundleError: It cannot be written.
    """
    before = highest(state, manifest.name)
    if before >= manifest.version:
        return
    try:
        state.mkdir(parents=True, exist_ok=True)
        (state / f"{manifest.name}.{manifest.version}").touch()
        to_disk(state)
        if before:
            (state / f"{manifest.name}.{before}").unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(
            f"{state}: the version that was opened cannot be remembered ({type(error).__name__}); name a folder that this "
            "device may write to, or choose to go without"
        ) from None
