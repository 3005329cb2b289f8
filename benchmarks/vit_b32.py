"""Three fine-tuned ViT-B-32 image towers merged by `minipact merge`, file to file: time and memory.

    python benchmarks/vit_b32.py --device cuda --machine NAME

The weights are made on the spot (open_clip's architecture, random base, low-rank and dense deltas); sizes and
layout are those of the real checkpoints. Everything is set against the floor, a program that reads four
files and writes one. Writes benchmarks/results/vit_b32_<machine>.json; full_scale.py does it on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import open_clip
import psutil
import torch
from safetensors.torch import save_file

PACT = ["--rule", "tsv_m", "--purify", "pact"]
SKETCH = ["--set", "pact.svd=randomized", "--set", "tsv_m.svd=randomized"]
FLOOR = """
import sys
*inputs, output = sys.argv[1:]
with open(output, "wb") as copy:
    for number, name in enumerate(inputs):
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                if number == 0:
                    copy.write(block)
"""


def make_checkpoints(folder: Path, tasks: int = 3, seed: int = 0) -> tuple[Path, list[Path]]:
    """Base and fine-tuned image towers of open_clip's ViT-B-32 as safetensors files, 88 M parameters each."""
    torch.manual_seed(seed)
    visual = open_clip.create_model("ViT-B-32", pretrained=None).visual
    base = {f"visual.{name}": x.detach().contiguous() for name, x in visual.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    paths = [folder / f"task{t}.safetensors" for t in range(tasks)]
    for t, path in enumerate(paths):
        save_file(fine_tuned(base, seed + t + 1), path)
    return folder / "base.safetensors", paths


def fine_tuned(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Base plus a low-rank and a dense change, together 3 % of the base's norm per tensor."""
    g = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, x in base.items():
        delta = torch.randn(x.shape, generator=g)
        if x.ndim == 2:
            u, v = (
                torch.randn(x.shape[0], 16, generator=g),
                torch.randn(16, x.shape[1], generator=g),
            )
            delta += u @ v
        tuned[name] = x + 0.03 * (x.norm() + 1e-3) / delta.norm() * delta
    return tuned


def anonymous_mb(process: psutil.Process) -> float:
    """Anonymous resident memory of a process and those it started, in MB; all resident but on Linux."""
    found = [one.memory_info() for one in (process, *process.children(recursive=True))]
    return sum(info.rss - getattr(info, "shared", 0) for info in found) / 1e6


def run(command: list[str]) -> dict[str, float]:
    """Wall time, and the largest anonymous memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    samples = [0.0]

    def watch() -> None:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # a process may end while it is looked at
                samples.append(anonymous_mb(watched))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    if process.wait() != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    thread.join()
    return {"seconds": time.perf_counter() - started, "anonymous_mb": max(samples)}


def measure(repeats: int, device: str = "cpu") -> dict[str, Any]:
    """The floor and several ways to merge the same files, taking turns: seconds, and memory above imports."""
    bare = run(
        [sys.executable, "-c", "import torch, safetensors.torch, minipact.job, time; time.sleep(1)"]
    )
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        base, tasks = make_checkpoints(folder)
        size, files = base.stat().st_size, [str(path) for path in (base, *tasks)]
        end = ["-o", str(folder / "out.safetensors"), "--overwrite", "--quiet", "--device", device]
        merge = ["-m", "minipact", "merge", *files, *end]
        jobs = {
            "read the inputs, write one": ["-c", FLOOR, *files, str(folder / "copy")],
            "task arithmetic": merge,
            "PACT + TSV-M exact": [*merge, *PACT],
            "PACT + TSV-M randomized": [*merge, *PACT, *SKETCH],
        }
        if device == "cpu":
            several = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *merge, *PACT]
            jobs["PACT + TSV-M exact, two processes"] = [*several, "--threads", "1"]
        for _ in range(repeats):
            for job, arguments in jobs.items():
                runs.setdefault(job, []).append(run([sys.executable, *arguments]))
                print(f"  {job}: {runs[job][-1]}", flush=True)
    rows: dict[str, dict[str, Any]] = {
        job: {
            "seconds": [round(r["seconds"], 2) for r in found],
            "median": round(statistics.median(r["seconds"] for r in found), 2),
            "anonymous_mb_above_imports": max(
                0, round(max(r["anonymous_mb"] for r in found) - bare["anonymous_mb"])
            ),
        }
        for job, found in runs.items()
    }
    floor = rows["read the inputs, write one"]["median"]
    for row in rows.values():
        row["over_floor"] = round(row["median"] / floor, 1)
    return {"bytes_of_one_model": size, "tasks": 3, "device": device, "jobs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    arguments = parser.parse_args()
    results = {"machine": arguments.machine, "torch": torch.__version__.split("+")[0]}
    results |= measure(arguments.repeats, arguments.device)
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    (out / f"vit_b32_{arguments.machine}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
