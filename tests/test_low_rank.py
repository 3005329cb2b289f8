"""Products of factors, and rules that take them: the same results as from expanded matrices."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import minipact as mp
from helpers import close, normal
from minipact.adapters import Adapter, open_adapter
from minipact.checkpoints import open_checkpoint
from minipact.errors import MergeError
from minipact.low_rank import Product, Products
from minipact.methods import tsv_m
from minipact.whole_vector import knots, shared_basis


def products(m: int, n: int, ranks: list[int], seed: int = 0) -> Products:
    return Products(
        Product(normal(m, r, seed=seed + i), normal(r, n, seed=seed + 100 + i))
        for i, r in enumerate(ranks)
    )


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
ranks = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(shapes, ranks, st.integers(0, 999))
def test_products_stand_for_their_matrices(shape: tuple[int, int], ranks: list[int], seed: int):
    D = products(*shape, ranks, seed)
    dense = D.dense()
    assert D.shape == dense.shape
    assert D.dtype == dense.dtype
    assert close(D.sum(0).dense(), dense.sum(0))
    assert close(D.mean(0).dense(), dense.mean(0))
    assert close(D.mT.dense(), dense.mT)
    for x, d in zip(D, dense, strict=True):
        q, core, p = x.thin()
        assert close(q @ core @ p.mT, d)
        assert close(q.mT @ q, torch.eye(q.shape[1]).double())
        assert close(p.mT @ p, torch.eye(p.shape[1]).double())
        assert close(torch.tensor(x.square()), d.square().sum().float())
        assert close((x * 3.0).dense(), 3 * d)
        assert x.empty().shape == d.shape


@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"rank": 0.4}, {"rank": "energy:0.8"}])
def test_tsv_m_from_factors_is_that_of_the_matrices(shape: tuple[int, int], options: dict):
    D = products(*shape, [3, 2, 4])
    assert close(tsv_m(D, **options), tsv_m(D.dense(), **options))


@pytest.mark.parametrize("shape", [(20, 14), (14, 20), (5, 30)])
@pytest.mark.parametrize("options", [{}, {"density": 0.5, "reduce": "sum"}, {"merge": "linear"}])
def test_knots_from_factors_is_that_of_the_matrices(shape: tuple[int, int], options: dict):
    D = products(*shape, [3, 2, 4])
    assert close(knots(D, **options), knots(D.dense(), **options))
    basis, R = shared_basis(D)
    assert basis.shape[1] == min(9, *shape)
    assert close(basis @ R, D.dense())
    plain = knots(D, merge="linear", reduce="sum")
    assert close(plain, mp.task_arithmetic(D.dense()))


def test_factors_with_nan_are_refused():
    D = Products([Product(torch.full((4, 2), torch.nan), normal(2, 3))])
    with pytest.raises(MergeError, match="NaN"):
        knots(D)


# ---- In a merge ----------------------------------------------------------------------------------

SHAPES = {"q.weight": (9, 7), "h.0.mlp.c_fc.weight": (7, 9), "k.weight": (9, 7), "q.bias": (9,)}


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """A base in float64 and adapters of several ranks on some of its layers, one of them transposed."""
    base = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    save_file(base, tmp_path / "base.safetensors")
    opened = open_checkpoint(tmp_path / "base.safetensors")
    found = {}
    for seed, (rank, names) in enumerate([(2, ["q", "h.0.mlp.c_fc"]), (3, ["q", "k"])]):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        state = {}
        for i, name in enumerate(names):
            state[f"base_model.model.{name}.lora_A.weight"] = normal(rank, 7, seed=10 * seed + i)
            state[f"base_model.model.{name}.lora_B.weight"] = normal(9, rank, seed=30 * seed + i)
        save_file(state, folder / "adapter_model.safetensors")
        found[f"rank{rank}"] = open_adapter(folder, opened)
    return opened, found


RULES = [
    {"rule": "task_arithmetic"},
    {"rule": "task_arithmetic", "options": {"task_arithmetic": {"reduce": "mean"}}},
    {"rule": "tsv_m"},
    {"rule": "knots"},
    {"rule": "knots", "options": {"knots": {"scope": "tensor", "density": 0.6}}},
]


@pytest.mark.parametrize("recipe", RULES)
def test_a_merge_of_adapters_is_that_of_their_models(adapters, recipe: dict):
    base, tasks = adapters
    weights = {"rank2": 0.5, "rank3": 2.0}
    models = {name: dict(task) for name, task in tasks.items()}
    expected = mp.merge(dict(base), models, weights=weights, scale=0.7, **recipe)
    found = mp.merge(base, tasks, weights=weights, scale=0.7, **recipe)
    assert all(torch.allclose(found[name], expected[name], atol=1e-9) for name in base)
    in_threads = mp.merge(base, tasks, weights=weights, scale=0.7, threads=2, **recipe)
    assert all(torch.equal(found[name], in_threads[name]) for name in base)


@pytest.mark.parametrize("recipe", RULES)
def test_these_rules_never_expand_the_tasks(
    adapters, recipe: dict, monkeypatch: pytest.MonkeyPatch
):
    base, tasks = adapters

    def fail(self: object, name: str) -> None:
        raise AssertionError(f"{name} was expanded")

    monkeypatch.setattr(Adapter, "_update", fail)
    only = {"include": ["*.weight"]}  # vectors have no factors
    merged = mp.Merged(base, tasks, **recipe, **only)
    assert merged["q.weight"].isfinite().all()
    with pytest.raises(AssertionError, match="was expanded"):
        mp.merge(base, tasks, rule="ties", **only)
    with pytest.raises(AssertionError, match="was expanded"):
        mp.merge(base, tasks, rule="tsv_m", purify="pact", **only)


def test_updates_come_as_products_where_the_rule_keeps_them(adapters):
    base, tasks = adapters
    merged = mp.Merged(base, tasks, scale=0.5)
    product, factor = merged.update("q.weight")
    assert isinstance(product, Product)
    assert (product.rank, factor) == (5, 0.5)
    assert close(product.dense() * factor, merged.delta("q.weight"))
    assert merged.update("q.bias") == (None, 0.5)
    assert isinstance(mp.Merged(base, tasks, rule="ties").update("q.weight")[0], Tensor)
    kept = merged.at(0.25)
    assert close(kept.update("q.weight")[0], product.dense())
    assert merged.at(0.0).update("q.weight")[0] is None


def test_a_rule_of_ones_own_may_take_factors(adapters):
    base, tasks = adapters
    seen = []

    def first(D: Tensor | Products) -> Product | Tensor:
        seen.append(type(D))
        return D[0]

    method = mp.Method("first", "rule", first, needs=("factors",))
    found = mp.merge(base, tasks, rule=method, scale=1.0, include="*.weight")
    assert close(found["q.weight"], tasks["rank2"]["q.weight"])
    assert Products in seen
    wrong = mp.Method("wrong", "rule", lambda D: torch.ones(2), needs=("factors",))
    with pytest.raises(MergeError, match="it returned the shape"):
        mp.Merged(base, tasks, rule=wrong, scale=1.0, include="*.weight")["q.weight"]
