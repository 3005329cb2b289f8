"""The engine: one lazy mapping, `Merged`, from a base and fine-tuned models to the merged model.

For every tensor of the base: stack the task vectors, run the purifiers, run the rule, add the result to the
base, scaled. All is checked by names, shapes and options before any weight is read. Tensors come one by one,
so that neither inputs nor output need to fit into memory. Names no method: what a method needs is written
in the registry, `minipact.methods`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

import minipact.least_squares
import minipact.per_task
import minipact.training
import minipact.whole_vector  # noqa: F401  all enter their methods into the registry
from minipact.alignment import Aligned, aligned, is_packed, other_numbers, refuse_disagreement
from minipact.calls import Calls, added
from minipact.errors import MergeError, listing
from minipact.groups import Group, Waiting, group_matrices, groups_of, zero_parts
from minipact.low_rank import Product, expanded
from minipact.methods import (
    FACTORS,
    Measure,
    Options,
    is_built_in,
    is_finite,
    is_zero,
    named_generator,
    parameters_of,
    run_survey,
)
from minipact.methods import METHODS as METHODS
from minipact.parallel import in_threads
from minipact.recipe import (
    Globs,
    Policy,
    Recipe,
    Table,
    Use,
    as_globs,
    as_methods,
    as_number,
    as_table,
    dtype_name,
)
from minipact.steps import (
    Applied,
    Factors,
    Statistics,
    Step,
    Tasks,
    applied_methods,
    check_chain,
    check_globs,
    check_work,
    decided_scale,
    decided_vectors,
    is_selected,
    kind_of,
    kinds_of,
    known_sums,
    named_statistics,
    named_tasks,
    refuse_path,
    step_of,
    weights_by_name,
    with_statistics,
)
from minipact.tensors import (
    Device,
    State,
    States,
    is_same,
    is_unchanged,
    meta_of,
    rounded_update,
    task_blocks,
    task_matrices,
)

KEPT = 1 << 27  # entries of purified task matrices that stay in memory for further passes

Progress = Callable[[int, int, str], None] | None
Gather = Callable[[Any], list[Any]]
Answers = list[dict[str, Tensor]]
Kept = MutableMapping[str, Tensor | None]
Result = TypeVar("Result")


@dataclass
class _FirstPass:
    """What a first pass over the models found, shared by merges that differ in their scale only."""

    answers: Answers | None = None  # for each method, by the names of its arguments
    kept: Kept | None = None  # merged task vectors by name, once `at` wants them
    lock: Any = field(default_factory=Lock)
    waiting: Waiting = field(default_factory=Waiting)
    purified: dict[str, Tensor] = field(default_factory=dict)  # by the first name of a group


@dataclass(frozen=True)
class _Part:
    """What one process looks at in a first pass, and how; fields as in `Merged.prepare`."""

    names: Collection[str] | None
    gather: Gather
    threads: int | None
    room: float


# ---- The merged model ----------------------------------------------------------------------------


class Merged(Mapping[str, Tensor]):
    """The merged model as a lazy mapping, name -> tensor: purified, merged and added when asked for.

    Like a state dict, it can be saved, loaded into a module, or be a model of another merge. Every access
    computes, but for what `at` keeps; `dict(merged)` holds all. Tensors are new and on the CPU, one for
    every name of the base.

    Arguments are those of `merge`, but for progress and threads.

    Attributes:
        recipe: the `Recipe` with all defaults filled in, scale and vectors decided.
        steps: name -> Step, what happens to each tensor.
        notes: what the user should know about choices made.
        base, tasks, device: as given, the tasks by name.

    Raises:
        MergeError: as `merge`; at once for all that names, shapes and options tell, later for weights.
    """

    def __init__(
        self,
        base: State,
        tasks: Tasks,
        *,
        rule: Use = "task_arithmetic",
        purify: Use | Sequence[Use] = (),
        options: Mapping[str, Options] | None = None,
        scale: float | None = None,
        vectors: str | float = "auto",
        weights: Factors = None,
        include: Globs = None,
        exclude: Globs = None,
        policy: Mapping[str, str] | Policy | None = None,
        missing: str = "error",
        rename: Mapping[str, str] | Table = (),
        vocabulary: str = "same",
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        device: Device = "cpu",
        statistics: Statistics = None,
    ) -> None:
        refuse_path("base", base)
        named, self.device = named_tasks(tasks), device
        self._statistics: Mapping[str, States] = named_statistics(statistics, tasks, named)
        given = Recipe(
            rule=rule,
            purify=as_methods(purify),
            options=options or {},
            scale=scale,
            vectors=vectors,
            weights=weights_by_name(weights, tasks, named),
            include=as_globs(include, "include"),
            exclude=as_globs(exclude, "exclude"),
            policy=policy if callable(policy) else as_table(policy),
            missing=missing,
            rename=as_table(rename, "rename"),
            vocabulary=vocabulary,
            dtype=dtype_name(dtype),
            seed=seed,
            statistics=known_sums(self._statistics),
        )
        if vocabulary == "union" and not hasattr(base, "vocabulary"):
            hint = "give model folders to merge_files, or to the command line"
            raise MergeError(f"vocabulary='union' needs the models' tokenizers: {hint}")
        models = aligned(base, named, partial(_is_merged, given), given.missing, given.rename)
        self.base, self.tasks = models.base, models.tasks
        self._models: Aligned = models
        check_globs(given, {*self.base, *(name for task in self.tasks.values() for name in task)})
        self._metas = {name: meta_of(self.base, name).to("meta") for name in self.base}
        self._kinds = kinds_of(given, self.base, models.copied)
        uses = applied_methods(given, self.base)
        check_chain(uses, given.weights or {})
        self._uses, lacking = with_statistics(uses, self._statistics, self.base, self._kinds)
        self._calls = Calls(
            self.base,
            self.tasks,
            models.holders,
            given.weights or {},
            self._statistics,
            seed,
            device,
        )
        found, notes = decided_scale(given.scale, self._uses, len(self.tasks))
        self.notes = (*models.notes, *lacking, *notes)
        self._vectors = given.vectors
        self._passes: dict[str | float, _FirstPass] = {}
        self.recipe = replace(given, options={use.name: use.effective for use in self._uses})
        self._settle(found)
        self.notes = (*self.notes, *self._repeated())
        self._try_out()

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: object) -> bool:
        return name in self.steps

    def __getitem__(self, name: str) -> Tensor:
        return self.rounded(name)[0]

    def __repr__(self) -> str:
        methods = " > ".join(use.name for use in self._uses)
        models = f"{len(self)} tensors of {len(self.tasks)} tasks"
        return f"<Merged: {models} by {methods}, scale {self.scale:g}>"

    @property
    def scale(self) -> float:
        """Factor of the merged task vector."""
        return float(self.recipe.scale or 0.0)

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type of the result; None keeps the base's."""
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else None

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without computing anything."""
        meta = self._metas[name]
        return meta.to(self.dtype) if self.dtype and meta.is_floating_point() else meta

    def delta(self, name: str) -> Tensor | None:
        """What is added to the base's tensor, in float32 or float64; None for a copy of the base's."""
        _, delta, factor = self.parts(name)
        return None if delta is None else delta.mul(factor).cpu()

    def prefetch(self, name: str) -> None:
        """Have those models fetch a tensor in the background that can, and are needed for it."""
        states = (
            [self.base, *self._calls.holding(name).values()]
            if self._computes(name)
            else [self.base]
        )
        for state in states:
            if hasattr(state, "prefetch"):
                state.prefetch(name)

    def at(self, scale: float, *, shelf: Callable[[], Kept] = dict) -> Merged:
        """The same merge at another scale, for sweeps: merged task vectors are computed once and kept.

        Where the sign of the scale changes the treatment of vectors (vectors="auto"), once for each
        treatment. `shelf` makes the mapping, name -> tensor or None, in which they are kept, on the CPU.
        Raises MergeError for a scale that is no finite number, or that leaves a purifier without tensors.
        """
        other = copy.copy(self)
        other._settle(as_number("scale", scale))
        other.notes = ()
        found = self._passes[other.recipe.vectors]
        if found.kept is None:
            found.kept = shelf()
        return other

    def parts(self, name: str) -> tuple[Tensor, Tensor | None, float]:
        """The base's tensor, the merged task vector on the device, None for a copy, and its factor.

        The merged tensor is base + factor * task vector, see `rounded`.
        """
        step = self.steps[name]
        if step.rule == "copy" or self.scale == 0:
            return self.base[name], None, self._factor(step)
        self.prepare()
        return self.base[name], self._merged_vector(step), self._factor(step)

    def rounded(self, name: str) -> tuple[Tensor, float, float]:
        """The merged tensor, and squared norms: what rounding to a half type adds, and the update's own.

        Both norms are 0 where the result is of a wider type, or a copy of the base's. Raises MergeError where
        the result overflows, and for NaN or infinity in an input.
        """
        step, dtype = self.steps[name], self.meta(name).dtype
        is_alone = len(self._groups[name]) == 1 and torch.device(self.device).type == "cpu"
        found = self._passes[self.recipe.vectors]
        if step.rule == "copy" or self.scale == 0 or found.kept is not None or not is_alone:
            base, delta, factor = self.parts(name)
            if delta is None:
                return rounded_update(name, base, (), factor, dtype)
            return rounded_update(name, base, (delta,), factor, dtype, delta.device)
        self.prepare()
        parts: Iterator[Tensor] = map(expanded, self._parts(step, found.answers or []))
        first = next(parts, None)
        if first is not None and first.numel() == step.entries:
            parts = iter(())  # which frees the task matrices
        blocks = itertools.chain(() if first is None else (first,), parts)
        return rounded_update(name, self.base[name], blocks, self._factor(step), dtype)

    def _factor(self, step: Step) -> float:
        return self.scale if step.factor is None else step.factor

    def update(self, name: str) -> tuple[Tensor | Product | None, float]:
        """As in `parts`, the merged task vector and its factor; as a `Product` where the rule kept it so."""
        step = self.steps[name]
        kept = self._passes[self.recipe.vectors].kept
        if step.rule == "copy" or self.scale == 0 or kept is not None:
            return self.parts(name)[1:]
        if len(self._groups[name]) > 1:
            return self.parts(name)[1:]
        self.prepare()
        found = self._computed(step, self._passes[self.recipe.vectors].answers or [])
        return found, self._factor(step)

    def together(self, name: str) -> tuple[str, ...]:
        """Names of the small tensors that are computed in one go with a tensor, in order, itself too."""
        return tuple(step.name for step in self._groups[name])

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of all tensors, those that are computed in one go together; see `minipact.groups`."""
        return [
            self.together(name) for name, group in self._groups.items() if group[0].name == name
        ]

    def map(
        self,
        work: Callable[[str], Result],
        names: Collection[str] | None = None,
        *,
        threads: int | None = None,
        room: float = math.inf,
    ) -> Iterator[Result]:
        """work(name) for all names or some, in the base's order; arguments as in `each`.

        Results that come before their turn wait in memory.
        """
        early: dict[str, Result] = {}
        found = self.each(work, names, threads=threads, room=room)
        for name in self._chosen(names):
            while name not in early:
                early.update([next(found)])
            yield early.pop(name)

    def each(
        self,
        work: Callable[[str], Result],
        names: Collection[str] | None = None,
        *,
        threads: int | None = None,
        room: float = math.inf,
    ) -> Iterator[tuple[str, Result]]:
        """(name, work(name)) for all names or some, what is computed together one after the other.

        Args:
            work: what to do for a tensor, such as `merged.__getitem__`.
            names: those that one process of several takes.
            threads: groups of tensors in work at once, with one core each; None is one tensor on all cores.
            room: entries that the tensors in work may have together, see `minipact.parallel`.
        """
        self.prepare(threads=threads, room=room)
        parts: dict[str, list[str]] = {}
        for name in self._chosen(names):
            parts.setdefault(self._groups[name][0].name, []).append(name)
        if threads is None:
            alone = {name: [name] for part in parts.values() for name in part}
            return ((name, work(name)) for name in self._read_ahead(alone))

        def work_on(first: str) -> list[tuple[str, Result]]:
            return [(name, work(name)) for name in parts[first]]

        return (pair for pairs in self._run(work_on, parts, threads, room) for pair in pairs)

    def prepare(
        self,
        names: Collection[str] | None = None,
        *,
        gather: Gather = lambda share: [share],
        threads: int | None = None,
        room: float = math.inf,
    ) -> None:
        """First pass over the models, once: no task equals the base, and what methods survey is found.

        Args:
            names, threads, room: as in `map`, for the part of one process of several.
            gather: one process's share -> the shares of all, by rank.
        """
        part = _Part(names, gather, threads, room)
        found = self._passes[self.recipe.vectors]
        with found.lock:
            if found.answers is None:
                self._refuse_strangers()
                self._refuse_identical()
                answers: Answers = []
                for use in self._uses:
                    answers.append(self._survey(use, answers, part))
                found.answers = answers

    # -- inside ------------------------------------------------------------------------------------

    def _settle(self, scale: float) -> None:
        """Decide all that depends on the scale."""
        vectors = decided_vectors(self._vectors, scale, self._uses, len(self.tasks))
        self.recipe = replace(self.recipe, scale=scale, vectors=vectors)
        self.steps = {
            name: step_of(name, self._metas[name], kind, self._uses, vectors)
            for name, kind in self._kinds.items()
        }
        for use in self._uses:
            check_work(use, self.steps.values())
        self._groups = groups_of(self.steps.values(), self._likeness, len(self.tasks) + 1)
        self._passes.setdefault(vectors, _FirstPass())

    def _likeness(self, step: Step) -> Hashable:
        """What tensors of one group have in common; None for one that is merged alone."""
        if step.rule == "copy" or step.kind.startswith("stack") or step.entries == 0:
            return None
        models = [self.base, *self._calls.holding(step.name).values()]
        if FACTORS in self._uses[-1].method.needs and any(hasattr(x, "factors") for x in models):
            return None
        types = tuple(meta_of(x, step.name).dtype for x in models)
        acting = [use for use in self._uses if use.name in (*step.purify, step.rule)]
        shape = step.shape if any(use.method.acts_on != "entries" for use in acting) else None
        held = self._models.holders.get(step.name)
        return step.kind, step.purify, step.rule, step.factor, shape, held, types

    def _computes(self, name: str) -> bool:
        """Whether a tensor's merged task vector is needed and not there yet."""
        kept = self._passes[self.recipe.vectors].kept
        changes = self.steps[name].rule != "copy" and self.scale != 0
        return changes and not (kept is not None and name in kept)

    def _chosen(self, names: Collection[str] | None) -> list[str]:
        """All names or some, in the base's order."""
        return [name for name in self.steps if names is None or name in names]

    def _run(
        self,
        work: Callable[[str], Result],
        parts: Mapping[str, Sequence[str]],
        threads: int | None,
        room: float,
    ) -> Iterator[Result]:
        """work(first) for the groups whose names are given by their first ones, in order."""
        ahead = self._read_ahead(parts)
        if threads is None:
            return map(work, ahead)

        def size(first: str) -> int:
            return sum(step.entries for step in self._groups[first])

        return in_threads(work, ahead, threads, size=size, room=room)

    def _read_ahead(self, parts: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """The keys, while the tensors of the next part are fetched."""
        following = [*list(parts.values())[1:], *list(parts.values())[-1:]]
        for first, names in zip(parts, following, strict=True):
            for name in names:
                self.prefetch(name)
            yield first

    def _merged_vector(self, step: Step) -> Tensor | None:
        found = self._passes[self.recipe.vectors]
        group = self._groups[step.name]
        compute = partial(self._results, group, found.answers or [])
        if found.kept is None:
            return found.waiting.take(step.name, group, compute)
        if step.name not in found.kept:
            delta = found.waiting.take(step.name, group, compute)
            found.kept[step.name] = None if delta is None else delta.cpu()
        kept = found.kept[step.name]
        return None if kept is None else kept.to(self.device)

    def _results(self, group: Group, answers: Answers) -> list[Tensor | None]:
        """The rule's results for the tensors of a group, None where one is zero.

        Where the device has no memory for them, in halves, and a single one on the CPU.
        """
        try:
            if len(group) > 1:
                return self._group_vectors(group, answers)
            delta = self._computed(group[0], answers)
            return [None if delta is None else expanded(delta)]
        except torch.OutOfMemoryError:
            if len(group) > 1:
                half = len(group) // 2
                parts = (self._results(part, answers) for part in (group[:half], group[half:]))
                return [x for part in parts for x in part]
            if torch.device(self.device).type == "cpu":
                raise
            return self._on_the_cpu(group[0])._results(group, answers)

    def _on_the_cpu(self, step: Step) -> Merged:
        """The same merge for a tensor that the device has no memory for; said once."""
        what = f"'{step.name}' and tensors like it are merged on the CPU"
        note = f"{what}: {self.device} has no memory for them"
        if not any("has no memory" in known for known in self.notes):
            self.notes = (*self.notes, note)
        other = copy.copy(self)
        other.device, other._calls = "cpu", replace(self._calls, device="cpu")
        return other

    def _computed(self, step: Step, answers: Answers) -> Tensor | Product | None:
        """The rule's result for one tensor, None where it is zero."""
        parts = self._parts(step, answers)
        delta = next(parts, None)
        if not isinstance(delta, Tensor):
            return delta
        if delta.numel() < step.entries:
            delta = _joined(delta, parts, step.entries)
        return None if is_zero(delta) else delta.view(step.shape)

    def _parts(self, step: Step, answers: Answers) -> Iterator[Any]:
        """The rule's result for one tensor: whole, or in blocks of its entries, end to end, or nothing."""
        rule, answer = self._uses[-1], answers[-1]
        factors = self._calls.factors(rule, step)
        if factors is not None:
            found = self._calls.from_factors(rule, answer, step, factors)
            return iter(() if found is None else (found,))
        plain = PLAIN.get(step.rule)
        by_entry = plain is not None or rule.takes_blocks(answer)
        merge_block = plain or partial(self._calls.on_tensor, rule, answer, step)
        return map(merge_block, self._task_matrices(step, self._uses[:-1], answers, by_entry))

    def _task_matrices(
        self, step: Step, purifiers: Sequence[Applied], answers: Answers, by_entry: bool
    ) -> Iterator[Tensor]:
        """D [T, ...] of one tensor behind some purifiers; in blocks [T, b] where entries alone count."""
        kept = self._kept_of(step, purifiers)
        if kept is not None:
            yield kept
            return
        acting = self._acting(step, purifiers, answers)
        whole = not (by_entry and all(use.takes_blocks(answer) for use, answer in acting))
        tasks, weights = self._calls.with_weights(step)
        for D in task_blocks(step.name, self.base, tasks, weights, self.device, whole=whole):
            for use, answer in acting:
                D = self._calls.on_tensor(use, answer, step, D)
            yield D

    def _kept_of(self, step: Step, purifiers: Sequence[Applied]) -> Tensor | None:
        """What a survey of the rule kept of D behind all purifiers; it is handed out once."""
        if len(purifiers) < len(self._uses) - 1:
            return None
        return self._passes[self.recipe.vectors].purified.pop(step.name, None)

    def _acting(
        self, step: Step, purifiers: Sequence[Applied], answers: Answers
    ) -> list[tuple[Applied, dict[str, Tensor]]]:
        """Those purifiers that act on a tensor, each with what its survey found."""
        pairs = zip(purifiers, answers, strict=False)
        return [(use, answer) for use, answer in pairs if use.name in step.purify]

    # -- several tensors at once -------------------------------------------------------------------

    def _group_vectors(self, group: Group, answers: Answers) -> list[Tensor | None]:
        """The rule's results for the tensors of a group, None where one is zero."""
        rule, answer = self._uses[-1], answers[-1]
        D = self._group_matrices(group, self._uses[:-1], answers)
        plain = PLAIN.get(group[0].rule)
        merged = plain(D) if plain else self._calls.on_group(rule, answer, group, D)
        sizes = [step.entries for step in group]
        flat = merged.flatten()
        parts = zip(group, torch.split(flat, sizes), zero_parts(flat, sizes), strict=True)
        return [None if zero else x.view(step.shape) for step, x, zero in parts]

    def _group_matrices(
        self, group: Group, purifiers: Sequence[Applied], answers: Answers
    ) -> Tensor:
        """D of a group behind some purifiers: [T, N], end to end, or [T, G, ...] where all have one shape."""
        kept = self._kept_of(group[0], purifiers)
        if kept is not None:
            return kept
        names = [step.name for step in group]
        tasks, weights = self._calls.with_weights(group[0])
        origin, D = group_matrices(names, self.base, tasks, weights, self.device)
        if not is_finite(D):
            for name in names:  # the one that holds it says so
                task_matrices(name, self.base, tasks, weights, self.device)
        if len({step.shape for step in group}) == 1:
            D = D.view(len(D), len(group), *group[0].shape)
        W0 = origin.to(D).view(D.shape[1:])
        for use, answer in self._acting(group[0], purifiers, answers):
            D = self._calls.on_group(use, answer, group, D, W0)
        return D

    def _survey(self, use: Applied, answers: Answers, part: _Part) -> dict[str, Tensor]:
        """What a method asks of the whole model, behind the purifiers before it; see `Method.survey`."""
        survey = use.method.survey
        treated = [step for step in self.steps.values() if use.name in (*step.purify, step.rule)]
        if survey is None or not treated:
            return {}
        if partly := [step.name for step in treated if step.name in self._models.holders]:
            hint = "take missing='base', or exclude it"
            raise MergeError(
                f"{use.name} looks at all tasks at once, and some lack {listing(partly)}: {hint}"
            )
        mine = [s.name for s in treated if part.names is None or s.name in part.names]
        entries = sum(step.entries for step in treated)
        talk = survey(tasks=len(self.tasks), entries=entries, **use.taken_by(survey))
        return run_survey(talk, lambda measure: self._sum(measure, use, answers, mine, part))

    def _sum(
        self, measure: Measure, use: Applied, answers: Answers, names: list[str], part: _Part
    ) -> Tensor:
        """Sum of measure(D) over all tensors that a method treats, those of other processes too."""
        share: dict[str, Tensor] = {}
        lock = Lock()
        keeps = self._keeps(use)

        def look(first: str) -> None:
            group = self._groups[first]
            if len(group) == 1:
                value = self._look(measure, use, answers, group[0], keeps)
            else:
                value = self._look_at_group(measure, use, answers, group, keeps)
            with lock:
                if value.is_floating_point():  # these add up alike only in the order of names
                    share[first] = value.clone()
                elif "" in share:
                    share[""].add_(value)
                else:
                    share[""] = value.to_dense().clone()

        firsts = [name for name in names if self._groups[name][0].name == name]
        parts = {first: self.together(first) for first in firsts}
        for _ in self._run(look, parts, part.threads, part.room):
            pass
        found = [item for one in part.gather(share) for item in one.items()]
        if not found:
            raise MergeError(f"{use.name} finds no tensor to look at in a first pass: see names")
        return added(value for _, value in sorted(found, key=lambda item: item[0]))

    def _look(
        self, measure: Measure, use: Applied, answers: Answers, step: Step, keeps: bool
    ) -> Tensor:
        """measure(D) of one tensor behind the purifiers before the method that asks."""
        before = self._uses[: len(answers)]
        factors = self._calls.factors(use, step)
        if factors is not None:
            return self._calls.measured(measure, use, step, factors)
        blocks = self._task_matrices(step, before, answers, use.looks_at_entries)
        if keeps and step.purify and step.spectral:
            (whole,) = blocks
            self._passes[self.recipe.vectors].purified[step.name] = whole
            blocks = iter([whole])
        return added(self._calls.measured(measure, use, step, D) for D in blocks)

    def _look_at_group(
        self, measure: Measure, use: Applied, answers: Answers, group: Group, keeps: bool
    ) -> Tensor:
        """measure(D) of a group."""
        D = self._group_matrices(group, self._uses[: len(answers)], answers)
        if keeps and group[0].purify and group[0].spectral:
            self._passes[self.recipe.vectors].purified[group[0].name] = D
        if use.looks_at_entries and "tuned" not in parameters_of(measure):
            return measure(D).cpu()
        sizes = [step.entries for step in group]
        parts = zip(group, torch.split(D.flatten(1), sizes, 1), strict=True)
        return added(
            self._calls.measured(measure, use, step, x.view(-1, *step.shape)) for step, x in parts
        )

    def _keeps(self, use: Applied) -> bool:
        """Whether the passes of the rule's survey keep what the purifiers leave, for the passes to come."""
        if use is not self._uses[-1] or not self._slow_purifiers():
            return False
        purified = [step for step in self.steps.values() if step.purify]
        return len(self.tasks) * sum(step.entries for step in purified) <= KEPT

    def _slow_purifiers(self) -> list[str]:
        """Names of the purifiers that look at matrices."""
        return [use.name for use in self._uses[:-1] if use.method.acts_on == "matrix"]

    def _repeated(self) -> list[str]:
        """A note where purifiers run anew for each pass of the rule's survey."""
        rule, slow = self._uses[-1], self._slow_purifiers()
        if rule.method.survey is None or not slow or self._keeps(rule):
            return []
        what = f"{', '.join(slow)} runs once for each pass of {rule.name} over the model"
        return [f"{what}, as what it leaves is too much to keep in memory"]

    def _refuse_strangers(self) -> None:
        """Tensors that a merge cannot change must be alike where they cannot be made anew."""
        for name in self._models.taken:
            refuse_disagreement(name, self._calls.holding(name))
        fixed = [name for name, meta in self._metas.items() if is_packed(name, meta)]
        for name in filter(partial(is_selected, self.recipe), fixed):
            for label, task in self.tasks.items():
                if name in task and not is_same(self.base, task, name):
                    raise other_numbers(name, label, self.base)

    def _refuse_identical(self) -> None:
        merged = [step.name for step in self.steps.values() if step.rule != "copy"]
        for label, task in self.tasks.items():
            held = [name for name in merged if label in self._calls.holding(name)]
            if all(is_unchanged(task, name, self.base) for name in held):
                hint = "leave it out, or check that the right files were given"
                raise MergeError(f"task '{label}' equals the base in every tensor to merge: {hint}")

    def _try_out(self) -> None:
        """A merge of small random matrices shows options out of range before any weight is read."""
        tested = [use.name for use in self._uses if is_built_in(use.method)]
        rule = self._uses[-1].name if is_built_in(self._uses[-1].method) else "mean"
        purify = tuple(name for name in tested if name != rule)
        base, *tuned = torch.randn(len(self.tasks) + 1, 4, 4, generator=named_generator(0))
        small = copy.copy(self)
        small.base, small.device = {"": base}, "cpu"
        small.tasks = {name: {"": x} for name, x in zip(self.tasks, tuned, strict=True)}
        small._models, small._metas = replace(self._models, taken=frozenset(), holders={}), {}
        example: States = {name: {"": torch.eye(4)} for name in self.tasks}
        statistics = {kind: example for kind in self._statistics}
        small._calls = Calls(small.base, small.tasks, {}, {}, statistics, self.recipe.seed, "cpu")
        small.steps = {"": Step("", (4, 4), torch.float32, "matrix", purify, rule)}
        small._groups = {name: (step,) for name, step in small.steps.items()}
        small._passes = {self.recipe.vectors: _FirstPass()}
        try:
            small.prepare()
            small._merged_vector(small.steps[""])
        except MergeError as error:
            raise MergeError(str(error).removeprefix("tensor '', ")) from error
        except TypeError as error:
            tried = [use for use in self._uses if use.name in (*purify, rule)]
            given = {use.name: use.options for use in tried}
            misfits = [text for use in tried for text in use.misfits()]
            unknown = f"an option is of the wrong type, {given}: {error}"
            raise MergeError("; ".join(misfits) or unknown) from error


def _is_merged(recipe: Recipe, name: str, tensor: Tensor) -> bool:
    """Whether a recipe touches a tensor of this name, shape and type."""
    return kind_of(recipe, name, tensor) != "copy"


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda D: D.mean(0),
    "sum": lambda D: D.sum(0),
}


