"""The engine: one lazy mapping, `Merged`, from a base and fine-tuned models to the merged model.

For every tensor of the base: stack the task vectors, run the purifiers, run the rule, add the result to the
base, scaled. All is checked by names, shapes and options before any weight is read. Tensors come one by one,
so that neither inputs nor output need to fit into memory. Names no method: what a method needs is written
in the registry, `minipact.methods`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import reduce
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

import minipact.per_task  # noqa: F401  enters its methods into the registry
from minipact.errors import MergeError, check_known, listing
from minipact.methods import METHODS as METHODS
from minipact.methods import (
    RANK_OPTIONS,
    SUPPLIED,
    Measure,
    Method,
    Options,
    find_method,
    is_finite,
    is_registered,
    is_zero,
    named_generator,
    parameters_of,
    run_survey,
)
from minipact.parallel import in_threads
from minipact.recipe import (
    KINDS_OF_TENSOR,
    Globs,
    Policy,
    Recipe,
    Use,
    as_globs,
    as_methods,
    dtype_name,
)

Device = str | torch.device
State = Mapping[str, Tensor]
States = Mapping[str, State]
Tasks = Sequence[State] | States
Factors = Sequence[float] | Mapping[str, float] | None
Progress = Callable[[int, int, str], None] | None
Gather = Callable[[Any], list[Any]]
Answers = list[dict[str, Tensor]]
Result = TypeVar("Result")

# ---- What happens to each tensor -----------------------------------------------------------------

_LOOKUP_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "wte.")
_GPT2_LAYERS = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.weight")


def default_policy(name: str, tensor: Tensor) -> str:
    """How a floating-point tensor is treated: "matrix", "matrix_T", "vector" or "copy".

    Matrices are 2-D weights used as x @ W^T. "matrix_T" is stored the other way round, for x @ W (CLIP's
    `visual.proj`, GPT-2's Conv1D layers): purifiers see it transposed. Vectors are all the rest: biases,
    norms, convolutions, token tables, and `text_projection`, as published; so are positional embeddings
    as matrices. Statistics of batch normalisation are copied: recompute them after merging.
    """
    if name.endswith(("running_mean", "running_var")):
        return "copy"
    if tensor.ndim != 2 or any(t in name for t in ("text_projection", *_LOOKUP_TABLES)):
        return "vector"
    transposed = name == "proj" or name.endswith("visual.proj") or _GPT2_LAYERS.search(name)
    return "matrix_T" if transposed else "matrix"


@dataclass(frozen=True)
class Step:
    """What happens to one tensor.

    Attributes:
        name, shape, dtype: of the base's tensor.
        kind: "matrix", "matrix_T", "vector" or "copy".
        purify: names of the purifiers that act on it, in order.
        rule: name of the rule; or "mean", "sum", "copy".
        factor: what the rule's result is multiplied with; None is the scale of the merge.
        spectral: whether a method for matrices acts on it, whose work grows faster than its entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    purify: tuple[str, ...]
    rule: str
    factor: float | None = None
    spectral: bool = False

    @property
    def treatment(self) -> str:
        """In words: "pact > tsv_m", "mean, unscaled", "copy"."""
        words = " > ".join([*self.purify, self.rule])
        if self.factor is None:
            return words
        return f"{words}, unscaled" if self.factor == 1 else f"{self.factor:g} x {words}, unscaled"

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Use:
    """A method with the options of this merge, and the tensors that a purifier is for."""

    method: Method
    options: Mapping[str, object]
    scope: tuple[str, ...] = ("*",)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def effective(self) -> dict[str, object]:
        """All options, defaults too, as a recipe holds them."""
        if self.method.kind != "purifier":
            return dict(self.options)
        return {**self.options, "scope": None if self.scope == ("*",) else self.scope}

    def takes_blocks(self, answer: Mapping[str, Tensor]) -> bool:
        """Whether a tensor may come in parts: by entries, once a survey told what is of the whole."""
        alone = self.method.survey is None or bool(answer)
        return self.method.acts_on == "entries" and alone and not {*SUPPLIED} & {*self.method.needs}

    def clipped(self, shape: Sequence[int]) -> dict[str, object]:
        """The function's options, with counts of directions cut to a small matrix' min(m, n)."""
        options = self.taken_by(self.method.function)
        for name in RANK_OPTIONS:
            count = options.get(name)
            if isinstance(count, int):
                options[name] = min(count, *shape)
        return options

    def acts_on(self, name: str, kind: str) -> bool:
        fits = self.method.acts_on != "matrix" or kind.startswith("matrix")
        return fits and kind != "copy" and _matches(name, self.scope)

    def turns(self, kind: str) -> bool:
        """Whether it sees tensors of this kind transposed: inputs are the columns of what it clears."""
        method = self.method
        return kind == "matrix_T" and (method.kind, method.acts_on) == ("purifier", "matrix")

    def taken_by(self, function: Callable[..., object]) -> dict[str, Any]:
        """Those options that a function has parameters for."""
        parameters = parameters_of(function)
        return {name: x for name, x in self.options.items() if name in parameters}


@dataclass
class _FirstPass:
    """What a first pass over the models found, shared by merges that differ in their scale only."""

    answers: Answers | None = None  # for each method, by the names of its arguments
    kept: MutableMapping[str, Tensor | None] | None = None  # merged task vectors by name
    lock: Any = field(default_factory=Lock)


# ---- The merged model ----------------------------------------------------------------------------


class Merged(Mapping[str, Tensor]):
    """The merged model as a lazy mapping, name -> tensor: purified, merged and added when asked for.

    Like a state dict, it can be saved, loaded into a module, or be a model of another merge. Every access
    computes; `dict(merged)` holds all. Tensors are new and on the CPU, one for every name of the base.

    Args:
        base, tasks, and the keywords: as in `merge`.

    Attributes:
        recipe: the `Recipe` with all defaults filled in, scale and vectors decided.
        steps: name -> Step, what happens to each tensor.
        notes: what the user should know about choices made.
        base, tasks, device: as given, the tasks by name.
        shelf: makes the mapping, name -> tensor, in which `at` keeps merged task vectors; a dict.

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
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        device: Device = "cpu",
    ) -> None:
        self.base, self.tasks, self.device = base, _named_tasks(tasks), device
        _refuse_mismatches(base, self.tasks)
        factors = _task_weights(weights, tasks, self.tasks)
        given = Recipe(
            rule, as_methods(purify), options or {}, scale, vectors, factors,
            as_globs(include, "include"), as_globs(exclude, "exclude"), policy or {},
            dtype_name(dtype), seed,
        )  # fmt: skip
        self._uses = _uses(given, base)
        self._kinds = _kinds(given, base)
        found, self.notes = _scale(given.scale, self._uses)
        self._vectors, self._keeps = given.vectors, False
        self.shelf: Callable[[], MutableMapping[str, Tensor | None]] = dict
        self._passes: dict[str | float, _FirstPass] = {}
        self.recipe = replace(given, options={use.name: use.effective for use in self._uses})
        self._settle(found)
        for use in self._uses:
            _check_work(use, self.steps.values())
        self._try_out()

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: object) -> bool:
        return name in self.steps

    def __getitem__(self, name: str) -> Tensor:
        base, delta, factor = self.parts(name)
        return add_update(name, base, delta, factor, self.dtype).cpu()

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
        meta = _meta(self.base, name).to("meta")
        return meta.to(self.dtype) if self.dtype and meta.is_floating_point() else meta

    def delta(self, name: str) -> Tensor | None:
        """What is added to the base's tensor, in float32 or float64; None for a copy of the base's."""
        _, delta, factor = self.parts(name)
        return None if delta is None else delta.mul(factor).cpu()

    def prefetch(self, name: str) -> None:
        """Have all models fetch a tensor in the background that can."""
        for state in (self.base, *self.tasks.values()):
            if hasattr(state, "prefetch"):
                state.prefetch(name)

    def at(self, scale: float) -> Merged:
        """The same merge at another scale, for sweeps: merged task vectors are computed once and kept.

        vectors="auto" is decided anew. Raises MergeError for a scale that is not finite.
        """
        other = copy.copy(self)
        other._settle(scale)
        other._keeps, other.notes = True, ()
        found = self._passes[other.recipe.vectors]
        if found.kept is None:
            found.kept = self.shelf()
        return other

    def parts(self, name: str) -> tuple[Tensor, Tensor | None, float]:
        """The base's tensor, the merged task vector on the device, None for a copy, and its factor.

        The merged tensor is base + factor * task vector, see `add_update`.
        """
        step = self.steps[name]
        factor = self.scale if step.factor is None else step.factor
        if step.rule == "copy" or self.scale == 0:
            return self.base[name], None, factor
        self.prepare()
        return self.base[name], self._merged_vector(step), factor

    def map(
        self,
        work: Callable[[str], Result],
        names: Collection[str] | None = None,
        *,
        threads: int | None = None,
        room: float = math.inf,
    ) -> Iterator[Result]:
        """work(name) for all names or some, in the base's order, with the next tensors read ahead.

        Args:
            work: what to do for a tensor, such as `merged.__getitem__`.
            names: those that one process of several takes.
            threads: tensors in work at once, with one core each; None is one tensor on all cores.
            room: entries that the tensors in work may have together, see `minipact.parallel`.
        """
        self.prepare(threads=threads, room=room)
        chosen = [name for name in self.steps if names is None or name in names]
        return self._run(work, chosen, threads, room)

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
            names, threads, room: as in `map`; what one process of several looks at.
            gather: one process' share -> the shares of all, by rank.
        """
        found = self._passes[self.recipe.vectors]
        with found.lock:
            if found.answers is None:
                self._refuse_identical()
                answers: Answers = []
                for use in self._uses:
                    look = self._survey(use, answers, names, gather, threads, room)
                    answers.append(look)
                found.answers = answers

    # -- inside ------------------------------------------------------------------------------------

    def _settle(self, scale: float) -> None:
        """Decide all that depends on the scale."""
        recipe = replace(self.recipe, scale=scale)
        vectors = _decided(self._vectors, scale, self._uses, len(self.tasks))
        self.recipe = replace(recipe, vectors=vectors)
        self.steps = {
            name: _step(name, _meta(self.base, name), kind, self._uses, vectors)
            for name, kind in self._kinds.items()
        }
        self._passes.setdefault(vectors, _FirstPass())

    def _run(
        self, work: Callable[[str], Result], names: list[str], threads: int | None, room: float
    ) -> Iterator[Result]:
        ahead = self._read_ahead(names)
        if threads is None:
            return map(work, ahead)
        return in_threads(work, ahead, threads, size=lambda n: self.steps[n].entries, room=room)

    def _read_ahead(self, names: list[str]) -> Iterator[str]:
        for name, following in zip(names, [*names[1:], *names[-1:]], strict=True):
            self.prefetch(following)
            yield name

    def _merged_vector(self, step: Step) -> Tensor | None:
        found = self._passes[self.recipe.vectors]
        if found.kept is not None and step.name in found.kept:
            return found.kept[step.name]
        delta = self._computed(step, found.answers or [])
        if found.kept is not None and self._keeps:
            found.kept[step.name] = None if delta is None else delta.cpu()
        return delta

    def _computed(self, step: Step, answers: Answers) -> Tensor | None:
        """The rule's result for one tensor, None where it is zero."""
        plain = PLAIN.get(step.rule)
        rule, answer = self._uses[-1], answers[-1]
        by_entry = plain is not None or rule.takes_blocks(answer)
        delta, end = torch.empty(0), 0
        for D in self._task_matrices(step, self._uses[:-1], answers, by_entry):
            part = (plain(D) if plain else self._call(rule, answer, step, D)).flatten()
            if end == 0:
                delta = part if len(part) == step.entries else part.new_empty(step.entries)
            delta[end : end + len(part)] = part
            end += len(part)
        return None if is_zero(delta) else delta.view(step.shape)

    def _task_matrices(
        self, step: Step, purifiers: Sequence[_Use], answers: Answers, by_entry: bool
    ) -> Iterator[Tensor]:
        """D [T, ...] of one tensor behind some purifiers; in blocks [T, b] where entries alone count."""
        acting = [
            (use, answer)
            for use, answer in zip(purifiers, answers, strict=False)
            if use.name in step.purify
        ]
        whole = not (by_entry and all(use.takes_blocks(answer) for use, answer in acting))
        source = step.name, self.base, self.tasks, self.recipe.weights, self.device
        for D in task_blocks(*source, whole=whole):
            for use, answer in acting:
                D = self._call(use, answer, step, D)
            yield D

    @torch.no_grad()
    def _call(self, use: _Use, answer: dict[str, Tensor], step: Step, D: Tensor) -> Tensor:
        """Run one purifier or rule on one tensor, with the arguments it needs."""
        method, purifies = use.method, use.method.kind == "purifier"
        if method.acts_on == "matrix" and is_zero(D):
            return D if purifies else D[0]
        keywords: dict[str, Any] = {**use.clipped(D.shape[1:]), **answer}
        if "generator" in method.needs:
            keywords["generator"] = named_generator(self.recipe.seed, step.name)
        if "generators" in method.needs:
            seeds = [(task, step.name) for task in self.tasks]
            keywords["generator"] = [named_generator(self.recipe.seed, *names) for names in seeds]
        inputs = [self.base[step.name].to(D), D] if "base" in method.needs else [D]
        if "tuned" in method.needs:
            keywords["tuned"] = torch.stack([task[step.name].to(D) for task in self.tasks.values()])
        turned = use.turns(step.kind)
        if turned:
            inputs = [x.mT for x in inputs]
            if "tuned" in keywords:
                keywords["tuned"] = keywords["tuned"].mT
        try:
            result = method.function(*inputs, **keywords)
        except MergeError as error:
            raise MergeError(f"tensor '{step.name}', {method.name}: {error}") from error
        if not isinstance(result, Tensor):
            raise MergeError(f"{method.name} returned {type(result).__name__}, not a tensor")
        expected = inputs[-1] if purifies else inputs[-1][0]
        if result.shape != expected.shape:
            shape = f"the shape {tuple(result.shape)} for D {tuple(inputs[-1].shape)}"
            raise MergeError(f"tensor '{step.name}': {method.name} returned {shape}")
        return result.mT if turned else result

    def _survey(
        self,
        use: _Use,
        answers: Answers,
        names: Collection[str] | None,
        gather: Gather,
        threads: int | None,
        room: float,
    ) -> dict[str, Tensor]:
        """What a method asks of the whole model, behind the purifiers before it; see `Method.survey`."""
        survey = use.method.survey
        treated = [step for step in self.steps.values() if use.name in (*step.purify, step.rule)]
        if survey is None or not treated:
            return {}
        mine = [step.name for step in treated if names is None or step.name in names]
        by_entry = use.method.acts_on == "entries"

        def added_up(measure: Measure) -> Tensor:
            def measured(name: str) -> Tensor:
                before = self._uses[: len(answers)]
                step = self.steps[name]
                blocks = self._task_matrices(step, before, answers, by_entry)
                if use.turns(step.kind):
                    blocks = (D.mT for D in blocks)
                return reduce(torch.add, map(measure, blocks))

            share: dict[str, Tensor] = {}
            for name, value in zip(mine, self._run(measured, mine, threads, room), strict=True):
                # Whole numbers add up alike in any order, other numbers only in the order of names.
                key = name if value.is_floating_point() else ""
                share[key] = share[key] + value if key in share else value
            return _sum_by_name(gather(share))

        entries = sum(step.entries for step in treated)
        talk = survey(tasks=len(self.tasks), entries=entries, **use.taken_by(survey))
        return run_survey(talk, added_up)

    def _refuse_identical(self) -> None:
        merged = [step.name for step in self.steps.values() if step.rule != "copy"]
        for label, task in self.tasks.items():
            if all(torch.equal(self.base[name], task[name]) for name in merged):
                hint = "leave it out, or check that the right files were given"
                raise MergeError(f"task '{label}' equals the base in every tensor to merge: {hint}")

    def _try_out(self) -> None:
        """A merge of small random matrices shows options out of range before any weight is read."""
        tested = [use.name for use in self._uses if is_registered(use.method)]
        rule = self._uses[-1].name if is_registered(self._uses[-1].method) else "mean"
        purify = tuple(name for name in tested if name != rule)
        base, *tuned = torch.randn(len(self.tasks) + 1, 4, 4, generator=named_generator(0))
        small = copy.copy(self)
        small.base, small.device = {"": base}, "cpu"
        small.tasks = {name: {"": x} for name, x in zip(self.tasks, tuned, strict=True)}
        small.recipe = replace(self.recipe, weights=None)
        small.steps = {"": Step("", (4, 4), torch.float32, "matrix", purify, rule)}
        small._passes = {self.recipe.vectors: _FirstPass()}
        try:
            small.prepare()
            small._merged_vector(small.steps[""])
        except MergeError as error:
            raise MergeError(str(error).removeprefix("tensor '', ")) from error
        except TypeError as error:
            used = listing([*purify, rule])
            raise MergeError(f"{used}: wrong option type: {error}") from error


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda D: D.mean(0),
    "sum": lambda D: D.sum(0),
}


