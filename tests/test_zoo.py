"""The mini zoo: random streams, damage, quality, and that its recorded accuracies are its own."""

import csv
import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import packed
import tasks as zoo_tasks
import train_zoo
import zoo_io
from helpers import ROOT
from minipact.__main__ import main
from sums import DataError, write_sums

FOLDER = ROOT / "data" / "zoo"
INFO = json.loads((FOLDER / "zoo.json").read_text())


@pytest.mark.parametrize("task", zoo_tasks.TASKS)
def test_pictures_repeat_and_splits_share_none(task: str):
    images, labels = zoo_tasks.load(task, "val", 60)
    again, _ = zoo_tasks.load(task, "val", 60)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, again)
    assert set(labels) <= set(range(len(zoo_tasks.TASKS[task].classes)))
    parts = {
        s: {x.tobytes() for x in zoo_tasks.load(task, s, 200)[0]} for s in zoo_tasks.SPLIT_SIZES
    }
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]


def test_seeds_change_training_pictures_only():
    for split, equal in (("train", False), ("val", True), ("test", True)):
        first, second = (zoo_tasks.load("shapes", split, 5, seed)[0] for seed in (0, 1))
        assert np.array_equal(first, second) == equal
    with pytest.raises(ValueError, match="997"):
        zoo_tasks.load("digits", "train", 998)
    with pytest.raises(ValueError, match="no split"):
        zoo_tasks.load("digits", "dev")


def test_world_has_captions():
    images, captions = zoo_tasks.pretrain_world(50, seed=5)
    assert images.shape == (50, 32, 32, 3)
    assert len(set(captions)) > 25


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "zoo"))


@pytest.mark.parametrize("name", ["base.safetensors", "signs.safetensors", "zoo.json"])
def test_damaged_or_missing_files_are_named(copy: Path, name: str):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{name} is damaged.*make zoo"):
        zoo_io.load_zoo(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        zoo_io.load_zoo(copy)


def test_packed_towers_are_read_in_place_of_whole_ones(copy: Path):
    zoo = zoo_io.load_zoo(copy)
    (copy / "signs.safetensors").unlink()
    (copy / "signs.safetensors.gz").write_bytes(packed.pack(zoo.base, zoo.tasks["signs"], 0.5))
    write_sums(copy)
    found = zoo_io.load_zoo(copy)
    for name, x in zoo.tasks["signs"].items():
        change, error = x - zoo.base[name], found.tasks["signs"][name] - x
        assert error.norm() <= 0.16 * change.norm()
    assert found.tasks["digits"].keys() == zoo.tasks["digits"].keys()
    judge = zoo_io.Judge(zoo.info["model"], {"signs": zoo.heads["signs"]})
    assert judge.accuracies(found.tasks["signs"])["signs"] > 0.99


def test_a_base_without_a_base_is_packed_to_half_a_percent(copy: Path):
    zoo = zoo_io.load_zoo(copy)
    (copy / "base.safetensors").unlink()
    (copy / "base.safetensors.gz").write_bytes(packed.pack_alone(zoo.base, 0.05))
    write_sums(copy)
    found = zoo_io.load_zoo(copy).base
    assert found.keys() == zoo.base.keys()
    for name, x in zoo.base.items():
        assert (found[name] - x).norm() <= 0.03 * x.norm(), name
    assert (copy / "base.safetensors.gz").stat().st_size < 1.1e6


def test_zoo_is_small_and_whole():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 30e6
    zoo = zoo_io.load_zoo(FOLDER)
    assert list(zoo.tasks) == list(zoo_tasks.TASKS)
    assert all(state.keys() == zoo.base.keys() for state in zoo.tasks.values())
    assert 1e6 < sum(x.numel() for x in zoo.base.values()) < 1.6e6
    for task, head in zoo.heads.items():
        assert head.shape[0] == len(zoo_tasks.TASKS[task].classes)
        assert torch.allclose(head.norm(dim=-1), torch.ones(len(head)), atol=1e-5)


class Seeds:
    rows: ClassVar = list(csv.DictReader((ROOT / "data" / "seeds.csv").read_text().splitlines()))
    seeds: ClassVar = sorted({row["seed"] for row in rows})

    @classmethod
    def column(cls, seed: str, name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in cls.rows if row["seed"] == seed])


@pytest.mark.parametrize(("seed", "folder"), [("0", "zoo"), ("1", "zoo1"), ("2", "zoo2")])
def test_seeds_are_recorded_as_the_zoos_say(seed: str, folder: str):
    info = json.loads((ROOT / "data" / folder / "zoo.json").read_text())
    for name in ("zero_shot", "finetuned", "task_arithmetic"):
        recorded = [row[name] for row in info["tasks"].values()]
        assert np.allclose(Seeds.column(seed, name), recorded, atol=1e-4)


