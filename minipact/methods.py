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
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.low_rank import Product, Products

PIECE = 1 << 20  # entries of matrices that are factorised in one call

Rank = int | float | str
Triples = tuple[Tensor, Tensor, Tensor]
RNG = torch.Generator | None
RNGs = RNG | Sequence[torch.Generator]
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
        scale: a rule's recommended scale by value of the option `reduce`, or under "any"; of a purifier,
            the scale for rules behind it, by the rule's name.
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
        batched: whether a method on matrices takes several weights at once: W0 [G, m, n], D [G, T, m, n] and
            a sequence of G generators, for G results.
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
    batched: bool = False

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
    batched: bool = False,
    **scale: float,
) -> Callable[[_F], _F]:
    """Decorator that registers a function on tensors under its own name."""

    def enter(function: _F) -> _F:
        name, needed = function.__name__, tuple(needs.split())
        method = Method(
            name, kind, function, source, acts_on, scale, needed, survey, sided, batched
        )
        register(method)
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
    if x.numel() <= 4096:
        return bool(x.isfinite().all())
    if bool(x.sum().isfinite()):
        return True
    low, high = x.aminmax()  # since finite entries may have a sum that is not
    return bool(low.isfinite() & high.isfinite())


def is_zero(x: Tensor) -> bool:
    """Whether all entries are zero."""
    if x.dim() > 1 and x.numel() > 4096 and x.device.type == "cpu" and not is_zero(x[0]):
        return False  # as most tensors tell by their first rows
    return not bool(x.any())


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_tensor(what: str, x: object) -> None:
    """Raise MergeError for a list of tensors, an array, or whatever else is no tensor and no `Products`."""
    if not isinstance(x, Tensor | Products):
        hint = "torch.stack makes one tensor of a list of them"
        raise MergeError(f"{what} must be a tensor, not {type(x).__name__}: {hint}")


def check_stack(D: Tensor | Products, W0: Tensor | None = None) -> None:
    """Raise MergeError unless D is a floating-point [T, m, n], T >= 1, and W0, if given, an [m, n]."""
    check_tensor("D", D)
    if W0 is not None:
        check_tensor("W0", W0)
    if isinstance(D, Products):
        return
    if D.ndim < 3 or D.shape[-3] == 0 or not D.is_floating_point():
        raise MergeError(f"D must be a floating-point [T, m, n], not {D.dtype} {tuple(D.shape)}")
    if W0 is not None and W0.shape != (*D.shape[:-3], *D.shape[-2:]):
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
    check_finite(x)
    u, s, v = padded_triples(x, tol, rank)
    return trimmed(u), s[s > 0], trimmed(v)


def padded_triples(x: Tensor, tol: float, rank: Rank | None = None) -> Triples:
    """`singular_triples` of each matrix in x [..., m, n]: U [..., m, k], S [..., k], V [..., n, k].

    All have the k that the rank means at most; what a matrix has less of is zero. Finite x only.
    """
    if x.shape[-2] < x.shape[-1]:
        v, s, u = padded_triples(x.mT, tol, rank)
        return u, s, v
    x = x.to(torch.float64, memory_format=torch.contiguous_format)  # else each product copies it
    if tol < 1e-6:
        left, s, vh = torch.linalg.svd(x, full_matrices=False)
        v = vh.mT
    else:
        squares, v = torch.linalg.eigh(gram_matrix(x))
        s, v = squares.flip(-1).clamp(min=0).sqrt(), v.flip(-1)
    kept = s > tol * s[..., :1]
    k = s.shape[-1]
    if rank is not None:
        k = most_directions(rank, k)
        kept = kept[..., :k] & _within_energy(rank, s * kept)[..., :k]
    s, v = s[..., :k] * kept, v[..., :k] * kept.unsqueeze(-2)
    if tol < 1e-6:
        return left[..., :k] * kept.unsqueeze(-2), s, v
    return x @ v / s.where(kept, 1).unsqueeze(-2), s, v


