"""Load-bearing weights, enrichment and its tests against cases worked by hand."""

import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import close, normal, rng
from minipact import lbw_weights

# ---- Masks ---------------------------------------------------------------------------------------


def weights(seed: int) -> dict[str, Tensor]:
    shapes = {"a.weight": (40, 30), "conv1.weight": (6, 3, 4, 4), "embedding": (17, 20)}
    outside = {"a.bias": (40,), "head.weight": (8, 8), "norm.weight": (4, 4), "ln_1.w": (4, 4)}
    state = {n: normal(*s, seed=seed + i) for i, (n, s) in enumerate((shapes | outside).items())}
    return state | {"steps": torch.ones(3, 3, dtype=torch.long)}


TAU, SENSITIVITY = weights(0), {n: x.double().square() for n, x in weights(100).items()}
SCOPE = {"a.weight", "conv1.weight", "embedding"}


def test_crucial_and_safe_by_hand():
    tau = {"w": torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]])}
    f = {"w": torch.tensor([[11.0, 1.0, 10.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0, 4.0, 3.0]])}
    found = mp.lbw_mask(tau, f, equalise=False)
    # The 0.3 quantile of |tau| is 4, those of the Fisher information are 4 and 8; all strictly.
    assert found.crucial["w"].tolist() == [[True, False, True] + 8 * [False]]
    assert found.safe["w"].tolist() == [[False, True] + 9 * [False]]
    assert int(found.random["w"].sum()) == int(found.low["w"].sum()) == 2
    assert not found.low["w"][:, 3:].any()
    equal = mp.lbw_mask(tau, f)
    assert {int(g["w"].sum()) for g in vars(equal).values()} == {1}
    assert not (equal.crucial["w"] & ~found.crucial["w"]).any()


def test_low_and_high_are_quantiles():
    for low, high in ((0.1, 0.9), (0.2, 0.8), (0.4, 0.6)):
        found = mp.lbw_mask(TAU, SENSITIVITY, low, high, equalise=False)
        for name in SCOPE:
            a, f = TAU[name].abs(), SENSITIVITY[name]
            small = a < torch.quantile(a, low)
            assert torch.equal(found.crucial[name], small & (f > torch.quantile(f, high)))
            assert torch.equal(found.safe[name], small & (f < torch.quantile(f, low)))


def test_groups_are_equal_in_size_and_where_they_belong():
    whole, found = mp.lbw_mask(TAU, SENSITIVITY, equalise=False), mp.lbw_mask(TAU, SENSITIVITY)
    for name in SCOPE:
        sizes = {int(group[name].sum()) for group in vars(found).values()}
        assert sizes == {min(int(whole.crucial[name].sum()), int(whole.safe[name].sum()))}
        assert not (found.crucial[name] & ~whole.crucial[name]).any()
        assert not (found.safe[name] & ~whole.safe[name]).any()
        a = TAU[name].abs()
        assert a[found.low[name]].max() < torch.quantile(a, 0.3) < a[found.random[name]].max()
    assert all(set(group) == SCOPE for group in vars(found).values())


def test_draws_do_not_depend_on_the_order_of_tensors_or_the_process():
    first = mp.lbw_mask(TAU, SENSITIVITY)
    again = mp.lbw_mask(dict(reversed(TAU.items())), dict(reversed(SENSITIVITY.items())))
    other = mp.lbw_mask(TAU, SENSITIVITY, seed=1)
    for group in ("crucial", "safe", "random", "low"):
        for name in SCOPE:
            assert torch.equal(getattr(first, group)[name], getattr(again, group)[name])
    for name in SCOPE:
        assert not torch.equal(first.random[name], other.random[name])
        assert not torch.equal(first.low[name], other.low[name])
        assert not torch.equal(first.low[name], first.random[name])
    # CRC-32 of the name, not Python's salted hash: these numbers hold in every process.
    chosen = first.random["a.weight"].flatten().nonzero().flatten()[:4].tolist()
    assert chosen == [11, 12, 16, 49]


def test_one_candidate_more_changes_one_entry():
    among = normal(1000) > 0.5
    more = among.clone()
    more[int((~among).nonzero()[0])] = True
    one = lbw_weights._draw(among, 50, 0, "w", "crucial")
    two = lbw_weights._draw(more, 50, 0, "w", "crucial")
    assert int((one ^ two).sum()) <= 2


