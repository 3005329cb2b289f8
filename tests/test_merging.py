"""Whole models: what happens to each tensor, vectors and scale, sweeps, checks, streams, processes."""

import itertools
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import flat, normal, same, single, small_model, tuned
from minipact import methods, tensors
from minipact.methods import SurveyPasses
from minipact.parallel import in_threads
from minipact.steps import Applied

RULES = (
    "task_arithmetic", "ties", "consensus", "tsv_m", "iso_c", "iso_cts", "wudi", "swudi", "ace", "knots",
)  # fmt: skip
VECTORS = ("auto", "rule", "mean", "copy", 0.4)
BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]
BIAS, PROJ = "visual.mlp.c_fc.bias", "visual.proj"


def differences(name: str) -> Tensor:
    """D [T, ...] of one tensor of the three tasks."""
    return torch.stack([task[name] - BASE[name] for task in TASKS])


# ---- What happens to each tensor -----------------------------------------------------------------


def test_matrices_vectors_and_integers_go_their_ways():
    merged = mp.Merged(BASE, TASKS, rule="iso_c", purify="pact", vectors="rule", scale=1.0)
    name = "visual.mlp.c_proj.weight"
    D = differences(name)
    assert torch.equal(merged.delta(name), mp.iso_c(mp.pact(BASE[name], D)))
    # used as x @ W: its input side is the first axis
    transposed = mp.pact(BASE[PROJ].mT, differences(PROJ).mT).mT
    assert torch.equal(merged.delta(PROJ), mp.iso_c(transposed))
    sided = mp.Merged(BASE, TASKS, rule="wudi", scale=1.0)
    assert torch.equal(sided.delta(PROJ), mp.wudi(differences(PROJ).mT).mT)
    for name in (BIAS, "visual.conv1.weight"):
        assert torch.equal(merged.delta(name), differences(name).mean(0))
    assert merged.delta("visual.steps") is None
    assert merged["visual.steps"] == BASE["visual.steps"]
    summed = mp.Merged(BASE, TASKS, purify="pact", vectors="rule", scale=1.0)
    assert torch.equal(
        summed.delta("visual.conv1.weight"), differences("visual.conv1.weight").sum(0)
    )


def test_steps_tell_what_happens():
    merged = mp.Merged(BASE, TASKS, rule="tsv_m", purify=["pact", "dare"])
    told = {name: (step.kind, step.treatment) for name, step in merged.steps.items()}
    assert told == {
        "visual.mlp.c_fc.weight": ("matrix", "pact > dare > tsv_m"),
        "visual.mlp.c_fc.bias": ("vector", "mean, unscaled"),
        "visual.mlp.c_proj.weight": ("matrix", "pact > dare > tsv_m"),
        "visual.proj": ("matrix_T", "pact > dare > tsv_m"),
        "visual.conv1.weight": ("vector", "mean, unscaled"),
        "visual.steps": ("copy", "copy"),
    }
    assert merged.steps[PROJ].entries == 16 * 12
    third = mp.Merged(BASE, TASKS, rule="tsv_m", vectors=0.25)
    assert third.steps[BIAS].treatment == "0.25 x sum, unscaled"
    scaled = mp.Merged(BASE, TASKS, rule="ties", purify="dare").steps[BIAS]
    assert (scaled.treatment, scaled.factor) == ("dare > ties", None)


def test_default_policy():
    x2, x1 = torch.empty(4, 4), torch.empty(4)
    kinds = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": "matrix",
        "visual.positional_embedding": "matrix",
        "visual.proj": "matrix_T",
        "transformer.h.0.attn.c_attn.weight": "matrix_T",
        "visual.transformer.resblocks.0.mlp.c_fc.weight": "matrix",
        "text_projection": "vector",
        "token_embedding.weight": "vector",
        "model.embed_tokens.weight": "vector",
        "bn.running_mean": "copy",
    }
    assert {name: mp.default_policy(name, x2) for name in kinds} == kinds
    assert mp.default_policy("ln.weight", x1) == "vector"
    assert mp.default_policy("mlp.experts.gate_up_proj_bias", x2) == "vector"
    for name in (
        "experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "experts.w1.weight",
    ):
        assert mp.default_policy(name, torch.empty(2, 4, 4)) == "stack"
    for name in ("experts_of.w", "my_experts.w", "experts.0.w", "visual.class_tokens"):
        assert mp.default_policy(name, torch.empty(2, 4, 4)) == "vector"


def test_policies_as_tables_and_functions():
    table = {"*.conv1.*": "copy", "*.proj": "vector", "visual.p*": "matrix"}
    steps = mp.Merged(BASE, TASKS, policy=table).steps
    kinds = {name: step.kind for name, step in steps.items()}
    assert kinds["visual.conv1.weight"] == "copy"
    assert kinds[PROJ] == "vector", "the first glob that matches counts"
    assert kinds["visual.mlp.c_fc.weight"] == "matrix"
    by_function = mp.Merged(BASE, TASKS, policy=lambda name, x: "vector").steps
    assert {step.kind for step in by_function.values()} == {"vector", "copy"}


def test_include_exclude_and_scope():
    merged = mp.merge(BASE, TASKS, exclude="*.bias", scale=1.0)
    assert torch.equal(merged["visual.mlp.c_fc.bias"], BASE["visual.mlp.c_fc.bias"])
    merged = mp.merge(BASE, TASKS, include=["*.bias"], scale=1.0)
    changed = [name for name in BASE if not torch.equal(merged[name], BASE[name])]
    assert changed == ["visual.mlp.c_fc.bias"]
    steps = mp.Merged(BASE, TASKS, purify="pact", options={"pact": {"scope": "*c_fc*"}}).steps
    assert [name for name, step in steps.items() if step.purify] == ["visual.mlp.c_fc.weight"]


def test_weights_multiply_task_vectors():
    merged = mp.merge(BASE, TASKS, weights=[1, 0.5, 0], scale=1.0)
    name = PROJ
    expected = TASKS[0][name] + 0.5 * (TASKS[1][name] - BASE[name])
    assert torch.allclose(merged[name], expected, atol=1e-6)
    named = dict(zip("cab", TASKS, strict=True))
    by_name = mp.merge(BASE, named, weights={"b": 0, "a": 0.5, "c": 1}, scale=1.0)
    in_order = mp.merge(BASE, named, weights=[1, 0.5, 0], scale=1.0)
    assert same(by_name, in_order)
    assert torch.allclose(by_name[name], merged[name], atol=1e-6)


def test_own_functions():
    def largest(D: Tensor) -> Tensor:
        return D.amax(0)

    def halved(W0: Tensor, D: Tensor) -> Tensor:
        assert W0.shape == D.shape[1:]
        return D / 2

    name = "visual.mlp.c_fc.weight"
    merged = mp.Merged(BASE, TASKS, rule=largest, purify=[halved, "pact"], scale=1.0)
    D = differences(name)
    assert torch.allclose(merged.delta(name), mp.pact(BASE[name], D / 2).amax(0), rtol=0, atol=1e-6)
    assert merged.steps[name].treatment == "halved > pact > largest"
    assert mp.Merged(BASE, TASKS, rule=largest).scale == 1.0
    assert "largest has no recommended value" in mp.Merged(BASE, TASKS, rule=largest).notes[0]
    with pytest.raises(
        mp.MergeError, match=r"'visual.mlp.c_fc.weight', <lambda>: it returned the shape"
    ):
        mp.merge(BASE, TASKS, rule=lambda D: D[0, 0])
    with pytest.raises(mp.MergeError, match="<lambda>: it returned float, not a dense tensor"):
        mp.merge(BASE, TASKS, rule=lambda D: 1.0)


