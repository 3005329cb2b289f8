"""Checks of what a reader fills in: check("reliance", reliance, V0=V0, V=V).

The right answer is computed from the inputs that the cell gives, so a reader may change them. A wrong one is
told what is wrong with it and not what would be right.
"""

from __future__ import annotations

from collections.abc import Callable
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


def sensitivity(X: Tensor) -> Tensor:
    """TATR's sensitivity of task vectors X [T, d], without data."""
    return X.abs().sum(0).square() - X.square().sum(0)


def shifted(G: Tensor, c: Tensor) -> Tensor:
    """Inner products of tau_i - sum_t c_t tau_t, from those of the tau_i, G [T, T]."""
    away = torch.eye(len(G)).to(G) - c
    return away @ G @ away.mT


QUESTIONS = {
    "reliance": Question(reliance),
    "shield": Question(shield, basis=True),
    "half_width": Question(half_width),
    "tall_mask": Question(tall_mask),
    "rescaler": Question(rescaler),
    "covariance": Question(covariance),
    "least_squares": Question(least_squares),
    "sensitivity": Question(sensitivity),
    "shifted": Question(shifted),
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
