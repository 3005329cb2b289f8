"""The zoo's training variants: a few steps of each, interrupted and not, and what they leave behind."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tasks as zoo_tasks
import train_zoo
import tuned_to_merge
from helpers import ROOT
from zoo_io import Zoo, load_zoo

FOLDER = ROOT / "data" / "zoo"
TASKS = ("digits", "shapes", "signs")
FEW = {
    "task_images": 16, "finetune_steps": 2, "batch": 8, "rounds": 2, "coefficient_epochs": 1, "few": 4,
}  # fmt: skip


def three_tasks(folder: Path) -> Zoo:
    zoo = load_zoo(folder)
    tasks, heads = ({task: x[task] for task in TASKS} for x in (zoo.tasks, zoo.heads))
    return replace(zoo, tasks=tasks, heads=heads)


def run(folder: Path, changes: dict[str, float] = FEW) -> str:
    table = folder / "table.csv"
    tuned_to_merge.train(FOLDER, folder, table, torch.device("cpu"), changes)
    return table.read_text()


@pytest.mark.slow
def test_all_variants_are_trained_recorded_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(zoo_tasks, "SPLIT_SIZES", {"train": 16, "val": 4, "test": 4})
    monkeypatch.setattr(tuned_to_merge, "SCALES", [0.3])
    monkeypatch.setattr(tuned_to_merge, "load_zoo", three_tasks)
    straight = run(tmp_path / "straight")
    rows = list(csv.DictReader(straight.splitlines()))
    kinds = list(dict.fromkeys((row["method"], row["model"]) for row in rows))
    assert len(rows) == len(kinds) * len(TASKS)
    assert kinds == [
        *((m, x) for m in ("finetuned", "talos") for x in ("own", "task_arithmetic", "tsv_m")),
        *((m, "merged") for m in ("atm", "atlas", "atlas_entropy")),
    ]
    assert all(0 <= float(row[split]) <= 1 for row in rows for split in ("val", "test"))

    kept = tmp_path / "straight" / "seed0"
    base = load_zoo(FOLDER).base
    sparse = torch.load(kept / "talos-signs.pt", weights_only=True)
    moved = sum(int((x != base[name]).sum()) for name, x in sparse.items())
    assert 0 < moved <= 0.1 * sum(x.numel() for x in base.values())
    assert torch.equal(sparse["visual.proj"], base["visual.proj"])
    names = {path.stem for path in kept.glob("*.pt")}
    assert names >= {"talos-digits", "atm-0", "atm-1", "atlas-labels", "atlas-entropy"}

    saved, keep = [], train_zoo.save_atomically

    def stop_early(state: object, path: Path) -> None:
        keep(state, path)
        saved.append(path.stem)
        if path.stem in ("talos-shapes", "atm-0"):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_zoo, "save_atomically", stop_early)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halting")
    assert not (tmp_path / "halting" / "table.csv").exists()
    monkeypatch.setattr(train_zoo, "save_atomically", keep)
    assert run(tmp_path / "halting") == straight
    assert len(saved) == len({*saved}), "nothing is trained twice"
    with pytest.raises(SystemExit, match="a run with other settings"):
        run(tmp_path / "halting", FEW | {"rounds": 3})


def test_the_table_replaces_a_seeds_rows(tmp_path: Path):
    table = tmp_path / "table.csv"
    row = dict.fromkeys(tuned_to_merge.COLUMNS, "x")
    for seed in (1, 0, 1):
        tuned_to_merge.write(table, seed, [row | {"seed": str(seed)}])
    assert [r["seed"] for r in csv.DictReader(table.read_text().splitlines())] == ["0", "1"]


def test_a_zoo_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"zoo77 is missing: make it with data/train_zoo.py"):
        tuned_to_merge.main(["--seed", "77"])
