"""Arguments of `minipact statistics`, and what it prints; `__main__` runs it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minipact.arguments import add_report

Run = Callable[[argparse.Namespace], int]
# STATISTICS takes torch to load, for which help does not wait.
KINDS = ("covariance", "fisher", "gradient")


def add_statistics(commands: Any, run: Run) -> None:
    """Add `minipact statistics`."""
    statistics: argparse.ArgumentParser = commands.add_parser(
        "statistics",
        help="measure a model on data, for methods that need it",
        description="Measure a statistic of a model on a task's data, and write it to a file for "
        "minipact merge --statistics.",
        epilog="example: minipact statistics covariance cars.safetensors --data images/cars "
        "--architecture ViT-B-32-quickgelu -o cars_covariance.safetensors",
    )
    statistics.set_defaults(run=run)
    add = statistics.add_argument
    add("kind", metavar="KIND", choices=KINDS, type=lambda text: text.removesuffix("s"),
        help="covariance (of the inputs of linear layers, at the fine-tuned model), fisher (information, "
        "likewise), or gradients (magnitudes, at the base)")  # fmt: skip
    add("model", metavar="MODEL", type=Path,
        help="checkpoint; for gradients the base")  # fmt: skip
    add("--data", metavar="DATA", type=Path, required=True,
        help="the task's training data: a folder of images for each class, or a file with a text a line, or "
        'lines of {"text": ..., "label": NUMBER} in a .jsonl')  # fmt: skip
    add("-o", "--output", metavar="FILE", type=Path, required=True, help="FILE.safetensors")
    add("--task", metavar="TASK", type=Path,
        help="fine-tuned checkpoint that gradients of the base are for")  # fmt: skip
    add("--loader", metavar="NAME",
        help="open_clip, transformers, or package.module:function, (model, data) -> (torch module, "
        "batches) (what the model says)")  # fmt: skip
    add("--architecture", metavar="NAME", help="open_clip's, where MODEL is a file of one")
    add("--head", metavar="FILE", type=Path,
        help="of an image tower: weight [C, d], classes in the order of their folders (made of the folders' "
        "names)")  # fmt: skip
    add("--text", metavar="FILE", type=Path,
        help="open_clip checkpoint whose text tower makes the head, where MODEL has none")  # fmt: skip
    add("--labels", choices=("true", "expected", "empirical", "argmax"),
        help="of fisher and gradients: drawn from the model, all weighted, the data's, or the likeliest "
        "(true; for gradients empirical)")  # fmt: skip
    add(
        "--samples",
        type=int,
        metavar="N",
        help="how many, drawn by the seed (1024; of gradients 128)",
    )
    add("--batch", type=int, default=32, metavar="N", help="at once (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples, and of labels drawn (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    add_report(add)


def show_statistics(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    """What was written."""
    if arguments.json:
        print(json.dumps(summary, indent=2))
    elif not arguments.quiet:
        what = f"{summary['kind']} of {summary['tensors']} tensors on {summary['samples']} samples"
        print(f"{what}: wrote {summary['file']} ({summary['bytes']:,} bytes)")
