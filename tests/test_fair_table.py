"""The fair table: filters once for all rules, one grid, choices by the other kind, resuming, intervals."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import controls
import fair_table
import minipact as mp
import verdicts
from benches import Bench, Hits, digest_of, mean_accuracy, open_bench
from helpers import ROOT, close, flat, normal, problem, rng, small_model
from rows import path_of

BASE = small_model(0)
TASKS = {f"task{t}": small_model(100 * t, BASE) for t in (1, 2, 3)}


class Judged:
    """Right answers are the more, the nearer weights are to those of a target; counts its calls."""

    def __init__(self, target: Mapping[str, Tensor]):
        self.target, self.calls = flat(target), []

    def __call__(self, weights: Mapping[str, Tensor], split: str, only: Iterable[str]) -> Hits:
        self.calls.append(split)
        off = float((flat(weights) - self.target).norm() / (flat(BASE) - self.target).norm())
        share = 0.9 * np.exp(-off)
        return {task: np.arange(verdicts.TESTS) < share * verdicts.TESTS for task in only}


@pytest.fixture
def bench() -> Bench:
    target = mp.merge(BASE, TASKS, rule="task_arithmetic", scale=0.6)
    return Bench("zoo0", "zoo", "abc", BASE, TASKS, Judged(target))


# ---- Filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fair_table.FILTERS)
@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv_m", "wudi"])
def test_tasks_behind_a_filter_merge_as_the_recipe_says(bench: Bench, name: str, rule: str):
    for options in fair_table.FILTERS[name][:2]:
        recipe = fair_table.behind(rule, name, options)
        tasks = fair_table.filtered(bench, name, options)
        ours = mp.Merged(BASE, tasks, rule=rule, vectors="mean", scale=0.7)
        wanted = mp.Merged(BASE, TASKS, **recipe.but(scale=0.7).keywords())
        for tensor in BASE:
            assert torch.allclose(ours[tensor], wanted[tensor], atol=1e-5), tensor


def test_every_filter_has_as_many_settings_and_ours_has_one():
    assert fair_table.FILTERS["wiener"] == [{}]
    published = {k: settings for k, settings in fair_table.FILTERS.items() if k != "wiener"}
    assert {len(settings) for settings in published.values()} == {4}
    keys = [fair_table.key(recipe) for recipe in fair_table.settings_rows()]
    assert len(keys) == len(set(keys)) == 7 * 2 + 4 * (1 + 4 * len(published))


def test_our_own_filter_is_the_frozen_one():
    """Rows of the stage "unseen" name no options: they are of these defaults, which LOG.md fixes."""
    frozen = {"claims": 30.0, "ridge": 1.0, "side": "both", "scope": None}
    assert mp.METHODS["wiener"].options == frozen
    log = (fair_table.FOLDER / "LOG.md").read_text()
    assert 'wiener(D, claims=30.0, ridge=1.0, side="both")' in log
    recorded = fair_table.read(path_of("encoder_unseen"))
    wanted = [
        fair_table.key(recipe) for recipe in fair_table.wanted_rows("encoder_unseen", "unseen")
    ]
    assert [fair_table.row_key(row) for row in recorded if "hits" in row] == wanted


# ---- Controls ------------------------------------------------------------------------------------


def test_random_shields_have_the_dimensions_of_pacts():
    W0, D = problem()
    walls = mp.load_bearing_walls(W0, D, core=5, task=3)
    cleared = controls.random_shield(W0, D, core=5, task=3, generator=rng())
    for j in range(4):
        removed = D[j] - cleared[j]
        assert torch.linalg.matrix_rank(removed) == walls.shield(j).shape[1]
        assert close((removed * cleared[j]).sum(), torch.tensor(0.0).double())
    again = controls.random_shield(W0, D, core=5, task=3, generator=rng())
    other = controls.random_shield(W0, D, core=5, task=3, generator=rng(1))
    assert torch.equal(cleared, again)
    assert not torch.allclose(cleared, other)


def test_the_shield_of_updates_takes_the_others_leading_directions():
    W0, D = problem()
    sizes = controls.sizes(W0, D, 5, 3, 1e-3)
    cleared = controls.updates_shield(W0, D, core=5, task=3)
    for j in range(4):
        others = torch.cat([d / d.norm() for i, d in enumerate(D) if i != j])
        _, _, vh = torch.linalg.svd(others)
        assert (cleared[j] @ vh[: sizes[j]].mT).abs().max() < 1e-10
        assert torch.allclose(cleared[j] @ vh[sizes[j] :].mT, D[j] @ vh[sizes[j] :].mT, atol=1e-10)


def test_shrinking_leaves_pacts_norms_and_all_directions():
    W0, D = problem()
    found, wanted = controls.shrinking(W0, D, core=5, task=3), mp.pact(W0, D, core=5, task=3)
    assert close(found.norm(dim=(1, 2)), wanted.norm(dim=(1, 2)))
    assert close(found / found.norm(dim=(1, 2), keepdim=True), D / D.norm(dim=(1, 2), keepdim=True))


def test_rotated_needs_and_claims_have_the_spectra_of_the_filters():
    """What the control divides by has the same values; only on identical directions is it the filter."""
    _, D = problem(12, 9)
    found = controls.rotated_wiener(D, generator=rng())
    assert torch.equal(found, controls.rotated_wiener(D, generator=rng()))
    assert not torch.allclose(found, mp.wiener(D), atol=1e-3)
    scaled = controls.rotated_wiener(2 * D, generator=rng())
    assert torch.allclose(scaled, 2 * found, atol=1e-10)
    flat = torch.stack(
        [orthogonal * (i + 1) for i, orthogonal in enumerate(controls.orthogonal(9, 3, rng()))]
    )
    assert torch.allclose(
        controls.rotated_wiener(flat, generator=rng()), mp.wiener(flat), atol=1e-10
    )
    assert torch.equal(controls.rotated_wiener(D[:1], generator=rng()), D[:1])


# ---- Scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", range(8))
def test_the_climb_finds_the_top_from_the_start(top: int):
    assert fair_table.climb(lambda i: -abs(i - top), 8, start=4) == top


def test_the_climb_stays_on_a_plateau():
    assert fair_table.climb(lambda i: 0.5, 8, start=4) == 4


def test_lengths_are_in_units_of_a_task_vector(bench: Bench):
    one = bench.only(["task1"], "one")
    merged = mp.Merged(BASE, one.tasks, rule="task_arithmetic", scale=1.0)
    assert fair_table.length(merged, one) == pytest.approx(1)
    assert fair_table.length(merged.at(0.3), one) == pytest.approx(0.3)


def test_a_row_has_the_scale_of_the_best_length(bench: Bench):
    row = fair_table.validated(bench, TASKS, fair_table.alone("task_arithmetic", "rule"))
    merged = mp.Merged(BASE, TASKS, rule="task_arithmetic", vectors="rule", scale=row["scale"])
    assert fair_table.length(merged, bench) == pytest.approx(row["length"], rel=1e-3)
    assert 0.4 < row["scale"] < 0.9
    assert row["val"] == max(row["curve"].values()) == row["curve"][f"{row['length']:.3f}"]
    assert row["val"] == pytest.approx(mean_accuracy(bench.hits(merged, "val")), abs=1e-5)


# ---- Stages --------------------------------------------------------------------------------------


def test_rows_are_measured_once_and_resumed(bench: Bench, tmp_path: Path):
    path = path_of("zoo0", tmp_path)
    wanted = [fair_table.alone(rule, "mean") for rule in ("task_arithmetic", "tsv_m")]
    wanted.append(fair_table.behind("tsv_m", "sift", {"core": 0.1}))
    fair_table.fill(bench, path, wanted[:1], test=False)
    fair_table.fill(bench, path, wanted, test=False)
    assert set(bench.judge.calls) == {"val"}, "settings never look at test data"
    assert [fair_table.row_key(row) for row in fair_table.read(path)] == list(
        map(fair_table.key, wanted)
    )
    fair_table.fill(bench, path, wanted[1:], test=True)
    assert bench.judge.calls.count("test") == 2
    seen = len(bench.judge.calls)
    fair_table.fill(bench, path, wanted[1:], test=True)
    assert len(bench.judge.calls) == seen
    assert ["hits" in row for row in fair_table.read(path)] == [False, True, True]
    for row in fair_table.read(path)[1:]:
        recipe = next(r for r in wanted if fair_table.key(r) == fair_table.row_key(row))
        merged = mp.merge(BASE, TASKS, **recipe.but(scale=row["scale"]).keywords())
        found = bench.hits(merged, "test")
        assert all(np.array_equal(found[task], x) for task, x in verdicts.hits(row).items())


def test_rows_of_another_training_are_measured_anew(bench: Bench, tmp_path: Path):
    path = path_of("zoo0", tmp_path)
    wanted = [fair_table.alone("tsv_m", "mean")]
    fair_table.fill(bench, path, wanted, test=False)
    other = Bench("zoo0", "zoo", "other", BASE, TASKS, bench.judge)
    fair_table.fill(other, path, wanted, test=False)
    assert [row["digest"] for row in fair_table.read(path)] == ["other"]


def test_settings_are_chosen_on_the_other_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fair_table, "FOLDER", tmp_path)

    def record(model: str, favourite: int) -> None:
        """Rows of a model whose validation data like one place among the settings of each filter."""
        rows = []
        for recipe in fair_table.settings_rows():
            row = {"purify": list(recipe.purify), "rule": recipe.rule, "vectors": recipe.vectors}
            row["options"] = {name: dict(options) for name, options in recipe.options.items()}
            settings = fair_table.FILTERS[recipe.purify[0]] if recipe.purify else [{}]
            liked = [*row["options"].values(), {}][0] == settings[favourite % len(settings)]
            rows.append(row | {"val": 0.9 if liked else 0.5})
        fair_table.write(path_of(model, tmp_path), rows)

    record("zoo0", 3)
    record("encoder", 1)
    for model, place in (("zoo1", 1), ("zoo0", 1), ("encoder", 3)):
        filtered = [r for r in fair_table.wanted_rows(model, "final") if r.purify]
        assert len(filtered) == 7 * len(fair_table.FILTERS)
        for recipe in filtered:
            name = recipe.purify[0]
            settings = fair_table.FILTERS[name][place % len(fair_table.FILTERS[name])]
            assert fair_table.key(recipe) == fair_table.key(
                fair_table.behind(recipe.rule, name, settings)
            )
    path_of("zoo0", tmp_path).unlink()
    with pytest.raises(SystemExit, match="settings first"):
        fair_table.wanted_rows("encoder", "final")


# ---- Intervals -----------------------------------------------------------------------------------


def test_bits_come_back():
    found = {"a": rng_booleans(0), "b": rng_booleans(1)}
    row = {"hits": fair_table.packed(found)}
    assert all(np.array_equal(found[task], x) for task, x in verdicts.hits(row).items())


def rng_booleans(seed: int) -> np.ndarray:
    return (normal(verdicts.TESTS, seed=seed) > 0).numpy()


def test_gain_by_hand():
    """Differences 1, 0, 0, 0 in one task and 1, 1, 0, 0 in the other: means 1/4 and 1/2."""
    behind = {"a": np.array([1, 1, 0, 0], bool), "b": np.array([1, 1, 1, 0], bool)}
    alone = {"a": np.array([0, 1, 0, 0], bool), "b": np.array([0, 0, 1, 0], bool)}
    found = verdicts.gain([behind], [alone])
    assert found.points == pytest.approx(37.5)
    variances = (3 * (1 / 4) ** 2 + (3 / 4) ** 2) / 3 / 4, 4 * (1 / 2) ** 2 / 3 / 4
    assert found.examples == pytest.approx(100 * 1.959964 * sum(variances) ** 0.5 / 2, rel=1e-5)
    assert found.tasks == pytest.approx(100 * 12.7062 * (0.125 * 2**0.5) / 2**0.5, rel=1e-5)


def test_several_trainings_count_an_example_once():
    a, b = ({"x": rng_booleans(s), "y": rng_booleans(s + 1)} for s in (0, 5))
    assert verdicts.gain([a, a], [b, b]) == verdicts.gain([a], [b])
    mixed = verdicts.gain([a, b], [b, a])
    assert (mixed.points, mixed.examples) == (0, 0)


def recorded(purify: list[str], vectors: str, val: float, hits: Hits) -> dict[str, object]:
    row = {"rule": "ties", "purify": purify, "options": {}, "vectors": vectors, "val": val}
    return row | {"hits": fair_table.packed(hits)}


def test_a_rule_alone_takes_the_vectors_that_validation_prefers(tmp_path: Path):
    a, b, c = ({"x": rng_booleans(s), "y": rng_booleans(s + 1)} for s in (0, 5, 9))
    rows = [
        recorded([], "mean", 0.7, a),
        recorded([], "rule", 0.8, b),
        recorded(["pact"], "mean", 0.75, c),
    ]
    fair_table.write(path_of("zoo0", tmp_path), rows)
    assert verdicts.mean_alone(["zoo0"], "ties", tmp_path) == 100 * verdicts.accuracy(b)
    assert verdicts.gains(["zoo0"], "ties", "pact", tmp_path) == verdicts.gain([c], [b])
    assert verdicts.gains(["zoo0"], "ties", "sift", tmp_path) is None
    header, _, line = verdicts.markdown(["zoo0"], tmp_path).splitlines()
    found = verdicts.gain([c], [b])
    cell = f"{found.points:+.1f} ± {found.examples:.1f}"
    assert header == "| rule | alone | PACT |"
    assert line == f"| TIES | {100 * verdicts.accuracy(b):.1f} | {cell} |"


def test_gains_that_both_intervals_hold_above_zero_are_bold(tmp_path: Path):
    tasks = [f"task{i}" for i in range(8)]
    low = {t: np.arange(verdicts.TESTS) < 200 for t in tasks}
    high = {t: np.arange(verdicts.TESTS) < 250 + i for i, t in enumerate(tasks)}
    mixed = {t: np.arange(verdicts.TESTS) < (300 if i else 1) for i, t in enumerate(tasks)}
    for behind, bold in ((high, True), (mixed, False)):
        rows = [recorded([], "mean", 0.7, low), recorded(["pact"], "mean", 0.75, behind)]
        fair_table.write(path_of("zoo0", tmp_path), rows)
        line = verdicts.markdown(["zoo0"], tmp_path).splitlines()[2]
        assert ("**" in line) == bold


def test_two_filters_are_compared_over_the_same_examples(tmp_path: Path):
    a, b, c = ({"x": rng_booleans(s), "y": rng_booleans(s + 1)} for s in (0, 5, 9))
    rows = [
        recorded([], "mean", 0.7, a),
        recorded(["sift"], "mean", 0.7, b),
        recorded(["pact"], "mean", 0.7, c),
    ]
    fair_table.write(path_of("zoo0", tmp_path), rows)
    found = verdicts.contrast(["zoo0"], "ties", "pact", "sift", tmp_path)
    assert found == verdicts.gain([c], [b])
    assert verdicts.contrast(["zoo0"], "ties", "pact", "wiener", tmp_path) is None


# ---- What is published ---------------------------------------------------------------------------

KINDS = {"zoos": ["zoo0", "zoo1", "zoo2"], "encoder": ["encoder"]}
MODELS = [model for models in KINDS.values() for model in models]


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_in_the_readme_differs_from_the_table(kind: str):
    text = (ROOT / "README.md").read_text()
    tables = re.findall(rf"<!-- fair table: {kind} -->\n(.*?)\n\n", text, re.DOTALL)
    assert tables == [verdicts.markdown(KINDS[kind])]


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_whole_and_its_settings_come_from_the_other_kind(model: str):
    wanted = [fair_table.key(recipe) for recipe in fair_table.wanted_rows(model, "final")]
    assert not set(wanted) - {fair_table.row_key(row) for row in verdicts.load(model)}


@pytest.mark.parametrize("model", ["zoo0", "zoo1", "zoo2", "encoder", "encoder_unseen"])
def test_rows_belong_to_the_weights_in_this_repository(model: str):
    folder = {"zoo0": "zoo"}.get(model, model.removesuffix("_unseen"))
    digest = digest_of(ROOT / "data" / folder)[:16]
    assert {row["digest"] for row in fair_table.read(path_of(model))} == {digest}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rule", "name"),
    [
        ("zoo0", "tsv_m", ""),
        ("zoo0", "task_arithmetic", "pact"),
        ("zoo1", "ties", "wiener"),
        ("zoo2", "iso_c", "updates_shield"),
        ("encoder", "task_arithmetic", "pact"),
    ],
)
def test_published_rows_come_out_again(model: str, rule: str, name: str):
    """Processors round differently: one example in a hundred may turn, the average by a quarter point."""
    bench, rows = open_bench(model), verdicts.load(model)
    row = verdicts.behind(rows, rule, name) if name else verdicts.alone(rows, rule)
    assert row is not None
    assert row["digest"] == bench.digest[:16]
    tasks = fair_table.filtered(bench, name, row["options"].get(name, {})) if name else bench.tasks
    again, found = verdicts.hits(fair_table.tested(bench, tasks, row)), verdicts.hits(row)
    assert abs(verdicts.accuracy(again) - verdicts.accuracy(found)) < 0.0025
    assert np.mean([np.mean(again[task] != found[task]) for task in found]) < 0.01
