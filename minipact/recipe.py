"""A merge described as one object: everything but the models and where they are."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.methods import METHODS, STATISTICS, Function, Method, Options

Use = str | Function | Method
Policy = Callable[[str, Tensor], str]
Globs = str | Sequence[str] | None
Table = tuple[tuple[str, str], ...]
VECTORS = ("auto", "rule", "mean", "copy")
VOCABULARIES = ("same", "union")
MISSING = ("error", "base", "present")
KINDS_OF_TENSOR = ("matrix", "matrix_T", "stack", "stack_T", "vector", "copy")


@dataclass(frozen=True)
class Recipe:
    """What is merged how; the fields are those of `merge`, without models, device and progress.

    Two merges of the same inputs by equal recipes have the same result. Lists become tuples, so that
    recipes compare by value. Raises MergeError where a field is of the wrong type.

    Attributes:
        rule, purify: names, functions, or Methods; purify in order.
        options: method name -> {option: value}.
        scale: None takes the rule's recommended value.
        vectors: "auto", "rule", "mean", "copy", or a factor of the sum of the task vectors.
        weights: task name -> factor; None is 1 each.
        include, exclude: globs of tensor names.
        policy: pairs, or a mapping, glob -> "matrix", "matrix_T", "stack", "stack_T", "vector" or "copy"; the
            first glob that matches counts, then the default policy. Or a function (name, tensor) -> kind in
            its place.
        missing: "error"; "base", what a task lacks counts as unchanged, and what the base lacks is left out;
            or "present", each tensor is merged from the models that hold it.
        rename: pairs (old, new) of beginnings of names in the tasks.
        vocabulary: "same", or "union" of the tokenizers in model folders, for `merge_files`.
        dtype: name of the result's floating-point type, "bfloat16" for one; None keeps the base's.
        seed: of all random numbers.
        statistics: kind -> {task: SHA-256 of the file}, where a merge takes statistics of data from files.
    """

    rule: Use = "task_arithmetic"
    purify: tuple[Use, ...] = ()
    options: Mapping[str, Options] = field(default_factory=dict)
    scale: float | None = None
    vectors: str | float = "auto"
    weights: Mapping[str, float] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    policy: Table | Policy = ()
    missing: str = "error"
    rename: Table = ()
    vocabulary: str = "same"
    dtype: str | None = None
    seed: int = 0
    statistics: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on

        _check_method("rule", self.rule)
        settle("purify", as_methods(self.purify))
        settle("include", as_globs(self.include, "include"))
        settle("exclude", as_globs(self.exclude, "exclude"))
        settle("options", _options(self.options))
        settle("statistics", _sums(self.statistics))
        settle("dtype", dtype_name(self.dtype))
        check_known("missing", [self.missing], MISSING)
        check_known("vocabulary", [self.vocabulary], VOCABULARIES)
        settle("rename", as_table(self.rename, "rename"))
        if not callable(self.policy):
            settle("policy", as_table(self.policy))
            check_known("policy", [kind for _, kind in self.policy], KINDS_OF_TENSOR)
        if self.weights is not None:
            table = _table(self.weights, "weights")
            weights = {str(name): as_number(f"weights: '{name}'", x) for name, x in table.items()}
            settle("weights", weights)
        if isinstance(self.vectors, str):
            check_known("vectors", [self.vectors], VECTORS)
        else:
            settle("vectors", as_number("vectors", self.vectors))
        if self.scale is not None:
            settle("scale", as_number("scale", self.scale))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise MergeError(f"seed {self.seed!r} must be a whole number")

    def __hash__(self) -> int:
        return hash((str(self.rule), str(self.purify), self.scale, self.vectors, self.seed))

    def keywords(self) -> dict[str, Any]:
        """The fields as keyword arguments of `merge` and `Merged`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to_json(self) -> str:
        """The recipe as one line of JSON, keys sorted.

        Raises MergeError where it holds a function that no name stands for, or an option that JSON does not
        know.
        """
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as what JSON knows: dictionaries, lists, strings, numbers. Errors as in `to_json`."""
        if callable(self.policy):
            raise _no_json("policy", self.policy, "give a table, glob -> kind")
        found = self.keywords()
        found["rule"] = _name(self.rule, "rule")
        found["purify"] = [_name(method, "purifier") for method in self.purify]
        try:
            as_json: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise MergeError(f"the recipe has no JSON: {error}") from error
        if _options(as_json["options"]) != self.options:
            raise MergeError(
                "the recipe has no JSON: an option's value would come back as another one"
            )
        return as_json

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises MergeError where the text is no JSON, or a field is unknown or of the wrong type.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise MergeError(f"the recipe is no JSON ({error})") from error

    @classmethod
    def from_dict(cls, found: object) -> Recipe:
        """The recipe that `to_dict` gave. Errors as in `from_json`."""
        if not isinstance(found, Mapping):
            raise MergeError("the recipe must be a JSON object with fields such as rule and scale")
        check_known("recipe field", found, [f.name for f in fields(cls)])
        try:
            return cls(**found)
        except MergeError as error:
            raise MergeError(f"the recipe cannot be read: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON, in hexadecimal. Errors as in `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed."""
        return replace(self, **changes)


