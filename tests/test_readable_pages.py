"""What the pages get so that all can read them: widths of figures, names for screen readers, formulas."""

import io
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import accessible
import offline
from helpers import ROOT


def png(wide: int, dots: int | None = None) -> bytes:
    packed = io.BytesIO()
    Image.new("P", (wide, 40)).save(packed, "PNG", **({"dpi": (dots, dots)} if dots else {}))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("wide", "noted", "dots"),
    [(960, 200, 200), (640, 200, 200), (960, None, 200), (720, None, 100)],
)
def test_density_is_what_the_file_says_or_what_its_width_tells(wide: int, noted: int, dots: int):
    assert accessible.dots_per_inch(png(wide, noted)) == dots


def test_figures_know_their_width_and_how_small_they_may_get(tmp_path: Path):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images" / "a.png").write_bytes(png(960, 200))
    page = '<img alt="x" src="../_images/a.png" />'
    repaired = accessible.repair(page, tmp_path)
    assert re.fullmatch(r'<span class="picture"><img .*alt="x".*/></span>', repaired)
    assert 'width="480"' in repaired, "4.8 inches at 100 pixels"
    assert "--least: 328px" in repaired, "10 points are 9.5 pixels there"


def test_pages_are_repaired_once(tmp_path: Path):
    page = tmp_path / "a.html"
    page.write_text('<div role="doc-biblioentry"></div>')
    app = SimpleNamespace(outdir=tmp_path, builder=SimpleNamespace(format="html"))
    for _ in range(2):
        accessible.repair_pages(app, None)
        assert page.read_text() == '<div role="listitem"></div>'


def test_formulas_need_no_network():
    package = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    assert all((package / part).exists() for part in (offline.SCRIPT, *offline.FOLDERS))
    config = (ROOT / "_config.yml").read_text()
    assert "offline: book/_ext" in config
    assert "http" not in (ROOT / "book" / "_static" / "book.js").read_text()


def test_only_thebe_is_left_out():
    kept = SimpleNamespace(handler=Path.exists)
    gone = SimpleNamespace(handler=SimpleNamespace(__module__="sphinx_thebe"))
    app = SimpleNamespace(
        events=SimpleNamespace(listeners={"builder-inited": [kept, gone]}),
        registry=SimpleNamespace(css_files=[("book.css", {}), ("sphinx-thebe.css", {})]),
    )
    offline.drop_thebe(app)
    assert app.events.listeners == {"builder-inited": [kept]}
    assert app.registry.css_files == [("book.css", {})]
