"""What a person would see amiss in the built book, as lists of sentences; empty lists are what one wants."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Error, Locator, Page, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HELP = """No browser was found. Any of these helps:
  Debian, Ubuntu   apt install chromium
  elsewhere        .venv-docs/bin/playwright install chromium
  or name one      BROWSER_PATH=/path/to/chromium make browser
"""

SIZES = {"desktop": (1280, 900), "tablet": (820, 1180), "phone": (375, 812)}
THEMES = ("light", "dark")
PAPER = (718, 1000)  # A4 less margins of a centimetre, in pixels of the page
WAIT = 120_000  # milliseconds; machines of continuous integration are slow at times
LOOK = (Path(__file__).parent / "faults.js").read_text(encoding="utf-8")
READY = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
}"""
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations.flatMap((v) =>
  v.nodes.map((n) => `${v.id}: ${v.help}: ${n.html.slice(0, 120)}`))"""


def start(play: Playwright) -> Browser:
    """The system's browser, or Playwright's own.

    Raises:
        FileNotFoundError: there is none; the message says how to get one.
    """
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    try:
        return play.chromium.launch(executable_path=path, args=["--no-sandbox"])
    except Error as error:
        raise FileNotFoundError(f"{HELP}\n{error.message.splitlines()[0]}") from error


@contextmanager
def visit(
    browser: Browser, url: str, device: str = "desktop", theme: str = "light", **options
) -> Iterator[tuple[Page, list[str]]]:
    """A page that is ready, and what went wrong on the way; the list grows while one stays."""
    width, height = SIZES[device]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, **options
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(WAIT)
    context.add_init_script(LOOK)
    page, heard = context.new_page(), []
    listen(page, url.split("/")[2], heard)
    page.goto(url, wait_until="load")
    page.evaluate(READY)
    yield page, heard
    context.close()


def listen(page: Page, host: str, heard: list[str]) -> None:
    """Errors of scripts, what does not load, and whatever the page asks of other hosts."""
    page.on("console", lambda m: m.type == "error" and heard.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on(
        "request",
        lambda r: (
            r.url.startswith(("http:", "https:"))
            and r.url.split("/")[2] != host
            and heard.append(f"asks the network: {r.url}")
        ),
    )
    page.on("response", lambda r: r.status >= 400 and heard.append(f"{r.status}: {r.url}"))


def on_screen(page: Page, device: str) -> list[str]:
    """Images, formulas, widths, letters of figures. On a desktop no formula needs to be scrolled."""
    return page.evaluate("scrolls => faults.screen(scrolls)", device != "desktop")


def on_paper(page: Page) -> list[str]:
    """Nothing is cut or folded, and no menu is printed."""
    page.set_viewport_size({"width": PAPER[0], "height": PAPER[1]})
    page.emulate_media(media="print")
    page.evaluate(READY)
    found = page.evaluate("faults.paper()")
    page.emulate_media(media="screen")
    return found


def moving(page: Page) -> list[str]:
    """What moves on a page whose reader asked for less motion."""
    return page.evaluate("faults.motion()")


def inaccessible(page: Page) -> list[str]:
    """Violations that axe finds, with all its rules."""
    page.evaluate(AXE_SCRIPT)
    return page.evaluate(AXE)


# ---- Things to click -----------------------------------------------------------------------------


def acts(page: Page, button: Locator, key: str = "") -> list[str]:
    """A click changes what is shown; another, or a key, changes it back and returns to the button."""
    back = (lambda: page.keyboard.press(key)) if key else button.click
    found = answers(page, button, button.click, back)
    if key and not found and not button.evaluate("button => button === document.activeElement"):
        found.append(f"loses the reader's place: {name_of(button)}")
    return found


def drops(page: Page, button: Locator) -> list[str]:
    """What drops down does so by keyboard, too; the mouse opens it by coming near."""
    return answers(page, button, lambda: button.press("Enter"), lambda: button.press("Escape"))


def answers(page: Page, button: Locator, there: Callable, back: Callable) -> list[str]:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")  # so that no tip hangs over the button
    for act, fault in ((there, "does nothing"), (back, "does not close")):
        before = page.evaluate("faults.state()")
        act()
        if not changes(page, before):
            return [f"{fault}: {name_of(button)}"]
    return []


def changes(page: Page, before: str) -> bool:
    for _ in range(20):
        if page.evaluate("faults.state()") != before:
            return True
        page.wait_for_timeout(100)
    return False


def name_of(button: Locator) -> str:
    return button.get_attribute("aria-label") or button.get_attribute("title") or "a button"


def dead_menus(page: Page, device: str) -> list[str]:
    """Both menus' buttons, the button of the theme, and what drops down."""
    sides = ("primary",) if device == "desktop" else ("primary", "secondary")
    found = []
    for side in sides:  # a page with one heading has no list of headings
        for button in page.locator(f"button.{side}-toggle:visible").all():
            found += acts(page, button, "" if device == "desktop" else "Escape")
    found += acts(page, page.locator("button.theme-switch-button:visible").first)
    for button in page.locator("button.dropdown-toggle:visible").all():
        found += drops(page, button)
    return found


