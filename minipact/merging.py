"""Model merging in one file: task arithmetic, TIES, DARE, TSV-M, Iso-C, Iso-CTS, SIFT and PACT.

Needs torch only: copy this file into any project. Everything is one pipeline, *purify, then merge*:

    for each weight:  W0 [m, n] of the base, D [T, m, n] = the T task matrices W_t - W0
        purifiers     (W0, D) -> D        pact, sift, dare, or your own function
        one rule      D -> merged         task_arithmetic, ties, tsv_m, iso_c, iso_cts, or your own
        result        W0 + scale * merged

Shapes stand in square brackets: m outputs, n inputs, T tasks. Singular vectors are columns.
"""

from __future__ import annotations

import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor

Rank = int | float | str
Device = str | torch.device
State = Mapping[str, Tensor]
States = Mapping[str, State]
Tasks = Sequence[State] | States
Weights = Mapping[str, float] | None
Function = Callable[..., Tensor]
Generator = torch.Generator | None
Generators = Generator | Sequence[Generator]
Triples = tuple[Tensor, Tensor, Tensor]
Dtype = torch.dtype | None
Notes = tuple[str, ...]
Options = Mapping[str, Mapping[str, Any]]
Factors = Sequence[float] | Mapping[str, float] | None
Progress = Callable[[int, int, str], None] | None


class MergeError(ValueError):
    """Input or option that cannot be merged; the message names the tensor or option and the remedy."""


# ---- Registry of methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A purifier or a rule as `merge` sees it.

    `scope` "matrix" acts on 2-D weights (a rule then gives vectors the mean), "tensor" on all. `scale` is
    recommended, per value of `reduce` ("any" without), `needs` what `merge` supplies besides D, `given`
    the options of this run, `patterns` globs of tensor names.
    """

    name: str
    kind: str
    function: Function
    scope: str = "matrix"
    source: str = ""
    scale: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    patterns: tuple[str, ...] = ("*",)

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        supplied = ("W0", "D", "generator", "thresholds")
        options = {p.name: p.default for p in parameters if p.name not in supplied}
        if self.kind == "purifier" or "thresholds" in self.needs:
            options["scope"] = None if self.kind == "purifier" else "global"
        return options


METHODS: dict[str, Method] = {}
_F = TypeVar("_F", bound=Function)


def _method(
    kind: str, scope: str, source: str, needs: str = "", **scale: float
) -> Callable[[_F], _F]:
    """Decorator that enters a function on tensors into METHODS."""

    def register(function: _F) -> _F:
        name = function.__name__
        METHODS[name] = Method(name, kind, function, scope, source, scale, tuple(needs.split()))
        return function

    return register


# ---- Singular vectors ----------------------------------------------------------------------------


def _rank_tolerance(dtype: torch.dtype) -> float:
    """Share of the largest singular value below which a direction counts as rounding."""
    return 1e-12 if dtype == torch.float64 else 1e-5


def _svd(x: Tensor, tol: float, rank: Rank | None = None) -> Triples:
    """SVD in float64 on the numerical range, S > tol S_1: U [m, k], S [k] descending, V [n, k].

    With a rank, only the leading triples. From tol 1e-6 on it goes by the eigenvectors of the smaller
    Gram matrix, faster than an SVD; it squares the singular values, so it cannot serve smaller ones.
    """
    if x.shape[0] < x.shape[1]:
        v, s, u = _svd(x.mT, tol, rank)
        return u, s, v
    if not _is_finite(x):
        raise MergeError("a matrix holds NaN or infinity: check the checkpoints it comes from")
    x = x.double()
    if tol < 1e-6:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        v = vh.mT
    else:
        squares, v = torch.linalg.eigh(_gram(x))
        s, v = squares.flip(0).clamp(min=0).sqrt(), v.flip(1)
    k = int((s > tol * s[:1]).sum())
    k = k if rank is None else min(k, _count(rank, min(x.shape), s[:k]))
    s, v = s[:k], v[:, :k].contiguous()  # a view would keep all n x n of it
    return (u[:, :k].contiguous() if tol < 1e-6 else x @ v / s), s, v


def _gram(x: Tensor, block: int = 256) -> Tensor:
    """x^T x [n, n], of which eigh reads the lower triangle: only the blocks that touch it are filled."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], block):
        gram[i:, i : i + block] = x[:, i:].mT @ x[:, i : i + block]
    return gram


def _randomized_svd(
    x: Tensor, count: int, generator: Generator, oversample: int = 10, power: int = 3
) -> Triples:
    """Leading singular triples by the range finder with power iterations (Halko et al. 2011)."""
    shape = (x.shape[1], min(count + oversample, *x.shape))
    source = generator.device if generator else "cpu"  # so that the numbers are the same elsewhere
    sketch = torch.randn(shape, generator=generator, dtype=torch.float64, device=source)
    q = torch.linalg.qr(x @ sketch.to(x)).Q
    for _ in range(power):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q).Q).Q
    u, s, v = _svd(q.mT @ x, _rank_tolerance(x.dtype), min(count, shape[1]))
    return q.double() @ u, s, v


