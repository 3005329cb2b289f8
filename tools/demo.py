"""Merge the zoo's eight models with the command line, and compare: the base, one model per task, the merge.

python tools/demo.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import minipact as mp  # noqa: E402
import zoo_io  # noqa: E402  lies in data/
from minipact.__main__ import main as minipact  # noqa: E402

ZOO = ROOT / "data" / "zoo"
RECIPE = ["--rule", "tsv_m", "--scale", "1.0"]


def merged_zoo(output: Path, tasks: list[str]) -> int:
    """Run the command that a reader would type; returns its exit code."""
    files = [f"data/zoo/{name}.safetensors" for name in ["base", *tasks]]
    print(
        "minipact merge data/zoo/base.safetensors data/zoo/TASK.safetensors ... -o merged.safetensors",
        *RECIPE,
    )
    return minipact(["merge", *(str(ROOT / file) for file in files), "-o", str(output), *RECIPE])


def accuracies(zoo: zoo_io.Zoo, merged: dict[str, Tensor]) -> dict[str, list[float]]:
    """Task -> test accuracy in 0..1 of the base, of the task's own model, and of the merge."""
    judge = zoo_io.Judge(zoo.info["model"], zoo.heads)
    found = {}
    for task in tqdm(zoo.tasks, desc="testing", unit="task", leave=False):
        models = [zoo.base, zoo.tasks[task], merged]
        found[task] = [judge.accuracies(weights, "test", [task])[task] for weights in models]
    return found


def table(found: dict[str, list[float]]) -> str:
    """Percent, one line per task, and the average."""
    average = [sum(column) / len(found) for column in zip(*found.values(), strict=True)]
    lines = [f"{'':10}{'base':>8}{'own model':>12}{'merged':>10}"]
    for task, row in (found | {"average": average}).items():
        base, own, merged = (f"{100 * x:.1f}" for x in row)
        lines.append(f"{task:10}{base:>8}{own:>12}{merged:>10}")
    return "\n".join(lines)


def main() -> int:
    zoo = zoo_io.load_zoo(ZOO)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "merged.safetensors"
        if code := merged_zoo(output, list(zoo.tasks)):
            return code
        print("\ntest accuracy (%)\n" + table(accuracies(zoo, dict(mp.open_checkpoint(output)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
