"""The errors of minipact, and how their messages name things."""

from __future__ import annotations

from collections.abc import Iterable


class MergeError(ValueError):
    """Input or option that cannot be merged; the message names the tensor or option and the remedy."""


class CheckpointError(ValueError):
    """A file that cannot be read or written as asked; the message names it and the remedy."""


def listing(names: Iterable[object]) -> str:
    """Names in quotes, for a message: eight of them at most, then how many more."""
    texts = [f"'{name}'" for name in names]
    shown = ", ".join(texts[:8])
    return shown if len(texts) <= 8 else f"{shown} and {len(texts) - 8} more"


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise MergeError if a given name is not among the known ones; the message lists those."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise MergeError(f"{what} {listing(unknown)} is unknown: use {listing(known) or 'none'}")
