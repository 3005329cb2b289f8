"""What happens to each tensor of a merge, decided by names, shapes and options before any weight is read."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from minipact.alignment import is_buffer
from minipact.errors import MergeError, check_known, listing
from minipact.methods import (
    COMMANDS,
    RANK_OPTIONS,
    STATISTICS,
    SUPPLIED,
    Method,
    Options,
    find_method,
    parameters_of,
)
from minipact.recipe import KINDS_OF_TENSOR, Policy, Recipe, Table, as_globs
from minipact.tensors import State, States, meta_of

Tasks = Sequence[State] | States
Factors = Iterable[float] | Mapping[str, float] | None
Statistics = Mapping[str, Tasks] | None

# ---- What happens to each tensor -----------------------------------------------------------------

LOOKUP_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "wte.")
EXPERTS = re.compile(r"(^|\.)experts\.[^.]+(\.weight)?$")
GPT2_LAYERS = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.weight")


def default_policy(name: str, tensor: Tensor) -> str:
    """How a floating-point tensor is treated: "matrix", "matrix_T", "stack", "vector" or "copy".

    Matrices are 2-D weights used as x @ W^T. "matrix_T" is stored the other way round, for x @ W (CLIP's
    `visual.proj`, GPT-2's Conv1D layers): purifiers see it transposed, and so do rules that tell inputs from
    outputs. A "stack" [E, m, n] holds a matrix for each expert, as mixtures of experts pack them, and each is
    treated as a matrix; a merge makes it a "stack_T" where the shapes of gate_up_proj and down_proj together
    show that they are stored for x @ W. Vectors are all the rest: biases, norms, convolutions, token tables,
    and `text_projection`, as published; so are positional embeddings as matrices. Statistics of batch
    normalisation are copied: recompute them after merging. So are known buffers, such as tables of positions.
    """
    if name.endswith(("running_mean", "running_var")) or is_buffer(name, tensor):
        return "copy"
    if tensor.ndim == 3 and EXPERTS.search(name):
        return "stack"
    others = ("text_projection", *LOOKUP_TABLES)
    if tensor.ndim != 2 or name.endswith("bias") or any(t in name for t in others):
        return "vector"
    transposed = name == "proj" or name.endswith("visual.proj") or GPT2_LAYERS.search(name)
    return "matrix_T" if transposed else "matrix"


def holds_matrices(kind: str) -> bool:
    """Whether a tensor of this kind is a matrix or a stack of them."""
    return kind.startswith(("matrix", "stack"))


@dataclass(frozen=True)
class Step:
    """What happens to one tensor.

    Attributes:
        name, shape, dtype: of the base's tensor.
        kind: "matrix", "matrix_T", "stack", "stack_T", "vector" or "copy".
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
        """What is done, in words, such as "pact > tsv_m" or "mean, unscaled"."""
        words = " > ".join([*self.purify, self.rule])
        if self.factor is None:
            return words
        return f"{words}, unscaled" if self.factor == 1 else f"{self.factor:g} x {words}, unscaled"

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Applied:
    """A method with the options of this merge, the tensors that it is for, and the statistics it gets."""

    method: Method
    options: Mapping[str, object]
    scope: tuple[str, ...] = ("*",)
    statistics: tuple[str, ...] = ()
    known: Collection[str] | None = None  # tensors that all tasks have these statistics of

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def purifies(self) -> bool:
        """Whether it turns task matrices into task matrices, and is no rule."""
        return self.method.kind == "purifier"

    def like_result(self, D: Tensor) -> Tensor:
        """A tensor of the shape that it makes of D [T, ...]: D itself, or its first task, [...]."""
        return D if self.purifies else D[0]

    @property
    def effective(self) -> dict[str, object]:
        """All options, defaults too, as a recipe holds them."""
        if not self.purifies:
            return dict(self.options)
        return {**self.options, "scope": None if self.scope == ("*",) else self.scope}

    def takes_blocks(self, answer: Mapping[str, Tensor]) -> bool:
        """Whether a tensor may come in parts: by entries, once a survey told what is of the whole."""
        alone = self.method.survey is None or bool(answer)
        return self.looks_at_entries and alone and not {*SUPPLIED} & {*self.method.needs}

    @property
    def looks_at_entries(self) -> bool:
        """Whether it acts entry by entry, on D alone."""
        return self.method.acts_on == "entries" and not self.statistics

    def clipped(self, shape: Sequence[int]) -> dict[str, object]:
        """The function's options, with counts of directions cut to a small matrix's min(m, n)."""
        options = self.taken_by(self.method.function)
        if self.method.acts_on != "matrix":
            return options
        for name in RANK_OPTIONS:
            count = options.get(name)
            if isinstance(count, int):
                options[name] = min(count, *shape)
        return options

    def acts_on(self, name: str, kind: str) -> bool:
        """Whether it acts on a tensor of this name and kind."""
        fits = self.method.acts_on != "matrix" or holds_matrices(kind)
        known = self.known is None or name in self.known
        return fits and known and kind != "copy" and _matches(name, self.scope)

    def sees_transposed(self, kind: str) -> bool:
        """Whether it sees tensors of this kind transposed, so that inputs are columns."""
        sided = self.method.sided or self.purifies
        return kind.endswith("_T") and self.method.acts_on == "matrix" and sided

    def sees_slices(self, kind: str) -> bool:
        """Whether it sees tensors of this kind matrix by matrix."""
        return kind.startswith("stack") and self.method.acts_on == "matrix"

    def taken_by(self, function: Callable[..., object]) -> dict[str, Any]:
        """Those options that a function has parameters for."""
        parameters = parameters_of(function)
        return {name: x for name, x in self.options.items() if name in parameters}

    def misfits(self) -> list[str]:
        """What to say of options that are not of the type that a method of this package declares."""
        functions = [f for f in (self.method.survey, self.method.function) if f is not None]
        declared = {name: x for f in functions for name, x in get_type_hints(f).items()}
        return [
            f"{self.name}.{name}={x!r} must be {_in_words(declared[name], self.method.options[name])}"
            for name, x in self.options.items()
            if name in declared and not _is_of(x, declared[name])
        ]


_TAKEN = {  # declared type of an option -> what it takes, in Python and in words
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    Sequence: (list | tuple, "a list"),
    NoneType: (NoneType, "none"),
}


def _kinds(declared: Any) -> list[type]:
    """The types that a type hint allows; a whole number beside a number needs no mention."""
    kinds = [get_origin(kind) or kind for kind in get_args(declared) or (declared,)]
    return [kind for kind in kinds if not (kind is int and float in kinds)]


def _is_of(x: object, declared: Any) -> bool:
    """Whether a value is of a declared type; true and false are no numbers."""
    kinds = _kinds(declared)
    if isinstance(x, bool):
        return bool in kinds
    return any(isinstance(x, _TAKEN[kind][0]) for kind in kinds)


def _in_words(declared: Any, default: object) -> str:
    """What an option takes, with its default for an example."""
    example = "" if default is None else f", such as {default}"
    return " or ".join(_TAKEN[kind][1] for kind in _kinds(declared)) + example


# ---- Checks, and what follows from them ----------------------------------------------------------


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle_globs(globs: Iterable[str], names: Iterable[str], what: str) -> None:
    """Each glob must match a name, so that a typo cannot pass silently."""
    if idle := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]:
        raise MergeError(f"{what} {listing(idle)} matches no tensor name of the base or the tasks")


