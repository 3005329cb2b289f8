"""Methods that look at the whole task vector: AWD, TATR, Consensus TA and KnOTS."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import data_of, flat, normal, problem, same, single, small_model
from minipact import plain
from minipact.whole_vector import sensitivity, shared_basis

BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]
VECTORS = torch.stack([flat(task) - flat(BASE) for task in TASKS])


def alike(tasks: int, entries: int = 50, seed: int = 0) -> Tensor:
    """Task vectors [tasks, entries] of norms about 1 that share a part."""
    return (normal(tasks, entries, seed=seed) + 0.7 * normal(entries, seed=99)) / entries**0.5


def matrices(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---- AWD -----------------------------------------------------------------------------------------


def objective(D: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """AWD's, from its definition."""
    pairs = itertools.permutations(D - delta, 2)
    cosines = [torch.cosine_similarity(x, y, dim=0).abs() for x, y in pairs]
    return torch.stack(cosines).mean() + alpha * torch.linalg.vector_norm(delta)


def descended(D: Tensor, alpha: float, lr: float, iterations: int) -> Tensor:
    """D - delta by plain gradient descent on the whole vector; its gradient at 0 counts as 0."""
    delta = torch.zeros_like(D[0], requires_grad=True)
    for _ in range(iterations):
        (slope,) = torch.autograd.grad(objective(D, delta, alpha), delta)
        delta.data -= lr * slope
    return D - delta.detach()


@pytest.mark.parametrize("function", [mp.awd, plain.awd])
def test_a_step_of_awd_by_hand(function):
    """u = [1, 0], [1, 1] / sqrt 2 with cosine rho = 1 / sqrt 2, of norms 1 and sqrt 2.

    delta moves by lr ((u_2 - rho u_1) / 1 + (u_1 - rho u_2) / sqrt 2), so by
    lr ([0, 2] + [1, -1]) / sqrt 8.
    """
    D = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
    delta = 0.1 * torch.tensor([1.0, 1.0]).double() / 8**0.5
    assert torch.allclose(function(D, lr=0.1, iterations=1), D - delta, atol=1e-15)
    assert torch.equal(function(D, iterations=0), D)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize(
    ("alpha", "lr", "iterations"), [(0.1, 0.01, 300), (0, 0.02, 50), (2, 0.01, 99)]
)
def test_awd_is_gradient_descent_on_the_whole_vector(
    tasks: int, alpha: float, lr: float, iterations: int
):
    D = alike(tasks)
    options = {"alpha": alpha, "lr": lr, "iterations": iterations}
    assert torch.allclose(mp.awd(D, **options), descended(D, **options), atol=1e-10)


@pytest.mark.parametrize("size", [1, 3])
def test_the_objective_of_awd_decreases(size: float):
    D = size * alike(4)
    values = []
    for iterations in (0, 1, 10, 100, 300):
        delta = D[0] - mp.awd(D, iterations=iterations)[0]
        values.append(float(objective(D, delta, 0.1)))
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


def test_awd_takes_one_vector_off_all():
    D = alike(4)
    purified = mp.awd(D)
    assert torch.allclose(purified - purified[:1], D - D[:1], atol=1e-14)
    assert torch.linalg.matrix_rank(D - purified) == 1


def test_awd_knows_no_order_and_scales_with_its_units():
    D, order = alike(4), [2, 0, 3, 1]
    assert torch.allclose(mp.awd(D[order]), mp.awd(D)[order], atol=1e-12)
    scaled = mp.awd(4 * D, alpha=0.1 / 4, lr=0.01 * 16)
    assert torch.allclose(scaled, 4 * mp.awd(D), atol=1e-10)


def test_awd_leaves_alone_what_shares_nothing():
    D = alike(1)
    assert torch.equal(mp.awd(D), D)
    assert torch.equal(mp.awd(torch.zeros(3, 4)), torch.zeros(3, 4))
    apart = torch.eye(5).double()[:3]
    assert torch.equal(mp.awd(apart), apart)
    copies = torch.cat([D, D, -D])  # no direction makes their cosines smaller
    assert torch.allclose(mp.awd(copies), copies, atol=1e-12)


def test_a_zero_task_has_no_cosine_in_awd():
    D = alike(3)
    with_zero = torch.cat([D, torch.zeros_like(D[:1])])
    assert torch.allclose(mp.awd(with_zero)[:3], mp.awd(D), atol=1e-12)


