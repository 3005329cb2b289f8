"""One least-squares problem per tensor: the rules RegMean, Fisher merging and SWUDI, the purifier PAVE.

RegMean and PAVE have a covariance of inputs for each task, Fisher merging a weight for each entry, from data.
WUDI, ACE-Merging and the Wiener filter, which make theirs of the updates, stand in `minipact.methods`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from minipact.errors import MergeError
from minipact.methods import (
    Method,
    Rank,
    SurveyPasses,
    check_finite,
    check_stack,
    check_tensor,
    is_zero,
    register,
    roundoff,
    singular_triples,
    unit_tasks,
)


def swudi(D: Tensor, *, time: float = 1e3, rank: Rank | None = None) -> Tensor:
    """SWUDI: solve WUDI's normal equation as gradient flow does in a finite time, softly.

    With G = sum_i D_i^T D_i / ||D_i||^2 = sum_k g_k v_k v_k^T, g_k in units of their mean over all inputs,

        M = (sum_i D_i D_i^T D_i / ||D_i||^2) sum_k (1 - exp(-time g_k)) / g_k  v_k v_k^T

    up to that unit: directions that few rows fill, below about 1 / time, are not divided by their small g_k.
    Built from the abstract of arXiv 2606.07289 alone, so that both defaults, and the unit of time, are ours:
    1e3 is near `wudi` with its ridge of 1e-3.

    Args:
        D: [T, m, n] task matrices; zero updates add nothing.
        time: of the flow from M = 0 along WUDI's gradient; the longer, the closer to its pseudo-inverse.
        rank: number of the largest g_k that count, as a count, share or energy as in `pact`; None is all.

    Returns [m, n] in D's dtype. Raises MergeError unless D is a finite stack of matrices, time is above 0 and
    the rank fits.
    """
    check_stack(D)
    check_finite(D)
    if not 0 < time < math.inf:
        raise MergeError(f"time={time} must be above 0: give a number such as 1000")
    if is_zero(D):
        return torch.zeros_like(D[0])
    unit = unit_tasks(D)
    rows = unit.flatten(0, 1)  # [T m, n], rows^T rows = G
    targets = (unit @ D.double().mT).flatten(0, 1)  # [T m, m]: rows M^T = targets is to hold
    u, s, v = singular_triples(rows, roundoff(D.dtype), rank)
    filled = s.square() * (rows.shape[1] / rows.square().sum())
    merged: Tensor = targets.mT @ u * (-torch.expm1(-time * filled) / s) @ v.mT
    return merged.to(D.dtype)


register(Method("swudi", "rule", swudi, "arXiv 2606.07289", scale={"any": 1.0}, sided=True))


def regmean(D: Tensor, covariance: Tensor, *, off_diagonal: float = 0.9) -> Tensor:
    """RegMean: do on each task's inputs what that task's update does, as well as one matrix can.

    The M with the least sum_i tr (M - D_i) C_i (M - D_i)^T, C_i = mean of x x^T over the inputs x that the
    layer sees on task i's data: M = (sum_i D_i C_i) (sum_i C_i)^{-1}. On weights it is the same merge.
    Source: Jin et al. 2023 (arXiv 2212.09849).

    Args:
        D: [T, m, n] task matrices.
        covariance: [T, n, n], from the inputs of each fine-tuned model on its own data, unlabelled.
        off_diagonal: factor of what is off the covariances' diagonals, in [0, 1]; the published models take
            0.9, or 0.1 for T5. With 1 the inverse is a pseudo-inverse, on their numerical range.

    Returns [m, n] in D's dtype. Raises MergeError unless D and covariance are finite stacks that fit, and
    off_diagonal is in range; a covariance has no negative number on its diagonal.
    """
    check_stack(D)
    check_finite(D)
    _check_covariance(covariance, D)
    if bool((covariance.diagonal(dim1=1, dim2=2) < 0).any()):
        raise MergeError("covariance is negative on its diagonal: see minipact.input_covariances")
    if not 0 <= off_diagonal <= 1:
        raise MergeError(f"off_diagonal={off_diagonal} must lie between 0 and 1")
    total, targets = torch.zeros_like(covariance[0]).double(), torch.zeros_like(D[0]).double()
    for d, c in zip(D, covariance, strict=True):  # one by one takes the least memory
        C = c.double() * off_diagonal
        C.diagonal().copy_(c.diagonal())
        total += C
        targets += d.double() @ C
    tolerance = 1e-12 if D.dtype == torch.float64 else 1e-7
    smallest = (1 - off_diagonal) * total.diagonal().min()  # no eigenvalue is smaller
    if bool(smallest > tolerance * total.trace()):
        merged: Tensor = torch.linalg.solve(total, targets, left=False)
        return merged.to(D.dtype)
    values, vectors = torch.linalg.eigh(total)
    kept = values > tolerance * values[-1:]
    values, vectors = values[kept], vectors[:, kept]
    merged = targets @ vectors / values @ vectors.mT
    return merged.to(D.dtype)


register(
    Method(
        "regmean",
        "rule",
        regmean,
        "Jin et al. 2023, arXiv 2212.09849",
        scale={"any": 1.0},
        needs=("covariance",),
        sided=True,
    )
)


def fisher_merge(D: Tensor, fisher: Tensor) -> Tensor:
    """Fisher merging: the mean of the tasks, each entry weighted by how much the task needs it.

    sum_t F_t D_t / sum_t F_t, entry by entry, with F_t the diagonal of task t's Fisher information at its own
    weights (`minipact.fisher`); where all F_t are 0, the plain mean. On weights it is the same merge. Source:
    Matena and Raffel 2022 (arXiv 2111.09832).

    D and fisher are [T, ...], the result [...] in D's dtype. Raises MergeError unless fisher has D's shape
    and is finite and 0 or more everywhere.
    """
    check_tensor("D", D)
    check_tensor("fisher", fisher)
    if fisher.shape != D.shape:
        raise MergeError(f"fisher {[*fisher.shape]} does not fit D {[*D.shape]}")
    if not bool(((fisher >= 0) & (fisher < math.inf)).all()):
        raise MergeError("fisher holds NaN, infinity or negative numbers: see minipact.fisher")
    total = fisher.sum(0, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    for d, f in zip(D, fisher, strict=True):  # one by one takes the least memory
        weighted += f.double() * d
    return torch.where(total > 0, weighted / total, D.mean(0)).to(D.dtype)


register(
    Method(
        "fisher_merge",
        "rule",
        fisher_merge,
        "Matena and Raffel 2022, arXiv 2111.09832",
        acts_on="entries",
        scale={"any": 1.0},
        needs=("fisher",),
    )
)


# ---- PAVE: what a task's own weights do with its own inputs --------------------------------------


def pave_survey(
    *, tasks: int, entries: int, rho: float, ridge: float, collapse: bool = False
) -> SurveyPasses:
    """Survey of PAVE: with collapse, the share of directions that each task keeps over all matrices."""
    _check_pave(rho, ridge)
    if not collapse:
        return {}
    counts = yield partial(_kept_counts, rho=rho, ridge=ridge)
    return {"shares": counts[:-1] / counts[-1]}


def _kept_counts(
    D: Tensor, tuned: Tensor, covariance: Tensor, *, rho: float, ridge: float
) -> Tensor:
    """[T + 1] in float64: how many directions each task keeps of a matrix, and how many it has."""
    _check_covariance(covariance, D)
    spectra = [_last_directions(W, C, ridge, 0)[0] for W, C in zip(tuned, covariance, strict=True)]
    kept = allocated_ranks(torch.stack(spectra), rho)
    return torch.tensor([*kept, min(D.shape[1:])], dtype=torch.float64)


def pave(
    D: Tensor,
    tuned: Tensor,
    covariance: Tensor,
    *,
    rho: float = 0.984375,
    ridge: float = 0.1,
    shares: Tensor | None = None,
) -> Tensor:
    """PAVE: take out of each fine-tuned weight the directions that its own task's inputs hardly use.

    With C_t = mean of x x^T over the inputs x that the layer sees on task t's data, plus ridge I, and the SVD
    W_t C_t = U S V^T of the fine-tuned weight, all but the first r_t directions go:

        D'_t = U_r S_r V_r^T C_t^{-1} - W_0 = D_t - (the other directions) C_t^{-1}

    The r_t are shared out between the tasks of one layer: of all singular values, each spectrum over its
    largest, the smallest go first, until less than the share rho is left. Source: arXiv 2510.14697, read in
    the authors' code. There hooks miss attention, which is treated here where `input_covariances` sees it.

    Args:
        D: [T, m, n] task matrices.
        tuned: [T, m, n] fine-tuned weights themselves. So in a merge this comes first in purify, and without
            weights, since it knows nothing of what was done to D.
        covariance: [T, n, n], from the inputs of each fine-tuned model on its own data, unlabelled.
        rho: share of the directions that stay, in (0, 1]; no task loses more than 1.5 times its part. What
            is cut is a weight, nearly of full rank, so that rho stays near 1: 0.984375 is published for
            images, 0.875 to 0.984375 for texts.
        ridge: added to the covariances' diagonals, and doubled until ||C^{-1} C - I|| < 0.05.
        shares: [T] of the directions that stay, in place of those found for this layer. In a merge,
            collapse=True takes one share for each task, the mean over all matrices, as the released runs on
            images do; that is a first pass over the model.

    Returns [T, m, n] in D's dtype; with rho=1, D. Raises MergeError unless D, tuned and covariance are finite
    and fit together, and the options are in range.
    """
    _check_pave(rho, ridge)
    check_stack(D)
    check_tensor("tuned", tuned)
    if tuned.shape != D.shape:
        raise MergeError(f"tuned {[*tuned.shape]} does not fit D [T, m, n] = {[*D.shape]}")
    check_finite(D)
    check_finite(tuned)
    _check_covariance(covariance, D)
    size = min(D.shape[1:])
    spare = size - _least_rank(size, rho)
    kept: list[int] = []
    if shares is not None:
        kept = [max(1, round(size * share)) for share in shares.tolist()]
        spare = size - min(kept)
    cuts = [_last_directions(W, C, ridge, spare) for W, C in zip(tuned, covariance, strict=True)]
    if shares is None:
        kept = allocated_ranks(torch.stack([spectrum for spectrum, _, _ in cuts]), rho)
    purified = torch.empty_like(D)
    for i, (rank, (_, left, right)) in enumerate(zip(kept, cuts, strict=True)):
        first = spare - (size - rank)
        purified[i] = D[i].double() - left[:, first:] @ right[first:]
    return purified


def _check_pave(rho: float, ridge: float) -> None:
    if not 0 < rho <= 1:
        raise MergeError(f"rho={rho} must lie above 0 and up to 1: 1 keeps all, 0.98 nearly all")
    if not 0 < ridge < math.inf:
        raise MergeError(f"ridge={ridge} must be above 0: give a number such as 0.1")


def _check_covariance(covariance: Tensor, D: Tensor) -> None:
    check_tensor("covariance", covariance)
    check_finite(covariance)
    if covariance.shape != (len(D), D.shape[2], D.shape[2]):
        shape = [*covariance.shape]
        raise MergeError(
            f"covariance {shape} does not fit D [T, m, n] = {[*D.shape]}: give [T, n, n]"
        )


def _last_directions(
    W: Tensor, C: Tensor, ridge: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of W C = U S V^T: S over its largest [r], and the last `count` of U S [m, c] and V^T C^{-1} [c, n]."""
    C, lower = _with_ridge(C.double(), ridge)
    seen = W.double() @ C
    _, s, vh = torch.linalg.svd(seen, full_matrices=False)
    last = vh[len(s) - count :].mT
    return s / s[0].where(s[0] > 0, 1), seen @ last, torch.cholesky_solve(last, lower).mT


