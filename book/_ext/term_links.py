"""Chapters link to the glossary and to the reference by themselves.

The first mention of a glossary's term in a chapter becomes a link, and so does code such as `mp.pact`
wherever it names something that the reference describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

# Words of everyday English too: linked where a text emphasises them, as it does when it introduces a term.
EVERYDAY = {
    "base", "claim", "core", "head", "margin", "merging", "need", "rule", "scale", "seat", "vectors",
}  # fmt: skip
NO_CHAPTERS = ("glossary", "bibliography", "reference", "colophon")
# Where no link should stand.
CLOSED = (nodes.title, nodes.reference, nodes.literal, nodes.math, nodes.caption, nodes.term)
CODE = re.compile(r"(?:mp|minipact)\.([\w.]+)(?:\(.*\))?")


@cache
def pattern(term: str) -> re.Pattern[str]:
    """A term as a word of its own, in singular or plural; capitals count only if the term has some."""
    flags = re.IGNORECASE if term == term.lower() else re.NOFLAG
    return re.compile(rf"(?<![\w-]){re.escape(term)}s?(?![\w-])", flags)


def inside(node: nodes.Node, kinds: tuple[type[nodes.Node], ...]) -> bool:
    """Whether a node lies in one of some kinds."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def open_texts(doctree: nodes.document) -> Iterator[nodes.Text]:
    """Texts of paragraphs in which a link may stand."""
    for text in list(doctree.findall(nodes.Text)):
        if inside(text, (nodes.paragraph,)) and not inside(text, CLOSED):
            yield text


def mention(text: nodes.Text, term: str) -> re.Match[str] | None:
    """Where a text mentions a term, None where it does not, or not as a term."""
    if term not in EVERYDAY:
        return pattern(term).search(text)
    emphasised = isinstance(text.parent, nodes.emphasis | nodes.strong)
    return pattern(term).fullmatch(text) if emphasised else None


def split(text: nodes.Text, found: re.Match[str], link: nodes.reference) -> list[nodes.Node]:
    """A text with a link in place of what was found; the link is given its words."""
    link += nodes.inline("", found.group())
    before, after = text[: found.start()], text[found.end() :]
    parts = [nodes.Text(before), link, nodes.Text(after)]
    text.parent.replace(text, [part for part in parts if part is link or part])
    return parts


class TermLinks(SphinxPostTransform):
    """Links from a chapter's text."""

    default_priority = 5  # before references are resolved, while citations are still apart
    formats = ("html",)

    def run(self, **keywords: object) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            self.link_code(literal)
        if not self.env.docname.endswith(NO_CHAPTERS):
            self.link_terms()

    def link_terms(self) -> None:
        terms = self.env.get_domain("std").objects
        names = sorted((name for kind, name in terms if kind == "term"), key=len, reverse=True)
        for term in names:
            self.link_first(term, *terms["term", term])

    def link_first(self, term: str, page: str, label: str) -> None:
        for text in open_texts(self.document):
            if found := mention(text, term):
                split(text, found, self.link(page, label, "glossary-term"))
                return

    def link_code(self, literal: nodes.literal) -> None:
        found = CODE.fullmatch(literal.astext())
        if found is None or inside(literal, (nodes.title, nodes.reference)):
            return
        entry = self.described(found[1])
        if entry is not None:
            link = self.link(entry.docname, entry.node_id, "code-name")
            literal.replace_self(link)
            link += literal

    def described(self, name: str) -> object | None:
        """What the reference has under a name that `mp` offers."""
        objects = self.env.get_domain("py").objects
        if entry := objects.get(f"minipact.{name}"):
            return entry
        ends = [full for full in objects if full.endswith(f".{name}")]
        return objects[ends[0]] if len(ends) == 1 else None

    def link(self, page: str, label: str, kind: str) -> nodes.reference:
        uri = self.app.builder.get_relative_uri(self.env.docname, page)
        return nodes.reference("", "", internal=True, refuri=f"{uri}#{label}", classes=[kind])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(TermLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
