"""The least-squares family: WUDI, SWUDI, RegMean, Fisher merging, ACE-Merging, the Wiener filter and PAVE."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import close, data_of, normal, problem, same, single, small_model
from minipact import plain
from minipact.least_squares import allocated_ranks

BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def low_ranks(m: int, n: int, rank: int, tasks: int) -> Tensor:
    """Task matrices [tasks, m, n] of a rank."""
    factors = [(normal(m, rank, seed=t), normal(rank, n, seed=50 + t)) for t in range(tasks)]
    return torch.stack([a @ b for a, b in factors])


def matrices(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---- WUDI ----------------------------------------------------------------------------------------


def interference(M: Tensor, D: Tensor) -> Tensor:
    """WUDI's loss: what M does otherwise than D_i on the rows of D_i."""
    return (((M - D) @ D.mT).square().sum((1, 2)) / D.square().sum((1, 2))).sum()


@pytest.mark.parametrize("function", [mp.wudi, plain.wudi])
def test_wudi_by_hand(function):
    """M keeps [1, 0] -> [2, 0] of the first task and [1, 1] -> [0, 2] of the second."""
    D = matrices([[2, 0], [0, 0]], [[0, 0], [1, 1]])
    assert torch.allclose(function(D, ridge=0), matrices([[2, -2], [0, 2]])[0])
    D = matrices([[2, 0], [0, 0]], [[0, 0], [0, 3]])  # the Gram sum is the identity
    assert torch.allclose(function(D, ridge=0.25), D.sum(0) / 1.25)


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12)])
def test_wudi_gives_one_task_back(m: int, n: int):
    _, D = problem(m, n, tasks=1)
    assert torch.allclose(mp.wudi(D, ridge=0), D[0], atol=1e-12)
    with_zero = torch.cat([D, torch.zeros_like(D)])
    assert torch.allclose(mp.wudi(with_zero, ridge=0), D[0], atol=1e-12)
    assert not mp.wudi(torch.zeros_like(with_zero)).any()
    single_precision = mp.wudi(low_ranks(m, n, 2, 1).float(), ridge=0)
    assert torch.allclose(single_precision, low_ranks(m, n, 2, 1)[0].float(), atol=1e-4)


def test_a_zero_update_adds_nothing_to_wudi():
    _, D = problem()
    with_zero = torch.cat([D, torch.zeros_like(D[:1])])
    assert torch.allclose(mp.wudi(with_zero), mp.wudi(D), atol=1e-12)


def test_wudi_leaves_nothing_where_row_spaces_are_independent():
    D = low_ranks(15, 12, rank=3, tasks=4)
    M = mp.wudi(D, ridge=0)
    assert ((M - D) @ D.mT).abs().max() < 1e-10 * (D @ D.mT).abs().max()
    assert interference(mp.wudi(D, ridge=1e-6), D) > interference(M, D)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_wudi_is_where_the_gradient_vanishes(rank: int):
    """Also where the rows of all tasks do not span the inputs: 2 * 3 < 12."""
    D = low_ranks(10, 12, rank, tasks=3)
    M = mp.wudi(D, ridge=0)
    norms = D.square().sum((1, 2), keepdim=True)
    assert ((M - D) @ D.mT @ D / norms).sum(0).abs().max() < 1e-10
    rows = D.flatten(0, 1)
    assert torch.allclose(M @ torch.linalg.pinv(rows) @ rows, M, atol=1e-10)  # nothing outside


def test_descent_from_the_sum_does_not_go_below_wudi():
    _, D = problem(10, 8, tasks=4)
    D = 10 * D
    M = D.sum(0).clone().requires_grad_()
    before = interference(M.detach(), D)
    optimizer = torch.optim.Adam([M], lr=1e-2)
    for _ in range(2000):
        optimizer.zero_grad()
        interference(M, D).backward()
        optimizer.step()
    reached, least = interference(M.detach(), D), interference(mp.wudi(D, ridge=0), D)
    assert least <= reached < before
    assert reached < 1.01 * least


def test_wudi_turns_with_inputs_and_outputs():
    _, D = problem()
    u, v = orthogonal(40, 1), orthogonal(30, 2)
    for ridge in (1e-3, 0):
        turned = mp.wudi(u @ D @ v, ridge=ridge)
        assert torch.allclose(turned, u @ mp.wudi(D, ridge=ridge) @ v, atol=1e-9)


