"""Methods that look at the whole task vector, all tensors together: AWD, TATR, Consensus TA and KnOTS.

What a tensor needs to know of the others comes from a first pass over the model, `Method.survey`: inner
products, a quantile, thresholds. So they stream, in memory that does not grow with the model.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.low_rank import Products
from minipact.methods import (
    FACTORS,
    Measure,
    Method,
    SurveyPasses,
    check_finite,
    check_stack,
    check_tensor,
    count_of,
    largest_magnitudes,
    ranked_magnitudes,
    register,
    run_survey,
    task_arithmetic,
    ties,
)

# ---- AWD: what all tasks share --------------------------------------------------------------------


def awd_survey(
    *, tasks: int, entries: int, alpha: float, lr: float, iterations: int
) -> SurveyPasses:
    """Survey of AWD: the inner products of all task vectors, and from them the vector to take off."""
    if not (0 <= alpha < math.inf and 0 < lr < math.inf and iterations >= 0):
        hint = "alpha and iterations must be 0 or more, lr above 0"
        raise MergeError(f"alpha={alpha}, lr={lr}, iterations={iterations}: {hint}")
    if tasks == 1:
        return {"coefficients": torch.zeros(1)}
    gram = yield _inner_products
    return {"coefficients": shared_part(gram, alpha, lr, iterations)}


def _inner_products(D: Tensor) -> Tensor:
    """[T, T] in float64 of D [T, ...]."""
    flat = D.reshape(len(D), D[0].numel()).double()
    return flat @ flat.mT


def shared_part(gram: Tensor, alpha: float, lr: float, iterations: int) -> Tensor:
    """c [T] with delta = sum_t c_t tau_t after gradient descent on AWD's objective; see `awd`.

    The gradient lies in the span of the task vectors, so their inner products, gram [T, T], are all it takes.
    """
    sizes = gram.diagonal().sqrt()
    seen = (sizes > 1e-6).to(gram)  # what is of rounding size has no cosine
    least = float(sizes.where(seen > 0, math.inf).min())
    if lr > least**2 / 10:
        hint = f"take lr={least**2 / 20:.1g} or less, with more iterations"
        raise MergeError(f"lr={lr} oversteps for task vectors of norm {least:.2g}: {hint}")
    pairs = torch.outer(seen, seen).fill_diagonal_(0)
    c = torch.zeros_like(sizes)
    for _ in range(iterations):
        moved = torch.eye(len(c)).to(gram) - c  # row i: tau_i - delta in terms of the task vectors
        products = moved @ gram @ moved.mT
        norms = products.diagonal().sqrt().where(seen > 0, 1).unsqueeze(1)
        units, cosines = moved / norms, products / (norms * norms.mT)
        signs = pairs * cosines.sign().where(cosines.abs() > 1e-12, 0)  # below is rounding
        pulls = (signs @ units - (signs * cosines).sum(1, keepdim=True) * units) / norms
        slope = -2 / pairs.sum().clamp(min=1) * pulls.sum(0)
        length = (c @ gram @ c).clamp(min=0).sqrt()
        if length > 1e-12 * gram.trace().sqrt():
            slope += alpha * c / length
        c = c - lr * slope
    return c


def awd(
    D: Tensor,
    *,
    alpha: float = 0.1,
    lr: float = 0.01,
    iterations: int = 300,
    coefficients: Tensor | None = None,
) -> Tensor:
    """AWD: take one vector off all tasks, so that what is left of them is as orthogonal as can be.

    tau_i' = tau_i - delta, where delta minimises

        mean_{i != j} abs(cos(tau_i - delta, tau_j - delta)) + alpha norm(delta)

    by gradient descent from 0 over all tensors together. delta stays in the span of the task vectors, so
    the descent runs on their inner products: the same steps, without a second vector of the model's
    length. Source: Xiong et al. 2024 (arXiv 2411.18729); its code is not public, so the start at 0, where the
    gradient of norm(delta) counts as 0, and cosines of whole vectors, not layer by layer, are our reading.

    Args:
        D: [T, ...] tasks of one tensor, or of a model as one vector.
        alpha: price of delta's length.
        lr: factor of the gradient in a step. The objective does not scale with D: the default is for task
            vectors of norm 1 and more, shorter ones need less, up to a tenth of the squared norm.
        iterations: number of steps.
        coefficients: [T] with delta = sum_t c_t tau_t. None finds them for D alone; a merge for the
            whole model, in one pass.

    Returns [T, ...]; one task alone stays as it is. A task of zeros has no cosine, and loses delta like the
    others: differences between tasks never change. Raises MergeError for an option out of range, and where
    steps of lr are too long for the shortest task vector, since the result would then be chance.
    """
    check_tensor("D", D)
    if coefficients is None:
        size = {"tasks": len(D), "entries": D[0].numel()}
        survey = awd_survey(**size, alpha=alpha, lr=lr, iterations=iterations)
        coefficients = run_survey(survey, lambda measure: measure(D).cpu())["coefficients"]
    delta = torch.zeros_like(D[0])
    for d, c in zip(D, coefficients.tolist(), strict=True):
        delta.add_(d, alpha=c)
    return D - delta


register(
    Method(
        "awd",
        "purifier",
        awd,
        "Xiong et al. 2024, arXiv 2411.18729",
        acts_on="entries",
        needs=("coefficients",),
        survey=awd_survey,
    )
)

# ---- TATR: where tasks disturb each other ---------------------------------------------------------


def sensitivity(D: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Omega [...] = sum_{i != j} g_i abs(D_j) in float64, of D and g [T, ...], abs(D) itself if None."""
    sizes = D.abs().double()
    slopes = sizes if gradient is None else gradient.to(sizes)
    return slopes.sum(0) * sizes.sum(0) - (slopes * sizes).sum(0)


