"""Each check finds its fault on a small page, and nothing on the page without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import (
    LOOK,
    acts,
    broken_links,
    dead_copy_buttons,
    dead_search,
    dead_sliders,
    dead_toggles,
    inaccessible,
    listen,
    moving,
    on_paper,
    on_screen,
    unreached,
)
from playwright.sync_api import Browser, Page

DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
PAGE = """<!DOCTYPE html><html lang="en"><head><title>A page</title><style>
  body {{ margin: 0 }} .math {{ display: block }} mjx-math {{ display: inline-block; height: 20px }}
</style></head><body><main><h1>A page</h1>{}</main></body></html>"""


def formula(width: int, style: str = "") -> str:
    return (
        f'<p><span class="math" style="{style}"><mjx-container>'
        f'<mjx-math style="width: {width}px"></mjx-math></mjx-container></span></p>'
    )


def figure(natural: int, shown: int) -> str:
    image = f'<img alt="x" src="{DOT}" width="{natural}" style="width: {shown}px">'
    return f'<span class="picture">{image}</span>'


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(LOOK)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


def load(page: Page, body: str) -> None:
    page.goto("about:blank")
    page.set_content(PAGE.format(body), wait_until="load")


SEEN = {
    "missing image": ('<img alt="x" src="http://127.0.0.1:9/none.png">', "does not load"),
    "image without text": (f'<img src="{DOT}">', "without alternative text"),
    "page too wide": ('<div style="width: 1400px; height: 9px"></div>', "120 px too wide"),
    "code cut": (
        '<pre style="overflow: hidden; width: 90px"><code>' + "x" * 99 + "</code></pre>",
        "cut by",
    ),
    "code without a name": (
        '<pre style="overflow: auto; width: 90px">' + "x" * 99 + "</pre>",
        "not by keyboard",
    ),
    "formula left as text": ('<span class="math">\\(x^2\\)</span>', "not rendered"),
    "formula with an error": (
        '<p class="math"><mjx-container><mjx-math>x<mjx-merror>y</mjx-merror></mjx-math></mjx-container></p>',
        "with an error",
    ),
    "formula that vanishes": (formula(0), "without extent"),
    "formula cut in a sentence": (
        formula(500, "overflow: hidden; width: 300px"),
        "formula cut by 200 px",
    ),
    "formula that needs scrolling": (
        formula(500, "overflow: auto; width: 300px"),
        "formula cut by 200 px",
    ),
    "letters too small": (figure(700, 500), "labels of 7.9 px"),
}


@pytest.mark.parametrize(("body", "fault"), SEEN.values(), ids=SEEN)
def test_faults_on_the_screen_are_found(page: Page, body: str, fault: str):
    load(page, body)
    assert any(fault in text for text in on_screen(page, "desktop"))


def test_a_page_without_faults_has_none(page: Page):
    box = 'tabindex="0" role="group" aria-label="Code" style="overflow: auto; width: 90px"'
    good = formula(500) + figure(700, 650) + f"<pre {box}>{'x' * 99}</pre>"
    load(page, good)
    assert on_screen(page, "desktop") == []
    load(page, formula(500, "overflow: auto; width: 300px").replace("<span ", f"<span {box} ", 1))
    assert on_screen(page, "phone") == [], "a formula may scroll on a phone"


PRINTED = {
    "code that scrolls": ('<pre style="overflow: auto">' + "x" * 200 + "</pre>", "cut by"),
    "formula that scrolls": (formula(900, "overflow: auto"), "formula cut by"),
    "folded answer": (
        "<details><summary>Why?</summary><p>Because.</p></details>",
        "folded on paper",
    ),
    "menu": ('<div class="bd-sidebar-primary">Menu</div>', "a menu on paper"),
}


@pytest.mark.parametrize(("body", "fault"), PRINTED.values(), ids=PRINTED)
def test_faults_on_paper_are_found(page: Page, body: str, fault: str):
    load(page, body)
    assert any(fault in text for text in on_paper(page))


def test_a_page_without_faults_prints_whole(page: Page):
    load(page, formula(500) + "<details open><summary>Why?</summary><p>Because.</p></details>")
    assert on_paper(page) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>console.error('bad')</script>", "console: bad"),
        ("<script>let a; nothing.here</script>", "error: "),
        ('<img alt="x" src="http://127.0.0.2:9/none.png">', "asks the network"),
    ],
    ids=["console", "script", "network"],
)
def test_what_goes_wrong_on_the_way_is_heard(page: Page, body: str, fault: str):
    heard: list[str] = []
    listen(page, "127.0.0.1:9", heard)
    load(page, body)
    assert any(fault in text for text in heard)


def test_a_file_that_is_not_there_is_heard(page: Page, address: str):
    heard: list[str] = []
    listen(page, address.split("/")[2], heard)
    page.goto(f"{address}/none.html")
    assert any(text.startswith("404: ") for text in heard)


BUTTON = '<button title="Menu" onclick="{}">Menu</button><dialog>Chapters</dialog>'


def test_dead_buttons_are_found(page: Page):
    load(page, BUTTON.format("document.querySelector('dialog').showModal()"))
    assert acts(page, page.locator("button"), "Escape") == []
    load(page, BUTTON.format(""))
    assert acts(page, page.locator("button"), "Escape") == ["does nothing: Menu"]
    load(page, BUTTON.format("document.querySelector('dialog').show()"))
    assert acts(page, page.locator("button"), "Escape") == ["does not close: Menu"]


def test_dead_toggles_are_found(page: Page):
    load(page, "<details><summary>Why?</summary><p>Because.</p></details>")
    assert dead_toggles(page) == []
    load(
        page,
        "<details onclick='event.preventDefault()'><summary>Why?</summary><p>So.</p></details>",
    )
    assert dead_toggles(page) == ["does not unfold: Why?"]
    load(page, '<button class="toggle-button" id="b" aria-expanded="false">Show</button>')
    assert dead_toggles(page) == ["does not unfold: b"]


def test_dead_sliders_are_found(page: Page):
    frames = f'<img alt="1" src="{DOT}"><img alt="2" src="{DOT}#2" hidden>'
    flip = "document.querySelectorAll('img').forEach(x => { x.hidden = !x.hidden })"
    for act, fault in ((flip, []), ("", ["does not slide: Scale"])):
        load(
            page,
            f'{frames}<input type="range" max="1" value="0" aria-label="Scale" oninput="{act}">',
        )
        assert dead_sliders(page) == fault


def test_dead_copy_buttons_are_found(browser: Browser, address: str):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{address}/none.html")  # only there for its address, since the clipboard wants one
    button = (
        '<pre id="c">x = 1</pre>'
        '<button class="copybtn" data-clipboard-target="#c" onclick="{}">Copy</button>'
    )
    page.set_content(PAGE.format(button.format("navigator.clipboard.writeText('x = 1')")))
    assert dead_copy_buttons(page) == []
    page.set_content(PAGE.format(button.format("")))
    assert dead_copy_buttons(page) == ["does not copy: 'x = 1', but 'nothing'"]
    context.close()


def test_a_dead_search_is_found(page: Page):
    load(page, '<dialog id="pst-search-dialog"><input type="search"></dialog>')
    assert dead_search(page, "shield") == ["the search does not open"]


def test_what_the_keyboard_does_not_reach_is_found(page: Page):
    load(page, '<a href="#x">Skip to main content</a><button>One</button><button>Two</button>')
    assert unreached(page) == []
    trap = "onkeydown=\"if (event.key === 'Tab') event.preventDefault()\""
    load(
        page,
        f'<a href="#x">Skip to main content</a><button {trap}>One</button><button>Two</button>',
    )
    assert unreached(page) == ["not reached by keyboard: 'Two'"]
    load(page, "<button>One</button>")
    assert unreached(page) == ["the first stop is not the link to the main content"]


def test_motion_is_found(page: Page):
    load(page, "<p>Still</p>")
    assert moving(page) == []
    load(page, '<p style="transition: opacity 1s">Moves</p>')
    assert moving(page) == ["moves although the reader wants no motion: p."]


def test_axe_runs_with_all_its_rules(page: Page):
    load(page, "<p>Text</p>")
    assert inaccessible(page) == []
    load(page, '<p style="color: #ccc">Pale</p><div aria-label="x" role="list"></div>')
    found = " ".join(inaccessible(page))
    assert "color-contrast" in found


def test_broken_links_are_found(tmp_path: Path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a href="https://elsewhere">c</a>')
    (tmp_path / "b.html").write_text('<p id="here"><a href="a.html">a</a><img src="none.png"></p>')
    assert broken_links(tmp_path) == ["b.html: none.png"]
    (tmp_path / "b.html").write_text("<p>gone</p>")
    assert broken_links(tmp_path) == ["a.html: b.html#here"]