# ---- SWUDI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mp.swudi, plain.swudi])
def test_swudi_by_hand(function):
    """The Gram sum is the identity, so each direction is filled by 1 - exp(-time)."""
    D = matrices([[2, 0], [0, 0]], [[0, 0], [0, 3]])
    assert torch.allclose(function(D, time=0.5), (1 - math.exp(-0.5)) * D.sum(0))
    # Squared singular values 8/9, 1/9 and 1 of G are 8/6, 1/6 and 3/2 in units of their mean, 2/3.
    D = matrices([[4, 0, 0], [0, 2**0.5, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 5]])
    filled = 1 - torch.exp(-torch.tensor([8 / 6, 1 / 6, 3 / 2]).double())
    assert torch.allclose(function(D, time=1.0), D.sum(0) * filled)
    assert torch.allclose(
        function(D, time=1e9, rank=1), torch.diag(torch.tensor([0, 0, 5.0]).double())
    )
    assert torch.allclose(function(D, time=1e9, rank="energy:0.9"), D.sum(0) * filled.ge(0.5))


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12)])
def test_swudi_is_gradient_flow_from_zero(m: int, n: int):
    """Many short steps along WUDI's gradient, in units of the mean eigenvalue of G."""
    D = normal(3, m, n)
    norms = D.square().sum((1, 2), keepdim=True)
    G = (D.mT @ D / norms).sum(0)
    unit, steps, time = G.trace() / n, 20000, 2.0
    M = torch.zeros(m, n).double()
    for _ in range(steps):
        M -= time / unit / steps * ((M - D) @ D.mT @ D / norms).sum(0)
    assert torch.allclose(mp.swudi(D, time=time), M, atol=1e-3)


def test_swudi_tends_to_wudi_and_starts_at_zero():
    D = low_ranks(10, 12, 2, tasks=3)
    assert torch.allclose(mp.swudi(D, time=1e12), mp.wudi(D, ridge=0), atol=1e-8)
    losses = [interference(mp.swudi(D, time=time), D) for time in (1e-6, 0.1, 1, 10, 1e6)]
    assert losses == sorted(losses, reverse=True)
    assert mp.swudi(D, time=1e-9).norm() < 1e-6 * D.norm()


def test_swudi_of_one_task_and_of_zero_updates():
    D = low_ranks(9, 6, 2, tasks=1)
    assert torch.allclose(mp.swudi(D, time=1e9), D[0], atol=1e-9)
    with_zero = torch.cat([D, torch.zeros_like(D)])
    assert torch.allclose(mp.swudi(with_zero), mp.swudi(D), atol=1e-12)
    assert not mp.swudi(torch.zeros_like(with_zero)).any()


def test_swudi_turns_with_inputs_and_outputs():
    _, D = problem()
    u, v = orthogonal(40, 1), orthogonal(30, 2)
    for rank in (None, 5):
        turned = mp.swudi(u @ D @ v, rank=rank)
        assert torch.allclose(turned, u @ mp.swudi(D, rank=rank) @ v, atol=1e-9)


# ---- RegMean and Fisher merging ------------------------------------------------------------------


def covariances(D: Tensor, seed: int = 0) -> Tensor:
    """Of full rank, [T, n, n]."""
    T, _, n = D.shape
    X = normal(T, 3 * n, n, seed=seed)
    return X.mT @ X / (3 * n)


@pytest.mark.parametrize("function", [mp.regmean, plain.regmean])
def test_regmean_by_hand(function):
    """Task 1 sees input 1 thrice as often as task 2, and input 2 as often."""
    D = matrices([[4, 2], [0, 2]], [[0, 4], [8, 0]])
    C = matrices([[3, 0], [0, 1]], [[1, 0], [0, 1]])
    assert torch.allclose(function(D, C), matrices([[3, 3], [2, 1]])[0])
    # [[2, 2], [2, 2]] with half its sides is [[2, 1], [1, 2]], the sum with the identity [[3, 1], [1, 3]]
    C = matrices([[2, 2], [2, 2]], [[1, 0], [0, 1]])
    D = matrices([[1, 0], [0, 0]], [[0, 0], [0, 1]])
    expected = matrices([[2, 1], [0, 1]])[0] @ matrices([[3, -1], [-1, 3]])[0] / 8
    assert torch.allclose(function(D, C, off_diagonal=0.5), expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_solves_its_least_squares_problem(off_diagonal: float):
    _, D = problem(12, 9)
    C = covariances(D)
    M = mp.regmean(D, C, off_diagonal=off_diagonal)
    shrunk = off_diagonal * C + (1 - off_diagonal) * torch.diag_embed(C.diagonal(dim1=1, dim2=2))
    assert ((M - D) @ shrunk).sum(0).abs().max() < 1e-12
    W0 = normal(12, 9, seed=8)
    weights = ((W0 + D) @ shrunk).sum(0) @ torch.linalg.inv(shrunk.sum(0))
    assert torch.allclose(W0 + M, weights, atol=1e-10), "on weights as on updates"


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 8, 8), (10, 12, 2)])
def test_regmean_with_the_grams_of_the_updates_is_wudi(m: int, n: int, rank: int):
    D = low_ranks(m, n, rank, tasks=3)
    grams = D.mT @ D / D.square().sum((1, 2), keepdim=True)
    assert torch.allclose(mp.regmean(D, grams, off_diagonal=1.0), mp.wudi(D, ridge=0), atol=1e-8)


