"""Measure every rule alone and behind every filter, on the zoos and on the encoder, with all else held fixed.

    python data/fair_table.py --model zoo0 --stage settings
    python data/fair_table.py --model zoo1 --stage final
    python data/fair_table.py --model encoder_unseen --stage unseen

Stage "settings" looks at validation data only, for all settings of all filters. Stage "final" measures test
data, once per row, with the settings that validation data of the other kind of model chose. Stage "unseen"
judges our own filter, as it was frozen, on what its search never saw. Rows that are there are skipped, so an
interrupted run goes on. Results are lines of JSON in data/fair, read by verdicts.py.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import controls  # noqa: F401  enters the controls into the registry
import minipact as mp
from benches import Bench, Hits, State, mean_accuracy, open_bench
from minipact.methods import named_generator
from rows import FOLDER, path_of, read, write

KINDS = {"zoo0": "zoo", "zoo1": "zoo", "zoo2": "zoo", "encoder": "encoder"}
UNSEEN = ("zoo1", "zoo2", "zoo3", "encoder_unseen")  # no part of the search for our own filter
SEARCHED = ("zoo0", "encoder")  # models on which all settings are tried, on validation data
RULES = ("task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "wudi", "ace")
JURY = RULES[:4]  # a filter's setting is the one with the best mean over these
# Settings of each filter, four for every one; controls take PACT's and are of PACT's size. Our own was frozen
# with one setting before the table was measured.
PACT: list[dict[str, Any]] = [{}, {"tol": 0.1}, {"tol": 0.3}, {"task": 1}]
FILTERS: dict[str, list[dict[str, Any]]] = {
    "pact": PACT,
    "sift": [{"core": share} for share in (0.02, 0.05, 0.1, 0.2)],
    "random_shield": PACT,
    "updates_shield": PACT,
    "shrinking": PACT,
    "wiener": [{}],
}
# Lengths of the merged update over all matrices, in units of the task vectors' mean length: one grid for all.
LENGTHS = [0.5 * 1.5**step for step in range(8)]
START = 4


# ---- Task vectors behind a filter ----------------------------------------------------------------


@dataclass(frozen=True)
class Filtered(Mapping[str, Tensor]):
    """A fine-tuned model that knows its task vector: what a filter left of it."""

    base: State
    changes: State

    def delta(self, name: str) -> Tensor:
        return self.changes[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.base[name] + self.changes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def matrices(bench: Bench) -> dict[str, bool]:
    """Names of the tensors that filters treat, and whether these see them transposed."""
    steps = mp.Merged(bench.base, bench.tasks, rule="tsv_m").steps.values()
    return {s.name: s.kind == "matrix_T" for s in steps if s.kind.startswith("matrix")}


def filtered(bench: Bench, name: str, options: Mapping[str, Any]) -> dict[str, State]:
    """The tasks of a bench behind one filter, computed once for all rules."""
    transposed = matrices(bench)
    changes: dict[str, dict[str, Tensor]] = {task: {} for task in bench.tasks}
    for tensor, origin in bench.base.items():
        D = torch.stack([weights[tensor] - origin for weights in bench.tasks.values()])
        if tensor in transposed and D.any():
            turn = transposed[tensor]
            W0, D = (origin.mT, D.mT) if turn else (origin, D)
            D = cleaned(W0, D, mp.METHODS[name], tensor, options)
            D = D.mT if turn else D
        for task, d in zip(changes, D, strict=True):
            changes[task][tensor] = d
    return {task: Filtered(bench.base, found) for task, found in changes.items()}


def cleaned(
    W0: Tensor, D: Tensor, method: mp.Method, tensor: str, options: Mapping[str, Any]
) -> Tensor:
    """D behind a purifier, as the engine would call it."""
    inputs = [W0, D] if "base" in method.needs else [D]
    keywords = dict(options)
    if "generator" in method.needs:
        keywords["generator"] = named_generator(0, tensor)
    found: Tensor = method.function(*inputs, **keywords)
    return found


# ---- Rows ----------------------------------------------------------------------------------------


def alone(rule: str, vectors: str) -> mp.Recipe:
    """A rule without a filter."""
    return mp.Recipe(rule, vectors=vectors)


def behind(rule: str, name: str, options: Mapping[str, Any]) -> mp.Recipe:
    """A rule behind a filter; what no filter treats is the plain mean, at any scale."""
    return mp.Recipe(rule, (name,), {name: dict(options)} if options else {}, vectors="mean")


def settings_rows() -> list[mp.Recipe]:
    """All rows whose validation accuracy decides something."""
    found = [alone(rule, vectors) for rule in RULES for vectors in ("mean", "rule")]
    for name, settings in FILTERS.items():
        found += [behind(rule, name, options) for options in settings for rule in JURY]
    return found


def unseen_rows() -> list[mp.Recipe]:
    """Every rule alone and behind our own filter as it was frozen, and behind the filter's control."""
    found = [alone(rule, vectors) for rule in RULES for vectors in ("mean", "rule")]
    found += [behind(rule, "wiener", {}) for rule in RULES]
    return found + [behind(rule, "rotated_wiener", {}) for rule in JURY]


