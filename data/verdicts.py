"""Reading the fair table: accuracies, and gains with paired intervals.

rows = load("zoo0")
gain([hits(behind)], [hits(alone)])   # points, with 95 % intervals over examples and over tasks
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, t

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