def test_regmean_of_one_task_and_of_equal_inputs():
    _, D = problem(12, 9)
    C = covariances(D)
    assert torch.allclose(mp.regmean(D[:1], C[:1]), D[0], atol=1e-12)
    assert torch.allclose(mp.regmean(D, C[:1].expand(4, 9, 9)), D.mean(0), atol=1e-12)
    order = [2, 0, 3, 1]
    assert torch.allclose(mp.regmean(D[order], C[order]), mp.regmean(D, C), atol=1e-12)
    assert torch.allclose(mp.regmean(3 * D, 5 * C), 3 * mp.regmean(D, C), atol=1e-12)
    assert not mp.regmean(D, 0 * C).any()


@pytest.mark.parametrize("function", [mp.fisher_merge, plain.fisher_merge])
def test_fisher_merging_by_hand(function):
    D = torch.tensor([[8.0, 4.0, 2.0], [0.0, 2.0, 6.0]])
    F = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert function(D, F).tolist() == [6.0, 4.0, 4.0]
    assert torch.allclose(function(D, 1e-30 * F), function(D, F))
    assert torch.equal(function(D[:1], F[:1]), D[0])
    assert torch.equal(function(D, torch.ones(2, 3)), D.mean(0))


def test_statistics_that_do_not_fit_are_refused():
    _, D = problem(12, 9)
    C = covariances(D)
    for call, message in (
        (lambda: mp.regmean(D, C[:2]), r"covariance \[2, 9, 9\] does not fit D"),
        (lambda: mp.regmean(D.mT, C), "give .T, n, n."),
        (lambda: mp.regmean(D, C / 0), "NaN"),
        (
            lambda: mp.regmean(D, -C),
            "covariance is negative on its diagonal: see minipact.input_cov",
        ),
        (lambda: mp.regmean(D, list(C)), "covariance must be a tensor, not list"),
        (lambda: mp.fisher_merge(D, list(D.abs())), "fisher must be a tensor, not list"),
        (lambda: mp.regmean(D, C, off_diagonal=1.1), "off_diagonal=1.1 must lie between"),
        (lambda: mp.fisher_merge(D, D.abs()[:1]), r"fisher \[1, 12, 9\] does not fit"),
        (lambda: mp.fisher_merge(D, D), "negative"),
        (lambda: mp.fisher_merge(D, D * math.nan), "NaN"),
    ):
        with pytest.raises(mp.MergeError, match=message):
            call()


# ---- ACE-Merging ---------------------------------------------------------------------------------


def ace_slowly(D: Tensor, epsilon: float) -> Tensor:
    """Entry by entry, for updates that all have a covariance and full rank."""
    T, m, n = D.shape
    logs = [math.log(sum(float(x) ** 2 for x in d.flatten())) for d in D]
    mean = sum(logs) / T
    variance = sum((x - mean) ** 2 for x in logs) / max(1, T - 1)
    uneven = variance / (mean**2 + 1e-12) > 0.3
    centred, covariances, loads = [], [], []
    for d in D:
        z = torch.stack([d[i] - sum(d[k] for k in range(m)) / m for i in range(m)])
        S = sum(torch.outer(z[i], z[i]) for i in range(m))
        trace = sum(float(S[i, i]) for i in range(n)) if uneven else 1.0
        centred.append(z)
        covariances.append(S / trace)
        loads.append(epsilon / trace * torch.eye(n).double())
    numerator, denominator = torch.zeros(m, n).double(), torch.zeros(n, n).double()
    for z, S, load in zip(centred, covariances, loads, strict=True):
        numerator += z @ (S + load)
        denominator += S + load
    total = sum(covariances)
    mean_row = sum(total[i] for i in range(n)) / n
    if uneven:
        mean_row = mean_row / (sum(math.exp(x) for x in logs) / T)
    M = numerator @ torch.linalg.inv(denominator + torch.stack([mean_row] * n))
    if uneven:
        residual = sum(d @ (S - denominator / T) for d, S in zip(D, covariances, strict=True))
        u, s, vh = torch.linalg.svd(M + residual, full_matrices=False)
        k = int(0.3 * min(m, n))
        M = M + s[:k].mean() * u[:, :k] @ vh[:k]
    return M


