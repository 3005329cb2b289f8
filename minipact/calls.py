"""Methods called on the tensors of a merge: what each needs is put together, what it returns is checked.

For one tensor, or for a group of small ones at once; see `minipact.groups`. Names no method: what a method
needs is written in the registry, `minipact.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from minipact.tensors import Device, State, States, task_factors

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
        with _blaming(group[0], use):
            found = use.method.function(D, **self._keywords(use, group[0]), **answer)
            expected = D if use.method.kind == "purifier" else D[0]
            return _checked(found, expected, use.method)

    def _by_matrix(
        self, use: Applied, answer: Answer, group: Group, D: Tensor, W0: Tensor | None
    ) -> Tensor:
        if not use.method.batched or not bool(D.transpose(0, 1).flatten(1).any(1).all()):
            return self._one_by_one(use, answer, group, D)  # which lets zeros be
        turned = use.sees_transposed(group[0].kind)
        given = D.transpose(0, 1)
        inputs = [given.mT if turned else given]
        if W0 is not None and "base" in use.method.needs:
            inputs.insert(0, W0.mT if turned else W0)
        keywords: dict[str, Any] = use.clipped(group[0].shape)
        if "generator" in use.method.needs:
            keywords["generator"] = [named_generator(self.seed, step.name) for step in group]
        try:
            found = _batch(use, group[0], inputs, keywords | answer)
        except MergeError:
            return self._one_by_one(use, answer, group, D)  # which names the tensor
        return found.mT if turned else found

    def _one_by_one(self, use: Applied, answer: Answer, group: Group, D: Tensor) -> Tensor:
        """Run a method on the tensors of a group for themselves; the result is as of all at once."""
        sizes = [step.entries for step in group]
        parts = zip(group, torch.split(D.flatten(1), sizes, 1), strict=True)
        found = [self.on_tensor(use, answer, step, x.view(-1, *step.shape)) for step, x in parts]
        purifies = use.method.kind == "purifier"
        flat = torch.cat([x.reshape(len(D), -1) if purifies else x.flatten() for x in found], -1)
        return flat.view(D.shape if purifies else D.shape[1:])

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
        purifies = use.method.kind == "purifier"
        if use.method.acts_on == "matrix" and is_zero(D):
            return D if purifies else D[0]
        inputs, keywords = self._arguments(use, step, D)
        if use.sees_slices(step.kind) and use.method.batched:
            result = self._of_stack(use, answer, step, inputs, keywords)
        elif use.sees_slices(step.kind):
            parts = [
                self._of_slice(use, answer, step, inputs, keywords, e) for e in range(step.shape[0])
            ]
            result = torch.stack(parts, dim=-3)
        else:
            result = self._result(use, answer, step, inputs, keywords)
        return result.mT if use.sees_transposed(step.kind) else result

    def _of_stack(
        self,
        use: Applied,
        answer: Answer,
        step: Step,
        inputs: list[Tensor],
        keywords: dict[str, Any],
    ) -> Tensor:
        """Run a method for matrices on a stack [..., E, m, n], as many at once as a group may have."""
        size = max(1, GROUP // (sum(x.numel() for x in inputs) // step.shape[0]))
        pieces = list(zip(*(torch.split(x, size, -3) for x in inputs), strict=True))
        several: dict[str, Any] = dict(keywords)
        found = []
        for number, piece in enumerate(pieces):
            D = piece[-1].transpose(0, 1)
            if "generator" in keywords:
                several["generator"] = [keywords["generator"]] * len(D)
            if len(D) > 1 and bool(D.flatten(1).any(1).all()):
                found.append(_batch(use, step, [*piece[:-1], D], several | answer))
                continue
            each = range(number * size, number * size + len(D))
            parts = [self._of_slice(use, answer, step, inputs, keywords, e) for e in each]
            found.append(torch.stack(parts, dim=-3))
        return torch.cat(found, dim=-3)

    def _of_slice(
        self,
        use: Applied,
        answer: Answer,
        step: Step,
        inputs: list[Tensor],
        keywords: dict[str, Any],
        number: int,
    ) -> Tensor:
        """Run a method for matrices on one slice of a stack [..., E, m, n]."""
        given = [_slice(x, number) for x in inputs]
        if is_zero(given[-1]):
            nothing: Tensor = given[-1] if use.method.kind == "purifier" else given[-1][0]
            return nothing
        named = {name: _slice(x, number) for name, x in keywords.items()}
        return self._result(use, answer, step, given, named)

    def _result(
        self,
        use: Applied,
        answer: Answer,
        step: Step,
        inputs: list[Tensor],
        keywords: dict[str, Any],
    ) -> Tensor:
        """What a method returns, checked."""
        given = inputs[-1]
        expected = given if use.method.kind == "purifier" else given[0]
        with _blaming(step, use):
            result = use.method.function(*inputs, **keywords, **answer)
            checked = _checked(result, expected, use.method)
        return checked

    def _arguments(
        self, use: Applied, step: Step, D: Tensor
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """What a method needs for one tensor: D, perhaps behind W0, and its options; see `Method.needs`."""
        keywords = self._keywords(use, step)
        inputs = [D]
        if "base" in use.method.needs:  # a copy for functions of strangers, who might change it
            inputs.insert(0, self.base[step.name].to(D, copy=not is_built_in(use.method)))
        if use.sees_transposed(step.kind):
            inputs = [x.mT for x in inputs]
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
        found = torch.stack([task[step.name].to(D) for task in tuned])
        return {"tuned": found.mT if use.sees_transposed(step.kind) else found}

    def _statistics_of(self, use: Applied, name: str, D: Tensor) -> dict[str, Tensor]:
        """The statistics [T, ...] that a method needs for one tensor, by kind, in D's type."""
        found = {}
        labels = list(self.holding(name))
        for kind in use.statistics:
            states = [self.statistics[kind][label] for label in labels]
            found[kind] = torch.stack([state[name].to(D) for state in states])
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
            measure(_slice(D, e), **{kind: _slice(x, e) for kind, x in given.items()}).cpu()
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


def _batch(use: Applied, step: Step, inputs: list[Tensor], keywords: dict[str, Any]) -> Tensor:
    """What a method returns for several matrices at once, D [G, T, m, n]: [T, G, m, n], or [G, m, n]."""
    D = inputs[-1]
    purifies = use.method.kind == "purifier"
    with _blaming(step, use):
        result = use.method.function(*inputs, **keywords)
        found = _checked(result, D if purifies else D[:, 0], use.method)
    return found.transpose(0, 1) if purifies else found


def _slice(x: Any, number: int) -> Any:
    """One matrix of a stack [..., E, m, n]; what is no tensor as it is."""
    return x.select(-3, number) if isinstance(x, Tensor) else x


def added(values: Iterable[Tensor]) -> Tensor:
    """Sum of one tensor or more; a new one where there are several."""
    several = iter(values)
    total = next(several)
    for number, value in enumerate(several):
        total = total.add_(value) if number else total.to_dense() + value
    return total