def _sum_by_name(shares: Iterable[Mapping[str, Tensor]]) -> Tensor:
    values = sorted((item for share in shares for item in share.items()), key=lambda item: item[0])
    return reduce(torch.add, [value for _, value in values])


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
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: Device = "cpu",
    progress: Progress = None,
    threads: int | None = None,
) -> dict[str, Tensor]:
    """Merge fine-tuned models into their common base: purify the task vectors, then merge them.

    Args:
        base: pre-trained model, a mapping name -> tensor: a state dict or a lazy checkpoint.
        tasks: fine-tuned models with the same names and shapes, as a list or as a mapping
            task name -> model. With names the result does not depend on their order, bit for bit.
        rule: name in METHODS, "package.module:function", a function of the registry, or your own
            D [T, m, n] -> [m, n] for matrices.
        purify: likewise, one or several in order; your own is (W0, D) -> D for matrices.
        options: method name -> {option: value}. Purifiers also take "scope", one or several globs of
            tensor names; other tensors go to the rule unpurified. A count of directions beyond a matrix'
            min(m, n) is cut to it.
        scale: factor of what the rule makes of the tensors it treats. None takes the rule's recommended
            value (`METHODS[rule].scale`); none is published behind a purifier, so try several there. 0
            returns the base.
        vectors: what becomes of tensors that are no matrices: biases, norms, convolutions, tables. "rule":
            as published, task arithmetic and TIES treat them like matrices, the rules on matrices take
            scale * their mean. "mean": the plain mean of the task vectors, unscaled. "copy": as in the base.
            A number: so much of their sum, unscaled. "auto": "mean" where the rule or a purifier acts on
            matrices, since the scale then makes up for what vectors did not lose; "rule" for other rules,
            for a single task and for a negative scale.
        weights: factor of each task vector before anything else; 1 each. Nothing is normalised.
        include, exclude: globs of tensor names; what they leave out is copied from the base.
        policy: glob -> "matrix", "matrix_T", "vector" or "copy", ahead of `default_policy`; or a function
            (name, tensor) -> kind instead of it.
        dtype: floating-point type of the result; None keeps the base's. All work is done in float32
            at least, in float64 where an input is float64.
        seed: of all random numbers, drawn apart for each tensor and task name.
        device: where to compute; results are on the CPU.
        progress: called with (tensors done, tensors in all, name) after each.
        threads: tensors in work at once, one core each; None is one tensor on all cores.

    Returns name -> new tensor for every tensor of the base; integer tensors, and tensors that no task
    changed, are copies. Raises MergeError where the inputs do not fit together or hold NaN or infinity,
    a task equals the base, or a method or option is unknown or out of range.
    """
    merged = Merged(
        base, tasks, rule=rule, purify=purify, options=options, scale=scale, vectors=vectors,
        weights=weights, include=include, exclude=exclude, policy=policy, dtype=dtype, seed=seed,
        device=device,
    )  # fmt: skip
    tensors = merged.map(merged.__getitem__, threads=threads)
    found = {}
    for done, (name, tensor) in enumerate(zip(merged, tensors, strict=True), start=1):
        found[name] = tensor
        if progress is not None:
            progress(done, len(merged), name)
    return found


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
) -> Sweep:
    """Merge once, try many: score the merge at each scale and keep the best.

    Choose on validation data, and report on data that had no part in the choice.

    Args:
        merged: what to sweep; its task vectors stay in memory until it goes.
        score: of a model, name -> tensor; the higher the better.
        scales: to try.
        progress: called with (scales done, scales in all, text) after each.

    Raises:
        MergeError: no scale is given, or a score is NaN.
    """
    candidates = {float(scale): merged.at(scale) for scale in scales}
    if not candidates:
        raise MergeError("no scale to try: give at least one")
    scores: dict[float, float] = {}
    for scale, candidate in candidates.items():
        scores[scale] = float(score(candidate))
        if math.isnan(scores[scale]):
            raise MergeError(f"the score at scale {scale:g} is NaN: check the evaluation")
        if progress is not None:
            progress(len(scores), len(candidates), f"scale {scale:g}: {scores[scale]:g}")
    best = max(scores, key=lambda scale: (scores[scale], -abs(scale)))
    return Sweep(scores, best, candidates[best])