def _count(rank: Rank, size: int, spectrum: Tensor | None = None) -> int:
    """Number of singular directions that a rank setting means for a matrix with min(m, n) = size."""
    if isinstance(rank, str) and re.fullmatch(r"energy:(0?\.\d+|1(\.0*)?)", rank):
        if spectrum is None:
            raise MergeError(f"rank {rank!r} needs the whole spectrum: use svd='exact'")
        held = spectrum.square().cumsum(0)
        return int((held < float(rank[7:]) * held[-1:]).sum()) + 1 if len(held) else 0
    if isinstance(rank, float) and 0 < rank < 1:
        return max(1, int(rank * size + 1e-9))
    if isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank <= size:
        return rank
    hint = "give a count from 0 to min(m, n), a share between 0 and 1, or 'energy:0.85'"
    raise MergeError(f"rank {rank!r} does not fit a matrix: {hint}")


def _leading_svd(x: Tensor, rank: Rank, svd: str, generator: Generator) -> Triples:
    """Leading singular triples U [m, k], S [k], V [n, k] in float64, k at most the numerical rank."""
    _check_known("svd", [svd], ("exact", "randomized"))
    x, rank = _lift(x), "none" if rank is None else rank  # it would mean all of them to _svd
    if svd == "randomized":
        return _randomized_svd(x, _count(rank, min(x.shape)), generator)
    return _svd(x, _rank_tolerance(x.dtype), rank)


def _polar(x: Tensor, tol: float) -> Tensor:
    """Polar factor U V^T of x = U S V^T on its numerical range: the nearest partial isometry.

    Completing it to a full isometry would fill exactly the directions that PACT cleared.
    """
    u, _, v = _svd(x, tol)
    return u @ v.mT


# ---- Purifiers: (W0, D) -> D ---------------------------------------------------------------------


@_method("purifier", "matrix", "Shi et al. 2026, arXiv 2606.18627", "base generator")
def pact(
    W0: Tensor,
    D: Tensor,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    strength: float = 1.0,
    svd: str = "exact",
    generator: Generator = None,
) -> Tensor:
    """PACT: take out of each task matrix what would run over the other tasks' load-bearing walls.

    D'_j = D_j - strength * D_j P_j P_j^T, where P_j = `shield_basis(W0, D, j)` spans what the other
    tasks rely on. Source: Shi et al. 2026 (arXiv 2606.18627); `strength` below 1 is our extension.

    Args:
        W0: [m, n] pre-trained weight itself, not a difference.
        D: [T, m, n] task matrices W_t - W0.
        core: K, leading right singular directions of W0 that form the pre-trained core.
        task: k, leading right singular directions of each D_t that count as its own update. Both: an
            int is a count, a float in (0, 1) a share of min(m, n), at least 1, and "energy:0.85" the
            smallest count with this share of the squared spectrum. They stop at the numerical rank.
        tol: relative singular value above which a direction belongs to a basis. Small values protect
            the full union of the other tasks' LBW subspaces; from about 0.2 on little more than the core.
        strength: 0 leaves D as it is, 1 removes the shield entirely.
        svd: "exact", or "randomized" (range finder, 10 extra columns, 3 power iterations, drawn from
            `generator`): within 1 % in Frobenius norm where spectra decay like 1/i, else less close.

    Returns [T, m, n] filtered task matrices in D's dtype; one task alone comes back unchanged. Raises
    MergeError where shapes do not fit, W0 is zero, a rank is out of range, or an option is unknown.
    """
    _check_stack(D, W0)
    if not 0 <= strength <= 1:
        raise MergeError(f"strength={strength}: must lie between 0 and 1")
    if len(D) == 1 or strength == 0:
        return D.clone()
    frame, reliance = _reliance(W0, D, core, task, tol, svd, generator)
    filtered = torch.empty_like(D)
    for j, d in enumerate(D):
        filtered[j] = _remove(d, frame @ _union(reliance, j, tol), strength)
    return filtered


@_method("purifier", "matrix", "Shi et al. 2026, arXiv 2606.18627", "base generator")
def sift(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, svd: str = "exact", generator: Generator = None
) -> Tensor:
    """SIFT, PACT's static variant: take the pre-trained core out of every task matrix.

    D'_t = D_t - D_t V_0 V_0^T with V_0 [n, K] the leading right singular vectors of W0. Equals
    `pact` with task=0 for two tasks or more. Arguments, shapes and errors as in `pact`.
    """
    _check_stack(D, W0)
    v0 = _core(W0, core, svd, generator)
    return torch.stack([_remove(d, v0, 1.0) for d in D])


