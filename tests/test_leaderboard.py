"""The leaderboard: the search for a scale, resuming, and that the recorded table is whole and true."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import leaderboard  # noqa: E402
import zoo_io  # noqa: E402

ROWS = list(csv.DictReader((ROOT / "data" / "leaderboard.csv").read_text().splitlines()))


@pytest.mark.parametrize("top", [0.03, 0.2, 0.7, 5.0])
def test_search_climbs_to_the_top_from_either_side(top: float):
    scale, score = leaderboard.best_scale(lambda a: -abs(np.log(a / top)), start=0.5)
    assert top / 1.1 < scale < top * 1.1
    assert score == -abs(np.log(scale / top))


def test_search_stops_on_a_plateau():
    assert leaderboard.best_scale(lambda a: 0.5, start=1.0) == (1.0, 0.5)


def test_rows_are_named_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def measure(zoo: object, judge: object, recipe: leaderboard.Recipe) -> dict[str, object]:
        measured.append(recipe.key)
        if len(measured) == 3:
            raise KeyboardInterrupt
        values = ["0", *recipe.key[:2], recipe.key[2], 1, 0.5, 0.5, 0.5]
        return dict(zip(leaderboard.COLUMNS, values, strict=True))

    zoo = SimpleNamespace(info={"seed": 0})
    monkeypatch.setattr(leaderboard, "measure", measure)
    monkeypatch.setattr(leaderboard, "Judge", lambda zoo: None)
    table, wanted = tmp_path / "table.csv", leaderboard.recipes(1)[:4]
    with pytest.raises(KeyboardInterrupt):
        leaderboard.fill(zoo, table, wanted)
    assert len(leaderboard.read(table)) == 2
    assert leaderboard.fill(zoo, table, wanted) == 2
    assert leaderboard.fill(zoo, table, wanted) == 0
    assert measured == [r.key for r in [*wanted[:3], *wanted[2:]]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_table_has_every_row(seed: int):
    recorded = [(r["purify"], r["options"], r["rule"]) for r in ROWS if r["seed"] == str(seed)]
    assert sorted(recorded) == sorted(recipe.key for recipe in leaderboard.recipes(seed))


def test_recorded_choices_are_those_of_validation_data():
    for rule, name in leaderboard.CHOSEN.items():
        marks = {
            r["options"]: float(r["val"])
            for r in ROWS
            if (r["seed"], r["purify"], r["rule"]) == ("0", "pact", rule)
        }
        chosen = leaderboard.Recipe(rule, ("pact",), {"pact": leaderboard.SETTINGS[name]})
        assert marks[chosen.key[1]] == max(marks.values()), rule


def test_a_recorded_row_is_what_the_weights_give():
    zoo = zoo_io.load_zoo(ROOT / "data" / "zoo")
    row = next(r for r in ROWS if (r["seed"], r["purify"], r["rule"]) == ("0", "pact", "iso_c"))
    delta = leaderboard.mp.merged_delta(zoo.base, zoo.tasks, rule="iso_c", purify="pact")
    weights = delta.apply_to(zoo.base, float(row["scale"]))
    test = leaderboard.Judge(zoo).accuracies(weights, "test")
    assert test.mean() == pytest.approx(float(row["test"]), abs=0.003)