def test_awd_of_a_model_is_awd_of_its_vector():
    merged = mp.Merged(BASE, TASKS, purify="awd", scale=1.0)
    found = {name: merged.delta(name) for name in BASE if BASE[name].is_floating_point()}
    assert torch.allclose(flat(found), mp.awd(VECTORS).sum(0), atol=1e-6)
    alone = mp.Merged(BASE, TASKS, purify="awd", scale=1.0, options={"awd": {"scope": "*.bias"}})
    D = torch.stack([task["visual.mlp.c_fc.bias"] - BASE["visual.mlp.c_fc.bias"] for task in TASKS])
    with pytest.raises(mp.MergeError, match="lr=0.01 oversteps for task vectors of norm 0.2"):
        alone["visual.proj"]
    with pytest.raises(mp.MergeError, match="take lr=0.00. or less"):
        mp.awd(D)


# ---- TATR ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mp.tatr, plain.tatr])
def test_tatr_by_hand(function):
    """The sensitivities 2 |a| |b| are 4, 0, 12 and 6."""
    D = matrices([[1, 5], [-3, 1]], [[2, 0], [2, -3]])
    assert sensitivity(D).tolist() == [[4, 0], [12, 6]]
    assert torch.equal(function(D, 0.75), matrices([[1, 5], [0, 1]], [[2, 0], [0, -3]]))
    assert torch.equal(function(D, 0.5), matrices([[1, 5], [0, 0]], [[2, 0], [0, 0]]))
    # With gradients [[1, 0], [0, 0]] and [[0, 1], [0, 0]] they are 1 * 2, 1 * 5, 0 and 0.
    gradient = matrices([[1, 0], [0, 0]], [[0, 1], [0, 0]])
    kept = matrices([[1, 0], [-3, 1]], [[2, 0], [2, -3]])
    assert torch.equal(function(D, 0.75, gradient=gradient), kept)


def test_the_sensitivity_is_a_sum_over_pairs():
    D, g = normal(4, 6, 5), normal(4, 6, 5, seed=1).abs()
    pairs = sum(g[i] * D[j].abs() for i, j in itertools.permutations(range(4), 2))
    assert torch.allclose(sensitivity(D, g), pairs, atol=1e-12)


@pytest.mark.parametrize("q", [0.001, 0.25, 0.99, 1.0])
def test_tatr_keeps_the_stated_number_of_entries(q: float):
    D = normal(3, 1000)
    kept = mp.tatr(D, q) != 0
    assert kept.sum(1).tolist() == [max(1, int(q * 1000))] * 3
    assert torch.equal(mp.tatr(D, q)[kept], D[kept])
    dropped = sensitivity(D)[~kept[0]]
    assert not len(dropped) or dropped.min() > sensitivity(D)[kept[0]].max()


def test_tatr_keeps_all_where_nothing_is_disturbed():
    D = normal(3, 8, 6)
    assert torch.equal(mp.tatr(D, 1.0), D)
    assert torch.equal(mp.tatr(D[:1], 0.1), D[:1])
    assert not mp.tatr(torch.zeros(2, 5)).any()
    apart = torch.eye(3).double() * torch.tensor([1e-9, 1.0, 1e9]).double()
    assert torch.equal(mp.tatr(apart, 0.1), apart)


def test_tatr_knows_neither_order_nor_size():
    D, order = normal(4, 8, 6), [2, 0, 3, 1]
    assert torch.equal(mp.tatr(D[order], 0.5), mp.tatr(D, 0.5)[order])
    assert torch.equal(mp.tatr(8 * D, 0.5), 8 * mp.tatr(D, 0.5))


def test_the_quantile_of_tatr_is_that_of_the_whole_model():
    merged = mp.Merged(BASE, TASKS, purify="tatr", scale=1.0, options={"tatr": {"q": 0.6}})
    found = {name: merged.delta(name) for name in BASE if BASE[name].is_floating_point()}
    assert torch.equal(flat(found), mp.tatr(VECTORS, 0.6).sum(0))


# ---- Consensus TA --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mp.consensus, plain.consensus])
def test_consensus_by_hand(function):
    """With lambda 1/2 an entry is needed by a task where |a| > |b| / 2."""
    D = matrices(
        [[4, 1], [1, 0]], [[4, -3], [2, 0]]
    )  # by both, by one, by one since 1 = 2 / 2, by none
    assert torch.equal(function(D, 0.5), matrices([[8, 0], [0, 0]])[0])
    assert torch.equal(function(D, 0.5, keep=1), matrices([[8, -2], [3, 0]])[0])
    assert torch.equal(function(D, 0.4), matrices([[8, 0], [3, 0]])[0])