def _check_method(what: str, given: object) -> None:
    if not isinstance(given, str | Method) and not callable(given):
        raise MergeError(f"{what} {given!r} is neither a name nor a function")


def as_methods(given: Use | Sequence[Use]) -> tuple[Use, ...]:
    """One purifier or several as a tuple. Raises MergeError for anything else."""
    methods = given if isinstance(given, list | tuple) else (given,)
    for method in methods:
        _check_method("purify", method)
    return tuple(methods)


def as_globs(given: object, what: str) -> tuple[str, ...]:
    """One glob, several, or none, as a tuple. Raises MergeError, naming the field, for anything else."""
    if given is None:
        return ()
    globs = (given,) if isinstance(given, str) else given
    if not isinstance(globs, list | tuple | set) or not all(
        isinstance(glob, str) for glob in globs
    ):
        raise MergeError(f"{what} must be a glob of tensor names or several, not {given!r}")
    return tuple(globs)


def _options(given: Mapping[str, Options]) -> dict[str, Options]:
    return {
        name: {option: _as_tuple(x) for option, x in _table(options, f"options: {name}").items()}
        for name, options in _table(given, "options").items()
    }


def _sums(given: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """SHA-256 of files of statistics by kind and task, checked."""
    table = _table(given, "statistics")
    check_known("statistics", table, STATISTICS)
    found = {}
    for kind, sums in table.items():
        found[kind] = {str(name): x for name, x in _table(sums, f"statistics: {kind}").items()}
        for name, x in found[kind].items():
            if not isinstance(x, str) or not re.fullmatch("[0-9a-f]{64}", x):
                raise MergeError(f"statistics: {kind} of '{name}' must be a SHA-256, not {x!r}")
    return found


def _as_tuple(x: object) -> object:
    return tuple(x) if isinstance(x, list) else x


def as_table(given: object, what: str = "policy") -> Table:
    """Pairs of a policy (glob, kind), or of names (old, new), from a mapping or pairs; their order counts."""
    if given is None:
        return ()
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        pairs = {"policy": "glob -> kind", "rename": "old -> new"}[what]
        raise MergeError(f"{what} must be a mapping {pairs}, not {given!r}")
    return tuple((str(glob), str(kind)) for glob, kind in pairs)


def _table(given: object, what: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise MergeError(f"{what} must be a mapping, not {given!r}")
    return given


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Name of a floating-point type. Raises MergeError where it is none."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise MergeError(
            f"dtype {name!r} is no floating-point type: use float32, bfloat16, float16, ..."
        )
    return str(found).removeprefix("torch.")  # "half" is float16


def as_number(what: str, x: Any) -> float:
    """x as a float, from a number of any library. Raises MergeError unless float32 can hold it."""
    try:
        found = math.nan if isinstance(x, str | bool) else float(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not abs(found) <= torch.finfo(torch.float32).max:
        raise MergeError(f"{what} {x!r} must be a number, finite and within float32's range")
    return found


def _name(method: Use, kind: str) -> str:
    """The name that finds a method again; strings are names already."""
    if isinstance(method, str):
        return method
    for known in METHODS.values():
        if method is known or method is known.function:
            return known.name
    remedy = "register it (minipact.register), or name it package.module:function"
    raise _no_json(kind, method, remedy)


def _no_json(what: str, function: object, remedy: str) -> MergeError:
    name = getattr(function, "__name__", getattr(function, "name", repr(function)))
    return MergeError(
        f"{what} {name} is a function of your own, so the recipe has no JSON: {remedy}"
    )