@pytest.mark.parametrize("function", [mp.ace, plain.ace])
def test_ace_by_hand(function):
    """Both tasks have squared norm 2 after centring, and two outputs that differ; epsilon is 1.

    The covariances are diag(2, 0) and diag(0, 2), loaded diag(3, 1) and diag(1, 3), their sum 4 I; the mean
    row of 2 I is [1, 1]. So M = [[3, 3], [-3, -3]] [[5, 1], [1, 5]]^-1.
    """
    D = matrices([[1, 0], [-1, 0]], [[0, 1], [0, -1]])
    expected = matrices([[0.5, 0.5], [-0.5, -0.5]])[0]
    assert torch.allclose(function(D, epsilon=1.0), expected)
    assert torch.allclose(function(D + 3, epsilon=1.0), expected)  # the mean output does not count


@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12)])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1, 2, 1], [0.01, 0.1, 3, 100], [1, 1e3, 1, 1]])
@pytest.mark.parametrize("epsilon", [1e-2, 1.0])
def test_ace_against_the_equations(m: int, n: int, sizes: list[float], epsilon: float):
    D = normal(4, m, n) * torch.tensor(sizes).double()[:, None, None]
    expected = ace_slowly(D, epsilon)
    assert torch.allclose(mp.ace(D, epsilon=epsilon), expected, rtol=1e-8, atol=1e-8)


def test_ace_of_one_task():
    """M (S + epsilon I + C) = Z (S + epsilon I), Z being the update less its mean row."""
    D = normal(1, 9, 6)
    z = D[0] - D[0].mean(0)
    loaded = z.mT @ z + 0.01 * torch.eye(6).double()
    solved = mp.ace(D) @ (loaded + (z.mT @ z).mean(0))
    assert torch.allclose(solved, z @ loaded, atol=1e-9)
    assert torch.allclose(mp.ace(torch.cat([D] * 3)), mp.ace(D), atol=1e-12)
    unit = D / D.norm()  # its log norm is 0
    for sizes in ([1, 1, 1], [1]):
        found = mp.ace(torch.cat([unit] * len(sizes)))
        assert torch.allclose(found, ace_slowly(unit, 1e-2), atol=1e-9)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [0.01, 1, 100]])
def test_ace_leaves_out_what_has_no_covariance(sizes: list[float]):
    D = normal(3, 9, 6) * torch.tensor(sizes).double()[:, None, None]
    equal_rows = normal(1, 1, 6).expand(1, 9, 6)
    with_idle = torch.cat([D, torch.zeros_like(D), equal_rows])
    assert torch.allclose(mp.ace(with_idle), mp.ace(D), atol=1e-12)
    assert not mp.ace(torch.zeros_like(D)).any()
    assert not mp.ace(equal_rows).any()


# ---- The Wiener filter ---------------------------------------------------------------------------

SIDES = ("both", "output", "input")


