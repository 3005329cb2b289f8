"""What ablations take away, and only that: energy of random controls, own need, claims, rank."""

import pytest
import torch

import ablations
import controls
import fair_table
import minipact as mp
from benches import Bench
from helpers import close, problem, rng, small_model

BASE = small_model(0)
TASKS = {f"task{t}": small_model(100 * t, BASE) for t in (1, 2, 3)}
BENCH = Bench("zoo1", "zoo", "abc", BASE, TASKS, lambda *_: {})


def energy(D: torch.Tensor) -> torch.Tensor:
    return D.square().sum((1, 2))


@pytest.mark.parametrize("dose", [{}, {"tol": 0.1}, {"task": 1}, {"strength": 0.5}])
def test_random_directions_take_what_pact_takes_and_no_direction_more(dose: dict):
    W0, D = problem(30, 24)
    found = ablations.random_energy(W0, D, generator=rng(), **dose)
    wanted = energy(mp.pact(W0, D, **dose))
    assert (energy(found) <= wanted * (1 + 1e-9)).all()
    assert (energy(found) > wanted - 0.35 * energy(D)).all()
    for j in range(4):
        lost = D[j] - found[j]
        assert close(lost @ found[j].mT, torch.zeros(30, 30).double())
    other = ablations.random_energy(W0, D, generator=rng(1), **dose)
    assert not torch.allclose(found, other)


def test_a_cut_stops_at_the_first_direction_that_is_enough():
    d = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])).double()
    basis = torch.eye(4).double()
    for kept, left in ((1.0, 4), (0.5, 3), (0.43, 3), (0.4, 2), (0.0, 0)):
        found = ablations.cut(d, basis, kept)
        assert torch.linalg.matrix_rank(found) == left, kept


def test_own_leading_directions_are_spared():
    W0, D = problem()
    found = ablations.spared(W0, D, core=5, task=3)
    plain = mp.pact(W0, D, core=5, task=3)
    for j in range(4):
        own = torch.linalg.svd(D[j]).Vh[:3].mT
        assert torch.allclose(found[j] @ own, D[j] @ own, atol=1e-9)
        assert not torch.allclose(plain[j] @ own, D[j] @ own, atol=1e-3)
        assert energy(found)[j] > energy(plain)[j]
    assert not torch.allclose(found, D, atol=1e-3)


def test_the_parts_put_together_are_the_filter():
    _, D = problem(14, 9)
    (A, B), (a, b) = ablations.needs_and_claims(D), ablations.needs_and_claims(D.mT)
    assert close(ablations.weighed(D, A, B, a, b), mp.wiener(D))
    assert close(A.diagonal(dim1=1, dim2=2).mean(1), torch.full((4,), 2.0).double())
    assert close(B.diagonal(dim1=1, dim2=2).mean(1), torch.ones(4).double())


def test_a_missing_part_leaves_the_other_alone():
    _, D = problem(14, 9)
    (A, B), (a, b) = ablations.needs_and_claims(D), ablations.needs_and_claims(D.mT)
    X = ablations.without_need(D)
    assert close(4 * (X - D) + 30 * B @ X @ b, torch.zeros_like(D))
    X = ablations.without_claims(D)
    assert torch.allclose(A @ (X - D) @ a, -30 * X, atol=1e-8)
    assert close(controls.norms(ablations.shrunk(D)), controls.norms(mp.wiener(D)))


def test_reliance_claims_the_core_too():
    W0, D = problem(14, 40)
    core = torch.linalg.svd(W0).Vh[:1].mT
    plain, found = mp.wiener(D), ablations.with_reliance(W0, D)
    share = [(x @ core).norm() / (D @ core).norm() for x in (found, plain)]
    assert share[0] < 0.7 * share[1]


def test_updates_of_low_rank_are_the_best_of_their_rank():
    bench = ablations.low_rank(BENCH, 0.2)
    for name in fair_table.matrices(BENCH):
        change = TASKS["task1"][name] - BASE[name]
        found = bench.tasks["task1"][name] - BASE[name]
        count = max(1, int(0.2 * min(change.shape)))
        spectrum = torch.linalg.svdvals(change)
        assert torch.linalg.matrix_rank(found, rtol=1e-3) == count
        assert torch.allclose((change - found).norm(), spectrum[count:].norm(), rtol=1e-3)
    others = TASKS["task1"].keys() - fair_table.matrices(BENCH).keys()
    assert all(torch.equal(bench.tasks["task1"][k], TASKS["task1"][k]) for k in others)


def test_every_part_is_measured_under_the_rules_of_the_jury():
    for rows, filters, rules in (
        (ablations.shield_rows(), 2 * len(ablations.DOSES) + 1, 2),
        (ablations.filter_rows(), len(ablations.PARTS), 4),
    ):
        keys = {fair_table.key(row) for row in rows}
        assert len(keys) == len(rows) == (filters + 1) * rules
        assert all(row.vectors == "mean" for row in rows)