def test_consensus_of_all_and_of_too_many():
    D = single(4, 9, 7)
    assert torch.equal(mp.consensus(D, keep=0), mp.task_arithmetic(D))
    assert not mp.consensus(D, keep=5).any()
    assert torch.equal(mp.consensus(D[:1], keep=1), D[0])
    counts = [int((mp.consensus(D, keep=k) != 0).sum()) for k in range(6)]
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[4] < counts[1]
    base = mp.merge(BASE, TASKS, rule="consensus", scale=1.0, options={"consensus": {"keep": 4}})
    assert same(base, BASE)


def test_consensus_knows_no_order_and_scales():
    D = normal(4, 9, 7)
    for keep in (1, 2, 3):
        merged = mp.consensus(D, keep=keep)
        assert torch.allclose(mp.consensus(D[[2, 0, 3, 1]], keep=keep), merged, atol=1e-12)
        assert torch.equal(mp.consensus(4 * D, keep=keep), 4 * merged)


# ---- KnOTS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mp.knots, plain.knots])
def test_knots_by_hand(function):
    """In the outputs [1, 1] and [1, -1] over sqrt 2, the tasks are [[3, 0], [0, 0]] and [[-1, 0], [0, 1]]."""
    U = matrices([[1, 1], [1, -1]])[0] / 2**0.5
    D = U @ matrices([[3, 0], [0, 0]], [[-1, 0], [0, 1]])
    for reduce in ("mean", "sum", "max"):
        elected = U @ matrices([[3, 0], [0, 1]])[0]
        assert torch.allclose(function(D, 1.0, reduce), elected, atol=1e-14)
    trimmed = U @ matrices([[3, 0], [0, 1]])[0]  # both entries of task 2 have magnitude 1
    assert torch.allclose(function(D, 0.25, "sum"), trimmed, atol=1e-6)
    assert torch.allclose(function(D, reduce="sum", merge="linear"), D.sum(0), atol=1e-14)


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12), (40, 5)])
def test_linear_knots_is_task_arithmetic(m: int, n: int):
    D = normal(3, m, n)
    for reduce in ("sum", "mean"):
        merged = mp.knots(D, reduce=reduce, merge="linear")
        assert torch.allclose(merged, mp.task_arithmetic(D, reduce), atol=1e-13)


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12), (40, 5)])
def test_the_shared_basis_is_that_of_the_singular_vectors(m: int, n: int):
    D = normal(3, m, n)
    U, R = shared_basis(D)
    assert torch.allclose(U @ R, D, atol=1e-13)
    u, s, vh = torch.linalg.svd(torch.cat(list(D), dim=1), full_matrices=False)
    assert torch.allclose((U.mT @ u).abs(), torch.eye(len(s)).double(), atol=1e-10)
    joined = torch.cat(list(R), dim=1)
    assert torch.allclose(joined.abs(), (s[:, None] * vh).abs(), atol=1e-10)


def test_knots_drops_directions_of_no_size():
    D = torch.diag(torch.tensor([1.0, 1e-4, 1e-6])).double()[None]
    assert torch.allclose(mp.knots(D, 1.0), torch.diag(torch.tensor([1.0, 1e-4, 0])).double())
    assert not mp.knots(torch.zeros(3, 4, 5)).any()
    with_zero = torch.cat([D, torch.zeros_like(D)])
    assert torch.allclose(mp.knots(with_zero, 1.0), mp.knots(D, 1.0))


def test_knots_of_one_task_gives_it_back():
    _, D = problem(20, 14, tasks=1)
    assert torch.allclose(mp.knots(D, 1.0), D[0], atol=1e-12)
    trimmed = mp.knots(D, 0.2)
    assert 0.5 * D.norm() < trimmed.norm() < D.norm()


def test_knots_follows_a_rotation_of_the_outputs_and_no_order():
    _, D = problem(20, 14)
    q = torch.linalg.qr(normal(20, 20, seed=5)).Q
    for reduce in ("mean", "sum", "max"):
        merged = mp.knots(D, reduce=reduce)
        assert torch.allclose(mp.knots(q @ D, reduce=reduce), q @ merged, atol=1e-12)
        assert torch.allclose(mp.knots(D[[2, 0, 3, 1]], reduce=reduce), merged, atol=1e-12)
        assert torch.allclose(mp.knots(2 * D, reduce=reduce), 2 * merged, atol=1e-12)