def needs_and_claims(D: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """A_j and B_j [T, m, m] of the output side, from their definitions."""
    T, m, _ = D.shape
    C = [m * d @ d.mT / (d @ d.mT).trace() if d.any() else torch.zeros(m, m).double() for d in D]
    others = [sum(c for i, c in enumerate(C) if i != j) / (T - 1) for j in range(T)]
    return torch.stack(C) + ridge * torch.eye(m).double(), torch.stack(others)


def weights_of(D: Tensor, ridge: float, side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B of the output side and a, b of the input side for every task; identities where left out."""
    T, m, n = D.shape
    A, B = needs_and_claims(D, ridge)
    a, b = needs_and_claims(D.mT, ridge)
    if side == "input":
        A = B = torch.eye(m).double().expand(T, m, m)
    if side == "output":
        a = b = torch.eye(n).double().expand(T, n, n)
    return A, B, a, b


@pytest.mark.parametrize("function", [mp.wiener, plain.wiener])
def test_wiener_by_hand(function):
    """Task 1 needs A = a = diag(3, 1), task 2 claims I on both sides: 5 becomes 5 * 9 / (9 + 2).

    Task 2 writes where task 1 reads, and reads where it writes, but never both at once: it stays.
    """
    D = matrices([[5, 0], [0, 0]], [[0, 1], [-1, 0]])
    expected = matrices([[45 / 11, 0], [0, 0]], [[0, 1], [-1, 0]])
    assert torch.allclose(function(D, claims=2.0, ridge=1.0), expected)
    # the output side alone: A = diag(3, 1) against 2 I, and 2 I against diag(4, 0)
    expected = matrices([[3, 0], [0, 0]], [[0, 1 / 3], [-1, 0]])
    assert torch.allclose(function(D, claims=2.0, ridge=1.0, side="output"), expected)
    expected = matrices([[3, 0], [0, 0]], [[0, 1], [-1 / 3, 0]])
    assert torch.allclose(function(D, claims=2.0, ridge=1.0, side="input"), expected)


def test_wiener_without_claims_is_the_identity():
    _, D = problem()
    assert torch.equal(mp.wiener(D, claims=0), D)
    assert torch.equal(mp.wiener(D[:1]), D[:1])
    alone = torch.cat([D[:1], torch.zeros_like(D[:2])])
    assert torch.allclose(mp.wiener(alone), alone, atol=1e-12)
    assert not mp.wiener(torch.zeros_like(D)).any()
    changed = mp.wiener(D, claims=0)
    changed += 1
    assert not torch.equal(changed, D), "the result is a new tensor"


def test_wiener_leaves_alone_what_others_claim_on_one_side_only():
    u, v = orthogonal(12, 1).split(4, dim=1), orthogonal(12, 2)
    D = torch.stack([a @ normal(4, 12, seed=i) for i, a in enumerate(u)])  # own outputs
    for side in ("both", "output"):
        assert torch.allclose(mp.wiener(D, side=side), D, atol=1e-10)
    assert not torch.allclose(mp.wiener(D, side="input"), D, atol=0.1)
    D = torch.stack([normal(12, 4, seed=i) @ b.mT for i, b in enumerate(v.split(4, dim=1))])
    for side in ("both", "input"):
        assert torch.allclose(mp.wiener(D, side=side), D, atol=1e-10)
    assert not torch.allclose(mp.wiener(D, side="output"), D, atol=0.1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ridge", [3.0, 0.01])
def test_wiener_solves_its_least_squares_problem(side: str, ridge: float):
    D = torch.cat([normal(3, 9, 7), torch.zeros(1, 9, 7).double()])
    X = mp.wiener(D, claims=7.0, ridge=ridge, side=side)
    A, B, a, b = weights_of(D, ridge, side)
    half_gradient = A @ (X - D) @ a + 7.0 * B @ X @ b
    assert half_gradient.abs().max() < 1e-10 * (A @ D @ a).abs().max()
    assert not X[3].any()

    def objective(x: Tensor) -> Tensor:
        own = ((x - D) * (A @ (x - D) @ a)).sum((1, 2))
        return own + 7.0 * (x * (B @ x @ b)).sum((1, 2))

    for seed, size in itertools.product(range(5), (1e-3, 1.0)):
        assert (objective(X + size * normal(*X.shape, seed=seed)) > objective(X)).all()


def test_the_sum_behind_the_input_side_tends_to_wudi():
    D = normal(3, 12, 8)
    filtered = mp.wiener(D, claims=2.0, ridge=1e-9, side="input")
    assert torch.allclose(filtered.sum(0), mp.wudi(D, ridge=0), atol=1e-6)


def test_for_two_tasks_the_sum_solves_for_both_at_once():
    """K_1 (M - D_1) + K_2 (M - D_2) = 0 with K_i (M) = C_i M c_i, which needs no mean of others."""
    D = normal(2, 7, 7)
    M = mp.wiener(D, claims=1.0, ridge=1e-9).sum(0)
    A, _, a, _ = weights_of(D, 0.0, "both")
    residual = (A @ (M - D) @ a).sum(0)
    assert residual.abs().max() < 1e-5 * (A @ D @ a).abs().max()


@pytest.mark.parametrize("side", SIDES)
def test_the_size_of_a_task_is_its_own_affair(side: str):
    _, D = problem(12, 9)
    sizes = torch.tensor([1, 1e-3, 50, 1]).double()[:, None, None]
    assert torch.allclose(
        mp.wiener(sizes * D, side=side), sizes * mp.wiener(D, side=side), rtol=1e-9
    )


@pytest.mark.parametrize("side", SIDES)
def test_wiener_turns_with_inputs_and_outputs_and_knows_no_order(side: str):
    _, D = problem(12, 9)
    u, v = orthogonal(12, 1), orthogonal(9, 2)
    turned = mp.wiener(u @ D @ v, side=side)
    assert torch.allclose(turned, u @ mp.wiener(D, side=side) @ v, atol=1e-10)
    order = [2, 0, 3, 1]
    found = mp.wiener(D[order], side=side)
    assert torch.allclose(found, mp.wiener(D, side=side)[order], atol=1e-12)


def test_heavy_claims_take_the_others_directions_out():
    D = low_ranks(20, 14, rank=2, tasks=4)
    for j, d in enumerate(mp.wiener(D, claims=1e9, side="output")):
        others = torch.cat([D[i] for i in range(4) if i != j], dim=1)
        u, s, _ = torch.linalg.svd(others)
        taken = u[:, : int((s > 1e-9 * s[0]).sum())]
        assert taken.shape == (20, 6)
        assert (taken.mT @ d).abs().max() < 1e-6
        kept = D[j] - taken @ taken.mT @ D[j]
        assert d.norm() > 0.3 * kept.norm()


def test_heavy_claims_on_both_sides_leave_what_no_other_both_reads_and_writes():
    D = low_ranks(20, 14, rank=2, tasks=4)
    for j, d in enumerate(mp.wiener(D, claims=1e9)):
        rest = [D[i] for i in range(4) if i != j]
        outputs, inputs = torch.cat(rest, dim=1), torch.cat(rest, dim=0).mT
        U, V = (torch.linalg.svd(x).U[:, :6] for x in (outputs, inputs))
        assert (U.mT @ d @ V).abs().max() < 1e-6
        assert d.norm() > 0.3 * D[j].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_tasks_is_kept(dtype: torch.dtype):
    D = single(3, 8, 6).to(dtype)
    before = D.clone()
    exact = mp.wiener(D.double())
    found = mp.wiener(D)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(dtype).eps)
    for rule in (mp.wudi, mp.swudi, mp.ace):
        assert rule(D).dtype == dtype
        assert torch.allclose(rule(D).double(), rule(D.double()), rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(D, before)


@pytest.mark.parametrize(
    "rule", ["task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "wudi", "ace"]
)
def test_wiener_stands_in_front_of_any_rule(rule: str):
    merged = mp.Merged(BASE, TASKS, rule=rule, purify=["wiener"], scale=1.0)
    D = {
        n: torch.stack([task[n] - BASE[n] for task in TASKS])
        for n in ("visual.mlp.c_fc.weight", "visual.proj")
    }
    function = mp.METHODS[rule].function
    if rule != "ties":  # which trims over the whole model
        name = "visual.mlp.c_fc.weight"
        assert torch.equal(merged.delta(name), function(mp.wiener(D[name])))
    assert merged.steps["visual.proj"].purify == ("wiener",)
    assert merged.steps["visual.mlp.c_fc.bias"].treatment == "mean, unscaled"
    assert same(merged, mp.merge(BASE, TASKS, rule=rule, purify=[mp.wiener], scale=1.0))


def test_wiener_needs_no_base():
    zeros = {name: torch.zeros_like(x) for name, x in BASE.items()}
    tasks = [{n: x - BASE[n] for n, x in task.items()} for task in TASKS]
    merged = mp.merge(zeros, tasks, rule="task_arithmetic", purify="wiener", scale=1.0)
    D = torch.stack([task["visual.proj"] for task in tasks])
    assert torch.equal(merged["visual.proj"], mp.wiener(D.mT).mT.sum(0))


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda D: mp.wudi(D[0]), r"\[T, m, n\]"),
        (lambda D: mp.ace(D.long()), "floating-point"),
        (lambda D: mp.wiener(D[:0]), r"\[T, m, n\]"),
        (lambda D: mp.wudi(D * math.nan), "NaN"),
        (lambda D: mp.ace(D / 0), "NaN"),
        (lambda D: mp.wiener(D / 0), "NaN"),
        (lambda D: mp.wudi(D, ridge=-1), "ridge=-1 must be 0, or from 1e-9 on: give 0"),
        (lambda D: mp.wudi(D, ridge=math.nan), "ridge=nan"),
        (lambda D: mp.swudi(D, time=0), "time=0 must be above 0: give a number such as 1000"),
        (lambda D: mp.swudi(D / 0), "NaN"),
        (lambda D: mp.swudi(D, rank=-1), "rank -1 does not fit"),
        (lambda D: mp.ace(D, epsilon=0), "epsilon=0 must be above 0: give a small number"),
        (lambda D: mp.wiener(D, ridge=0), "ridge=0 must be above 0: give a number such as 1"),
        (lambda D: mp.wiener(D, ridge=math.inf), "ridge=inf"),
        (lambda D: mp.wiener(D, claims=-2), "claims=-2 must be 0 or more: give 0 to leave"),
        (lambda D: mp.wiener(D, claims=math.nan), "claims=nan must be 0 or more"),
        (lambda D: mp.wiener(D[:1], claims=-2), "claims=-2"),
        (lambda D: mp.wiener(D, side="left"), "side 'left' is unknown"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(mp.MergeError, match=message):
        call(problem()[1])


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 1, 1)])
def test_empty_and_tiny_matrices(shape: tuple[int, int, int]):
    D = torch.ones(shape).double()
    assert mp.wiener(D).shape == shape
    assert mp.wudi(D).shape == mp.wudi(D, ridge=0).shape == mp.ace(D).shape == shape[1:]


def test_the_registry_says_whose_it_is():
    assert mp.METHODS["wiener"].source == "minipact, unpublished"
    assert "unpublished" in (mp.wiener.__doc__ or "")
    assert "arXiv 2503.08099" in mp.METHODS["wudi"].source
    assert "arXiv 2603.02945" in mp.METHODS["ace"].source


# ---- PAVE ----------------------------------------------------------------------------------------


def tuned_problem(m: int, n: int, tasks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Task matrices, fine-tuned weights and covariances of their inputs."""
    W0, D = problem(m, n, tasks=tasks)
    return D, W0 + D, covariances(D)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9), (1, 5)])
