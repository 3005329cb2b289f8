"""The family beside the fair table: defaults only, statistics of training data, resuming, reading, costs."""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import costs
import fair_table
import family
import minipact as mp
import verdicts
from benches import Bench, Hits, digest_of, open_bench
from family import Entry
from helpers import ROOT, data_of, flat, normal, single, small_model
from minipact.methods import is_built_in
from peak_memory import peak
from rows import path_of, read, write

BASE = small_model(0)
TASKS = {f"task{t}": small_model(100 * t, BASE) for t in (1, 2, 3)}
MODELS = [*family.ZOOS, "encoder"]


class Judged:
    """Right answers are the more, the nearer weights are to the mean of the tasks; notes what it judged."""

    def __init__(self) -> None:
        self.target, self.calls = flat(mp.merge(BASE, TASKS, scale=1 / 3)), []

    def __call__(self, weights: Mapping[str, Tensor], split: str, only: Iterable[str]) -> Hits:
        self.calls.append(split)
        off = float((flat(weights) - self.target).norm() / (flat(BASE) - self.target).norm())
        return {t: np.arange(verdicts.TESTS) < 450 * np.exp(-off) for t in only}


@pytest.fixture
def bench() -> Bench:
    return Bench("zoo0", "zoo", "abc", BASE, TASKS, Judged())


def statistics(data: str) -> family.States:
    """Random ones for the small models."""
    if not data:
        return {}
    if data == "gradient":
        floats = {name: x for name, x in BASE.items() if x.is_floating_point()}
        states = [{n: single(*x.shape, seed=t).abs() for n, x in floats.items()} for t in range(3)]
        return {"gradient": dict(zip(TASKS, states, strict=True))}
    method = {"covariance": "regmean"}.get(data, "fisher_merge")
    found = data_of(method, BASE, 3)["statistics"]
    return {kind: dict(zip(TASKS, states, strict=True)) for kind, states in found.items()}


def merging_methods() -> set[str]:
    """Rules and purifiers of the package, without those that tests and controls have registered."""
    kinds = ("rule", "purifier")
    return {name for name, m in mp.METHODS.items() if m.kind in kinds and is_built_in(m)}


# ---- What is wanted ------------------------------------------------------------------------------


def test_every_method_of_the_registry_is_on_the_table():
    assert merging_methods() == {x for name in family.table("zoo0") for x in name[:2] if x}


@pytest.mark.parametrize("model", family.ZOOS)
def test_all_is_at_its_defaults_but_what_the_fair_table_set(model: str):
    wanted = family.zoo_entries(model)
    assert len({family.key(entry) for entry in wanted}) == len(wanted) == 6 * (2 + 2) + 5 * 2
    for entry in wanted:
        options = {k: x for k, x in entry.recipe.options.items() if k != "pact"}
        assert not any(options.values())
        assert entry.recipe.vectors == "mean" or not entry.recipe.purify
        if entry.recipe.purify == ("pact",):
            fair = verdicts.behind(verdicts.load(model), "ties", "pact")
            assert fair["options"] == dict(entry.recipe.options)


def test_counts_are_of_the_recipes_picked_beforehand():
    names = {(*entry.recipe.purify, entry.recipe.rule) for entry in family.counted_entries()}
    alone = {(x,) for x in ("task_arithmetic", "ties", "tsv_m", "wudi")}
    behind = {("pact", "task_arithmetic"), ("wiener", "task_arithmetic")}
    assert names == alone | behind


# ---- Measuring -----------------------------------------------------------------------------------


def some_entries() -> list[Entry]:
    """One of each kind: behind a filter of the fair table, with each statistic, and the same without."""
    return [
        Entry(fair_table.behind("knots", "wiener", {})),
        Entry(fair_table.behind("regmean", "pact", {"task": 1}), "covariance"),
        Entry(fair_table.alone("fisher_merge", "rule"), "fisher"),
        Entry(fair_table.alone("fisher_merge", "rule"), "equal fisher"),
        Entry(fair_table.behind("tsv_m", "tatr", {}), "gradient"),
        Entry(fair_table.behind("tsv_m", "tatr", {})),
    ]


def test_rows_are_those_of_the_recipe_and_are_measured_once(bench: Bench, tmp_path: Path):
    path, wanted = path_of("family_zoo0", tmp_path), some_entries()
    family.fill(bench, path, wanted[:2], statistics)
    family.fill(bench, path, wanted, statistics)
    assert [family.row_key(row) for row in read(path)] == [family.key(entry) for entry in wanted]
    assert bench.judge.calls.count("test") == len(wanted)
    for entry, row in zip(wanted, read(path), strict=True):
        given = entry.recipe.but(scale=row["scale"]).keywords()
        merged = mp.merge(BASE, TASKS, **given | {"statistics": statistics(entry.data)})
        found = bench.hits(merged, "test")
        assert all(np.array_equal(found[task], x) for task, x in verdicts.hits(row).items())
        assert row["val"] == max(row["curve"].values())
    assert len({row["scale"] for row in read(path)}) > 3


@pytest.mark.slow
def test_statistics_are_of_the_zoos_own_layers():
    zoo = family.load_zoo(ROOT / "data" / "zoo")
    found = family.statistics_of("zoo0", "covariance", 2)["covariance"]
    assert list(found) == list(zoo.tasks)
    name = "visual.transformer.resblocks.3.mlp.c_fc.weight"
    assert found["digits"][name].shape == (128, 128)
    assert {name for state in found.values() for name in state} < set(zoo.base)
    assert family.statistics_of("zoo0", "") == {}


