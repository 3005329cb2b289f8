"""The book's laboratory: the mini zoo, its accuracies, and one style for every picture.

import lab
zoo = lab.load_zoo()
lab.accuracies(zoo.base)                 # {"digits": 0.31, ...} on the test split
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, imported by open_clip
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import minipact as mp  # noqa: E402
import tasks as zoo_tasks  # noqa: E402  lies in data/
import zoo_io  # noqa: E402
from check import check  # noqa: E402, F401  for fill-in cells

TASKS = list(zoo_tasks.TASKS)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
State = Mapping[str, Tensor]

# Okabe and Ito's colours, which colour-blind readers can tell apart; on a light card in dark mode too.
BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#707070",
)
PALETTE = [BLUE, ORANGE, GREEN, RED, PURPLE, "#56B4E9", "#B8A800", GRAY]


# ---- The zoo -------------------------------------------------------------------------------------


@cache
def load_zoo() -> zoo_io.Zoo:
    """The committed zoo: base, tasks, heads and zoo.json, checked against its checksums."""
    return zoo_io.load_zoo(ROOT / "data" / "zoo")


@cache
def pictures(task: str, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of one split, drawn once per session."""
    return zoo_tasks.load(task, split)


@cache
def _judge() -> zoo_io.Judge:
    zoo = load_zoo()
    return zoo_io.Judge(zoo.info["model"], zoo.heads, DEVICE, pictures)


def accuracy(weights: State, task: str, split: str = "test") -> float:
    """Share of the task's images that the image tower with these weights puts into the right class."""
    return accuracies(weights, split, [task])[task]


def accuracies(
    weights: State, split: str = "test", only: Sequence[str] = TASKS
) -> dict[str, float]:
    """Accuracy on every task, task -> share in 0..1."""
    return _judge().accuracies(weights, split, only)


def mean(values: Mapping[str, float] | Sequence[float]) -> float:
    """Plain average of a list or of a mapping's values."""
    return float(np.mean(list(values.values() if isinstance(values, Mapping) else values)))


def tune(
    merged: mp.Merged | mp.TaskVector, scales: Sequence[float], only: Sequence[str] = TASKS
) -> tuple[float, list[float]]:
    """The scale with the best average validation accuracy, and that average at every scale.

    Of a merge, or of a task vector added to the zoo's base. Of equally good scales the smallest.
    """
    model = _Line(merged) if isinstance(merged, mp.TaskVector) else merged
    found = mp.sweep(model, lambda weights: mean(accuracies(weights, "val", only)), scales)
    return found.scale, list(found.scores.values())


@dataclass(frozen=True)
class _Line:
    """The zoo's base plus any multiple of a task vector, in the form that `mp.sweep` takes."""

    direction: mp.TaskVector

    def at(self, scale: float) -> State:
        return self.direction.apply_to(load_zoo().base, scale)


# ---- Numbers in print ----------------------------------------------------------------------------


def fixed(value: float, digits: int = 3, slack: float = 1e-3) -> str:
    """Number with so many decimals; refused where another machine might round it the other way.

    Raises:
        ValueError: the value lies within `slack` of a rounding boundary, in units of the last digit.
    """
    units = abs(value) * 10**digits
    if abs(units % 1 - 0.5) < slack:
        raise ValueError(f"{value!r} is too close to a rounding boundary for {digits} digits")
    return f"{value:.{digits}f}"


def percent(share: float) -> str:
    """Share of correct pictures, in percent with one decimal; a ratio of counts, so exact."""
    return f"{100 * share:.1f}"


def table(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print accuracies in percent: one row per task, one column per model, and the average."""
    names = list(columns)
    width = max(8, *(len(name) for name in names)) + 2
    print(" " * 10 + "".join(f"{name:>{width}}" for name in names))
    for task in next(iter(columns.values())):
        print(f"{task:10}" + "".join(f"{percent(columns[n][task]):>{width}}" for n in names))
    print(f"{'average':10}" + "".join(f"{percent(mean(columns[n])):>{width}}" for n in names))


# ---- Pictures ------------------------------------------------------------------------------------


def style() -> None:
    """One look for all figures; called at the top of every chapter."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE)
    mpl.rcParams.update({
        "figure.figsize": (7.2, 4.2),
        "figure.dpi": 100,
        "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "grid.alpha": 0.4,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "minipact",
    })  # fmt: skip


def gallery(columns: int = 10) -> None:
    """A row of test images for every task, in 64 colours to keep the notebook small."""
    rows = []
    for task in TASKS:
        images, labels = pictures(task)
        kinds = len(zoo_tasks.TASKS[task].classes)
        chosen = [np.flatnonzero(labels == k % kinds)[k // kinds] for k in range(columns)]
        rows.append(np.concatenate(list(images[chosen]), axis=1))
    mosaic = Image.fromarray(np.concatenate(rows)).quantize(64).convert("RGB")
    _, ax = plt.subplots(figsize=(7.2, 5.4))
    ax.imshow(mosaic, interpolation="nearest")
    ax.set(xticks=[], yticks=[32 * i + 16 for i in range(len(TASKS))], yticklabels=TASKS)
    ax.grid(False)
    plt.show()


def heatmap(
    matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, **options
) -> None:
    """Labelled heatmap with a colour bar and the numbers in the cells."""
    settings = {"annot": True, "fmt": ".2f", "cmap": "cividis", "annot_kws": {"size": 8}}
    _, ax = plt.subplots(figsize=(1.2 + 0.72 * len(columns), 0.9 + 0.48 * len(rows)))
    sns.heatmap(
        matrix, xticklabels=columns, yticklabels=rows, cbar_kws={"label": label}, ax=ax,
        **settings | options,
    )  # fmt: skip
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)
    plt.show()
