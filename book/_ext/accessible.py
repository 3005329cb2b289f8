"""Pages that everybody can read: names for screen readers, and figures whose letters never get too small."""

import re
import struct
from pathlib import Path

from sphinx.application import Sphinx

# What docutils and the theme write, and what a screen reader can use.
REPAIRS = {
    'role="doc-biblioentry"': 'role="listitem"',  # deprecated, and not what a list may hold
    '<div id="pst-primary-sidebar" ': '<div id="pst-primary-sidebar" role="navigation" aria-label="Book" ',
    '<div id="pst-secondary-sidebar" ': '<div id="pst-secondary-sidebar" role="region" '
    'aria-label="Contents of this page" tabindex="0" ',  # it scrolls
    ' data-bs-toggle="tooltip"': "",  # these open outside of all regions; titles and labels say the same
    ' data-theme="auto"': "",  # without scripts no colours are defined for it, and light ones for none
}
IMAGE = re.compile(r'<img\b[^>]*\bsrc="[^"]*?(_images/[^"]+\.png)"[^>]*/>')
POINTS = {200: 10, 100: 8}  # the smallest letters of a figure, by its dots per inch
LEAST = 9.5  # pixels for them on the screen; a box too narrow for that scrolls


def dots_per_inch(png: bytes) -> int:
    """What the file says; figures of today's style are drawn at 200, those of 0.1.0 at 100."""
    place = png.find(b"pHYs")
    if place > 0:
        return round(struct.unpack(">I", png[place + 4 : place + 8])[0] * 0.0254)
    return 200 if width(png) >= 940 else 100


def width(png: bytes) -> int:
    return struct.unpack(">I", png[16:20])[0]


def in_a_box(tag: str, png: bytes) -> str:
    """The picture with its width in pixels of the page, and as small as its letters allow."""
    dots = dots_per_inch(png)
    inches = width(png) / dots
    least = inches * 72 * LEAST / POINTS.get(dots, 8)
    size = f'width="{round(inches * 100)}" style="--least: {round(least)}px" '
    return f'<span class="picture">{tag.replace("<img ", f"<img {size}", 1)}</span>'


def repair(text: str, images: Path) -> str:
    for old, new in REPAIRS.items():
        text = text.replace(old, new)
    return IMAGE.sub(lambda m: in_a_box(m[0], (images / m[1]).read_bytes()), text)


def repair_pages(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text(encoding="utf-8")
            if 'class="picture"' not in text and (new := repair(text, Path(app.outdir))) != text:
                path.write_text(new, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", repair_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
