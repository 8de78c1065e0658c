"""Several processes that train one model together, as ``accelerate launch`` or ``torchrun`` start them.

The first one does everything: it reads the job, runs the round, measures and writes. The others wait until it trains, are
handed the same training, take part in it and wait again.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# The first process reads, measures and writes while the others wait.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that reads and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def hand_out(work: Any) -> None:
    """Tells the others what this process, the first, is about to do; None ends them."""
    if count() > 1:
        _broadcast(work)
        if work is None:
            _end()


def follow(do: Callable[[Any], object]) -> None:
    """Does whatever the first process does, until it has done everything."""
    while (work := _broadcast(None)) is not None:
        do(work)
    _end()


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        import torch

        _begin()
        torch.distributed.barrier()


def _broadcast(work: Any) -> Any:
    import torch

    _begin()
    holder = [work]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def _begin() -> None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    if not torch.distributed.is_initialized():
        cpu = not torch.cuda.is_available()
        own = {} if cpu else {"backend": "cpu:gloo,cuda:nccl"}
        PartialState(cpu=cpu, **own, **InitProcessGroupKwargs(timeout=_PATIENCE).to_kwargs())


def _end() -> None:
    import torch

    torch.distributed.destroy_process_group()