def _joined(first: Tensor, parts: Iterable[Tensor], entries: int) -> Tensor:
    """One vector of so many entries from its parts."""
    whole = first.new_empty(entries)
    end = 0
    for part in (first, *parts):
        whole[end : end + len(part)] = part
        end += len(part)
    return whole


def merge(
    base: State,
    tasks: Tasks,
    *,
    rule: Use = "task_arithmetic",
    purify: Use | Sequence[Use] = (),
    options: Mapping[str, Options] | None = None,
    scale: float | None = None,
    vectors: str | float = "auto",
    weights: Factors = None,
    include: Globs = None,
    exclude: Globs = None,
    policy: Mapping[str, str] | Policy | None = None,
    missing: str = "error",
    rename: Mapping[str, str] | Table = (),
    vocabulary: str = "same",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: Device = "cpu",
    statistics: Statistics = None,
    progress: Progress = None,
    threads: int | None = None,
) -> dict[str, Tensor]:
    """Merge fine-tuned models into their common base: purify the task vectors, then merge them.

    Args:
        base: pre-trained model, a mapping name -> tensor: a state dict or a lazy checkpoint.
        tasks: fine-tuned models, as a list or as a mapping task name -> model; the tensors to merge have the
            same names and shapes. With names the result does not depend on their order, bit for bit.
        rule: name in METHODS, "package.module:function", a function of the registry, or your own
            D [T, m, n] -> [m, n] for matrices.
        purify: likewise, one or several in order; your own is (W0, D) -> D for matrices.
        options: method name -> {option: value}. Purifiers also take "scope", one or several globs of
            tensor names; other tensors go to the rule unpurified. A count of directions beyond a matrix's
            min(m, n) is cut to it.
        scale: factor of what the rule makes of the tensors it treats. None takes the rule's recommended
            value (`METHODS[rule].scale`), and 1 for a single task; none is published behind a purifier, so
            try several there. 0 returns the base.
        vectors: what becomes of tensors that are no matrices: biases, norms, convolutions, tables. "rule":
            as published, task arithmetic and TIES treat them like matrices, the rules on matrices take
            scale * their mean. "mean": the plain mean of the task vectors, unscaled. "copy": as in the base.
            A number: so much of their sum, unscaled. "auto": "mean" where the rule or a purifier acts on
            matrices, since the scale then makes up for what vectors did not lose; "rule" for other rules,
            for a single task and for a negative scale.
        weights: factor of each task vector before anything else; 1 each. Nothing is normalised.
        include, exclude: globs of names to merge, and of names not to; the base's other tensors are copied.
        policy: glob -> "matrix", "matrix_T", "stack", "stack_T", "vector" or "copy", ahead of
            `default_policy`; or a function (name, tensor) -> kind instead of it.
        missing: what becomes of tensors that are to be merged and that a model lacks. "error": said, and
            refused. "base": a task without it counts as unchanged; what the base lacks is left out.
            "present": it is merged from the tasks that hold it; what the base lacks is taken over if its
            holders agree bit for bit.
        rename: old -> new beginnings of names in the tasks. A beginning that all names of a task have, or
            all of the base's, is found alone, and said in the notes.
        vocabulary: "same"; "union" is for `merge_files`, which knows the models' tokenizers.
        dtype: floating-point type of the result; None keeps the base's. All work is done in float32
            at least, in float64 where an input is float64.
        seed: of all random numbers, drawn apart for each tensor and task name.
        device: where to compute; results are on the CPU.
        statistics: of data, for methods that need them: kind -> one mapping, tensor name -> tensor, for each
            task, by name or in the order of the tasks, in files by `open_statistics`. Kinds are "covariance",
            [n, n] of a matrix's n inputs and [E, n, n] of a stack's, "fisher" and "gradient", of the tensor's
            shape. A method leaves out tensors without: a rule's get the mean. The recipe holds the SHA-256 of
            those in files.
        progress: called with (tensors done, tensors in all, name) after each.
        threads: tensors in work at once, one core each; results do not depend on how many. None is one
            tensor at a time on all cores of torch, whose number may change last bits.

    Returns name -> new tensor for every tensor of the base; integer tensors, and tensors that no task
    changed, are copies. Raises MergeError where the inputs do not fit together or hold NaN or infinity,
    a task equals the base, or a method or option is unknown or out of range.
    """
    merged = Merged(
        base, tasks, rule=rule, purify=purify, options=options, scale=scale, vectors=vectors,
        weights=weights, include=include, exclude=exclude, policy=policy, missing=missing, rename=rename,
        vocabulary=vocabulary, dtype=dtype, seed=seed, device=device, statistics=statistics,
    )  # fmt: skip
    found = {}
    for name, tensor in merged.each(merged.__getitem__, threads=threads):
        found[name] = tensor
        if progress is not None:
            progress(len(found), len(merged), name)
    return {name: found[name] for name in merged}