# ---- Tensors -------------------------------------------------------------------------------------


@torch.no_grad()
def add_update(
    name: str, base: Tensor, delta: Tensor | None, factor: float, dtype: torch.dtype | None = None
) -> Tensor:
    """base + factor * delta in a wide type, then in dtype; a copy of the base without a delta.

    dtype None, and any for integers, is the base's. Raises MergeError, naming the tensor, where the result
    overflows.
    """
    if dtype is None or not base.is_floating_point():
        dtype = base.dtype
    if delta is None or factor == 0:
        merged = base.to(dtype, copy=True)
    else:
        merged = torch.empty(base.shape, dtype=dtype, device=delta.device)
        pieces = (in_pieces(x, delta.device) for x in (merged, base, delta))
        for out, x, d in zip(*pieces, strict=True):
            out.copy_(torch.add(x.to(d), d, alpha=factor))
    if not is_finite(merged) and is_finite(base):
        hint = "check the base, take a smaller scale or a wider dtype"
        raise MergeError(f"tensor '{name}' of the result overflows {merged.dtype}: {hint}")
    return merged


def in_pieces(x: Tensor, device: Device) -> Sequence[Tensor]:
    """The entries in pieces that fit into the cache where a CPU does the work, else in one."""
    size = 1 << 18 if torch.device(device).type == "cpu" else max(1, x.numel())
    return torch.split(x.flatten(), size)


