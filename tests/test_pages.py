"""What pages are given beside their text: links to terms and code, heads, addresses, files of the site."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from docutils import nodes

import colophon
import page_heads
import site_files
import term_links
from helpers import ROOT

# ---- Links to terms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("task vector", "Two task vectors differ.", "task vectors"),
        ("task vector", "Task vector first.", "Task vector"),
        ("PACT", "an impact of PACT, not of pact", "PACT"),
        ("TIES", "it ties", None),
        ("Iso-C", "Iso-CTS alone", None),
        ("shield", "unshielded", None),
        ("core", "the core of it", None),
        ("rule", "as a rule", None),
    ],
)
def test_a_term_is_found_as_a_word_of_its_own(term: str, text: str, found: str | None):
    match = term_links.mention(nodes.Text(text), term)
    assert (match and match.group()) == found


def test_an_everyday_word_is_a_term_where_it_is_emphasised():
    paragraph = nodes.paragraph("", "", nodes.strong("", "core"), nodes.strong("", "Claim."))
    core, claim = (strong[0] for strong in paragraph)
    assert term_links.mention(core, "core")
    assert term_links.mention(claim, "claim") is None


def test_a_link_takes_the_words_and_leaves_the_rest():
    paragraph = nodes.paragraph("", "A task vector is.")
    text, link = paragraph[0], nodes.reference(refuri="glossary.html#term")
    term_links.split(text, term_links.mention(text, "task vector"), link)
    assert [part.astext() for part in paragraph] == ["A ", "task vector", " is."]
    assert paragraph[1] is link


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("mp.pact", "pact"),
        ("minipact.Merged.at", "Merged.at"),
        ("mp.merge(base, tasks)", "merge"),
        ("pact", None),
        ("import minipact as mp", None),
        ("comp.pact", None),
    ],
)
def test_code_that_names_something_of_the_package(code: str, name: str | None):
    found = term_links.CODE.fullmatch(code)
    assert (found and found[1]) == name


def test_everyday_words_are_terms_of_the_glossary():
    glossary = (ROOT / "book" / "glossary.md").read_text().splitlines()
    assert set(glossary) >= term_links.EVERYDAY


# ---- Heads and files -----------------------------------------------------------------------------


def page(*paragraphs: str) -> nodes.section:
    return nodes.section("", *(nodes.paragraph("", text) for text in paragraphs))


def test_descriptions_end_with_a_sentence_or_a_word():
    assert page_heads.description(page("Claim. It works.", "More.")) == "It works."
    sentences = "It works well. " * 20
    assert page_heads.description(page(sentences)).endswith("well.")
    words = "without any end " * 20
    found = page_heads.description(page(words))
    assert found.endswith(("without…", "any…", "end…"))
    assert len(found) <= page_heads.LENGTH


def test_boxes_do_not_describe_a_page():
    box = nodes.note("", nodes.paragraph("", "You need matrices."))
    section = page("What it is about.")
    section.insert(0, box)
    assert page_heads.description(section) == "What it is about."


def test_values_of_tags_are_escaped():
    assert 'content="&lt;a&gt; &quot;b&quot;"' in page_heads.tags({"og:title": '<a> "b"'})


def test_links_of_the_lost_page_work_from_any_depth():
    html = '<a href="book/a.html"><img src="./_static/b.png"><a href="#c"><a href="https://d">'
    html += '<html data-content_root="./"><a href="/e"><script src="//f">'
    assert site_files.rooted(html, "https://someone.example/minipact/") == (
        '<a href="/minipact/book/a.html"><img src="/minipact/_static/b.png"><a href="#c"><a href="https://d">'
        '<html data-content_root="/minipact/"><a href="/e"><script src="//f">'
    )


def test_the_colophon_tells_when_a_chapter_ran(tmp_path: Path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 1 Sums\n\nText")])
    nbformat.write(notebook, tmp_path / "01_sums.ipynb")
    notebook.metadata["minipact"] = dict(zip(colophon.COLUMNS, "abcd", strict=True))
    nbformat.write(notebook, tmp_path / "02_sums.ipynb")
    first, second = colophon.runs(sorted(tmp_path.iterdir()))
    assert first == [":doc:`1 Sums <01_sums>`", *["not noted"] * 4]
    assert second[1:] == ["a", "b", "c", "d"]


# ---- Two small builds ----------------------------------------------------------------------------

TOC = """
format: jb-book
root: book/intro
chapters:
- file: book/12_least_squares
- file: book/glossary
- file: book/reference
- file: book/bibliography
- file: book/colophon
"""
URLS = """
[project.urls]
Repository = "https://github.com/someone/fork"
Documentation = "https://someone.github.io/fork"
"""
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from jupyter_book.cli.main import main
main(["build", ".", "-n"])
"""


