"""Which part of a filter does what: PACT's shield on zoo 0, our own filter on zoo 1, part by part.

    python data/ablations.py --part shield
    python data/ablations.py --part filter

Every dose of PACT meets random directions that take the same energy. Rows are as in the fair table, scale by
validation data and hits on test data, and say which share of the energy a filter left; they lie in
data/fair/shield.jsonl.gz and data/fair/filter*.jsonl.gz. Nothing is chosen from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import controls
import fair_table
import minipact as mp
from benches import Bench, open_bench
from controls import Rank, orthogonal
from rows import path_of

# One of PACT's settings changed at a time, from a whole shield to hardly any.
DOSES: list[dict[str, Any]] = [
    *({"tol": tol} for tol in (1e-3, 0.03, 0.1, 0.2, 0.3)),
    *({"core": core} for core in (1, 0.1, 0.2)),
    *({"task": task} for task in (1, 0.08)),
    {"strength": 0.5},
]
SHIELD_RULES = ("task_arithmetic", "tsv_m")
# Our own filter without a part of it, with another part, and what takes as much without a thought.
PARTS: list[tuple[str, dict[str, Any]]] = [
    ("wiener", {}),
    ("wiener", {"side": "output"}),
    ("wiener", {"side": "input"}),
    ("without_need", {}),
    ("without_claims", {}),
    ("with_reliance", {}),
    ("rotated_wiener", {}),
    ("shrunk", {}),
    ("random_wiener", {}),
]
COUNTS = (2, 4, 6)  # of tasks, the first ones
RANKS = (0.05, 0.2)  # of updates, as shares of the smaller side


# ---- Parts of a shield ---------------------------------------------------------------------------


def random_energy(
    W0: Tensor,
    D: Tensor,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    strength: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Random input directions cleared, as many as take the energy that PACT takes of each task."""
    like = mp.pact(W0, D, core=core, task=task, tol=tol, strength=strength)
    return randomly(D, like, generator)


def random_wiener(D: Tensor, *, generator: torch.Generator) -> Tensor:
    """Random input directions cleared, as many as take the energy that our own filter takes."""
    return randomly(D, mp.wiener(D), generator)


