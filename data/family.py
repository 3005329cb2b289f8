"""The newer relatives beside the fair table: more rules, more purifiers, fewer tasks, each with its defaults.

    python data/family.py --part zoo0       rules and purifiers on a zoo, with test data; also zoo1, zoo2
    python data/family.py --part encoder    the ten best recipes by the zoos' validation data, on the encoder
    python data/family.py --part counts     six recipes on the first 2, 4 and 6 tasks of zoo 0
    python data/family.py --part table      print the best rows, for data/README.md

Vectors, scales and choices are those of the fair table, whose rows are not measured again; PACT and SIFT have
the settings that it chose on the other kind of model. Statistics are of training examples. Rows that are
there are skipped. They are lines of JSON in data/fair/family_*.jsonl.gz, with what a method was told of data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import fair_table
import minipact as mp
import verdicts
from benches import HERE, Bench, open_bench
from rows import FOLDER, path_of, read, write
from tasks import load, to_tensor
from zoo_io import Zoo, image_tower, load_zoo

Row = dict[str, Any]
Name = tuple[str, str, str]  # purifier, rule, and what the method was told of data
State = Mapping[str, Tensor]
States = dict[str, dict[str, State]]  # kind -> task -> statistic

ZOOS = ("zoo0", "zoo1", "zoo2")
# Fisher information enters twice: as it is, and with one length for every task, as its authors' code has it.
NEW_RULES = (
    ("consensus", ""),
    ("swudi", ""),
    ("knots", ""),
    ("regmean", "covariance"),
    ("fisher_merge", "fisher"),
    ("fisher_merge", "equal fisher"),
)
NEW_PURIFIERS = (
    ("awd", ""),
    ("pave", "covariance"),
    ("tatr", "gradient"),
    ("tatr", ""),
    ("dare", ""),
)
BEHIND = ("pact", "wiener")  # what new rules are measured behind
BEFORE = ("task_arithmetic", "tsv_m")  # what new purifiers are measured before
COUNTS = (2, 4, 6)  # of tasks, the first ones
COUNTED = (  # picked before they were measured
    ("", "task_arithmetic"),
    ("", "ties"),
    ("", "tsv_m"),
    ("", "wudi"),
    ("pact", "task_arithmetic"),
    ("wiener", "task_arithmetic"),
)
CONTROLS = ("random_shield", "updates_shield", "shrinking", "rotated_wiener")
LABELS = verdicts.LABELS | {
    "consensus": "Consensus TA",
    "swudi": "SWUDI",
    "knots": "KnOTS",
    "regmean": "RegMean",
    "fisher_merge": "Fisher merging",
    "awd": "AWD",
    "pave": "PAVE",
    "tatr": "TATR",
    "dare": "DARE",
}


@dataclass(frozen=True)
class Entry:
    """A recipe, and what it is told of data: a key of MEASURES, "equal fisher", or nothing."""

    recipe: mp.Recipe
    data: str = ""


# ---- Statistics of models on training data -------------------------------------------------------


class Classifier(nn.Module):
    """Images [N, 3, 32, 32] to the logits [N, C] that a zoo's tower was trained with."""

    def __init__(self, zoo: Zoo, task: str, weights: State) -> None:
        super().__init__()
        self.visual = image_tower(zoo.info["model"], dict(weights))
        self.register_buffer("head", zoo.heads[task])
        self.scale = zoo.info["logit_scale"]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * normalize(self.visual(x), dim=-1) @ self.head.mT
        return logits


def training_pictures(zoo: Zoo, task: str, count: int) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 32, 32] of the training split, from the zoo's own seed, and their labels."""
    images, labels = load(task, "train", count, zoo.info["seed"])
    return to_tensor(images), torch.from_numpy(labels)


def covariances(zoo: Zoo, task: str, count: int) -> State:
    """Of the inputs of the fine-tuned model's layers, on pictures without labels."""
    model, (x, _) = Classifier(zoo, task, zoo.tasks[task]), training_pictures(zoo, task, count)
    return mp.input_covariances(model, [x])


def fisher(zoo: Zoo, task: str, count: int) -> State:
    """Of the fine-tuned model; its own answers stand for labels."""
    model, (x, _) = Classifier(zoo, task, zoo.tasks[task]), training_pictures(zoo, task, count)
    return mp.fisher(model, [x], generator=torch.Generator().manual_seed(0))


