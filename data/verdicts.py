"""Reading the fair table: accuracies, and gains with paired intervals.

rows = load("zoo0")
gain([hits(behind)], [hits(alone)])   # points, with 95 % intervals over examples and over tasks
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, t

from rows import FOLDER, path_of, read

Hits = Mapping[str, np.ndarray]
TESTS = 500  # test examples of every task, of the zoos and of the encoder


@dataclass(frozen=True)
class Gain:
    """Mean difference over tasks in points, and half widths of its 95 % intervals.

    Attributes:
        points: mean over tasks, and over models of one kind.
        examples: half width over examples, for these tasks and these models.
        tasks: half width over tasks, which stand for others of their kind.
    """

    points: float
    examples: float
    tasks: float


def hits(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which test examples of each task come out right: booleans [500]."""
    return {
        task: np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))[:TESTS].astype(bool)
        for task, bits in row["hits"].items()
    }


def accuracy(found: Hits) -> float:
    """Mean over tasks of the share of right answers."""
    return float(np.mean([x.mean() for x in found.values()]))


def gain(behind: Sequence[Hits], alone: Sequence[Hits]) -> Gain:
    """How much better some models do than others, on the same tasks and the same examples.

    Args:
        behind, alone: for each training, task -> booleans [examples], in the same order. Examples that come
            back in several trainings are averaged over them first, so that they count once.
    """
    differences = {
        task: np.mean(
            [a[task].astype(float) - b[task] for a, b in zip(behind, alone, strict=True)], 0
        )
        for task in behind[0]
    }
    means = [d.mean() for d in differences.values()]
    within = sum(d.var(ddof=1) / len(d) for d in differences.values()) ** 0.5 / len(means)
    between = np.std(means, ddof=1) / len(means) ** 0.5
    spread = t.ppf(0.975, len(means) - 1)
    return Gain(
        *(100 * float(x) for x in (np.mean(means), norm.ppf(0.975) * within, spread * between))
    )


# ---- Verdicts ------------------------------------------------------------------------------------


def load(model: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Rows of a model that have test data."""
    return [row for row in read(path_of(model, folder)) if "hits" in row]


def alone(rows: Iterable[Mapping[str, Any]], rule: str) -> Mapping[str, Any]:
    """A rule without a filter, with those of the two treatments of vectors that validation data prefer."""
    found = [row for row in rows if row["rule"] == rule and not row["purify"]]
    return max(found, key=lambda row: row["val"])


def behind(rows: Iterable[Mapping[str, Any]], rule: str, name: str) -> Mapping[str, Any] | None:
    """A rule behind a filter, None where it is not measured; the last of several settings."""
    found = [row for row in rows if row["rule"] == rule and row["purify"] == [name]]
    return found[-1] if found else None


def gains(models: Sequence[str], rule: str, name: str, folder: Path = FOLDER) -> Gain | None:
    """What a filter gains in front of a rule, over trainings of one kind; None where not measured."""
    rows = [load(model, folder) for model in models]
    filtered = [behind(own, rule, name) for own in rows]
    if any(row is None for row in filtered):
        return None
    return gain([hits(row) for row in filtered if row], [hits(alone(own, rule)) for own in rows])


def mean_alone(models: Sequence[str], rule: str, folder: Path = FOLDER) -> float:
    """Test accuracy in percent of a rule without a filter, mean over models."""
    rows = [alone(load(model, folder), rule) for model in models]
    return 100 * float(np.mean([accuracy(hits(row)) for row in rows]))


def contrast(
    models: Sequence[str], rule: str, name: str, other: str, folder: Path = FOLDER
) -> Gain | None:
    """What a filter gains over another one in front of a rule, paired; None where one is not measured."""
    pairs = [[behind(load(m, folder), rule, x) for m in models] for x in (name, other)]
    if any(row is None for rows in pairs for row in rows):
        return None
    ours, theirs = ([hits(row) for row in rows if row] for rows in pairs)
    return gain(ours, theirs)


LABELS = {
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "wudi": "WUDI",
    "ace": "ACE-Merging",
    "pact": "PACT",
    "sift": "SIFT",
    "random_shield": "random shield",
    "updates_shield": "others' updates",
    "shrinking": "shrinking",
    "wiener": "Wiener filter",
}


def markdown(models: Sequence[str], folder: Path = FOLDER) -> str:
    """Rules down, filters across: accuracy alone, then gains with the half width over examples.

    Bold where neither the interval over examples nor the one over tasks holds zero.
    """
    rows = load(models[0], folder)
    rules = [rule for rule in LABELS if any(row["rule"] == rule for row in rows)]
    names = [name for name in LABELS if any(row["purify"] == [name] for row in rows)]
    lines = ["| rule | alone | " + " | ".join(LABELS[n] for n in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for rule in rules:
        cells = [_cell(gains(models, rule, name, folder)) for name in names]
        alone = f"{mean_alone(models, rule, folder):.1f}"
        lines.append(f"| {LABELS[rule]} | {alone} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Gain | None) -> str:
    if found is None:
        return ""
    text = f"{found.points:+.1f} ± {found.examples:.1f}"
    sure = abs(found.points) > max(found.examples, found.tasks)
    return f"**{text}**" if sure else text


if __name__ == "__main__":
    print(markdown(sys.argv[1:]))