# ---- Sweeps over scales --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Scores of a merge at several scales.

    Attributes:
        scores: scale -> score, in the order tried.
        scale: the one with the highest score; of equal ones the smallest in magnitude.
        merged: the merge at this scale.
    """

    scores: Mapping[float, float]
    scale: float
    merged: Merged


def sweep(
    merged: Merged,
    score: Callable[[Merged], float],
    scales: Iterable[float],
    *,
    progress: Progress = None,
    shelf: Callable[[], Kept] | None = None,
) -> Sweep:
    """Merge once, try many: score the merge at each scale and keep the best.

    Choose on validation data, and report on data that had no part in the choice.

    Args:
        merged: what to sweep; its task vectors stay in memory until it goes.
        score: of a model, name -> tensor; the higher the better.
        scales: to try.
        progress: called with (scales done, scales in all, text) after each.
        shelf: makes the mapping in which merged task vectors are kept, see `Merged.at`; None is a dict.

    Raises:
        MergeError: no scale is given, or a score is no finite number.
    """
    at = merged.at if shelf is None else partial(merged.at, shelf=shelf)
    candidates = {float(scale): at(scale) for scale in scales}
    if not candidates:
        raise MergeError("no scale to try: give at least one")
    scores: dict[float, float] = {}
    for scale, candidate in candidates.items():
        scores[scale] = _scored(score, candidate)
        if progress is not None:
            progress(len(scores), len(candidates), f"scale {scale:g}: {scores[scale]:g}")
    best = max(scores, key=lambda scale: (scores[scale], -abs(scale)))
    return Sweep(scores, best, candidates[best])


def _scored(score: Callable[[Merged], float], candidate: Merged) -> float:
    """A finite score; errors name the scale."""
    try:
        found = as_number("the score", score(candidate))
    except MergeError as error:
        raise MergeError(f"at scale {candidate.scale:g}: {error}") from error
    return found
