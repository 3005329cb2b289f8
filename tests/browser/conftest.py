"""A browser, and the built book on a local server. `make browser` comes here, and `make test` does not."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checks import start
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", type=Path, default=ROOT / "_build" / "html", help="the built book")
    parser.addoption("--pages", default="", help="names of pages, by commas; all if there is none")


def names(config: pytest.Config) -> list[str]:
    """Names of the pages to test."""
    site = config.getoption("--site")
    asked = config.getoption("--pages")
    return asked.split(",") if asked else sorted(p.stem for p in (site / "book").glob("*.html"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names(metafunc.config))


def pytest_configure(config: pytest.Config) -> None:
    """What is missing is said once and plainly, before any test."""
    if not (config.getoption("--site") / "index.html").is_file():
        raise pytest.UsageError(f"no built book in {config.getoption('--site')}: make book")
    if not hasattr(config, "workerinput"):
        try:
            with sync_playwright() as play:
                start(play).close()
        except FileNotFoundError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        started = start(play)
        yield started
        started.close()


@pytest.fixture(scope="session")
def site(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.getoption("--site").resolve()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the book can be read while the tests run."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
