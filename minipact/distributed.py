"""Several processes on one merge, by torch.distributed: `torchrun --nproc-per-node N -m minipact merge ...`.

Each process takes a share of the tensors and writes them into their places in the output's files, so the
files do not depend on the number of processes. They share a file system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from minipact.launched import rank as rank
from minipact.launched import size as size
from minipact.launched import told


class PeerError(OSError):
    """Another process of the same run is gone."""


def has_joined() -> bool:
    """Whether this process works together with others already."""
    return dist.is_available() and dist.is_initialized()


def local_device() -> str:
    """The GPU of this process, spread over those of the machine."""
    return f"cuda:{told('LOCAL_RANK') % torch.cuda.device_count()}"


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, if it did; leave them only when all went well."""
    if size() == 1:
        yield
        return
    with _peers():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # A peer's end closes its connection at once; the timeout only bounds how far shares may differ.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: connection closed by peer, timeout
        raise PeerError(
            "another process of this run has ended early; its own message tells why"
        ) from error


def from_first(value: Any) -> Any:
    """The first process's value, in all; waits for it."""
    values = [value]
    if size() > 1:
        with _peers():
            dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """Every process' value, by rank, in all; waits for all."""
    values = [value]
    if size() > 1:
        values = [None] * size()
        with _peers():
            dist.all_gather_object(values, value)
    return values


def share(costs: Mapping[str, float]) -> set[str]:
    """Names of this process' tensors: the dearest first, each to the process with the least to do."""
    loads = [0.0] * size()
    mine = set()
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        if least == rank():
            mine.add(name)
    return mine