def refuse_path(what: str, given: object) -> None:
    """Raise MergeError where a path stands for a model."""
    if isinstance(given, str | Path):
        hint = "open it by minipact.open_checkpoint, or give all paths to minipact.merge_files"
        raise MergeError(f"{what} is a path, '{given}', and no state dict: {hint}")


def named_tasks(tasks: Tasks) -> dict[str, State]:
    """Tasks by name: sorted where the caller named them, else numbered from '0'.

    Raises MergeError unless there is one at least, and all are mappings.
    """
    refuse_path("tasks", tasks)
    pairs = sorted(tasks.items()) if isinstance(tasks, Mapping) else enumerate(tasks)
    named = {str(name): task for name, task in pairs}
    for name, task in named.items():
        refuse_path(f"task '{name}'", task)
    if not named or not all(isinstance(task, Mapping) for task in named.values()):
        raise MergeError("tasks must be a list, or a mapping by name, of state dicts: at least one")
    return named


def weights_by_name(weights: Factors, tasks: Tasks, named: States) -> dict[str, float]:
    """The factor of each task vector, 1 where none is given; a list is in the order of the tasks given.

    Raises MergeError unless there is one factor for each task.
    """
    if weights is None:
        return dict.fromkeys(named, 1.0)
    names = tasks if isinstance(tasks, Mapping) else named
    problem = MergeError(f"weights must give one number for each of {listing(named)}")
    if isinstance(weights, Mapping):
        pairs = {str(name): x for name, x in weights.items()}
    else:
        numbers = list(weights) if isinstance(weights, Iterable) else []
        if len(numbers) != len(named):
            raise problem
        pairs = dict(zip(map(str, names), numbers, strict=True))
    if pairs.keys() != named.keys():
        raise problem
    return {name: pairs[name] for name in named}