def task_matrices(
    name: str, base: State, tasks: States, weights: Mapping[str, float] | None = None,
    device: Device = "cpu",
) -> Tensor:  # fmt: skip
    """D [T, ...] of one tensor: weight * (fine-tuned - base), or a task's own `delta(name)`.

    float32, float64 where an input is. Raises MergeError, naming tensor and model, for NaN or infinity.
    """
    return next(task_blocks(name, base, tasks, weights, device, whole=True))


def task_blocks(
    name: str, base: State, tasks: States, weights: Mapping[str, float] | None, device: Device, *,
    whole: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """`task_matrices`, whole or in blocks [T, b] of the entries that fit into a cache."""
    known = [_own_delta(task, name, base) for task in tasks.values()]
    tuned = (task[name] if d is None else d for task, d in zip(tasks.values(), known, strict=True))
    tensors = [x.detach() for x in (base[name], *tuned)]
    wide = any(x.dtype == torch.float64 for x in tensors)
    kind = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)
    factors = list((weights or dict.fromkeys(tasks, 1.0)).values())
    pieces = ([x] if whole else in_pieces(x, device) for x in tensors)

    def block(start: Tensor, *tuned: Tensor) -> Tensor:
        origin, D = start.to(kind), kind.new_empty(len(tuned), *start.shape)
        for delta, x, factor, d in zip(D, tuned, factors, known, strict=True):
            torch.sub(x.to(kind), origin, alpha=int(d is None), out=delta)
            if factor != 1:
                delta.mul_(factor)
        if not is_finite(D):
            models = ["the base", *(f"task '{label}'" for label in tasks), "some task"]
            model = models[[*map(is_finite, tensors), False].index(False)]
            raise MergeError(f"'{name}' of {model} holds NaN or infinity: repair or exclude it")
        return D

    return map(block, *pieces)


