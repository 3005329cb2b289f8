"""Small tensors that are merged together, so that each operation has enough to do.

A group holds tensors of one treatment and, where a method looks at matrices, of one shape. Groups follow from
the plan alone, names, shapes and types: never from threads, processes, or what is asked for first. So the
bytes of a tensor do not depend on any of these, even where a library's batched routine rounds otherwise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock, RLock

import torch
from torch import Tensor

from minipact.steps import Step
from minipact.tensors import Device, State, States, moved, own_delta, task_matrices

GROUP = 1 << 19  # entries of the base and all tasks that a group may have; they fit into a cache
SMALL = 1 << 12  # entries of a tensor in all models, below which groups may be four times larger
WAITING = 1 << 26  # entries of results that wait until they are asked for

Group = tuple[Step, ...]


def groups_of(
    steps: Iterable[Step], alike: Callable[[Step], Hashable], models: int
) -> dict[str, Group]:
    """The group of each tensor, by name; in the order of the steps.

    Args:
        alike: equal for those that may be in one group; None for one that stays alone.
        models: how many the merge reads, the base with the tasks.
    """
    found: list[list[Step]] = []
    latest: dict[Hashable, tuple[list[Step], int]] = {}
    for step in steps:
        key, size = alike(step), models * step.entries
        group, held = latest.get(key, ([], 0))
        most = 4 * GROUP if size < SMALL else GROUP
        if key is None or not group or held + size > most:
            group, held = [], 0
            found.append(group)
        group.append(step)
        latest[key] = group, held + size
    whole = [tuple(group) for group in found]
    return {step.name: group for group in whole for step in group}


@dataclass
class Waiting:
    """Results of groups until they are asked for, one by one; the oldest go where they become too many."""

    found: OrderedDict[str, tuple[Tensor | None, int]] = field(default_factory=OrderedDict)
    lock: RLock = field(default_factory=RLock)
    busy: dict[str, Lock] = field(default_factory=dict)

    def take(
        self, name: str, group: Group, compute: Callable[[], list[Tensor | None]]
    ) -> Tensor | None:
        """The result of one tensor, computed with its group unless it waits here; it does not stay."""
        if len(group) == 1:
            return compute()[0]
        with self.lock:
            busy = self.busy.setdefault(group[0].name, Lock())
        with busy:
            with self.lock:
                if name in self.found:
                    return self.found.pop(name)[0]
            results = dict(zip((step.name for step in group), compute(), strict=True))
            mine = results.pop(name)
            with self.lock:
                for other, x in results.items():
                    self.found[other] = (x, 0 if x is None else x.numel())
                self._make_room()
            return mine

    def _make_room(self) -> None:
        held = sum(size for _, size in self.found.values())
        while held > WAITING:
            held -= self.found.popitem(last=False)[1][1]


@torch.no_grad()
def group_matrices(
    names: Sequence[str], base: State, tasks: States, weights: Mapping[str, float], device: Device
) -> tuple[Tensor, Tensor]:
    """Tensors of several names end to end: the base's [N], and weight * (fine-tuned - base) [T, N].

    The same as `tensors.task_matrices` of each, for many small tensors of equal types; but NaN and infinity
    stay in, since looking for them takes a wait for the device.
    """
    rows = [_row(names, base, task) for task in tasks.values()]
    origin = _joined(base[name] for name in names)
    types = {origin.dtype, *(x.dtype for x, _ in rows)}
    wide = torch.float64 if torch.float64 in types else torch.float32
    start = moved(origin, device).to(wide)
    D = start.new_empty(len(rows), len(start))
    for out, (x, is_difference), label in zip(D, rows, tasks, strict=True):
        torch.sub(moved(x, device).to(wide), start, alpha=int(not is_difference), out=out)
        if weights.get(label, 1.0) != 1:
            out.mul_(weights[label])
    return start, D


def _row(names: Sequence[str], base: State, task: State) -> tuple[Tensor, bool]:
    """A task's tensors end to end, or its differences from the base where it knows some of them itself."""
    known = {name: own_delta(task, name, base) for name in names}
    if all(x is None for x in known.values()):
        return _joined(task[name] for name in names), False
    alone = {"": task}
    whole = (task_matrices(name, base, alone)[0] if x is None else x for name, x in known.items())
    return _joined(whole), True


@torch.no_grad()
def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def zero_parts(x: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Whether each part of x [N] is zero, the sizes of the parts given: one wait for the device."""
    if len({*sizes}) == 1:
        return x.view(len(sizes), -1).any(1).logical_not().tolist()
    ends = torch.tensor(sizes).cumsum(0).sub(1).to(x.device)
    counts = x.ne(0).cumsum(0)[ends].tolist()
    return [count == before for count, before in zip(counts, [0, *counts], strict=False)]