def test_dtypes():
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in BASE.items()}
    tuned = [
        {name: x.bfloat16() if x.is_floating_point() else x for name, x in task.items()}
        for task in TASKS
    ]
    merged = mp.merge(half, tuned, rule="tsv_m", purify="pact")
    assert {name: x.dtype for name, x in merged.items()} == {n: x.dtype for n, x in half.items()}
    wide = mp.merge(half, tuned, rule="tsv_m", purify="pact", dtype=torch.float32)
    assert wide["visual.proj"].dtype == torch.float32
    assert wide["visual.steps"].dtype == torch.int64
    assert torch.equal(wide["visual.proj"].bfloat16(), merged["visual.proj"])
    double = {name: x.double() if x.is_floating_point() else x for name, x in BASE.items()}
    assert mp.Merged(double, TASKS).delta("visual.proj").dtype == torch.float64
    for function in (mp.tsv_m, mp.iso_c, mp.iso_cts, mp.wudi, mp.ace):
        assert function(single(3, 8, 6).bfloat16()).dtype == torch.bfloat16


def test_dare_masks_depend_on_names_only():
    named = dict(zip("abc", TASKS, strict=True))
    alone = mp.merge(BASE, {"b": TASKS[1]}, purify="dare", scale=1.0, seed=3)
    masked = {n: (alone[n] != BASE[n]) for n in ("visual.proj", "visual.conv1.weight")}
    weights = {"a": 0, "b": 1, "c": 0}
    together = mp.merge(BASE, named, purify="dare", scale=1.0, seed=3, weights=weights)
    for name, mask in masked.items():
        assert torch.equal(together[name] != BASE[name], mask)
    other = mp.merge(BASE, {"b": TASKS[1]}, purify="dare", scale=1.0, seed=4)
    assert not torch.equal(other["visual.proj"], alone["visual.proj"])


def test_unchanged_tensors_are_copied():
    frozen = [task | {PROJ: BASE[PROJ].clone()} for task in TASKS]
    merged = mp.merge(BASE, frozen, rule="iso_c", purify="pact")
    assert torch.equal(merged[PROJ], BASE[PROJ])
    assert merged[PROJ].data_ptr() != BASE[PROJ].data_ptr()


def test_scales_are_recommended():
    assert mp.Merged(BASE, TASKS).scale == 0.3
    assert mp.Merged(BASE, TASKS, options={"task_arithmetic": {"reduce": "mean"}}).scale == 1.0
    assert mp.Merged(BASE, TASKS, rule="iso_cts").scale == 1.5
    assert mp.Merged(BASE, TASKS, scale=1).notes == ()
    assert "no value is published behind pact" in mp.Merged(BASE, TASKS, purify="pact").notes[0]
    assert "validation data" in mp.Merged(BASE, TASKS, rule="iso_c").notes[0]
    filtered = mp.Merged(BASE, TASKS, purify=["dare", "wiener"])
    assert filtered.scale == 1.0
    assert filtered.notes[0] == "scale 1.0, for task_arithmetic behind wiener"
    assert mp.Merged(BASE, TASKS, purify=["wiener", "dare"]).scale == 0.3
    assert mp.Merged(BASE, TASKS, rule="tsv_m", purify="wiener").scale == 1.0


@pytest.mark.parametrize(
    ("rule", "options"), [("task_arithmetic", {}), ("ties", {"density": 1.0}), ("tsv_m", {})]
)
@pytest.mark.parametrize("purify", [[], ["pact"], ["dare"]])
def test_one_task_comes_back(rule: str, options: dict[str, float], purify: list[str]):
    merged = mp.merge(
        BASE, TASKS[:1], rule=rule, purify=purify, scale=1.0,
        options={rule: options} | ({"dare": {"p": 0.0}} if purify == ["dare"] else {}),
    )  # fmt: skip
    for name, x in TASKS[0].items():
        assert torch.allclose(merged[name], x, atol=1e-5), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "purify", [[], ["pact"], ["sift", "dare"], ["pact", "dare"], ["awd", "tatr"]]
)
def test_named_tasks_merge_alike_in_any_order_bit_for_bit(rule: str, purify: list[str]):
    named = dict(zip("abc", TASKS, strict=True))
    first, second = (
        mp.merge(BASE, {name: named[name] for name in order}, rule=rule, purify=purify, scale=1.0)
        for order in ("abc", "cab")
    )
    assert same(first, second)


# ---- Vectors and scale ---------------------------------------------------------------------------

SMALL = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.ones(2)}
# The tasks' matrices add up to diag(2, 4), so Iso-C makes 3 * identity of them.
TWO = [
    {"w": SMALL["w"] + torch.diag(torch.tensor([2.0, 0.0])), "b": torch.tensor([2.0, 1.0])},
    {"w": SMALL["w"] + torch.diag(torch.tensor([0.0, 4.0])), "b": torch.tensor([4.0, -1.0])},
]
UPDATES = {"task_arithmetic": [[2.0, 0.0], [0.0, 4.0]], "iso_c": [[3.0, 0.0], [0.0, 3.0]]}
# The biases change by [1, 0] and [3, -2]: the sum is [4, -2], the mean [2, -1]; the scale is 1/4.
BIASES = [
    ("task_arithmetic", (), "rule", [1.0, -0.5]),
    ("task_arithmetic", (), "mean", [2.0, -1.0]),
    ("task_arithmetic", (), "copy", [0.0, 0.0]),
    ("task_arithmetic", (), 0.75, [3.0, -1.5]),
    ("task_arithmetic", (), "auto", [1.0, -0.5]),
    ("task_arithmetic", ("pact",), "rule", [1.0, -0.5]),
    ("task_arithmetic", ("pact",), "mean", [2.0, -1.0]),
    ("task_arithmetic", ("pact",), "copy", [0.0, 0.0]),
    ("task_arithmetic", ("pact",), 0.75, [3.0, -1.5]),
    ("task_arithmetic", ("pact",), "auto", [2.0, -1.0]),
    ("iso_c", (), "rule", [0.5, -0.25]),
    ("iso_c", (), "mean", [2.0, -1.0]),
    ("iso_c", (), "copy", [0.0, 0.0]),
    ("iso_c", (), 0.75, [3.0, -1.5]),
    ("iso_c", (), "auto", [2.0, -1.0]),
    ("iso_c", ("pact",), "rule", [0.5, -0.25]),
    ("iso_c", ("pact",), "auto", [2.0, -1.0]),
]


