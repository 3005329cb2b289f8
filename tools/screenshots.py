"""Pages of the built book as pictures: desktop and phone, light and dark, into screenshots/.

python tools/screenshots.py [PAGE ...]        needs chromium
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
SIZES = {"desktop": (1280, 2400), "phone": (390, 2400)}


def shoot(browser: str, page: Path, out: Path, size: tuple[int, int], mode: str) -> None:
    """One picture; the theme reads its mode from the root element, so a copy of the page sets it."""
    text = page.read_text().replace("<html ", f'<html data-theme="{mode}" ', 1)
    script = f"<script>localStorage.setItem('mode','{mode}');localStorage.setItem('theme','{mode}')</script>"
    copy = page.with_name(f"_{mode}_{page.name}")
    copy.write_text(text.replace("<head>", f"<head>{script}", 1))
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--virtual-time-budget=8000", f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}", f"--screenshot={out}", copy.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    copy.unlink()


def main(names: list[str]) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not HTML.is_dir():
        raise SystemExit("chromium and a built book are needed: make book")
    folder = ROOT / "screenshots"
    folder.mkdir(exist_ok=True)
    pages = [HTML / "book" / f"{n}.html" for n in names] or sorted(
        (HTML / "book").glob("[!_]*.html")
    )
    for page in pages:
        for label, size in SIZES.items():
            for mode in ("light", "dark"):
                shoot(browser, page, folder / f"{page.stem}-{label}-{mode}.png", size, mode)


if __name__ == "__main__":
    main(sys.argv[1:])
