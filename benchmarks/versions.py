"""This version beside an earlier one: merges of small and of larger matrices, in turns, by CPU seconds.

    git worktree add ../earlier COMMIT
    python benchmarks/versions.py ../earlier

Each version runs in processes of its own, on one thread; a ratio is of neighbours within a round, below 1
where this version takes less. Writes benchmarks/results/versions_<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import minipact as mp
from full_scale import State, block_shapes, decaying

ROOT = Path(__file__).resolve().parents[1]
SKETCHED = {"pact": {"svd": "randomized"}, "tsv_m": {"svd": "randomized"}}
CASES: dict[str, dict[str, Any]] = {
    "task arithmetic": {"rule": "task_arithmetic"},
    "TIES": {"rule": "ties"},
    "TSV-M": {"rule": "tsv_m"},
    "Iso-C": {"rule": "iso_c"},
    "DARE + task arithmetic": {"rule": "task_arithmetic", "purify": "dare"},
    "SIFT + task arithmetic": {"rule": "task_arithmetic", "purify": "sift"},
    "PACT + task arithmetic": {"rule": "task_arithmetic", "purify": "pact"},
    "PACT + TIES": {"rule": "ties", "purify": "pact"},
    "PACT + TSV-M": {"rule": "tsv_m", "purify": "pact"},
    "PACT + TSV-M, randomized": {"rule": "tsv_m", "purify": "pact", "options": SKETCHED},
}
SIZES = {"24 matrices of width 128": (128, 6), "4 of width 384": (384, 1)}  # width, layers
SECONDS = 1.0  # that each case is repeated for, twice at least: the first time memory is fetched


def models(width: int, layers: int, tasks: int = 8) -> tuple[State, list[State]]:
    """A base and fine-tuned models: the matrices of transformer blocks, and biases."""
    g = torch.Generator().manual_seed(0)
    shapes = block_shapes(width, layers)
    base = {name: decaying(shape, 30.0, g) for name, shape in shapes.items()}
    base |= {f"{name[:-6]}bias": torch.randn(m, generator=g) for name, (m, _) in shapes.items()}

    def tuned(x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * torch.randn(x.shape, generator=g)

    return base, [{name: tuned(x) for name, x in base.items()} for _ in range(tasks)]


def measured() -> dict[str, float]:
    """CPU seconds of each case: the least of some repeats."""
    torch.set_num_threads(1)
    found = {}
    for size, (width, layers) in SIZES.items():
        base, tasks = models(width, layers)
        for case, recipe in CASES.items():
            spent: list[float] = []
            while len(spent) < 2 or sum(spent) < SECONDS:
                started = time.process_time()
                mp.merge(base, tasks, scale=1.0, **recipe)
                spent.append(time.process_time() - started)
            found[f"{size}: {case}"] = min(spent)
    return found


def run(place: Path) -> dict[str, float]:
    """`measured` with the package of one folder."""
    paths = os.pathsep.join([str(place.resolve()), str(ROOT / "benchmarks")])
    command = [sys.executable, __file__, "--measure"]
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("earlier", type=Path, nargs="?", help="folder of the earlier version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured()))
        return
    pairs = [(run(given.earlier), run(ROOT)) for _ in range(given.rounds)]
    rows = {}
    for case in pairs[0][0]:
        ratios = sorted(now[case] / before[case] for before, now in pairs)
        row = {"earlier": [round(x[case], 4) for x, _ in pairs]}
        row |= {"now": [round(x[case], 4) for _, x in pairs]}
        rows[case] = row | {"ratios": [round(x, 2) for x in ratios]}
        print(f"{case:52}{statistics.median(ratios):6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    out = (
        ROOT
        / "benchmarks"
        / "results"
        / f"versions_{platform.machine()}_{os.cpu_count()}cores.json"
    )
    told = ["git", "-C", str(given.earlier), "rev-parse", "--short", "HEAD"]
    earlier = subprocess.run(told, capture_output=True, text=True).stdout.strip()
    results = {"torch": torch.__version__, "earlier": earlier, "cases": rows}
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
