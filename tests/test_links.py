"""Addresses on the web: found in texts and bibliography, and asked for by those who are online."""

import json
import re
import urllib.error
from pathlib import Path

import pytest

import links
from helpers import ROOT


def test_addresses_end_where_the_sentence_goes_on():
    text = "See [it](https://a.example/b), `https://c.example/d`, <https://e.example>, or https://f.example/g."
    assert links.addresses(text) == {
        "https://a.example/b", "https://c.example/d", "https://e.example", "https://f.example/g",
    }  # fmt: skip


def test_numbers_of_the_bibliography_are_addresses():
    found = links.addresses("eprint = {2212.04089},\n  doi = {10.1137/090771806}\n")
    assert found == {"https://arxiv.org/abs/2212.04089", "https://doi.org/10.1137/090771806"}


def test_outputs_of_notebooks_do_not_count(tmp_path: Path):
    cell = {"source": ["see https://a.example\n"], "outputs": ["https://b.example"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    text = links.text_of(tmp_path / "a.ipynb")
    assert links.addresses(text) == {"https://a.example"}


def test_every_entry_of_the_bibliography_leads_somewhere():
    entries = re.split(r"\n(?=@)", (ROOT / "references.bib").read_text().strip())
    assert len(entries) > 30
    for entry in entries:
        assert re.search(r"\b(?:eprint|doi|url|isbn) = \{", entry), entry.splitlines()[0]
        assert "note = {arXiv" not in entry, "as eprint it is a link"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (urllib.error.HTTPError("", 404, "", None, None), "answer 404"),
        (urllib.error.HTTPError("", 403, "", None, None), ""),
        (urllib.error.URLError("no route"), "no route"),
        (TimeoutError("slow"), "slow"),
    ],
)
def test_what_counts_as_a_fault(answer: OSError, said: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise answer

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert links.fault("https://a.example") == said


def test_it_fails_only_if_asked_to_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(links, "named", lambda: {"https://a.example": ["README.md"]})
    monkeypatch.setattr(links, "fault", lambda address: "answer 404")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("sys.argv", ["links.py"])
    assert links.main() == 0
    monkeypatch.setattr("sys.argv", ["links.py", "--check"])
    assert links.main() == 1
    assert "FAULT: answer 404" in capsys.readouterr().out