def _own_delta(task: State, name: str, base: State) -> Tensor | None:
    """A task's own difference from this base, where it knows it more exactly than by subtraction."""
    if getattr(task, "base", base) is not base:
        return None
    delta: Tensor | None = getattr(task, "delta", lambda _: None)(name)
    return delta


# ---- Checks, and what follows from them ----------------------------------------------------------


def _meta(state: State, name: str) -> Tensor:
    """Shape and dtype of a tensor, unread where the mapping has a method `meta(name)`."""
    tensor: Tensor = getattr(state, "meta", state.__getitem__)(name)
    return tensor


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle_globs(globs: Iterable[str], names: Iterable[str], what: str) -> None:
    """Each glob must match a name, so that a typo cannot pass silently."""
    if idle := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]:
        raise MergeError(f"{what} {listing(idle)} matches no tensor name of the base")


def _named_tasks(tasks: Tasks) -> dict[str, State]:
    """Tasks by name: sorted where the caller named them, else numbered from '0'."""
    pairs = sorted(tasks.items()) if isinstance(tasks, Mapping) else enumerate(tasks)
    named = {str(name): task for name, task in pairs}
    if not named or not all(isinstance(task, Mapping) for task in named.values()):
        raise MergeError("tasks must be a list, or a mapping by name, of state dicts: at least one")
    return named