def dead_toggles(page: Page) -> list[str]:
    """Every folded answer opens by a click."""
    found = []
    for summary in page.locator("main summary:visible").all():
        inside = summary.locator("xpath=following-sibling::*[1]")
        before = inside.is_visible()
        summary.click()
        if inside.is_visible() == before:
            found.append(f"does not unfold: {summary.inner_text()[:60]}")
    for button in page.locator("main button.toggle-button:visible").all():
        before = button.get_attribute("aria-expanded")
        button.click()
        if button.get_attribute("aria-expanded") == before:
            found.append(f"does not unfold: {button.get_attribute('id')}")
    return found


def dead_copy_buttons(page: Page, most: int = 3) -> list[str]:
    """The first buttons copy what stands beside them."""
    found = []
    for button in page.locator("main button.copybtn").all()[:most]:
        text = page.locator(button.get_attribute("data-clipboard-target") or "none").text_content()
        if not button.is_visible():
            continue
        page.evaluate("navigator.clipboard.writeText('nothing')")
        button.hover()
        button.click()
        page.wait_for_timeout(100)
        copied = page.evaluate("navigator.clipboard.readText()")
        if copied.strip() != text.strip():
            found.append(f"does not copy: {text[:60]!r}, but {copied[:60]!r}")
    return found


def dead_sliders(page: Page) -> list[str]:
    """An arrow key changes the picture."""
    found = []
    for slider in page.locator("main input[type=range]:visible").all():
        shown = slider.locator("xpath=..").locator("img:visible").first
        before, key = shown.get_attribute("src"), "ArrowRight"
        if slider.input_value() == slider.get_attribute("max"):
            key = "ArrowLeft"
        slider.press(key)
        if shown.get_attribute("src") == before:
            found.append(f"does not slide: {slider.get_attribute('aria-label')}")
    return found


def dead_search(page: Page, word: str) -> list[str]:
    """The field opens, takes a word, and leads to pages that have it."""
    page.keyboard.press("Control+k")
    field = page.locator("#pst-search-dialog input[type=search]")
    if not field.is_visible():
        return ["the search does not open"]
    field.fill(word)
    field.press("Enter")
    page.wait_for_url("**/search.html*")
    page.locator("#search-results p.search-summary, .search-summary").first.wait_for()
    page.wait_for_timeout(500)
    hits = page.locator("#search-results li").count()
    return [] if hits else [f"the search finds nothing for {word!r}"]


def unreached(page: Page) -> list[str]:
    """Links, buttons and boxes that the Tab key never comes to; the first is the link past the menus."""
    wanted = page.evaluate("faults.stops()")
    met, first = set(), None
    for _ in range(len(wanted) + 20):
        page.keyboard.press("Tab")
        here = page.evaluate("document.activeElement.dataset.stop ?? ''")
        first = here if first is None else first
        if here and int(here) in met:
            break
        if here:
            met.add(int(here))
    found = [f"not reached by keyboard: {x!r}" for i, x in enumerate(wanted) if i not in met]
    if not first or "main content" not in wanted[int(first)]:
        found.append("the first stop is not the link to the main content")
    return found


# ---- Links ---------------------------------------------------------------------------------------


class Parts(HTMLParser):
    """Names in a page, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


def broken_links(site: Path) -> list[str]:
    """Links of the site to files that it does not have, and to names that a page does not have."""
    paths = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    pages = {path: Parts(path.read_text(encoding="utf-8")) for path in paths}
    found = []
    for path, parts in pages.items():
        for link in parts.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            file, name = urldefrag(link)
            target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and (not name or unquote(name) in pages[target].names)
            if not (known or (target not in pages and target.is_file())):
                found.append(f"{path.relative_to(site)}: {link}")
    return found