def test_knots_trims_over_the_whole_model():
    """At one magnitude over the representations of all matrices, inputs as columns."""
    names = ("visual.mlp.c_fc.weight", "visual.mlp.c_proj.weight", "visual.proj")
    merged = mp.Merged(BASE, TASKS, rule="knots", scale=1.0)
    bases, representations = {}, {}
    for name in names:
        D = torch.stack([task[name] - BASE[name] for task in TASKS])
        D = D.mT if name == "visual.proj" else D
        bases[name], representations[name] = shared_basis(D)
    R = torch.cat([r.flatten(1) for r in representations.values()], dim=1)
    parts = mp.ties(R, 0.2).split([r[0].numel() for r in representations.values()])
    for name, part in zip(names, parts, strict=True):
        expected = bases[name] @ part.view_as(representations[name][0])
        found = merged.delta(name).double()
        found = found.mT if name == "visual.proj" else found
        assert torch.allclose(found, expected, atol=1e-6)
    own = mp.Merged(BASE, TASKS, rule="knots", scale=1.0, options={"knots": {"scope": "tensor"}})
    D = torch.stack([task[names[0]] - BASE[names[0]] for task in TASKS])
    assert torch.equal(own.delta(names[0]), mp.knots(D))


# ---- Types, chains, bad input --------------------------------------------------------------------

FUNCTIONS = (mp.awd, mp.tatr, mp.consensus, mp.knots)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_tasks_is_kept(function, dtype: torch.dtype):
    D = single(3, 8, 6).to(dtype)
    before = D.clone()
    assert function(D).dtype == dtype
    assert torch.equal(D, before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 1, 1)])
def test_empty_and_tiny_matrices(function, shape: tuple[int, int, int]):
    D = torch.ones(shape)
    assert function(D).shape in (shape, shape[1:])


@pytest.mark.parametrize("rule", [m.name for m in mp.METHODS.values() if m.kind == "rule"])
@pytest.mark.parametrize("purifier", ["awd", "tatr"])
def test_they_stand_in_front_of_any_rule(rule: str, purifier: str):
    recipe = {"rule": rule, "scale": 1.0} | data_of(rule, BASE, len(TASKS))
    merged = mp.merge(BASE, TASKS, purify=purifier, **recipe)
    plain_rule = mp.merge(BASE, TASKS, **recipe)
    assert all(x.isfinite().all() for x in merged.values())
    assert not same(merged, plain_rule)


@pytest.mark.parametrize("purifier", [m.name for m in mp.METHODS.values() if m.kind == "purifier"])
@pytest.mark.parametrize("rule", ["consensus", "knots", "swudi"])
def test_they_stand_behind_any_purifier(purifier: str, rule: str):
    given = data_of(purifier, BASE, len(TASKS))
    merged = mp.merge(BASE, TASKS, rule=rule, purify=purifier, scale=1.0, **given)
    assert all(x.isfinite().all() for x in merged.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda D: mp.awd(D, alpha=-1), "alpha=-1, lr=0.01, iterations=300: alpha and iterations"),
        (lambda D: mp.awd(D, lr=0), "lr=0, .* must be 0 or more, lr above 0"),
        (lambda D: mp.awd(D, lr=math.nan), "lr=nan"),
        (lambda D: mp.awd(D, iterations=-1), "iterations=-1"),
        (
            lambda D: mp.awd(1e-3 * D, lr=0.01),
            "oversteps .* take lr=.* or less, with more iterations",
        ),
        (lambda D: mp.tatr(D, 0), "q=0 of TATR must satisfy 0 < q <= 1"),
        (lambda D: mp.tatr(D, 1.5), "q=1.5"),
        (lambda D: mp.consensus(D, -1), "lambdas=-1 must be 0 or more: give a number such as 0.4"),
        (lambda D: mp.consensus(D, keep=-1), "keep=-1 must be a number of tasks"),
        (lambda D: mp.consensus(D, keep=1.5), "keep=1.5 must"),
        (lambda D: mp.knots(D[0]), r"\[T, m, n\]"),
        (lambda D: mp.knots(D / 0), "NaN"),
        (lambda D: mp.knots(D, 0), "density=0 of TIES"),
        (lambda D: mp.knots(D, merge="svd"), "merge 'svd' is unknown: use 'ties'"),
        (lambda D: mp.knots(D, reduce="all"), "reduce 'all' is unknown"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(mp.MergeError, match=message):
        call(problem()[1])


def test_options_of_a_merge_are_checked_at_once():
    for options in ({"awd": {"lr": -1}}, {"tatr": {"q": 2}}):
        with pytest.raises(mp.MergeError, match="lr=-1|q=2"):
            mp.Merged(BASE, TASKS, purify=list(options), options=options)
    with pytest.raises(mp.MergeError, match="knots scope 'all' is unknown"):
        mp.Merged(BASE, TASKS, rule="knots", options={"knots": {"scope": "all"}})


def test_what_is_ours_is_said():
    for function, words in ((mp.awd, "our reading"), (mp.consensus, "is\n    ours")):
        assert words in (function.__doc__ or "")
    assert "Built from the abstract" in (mp.swudi.__doc__ or "")
