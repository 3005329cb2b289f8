"""The project's files agree with each other."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml

import minipact
from minipact import diagnostics, merging, parallel, statistics, task_vectors

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines() if done.returncode == 0 else []
    return [path for name in names if (path := ROOT / name).is_file()]


def test_environment_installs_the_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[0])[1].split(",")
    assert set(extras) == {"book", "test"} <= set(EXTRAS)
    assert "python=3.11" in environment["dependencies"]


def test_pins():
    pins = dict(entry.split("==") for entry in EXTRAS["book"])
    assert pins["jupyter-book"].startswith("1."), "2.x ignores _config.yml and builds nothing"
    assert {"torch", "torchvision", "open_clip_torch", "numpy", "pillow"} <= set(pins)
    assert not any("==" in entry for entry in PROJECT["dependencies"]), "Colab keeps its own torch"


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == minipact.__version__
    assert f"## {minipact.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_readme_commands_and_code():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("book", "test"):
        assert f"make {command}" in readme
        assert re.search(rf"^{command}:", makefile, re.M)
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert snippets
    for snippet in snippets:
        ast.parse(snippet)
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_readme_tells_the_recorded_times():
    recorded = json.loads((ROOT / "benchmarks/results/full_scale_x86_64_2cores.json").read_text())
    tower = recorded["whole"]["jobs"]["PACT + TSV-M exact"]["median"]
    large = recorded["llm"]["jobs"]["task arithmetic"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"by TSV-M behind PACT in {tower:.0f} s" in readme
    assert f"in {large['seconds']:.0f} s and {large['anonymous_mb'] / 1000:.1f} GB" in readme


def test_public_address_stands_in_one_place():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    name = address.removeprefix("https://")
    texts = [
        p for p in tracked() if p.suffix in {".md", ".py", ".toml", ".yml", ".cff", ".ipynb", ""}
    ]
    holders = {p.name for p in texts if name in p.read_text(errors="ignore")}
    assert holders <= {"_config.yml"}


def test_public_names_are_exported_and_documented():
    public = {name for name in minipact.__all__ if not name.startswith("_")}
    reference = (ROOT / "book" / "reference.md").read_text()
    for name in public:
        assert re.search(rf"\b{name}\b", reference), name
        thing = getattr(minipact, name)
        if callable(thing):
            assert thing.__doc__, name
    defined = {
        node.name
        for module in (merging, task_vectors, diagnostics, statistics, parallel)
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined | {"METHODS"} == public


def test_the_module_can_be_read_in_one_sitting():
    assert len(Path(merging.__file__).read_text().splitlines()) <= 900


def test_module_imports_torch_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(merging.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_readme_table_agrees_with_the_leaderboard():
    rows = list(csv.DictReader((ROOT / "data" / "leaderboard.csv").read_text().splitlines()))
    text = (ROOT / "README.md").read_text()
    names = {"task arithmetic": "task_arithmetic", "TIES": "ties", "TSV-M": "tsv_m"}
    names |= {"Iso-C": "iso_c", "Iso-CTS": "iso_cts"}
    columns = [("", "{}"), ("sift", "{}"), ("pact", "{}"), ("pact", '{"pact": {"task": 1}}')]
    for label, rule in names.items():
        cells = re.search(rf"^\| {label} \| (.*) \|$", text, re.M)[1].split(" | ")
        for cell, (purify, options) in zip(cells, columns, strict=True):
            key = {"purify": purify, "options": options, "rule": rule, "vectors": "rule"}
            found = [100 * float(r["test"]) for r in rows if key.items() <= r.items()]
            mean, deviation = (f(found) if len(found) == 3 else None for f in (fmean, stdev))
            assert cell == ("not run" if mean is None else f"{mean:.1f} ± {deviation:.1f}"), label
