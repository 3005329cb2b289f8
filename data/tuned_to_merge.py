"""Train the mini zoo's tasks with merging in mind: TaLoS, ATM and aTLAS beside plain fine-tuning.

    python data/tuned_to_merge.py --seed 0

For one zoo, from its own base and pictures, with the steps, batches and learning rate that made the zoo:

    talos            each task trains the tenth of the weights that its 300 validation pictures call least
                     sensitive; then task arithmetic and TSV-M of the sparse task vectors
    atm              rounds of tuning and merging, as many steps for each task in all as plain fine-tuning has
    atlas            a factor for each task and tensor, learned from the labelled validation pictures
    atlas_entropy    the same without their labels

beside the zoo's own models, and their task arithmetic and TSV-M. The scale of task arithmetic is chosen on
validation data, TSV-M has its default. aTLAS and that choice see the same 300 pictures of each task; test
data are read once, at the end. Writes data/fair/tuned_to_merge.csv: for each seed, method and task the
accuracies on validation and on test data, of the task's own model ("own") or of the one merged model.

An interrupted run goes on where it stopped: what is trained is kept in data/.tuned/, in float32. A zoo takes
about 45 minutes on 2 free cores (estimate from `make zoo`: fine-tuning all tasks once takes ten, and here
it is done twice, with scores, aTLAS, which passes 48,000 pictures forth and back, and some 50 rounds of
evaluation; on cores that others used, it took 100), 2.3 GB of memory and 100 MB of disk; a few minutes on a
GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import minipact as mp
from tasks import load, to_tensor
from train_zoo import SCALES, batches, kept_or_made, optimizer_and_schedule, shifted
from zoo_io import Judge, State, Zoo, image_tower, load_zoo

HERE = Path(__file__).parent
TABLE = HERE / "fair" / "tuned_to_merge.csv"
KEPT = HERE / ".tuned"
COLUMNS = ("seed", "method", "model", "scale", "task", "val", "test")
EXTRA: dict[str, float] = {"sparsity": 0.9, "rounds": 10, "coefficient_epochs": 10, "few": 300}
Mask = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trainer:
    """One zoo and how its tasks are trained: everything comes from its seed.

    Attributes:
        zoo: base, tasks, heads. settings: the zoo's training and EXTRA.
        work: folder of what is trained.
    """

    zoo: Zoo
    settings: dict[str, float]
    work: Path
    device: torch.device

    @property
    def seed(self) -> int:
        return int(self.zoo.info["seed"])

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.zoo.info["model"], self.zoo.heads, self.device)

    @cached_property
    def pictures(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Training pictures [N, 3, 32, 32] and labels [N] of each task, as the zoo was trained on."""
        return {task: self._pictures(task) for task in self.zoo.tasks}

    def _pictures(self, task: str) -> tuple[Tensor, Tensor]:
        count = None if task == "digits" else int(self.settings["task_images"])
        images, labels = load(task, "train", count, self.seed)
        return to_tensor(images), torch.from_numpy(labels)

    def few(self, task: str) -> list[tuple[Tensor, Tensor]]:
        """Validation pictures with labels, in batches of 100."""
        images, labels = load(task, "val")
        count = int(self.settings["few"])
        pixels, targets = to_tensor(images)[:count], torch.from_numpy(labels)[:count]
        return list(zip(pixels.split(100), targets.split(100), strict=True))

    def tower(self, weights: State) -> nn.Module:
        return image_tower(self.zoo.info["model"], weights).to(self.device)

    def head(self, task: str) -> Callable[[Tensor], Tensor]:
        """From image embeddings to the logits that the zoo was trained with."""
        return partial(
            scaled_cosines, self.zoo.heads[task].to(self.device), self.zoo.info["logit_scale"]
        )

    def tune(
        self, task: str, start: State, steps: int, lot: int = 0, mask: Mask | None = None
    ) -> State:
        """The image tower after some steps on a task, from some weights; a lot is an order of batches."""
        tower = self.tower(start).train()
        pixels, labels = self.pictures[task]
        optimizer, rate = optimizer_and_schedule(
            tower, self.settings["finetune_lr"], steps, self.settings["weight_decay"]
        )
        rng, head = np.random.default_rng([self.seed, len(task), lot]), self.head(task)
        inside = nullcontext() if mask is None else mp.masked(tower, optimizer, mask)
        with inside:
            for step, rows in enumerate(self._rows(len(labels), steps, lot)):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                batch = pixels[rows] if task != "digits" else shifted(pixels[rows], rng)
                logits = head(tower(batch.to(self.device)))
                loss = cross_entropy(logits, labels[rows].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {f"visual.{k}": v.detach().cpu() for k, v in tower.state_dict().items()}

    def _rows(self, count: int, steps: int, lot: int) -> Iterator[Tensor]:
        """Rows of each step, in new order in each epoch."""
        size, taken = int(self.settings["batch"]), 0
        while taken < steps:
            for rows in batches(count, size, 1000 * self.seed + 100_000 * (lot + 1) + taken):
                if taken < steps:
                    yield rows
                    taken += 1

    def made(self, name: str, make: Callable[[], State]) -> State:
        return kept_or_made(self.work / f"{name}.pt", make)


def scaled_cosines(head: Tensor, scale: float, embedded: Tensor) -> Tensor:
    return scale * normalize(embedded, dim=-1) @ head.mT


# ---- The three ways to train ---------------------------------------------------------------------


def talos(trainer: Trainer) -> dict[str, State]:
    """Towers fine-tuned where the base hardly looks; what is frozen is the base's to the bit."""
    steps = int(trainer.settings["finetune_steps"])

    def make(task: str) -> State:
        generator = torch.Generator().manual_seed(trainer.seed)
        options = {"sparsity": trainer.settings["sparsity"], "generator": generator}
        base = trainer.tower(trainer.zoo.base)
        mask = mp.talos_mask(base, trainer.few(task), head=trainer.head(task), **options)
        return trainer.tune(task, trainer.zoo.base, steps, mask=mask)

    return {task: trainer.made(f"talos-{task}", partial(make, task)) for task in trainer.zoo.tasks}


def atm(trainer: Trainer) -> State:
    """The tower after rounds of tuning all tasks for some steps each and taking their mean."""
    rounds = int(trainer.settings["rounds"])
    steps = max(1, int(trainer.settings["finetune_steps"]) // rounds)
    theta = trainer.zoo.base
    for lot in range(rounds):
        tune = {
            task: lambda theta, task=task, lot=lot: trainer.tune(task, theta, steps, lot)
            for task in trainer.zoo.tasks
        }
        theta = trainer.made(f"atm-{lot}", partial(mp.atm_step, theta, tune))
    return theta


def atlas(trainer: Trainer, objective: str) -> Mapping[str, Tensor]:
    """The zoo's task vectors with learned factors."""
    zoo = trainer.zoo

    def make() -> State:
        heads = {task: trainer.head(task) for task in zoo.tasks}
        few = {task: trainer.few(task) for task in zoo.tasks}
        tasks = {task: inner(state) for task, state in zoo.tasks.items()}
        found = mp.atlas(
            trainer.tower(zoo.base), inner(zoo.base), tasks, few, heads=heads, objective=objective,
            epochs=int(trainer.settings["coefficient_epochs"]),
            generator=torch.Generator().manual_seed(trainer.seed),
        )  # fmt: skip
        return dict(zip(found.names, found.values.cpu().unbind(1), strict=True))

    factors = trainer.made(f"atlas-{objective}", make)
    names = tuple(f"visual.{name}" for name in factors)
    values = torch.stack(list(factors.values()), 1)
    return mp.Coefficients(tuple(sorted(zoo.tasks)), names, values).apply(zoo.base, zoo.tasks)


def inner(state: State) -> State:
    """Weights under the names that the image tower alone has."""
    return {name.removeprefix("visual."): x for name, x in state.items()}


# ---- What they are worth -------------------------------------------------------------------------

Row = dict[str, Any]


def rows_of(trainer: Trainer) -> Iterator[Row]:
    """All results of a zoo."""
    zoo = trainer.zoo
    yield from merged_rows(trainer, "finetuned", zoo.tasks)
    yield from merged_rows(trainer, "talos", talos(trainer))
    yield from rows(trainer, "atm", "merged", atm(trainer))
    yield from rows(trainer, "atlas", "merged", dict(atlas(trainer, "labels")))
    yield from rows(trainer, "atlas_entropy", "merged", dict(atlas(trainer, "entropy")))


def merged_rows(trainer: Trainer, method: str, tasks: dict[str, State]) -> Iterator[Row]:
    """Each task's own model, and all of them merged."""
    for task, weights in tasks.items():
        yield from rows(trainer, method, "own", weights, only=[task])
    lazy = mp.Merged(trainer.zoo.base, tasks, rule="task_arithmetic")
    means = {scale: mean(trainer.judge.accuracies(dict(lazy.at(scale)), "val")) for scale in SCALES}
    best = max(means, key=lambda scale: means[scale])
    yield from rows(trainer, method, "task_arithmetic", dict(lazy.at(best)), best)
    lazy = mp.Merged(trainer.zoo.base, tasks, rule="tsv_m")
    yield from rows(trainer, method, "tsv_m", dict(lazy), lazy.scale)


def rows(
    trainer: Trainer, method: str, model: str, weights: State, scale: float | None = None,
    only: list[str] | None = None,
) -> Iterator[Row]:  # fmt: skip
    val, test = (trainer.judge.accuracies(weights, split, only) for split in ("val", "test"))
    told = "" if scale is None else f"{scale:g}"
    for task in val:
        row = (trainer.seed, method, model, told, task, f"{val[task]:.5f}", f"{test[task]:.5f}")
        yield dict(zip(COLUMNS, map(str, row), strict=True))


def mean(accuracies: Mapping[str, float]) -> float:
    return float(np.mean(list(accuracies.values())))


def write(table: Path, seed: int, found: list[Row]) -> None:
    """Put a seed's rows in the place of those that the table has of it, all of them or none."""
    kept = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    whole = [row for row in kept if row["seed"] != str(seed)] + found
    part = table.with_name(table.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(whole, key=lambda row: int(row["seed"])))
    os.replace(part, table)


def train(
    folder: Path, kept: Path, table: Path, device: torch.device, changes: Mapping[str, float] = {}
) -> list[Row]:
    """Everything for the zoo in a folder; returns its rows of the table."""
    zoo = load_zoo(folder)
    settings = zoo.info["training"] | EXTRA | dict(changes)
    work = kept / f"seed{zoo.info['seed']}"
    work.mkdir(parents=True, exist_ok=True)
    recipe, wanted = work / "recipe.json", json.dumps(settings | {"model": zoo.info["model"]})
    if recipe.exists() and recipe.read_text() != wanted:
        raise SystemExit(
            f"{work} holds a run with other settings: remove it, or choose another --kept"
        )
    recipe.write_text(wanted)
    found = list(rows_of(Trainer(zoo, settings, work, device)))
    write(table, zoo.info["seed"], found)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the zoo (%(default)s)")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what is trained")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    arguments = parser.parse_args(argv)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if arguments.device == "auto" else arguments.device)
    folder = HERE / ("zoo" if arguments.seed == 0 else f"zoo{arguments.seed}")
    if not folder.exists():
        raise SystemExit(f"{folder} is missing: make it with data/train_zoo.py")
    found = train(folder, arguments.kept, arguments.table, device)
    for method, model in dict.fromkeys((row["method"], row["model"]) for row in found):
        test = [float(r["test"]) for r in found if (r["method"], r["model"]) == (method, model)]
        print(f"{method:14s} {model:16s} {np.mean(test):.4f}")


if __name__ == "__main__":
    main()
