"""The mathematics of merging: known answers, properties, equivalences, bad input."""

import itertools
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minipact as mp
from minipact import merging

RULES = ("task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts")
MATRIX_RULES = (mp.tsv_m, mp.iso_c, mp.iso_cts)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def decaying(m: int, n: int, seed: int = 0, power: float = 1.0) -> Tensor:
    """Random matrix with singular values i^-power, in float64."""
    r = min(m, n)
    u = torch.linalg.qr(normal(m, r, seed=seed)).Q
    v = torch.linalg.qr(normal(n, r, seed=seed + 1000)).Q
    return (u * torch.arange(1, r + 1).double() ** -power) @ v.mT


def problem(m: int = 40, n: int = 30, tasks: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    W0 = decaying(m, n, seed)
    return W0, torch.stack([0.1 * decaying(m, n, seed + t + 1) for t in range(tasks)])


def model(seed: int, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Small state dict with matrices, a transposed one, vectors, a convolution and an integer."""
    shapes = {
        "visual.mlp.c_fc.weight": (24, 16),
        "visual.mlp.c_fc.bias": (24,),
        "visual.mlp.c_proj.weight": (16, 24),
        "visual.proj": (16, 12),
        "visual.conv1.weight": (8, 3, 2, 2),
    }
    state = {
        name: normal(*shape, seed=seed + i, dtype=torch.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    if base is not None:
        state = {name: base[name] + 0.05 * x for name, x in state.items()}
    return state | {"visual.steps": torch.tensor(7)}


BASE = model(0)
TASKS = [model(100 * t, BASE) for t in (1, 2, 3)]


def reference_shield(W0: Tensor, D: Tensor, j: int, core: int, task: int, tol: float) -> Tensor:
    """Projector on the shield, straight from the equations with full SVDs."""
    v0 = torch.linalg.svd(W0).Vh[:core].mT
    parts = []
    for i, d in enumerate(D):
        if i != j:
            v = torch.linalg.svd(d).Vh[:task].mT
            u, s, _ = torch.linalg.svd(v0 - v @ (v.mT @ v0), full_matrices=False)
            parts.append(u[:, s > tol * s[0]])
    u, s, _ = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    p = u[:, s > tol * s[0]]
    return p @ p.mT


# ---- Task vectors --------------------------------------------------------------------------------


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


def test_negation_returns_to_the_base():
    tau = mp.task_vector(BASE, TASKS[0])
    back = (-tau).apply_to(tau.apply_to(BASE))
    assert all(torch.allclose(back[k], BASE[k], atol=1e-6) for k in BASE)


# ---- Rules by hand -------------------------------------------------------------------------------


def test_task_arithmetic_by_hand():
    D = torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]])
    assert mp.task_arithmetic(D).tolist() == [[4.0, -2.0]]
    assert mp.task_arithmetic(D, reduce="mean").tolist() == [[2.0, -1.0]]


def test_ties_by_hand():
    D = torch.tensor([[4.0, -1.0, 3.0, 0.5, 2.0], [-2.0, -3.0, 5.0, 1.0, -2.0]])
    # trimmed to 3 of 5: [4, 0, 3, 0, 2], [-2, -3, 5, 0, -2]; ties at the threshold stay
    assert mp.ties(D, density=0.6).tolist() == [4.0, -3.0, 4.0, 0.0, 0.0]
    assert mp.ties(D, density=0.6, reduce="sum").tolist() == [4.0, -3.0, 8.0, 0.0, 0.0]
    assert mp.ties(D, density=0.6, reduce="max").tolist() == [4.0, -3.0, 5.0, 0.0, 0.0]


def test_ties_lets_opposite_vectors_cancel():
    x = normal(5, 4)
    assert not mp.ties(torch.stack([x, -x]), density=1.0).any()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_keeps_the_stated_number_of_entries(density: float):
    x = normal(1, 1000)
    assert int((mp.ties(x, density=density) != 0).sum()) == int(density * 1000)


def test_iso_c_by_hand():
    D = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    assert torch.allclose(mp.iso_c(D), 2.0 * torch.eye(2), atol=1e-6)


def test_tsv_m_by_hand():
    D = torch.zeros(2, 3, 3)
    D[0, 0, 1], D[1, 2, 0] = 5.0, -7.0  # orthogonal tasks: whitening changes nothing
    assert torch.allclose(mp.tsv_m(D), D.sum(0), atol=1e-6)
    twice = torch.stack([D[0], D[0]])  # one direction, twice: two equal columns share it
    assert torch.allclose(mp.tsv_m(twice), D[0], atol=1e-6)


def test_iso_c_keeps_the_nuclear_norm_and_flattens():
    _, D = problem()
    s = torch.linalg.svdvals(mp.iso_c(D))
    assert torch.allclose(s, s[0].expand_as(s), rtol=1e-9)
    assert s.sum().item() == pytest.approx(torch.linalg.svdvals(D.sum(0)).sum().item())


def test_mean_over_range_counts_the_rank():
    D = torch.diag(torch.tensor([4.0, 2.0, 0.0]))[None]
    assert torch.allclose(mp.iso_c(D), torch.diag(torch.tensor([2.0, 2.0, 0.0])), atol=1e-6)
    ranged = mp.iso_c(D, mean_over="range")
    assert torch.allclose(ranged, torch.diag(torch.tensor([3.0, 3.0, 0.0])), atol=1e-6)


def test_iso_cts_with_everything_common_is_iso_c():
    _, D = problem()
    assert torch.allclose(mp.iso_cts(D, common=1.0), mp.iso_c(D), atol=1e-12)


def test_iso_cts_against_the_equations():
    _, D = problem(m=20, n=15, tasks=3)
    own = round((15 - 12) / 3)
    u, s, vh = torch.linalg.svd(D.sum(0), full_matrices=False)
    k = 15 - 3 * own
    us, ss, vs = [u[:, :k]], [s[:k]], [vh[:k].mT]
    for d in D:
        a, b, c = torch.linalg.svd(d - u[:, :k] @ u[:, :k].mT @ d, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, c[:own].mT]

    def polar(x: Tensor) -> Tensor:
        a, _, b = torch.linalg.svd(x, full_matrices=False)
        return a @ b

    expected = torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 1)).mT
    assert torch.allclose(mp.iso_cts(D), expected, atol=1e-12)


def test_tsv_m_against_the_equations():
    _, D = problem(m=20, n=15, tasks=3)
    parts = [torch.linalg.svd(d, full_matrices=False) for d in D]
    u, s = torch.cat([p[0][:, :5] for p in parts], 1), torch.cat([p[1][:5] for p in parts])
    v = torch.cat([p[2][:5].mT for p in parts], 1)
    a, b = (torch.linalg.svd(x, full_matrices=False) for x in (u, v))
    assert torch.allclose(mp.tsv_m(D), (a[0] @ a[2] * s) @ (b[0] @ b[2]).mT, atol=1e-10)


def test_dare_keeps_the_mean_and_the_share():
    x = torch.ones(2, 200, 200)
    y = mp.dare(x, p=0.75, generator=rng())
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(y, mp.dare(x, p=0.75, generator=rng()))
    assert torch.equal(mp.dare(x, p=0.0), x)
    assert mp.dare(x, p=0.5, rescale=False, generator=rng()).max() == 1.0


# ---- One task, order, linearity ------------------------------------------------------------------


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


def test_iso_and_sift_change_a_single_task():
    W0, D = problem(tasks=1)
    assert not torch.allclose(mp.iso_c(D), D[0], atol=1e-3)
    assert not torch.allclose(mp.sift(W0, D), D, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("purify", [[], ["pact"], ["sift", "dare"], ["pact", "dare"]])
def test_named_tasks_merge_alike_in_any_order_bit_for_bit(rule: str, purify: list[str]):
    named = dict(zip("abc", TASKS, strict=True))
    first, second = (
        mp.merge(BASE, {name: named[name] for name in order}, rule=rule, purify=purify, scale=1.0)
        for order in ("abc", "cab")
    )
    assert all(torch.equal(first[name], second[name]) for name in BASE)


@pytest.mark.parametrize("function", MATRIX_RULES)
def test_rules_on_stacks_do_not_depend_on_order(function):
    W0, D = problem()
    for order in itertools.islice(itertools.permutations(range(4)), 6):
        shuffled = D[list(order)]
        assert torch.allclose(function(shuffled), function(D), atol=1e-9)
        purified = mp.pact(W0, shuffled)
        assert torch.allclose(purified, mp.pact(W0, D)[list(order)], atol=1e-9)
        assert torch.allclose(function(purified), function(mp.pact(W0, D)), atol=1e-9)


@pytest.mark.parametrize("function", [*MATRIX_RULES, lambda D: mp.task_arithmetic(D)])
@pytest.mark.parametrize("purified", [False, True])
def test_spectral_methods_follow_a_rotation_of_the_inputs(function, purified: bool):
    W0, D = problem()
    q = torch.linalg.qr(normal(30, 30, seed=9)).Q
    rotated = D @ q
    if purified:
        D, rotated = mp.pact(W0, D), mp.pact(W0 @ q, rotated)
    assert torch.allclose(function(rotated), function(D) @ q, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_rules_scale_with_their_inputs(rule: str):
    _, D = problem()
    function = mp.METHODS[rule].function
    assert torch.allclose(function(3 * D), 3 * function(D), atol=1e-9)


# ---- PACT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "task"), [(5, 3), (0.2, 0.1), (12, 4), ("energy:0.9", "energy:0.5")]
)
def test_filtered_matrices_are_orthogonal_to_the_shield(core, task):
    W0, D = problem()
    filtered = mp.pact(W0, D, core=core, task=task)
    for j, d in enumerate(filtered):
        p = mp.shield_basis(W0, D, j, core=core, task=task)
        assert 0 < p.shape[1] < 30
        assert torch.allclose(p.mT @ p, torch.eye(p.shape[1]).double(), atol=1e-12)
        assert (d @ p).abs().max() < 1e-10 * D[j].abs().max()
        assert d.norm() < D[j].norm()


@pytest.mark.parametrize("tol", [1e-9, 1e-3, 0.05, 0.3])
@pytest.mark.parametrize(("core", "task"), [(8, 3), (3, 8), (14, 6), (25, 2)])
def test_shield_is_the_numerical_span(core: int, task: int, tol: float):
    """Also where (T - 1) K exceeds the width, and in both branches of the spectrum's route."""
    W0, D = problem(tasks=5)
    for j in range(5):
        p = mp.shield_basis(W0, D, j, core=core, task=task, tol=tol)
        assert torch.allclose(p @ p.mT, reference_shield(W0, D, j, core, task, tol), atol=1e-6)


def test_shield_has_the_closed_form_where_it_should():
    W0, D = (x.clone() for x in problem(m=60, n=60, tasks=5, seed=3))
    W0, D = normal(60, 60, seed=1), torch.stack([normal(60, 60, seed=s) for s in range(2, 7)])
    core, task = 8, 4  # (T - 2) K = 24 >= (T - 1) k = 16
    v0 = torch.linalg.svd(W0).Vh[:core].mT
    others = [torch.linalg.svd(d).Vh[:task].mT for d in D[1:]]
    q = torch.linalg.qr(torch.cat([v0, *others], 1)).Q
    p = mp.shield_basis(W0, D, 0, core=core, task=task, tol=1e-9)
    assert p.shape[1] == core + 4 * task
    assert torch.allclose(p @ p.mT, q @ q.mT, atol=1e-6)


def test_shield_is_smaller_where_the_closed_form_fails():
    W0, D = normal(60, 60, seed=1), torch.stack([normal(60, 60, seed=s) for s in range(2, 6)])
    core, task = 4, 8  # (T - 2) K = 8 < (T - 1) k = 24
    p = mp.shield_basis(W0, D, 0, core=core, task=task, tol=1e-9)
    assert p.shape[1] == 3 * core < core + 3 * task


def test_two_tasks_shield_each_other_with_one_basis():
    W0, D = problem(tasks=2)
    p, b = mp.shield_basis(W0, D, 0), mp.lbw_basis(W0, D[1])
    assert torch.allclose(p @ p.mT, b @ b.mT, atol=1e-10)


def test_filter_is_idempotent_for_a_fixed_shield():
    W0, D = problem()
    once = mp.pact(W0, D)
    for j, d in enumerate(once):
        p = mp.shield_basis(W0, D, j)
        assert torch.allclose(d - d @ p @ p.mT, d, atol=1e-12)


def test_unpivoted_qr_would_delete_everything():
    """The trap of methods that orthonormalise by a reduced QR; ours keeps what it should."""
    W0, D = problem(tasks=6)
    core, task = 10, 1
    bases = [mp.lbw_basis(W0, d, core=core, task=task) for d in D[1:]]
    q = torch.linalg.qr(torch.cat(bases, 1)).Q
    assert torch.allclose(D[0] - D[0] @ q @ q.mT, torch.zeros_like(D[0]), atol=1e-10)
    kept = mp.pact(W0, D, core=core, task=task)[0]
    assert kept.norm() > 0.1 * D[0].norm()


def test_sift_is_pact_without_task_directions():
    W0, D = problem()
    assert torch.allclose(mp.sift(W0, D, core=6), mp.pact(W0, D, core=6, task=0), atol=1e-12)
    v0 = torch.linalg.svd(W0).Vh[:6].mT
    assert (mp.sift(W0, D, core=6) @ v0).abs().max() < 1e-12


def test_pact_with_nothing_to_protect_is_the_identity():
    W0, D = problem()
    assert torch.equal(mp.pact(W0, D, strength=0.0), D)
    assert torch.allclose(mp.pact(W0, D, core=0), D, atol=1e-15)
    assert torch.allclose(mp.pact(torch.zeros_like(W0), D, core=0), D, atol=1e-15)
    half = mp.pact(W0, D, strength=0.5)
    assert torch.allclose(half, (D + mp.pact(W0, D)) / 2, atol=1e-12)


def test_a_zero_task_matrix_is_protected_all_the_same():
    W0, D = problem()
    D[2] = 0
    filtered = mp.pact(W0, D, core=5)
    v0 = torch.linalg.svd(W0).Vh[:5].mT
    assert (filtered[0] @ v0).abs().max() < 1e-10
    assert not filtered[2].any()


@pytest.mark.parametrize("function", MATRIX_RULES)
def test_whitening_leaves_cleared_directions_clear(function):
    W0, D = problem(tasks=6)
    v0 = torch.linalg.svd(W0).Vh[:6].mT
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        purified = mp.pact(W0.to(dtype), D.to(dtype), core=6, task=1)
        merged = function(purified).double()
        assert (merged @ v0).norm() < bound * merged.norm()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_randomized_pact_keeps_its_promise(shape: tuple[int, int]):
    W0, D = problem(*shape, tasks=4)
    W0, D = W0.float(), D.float()
    exact = mp.pact(W0, D)
    fast = mp.pact(W0, D, svd="randomized", generator=rng())
    assert (fast - exact).norm() < 0.01 * exact.norm()
    assert torch.equal(fast, mp.pact(W0, D, svd="randomized", generator=rng()))


def test_randomized_tsv_m_is_close():
    _, D = problem(96, 64, tasks=8)
    exact, fast = mp.tsv_m(D.float()), mp.tsv_m(D.float(), svd="randomized", generator=rng())
    assert (fast - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
def test_singular_subspaces_agree_with_lapack(shape: tuple[int, int]):
    x = decaying(*shape).float()
    u, s, v = merging._leading_svd(x, 7, "exact", None)
    full = torch.linalg.svd(x.double())
    assert torch.allclose(s, full.S[:7], rtol=1e-6)
    assert torch.allclose(v @ v.mT, full.Vh[:7].mT @ full.Vh[:7], atol=1e-6)
    assert torch.allclose(u @ u.mT, full.U[:, :7] @ full.U[:, :7].mT, atol=1e-6)


@pytest.mark.parametrize(
    ("rank", "count"),
    [(0, 0), (7, 7), (0.05, 5), (0.001, 1), (0.29, 29), (0.999, 99), ("energy:0.5", 1)],
)
def test_ranks(rank, count: int):
    spectrum = torch.arange(1, 101).double() ** -2.0
    assert merging._count(rank, 100, spectrum) == count


def test_energy_rank_by_hand():
    spectrum = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [merging._count(f"energy:{e}", 3, spectrum) for e in (0.6, 0.65, 0.9, 0.95, 1.0)] == [
        1, 2, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rank", [-1, 101, 1.0, 0.0, True, "energy:0", "energy:2", "energy:x", "half"]
)
def test_ranks_out_of_range(rank):
    with pytest.raises(mp.MergeError, match="rank"):
        merging._count(rank, 100, torch.ones(100))


def test_thresholds_of_a_stream_are_exact():
    D = normal(3, 5000, dtype=torch.float32)
    D[1] = D[1].round(decimals=1)  # many ties
    D[2, 1000:] = 0  # fewer numbers than are kept
    for keep in (1, 1500, 5000):
        found = merging._thresholds(lambda: iter(D.split(700, dim=1)), 3, keep / 5000, 5000)
        assert torch.equal(found, D.abs().sort(dim=1, descending=True).values[:, keep - 1])


# ---- Whole models --------------------------------------------------------------------------------


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in state.values() if x.is_floating_point()])


def test_ties_trims_over_the_whole_model():
    D = torch.stack([flat(task) - flat(BASE) for task in TASKS])
    merged = mp.merged_delta(BASE, TASKS, rule="ties")
    assert torch.equal(flat(merged), mp.ties(D))
    local = mp.merged_delta(BASE, TASKS, rule="ties", options={"ties": {"scope": "tensor"}})
    assert not torch.equal(flat(local), flat(merged))
    name = "visual.proj"
    stack = torch.stack([task[name] - BASE[name] for task in TASKS])
    assert torch.equal(local[name], mp.ties(stack))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("purify", [[], ["pact"], ["dare", "pact"]])
def test_scale_zero_gives_the_base_and_a_sweep_equals_a_merge(rule: str, purify: list[str]):
    kept = {name: x.clone() for name, x in (*BASE.items(),)}
    still = mp.merge(BASE, TASKS, rule=rule, purify=purify, scale=0.0)
    assert all(torch.equal(still[name], BASE[name]) for name in BASE)
    delta = mp.merged_delta(BASE, TASKS, rule=rule, purify=purify)
    for scale in (0.5, 1.7):
        merged = mp.merge(BASE, TASKS, rule=rule, purify=purify, scale=scale)
        swept = delta.apply_to(BASE, scale)
        assert list(merged) == list(BASE)
        assert all(torch.equal(merged[name], swept[name]) for name in BASE)
        assert all(merged[name].data_ptr() != BASE[name].data_ptr() for name in BASE)
    assert all(torch.equal(kept[name], BASE[name]) for name in BASE)


def test_matrices_vectors_and_integers_go_their_ways():
    D = {name: torch.stack([task[name] - BASE[name] for task in TASKS]) for name in BASE}
    merged = mp.merged_delta(BASE, TASKS, rule="iso_c", purify="pact")
    name = "visual.mlp.c_proj.weight"
    assert torch.equal(merged[name], mp.iso_c(mp.pact(BASE[name], D[name])))
    name = "visual.proj"  # used as x @ W: its input side is the first axis
    transposed = mp.pact(BASE[name].mT, D[name].mT).mT
    assert torch.equal(merged[name], mp.iso_c(transposed))
    for name in ("visual.mlp.c_fc.bias", "visual.conv1.weight"):
        assert torch.equal(merged[name], D[name].mean(0))
    assert "visual.steps" not in merged
    summed = mp.merged_delta(BASE, TASKS, purify="pact")
    assert torch.equal(summed["visual.conv1.weight"], D["visual.conv1.weight"].sum(0))


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


def test_include_exclude_and_scope():
    merged = mp.merge(BASE, TASKS, exclude="*.bias", scale=1.0)
    assert torch.equal(merged["visual.mlp.c_fc.bias"], BASE["visual.mlp.c_fc.bias"])
    merged = mp.merge(BASE, TASKS, include=["*.bias"], scale=1.0)
    changed = [name for name in BASE if not torch.equal(merged[name], BASE[name])]
    assert changed == ["visual.mlp.c_fc.bias"]
    steps = mp.plan(BASE, TASKS, purify="pact", options={"pact": {"scope": "*c_fc*"}}).steps
    assert [step.name for step in steps if step.purify] == ["visual.mlp.c_fc.weight"]


def test_weights_multiply_task_vectors():
    merged = mp.merge(BASE, TASKS, weights=[1, 0.5, 0], scale=1.0)
    name = "visual.proj"
    expected = TASKS[0][name] + 0.5 * (TASKS[1][name] - BASE[name])
    assert torch.allclose(merged[name], expected, atol=1e-6)
    named = dict(zip("cab", TASKS, strict=True))
    by_name = mp.merge(BASE, named, weights={"b": 0, "a": 0.5, "c": 1}, scale=1.0)
    in_order = mp.merge(BASE, named, weights=[1, 0.5, 0], scale=1.0)
    assert all(torch.equal(by_name[n], in_order[n]) for n in BASE)
    assert torch.allclose(by_name[name], merged[name], atol=1e-6)


def test_own_functions():
    def largest(D: Tensor) -> Tensor:
        return D.amax(0)

    def halved(W0: Tensor, D: Tensor) -> Tensor:
        assert W0.shape == D.shape[1:]
        return D / 2

    delta = mp.merged_delta(BASE, TASKS, rule=largest, purify=[halved, "pact"])
    name = "visual.mlp.c_fc.weight"
    D = torch.stack([task[name] - BASE[name] for task in TASKS])
    assert torch.allclose(delta[name], mp.pact(BASE[name], D / 2).amax(0), atol=1e-6)
    again = mp.merged_delta(
        BASE, TASKS, rule=mp.iso_cts, purify="pact"
    )  # named like a registered rule
    assert torch.equal(
        again[name], mp.merged_delta(BASE, TASKS, rule="iso_cts", purify="pact")[name]
    )
    assert mp.plan(BASE, TASKS, rule=mp.iso_cts).scale == 1.0
    with pytest.raises(mp.MergeError, match=r"<lambda> returned the shape"):
        mp.merge(BASE, TASKS, rule=lambda D: D[0, 0])


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
    assert mp.merged_delta(double, TASKS)["visual.proj"].dtype == torch.float64
    for function in MATRIX_RULES:
        assert function(normal(3, 8, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


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


def test_unchanged_tensors_are_copied_and_scales_are_recommended():
    frozen = [task | {"visual.proj": BASE["visual.proj"].clone()} for task in TASKS]
    merged = mp.merge(BASE, frozen, rule="iso_c", purify="pact")
    assert torch.equal(merged["visual.proj"], BASE["visual.proj"])
    assert mp.plan(BASE, TASKS).scale == 0.3
    assert mp.plan(BASE, TASKS, options={"task_arithmetic": {"reduce": "mean"}}).scale == 1.0
    assert mp.plan(BASE, TASKS, rule="iso_cts").scale == 1.5
    assert "sweep" not in "".join(mp.plan(BASE, TASKS, scale=1).notes)
    assert "no value is published behind pact" in mp.plan(BASE, TASKS, purify="pact").notes[0]


def test_progress_and_streaming():
    seen = []
    stream = mp.merge_iter(BASE, TASKS, progress=lambda *step: seen.append(step))
    assert dict(stream).keys() == BASE.keys()
    assert seen[-1] == (len(BASE), len(BASE), list(BASE)[-1])


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
        ({"rule": "pact"}, "rule 'pact' is unknown"),
        ({"purify": "ties"}, "purifier 'ties' is unknown"),
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
        ({"weights": [1, 2]}, "weights"),
        ({"weights": {"x": 1}}, "weights"),
        ({"policy": lambda name, x: "tensor"}, "'tensor' is unknown"),
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
    ("call", "message"),
    [
        (lambda W0, D: mp.pact(W0, D[0]), r"\[T, m, n\]"),
        (lambda W0, D: mp.pact(W0.mT, D), "does not fit"),
        (lambda W0, D: mp.pact(W0, D, strength=2), "strength"),
        (lambda W0, D: mp.pact(W0 * math.nan, D), "NaN"),
        (lambda W0, D: mp.pact(0 * W0, D), "pre-trained weight is zero"),
        (lambda W0, D: mp.pact(W0, D, core=31), "does not fit a matrix"),
        (lambda W0, D: mp.shield_basis(W0, D, 4), "j=4"),
        (lambda W0, D: mp.tsv_m(D.long()), "floating-point"),
        (lambda W0, D: mp.iso_c(D[:0]), r"\[T, m, n\]"),
    ],
)
def test_bad_tensors(call, message: str):
    with pytest.raises(mp.MergeError, match=message):
        call(*problem())


class Closed(dict):
    """A state dict of known shapes whose weights must not be read yet."""

    def meta(self, name: str) -> Tensor:
        return dict.__getitem__(self, name).to("meta")

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"'{name}' was read")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"purify": "dare", "options": {"dare": {"p": 1}}}, "^dare: p=1 must"),
        ({"purify": "dare", "options": {"dare": {"p": "half"}}}, "'dare'.*wrong option type"),
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
        mp.plan(Closed(BASE), [Closed(task) for task in TASKS], **recipe)


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_reads_no_weight(rule: str):
    mp.plan(Closed(BASE), [Closed(task) for task in TASKS], rule=rule, purify=["pact", "dare"])


