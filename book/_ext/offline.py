"""The built pages ask nothing of the network: MathJax comes from an installed package, Thebe stays out."""

from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

# The renderer in one file, and what it may fetch later: extensions, fonts, the explorer for screen readers.
SCRIPT = "tex-chtml.js"
FOLDERS = ["input/tex/extensions", "output", "a11y", "sre"]


def copy_mathjax(app: Sphinx, failure: Exception | None) -> None:
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    if failure is None and not (target / SCRIPT).exists():
        copy_asset(source / SCRIPT, target)
        for folder in FOLDERS:
            copy_asset(source / folder, target / folder)


def drop_thebe(app: Sphinx) -> None:
    """No cell runs in the page, and Thebe's script comes from a server far away, and is declared twice."""
    for listeners in app.events.listeners.values():
        listeners[:] = [x for x in listeners if x.handler.__module__ != "sphinx_thebe"]
    styles = app.registry.css_files
    styles[:] = [x for x in styles if x[0] != "sphinx-thebe.css"]


def setup(app: Sphinx) -> dict[str, bool]:
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("build-finished", copy_mathjax)
    drop_thebe(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