def applied_methods(recipe: Recipe, base: State) -> tuple[Applied, ...]:
    """Purifiers in order, then the rule, with their options checked by name.

    Raises MergeError where one is unknown or stands twice, or an option or scope is idle or unknown.
    """
    methods = [find_method(purifier, "purifier") for purifier in recipe.purify]
    methods.append(find_method(recipe.rule, "rule"))
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        hint = "give each method once, and functions names of their own"
        raise MergeError(f"'{twice[0]}' stands twice: {hint}")
    if idle := recipe.options.keys() - {method.name for method in methods}:
        raise MergeError(f"options for {listing(idle)}, which is not used: add rule or purifier")
    return tuple(_applied(method, recipe.options.get(method.name, {}), base) for method in methods)


def check_chain(uses: Sequence[Applied], weights: Mapping[str, float]) -> None:
    """Raise MergeError where a purifier of the fine-tuned weights themselves would see changed ones."""
    purifiers = [use for use in uses if use.purifies]
    for place, use in enumerate(purifiers):
        if "tuned" not in use.method.needs:
            continue
        why = f"{use.name} works on the fine-tuned weights, not on their difference from the base"
        if place > 0:
            raise MergeError(
                f"{why}, and would undo {purifiers[place - 1].name}: put it first in purify"
            )
        if any(x != 1 for x in weights.values()):
            raise MergeError(f"{why}, which weights cannot scale before it: leave weights out")


def named_statistics(given: Statistics, tasks: Tasks, named: States) -> dict[str, dict[str, State]]:
    """Statistics by kind and task; lists are in the order of the tasks given.

    Raises MergeError for an unknown kind, and unless there is a mapping for each task.
    """
    check_known("statistics", given or {}, STATISTICS)
    names = [str(name) for name in tasks] if isinstance(tasks, Mapping) else list(named)
    found = {}
    for kind, states in (given or {}).items():
        one_each = states if isinstance(states, Mapping) else dict(zip(names, states, strict=False))
        if len(states) != len(named) or {*map(str, one_each)} != {*named}:
            raise MergeError(f"statistics: {kind} must be there once for each of {listing(named)}")
        if strange := [name for name, x in one_each.items() if not isinstance(x, Mapping)]:
            what = f"statistics: {kind} of {listing(strange)} is no mapping of tensors"
            raise MergeError(f"{what}: open its file by minipact.open_statistics")
        found[kind] = {str(name): state for name, state in one_each.items()}
    return found


def known_sums(statistics: Mapping[str, States]) -> dict[str, dict[str, str]]:
    """SHA-256 of the files of statistics by kind and task, for kinds that all come from files."""
    found = {}
    for kind, states in statistics.items():
        sums = {name: getattr(state, "sha256", None) for name, state in states.items()}
        if all(isinstance(x, str) for x in sums.values()):
            found[kind] = {name: str(x) for name, x in sums.items()}
    return found


