"""Notebooks say which code made their outputs; one whose code has changed since is stale."""

from pathlib import Path

import nbformat
import pytest

import stamps
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_and_outputs_agree(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert not stamps.is_stale(notebook), "the code is not the code that ran: make notebooks"
    assert {"executed", "python", "torch", "numpy"} <= notebook.metadata["minipact"].keys()


def small() -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("print(1)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["minipact"] = stamps.stamp(notebook)
    return notebook


def test_only_code_makes_a_notebook_stale():
    notebook = small()
    notebook.cells[0].source = "# Another title"
    notebook.cells.append(nbformat.v4.new_markdown_cell("more"))
    assert not stamps.is_stale(notebook)
    notebook.cells[1].source = "print(2)"
    assert stamps.is_stale(notebook)


def test_the_first_cell_may_change():
    notebook = small()
    notebook.cells.insert(1, nbformat.v4.new_code_cell("import os", id=stamps.FIRST_CELL))
    assert not stamps.is_stale(notebook)
    notebook.cells.insert(1, nbformat.v4.new_code_cell("import os"))
    assert stamps.is_stale(notebook)


def test_an_unknown_run_counts_as_stale():
    notebook = small()
    del notebook.metadata["minipact"]
    assert stamps.is_stale(notebook)