def key(recipe: mp.Recipe) -> str:
    """What names a row among those of a model."""
    options = {name: dict(options) for name, options in recipe.options.items()}
    return json.dumps([list(recipe.purify), options, recipe.rule, recipe.vectors], sort_keys=True)


def row_key(row: Mapping[str, Any]) -> str:
    """`key` of a row that was written."""
    fields = [row["purify"], row["options"], row["rule"], row["vectors"]]
    return json.dumps(fields, sort_keys=True)


def length(merged: mp.Merged, bench: Bench) -> float:
    """Norm of a merged update over all matrices, in units of the mean norm of the task vectors."""
    names = matrices(bench)
    tasks = [[w[name] - bench.base[name] for name in names] for w in bench.tasks.values()]
    own = float(np.mean([norm(changes) for changes in tasks]))
    return norm([x for name in names if (x := merged.delta(name)) is not None]) / own


def kept_energy(bench: Bench, tasks: Mapping[str, State]) -> float:
    """Share of the energy of a task's matrices that a filter left, mean over tasks."""
    names = list(matrices(bench))

    def energy(weights: State) -> float:
        return norm([weights[name] - bench.base[name] for name in names]) ** 2

    return float(np.mean([energy(tasks[t]) / energy(bench.tasks[t]) for t in bench.tasks]))


def norm(tensors: list[Tensor]) -> float:
    """Frobenius norm of several tensors together."""
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def climb(value: Callable[[int], float], count: int, start: int) -> int:
    """The point of a grid from which no neighbour is better, going uphill from the start."""
    place = start
    for step in (1, -1):
        while 0 <= place + step < count and value(place + step) > value(place):
            place += step
    return place


def tuned(bench: Bench, merged: mp.Merged) -> dict[str, Any]:
    """The scale that validation data choose on the grid, and the accuracies on the way to it."""
    unit = length(merged.at(1.0), bench)
    scales = [float(f"{x / unit:.4g}") for x in LENGTHS]
    curve: dict[int, float] = {}

    def value(point: int) -> float:
        if point not in curve:
            swept = mp.sweep(merged, lambda m: mean_accuracy(bench.hits(m, "val")), [scales[point]])
            curve[point] = swept.scores[scales[point]]
        return curve[point]

    best = climb(value, len(LENGTHS), START)
    return {
        "scale": scales[best],
        "length": round(LENGTHS[best], 3),
        "val": round(curve[best], 5),
        "curve": {f"{LENGTHS[i]:.3f}": round(curve[i], 5) for i in sorted(curve)},
    }


def labelled(bench: Bench, recipe: mp.Recipe) -> dict[str, Any]:
    """What a row is of."""
    return {
        "model": bench.name,
        "digest": bench.digest[:16],
        "purify": list(recipe.purify),
        "options": {name: dict(options) for name, options in recipe.options.items()},
        "rule": recipe.rule,
        "vectors": recipe.vectors,
    }


