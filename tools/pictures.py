"""The two pictures of README and introduction, drawn from what the package computes and from the fair table.

python tools/pictures.py [FOLDER]        default: book/_static
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import verdicts  # noqa: E402  lies in data/
from minipact import plain  # noqa: E402

BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#707070"
DOTS = 200  # per inch, twice what a page shows
KINDS = {"three image encoders": ["zoo0", "zoo1", "zoo2"], "a text encoder": ["encoder"]}
RULES = ["task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "wudi", "ace"]
FILTERS = {"pact": (ORANGE, "behind PACT"), "wiener": (BLUE, "behind Wiener filter")}


def arrow(ax: Axes, end: torch.Tensor, color: str, **style: object) -> None:
    """An arrow from the origin."""
    props = {"arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": color, "lw": 2.6}
    x, y = end.tolist()
    ax.annotate("", (x, y), (0, 0), arrowprops=props | {"shrinkA": 0, "shrinkB": 0} | style)


def plane(ax: Axes, title: str) -> None:
    """Axes for arrows: the plane of a layer's inputs."""
    ax.set(xlim=(-0.06, 1.24), ylim=(-0.8, 0.95), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=11)
    ax.axhline(0, color="#dddddd", lw=1, zorder=0)
    ax.axvline(0, color="#dddddd", lw=1, zorder=0)
    for side in ax.spines.values():
        side.set_visible(False)


def idea() -> Figure:
    """PACT for a layer with two inputs and one output, all arrows as minipact.plain computes them."""
    angle = torch.tensor(45.0, dtype=torch.float64).deg2rad()
    W0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    own = torch.stack([angle.cos(), angle.sin()])
    other = torch.tensor([0.98, 0.1], dtype=torch.float64)
    D = torch.stack([own[None], other[None]])
    core, (left,) = W0[0], plain.pact(W0, D, core=1, task=1)[1]
    reliance = core - own * (own @ core)
    fig, (before, after) = plt.subplots(1, 2, figsize=(4.7, 2.9), layout="constrained")
    plane(before, "What task A relies on")
    arrow(before, core, GRAY)
    arrow(before, own, GREEN)
    arrow(before, reliance, RED)
    before.text(0.6, 0.06, "base's core", color=GRAY)
    before.text(0.2, 0.82, "task A's update", color=GREEN)
    before.text(0.04, -0.79, "the core's part that A\nnever changed: its wall", color=RED)
    before.add_patch(Arc((0, 0), 0.3, 0.3, theta1=-45, theta2=45, color=GRAY, lw=1))
    plane(after, "PACT cuts task B's update")
    arrow(after, other, BLUE, alpha=0.35)
    arrow(after, left, BLUE)
    arrow(after, reliance, RED)
    after.plot(*zip(left.tolist(), other.tolist(), strict=True), color=GRAY, lw=1.4, ls=":")
    after.text(0.5, -0.12, "task B's update", color="#3f7fae")
    after.text(0.2, 0.62, "what is left of it", color=BLUE)
    after.text(0.04, -0.65, "A's wall: not touched", color=RED)
    return fig


def result() -> Figure:
    """Test accuracy of every rule alone and behind two filters, from the fair table."""
    fig, panels = plt.subplots(1, 2, figsize=(4.7, 4.4), sharey=True, layout="constrained")
    for ax, (kind, models) in zip(panels, KINDS.items(), strict=True):
        for y, rule in enumerate(RULES):
            compare(ax, y, models, rule)
        ax.set_title(kind, fontsize=11)
        ax.set(xlabel="test accuracy (%)", yticks=range(len(RULES)), ylim=(len(RULES) - 0.5, -0.6))
        ax.set_yticklabels([verdicts.LABELS[rule] for rule in RULES])
        ax.grid(axis="x", color="#dddddd", lw=0.8)
        ax.tick_params(length=0)
    marks = [Line2D([], [], marker="o", color=GRAY, ls="", label="alone")]
    marks += [Line2D([], [], marker="o", color=c, lw=2.4, label=n) for c, n in FILTERS.values()]
    fig.legend(
        handles=marks,
        loc="outside lower center",
        ncols=3,
        handlelength=1.6,
        columnspacing=1.2,
        frameon=False,
    )
    return fig


def compare(ax: Axes, y: float, models: list[str], rule: str) -> None:
    """One rule: a dot alone, and a line from there to each filter, with the 95 % interval of the gain."""
    alone = verdicts.mean_alone(models, rule)
    for shift, (name, (color, _)) in zip((-0.17, 0.17), FILTERS.items(), strict=True):
        gain = verdicts.gains(models, rule, name)
        ax.plot([alone, alone + gain.points], [y + shift] * 2, color=color, lw=2.4)
        ax.errorbar(
            alone + gain.points,
            y + shift,
            xerr=gain.examples,
            fmt="o",
            ms=6,
            color=color,
            elinewidth=1,
        )
    ax.plot(alone, y, "o", ms=8, color=GRAY, zorder=3)


def packed(figure: Figure) -> bytes:
    """A PNG with a palette of 32 colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DOTS, facecolor="white")
    plt.close(figure)
    image = Image.open(drawn).convert("RGB").quantize(32, dither=Image.Dither.NONE)
    found = io.BytesIO()
    image.save(found, "PNG", optimize=True, dpi=(DOTS, DOTS))
    return found.getvalue()


def main(folder: Path) -> None:
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "axes.spines.left": False})
    for name, draw in {"pact": idea, "result": result}.items():
        (folder / f"{name}.png").write_bytes(packed(draw()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "book" / "_static")
