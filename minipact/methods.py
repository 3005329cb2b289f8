"""The methods of merging, for real use: linear algebra, load-bearing walls, purifiers, rules, the registry.

For each weight, W0 [m, n] of the base and D [T, m, n] = the T task matrices W_t - W0:

    purifiers     (W0, D) -> D        pact, sift, dare, wiener
    rules         D -> merged         task_arithmetic, ties, tsv_m, iso_c, iso_cts, wudi, ace

Relatives have rooms of their own: `minipact.whole_vector`, `minipact.least_squares`, `minipact.per_task`.
Checked, exact or randomized, in any floating-point type. `minipact/plain.py` has the same methods as bare
equations. Shapes stand in square brackets: m outputs, n inputs, T tasks. Singular vectors are columns.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.low_rank import Product, Products

Rank = int | float | str
Triples = tuple[Tensor, Tensor, Tensor]
RNG = torch.Generator | None
Function = Callable[..., Tensor | tuple[Tensor, ...]]
Option = bool | int | float | str | None
Options = Mapping[str, object]
Measure = Callable[..., Tensor]
SurveyPasses = Generator[Measure, Tensor, dict[str, Tensor]]
Survey = Callable[..., SurveyPasses]

# ---- Registry of methods -------------------------------------------------------------------------

KINDS = ("purifier", "rule", "per_task", "training")
ACTS_ON = ("matrix", "tensor", "entries")
SUPPLIED = ("base", "tuned", "generator", "generators")
FACTORS = "factors"  # of a LoRA, for rules that need not expand them
STATISTICS = {  # what takes data, for each task -> how it is made
    "covariance": "minipact.input_covariances(fine_tuned_model, batches)",
    "fisher": "minipact.fisher(fine_tuned_model, batches)",
    "gradient": "minipact.gradient_magnitudes(base_model, batches)",
}
COMMANDS = {  # the same from files to a file
    "covariance": "minipact statistics covariance TASK --data DATA -o FILE",
    "fisher": "minipact statistics fisher TASK --data DATA -o FILE",
    "gradient": "minipact statistics gradients BASE --task TASK --data DATA -o FILE",
}
PLAIN_WORDS = ("mean", "sum", "copy")  # what becomes of a tensor that no rule treats


@dataclass(frozen=True)
class Method:
    """A method of the registry: what it is, where it is from, and how the engine is to call it.

    Attributes:
        name: as users write it.
        kind: "purifier", (W0, D) -> D or D -> D; "rule", D -> merged; "per_task" and "training" are listed,
            but are no part of a merge.
        function: on tensors; all its parameters but those supplied are options with defaults.
        source: paper and arXiv number.
        acts_on: "matrix", 2-D weights only; "tensor", whole tensors of any shape, D [T, ...]; "entries",
            entry by entry, so that a tensor may come in blocks.
        scale: recommended scale by value of the option `reduce`, or under "any".
        needs: what the engine supplies besides D. "base": W0 as the first argument; "tuned": the
            fine-tuned weights [T, ...]; "generator": random numbers of this tensor; "generators": one
            generator for each task, as `generator`; "covariance", "fisher", "gradient": a statistic of
            the tasks' data, [T, n, n] or [T, ...], which a merge gets as `statistics`. One that
            `function` has a default for may be missing. "factors": a rule that takes D as `Products`
            too, which it gets where all tasks are adapters and no purifier acts; it returns [m, n] or a
            `Product`. Any other name comes from the survey.
        survey: a first pass over the model, a generator function that gets tasks=T, entries=d, the number
            of entries that the method treats, and those of the options that it has parameters for. Each
            function of D [T, ...] that it yields is called on every tensor, or for "entries" on blocks
            [T, b] of it, with the statistics that were given, and tuned=[T, ...] if it has this parameter;
            the values, tensors dense or sparse, are added up and sent back. What it returns reaches
            `function` as keyword arguments.
        sided: whether a rule on matrices tells inputs from outputs. Matrices stored for x @ W then come to
            it transposed, as they do to every purifier of matrices.
    """

    name: str
    kind: str
    function: Function
    source: str = ""
    acts_on: str = "matrix"
    scale: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    survey: Survey | None = None
    sided: bool = False

    def __post_init__(self) -> None:
        if self.name in PLAIN_WORDS:
            raise MergeError(
                f"a method cannot be called '{self.name}', which stands for what happens to tensors that no"
                " method treats: choose another name"
            )
        if not callable(self.function) or not self.name or re.search(r"[:.,=\s]", self.name):
            raise MergeError(
                f"a method needs a function and a name without : . , = or space, not {self.name!r}"
            )
        check_known(f"{self.name}: kind", [self.kind], KINDS)
        check_known(f"{self.name}: acts_on", [self.acts_on], ACTS_ON)
        if self.survey is None:
            check_known(f"{self.name}: needs", self.needs, (*SUPPLIED, *STATISTICS, FACTORS))

    @property
    def options(self) -> dict[str, Option]:
        """Names of the options with their defaults."""
        options = _defaults(self.function)
        if self.survey is not None:
            options |= _defaults(self.survey)
        if self.kind == "purifier":
            options["scope"] = None
        return {name: x for name, x in options.items() if name not in ("generator", *self.needs)}


def parameters_of(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function by name; none where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C
        return {}


def _defaults(function: Callable[..., object]) -> dict[str, Option]:
    parameters = parameters_of(function).values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


RANK_OPTIONS = ("core", "task", "rank")  # options that are ranks, in every method
METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Enter a method into METHODS, so that `merge` and the command line know it by name.

    Raises MergeError where another method has this name.
    """
    if METHODS.get(method.name, method) != method:
        raise MergeError(f"a method called '{method.name}' is registered: choose another name")
    METHODS[method.name] = method
    return method