def validated(bench: Bench, tasks: Mapping[str, State], recipe: mp.Recipe) -> dict[str, Any]:
    """A row without test data: recipe, scale, and what the filter left."""
    merged = mp.Merged(bench.base, tasks, rule=recipe.rule, vectors=recipe.vectors, scale=1.0)
    kept = round(kept_energy(bench, tasks), 4)
    return {**labelled(bench, recipe), **tuned(bench, merged), "kept": kept}


def tested(bench: Bench, tasks: Mapping[str, State], row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the test examples that come out right at its scale, as packed bits."""
    merged = mp.Merged(
        bench.base, tasks, rule=row["rule"], vectors=row["vectors"], scale=row["scale"]
    )
    return {**row, "hits": packed(bench.hits(merged, "test"))}


def packed(hits: Hits) -> dict[str, str]:
    """Booleans as base64 of packed bits."""
    return {task: base64.b64encode(np.packbits(x).tobytes()).decode() for task, x in hits.items()}


# ---- Files ---------------------------------------------------------------------------------------


def by_filter(recipes: Iterable[mp.Recipe]) -> Iterator[tuple[mp.Recipe, list[mp.Recipe]]]:
    """Recipes that share purifier and options, so that tasks are filtered once for them."""
    groups: dict[str, list[mp.Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(json.dumps([recipe.purify, recipe.options]), []).append(recipe)
    return ((group[0], group) for group in groups.values())


def fill(bench: Bench, path: Path, wanted: Sequence[mp.Recipe], test: bool) -> None:
    """Measure what the file lacks: scales on validation data, and test data where `test` says so."""
    there = {row_key(row): row for row in read(path) if row["digest"] == bench.digest[:16]}
    missing = [r for r in wanted if key(r) not in there or (test and "hits" not in there[key(r)])]
    with tqdm(total=len(missing), desc=bench.name, unit="row") as bar:
        for first, group in by_filter(missing):
            tasks: Mapping[str, State] = bench.tasks
            for name in first.purify:
                tasks = filtered(bench, name, first.options.get(name, {}))
            for recipe in group:
                row = there.get(key(recipe)) or validated(bench, tasks, recipe)
                there[key(recipe)] = tested(bench, tasks, row) if test else row
                write(path, there.values())
                bar.update()


# ---- What is wanted ------------------------------------------------------------------------------


def wanted_rows(name: str, stage: str) -> list[mp.Recipe]:
    """Recipes of a stage for a model; the final ones need the other kind's settings."""
    if stage == "settings":
        return settings_rows()
    if stage == "unseen":
        return unseen_rows()
    others = [n for n in SEARCHED if KINDS[n] != KINDS[name]]
    rows = [row for other in others for row in read(path_of(other, FOLDER))]
    found = [alone(rule, vectors) for rule in RULES for vectors in ("mean", "rule")]
    for filter_name in FILTERS:
        options = chosen(rows, filter_name)
        found += [behind(rule, filter_name, options) for rule in RULES]
    return found


def chosen(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The setting of a filter with the best mean validation accuracy, over the jury and the given rows."""
    value: dict[str, list[float]] = {}
    for row in rows:
        value.setdefault(row_key(row), []).append(row["val"])

    def mark(options: dict[str, Any]) -> float:
        keys = [key(behind(rule, name, options)) for rule in JURY]
        if lacking := [k for k in keys if k not in value]:
            raise SystemExit(f"run --stage settings first: {lacking[0]} is not measured yet")
        return float(np.mean([value[k] for k in keys]))

    return max(FILTERS[name], key=mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, choices=dict.fromkeys((*KINDS, *UNSEEN)))
    parser.add_argument("--stage", required=True, choices=("settings", "final", "unseen"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=1, help="for torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = wanted_rows(arguments.model, arguments.stage)
    path = path_of(arguments.model, arguments.out)
    fill(open_bench(arguments.model), path, wanted, arguments.stage != "settings")


if __name__ == "__main__":
    main()
