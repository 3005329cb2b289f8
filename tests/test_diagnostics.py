"""Diagnostics: answers worked by hand, the plain equations with full SVDs, properties, bad input."""

import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import normal, problem, rng

WALLS = (mp.lbw_similarity, mp.hidden_interference)
SHARES = (mp.intrusion_energy, mp.axis_profile)


def right(x: Tensor, k: int) -> Tensor:
    """Leading right singular vectors [n, k]."""
    return torch.linalg.svd(x).Vh[:k].mT


def wall(W0: Tensor, d: Tensor, core: int, task: int) -> Tensor:
    v0, v = right(W0, core), right(d, task)
    u, s, _ = torch.linalg.svd(v0 - v @ v.mT @ v0, full_matrices=False)
    return u[:, s > 1e-3 * s[0]]


def axes(*indices: int, n: int = 4) -> Tensor:
    """Matrix that reads the given input axes with strengths 2^-1, 2^-2, ...: [n, n]."""
    x = torch.zeros(n, n, dtype=torch.float64)
    for row, i in enumerate(indices):
        x[row, i] = 0.5 ** (row + 1)
    return x


# ---- Task singular vectors -----------------------------------------------------------------------


def test_compression_is_exact_at_full_rank_and_for_one_task():
    _, D = problem(24)
    assert torch.allclose(mp.tsv_decompress(*mp.tsv_compress(D, rank=24)), D, atol=1e-12)
    assert torch.allclose(mp.tsv_decompress(*mp.tsv_compress(D[:1])), D[:1], atol=1e-12)