def _within_energy(rank: Rank, s: Tensor) -> Tensor:
    """Which of the singular values s [..., k], descending, "energy:0.85" means; all for other ranks."""
    if not isinstance(rank, str):
        return torch.ones_like(s, dtype=torch.bool)
    held = s.square().cumsum(-1)
    before = torch.nn.functional.pad(held, (1, -1))
    return before < float(rank[7:]) * held[..., -1:]


def trimmed(basis: Tensor) -> Tensor:
    """A padded basis [n, k] without its columns of zeros, in memory of its own."""
    return basis[:, basis.any(0)].contiguous()


def gram_matrix(x: Tensor, block: int = 256) -> Tensor:
    """x^T x [..., n, n], of which eigh reads the lower triangle: only the blocks that touch it are filled."""
    n = x.shape[-1]
    if n <= block:
        return x.mT @ x
    gram = x.new_zeros(*x.shape[:-2], n, n)
    for i in range(0, n, block):
        gram[..., i:, i : i + block] = x[..., i:].mT @ x[..., i : i + block]
    return gram


def randomized_triples(
    x: Tensor, count: int, generator: RNGs, oversample: int = 10, power: int = 3
) -> Triples:
    """Leading triples of x [..., m, n], padded, by the range finder with powers (Halko et al. 2011).

    `generator` is one, or a sequence with one for each entry of the first dimension.
    """
    width = min(count + oversample, *x.shape[-2:])
    sketch = drawn((*x.shape[:-2], x.shape[-1], width), generator).to(x)
    q = torch.linalg.qr(x @ sketch).Q
    for _ in range(power):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q).Q).Q
    u, s, v = padded_triples(q.mT @ x, roundoff(x.dtype), min(count, width))
    return q.double() @ u, s, v


def drawn(shape: tuple[int, ...], generator: RNGs) -> Tensor:
    """Normal random numbers [..., n, c] in float64, the same on every device: matrix by matrix.

    `generator` is one, or a sequence with one for each entry of the first dimension.
    """
    if isinstance(generator, Sequence):
        return torch.stack([drawn(shape[1:], g) for g in generator])
    source = generator.device if generator else "cpu"
    each = [
        torch.randn(shape[-2:], generator=generator, dtype=torch.float64, device=source)
        for _ in range(math.prod(shape[:-2]))
    ]
    return torch.stack(each).view(shape)


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


def most_directions(rank: Rank, size: int) -> int:
    """The count that a rank means at most; that of "energy:0.85" depends on the spectrum. Errors as above."""
    if isinstance(rank, str):
        direction_count(rank, size, torch.ones(1))
        return size
    return direction_count(rank, size)


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
    if isinstance(x, Product):
        _check_leading(rank, svd)
        return thin_triples(x, roundoff(x.dtype), rank)
    check_finite(x)
    u, s, v = padded_leading(x, rank, svd, generator)
    return trimmed(u), s[s > 0], trimmed(v)


def padded_leading(x: Tensor, rank: Rank, svd: str, generator: RNGs) -> Triples:
    """`leading_triples` of each matrix in x [..., m, n], padded with zeros to one k; finite x only."""
    _check_leading(rank, svd)
    x = widened(x)
    if svd == "randomized":
        return randomized_triples(x, direction_count(rank, min(x.shape[-2:])), generator)
    return padded_triples(x, roundoff(x.dtype), rank)


def _check_leading(rank: Rank | None, svd: str) -> None:
    check_known("svd", [svd], ("exact", "randomized"))
    if rank is None:
        raise MergeError("rank None does not fit here: give a count, a share or 'energy:0.85'")


def polar_factor(x: Tensor, tol: float) -> Tensor:
    """U V^T [..., m, c] of x [..., m, c] = U S V^T on its numerical range, in float64.

    It is the nearest partial isometry. Completing it to a full isometry would fill exactly the directions
    that PACT cleared.
    """
    u, _, v = padded_triples(x, tol)
    return u @ v.mT


def span_bases(a: Tensor, tol: float) -> Tensor:
    """Orthonormal bases [..., q, r] in float64 of the columns of a [..., q, c], by rank, padded with zeros.

    Directions are kept whose singular values are above tol times the first. A reduced QR of a wide,
    rank-deficient matrix would return a complete basis, and the filter delete everything. A matrix of
    rounding size spans nothing.
    """
    if a.shape[-1] == 0:
        return a
    basis = padded_triples(a, max(tol, 1e-12))[0]
    counts = a.square().sum((-2, -1), keepdim=True) > 1e-12
    return basis * counts