def is_built_in(method: Method) -> bool:
    """Whether a method is of this package, so that its function may be trusted with any input."""
    place = getattr(method.function, "__module__", None) or ""
    return place.startswith("minipact.") and is_registered(method)


def is_registered(method: Method) -> bool:
    """Whether a method is the one in METHODS under its name."""
    return METHODS.get(method.name) is method


def find_method(given: str | Function | Method, kind: str) -> Method:
    """The purifier or rule that a user means.

    Args:
        given: a name in METHODS, "package.module:function" to import, a registered function or a Method,
            which are what their names are, or the caller's own function: a rule D [T, m, n] -> [m, n],
            or a purifier (W0, D) -> D, for matrices.
        kind: "purifier" or "rule".

    Raises MergeError where nothing of this name is there, or it is of another kind.
    """
    if isinstance(given, str) and ":" in given:
        given = _imported(given)
    if isinstance(given, str):
        if given not in METHODS:
            check_known(kind, [given], [m.name for m in METHODS.values() if m.kind == kind])
        given = METHODS[given]
    if not isinstance(given, Method):
        given = _method_of(given, kind)
    if given.kind in KINDS[2:]:
        place = f"{given.function.__module__}.{given.function.__name__}"
        whole = ", and minipact compress for models" if given.kind == "per_task" else ""
        raise MergeError(f"{given.name} is no {kind} but a {given.kind} method: see {place}{whole}")
    if given.kind != kind:
        raise MergeError(f"{kind} '{given.name}' is unknown: {given.name} is a {given.kind}")
    return given


def _imported(place: str) -> Function | Method:
    """The function or Method at "package.module:name"."""
    module, _, name = place.partition(":")
    try:
        found: Function | Method = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever its module does when it is imported
        hint = "write package.module:function, with its folder on PYTHONPATH"
        raise MergeError(f"{place} cannot be imported ({error!r}): {hint}") from error
    return found


def _method_of(function: Function, kind: str) -> Method:
    """The registered method with this function, else the caller's own as a method for matrices."""
    if not callable(function):
        raise MergeError(f"{kind} {function!r} is neither a name nor a function")
    for method in METHODS.values():
        if method.function is function:
            return method
    needs = ("base",) if kind == "purifier" else ()
    return Method(getattr(function, "__name__", "custom"), kind, function, needs=needs)


_F = TypeVar("_F", bound=Function)


def _method(
    kind: str,
    acts_on: str,
    source: str,
    needs: str = "",
    survey: Survey | None = None,
    sided: bool = False,
    **scale: float,
) -> Callable[[_F], _F]:
    """Decorator that registers a function on tensors under its own name."""

    def enter(function: _F) -> _F:
        name, needed = function.__name__, tuple(needs.split())
        register(Method(name, kind, function, source, acts_on, scale, needed, survey, sided))
        return function

    return enter


def named_generator(seed: int, *names: str) -> torch.Generator:
    """CPU generator seeded by the seed and names, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32("/".join([str(seed), *names]).encode()))


# ---- Checks of tensors ---------------------------------------------------------------------------


def is_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, of any type."""
    if x.is_complex():
        return bool(x.isfinite().all())
    if not x.is_floating_point():
        return True
    if x.itemsize == 1:  # torch has no minimum of 8-bit floats
        x = x.float()
    return not x.numel() or all(map(torch.isfinite, x.aminmax()))


def is_zero(x: Tensor) -> bool:
    """Whether all entries are zero."""
    return not x.numel() or not any(x.aminmax())


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_stack(D: Tensor | Products, W0: Tensor | None = None) -> None:
    """Raise MergeError unless D is a floating-point [T, m, n], T >= 1, and W0, if given, an [m, n]."""
    if isinstance(D, Products):
        return
    if D.ndim != 3 or len(D) == 0 or not D.is_floating_point():
        raise MergeError(f"D must be a floating-point [T, m, n], not {D.dtype} {tuple(D.shape)}")
    if W0 is not None and W0.shape != D.shape[1:]:
        raise MergeError(f"W0 {tuple(W0.shape)} does not fit D [T, m, n] = {tuple(D.shape)}")


def check_finite(x: Tensor | Products) -> None:
    """Raise MergeError where x holds NaN or infinity."""
    parts = [x] if isinstance(x, Tensor) else [part for d in x for part in (d.b, d.a)]
    if not all(map(is_finite, parts)):
        raise MergeError("a matrix holds NaN or infinity: check the checkpoints it comes from")


# ---- Singular vectors ----------------------------------------------------------------------------