def test_pave_with_all_directions_changes_nothing(shape: tuple[int, int]):
    D, tuned, C = tuned_problem(*shape)
    assert torch.equal(mp.pave(D, tuned, C, rho=1.0), D)
    assert torch.equal(mp.pave(D.float(), tuned.float(), C.float(), rho=1.0), D.float())


def test_pave_is_the_truncated_svd_where_inputs_are_alike_in_all_directions():
    D, tuned, _ = tuned_problem(12, 8, tasks=1)
    C = 3.0 * torch.eye(8).double()[None]
    u, s, vh = torch.linalg.svd(tuned[0], full_matrices=False)
    found = mp.pave(D, tuned, C, rho=0.75)  # less than 6 of 8 are to be left
    expected = u[:, :5] * s[:5] @ vh[:5] - (tuned - D)[0]
    assert close(found[0], expected)


def test_pave_s_weights_are_the_closest_of_their_rank_on_what_the_layer_sees():
    D, tuned, C = tuned_problem(12, 8, tasks=1)
    seen = C[0] + 0.1 * torch.eye(8)
    kept = tuned + mp.pave(D, tuned, C, rho=0.6) - D
    assert torch.linalg.matrix_rank(kept[0]) == 4
    error = torch.linalg.norm((tuned - kept)[0] @ seen)
    spectrum = torch.linalg.svdvals(tuned[0] @ seen)
    assert close(error, spectrum[4:].norm())
    u, s, vh = torch.linalg.svd(tuned[0], full_matrices=False)
    plain_cut = (u[:, :4] * s[:4] @ vh[:4] - tuned[0]) @ seen
    assert error < plain_cut.norm()


