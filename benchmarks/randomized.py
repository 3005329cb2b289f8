"""Exact against randomized singular vectors: time of one matrix, of PACT and of TSV-M at real widths.

    python benchmarks/randomized.py

CPU seconds of one thread, which other programs on the machine disturb little. The matrices are random,
since time hardly depends on what they hold. Writes benchmarks/results/randomized_<machine>.json, which
chapter 7 draws.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import minipact as mp

WIDTHS = (128, 256, 512, 768, 1024)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
TASKS = 8


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of a call, the least of several repeats."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return float(f"{min(times):.3g}")


def randomized(A: Tensor, k: int, oversample: int = 10, power: int = 3) -> Tensor:
    """Leading right singular vectors [n, k] by the range finder, as in chapter 7."""
    columns = min(k + oversample, *A.shape)
    Q = torch.linalg.qr(A @ torch.randn(A.shape[1], columns)).Q
    for _ in range(power):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
    return torch.linalg.svd(Q.mT @ A, full_matrices=False).Vh[:k].mT


def gram(A: Tensor) -> Tensor:
    """All right singular vectors as eigenvectors of A^T A, in float64 since squaring costs digits."""
    wide = A.double()
    return torch.linalg.eigh(wide.mT @ wide).eigenvectors


def newton_schulz(A: Tensor, iterations: int) -> Tensor:
    X, eye = A / A.norm(), torch.eye(A.shape[1])
    for _ in range(iterations):
        X = X @ (3 * eye - X.mT @ X) / 2
    return X


def one_matrix(width: int, repeats: int) -> dict[str, object]:
    """Seconds for the leading vectors of one square float32 matrix, and for its polar factor."""
    A = torch.randn(width, width)
    ranks = [max(1, int(share * width)) for share in SHARES]
    return {
        "width": width,
        "svd": seconds(lambda: torch.linalg.svd(A), repeats),
        "gram": seconds(lambda: gram(A), repeats),
        "ranks": ranks,
        "randomized": [seconds(partial(randomized, A, k), repeats) for k in ranks],
        "newton_schulz_20": seconds(lambda: newton_schulz(A, 20), repeats),
    }


def methods(width: int, repeats: int) -> dict[str, object]:
    """Seconds of `mp.pact` and `mp.tsv_m` on eight square float32 task matrices, default ranks."""
    W0 = torch.randn(width, width)
    D = torch.randn(TASKS, width, 16) @ torch.randn(TASKS, 16, width)
    D = 0.01 * (D + torch.randn(TASKS, width, width))

    def timed(method: Callable[..., Tensor], *inputs: Tensor) -> dict[str, float]:
        source = torch.Generator().manual_seed(0)
        return {
            svd: seconds(partial(method, *inputs, svd=svd, generator=source), repeats)
            for svd in ("exact", "randomized")
        }

    return {"width": width, "pact": timed(mp.pact, W0, D), "tsv_m": timed(mp.tsv_m, D)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results: dict[str, object] = {
        "machine": arguments.machine,
        "torch": torch.__version__,
        "threads": 1,
        "tasks": TASKS,
        "one_matrix": one_matrix(768, arguments.repeats),
        "methods": [methods(width, arguments.repeats) for width in WIDTHS],
    }
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    path = out / f"randomized_{arguments.machine}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
