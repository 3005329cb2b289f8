"""Tables of the colophon: when each chapter last ran, and what builds the pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BUILDERS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "pydata-sphinx-theme")
COLUMNS = ("executed", "python", "torch", "numpy")


def title_of(notebook: dict) -> str:
    """A chapter's title, from the first line of its first cell."""
    return "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")


def runs(chapters: Iterable[Path]) -> list[list[str]]:
    """Chapter, and the day and versions of its last execution, as tools/execute.py noted them."""
    found = []
    for path in chapters:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        noted = notebook["metadata"].get("minipact", {})
        row = [
            noted.get(column, "not noted").replace("-", "\u2011") for column in COLUMNS
        ]  # stays whole
        found.append([f":doc:`{title_of(notebook)} <{path.stem}>`", *row])
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


class Colophon(SphinxDirective):
    """The two tables."""

    def run(self) -> list[nodes.Node]:
        files = [Path(self.env.doc2path(page)) for page in sorted(self.env.found_docs)]
        chapters = [file for file in files if file.suffix == ".ipynb"]
        for path in chapters:
            self.env.note_dependency(str(path))
        lines = table(["chapter", "last run", "Python", "PyTorch", "NumPy"], runs(chapters))
        lines += table(
            ["pages built with", "version"], [[name, version(name)] for name in BUILDERS]
        )
        found = nodes.Element()
        self.state.nested_parse(StringList(lines, source="colophon"), self.content_offset, found)
        return found.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("colophon", Colophon)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