@pytest.mark.parametrize(("rule", "purify", "vectors", "bias"), BIASES)
def test_vectors_by_hand(rule: str, purify: tuple[str, ...], vectors, bias: list[float]):
    options = {"pact": {"strength": 0.0}} if purify else {}  # so that matrices stay simple
    recipe = {"rule": rule, "purify": purify, "vectors": vectors, "options": options}
    merged = mp.merge(SMALL, TWO, scale=0.25, **recipe)
    assert torch.equal(merged["b"], 1 + torch.tensor(bias))
    update = 0.25 * torch.tensor(UPDATES[rule])
    assert torch.allclose(merged["w"], SMALL["w"] + update, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "purify", "tasks", "scale", "decided"),
    [
        ("task_arithmetic", [], 3, 0.5, "rule"),
        ("ties", [], 3, 0.5, "rule"),
        ("ties", ["dare"], 3, 0.5, "rule"),
        ("task_arithmetic", ["pact"], 3, 0.5, "mean"),
        ("ties", ["dare", "sift"], 3, 0.5, "mean"),
        ("tsv_m", [], 3, 0.5, "mean"),
        ("iso_c", ["dare"], 2, None, "mean"),
        ("iso_c", ["dare"], 1, 0.5, "rule"),
        ("task_arithmetic", ["pact"], 1, 0.5, "rule"),
        ("task_arithmetic", ["pact"], 3, -0.5, "rule"),
        ("tsv_m", [], 3, -0.5, "rule"),
        (lambda D: D.sum(0), [], 3, 0.5, "mean"),
        ("task_arithmetic", [lambda W0, D: D], 3, 0.5, "mean"),
    ],
)
def test_auto_decides(rule, purify: list, tasks: int, scale: float | None, decided: str):
    recipe = {"rule": rule, "purify": purify, "scale": scale}
    merged = mp.Merged(BASE, TASKS[:tasks], **recipe)
    assert merged.recipe.vectors == decided
    assert same(merged, mp.Merged(BASE, TASKS[:tasks], **recipe, vectors=decided))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("purify", [[], ["pact"], ["sift"], ["dare"], ["dare", "pact"]])
def test_scale_zero_gives_the_base_to_the_byte(rule: str, purify: list[str]):
    base = BASE | {"zeros": torch.tensor([-0.0, 0.0])}
    tasks = [task | {"zeros": torch.tensor([0.0, 1.0])} for task in TASKS]
    for vectors in VECTORS:
        still = mp.merge(base, tasks, rule=rule, purify=purify, scale=0.0, vectors=vectors)
        assert list(still) == list(base)
        for name, x in base.items():
            assert still[name].numpy().tobytes() == x.numpy().tobytes()
            assert still[name].data_ptr() != x.data_ptr()


def test_a_bias_is_unaffected_by_the_scale_under_mean():
    biases = [mp.merge(BASE, TASKS, rule="tsv_m", scale=scale)[BIAS] for scale in (0.1, 1.0, 7.0)]
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])
    assert torch.allclose(biases[0], BASE[BIAS] + differences(BIAS).mean(0), atol=1e-6)


def test_ties_trims_over_the_whole_model():
    D = torch.stack([flat(task) - flat(BASE) for task in TASKS])
    merged = mp.Merged(BASE, TASKS, rule="ties", scale=1.0)
    found = {name: merged.delta(name) for name in BASE if name != "visual.steps"}
    assert torch.equal(flat(found), mp.ties(D))
    by_tensor = {"options": {"ties": {"scope": "tensor"}}, "scale": 1.0}
    local = mp.Merged(BASE, TASKS, rule="ties", **by_tensor)
    assert torch.equal(local.delta(PROJ), mp.ties(differences(PROJ)))
    assert not torch.equal(local.delta(PROJ), merged.delta(PROJ))


@pytest.mark.parametrize("vectors", ["mean", "copy", 0.5])
def test_ties_trims_over_what_it_treats_only(vectors: str | float):
    """Vectors that are treated apart do not take part in the share of entries that stay."""
    louder = [task | {BIAS: BASE[BIAS] + 100 * single(24, seed=i)} for i, task in enumerate(TASKS)]
    merged = mp.Merged(BASE, louder, rule="ties", vectors=vectors, scale=1.0)
    matrices = [name for name, step in merged.steps.items() if step.kind.startswith("matrix")]
    D = torch.cat([differences(name).flatten(1) for name in matrices], dim=1)
    found = torch.cat([merged.delta(name).flatten() for name in matrices])
    assert torch.equal(found, mp.ties(D))


def test_a_model_of_vectors_alone_merges():
    base = {"b": torch.zeros(4)}
    tasks = [{"b": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"b": torch.tensor([3.0, 0.0, 1.0, 0.0])}]
    for rule in ("ties", "tsv_m", "task_arithmetic"):
        merged = mp.merge(base, tasks, rule=rule, scale=0.5, vectors="mean")
        assert merged["b"].tolist() == [2.0, 1.0, 2.0, 2.0]


# ---- The merged model as a mapping ---------------------------------------------------------------


class Closed(dict):
    """A state dict of known shapes whose weights must not be read yet."""

    def meta(self, name: str) -> Tensor:
        return dict.__getitem__(self, name).to("meta")

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"'{name}' was read")


def counted() -> tuple[Callable[[Tensor], Tensor], list[torch.Size]]:
    """A rule, and the shapes that it was called with."""
    shapes: list[torch.Size] = []

    def rule(D: Tensor) -> Tensor:
        shapes.append(D.shape[1:])
        return D.sum(0)

    return rule, shapes


MATRICES = [x.shape for name, x in BASE.items() if mp.default_policy(name, x)[:6] == "matrix"][:3]


def test_a_mapping_with_the_names_of_the_base():
    merged = mp.Merged(BASE, TASKS)
    assert list(merged) == list(BASE)
    assert len(merged) == len(BASE)
    assert PROJ in merged
    assert "other" not in merged
    with pytest.raises(KeyError):
        merged["other"]
    assert same(dict(merged), mp.merge(BASE, TASKS))
    assert merged.base is BASE
    assert list(merged.tasks) == ["0", "1", "2"]


@pytest.mark.parametrize("rule", RULES)
def test_no_weight_is_read_before_it_is_asked_for(rule: str):
    closed = Closed(BASE), [Closed(task) for task in TASKS]
    merged = mp.Merged(*closed, rule=rule, purify=["pact", "dare"], dtype="bfloat16")
    for name, x in BASE.items():
        meta = merged.at(0.5).meta(name)
        assert (meta.device.type, meta.shape) == ("meta", x.shape)
        assert meta.dtype == (torch.bfloat16 if x.is_floating_point() else x.dtype)
        assert name in merged
    with pytest.raises(AssertionError, match="was read"):
        merged[PROJ]


def test_a_merge_of_merges_reads_nothing_at_first():
    inner = mp.Merged(Closed(BASE), [Closed(task) for task in TASKS])
    mp.Merged(inner, {"a": inner.at(0.1), "b": inner.at(0.7)}, rule="iso_c")


def test_functions_of_the_caller_see_real_tensors_only():
    rule, shapes = counted()
    purified = []

    def purifier(W0: Tensor, D: Tensor) -> Tensor:
        purified.append(W0.shape)
        return D

    mp.merge(BASE, TASKS, rule=rule, purify=purifier)
    assert shapes == MATRICES
    assert purified == [*MATRICES[:2], MATRICES[2][::-1]]


def test_parts_make_the_whole():
    merged = mp.Merged(BASE, TASKS, rule="tsv_m", scale=0.7)
    for name, x in BASE.items():
        base, delta, factor = merged.parts(name)
        assert base is x
        assert torch.equal(tensors.add_update(name, base, delta, factor), merged[name])
    assert merged.parts(PROJ)[2] == 0.7
    assert merged.parts(BIAS)[2] == 1.0
    assert merged.parts("visual.steps")[1] is None
    assert torch.equal(merged.delta(PROJ), 0.7 * merged.parts(PROJ)[1])
    assert merged.at(0).delta(PROJ) is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("purify", [[], ["pact"], ["dare", "pact"]])
@pytest.mark.parametrize("vectors", VECTORS)
def test_any_scale_is_one_computation_away(rule: str, purify: list[str], vectors: str | float):
    kept = {name: x.clone() for name, x in BASE.items()}
    recipe = {"rule": rule, "purify": purify, "vectors": vectors}
    lazy = mp.Merged(BASE, TASKS, **recipe)
    for scale in (1.7, -0.8):
        swept = lazy.at(scale)
        assert swept.scale == swept.recipe.scale == scale
        assert same(swept, mp.merge(BASE, TASKS, scale=scale, **recipe))
        assert same(swept, lazy.at(scale)), "what is kept is what was found"
    assert same(lazy.at(0.0), BASE)
    assert same(kept, BASE)


