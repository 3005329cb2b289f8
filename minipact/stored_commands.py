"""Arguments of `minipact compress` and `minipact extract`, and what they print; `__main__` runs them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minipact.arguments import add_report, add_selection, add_work

Run = Callable[[argparse.Namespace], int]
# What METHODS holds by the end; it takes torch to load, for which help does not wait.
PER_TASK = ("emr", "tall", "tsv_compress")


def add_compress(commands: Any, run: Run, entry: str) -> None:
    """Add `minipact compress`; `entry` is the help of --entry."""
    compress: argparse.ArgumentParser = commands.add_parser(
        "compress",
        help="store a base and its fine-tuned checkpoints in less room",
        description="Store a base and its fine-tuned checkpoints in one file, out of which minipact extract "
        "makes a model for each task again. Checkpoints are as in minipact merge.",
        epilog="example: minipact compress base.safetensors cars.safetensors dtd.safetensors "
        "-o all.safetensors --rule emr",
    )
    compress.set_defaults(run=run)
    add = compress.add_argument
    add("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    add("tasks", metavar="TASK", nargs="+", help="fine-tuned checkpoint, or NAME=PATH")
    add("-o", "--output", metavar="FILE", type=Path, required=True, help="FILE.safetensors")
    add("--rule", metavar="NAME", default="emr", help=f"{', '.join(PER_TASK)} (%(default)s)")
    add("--set", action="append", metavar="METHOD.OPTION=VALUE",
        help="option of a method, such as tsv_compress.rank=0.1, or tall.lambdas=cars:0.4,dtd:0.2 where it "
        "takes one for each task")  # fmt: skip
    add("--without-base", action="store_true",
        help="leave the base out; minipact extract then needs it again")  # fmt: skip
    add_selection(add, "the tasks", entry)
    add_work(add)
    add_report(add)


def add_extract(commands: Any, run: Run) -> None:
    """Add `minipact extract`."""
    extract: argparse.ArgumentParser = commands.add_parser(
        "extract",
        help="the model of one task out of a compressed file",
        description="Write the model of one task out of a file of minipact compress.",
        epilog="example: minipact extract all.safetensors cars -o cars.safetensors",
    )
    extract.set_defaults(run=run)
    add = extract.add_argument
    add("file", metavar="FILE", type=Path, help="what minipact compress wrote")
    add("task", metavar="TASK", help="name of the task")
    add("-o", "--output", metavar="OUT", type=Path, required=True,
        help="OUT.safetensors for one file, else a folder in Hugging Face layout")  # fmt: skip
    add("--base", metavar="BASE", type=Path,
        help="the base, where the file holds none, or for a model folder's other files")  # fmt: skip
    add("--max-shard-size", default="5GB", help="of a folder's files (%(default)s)")
    add_report(add)


def by_task(value: Any) -> Any:
    """{"cars": 0.4, "dtd": 0.2} from cars:0.4,dtd:0.2; any other value as it is."""
    if not isinstance(value, str) or value.startswith("energy:"):
        return value
    try:
        pairs = [pair.rsplit(":", 1) for pair in value.split(",")]
        return {task: float(x) for task, x in pairs}
    except ValueError:
        return value


def show(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    """What was written."""
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    if arguments.quiet:
        return
    for treatment, count in summary.get("tensors", {}).items():
        print(f"{count:5d} tensors: {treatment}")
    for note in summary["notes"]:
        print(f"note: {note}")
    print(f"wrote {arguments.output}: {summary['bytes']:,} bytes")
    if "bytes_apart" in summary:
        apart, tasks = summary["bytes_apart"], len(summary["tasks"])
        share = summary["bytes"] / apart
        print(f"that is {share:.0%} of the {apart:,} bytes of the base and {tasks} whole models")