def side_by_side(x: Tensor) -> Tensor:
    """[x_1 .. x_T], [..., n, T k], of x [..., T, n, k]."""
    return x.movedim(-3, -2).flatten(-2)


def by_pieces(function: Callable[..., tuple[Tensor, ...]], *stacks: Tensor) -> tuple[Tensor, ...]:
    """function(*stacks) for stacks [T, m, n], in pieces along T that keep what it needs meanwhile small.

    Large matrices go one by one, as they would take memory for nothing; small ones together, since each
    operation has its price, and groups [..., T, m, n], which are small, in one.
    """
    size = max(1, PIECE // max(1, *(x[0].numel() for x in stacks)))
    if stacks[0].ndim > 3 or len(stacks[0]) <= size:
        return function(*stacks)
    whole: tuple[Tensor, ...] = ()
    for start in range(0, len(stacks[0]), size):
        found = function(*(x[start : start + size] for x in stacks))
        if not whole:
            whole = tuple(x.new_empty(len(stacks[0]), *x.shape[1:]) for x in found)
        for x, part in zip(whole, found, strict=True):
            x[start : start + size] = part
    return whole


def unit_tasks(D: Tensor) -> Tensor:
    """D [..., T, m, n] in float64 with each task matrix of Frobenius norm 1; a zero one stays zero."""
    wide = D.to(torch.float64, memory_format=torch.contiguous_format)
    norms = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    unit: Tensor = wide / norms.where(norms > 0, 1)
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
        return trimmed(span_bases(torch.cat(others, dim=1), self.tol))

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
    check_finite(D)
    v0 = core_directions(W0, core, svd, generator)
    updates = update_directions(D, task, svd, generator)
    return walls_between(trimmed(v0), [trimmed(v) for v in updates], tol)


def walls_between(v0: Tensor, updates: Sequence[Tensor], tol: float) -> Walls:
    """Walls from the core's directions V_0 [n, K] and the update directions V_t [n, k_t] themselves.

    Raises MergeError unless 0 <= tol < 1.
    """
    width = max((v.shape[1] for v in updates), default=0)
    padded = [torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in updates]
    frame, bases = lbw_bases(v0, torch.stack(padded), tol)
    own = tuple(frame.mT @ v for v in updates)
    return Walls(frame, frame.mT @ v0, own, tuple(map(trimmed, bases)), tol)


def lbw_bases(v0: Tensor, updates: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """A frame [..., n, q] and in it each task's LBW subspace [..., T, q, r], padded; `Walls` tells of what.

    v0 is [..., n, K], updates [..., T, n, k], both orthonormal up to columns of zeros. Raises MergeError
    unless 0 <= tol < 1.
    """
    if not 0 <= tol < 1:
        raise MergeError(f"tol={tol} must satisfy 0 <= tol < 1")
    frame = torch.linalg.qr(torch.cat([v0, side_by_side(updates)], dim=-1)).Q
    core = (frame.mT @ v0).unsqueeze(-3)
    own = frame.unsqueeze(-3).mT @ updates
    return frame, span_bases(core - own @ (own.mT @ core), tol)


def unions_of_others(bases: Tensor, tol: float, tasks: Tensor) -> Tensor:
    """For some tasks [S] the span [..., S, q, p] of all bases [..., T, q, r] but its own, padded."""
    count = bases.shape[-3]
    others = (tasks.cpu().unsqueeze(1) + torch.arange(1, count)).remainder(count)
    chosen = bases.index_select(-3, others.flatten().to(bases.device))
    chosen = chosen.view(*bases.shape[:-3], len(tasks), count - 1, *bases.shape[-2:])
    return span_bases(side_by_side(chosen), tol)


def core_directions(W0: Tensor, core: Rank, svd: str, generator: RNGs) -> Tensor:
    """Leading right singular vectors of each pre-trained weight W0 [..., m, n]: V_0 [..., n, K], padded.

    In float64. Raises MergeError where a weight is zero, as it then has none, or holds NaN or infinity.
    """
    check_finite(W0)
    if core != 0 and not bool(W0.flatten(-2).any(-1).all()):
        hint = "pass the weight itself, not a difference, or leave this tensor out (exclude, scope)"
        raise MergeError(f"the pre-trained weight is zero, so it has no core to protect: {hint}")
    return padded_leading(W0, core, svd, generator)[2]


def update_directions(D: Tensor, task: Rank, svd: str, generator: RNGs) -> Tensor:
    """Leading right singular vectors of each task matrix D [..., T, m, n]: [..., T, n, k], padded."""
    (found,) = by_pieces(lambda d: padded_leading(d, task, svd, generator)[2:], D)
    return found


def without_directions(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """x - strength * x P P^T for x [..., m, n] and orthonormal P [..., n, p], in x's dtype."""
    wide = widened(x).contiguous()  # else each product copies it
    p = basis.to(wide)
    return (wide - strength * (wide @ p) @ p.mT).to(x.dtype)


# ---- Purifiers: (W0, D) -> D or D -> D -----------------------------------------------------------


@_method("purifier", "matrix", "Shi et al. 2026, arXiv 2606.18627", "base generator", batched=True)
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
            `generator`). Where spectra decay like 1/i, the result differs by up to 0.1 % of its Frobenius
            norm at width 128, and by 1 to 5 % at 512 and 768, measured with 3 and 8 tasks.

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
    if D.shape[-3] == 1 or strength == 0:
        return D.clone()
    check_finite(D)
    v0 = core_directions(W0, core, svd, generator)
    frame, bases = lbw_bases(v0, update_directions(D, task, svd, generator), tol)

    def filtered(d: Tensor, tasks: Tensor) -> tuple[Tensor]:
        shields = frame.unsqueeze(-3) @ unions_of_others(bases, tol, tasks)
        return (without_directions(d, shields, strength),)

    return by_pieces(filtered, D, torch.arange(D.shape[-3]))[0]


@_method("purifier", "matrix", "Shi et al. 2026, arXiv 2606.18627", "base generator", batched=True)
def sift(
    W0: Tensor, D: Tensor, *, core: Rank = 0.05, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """SIFT, PACT's static variant: take the pre-trained core out of every task matrix.

    D'_t = D_t - D_t V_0 V_0^T with V_0 [n, K] the leading right singular vectors of W0. Equals
    `pact` with task=0 for two tasks or more. Arguments, shapes and errors as in `pact`.
    """
    check_stack(D, W0)
    check_finite(D)
    v0 = core_directions(W0, core, svd, generator)
    return without_directions(D, v0.unsqueeze(-3))


@_method("purifier", "tensor", "Yu et al. 2024, arXiv 2311.03099", "generators")
def dare(
    D: Tensor,
    p: float = 0.2,
    *,
    rescale: bool = True,
    generator: RNG | Sequence[torch.Generator] = None,
) -> Tensor:
    """DARE: drop each entry with probability p, divide the rest by 1 - p (Yu et al. 2024, section 3).

    The authors' code (MergeLM) takes 0.2 where models are merged, and 0.9 where one model is thinned out.
    D and the result are [T, ...], task matrices or vectors. rescale=False only drops. `generator` is one
    for all tasks, or a sequence with one for each. Raises MergeError unless 0 <= p < 1.
    """
    check_tensor("D", D)
    if not 0 <= p < 1:
        raise MergeError(f"p={p} must satisfy 0 <= p < 1")
    if not isinstance(rescale, bool):
        raise MergeError(f"rescale={rescale!r} must be true or false")
    per_task = generator if isinstance(generator, Sequence) else [generator] * len(D)
    kept = torch.empty_like(D)
    for i, (d, g) in enumerate(zip(D, per_task, strict=True)):
        draws = torch.rand(d.shape, generator=g, device=g.device if g else "cpu")
        kept[i] = d * (draws >= p).to(d.device)
    return kept.div_(1 - p) if rescale else kept


@_method("purifier", "matrix", "minipact, unpublished", batched=True, task_arithmetic=1.0)
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
    if D.shape[-3] == 1 or claims == 0:
        return D.clone()
    unit, tasks = unit_tasks(D), D.shape[-3]
    totals = [x @ x.mT for x in (side_by_side(unit), side_by_side(unit.mT))]

    def filtered(d: Tensor, x: Tensor) -> tuple[Tensor]:
        around = [total if d.ndim == 3 else total.unsqueeze(-3) for total in totals]
        rows = _claimed_seats(x, around[0], tasks, ridge) if side != "input" else None
        columns = _claimed_seats(x.mT, around[1], tasks, ridge) if side != "output" else None
        return (_given_way(d.double(), claims, rows, columns).to(D.dtype),)

    return by_pieces(filtered, D, unit)[0]


def _check_weights(claims: float, ridge: float) -> None:
    if not 0 <= claims < math.inf:
        hint = "give 0 to leave D as it is, or a positive number such as 30"
        raise MergeError(f"claims={claims} must be 0 or more: {hint}")
    if not 1e-9 <= ridge < math.inf:
        hint = "give a number such as 1, or 1e-9, which float64 still tells from rounding"
        raise MergeError(f"ridge={ridge} must be above 0: {hint}")


def _claimed_seats(unit: Tensor, total: Tensor, tasks: int, ridge: float) -> tuple[Tensor, Tensor]:
    """For task matrices [..., m, n] of norm 1, e [..., m] and Q [..., m, m]: A = Q^T Q, B = Q^T diag(e) Q.

    `total` is the sum of unit @ unit^T over all tasks.
    """
    size = unit.shape[-2]
    own = size * unit @ unit.mT
    others = (size * total - own) / (tasks - 1)
    own.diagonal(dim1=-2, dim2=-1).add_(ridge)
    lower = torch.linalg.cholesky(own)
    half = torch.linalg.solve_triangular(lower, others, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
    return values, (lower @ vectors).mT


def _given_way(
    d: Tensor,
    claims: float,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The X [..., m, n] of `wiener` for d of this shape; None is a side that is left out."""
    factor = torch.full_like(d, claims)
    if rows:
        factor = factor * rows[0].unsqueeze(-1)
        d = rows[1] @ d
    if columns:
        factor = factor * columns[0].unsqueeze(-2)
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
    check_tensor("D", D)
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
    check_tensor("D", D)
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


@_method(
    "rule",
    "matrix",
    "Gargiulo et al. 2025, arXiv 2412.00081",
    "generator factors",
    batched=True,
    any=1.0,
)
def tsv_m(
    D: Tensor | Products, *, rank: Rank | None = None, svd: str = "exact", generator: RNG = None
) -> Tensor:
    """TSV-M (TSV-Merge): truncate each task to its leading triples, whiten across tasks, add.

    With the triples of all tasks side by side, U [m, Tk], S [Tk], V [n, Tk], the result is
    polar(U) diag(S) polar(V)^T. Source: Gargiulo et al. 2025, section 3.2 (arXiv 2412.00081).

    D is [T, m, n], the result [m, n] in its dtype. rank is k, the triples per task, as a count, share or
    energy as in `pact`; None is min(m, n) // T, at least 1. svd="randomized" pays when k is small against
    min(m, n); of factors, D as `Products`, the triples come exact without it. Raises MergeError unless D is a
    finite stack of matrices and the options fit.
    """
    check_stack(D)
    k = max(1, min(D.shape[-2:]) // D.shape[-3]) if rank is None else rank
    if isinstance(D, Products):
        triples = [leading_triples(d, k, svd, generator) for d in D]
        u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    else:
        check_finite(D)
        u, s, v = by_pieces(lambda d: padded_leading(d, k, svd, generator), D)
        u, v = side_by_side(u), side_by_side(v)
        s = s.flatten(-2)
    tol = roundoff(D.dtype)
    wide = torch.promote_types(D.dtype, torch.float32)
    left, right = (polar_factor(x, tol).to(wide) for x in (u, v))
    return (left * s.to(left).unsqueeze(-2) @ right.mT).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", batched=True, any=1.3)
def iso_c(D: Tensor, *, mean_over: str = "all") -> Tensor:
    """Iso-C: give every singular direction of the summed task matrices their mean singular value.

    D [T, m, n], result and errors as in `tsv_m`. mean_over="all" averages over min(m, n) values as
    published, "range" over the numerical rank. Source: Marczak et al. 2025, section 4.1.
    """
    check_stack(D)
    check_finite(D)
    u, s, v = padded_triples(widened(D).sum(-3), roundoff(D.dtype))
    return (_mean_singular_value(s, D, mean_over) * (u @ v.mT)).to(D.dtype)


@_method("rule", "matrix", "Marczak et al. 2025, arXiv 2502.04959", batched=True, any=1.5)
def iso_cts(D: Tensor, common: float = 0.8, *, mean_over: str = "all") -> Tensor:
    """Iso-CTS: Iso-C on a common subspace plus each task's own leading directions outside of it.

    The common part takes the leading directions of the summed matrices, a share 0 < common <= 1 of
    min(m, n) (1 is Iso-C); the rest goes in equal parts to the tasks' residuals. Arguments, result and
    errors as in `iso_c`. Source: Marczak et al. 2025, section 4.2, algorithm 2.
    """
    check_stack(D)
    if not 0 < common <= 1:
        raise MergeError(f"common={common} must satisfy 0 < common <= 1")
    check_finite(D)
    size, tasks, tol = min(D.shape[-2:]), D.shape[-3], roundoff(D.dtype)
    stack = widened(D)
    own = min(round((size - int(size * common)) / tasks), (size - 1) // tasks)
    shared = padded_triples(stack.sum(-3), tol, size - own * tasks)

    def apart(d: Tensor) -> Triples:
        around = shared[0] if d.ndim == 3 else shared[0].unsqueeze(-3)
        return _own_directions(d.double(), around, own, tol)

    u, s, v = by_pieces(apart, stack)
    u, v = (torch.cat([x, side_by_side(y)], -1) for x, y in ((shared[0], u), (shared[2], v)))
    s = torch.cat([shared[1], s.flatten(-2)], -1)
    merged = _mean_singular_value(s, D, mean_over) * (
        polar_factor(u, tol) @ polar_factor(v, tol).mT
    )
    return merged.to(D.dtype)


def _own_directions(d: Tensor, common: Tensor, count: int, tol: float) -> Triples:
    """Leading triples of d [..., m, n] outside common left directions; below tol ||d|| is rounding."""
    u, s, v = padded_triples(d - common @ (common.mT @ d), tol, count)
    kept = s > tol * torch.linalg.vector_norm(d, dim=(-2, -1)).unsqueeze(-1)
    return u * kept.unsqueeze(-2), s * kept, v * kept.unsqueeze(-2)


def _mean_singular_value(s: Tensor, D: Tensor, mean_over: str) -> Tensor:
    """Mean [..., 1, 1] of the singular values s [..., k], padded with zeros."""
    check_known("mean_over", [mean_over], ("all", "range"))
    total = s.sum(-1)
    mean = total / min(D.shape[-2:])
    if mean_over == "range":
        mean = total / (s > 0).sum(-1).clamp(min=1)
    return mean[..., None, None]


@_method("rule", "matrix", "Cheng et al. 2025, arXiv 2503.08099", sided=True, batched=True, any=1.0)
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
    unit = unit_tasks(D)
    rows = unit.flatten(-3, -2)  # [..., T m, n]
    targets = (unit @ D.double().mT).flatten(-3, -2)  # [..., T m, m]: rows M^T = targets is to hold
    if ridge == 0:
        u, s, v = padded_triples(rows, roundoff(D.dtype))
        inverse = torch.where(s > 0, 1 / s, 0).unsqueeze(-2)
        return ((targets.mT @ u * inverse) @ v.mT).to(D.dtype)
    gram = rows.mT @ rows
    trace = rows.square().sum((-2, -1)) / gram.shape[-1]
    load = ridge * trace.where(trace > 0, 1)
    gram.diagonal(dim1=-2, dim2=-1).add_(load.unsqueeze(-1))
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
