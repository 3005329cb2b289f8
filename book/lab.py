"""The book's laboratory: the mini zoo, its accuracies, and one style for every picture.

import lab
zoo = lab.load_zoo()
lab.accuracies(zoo.base)                 # {"digits": 0.31, ...} on the test split
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# From tqdm, which open_clip imports.
warnings.filterwarnings("ignore", message="IProgress not found")
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
LETTERS = {ORANGE: "#8A5F00", GREEN: "#00714F", PURPLE: "#9C4477"}
PALETTE = [BLUE, ORANGE, GREEN, RED, PURPLE, "#56B4E9", "#B8A800", GRAY]


def ink(color: str) -> str:
    """The colour for letters: the same, or a darker shade where the letters would be too pale on white."""
    return LETTERS.get(color, color)


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


def hits(weights: State, task: str, split: str = "test") -> np.ndarray:
    """Which of the task's images come out right with these weights: booleans [images]."""
    return _judge().right(weights, split, [task])[task]


def all_hits(
    weights: State, split: str = "test", only: Sequence[str] = TASKS
) -> np.ndarray:
    """Which images of all these tasks, one after the other, come out right: booleans [images]."""
    return np.concatenate(list(_judge().right(weights, split, only).values()))


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Points that one model is ahead of another, and half the width of a 95 % interval for it.

    Both [images], of the same images: right or wrong, or means of that over several draws.
    """
    ahead = 100 * (np.asarray(ours, float) - np.asarray(theirs, float))
    return float(ahead.mean()), 1.96 * float(ahead.std(ddof=1)) / len(ahead) ** 0.5


def mean(values: Mapping[str, float] | Sequence[float]) -> float:
    """Plain average of a list or of a mapping's values."""
    return float(
        np.mean(list(values.values() if isinstance(values, Mapping) else values))
    )


def tune(
    merged: mp.Merged | mp.TaskVector,
    scales: Sequence[float],
    only: Sequence[str] = TASKS,
) -> tuple[float, list[float]]:
    """The scale with the best average validation accuracy, and that average at every scale.

    Of a merge, or of a task vector added to the zoo's base. Of equally good scales the smallest.
    """
    model = _Line(merged) if isinstance(merged, mp.TaskVector) else merged
    found = mp.sweep(
        model, lambda weights: mean(accuracies(weights, "val", only)), scales
    )
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
        raise ValueError(
            f"{value!r} is too close to a rounding boundary for {digits} digits"
        )
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
        print(
            f"{task:10}"
            + "".join(f"{percent(columns[n][task]):>{width}}" for n in names)
        )
    print(
        f"{'average':10}"
        + "".join(f"{percent(mean(columns[n])):>{width}}" for n in names)
    )


# ---- Pictures ------------------------------------------------------------------------------------


def style() -> None:
    """One look for all figures; called at the top of every chapter.

    A figure of this width on a phone of 375 px has labels of 11 px; its pixels are twice the page's.
    """
    # matplotlib's own copy of the style, as seaborn takes 130 MB to import
    plt.style.use("seaborn-v0_8-whitegrid")
    mpl.rcParams.update({
        "font.size": 12,
        "axes.labelsize": 12,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "legend.fontsize": 11,
        "legend.frameon": True,
        "axes.prop_cycle": mpl.cycler(color=PALETTE),
        "figure.figsize": (4.8, 3.2),
        "figure.dpi": 200,
        "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "grid.alpha": 0.4,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "minipact",
    })  # fmt: skip


