"""A model per known task on zoo 0: bytes and test accuracy, beside separate models, the base and one merge.

    python data/compressed.py

EMR, TALL masks and TSV-Compress with their defaults, nothing chosen; TSV-M as it merges by default. Writes
data/fair/compressed.csv: bytes of the tensors in float32, which share they are of the base and all models,
and the mean over tasks of the test accuracy.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import minipact as mp
from benches import HERE, Bench, State, mean_accuracy, open_bench

TABLE = HERE / "fair" / "compressed.csv"
RULES = ("emr", "tall", "tsv_compress")
COLUMNS = ("model", "what", "tasks", "bytes", "share", "test")
Rows = Iterator[tuple[str, int, float]]


def accuracy(bench: Bench, model: Callable[[str], State]) -> float:
    """Mean over tasks of the test accuracy of each task's own model."""
    found = {task: bench.hits(model(task), "test", [task])[task] for task in bench.tasks}
    return mean_accuracy(found)


def measured(bench: Bench) -> Rows:
    """What is kept, its bytes, and its accuracy."""
    one = sum(x.nbytes for x in bench.base.values())
    yield "separate models", one * (1 + len(bench.tasks)), accuracy(bench, bench.tasks.__getitem__)
    for rule in RULES:
        stored = mp.compress(bench.base, bench.tasks, rule=rule)
        yield rule, stored.bytes, accuracy(bench, stored.model)
    merged = mp.merge(bench.base, bench.tasks, rule="tsv_m")
    yield "tsv_m", one, mean_accuracy(bench.hits(merged, "test"))
    yield "base", one, mean_accuracy(bench.hits(bench.base, "test"))


def write(table: Path, bench: Bench, rows: Rows) -> None:
    """The table, all of it or none."""
    part = table.with_name(table.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        whole = 0
        for what, size, test in rows:
            whole = whole or size  # separate models come first
            row = (bench.name, what, len(bench.tasks), size, f"{size / whole:.4f}", f"{test:.5f}")
            writer.writerow(row)
            print(*row)
    os.replace(part, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="zoo0", help="as in benches.py (%(default)s)")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(arguments.model)
    write(arguments.table, bench, measured(bench))


if __name__ == "__main__":
    main()
