"""Several tensors of a merge at once, on the threads of one process."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from minipact.merging import Step

Mapper = Callable[[Callable[[Step], Any], Iterable[Step]], Iterator[Any]]


def threads(workers: int, room: float = math.inf) -> Mapper:
    """`map` for `Plan.deltas(mapper=...)` and `Plan.merged`, on several threads with one core each.

    Small factorisations gain nothing from several cores, so every tensor has one; results come in order
    and do not depend on the number of threads.

    Args:
        workers: number of threads.
        room: entries that the tensors in work may have together; a larger one is worked on alone.
    """

    def mapper(work: Callable[[Step], Any], steps: Iterable[Step]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        running: deque[tuple[int, Future[Any]]] = deque()
        try:
            for step in steps:
                size = math.prod(step.shape)
                # Results wait for their turn; with fewer of them small tensors would leave threads idle.
                full = len(running) == 4 * workers
                while running and (full or size + sum(n for n, _ in running) > room):
                    yield running.popleft()[1].result()
                    full = False
                running.append((size, pool.submit(work, step)))
            while running:
                yield running.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun

    return mapper
