"""Store a trained zoo in fewer bits, and say what that changes.

    python data/pack_zoo.py zoo-of-seed-1 data/zoo1

Heads are copied, weights packed. What zoo.json says is measured on the packed weights; `unpacked` keeps the
accuracies of the full ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import packed
from sums import write_sums
from train_zoo import measure
from zoo_io import Zoo, load_zoo


def pack_zoo(full: Path, out: Path, step: float, base_step: float) -> None:
    """Write the packed zoo of a folder that train_zoo.py made; steps as in `packed.pack`."""
    zoo = load_zoo(full)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(full / "heads.safetensors", out / "heads.safetensors")
    (out / "base.safetensors.gz").write_bytes(packed.pack_alone(zoo.base, base_step))
    for task, weights in zoo.tasks.items():
        (out / f"{task}.safetensors.gz").write_bytes(packed.pack(zoo.base, weights, step))
    stored = packed_zoo(out, zoo)
    found = measure(stored.base, stored.tasks, zoo.heads, torch.device("cpu"))
    unpacked = {task: row["finetuned"] for task, row in zoo.info["tasks"].items()}
    steps = {"step": step, "base_step": base_step, "unpacked": unpacked}
    (out / "zoo.json").write_text(json.dumps(zoo.info | found | steps, indent=1) + "\n")
    write_sums(out)


def packed_zoo(out: Path, zoo: Zoo) -> Zoo:
    """The zoo as its packed files give it."""
    base = packed.unpack_alone((out / "base.safetensors.gz").read_bytes())
    tasks = {task: packed.read(base, out / f"{task}.safetensors.gz") for task in zoo.tasks}
    return replace(zoo, base=base, tasks=tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("full", type=Path, help="folder made by train_zoo.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=float, default=1.0, help="of updates (%(default)s)")
    parser.add_argument("--base-step", type=float, default=0.03, help="of the base (%(default)s)")
    arguments = parser.parse_args()
    pack_zoo(arguments.full, arguments.out, arguments.step, arguments.base_step)


if __name__ == "__main__":
    main()