def _refuse_mismatches(base: State, tasks: States) -> None:
    """One message with everything that keeps the models from being compared."""
    problems = [text for name, task in tasks.items() for text in mismatches(base, name, task)]
    if problems:
        raise MergeError("\n".join(problems))


def mismatches(base: State, label: str, task: State) -> list[str]:
    """What keeps a fine-tuned model from being compared with the base, one line each."""
    if not isinstance(base, Mapping) or not base:
        return ["the base must be a mapping name -> tensor with entries: pass model.state_dict()"]
    problems = []
    if missing := [name for name in base if name not in task]:
        problems.append(f"task '{label}' lacks {listing(missing)}: is it tuned from this base?")
    if extra := [name for name in task if name not in base]:
        problems.append(f"task '{label}' has {listing(extra)}, unknown to the base: remove it")
    for name in [name for name in base if name in task]:
        x, y = _meta(base, name), _meta(task, name)
        if (x.shape, x.is_floating_point()) != (y.shape, y.is_floating_point()):
            given = f"{y.dtype} {tuple(y.shape)}, in the base {x.dtype} {tuple(x.shape)}"
            problems.append(f"task '{label}': '{name}' is {given}: crop, resize or convert it")
    return problems


def _task_weights(weights: Factors, tasks: Tasks, named: States) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(named, 1.0)
    names = tasks if isinstance(tasks, Mapping) else named
    if isinstance(weights, Mapping):
        pairs = {str(name): x for name, x in weights.items()}
    else:
        pairs = dict(zip(map(str, names), weights, strict=False))
    if len(weights) != len(named) or pairs.keys() != named.keys():
        raise MergeError(f"weights must give one number for each of {listing(named)}")
    return {name: pairs[name] for name in named}


