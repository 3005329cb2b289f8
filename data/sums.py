"""Checksums of the folders of weights in data/."""

from __future__ import annotations

import hashlib
from pathlib import Path


class DataError(ValueError):
    """A file of data/, or a package that data/ reads, is missing, damaged or of another version."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return sha256_of(path.read_bytes())


def sha256_of(content: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def verify(folder: Path, remedy: str) -> None:
    """Raise DataError, with the remedy, unless all files of SHA256SUMS are there and whole."""
    sums = Path(folder, "SHA256SUMS")
    if not sums.is_file():
        raise DataError(f"{sums} is missing: {remedy}")
    for line in sums.read_text().splitlines():
        digest, name = line.split("  ")
        path = Path(folder, name)
        if not path.is_file():
            raise DataError(f"{path} is missing: {remedy}")
        if sha256(path) != digest:
            raise DataError(f"{path} is damaged (its SHA-256 differs): {remedy}")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS for all other files of the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    Path(folder, "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.name}\n" for p in files))
