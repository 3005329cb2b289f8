"""Store a trained zoo in fewer bits, and say what that changes.

    python data/pack_zoo.py zoo-of-seed-1 data/zoo1

Pre-trained weights and heads are copied, fine-tuned weights packed. What zoo.json says is measured on the
packed weights; `unpacked` keeps the accuracies of the full ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import packed
from sums import write_sums
from train_zoo import measure
from zoo_io import load_zoo


def pack_zoo(full: Path, out: Path, step: float) -> None:
    """Write the packed zoo of a folder that train_zoo.py made; step as in `packed.pack`."""
    zoo = load_zoo(full)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("base", "heads"):
        shutil.copyfile(full / f"{name}.safetensors", out / f"{name}.safetensors")
    for task, weights in zoo.tasks.items():
        (out / f"{task}.safetensors.gz").write_bytes(packed.pack(zoo.base, weights, step))
    stored = {task: packed.read(zoo.base, out / f"{task}.safetensors.gz") for task in zoo.tasks}
    found = measure(zoo.base, stored, zoo.heads, torch.device("cpu"))
    unpacked = {task: row["finetuned"] for task, row in zoo.info["tasks"].items()}
    info = zoo.info | found | {"step": step, "unpacked": unpacked}
    (out / "zoo.json").write_text(json.dumps(info, indent=1) + "\n")
    write_sums(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("full", type=Path, help="folder made by train_zoo.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=float, default=0.5, help="of packed.pack (%(default)s)")
    arguments = parser.parse_args()
    pack_zoo(arguments.full, arguments.out, arguments.step)


if __name__ == "__main__":
    main()
