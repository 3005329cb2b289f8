"""Arguments of `minipact extract-lora` and of `minipact merge --lora-rank`, and what they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minipact.arguments import add_report, add_selection, add_work

Run = Callable[[argparse.Namespace], int]


def add_extract_lora(commands: Any, run: Run, entry: str) -> None:
    """Add `minipact extract-lora`; `entry` is the help of --entry."""
    extract: argparse.ArgumentParser = commands.add_parser(
        "extract-lora",
        help="the LoRA adapter of a fine-tuned checkpoint",
        description="Write what a fine-tuned checkpoint adds to its base as a LoRA adapter that PEFT loads: "
        "for each layer the nearest update of a rank. What is lost is printed, by rank. Checkpoints are as "
        "in minipact merge.",
        epilog="example: minipact extract-lora base tuned -o adapter --rank 16",
    )
    extract.set_defaults(run=run)
    add = extract.add_argument
    add("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    add("tuned", metavar="TUNED", help="fine-tuned checkpoint, or NAME=PATH")
    add("-o", "--output", metavar="ADAPTER", type=Path, required=True, help="folder to write")
    add("--rank", type=int, metavar="R", required=True, help="of each layer's update at most")
    add_save_modules(add)
    add("--svd", choices=("exact", "randomized"), default="exact",
        help="randomized is faster on large matrices (%(default)s)")  # fmt: skip
    add_selection(add, "TUNED", entry)
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"),
        help="of the adapter (float32, and tensors stored whole as in the base)")  # fmt: skip
    add(
        "--base-model",
        metavar="ID",
        help="what the adapter calls its base (what TUNED's card says)",
    )
    add("--license", metavar="ID", help="for the card, likewise")
    add_work(add)
    add_report(add)


def add_save_modules(add: Callable[..., object]) -> None:
    """Add --save-modules, which both commands take."""
    add("--save-modules", action="store_true",
        help="store what changed and factors cannot hold, such as norms and embeddings, with its whole "
        "module; else it is refused")  # fmt: skip


def show_lora(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    """What was written, and what is lost."""
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    if arguments.quiet:
        return
    for treatment, count in summary["tensors"].items():
        print(f"{count:5d} tensors: {treatment}")
    for note in summary["notes"]:
        print(f"note: {note}")
    _show_errors(summary["errors"])
    layers, whole, rank = summary["layers"], len(summary["whole"]), summary["rank"]
    beside = f", {whole} tensors stored whole" if whole else ""
    size, error = summary["bytes"] / 1e6, summary["error"]
    print(f"wrote {arguments.output} ({size:.1f} MB): rank {rank} on {layers} layers{beside}")
    print(f"relative error of what is added to these layers: {error:.3g}")


def _show_errors(errors: Mapping[str, Mapping[int, float]]) -> None:
    """The table of errors by kind of layer and rank."""
    title = "relative error at rank"
    width = max(map(len, [title, *errors]))
    print(f"{title:{width}}" + "".join(f"{rank:>8}" for rank in next(iter(errors.values()))))
    for kind, found in errors.items():
        print(f"{kind:{width}}" + "".join(f"{error:8.4f}" for error in found.values()))
