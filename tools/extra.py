"""The packages of an extra of pyproject.toml, one a line, for an environment without the package itself.

python tools/extra.py docs > requirements.txt
"""

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def packages(extra: str) -> list[str]:
    """What an extra asks for."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][extra]


if __name__ == "__main__":
    print("\n".join(packages(sys.argv[1])))
