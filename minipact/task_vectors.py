"""Task vectors and their arithmetic: fine-tuned minus pre-trained weights, name -> tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minipact.alignment import aligned
from minipact.errors import MergeError, listing
from minipact.merging import Merged
from minipact.steps import Tasks
from minipact.tensors import State, add_update, meta_of, task_matrices


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
        """State dict base + scale * self: new tensors in the base's dtypes; unnamed ones are copies.

        Raises MergeError where the base lacks a name, or a shape differs.
        """
        if unknown := [name for name in self if name not in base]:
            raise MergeError(f"the base lacks {listing(unknown)}: is it the right base?")
        if other := [name for name, delta in self.items() if delta.shape != base[name].shape]:
            raise MergeError(
                f"{listing(other)}: other shapes than the base's: is it the right base?"
            )
        return {name: add_update(name, x, self.get(name), scale) for name, x in base.items()}

    def _with(self, other: TaskVector) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.keys() != other.keys():
            differing = sorted(self.keys() ^ other.keys())
            raise MergeError(f"task vectors differ in {listing(differing)}")
        return ((name, delta, other[name]) for name, delta in self.items())


def task_vector(base: State, tuned: State) -> TaskVector:
    """Task vector: fine-tuned minus pre-trained weights (Ilharco et al. 2023, section 2).

    name -> difference for every floating-point tensor, in float32 (float64 where an input is). Raises
    MergeError where names or shapes of the two mappings differ, or a tensor holds NaN or infinity.
    """
    models = aligned(base, {"tuned": tuned}, lambda _, x: x.is_floating_point())
    names = [name for name in base if meta_of(base, name).is_floating_point()]
    return TaskVector({name: task_matrices(name, base, models.tasks)[0] for name in names})


def merged_delta(base: State, tasks: Tasks, **keywords: Any) -> TaskVector:
    """Merged task vector before scaling: `merged_delta(...).apply_to(base, scale)` is `merge(..., scale)`.

    Keywords and errors as in `Merged`; tensors that are copied from the base have no entry. Raises
    MergeError too where vectors are not scaled along, as no one factor then gives the merge: use
    `Merged(...).at(scale)`, which serves every case, or vectors="rule".
    """
    merged = Merged(base, tasks, **keywords)
    fixed = [name for name, step in merged.steps.items() if step.factor is not None]
    if fixed:
        remedy = "use Merged(...).at(scale), or vectors='rule' or 'copy'"
        raise MergeError(f"{listing(fixed)}: vectors are not scaled along with the rest: {remedy}")
    vectors = merged.map(lambda name: merged.parts(name)[1])
    found = zip(merged, vectors, strict=True)
    return TaskVector({name: delta.cpu() for name, delta in found if delta is not None})
