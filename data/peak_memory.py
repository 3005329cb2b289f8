"""Memory that a piece of work takes, as Linux tells."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def status(name: str) -> int:
    """A size in kilobytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(work: Callable[[], object]) -> float:
    """Megabytes that work takes at its peak, beyond what the process has before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024