def test_pave_errs_less_the_more_it_keeps():
    D, tuned, C = tuned_problem(16, 12)
    seen = C + 0.1 * torch.eye(12)
    errors = [
        torch.linalg.norm((D - mp.pave(D, tuned, C, rho=rho)) @ seen, dim=(1, 2))
        for rho in (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    ]
    sums = [float(x.square().sum()) for x in errors]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] == 0
    assert len(set(sums)) == len(sums)


def test_ranks_are_shared_out_by_the_size_of_what_goes():
    """Of 2 x 4 directions at least one goes for rho = 1, two for 7/8; each task may lose two at most."""
    spectra = torch.tensor([[1.0, 0.9, 0.8, 0.7], [1.0, 0.3, 0.2, 0.1]])
    assert allocated_ranks(spectra, 1.0) == [4, 4]
    assert allocated_ranks(spectra, 0.8) == [4, 2]
    assert allocated_ranks(spectra, 0.75) == [3, 2]  # 1.5 x 1 rounds to two
    assert allocated_ranks(spectra.flip(0), 0.8) == [2, 4]
    assert allocated_ranks(torch.ones(1, 1), 0.1) == [1]


@pytest.mark.parametrize("rho", [1.0, 0.984375, 0.9, 0.5, 0.05])
@pytest.mark.parametrize(("tasks", "size"), [(1, 5), (3, 8), (4, 64), (9, 5)])
def test_one_sort_finds_the_ranks_of_the_published_loop(tasks: int, size: int, rho: float):
    spectra = normal(tasks, size).abs().sort(descending=True).values
    spectra = spectra / spectra[:, :1]
    assert allocated_ranks(spectra, rho) == plain.allocated(spectra, rho)


def test_pave_does_not_depend_on_the_order_of_tasks():
    D, tuned, C = tuned_problem(12, 8)
    found = mp.pave(D, tuned, C, rho=0.8)
    assert torch.equal(mp.pave(D.flip(0), tuned.flip(0), C.flip(0), rho=0.8), found.flip(0))


def test_what_pave_cannot_use_is_refused():
    D, tuned, C = tuned_problem(6, 4)
    for call, message in [
        (lambda: mp.pave(D, tuned, C, rho=0.0), "rho=0.0 must lie above 0 and up to 1"),
        (lambda: mp.pave(D, tuned, C, rho=1.1), "rho=1.1 must lie above 0"),
        (lambda: mp.pave(D, tuned, C, ridge=0.0), "ridge=0.0 must be above 0"),
        (lambda: mp.pave(D, tuned[:2], C), r"tuned \[2, 6, 4\] does not fit D"),
        (lambda: mp.pave(D, tuned, C[:, :3, :3]), r"covariance \[3, 3, 3\] does not fit D"),
        (lambda: mp.pave(D, tuned, C * torch.nan), "NaN"),
        (lambda: mp.pave(D, tuned, -1e30 * C), "covariance is none, but far from positive"),
    ]:
        with pytest.raises(mp.MergeError, match=message):
            call()