def test_compression_keeps_the_best_approximation():
    _, D = problem(24)
    short = mp.tsv_decompress(*mp.tsv_compress(D, rank=3))
    for d, x in zip(D, short, strict=True):
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        assert torch.allclose(x, u[:, :3] * s[:3] @ vh[:3], atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 4, 8, 40])
def test_compression_stores_about_two_matrices(tasks: int):
    D = normal(tasks, 24, 32)
    u, s, v = mp.tsv_compress(D)
    k = max(1, 24 // tasks)
    assert (u.shape, s.shape, v.shape) == ((tasks, 24, k), (tasks, k), (tasks, 32, k))
    if tasks <= 24:
        assert u.numel() + s.numel() + v.numel() <= 24 * (24 + 32 + 1) < 2 * 24 * 32
    assert (s.diff(dim=1) <= 0).all()


def test_compression_pads_a_task_of_small_rank():
    D = torch.stack([axes(0), axes(1, 2, 3)])
    u, s, v = mp.tsv_compress(D, rank=3)
    assert s[0, 1:].tolist() == [0, 0]
    assert not u[0, :, 1:].any()
    assert torch.allclose(mp.tsv_decompress(u, s, v), D, atol=1e-12)


def test_compression_keeps_the_type_and_the_input():
    D = normal(3, 8, 8).half()
    before = D.clone()
    assert all(x.dtype == torch.float16 for x in mp.tsv_compress(D))
    assert torch.equal(D, before)
    assert mp.tsv_compress(normal(3, 8, 8))[0].dtype == torch.float64


def test_randomized_compression_agrees_with_the_exact_one():
    _, D = problem(24)
    short = mp.tsv_decompress(*mp.tsv_compress(D, rank=4, svd="randomized", generator=rng()))
    exact = mp.tsv_decompress(*mp.tsv_compress(D, rank=4))
    assert (short - exact).norm() < 1e-3 * exact.norm()


def test_task_interference_by_hand():
    # two rank-one tasks s u v^T; left vectors at 60 degrees, right vectors at 45 degrees:
    # U^T U - I has a = cos 60 off the diagonal, V^T V - I has b = cos 45, the product is diag(a b s)
    e = torch.eye(2, dtype=torch.float64)
    u2 = torch.tensor([0.5, math.sqrt(3) / 2], dtype=torch.float64)
    v2 = torch.tensor([1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    D = torch.stack([3 * torch.outer(e[0], e[0]), 5 * torch.outer(u2, v2)])
    overlap = 0.5 / math.sqrt(2)
    assert mp.singular_task_interference(D, rank=1) == pytest.approx(8 * overlap)
    induced = mp.singular_task_interference(D, rank=1, norm="induced")
    assert induced == pytest.approx(5 * overlap)


def test_task_interference_of_orthogonal_tasks_is_zero():
    D = torch.stack([axes(0, 1), axes(2, 3).flip(0)])
    assert mp.singular_task_interference(D, rank=2) == pytest.approx(0, abs=1e-12)
    shared_inputs = torch.stack([axes(0, 1), axes(0, 1).flip(0)])  # other outputs: no collision
    assert mp.singular_task_interference(shared_inputs, rank=2) == pytest.approx(0, abs=1e-12)


def test_task_interference_is_zero_after_whitening():
    _, D = problem(24)
    u, s, v = mp.tsv_compress(D)
    side_by_side = (torch.cat(list(x), dim=1) for x in (u, v))
    a, b = (torch.linalg.svd(x, full_matrices=False) for x in side_by_side)
    u, v = a.U @ a.Vh, b.U @ b.Vh
    whitened = torch.einsum("mi,i,ni->imn", u, s.flatten(), v)  # every triple a task of its own
    assert mp.singular_task_interference(D) > 0.1
    assert mp.singular_task_interference(whitened, rank=1) == pytest.approx(0, abs=1e-10)


def test_task_interference_against_the_equation():
    _, D = problem(24)
    parts = [torch.linalg.svd(d, full_matrices=False) for d in D]
    u = torch.cat([p.U[:, :6] for p in parts], 1)
    v = torch.cat([p.Vh[:6].mT for p in parts], 1)
    s, one = torch.cat([p.S[:6] for p in parts]), torch.eye(24, dtype=torch.float64)
    x = ((u.mT @ u - one) @ s.diag() @ (v.mT @ v - one)).abs()
    assert mp.singular_task_interference(D) == pytest.approx(x.sum().item())
    induced = mp.singular_task_interference(D, norm="induced")
    assert induced == pytest.approx(x.sum(0).max().item())


@pytest.mark.parametrize("norm", ["entrywise", "induced"])
def test_no_update_interferes_with_nothing(norm: str):
    assert mp.singular_task_interference(torch.zeros(2, 3, 3), norm=norm) == 0
    once = torch.stack([axes(0, 1), torch.zeros(4, 4).double()])
    assert mp.singular_task_interference(once, norm=norm) == pytest.approx(0, abs=1e-12)


# ---- Load-bearing walls --------------------------------------------------------------------------


def test_walls_by_hand():
    """Core e0, e1. Task A updates e1, so it leans on e0; B updates e0; C updates e2, so on both."""
    W0, D = axes(0, 1), torch.stack([axes(1), axes(0), axes(2)])
    settings = {"core": 2, "task": 1}
    similarity = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).double()
    assert torch.allclose(mp.lbw_similarity(W0, D, **settings), similarity, atol=1e-12)
    # rows interfere, columns suffer: A writes on e1, which B and C lean on
    hidden = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double()
    assert torch.allclose(mp.hidden_interference(W0, D, **settings), hidden, atol=1e-12)


def test_walls_of_a_slanted_update_by_hand():
    """Core e0; the update reads cos e0 + sin e1. What is left of e0 leans the other way."""
    c, s = math.cos(0.5), math.sin(0.5)
    slanted = torch.tensor([[c, s], [0, 0]], dtype=torch.float64)
    W0, D = axes(0, n=2), torch.stack([slanted, axes(1, n=2)])
    settings = {"core": 1, "task": 1}
    basis = mp.lbw_basis(W0, slanted, **settings)
    expected = torch.tensor([[s], [-c]]).double()
    assert torch.allclose(basis @ basis.mT, expected @ expected.mT, atol=1e-12)
    assert mp.lbw_similarity(W0, D, **settings)[0, 1].item() == pytest.approx(s * s)
    hidden = mp.hidden_interference(W0, D, **settings)
    assert hidden[0, 1].item() == pytest.approx(c * c)
    assert hidden[1, 0].item() == pytest.approx(c * c)


def test_diagonals():
    W0, D = problem(24)
    for core, task in ((5, 3), (3, 8), (20, 6), (0.5, "energy:0.6")):
        similarity = mp.lbw_similarity(W0, D, core=core, task=task)
        hidden = mp.hidden_interference(W0, D, core=core, task=task)
        assert torch.allclose(similarity.diag(), torch.ones(4).double(), atol=1e-10)
        assert torch.allclose(hidden.diag(), torch.zeros(4).double(), atol=1e-12)
        assert torch.allclose(similarity, similarity.T, atol=1e-12)
        assert ((similarity > -1e-12) & (similarity < 1 + 1e-10)).all()
        assert ((hidden > -1e-12) & (hidden < 1 + 1e-10)).all()


@pytest.mark.parametrize(("core", "task"), [(5, 3), (3, 8), (12, 6)])
def test_walls_against_the_equations(core: int, task: int):
    W0, D = problem(24)
    bases = [wall(W0, d, core, task) for d in D]
    similarity = mp.lbw_similarity(W0, D, core=core, task=task)
    hidden = mp.hidden_interference(W0, D, core=core, task=task)
    for a, x in enumerate(bases):
        for b, y in enumerate(bases):
            shared = (x.mT @ y).square().sum() / min(x.shape[1], y.shape[1])
            assert similarity[a, b].item() == pytest.approx(shared.item(), abs=1e-9)
            written = (right(D[a], task).mT @ y).square().sum() / task
            assert hidden[a, b].item() == pytest.approx(written.item(), abs=1e-9)


def test_random_updates_hit_a_wall_in_proportion_to_its_size():
    W0 = normal(64, 64)
    D = torch.stack([normal(64, 64, seed=s) for s in range(1, 9)])
    hidden = mp.hidden_interference(W0, D, core=16, task=16)
    off = hidden[~torch.eye(8, dtype=torch.bool)]
    assert off.mean().item() == pytest.approx(16 / 64, rel=0.05)


@pytest.mark.parametrize("function", [*WALLS, *SHARES])
def test_measures_follow_the_order_of_tasks(function):
    W0, D = problem(24)
    order = [2, 0, 3, 1]
    x, shuffled = function(W0, D, core=6), function(W0, D[order], core=6)
    expected = x[order][:, order] if function in WALLS else x[order]
    assert torch.allclose(shuffled, expected, atol=1e-10)


@pytest.mark.parametrize("function", [*WALLS, *SHARES])
def test_measures_ignore_the_choice_of_input_and_output_axes(function):
    W0, D = problem(24)
    q, p = torch.linalg.qr(normal(30, 30, seed=9)).Q, torch.linalg.qr(normal(24, 24, seed=8)).Q
    assert torch.allclose(function(p @ W0 @ q, p @ D @ q, core=6), function(W0, D, core=6))


@pytest.mark.parametrize("function", [*WALLS, *SHARES])
def test_measures_ignore_the_size_of_updates(function):
    W0, D = problem(24)
    factors = torch.tensor([1e-3, 1.0, 7.0, 200.0])[:, None, None]
    scaled = function(3 * W0, factors * D, core=6)
    assert torch.allclose(scaled, function(W0, D, core=6), atol=1e-9)


def test_measures_of_float32_and_wide_matrices():
    W0, D = problem(m=10, n=30)
    for function in (*WALLS, *SHARES):
        wide = function(W0, D, core=4, task=3) if function in WALLS else function(W0, D, core=4)
        low = (W0.float(), D.float())
        narrow = function(*low, core=4, task=3) if function in WALLS else function(*low, core=4)
        assert narrow.dtype == torch.float64
        assert torch.allclose(narrow, wide, atol=1e-4)


def test_empty_walls_are_nan():
    """A task that updates the whole core leans on none of it; a task without update has no direction."""
    W0, D = axes(0), torch.stack([axes(0), axes(1), torch.zeros(4, 4).double()])
    similarity = mp.lbw_similarity(W0, D, core=1, task=1)
    assert similarity[0].isnan().all()
    assert similarity[:, 0].isnan().all()
    assert torch.allclose(similarity[1:, 1:], torch.ones(2, 2).double())
    hidden = mp.hidden_interference(W0, D, core=1, task=1)
    assert hidden[2].isnan().all()
    assert hidden[:2].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert mp.hidden_interference(W0, D, core=0, task=1)[:2].tolist() == [[0, 0, 0]] * 2


# ---- Intrusion -----------------------------------------------------------------------------------


def test_intrusion_by_hand():
    W0, D = axes(0, 1), torch.stack([axes(1, 0), axes(2, 1), axes(3), torch.zeros(4, 4)])
    # squares of the strengths: 1/4 and 1/16, so the second of two axes holds one fifth
    profile = torch.tensor([[0.2, 0.8], [0, 0.2], [0, 0], [0, 0]]).double()
    assert torch.allclose(mp.axis_profile(W0, D, core=2), profile, atol=1e-12)
    energy = torch.tensor([1, 0.2, 0, 0]).double()
    assert torch.allclose(mp.intrusion_energy(W0, D, core=2), energy, atol=1e-12)


def test_profile_sums_to_the_energy_and_a_full_core_holds_all():
    W0, D = problem(m=30, n=24)
    for core in (1, 5, 0.3, "energy:0.9"):
        profile = mp.axis_profile(W0, D, core=core)
        assert torch.allclose(profile.sum(1), mp.intrusion_energy(W0, D, core=core), atol=1e-12)
    assert mp.axis_profile(W0, D, core=5).shape == (4, 5)
    assert torch.allclose(mp.intrusion_energy(W0, D, core=24), torch.ones(4).double(), atol=1e-10)


def test_intrusion_against_the_equation():
    W0, D = problem(24)
    v0 = right(W0, 7)
    expected = torch.stack([(d @ v0).norm() ** 2 / d.norm() ** 2 for d in D])
    assert torch.allclose(mp.intrusion_energy(W0, D, core=7), expected, atol=1e-10)


def test_intrusion_of_noise_is_the_share_of_dimensions():
    W0, D = normal(80, 80), torch.stack([normal(80, 80, seed=s) for s in range(1, 9)])
    assert mp.intrusion_energy(W0, D, core=20).mean().item() == pytest.approx(0.25, rel=0.05)


def test_filters_end_the_intrusion():
    W0, D = problem(24)
    assert mp.intrusion_energy(W0, mp.sift(W0, D, core=6), core=6).max() < 1e-20
    shielded = mp.pact(W0, D, core=6, task=1, tol=1e-9)  # the others' walls together hold the core
    assert mp.intrusion_energy(W0, shielded, core=6).max() < 1e-12


# ---- Ablation ------------------------------------------------------------------------------------


def test_ablation_by_hand():
    X = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert mp.ablate_subspace(X, torch.tensor([[1.0], [0.0]])).tolist() == [[0, 4], [0, 2]]
    slanted = torch.tensor([[0.6], [0.8]])  # the first row lies on it entirely
    ablated = mp.ablate_subspace(X, slanted)
    assert torch.allclose(ablated, torch.tensor([[0.0, 0.0], [-0.32, 0.24]]), atol=1e-6)


def test_ablation_is_idempotent_and_splits_the_energy():
    _, D = problem(24)
    basis = torch.linalg.qr(normal(30, 7, seed=5)).Q
    once = mp.ablate_subspace(D, basis)
    assert torch.allclose(mp.ablate_subspace(once, basis), once, atol=1e-12)
    assert (once @ basis).abs().max() < 1e-12
    removed = (D - once).square().sum()
    assert (removed + once.square().sum()).item() == pytest.approx(D.square().sum().item())
    assert torch.equal(mp.ablate_subspace(D, basis[:, :0]), D)


def test_ablation_keeps_type_and_input():
    X = normal(4, 6).half()
    before, basis = X.clone(), torch.eye(6).double()[:, :2]
    ablated = mp.ablate_subspace(X, basis)
    assert ablated.dtype == torch.float16
    assert not ablated[:, :2].any()
    assert torch.equal(X, before)


@pytest.mark.parametrize("size", [0, 1, 9, 15])
def test_random_subspace_lies_outside(size: int):
    avoid = torch.linalg.qr(normal(24, 9)).Q
    basis = mp.random_subspace(avoid, size, generator=rng(4))
    assert basis.shape == (24, size)
    assert torch.allclose(basis.mT @ basis, torch.eye(size).double(), atol=1e-10)
    assert (avoid.mT @ basis).abs().sum() < 1e-10


def test_random_subspace_repeats_with_its_seed_only():
    avoid = torch.zeros(12, 0)
    a, b, c = (mp.random_subspace(avoid, 3, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a @ a.mT - c @ c.mT).norm() > 0.5


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*WALLS, *SHARES])
def test_bad_matrices_are_refused(function):
    W0, D = problem(24)
    broken = D.clone()
    broken[1, 2, 3] = math.nan
    with pytest.raises(mp.MergeError, match="NaN"):
        function(W0, broken)
    with pytest.raises(mp.MergeError, match="NaN"):
        function(torch.full_like(W0, math.inf), D)
    with pytest.raises(mp.MergeError, match="does not fit"):
        function(W0.mT, D)
    with pytest.raises(mp.MergeError, match=r"\[T, m, n\]"):
        function(W0, D[0])
    with pytest.raises(mp.MergeError, match="no core"):
        function(torch.zeros_like(W0), D)
    with pytest.raises(mp.MergeError, match="rank 25"):
        function(W0, D, core=25)
    with pytest.raises(mp.MergeError, match="svd"):
        function(W0, D, svd="magic")


@pytest.mark.parametrize("function", WALLS)
@pytest.mark.parametrize("tol", [-0.1, 1.0, 2.0])
def test_bad_tolerances_are_refused(function, tol: float):
    with pytest.raises(mp.MergeError, match="tol"):
        function(*problem(24), tol=tol)


def test_bad_stacks_and_options_are_refused():
    _, D = problem(24)
    with pytest.raises(mp.MergeError, match="norm 'l2' is unknown"):
        mp.singular_task_interference(D, norm="l2")
    for function in (mp.tsv_compress, mp.singular_task_interference):
        with pytest.raises(mp.MergeError, match="rank 99"):
            function(D, rank=99)
        with pytest.raises(mp.MergeError, match=r"\[T, m, n\]"):
            function(D[0])
        with pytest.raises(mp.MergeError, match="NaN"):
            function(D * math.nan)


def test_bad_bases_are_refused():
    X = normal(4, 6)
    with pytest.raises(mp.MergeError, match="does not fit"):
        mp.ablate_subspace(X, torch.eye(4))
    with pytest.raises(mp.MergeError, match="does not fit"):
        mp.ablate_subspace(X, torch.ones(6))
    with pytest.raises(mp.MergeError, match="orthonormal"):
        mp.ablate_subspace(X, torch.ones(6, 2))
    with pytest.raises(mp.MergeError, match="only 2 of 6 directions"):
        mp.random_subspace(torch.eye(6)[:, :4], 3)
    with pytest.raises(mp.MergeError, match="basis"):
        mp.random_subspace(torch.ones(6), 1)