def gallery(columns: int = 6) -> None:
    """A row of test images for every task, in few colours to keep the notebook small."""
    rows = []
    for task in TASKS:
        images, labels = pictures(task)
        kinds = len(zoo_tasks.TASKS[task].classes)
        first = [
            np.flatnonzero(labels == k % kinds)[k // kinds] for k in range(columns)
        ]
        rows.append(np.concatenate(list(images[first]), axis=1))
    mosaic = Image.fromarray(np.concatenate(rows)).quantize(32).convert("RGB")
    _, ax = plt.subplots(figsize=(4.8, 5.2))
    ax.imshow(mosaic, interpolation="nearest")
    middles = [32 * i + 16 for i in range(len(TASKS))]
    ax.set(xticks=[], yticks=middles, yticklabels=TASKS)
    ax.grid(False)
    plt.show()


def heatmap(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    **options,
) -> None:
    """Heatmap with the numbers in its cells; the label says what they are."""
    import seaborn as sns  # here, as it takes 130 MB of memory

    settings = {"annot": True, "fmt": ".2f", "cmap": "cividis", "cbar": False}
    _, ax = plt.subplots(figsize=(4.8, 1.2 + 0.36 * len(rows)))
    sns.heatmap(
        matrix, xticklabels=columns, yticklabels=rows, ax=ax, annot_kws={"size": 10},
        **settings | options,
    )  # fmt: skip
    ax.set_title(label)
    ax.tick_params(axis="x", rotation=60)
    ax.tick_params(axis="y", rotation=0)
    plt.show()


# ---- Sliders -------------------------------------------------------------------------------------

# A chapter with two sliders still loads fast.
SLIDER_BYTES = 150_000

# Without its script a reader sees the first and the last frame; nothing moves unless the reader moves it.
SLIDER = """\
<div class="slider" id="{name}" style="max-width:36rem;margin:auto">
{frames}
<input type="range" hidden autocomplete="off" min="0" max="{last}" step="1" value="{start}"
 aria-label="{label}" style="width:100%;height:2rem;margin:0;accent-color:#0072B2">
</div>
<script>
(() => {{
  const box = document.getElementById("{name}");
  const frames = box.querySelectorAll("[data-value]"), range = box.querySelector("input");
  const show = () => {{
    frames.forEach((f, i) => {{ f.style.display = i == range.value ? "block" : "none"; }});
    const now = frames[range.value];
    range.setAttribute("aria-valuetext", now.dataset.value + ". " + now.querySelector("img").alt);
  }};
  range.addEventListener("input", show);
  range.hidden = false;
  show();
}})();
</script>
"""
FRAME = """\
<div data-value="{value}" style="display:{display}">
<div style="text-align:center">{label}: <b>{value}</b></div>
<img src="data:image/png;base64,{png}" alt="{alt}" width="{width}" height="{height}"
 style="width:100%;height:auto">
</div>"""


def slider(
    frames: Mapping[str, tuple[Figure, str]], label: str, start: int = 0
) -> None:
    """Show one of several figures, chosen with a slider that needs neither a kernel nor a network.

    Args:
        frames: per value of the slider a figure and its alternative text; all figures of one size.
        label: what the slider changes.
        start: the frame to begin with.

    Raises:
        ValueError: figures of several sizes, a frame without alternative text, or too many bytes.
    """
    pictures = [_picture(figure) for figure, _ in frames.values()]
    if len({picture.size for picture in pictures}) > 1:
        raise ValueError("the frames of a slider need figures of one size")
    if not all(alt for _, alt in frames.values()):
        raise ValueError("every frame of a slider needs an alternative text")
    ends = (0, len(frames) - 1)
    parts = [
        FRAME.format(
            value=html.escape(value), label=html.escape(label), alt=html.escape(alt),
            png=_png(picture), width=picture.width // 2, height=picture.height // 2,
            display="block" if i in ends else "none",
        )
        for i, (picture, (value, (_, alt))) in enumerate(zip(pictures, frames.items(), strict=True))
    ]  # fmt: skip
    inner = "\n".join(parts)
    name = "slider-" + hashlib.sha256(inner.encode()).hexdigest()[:8]
    page = SLIDER.format(
        name=name, frames=inner, last=ends[1], start=start, label=html.escape(label)
    )
    if len(page) > SLIDER_BYTES:
        raise ValueError(
            f"this slider takes {len(page):,} bytes, more than {SLIDER_BYTES:,}"
        )
    display(HTML(page))


def _picture(figure: Figure) -> Image.Image:
    """A figure at twice the resolution of the page, and not cropped, so that frames do not jump."""
    figure.set_dpi(200)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    plt.close(figure)
    return Image.fromarray(pixels).convert("RGB")


def _png(picture: Image.Image) -> str:
    """The picture as a PNG with a palette, in base64."""
    packed = io.BytesIO()
    picture.quantize(32, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()
