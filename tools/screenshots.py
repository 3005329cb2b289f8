"""Pages of the built book as pictures: three widths, light and dark, into screenshots/.

.venv-docs/bin/python tools/screenshots.py [PAGE ...]
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))
from checks import SIZES, THEMES, start, visit  # noqa: E402

PAGES = ROOT / "_build" / "html" / "book"


def main(names: list[str]) -> None:
    folder = ROOT / "screenshots"
    folder.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = start(play)
        for name in names or sorted(path.stem for path in PAGES.glob("*.html")):
            for device in SIZES:
                for theme in THEMES:
                    at = (PAGES / f"{name}.html").as_uri()
                    with visit(browser, at, device, theme, reduced_motion="reduce") as (page, _):
                        file = folder / f"{name}-{device}-{theme}.png"
                        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
