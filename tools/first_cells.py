"""Write the first cell of code of notebooks: on Colab it fetches the book, elsewhere it does nothing.

python tools/first_cells.py book/*.ipynb

The address is that of pyproject.toml; without one the cell says what is missing. All else stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]

import address  # noqa: E402  lies in book/_ext
from stamps import FIRST_CELL  # noqa: E402

FETCHES = """\
# On Colab this fetches the book and what it needs; elsewhere it does nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lab.py"):
    if not os.path.exists("minipact"):
        clone = "git clone --quiet --depth 1 {repository} minipact"
        subprocess.run(clone.split(), check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-e"]
    subprocess.run([*install, "./minipact[colab]"], check=True)
    os.chdir("minipact/book")
    sys.path.insert(0, os.getcwd())"""
ASKS = """\
# This notebook needs the repository that it came in; inside it this does nothing.
import os

if not os.path.exists("lab.py"):
    raise FileNotFoundError(
        "Copy the whole repository here, not this notebook alone. Then run "
        "%pip install -e '.[colab]' in its folder, and %cd book."
    )"""


def source(where: address.Address | None) -> str:
    """Code of the first cell, with the project's address or without one."""
    return FETCHES.format(repository=where.repository) if where else ASKS


def update(notebook: nbformat.NotebookNode, where: address.Address | None) -> None:
    """Give a notebook its first cell; outputs stay, and numbers of executed cells make room."""
    for cell in notebook.cells:
        if cell.get("id") == FIRST_CELL:
            cell.source = source(where)
            return
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count:
            later(cell)
    first = nbformat.v4.new_code_cell(source(where), id=FIRST_CELL, execution_count=1)
    first.metadata["tags"] = ["remove-cell"]  # of no use in a page
    place = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(place, first)


def later(cell: nbformat.NotebookNode) -> None:
    """Count a cell as executed one place later."""
    cell.execution_count += 1
    for output in cell.outputs:
        if output.get("execution_count"):
            output.execution_count += 1


def main(names: list[str]) -> None:
    where = address.read()
    for path in map(Path, names):
        before = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=4)
        update(notebook, where)
        after = nbformat.writes(notebook) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
