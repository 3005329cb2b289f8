"""Bytes beside accuracy: the script on small models, and what it recorded."""

import csv
import re

import numpy as np
import pytest

import compressed
from benches import Bench
from helpers import ROOT, single, tuned


def small_bench() -> Bench:
    """Two tasks, whose examples come out right with their own weights, and half with near ones."""
    base = {"w": single(16, 16), "b": single(16, seed=1)}
    tasks = {name: tuned(base, i) for i, name in enumerate(("cars", "dtd"), 1)}

    def judge(weights, split, only):
        assert split == "test"
        near = {
            t: max(float((weights[n] - x).abs().max()) for n, x in tasks[t].items()) for t in only
        }
        return {t: np.arange(10) < 5 * (near[t] < 1e-6) + 5 * (near[t] < 0.06) for t in only}

    return Bench("small", "zoo", "", base, tasks, judge)


def test_a_table_of_bytes_and_accuracies(tmp_path):
    bench, table = small_bench(), tmp_path / "table.csv"
    compressed.write(table, bench, compressed.measured(bench))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["what"] for row in rows] == ["separate models", *compressed.RULES, "tsv_m", "base"]
    assert rows[0]["share"] == "1.0000"
    assert rows[0]["test"] == "1.00000", "each task is judged on its own model"
    one = 4 * (16 * 16 + 16)
    assert [int(row["bytes"]) for row in rows if row["what"] in ("base", "tsv_m")] == [one, one]
    assert int(rows[0]["bytes"]) == 3 * one
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_the_changelog_tells_what_was_recorded():
    rows = {row["what"]: row for row in csv.DictReader(compressed.TABLE.read_text().splitlines())}
    text = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    told = re.search(
        r"from ([\d.]+) % to ([\d.]+) % by EMR and ([\d.]+) % by TALL in (\d+) % of the bytes, and to "
        r"([\d.]+) % by TSV-Compress in (\d+) %; TSV-M has ([\d.]+) %",
        text,
    ).groups()
    names = ("separate models", "emr", "tall", "emr", "tsv_compress", "tsv_compress", "tsv_m")
    columns = ("test", "test", "test", "share", "test", "share", "test")
    for number, name, column in zip(told, names, columns, strict=True):
        rounding = 0.051 if column == "test" else 0.51
        assert float(number) == pytest.approx(100 * float(rows[name][column]), abs=rounding), name
    assert int(rows["tall"]["bytes"]) < int(rows["tsv_compress"]["bytes"])