def with_statistics(
    uses: Sequence[Applied], statistics: Mapping[str, States], base: State, kinds: Mapping[str, str]
) -> tuple[tuple[Applied, ...], tuple[str, ...]]:
    """The methods with the statistics they need, and what the user should know about those.

    Raises MergeError where one is missing, idle, or of another shape than its tensor asks for.
    """
    needed = {kind for use in uses for kind in use.method.needs if kind in STATISTICS}
    if idle := statistics.keys() - needed:
        raise MergeError(f"statistics {listing(idle)} are used by no method of this merge")
    notes = []
    found = [_with_its_own(use, statistics) for use in uses]
    for use, plain in zip(found, uses, strict=True):
        treated = [name for name, kind in kinds.items() if plain.acts_on(name, kind)]
        for statistic in use.statistics:
            _check_shapes(statistic, statistics[statistic], base, kinds, use)
        lacking = [name for name in treated if not use.acts_on(name, kinds[name])]
        if lacking and len(lacking) == len(treated):
            has = listing(sorted(use.known or ())) or "nothing"
            raise MergeError(f"the statistics are of {has}, of no tensor that {use.name} acts on")
        if lacking:
            what = f"no {' and '.join(use.statistics)} of {len(lacking)} tensors"
            notes.append(f"{what}, such as '{lacking[0]}': {use.name} leaves them out")
    return tuple(found), tuple(notes)


def _with_its_own(use: Applied, statistics: Mapping[str, States]) -> Applied:
    needed = [kind for kind in use.method.needs if kind in STATISTICS]
    parameters = parameters_of(use.method.function)
    for kind in needed:
        default = getattr(parameters.get(kind), "default", inspect.Parameter.empty)
        if kind not in statistics and default is inspect.Parameter.empty:
            how = f"make it by {COMMANDS[kind]}, and give --statistics FILE for each; from Python"
            call = f"statistics={{'{kind}': {{task: {STATISTICS[kind]}}}}}"
            raise MergeError(f"{use.name} needs the {kind} of each task: {how} {call}")
    given = tuple(kind for kind in needed if kind in statistics)
    states = [state for kind in given for state in statistics[kind].values()]
    known = frozenset(states[0]).intersection(*states[1:]) if states else None
    return replace(use, statistics=given, known=known)


def _check_shapes(
    statistic: str, states: States, base: State, kinds: Mapping[str, str], use: Applied
) -> None:
    for name in [name for name, kind in kinds.items() if use.acts_on(name, kind)]:
        shape = tuple(meta_of(base, name).shape)
        if statistic == "covariance":
            if not holds_matrices(kinds[name]):
                raise MergeError(f"covariance of '{name}', which is no matrix: leave it out")
            inputs = shape[-2 if kinds[name].endswith("_T") else -1]
            shape = (*shape[:-2], inputs, inputs)
        for label, state in states.items():
            if (own := tuple(meta_of(state, name).shape)) != shape:
                raise MergeError(f"{statistic} of '{name}', task '{label}': is {own}, not {shape}")


def _applied(method: Method, given: Options, base: State) -> Applied:
    check_known(f"{method.name} option", given, method.options)
    options = {**method.options, **given}
    if method.kind != "purifier":
        return Applied(method, options)
    scope = as_globs(options.pop("scope"), f"{method.name} scope")
    _refuse_idle_globs(scope, base, f"{method.name} scope")
    return Applied(method, options, scope or ("*",))


def kinds_of(recipe: Recipe, base: State, copied: Collection[str] = ()) -> dict[str, str]:
    """Kind of each tensor: by the policy where the merge touches it, else "copy", as for some by name."""
    kinds = {
        name: "copy" if name in copied else kind_of(recipe, name, meta_of(base, name))
        for name in base
    }
    if callable(recipe.policy):
        return kinds
    given = [glob for glob, _ in recipe.policy]
    stacks = [name for name, kind in kinds.items() if kind == "stack" and not _matches(name, given)]
    return kinds | {name: "stack_T" for name in stacks if _is_turned(name, base)}


def _is_turned(name: str, base: State) -> bool:
    """Whether packed experts are stored for x @ W: gate_up_proj [E, n, 2 i] and down_proj [E, i, n]."""
    home = name[: name.rindex("experts.") + len("experts.")]
    parts = [f"{home}gate_up_proj", f"{home}down_proj"]
    if not all(part in base for part in parts):
        return False
    (_, inputs, both), (_, inner, outputs) = (meta_of(base, part).shape for part in parts)
    return bool(inputs == outputs and both == 2 * inner)


def check_globs(recipe: Recipe, names: Collection[str]) -> None:
    """Raise MergeError where a glob of the recipe matches none of the models' tensors."""
    for what in ("include", "exclude"):
        _refuse_idle_globs(getattr(recipe, what), names, what)
    if not callable(recipe.policy):
        _refuse_idle_globs([glob for glob, _ in recipe.policy], names, "policy")


