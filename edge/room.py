"""Whether this machine has the memory and the disk for what is about to be made: asked before, not found out half-way."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ModelError
from strategies.base_model import Base
from strategies.hardware import probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 100 M parameters took 0.93 GB (benchmarks/LOG.md): the weights in float32, the tensor that is being written, the libraries and
# the trace. A checkpoint in 16 bits is held beside its float32 copy while that is made.
_PER_PARAMETER, _BESIDE = 6, 700 * 10**6


def check_memory(base: Base, skeleton: "PreTrainedModel") -> None:
    """Makes sure that a model can be exported here.

    Raises:
        ModelError: It needs more memory than is free.
    """
    needed = _PER_PARAMETER * sum(parameter.numel() for parameter in skeleton.parameters()) + _BESIDE
    free = probe().ram_free_bytes
    if needed > free:
        raise ModelError(
            f"{base.name!r}: to export it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free here; "
            "export it on a larger machine: a bundle is the same wherever it was made"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Makes sure that so many bytes fit where a folder is.

    Raises:
        ModelError: They do not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"{folder}: to write the graph takes {needed:,} bytes, {free:,} are free there; make room, or name another folder"
        )