@_method("purifier", "tensor", "Yu et al. 2024, arXiv 2311.03099", "generators")
def dare(
    D: Tensor, p: float = 0.9, *, rescale: bool = True, generator: Generators = None
) -> Tensor:
    """DARE: drop each entry with probability p, divide the rest by 1 - p (Yu et al. 2024, section 3).

    D and the result are [T, ...], task matrices or vectors. rescale=False only drops. `generator` is one
    for all tasks, or a sequence with one for each. Raises MergeError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise MergeError(f"p={p} must satisfy 0 <= p < 1")
    per_task = generator if isinstance(generator, Sequence) else [generator] * len(D)
    kept = torch.empty_like(D)
    for d, out, g in zip(D, kept, per_task, strict=True):
        draws = torch.rand(d.shape, generator=g, device=g.device if g else "cpu")
        torch.mul(d, (draws >= p).to(d.device), out=out)
    return kept.div_(1 - p) if rescale else kept


def _core(W0: Tensor, core: Rank, svd: str, generator: Generator) -> Tensor:
    """Leading right singular vectors of the pre-trained weight, V_0 [n, K] in float64."""
    if core != 0 and not W0.any():
        hint = "pass the weight itself, not a difference, or leave this tensor out (exclude, scope)"
        raise MergeError(f"the pre-trained weight is zero, so it has no core to protect: {hint}")
    return _leading_svd(W0, core, svd, generator)[2]


def _coordinates(
    W0: Tensor, D: Tensor, core: Rank, task: Rank, svd: str, generator: Generator
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Orthonormal frame [n, q] of V_0 and every V_t, q <= K + sum k_t, and their coordinates in it."""
    v0 = _core(W0, core, svd, generator)
    updates = [_leading_svd(d, task, svd, generator)[2] for d in D]
    frame = torch.linalg.qr(torch.cat([v0, *updates], dim=1)).Q
    return frame, frame.mT @ v0, [frame.mT @ v for v in updates]


def _reliance(
    W0: Tensor, D: Tensor, core: Rank, task: Rank, tol: float, svd: str, generator: Generator
) -> tuple[Tensor, list[Tensor]]:
    """Common frame [n, q], and in it every task's LBW basis [q, r_t], of V_0 - V_t V_t^T V_0."""
    if not 0 <= tol < 1:
        raise MergeError(f"tol={tol} must satisfy 0 <= tol < 1")
    frame, c0, own = _coordinates(W0, D, core, task, svd, generator)
    return frame, [_orth(c0 - c @ (c.mT @ c0), tol) for c in own]


def _union(reliance: list[Tensor], j: int, tol: float) -> Tensor:
    """Orthonormal basis [q, p] of the sum of all LBW subspaces but the j-th."""
    others = reliance[:j] + reliance[j + 1 :]
    return _orth(torch.cat(others, dim=1), tol) if others else reliance[j][:, :0]


def _orth(a: Tensor, tol: float) -> Tensor:
    """Orthonormal basis of the columns of a [q, c] by rank: singular values above tol times the first.

    A reduced QR of a wide, rank-deficient matrix would return a complete basis, and the filter delete
    everything. A matrix of rounding size spans nothing.
    """
    return _svd(a, max(tol, 1e-12))[0] if a.norm() > 1e-6 else a[:, :0]


def _remove(d: Tensor, basis: Tensor, strength: float) -> Tensor:
    """d - strength * d P P^T for d [m, n] and orthonormal P [n, p], in d's dtype."""
    x = _lift(d)
    p = basis.to(x.dtype)
    cleared: Tensor = torch.addmm(x, x @ p, p.mT, alpha=-strength)
    return cleared.to(d.dtype)


# ---- Rules: D -> merged --------------------------------------------------------------------------


@_method("rule", "tensor", "Ilharco et al. 2023, arXiv 2212.04089", sum=0.3, mean=1.0)
def task_arithmetic(D: Tensor, reduce: str = "sum") -> Tensor:
    """The "sum" or "mean" of the task matrices D [T, ...] (Ilharco et al. 2023, section 2)."""
    _check_known("reduce", [reduce], ("sum", "mean"))
    return D.sum(0) if reduce == "sum" else D.mean(0)


@_method("rule", "tensor", "Yadav et al. 2023, arXiv 2306.01708", "thresholds", mean=1.0, sum=0.3)
def ties(
    D: Tensor, density: float = 0.2, reduce: str = "mean", *, thresholds: Tensor | None = None
) -> Tensor:
    """TIES: trim small entries, elect a sign per entry, merge what agrees (Yadav et al. 2023).

    D is [T, ...], the result [...]. Each task keeps its int(density * d) largest entries in magnitude,
    ties included (the released code keeps one more), or those from `thresholds` [T] on. reduce="mean"
    averages the entries that agree with the elected sign, "sum" adds them, "max" takes the largest; an
    entry whose sum is exactly zero stays zero. Raises MergeError for a density or reduce out of range.
    """
    _check_known("reduce", [reduce], ("mean", "sum", "max"))
    if thresholds is None:
        thresholds = _thresholds(lambda: [D], len(D), density, D[0].numel())
    floor = thresholds.to(D.device).view(-1, *[1] * (D.ndim - 1))
    trimmed = torch.where(D.abs().float() >= floor, D, 0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0)
    if reduce == "max":
        return sign * agreeing.abs().amax(0)
    total = agreeing.sum(0)
    return total if reduce == "sum" else total / (agreeing != 0).sum(0).clamp(min=1)


