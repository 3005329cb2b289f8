"""The project's address: set in one place, read by pages and first cells; while unset, no text claims one."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest

import address
import first_cells
import stamps
from address import Address
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SET = """
[project]
[project.urls]
Repository = "https://github.com/someone/minipact/"
Documentation = "https://someone.github.io/minipact"
"""


def texts() -> list[Path]:
    """Files of the repository that people read."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines() if done.returncode == 0 else []
    kinds = {".md", ".py", ".toml", ".yml", ".cff", ".ipynb", ""}
    return [path for name in names if (path := ROOT / name).is_file() and path.suffix in kinds]


def test_it_is_read_from_the_project_file(tmp_path: Path):
    file = tmp_path / "pyproject.toml"
    file.write_text(SET)
    found = address.read(file)
    assert found == Address(
        "https://github.com/someone/minipact", "https://someone.github.io/minipact/"
    )
    file.write_text(SET.replace("Documentation", "Homepage"))
    assert address.read(file) == Address("https://github.com/someone/minipact", "")
    file.write_text("[project]")
    assert address.read(file) is None


def test_the_theme_gets_buttons_from_it():
    options = address.theme_options(Address("https://github.com/someone/minipact"))
    assert options["repository_url"] == "https://github.com/someone/minipact"
    assert options["use_repository_button"]
    assert {"binderhub_url", "colab_url"} <= options["launch_buttons"].keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cells_hold_the_address_that_is_set(path: Path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert cells[0].get("id") == stamps.FIRST_CELL, "make notebooks"
    assert cells[0].source == first_cells.source(address.read()), "make notebooks"


def test_no_text_claims_another_address():
    own = address.read()
    claim = re.compile(r"(?:github\.com|github\.io|gitlab\.com)/[\w-]*/?minipact\b")
    for path in texts():
        if path.name == Path(__file__).name:
            continue
        for found in claim.findall(path.read_text(errors="ignore")):
            assert own is not None, f"{path.name} claims {found}"
            assert found in own.repository or found in own.pages, path.name