def test_siblings_share_what_is_computed_once():
    rule, shapes = counted()
    lazy = mp.Merged(BASE, TASKS, rule=rule, scale=1.0)
    dict(lazy)
    assert shapes == MATRICES
    first, second = lazy.at(0.5), lazy.at(2.0)
    assert shapes == MATRICES, "nothing is computed before it is asked for"
    del shapes[:]
    for merged in (first, second, first.at(3.0), lazy, first):
        dict(merged)
    assert shapes == MATRICES
    dict(lazy.at(-1.0))  # here vectors are treated otherwise, and so all is computed again
    assert shapes == 2 * MATRICES
    assert (lazy.scale, lazy.recipe.vectors) == (1.0, "mean")
    assert same(second, mp.merge(BASE, TASKS, rule=rule, scale=2.0))


def test_a_merge_knows_its_scale():
    lazy = mp.Merged(BASE, TASKS, rule="tsv_m")
    assert lazy.notes
    other = lazy.at(-2)
    assert (other.scale, other.recipe.vectors, other.notes) == (-2.0, "rule", ())
    assert other.at(2).recipe.vectors == "mean"
    assert other.steps[BIAS].treatment == "mean"
    for scale in (math.nan, math.inf, "1", None):
        with pytest.raises(mp.MergeError, match="scale"):
            lazy.at(scale)


def test_a_merge_is_a_task_of_another():
    inner = mp.Merged(BASE, TASKS[:2], rule="tsv_m", scale=0.8)
    outer = mp.Merged(BASE, {"pair": inner, "third": TASKS[2]}, rule="iso_c")
    plain = mp.Merged(BASE, {"pair": dict(inner), "third": TASKS[2]}, rule="iso_c")
    for name in BASE:
        assert torch.allclose(outer[name], plain[name], atol=1e-5)


def test_a_merge_with_this_base_gives_its_own_difference():
    """It is more exact than subtracting rounded weights."""
    base = {"w": torch.full((4, 4), 256.0).bfloat16(), "b": torch.zeros(1)}
    task = {"w": base["w"].float() + 0.25 * torch.eye(4), "b": torch.ones(1)}
    inner = mp.Merged(base, [task], scale=1.0)
    assert torch.equal(inner["w"], base["w"]), "lost in rounding"
    D = tensors.task_matrices("w", base, {"a": inner})
    assert torch.equal(D[0], 0.25 * torch.eye(4))
    assert torch.equal(mp.merge(base, [inner], scale=16.0)["w"].diag(), base["w"].diag() + 4)


def test_a_merge_with_another_base_is_subtracted():
    other = {n: x + 1 if x.is_floating_point() else x for n, x in BASE.items()}
    inner = mp.Merged(other, [small_model(7, other)], scale=1.0)
    back = mp.merge(BASE, [inner], scale=1.0)
    assert all(torch.allclose(back[name], inner[name], atol=1e-5) for name in BASE)


def test_a_merge_is_a_base_of_another():
    inner = mp.Merged(BASE, TASKS[:2], scale=0.5)
    outer = mp.merge(inner, [TASKS[2]], scale=1.0)
    assert all(torch.allclose(outer[name], TASKS[2][name], atol=1e-5) for name in BASE)


def test_a_merge_saves_like_a_state_dict(tmp_path: Path):
    merged = mp.Merged(BASE, TASKS, rule="tsv_m", purify="pact", dtype=torch.float16)
    mp.save_checkpoint(tmp_path / "merged.safetensors", merged)
    assert same(mp.open_checkpoint(tmp_path / "merged.safetensors"), merged)


def test_a_merge_loads_into_a_module():
    def module(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.BatchNorm1d(3)
        )

    base, *tasks = (module(seed).state_dict() for seed in (0, 1, 2))
    merged = mp.Merged(base, tasks)
    loaded = module(3)
    loaded.load_state_dict(dict(merged))
    assert same(loaded.state_dict(), merged)


def test_progress():
    seen = []
    merged = mp.merge(BASE, TASKS, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, len(BASE)) for i in range(1, len(BASE) + 1)]
    assert sorted(name for _, _, name in seen) == sorted(BASE)
    assert list(merged) == list(BASE)


# ---- Sweeps --------------------------------------------------------------------------------------


def nearness(target: float) -> Callable[[Mapping[str, Tensor]], float]:
    """A score of models between the base, at 0, and the sum of all tasks, at 1."""
    whole = mp.merge(BASE, TASKS, scale=1.0)[PROJ] - BASE[PROJ]

    def score(model: Mapping[str, Tensor]) -> float:
        reached = (model[PROJ] - BASE[PROJ]).norm() / whole.norm()
        return -abs(round(float(reached), 3) - target)

    return score


def test_a_sweep_finds_the_best_scale():
    told = []
    lazy = mp.Merged(BASE, TASKS)
    found = mp.sweep(lazy, nearness(0.4), [0.1, 0.4, 0.9], progress=lambda *x: told.append(x))
    assert found.scale == found.merged.scale == 0.4
    assert list(found.scores) == [0.1, 0.4, 0.9]
    assert found.scores[0.9] == pytest.approx(-0.5)
    assert [step[:2] for step in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][2] == "scale 0.1: -0.3"
    assert same(found.merged, mp.merge(BASE, TASKS, scale=0.4))


@pytest.mark.parametrize("order", itertools.permutations([-0.5, 1.5, 1.0, 0.5]))
def test_of_equal_scores_the_smaller_scale_wins(order: tuple[float, ...]):
    scores = {-0.5: 0.0, 0.5: 1.0, 1.0: 1.0, 1.5: 1.0}
    lazy = mp.Merged(BASE, TASKS)
    assert mp.sweep(lazy, lambda model: scores[model.scale], order).scale == 0.5
    assert abs(mp.sweep(lazy, lambda model: 0.0, order).scale) == 0.5


def test_every_scale_is_tried_once():
    rule, shapes = counted()
    tried = []

    def score(model: mp.Merged) -> float:
        tried.append(model.scale)
        return float(sum(model[name].float().sum() for name in model))

    found = mp.sweep(mp.Merged(BASE, TASKS, rule=rule), score, iter([1, 0.5, 1.0, 0.5, 2.0]))
    assert tried == list(found.scores) == [1.0, 0.5, 2.0]
    assert shapes == MATRICES, "merged once"


def test_bad_sweeps():
    lazy = mp.Merged(BASE, TASKS)
    with pytest.raises(mp.MergeError, match="at scale 0.5: the score nan must be a number"):
        mp.sweep(lazy, lambda model: math.nan if model.scale == 0.5 else 1.0, [0.1, 0.5])
    with pytest.raises(mp.MergeError, match="no scale to try"):
        mp.sweep(lazy, lambda model: 1.0, [])
    with pytest.raises(mp.MergeError, match="scale"):
        mp.sweep(lazy, lambda model: 1.0, [math.inf])


