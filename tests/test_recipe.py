"""Recipes: checked fields, JSON both ways, digests, and merges that they repeat bit for bit."""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minipact as mp
from helpers import same, small_model
from minipact.recipe import KINDS_OF_TENSOR, VECTORS

BASE = small_model(0)
TASKS = {"a": small_model(100, BASE), "b": small_model(200, BASE)}

NUMBERS = st.floats(-1e30, 1e30) | st.integers(-9, 9)
WORDS = st.text(max_size=8)
GLOBS = st.lists(WORDS, max_size=3)
VALUES = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(0, 1) | WORDS | GLOBS
RECIPES = st.builds(
    mp.Recipe,
    rule=st.sampled_from(["ties", "tsv_m", "some.module:rule"]),
    purify=st.lists(st.sampled_from(["pact", "dare", "some.module:purifier"]), max_size=3),
    options=st.dictionaries(WORDS, st.dictionaries(WORDS, VALUES, max_size=3), max_size=3),
    scale=st.none() | NUMBERS,
    vectors=st.sampled_from(VECTORS) | NUMBERS,
    weights=st.none() | st.dictionaries(WORDS, NUMBERS, max_size=3),
    include=st.none() | WORDS | GLOBS,
    exclude=GLOBS.map(tuple),
    policy=st.dictionaries(WORDS, st.sampled_from(KINDS_OF_TENSOR), max_size=3),
    dtype=st.sampled_from([None, "bfloat16", "float32", torch.float16]),
    seed=st.integers(-(2**70), 2**70),
    statistics=st.dictionaries(
        st.sampled_from(["covariance", "fisher"]),
        st.dictionaries(WORDS, st.from_regex("[0-9a-f]{64}", fullmatch=True), max_size=2),
    ),
)
# One other value for every field.
CHANGES = {
    "rule": "ties",
    "purify": ["pact"],
    "options": {"task_arithmetic": {"reduce": "mean"}},
    "scale": 0.5,
    "vectors": "mean",
    "weights": {"a": 1.0},
    "include": "*.weight",
    "exclude": "*.weight",
    "policy": {"*": "vector"},
    "missing": "base",
    "rename": {"model.": ""},
    "vocabulary": "union",
    "dtype": "float16",
    "seed": 1,
    "statistics": {"covariance": {"a": 64 * "0"}},
}


# ---- JSON and digests ----------------------------------------------------------------------------


@given(RECIPES)
@settings(max_examples=100, deadline=None)
def test_recipes_survive_json(recipe: mp.Recipe):
    text = recipe.to_json()
    again = mp.Recipe.from_json(text)
    assert again == recipe
    assert again.to_json() == text
    assert again.digest == recipe.digest
    assert mp.Recipe.from_dict(recipe.to_dict()) == recipe
    assert mp.Recipe(**recipe.keywords()) == recipe


def test_the_digest_is_stable():
    recipe = mp.Recipe("tsv_m", ["pact"], {"pact": {"core": 38}}, 0.8, exclude="*.bias")
    assert recipe.to_json() == (
        '{"dtype": null, "exclude": ["*.bias"], "include": [], "missing": "error", '
        '"options": {"pact": {"core": 38}}, "policy": [], "purify": ["pact"], "rename": [], '
        '"rule": "tsv_m", "scale": 0.8, "seed": 0, "statistics": {}, '
        '"vectors": "auto", "vocabulary": "same", "weights": null}'
    )
    assert recipe.digest == "d22eb4b47569e368333d6feadc73bd521b39297f6a199f3f66648e8c966479b5"


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_counts(field: str):
    assert set(CHANGES) == set(mp.Recipe().keywords())
    other = mp.Recipe().but(**{field: CHANGES[field]})
    assert other != mp.Recipe()
    assert other.digest != mp.Recipe().digest
    assert mp.Recipe.from_json(other.to_json()) == other


def test_what_is_equal_is_written_alike():
    given = mp.Recipe(
        mp.tsv_m, mp.METHODS["pact"], {"pact": {"scope": ["a"]}}, 1, 2, dtype=torch.half
    )
    named = mp.Recipe("tsv_m", ("pact",), {"pact": {"scope": ("a",)}}, 1.0, 2.0, dtype="float16")
    assert given.digest == named.digest
    assert given.to_json() == named.to_json()
    assert given.options == named.options


