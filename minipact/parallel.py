"""Several tensors of a merge at once, on the threads of one process."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from minipact.errors import MergeError

Result = TypeVar("Result")


def in_threads(
    work: Callable[[str], Result],
    names: Iterable[str],
    workers: int,
    *,
    size: Callable[[str], int] = lambda _: 1,
    room: float = math.inf,
) -> Iterator[Result]:
    """work(name) for every name, in order, on several threads with one core each.

    Small factorisations gain nothing from several cores, so every tensor has one; results come in order
    and do not depend on the number of threads.

    Args:
        workers: number of threads; each has one core, which torch's operations then keep to.
        size: entries of the tensor of a name.
        room: entries that the tensors in work may have together; a larger one is worked on alone.

    Raises MergeError for less than one worker.
    """
    if workers < 1:
        raise MergeError(f"threads={workers} must be 1 or more")
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    running: deque[tuple[int, Future[Result]]] = deque()
    try:
        for name in names:
            entries = size(name)
            # Results wait for their turn; with fewer of them small tensors would leave threads idle.
            full = len(running) == 4 * workers
            while running and (full or entries + sum(n for n, _ in running) > room):
                yield running.popleft()[1].result()
                full = False
            running.append((entries, pool.submit(work, name)))
        while running:
            yield running.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun
        torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> float:
    """Bytes of the machine's memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf
