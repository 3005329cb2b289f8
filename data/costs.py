"""Time and memory of every method: one merge of zoo 0 by each, in a process of its own.

    python data/costs.py

Methods have their defaults, purifiers stand before task arithmetic, and what makes statistics from training
pictures is measured by itself. A process merges twice, for memory and then, warm, for CPU seconds. One run
on one core, on Linux; writes data/fair/family_costs.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import family
import minipact as mp
from benches import HERE
from peak_memory import peak
from zoo_io import load_zoo

TABLE = HERE / "fair" / "family_costs.csv"
COLUMNS = ("what", "kind", "seconds", "megabytes")
RULES = (
    *("task_arithmetic", "ties", "consensus", "tsv_m", "iso_c", "iso_cts", "wudi", "swudi", "ace"),
    *("knots", "regmean", "fisher_merge"),
)
PURIFIERS = ("pact", "sift", "dare", "awd", "pave", "tatr", "wiener")
KINDS = {
    **dict.fromkeys(RULES, "rule"),
    **dict.fromkeys(PURIFIERS, "purifier"),
    **dict.fromkeys(family.MEASURES, "statistic"),
}
NEEDS = {"regmean": "covariance", "pave": "covariance", "fisher_merge": "fisher"}
FEW = 8  # pictures whose statistics a merge is timed with: its work does not depend on how many


def work_of(what: str) -> Callable[[], object]:
    """What is measured: a merge of the zoo, or a statistic of all its tasks on 256 pictures each."""
    if KINDS[what] == "statistic":
        return lambda: family.statistics_of.__wrapped__("zoo0", what)
    zoo = load_zoo(HERE / "zoo")
    statistics = family.statistics_of("zoo0", NEEDS.get(what, ""), FEW)
    recipe = (
        mp.Recipe(what) if KINDS[what] == "rule" else mp.Recipe("task_arithmetic", purify=(what,))
    )
    given = recipe.but(scale=1.0).keywords() | {"statistics": statistics}
    return lambda: mp.merge(zoo.base, zoo.tasks, **given)


def seconds(work: Callable[[], object]) -> float:
    """CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def once(what: str) -> dict[str, object]:
    """A row, measured in this process."""
    torch.set_num_threads(1)
    work = work_of(what)
    memory = peak(work)
    return {
        "what": what,
        "kind": KINDS[what],
        "seconds": f"{seconds(work):.3f}",
        "megabytes": f"{memory:.1f}",
    }


def apart(what: str) -> dict[str, object]:
    """A row, measured in a process of its own."""
    command = [sys.executable, __file__, "--once", what]
    found = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    row: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--once", choices=KINDS, help="print one row, measured in this process")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(once(arguments.once)))
        return
    found = [apart(what) for what in KINDS]
    part = arguments.table.with_name(arguments.table.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    os.replace(part, arguments.table)


if __name__ == "__main__":
    main()
