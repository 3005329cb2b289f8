"""The built book as a person uses it: every page, three widths, two themes, paper, keyboard, no network."""

from pathlib import Path

import pytest
from checks import (
    SIZES,
    THEMES,
    broken_links,
    dead_copy_buttons,
    dead_menus,
    dead_search,
    dead_sliders,
    dead_toggles,
    inaccessible,
    moving,
    on_paper,
    on_screen,
    unreached,
    visit,
)
from playwright.sync_api import Browser


def none(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("device", SIZES)
def test_page_is_whole_acts_and_can_be_read_by_all(
    browser: Browser, address: str, name: str, device: str, theme: str
):
    with visit(browser, f"{address}/book/{name}.html", device, theme) as (page, heard):
        found = on_screen(page, device) + dead_menus(page, device)
        if theme == "light":
            found += dead_toggles(page) + dead_sliders(page) + dead_copy_buttons(page)
            found += on_screen(page, device)  # what was folded, too
        found += heard
        found += inaccessible(page)  # last, since axe itself asks for style sheets where none are
        none(found)


def test_page_prints_whole(browser: Browser, address: str, name: str):
    with visit(browser, f"{address}/book/{name}.html") as (page, _):
        none(on_paper(page))


def test_keyboard_reaches_everything(browser: Browser, address: str, name: str):
    with visit(browser, f"{address}/book/{name}.html") as (page, _):
        none(unreached(page))


def test_page_keeps_still_for_those_who_ask(browser: Browser, address: str, name: str):
    with visit(browser, f"{address}/book/{name}.html", reduced_motion="reduce") as (page, _):
        none(moving(page))


@pytest.mark.parametrize("device", SIZES)
def test_search_finds(browser: Browser, address: str, device: str):
    with visit(browser, f"{address}/book/intro.html", device) as (page, heard):
        none(dead_search(page, "shield") + heard)


def test_skip_link_leads_past_the_menus(browser: Browser, address: str):
    with visit(browser, f"{address}/book/intro.html") as (page, _):
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("() => !!document.activeElement.closest('main')")


@pytest.mark.parametrize("page_without_chapter", ["search", "genindex", "404"])
def test_other_pages(browser: Browser, address: str, page_without_chapter: str):
    with visit(browser, f"{address}/{page_without_chapter}.html", "phone") as (page, heard):
        found = on_screen(page, "phone") + heard
        none(found + inaccessible(page))


def test_book_opens_from_the_disk(browser: Browser, site: Path):
    with visit(browser, (site / "book" / "intro.html").as_uri()) as (page, heard):
        none(heard + on_screen(page, "desktop"))


def test_links_inside_the_book_lead_somewhere(site: Path):
    none(broken_links(site))