def test_four_seeds_are_recorded():
    assert Seeds.seeds == ["0", "1", "2", "3"]


@pytest.mark.parametrize("seed", Seeds.seeds)
def test_the_zoo_is_good(seed: str):
    """What issue and book promise: knowledge in the base, good experts, and a loss to repair."""
    base, own, added = (
        Seeds.column(seed, n) for n in ("zero_shot", "finetuned", "task_arithmetic")
    )
    chance = np.array([row["chance"] for row in INFO["tasks"].values()])
    assert 0.35 < base.mean() < 0.75
    assert (base > chance + 0.15).sum() >= 6
    assert (own >= 0.9).sum() >= 6
    assert own.min() >= 0.8
    assert own.mean() - added.mean() >= 0.08


@pytest.mark.parametrize("task", ["digits", "scenes"])
def test_recorded_accuracies_are_those_of_the_weights(task: str):
    zoo, pictures = zoo_io.load_zoo(FOLDER), zoo_tasks.load(task, "test")
    recorded = INFO["tasks"][task]
    for weights, key in ((zoo.base, "zero_shot"), (zoo.tasks[task], "finetuned")):
        tower = zoo_io.image_tower(INFO["model"], weights)
        assert zoo_io.accuracy(tower, zoo.heads[task], *pictures) == pytest.approx(recorded[key])


@pytest.mark.slow
def test_the_zoo_merges_from_the_command_line(tmp_path: Path):
    """The main job: files in, one file out, and the result reads all eight tasks better than the base."""
    files = [str(FOLDER / f"{task}.safetensors") for task in zoo_tasks.TASKS]
    out = tmp_path / "merged.safetensors"
    scale = ["--scale", str(INFO["scale"])]
    assert (
        main(["merge", str(FOLDER / "base.safetensors"), *files, "-o", str(out), "--quiet", *scale])
        == 0
    )
    merged = {name: x.float() for name, x in load_file(out).items()}
    zoo = zoo_io.load_zoo(FOLDER)
    tower = zoo_io.image_tower(INFO["model"], merged)
    for task in ("numbers", "shapes", "scenes"):
        found = zoo_io.accuracy(tower, zoo.heads[task], *zoo_tasks.load(task, "test"))
        assert found == pytest.approx(INFO["tasks"][task]["task_arithmetic"], abs=0.01)
        assert found > INFO["tasks"][task]["zero_shot"] + 0.1


@pytest.mark.slow
def test_training_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A few steps from nothing: interrupted after an epoch and after a task, and not interrupted."""
    few = dict(train_zoo.TRAINING) | {
        "world_images": 64, "pretrain_epochs": 2, "task_images": 32, "finetune_steps": 2, "batch": 16,
    }  # fmt: skip
    monkeypatch.setattr(zoo_tasks, "SPLIT_SIZES", {"train": 32, "val": 8, "test": 8})
    monkeypatch.setattr(train_zoo, "SCALES", [0.5])
    train_zoo.train(0, tmp_path / "straight", torch.device("cpu"), few)

    saved, keep = [], train_zoo.save_atomically

    def stop_after(count: int):
        def save(state: object, path: Path) -> None:
            keep(state, path)
            saved.append(path.name)
            if len(saved) == count:
                raise KeyboardInterrupt

        return save

    for count in (1, 4):
        monkeypatch.setattr(train_zoo, "save_atomically", stop_after(count))
        with pytest.raises(KeyboardInterrupt):
            train_zoo.train(0, tmp_path / "halting", torch.device("cpu"), few)
    monkeypatch.setattr(train_zoo, "save_atomically", keep)
    with pytest.raises(SystemExit, match="another, unfinished run"):
        train_zoo.train(1, tmp_path / "halting", torch.device("cpu"), few)
    train_zoo.train(0, tmp_path / "halting", torch.device("cpu"), few)
    sums = [(tmp_path / name / "SHA256SUMS").read_text() for name in ("straight", "halting")]
    assert sums[0] == sums[1]
    assert not (tmp_path / "halting" / ".work").exists()


@pytest.mark.slow
def test_the_packed_zoo_is_as_accurate_as_the_full_one():
    """`unpacked` holds what the full weights of the same training reached."""
    zoo = zoo_io.load_zoo(ROOT / "data" / "zoo1")
    assert list(zoo.tasks) == list(zoo_tasks.TASKS)
    rows = zoo.info["tasks"]
    loss = np.mean([zoo.info["unpacked"][task] - row["finetuned"] for task, row in rows.items()])
    assert abs(loss) < 0.002
    judge = zoo_io.Judge(zoo.info["model"], zoo.heads)
    for task in ("digits", "scenes"):
        found = judge.accuracies(zoo.tasks[task], "test", [task])[task]
        assert found == pytest.approx(rows[task]["finetuned"], abs=0.006)
