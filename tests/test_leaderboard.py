"""The leaderboard: the search for a scale, resuming, and that the recorded table is whole and true."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import leaderboard
import minipact as mp
import zoo_io
from helpers import ROOT

ROWS = list(csv.DictReader((ROOT / "data" / "leaderboard.csv").read_text().splitlines()))
SCALE_ITSELF = SimpleNamespace(at=lambda scale: scale)  # in place of a merge: scores see the scale


@pytest.mark.parametrize("top", [0.03, 0.2, 0.7, 5.0])
def test_search_climbs_to_the_top_from_either_side(top: float):
    scale, score = leaderboard.best_scale(SCALE_ITSELF, lambda a: -abs(np.log(a / top)), start=0.5)
    assert top / 1.1 < scale < top * 1.1
    assert score == -abs(np.log(scale / top))


def test_search_stops_on_a_plateau():
    assert leaderboard.best_scale(SCALE_ITSELF, lambda a: 0.5, start=1.0) == (1.0, 0.5)


def test_rows_are_named_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def measure(zoo: object, judge: object, row: mp.Recipe) -> dict[str, object]:
        measured.append(leaderboard.key(row))
        if len(measured) == 3:
            raise KeyboardInterrupt
        values = ["0", *leaderboard.key(row), 1, 0.5, 0.5, 0.5]
        return dict(zip(leaderboard.COLUMNS, values, strict=True))

    zoo = SimpleNamespace(info={"seed": 0})
    monkeypatch.setattr(leaderboard, "measure", measure)
    table, wanted = tmp_path / "table.csv", leaderboard.recipes(1)[:4]
    with pytest.raises(KeyboardInterrupt):
        leaderboard.fill(zoo, None, table, wanted)
    assert len(leaderboard.read(table)) == 2
    assert leaderboard.fill(zoo, None, table, wanted) == 2
    assert leaderboard.fill(zoo, None, table, wanted) == 0
    assert measured == [leaderboard.key(row) for row in [*wanted[:3], *wanted[2:]]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_table_has_every_row(seed: int):
    recorded = [tuple(r[c] for c in leaderboard.KEY) for r in ROWS if r["seed"] == str(seed)]
    assert sorted(recorded) == sorted(map(leaderboard.key, leaderboard.recipes(seed)))


def test_recorded_choices_are_those_of_validation_data():
    for rule, name in leaderboard.CHOSEN.items():
        wanted = {"seed": "0", "purify": "pact", "rule": rule, "vectors": "rule"}
        marks = {r["options"]: float(r["val"]) for r in ROWS if wanted.items() <= r.items()}
        chosen = leaderboard.recipe(rule, ("pact",), leaderboard.SETTINGS[name])
        assert marks[leaderboard.key(chosen)[1]] == max(marks.values()), rule


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["rule", "mean"])
def test_a_recorded_row_is_what_the_weights_give(vectors: str):
    zoo = zoo_io.load_zoo(ROOT / "data" / "zoo")
    recipe = leaderboard.recipe("iso_c", ("pact",), vectors=vectors)
    columns = {"seed": "0", **dict(zip(leaderboard.KEY, leaderboard.key(recipe), strict=True))}
    row = next(r for r in ROWS if columns.items() <= r.items())
    merged = mp.Merged(zoo.base, zoo.tasks, **recipe.keywords()).at(float(row["scale"]))
    test = leaderboard.Judge(zoo.info["model"], zoo.heads).accuracies(merged, "test")
    assert np.mean(list(test.values())) == pytest.approx(float(row["test"]), abs=0.003)