def _thresholds(stream: Any, tasks: int, density: float, size: int, combine: Any = None) -> Tensor:
    """Per task the int(density * size)-th largest magnitude in a stream of D [T, ...], [T] in float32.

    Non-negative float32 numbers sort like their bit patterns. A first pass counts their upper 16 bits,
    a second one the lower 16 bits of those in the bin found: exact, in memory that does not grow with
    the model. `combine` adds up the counts of several processes.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density={density} of TIES must satisfy 0 < density <= 1")
    found, ranks = torch.zeros(2, tasks, dtype=torch.int64)
    ranks += max(1, int(density * size + 1e-9))
    for shift in (16, 0):
        counts = torch.zeros(tasks, 65536, dtype=torch.int64)
        for D in stream():
            for t, bits in enumerate(D.abs().float().reshape(tasks, -1).view(torch.int32)):
                digits = bits >> 16 if shift else (bits & 0xFFFF)[bits >> 16 == int(found[t])]
                counts[t] += torch.bincount(digits, minlength=65536).cpu()
        counts = combine(counts) if combine else counts
        reached = counts.flip(1).cumsum(1).flip(1)  # how many numbers lie in this bin or above
        digit = ((reached >= ranks[:, None]).sum(1) - 1).clamp(min=0)
        ranks = ranks - (reached - counts).gather(1, digit[:, None])[:, 0]
        found = found << 16 | digit
    thresholds: Tensor = found.int().view(torch.float32)
    return thresholds


@_method("rule", "matrix", "Gargiulo et al. 2025, arXiv 2412.00081", "generator", any=1.0)
def tsv_m(
    D: Tensor, *, rank: Rank | None = None, svd: str = "exact", generator: Generator = None
) -> Tensor:
    """TSV-Merge: truncate each task to its leading singular triples, whiten across tasks, add.

    With the triples of all tasks side by side, U [m, Tk], S [Tk], V [n, Tk], the result is
    polar(U) diag(S) polar(V)^T. Source: Gargiulo et al. 2025, section 3.2 (arXiv 2412.00081).

    D is [T, m, n], the result [m, n] in its dtype. rank is k, the triples per task, as a count, share or
    energy as in `pact`; None is min(m, n) // T, at least 1. svd="randomized" pays when k is small
    against min(m, n). Raises MergeError unless D is a finite stack of matrices and the options fit.
    """
    _check_stack(D)
    k = max(1, min(D.shape[1:]) // len(D)) if rank is None else rank
    triples = [_leading_svd(d, k, svd, generator) for d in D]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    tol = _rank_tolerance(D.dtype)
    left, right = (_polar(x, tol).to(_lift(D)) for x in (u, v))
    return (left * s.to(left) @ right.mT).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", any=1.3)
def iso_c(D: Tensor, *, mean_over: str = "all") -> Tensor:
    """Iso-C: give every singular direction of the summed task matrices their mean singular value.

    D [T, m, n], result and errors as in `tsv_m`. mean_over="all" averages over min(m, n) values as
    published, "range" over the numerical rank. Source: Marczak et al. 2025, section 4.1.
    """
    _check_stack(D)
    u, s, v = _svd(_lift(D).sum(0), _rank_tolerance(D.dtype))
    return (_mean_singular_value(s, D, mean_over) * (u @ v.mT)).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", any=1.5)
def iso_cts(D: Tensor, common: float = 0.8, *, mean_over: str = "all") -> Tensor:
    """Iso-CTS: Iso-C on a common subspace plus each task's own leading directions outside of it.

    The common part takes the leading directions of the summed matrices, a share 0 < common <= 1 of
    min(m, n) (1 is Iso-C); the rest goes in equal parts to the tasks' residuals. Arguments, result and
    errors as in `iso_c`. Source: Marczak et al. 2025, section 4.2, algorithm 2.
    """
    _check_stack(D)
    if not 0 < common <= 1:
        raise MergeError(f"common={common} must satisfy 0 < common <= 1")
    size, tol = min(D.shape[1:]), _rank_tolerance(D.dtype)
    stack = _lift(D)
    own = min(round((size - int(size * common)) / len(D)), (size - 1) // len(D))
    shared = _svd(stack.sum(0), tol, size - own * len(D))
    residuals = (_own_directions(d.double(), shared[0], own, tol) for d in stack)
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(shared, *residuals, strict=True))
    merged = _mean_singular_value(s, D, mean_over) * (_polar(u, tol) @ _polar(v, tol).mT)
    return merged.to(D.dtype)


def _own_directions(d: Tensor, common: Tensor, count: int, tol: float) -> Triples:
    """Leading triples of d outside the common left directions; below tol * ||d|| all is rounding."""
    u, s, v = _svd(d - common @ (common.mT @ d), tol, count)
    count = int((s > tol * d.norm()).sum())
    return u[:, :count], s[:count], v[:, :count]


def _mean_singular_value(s: Tensor, D: Tensor, mean_over: str) -> Tensor:
    _check_known("mean_over", [mean_over], ("all", "range"))
    return s.sum() / (min(D.shape[1:]) if mean_over == "all" else max(1, len(s)))


# ---- Whole models --------------------------------------------------------------------------------

_LOOKUP_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "wte.")
_GPT2_LAYERS = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.weight")
_RANK_OPTIONS = ("core", "task", "rank")


def default_policy(name: str, tensor: Tensor) -> str:
    """How a floating-point tensor is treated: "matrix", "matrix_T", "vector" or "copy".

    Matrices are 2-D weights used as x @ W^T. "matrix_T" is stored the other way round, for x @ W (CLIP's
    `visual.proj`, GPT-2's Conv1D layers): purifiers see it transposed. Vectors are all the rest: biases,
    norms, convolutions, token tables, and `text_projection`, as published; so are positional embeddings
    as matrices. Statistics of batch normalisation are copied: recompute them after merging.
    """
    if name.endswith(("running_mean", "running_var")):
        return "copy"
    if tensor.ndim != 2 or any(t in name for t in ("text_projection", *_LOOKUP_TABLES)):
        return "vector"
    transposed = name == "proj" or name.endswith("visual.proj") or _GPT2_LAYERS.search(name)
    return "matrix_T" if transposed else "matrix"


@dataclass(frozen=True)
class Step:
    """What happens to one tensor: its kind, the purifiers in order, the rule ("mean", "copy", ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    purify: tuple[str, ...]
    rule: str


@dataclass(frozen=True)
class Plan:
    """A checked merge: one step per tensor of the base, the scale, notes, and what it works on."""

    steps: tuple[Step, ...]
    scale: float
    notes: Notes
    base: State
    tasks: States
    weights: Mapping[str, float]
    purifiers: tuple[Method, ...]
    rule: Method
    device: Device
    seed: int

    def merged(
        self, *, dtype: Dtype = None, progress: Progress = None, **part: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor on the CPU) one by one; arguments as in `merge` and `deltas`."""

        def finish(step: Step, base: Tensor, delta: Tensor | None) -> tuple[str, Tensor]:
            return step.name, _add(step.name, base, delta, self.scale, dtype).cpu()

        for done, (name, tensor) in enumerate(self.deltas(finish, **part), start=1):
            yield name, tensor
            if progress is not None:
                progress(done, len(self.steps), name)

    def deltas(
        self, finish: Any = None, *, names: Any = None, combine: Any = None, mapper: Any = map
    ) -> Iterator[Any]:
        """Per tensor of the base: its step, the base tensor, and the merged delta, None for a copy.

        With `finish`, what it returns for these three. `mapper` spreads the steps over threads,
        see `minipact.threads`. One process of several takes `names`, and `combine` adds up counts of all.
        """
        steps = [step for step in self.steps if names is None or step.name in names]
        self._refuse_identical()
        thresholds = self._thresholds(steps, combine)

        def work(step: Step) -> Any:
            found = step, self.base[step.name], self._delta(step, thresholds)
            return finish(*found) if finish else found

        yield from mapper(work, self._read_ahead(steps))

    def _delta(self, step: Step, thresholds: Tensor | None) -> Tensor | None:
        if step.rule == "copy":
            return None
        mean, size, delta, end = step.rule == "mean", math.prod(step.shape), torch.empty(0), 0
        by_entry = mean or self.rule.function is task_arithmetic or thresholds is not None
        for D in self._task_matrices(step, by_entry):
            part = (D.mean(0) if mean else self._call(self.rule, step, D, thresholds)).flatten()
            delta = delta if end else part if len(part) == size else part.new_empty(size)
            delta[end : end + len(part)] = part
            end += len(part)
        return None if _is_zero(delta) else delta.view(step.shape)

    def _read_ahead(self, steps: Sequence[Step]) -> Iterator[Step]:
        """The steps; mappings with a method `prefetch(name)` hear of the next tensor one step ahead."""
        for step, ahead in zip(steps, [*steps[1:], *steps[-1:]], strict=True):
            for state in (self.base, *self.tasks.values()):
                if hasattr(state, "prefetch"):
                    state.prefetch(ahead.name)
            yield step

    def _task_matrices(self, step: Step, by_entry: bool) -> Iterator[Tensor]:
        """D [T, m, n] of one tensor after all purifiers; where nothing but entries counts, in blocks."""
        source = step.name, self.base, self.tasks, self.weights, self.device
        for D in _delta_blocks(*source, whole=not by_entry or bool(step.purify)):
            for method in self.purifiers:
                D = self._call(method, step, D) if method.name in step.purify else D
            yield D

    @torch.no_grad()
    def _call(self, method: Method, step: Step, D: Tensor, thresholds: Any = None) -> Tensor:
        """Run one purifier or rule on one tensor, with the arguments it needs."""
        purifies = method.kind == "purifier"
        if method.scope == "matrix" and _is_zero(D):
            return D if purifies else D[0]
        options = {key: value for key, value in method.given.items() if key != "scope"}
        counts = {k: v for k, v in options.items() if k in _RANK_OPTIONS and isinstance(v, int)}
        options |= {key: min(count, *D.shape[1:]) for key, count in counts.items()}
        if "generator" in method.needs:
            options["generator"] = _generator(self.seed, step.name)
        if "generators" in method.needs:
            options["generator"] = [_generator(self.seed, task, step.name) for task in self.tasks]
        if "thresholds" in method.needs:
            options["thresholds"] = thresholds
        turned = step.kind == "matrix_T" and purifies and method.scope == "matrix"
        inputs = [self.base[step.name].to(D), D] if "base" in method.needs else [D]
        inputs = [x.mT for x in inputs] if turned else inputs
        try:
            result = method.function(*inputs, **options)
        except MergeError as error:
            raise MergeError(f"tensor '{step.name}', {method.name}: {error}") from error
        if result.shape != (inputs[-1] if purifies else inputs[-1][0]).shape:
            shape = f"the shape {tuple(result.shape)} for D {tuple(inputs[-1].shape)}"
            raise MergeError(f"tensor '{step.name}': {method.name} returned {shape}")
        return result.mT if turned else result

    def _thresholds(self, steps: Sequence[Step], combine: Any) -> Tensor | None:
        """TIES' trimming magnitude per task over the whole model, which is purified for each pass."""
        if "thresholds" not in self.rule.needs or self.rule.given["scope"] == "tensor":
            return None
        size = sum(math.prod(step.shape) for step in self.steps if step.rule == self.rule.name)
        trimmed = [step for step in steps if step.rule == self.rule.name]

        def stream() -> Iterator[Tensor]:
            return (D for s in self._read_ahead(trimmed) for D in self._task_matrices(s, True))

        return _thresholds(stream, len(self.tasks), self.rule.given["density"], size, combine)

    def _refuse_identical(self) -> None:
        merged = [step.name for step in self.steps if step.rule != "copy"]
        for label, task in self.tasks.items():
            if all(torch.equal(self.base[name], task[name]) for name in merged):
                hint = "leave it out, or check that the right files were given"
                raise MergeError(f"task '{label}' equals the base in every tensor to merge: {hint}")


def plan(
    base: State,
    tasks: Tasks,
    *,
    rule: str | Function = "task_arithmetic",
    purify: str | Function | Sequence[str | Function] = (),
    scale: float | None = None,
    weights: Factors = None,
    options: Options | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    policy: Callable[[str, Tensor], str] = default_policy,
    device: Device = "cpu",
    seed: int = 0,
) -> Plan:
    """Check a merge by names, shapes and options, without reading weights. Arguments as in `merge`.

    Raises MergeError, one message with every problem of the inputs.
    """
    named = _named_tasks(tasks)
    problems = [text for name, task in named.items() for text in _mismatches(base, name, task)]
    if problems:
        raise MergeError("\n".join(problems))
    several = [purify] if isinstance(purify, str) or callable(purify) else purify
    settings = dict(options or {})
    purifiers = tuple(_configured(p, "purifier", settings, base) for p in several)
    chosen = _configured(rule, "rule", settings, base)
    if idle := settings.keys() - {m.name for m in (*purifiers, chosen) if m.source}:
        raise MergeError(f"options for {_listing(idle)}, which is not used: add rule or purifier")
    wanted, unwanted = _globs(include, base, "include"), _globs(exclude, base, "exclude")
    steps = []
    for name in base:
        tensor = _meta(base, name)
        kept = _matches(name, wanted or ("*",)) and not _matches(name, unwanted)
        kind = policy(name, tensor) if kept and tensor.is_floating_point() else "copy"
        steps.append(_step(name, tensor, kind, purifiers, chosen))
    for method in (*purifiers, chosen):
        _check_work(method, steps)
    scaled, factors = _scale(scale, chosen, purifiers), _task_weights(weights, tasks, named)
    checked = Plan(tuple(steps), *scaled, base, named, factors, purifiers, chosen, device, seed)
    return _tried(checked)


def merge(
    base: State, tasks: Tasks, *, dtype: Dtype = None, progress: Progress = None, **recipe: Any
) -> dict[str, Tensor]:
    """Merge fine-tuned models into their common base: purify the task vectors, then merge them.

    Args:
        base: pre-trained model, a mapping name -> tensor: a state dict or a lazy checkpoint.
        tasks: fine-tuned models with the same names and shapes, as a list or as a mapping
            task name -> model. With names the result does not depend on their order, bit for bit.
        dtype: floating-point type of the result; None keeps the base's. All work is done in float32
            at least, in float64 where an input is float64.
        progress: called with (tensors done, tensors in all, name) after each.
        rule: name in METHODS ("task_arithmetic"), or a function D [T, m, n] -> [m, n] for matrices.
        purify: names in METHODS, or functions (W0, D) -> D for matrices, in order.
        scale: factor of the merged task vector. None takes the rule's recommended value
            (`METHODS[rule].scale`); no value is published behind a purifier, so try several there.
        weights: factor of each task vector before anything else; 1 each. Nothing is normalised.
        options: method name -> {option: value}. Purifiers also take "scope", one or several globs of
            tensor names; other tensors go to the rule unpurified. TIES takes "scope": "global" trims
            at one magnitude per task over the model, "tensor" tensor by tensor. A count of
            directions beyond a matrix' min(m, n) is cut to it.
        include, exclude: globs of tensor names; what they leave out is copied from the base.
        policy: (name, tensor) -> "matrix", "matrix_T", "vector" or "copy", see `default_policy`.
        device: where to compute ("cpu"); results are on the CPU.
        seed: of all random numbers (0), drawn apart for each tensor and task name.

    Returns name -> new tensor for every tensor of the base; integer tensors, and tensors that no task
    changed, are copies. Raises MergeError where the inputs do not fit together or hold NaN or infinity,
    a task equals the base, or a method or option is unknown or out of range.
    """
    return dict(merge_iter(base, tasks, dtype=dtype, progress=progress, **recipe))


def merge_iter(
    base: State, tasks: Tasks, *, dtype: Dtype = None, progress: Progress = None, **recipe: Any
) -> Iterator[tuple[str, Tensor]]:
    """`merge` as a generator of (name, tensor), one at a time; arguments are checked at the call."""
    return plan(base, tasks, **recipe).merged(dtype=dtype, progress=progress)


@torch.no_grad()
def _add(name: str, base: Tensor, delta: Tensor | None, scale: float, dtype: Dtype) -> Tensor:
    """base + scale * delta in a wide type, then in dtype; a copy of the base without a delta."""
    dtype = (dtype or base.dtype) if base.is_floating_point() else base.dtype
    if delta is None or scale == 0:
        merged = base.to(dtype, copy=True)
    else:
        merged = torch.empty(base.shape, dtype=dtype, device=delta.device)
        pieces = (_pieces(x, delta.device) for x in (merged, base, delta))
        for out, x, d in zip(*pieces, strict=True):
            out.copy_(torch.add(x.to(d), d, alpha=scale))
    if not _is_finite(merged) and _is_finite(base):
        hint = "check the base, take a smaller scale or a wider dtype"
        raise MergeError(f"tensor '{name}' of the result overflows {merged.dtype}: {hint}")
    return merged


def _pieces(x: Tensor, device: Device) -> Sequence[Tensor]:
    """The entries in pieces that fit into the cache where a CPU does the work, else in one."""
    size = 1 << 18 if torch.device(device).type == "cpu" else max(1, x.numel())
    return torch.split(x.flatten(), size)


def _delta_blocks(
    name: str, base: State, tasks: States, weights: Weights, device: Device, whole: bool = True
) -> Iterator[Tensor]:
    """weight * (fine-tuned - base), or a task's own `delta(name)`, as D [T, ...] or in blocks [T, b]."""
    direct = [getattr(task, "delta", lambda _: None)(name) for task in tasks.values()]
    tuned = (task[name] if d is None else d for task, d in zip(tasks.values(), direct, strict=True))
    tensors = [x.detach() for x in (base[name], *tuned)]
    wide = any(x.dtype == torch.float64 for x in tensors)
    kind = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)
    factors = list((weights or dict.fromkeys(tasks, 1.0)).values())
    pieces = ([x] if whole else _pieces(x, device) for x in tensors)

    def block(start: Tensor, *tuned: Tensor) -> Tensor:
        origin, D = start.to(kind), kind.new_empty(len(tuned), *start.shape)
        for delta, x, factor, d in zip(D, tuned, factors, direct, strict=True):
            torch.sub(x.to(kind), origin, alpha=int(d is None), out=delta)
            delta.mul_(factor) if factor != 1 else delta
        if not _is_finite(D):
            models = ["the base", *(f"task '{label}'" for label in tasks), "some task"]
            model = models[[*map(_is_finite, tensors), False].index(False)]
            raise MergeError(f"'{name}' of {model} holds NaN or infinity: repair or exclude it")
        return D

    return map(block, *pieces)


def _generator(seed: int, *names: str) -> torch.Generator:
    """CPU generator seeded by the seed and names, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32("/".join([str(seed), *names]).encode()))


# ---- Checks of arguments -------------------------------------------------------------------------


def _is_finite(x: Tensor) -> bool:
    x = x.float() if x.dtype.itemsize == 1 else x  # torch has no minimum of 8-bit floats
    return not x.numel() or all(map(torch.isfinite, x.aminmax()))


def _is_zero(x: Tensor) -> bool:
    return not x.numel() or not any(x.aminmax())


def _lift(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _meta(state: State, name: str) -> Tensor:
    """Shape and dtype of a tensor, unread where the mapping has a method `meta(name)`."""
    tensor: Tensor = getattr(state, "meta", state.__getitem__)(name)
    return tensor


def _listing(names: Iterable[object]) -> str:
    texts = [f"'{name}'" for name in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise MergeError(f"{what} {_listing(unknown)} is unknown: use {_listing(known) or 'none'}")


def _check_stack(D: Tensor, W0: Tensor | None = None) -> None:
    if D.ndim != 3 or len(D) == 0 or not D.is_floating_point():
        raise MergeError(f"D must be a floating-point [T, m, n], not {D.dtype} {tuple(D.shape)}")
    if W0 is not None and W0.shape != D.shape[1:]:
        raise MergeError(f"W0 {tuple(W0.shape)} does not fit D [T, m, n] = {tuple(D.shape)}")


def _named_tasks(tasks: Sequence[State] | States) -> dict[str, State]:
    """Tasks by name: sorted where the caller named them, else numbered from '0'."""
    pairs = sorted(tasks.items()) if isinstance(tasks, Mapping) else enumerate(tasks)
    named = {str(name): task for name, task in pairs}
    if not named or not all(isinstance(task, Mapping) for task in named.values()):
        raise MergeError("tasks must be a list, or a mapping by name, of state dicts: at least one")
    return named


def _mismatches(base: State, label: str, task: State) -> list[str]:
    """What keeps a fine-tuned model from being compared with the base, one line each."""
    if not isinstance(base, Mapping) or not base:
        return ["the base must be a mapping name -> tensor with entries: pass model.state_dict()"]
    problems = []
    if missing := [name for name in base if name not in task]:
        problems.append(f"task '{label}' lacks {_listing(missing)}: is it tuned from this base?")
    if extra := [name for name in task if name not in base]:
        problems.append(f"task '{label}' has {_listing(extra)}, unknown to the base: remove it")
    for name in [name for name in base if name in task]:
        x, y = _meta(base, name), _meta(task, name)
        if (x.shape, x.is_floating_point()) != (y.shape, y.is_floating_point()):
            given = f"{y.dtype} {tuple(y.shape)}, in the base {x.dtype} {tuple(x.shape)}"
            problems.append(f"task '{label}': '{name}' is {given}: crop, resize or convert it")
    return problems


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _globs(globs: str | Sequence[str] | None, names: Iterable[str], what: str) -> tuple[str, ...]:
    """Glob patterns as a tuple; each must match a name, so that a typo cannot pass silently."""
    given = globs if isinstance(globs, list | tuple) else [] if globs is None else [globs]
    patterns = tuple(map(str, given))
    if idle := [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]:
        raise MergeError(f"{what} {_listing(idle)} matches no tensor name of the base")
    return patterns


def _configured(method: str | Function, kind: str, options: Options, base: State) -> Method:
    """Registered method with its options checked by name, or the caller's own function."""
    if not isinstance(method, str):
        needs = ("base",) if kind == "purifier" else ()
        return Method(getattr(method, "__name__", "custom"), kind, method, needs=needs)
    _check_known(kind, [method], [m.name for m in METHODS.values() if m.kind == kind])
    found, given = METHODS[method], options.get(method, {})
    _check_known(f"{method} option", given, found.options)
    found = replace(found, given=found.options | dict(given))
    if kind == "purifier":
        patterns = _globs(given.get("scope"), base, f"{method} scope")
        return replace(found, patterns=patterns or ("*",))
    _check_known(f"{method} scope", [given.get("scope", "global")], ("global", "tensor"))
    return found


def _step(name: str, x: Tensor, kind: str, purifiers: Iterable[Method], rule: Method) -> Step:
    _check_known(f"policy for '{name}'", [kind], ("matrix", "matrix_T", "vector", "copy"))
    if kind.startswith("matrix") and x.ndim != 2:
        raise MergeError(f"policy: '{name}' of shape {tuple(x.shape)} cannot be a {kind}")

    def fits(method: Method) -> bool:
        acts = method.scope == "tensor" or kind.startswith("matrix")
        return acts and kind != "copy" and _matches(name, method.patterns)

    purify = tuple(m.name for m in purifiers if fits(m))
    how = "copy" if kind == "copy" else rule.name if fits(rule) else "mean"
    return Step(name, tuple(x.shape), x.dtype, kind, purify, how)


def _check_work(method: Method, steps: Iterable[Step]) -> None:
    """A purifier must find tensors, and a count of directions must fit one of them at least."""
    sizes = [min(s.shape, default=1) for s in steps if method.name in (*s.purify, s.rule)]
    if not sizes and (method.kind == "purifier" or all(s.rule == "copy" for s in steps)):
        raise MergeError(f"{method.name} has no tensor to work on: see scope, include and exclude")
    for option in _RANK_OPTIONS:
        rank, most = method.given.get(option), max(sizes, default=math.inf)
        if isinstance(rank, int) and rank > most:
            raise MergeError(f"{method.name}.{option}={rank} is above the largest rank, {most}")


def _tried(checked: Plan) -> Plan:
    """A merge of small random matrices shows options out of range before any weight is read."""
    purify = tuple(m.name for m in checked.purifiers if m.source)
    rule = checked.rule.name if checked.rule.source else "mean"
    step = Step("", (4, 4), torch.float32, "matrix", purify, rule)
    base, *tuned = torch.randn(len(checked.tasks) + 1, 4, 4, generator=_generator(0))
    tasks = {name: {"": x} for name, x in zip(checked.tasks, tuned, strict=True)}
    small = replace(checked, steps=(step,), base={"": base}, tasks=tasks, weights={}, device="cpu")
    try:
        list(small.deltas())
    except MergeError as error:
        raise MergeError(str(error).removeprefix("tensor '', ")) from error
    except TypeError as error:
        raise MergeError(f"{_listing([*purify, rule])}: wrong option type: {error}") from error
    return checked


def _scale(scale: float | None, rule: Method, purifiers: Sequence[Method]) -> tuple[float, Notes]:
    """The scale to use, and what the user should know about it."""
    if scale is not None:
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise MergeError(f"scale={scale} must be finite, within float32's range")
        return float(scale), ()
    if not rule.source:
        return 1.0, ("scale 1.0: your own rule has no recommended value",)
    reduce = rule.given.get("reduce", "any")
    if reduce not in rule.scale:
        raise MergeError(f"{rule.name} with reduce={reduce!r} has no recommended scale: give one")
    behind = ", ".join(m.name for m in purifiers)
    caution = f" alone; no value is published behind {behind}: try several on validation data"
    note = f"scale {rule.scale[reduce]}, recommended for {rule.name}"
    return rule.scale[reduce], (note + caution if behind else note,)


def _task_weights(weights: Factors, tasks: Tasks, named: States) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(named, 1.0)
    names = tasks if isinstance(tasks, Mapping) else named
    pairs = weights if isinstance(weights, Mapping) else dict(zip(map(str, names), weights))  # noqa: B905
    fits = len(weights) == len(named) and pairs.keys() == named.keys()
    if not fits or not all(map(math.isfinite, pairs.values())):
        raise MergeError(f"weights must give one finite number for each of {_listing(named)}")
    return {name: float(pairs[name]) for name in named}