def tatr_survey(*, tasks: int, entries: int, q: float) -> SurveyPasses:
    """Survey of TATR: the sensitivity up to which entries are in the trust region, over the model."""
    return (yield from _trust_region(tasks, q, sensitivity))


def _trust_region(tasks: int, q: float, values: Measure) -> SurveyPasses:
    if not 0 < q <= 1:
        raise MergeError(f"q={q} of TATR must satisfy 0 < q <= 1")
    if tasks == 1:
        return {"thresholds": torch.full((1,), math.inf)}

    def rank(entries: int) -> int:  # of the largest that stays
        return entries + 1 - count_of(q, entries)

    return {"thresholds": (yield from ranked_magnitudes(1, rank, values))}


def tatr(
    D: Tensor, q: float = 0.99, *, gradient: Tensor | None = None, thresholds: Tensor | None = None
) -> Tensor:
    """TATR: keep tasks inside a trust region, the entries where they disturb each other least.

    With g_i the mean magnitude of task i's gradients at the base, an entry stays, for all tasks, where

        Omega = sum_{i != j} g_i a_j = (sum_i g_i) (sum_i a_i) - sum_i g_i a_i,  a_i = abs(tau_i)

    is among the smallest share q over the whole model, ties included; others become 0. Without data,
    a_i stands for g_i. Source: Sun et al. 2025 (arXiv 2501.15065), whose code was not found.

    Args:
        D: [T, ...] tasks of one tensor, or of a model as one vector.
        q: share of entries to keep; 1 keeps all.
        gradient: [T, ...] mean over samples of the magnitudes of their gradients at the base. None is abs(D).
        thresholds: [1], the largest Omega to keep, in float32. None takes it from D alone; a merge from
            the whole model, exactly, in two passes.

    Returns [T, ...]; one task alone stays as it is. Raises MergeError unless 0 < q <= 1.
    """
    check_tensor("D", D)
    values = partial(sensitivity, gradient=gradient)
    if thresholds is None:
        survey = _trust_region(len(D), q, values)
        thresholds = run_survey(survey, lambda measure: measure(D).to_dense())["thresholds"]
    return torch.where(values(D).abs().float() <= thresholds.to(D.device), D, 0)


register(
    Method(
        "tatr",
        "purifier",
        tatr,
        "Sun et al. 2025, arXiv 2501.15065",
        acts_on="entries",
        needs=("thresholds", "gradient"),
        survey=tatr_survey,
    )
)

# ---- Consensus TA: what several tasks need --------------------------------------------------------


def consensus(D: Tensor, lambdas: float = 0.4, *, keep: int = 2) -> Tensor:
    """Consensus TA: add up the tasks, and keep the entries that several of them need.

    Task t needs an entry where abs(tau_t) > lambda abs(tau - tau_t), tau the sum of all (its TALL mask). D
    is [T, ...], the result [...]: tau where `keep` tasks or more do. keep=1 drops what none needs, 0 is task
    arithmetic, and more than T leaves nothing, so one task alone needs keep=1. Source: Wang et al. 2024
    (arXiv 2405.07813), who choose lambda for each task on validation data, from 0.2 to 0.6; 0.4 for all is
    ours.

    Raises MergeError unless lambdas is 0 or more and keep a count.
    """
    check_tensor("D", D)
    if not 0 <= lambdas < math.inf:
        raise MergeError(f"lambdas={lambdas} must be 0 or more: give a number such as 0.4")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
        raise MergeError(f"keep={keep!r} must be a number of tasks: 0, 1, 2 ...")
    total = D.sum(0)
    votes = torch.zeros_like(total, dtype=torch.int32)
    for d in D:
        votes += d.abs() > lambdas * (total - d).abs()
    return torch.where(votes >= keep, total, 0)