def kind_of(recipe: Recipe, name: str, tensor: Tensor) -> str:
    """Kind of a tensor: by the policy where the merge touches it, else "copy".

    Raises MergeError where the policy names an unknown kind, or a matrix that is none.
    """
    if not is_selected(recipe, name) or not tensor.is_floating_point():
        return "copy"
    kind = _by_policy(name, tensor, recipe.policy)
    check_known(f"policy for '{name}'", [kind], KINDS_OF_TENSOR)
    if holds_matrices(kind) and tensor.ndim != (3 if kind.startswith("stack") else 2):
        shape = tuple(tensor.shape)
        raise MergeError(f"policy: '{name}' of shape {shape} cannot be a {kind}")
    return kind


def is_selected(recipe: Recipe, name: str) -> bool:
    """Whether include and exclude leave a tensor to the merge."""
    return _matches(name, recipe.include or ("*",)) and not _matches(name, recipe.exclude)


def _by_policy(name: str, tensor: Tensor, policy: Table | Policy) -> str:
    if callable(policy):
        return policy(name, tensor)
    for glob, kind in policy:
        if fnmatchcase(name, glob):
            return kind
    return default_policy(name, tensor)


def step_of(name: str, x: Tensor, kind: str, uses: Sequence[Applied], vectors: str | float) -> Step:
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
    purify = tuple(use.name for use in acting if use.purifies)
    how = uses[-1].name if uses[-1] in acting else "mean"
    spectral = any(use.method.acts_on == "matrix" for use in acting)
    return Step(name, shape, x.dtype, kind, purify, how, spectral=spectral)


def check_work(use: Applied, steps: Iterable[Step]) -> None:
    """Raise MergeError where a purifier finds no tensor, or a count of directions fits none of them."""
    steps, name = list(steps), use.name
    sizes = [min(s.shape[-2:], default=1) for s in steps if name in (*s.purify, s.rule)]
    idle = use.purifies or all(s.rule == "copy" for s in steps)
    if not sizes and idle:
        raise MergeError(
            f"{name} has no tensor to work on: see scope, include, exclude and vectors"
        )
    if use.method.acts_on != "matrix":
        return
    for option in RANK_OPTIONS:
        rank, most = use.options.get(option), max(sizes, default=math.inf)
        if isinstance(rank, int) and rank > most:
            raise MergeError(f"{name}.{option}={rank} is above the largest rank, {most}")


def decided_vectors(
    vectors: str | float, scale: float, uses: Sequence[Applied], tasks: int
) -> str | float:
    """The treatment of vectors that "auto" stands for; see `merge`."""
    if vectors != "auto":
        return vectors
    on_matrices = any(use.method.acts_on == "matrix" for use in uses)
    return "mean" if on_matrices and tasks > 1 and scale >= 0 else "rule"


def decided_scale(
    scale: float | None, uses: Sequence[Applied], tasks: int
) -> tuple[float, tuple[str, ...]]:
    """The scale to use for so many tasks, and what the user should know about it.

    Raises MergeError where none is given, and the rule recommends none for its option `reduce`.
    """
    *purifiers, rule = uses
    if scale is not None:
        return float(scale), ()
    if tasks == 1:
        return 1.0, ("scale 1.0: one task goes in whole; recommended scales are for several",)
    if not rule.method.scale:
        return 1.0, (f"scale 1.0: {rule.name} has no recommended value, try several",)
    reduced = str(rule.options.get("reduce", "any"))
    if reduced not in rule.method.scale:
        raise MergeError(f"{rule.name} with reduce={reduced!r} has no recommended scale: give one")
    recommended = rule.method.scale[reduced]
    if purifiers and rule.name in purifiers[-1].method.scale:
        recommended = purifiers[-1].method.scale[rule.name]
        return recommended, (f"scale {recommended}, for {rule.name} behind {purifiers[-1].name}",)
    note = f"scale {recommended}, recommended for {rule.name}"
    if purifiers:
        behind = ", ".join(use.name for use in purifiers)
        note += f" alone; no value is published behind {behind}: try several on validation data"
    else:
        note += " on the models of its authors: try several on validation data"
    return recommended, (note,)
