"""Measure every merging rule of minipact on one zoo, alone and behind PACT and SIFT.

    python data/leaderboard.py --zoo data/zoo --table data/leaderboard.csv

Each row merges the eight fine-tuned models once, looks for the scale on validation data, and measures test
accuracy at that scale. Rows that are in the table already are skipped, so an interrupted run goes on.
Vectors (biases, norms, ...) are scaled along with matrices in most rows, vectors="rule" as published.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import minipact as mp
from zoo_io import Judge, Zoo, load_zoo

KEY = ["purify", "options", "rule", "vectors"]
COLUMNS = ["seed", *KEY, "scale", "val", "test", "normalised"]
# Where the search for the scale begins: near what the rules need on their own.
START = {"task_arithmetic": 0.2, "ties": 0.6, "tsv_m": 1.0, "iso_c": 1.0, "iso_cts": 1.0}
COARSE, FINE = 1.6, 1 / 3  # factor of a step of the search, and its part in the end

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


def recipes(seed: int) -> list[mp.Recipe]:
    """All rows for a zoo, the most important first."""
    found = [recipe(rule, purify) for purify in ((), ("pact",), ("sift",)) for rule in RULES]
    found += [recipe(rule, ("pact",), SETTINGS[name]) for rule, name in CHOSEN.items()]
    found += [recipe(rule, ("pact",), SETTINGS["released"]) for rule in RULES]
    if seed == 0:
        searched = [(rule, options) for rule in PLAIN_RULES for options in SETTINGS.values()]
        found += [recipe(rule, ("pact",), options) for rule, options in searched]
        found += with_mean_vectors()
    return list({key(row): row for row in found}.values())


def with_mean_vectors() -> list[mp.Recipe]:
    """Rows whose vectors are the plain mean of the task vectors, whatever the scale of the matrices."""
    found = []
    for rule in ("task_arithmetic", "ties", "tsv_m", "iso_c"):
        found.append(recipe(rule, vectors="mean"))
        found.append(recipe(rule, ("pact",), vectors="mean"))
        found.append(recipe(rule, ("pact",), SETTINGS["tol 0.1"], vectors="mean"))
    return found


def recipe(
    rule: str,
    purify: tuple[str, ...] = (),
    pact: Mapping[str, Any] | None = None,
    vectors: str = "rule",
) -> mp.Recipe:
    """Purifiers, rule and PACT's options; DARE comes last, so that shields are those of whole matrices."""
    *thinning, name = rule.split("+")
    options = {"pact": pact} if pact else {}
    return mp.Recipe(name, (*purify, *thinning), options, vectors=vectors)


def key(row: mp.Recipe) -> tuple[str, str, str, str]:
    """What the columns of KEY say of a recipe, which name its row."""
    options = json.dumps(row.options, sort_keys=True)
    return "+".join(row.purify), options, row.rule, row.vectors


def best_scale(
    merged: mp.Merged, score: Callable[[mp.Merged], float], start: float
) -> tuple[float, float]:
    """Climb from start in coarse steps until both neighbours are worse, then try two finer ones.

    Returns:
        The scale, rounded to three digits, and its score.
    """
    scores: dict[float, float] = {}

    def mark(steps: float) -> float:
        scale = float(f"{start * COARSE**steps:.3g}")
        if scale not in scores:
            scores.update(mp.sweep(merged, score, [scale]).scores)
        return scores[scale]

    step = 0
    while True:
        better = max((step, step + 1, step - 1), key=mark)
        if better == step:
            break
        step = better
    for finer in (step - FINE, step + FINE):
        mark(finer)
    best = max(scores, key=lambda scale: scores[scale])
    return best, scores[best]


def measure(zoo: Zoo, judge: Judge, row: mp.Recipe) -> dict[str, Any]:
    """Merge once, choose the scale on validation data, measure on test data."""

    def accuracies(weights: mp.Merged, split: str) -> np.ndarray:
        return np.array(list(judge.accuracies(weights, split).values()))

    merged = mp.Merged(zoo.base, zoo.tasks, **row.keywords())
    scale, val = best_scale(merged, lambda x: accuracies(x, "val").mean(), START[row.rule])
    test = accuracies(merged.at(scale), "test")
    own = np.array([zoo.info["tasks"][task]["finetuned"] for task in zoo.tasks])
    return {
        "seed": zoo.info["seed"], **dict(zip(KEY, key(row), strict=True)), "scale": scale,
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


def fill(zoo: Zoo, judge: Judge, table: Path, wanted: Iterable[mp.Recipe]) -> int:
    """Measure what the table lacks for this zoo; returns the number of new rows."""
    seed, new = str(zoo.info["seed"]), 0
    there = {tuple(row[column] for column in ("seed", *KEY)) for row in read(table)}
    missing = [row for row in wanted if (seed, *key(row)) not in there]
    for row in tqdm(missing, desc=f"zoo {seed}", unit="row"):
        write(table, [*read(table), measure(zoo, judge, row)])
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
    judge = Judge(zoo.info["model"], zoo.heads)
    new = fill(zoo, judge, arguments.table, recipes(zoo.info["seed"]))
    print(f"{new} new rows in {arguments.table}")


if __name__ == "__main__":
    main()
