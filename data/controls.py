"""Purifiers that know less than PACT, or than `wiener`: controls of the same size, for the fair table.

Each takes the options of what it controls, and clears or shrinks as much as that would with them. Importing
this module enters them into minipact's registry, so that a Recipe can name them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import minipact as mp
from minipact import plain

Rank = int | float | str


def cleared(D: Tensor, shields: list[Tensor]) -> Tensor:
    """D [T, m, n] without what each task has in its shield, orthonormal [n, p]."""
    pairs = zip(D, shields, strict=True)
    return torch.stack([d - d @ shield.to(d) @ shield.to(d).mT for d, shield in pairs])


def sizes(W0: Tensor, D: Tensor, core: Rank, task: Rank, tol: float) -> list[int]:
    """Dimension of PACT's shield against each task."""
    walls = mp.load_bearing_walls(W0, D, core=core, task=task, tol=tol)
    return [walls.shield(j).shape[1] for j in range(len(D))]


def random_shield(
    W0: Tensor,
    D: Tensor,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    generator: torch.Generator,
) -> Tensor:
    """PACT with random subspaces of the same dimensions in place of its shields."""
    shields = []
    for size in sizes(W0, D, core, task, tol):
        drawn = torch.randn(D.shape[2], size, generator=generator, dtype=torch.float64)
        shields.append(torch.linalg.qr(drawn).Q)
    return cleared(D, shields)


def updates_shield(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3
) -> Tensor:
    """PACT with what the other tasks change in place of what they rely on: no look at the base.

    The shield against a task holds the leading input directions of the others' updates, each of norm one.
    """
    unit = D.double() / norms(D).clamp_min(1e-300)
    shields = []
    for j, size in enumerate(sizes(W0, D, core, task, tol)):
        others = torch.cat([unit[:j], unit[j + 1 :]]).flatten(0, 1)
        directions = torch.linalg.eigh(others.mT @ others).eigenvectors
        shields.append(directions[:, directions.shape[1] - size :])
    return cleared(D, shields)


def shrinking(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3
) -> Tensor:
    """Each task matrix shrunk to the norm that PACT leaves it, all directions alike."""
    kept = norms(mp.pact(W0, D, core=core, task=task, tol=tol))
    return D * (kept / norms(D).clamp_min(1e-300)).to(D)


def rotated_wiener(
    D: Tensor, *, claims: float = 30.0, ridge: float = 1.0, generator: torch.Generator
) -> Tensor:
    """`wiener` with needs and claims of equal spectra in random directions, anew for every task and side."""
    if len(D) == 1:
        return D
    turned = orthogonal(D.shape[1], len(D), generator) @ D.double()
    turned = turned @ orthogonal(D.shape[2], len(D), generator)
    e, Q = plain.seats(turned, ridge)
    f, R = plain.seats(turned.mT, ridge)
    X = Q @ D.double() @ R.mT / (1 + claims * e.unsqueeze(2) * f.unsqueeze(1))
    return torch.linalg.solve(R, torch.linalg.solve(Q, X).mT).mT.to(D)


def orthogonal(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrices [count, size, size] in float64."""
    drawn = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def norms(D: Tensor) -> Tensor:
    """Frobenius norm of each task matrix, [T, 1, 1] in float64."""
    return D.double().norm(dim=(1, 2), keepdim=True)


def enter(function: Callable[..., Tensor], *needs: str) -> None:
    """Make a purifier known to minipact under its own name."""
    name = function.__name__
    mp.register(mp.Method(name, "purifier", function, "control of the fair table", needs=needs))


enter(random_shield, "base", "generator")
enter(updates_shield, "base")
enter(shrinking, "base")
enter(rotated_wiener, "generator")