# ---- Bad input -----------------------------------------------------------------------------------


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(TASKS[0])
    for name, x in changes.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if x is not None:
            state[key] = x
    return state


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (broken(visual__proj=None), "lacks 'visual.proj'"),
        (broken(extra=torch.zeros(1)), "has 'extra'"),
        (broken(visual__proj=torch.zeros(3, 3)), r"'visual.proj' is torch.float32 \(3, 3\)"),
        (broken(visual__proj=torch.zeros(16, 12).long()), "int64"),
        (
            broken(visual__proj=torch.full((16, 12), math.nan)),
            "'visual.proj' of task '1' holds NaN",
        ),
        (
            broken(visual__proj=torch.full((16, 12), math.inf)),
            "'visual.proj' of task '1' holds NaN",
        ),
        (dict(BASE), "task '1' equals the base"),
        ({}, "lacks"),
        (None, "tasks must be"),
    ],
)
def test_bad_tasks(task: dict[str, Tensor], message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.merge(BASE, [TASKS[1], task])


def test_all_problems_are_told_at_once():
    with pytest.raises(mp.MergeError) as caught:
        mp.merge(BASE, {"x": broken(visual__proj=None), "y": broken(extra=torch.zeros(1))})
    assert "task 'x' lacks 'visual.proj'" in str(caught.value)
    assert "task 'y' has 'extra'" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"options": {"ties": {}}}, "options for 'ties', which is not used"),
        ({"scale": 1e39}, "float32's range"),
        ({"options": {"task_arithmetic": {"lambda": 1}}}, "option 'lambda'"),
        ({"options": {"task_arithmetic": {"reduce": "max"}}, "scale": 1}, "reduce 'max'"),
        ({"rule": "ties", "options": {"ties": {"reduce": "max"}}}, "no recommended scale"),
        ({"rule": "ties", "options": {"ties": {"density": 0}}}, "density"),
        ({"rule": "ties", "options": {"ties": {"scope": "layer"}}}, "ties scope 'layer'"),
        ({"purify": "dare", "options": {"dare": {"p": 1.0}}}, "p=1.0"),
        ({"purify": "pact", "options": {"pact": {"core": 99}}}, "pact.core=99"),
        ({"purify": "pact", "options": {"pact": {"task": 1.5}}}, "rank 1.5"),
        ({"purify": "pact", "options": {"pact": {"tol": 2}}}, "tol=2"),
        ({"purify": "pact", "options": {"pact": {"svd": "fast"}}}, "svd 'fast'"),
        (
            {"purify": "pact", "options": {"pact": {"core": "energy:.9", "svd": "randomized"}}},
            "exact",
        ),
        (
            {"purify": "pact", "options": {"pact": {"scope": "*.attn.*"}}},
            r"'\*.attn.\*' matches no",
        ),
        ({"purify": "pact", "include": "*.bias"}, "no tensor to work on"),
        ({"rule": "iso_cts", "options": {"iso_cts": {"common": 0}}}, "common=0"),
        ({"rule": "iso_c", "options": {"iso_c": {"mean_over": "some"}}}, "mean_over 'some'"),
        ({"include": "nothing*"}, "include 'nothing.*' matches no"),
        ({"scale": math.nan}, "scale"),
        ({"scale": "1"}, "scale '1' must be a number"),
        ({"vectors": "all"}, "vectors 'all' is unknown: use 'auto'"),
        ({"vectors": None}, "vectors None must be a number"),
        ({"vectors": math.inf}, "vectors inf must be"),
        ({"dtype": torch.int8}, "dtype 'int8' is no floating-point type"),
        ({"seed": 0.5}, "seed 0.5 must be a whole number"),
        ({"weights": [1, 2]}, "weights"),
        ({"weights": {"x": 1}}, "weights"),
        ({"weights": [1, 2, math.nan]}, "weights: '2' nan must be a number"),
        ({"weights": [1, 2, "x"]}, "weights: '2' 'x' must be a number"),
        ({"policy": lambda name, x: "tensor"}, "'tensor' is unknown"),
        ({"policy": {"*.proj": "tensor"}}, "policy 'tensor' is unknown"),
        ({"policy": {"*.projection": "copy"}}, r"policy '\*.projection' matches no"),
        ({"policy": {"*.bias": "matrix"}}, r"policy: '.*bias' of shape \(24,\) cannot be a matrix"),
        ({"policy": lambda name, x: "matrix"}, "cannot be a matrix"),
    ],
)
def test_bad_recipes(recipe: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.merge(BASE, TASKS, **recipe)


def test_zero_base_under_pact_names_the_tensor_and_the_way_out():
    zero = {name: torch.zeros_like(x) for name, x in BASE.items()}
    with pytest.raises(mp.MergeError, match=r"'visual.mlp.c_fc.weight', pact: .*exclude"):
        mp.merge(zero, TASKS, purify="pact")
    mp.merge(zero, TASKS, purify="pact", options={"pact": {"core": 0}}, scale=1.0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"purify": "dare", "options": {"dare": {"p": 1}}}, "^dare: p=1 must"),
        (
            {"purify": "dare", "options": {"dare": {"p": "half"}}},
            "^dare.p='half' must be a number, such as 0.2$",
        ),
        ({"purify": "pact", "options": {"pact": {"core": -1}}}, "^pact: rank -1 does not fit"),
        ({"purify": "pact", "options": {"pact": {"core": "energy:2"}}}, "^pact: rank 'energy:2'"),
        ({"purify": "pact", "options": {"pact": {"tol": 5}}}, "^pact: tol=5 must"),
        ({"purify": "sift", "options": {"sift": {"svd": "fast"}}}, "^sift: svd 'fast' is unknown"),
        ({"rule": "ties", "options": {"ties": {"density": 3}}}, "^density=3 of TIES must"),
        ({"rule": "iso_cts", "options": {"iso_cts": {"common": 0}}}, "^iso_cts: common=0 must"),
        ({"rule": "iso_c", "options": {"iso_c": {"mean_over": "half"}}}, "^iso_c: mean_over"),
        ({"rule": "tsv_m", "options": {"tsv_m": {"rank": 0.0}}}, "^tsv_m: rank 0.0 does not fit"),
    ],
)
def test_options_out_of_range_show_before_any_weight_is_read(recipe: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Merged(Closed(BASE), [Closed(task) for task in TASKS], **recipe)


@pytest.mark.parametrize("name", [n for n, x in mp.METHODS.items() if x.kind != "training"])
def test_an_option_of_another_type_is_named_with_what_it_takes(name: str):
    method = mp.METHODS[name]
    options = dict(method.options)
    if method.kind == "purifier":
        del options["scope"]  # of globs, which have a check of their own
    assert not Applied(method, options).misfits()
    for key in options:
        (told,) = Applied(method, {**options, key: {}}).misfits()
        assert re.match(rf"{name}.{key}={{}} must be (a|text|true)", told)


def test_counts_and_switches_are_told_apart():
    iterations = {"awd": {"iterations": 2.5}}
    with pytest.raises(mp.MergeError, match=r"awd.iterations=2.5 must be a whole number, such as"):
        mp.Merged(BASE, TASKS, purify="awd", options=iterations)


def test_paths_in_place_of_models_are_named():
    way = "open it by minipact.open_checkpoint, or give all paths to minipact.merge_files"
    for base, tasks, message in (
        ("base.safetensors", ["a.safetensors"], "^base is a path, 'base.safetensors', and"),
        (BASE, ["a.safetensors"], "^task '0' is a path, 'a.safetensors', and no state dict"),
        (BASE, {"a": Path("a.safetensors")}, "^task 'a' is a path"),
        (BASE, Path("a.safetensors"), "^tasks is a path"),
        (BASE, "a.safetensors", "^tasks is a path"),
    ):
        with pytest.raises(mp.MergeError, match=f"{message}.*: {way}"):
            mp.merge(base, tasks)


def test_a_merge_says_what_it_is():
    merged = mp.Merged(BASE, TASKS, rule="tsv_m", purify=["dare", "pact"], scale=0.5)
    expected = (
        f"<Merged: {len(BASE)} tensors of {len(TASKS)} tasks by dare > pact > tsv_m, scale 0.5>"
    )
    assert repr(merged) == expected


@pytest.mark.parametrize("recipe", [{"options": {"ties": {"scope": "tensor"}}}, {"purify": "dare"}])
def test_ties_takes_numbers_without_dimensions(recipe: dict):
    base = {"scale": torch.tensor(4.0), "w": torch.ones(2, 2)}
    tasks = [{"scale": torch.tensor(x), "w": torch.eye(2)} for x in (5.0, 7.0)]
    options = {"dare": {"p": 0.0}} if "purify" in recipe else {}
    recipe = recipe | {"options": recipe.get("options", {}) | options}
    assert mp.merge(base, tasks, rule="ties", scale=1.0, **recipe)["scale"] == 6.0


def test_what_is_excluded_may_be_infinite():
    base = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.ones(2)}
    tuned = {"mask": base["mask"], "w": torch.zeros(2)}
    with pytest.raises(mp.MergeError, match="'mask' of the base holds NaN or infinity"):
        mp.merge(base, [tuned])
    merged = mp.merge(base, [tuned], exclude="mask", scale=1.0, dtype=torch.bfloat16)
    assert merged["mask"].tolist() == [0.0, -math.inf]
    assert merged["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rule": mp.tsv_m, "options": {"iso_c": {}}}, "'iso_c', which is not used"),
        ({"purify": mp.sift, "options": {"pact": {"core": 1}}}, "'pact', which is not used"),
        (
            {"purify": "pact", "options": {"pact": {"scope": 3}}},
            "pact scope must be a glob .* not 3",
        ),
        ({"include": 3}, "include must be a glob of tensor names or several, not 3"),
        ({"purify": "pact", "options": {"pact": {"core": None}}}, "^pact: rank None does not fit"),
        ({"exclude": "*"}, "task_arithmetic has no tensor to work on"),
    ],
)
def test_recipes_without_effect_are_refused(recipe: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Merged(BASE, TASKS, **recipe)


def test_large_weights_are_no_wrong_option():
    mp.Merged(BASE, TASKS, rule="tsv_m", weights=[1e38] * len(TASKS))


def test_8_bit_floats_merge():
    base = {"w": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    tuned = {"w": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn)}
    merged = mp.merge(base, [tuned], scale=1.0)["w"]
    assert merged.dtype == torch.float8_e4m3fn
    assert merged.float().tolist() == [1.5, 2.0]
    tuned["w"] = torch.tensor([math.nan, 2.0]).to(torch.float8_e4m3fn)
    with pytest.raises(mp.MergeError, match="holds NaN"):
        mp.merge(base, [tuned])


def test_overflow_of_the_output_is_told():
    half = {"w": torch.tensor([60000.0, 1.0]).half()}
    tuned = {"w": torch.tensor([65000.0, 1.0]).half()}
    with pytest.raises(mp.MergeError, match="overflows"):
        mp.merge(half, [tuned], scale=2.0)


# ---- Surveys and processes -----------------------------------------------------------------------


def spread(*, tasks: int, entries: int) -> SurveyPasses:
    """Standard deviation of each task's entries over the model, by two passes over the stream."""
    total = yield lambda D: D.double().reshape(tasks, -1).sum(1)
    mean = total / entries

    def squares(D: Tensor) -> Tensor:
        return (D.double().reshape(tasks, -1) - mean[:, None]).square().sum(1)

    return {"deviation": ((yield squares) / entries).sqrt()}


def standardized(D: Tensor, *, deviation: Tensor) -> Tensor:
    return (D / deviation.view(-1, *[1] * (D.ndim - 1))).sum(0).to(D)


def single_sum(*, tasks: int, entries: int) -> SurveyPasses:
    """In float32, where the order of summation shows."""
    return {"total": (yield lambda D: D.sum().float())}


def divided(D: Tensor, *, total: Tensor) -> Tensor:
    return D.sum(0) / total


STANDARDIZED = mp.Method(
    "standardized", "rule", standardized, acts_on="entries", needs=("deviation",), survey=spread
)
DIVIDED = mp.Method(
    "divided", "rule", divided, acts_on="tensor", needs=("total",), survey=single_sum
)


def test_a_survey_may_ask_for_the_stream_again():
    D = torch.stack([flat(task) - flat(BASE) for task in TASKS])
    expected = (D / D.double().std(dim=1, correction=0)[:, None]).sum(0).float()
    merged = mp.Merged(BASE, TASKS, rule=STANDARDIZED, vectors="rule", scale=1.0)
    found = {name: merged.delta(name) for name in BASE if name != "visual.steps"}
    assert torch.allclose(flat(found), expected, rtol=1e-5)


def test_a_survey_sees_what_the_purifiers_left():
    names = [name for name in BASE if name.startswith("visual.mlp.c") and "bias" not in name]
    D = torch.cat([mp.sift(BASE[n], differences(n)).flatten(1) for n in names], dim=1)
    merged = mp.Merged(BASE, TASKS, rule=STANDARDIZED, purify="sift", include=names, scale=1.0)
    expected = (D / D.double().std(dim=1, correction=0)[:, None]).sum(0).float()
    found = torch.cat([merged.delta(name).flatten() for name in names])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_purifier_surveys_matrices_the_way_it_sees_them():
    def shapes(*, tasks: int, entries: int) -> SurveyPasses:
        return {"rows": (yield lambda D: torch.tensor(D.shape[1]))}

    def checked(W0: Tensor, D: Tensor, *, tuned: Tensor, rows: Tensor) -> Tensor:
        assert D.shape[1] == rows == 12, "transposed: W [16, 12] is used as x @ W"
        assert torch.allclose(tuned - W0, D, atol=1e-6)
        return D

    needs = ("base", "tuned", "rows")
    method = mp.Method("checked", "purifier", checked, needs=needs, survey=shapes)
    dict(mp.Merged(BASE, TASKS, purify=method, include=PROJ))


def test_fine_tuned_weights_on_request():
    def moved(W0: Tensor, D: Tensor, *, tuned: Tensor, share: float = 1.0) -> Tensor:
        return share * (tuned - W0).sum(0)

    method = mp.Method("moved", "rule", moved, acts_on="tensor", needs=("base", "tuned"))
    assert method.options == {"share": 1.0}
    found = mp.merge(BASE, TASKS, rule=method, scale=0.5, options={"moved": {"share": 2.0}})
    expected = mp.merge(BASE, TASKS, scale=1.0)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in BASE)