def roundoff(dtype: torch.dtype) -> float:
    """Share of the largest singular value below which a direction counts as rounding."""
    return 1e-12 if dtype == torch.float64 else 1e-5


def singular_triples(x: Tensor, tol: float, rank: Rank | None = None) -> Triples:
    """U [m, k], S [k] descending, V [n, k] of x [m, n] in float64, on its range S > tol S_1.

    With a rank, only the leading triples. From tol 1e-6 on it goes by the eigenvectors of the smaller
    Gram matrix, faster than an SVD; it squares the singular values, so it cannot serve smaller ones, and
    U is orthonormal up to 1e-16 / tol^2 only. Raises MergeError where x holds NaN or infinity, or the rank
    is out of range.
    """
    if x.shape[0] < x.shape[1]:
        v, s, u = singular_triples(x.mT, tol, rank)
        return u, s, v
    check_finite(x)
    x = x.double()
    if tol < 1e-6:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        k = _kept(s, tol, rank)
        return u[:, :k].contiguous(), s[:k], vh[:k].mT.contiguous()
    squares, v = torch.linalg.eigh(gram_matrix(x))
    s = squares.flip(0).clamp(min=0).sqrt()
    k = _kept(s, tol, rank)
    s, v = s[:k], v.flip(1)[:, :k].contiguous()  # a view would keep all n x n of it
    return x @ v / s, s, v


def _kept(s: Tensor, tol: float, rank: Rank | None) -> int:
    """How many of the singular values s, descending, are above tol s_1 and among those of a rank."""
    k = int((s > tol * s[:1]).sum())
    return k if rank is None else min(k, direction_count(rank, len(s), s[:k]))


def gram_matrix(x: Tensor, block: int = 256) -> Tensor:
    """x^T x [n, n], of which eigh reads the lower triangle: only the blocks that touch it are filled."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], block):
        gram[i:, i : i + block] = x[:, i:].mT @ x[:, i : i + block]
    return gram


def randomized_triples(
    x: Tensor, count: int, generator: RNG, oversample: int = 10, power: int = 3
) -> Triples:
    """Leading singular triples by the range finder with power iterations (Halko et al. 2011)."""
    shape = (x.shape[1], min(count + oversample, *x.shape))
    source = generator.device if generator else "cpu"  # so that the numbers are the same elsewhere
    sketch = torch.randn(shape, generator=generator, dtype=torch.float64, device=source)
    q = torch.linalg.qr(x @ sketch.to(x)).Q
    for _ in range(power):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q).Q).Q
    u, s, v = singular_triples(q.mT @ x, roundoff(x.dtype), min(count, shape[1]))
    return q.double() @ u, s, v


def direction_count(rank: Rank, size: int, spectrum: Tensor | None = None) -> int:
    """Number of singular directions that a rank means for a matrix with min(m, n) = size.

    A count; a share of size, at least 1; or "energy:0.85", the fewest directions with that share of the
    squared spectrum. Raises MergeError for anything else.
    """
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


def thin_triples(x: Product, tol: float, rank: Rank) -> Triples:
    """`singular_triples` of a product [m, n], from those of its core of r x r at most."""
    q, core, p = x.thin()
    if not isinstance(rank, str):
        rank = min(direction_count(rank, min(x.shape)), *core.shape)
    u, s, v = singular_triples(core, tol, rank)
    return q @ u, s, p @ v


def leading_triples(x: Tensor | Product, rank: Rank, svd: str, generator: RNG) -> Triples:
    """Leading singular triples U [m, k], S [k], V [n, k] in float64, k at most the numerical rank.

    svd is "exact" or "randomized"; of a product they are exact, as this takes less. Raises MergeError as
    `singular_triples` does.
    """
    check_known("svd", [svd], ("exact", "randomized"))
    if rank is None:
        raise MergeError("rank None does not fit here: give a count, a share or 'energy:0.85'")
    if isinstance(x, Product):
        return thin_triples(x, roundoff(x.dtype), rank)
    x = widened(x)
    if svd == "randomized":
        return randomized_triples(x, direction_count(rank, min(x.shape)), generator)
    return singular_triples(x, roundoff(x.dtype), rank)


def polar_factor(x: Tensor, tol: float) -> Tensor:
    """U V^T [m, c] of x [m, c] = U S V^T on its numerical range, in float64: the nearest partial isometry.

    Completing it to a full isometry would fill exactly the directions that PACT cleared.
    """
    u, _, v = singular_triples(x, tol)
    return u @ v.mT


def span_basis(a: Tensor, tol: float) -> Tensor:
    """Orthonormal basis [q, r] in float64 of the columns of a [q, c], by rank.

    Directions are kept whose singular values are above tol times the first. A reduced QR of a wide,
    rank-deficient matrix would return a complete basis, and the filter delete everything. A matrix of
    rounding size spans nothing.
    """
    if a.norm() <= 1e-6:
        return a[:, :0]
    return singular_triples(a, max(tol, 1e-12))[0]


def unit_tasks(D: Tensor) -> Tensor:
    """D [T, m, n] in float64 with each task matrix of Frobenius norm 1; a zero one stays zero."""
    norms = D.double().norm(dim=(1, 2), keepdim=True)
    unit: Tensor = D.double() / norms.where(norms > 0, 1)
    return unit


# ---- Load-bearing walls --------------------------------------------------------------------------


@dataclass(frozen=True)
class Walls:
    """Load-bearing walls of one weight: what each task relies on without changing it.

    All subspaces lie in one frame, and are kept as coordinates in it, in float64.

    Attributes:
        frame: [n, q] orthonormal, spans the core V_0 and the update directions V_t of all tasks.
        core: [q, K], the leading right singular vectors of W0.
        updates: [q, k_t] for each task, the leading right singular vectors of D_t.
        bases: [q, r_t] for each task, orthonormal, spans V_0 - V_t V_t^T V_0: its LBW subspace.
        tol: relative singular value above which a direction belongs to a basis.
    """

    frame: Tensor
    core: Tensor
    updates: tuple[Tensor, ...]
    bases: tuple[Tensor, ...]
    tol: float

    def union(self, j: int) -> Tensor:
        """Coordinates [q, p] of an orthonormal basis of the sum of all LBW subspaces but the j-th."""
        others = [self.core[:, :0], *self.bases[:j], *self.bases[j + 1 :]]
        return span_basis(torch.cat(others, dim=1), self.tol)

    def shield(self, j: int) -> Tensor:
        """What task j must not touch: orthonormal basis [n, p] of the other tasks' LBW subspaces."""
        return self.frame @ self.union(j)


