"""The addresses on the web that texts, notebooks and bibliography name, with the files that name them.

python tools/links.py            list them
python tools/links.py --check    ask each of them, and fail if one does not answer
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["*.md", "book/*.md", "book/*.ipynb", "data/*.md", "benchmarks/*.md", "references.bib"]
ADDRESS = re.compile(r"https?://[^\s<>\"'`\\)\]}|]+")
FIELDS = {"eprint": "https://arxiv.org/abs/{}", "doi": "https://doi.org/{}"}
REFUSED = {401, 403, 405, 429}  # a server that answers so is there, but wants no programs


def text_of(path: Path) -> str:
    """What a person reads of a file; of a notebook its cells without outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def addresses(text: str) -> set[str]:
    """Addresses in a text, with those that a bibliography means by numbers."""
    found = {address.rstrip(".,;:") for address in ADDRESS.findall(text)}
    for field, form in FIELDS.items():
        found |= {form.format(x) for x in re.findall(rf"\b{field}\s*=\s*\{{([^}}]+)\}}", text)}
    return found


def named() -> dict[str, list[str]]:
    """Address -> files that name it."""
    found = defaultdict(list)
    for path in sorted(path for glob in TEXTS for path in ROOT.glob(glob)):
        for address in addresses(text_of(path)):
            found[address].append(str(path.relative_to(ROOT)))
    return dict(sorted(found.items()))


def fault(address: str) -> str:
    """What is wrong with an address, empty if it answers."""
    request = urllib.request.Request(address, headers={"User-Agent": "minipact-links"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in REFUSED else f"answer {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))


def main() -> int:
    check, faults = "--check" in sys.argv, 0
    for address, files in named().items():
        said = fault(address) if check else ""
        faults += bool(said)
        print(f"{address}  ({', '.join(files)})" + (f"  FAULT: {said}" if said else ""), flush=True)
        if check:
            time.sleep(1)  # politely
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
