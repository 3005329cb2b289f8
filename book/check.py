"""Checks of what a reader fills in: check("reliance", reliance, V0=V0, V=V).

The right answer is computed from the inputs that the cell gives, so a reader may change them. A wrong one is
told what is wrong with it and not what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipact import plain

TOLERANCE = 1e-5  # of the largest entry, so that answers in float32 count


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        reference: the right answer, from the inputs of the cell.
        basis: whether every orthonormal basis of the same space is right; directions are columns.
    """

    reference: Callable[..., Tensor]
    basis: bool = False


def reliance(V0: Tensor, V: Tensor) -> Tensor:
    """What a task with update directions V [n, k] takes from the core V0 [n, K] as it found it."""
    return V0 - V @ (V.mT @ V0)


def shield(walls: list[Tensor], j: int) -> Tensor:
    """Orthonormal basis of the sum of all walls but the j-th."""
    return plain.basis(torch.cat([*walls[:j], *walls[j + 1 :]], dim=1), 1e-3)


def half_width(d: np.ndarray) -> Tensor:
    """Half of a 95 % interval for the mean of differences d [examples]."""
    return torch.tensor(1.96 * d.std(ddof=1) / len(d) ** 0.5)


def tall_mask(D: Tensor, t: int, lam: float) -> Tensor:
    """TALL mask of task t of D [T, d]."""
    return plain.tall(D, lam)[1][t]


def rescaler(D: Tensor, t: int) -> Tensor:
    """EMR's rescaler of task t of D [T, d]."""
    return plain.emr_rescalers({"": D})[t]


def covariance(X: Tensor) -> Tensor:
    """Mean of x x^T over the rows of X [N, n]."""
    return X.mT @ X / len(X)


def least_squares(D: Tensor, C: Tensor) -> Tensor:
    """The merge of D [T, m, n] that does best on inputs with covariances C [T, n, n]."""
    return torch.linalg.solve(C.sum(0), (D @ C).sum(0).mT).mT


def share(e: Tensor, f: Tensor, claims: float) -> Tensor:
    """Share of every seat [m, n] that the filter keeps, with claims e [m] on outputs and f [n] on inputs."""
    return 1 / (1 + claims * torch.outer(e, f))


def sensitivity(X: Tensor) -> Tensor:
    """TATR's sensitivity of task vectors X [T, d], without data."""
    return X.abs().sum(0).square() - X.square().sum(0)


def shifted(G: Tensor, c: Tensor) -> Tensor:
    """Inner products of tau_i - sum_t c_t tau_t, from those of the tau_i, G [T, T]."""
    away = torch.eye(len(G)).to(G) - c
    return away @ G @ away.mT


def fisher(p: Tensor, G: Tensor) -> Tensor:
    """Diagonal Fisher information [d]: probabilities p [N, C], gradients G [N, C, d] of their logarithms."""
    return (p[..., None] * G.square()).sum(1).mean(0)


def crucial(t: Tensor, f: Tensor, low: float = 0.3, high: float = 0.7) -> Tensor:
    """Mask of the weights with a small update t and a high Fisher information f, of equal shapes."""
    return (t.abs() < torch.quantile(t.abs(), low)) & (f > torch.quantile(f, high))


def merged(W0: Tensor, W: Tensor, alpha: float) -> Tensor:
    """Weight W0 [m, n] of the base plus alpha times all tasks' differences from it, of W [T, m, n]."""
    return W0 + alpha * plain.task_arithmetic(W - W0)


def cosines(X: Tensor) -> Tensor:
    """Cosines [T, T] between the rows of X [T, d]."""
    Y = X / X.norm(dim=1, keepdim=True)
    return Y @ Y.mT


def agreeing_mean(X: Tensor) -> Tensor:
    """TIES without trimming: in each column of X [T, d] the mean of the entries that won the vote."""
    return plain.ties(X, density=1.0)


def dare_variance(tau: Tensor, p: float) -> Tensor:
    """Variance of each entry of tau [d] under DARE with the drop rate p."""
    return p / (1 - p) * tau.square()


