"""What torchrun tells a process of itself, read from the environment: nothing here waits for torch."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return told("RANK") if size() > 1 else 0


def size() -> int:
    """Number of processes."""
    launched = all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return max(1, told("WORLD_SIZE")) if launched else 1


def told(variable: str) -> int:
    """A number in the environment, 0 where it is none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
