"""Rows of the fair table in files: a JSON object a line, packed by gzip to a quarter.

rows = read(Path("data/fair/zoo0.jsonl.gz"))
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "fair"


def path_of(model: str, folder: Path = FOLDER) -> Path:
    """Where the rows of a model lie."""
    return folder / f"{model}.jsonl.gz"


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; none if there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file in one step, so that an interruption leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    part.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(part, path)
