"""The methods that solve a least-squares problem per matrix: WUDI, ACE-Merging and the Wiener filter."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import normal, problem, same, single, small_model
from minipact import plain

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

SIDES = [{"output": 7.0, "input": 0.0}, {"output": 0.0, "input": 7.0}]


def left_problem(D: Tensor, options: dict[str, float]) -> tuple[Tensor, float]:
    """D, and the weight of the others, of the one side in use, turned so that it is the output side."""
    return (D, options["output"]) if options["output"] else (D.mT, options["input"])


def needs_and_claims(D: Tensor, claims: float, ridge: float) -> tuple[list[Tensor], list[Tensor]]:
    """A_j and B_j [m, m] of the output side, from their definitions."""
    m = D.shape[1]
    C = [m * d @ d.mT / (d @ d.mT).trace() if d.any() else torch.zeros(m, m).double() for d in D]
    others = [[c for i, c in enumerate(C) if i != j] for j in range(len(D))]
    A = [c + ridge * torch.eye(m).double() for c in C]
    return A, [claims / (len(D) - 1) * sum(group) for group in others]


@pytest.mark.parametrize("function", [mp.wiener, plain.wiener])
def test_wiener_by_hand(function):
    """C_1 = diag(2, 0), C_2 = I: L_1 = diag(3, 1) / (diag(3, 1) + 2 I), L_2 = 2 I / (2 I + diag(4, 0))."""
    D = matrices([[5, 0], [0, 0]], [[0, 1], [-1, 0]])
    expected = matrices([[3, 0], [0, 0]], [[0, 1 / 3], [-1, 0]])
    assert torch.allclose(function(D, output=2.0, ridge=1.0), expected)
    expected = matrices([[3, 0], [0, 0]], [[0, 1], [-1 / 3, 0]])
    assert torch.allclose(function(D, output=0.0, input=2.0, ridge=1.0), expected)
    both = matrices([[9 / 5, 0], [0, 0]], [[0, 1 / 3], [-1 / 3, 0]])
    assert torch.allclose(function(D, output=2.0, input=2.0, ridge=1.0), both)


def test_wiener_without_claims_is_the_identity():
    _, D = problem()
    assert torch.equal(mp.wiener(D, output=0.0), D)
    assert torch.equal(mp.wiener(D[:1], input=3.0), D[:1])
    alone = torch.cat([D[:1], torch.zeros_like(D[:2])])
    assert torch.allclose(mp.wiener(alone, input=3.0), alone, atol=1e-12)
    assert not mp.wiener(torch.zeros_like(D)).any()
    D = D.clone()
    changed = mp.wiener(D, output=0.0)
    changed += 1
    assert not torch.equal(changed, D), "the result is a new tensor"


def test_wiener_leaves_tasks_on_orthogonal_sides_alone():
    """The output side sees orthogonal column spaces, the input side orthogonal row spaces, and only them."""
    u, v = orthogonal(12, 1).split(4, dim=1), orthogonal(12, 2)
    D = torch.stack([a @ normal(4, 12, seed=i) for i, a in enumerate(u)])
    assert torch.allclose(mp.wiener(D), D, atol=1e-10)
    assert torch.allclose(mp.wiener(D.mT, output=0.0, input=30.0), D.mT, atol=1e-10)
    assert not torch.allclose(mp.wiener(D, output=0.0, input=30.0), D, atol=0.1)
    D = torch.stack(
        [a @ normal(4, 4, seed=i) @ v[:, 4 * i : 4 * i + 4].mT for i, a in enumerate(u)]
    )
    assert torch.allclose(mp.wiener(D, input=9.0), D, atol=1e-10)


@pytest.mark.parametrize("options", SIDES)
@pytest.mark.parametrize("ridge", [3.0, 0.01])
def test_wiener_solves_its_least_squares_problem(options: dict[str, float], ridge: float):
    D = torch.cat([normal(3, 9, 7), torch.zeros(1, 9, 7).double()])
    D, claims = left_problem(D, options)
    X = left_problem(mp.wiener(left_problem(D, options)[0], **options, ridge=ridge), options)[0]
    for j, (A, B) in enumerate(zip(*needs_and_claims(D, claims, ridge), strict=True)):
        assert (A @ (X[j] - D[j]) + B @ X[j]).abs().max() < 1e-10  # half the gradient

        def objective(x: Tensor, A: Tensor = A, B: Tensor = B, d: Tensor = D[j]) -> Tensor:
            return ((x - d).mT @ A @ (x - d)).trace() + (x.mT @ B @ x).trace()

        least = objective(X[j])
        for seed, size in itertools.product(range(5), (1e-3, 1.0)):
            assert objective(X[j] + size * normal(*X[j].shape, seed=seed)) > least


def test_both_sides_see_the_given_tasks():
    D = normal(3, 9, 7)
    left = mp.wiener(D) @ torch.linalg.pinv(D)  # one L with L D = D'
    right = mp.wiener(D, output=0.0, input=5.0)
    assert torch.allclose(mp.wiener(D, input=5.0), left @ right, atol=1e-9)


def test_the_sum_behind_the_input_side_tends_to_wudi():
    D = normal(3, 12, 8)
    assert torch.linalg.cond(mp.wudi(D, ridge=0)) < 1e3
    filtered = mp.wiener(D, output=0.0, input=2.0, ridge=1e-9)
    assert torch.allclose(filtered.sum(0), mp.wudi(D, ridge=0), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"input": 4.0}, SIDES[1]])
def test_the_size_of_a_task_is_its_own_affair(options: dict[str, float]):
    _, D = problem(12, 9)
    sizes = torch.tensor([1, 1e-3, 50, 1]).double()[:, None, None]
    assert torch.allclose(
        mp.wiener(sizes * D, **options), sizes * mp.wiener(D, **options), rtol=1e-9
    )


@pytest.mark.parametrize("options", [{}, {"input": 4.0}, SIDES[1]])
def test_wiener_turns_with_inputs_and_outputs_and_knows_no_order(options: dict[str, float]):
    _, D = problem(12, 9)
    u, v = orthogonal(12, 1), orthogonal(9, 2)
    turned = mp.wiener(u @ D @ v, **options)
    assert torch.allclose(turned, u @ mp.wiener(D, **options) @ v, atol=1e-10)
    order = [2, 0, 3, 1]
    assert torch.allclose(
        mp.wiener(D[order], **options), mp.wiener(D, **options)[order], atol=1e-12
    )


def test_heavy_claims_take_the_others_directions_out():
    D = low_ranks(20, 14, rank=2, tasks=4)
    for j, d in enumerate(mp.wiener(D, output=1e9)):
        others = torch.cat([D[i] for i in range(4) if i != j], dim=1)
        u, s, _ = torch.linalg.svd(others)
        taken = u[:, : int((s > 1e-9 * s[0]).sum())]
        assert taken.shape == (20, 6)
        assert (taken.mT @ d).abs().max() < 1e-6
        kept = D[j] - taken @ taken.mT @ D[j]
        assert torch.allclose(d - taken @ taken.mT @ d, d, atol=1e-6)
        assert d.norm() > 0.3 * kept.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_tasks_is_kept(dtype: torch.dtype):
    D = single(3, 8, 6).to(dtype)
    before = D.clone()
    exact = mp.wiener(D.double(), input=1.0)
    found = mp.wiener(D, input=1.0)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(dtype).eps)
    for rule in (mp.wudi, mp.ace):
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
        (lambda D: mp.ace(D, epsilon=0), "epsilon=0 must be above 0: give a small number"),
        (lambda D: mp.wiener(D, ridge=0), "ridge=0 must be above 0: give a number such as 3"),
        (lambda D: mp.wiener(D, ridge=math.inf), "ridge=inf"),
        (lambda D: mp.wiener(D, output=-2), "output=-2 must be 0 or more: give 0 to leave"),
        (lambda D: mp.wiener(D, input=math.nan), "input=nan must be 0 or more"),
        (lambda D: mp.wiener(D[:1], output=-2), "output=-2"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(mp.MergeError, match=message):
        call(problem()[1])


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 1, 1)])
def test_empty_and_tiny_matrices(shape: tuple[int, int, int]):
    D = torch.ones(shape).double()
    assert mp.wiener(D, input=1.0).shape == shape
    assert mp.wudi(D).shape == mp.wudi(D, ridge=0).shape == mp.ace(D).shape == shape[1:]


def test_the_registry_says_whose_it_is():
    assert mp.METHODS["wiener"].source == "minipact, unpublished"
    assert "unpublished" in (mp.wiener.__doc__ or "")
    assert "arXiv 2503.08099" in mp.METHODS["wudi"].source
    assert "arXiv 2603.02945" in mp.METHODS["ace"].source
