"""The workflow files of the forge: they parse, and what they name is there."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import ROOT
from test_project import EXTRAS, PROJECT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
SYSTEMS = {"ubuntu-latest", "macos-latest", "windows-latest"}


def steps() -> Iterator[dict]:
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            yield from job["steps"]


def commands() -> list[str]:
    return [step["run"].partition("  #")[0] for step in steps() if "run" in step]


def test_there_is_one_for_each_purpose():
    assert set(WORKFLOWS) == {"tests", "book", "weekly", "release"}
    for name, workflow in WORKFLOWS.items():
        assert workflow["name"] == name
        assert workflow[True], "when it runs; YAML reads the word on as true"
        assert workflow["permissions"] == {"contents": "read"}, "no more than a job needs"


def test_jobs_name_each_other_and_have_an_end():
    for workflow in WORKFLOWS.values():
        jobs = workflow["jobs"]
        for job in jobs.values():
            assert job.get("needs", next(iter(jobs))) in jobs
            assert {job["runs-on"]} <= SYSTEMS | {"${{ matrix.os }}"}
            assert "timeout-minutes" in job or "needs" in job


def test_steps_are_actions_with_a_version_or_commands():
    for step in steps():
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"]), step["uses"]


def test_commands_name_targets_files_and_extras_that_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.M), target
        for file in re.findall(r"\b(?:tools|tests)/[\w.]+", command):
            assert (ROOT / file).is_file(), file
        for extras in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= set(EXTRAS)


def test_pythons_are_those_that_the_package_claims():
    matrix = WORKFLOWS["tests"]["jobs"]["unit"]["strategy"]["matrix"]
    claimed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3" in c]
    assert matrix["python"] == claimed == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    assert set(matrix["os"]) == SYSTEMS
    ruff = (ROOT / "pyproject.toml").read_text()
    assert f'target-version = "py{claimed[0].replace(".", "")}"' in ruff


def test_the_unit_tests_run_without_make():
    job = WORKFLOWS["tests"]["jobs"]["unit"]
    assert not [step for step in job["steps"] if "make" in step.get("run", "").split()]


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_the_oldest_versions_tried_are_those_allowed(name: str):
    (install,) = [c for c in commands() if f'"{name}==' in c]
    allowed = next(d for d in PROJECT["dependencies"] if d.startswith(name))
    assert re.search(rf'"{name}==([\d.]+)\.\*"', install)[1] == allowed.partition(">=")[2]


def test_a_release_needs_one_name_everywhere(tmp_path: Path):
    faults = runpy.run_path(str(ROOT / "tools" / "release.py"))["faults"]
    (tmp_path / "minipact").mkdir()
    (tmp_path / "minipact" / "version.py").write_text('__version__ = "1.2.0"\n')
    changelog, citation = tmp_path / "CHANGELOG.md", tmp_path / "CITATION.cff"
    changelog.write_text("## Unreleased\n\n## 1.2.0 - 2026-01-02\n")
    citation.write_text('version: 1.2.0\ndate-released: "2026-01-02"\n')
    assert faults("v1.2.0", tmp_path) == []
    assert len(faults("v1.3.0", tmp_path)) == 3
    citation.write_text('version: 1.2.0\ndate-released: "2026-01-03"\n')
    changelog.write_text("## Unreleased\n\n### Added\n\n## 1.2.0 - 2026-01-02\n")
    assert len(faults("v1.2.0", tmp_path)) == 2
