"""Single tensors of several models: differences from the base, and updates added to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from minipact.errors import MergeError
from minipact.low_rank import Product, Products
from minipact.methods import is_finite, is_zero

Device = str | torch.device
State = Mapping[str, Tensor]
States = Mapping[str, State]


def meta_of(state: State, name: str) -> Tensor:
    """Shape and dtype of a tensor, unread where the mapping has a method `meta(name)`."""
    tensor: Tensor = getattr(state, "meta", state.__getitem__)(name)
    return tensor


@torch.no_grad()
def add_update(
    name: str, base: Tensor, delta: Tensor | None, factor: float, dtype: torch.dtype | None = None
) -> Tensor:
    """base + factor * delta in a wide type, then in dtype, on the CPU; a copy of the base without a delta.

    dtype None, and any for integers, is the base's. Raises MergeError, naming the tensor, where the result
    overflows.
    """
    if delta is None:
        return rounded_update(name, base, (), factor, dtype)[0]
    return rounded_update(name, base, [delta], factor, dtype, delta.device)[0]


@torch.no_grad()
def rounded_update(
    name: str,
    base: Tensor,
    blocks: Iterable[Tensor],
    factor: float,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
) -> tuple[Tensor, float, float]:
    """`add_update`, and squared norms of what rounding to a half type adds, and of factor * delta.

    Delta comes in blocks of its entries, end to end, on the device; none for a copy of the base. Both norms
    are 0 where the result is of a wider type, or a copy.
    """
    if dtype is None or not base.is_floating_point():
        dtype = base.dtype
    merged = torch.empty(base.shape, dtype=dtype, device=device)
    origin, rounded, start = base.flatten(), merged.view(-1), 0
    measures = dtype.is_floating_point and dtype.itemsize < 4
    noise = signal = 0.0
    is_changed = False
    for d in (piece for block in blocks for piece in in_pieces(block, device)):
        which = slice(start, start := start + len(d))
        # on a device, where looking takes a wait, who made the blocks has looked
        is_changed = is_changed or d.device.type != "cpu" or not is_zero(d)
        exact = torch.add(moved(origin[which], d.device).to(d), d, alpha=factor)
        out = rounded[which].copy_(exact)
        if measures:
            noise += _squared_norm(exact.sub_(out.to(d)))
            signal += _squared_norm(d)
    if not is_changed:
        merged = base.to(dtype, copy=True)
    merged = merged.cpu()  # before the check, which would wait for the device
    if not is_finite(merged) and is_finite(base):
        hint = "check the base, take a smaller scale or a wider dtype"
        raise MergeError(f"tensor '{name}' of the result overflows {merged.dtype}: {hint}")
    return merged, noise, signal * factor**2


def _squared_norm(x: Tensor) -> float:
    """Sum of squares, in float64 where squares in float32 would not do."""
    norm = float(vector_norm(x))
    if not 1e-12 < norm < 1e12:
        norm = float(vector_norm(x, dtype=torch.float64))
    return norm**2


_PIECE = 1 << 18  # entries; fewer make more work of the calls than of the numbers


def in_pieces(x: Tensor, device: Device) -> Sequence[Tensor]:
    """The entries in pieces that fit into the cache where a CPU does the work, else in one."""
    flat = x.flatten()
    if flat.numel() <= _PIECE or torch.device(device).type != "cpu":
        return [flat]
    return torch.split(flat, _PIECE)


def moved(x: Tensor, device: Device) -> Tensor:
    """x on a device, in its own type, which takes fewer bytes than a wide one.

    To a GPU from pinned memory, so that the next tensor is read while this one is on its way.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def task_matrices(
    name: str, base: State, tasks: States, weights: Mapping[str, float] | None = None,
    device: Device = "cpu",
) -> Tensor:  # fmt: skip
    """D [T, ...] of one tensor: weight * (fine-tuned - base), or a task's own `delta(name)`.

    float32, float64 where an input is. Raises MergeError, naming tensor and model, for NaN or infinity.
    """
    return next(task_blocks(name, base, tasks, weights, device, whole=True))


