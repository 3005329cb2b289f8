"""First cells of notebooks: kept apart from all else, and able to fetch the book where there is none.

A repository on this machine stands in for the public one, an empty module google.colab for Colab. By default
one whole chapter runs; MINIPACT_COLAB=all (make colab-check) runs every one.
"""

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

import first_cells
from address import Address
from helpers import ROOT
from stamps import FIRST_CELL, code_hash

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SHORT = "12_least_squares"
WHOLE = [
    path for path in NOTEBOOKS if os.environ.get("MINIPACT_COLAB") == "all" or path.stem == SHORT
]
HERE = Address("https://example.org/someone/minipact")


# ---- The text of the cell ------------------------------------------------------------------------


def executed() -> nbformat.NotebookNode:
    result = nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=1)
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1")]
    cells[1].update(execution_count=1, outputs=[result])
    return nbformat.v4.new_notebook(cells=cells)


def test_it_stands_before_all_code_and_leaves_outputs():
    before = executed()
    notebook = copy.deepcopy(before)
    first_cells.update(notebook, HERE)
    title, first, code = notebook.cells
    assert (title.source, first.id, first.metadata.tags) == ("# Title", FIRST_CELL, ["remove-cell"])
    assert (first.execution_count, code.execution_count) == (1, 2)
    assert code.outputs[0].execution_count == 2
    assert code.outputs[0].data == before.cells[1].outputs[0].data
    assert code_hash(notebook) == code_hash(before)
    nbformat.validate(notebook)


def test_it_is_written_once_and_follows_the_address():
    notebook = executed()
    first_cells.update(notebook, None)
    once = copy.deepcopy(notebook)
    first_cells.update(notebook, None)
    assert notebook == once
    first_cells.update(notebook, HERE)
    assert len(notebook.cells) == 3
    assert " https://example.org/someone/minipact " in notebook.cells[1].source
    once.cells[1].source = notebook.cells[1].source
    assert notebook == once


def test_a_file_without_change_is_not_touched(tmp_path: Path):
    path = tmp_path / "a.ipynb"
    shutil.copy(NOTEBOOKS[0], path)
    first_cells.main([str(path)])
    text, time = path.read_text(), path.stat().st_mtime_ns
    first_cells.main([str(path)])
    assert (path.read_text(), path.stat().st_mtime_ns) == (text, time)


@pytest.mark.parametrize("where", [None, HERE])
def test_inside_the_book_it_does_nothing(where: Address | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT / "book")
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran a program"))
    exec(first_cells.source(where), {})
    assert Path.cwd() == ROOT / "book"


def test_a_notebook_alone_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Copy the whole repository here"):
        exec(first_cells.source(None), {})


# ---- From an empty folder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Address:
    """A repository with the files as they are now, not as they were committed."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    folder = tmp_path_factory.mktemp("remote")
    for name in done.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    commit = [*who, "commit", "--quiet", "--message=all"]
    for command in (["init", "--quiet"], ["add", "--all"], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return Address(folder.as_uri())


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees the packages of this one, takes installations, and has google.colab imported."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "google" / "colab").mkdir(parents=True)
    (own / "google" / "colab" / "__init__.py").touch()
    lines = [sysconfig.get_path("purelib"), "import google.colab"]
    (own / "colab.pth").write_text("\n".join(lines) + "\n")
    return Path(sysconfig.get_path("scripts", vars={"base": str(folder)})) / "python"


def run(python: Path, source: str, folder: Path) -> str:
    """Run code in a folder as Colab would, without the network; returns what it prints."""
    (folder / "cells.py").write_text(source)
    settings = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "MPLBACKEND": "agg",
    }  # 0 means no
    command = [str(python), "-c", "exec(open('cells.py').read())"]
    environment = {**os.environ, **settings}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_of(path: Path, where: Address) -> list[str]:
    """Code of a notebook's cells, the first of them with an address."""
    notebook = nbformat.read(path, as_version=4)
    first_cells.update(notebook, where)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_first_cells_fetch_the_book_into_an_empty_folder(
    remote: Address, colab: Path, tmp_path: Path
):
    codes = [code_of(path, remote) for path in NOTEBOOKS]
    (first,) = {code[0] for code in codes}
    where = "import lab, minipact\nprint(minipact.__file__, os.getcwd(), sep='\\n')"
    seconds = [f"exec({code[1]!r}, {{}})" for code in codes]  # what a chapter imports and loads
    package, cwd = run(colab, "\n".join([first, *seconds, where]), tmp_path).splitlines()[-2:]
    assert Path(cwd) == tmp_path / "minipact" / "book"
    assert Path(package).is_relative_to(tmp_path)
    run(colab, f"{first}\nimport lab", tmp_path)  # after a restart the clone is there


@pytest.mark.slow
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_whole_chapter_runs_from_an_empty_folder(
    path: Path, remote: Address, colab: Path, tmp_path: Path
):
    run(colab, "\n\n".join(code_of(path, remote)), tmp_path)