def test_degenerate_tensors_are_left_out():
    tau = TAU | {"frozen": torch.zeros(9, 9)}
    f = SENSITIVITY | {"frozen": torch.rand(9, 9)}
    assert set(mp.lbw_mask(tau, f).crucial) == SCOPE
    whole = mp.lbw_mask(tau, f, equalise=False)
    assert not whole.crucial["frozen"].any()
    assert mp.enrichment(whole.crucial["frozen"], tau["a.weight"][:9, :9]).isnan()
    with pytest.raises(mp.MergeError, match="no tensor has both"):
        mp.lbw_mask({"frozen": tau["frozen"]}, f)


def test_quantiles_of_huge_tensors_come_from_a_sample(monkeypatch):
    monkeypatch.setattr(lbw_weights, "MAX_FOR_QUANTILE", 2000)
    x = normal(200, 200)
    sampled = lbw_weights._quantile(x, 0.3, 0, "w")
    assert sampled != torch.quantile(x, 0.3)
    assert (x < sampled).double().mean() == pytest.approx(0.3, abs=0.04)
    assert sampled == lbw_weights._quantile(x, 0.3, 0, "w")


@pytest.mark.parametrize(
    ("tau", "f", "options", "message"),
    [
        (TAU, SENSITIVITY, {"low": 0.8}, "low=0.8, high=0.7"),
        (TAU, SENSITIVITY, {"low": 0.0}, "low=0.0"),
        (TAU, SENSITIVITY, {"high": 1.0}, "high=1.0"),
        ({"a.bias": TAU["a.bias"]}, SENSITIVITY, {}, "no tensor in scope"),
        (TAU, {}, {}, "lacks 'a.weight'"),
        (TAU, SENSITIVITY | {"embedding": torch.ones(20, 17)}, {}, "'embedding': tau"),
        (TAU, SENSITIVITY | {"embedding": torch.full((17, 20), math.nan)}, {}, "NaN"),
    ],
)
def test_lbw_mask_refuses(tau, f, options, message):
    with pytest.raises(mp.MergeError, match=message):
        mp.lbw_mask(tau, f, **options)


# ---- Enrichment and tests ------------------------------------------------------------------------


def test_enrichment_by_hand():
    mask = torch.tensor([[True, False], [False, False]])
    update = torch.tensor([[3.0, 1.0], [1.0, -1.0]])
    # 9 of 12 on a quarter of the entries.
    assert float(mp.enrichment(mask, update)) == 3.0
    both = mp.enrichment(mask, torch.stack([update, torch.ones(2, 2)]))
    assert both.tolist() == [3.0, 1.0]
    assert both.dtype == torch.float64
    assert mp.enrichment(~torch.ones_like(mask), update).isnan()
    assert mp.enrichment(mask, torch.zeros(2, 2)).isnan()
    assert float(mp.enrichment(torch.ones_like(mask), update)) == 1.0


def test_random_masks_are_not_enriched():
    update = normal(60, 50)
    values = [mp.enrichment(normal(60, 50, seed=s) > 1, update) for s in range(1, 201)]
    assert torch.stack(values).mean() == pytest.approx(1, abs=0.01)


def test_cohens_d_by_hand():
    mask = torch.tensor([True, True, False, False])
    # Means 5 and 2, variances 1 and 1.
    assert float(mp.cohens_d(mask, torch.tensor([-4.0, 6.0, 1.0, -3.0]))) == pytest.approx(3)
    assert mp.cohens_d(~mask & mask, torch.ones(4)).isnan()
    assert mp.cohens_d(mask | ~mask, torch.ones(2, 4)).isnan().all()


def test_permutation_test_of_the_extreme_cases():
    update = normal(20, 30)
    largest = update.abs() > torch.quantile(update.abs(), 0.9)
    assert float(mp.permutation_test(largest, update, 99, generator=rng())) == 0.01
    smallest = update.abs() < torch.quantile(update.abs(), 0.1)
    assert float(mp.permutation_test(smallest, update, 99, generator=rng())) == 1.0
    # All updates equal, so every mask is as enriched as any other, up to rounding.
    assert float(mp.permutation_test(largest, 0.1 * torch.ones(20, 30), 99)) == 1.0
    assert mp.permutation_test(largest & ~largest, update, 9).isnan()
    assert mp.permutation_test(largest, 0 * update, 9).isnan()


