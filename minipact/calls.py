"""Methods called on the tensors of a merge: what each needs is put together, what it returns is checked.

For one tensor, or for a group of small ones at once; see `minipact.groups`. Names no method: what a method
needs is written in the registry, `minipact.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minipact.errors import MergeError
from minipact.groups import GROUP, Group
from minipact.low_rank import Product, Products
from minipact.methods import (
    FACTORS,
    Measure,
    Method,
    is_built_in,
    is_finite,
    is_zero,
    named_generator,
    parameters_of,
)
from minipact.steps import Applied, Step
from minipact.tensors import Device, State, States, moved, task_factors

Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Calls:
    """The models of a merge, with all that methods take from them.

    Attributes:
        base, tasks: the models, the tasks by name.
        holders: name -> the tasks that hold a tensor which not all do.
        weights: task name -> factor of its task vector; 1 where none is given.
        statistics: of data, kind -> one mapping for each task.
        seed: of random numbers. device: where to compute.
    """

    base: State
    tasks: States
    holders: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, float]
    statistics: Mapping[str, States]
    seed: int
    device: Device

    def holding(self, name: str) -> dict[str, State]:
        """The tasks that hold a tensor: all but where missing="present" lets some lack it."""
        labels = self.holders.get(name, tuple(self.tasks))
        return {label: self.tasks[label] for label in labels}

    def with_weights(self, step: Step) -> tuple[dict[str, State], dict[str, float]]:
        """The tasks that hold a tensor, and their weights."""
        tasks = self.holding(step.name)
        return tasks, {label: self.weights.get(label, 1.0) for label in tasks}

    # -- groups ------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_group(
        self, use: Applied, answer: Answer, group: Group, D: Tensor, W0: Tensor | None = None
    ) -> Tensor:
        """Run one purifier or rule on a group: D [T, N], end to end, or [T, G, ...] of one shape, as W0."""
        if use.method.acts_on == "entries":
            return self._by_entry(use, answer, group, D)
        return self._by_matrix(use, answer, group, D, W0)

    def _by_entry(self, use: Applied, answer: Answer, group: Group, D: Tensor) -> Tensor:
        if not use.takes_blocks(answer):
            return self._one_by_one(use, answer, group, D)
        return _result(use, group[0], [D], self._keywords(use, group[0]) | answer)

    def _by_matrix(
        self, use: Applied, answer: Answer, group: Group, D: Tensor, W0: Tensor | None
    ) -> Tensor:
        inputs = [D.transpose(0, 1)]
        if not use.method.batched or not _all_change(inputs[0]):
            return self._one_by_one(use, answer, group, D)  # which lets zeros be
        if W0 is not None and "base" in use.method.needs:
            inputs.insert(0, W0)
        keywords: dict[str, Any] = use.clipped(group[0].shape)
        if "generator" in use.method.needs:
            keywords["generator"] = [named_generator(self.seed, step.name) for step in group]
        try:
            return _turned(use, group[0], _several, inputs, keywords | answer)
        except MergeError:
            return self._one_by_one(use, answer, group, D)  # which names the tensor

    def _one_by_one(self, use: Applied, answer: Answer, group: Group, D: Tensor) -> Tensor:
        """Run a method on the tensors of a group for themselves; the result is as of all at once."""
        sizes = [step.entries for step in group]
        parts = zip(group, torch.split(D.flatten(1), sizes, 1), strict=True)
        found = [self.on_tensor(use, answer, step, x.view(-1, *step.shape)) for step, x in parts]
        if use.purifies:
            return torch.cat([x.flatten(1) for x in found], 1).view(D.shape)
        return torch.cat([x.flatten() for x in found]).view(D.shape[1:])

    # -- factors -----------------------------------------------------------------------------------

    def factors(self, use: Applied, step: Step) -> Products | None:
        """D [T, m, n] of one tensor as factors, for a rule that takes them, where all tasks have some."""
        takes = use.name == step.rule and FACTORS in use.method.needs and not step.purify
        if not takes or not step.kind.startswith("matrix"):
            return None
        tasks, weights = self.with_weights(step)
        return task_factors(step.name, self.base, tasks, weights, self.device)

    @torch.no_grad()
    def from_factors(
        self, use: Applied, answer: Answer, step: Step, D: Products
    ) -> Tensor | Product | None:
        """A rule's result from the factors of all tasks, None where these are of rank 0."""
        if all(d.rank == 0 for d in D):
            return None
        turned = use.sees_transposed(step.kind)
        keywords = self._keywords(use, step)
        given = D.mT if turned else D
        with _blaming(step, use):
            result: Any = use.method.function(given, **keywords, **answer)
            if not isinstance(result, Product):
                result = _checked(result, given[0].empty(), use.method)
        found: Tensor | Product = result.mT if turned else result
        return found

    # -- one tensor --------------------------------------------------------------------------------

    @torch.no_grad()
    def on_tensor(self, use: Applied, answer: Answer, step: Step, D: Tensor) -> Tensor:
        """Run one purifier or rule on one tensor."""
        if use.method.acts_on == "matrix" and is_zero(D):
            return use.like_result(D)
        inputs, keywords = self._arguments(use, step, D)
        run = partial(_stack if use.sees_slices(step.kind) else _result, fixed=answer)
        return _turned(use, step, run, inputs, keywords)

    def _arguments(
        self, use: Applied, step: Step, D: Tensor
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """What a method needs for one tensor: D, perhaps behind W0, and its options; see `Method.needs`."""
        keywords = self._keywords(use, step)
        inputs = [D]
        if "base" in use.method.needs:  # a copy for functions of strangers, who might change it
            W0 = moved(self.base[step.name], self.device)
            inputs.insert(0, W0.to(D, copy=not is_built_in(use.method)))
        return inputs, keywords | self._tuned(use, step, D) | self._statistics_of(use, step.name, D)

    def _keywords(self, use: Applied, step: Step) -> dict[str, Any]:
        """A method's options for one tensor, and its random numbers."""
        needs, seed = use.method.needs, self.seed
        keywords: dict[str, Any] = use.clipped(step.shape[-2:])
        if "generator" in needs:
            keywords["generator"] = named_generator(seed, step.name)
        if "generators" in needs:
            per_task = [named_generator(seed, task, step.name) for task in self.holding(step.name)]
            keywords["generator"] = per_task
        return keywords

    def _tuned(self, use: Applied, step: Step, D: Tensor) -> dict[str, Tensor]:
        """The fine-tuned weights [T, ...] of one tensor, as the method sees D, where it needs them."""
        if "tuned" not in use.method.needs:
            return {}
        tuned = self.holding(step.name).values()
        found = torch.stack([moved(task[step.name], self.device).to(D) for task in tuned])
        return {"tuned": found.mT if use.sees_transposed(step.kind) else found}

    def _statistics_of(self, use: Applied, name: str, D: Tensor) -> dict[str, Tensor]:
        """The statistics [T, ...] that a method needs for one tensor, by kind, in D's type."""
        found = {}
        labels = list(self.holding(name))
        for kind in use.statistics:
            states = [self.statistics[kind][label] for label in labels]
            found[kind] = torch.stack([moved(state[name], self.device).to(D) for state in states])
            bad = [x for x, own in zip(labels, found[kind], strict=True) if not is_finite(own)]
            if bad:
                raise MergeError(f"{kind} of '{name}', task '{bad[0]}', holds NaN or infinity")
        return found

    def measured(self, measure: Measure, use: Applied, step: Step, D: Any) -> Tensor:
        """measure(D) of one tensor, or of a block of it, with the statistics that it takes."""
        if use.sees_transposed(step.kind):
            D = D.mT
        if isinstance(D, Products):
            return measure(D).cpu()
        given = self._statistics_of(use, step.name, D)
        if "tuned" in parameters_of(measure):
            given |= self._tuned(use, step, D)
        if not use.sees_slices(step.kind):
            return measure(D, **given).cpu()
        return added(
            measure(one_of(D, e), **{kind: one_of(x, e) for kind, x in given.items()}).cpu()
            for e in range(step.shape[0])
        )


@contextmanager
def _blaming(step: Step, use: Applied) -> Iterator[None]:
    """Have errors of a method name it and the tensor."""
    try:
        yield
    except MergeError as error:
        raise MergeError(f"tensor '{step.name}', {use.name}: {error}") from error
    except Exception as error:
        if is_built_in(use.method) or "memory" in str(error):
            raise
        raise MergeError(f"tensor '{step.name}', {use.name} failed: {error!r}") from error


def _checked(result: object, expected: Tensor, method: Method) -> Tensor:
    """What a method returned, if it is a tensor of the expected shape; in the expected type."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.is_sparse:
        kind = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise MergeError(f"it returned {kind}, not a dense tensor of floating-point numbers")
    if result.shape != expected.shape:
        raise MergeError(f"it returned the shape {tuple(result.shape)} for {tuple(expected.shape)}")
    if not is_built_in(method) and not is_finite(result):
        raise MergeError("it returned NaN or infinity")
    return result.to(expected)


Run = Callable[[Applied, Step, list[Tensor], dict[str, Any]], Tensor]


def _turned(
    use: Applied, step: Step, run: Run, inputs: list[Tensor], keywords: dict[str, Any]
) -> Tensor:
    """run(...) on matrices as the method sees them, and its result as they are stored."""
    if not use.sees_transposed(step.kind):
        return run(use, step, inputs, keywords)
    return run(use, step, [x.mT for x in inputs], keywords).mT


def _result(
    use: Applied,
    step: Step,
    inputs: list[Tensor],
    keywords: dict[str, Any],
    fixed: Mapping[str, Any] = MappingProxyType({}),
    tasks_axis: int = 0,
) -> Tensor:
    """What a method returns, checked, with the tasks in front; in D they stand at `tasks_axis`."""
    expected = use.like_result(inputs[-1].movedim(tasks_axis, 0))
    with _blaming(step, use):
        found = use.method.function(*inputs, **keywords, **fixed)
        if tasks_axis and use.purifies and isinstance(found, Tensor):
            found = found.movedim(tasks_axis, 0)
        return _checked(found, expected, use.method)


# For several matrices at once, D [G, T, m, n]: [T, G, m, n], or [G, m, n] of a rule.
_several = partial(_result, tasks_axis=1)


def _stack(
    use: Applied, step: Step, inputs: list[Tensor], keywords: dict[str, Any], fixed: Answer
) -> Tensor:
    """Run a method for matrices on a stack [..., E, m, n], on as many at once as a group may have."""
    experts = inputs[-1].shape[-3]
    size = 1
    if use.method.batched:
        size = max(1, GROUP // (sum(x.numel() for x in inputs) // experts))
    starts = range(0, experts, size)
    parts = [_part(use, step, inputs, keywords, fixed, slice(i, i + size)) for i in starts]
    return torch.cat(parts, dim=-3)


def _part(
    use: Applied,
    step: Step,
    inputs: list[Tensor],
    keywords: dict[str, Any],
    fixed: Answer,
    which: slice,
) -> Tensor:
    """Run a method on some matrices of a stack: together where all change, else one by one."""
    *before, D = (x[..., which, :, :] for x in inputs)
    count = D.shape[-3]
    if count > 1 and _all_change(D.transpose(0, 1)):
        several = dict(keywords)
        if "generator" in keywords:
            several["generator"] = [keywords["generator"]] * count
        return _several(use, step, [*before, D.transpose(0, 1)], several, fixed)
    found = []
    for e in range(count):
        given = [x.select(-3, e) for x in (*before, D)]
        if is_zero(given[-1]):
            found.append(use.like_result(given[-1]))
            continue
        own = {name: one_of(x, which.start + e) for name, x in keywords.items()}
        found.append(_result(use, step, given, own, fixed))
    return torch.stack(found, dim=-3)


def _all_change(D: Tensor) -> bool:
    """Whether some task changes each of the matrices, D [G, T, m, n]: one wait for the device."""
    starts = D[..., :1, :].flatten(1)  # a row tells in nearly all cases
    return bool(starts.any(1).all()) or bool(D.flatten(1).any(1).all())


def one_of(x: Any, number: int) -> Any:
    """One matrix of a stack [..., E, m, n]; what is no tensor as it is."""
    return x.select(-3, number) if isinstance(x, Tensor) else x


def added(values: Iterable[Tensor]) -> Tensor:
    """Sum of one tensor or more; a new one where there are several."""
    several = iter(values)
    total = next(several)
    for number, value in enumerate(several):
        total = total.add_(value) if number else total.to_dense() + value
    return total