def test_fisher_information_of_norm_one():
    state = {"a": normal(4, 3).square(), "b": normal(5, seed=1).square()}
    found = family.of_norm_one(state)
    assert torch.cat([x.flatten() for x in found.values()]).norm() == pytest.approx(1)
    ratio = found["a"] / state["a"]
    assert torch.allclose(ratio, ratio[0, 0].expand(4, 3))


@pytest.mark.slow
def test_training_pictures_are_of_no_other_split():
    zoo = family.load_zoo(ROOT / "data" / "zoo")
    for task in ("digits", "shapes"):
        pixels, _ = family.training_pictures(zoo, task, 8)
        for split in ("val", "test"):
            images, _ = family.load(task, split)
            others = family.to_tensor(images).flatten(1)
            assert torch.cdist(pixels.flatten(1), others).min() > 0.1


# ---- Reading -------------------------------------------------------------------------------------


def recorded(purify: list[str], rule: str, val: float, right: int, **more: object) -> family.Row:
    bits = {f"task{i}": np.arange(verdicts.TESTS) < right + i for i in range(8)}
    row = {"purify": purify, "options": {}, "rule": rule, "vectors": "mean", "digest": "abc"}
    return row | {"val": val, "hits": fair_table.packed(bits)} | more


def test_the_table_joins_both_files_without_controls(tmp_path: Path):
    fair = [
        recorded([], "ties", 0.6, 300),
        recorded([], "ties", 0.7, 350, vectors="rule"),
        recorded(["shrinking"], "ties", 0.9, 400),
    ]
    new = [
        recorded(["tatr"], "ties", 0.5, 200, data=""),
        recorded(["tatr"], "ties", 0.8, 380, data="gradient"),
    ]
    for model in family.ZOOS:
        write(path_of(model, tmp_path), fair)
        write(path_of(f"family_{model}", tmp_path), new)
    names = [("tatr", "ties", "gradient"), ("", "ties", ""), ("tatr", "ties", "")]
    found = family.ranking(tmp_path)
    assert [name for name, _ in found] == names
    assert [value for _, value in found] == pytest.approx([0.8, 0.7, 0.5])
    assert family.accuracy(["zoo0"], names[1], tmp_path) == pytest.approx((350 + 3.5) / 5)
    assert family.lead(["zoo0"], names[0], names[1], tmp_path).points == pytest.approx(6)
    assert family.label(names[0]) == "TATR > TIES, gradients"
    line = family.markdown(tmp_path).splitlines()[2]
    assert line == "| TATR > TIES, gradients | 80.0 | 76.7 |  |"


# ---- Costs ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_the_peak_is_what_work_takes():
    found = peak(lambda: torch.ones(10_000_000).sum())
    assert found == pytest.approx(38.1, abs=4)


def test_every_method_has_its_cost():
    rows = list(csv.DictReader(costs.TABLE.read_text().splitlines()))
    assert [(row["what"], row["kind"]) for row in rows] == list(costs.KINDS.items())
    assert all(float(row["seconds"]) > 0 and float(row["megabytes"]) >= 0 for row in rows)
    assert merging_methods() == {*costs.RULES, *costs.PURIFIERS}


# ---- What is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", family.ZOOS)
def test_the_zoos_are_whole_and_of_the_weights_here(model: str):
    rows = read(path_of(f"family_{model}"))
    wanted = [family.key(entry) for entry in family.zoo_entries(model)]
    assert [family.row_key(row) for row in rows] == wanted
    folder = ROOT / "data" / {"zoo0": "zoo"}.get(model, model)
    assert {row["digest"] for row in rows} == {digest_of(folder)[:16]}


def test_the_counts_and_the_encoder_are_whole():
    for count, found in family.counts().items():
        assert list(found) == [(*pair, "") for pair in family.COUNTED]
        assert all(len(row["hits"]) == count for row in found.values())
    for name, _ in family.ranking()[:10]:
        assert name[2] or name in family.table("encoder"), name


def test_no_number_in_the_readme_differs_from_the_rows():
    text = (ROOT / "data" / "README.md").read_text()
    tables = re.findall(r"<!-- family table -->\n(.*?)\n\n", text, re.DOTALL)
    assert tables == [family.markdown()]


def test_the_files_are_small():
    files = (ROOT / "data" / "fair").glob("family_*")
    assert sum(path.stat().st_size for path in files) < 90_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("zoo0", ("", "consensus", "")),
        ("zoo1", ("wiener", "knots", "")),
        ("zoo2", ("pave", "task_arithmetic", "covariance")),
    ],
)
def test_recorded_rows_come_out_again(model: str, name: family.Name):
    """Processors round differently: one example in a hundred may turn, the average by a quarter point."""
    bench, row = open_bench(model), family.table(model)[name]
    recipe = mp.Recipe(row["rule"], tuple(row["purify"]), row["options"], vectors=row["vectors"])
    given = recipe.but(scale=row["scale"]).keywords()
    given["statistics"] = family.statistics_of(model, row["data"])
    found = bench.hits(mp.merge(bench.base, bench.tasks, **given), "test")
    again = verdicts.hits({"hits": fair_table.packed(found)})
    assert abs(verdicts.accuracy(again) - verdicts.accuracy(verdicts.hits(row))) < 0.0025
    assert np.mean([np.mean(again[t] != x) for t, x in verdicts.hits(row).items()]) < 0.01