LARGE = {
    "w": single(300, 1000, seed=1),
    "b": single(5, seed=2),
}  # w has more entries than one block
LARGE_TASKS = [{n: x + 0.1 * single(*x.shape, seed=s) for n, x in LARGE.items()} for s in (3, 4)]


def test_large_tensors_come_in_blocks_to_methods_on_entries():
    shapes = []

    def summed(D: Tensor) -> Tensor:
        shapes.append(tuple(D.shape))
        return D.sum(0)

    method = mp.Method("summed", "rule", summed, acts_on="entries")
    found = mp.merge(LARGE, LARGE_TASKS, rule=method, scale=0.3)
    assert same(found, mp.merge(LARGE, LARGE_TASKS, scale=0.3))
    assert shapes == [(2, 1 << 18), (2, 300_000 - (1 << 18)), (2, 5)]


@pytest.mark.parametrize("need", ["base", "tuned", "generator", "generators"])
def test_what_needs_more_than_entries_comes_whole(need: str):
    """In blocks, random numbers would repeat and weights would not fit."""
    shapes = []

    def rule(*inputs: Tensor, **needed: object) -> Tensor:
        shapes.append(tuple(inputs[-1].shape))
        return inputs[-1].sum(0)

    method = mp.Method("rule", "rule", rule, acts_on="entries", needs=(need,))
    dict(mp.Merged(LARGE, LARGE_TASKS, rule=method))
    assert shapes == [(2, 300, 1000), (2, 5)]


