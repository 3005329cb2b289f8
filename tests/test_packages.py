"""Wheel and source archive: built, installed in a clean environment, and used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from helpers import ROOT, write_models

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text")


def run(*command: object, folder: Path) -> str:
    """What a command prints, run in a folder where this repository is out of sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(folder: Path, kind: str) -> Path:
    """A wheel or source archive made of a folder of sources."""
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')"
    run(sys.executable, "-c", code, folder=folder)
    (found,) = (folder / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "minipact", folder / "minipact", ignore=skipped)
    return built(folder, "sdist")


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source archive, which must therefore be whole."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return built(inner, "wheel")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it needs is taken from the present environment."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = Path(sysconfig.get_path("scripts", vars={"base": str(folder)})) / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=folder)
    return python


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_of_the_book(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    source = {f"minipact/{path.name}" for path in (ROOT / "minipact").iterdir() if path.is_file()}
    assert {name for name in names if name.startswith("minipact/")} == source
    others = {name.partition("/")[0] for name in names} - {"minipact"}
    assert len(others) == 1
    assert others.pop().endswith(".dist-info")
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_it_needs_no_package_of_the_book(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("/METADATA")]
        lines = opened.read(name).decode().splitlines()
    needed = [x for x in lines if x.startswith("Requires-Dist") and "extra ==" not in x]
    assert {x.split()[1].partition(">")[0] for x in needed} == {
        "torch", "safetensors", "filelock", "numpy", "tqdm", "pyyaml", "jinja2",
    }  # fmt: skip


@pytest.mark.slow
def test_it_merges_where_there_is_no_repository(python: Path, tmp_path: Path):
    command = python.with_name("minipact")
    where = run(python, "-c", "import minipact; print(minipact.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert run(command, "--version", folder=tmp_path).split()
    models = write_models(tmp_path)
    run(command, "merge", *models, "-o", tmp_path / "out.safetensors", folder=tmp_path)
    with safe_open(tmp_path / "out.safetensors", "pt") as merged:
        assert len(merged.keys()) == 4
    run(command, "xray", *models, "-o", tmp_path / "report.html", folder=tmp_path)