def _with_ridge(C: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """C + ridge I and its Cholesky factor; the ridge doubles until solving by it is accurate."""
    identity = torch.eye(len(C)).to(C)
    for doublings in range(60):
        loaded = C + 2.0**doublings * ridge * identity
        lower, failed = torch.linalg.cholesky_ex(loaded)
        if not failed and (torch.cholesky_solve(loaded, lower) - identity).norm() < 5e-2:
            return loaded, lower
    raise MergeError("covariance is none, but far from positive: see minipact.input_covariances")


def _least_rank(size: int, rho: float) -> int:
    """Directions that each task keeps at least: it loses 1.5 times its part at most."""
    return max(1, size - round(1.5 * (size - round(size * rho))))


def allocated_ranks(spectra: Tensor, rho: float) -> list[int]:
    """How many directions each of T tasks keeps of one layer: the smallest singular values go first.

    spectra is [T, r], each descending and over its largest. The authors' code drops the smallest last one
    again and again, until less than rho T r are left or no task has one to spare; one sort finds the same.
    """
    tasks, size = spectra.shape
    spare = size - _least_rank(size, rho)
    going = max(0, tasks * size - math.ceil(rho * tasks * size) + 1)
    order = spectra[:, size - spare :].flatten().argsort(stable=True)[:going]
    gone = torch.bincount(order // max(1, spare), minlength=tasks)
    return [size - int(count) for count in gone]


register(
    Method(
        "pave",
        "purifier",
        pave,
        "arXiv 2510.14697",
        needs=("tuned", "covariance", "shares"),
        survey=pave_survey,
    )
)