# ---- Functions of one's own ----------------------------------------------------------------------


def own(D: torch.Tensor) -> torch.Tensor:
    return D.sum(0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"rule": own},
            "rule own is a function of your own, .*minipact.register.*package.module:f",
        ),
        ({"purify": ["pact", own]}, "purifier own is a function of your own"),
        ({"rule": mp.Method("mine", "rule", own)}, "rule mine is a function of your own"),
        ({"rule": partial(own)}, "rule functools.partial.* is a function of your own"),
        (
            {"policy": lambda name, x: "copy"},
            "policy <lambda> is .* no JSON: give a table, glob -> ",
        ),
        ({"options": {"own": {"x": torch.ones(1)}}}, "the recipe has no JSON: .*Tensor"),
    ],
)
def test_own_functions_have_no_json(recipe: dict, message: str):
    for ask in (mp.Recipe.to_json, mp.Recipe.to_dict, lambda recipe: recipe.digest):
        with pytest.raises(mp.MergeError, match=message):
            ask(mp.Recipe(**recipe))


# ---- Bad fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": "ties"}, "recipe field 'rules' is unknown: use 'rule', 'purify'"),
        ({"rule": 5}, "rule 5 is neither a name nor a function"),
        ({"rule": None}, "rule None is neither"),
        ({"purify": 5}, "purify 5 is neither"),
        ({"purify": ["pact", 5]}, "purify 5 is neither"),
        ({"purify": None}, "purify None is neither"),
        ({"options": [1]}, r"options must be a mapping, not \[1\]"),
        ({"options": {"pact": 5}}, "options: pact must be a mapping, not 5"),
        ({"scale": "big"}, "scale 'big' must be a number"),
        ({"scale": "1"}, "scale '1' must be a number"),
        ({"scale": True}, "scale True must be a number"),
        ({"scale": [1.0]}, r"scale \[1.0\] must be a number"),
        ({"scale": math.inf}, "scale inf must be a number, finite"),
        ({"scale": math.nan}, "scale nan must be a number, finite"),
        ({"scale": 1e39}, "scale 1e\\+39 must be .* within float32's range"),
        ({"scale": 10**400}, "scale 1000.* must be a number"),
        ({"vectors": "all"}, "vectors 'all' is unknown: use 'auto', 'rule', 'mean', 'copy'"),
        ({"vectors": None}, "vectors None must be a number"),
        ({"vectors": math.nan}, "vectors nan must be a number"),
        ({"vectors": False}, "vectors False must be a number"),
        ({"weights": 3}, "weights must be a mapping, not 3"),
        ({"weights": {"a": "x"}}, "weights: 'a' 'x' must be a number"),
        ({"weights": {"a": math.nan}}, "weights: 'a' nan must be a number"),
        ({"include": 5}, "include must be a glob of tensor names or several, not 5"),
        ({"exclude": [1]}, r"exclude must be a glob of tensor names or several, not \[1\]"),
        ({"policy": "matrix"}, "policy must be a mapping glob -> kind, not 'matrix'"),
        ({"policy": {"*": 5}}, "policy '5' is unknown: use 'matrix'"),
        ({"policy": {"*": "tensor"}}, "policy 'tensor' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is no floating-point type"),
        ({"dtype": "float33"}, "dtype 'float33' is no floating-point type"),
        ({"dtype": 16}, "dtype '16' is no floating-point type"),
        ({"seed": 1.0}, "seed 1.0 must be a whole number"),
        ({"seed": True}, "seed True must be a whole number"),
        ({"seed": "1"}, "seed '1' must be a whole number"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Recipe.from_dict(fields)
    with pytest.raises(mp.MergeError, match=message):
        mp.Recipe.from_json(json.dumps(fields))
    if "rules" not in fields:
        with pytest.raises(mp.MergeError, match=message):
            mp.Recipe(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("", "is no JSON"),
        ("[]", "must be a JSON object"),
        ("3", "JSON object"),
    ],
)
def test_bad_texts(text: str, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Recipe.from_json(text)


def test_a_recipe_stays():
    recipe = mp.Recipe(options={"pact": {"core": 3}})
    with pytest.raises(AttributeError):
        recipe.scale = 2.0
    assert recipe.but(scale=2).scale == 2.0
    assert recipe.scale is None


# ---- The recipe of a merge -----------------------------------------------------------------------


def test_the_recipe_of_a_merge_is_effective():
    merged = mp.Merged(
        BASE,
        TASKS,
        rule="tsv_m",
        purify=["pact", mp.dare],
        options={"pact": {"core": 3, "scope": "*c_fc*"}},
        exclude="*.conv1.*",
        policy={"*.proj": "vector"},
    )
    assert merged.recipe.to_dict() == {
        "rule": "tsv_m",
        "purify": ["pact", "dare"],
        "options": {
            "pact": {
                "core": 3, "task": 0.04, "tol": 0.001, "strength": 1.0, "svd": "exact",
                "scope": ["*c_fc*"],
            },
            "dare": {"p": 0.2, "rescale": True, "scope": None},
            "tsv_m": {"rank": None, "svd": "exact"},
        },
        "scale": 1.0,
        "vectors": "mean",
        "weights": {"a": 1.0, "b": 1.0},
        "include": [],
        "exclude": ["*.conv1.*"],
        "policy": [["*.proj", "vector"]],
        "missing": "error",
        "rename": [],
        "vocabulary": "same",
        "dtype": None,
        "seed": 0,
        "statistics": {},
    }  # fmt: skip


MERGES = [
    {},
    {"rule": "ties", "options": {"ties": {"scope": "tensor"}}},
    {"rule": "ties", "purify": "dare", "seed": 5, "weights": [0.5, 2]},
    {"rule": "tsv_m", "purify": "pact", "options": {"pact": {"scope": ["*c_fc*", "*proj"]}}},
    {"rule": "iso_c", "scale": -1, "dtype": "bfloat16"},
    {"rule": mp.iso_cts, "purify": [mp.sift, mp.METHODS["dare"]], "vectors": 0.5},
    {"purify": "pact", "include": "*.weight", "exclude": ["*conv1*"]},
    {"policy": {"*.proj": "vector", "*bias": "copy"}, "rule": "tsv_m", "vectors": "rule"},
]


@pytest.mark.parametrize("recipe", MERGES)
def test_a_recipe_repeats_its_merge(recipe: dict):
    merged = mp.Merged(BASE, TASKS, **recipe)
    again = mp.Merged(BASE, TASKS, **merged.recipe.keywords())
    written = mp.Merged(BASE, TASKS, **mp.Recipe.from_json(merged.recipe.to_json()).keywords())
    for other in (again, written):
        assert same(other, merged)
        assert other.recipe.digest == merged.recipe.digest
        assert other.steps == merged.steps
    assert same(mp.merge(BASE, TASKS, **again.recipe.keywords()), merged)


def test_a_recipe_with_own_functions_repeats_its_merge():
    merged = mp.Merged(BASE, TASKS, rule=own, purify=lambda W0, D: D / 2, policy=mp.default_policy)
    assert same(mp.Merged(BASE, TASKS, **merged.recipe.keywords()), merged)


def test_the_recipe_of_another_scale_is_effective_too():
    lazy = mp.Merged(BASE, TASKS, rule="tsv_m")
    for scale, vectors in ((0.5, "mean"), (-0.5, "rule")):
        recipe = lazy.at(scale).recipe
        assert (recipe.scale, recipe.vectors) == (scale, vectors)
        assert same(mp.Merged(BASE, TASKS, **recipe.keywords()), lazy.at(scale))
    assert lazy.recipe.scale == 1.0


def test_equal_recipes_have_one_hash():
    one, two = (
        mp.Recipe("ties", ["pact"], {"pact": {"core": 3}}, policy={"a": "copy"}) for _ in "ab"
    )
    assert len({one, two}) == 1
    assert len({one, one.but(policy=()), one.but(scale=2)}) == 3