def test_p_values_are_uniform_where_nothing_is_to_be_found():
    masks = [normal(300, seed=s) > 1 for s in range(200)]
    p = [
        mp.permutation_test(m, normal(300, seed=900 + s), 99, generator=rng(s))
        for s, m in enumerate(masks)
    ]
    p = torch.stack(p)
    assert p.mean() == pytest.approx(0.5, abs=0.06)
    for level in (0.1, 0.5, 0.9):
        assert (p <= level).double().mean() == pytest.approx(level, abs=0.1)


def test_the_order_of_tasks_does_not_matter():
    mask, updates = normal(20, 20) > 1, normal(4, 20, 20, seed=1)
    p = mp.permutation_test(mask, updates, 50, generator=rng())
    assert p.shape == (4,)
    assert torch.equal(p.flip(0), mp.permutation_test(mask, updates.flip(0), 50, generator=rng()))
    assert torch.equal(p[2], mp.permutation_test(mask, updates[2], 50, generator=rng()))
    assert close(mp.enrichment(mask, updates)[2], mp.enrichment(mask, updates[2]))
    assert close(mp.cohens_d(mask, updates)[2], mp.cohens_d(mask, updates[2]))


@pytest.mark.parametrize("function", [mp.enrichment, mp.cohens_d, mp.permutation_test])
def test_masks_must_fit(function):
    with pytest.raises(mp.MergeError, match="does not fit"):
        function(torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3))
    with pytest.raises(mp.MergeError, match="does not fit"):
        function(torch.ones(2, 3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(mp.MergeError, match="boolean"):
        function(torch.ones(2, 3), torch.ones(2, 3))


def test_permutation_test_needs_repeats():
    with pytest.raises(mp.MergeError, match="repeats=0"):
        mp.permutation_test(torch.ones(2, dtype=torch.bool), torch.ones(2), 0)


def test_benjamini_hochberg_by_hand():
    p = torch.tensor([0.01, 0.04, 0.03, 0.005, math.nan, 0.9], dtype=torch.float64)
    # Sorted: 0.005 * 5, 0.01 * 5/2, 0.03 * 5/3, 0.04 * 5/4, 0.9; then the running minimum from above.
    wanted = torch.tensor([0.025, 0.05, 0.05, 0.025, math.nan, 0.9], dtype=torch.float64)
    assert torch.allclose(mp.benjamini_hochberg(p), wanted, equal_nan=True)
    assert p[0] == 0.01
    assert torch.allclose(mp.benjamini_hochberg(p.view(2, 3)), wanted.view(2, 3), equal_nan=True)
    assert mp.benjamini_hochberg(torch.full((2,), math.nan)).isnan().all()
    assert mp.benjamini_hochberg(torch.tensor([0.9, 1.0])).tolist() == [1.0, 1.0]
    # The step-up: 0.04 alone would fail its step, but 0.05 passes and takes it along.
    assert (mp.benjamini_hochberg(torch.tensor([0.04, 0.05]).double()) < 0.0501).all()
    with pytest.raises(mp.MergeError, match="between 0 and 1"):
        mp.benjamini_hochberg(torch.tensor([1.5]))


# ---- Ablation ------------------------------------------------------------------------------------


def test_overwrite():
    state = {"w": torch.zeros(2, 2, dtype=torch.float16), "b": torch.ones(2)}
    mask = {"w": torch.tensor([[True, False], [False, True]])}
    found = mp.overwrite(state, mask, {"w": torch.full((2, 2), 3.0)})
    assert found["w"].tolist() == [[3, 0], [0, 3]]
    assert found["w"].dtype == torch.float16
    assert list(found) == ["w", "b"]
    found["b"] += 1
    found["w"] += 1
    assert state["b"].tolist() == [1, 1]
    assert not state["w"].any()


@pytest.mark.parametrize(
    ("masks", "values", "message"),
    [
        ({"x": torch.ones(2, dtype=torch.bool)}, {"x": torch.ones(2)}, "'x', which"),
        ({"b": torch.ones(2, dtype=torch.bool)}, {}, "'b', which"),
        ({"b": torch.ones(2)}, {"b": torch.ones(2)}, "'b': need a boolean"),
        ({"b": torch.ones(3, dtype=torch.bool)}, {"b": torch.ones(2)}, "'b': need"),
        ({"b": torch.ones(2, dtype=torch.bool)}, {"b": torch.ones(1)}, "'b': need"),
    ],
)
def test_overwrite_refuses(masks, values, message):
    with pytest.raises(mp.MergeError, match=message):
        mp.overwrite({"b": torch.ones(2)}, masks, values)
