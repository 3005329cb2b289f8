"""The project's public address, set in one place: [project.urls] in pyproject.toml.

Repository, such as https://HOST/OWNER/NAME, and Documentation, where the pages are published. Without them
the pages have no button to a repository, an issue, Colab or Binder, and claim no address.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Address:
    """Where the project can be found.

    Attributes:
        repository: address to clone from, without a slash at its end.
        pages: address of the published pages with a slash at its end; empty if they are not published.
    """

    repository: str
    pages: str = ""


def read(pyproject: Path = ROOT / "pyproject.toml") -> Address | None:
    """The address that a pyproject.toml sets, None if it sets none."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    if "Repository" not in urls:
        return None
    pages = urls.get("Documentation", "").rstrip("/")
    return Address(urls["Repository"].rstrip("/"), f"{pages}/" if pages else "")


def theme_options(address: Address) -> dict[str, object]:
    """What the theme needs for its buttons."""
    return {
        "repository_url": address.repository,
        "repository_branch": "main",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def configure(app: Sphinx, config: Config) -> None:
    if address := read(Path(app.srcdir) / "pyproject.toml"):
        config.html_theme_options |= theme_options(address)
        config.html_baseurl = address.pages


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", configure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
