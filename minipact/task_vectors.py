"""Task vectors and their arithmetic: fine-tuned minus pre-trained weights, name -> tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minipact.merging import (
    MergeError,
    State,
    Tasks,
    _add,
    _delta_blocks,
    _listing,
    _meta,
    _mismatches,
    plan,
)


class TaskVector(dict[str, Tensor]):
    """Differences of weights, name -> tensor, with the arithmetic of task vectors.

    `a + b`, `a - b`, `-a`, `2 * a`, `sum([a, b])`, `a.dot(b)`, `a.norm()`, `a.cosine(b)`, and
    `a.apply_to(base, scale)`. Source: Ilharco et al. 2023, section 2 (arXiv 2212.04089).
    """

    def __add__(self, other: TaskVector | int) -> TaskVector:
        if isinstance(other, int):  # sum() starts from the integer 0
            return TaskVector(self) if other == 0 else NotImplemented
        return TaskVector({name: delta + x for name, delta, x in self._with(other)})

    __radd__ = __add__

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: delta * factor for name, delta in self.items()})

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def dot(self, other: TaskVector) -> float:
        """Inner product over all entries, in float64."""
        return sum(float((d.double() * x.double()).sum()) for _, d, x in self._with(other))

    def norm(self) -> float:
        """Euclidean norm over all entries."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Cosine of the angle to another task vector; NaN if one of them is zero."""
        lengths = self.norm() * other.norm()
        return self.dot(other) / lengths if lengths else math.nan

    def apply_to(self, base: State, scale: float = 1.0) -> dict[str, Tensor]:
        """State dict base + scale * self: new tensors in the base's dtypes; unnamed ones are copies."""
        unknown = [name for name in self if name not in base]
        if unknown:
            raise MergeError(f"the base lacks {_listing(unknown)}: is it the right base?")
        return {name: _add(name, x, self.get(name), scale, None) for name, x in base.items()}

    def _with(self, other: TaskVector) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.keys() != other.keys():
            differing = sorted(self.keys() ^ other.keys())
            raise MergeError(f"task vectors differ in {_listing(differing)}")
        return ((name, delta, other[name]) for name, delta in self.items())


def task_vector(base: State, tuned: State) -> TaskVector:
    """Task vector: fine-tuned minus pre-trained weights (Ilharco et al. 2023, section 2).

    name -> difference for every floating-point tensor, in float32 (float64 where an input is). Raises
    MergeError where names or shapes of the two mappings differ, or a tensor holds NaN or infinity.
    """
    if problems := _mismatches(base, "tuned", tuned):
        raise MergeError("\n".join(problems))
    names = [name for name in base if _meta(base, name).is_floating_point()]
    return TaskVector(
        {name: next(_delta_blocks(name, base, {"tuned": tuned}, None, "cpu"))[0] for name in names}
    )


def merged_delta(base: State, tasks: Tasks, **recipe: Any) -> TaskVector:
    """Merged task vector before scaling, so that a sweep over scales merges only once.

    `merged_delta(base, tasks, ...).apply_to(base, scale)` equals `merge(..., scale=scale)`. Arguments
    and errors as in `merge`; tensors that are copied from the base have no entry.
    """
    deltas = plan(base, tasks, **recipe).deltas()
    return TaskVector({step.name: delta.cpu() for step, _, delta in deltas if delta is not None})
