"""mergekit's YAML as a recipe, for the methods that both have; anything else in it is refused by name.

merge_method, models and their parameters as mergekit's generalized task arithmetic reads them (repository
arcee-ai/mergekit, merge_methods/generalized_task_arithmetic.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minipact.errors import CheckpointError, listing
from minipact.recipe import Recipe

ENDINGS = (".yml", ".yaml")
# method -> rule, purifier, whether mergekit normalizes by default
_METHODS = {
    "task_arithmetic": ("task_arithmetic", (), False),
    "ties": ("ties", (), True),
    "dare_linear": ("task_arithmetic", ("dare",), False),
    "dare_ties": ("ties", ("dare",), False),
}
_TOP = (
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
_OF_MODEL = ("weight", "density")
_PARAMETERS = ("weight", "density", "normalize", "rescale", "int8_mask", "lambda")


@dataclass(frozen=True)
class Foreign:
    """What a file says: paths or names of the models, as written there, and the merge.

    Attributes:
        base: of the base model. tasks: task name -> model. recipe: what to do. notes: how results differ.
    """

    base: str
    tasks: dict[str, str]
    recipe: Recipe
    notes: tuple[str, ...]

    def matched(self, given: Mapping[str, Path]) -> dict[str, Path]:
        """Files for the models: by their names, or else in the order of the file.

        Raises CheckpointError where there are more or fewer.
        """
        if given.keys() == self.tasks.keys():
            return dict(given)
        if len(given) != len(self.tasks):
            models = listing(self.tasks.values())
            raise CheckpointError(f"{len(given)} tasks are given for {models}: give one for each")
        return dict(zip(self.tasks, given.values(), strict=True))


def read_mergekit(path: Path) -> Foreign:
    """Read a mergekit configuration.

    Raises:
        CheckpointError: it cannot be read, or asks for what minipact does not do; the message names it.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
        return _foreign(found)
    except (OSError, ValueError, OverflowError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _foreign(found: object) -> Foreign:
    top = _table(found, "the file", _TOP)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"merge_method {method!r} is not read here: one of {listing(_METHODS)} is")
    base, models = top.get("base_model"), top.get("models")
    if not isinstance(base, str) or not isinstance(models, list):
        raise ValueError("base_model must be a name or path, and models a list")
    if top.get("tokenizer_source") not in (None, "base"):
        raise ValueError(
            "tokenizer_source must be 'base': minipact merges models of one vocabulary"
        )
    common = _table(top.get("parameters") or {}, "parameters", _PARAMETERS)
    entries = [_table(entry, "models", ("model", "parameters")) for entry in models]
    tasks = [entry for entry in entries if entry.get("model") != base]
    names = [_name(entry.get("model")) for entry in tasks]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"models {listing(names)}: at least one, and each by a name of its own")
    given = [common | _table(e.get("parameters") or {}, name, _OF_MODEL)
             for name, e in zip(names, tasks, strict=True)]  # fmt: skip
    recipe = _recipe(method, names, given, common)
    dtype = top.get("out_dtype", top.get("dtype"))
    notes = ["mergekit computes in its dtype, minipact in float32: results differ by rounding"]
    if recipe.purify:
        notes.append("DARE draws other random numbers than mergekit")
        if recipe.options["dare"]["rescale"]:
            own = "mergekit's rescale gives what is left of a tensor the L1 norm of the whole"
            notes.append(f"{own}, minipact divides it by the density: close on large tensors")
    paths = {name: str(entry["model"]) for name, entry in zip(names, tasks, strict=True)}
    return Foreign(base, paths, recipe.but(dtype=dtype), tuple(notes))


def _recipe(
    method: str, names: list[str], given: list[dict[str, Any]], common: Mapping[str, Any]
) -> Recipe:
    rule, purify, normalizes = _METHODS[method]
    weights = [_number("weight", x.get("weight")) for x in given]
    density = _one("density", [x.get("density", 1.0) for x in given])
    normalize = common.get("normalize", normalizes)
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize {normalize!r} must be true or false")
    options: dict[str, dict[str, Any]] = {}
    if purify:
        options["dare"] = {"p": 1 - density, "rescale": common.get("rescale", True)}
    elif common.get("rescale"):
        raise ValueError(f"rescale: true with {method} is not read here: leave it out")
    if rule == "ties":
        options["ties"] = {"density": 1.0 if purify else density, "scope": "tensor"}
        options["ties"]["reduce"] = "mean" if normalize else "sum"
        if normalize:
            _one("weight (normalize: true)", weights)
            weights = [1.0] * len(weights)
    elif normalize and sum(weights) != 0:
        weights = [x / sum(weights) for x in weights]
    scale = _number("lambda", common.get("lambda", 1.0))
    factors = dict(zip(names, weights, strict=True))
    return Recipe(rule, purify, options, scale, "rule", factors)


def _table(found: object, what: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A mapping that holds known keys only."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a mapping, not {found!r}")
    if unknown := [key for key in found if key not in known]:
        raise ValueError(f"{what}: {listing(unknown)} is not read here, only {listing(known)}")
    return dict(found)


def _name(model: object) -> str:
    """A task's name after its model's; adapters written as model+lora are not read."""
    if not isinstance(model, str) or "+" in model:
        raise ValueError(
            f"model {model!r} must be one name or path: give an adapter's folder as a task"
        )
    return Path(model).name


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = "one number for all tensors is, no list and no filter"
        raise ValueError(f"{what} {value!r} is not read here: {hint}")
    return float(value)


def _one(what: str, values: list[Any]) -> float:
    """The number that all models have."""
    numbers = [_number(what, value) for value in values]
    if len(set(numbers)) > 1:
        raise ValueError(f"{what} {numbers} must be the same for all models to be read here")
    return numbers[0]
