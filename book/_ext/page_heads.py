"""What others see of a page: description, title and picture for a shared link."""

from __future__ import annotations

from html import escape

from docutils import nodes
from sphinx.application import Sphinx

LENGTH = 200  # characters of a description; what search engines show
PICTURE = "_static/result.png"  # of pages that have none


def text_of(node: nodes.Node) -> str:
    """Text without the names of its parts, in one line."""
    return " ".join(node.astext().split())


def description(doctree: nodes.Node) -> str:
    """The first paragraph outside of boxes, cut at the end of a sentence or at least of a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section) and text_of(paragraph):
            return shortened(text_of(paragraph).removeprefix("Claim. "))
    return ""


def shortened(text: str) -> str:
    """As many sentences as fit, or as many words."""
    if len(text) <= LENGTH:
        return text
    sentence = text[:LENGTH].rfind(". ")
    if sentence > LENGTH // 3:
        return text[: sentence + 1]
    return text[: LENGTH - 1].rpartition(" ")[0].rstrip(",;:") + "…"


def picture(doctree: nodes.Node) -> tuple[str, str]:
    """Path in the site, and description, of a page's first picture that is no drawing in SVG."""
    for image in doctree.findall(nodes.image):
        folder, _, name = image["uri"].rpartition("/")
        if folder.endswith("_images") and name.endswith((".png", ".jpg")):
            return f"_images/{name}", image.get("alt", "")
    return PICTURE, ""


def properties(app: Sphinx, page: str, title: str, doctree: nodes.Node) -> dict[str, str]:
    """Open Graph properties and their values; those that are addresses only where the pages have one."""
    found = {
        "og:title": title,
        "og:site_name": app.config.html_title,
        "og:type": "article",
        "og:description": description(doctree),
    }
    base = app.config.html_baseurl
    if base:
        image, alt = picture(doctree)
        found["og:url"] = base + app.builder.get_target_uri(page)
        found["og:image"] = base + image
        found["og:image:alt"] = alt
    return {name: value for name, value in found.items() if value}


def tags(found: dict[str, str]) -> str:
    """Lines for the head of a page."""
    lines = [f'<meta property="{n}" content="{escape(x, quote=True)}" />' for n, x in found.items()]
    about = escape(found.get("og:description", ""), quote=True)
    lines += [f'<meta name="description" content="{about}" />'] if about else []
    card = "summary_large_image" if "og:image" in found else "summary"
    return "\n".join(["", *lines, f'<meta name="twitter:card" content="{card}" />', ""])


def add_tags(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.Node) -> None:
    if doctree is not None:
        title = app.env.titles[page].astext()
        context["metatags"] += tags(properties(app, page, title, doctree))
    elif page == "404":
        context["pageurl"] = ""  # it stands for any address


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add_tags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
