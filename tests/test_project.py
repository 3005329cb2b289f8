"""The project's files agree with each other."""

import ast
import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import minipact
import minipact.methods
import minipact.plain
from helpers import small_model, tuned
from minipact.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def package(entry: str) -> str:
    """Name of a package in a requirement, as pip compares names."""
    return re.split(r"[=<>~;\[ ]", entry)[0].replace("_", "-").lower()


def pins(entries: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are pinned."""
    return {package(entry): entry.split("==")[1] for entry in entries if "==" in entry}


def test_environment_installs_the_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[0])[1].split(",")
    assert set(extras) == {"book", "docs", "test", "encoder"} <= set(EXTRAS)
    assert f"-e '.[{','.join(extras)}]'" in (ROOT / "Makefile").read_text()
    assert "python=3.11" in environment["dependencies"]


def test_binder_has_what_the_chapters_need():
    environment = yaml.safe_load((ROOT / ".binder" / "environment.yml").read_text())
    names = [entry.replace("pytorch-cpu", "torch") for entry in environment["dependencies"]]
    found = dict(entry.split("=") for entry in names if "=" in entry)
    assert found == pins(EXTRAS["book"]) | {"python": "3.11"}
    assert {package(entry) for entry in PROJECT["dependencies"]} <= {package(x) for x in names}
    assert "pip install --no-deps -e ." in (ROOT / ".binder" / "postBuild").read_text()


def test_pins():
    book, docs = pins(EXTRAS["book"]), pins(EXTRAS["docs"])
    assert docs["jupyter-book"].startswith("1."), "2.x ignores _config.yml and builds nothing"
    assert {"torch", "torchvision", "open-clip-torch", "numpy", "pillow"} <= set(book)
    assert len(docs) == len(EXTRAS["docs"]), "builders are pinned"
    assert "torch" not in docs, "building the pages executes nothing"
    assert not any("==" in entry for entry in PROJECT["dependencies"]), "Colab keeps its own torch"


def test_colab_gets_what_the_chapters_need_but_for_its_own_torch():
    colab = {package(entry) for entry in EXTRAS["colab"]}
    own = {"torch", "torchvision", "ipykernel", *(package(x) for x in PROJECT["dependencies"])}
    assert colab == set(pins(EXTRAS["book"])) - own
    assert not pins(EXTRAS["colab"])


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == minipact.__version__
    assert f"## {minipact.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_readme_commands_and_code():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert re.search(r"^make book .*\nmake test ", readme, re.M)
    for text in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "book/intro.md"):
        for command in re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / text).read_text(), re.M):
            assert re.search(rf"^{command}:", makefile, re.M), command
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_readme_commands_run_on_the_files_of_the_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^minipact (.*)$", readme, re.M)
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, command
    merged, again = (load_file(f"{name}.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(again[name], x) for name, x in merged.items())
    assert Path("report.html").stat().st_size > 1e4


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    shutil.copy(ROOT / "minipact" / "plain.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    merge, copy = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(merge, {})
    assert load_file("merged.safetensors").keys() == load_file("data/zoo/base.safetensors").keys()
    found = {}
    exec(copy, found)
    assert found["plain"].__file__ == str(tmp_path / "plain.py")
    assert found["merged"].shape == found["W0"].shape


@pytest.mark.parametrize("name", ["pact", "result"])
def test_pictures_are_small_and_stand_in_readme_and_introduction(name: str):
    path = ROOT / "book" / "_static" / f"{name}.png"
    assert path.stat().st_size <= 40_000
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert round(picture.info["dpi"][0]) == 200, "twice the dots of a page"
    for text in ("README.md", "book/intro.md"):
        assert f"_static/{name}.png" in (ROOT / text).read_text()


@pytest.mark.slow
def test_pictures_can_be_drawn_again(tmp_path: Path):
    runpy.run_path(str(ROOT / "tools" / "pictures.py"))["main"](tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pact.png", "result.png"}


@pytest.mark.slow
def test_the_demo_merges_the_zoo_and_tells_accuracies(capsys: pytest.CaptureFixture[str]):
    assert runpy.run_path(str(ROOT / "tools" / "demo.py"))["main"]() == 0
    average = re.search(r"^average +([\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    base, own, merged = map(float, average.groups())
    assert base + 15 < merged < own - 10


def test_readme_tells_the_recorded_times():
    recorded = json.loads((ROOT / "benchmarks/results/full_scale_x86_64_2cores.json").read_text())
    tower = recorded["whole"]["jobs"]["PACT + TSV-M exact"]["median"]
    large = recorded["llm"]["jobs"]["task arithmetic"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"by TSV-M behind PACT in {tower:.0f} s" in readme
    assert f"in {large['seconds']:.0f} s and {large['anonymous_mb'] / 1000:.1f} GB" in readme
    took = {name: row["median"] for name, row in recorded["disk"]["jobs"].items()}
    start, sums = (
        took["import torch and minipact"],
        took["minipact"] - took["minipact without checksums"],
    )
    ours = f"minipact takes {took['minipact']:.1f} s, of which {start:.1f} are the start and {sums:.1f}"
    assert ours in readme
    assert (
        f"{took['mergekit']:.1f} s, of which {took['import mergekit']:.1f} are the start" in readme
    )


def test_public_names_are_documented_in_the_reference():
    reference = (ROOT / "book" / "reference.md").read_text()
    for name in minipact.__all__:
        thing = getattr(minipact, name)
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", reference), name
        if callable(thing):
            assert thing.__doc__, name


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((ROOT / "minipact" / "__init__.pyi").read_text())
    told = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"minipact.{room}" for name, room in minipact.HOMES.items()}
    assert told == homes | {"__version__": "minipact.version"}
    assert {*minipact.__all__} == {*told} <= {*dir(minipact)}


def test_names_of_the_first_version_import_or_say_what_to_use():
    first = (
        "METHODS LBWMasks MergeError Method Step TaskVector ablate_subspace axis_profile "
        "benjamini_hochberg cohens_d dare default_policy enrichment fisher hidden_interference "
        "intrusion_energy iso_c iso_cts lbw_basis lbw_mask lbw_similarity merge merged_delta overwrite "
        "pact permutation_test random_subspace shield_basis sift singular_task_interference "
        "task_arithmetic task_vector ties tsv_compress tsv_decompress tsv_m __version__"
    )
    assert all(hasattr(minipact, name) for name in first.split())
    for name in ("plan", "Plan", "merge_iter", "threads"):
        with pytest.raises(AttributeError, match=f"minipact.{name} is gone since 0.2.0: use "):
            getattr(minipact, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minipact.nothing


def test_one_file_to_copy_is_the_same_everywhere():
    texts = ["README.md", "CONTRIBUTING.md", "book/intro.md", "book/reference.md"]
    assert all("minipact/plain.py" in (ROOT / text).read_text() for text in texts)
    assert "Copy this file" in (minipact.plain.__doc__ or "")


def test_the_method_of_a_stranger_in_the_reference_works(monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "book" / "reference.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```", text, re.DOTALL)[1]
    assert sum(bool(line) for line in code.splitlines()) <= 20
    monkeypatch.setattr(minipact.methods, "METHODS", dict(minipact.METHODS))
    base = small_model(0)
    tasks = [small_model(1, base), tuned(base, 2, 0.3)]
    found = {"base": base, "tasks": tasks}
    exec(code, found)
    D = [minipact.task_vector(base, task) for task in tasks]
    mean = sum(d.norm() for d in D) / 2
    equal = [(mean / d.norm()) ** 0.5 * d for d in D]
    expected = (equal[0] + equal[1]).apply_to(base, 0.4)
    assert all(torch.allclose(found["merged"][n], x, atol=1e-5) for n, x in expected.items())
