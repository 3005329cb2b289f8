"""Diagnoses of task matrices from the weights alone: where tasks collide, and on what they rely.

Everything acts on the base weight W0 [m, n] and the task matrices D [T, m, n] of one weight; average over
the weights of a model as the papers do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.methods import (
    RNG,
    Rank,
    Walls,
    check_stack,
    core_directions,
    is_finite,
    load_bearing_walls,
    widened,
)
from minipact.per_task import tsv_compress


def singular_task_interference(
    D: Tensor, *, rank: Rank | None = None, norm: str = "entrywise"
) -> float:
    """Singular task interference: how much the leading singular vectors of the tasks overlap.

    || (U^T U - I) diag(S) (V^T V - I) ||_1 with the triples of all tasks side by side, U [m, Tk], S [Tk],
    V [n, Tk]. 0 where the tasks' singular vectors are orthogonal. Source: Gargiulo et al. 2025, section 3.2.

    Args:
        D: [T, m, n] task matrices.
        rank: k as in `tsv_compress`.
        norm: "entrywise" sums all magnitudes; "induced" takes the largest column sum.

    Raises:
        MergeError: D is not a finite stack of matrices, or an option is out of range.
    """
    check_known("norm", [norm], ("entrywise", "induced"))
    u, s, v = (x.double() for x in tsv_compress(widened(D), rank=rank))
    product = triples_interference(torch.cat([*u], 1), s.flatten(), torch.cat([*v], 1))
    columns = product.abs().sum(0)
    return float(columns.sum() if norm == "entrywise" else max(columns, default=0.0))


def triples_interference(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """(U^T U - I) diag(S) (V^T V - I) of the triples of all tasks, U [m, c], S [c], V [n, c]: [c, c]."""
    eye = torch.eye(len(s)).to(s)
    return ((u.mT @ u - eye) * s) @ (v.mT @ v - eye)


# ---- Load-bearing walls as subspaces -------------------------------------------------------------


def lbw_basis(
    W0: Tensor, D_t: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3,
    svd: str = "exact", generator: RNG = None,
) -> Tensor:  # fmt: skip
    """LBW subspace of one task: the part of the pre-trained core that its own update leaves alone.

    Orthonormal basis [n, r] of the span of V_0 - V_t V_t^T V_0, with V_0 [n, K] the core of W0 [m, n]
    and V_t [n, k] the leading right singular vectors of D_t [m, n] (Shi et al. 2026), in D_t's dtype.
    Keywords core, task, tol, svd, generator and errors as in `pact`.
    """
    walls = load_bearing_walls(
        W0, D_t[None], core=core, task=task, tol=tol, svd=svd, generator=generator
    )
    return (walls.frame @ walls.bases[0]).to(D_t.dtype)


def shield_basis(
    W0: Tensor, D: Tensor, j: int, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3,
    svd: str = "exact", generator: RNG = None,
) -> Tensor:  # fmt: skip
    """Shield of task j: orthonormal basis [n, p] of the union of the other tasks' LBW subspaces.

    p is the numerical rank of the union at `tol`, at most min(n, K + (T - 1) k); 0 for one task alone.
    Keywords core, task, tol, svd, generator and errors as in `pact`; in D's dtype.
    """
    check_stack(D, W0)
    if not 0 <= j < len(D):
        raise MergeError(f"task index j={j} is out of range for {len(D)} tasks")
    walls = load_bearing_walls(W0, D, core=core, task=task, tol=tol, svd=svd, generator=generator)
    return walls.shield(j).to(D.dtype)


def lbw_similarity(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3,
    svd: str = "exact", generator: RNG = None,
) -> Tensor:  # fmt: skip
    """Similarity of the tasks' LBW subspaces, [T, T] in float64, entries in [0, 1], diagonal 1.

    Sim(A, B) = ||B_A^T B_B||_F^2 / min(r_A, r_B) with the orthonormal bases B of `lbw_basis`. All of
    them lie near the same core, so values near 1 are the rule: compare with tasks whose updates are
    random. NaN where a subspace is empty. Arguments and errors as in `pact`. Source: Shi et al. 2026
    (arXiv 2606.18627), released analysis.
    """
    walls = load_bearing_walls(W0, D, core=core, task=task, tol=tol, svd=svd, generator=generator)
    return similarities(walls)


def hidden_interference(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3,
    svd: str = "exact", generator: RNG = None,
) -> Tensor:  # fmt: skip
    """Share of each task's leading update directions that lies in another task's LBW subspace.

    [T, T] in float64: row B is the interferer, column A the victim, ||V_B^T B_A||_F^2 / k_B with V_B
    [n, k_B] the leading right singular vectors of D_B and B_A [n, r_A] the basis of `lbw_basis`.
    Entries in [0, 1], diagonal 0 by construction; for random directions about r_A / n. NaN where B has
    no update. Arguments and errors as in `pact`. Source: Shi et al. 2026 (arXiv 2606.18627), released
    analysis.
    """
    walls = load_bearing_walls(W0, D, core=core, task=task, tol=tol, svd=svd, generator=generator)
    return interferences(walls)


def similarities(walls: Walls) -> Tensor:
    """`lbw_similarity` of walls that are known."""
    bases = walls.bases
    rows = [[overlap(a, b, min(a.shape[1], b.shape[1])) for b in bases] for a in bases]
    return torch.tensor(rows, dtype=torch.float64)


def interferences(walls: Walls) -> Tensor:
    """`hidden_interference` of walls that are known."""
    rows = [[overlap(v, b, v.shape[1]) for b in walls.bases] for v in walls.updates]
    return torch.tensor(rows, dtype=torch.float64)


def overlap(a: Tensor, b: Tensor, size: int) -> float:
    """||A^T B||_F^2 / size of orthonormal bases A [q, r] and B [q, s]; NaN for size 0."""
    return float((a.mT @ b).square().sum()) / size if size else math.nan


def intrusion_energy(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """Share of each task matrix that acts on the pre-trained core, [T] in float64.

    ||D_t V_0||_F^2 / ||D_t||_F^2 with V_0 [n, K] the leading right singular vectors of W0; about K / n
    for a task matrix without preference, 1 for a full core, 0 for a zero task matrix. Keywords core,
    svd, generator and errors as in `pact`. Source: Shi et al. 2026 (arXiv 2606.18627), released analysis.
    """
    return axis_profile(W0, D, core=core, svd=svd, generator=generator).sum(1)


def axis_profile(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """Share of each task matrix on every single core direction, [T, K] in float64.

    ||D_t v_i||^2 / ||D_t||_F^2 for the leading right singular vectors v_i of W0; rows sum to
    `intrusion_energy`. Keywords and errors as in `pact`. Source: Shi et al. 2026 (arXiv 2606.18627),
    released analysis.
    """
    check_stack(D, W0)
    if not is_finite(D):
        raise MergeError("D holds NaN or infinity: check the checkpoints it comes from")
    v0 = core_directions(W0, core, svd, generator)
    wide = D.double()
    energy = wide.square().sum((1, 2)).clamp(min=1e-300)
    return (wide @ v0).square().sum(1) / energy[:, None]


# ---- Ablation of subspaces -----------------------------------------------------------------------


def ablate_subspace(X: Tensor, basis: Tensor) -> Tensor:
    """X [..., m, n] without what it does on the span of an orthonormal basis P [n, p]: X - X P P^T.

    In X's dtype. X is an update, as in the released analysis of Shi et al. 2026 (arXiv 2606.18627), or a
    whole weight. Raises MergeError where the shapes do not fit or the
    basis is not orthonormal.
    """
    if basis.ndim != 2 or basis.shape[0] != X.shape[-1]:
        raise MergeError(f"basis {tuple(basis.shape)} does not fit X {tuple(X.shape)}: use [n, p]")
    x = widened(X)
    p = basis.to(x)
    if not torch.allclose(p.mT @ p, torch.eye(p.shape[1]).to(p), atol=1e-2):
        raise MergeError("the columns of basis must be orthonormal: use torch.linalg.qr(basis).Q")
    return (x - x @ p @ p.mT).to(X.dtype)


def random_subspace(avoid: Tensor, size: int, *, generator: RNG = None) -> Tensor:
    """Random orthonormal basis [n, size] in float64, orthogonal to the orthonormal columns of `avoid` [n, K].

    The control of a subspace ablation: as many directions, but none of the core; as in the released
    analysis of Shi et al. 2026 (arXiv 2606.18627).

    Raises:
        MergeError: fewer than `size` directions are left.
    """
    if avoid.ndim != 2:
        raise MergeError(f"avoid {tuple(avoid.shape)} must be a basis [n, K]; K may be 0")
    n, taken = avoid.shape
    if not 0 <= size <= n - taken:
        raise MergeError(f"size={size}: only {n - taken} of {n} directions are left beside `avoid`")
    held = avoid.double()
    source = generator.device if generator else "cpu"
    draw = torch.randn(n, size, generator=generator, dtype=torch.float64, device=source).to(held)
    basis: Tensor = torch.linalg.qr(draw - held @ (held.mT @ draw)).Q
    return basis