def task_blocks(
    name: str, base: State, tasks: States, weights: Mapping[str, float] | None, device: Device, *,
    whole: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """`task_matrices`, whole or in blocks [T, b] of the entries that fit into a cache."""
    known = [own_delta(task, name, base) for task in tasks.values()]
    tuned = (task[name] if d is None else d for task, d in zip(tasks.values(), known, strict=True))
    tensors = [x.detach() for x in (base[name], *tuned)]
    wide = any(x.dtype == torch.float64 for x in tensors)
    kind = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)
    factors = list((weights or dict.fromkeys(tasks, 1.0)).values())
    pieces = ([x] if whole else in_pieces(x, device) for x in tensors)

    def block(start: Tensor, *tuned: Tensor) -> Tensor:
        origin = moved(start, device).to(kind)
        D = kind.new_empty(len(tuned), *start.shape)
        for delta, x, factor, d in zip(D, tuned, factors, known, strict=True):
            torch.sub(moved(x, device).to(kind), origin, alpha=int(d is None), out=delta)
            if factor != 1:
                delta.mul_(factor)
        if not is_finite(D):
            models = ["the base", *(f"task '{label}'" for label in tasks), "some task"]
            model = models[[*map(is_finite, tensors), False].index(False)]
            raise MergeError(f"'{name}' of {model} holds NaN or infinity: repair or exclude it")
        return D

    return map(block, *pieces)


def own_delta(task: State, name: str, base: State) -> Tensor | None:
    """A task's own difference from this base, where it knows it more exactly than by subtraction."""
    if getattr(task, "base", base) is not base:
        return None
    delta: Tensor | None = getattr(task, "delta", lambda _: None)(name)
    return delta


def task_factors(
    name: str, base: State, tasks: States, weights: Mapping[str, float], device: Device
) -> Products | None:
    """`task_matrices` as factors, where all tasks know theirs; None else.

    Raises MergeError, naming tensor and task, for NaN or infinity.
    """
    found = {label: own_factors(task, name, base) for label, task in tasks.items()}
    known = {label: x for label, x in found.items() if x is not None}
    if len(known) < len(found):
        return None
    for label, x in known.items():
        if not (is_finite(x.b) and is_finite(x.a)):
            raise MergeError(
                f"'{name}' of task '{label}' holds NaN or infinity: repair or exclude it"
            )
    pairs = (
        (x.b.to(device) * weights.get(label, 1.0), x.a.to(device)) for label, x in known.items()
    )
    return Products(Product(b, a) for b, a in pairs)


def own_factors(task: State, name: str, base: State) -> Product | None:
    """A task's own difference from this base as factors, where it has it so."""
    if getattr(task, "base", base) is not base:
        return None
    factors: Product | None = getattr(task, "factors", lambda _: None)(name)
    return factors


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have one shape and the same numbers; their types may differ."""
    if x.shape != y.shape:
        return False
    is_float8 = x.is_floating_point() and x.itemsize == 1
    if x.dtype == y.dtype and not is_float8:
        return torch.equal(x, y)
    # torch compares neither float8 nor unsigned numbers with other types, nor a float8 tensor with itself
    wide = torch.int64
    if x.is_floating_point() or y.is_floating_point():
        wide = torch.float64
    if x.is_complex() or y.is_complex():
        wide = torch.complex128
    pieces = zip(in_pieces(x, x.device), in_pieces(y, y.device), strict=True)
    return all(torch.equal(a.to(wide), b.to(wide)) for a, b in pieces)


def is_same(one: State, other: State, name: str) -> bool:
    """Whether two models have the same tensor, of any type; unread where shapes tell."""
    same_shape = meta_of(one, name).shape == meta_of(other, name).shape
    return same_shape and equal(one[name], other[name])


def is_unchanged(task: State, name: str, base: State) -> bool:
    """Whether a task has the base's numbers; where it knows its own difference, whether that is zero."""
    factors = own_factors(task, name, base)
    if factors is not None:
        return is_zero(factors.b) or is_zero(factors.a)
    delta = own_delta(task, name, base)
    if delta is not None:
        return is_zero(delta)
    return equal(base[name], task[name])
