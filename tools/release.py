"""Check that a tag, the version, the changelog and the citation name one release.

python tools/release.py v0.2.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def faults(tag: str, root: Path = ROOT) -> list[str]:
    """What stands in the way of a release under a tag, one line each."""
    wanted = tag.removeprefix("v")
    version = re.search(r'__version__ = "(.+)"', (root / "minipact" / "version.py").read_text())[1]
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    dated = re.search(rf"^## {re.escape(wanted)} - (\d{{4}}-\d\d-\d\d)", changes, re.M)
    found = []
    if version != wanted:
        found.append(f"minipact/version.py says {version}")
    if dated is None:
        found.append(f"CHANGELOG.md has no section '## {wanted} - YYYY-MM-DD'")
    if f"version: {wanted}\n" not in citation:
        found.append(f"CITATION.cff has no version {wanted}")
    if dated and dated[1] not in citation:
        found.append(f"CITATION.cff has another date than {dated[1]}")
    if re.search(r"^## Unreleased\n+###", changes, re.M):
        found.append("CHANGELOG.md has entries under Unreleased")
    return found


if __name__ == "__main__":
    found = faults(sys.argv[1])
    print("\n".join(found) or "ready")
    sys.exit(bool(found))
