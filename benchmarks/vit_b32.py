"""Three fine-tuned ViT-B-32 image towers merged by PACT + TSV-M: time and memory of `minipact merge`.

    python benchmarks/vit_b32.py

The weights are made on the spot (open_clip's architecture, random base, low-rank and dense deltas); sizes and
layout are those of the real checkpoints. Writes benchmarks/results/vit_b32_<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

MODES = {
    "exact": [],
    "randomized": ["--set", "pact.svd=randomized", "--set", "tsv_m.svd=randomized"],
}


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


def anonymous_mb(pid: int) -> float:
    """Anonymous resident memory of a process in MB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1000 if found else 0.0


def run(command: list[str]) -> dict[str, float]:
    """Wall time, and the largest anonymous memory above that of the bare imports."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples = [0.0]

    def watch() -> None:
        while process.poll() is None:
            try:
                samples.append(anonymous_mb(process.pid))
            except OSError:
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    if process.wait() != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    thread.join()
    return {"seconds": time.perf_counter() - started, "anonymous_mb": max(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    arguments = parser.parse_args()
    python = [sys.executable, "-m"]
    bare = run(
        [sys.executable, "-c", "import torch, safetensors.torch, minipact, time; time.sleep(1)"]
    )
    results = {"machine": arguments.machine, "torch": torch.__version__, "modes": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tasks = make_checkpoints(folder)
        for mode, options in MODES.items():
            command = [*python, "minipact", "merge", base, *tasks, "-o", folder / "out.safetensors",
                       "--rule", "tsv_m", "--purify", "pact", "--overwrite", "--quiet",
                       "--device", arguments.device, *options]  # fmt: skip
            runs = [run([str(part) for part in command]) for _ in range(arguments.repeats)]
            results["modes"][mode] = {
                "seconds": [round(r["seconds"], 1) for r in runs],
                "anonymous_mb_above_imports": round(
                    max(r["anonymous_mb"] for r in runs) - bare["anonymous_mb"]
                ),
            }
            print(mode, results["modes"][mode], flush=True)
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    (out / f"vit_b32_{arguments.machine}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
