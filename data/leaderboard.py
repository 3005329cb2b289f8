"""Measure every merging rule of minipact on one zoo, alone and behind PACT and SIFT.

    python data/leaderboard.py --zoo data/zoo --table data/leaderboard.csv

Each row merges the eight fine-tuned models once, looks for the scale on validation data, and measures test
accuracy at that scale. Rows that are in the table already are skipped, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import minipact as mp
from tasks import load, to_tensor
from zoo_io import Zoo, image_tower, load_zoo, logits

COLUMNS = ["seed", "purify", "options", "rule", "scale", "val", "test", "normalised"]
# Where the search for the scale begins: near what the rules need on their own.
START = {"task_arithmetic": 0.2, "ties": 0.6, "tsv_m": 1.0, "iso_c": 1.0, "iso_cts": 1.0}
COARSE, FINE = 1.6, 1.6 ** (1 / 3)

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """One row of the table: purifiers in order, then a rule."""

    rule: str
    purify: tuple[str, ...] = ()
    options: Options = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """The columns purify, options and rule, which name the row."""
        return "+".join(self.purify), json.dumps(self.options, sort_keys=True), self.rule


# PACT's settings by name. Ranks below 1 are shares of min(m, n), whole numbers are counts.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": {"core": 0.8, "task": 10},
    "tol 0.1": {"tol": 0.1},
    "tol 0.3": {"tol": 0.3},
    "half strength": {"strength": 0.5},
    "one core direction": {"core": 1},
    "one update direction": {"task": 1},
}
PLAIN_RULES = ("task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts")
RULES = (*PLAIN_RULES, "dare+task_arithmetic", "dare+ties")
# The search over settings runs on the zoo of seed 0 only. What its validation data chose, rule by rule:
CHOSEN = {
    "task_arithmetic": "one core direction",
    "ties": "tol 0.3",
    "tsv_m": "one update direction",
    "iso_c": "one update direction",
    "iso_cts": "one update direction",
}


def recipes(seed: int) -> list[Recipe]:
    """All rows for a zoo, the most important first."""
    found = [_recipe(rule, purify, {}) for purify in ((), ("pact",), ("sift",)) for rule in RULES]
    found += [_recipe(rule, ("pact",), SETTINGS[name]) for rule, name in CHOSEN.items()]
    found += [_recipe(rule, ("pact",), SETTINGS["released"]) for rule in RULES]
    if seed == 0:
        found += [
            _recipe(r, ("pact",), options) for r in PLAIN_RULES for options in SETTINGS.values()
        ]
    return list({recipe.key: recipe for recipe in found}.values())


def _recipe(rule: str, purify: tuple[str, ...], pact: Mapping[str, Any]) -> Recipe:
    """Purifier, rule and PACT's options; DARE comes last, so that shields are those of whole matrices."""
    *thinning, name = rule.split("+")
    return Recipe(name, (*purify, *thinning), {"pact": dict(pact)} if pact else {})


class Judge:
    """Mean accuracy over a zoo's tasks, with the pictures of both splits in memory."""

    def __init__(self, zoo: Zoo) -> None:
        self.tower: nn.Module = image_tower(zoo.info["model"])
        self.heads = zoo.heads
        self.data = {split: {t: load(t, split) for t in zoo.tasks} for split in ("val", "test")}
        self.pixels = {
            split: {t: to_tensor(images) for t, (images, _) in found.items()}
            for split, found in self.data.items()
        }

    def accuracies(self, weights: Mapping[str, Tensor], split: str) -> np.ndarray:
        """Accuracy on every task, in the zoo's order."""
        self.tower.load_state_dict({k.removeprefix("visual."): x for k, x in weights.items()})
        marks = []
        for task, pixels in self.pixels[split].items():
            best = logits(self.tower, self.heads[task], pixels).argmax(-1).numpy()
            marks.append((best == self.data[split][task][1]).mean())
        return np.array(marks)


def best_scale(score: Callable[[float], float], start: float) -> tuple[float, float]:
    """Climb from start in coarse steps until both neighbours are worse, then try two finer ones.

    Returns:
        The scale, rounded to three digits, and its score.
    """
    seen: dict[float, float] = {}

    def mark(scale: float) -> float:
        scale = float(f"{scale:.3g}")
        if scale not in seen:
            seen[scale] = score(scale)
        return seen[scale]

    step = 0
    while True:
        here = max((step, step + 1, step - 1), key=lambda i: mark(start * COARSE**i))
        if here == step:
            break
        step = here
    for factor in (1 / FINE, FINE):
        mark(start * COARSE**step * factor)
    best = max(seen, key=lambda scale: seen[scale])
    return best, seen[best]


def measure(zoo: Zoo, judge: Judge, recipe: Recipe) -> dict[str, Any]:
    """Merge once, choose the scale on validation data, measure on test data."""
    delta = mp.merged_delta(
        zoo.base, zoo.tasks, rule=recipe.rule, purify=recipe.purify, options=recipe.options
    )
    scale, val = best_scale(
        lambda a: float(judge.accuracies(delta.apply_to(zoo.base, a), "val").mean()),
        START[recipe.rule],
    )
    test = judge.accuracies(delta.apply_to(zoo.base, scale), "test")
    own = np.array([zoo.info["tasks"][task]["finetuned"] for task in zoo.tasks])
    purify, options, rule = recipe.key
    return {
        "seed": zoo.info["seed"], "purify": purify, "options": options, "rule": rule, "scale": scale,
        "val": f"{val:.4f}", "test": f"{test.mean():.4f}", "normalised": f"{(test / own).mean():.4f}",
    }  # fmt: skip


def read(table: Path) -> list[dict[str, str]]:
    """Rows of the table; none if there is no table yet."""
    return list(csv.DictReader(table.read_text().splitlines())) if table.is_file() else []


def write(table: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table in one step, so that an interruption leaves the old one or the new one."""
    part = table.with_name(table.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, table)


def fill(zoo: Zoo, table: Path, wanted: Iterable[Recipe]) -> int:
    """Measure what the table lacks for this zoo; returns the number of new rows."""
    seed, judge, new = str(zoo.info["seed"]), Judge(zoo), 0
    there = {(r["seed"], r["purify"], r["options"], r["rule"]) for r in read(table)}
    missing = [recipe for recipe in wanted if (seed, *recipe.key) not in there]
    for recipe in tqdm(missing, desc=f"zoo {seed}", unit="row"):
        write(table, [*read(table), measure(zoo, judge, recipe)])
        new += 1
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder made by train_zoo.py")
    parser.add_argument("--table", type=Path, required=True, help="CSV file to add rows to")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    zoo = load_zoo(arguments.zoo)
    new = fill(zoo, arguments.table, recipes(zoo.info["seed"]))
    print(f"{new} new rows in {arguments.table}")


if __name__ == "__main__":
    main()