register(
    Method("consensus", "rule", consensus, "Wang et al. 2024, arXiv 2405.07813", acts_on="entries")
)

# ---- KnOTS: entries in a basis that all tasks share -----------------------------------------------


def shared_basis(D: Tensor | Products) -> tuple[Tensor, Tensor]:
    """U [m, q] orthonormal and R [T, q, n] with D = U R in float64: one basis of outputs for all tasks.

    U diag(s) [V_1^T .. V_T^T] is the SVD of [D_1 .. D_T] [m, T n], and R_t = diag(s) V_t^T. Directions with
    s up to 1e-5, whatever D's size, are left out, as published. Of factors it works in the space that all
    B_t span: the same in less time.
    """
    if isinstance(D, Products):
        span, coordinates = _spanned(D)
        basis, R = shared_basis(coordinates)
        return span @ basis, R
    wide = D.double()
    joined = wide.transpose(0, 1).flatten(1)
    small = torch.linalg.qr(joined.mT, mode="r").R.mT  # of the same U and s, but not T n wide
    u, s, _ = torch.linalg.svd(small, full_matrices=False)
    basis = u[:, s > 1e-5]
    return basis, basis.mT @ wide


def _spanned(D: Products) -> tuple[Tensor, Tensor]:
    """Q [m, p] orthonormal and C [T, p, n] with D = Q C in float64, p at most the sum of the ranks."""
    joined = torch.cat([d.b for d in D], dim=1).double()
    q, r = torch.linalg.qr(joined)
    own = r.split([d.rank for d in D], dim=1)
    return q, torch.stack([x @ d.a.double() for x, d in zip(own, D, strict=True)])


def _representations(D: Tensor | Products) -> Tensor:
    return shared_basis(D)[1]


def knots_survey(
    *, tasks: int, entries: int, density: float, merge: str, scope: str = "global"
) -> SurveyPasses:
    """Survey of KnOTS: one magnitude per task over the representations of all matrices."""
    check_known("knots scope", [scope], ("global", "tensor"))
    if scope == "tensor" or merge == "linear":
        return {}
    return (yield from largest_magnitudes(tasks, density, _representations))


def knots(
    D: Tensor | Products,
    density: float = 0.2,
    reduce: str = "mean",
    *,
    merge: str = "ties",
    thresholds: Tensor | None = None,
) -> Tensor:
    """KnOTS: merge by TIES in a basis of outputs that all tasks share, where their entries compare.

    With D_t = U R_t from the SVD of [D_1 .. D_T], the result is U ties(R). Made for LoRA, whose updates
    in the plain basis hardly align. Source: Stoica et al. 2024 (arXiv 2410.19735), read in the authors' code
    at commit 01a940c; there an entry whose sum is zero takes the sign of the majority, here it stays zero.

    Args:
        D: [T, m, n] task matrices, or their factors.
        density, reduce: of TIES. In a merge, scope="global" trims at one magnitude per task over the
            representations of all matrices, in two passes more, "tensor" matrix by matrix.
        merge: "ties", or "linear" for the plain sum or mean, which is that of D.
        thresholds: [T], magnitudes from which on entries of R are kept; None is scope="tensor".

    Returns [m, n] in D's dtype. Equal singular values leave U, and so the result, ambiguous. Raises
    MergeError unless D is a finite stack of matrices and the options are known.
    """
    check_stack(D)
    check_finite(D)
    check_known("merge", [merge], ("ties", "linear"))
    basis, R = shared_basis(D)
    if merge == "linear":
        return (basis @ task_arithmetic(R, reduce)).to(D.dtype)
    return (basis @ ties(R, density, reduce, thresholds=thresholds)).to(D.dtype)


register(
    Method(
        "knots",
        "rule",
        knots,
        "Stoica et al. 2024, arXiv 2410.19735",
        scale={"mean": 0.6},
        needs=("thresholds", FACTORS),
        survey=knots_survey,
        sided=True,
    )
)
