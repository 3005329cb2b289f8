"""What a notebook says of its last execution: the code that ran, the day, and the versions.

python tools/stamps.py book/*.ipynb          list the notebooks whose code is no longer the code that ran
python tools/stamps.py --now book/*.ipynb    say that they were executed just now; only after nbval has passed
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import nbformat

FIRST_CELL = "get-the-book"  # id of the cell that tools/first_cells.py writes; it changes no result
PACKAGES = ("torch", "numpy")


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all cells of code but the first, which holds the project's address."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.get("id") != FIRST_CELL]
    return hashlib.sha256("\0".join(cell.source for cell in cells).encode()).hexdigest()


def stamp(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The entry of the metadata for a notebook that has just been executed."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {name: version(name).partition("+")[0] for name in PACKAGES}
    python = platform.python_version()
    return {"code": code_hash(notebook), "executed": today, "python": python, **versions}


def is_stale(notebook: nbformat.NotebookNode) -> bool:
    """Whether the code has changed since it was executed, or nothing is known about that."""
    return notebook.metadata.get("minipact", {}).get("code") != code_hash(notebook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--now", action="store_true", help="stamp in place of listing")
    parser.add_argument("notebooks", nargs="+", type=Path)
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        notebook = nbformat.read(path, as_version=4)
        if arguments.now:
            notebook.metadata["minipact"] = stamp(notebook)
            nbformat.write(notebook, path)
        elif is_stale(notebook):
            print(path)


if __name__ == "__main__":
    main()