def _uses(recipe: Recipe, base: State) -> tuple[_Use, ...]:
    """Purifiers in order, then the rule, with their options checked by name."""
    methods = [find_method(purifier, "purifier") for purifier in recipe.purify]
    methods.append(find_method(recipe.rule, "rule"))
    if idle := recipe.options.keys() - {method.name for method in methods}:
        raise MergeError(f"options for {listing(idle)}, which is not used: add rule or purifier")
    return tuple(_use(method, recipe.options.get(method.name, {}), base) for method in methods)


def _use(method: Method, given: Options, base: State) -> _Use:
    check_known(f"{method.name} option", given, method.options)
    options = {**method.options, **given}
    if method.kind != "purifier":
        return _Use(method, options)
    scope = as_globs(options.pop("scope"), f"{method.name} scope")
    _refuse_idle_globs(scope, base, f"{method.name} scope")
    return _Use(method, options, scope or ("*",))


def _kinds(recipe: Recipe, base: State) -> dict[str, str]:
    """Kind of each tensor: by the policy where the merge touches it, else "copy"."""
    for what in ("include", "exclude"):
        _refuse_idle_globs(getattr(recipe, what), base, what)
    if not callable(recipe.policy):
        _refuse_idle_globs(recipe.policy, base, "policy")
    kinds = {}
    for name in base:
        tensor = _meta(base, name)
        wanted = _matches(name, recipe.include or ("*",)) and not _matches(name, recipe.exclude)
        if not wanted or not tensor.is_floating_point():
            kinds[name] = "copy"
            continue
        kinds[name] = _kind(name, tensor, recipe.policy)
        if kinds[name].startswith("matrix") and tensor.ndim != 2:
            shape = tuple(tensor.shape)
            raise MergeError(f"policy: '{name}' of shape {shape} cannot be a {kinds[name]}")
    return kinds