def gradients(zoo: Zoo, task: str, count: int) -> State:
    """Of the base on pictures with their labels; half of the pictures, 128 as published."""
    model = Classifier(zoo, task, zoo.base)
    return mp.gradient_magnitudes(model, [training_pictures(zoo, task, count // 2)])


MEASURES: dict[str, Callable[[Zoo, str, int], State]] = {
    "covariance": covariances,
    "fisher": fisher,
    "gradient": gradients,
}


@cache
def statistics_of(name: str, data: str, count: int = 256) -> States:
    """What the methods of a row are told of data, for each task of a model."""
    if not data:
        return {}
    if name == "encoder":
        return {data: encoder_covariances(count)}
    if data == "equal fisher":
        found = statistics_of(name, "fisher", count)["fisher"]
        return {"fisher": {task: of_norm_one(state) for task, state in found.items()}}
    zoo = load_zoo(HERE / ("zoo" if name == "zoo0" else name))
    return {data: {task: MEASURES[data](zoo, task, count) for task in zoo.tasks}}


def encoder_covariances(count: int) -> dict[str, State]:
    """Of the inputs of the encoder's layers, on training texts of each task without labels."""
    import encoder_io  # needs what the extra `encoder` installs

    encoder, found = encoder_io.Encoder(), {}
    for task, weights in encoder_io.load_encoder(HERE / "encoder").tasks.items():
        encoder.load(weights)
        by_length: dict[int, list[Tensor]] = {}
        for tokens in encoder_io.labelled(task, "train")[0][:count]:
            by_length.setdefault(len(tokens), []).append(tokens)
        batches = [torch.stack(rows) for rows in by_length.values()]  # so that nothing is padded
        found[task] = mp.input_covariances(encoder.bert, batches)
    return found


def of_norm_one(state: State) -> State:
    """Fisher information over its norm, so that no task outweighs the others by being unsure."""
    size = fair_table.norm(list(state.values()))
    return {name: x / size for name, x in state.items()}


# ---- Rows ----------------------------------------------------------------------------------------


def key(entry: Entry) -> str:
    """What names a row among those of a model."""
    return f"{fair_table.key(entry.recipe)} {entry.data}"


def row_key(row: Mapping[str, Any]) -> str:
    """`key` of a row that was written."""
    return f"{fair_table.row_key(row)} {row['data']}"


def measured(bench: Bench, tasks: Mapping[str, State], entry: Entry, statistics: States) -> Row:
    """A row: scale by validation data, and which test examples come out right at it.

    Tasks are behind those purifiers already that the fair table has too.
    """
    here = entry.recipe.but(scale=1.0)
    if here.purify and here.purify[0] in fair_table.FILTERS:
        here = here.but(purify=(), options={})
    merged = mp.Merged(bench.base, tasks, **here.keywords() | {"statistics": statistics})
    row = fair_table.labelled(bench, entry.recipe) | {"data": entry.data}
    row |= fair_table.tuned(bench, merged)
    return row | {"hits": fair_table.packed(bench.hits(merged.at(row["scale"]), "test"))}


def fill(
    bench: Bench, path: Path, wanted: Sequence[Entry], statistics: Callable[[str], States]
) -> None:
    """Measure what the file lacks."""
    there = {row_key(row): row for row in read(path) if row["digest"] == bench.digest[:16]}
    missing = [entry for entry in wanted if key(entry) not in there]
    known: dict[str, Mapping[str, State]] = {"": bench.tasks}
    for entry in tqdm(missing, desc=bench.name, unit="row"):
        name = next((p for p in entry.recipe.purify if p in fair_table.FILTERS), "")
        if name not in known:
            known[name] = fair_table.filtered(bench, name, entry.recipe.options.get(name, {}))
        there[key(entry)] = measured(bench, known[name], entry, statistics(entry.data))
        write(path, there.values())


def setting(model: str, name: str) -> dict[str, Any]:
    """Options that the fair table has for a filter on a model."""
    rows = [row for row in verdicts.load(model) if row["purify"] == [name]]
    return dict(rows[-1]["options"].get(name, {})) if rows else {}


def entries(purifier: str, rule: str, data: str, options: Mapping[str, Any]) -> list[Entry]:
    """A rule behind a purifier; alone with both treatments of vectors, of which validation data choose."""
    if purifier:
        return [Entry(fair_table.behind(rule, purifier, options), data)]
    return [Entry(fair_table.alone(rule, vectors), data) for vectors in ("mean", "rule")]


def zoo_entries(model: str) -> list[Entry]:
    """New rules alone and behind two filters, and new purifiers before two rules."""
    found = []
    for rule, data in NEW_RULES:
        for purifier in ("", *BEHIND):
            found += entries(purifier, rule, data, setting(model, purifier))
    for purifier, data in NEW_PURIFIERS:
        for rule in BEFORE:
            found += entries(purifier, rule, data, {})
    return found


def counted_entries() -> list[Entry]:
    """The recipes that are followed over the number of tasks."""
    return [
        entry
        for purifier, rule in COUNTED
        for entry in entries(purifier, rule, "", setting("zoo0", purifier))
    ]


# ---- Reading -------------------------------------------------------------------------------------


def name_of(row: Mapping[str, Any]) -> Name:
    """Purifier, rule, and data of a row; options do not count."""
    return "+".join(row["purify"]), row["rule"], row.get("data", "")


def label(name: Name) -> str:
    """A recipe in words."""
    purifier, rule, data = name
    words = f"{LABELS[purifier]} > {LABELS[rule]}" if purifier else LABELS[rule]
    if data == "equal fisher":
        return f"{words}, equal norms"
    return f"{words}, gradients" if data == "gradient" else words


def best(rows: Iterable[Row]) -> dict[Name, Row]:
    """One row for each recipe: of two treatments of vectors the one that validation data prefer."""
    found: dict[Name, Row] = {}
    for row in rows:
        name = name_of(row)
        if name not in found or row["val"] > found[name]["val"]:
            found[name] = row
    return found


@cache
def table(model: str, folder: Path = FOLDER) -> dict[Name, Row]:
    """All rows of a model that have test data, of the fair table and of this program, without controls."""
    rows = verdicts.load(model, folder) + read(path_of(f"family_{model}", folder))
    return {name: row for name, row in best(rows).items() if name[0] not in CONTROLS}


def ranking(folder: Path = FOLDER) -> list[tuple[Name, float]]:
    """Recipes by their mean validation accuracy on the zoos, best first."""
    tables = [table(model, folder) for model in ZOOS]
    shared = [name for name in tables[0] if all(name in found for found in tables)]
    values = {name: float(np.mean([found[name]["val"] for found in tables])) for name in shared}
    return sorted(values.items(), key=lambda pair: -pair[1])


def counts(folder: Path = FOLDER) -> dict[int, dict[Name, Row]]:
    """Rows of the recipes followed over the number of tasks of zoo 0: 2, 4, 6 and all 8."""
    found = {count: best(read(path_of(f"family_{count}_tasks", folder))) for count in COUNTS}
    whole = table("zoo0", folder)
    return found | {8: {(*pair, ""): whole[(*pair, "")] for pair in COUNTED}}


def accuracy(models: Sequence[str], name: Name, folder: Path = FOLDER) -> float:
    """Test accuracy of a recipe in percent, mean over models."""
    found = [verdicts.accuracy(verdicts.hits(table(model, folder)[name])) for model in models]
    return 100 * float(np.mean(found))


def lead(models: Sequence[str], name: Name, over: Name, folder: Path = FOLDER) -> verdicts.Gain:
    """How far a recipe is ahead of another, over the same examples."""
    pairs = [[verdicts.hits(table(model, folder)[x]) for model in models] for x in (name, over)]
    return verdicts.gain(*pairs)


def markdown(folder: Path = FOLDER) -> str:
    """The ten recipes that lead on the zoos' validation data, with their test accuracies."""
    lines = ["| recipe | zoos, validation | zoos, test | encoder, test |", "|---|---|---|---|"]
    for name, val in ranking(folder)[:10]:
        there = name in table("encoder", folder)
        other = f"{accuracy(['encoder'], name, folder):.1f}" if there else ""
        tests = accuracy(ZOOS, name, folder)
        lines.append(f"| {label(name)} | {100 * val:.1f} | {tests:.1f} | {other} |")
    return "\n".join(lines)


# ---- Parts ---------------------------------------------------------------------------------------


def measure_zoo(model: str, folder: Path) -> None:
    path = path_of(f"family_{model}", folder)
    fill(open_bench(model), path, zoo_entries(model), partial(statistics_of, model))


def measure_counts(folder: Path) -> None:
    bench = open_bench("zoo0")
    for count in COUNTS:
        few = bench.only(list(bench.tasks)[:count], f"zoo0_{count}_tasks")
        path = path_of(f"family_{count}_tasks", folder)
        fill(few, path, counted_entries(), lambda data: {})


def measure_encoder(folder: Path) -> None:
    """What the ten best recipes lack, and their rules alone."""
    wanted: list[Entry] = []
    leaders = [name for name, _ in ranking(folder)[:10]]
    for name in dict.fromkeys([*leaders, *(("", *name[1:]) for name in leaders)]):
        if name not in table("encoder", folder):
            wanted += entries(*name, setting("encoder", name[0]))
    path = path_of("family_encoder", folder)
    fill(open_bench("encoder"), path, wanted, partial(statistics_of, "encoder"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", required=True, choices=(*ZOOS, "counts", "encoder", "table"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=1, help="for torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part == "table":
        print(markdown(arguments.out))
    elif arguments.part == "counts":
        measure_counts(arguments.out)
    elif arguments.part == "encoder":
        measure_encoder(arguments.out)
    else:
        measure_zoo(arguments.part, arguments.out)


if __name__ == "__main__":
    main()
