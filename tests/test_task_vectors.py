"""Task vectors: their arithmetic by hand, and the merged task vector."""

import math

import pytest
import torch

import minipact as mp
from helpers import same, small_model
from minipact import tensors

BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]


def test_task_vector_arithmetic_by_hand():
    base = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    a = mp.task_vector(base, {"w": torch.tensor([4.0, 6.0]), "n": torch.tensor(9)})
    b = mp.task_vector(base, {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(3)})
    assert list(a) == ["w"]
    assert a["w"].tolist() == [3.0, 4.0]
    assert (a + b)["w"].tolist() == [3.0, 2.0]
    assert (a - b)["w"].tolist() == [3.0, 6.0]
    assert (-a)["w"].tolist() == [-3.0, -4.0]
    assert (2 * a)["w"].tolist() == (a * 2)["w"].tolist() == [6.0, 8.0]
    assert sum([a, b])["w"].tolist() == [3.0, 2.0]
    assert a.norm() == 5.0
    assert a.dot(b) == -8.0
    assert a.cosine(b) == pytest.approx(-0.8)
    assert math.isnan(a.cosine(a - a))
    merged = a.apply_to(base, 0.5)
    assert merged["w"].tolist() == [2.5, 4.0]
    assert merged["n"].item() == 3
    assert merged["n"] is not base["n"]


def test_task_vectors_of_other_models_are_refused():
    a = mp.TaskVector({"w": torch.zeros(2)})
    with pytest.raises(mp.MergeError, match="'v'"):
        _ = a + mp.TaskVector({"v": torch.zeros(2)})
    with pytest.raises(mp.MergeError, match="lacks 'w'"):
        a.apply_to({"v": torch.zeros(2)})
    with pytest.raises(TypeError):
        _ = a + 1


def test_models_that_do_not_fit_have_no_task_vector():
    short = {name: x for name, x in TASKS[0].items() if name != "visual.proj"}
    with pytest.raises(mp.MergeError, match="task 'tuned' lacks 'visual.proj'"):
        mp.task_vector(BASE, short)
    spoilt = TASKS[0] | {"visual.proj": torch.full((16, 12), math.nan)}
    with pytest.raises(mp.MergeError, match="'visual.proj' of task 'tuned' holds NaN"):
        mp.task_vector(BASE, spoilt)


def test_task_vectors_are_wide_and_take_lazy_models():
    base = {"w": torch.ones(2).bfloat16(), "d": torch.ones(2).double(), "n": torch.tensor(1)}
    tuned = {"w": base["w"] + 1, "d": base["d"] + 1e-9, "n": torch.tensor(2)}
    tau = mp.task_vector(base, tuned)
    assert (tau["w"].dtype, tau["d"].dtype) == (torch.float32, torch.float64)
    assert tau["d"].tolist() == pytest.approx([1e-9] * 2, rel=1e-6)
    lazy = mp.task_vector(BASE, mp.Merged(BASE, TASKS, scale=1.0))
    together = sum(mp.task_vector(BASE, task) for task in TASKS)
    assert all(torch.allclose(lazy[name], together[name], atol=1e-5) for name in together)


def test_negation_returns_to_the_base():
    tau = mp.task_vector(BASE, TASKS[0])
    back = (-tau).apply_to(tau.apply_to(BASE))
    assert all(torch.allclose(back[name], x, atol=1e-6) for name, x in BASE.items())


# ---- The merged task vector ----------------------------------------------------------------------

RULES = ("task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "wudi", "ace")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("purify", [[], ["pact"], ["dare", "pact"]])
@pytest.mark.parametrize("vectors", ["rule", "copy"])
def test_one_merged_task_vector_serves_all_scales(rule: str, purify: list[str], vectors: str):
    recipe = {"rule": rule, "purify": purify, "vectors": vectors}
    delta = mp.merged_delta(BASE, TASKS, **recipe)
    for scale in (0.5, 1.7, -1.0, 0.0):
        swept = delta.apply_to(BASE, scale)
        assert list(swept) == list(BASE)
        assert same(swept, mp.merge(BASE, TASKS, scale=scale, **recipe))


def test_what_is_copied_has_no_entry():
    assert "visual.steps" not in mp.merged_delta(BASE, TASKS)
    assert list(mp.merged_delta(BASE, TASKS, vectors="copy", include="*.weight")) == [
        "visual.mlp.c_fc.weight",
        "visual.mlp.c_proj.weight",
    ]


@pytest.mark.parametrize(
    "recipe",
    [
        {"rule": "tsv_m"},
        {"purify": "pact"},
        {"vectors": "mean"},
        {"vectors": 0.5},
        {"rule": "ties", "vectors": 1},
    ],
)
def test_no_one_factor_where_vectors_are_not_scaled_along(recipe: dict):
    told = r"'visual.mlp.c_fc.bias', 'visual.conv1.weight': vectors are not scaled .*Merged\(.*at\(scale\)"
    with pytest.raises(mp.MergeError, match=told):
        mp.merged_delta(BASE, TASKS, **recipe)
    matrices = mp.merged_delta(
        BASE, TASKS, **recipe, include=["*.weight", "*.proj"], exclude="*conv*"
    )
    assert list(matrices) == ["visual.mlp.c_fc.weight", "visual.mlp.c_proj.weight", "visual.proj"]


def test_one_task_and_flat_rules_have_a_merged_task_vector():
    one = mp.merged_delta(BASE, TASKS[:1], rule="tsv_m", purify="pact")
    assert torch.allclose(
        one["visual.proj"], TASKS[0]["visual.proj"] - BASE["visual.proj"], atol=1e-5
    )
    together = sum(mp.task_vector(BASE, task) for task in TASKS)
    summed = mp.merged_delta(BASE, TASKS)
    assert all(torch.allclose(summed[name], x, atol=1e-5) for name, x in together.items())


def test_tensors_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    way = []

    class Pinned:
        def to(self, device, **how):
            way.append((device, how))
            return "there"

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: Pinned())
    x = torch.ones(2, dtype=torch.bfloat16)
    assert tensors.moved(x, "cuda:1") == "there"
    assert way == [("cuda:1", {"non_blocking": True})]
    assert tensors.moved(x, "cpu") is x