def _kind(name: str, tensor: Tensor, policy: Mapping[str, str] | Policy) -> str:
    if callable(policy):
        kind = policy(name, tensor)
        check_known(f"policy for '{name}'", [kind], KINDS_OF_TENSOR)
        return kind
    for glob, kind in policy.items():
        if fnmatchcase(name, glob):
            return kind
    return default_policy(name, tensor)


def _step(name: str, x: Tensor, kind: str, uses: Sequence[_Use], vectors: str | float) -> Step:
    """What happens to a tensor of this kind."""
    shape = tuple(x.shape)
    if kind == "copy":
        return Step(name, shape, x.dtype, kind, (), "copy")
    if kind == "vector" and vectors != "rule":
        if isinstance(vectors, str):
            rule, factor = {"mean": ("mean", 1.0), "copy": ("copy", None)}[vectors]
        else:
            rule, factor = "sum", vectors
        return Step(name, shape, x.dtype, kind, (), rule, factor)
    acting = [use for use in uses if use.acts_on(name, kind)]
    purify = tuple(use.name for use in acting if use.method.kind == "purifier")
    how = uses[-1].name if uses[-1] in acting else "mean"
    spectral = any(use.method.acts_on == "matrix" for use in acting)
    return Step(name, shape, x.dtype, kind, purify, how, spectral=spectral)


def _check_work(use: _Use, steps: Iterable[Step]) -> None:
    """A purifier must find tensors, and a count of directions must fit one of them at least."""
    steps, name = list(steps), use.name
    sizes = [min(s.shape, default=1) for s in steps if name in (*s.purify, s.rule)]
    idle = use.method.kind == "purifier" or all(s.rule == "copy" for s in steps)
    if not sizes and idle:
        raise MergeError(f"{name} has no tensor to work on: see scope, include and exclude")
    for option in RANK_OPTIONS:
        rank, most = use.options.get(option), max(sizes, default=math.inf)
        if isinstance(rank, int) and rank > most:
            raise MergeError(f"{name}.{option}={rank} is above the largest rank, {most}")


def _decided(vectors: str | float, scale: float, uses: Sequence[_Use], tasks: int) -> str | float:
    """The treatment of vectors that "auto" stands for; see `merge`."""
    if vectors != "auto":
        return vectors
    on_matrices = any(use.method.acts_on == "matrix" for use in uses)
    return "mean" if on_matrices and tasks > 1 and scale >= 0 else "rule"


def _scale(scale: float | None, uses: Sequence[_Use]) -> tuple[float, tuple[str, ...]]:
    """The scale to use, and what the user should know about it."""
    *purifiers, rule = uses
    if scale is not None:
        return float(scale), ()
    if not rule.method.scale:
        return 1.0, (f"scale 1.0: {rule.name} has no recommended value, try several",)
    reduced = str(rule.options.get("reduce", "any"))
    if reduced not in rule.method.scale:
        raise MergeError(f"{rule.name} with reduce={reduced!r} has no recommended scale: give one")
    recommended = rule.method.scale[reduced]
    note = f"scale {recommended}, recommended for {rule.name}"
    if purifiers:
        behind = ", ".join(use.name for use in purifiers)
        note += f" alone; no value is published behind {behind}: try several on validation data"
    return recommended, (note,)