class Exchange:
    """What two processes tell each other, played by threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.shares: list[object] = [None, None]

    def gather(self, rank: int) -> Callable[[object], list[object]]:
        def exchange(share: object) -> list[object]:
            self.shares[rank] = share
            self.barrier.wait()
            found = list(self.shares)
            self.barrier.wait()
            return found

        return exchange


def in_two_processes(parts: list[list[str]], base, tasks, **recipe) -> dict[str, Tensor]:
    """The merge where each of two processes has the tensors of its part."""
    exchange = Exchange()

    def process(rank: int) -> dict[str, Tensor]:
        merged = mp.Merged(base, tasks, **recipe)
        merged.prepare(parts[rank], gather=exchange.gather(rank))
        return dict(zip(parts[rank], merged.map(merged.__getitem__, parts[rank]), strict=True))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, (0, 1))
    return first | second


@pytest.mark.parametrize("rule", ["ties", "knots", STANDARDIZED, DIVIDED, "tsv_m"])
@pytest.mark.parametrize("purify", [[], ["pact", "dare"], ["awd"], ["awd", "tatr"]])
def test_processes_do_not_change_a_bit(rule, purify: list[str]):
    names = list(BASE)
    recipe = {"rule": rule, "purify": purify, "scale": 0.9, "vectors": "rule"}
    alone = mp.merge(BASE, TASKS, **recipe)
    for parts in ([names[::2], names[1::2]], [names[:1], names[1:]], [names, []]):
        assert same(in_two_processes(parts, BASE, TASKS, **recipe), alone)


def test_sums_over_processes_go_by_name():
    """Numbers of very different size, whose sum in float32 depends on the order."""
    numbers = random.Random(0)
    names = [f"{i}.weight" for i in numbers.sample(range(100), 40)]
    base = {name: torch.zeros(2, 2) for name in names}
    task = {name: torch.full((2, 2), numbers.gauss(0, 1)) for name in names}
    totals = [task[name].sum() for name in names]
    assert sum(totals) != sum(totals[::2]) + sum(totals[1::2])
    alone = mp.merge(base, [task], rule=DIVIDED)
    for parts in ([names[::2], names[1::2]], [names[6:], names[:6]]):
        assert same(in_two_processes(parts, base, [task], rule=DIVIDED), alone)


def test_the_first_pass_runs_once():
    passes = []

    def survey(*, tasks: int, entries: int) -> SurveyPasses:
        passes.append(entries)
        yield lambda D: torch.zeros(1)
        return {}

    method = mp.Method("surveyed", "rule", lambda D: D.sum(0), acts_on="entries", survey=survey)
    merged = mp.Merged(BASE, TASKS, rule=method)
    del passes[:]
    merged.prepare()
    dict(merged)
    dict(merged.at(0.5))
    list(merged.map(merged.__getitem__, threads=2))
    assert passes == [flat(BASE).numel()]


# ---- Threads and streams -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, STANDARDIZED, DIVIDED])
@pytest.mark.parametrize("purify", [["pact", "dare"], ["awd", "tatr"]])
def test_threads_do_not_change_a_bit(rule, purify: list[str]):
    recipe = {"rule": rule, "purify": purify, "scale": 1.0}
    one, three = mp.merge(BASE, TASKS, **recipe), mp.merge(BASE, TASKS, **recipe, threads=3)
    assert list(one) == list(three) == list(BASE)
    assert same(one, three)


def test_names_of_a_part_come_in_the_order_of_the_base():
    merged = mp.Merged(BASE, TASKS)
    assert list(merged.map(str.upper, [PROJ, BIAS])) == [BIAS.upper(), PROJ.upper()]
    assert list(merged.map(str, [], threads=2)) == []


@pytest.mark.parametrize("threads", [None, 2])
def test_what_is_computed_together_comes_together(threads):
    base = {f"{i}.{part}": single(4, 3 + len(part)) for i in range(3) for part in ("a", "bb")}
    merged = mp.Merged(base, [tuned(base, 1), tuned(base, 2)], rule="tsv_m")
    found = dict(merged.each(str.upper, threads=threads))
    assert list(found) == ["0.a", "1.a", "2.a", "0.bb", "1.bb", "2.bb"]
    assert list(merged.map(str.upper, threads=threads)) == [name.upper() for name in base]


@pytest.mark.parametrize(("room", "together"), [(math.inf, 3), (32, 2), (20, 1), (1, 1)])
def test_tensors_in_work_fit_into_the_room(room: float, together: int):
    names = [str(i) for i in range(9)]
    barrier, running, most = threading.Lock(), set(), []

    def work(name: str) -> str:
        with barrier:
            running.add(name)
            most.append(len(running))
        time.sleep(0.02)
        with barrier:
            running.remove(name)
        return name

    assert list(in_threads(work, names, 3, size=lambda _: 16, room=room)) == names
    assert max(most) == together


def test_an_early_end_does_not_wait_for_what_has_not_begun():
    names = [str(i) for i in range(8)]
    begun: list[str] = []

    def work(name: str) -> str:
        begun.append(name)
        time.sleep(0.05)
        return name

    results: Iterator[str] = in_threads(work, names, 2)
    assert next(results) == "0"
    results.close()
    assert len(begun) < len(names)


def test_an_error_in_a_worker_comes_out():
    spoilt = [task | {PROJ: torch.full((16, 12), math.nan)} for task in TASKS]
    with pytest.raises(mp.MergeError, match=r"'visual\.proj' of task '0' holds NaN"):
        mp.merge(BASE, spoilt, threads=2)


class Recorded(dict):
    """A state dict that writes down what it is asked to fetch ahead."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        self.asked: list[str] = []

    def prefetch(self, name: str) -> None:
        self.asked.append(name)


@pytest.mark.parametrize("threads", [None, 2])
def test_mappings_hear_of_the_next_tensor(threads: int | None):
    base = Recorded(BASE)
    mp.merge(base, TASKS, threads=threads)
    groups = mp.Merged(BASE, TASKS).groups
    order = [name for group in groups for name in group]
    first = 1 if threads is None else len(next(iter(groups)))
    assert base.asked[: len(order) - first] == order[first:]
    mp.merge(mp.Merged(base, TASKS), TASKS[:1])
    assert len(base.asked) > len(order), "a merge passes it on"


@pytest.mark.parametrize("shape", [(4, 3), (300, 1000)])  # in one block, and in several
def test_rounding_is_measured_over_all_blocks(shape: tuple[int, int]):
    base = {"w": normal(*shape, dtype=torch.float32).bfloat16()}
    tuned = [{"w": base["w"] + normal(*shape, seed=seed).bfloat16()} for seed in (1, 2)]
    merged, noise, signal = mp.Merged(base, tuned, scale=0.5).rounded("w")
    update = 0.5 * sum(task["w"].double() - base["w"].double() for task in tuned)
    assert torch.equal(merged, (base["w"].double() + update).float().bfloat16())
    exact = base["w"].double() + update
    assert noise == pytest.approx(float((exact - merged.double()).square().sum()), rel=1e-4)
    assert signal == pytest.approx(float(update.square().sum()), rel=1e-4)
    assert mp.Merged(base, tuned, scale=0.0).rounded("w")[1:] == (0.0, 0.0)
    assert mp.Merged(base, tuned, dtype="float32").rounded("w")[1:] == (0.0, 0.0)