def test_pave_doubles_its_ridge_until_the_covariance_can_be_inverted():
    D, tuned, C = tuned_problem(6, 4, tasks=1)
    lowered = C - 0.9 * torch.eye(
        4
    )  # no covariance any more by less than what 0.1 * 2^k makes up for
    assert torch.linalg.eigvalsh(lowered)[0, 0] < -0.1
    found = mp.pave(D, tuned, lowered, rho=0.5)
    least = next(k for k in range(9) if torch.linalg.eigvalsh(lowered)[0, 0] + 0.1 * 2**k > 0)
    assert close(found, mp.pave(D, tuned, lowered, rho=0.5, ridge=0.1 * 2**least))


TUNED = dict(zip("ab", TASKS, strict=False))
GIVEN = data_of("pave", BASE, 2)


def test_pave_in_a_merge_sees_tuned_weights_and_inputs():
    recipe = {"purify": "pave", "options": {"pave": {"rho": 0.7}}, "scale": 0.5} | GIVEN
    merged = mp.Merged(BASE, TUNED, **recipe)
    for name in ("visual.mlp.c_fc.weight", "visual.proj"):
        tuned = torch.stack([task[name] for task in TUNED.values()])
        C = torch.stack([state[name] for state in GIVEN["statistics"]["covariance"]])
        if name == "visual.proj":  # stored for x @ W
            found = mp.pave((tuned - BASE[name]).mT, tuned.mT, C, rho=0.7).mT
        else:
            found = mp.pave(tuned - BASE[name], tuned, C, rho=0.7)
        assert torch.allclose(merged.delta(name), 0.5 * found.sum(0), atol=1e-6)
    expected = plain.merge(
        BASE, list(TUNED.values()), rule="task_arithmetic", **recipe | {"purify": ["pave"]}
    )
    assert all(
        torch.allclose(merged[name].float(), expected[name].float(), atol=1e-5) for name in BASE
    )


def test_collapsed_ranks_are_one_share_of_each_task_over_all_matrices():
    names = [name for name in BASE if name in GIVEN["statistics"]["covariance"][0]]
    kept, sizes = torch.zeros(2), 0
    for name in names:
        transposed = name == "visual.proj"
        tuned = torch.stack(
            [x[name].mT if transposed else x[name] for x in TUNED.values()]
        ).double()
        C = torch.stack([state[name] for state in GIVEN["statistics"]["covariance"]]).double()
        spectra = torch.linalg.svdvals(tuned @ (C + 0.1 * torch.eye(C.shape[1])))
        ranks = allocated_ranks(spectra / spectra[:, :1], 0.7)
        kept, sizes = kept + torch.tensor(ranks), sizes + spectra.shape[1]
    recipe = {
        "purify": "pave",
        "options": {"pave": {"rho": 0.7, "collapse": True}},
        "scale": 1.0,
    } | GIVEN
    merged = mp.Merged(BASE, TUNED, **recipe)
    for name in names[:2]:
        tuned = torch.stack([task[name] for task in TUNED.values()])
        C = torch.stack([state[name] for state in GIVEN["statistics"]["covariance"]])
        inputs = (tuned - BASE[name], tuned)
        if name == "visual.proj":
            inputs = tuple(x.mT for x in inputs)
        found = mp.pave(*inputs, C, rho=0.7, shares=kept / sizes).sum(0)
        found = found.mT if name == "visual.proj" else found
        assert torch.allclose(merged.delta(name), found, atol=1e-6)
    assert same(mp.merge(BASE, TUNED, threads=2, **recipe), merged)


def test_pave_comes_first_and_without_weights():
    for recipe, message in [
        ({"purify": ["pact", "pave"]}, "pave works on the fine-tuned .* undo pact: put it first"),
        ({"weights": {"a": 1, "b": 2}}, "pave works on .*, which weights cannot scale before it"),
        ({"statistics": None}, "pave needs the covariance of each task: make it by minipact stat"),
    ]:
        with pytest.raises(mp.MergeError, match=message):
            mp.Merged(BASE, TUNED, **{"purify": ["pave"], "scale": 1.0} | GIVEN | recipe)
    mp.Merged(BASE, TUNED, purify=["pave", "pact"], weights=[1, 1], scale=1.0, **GIVEN)