def load_bearing_walls(
    W0: Tensor,
    D: Tensor,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    svd: str = "exact",
    generator: RNG = None,
) -> Walls:
    """Load-bearing walls of one weight W0 [m, n] under task matrices D [T, m, n] (Shi et al. 2026).

    Keywords and errors as in `pact`, which is short on top of this.
    """
    check_stack(D, W0)
    v0 = core_directions(W0, core, svd, generator)
    return walls_between(v0, [leading_triples(d, task, svd, generator)[2] for d in D], tol)


def walls_between(v0: Tensor, updates: Sequence[Tensor], tol: float) -> Walls:
    """Walls from the core's directions V_0 [n, K] and the update directions V_t [n, k_t] themselves.

    Raises MergeError unless 0 <= tol < 1.
    """
    if not 0 <= tol < 1:
        raise MergeError(f"tol={tol} must satisfy 0 <= tol < 1")
    frame = torch.linalg.qr(torch.cat([v0, *updates], dim=1)).Q
    core, own = frame.mT @ v0, tuple(frame.mT @ v for v in updates)
    bases = tuple(span_basis(core - v @ (v.mT @ core), tol) for v in own)
    return Walls(frame, core, own, bases, tol)


def core_directions(W0: Tensor, core: Rank, svd: str, generator: RNG) -> Tensor:
    """Leading right singular vectors of the pre-trained weight, V_0 [n, K] in float64.

    Raises MergeError where W0 is zero, as it then has none.
    """
    if core != 0 and not W0.any():
        hint = "pass the weight itself, not a difference, or leave this tensor out (exclude, scope)"
        raise MergeError(f"the pre-trained weight is zero, so it has no core to protect: {hint}")
    return leading_triples(W0, core, svd, generator)[2]


def without_directions(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """x - strength * x P P^T for x [m, n] and orthonormal P [n, p], in x's dtype."""
    wide = widened(x)
    p = basis.to(wide)
    cleared: Tensor = torch.addmm(wide, wide @ p, p.mT, alpha=-strength)
    return cleared.to(x.dtype)


# ---- Purifiers: (W0, D) -> D or D -> D -----------------------------------------------------------


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
    generator: RNG = None,
) -> Tensor:
    """PACT: take out of each task matrix what would run over the other tasks' load-bearing walls.

    D'_j = D_j - strength * D_j P_j P_j^T, where P_j = `load_bearing_walls(W0, D).shield(j)` spans what the
    other tasks rely on. Source: Shi et al. 2026 (arXiv 2606.18627); `strength` below 1 is our extension.

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

    Our defaults are near the ranks 38 and 32 of the released analysis script at width 768. The released
    settings file says core=0.8 (a share) and task=10, which leaves nothing of narrow layers; the paper's own
    setting could not be confirmed.

    Returns [T, m, n] filtered task matrices in D's dtype; one task alone comes back unchanged. Raises
    MergeError where shapes do not fit or strength is out of range; with several tasks and a strength above
    0 also where W0 is zero, a rank is out of range, or an option is unknown.
    """
    check_stack(D, W0)
    if not 0 <= strength <= 1:
        raise MergeError(f"strength={strength}: must lie between 0 and 1")
    if len(D) == 1 or strength == 0:
        return D.clone()
    walls = load_bearing_walls(W0, D, core=core, task=task, tol=tol, svd=svd, generator=generator)
    filtered = torch.empty_like(D)
    for j, d in enumerate(D):
        filtered[j] = without_directions(d, walls.shield(j), strength)
    return filtered