def test_groups_name_every_tensor_once():
    merged = mp.Merged(BASE, TASKS)
    assert sorted(name for group in merged.groups for name in group) == sorted(BASE)
    assert all(merged.together(name) == group for group in merged.groups for name in group)


def test_parameters_merge_without_a_graph():
    tuned = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in TASKS[0].items()}
    base = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in BASE.items()}
    merged = mp.merge(base, [tuned, TASKS[1]], rule="iso_c", purify="pact")
    assert not any(x.requires_grad for x in merged.values())


def test_large_tensors_merge_in_blocks_as_in_one():
    shape = (300, 1000)  # more entries than one block
    base = {"w": normal(*shape, dtype=torch.float32).bfloat16(), "b": torch.zeros(0)}
    tuned = [
        {
            "w": (base["w"] + 0.1 * normal(*shape, seed=i, dtype=torch.float32)).bfloat16(),
            "b": base["b"],
        }
        for i in (1, 2, 3)
    ]
    D = torch.stack([task["w"].float() - base["w"].float() for task in tuned])
    weights = torch.tensor([1.0, 0.5, 2.0])
    summed = mp.merge(base, tuned, scale=0.3, weights=weights.tolist())["w"]
    expected = base["w"].float() + 0.3 * (D * weights[:, None, None]).sum(0)
    assert torch.allclose(
        summed.float(), expected, rtol=0.005, atol=1e-6
    )  # half a step of bfloat16
    wide = mp.Merged(base, tuned, weights=weights.tolist(), scale=1.0).delta("w")
    assert torch.equal(wide, (D * weights[:, None, None]).sum(0))
    for scope in ("global", "tensor"):
        options = {"ties": {"scope": scope}}
        merged = mp.Merged(base, tuned, rule="ties", options=options, scale=1.0)
        assert torch.equal(merged.delta("w"), mp.ties(D))
    assert torch.equal(mp.Merged(base, tuned, rule="iso_c", scale=1.0).delta("w"), mp.iso_c(D))
    tuned[1]["w"][-1, -1] = math.nan
    with pytest.raises(mp.MergeError, match="'w' of task '1' holds NaN"):
        mp.merge(base, tuned)


# ---- Functions of strangers ----------------------------------------------------------------------


def test_a_result_in_a_narrow_type_does_not_round_the_base():
    wide = {name: x * 1000 if x.is_floating_point() else x for name, x in BASE.items()}
    tasks = [{n: x + 1 if x.is_floating_point() else x for n, x in wide.items()} for _ in "ab"]
    merged = mp.merge(wide, tasks, rule=lambda D: D.sum(0).half(), vectors="copy", scale=1.0)
    name = "visual.proj"
    assert torch.allclose(merged[name], wide[name] + 2, atol=0.01)
    merged = mp.merge(wide, tasks, purify=lambda W0, D: D.bfloat16(), vectors="copy", scale=1.0)
    assert torch.allclose(merged[name], wide[name] + 2, atol=0.05)


def test_a_purifier_cannot_change_the_base():
    kept = BASE["visual.proj"].clone()
    mp.merge(BASE, TASKS, purify=lambda W0, D: W0.zero_() + D, scale=1.0)
    assert torch.equal(BASE["visual.proj"], kept)


def test_nan_of_a_purifier_does_not_vanish_in_ties():
    def spoilt(W0: Tensor, D: Tensor) -> Tensor:
        return torch.where(torch.arange(D.shape[-1]) % 2 == 0, D, math.nan)

    with pytest.raises(mp.MergeError, match="spoilt: it returned NaN"):
        mp.merge(BASE, TASKS, rule="ties", purify=spoilt)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_measure_may_return_a_tensor_that_it_keeps(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    one, seen = torch.ones((), dtype=dtype), []

    def survey(*, tasks: int, entries: int) -> SurveyPasses:
        seen.append((yield lambda D: one))
        return {"n": seen[-1]}

    mp.register(mp.Method("counted", "rule", lambda D, *, n: D.sum(0), needs=("n",), survey=survey))
    mp.merge(BASE, TASKS, rule="counted", scale=1.0, threads=2)
    matrices = [name for name, x in BASE.items() if mp.default_policy(name, x)[:6] == "matrix"]
    assert float(seen[-1]) == len(matrices)
    assert float(one) == 1


def test_a_registered_method_that_needs_large_matrices_is_not_tried_on_small_ones(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))

    def tops(D: Tensor, *, count: int = 12) -> Tensor:
        return D.topk(count, dim=-1).values.sum((0, 2), keepdim=True)[0].expand_as(D[0]).clone()

    mp.register(mp.Method("tops", "rule", tops))
    assert mp.merge(BASE, TASKS, rule="tops", scale=1.0).keys() == BASE.keys()


def test_a_policy_sees_the_tensors_of_a_state_dict():
    def policy(name: str, x: Tensor) -> str:
        return "vector" if float(x.abs().max()) > 2 else "copy"

    large = [name for name, x in BASE.items() if x.is_floating_point() and float(x.abs().max()) > 2]
    merged = mp.merge(BASE, TASKS, policy=policy)
    assert [name for name in BASE if not torch.equal(merged[name], BASE[name])] == large


def test_arrays_of_weights_are_taken():
    weights = torch.tensor([1.0, 0.5, 0.0])
    assert same(mp.merge(BASE, TASKS, weights=weights), mp.merge(BASE, TASKS, weights=[1, 0.5, 0]))
    with pytest.raises(mp.MergeError, match="weights must give one number"):
        mp.merge(BASE, TASKS, weights=0.5)


@pytest.mark.parametrize("value", ["no", 0, None, []])
def test_dare_takes_true_or_false_only(value: object):
    with pytest.raises(mp.MergeError, match="must be true or false"):
        mp.merge(BASE, TASKS, purify="dare", options={"dare": {"rescale": value}})


def test_methods_given_twice_are_refused():
    for purify in (["dare", "dare"], [lambda W0, D: D, lambda W0, D: 2 * D]):
        with pytest.raises(mp.MergeError, match="stands twice"):
            mp.merge(BASE, TASKS, purify=purify)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_one_or_more(threads: int):
    with pytest.raises(mp.MergeError, match=f"threads={threads} must be 1 or more"):
        mp.merge(BASE, TASKS, threads=threads)


def test_threads_leave_torch_as_it_was():
    before = torch.get_num_threads()
    mp.merge(BASE, TASKS, threads=2)
    assert torch.get_num_threads() == before


def test_complex_buffers_are_copied():
    base = BASE | {"freqs": torch.ones(3, dtype=torch.complex64)}
    tasks = [task | {"freqs": base["freqs"]} for task in TASKS]
    assert torch.equal(mp.merge(base, tasks)["freqs"], base["freqs"])


def test_a_recipe_with_options_that_json_would_change_has_no_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    mp.register(mp.Method("gains", "rule", lambda D, *, gain=None: D.sum(0)))
    recipe = mp.Recipe("gains", options={"gains": {"gain": {0: 3.0}}})
    with pytest.raises(mp.MergeError, match="would come back as another one"):
        recipe.to_json()