def low_rank(delta: Tensor, k: int) -> Tensor:
    """The matrix of rank k that is nearest to delta [m, n]."""
    U, S, V = plain.svd(delta, 0.0, k)
    return U * S @ V.mT


def whitened(X: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to X [m, q]."""
    return plain.polar(X, 1e-12)


def resting(A: Tensor, w: Tensor, lr: float, steps: int) -> Tensor:
    """Where rounds of `steps` steps of size lr and a mean come to rest, for A [T, n, n] and w [T, n]."""
    unit = torch.eye(A.shape[1]).to(A)
    W = unit - torch.linalg.matrix_power(unit - lr * A, steps)
    return torch.linalg.solve(W.sum(0), torch.einsum("tij,tj->i", W, w))


def scores(X: Tensor, y: Tensor, count: int) -> Tensor:
    """TaLoS's scores [count, n] of a linear layer on inputs X [N, n] with drawn classes y [N]."""
    return torch.nn.functional.one_hot(y, count).to(X).mT @ X.square()


def core(W0: Tensor, K: int) -> Tensor:
    """The K leading right singular vectors of W0 [m, n]: [n, K]."""
    return torch.linalg.svd(W0).Vh[:K].mT


def wall(V0: Tensor, V: Tensor) -> Tensor:
    """Load-bearing wall of a task with update directions V [n, k] beside the core V0 [n, K]."""
    return plain.basis(reliance(V0, V), 1e-3)


def cleared(d: Tensor, P: Tensor) -> Tensor:
    """An update d [m, n] without what it does on the span of P [n, p], orthonormal columns."""
    return d - d @ P @ P.mT


def hidden(V_s: Tensor, L_t: Tensor) -> Tensor:
    """Share of the update directions V_s [n, k] that lies in a wall L_t [n, r]."""
    return (V_s.mT @ L_t).square().sum() / V_s.shape[1]


def profile(d: Tensor, v0: Tensor) -> Tensor:
    """Share of a task matrix d [m, n] on each direction of a core v0 [n, K]."""
    return (d @ v0).square().sum(0) / d.square().sum()


def range_finder(A: np.ndarray, Omega: np.ndarray) -> Tensor:
    """Orthonormal basis of what A [m, n] makes of the random vectors Omega [n, ell]."""
    return plain.basis(torch.as_tensor(A @ Omega), 1e-12)


def captured(A: np.ndarray, V_hat: np.ndarray) -> Tensor:
    """Energy of A [m, n] on the directions V_hat [n, k], over that on its k leading ones."""
    best = torch.linalg.svdvals(torch.as_tensor(A))[: V_hat.shape[1]].square().sum()
    return torch.as_tensor(A @ V_hat).square().sum() / best


def bias(b0: Tensor, b: Tensor) -> Tensor:
    """Vector b0 [n] of the base plus the unscaled mean of the tasks' changes to it, of b [T, n]."""
    return b0 + (b - b0).mean(0)


def most_bytes(T: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Bytes that a streaming merge of T tasks holds at most, where tensors have these shapes."""
    return torch.tensor((2 * T + 4) * 4 * max(math.prod(shape) for shape in shapes))


def nearest(X: Tensor, H: Tensor) -> Tensor:
    """Row of H [C, d] that has the largest cosine with each row of X [N, d]."""
    return (plain.unit(X[:, None])[:, 0] @ plain.unit(H[:, None])[:, 0].mT).argmax(1)


def margins(X: Tensor, H: Tensor) -> Tensor:
    """Largest cosine minus the second largest, of each row of X [N, d] with the rows of H [C, d]."""
    cosines = plain.unit(X[:, None])[:, 0] @ plain.unit(H[:, None])[:, 0].mT
    best = cosines.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def normalised(merged: np.ndarray, own: np.ndarray) -> Tensor:
    """Mean over tasks of a merge's accuracies [T] as shares of the separate models' accuracies [T]."""
    return torch.tensor((merged / own).mean())


def task_width(d: np.ndarray) -> Tensor:
    """Half of a 95 % interval for what other tasks would gain, from the gains d of eight tasks."""
    return torch.tensor(2.365 * d.std(ddof=1) / len(d) ** 0.5)


QUESTIONS = {
    "merged": Question(merged),
    "cosines": Question(cosines),
    "agreeing_mean": Question(agreeing_mean),
    "dare_variance": Question(dare_variance),
    "low_rank": Question(low_rank),
    "whitened": Question(whitened),
    "reliance": Question(reliance),
    "shield": Question(shield, basis=True),
    "half_width": Question(half_width),
    "tall_mask": Question(tall_mask),
    "rescaler": Question(rescaler),
    "covariance": Question(covariance),
    "least_squares": Question(least_squares),
    "share": Question(share),
    "sensitivity": Question(sensitivity),
    "shifted": Question(shifted),
    "resting": Question(resting),
    "scores": Question(scores),
    "fisher": Question(fisher),
    "crucial": Question(crucial),
    "normalised": Question(normalised),
    "task_width": Question(task_width),
    "core": Question(core, basis=True),
    "wall": Question(wall, basis=True),
    "cleared": Question(cleared),
    "hidden": Question(hidden),
    "profile": Question(profile),
    "range_finder": Question(range_finder, basis=True),
    "captured": Question(captured),
    "bias": Question(bias),
    "bytes": Question(most_bytes),
    "nearest": Question(nearest),
    "margins": Question(margins),
}


def check(name: str, answer: object, **inputs: object) -> None:
    """Print whether the answer to a question is right, and if not, in which way it is wrong."""
    question = QUESTIONS[name]
    print(f"{name}: {verdict(answer, question.reference(**inputs), question.basis)}")


def verdict(answer: object, wanted: Tensor, basis: bool = False) -> str:
    """One line about an answer: "right", or what is wrong with it."""
    if answer is ...:
        return "not filled in yet"
    try:
        x = torch.as_tensor(answer).double()
    except (TypeError, ValueError, RuntimeError):
        return f"this is a {type(answer).__name__}, and numbers are wanted"
    return faults(x, wanted.double(), basis) or "right"


def faults(x: Tensor, wanted: Tensor, basis: bool) -> str:
    """What is wrong with numbers, empty if nothing is."""
    if x.shape != wanted.shape:
        turned = x.ndim == 2 and x.mT.shape == wanted.shape
        shapes = f"the shape is {list(x.shape)}, and {list(wanted.shape)} is wanted"
        return f"{shapes}: transposed?" if turned else shapes
    if not x.isfinite().all():
        return "there are entries that are not finite"
    if not x.any() and wanted.any():
        return "all entries are zero"
    return of_basis(x, wanted) if basis else of_values(x, wanted)


def of_values(x: Tensor, wanted: Tensor) -> str:
    """What is wrong with values of the right shape."""
    if close(x, wanted):
        return ""
    if close(-x, wanted):
        return "the sign is the wrong way round"
    if x.ndim == 2 and x.shape[0] == x.shape[1] and close(x.mT, wanted):
        return "this is the transpose"
    if x.ndim == 0:
        return "the value differs"
    factor = float((x * wanted).sum() / wanted.square().sum())
    if close(x, factor * wanted):
        return f"this is {factor:.3g} times what is wanted"
    worst = np.unravel_index(int((x - wanted).abs().argmax()), x.shape)
    return f"the values differ, most at {[int(i) for i in worst]}"


def of_basis(x: Tensor, wanted: Tensor) -> str:
    """What is wrong with the columns of x as an orthonormal basis of the span of wanted's."""
    gram = x.mT @ x
    if not close(gram.diagonal(), torch.ones(len(gram)).double()):
        return "the columns do not have length one"
    if not close(gram, torch.eye(len(gram)).double()):
        return "the columns are not at right angles"
    outside = float((x - wanted @ (wanted.mT @ x)).norm(dim=0).max())
    if outside <= TOLERANCE:
        return ""
    angle = np.degrees(np.arcsin(min(1.0, outside)))
    return f"orthonormal, but some column leaves the space by {angle:.0f} degrees"


def close(x: Tensor, wanted: Tensor) -> bool:
    """Whether all entries agree up to rounding."""
    return bool((x - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
