"""Trains, and when memory runs out trains again with less of it: smaller batches first, then whatever else saves memory."""

import gc
import logging
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

from protocol.errors import HardwareError
from protocol.plan import Plan
from strategies import processes
from strategies.allocator import return_freed_blocks

T = TypeVar("T")
log = logging.getLogger(__name__)


def on_ladder(plan: Plan, rungs: Iterable[tuple[str, Plan]], train: Callable[[Plan], T]) -> tuple[T, Plan, tuple[str, ...]]:
    """Calls ``train(plan)``, and after each out-of-memory error once more with the next rung's plan.

    Args:
        plan: To begin with.
        rungs: ``(what changes, plan)``, each in need of less memory than the one before; looked at only when one is needed.
        train: Trains; whatever it holds is given back before the next try.

    Returns:
        What ``train`` returned, the plan that it was called with, and what was changed on the way down.

    Raises:
        HardwareError: The last rung ran out of memory too.
    """
    changed: tuple[str, ...] = ()
    for change, now in chain([("", plan)], rungs):
        changed = (*changed, change) if change else changed
        try:
            return train(now), now, changed
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or processes.count() > 1:  # others train the same plan and would not climb down
                raise
            log.warning("out of memory%s", f" even with {change}" if change else "")
        _give_back()
    raise HardwareError("out of memory even with the smallest plan; free memory, or take a smaller base")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's is a class, a CPU's a RuntimeError of torch's allocator."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory"))


def _give_back() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:  # from now on freed tensors go back to the system: two thirds of the memory, 1.7 times the time
        return_freed_blocks()
