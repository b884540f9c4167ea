"""The most memory a process held, and running out of it: told from other errors, and said with what to change."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

# torch has a class for GPUs only; the allocator of the CPU says it in words.
_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


class OutOfMemoryError(RuntimeError):
    """Memory does not suffice; one line says for what, and what to change."""


@contextlib.contextmanager
def memory_named(explain: Callable[[], str]) -> Iterator[None]:
    """Say what ran out of memory, and what to change.

    Args:
        explain: One line, made only if it is needed. accelerate's `auto_find_batch_size` knows it by the words " out of memory."

    Raises:
        OutOfMemoryError: Memory ran out.

    Example:
        >>> with memory_named(lambda: "the teacher ran out of memory. Use a smaller batch"):
        ...     torch.empty(2**60)
        Traceback (most recent call last):
        ...
        hfcompress.measurement.memory.OutOfMemoryError: the teacher ran out of memory. Use a smaller batch
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explain()) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _WORDS)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on a GPU what torch took for tensors, else resident memory; 0 where none is told.

    Example:
        >>> peak_memory_bytes(torch.device("cpu")) > 10**7
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
