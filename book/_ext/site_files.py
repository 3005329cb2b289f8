"""Files of the site that are no chapter: front door, page for what is not found, sitemap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from sphinx.application import Sphinx

from page_heads import properties, tags

LOST = """
<section>
<h1>This page does not exist</h1>
<p>The address may be old or mistyped. Here are ways on:</p>
<ul>{links}</ul>
</section>
"""
FRONT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<title>{title}</title>
<meta http-equiv="refresh" content="0; url={target}" />{tags}</head>
<body><p><a href="{target}">{title}</a></p></body>
</html>
"""
RELATIVE = re.compile(r'((?:href|src|action|data-content_root)=")(?!\w+:|[#/"])(?:\./)?')


def lost_page(app: Sphinx) -> Iterator[tuple[str, dict, str]]:
    """404.html, which forges and most servers show for an unknown address."""
    pages = [app.config.root_doc, "book/glossary", "book/reference"]
    items = [(app.builder.get_target_uri(p), app.env.titles[p].astext()) for p in pages]
    items.append((app.builder.get_target_uri("search"), "Search"))
    links = "".join(f'<li><a href="{uri}">{escape(title)}</a></li>' for uri, title in items)
    yield "404", {"title": "Not found", "body": LOST.format(links=links)}, "page.html"


def rooted(html: str, base: str) -> str:
    """A page of the top folder with links that work from any depth below the base address."""
    return RELATIVE.sub(rf"\g<1>{urlsplit(base).path}", html)


def front_door(app: Sphinx) -> str:
    """index.html: leads to the introduction, and tells those who share its address what it is."""
    root = app.config.root_doc
    found = properties(app, root, app.config.html_title, app.env.get_doctree(root))
    target = app.builder.get_target_uri(root)
    return FRONT.format(title=escape(app.config.html_title), target=target, tags=tags(found))


def sitemap(app: Sphinx) -> str:
    """All chapters' addresses, for search engines."""
    uris = [app.builder.get_target_uri(page) for page in sorted(app.env.found_docs)]
    lines = [f"<url><loc>{escape(app.config.html_baseurl + uri)}</loc></url>" for uri in uris]
    space = "http://www.sitemaps.org/schemas/sitemap/0.9"
    head = f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{space}">'
    return "\n".join([head, *lines, "</urlset>", ""])


def write_files(app: Sphinx, failure: Exception | None) -> None:
    if failure or app.builder.name != "html":
        return
    out = Path(app.outdir)
    (out / "index.html").write_text(front_door(app), encoding="utf-8")
    if base := app.config.html_baseurl:
        lost = (out / "404.html").read_text(encoding="utf-8")
        (out / "404.html").write_text(rooted(lost, base), encoding="utf-8")
        (out / "sitemap.xml").write_text(sitemap(app), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-collect-pages", lost_page)
    app.connect("build-finished", write_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