def test_functions_of_the_caller_see_real_tensors_only():
    shapes: list[torch.Size] = []

    def rule(D: Tensor) -> Tensor:
        shapes.append(D.shape[1:])
        return D.sum(0)

    mp.merge(BASE, TASKS, rule=rule, purify=lambda W0, D: D)
    matrices = [x.shape for name, x in BASE.items() if mp.default_policy(name, x)[:6] == "matrix"]
    assert shapes == [shape for shape in shapes if shape in matrices]


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
        ({"rule": mp.tsv_m, "options": {"tsv_m": {"rank": 1}}}, "'tsv_m', which is not used"),
        ({"purify": mp.pact, "options": {"pact": {"core": 1}}}, "'pact', which is not used"),
        ({"purify": "pact", "options": {"pact": {"scope": 3}}}, "scope '3' matches no tensor"),
        (
            {"purify": "pact", "options": {"pact": {"core": None}}},
            "^pact: rank 'none' does not fit",
        ),
        ({"exclude": "*"}, "task_arithmetic has no tensor to work on"),
    ],
)
def test_recipes_without_effect_are_refused(recipe: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.plan(BASE, TASKS, **recipe)


def test_large_weights_are_no_wrong_option():
    mp.plan(BASE, TASKS, rule="tsv_m", weights=[1e38] * len(TASKS))


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


def test_module_alone_works_with_torch_only(tmp_path: Path):
    shutil.copy(Path(merging.__file__), tmp_path / "merging.py")
    script = (
        "import sys; sys.modules['numpy'] = None; sys.modules['safetensors'] = None\n"
        "import torch, merging\n"
        "base = {'w': torch.eye(8)}\n"
        "tasks = [{'w': torch.eye(8) + torch.randn(8, 8)} for _ in range(3)]\n"
        "print(merging.merge(base, tasks, rule='tsv_m', purify='pact')['w'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.Size([8, 8])", done.stderr


# ---- Plans in parts ------------------------------------------------------------------------------


class Recorded(dict):
    """A state dict that writes down what it is asked to fetch ahead."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        self.asked: list[str] = []

    def prefetch(self, name: str) -> None:
        self.asked.append(name)


@pytest.mark.parametrize("rule", RULES)
def test_workers_do_not_change_a_bit(rule: str):
    checked = mp.plan(BASE, TASKS, rule=rule, purify=["pact", "dare"], scale=1.0)
    one, three = dict(checked.merged()), dict(checked.merged(mapper=mp.threads(3)))
    assert list(one) == list(three) == list(BASE)
    assert all(torch.equal(one[name], three[name]) for name in BASE)


@pytest.mark.parametrize(("room", "together"), [(math.inf, 3), (32, 2), (20, 1), (1, 1)])
def test_tensors_in_work_fit_into_the_room(room: float, together: int):
    steps = [mp.Step(str(i), (4, 4), torch.float32, "matrix", (), "ties") for i in range(9)]
    barrier, running, most = threading.Lock(), set(), []

    def work(step: mp.Step) -> str:
        with barrier:
            running.add(step.name)
            most.append(len(running))
        time.sleep(0.02)
        with barrier:
            running.remove(step.name)
        return step.name

    assert list(mp.threads(3, room)(work, steps)) == [step.name for step in steps]
    assert max(most) == together


@pytest.mark.parametrize("block", [1, 7, 30, 64])
def test_the_lower_triangle_of_a_gram_matrix_is_whole(block: int):
    x = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(merging._gram(x, block).tril(), (x.mT @ x).tril(), atol=1e-12)


def test_singular_vectors_wider_than_one_block():
    x = torch.randn(300, 290, generator=torch.Generator().manual_seed(0))
    u, s, v = merging._leading_svd(x, 290, "exact", None)
    assert torch.allclose(s, torch.linalg.svdvals(x.double()), rtol=1e-8)
    assert torch.allclose(u * s @ v.mT, x.double(), atol=1e-9)


def test_an_early_end_does_not_wait_for_what_has_not_begun():
    steps = [mp.Step(str(i), (), torch.float32, "vector", (), "mean") for i in range(8)]
    begun: list[str] = []

    def work(step: mp.Step) -> str:
        begun.append(step.name)
        time.sleep(0.05)
        return step.name

    merged = mp.threads(2)(work, steps)
    assert next(merged) == "0"
    merged.close()
    assert len(begun) < len(steps)


def test_an_error_in_a_worker_comes_out():
    spoilt = [task | {"visual.proj": torch.full((16, 12), math.nan)} for task in TASKS]
    with pytest.raises(mp.MergeError, match=r"'visual\.proj' of task '0' holds NaN"):
        dict(mp.plan(BASE, spoilt).merged(mapper=mp.threads(2)))


def test_parts_of_a_plan_add_up_to_the_whole():
    checked = mp.plan(BASE, TASKS, rule="ties")
    whole = dict(checked.merged())
    parts = [list(BASE)[::2], list(BASE)[1::2]]
    alone: list[Tensor] = []
    next(checked.merged(combine=lambda counts: alone.append(counts) or counts))
    firsts = [first_counts(checked, part) for part in parts]
    assert torch.equal(sum(firsts), alone[0])
    later = iter(alone)
    merged = dict(checked.merged(names=parts[0], combine=lambda _: next(later)))
    assert list(merged) == parts[0]
    assert all(torch.equal(merged[name], whole[name]) for name in merged)


def first_counts(checked: mp.Plan, part: list[str]) -> Tensor:
    """What one process counts by itself in the first pass."""
    seen: list[Tensor] = []
    next(checked.merged(names=part, combine=lambda counts: seen.append(counts) or counts))
    return seen[0]


def test_mappings_hear_of_the_next_tensor():
    base = Recorded(BASE)
    dict(mp.plan(base, TASKS).merged())
    assert base.asked == [*list(BASE)[1:], list(BASE)[-1]]


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
    wide = mp.merged_delta(base, tuned, weights=weights.tolist())["w"]
    assert torch.equal(wide, (D * weights[:, None, None]).sum(0))
    for scope in ("global", "tensor"):
        delta = mp.merged_delta(base, tuned, rule="ties", options={"ties": {"scope": scope}})
        assert torch.equal(delta["w"], mp.ties(D))
    assert torch.equal(mp.merged_delta(base, tuned, rule="iso_c")["w"], mp.iso_c(D))
    tuned[1]["w"][-1, -1] = math.nan
    with pytest.raises(mp.MergeError, match="'w' of task '1' holds NaN"):
        mp.merge(base, tuned)