@_method("purifier", "matrix", "Shi et al. 2026, arXiv 2606.18627", "base generator")
def sift(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """SIFT, PACT's static variant: take the pre-trained core out of every task matrix.

    D'_t = D_t - D_t V_0 V_0^T with V_0 [n, K] the leading right singular vectors of W0. Equals
    `pact` with task=0 for two tasks or more. Arguments, shapes and errors as in `pact`.
    """
    check_stack(D, W0)
    v0 = core_directions(W0, core, svd, generator)
    return torch.stack([without_directions(d, v0, 1.0) for d in D])


@_method("purifier", "tensor", "Yu et al. 2024, arXiv 2311.03099", "generators")
def dare(
    D: Tensor,
    p: float = 0.9,
    *,
    rescale: bool = True,
    generator: RNG | Sequence[torch.Generator] = None,
) -> Tensor:
    """DARE: drop each entry with probability p, divide the rest by 1 - p (Yu et al. 2024, section 3).

    D and the result are [T, ...], task matrices or vectors. rescale=False only drops. `generator` is one
    for all tasks, or a sequence with one for each. Raises MergeError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise MergeError(f"p={p} must satisfy 0 <= p < 1")
    if not isinstance(rescale, bool):
        raise MergeError(f"rescale={rescale!r} must be true or false")
    per_task = generator if isinstance(generator, Sequence) else [generator] * len(D)
    kept = torch.empty_like(D)
    for d, out, g in zip(D, kept, per_task, strict=True):
        draws = torch.rand(d.shape, generator=g, device=g.device if g else "cpu")
        torch.mul(d, (draws >= p).to(d.device), out=out)
    return kept.div_(1 - p) if rescale else kept


@_method("purifier", "matrix", "minipact, unpublished")
def wiener(D: Tensor, *, claims: float = 30.0, ridge: float = 1.0, side: str = "both") -> Tensor:
    """A Wiener filter: weigh what each task needs against what the others claim, on both sides.

    Task j's X minimises

        ||A^{1/2} (X - D_j) a^{1/2}||^2 + claims * ||B^{1/2} X b^{1/2}||^2

    On the output side C_i = D_i D_i^T, scaled to mean eigenvalue 1, A = C_j + ridge I is what the task needs
    and B = mean_{i != j} C_i what the others claim. a and b are the same of the input side, from D_i^T D_i.
    So an update gives way only where others claim both the input it reads and the output it writes. This
    project's own, unpublished; it needs no W0 and no data.

    Args:
        D: [T, m, n] task matrices W_t - W0.
        claims: weight of the others; 0 leaves D as it is.
        ridge: what a task needs in every direction, in units of the mean eigenvalue. The larger, the less
            the directions of its own update stand out.
        side: "both", or "output" or "input" alone, with identities on the other.

    Returns [T, m, n] filtered task matrices in D's dtype. Tasks whose column spaces are orthogonal, or
    their row spaces, stay as they are; so does one task alone. Takes T eigendecompositions a side, and
    memory for a few matrices [m, m] and [n, n] in float64. Raises MergeError unless D is a finite stack of
    matrices, claims is 0 or more, ridge is 1e-9 or more, and side is known.
    """
    check_stack(D)
    check_finite(D)
    check_known("side", [side], ("both", "output", "input"))
    _check_weights(claims, ridge)
    if len(D) == 1 or claims == 0:
        return D.clone()
    unit, filtered = unit_tasks(D), torch.empty_like(D)
    nothing = [None] * len(D)
    left = _claimed_seats(unit, ridge) if side != "input" else nothing
    right = _claimed_seats(unit.mT, ridge) if side != "output" else nothing
    for j, (rows, columns) in enumerate(zip(left, right, strict=True)):
        filtered[j] = _given_way(D[j].double(), claims, rows, columns)
    return filtered


def _check_weights(claims: float, ridge: float) -> None:
    if not 0 <= claims < math.inf:
        hint = "give 0 to leave D as it is, or a positive number such as 30"
        raise MergeError(f"claims={claims} must be 0 or more: {hint}")
    if not 1e-9 <= ridge < math.inf:
        hint = "give a number such as 1, or 1e-9, which float64 still tells from rounding"
        raise MergeError(f"ridge={ridge} must be above 0: {hint}")


def _claimed_seats(unit: Tensor, ridge: float) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of the tasks [T, m, n] of norm 1, e [m] and Q [m, m] with A = Q^T Q, B = Q^T diag(e) Q."""
    size = unit.shape[1]
    total = sum(x @ x.mT for x in unit)
    for x in unit:
        own = size * x @ x.mT
        others = (size * total - own) / (len(unit) - 1)
        own.diagonal().add_(ridge)
        lower = torch.linalg.cholesky(own)
        half = torch.linalg.solve_triangular(lower, others, upper=False)
        values, vectors = torch.linalg.eigh(
            torch.linalg.solve_triangular(lower, half.mT, upper=False)
        )
        yield values, (lower @ vectors).mT


def _given_way(
    d: Tensor,
    claims: float,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The X [m, n] of `wiener` for one task; None is a side that is left out."""
    factor = torch.full_like(d, claims)
    if rows:
        factor *= rows[0].unsqueeze(1)
        d = rows[1] @ d
    if columns:
        factor *= columns[0]
        d = d @ columns[1].mT
    d = d / (1 + factor)
    if rows:
        d = torch.linalg.solve(rows[1], d)
    if columns:
        d = torch.linalg.solve(columns[1], d.mT).mT
    return d


# ---- Rules: D -> merged --------------------------------------------------------------------------


@_method("rule", "entries", "Ilharco et al. 2023, arXiv 2212.04089", FACTORS, sum=0.3, mean=1.0)
def task_arithmetic(D: Tensor, reduce: str = "sum") -> Tensor:
    """The "sum" or "mean" of the task matrices D [T, ...] (Ilharco et al. 2023, section 2).

    Raises MergeError for another `reduce`.
    """
    check_known("reduce", [reduce], ("sum", "mean"))
    return D.sum(0) if reduce == "sum" else D.mean(0)


def largest_magnitudes(tasks: int, density: float, values: Measure = lambda D: D) -> SurveyPasses:
    """Survey of a stream of D [T, ...]: the smallest magnitude per task that a share `density` keeps.

    It is the int(density * d)-th largest of the d entries that a task has in values(D) [T, ...], over all
    D. Returns {"thresholds": [T] in float32}. Raises MergeError unless 0 < density <= 1.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density={density} of TIES must satisfy 0 < density <= 1")
    return {"thresholds": (yield from ranked_magnitudes(tasks, partial(count_of, density), values))}


def count_of(share: float, entries: int) -> int:
    """A share of so many entries, rounded down, 1 at least."""
    return max(1, int(share * entries + 1e-9))


def ranked_magnitudes(
    rows: int, rank: Callable[[int], int], values: Measure = lambda D: D
) -> Generator[Measure, Tensor, Tensor]:
    """Passes over a stream of D [T, ...] that find one magnitude in each row of values(D) [R, ...].

    Non-negative float32 numbers sort like their bit patterns. A first pass counts their upper 16 bits,
    a second one the lower 16 bits of those in the bin found: exact, in memory that does not grow with
    the model. The rank, 1 for the largest, is taken from the number of entries in a row. Returns [R] in
    float32.
    """
    found = torch.zeros(rows, dtype=torch.int64)
    ranks = None
    for half in ("upper", "lower"):
        counts = yield partial(_count_bit_patterns, half=half, upper=found, values=values)
        counts = counts.view(rows, 65536)
        if ranks is None:
            ranks = torch.tensor([rank(entries) for entries in counts.sum(1).tolist()])
        reached = counts.flip(1).cumsum(1).flip(1)  # how many numbers lie in this bin or above
        digit = ((reached >= ranks[:, None]).sum(1) - 1).clamp(min=0)
        ranks = ranks - (reached - counts).gather(1, digit[:, None])[:, 0]
        found = found << 16 | digit
    return found.int().view(torch.float32)


def _count_bit_patterns(
    D: Tensor, half: str, upper: Tensor, values: Measure, **statistics: Tensor
) -> Tensor:
    """How often each pattern of 16 bits occurs among the magnitudes of each row of values, [R * 65536].

    Of the lower half only where the upper one is as given, [R]. Sparse where the rows have few entries, as
    a table for each of thousands of small tensors would take longer than all else.
    """
    bits = values(D, **statistics).abs().float().reshape(len(upper), -1).view(torch.int32)
    counts = [_of_half(row, half, int(upper[t])) for t, row in enumerate(bits)]
    if bits.shape[1] >= 8192:
        return torch.stack([torch.bincount(x, minlength=65536) for x in counts]).flatten().cpu()
    bins = torch.cat([x.long() + 65536 * t for t, x in enumerate(counts)]).cpu()
    ones = torch.ones(len(bins), dtype=torch.int64)
    return torch.sparse_coo_tensor(bins[None], ones, (65536 * len(upper),), check_invariants=False)


def _of_half(bits: Tensor, half: str, upper: int) -> Tensor:
    """The upper 16 of 32 bits, or the lower 16 of those whose upper ones are as given."""
    if half == "upper":
        return bits >> 16
    return (bits & 0xFFFF)[bits >> 16 == upper]


def ties_survey(
    *, tasks: int, entries: int, density: float, reduce: str, scope: str = "global"
) -> SurveyPasses:
    """Survey of TIES: one magnitude per task over the whole model, none with scope="tensor"."""
    check_known("ties scope", [scope], ("global", "tensor"))
    if scope == "tensor":
        return {}
    return (yield from largest_magnitudes(tasks, density))


def run_survey(passes: SurveyPasses, stream: Callable[[Measure], Tensor]) -> dict[str, Tensor]:
    """Result of a survey; stream(measure) adds up a function's values over all D of a model."""
    total = None
    while True:
        try:
            measure = passes.send(total) if total is not None else next(passes)
        except StopIteration as end:
            result: dict[str, Tensor] = end.value
            return result
        total = stream(measure)


@_method(
    "rule",
    "entries",
    "Yadav et al. 2023, arXiv 2306.01708",
    "thresholds",
    survey=ties_survey,
    mean=1.0,
    sum=0.3,
)
def ties(
    D: Tensor, density: float = 0.2, reduce: str = "mean", *, thresholds: Tensor | None = None
) -> Tensor:
    """TIES: trim small entries, elect a sign per entry, merge what agrees (Yadav et al. 2023).

    D is [T, ...], the result [...]. Each task keeps its int(density * d) largest entries in magnitude,
    ties included (the released code keeps one more), or those from `thresholds` [T] on. reduce="mean"
    averages the entries that agree with the elected sign, "sum" adds them, "max" takes the largest; an
    entry whose sum is exactly zero stays zero. Magnitudes are compared in float32. In a merge,
    scope="global" trims at one magnitude per task over the whole model, "tensor" tensor by tensor. Raises
    MergeError for a density or reduce out of range.
    """
    check_known("reduce", [reduce], ("mean", "sum", "max"))
    if thresholds is None:
        survey = largest_magnitudes(len(D), density)
        thresholds = run_survey(survey, lambda measure: measure(D).to_dense())["thresholds"]
    floor = thresholds.to(D.device).view(-1, *[1] * (D.ndim - 1))
    trimmed = torch.where(D.abs().float() >= floor, D, 0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0)
    if reduce == "max":
        return sign * agreeing.abs().amax(0)
    total = agreeing.sum(0)
    if reduce == "sum":
        return total
    return total / (agreeing != 0).sum(0).clamp(min=1)


@_method("rule", "matrix", "Gargiulo et al. 2025, arXiv 2412.00081", "generator factors", any=1.0)
def tsv_m(
    D: Tensor | Products, *, rank: Rank | None = None, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """TSV-Merge: truncate each task to its leading singular triples, whiten across tasks, add.

    With the triples of all tasks side by side, U [m, Tk], S [Tk], V [n, Tk], the result is
    polar(U) diag(S) polar(V)^T. Source: Gargiulo et al. 2025, section 3.2 (arXiv 2412.00081).

    D is [T, m, n], the result [m, n] in its dtype. rank is k, the triples per task, as a count, share or
    energy as in `pact`; None is min(m, n) // T, at least 1. svd="randomized" pays when k is small against
    min(m, n); of factors, D as `Products`, the triples come exact without it. Raises MergeError unless D is a
    finite stack of matrices and the options fit.
    """
    check_stack(D)
    k = max(1, min(D.shape[1:]) // len(D)) if rank is None else rank
    triples = [leading_triples(d, k, svd, generator) for d in D]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    tol = roundoff(D.dtype)
    wide = torch.promote_types(D.dtype, torch.float32)
    left, right = (polar_factor(x, tol).to(wide) for x in (u, v))
    return (left * s.to(left) @ right.mT).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", any=1.3)
def iso_c(D: Tensor, *, mean_over: str = "all") -> Tensor:
    """Iso-C: give every singular direction of the summed task matrices their mean singular value.

    D [T, m, n], result and errors as in `tsv_m`. mean_over="all" averages over min(m, n) values as
    published, "range" over the numerical rank. Source: Marczak et al. 2025, section 4.1.
    """
    check_stack(D)
    u, s, v = singular_triples(widened(D).sum(0), roundoff(D.dtype))
    return (_mean_singular_value(s, D, mean_over) * (u @ v.mT)).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", any=1.5)
def iso_cts(D: Tensor, common: float = 0.8, *, mean_over: str = "all") -> Tensor:
    """Iso-CTS: Iso-C on a common subspace plus each task's own leading directions outside of it.

    The common part takes the leading directions of the summed matrices, a share 0 < common <= 1 of
    min(m, n) (1 is Iso-C); the rest goes in equal parts to the tasks' residuals. Arguments, result and
    errors as in `iso_c`. Source: Marczak et al. 2025, section 4.2, algorithm 2.
    """
    check_stack(D)
    if not 0 < common <= 1:
        raise MergeError(f"common={common} must satisfy 0 < common <= 1")
    size, tol = min(D.shape[1:]), roundoff(D.dtype)
    stack = widened(D)
    own = min(round((size - int(size * common)) / len(D)), (size - 1) // len(D))
    shared = singular_triples(stack.sum(0), tol, size - own * len(D))
    residuals = (_own_directions(d.double(), shared[0], own, tol) for d in stack)
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(shared, *residuals, strict=True))
    merged = _mean_singular_value(s, D, mean_over) * (
        polar_factor(u, tol) @ polar_factor(v, tol).mT
    )
    return merged.to(D.dtype)


def _own_directions(d: Tensor, common: Tensor, count: int, tol: float) -> Triples:
    """Leading triples of d outside the common left directions; below tol * ||d|| all is rounding."""
    u, s, v = singular_triples(d - common @ (common.mT @ d), tol, count)
    count = int((s > tol * d.norm()).sum())
    return u[:, :count], s[:count], v[:, :count]


def _mean_singular_value(s: Tensor, D: Tensor, mean_over: str) -> Tensor:
    check_known("mean_over", [mean_over], ("all", "range"))
    return s.sum() / (min(D.shape[1:]) if mean_over == "all" else max(1, len(s)))


@_method("rule", "matrix", "Cheng et al. 2025, arXiv 2503.08099", sided=True, any=1.0)
def wudi(D: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """WUDI: do on each task's own inputs, for which its update stands, what that update does.

    The rows of D_i are combinations of task i's inputs. The result M minimises
    sum_i ||(M - D_i) D_i^T||^2 / ||D_i||^2: with G = sum_i D_i^T D_i / ||D_i||^2,

        M = (sum_i D_i D_i^T D_i / ||D_i||^2) (G + ridge tr(G) / n I)^{-1}

    which is RegMean with D_i^T D_i for the covariance of the inputs. The paper descends from the sum of
    the D_i to the same minimum. Source: Cheng et al. 2025 (arXiv 2503.08099); the ridge is ours.

    D is [T, m, n], the result [m, n] in its dtype; zero updates add nothing. ridge=0 takes the
    pseudo-inverse, on the numerical rank of all rows together. Raises MergeError unless D is a finite stack
    of matrices, and ridge is 0 or at least 1e-9.
    """
    check_stack(D)
    check_finite(D)
    if ridge != 0 and not 1e-9 <= ridge < math.inf:
        hint = "give 0 for the pseudo-inverse, or a positive number such as 1e-3"
        raise MergeError(f"ridge={ridge} must be 0, or from 1e-9 on: {hint}")
    if is_zero(D):
        return torch.zeros_like(D[0])
    unit = unit_tasks(D)
    rows = unit.flatten(0, 1)  # [T m, n]
    targets = (unit @ D.double().mT).flatten(0, 1)  # [T m, m]: rows M^T = targets is to hold
    if ridge == 0:
        u, s, v = singular_triples(rows, roundoff(D.dtype))
        return (targets.mT @ u / s @ v.mT).to(D.dtype)
    gram = rows.mT @ rows
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    merged: Tensor = torch.linalg.solve(gram, targets.mT @ rows, left=False)
    return merged.to(D.dtype)


@_method("rule", "matrix", "CVPR 2026, arXiv 2603.02945", sided=True, any=1.0)
def ace(D: Tensor, *, epsilon: float = 1e-2) -> Tensor:
    """ACE-Merging: RegMean with covariances from the updates, centred over the outputs.

    With Z_t the update less its mean over the outputs, S_t = Z_t^T Z_t and E_t = epsilon I,

        M = (sum_t Z_t (S_t + E_t)) (sum_t (S_t + E_t) + C)^{-1}

    where every row of C is the mean row of sum_t S_t. Updates are uneven where the variance of
    log ||D_t||^2 is above 0.3 times their squared mean. Then S_t and E_t are divided by tr S_t, C by the
    mean of ||D_t||^2, and M gains the first 30 % of the singular directions of
    M + sum_t D_t (S_t - mean_t (S_t + E_t)), all with their mean singular value.

    Source: ACE-Merging, CVPR 2026 (arXiv 2603.02945), read from the authors' code, src/merge/strategy.py at
    commit 22d9dfe: so the numerator takes centred updates, but the norms and the last term those given;
    variances are over T - 1; 1e-12 is added to the squared mean, which may be 0. Our reading where
    that code divides by nothing: an update without a covariance, zero or with equal rows, is left
    out; a single one is not uneven; the 30 % are one direction at least, and none of rounding size.

    D is [T, m, n], the result [m, n] in its dtype. It does not scale with D. Raises MergeError
    unless D is a finite stack of matrices and epsilon is above 0.
    """
    check_stack(D)
    check_finite(D)
    if not 0 < epsilon < math.inf:
        raise MergeError(f"epsilon={epsilon} must be above 0: give a small number such as 0.01")
    given, centred = _with_covariance(D)
    if not len(given):
        return torch.zeros_like(D[0])
    squares = given.square().sum((1, 2))
    logs = squares.log()
    uneven = len(given) > 1 and bool(logs.var() > 0.3 * (logs.mean() ** 2 + 1e-12))
    traces, size = centred.square().sum((1, 2), keepdim=True), squares.mean()
    if not uneven:
        traces, size = torch.ones_like(traces), torch.ones_like(size)
    loads = epsilon / traces
    covariance = given.new_zeros(D.shape[2], D.shape[2])
    weighted, own = torch.zeros_like(given[0]), torch.zeros_like(given[0])
    for d, z, trace in zip(given, centred, traces, strict=True):
        one = z.mT @ z / trace
        covariance += one
        weighted += z @ one
        own += d @ one
    shared = covariance.mean(0) / size
    covariance.diagonal().add_(loads.sum())
    weighted += (loads * centred).sum(0)
    merged: Tensor = torch.linalg.solve(covariance + shared, weighted, left=False)
    if uneven:
        fused = merged + own - given.sum(0) @ covariance / len(given)
        merged += _leading_isotropic(fused, roundoff(D.dtype))
    return merged.to(D.dtype)


def _with_covariance(D: Tensor) -> tuple[Tensor, Tensor]:
    """Those task matrices whose rows differ, in float64, as given and less their mean row."""
    given = D.double()
    centred = given - given.mean(1, keepdim=True)
    seen = centred.norm(dim=(1, 2)) > roundoff(D.dtype) * given.norm(dim=(1, 2))
    return given[seen], centred[seen]


def _leading_isotropic(x: Tensor, tol: float, share: float = 0.3) -> Tensor:
    """The leading share of x's singular directions, all with their mean singular value."""
    u, s, v = singular_triples(x, tol, share)
    flat: Tensor = s.sum() / direction_count(share, min(x.shape)) * (u @ v.mT)
    return flat
