"""Whether stored updates of the encoder lead to the same differences between methods as full ones.

    python data/compare_packed.py data/encoder --work data/encoder/.work

Merges full and stored task vectors by four recipes, each at the scale that validation data choose, and prints
test accuracies side by side. Run it after train_encoder.py; data/README.md quotes what it found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fair_table
import verdicts
from benches import encoder_bench
from encoder_io import load_encoder
from train_encoder import kept_or_made

RECIPES = [
    fair_table.alone("task_arithmetic", "mean"),
    fair_table.behind("task_arithmetic", "pact", {}),
    fair_table.alone("tsv_m", "mean"),
    fair_table.alone("iso_c", "mean"),
]


def accuracies(tasks: dict[str, dict[str, torch.Tensor]]) -> list[float]:
    """Test accuracy in percent of each recipe."""
    bench = encoder_bench(tasks, "")
    found = []
    for recipe in RECIPES:
        behind = bench.tasks
        for name in recipe.purify:
            behind = fair_table.filtered(bench, name, {})
        row = fair_table.tested(bench, behind, fair_table.validated(bench, behind, recipe))
        found.append(100 * verdicts.accuracy(verdicts.hits(row)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the full updates")
    arguments = parser.parse_args()
    stored = load_encoder(arguments.folder).tasks
    full = {task: kept_or_made(task, arguments.work) for task in stored}
    for recipe, *pair in zip(RECIPES, accuracies(full), accuracies(stored), strict=True):
        label = "+".join([*recipe.purify, recipe.rule])
        print(f"{label:24s} full {pair[0]:6.2f}  stored {pair[1]:6.2f}  {pair[1] - pair[0]:+.2f}")


if __name__ == "__main__":
    main()
