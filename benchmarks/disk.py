"""Task arithmetic from disk to disk: large files against the floor, many small tensors against a naive loop.

    python benchmarks/disk.py                            both parts, some minutes on 2 cores
    python benchmarks/disk.py --only large --megabytes 1000

The floor is the larger of two: reading all inputs and writing one output, and SHA-256 of all inputs on one
core, since a merge that records its inputs must do both. The naive loop opens the files by safetensors, adds
tensor by tensor and saves once. Everything takes turns in one process after the imports; the whole command,
start included, is measured apart. Ratios are of neighbours within a round, so that other work on the machine
disturbs them less; CPU seconds stand beside the seconds on the clock for the same reason.
Writes benchmarks/results/disk_<machine>.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import minipact as mp
from vit_b32 import run

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALE = 0.3
BLOCK = 1 << 22
Job = Callable[[], object]


# ---- Files ---------------------------------------------------------------------------------------


def write_models(
    folder: Path, shapes: dict[str, tuple[int, int]], tasks: int, dtype: torch.dtype
) -> list[Path]:
    """A base and fine-tuned models, random, with tensors of these shapes."""
    torch.manual_seed(0)
    base = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    paths = [folder / f"model{t}.safetensors" for t in range(tasks + 1)]
    for t, path in enumerate(paths):
        changes = {name: 0.001 * t * torch.randn(x.shape) for name, x in base.items()}
        save_file({name: (x + changes[name]).to(dtype) for name, x in base.items()}, path)
    return paths


# ---- What is compared ----------------------------------------------------------------------------


def copy(inputs: list[Path], output: Path, *, flush: bool = False) -> None:
    """Read all, write the first."""
    block = memoryview(bytearray(BLOCK))
    with output.open("wb", buffering=0) as out:
        for path in inputs:
            with path.open("rb", buffering=0) as file:
                while size := file.readinto(block):
                    if path == inputs[0]:
                        out.write(block[:size])
        if flush:
            os.fsync(out.fileno())


def digest(inputs: list[Path]) -> None:
    for path in inputs:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def naive(inputs: list[Path], output: Path) -> None:
    """base + scale * sum of (task - base), tensor by tensor."""
    base, *tasks = (safe_open(path, framework="pt") for path in inputs)
    merged: dict[str, Tensor] = {}
    for name in base.keys():  # noqa: SIM118
        x = base.get_tensor(name)
        merged[name] = x + SCALE * sum(task.get_tensor(name) - x for task in tasks)
    save_file(merged, output)


def merge(inputs: list[Path], output: Path, threads: int | None) -> None:
    recipe = mp.Recipe(scale=SCALE)
    mp.merge_files(inputs[0], inputs[1:], output, recipe, overwrite=True, threads=threads)


# ---- Timing --------------------------------------------------------------------------------------


def timed(job: Job) -> dict[str, float]:
    """Seconds on the clock and of all cores."""
    if hasattr(os, "sync"):  # what earlier jobs left to be written is not this one's work
        os.sync()
    clock, cpu = time.perf_counter(), time.process_time()
    job()
    return {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def take_turns(jobs: dict[str, Job], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run all jobs in turn, once to warm up and then `rounds` times."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            seconds = timed(job)
            if number:
                found[name].append(seconds)
                print(f"  {name}: {seconds['clock']:.2f} s, {seconds['cpu']:.2f} s CPU", flush=True)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    shown = [float(f"{x:.3g}") for x in values]
    return {"median": float(f"{statistics.median(values):.3g}"), "all": shown}


def compared(found: dict[str, list[dict[str, float]]], floors: list[str]) -> dict[str, Any]:
    """Seconds of every job, and the merge over the largest of some jobs, round by round."""
    rows: dict[str, Any] = {
        kind: {name: spread([x[kind] for x in runs]) for name, runs in found.items()}
        for kind in ("clock", "cpu")
    }
    for kind in ("clock", "cpu"):
        lowest = [
            max(runs) for runs in zip(*([x[kind] for x in found[f]] for f in floors), strict=True)
        ]
        ratios = [x[kind] / low for x, low in zip(found["minipact"], lowest, strict=True)]
        rows[f"ratio_{kind}"] = spread(ratios)
    return rows


def command(inputs: list[Path], output: Path, rounds: int) -> dict[str, Any]:
    """The whole command, and a start of Python with the imports that it needs."""
    arguments = [*map(str, inputs), "-o", str(output), "--scale", str(SCALE)]
    whole = [sys.executable, "-m", "minipact", "merge", *arguments, "--overwrite", "--quiet"]
    start = [sys.executable, "-c", "import minipact.job"]
    runs = [(run(start), run(whole)) for _ in range(rounds)]
    return {
        "start": spread([before["seconds"] for before, _ in runs]),
        "whole": spread([after["seconds"] for _, after in runs]),
        "anonymous_mb_above_start": max(
            round(after["anonymous_mb"] - before["anonymous_mb"]) for before, after in runs
        ),
    }


# ---- Parts ---------------------------------------------------------------------------------------


def large(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Large files of either type against the floor."""
    rows: dict[str, Any] = {"megabytes_of_one_model": options.megabytes, "tasks": options.tasks}
    for kind, dtype in TYPES.items():
        print(f"large, {kind}", flush=True)
        columns = round(options.megabytes * 1e6 / dtype.itemsize / 16 / 4096)
        shapes = {f"layers.{i}.weight": (4096, columns) for i in range(16)}
        inputs = write_models(folder, shapes, options.tasks, dtype)
        out, other = folder / "out.safetensors", folder / "copy"
        jobs: dict[str, Job] = {
            "read the inputs, write one": lambda i=inputs, o=other: copy(i, o),
            "the same, flushed to the disk": lambda i=inputs, o=other: copy(i, o, flush=True),
            "SHA-256 of the inputs": lambda i=inputs: digest(i),
            "minipact": lambda i=inputs, o=out: merge(i, o, options.threads),
        }
        floors = ["read the inputs, write one", "SHA-256 of the inputs"]
        rows[kind] = compared(take_turns(jobs, options.rounds), floors)
        rows[kind]["command"] = command(inputs, out, options.rounds)
    return rows


def small(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Many tensors of 4 x 4 and three tasks against the naive loop."""
    print("small", flush=True)
    shapes = {f"layers.{i}.weight": (4, 4) for i in range(options.tensors)}
    inputs = write_models(folder, shapes, 3, torch.float32)
    out, other = folder / "out.safetensors", folder / "naive.safetensors"
    jobs: dict[str, Job] = {
        "naive loop": lambda: naive(inputs, other),
        "minipact": lambda: merge(inputs, out, options.threads),
    }
    found = compared(take_turns(jobs, options.rounds), ["naive loop"])
    whole = command(inputs, out, options.rounds)
    return {"tensors": options.tensors, "shape": [4, 4], "tasks": 3, **found, "command": whole}


PARTS = {"large": large, "small": small}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--megabytes", type=float, default=268.0, help="of one model")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / f"disk_{options.machine}.json"
    out.parent.mkdir(exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    results |= {"machine": options.machine, "torch": torch.__version__.split("+")[0]}
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            results[name] = PARTS[name](options, Path(folder))
        if hasattr(os, "getloadavg"):
            results[name]["load_of_the_machine"] = round(os.getloadavg()[0], 1)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
