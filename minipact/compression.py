"""From models to one stored object with a model per known task: stored = compress(base, tasks, rule="emr").

Checked, aligned and read ahead as a merge of the same models is: `Merged` does it. The methods stand in
`minipact.per_task`, the object and its file in `minipact.stored`; `minipact.stored_files` works on files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minipact.alignment import is_buffer
from minipact.errors import MergeError, check_known, listing
from minipact.merging import METHODS, Kept, Merged, Progress
from minipact.methods import (
    Measure,
    Options,
    is_finite,
    is_zero,
    named_generator,
    parameters_of,
    run_survey,
)
from minipact.parallel import in_threads, memory
from minipact.per_task import STORAGE, Storage
from minipact.recipe import Globs, Table
from minipact.steps import Applied, Tasks
from minipact.stored import Record, Stored, digest_of, key_of, packed
from minipact.tensors import Device, State, task_matrices
from minipact.version import __version__

MISSING = ("error", "base")
_STATISTICS = ("running_mean", "running_var")  # of batch normalisation: each task's own
_BYTES = 64  # of memory for an entry of a tensor in work, beside those of the tasks


def compress(
    base: State,
    tasks: Tasks,
    *,
    rule: str = "emr",
    options: Mapping[str, Options] | None = None,
    include: Globs = None,
    exclude: Globs = None,
    missing: str = "error",
    rename: Mapping[str, str] | Table = (),
    seed: int = 0,
    device: Device = "cpu",
    threads: int | None = None,
    progress: Progress = None,
    shelf: Callable[[], Kept] = dict,
) -> Stored:
    """Store a base and several fine-tuned models in less room, so that each task gets a model of its own.

    Args:
        base, tasks: as in `merge`; the tasks' names are what `Stored.model` knows them by.
        rule: "emr", "tall" or "tsv_compress", see `minipact methods`. Published settings are the defaults,
            but for TALL's lambda. EMR and TALL act on all floating-point tensors. TSV-Compress acts on every
            tensor with two axes, and keeps the others in full; statistics of batch normalisation are kept
            in full by all.
        options: method name -> {option: value}; an option may be a mapping task name -> value where the
            method takes one for each task. Counts of directions are cut to a small matrix's min(m, n).
        include, exclude, missing, rename: as in `merge`, but missing="present".
        seed: of sketches, with svd="randomized".
        device: where to compute.
        progress: called with (tensors done, tensors in all, name) after each.
        threads: as in `merge`; the parts do not depend on how many.
        shelf: makes the mapping in which the parts are kept, a dict, which is in memory.

    Returns:
        `Stored`; its parts have the base's types. A tensor that no task changes takes nothing.

    Raises:
        MergeError: as `merge`, or a task's name holds a slash.
    """
    merged = Merged(
        base, tasks, scale=1.0, vectors="rule", include=include, exclude=exclude, missing=missing,
        rename=rename, policy=touched, seed=seed, device=device,
    )  # fmt: skip
    return compressed(merged, rule, options or {}, threads=threads, progress=progress, shelf=shelf)


def touched(name: str, tensor: Tensor) -> str:
    """Policy of `Merged` for what is stored: all floating-point tensors but known buffers."""
    return "copy" if is_buffer(name, tensor) else "vector"


def compressed(
    merged: Merged,
    rule: str,
    options: Mapping[str, Options],
    *,
    threads: int | None = None,
    progress: Progress = None,
    shelf: Callable[[], Kept] = dict,
) -> Stored:
    """What is stored of models that a merge by the policy `touched` has checked; see `compress`."""
    use = _use(rule, options, merged)
    check_known("missing", [merged.recipe.missing], MISSING)
    if slashed := [task for task in merged.tasks if "/" in task]:
        raise MergeError(f"a task cannot be called {listing(slashed)}, with a slash: rename it")
    work = _Work(merged, use, threads)
    work.try_out()
    merged.prepare(threads=threads, room=work.room)
    answer = work.surveyed()
    parts: Any = shelf()
    kept = {name: x for name, x in answer.items() if name in parameters_of(work.storage.decompress)}
    for name, x in kept.items():
        parts[name] = x
    found = merged.map(partial(work.parts, answer=answer), threads=threads, room=work.room)
    for done, (name, own) in enumerate(zip(merged, found, strict=True), start=1):
        for key, x in own.items():
            parts[key] = x
        if progress is not None:
            progress(done, len(merged), name)
    return Stored(merged.base, parts, _record(merged, use), merged.notes)


def _use(rule: str, options: Mapping[str, Options], merged: Merged) -> Applied:
    """The method with its options, those by task name as lists in the order of the tasks.

    Raises MergeError where the method or an option is unknown.
    """
    check_known("rule of compress", [rule], STORAGE)
    method, tasks = METHODS[rule], list(merged.tasks)
    check_known("options for", options, [rule])
    given = dict(options.get(rule, {}))
    check_known(f"{rule} option", given, method.options)
    for option, value in given.items():
        if isinstance(value, Mapping):
            if value.keys() != set(tasks):
                raise MergeError(f"{rule}.{option} must give a value for each of {listing(tasks)}")
            given[option] = [value[task] for task in tasks]
    return Applied(method, {**method.options, **given})


@dataclass(frozen=True)
class _Work:
    """Models, and the method that is to store them."""

    merged: Merged
    use: Applied
    threads: int | None = None

    @property
    def storage(self) -> Storage:
        return STORAGE[self.use.name]

    @property
    def room(self) -> float:
        """Entries that the tensors in work may have together, with a quarter of the memory."""
        return memory() / 4 / (_BYTES + 8 * len(self.merged.tasks))

    def treats(self, name: str) -> bool:
        """Whether the method acts on a tensor; the others that change are kept in full."""
        fits = self.use.method.acts_on != "matrix" or len(self.merged.steps[name].shape) == 2
        return fits and self.changes(name) and not name.endswith(_STATISTICS)

    def changes(self, name: str) -> bool:
        """Whether tasks may have another tensor than the base."""
        return self.merged.steps[name].rule != "copy"

    def deltas(self, name: str) -> Tensor:
        """D [T, ...] of a tensor."""
        return task_matrices(name, self.merged.base, self.merged.tasks, None, self.merged.device)

    def surveyed(self) -> dict[str, Tensor]:
        """What the method finds in a first pass over the models; see `Method.survey`."""
        survey = self.use.method.survey
        names = sorted(filter(self.treats, self.merged))  # so that sums do not depend on the order
        if survey is None or not names:
            return {}
        entries = sum(self.merged.steps[name].entries for name in names)
        options = self.use.taken_by(survey)
        talk = survey(tasks=len(self.merged.tasks), entries=entries, **options)
        return run_survey(talk, partial(self._sum, names))

    def _sum(self, names: list[str], measure: Measure) -> Tensor:
        """Sum of measure(D) over some tensors, added in their order."""

        def look(name: str) -> Tensor:
            return measure(self.deltas(name)).cpu()

        if self.threads is None:
            values: Iterator[Tensor] = map(look, names)
        else:
            values = in_threads(look, names, self.threads, size=self._entries, room=self.room)
        total = next(values).to_dense()
        for value in values:
            total = total + value
        return total

    def _entries(self, name: str) -> int:
        return self.merged.steps[name].entries

    @torch.no_grad()
    def parts(self, name: str, answer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of one tensor, on the CPU; nothing where no task changes it."""
        if not self.changes(name):
            return {}
        D = self.deltas(name)
        if is_zero(D):
            return {}
        tasks, dtype = self.merged.tasks, self.merged.meta(name).dtype
        if not self.treats(name):
            whole = {key_of("full", task, name): x[name].detach() for task, x in tasks.items()}
            return {key: _kept(key, x, dtype) for key, x in whole.items()}
        found, storage = self.run(name, D, answer), self.storage
        kept = {key_of(part, name): x for part, x in zip(storage.common, found, strict=False)}
        for part, stack in zip(storage.own, found[len(storage.common) :], strict=True):
            kept |= {key_of(part, task, name): x for task, x in zip(tasks, stack, strict=True)}
        if dtype.itemsize == 1:  # float8 is too coarse for what is added to it
            dtype = torch.bfloat16
        return {key: _kept(key, x, dtype) for key, x in kept.items()}

    def run(self, name: str, D: Tensor, answer: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the method returns for D [T, ...]."""
        function = self.use.method.function
        known = parameters_of(function)
        keywords: dict[str, Any] = self.use.clipped(D.shape[1:])
        keywords |= {key: x for key, x in answer.items() if key in known}
        if "generator" in self.use.method.needs:
            keywords["generator"] = named_generator(self.merged.recipe.seed, name)
        try:
            return tuple(function(D, **keywords))
        except MergeError as error:
            raise MergeError(f"tensor '{name}', {self.use.name}: {error}") from error

    def try_out(self) -> None:
        """Small random matrices show options out of range before any weight is read."""
        D = torch.randn(len(self.merged.tasks), 4, 4, generator=named_generator(0))
        survey = self.use.method.survey
        try:
            answer: dict[str, Tensor] = {}
            if survey is not None:
                talk = survey(tasks=len(D), entries=D[0].numel(), **self.use.taken_by(survey))
                answer = run_survey(talk, lambda measure: measure(D).to_dense())
            self.run("", D, answer)
        except MergeError as error:
            raise MergeError(str(error).removeprefix("tensor '', ")) from error
        except TypeError as error:
            given = dict(self.use.options)
            unknown = f"{self.use.name}: an option is of the wrong type, {given}: {error}"
            raise MergeError("; ".join(self.use.misfits()) or unknown) from error


def _kept(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor on the CPU, of a type or as bits. Raises MergeError where it overflows."""
    if x.dtype == torch.bool:
        return packed(x)
    found = x.to(dtype, copy=True).cpu()
    if not is_finite(found):
        raise MergeError(f"'{key}' overflows {dtype}: convert the base to a wider type first")
    return found


def _record(merged: Merged, use: Applied) -> Record:
    recipe = merged.recipe
    told = {
        "rule": use.name,
        "options": {use.name: dict(use.options)},
        "include": recipe.include,
        "exclude": recipe.exclude,
        "missing": recipe.missing,
        "rename": recipe.rename,
        "seed": recipe.seed,
    }
    record = {
        "recipe": told,
        "tasks": list(merged.tasks),
        "base": digest_of(merged.base),
        "aliases": {},
        "versions": {"minipact": __version__, "torch": str(torch.__version__)},
        "device": torch.device(merged.device).type,
    }
    found: Record = json.loads(json.dumps(record))  # as a file will tell it
    return found