def build(folder: Path, urls: str) -> Path:
    """The pages of some chapters, built in a place where torch cannot be imported."""
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / name, folder)
    for name in ("book", "minipact"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "_toc.yml").write_text(TOC)
    own = (ROOT / "pyproject.toml").read_text()
    without = re.sub(r"^\[project\.urls\]\n(?:.+\n)*", "", own, flags=re.M)
    (folder / "pyproject.toml").write_text(without + urls)
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_build" / "html"


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def meta(page: BeautifulSoup) -> dict[str, str]:
    tags = page.select("meta[property], meta[name]")
    return {tag.get("property") or tag["name"]: tag["content"] for tag in tags}


@pytest.fixture(scope="module")
def unset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unset"), "")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("set"), URLS)


@pytest.mark.slow
def test_without_an_address_pages_claim_none(unset: Path):
    for path in unset.rglob("*.html"):
        assert not re.search(r"github\.com/|colab\.research|mybinder\.org", path.read_text()), path
        assert not soup(path).select("link[rel=canonical]")
    assert not (unset / "sitemap.xml").exists()
    tags = meta(soup(unset / "book" / "12_least_squares.html"))
    assert tags["og:title"] == "Who supplies the covariance?"
    assert tags["description"] == tags["og:description"] != ""
    assert not {"og:url", "og:image"} & tags.keys()


@pytest.mark.slow
def test_with_an_address_pages_have_buttons_and_tell_where_they_are(published: Path):
    page = soup(published / "book" / "12_least_squares.html")
    links = {link["href"].partition("?")[0] for link in page.select("a[href^=https]")}
    own = "https://github.com/someone/fork"
    assert {own, f"{own}/issues/new"} <= links
    colab = "https://colab.research.google.com/github/someone/fork/blob/main/book"
    assert f"{colab}/12_least_squares.ipynb" in links
    assert "https://mybinder.org/v2/gh/someone/fork/main" in links
    where = "https://someone.github.io/fork/book/12_least_squares.html"
    assert page.select_one("link[rel=canonical]")["href"] == where
    tags = meta(page)
    assert tags["og:url"] == where
    picture = tags["og:image"].removeprefix("https://someone.github.io/fork/")
    assert (published / picture).is_file()
    assert f"<loc>{where}</loc>" in (published / "sitemap.xml").read_text()


@pytest.mark.slow
def test_the_front_door_leads_in_and_says_what_it_is(published: Path):
    front = soup(published / "index.html")
    assert front.select_one("meta[http-equiv=refresh]")["content"].endswith("url=book/intro.html")
    tags = meta(front)
    assert tags["og:image"] == "https://someone.github.io/fork/_static/result.png"
    assert (published / "_static" / "result.png").is_file()
    assert tags["og:title"].startswith("minipact")


@pytest.mark.slow
def test_the_page_for_lost_readers_works_below_any_address(published: Path, unset: Path):
    for site, root in ((published, "/fork/"), (unset, "")):
        page = soup(site / "404.html")
        assert page.select_one("link[rel=canonical]") is None
        found = [tag.get("href") or tag.get("src") for tag in page.select("[href], [src]")]
        own = [x for x in found if not re.match(r"\w+:|#", x)]
        assert len(own) > 10
        for link in own:
            assert link.startswith(root), link
            file = re.split(r"[?#]", link.removeprefix(root))[0]
            assert (site / file).exists(), link


@pytest.mark.slow
def test_chapters_link_to_terms_and_code(unset: Path):
    page = soup(unset / "book" / "12_least_squares.html")
    links = [link["href"] for link in page.select("a.glossary-term")]
    assert "glossary.html#term-PACT" in links
    assert len(links) == len(set(links)), "only a first mention is a link"
    glossary = soup(unset / "book" / "glossary.html")
    assert all(glossary.find(id=link.partition("#")[2]) for link in links)
    reference = soup(unset / "book" / "reference.html")
    own = [link["href"] for link in reference.select("a.code-name")]
    assert own
    assert all(reference.find(id=link.partition("#")[2]) for link in own)


@pytest.mark.slow
def test_the_bibliography_leads_to_the_papers(unset: Path):
    entries = soup(unset / "book" / "bibliography.html").select("div.citation")
    linked = [entry for entry in entries if entry.select_one("a[href^=https]")]
    assert len(linked) >= len(entries) - 3  # books have an ISBN