def randomly(D: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    """D [T, m, n] without random directions, so that it keeps no more energy than `like` does."""
    kept = (controls.norms(like) / controls.norms(D).clamp_min(1e-300)).square().flatten()
    bases = orthogonal(D.shape[2], len(D), generator)
    return torch.stack([cut(d, Q, float(x)) for d, Q, x in zip(D, bases, kept, strict=True)])


def cut(d: Tensor, basis: Tensor, kept: float) -> Tensor:
    """d [m, n] without so many columns of a basis [n, n] that at most a share of the energy is kept."""
    seen = (d.double() @ basis).square().sum(0)
    lost = seen.cumsum(0) / seen.sum().clamp_min(1e-300)
    count = int((lost < 1 - kept - 1e-9).sum()) + (kept < 1 - 1e-9)
    gone = basis[:, :count]
    return (d.double() - d.double() @ gone @ gone.mT).to(d)


def spared(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, task: Rank = 0.04, tol: float = 1e-3
) -> Tensor:
    """PACT with shields at right angles to the task's own leading directions, which it so keeps whole."""
    walls = mp.load_bearing_walls(W0, D, core=core, task=task, tol=tol)
    own = mp.tsv_compress(D, rank=task)[2].double()
    shields = []
    for j, v in enumerate(own):
        shield = walls.shield(j).double()
        u, s, _ = torch.linalg.svd(shield - v @ (v.mT @ shield), full_matrices=False)
        shields.append(u[:, s > tol])
    return controls.cleared(D, shields)


# ---- Parts of our own filter ---------------------------------------------------------------------


def weighed(D: Tensor, need: Tensor, claim: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`wiener` with any needs and claims: outputs [T, m, m] each, then inputs [T, n, n] each."""
    e, Q = seats(need, claim)
    f, R = seats(a, b)
    X = Q @ D.double() @ R.mT / (1 + 30.0 * e.unsqueeze(2) * f.unsqueeze(1))
    return torch.linalg.solve(R, torch.linalg.solve(Q, X).mT).mT.to(D)


def seats(need: Tensor, claim: Tensor) -> tuple[Tensor, Tensor]:
    """e [T, m] and Q [T, m, m] with need = Q^T Q and claim = Q^T diag(e) Q."""
    lower = torch.linalg.cholesky(need)
    half = torch.linalg.solve_triangular(lower, claim, upper=False).mT
    e, U = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half, upper=False))
    return e, (lower @ U).mT


def needs_and_claims(D: Tensor) -> tuple[Tensor, Tensor]:
    """What `wiener` puts into the output side at its defaults, A and B [T, m, m]."""
    unit = D.double() / controls.norms(D).clamp_min(1e-300)
    C = D.shape[1] * unit @ unit.mT
    return C + torch.eye(D.shape[1]).to(C), (C.sum(0) - C) / (len(D) - 1)


def alike(x: Tensor, mean: float) -> Tensor:
    """Multiples of the identity in place of matrices [T, m, m]."""
    return mean * torch.eye(x.shape[1]).to(x).expand_as(x)


def without_need(D: Tensor) -> Tensor:
    """Every direction is needed alike, as much as on average."""
    (A, B), (a, b) = needs_and_claims(D), needs_and_claims(D.mT)
    return weighed(D, alike(A, 2.0), B, alike(a, 2.0), b)


def without_claims(D: Tensor) -> Tensor:
    """Every direction is claimed alike, as much as on average."""
    (A, B), (a, b) = needs_and_claims(D), needs_and_claims(D.mT)
    return weighed(D, A, alike(B, 1.0), a, alike(b, 1.0))


def with_reliance(W0: Tensor, D: Tensor) -> Tensor:
    """The others also claim the inputs they rely on, as PACT sees them, as much as those they change."""
    v0 = (
        torch.linalg.svd(W0.double(), full_matrices=False)
        .Vh[: max(1, int(0.05 * min(W0.shape)))]
        .mT
    )
    own = mp.tsv_compress(D, rank=0.04)[2].double()
    walls = v0 - own @ (own.mT @ v0)
    R = walls @ walls.mT
    R = R * (D.shape[2] / R.diagonal(dim1=1, dim2=2).sum(1)[:, None, None])
    a, b = needs_and_claims(D.mT)
    return weighed(D, *needs_and_claims(D), a, b + (R.sum(0) - R) / (len(D) - 1))


def shrunk(D: Tensor) -> Tensor:
    """Each task matrix shrunk to the norm that our own filter leaves it, all directions alike."""
    return D * (controls.norms(mp.wiener(D)) / controls.norms(D).clamp_min(1e-300)).to(D)


for function, needs in (
    (random_energy, ("base", "generator")),
    (spared, ("base",)),
    (random_wiener, ("generator",)),
    (without_need, ()),
    (without_claims, ()),
    (with_reliance, ("base",)),
    (shrunk, ()),
):
    controls.enter(function, *needs)


# ---- Rows ----------------------------------------------------------------------------------------


def shield_rows() -> list[mp.Recipe]:
    """Doses of PACT, each before random directions of the same energy; and own need spared."""
    filters = [(name, dose) for dose in DOSES for name in ("pact", "random_energy")]
    filters.append(("spared", {}))
    found = [fair_table.alone(rule, "mean") for rule in SHIELD_RULES]
    return found + behind_all(SHIELD_RULES, filters)


def filter_rows() -> list[mp.Recipe]:
    """Our own filter without one of its parts, and what is as large."""
    found = [fair_table.alone(rule, "mean") for rule in fair_table.JURY]
    return found + behind_all(fair_table.JURY, PARTS)


def behind_all(
    rules: Sequence[str], filters: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[mp.Recipe]:
    """Every rule behind every filter."""
    return [fair_table.behind(rule, name, options) for name, options in filters for rule in rules]


def low_rank(bench: Bench, share: float) -> Bench:
    """The same models with updates of a lower rank, a share of each matrix's smaller side."""
    sides = fair_table.matrices(bench)
    return replace(
        bench,
        name=f"filter_rank_{share}",
        tasks={
            task: {k: lowered(bench.base[k], x, share) if k in sides else x for k, x in w.items()}
            for task, w in bench.tasks.items()
        },
    )


def lowered(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """Base plus the leading directions of an update."""
    u, s, vh = torch.linalg.svd(tuned - base, full_matrices=False)
    count = max(1, int(share * len(s)))
    return base + u[:, :count] * s[:count] @ vh[:count]


def smaller(bench: Bench) -> list[Bench]:
    """Zoo with fewer tasks, and zoo with updates of lower rank."""
    tasks = list(bench.tasks)
    fewer = [bench.only(tasks[:count], f"filter_{count}_tasks") for count in COUNTS]
    return fewer + [low_rank(bench, share) for share in RANKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", required=True, choices=("shield", "filter"))
    parser.add_argument("--threads", type=int, default=1, help="for torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part == "shield":
        fill(open_bench("zoo0"), "shield", shield_rows())
        return
    bench = open_bench("zoo1")
    fill(bench, "filter", filter_rows())
    for few in smaller(bench):
        rows = [fair_table.alone(rule, "mean") for rule in fair_table.JURY]
        fill(few, few.name, rows + behind_all(fair_table.JURY, [("wiener", {})]))


def fill(bench: Bench, name: str, rows: Sequence[mp.Recipe]) -> None:
    """Measure what a file lacks, with test data."""
    fair_table.fill(bench, path_of(name), rows, test=True)


if __name__ == "__main__":
    main()
