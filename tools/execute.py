"""Execute notebooks in place, under the settings of conftest.py.

python tools/execute.py book/01_task_arithmetic.ipynb
python tools/execute.py --stale book/*.ipynb     only those whose code has changed since
"""

import argparse
import base64
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401  sets the environment that kernels inherit
import stamps

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def smaller(png: str) -> str:
    """The picture (base64) with a palette of 64 colours, a third of the bytes or less, and its density."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    packed = io.BytesIO()
    few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(packed, "PNG", optimize=True, dpi=picture.info.get("dpi", (100, 100)))
    return base64.b64encode(packed.getvalue()).decode()


def execute(path: Path) -> float:
    """Run all cells from a fresh kernel and store outputs without volatile metadata; returns seconds."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(path.parent))
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "minipact": stamps.stamp(notebook),
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--stale", action="store_true", help="only those whose code has changed")
    args = parser.parse_args()
    for path in args.notebooks:
        if args.stale and not stamps.is_stale(nbformat.read(path, as_version=4)):
            continue
        print(f"{path}: {execute(path):.0f} s", flush=True)
