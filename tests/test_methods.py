"""The methods on tensors: known answers, properties, equivalences, bad input; and their registry."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import data_of, decaying, normal, problem, rng, same, single, small_model
from minipact import methods

RULES = (
    "task_arithmetic",
    "ties",
    "consensus",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "wudi",
    "swudi",
    "knots",
)
MATRIX_RULES = (mp.tsv_m, mp.iso_c, mp.iso_cts, mp.wudi, mp.swudi)
BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]


def projector(basis: Tensor) -> Tensor:
    """On the span of orthonormal columns."""
    return basis @ basis.mT


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
    return projector(u[:, s > tol * s[0]])


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


def test_iso_and_sift_change_a_single_task():
    W0, D = problem(tasks=1)
    assert not torch.allclose(mp.iso_c(D), D[0], atol=1e-3)
    assert not torch.allclose(mp.sift(W0, D), D, atol=1e-6)


@pytest.mark.parametrize("function", [*MATRIX_RULES, mp.ace])
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


@pytest.mark.parametrize("function", [*MATRIX_RULES, mp.ace])
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


@pytest.mark.slow
@pytest.mark.parametrize(("width", "bound"), [(128, 0.001), (512, 0.05)])
def test_randomized_pact_is_as_close_as_its_docstring_says(width: int, bound: float):
    """Spectra of 1/i exactly, the documented case."""
    g = torch.Generator().manual_seed(0)
    fall = 1 / torch.arange(1, width + 1, dtype=torch.float64)

    def turned() -> Tensor:
        drawn = torch.randn(2, width, width, dtype=torch.float64, generator=g)
        left, right = torch.linalg.qr(drawn)[0]
        return left * fall @ right.mT

    W0, D = turned(), torch.stack([turned() for _ in range(3)])
    exact = mp.pact(W0, D)
    fast = mp.pact(W0, D, svd="randomized", generator=rng())
    assert 0 < (fast - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize(
    "method",
    [
        lambda D: mp.dare(D, generator=rng()),
        lambda D: mp.emr(D)[0],
        lambda D: mp.pave(D, D, torch.eye(5).expand(2, 5, 5)),
    ],
    ids=["dare", "emr", "pave"],
)
def test_differences_of_parameters_are_task_matrices(method: Callable[[Tensor], Tensor]):
    layers = [torch.nn.Linear(5, 6) for _ in range(3)]
    D = torch.stack([layer.weight - layers[0].weight for layer in layers[1:]])
    assert D.requires_grad
    assert torch.equal(method(D), method(D.detach()))


def test_sift_refuses_what_is_not_finite():
    W0, D = problem(tasks=2)
    D[0, 0, 0] = math.nan
    with pytest.raises(mp.MergeError, match="NaN or infinity"):
        mp.sift(W0, D)


def test_randomized_tsv_m_is_close():
    _, D = problem(96, 64, tasks=8)
    exact, fast = mp.tsv_m(D.float()), mp.tsv_m(D.float(), svd="randomized", generator=rng())
    assert (fast - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
def test_singular_subspaces_agree_with_lapack(shape: tuple[int, int]):
    x = decaying(*shape).float()
    u, s, v = methods.leading_triples(x, 7, "exact", None)
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
    assert methods.direction_count(rank, 100, spectrum) == count


def test_energy_rank_by_hand():
    spectrum = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [methods.direction_count(f"energy:{e}", 3, spectrum) for e in (0.6, 0.65, 0.9, 0.95, 1.0)] == [
        1, 2, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rank", [-1, 101, 1.0, 0.0, True, "energy:0", "energy:2", "energy:x", "half"]
)
def test_ranks_out_of_range(rank):
    with pytest.raises(mp.MergeError, match="rank"):
        methods.direction_count(rank, 100, torch.ones(100))


def test_thresholds_of_a_stream_are_exact():
    D = single(3, 5000)
    D[1] = D[1].round(decimals=1)  # many ties
    D[2, 1000:] = 0  # fewer numbers than are kept
    blocks = D.split(700, dim=1)
    for keep in (1, 1500, 5000):
        survey = methods.largest_magnitudes(3, keep / 5000)
        found = methods.run_survey(
            survey, lambda measure: sum(measure(D).to_dense() for D in blocks)
        )["thresholds"]
        assert torch.equal(found, D.abs().sort(dim=1, descending=True).values[:, keep - 1])


@pytest.mark.parametrize("block", [1, 7, 30, 64])
def test_the_lower_triangle_of_a_gram_matrix_is_whole(block: int):
    x = normal(50, 30)
    assert torch.allclose(methods.gram_matrix(x, block).tril(), (x.mT @ x).tril(), atol=1e-12)


def test_singular_vectors_wider_than_one_block():
    x = single(300, 290)
    u, s, v = methods.leading_triples(x, 290, "exact", None)
    assert torch.allclose(s, torch.linalg.svdvals(x.double()), rtol=1e-8)
    assert torch.allclose(u * s @ v.mT, x.double(), atol=1e-9)


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


OWN = [n for n, x in mp.METHODS.items() if x.kind != "training" and methods.is_built_in(x)]


@pytest.mark.parametrize("name", OWN)
def test_a_list_in_place_of_a_stack_is_refused(name: str):
    W0, D = problem(6, 6)
    given = {"W0": W0, "tuned": W0 + D, "covariance": D @ D.mT, "fisher": D.square()}
    function = mp.METHODS[name].function
    needed = [p.name for p in signature(function).parameters.values() if p.default is p.empty]
    rest = {key: given[key] for key in needed if key != "D"}
    function(D=100 * D, **rest)
    with pytest.raises(mp.MergeError, match="D must be a tensor, not list: torch.stack makes one"):
        function(D=list(D), **rest)


# ---- Load-bearing walls --------------------------------------------------------------------------


def test_walls_hold_what_pact_is_short_on():
    W0, D = problem()
    walls = mp.load_bearing_walls(W0, D, core=6, task=3)
    v0 = torch.linalg.svd(W0).Vh[:6].mT
    assert torch.allclose(projector(walls.frame @ walls.core), projector(v0), atol=1e-9)
    for d, update, basis in zip(D, walls.updates, walls.bases, strict=True):
        v = torch.linalg.svd(d).Vh[:3].mT
        assert torch.allclose(projector(walls.frame @ update), projector(v), atol=1e-9)
        left = v0 - v @ v.mT @ v0
        assert torch.allclose(projector(walls.frame @ basis) @ left, left, atol=1e-9)
        assert basis.shape[1] == 6
    filtered = mp.pact(W0, D, core=6, task=3)
    for j, d in enumerate(D):
        p = walls.shield(j)
        assert torch.allclose(filtered[j], d - d @ p @ p.mT, atol=1e-12)


def test_a_wall_by_hand():
    """The core is axes 0 and 1; task 0 changes axis 0, so its wall is axis 1."""
    W0 = torch.diag(torch.tensor([4.0, 3.0, 1.0, 0.0]))
    D = torch.zeros(2, 4, 4)
    D[0, 2, 0], D[1, 3, 2] = 1.0, 1.0
    walls = mp.load_bearing_walls(W0, D, core=2, task=1)
    own = [projector(walls.frame @ basis).diag().tolist() for basis in walls.bases]
    assert own == [pytest.approx([0, 1, 0, 0]), pytest.approx([1, 1, 0, 0])]
    cleared = mp.pact(W0, D, core=2, task=1)
    assert not cleared[0].any()  # all it did was on axis 0, which task 1 relies on
    assert torch.allclose(cleared[1], D[1])


# ---- Registry ------------------------------------------------------------------------------------


def stretched(D: Tensor, factor: float = 1.0) -> Tensor:
    return factor * D.sum(0)


def damped(W0: Tensor, D: Tensor, *, share: float = 0.0) -> Tensor:
    return D - share * D


@pytest.fixture
def registry() -> Iterator[dict[str, mp.Method]]:
    """METHODS, as it was before the test when that ends."""
    before = dict(mp.METHODS)
    yield mp.METHODS
    for name in mp.METHODS.keys() - before.keys():
        del mp.METHODS[name]


OPTIONS = {
    "pact": {"core": 3, "scope": "*c_fc*"},
    "sift": {"core": 3},
    "dare": {"p": 0.5},
    "task_arithmetic": {"reduce": "mean"},
    "ties": {"density": 0.5, "scope": "tensor"},
    "tsv_m": {"rank": 2},
    "iso_c": {"mean_over": "range"},
    "iso_cts": {"common": 0.5},
    "wudi": {"ridge": 0.1},
    "ace": {"epsilon": 0.1},
    "wiener": {"claims": 10.0, "side": "output", "scope": "*c_fc*"},
    "awd": {"iterations": 5, "scope": "*c_fc*"},
    "tatr": {"q": 0.5, "scope": "*c_fc*"},
    "consensus": {"keep": 1},
    "swudi": {"time": 10.0},
    "knots": {"density": 0.5, "scope": "tensor"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_an_object_of_the_registry_is_the_method(name: str, options: dict):
    method = mp.METHODS[name]
    field = "purify" if method.kind == "purifier" else "rule"
    options = {name: options.get(name, {})}
    named = mp.Merged(BASE, TASKS, **{field: name}, options=options)
    for given in (method, method.function, getattr(mp, name)):
        merged = mp.Merged(BASE, TASKS, **{field: given}, options=options)
        assert merged.recipe.digest == named.recipe.digest
        assert (merged.scale, merged.notes) == (named.scale, named.notes)
        assert same(merged, named)


def test_recommended_scales_hold_for_objects():
    assert mp.Merged(BASE, TASKS, rule=mp.task_arithmetic).scale == 0.3
    assert mp.Merged(BASE, TASKS, rule=mp.iso_cts).scale == 1.5


def test_own_functions_take_options_by_name():
    name = "visual.mlp.c_fc.weight"
    D = torch.stack([task[name] - BASE[name] for task in TASKS])
    merged = mp.Merged(
        BASE,
        TASKS,
        rule=stretched,
        purify=[damped],
        options={"stretched": {"factor": 2.0}, "damped": {"share": 0.5, "scope": "*c_fc*"}},
    )
    assert torch.allclose(merged.delta(name), D.sum(0), atol=1e-6)
    assert merged.steps["visual.proj"].purify == ()
    assert merged.recipe.options["stretched"] == {"factor": 2.0}
    with pytest.raises(mp.MergeError, match="stretched option 'x' is unknown: use 'factor'"):
        mp.Merged(BASE, TASKS, rule=stretched, options={"stretched": {"x": 1}})


@pytest.mark.parametrize("rule", [operator.itemgetter(1), partial(torch.sum, dim=0)])
def test_functions_without_a_signature_merge(rule):
    delta = mp.Merged(BASE, TASKS, rule=rule, scale=1.0).delta("visual.proj")
    D = torch.stack([task["visual.proj"] - BASE["visual.proj"] for task in TASKS])
    assert torch.equal(delta, rule(D))
    with pytest.raises(mp.MergeError, match="custom option 'dim' is unknown: use none"):
        mp.Merged(BASE, TASKS, rule=rule, options={"custom": {"dim": 0}})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rule": "pact"}, "rule 'pact' is unknown: pact is a purifier"),
        ({"rule": mp.pact}, "rule 'pact' is unknown: pact is a purifier"),
        ({"purify": "ties"}, "purifier 'ties' is unknown: ties is a rule"),
        ({"purify": [mp.METHODS["ties"]]}, "purifier 'ties' is unknown: ties is a rule"),
        ({"rule": "tsv"}, "rule 'tsv' is unknown: use 'task_arithmetic'"),
        ({"rule": "tsv_compress"}, "a per_task method: see minipact.per_task.tsv_compress"),
        ({"rule": mp.tsv_compress}, "a per_task method: see minipact.per_task.tsv_compress"),
        ({"rule": 5}, "rule 5 is neither a name nor a function"),
        ({"rule": sum}, "cannot be called 'sum'"),
        ({"rule": "nowhere:f"}, "nowhere:f cannot be imported .*: write package.module:function"),
        ({"rule": "math:nothing"}, "math:nothing cannot be imported"),
        ({"purify": ":f"}, ":f cannot be imported"),
    ],
)
def test_what_is_no_method_of_this_kind_is_refused(recipe: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Merged(BASE, TASKS, **recipe)


def test_a_registered_method_goes_by_its_name(registry: dict[str, mp.Method]):
    method = mp.Method("stretch", "rule", stretched, "no paper", scale={"any": 0.7})
    assert mp.register(method) is method is registry["stretch"]
    mp.register(method)  # a module may be imported twice
    merged = mp.Merged(BASE, TASKS, rule="stretch", options={"stretch": {"factor": 2.0}})
    assert merged.scale == 0.7
    assert merged.recipe.to_dict()["options"] == {"stretch": {"factor": 2.0}}
    again = mp.Merged(BASE, TASKS, rule=stretched, options={"stretch": {"factor": 2.0}})
    assert again.recipe.digest == merged.recipe.digest
    with pytest.raises(mp.MergeError, match="'stretch' is registered: choose another name"):
        mp.register(mp.Method("stretch", "rule", damped))
    with pytest.raises(mp.MergeError, match="'pact' is registered"):
        mp.register(mp.Method("pact", "purifier", damped))
    assert registry["stretch"] is method


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "filter"}, "own: kind 'filter' is unknown: use 'purifier', 'rule'"),
        ({"acts_on": "vector"}, "own: acts_on 'vector' is unknown: use 'matrix'"),
        ({"needs": ("data",)}, "own: needs 'data' is unknown: use 'base'"),
        ({"name": "mean"}, "cannot be called 'mean'"),
    ],
)
def test_methods_are_checked(fields: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Method(**{"name": "own", "kind": "rule", "function": stretched} | fields)


def test_functions_are_imported_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "strange_rules.py"
    module.write_text(
        "import minipact as mp\n"
        "def largest(D, factor=1.0):\n    return factor * D.amax(0)\n"
        "def halved(W0, D):\n    return D / 2\n"
        "half = mp.Method('half', 'purifier', halved, acts_on='tensor', needs=('base',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    merged = mp.Merged(
        BASE,
        TASKS,
        rule="strange_rules:largest",
        purify=["strange_rules:halved", "strange_rules:half"],
        options={"largest": {"factor": 8.0}},
        scale=1.0,
        vectors="rule",
    )
    D = torch.stack([task["visual.proj"] - BASE["visual.proj"] for task in TASKS])
    assert torch.allclose(merged.delta("visual.proj"), 2 * D.amax(0))
    assert merged.steps["visual.conv1.weight"].purify == ("half",)
    again = mp.Merged(BASE, TASKS, **mp.Recipe.from_json(merged.recipe.to_json()).keywords())
    assert same(again, merged)


def test_every_option_has_a_default_that_is_tried_out():
    for method in mp.METHODS.values():
        if method.kind in ("purifier", "rule"):
            field = "purify" if method.kind == "purifier" else "rule"
            given = data_of(method.name, BASE, len(TASKS))
            options = {method.name: method.options}
            merged = mp.Merged(BASE, TASKS, **{field: method}, options=options, **given)
            assert merged.recipe.options[method.name] == method.options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_numbers_are_finite_even_where_their_sum_is_not(dtype: torch.dtype):
    x = torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype)
    assert methods.is_finite(x)
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = x.clone()
        spoilt[60, 70] = bad
        assert not methods.is_finite(spoilt)


@pytest.mark.parametrize("place", [(0, 0), (0, 99), (99, 0), (99, 99)])
def test_one_entry_anywhere_is_no_zero(place: tuple[int, int]):
    x = torch.zeros(100, 100)
    assert methods.is_zero(x)
    assert methods.is_zero(x[:0])
    x[place] = 1e-30
    assert not methods.is_zero(x)
