"""A simulated accelerator, "sim:0": CPU tensors that say another device, meet no CPU tensor, and count.

What runs on it runs on a GPU as far as devices are concerned, without one. It counts what makes a GPU stand
still, and these counts are the same on every machine. PyTorch lets a backend be written in Python, as an
experiment and once for a whole process: so tests run this in a process of its own.

    python tests/simulated.py            what some merges take, for each matrix
    python tests/simulated.py --top      and which operations these are
    python tests/simulated.py --lines    and which lines wait

Operations are what starts work on the device. A wait is the host needing a value, or how many entries there
are. Copies to and from the host, factorisations, and views, which start nothing, have columns of their own.
"""

from __future__ import annotations

import argparse
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

DEVICE = torch.device("cpu")  # "sim:0" once it is there
aten = torch.ops.aten

WAITS = {  # the host needs a number of theirs, or how many there are, before it can go on
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "repeat_interleave", "_unique", "_unique2", "unique_consecutive", "unique_dim", "_to_sparse", "_coalesce",
    "_linalg_check_errors", "histc", "segment_reduce", "allclose",
}  # fmt: skip
READS = {"_local_scalar_dense", "item"}  # that start no work
FACTORISATIONS = {  # on CUDA all but QR read back whether they succeeded, once a call: counted apart
    "_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "_linalg_det", "_linalg_slogdet", "linalg_lstsq",
    "linalg_eig", "linalg_inv_ex", "linalg_cholesky_ex", "linalg_lu_factor_ex", "linalg_qr",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
FACTORIES = (
    "empty.memory_format", "empty_strided", "eye", "eye.m", "arange", "arange.start", "arange.start_step",
    "linspace", "logspace", "randperm", "scalar_tensor", "full", "tril_indices", "triu_indices",
)  # fmt: skip

# ---- Counts --------------------------------------------------------------------------------------


class Counts:
    """What the device did since it was last cleared; several threads may count."""

    def __init__(self) -> None:
        self.lock, self.stacks = threading.Lock(), False
        self.clear()

    def clear(self) -> None:
        self.found: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()

    def add(self, kind: str, name: str) -> None:
        with self.lock:
            self.found[kind] += 1
            self.names[f"{kind}: {name}"] += 1
            if self.stacks and kind in ("waits", "copies out"):
                places = [f for f in traceback.extract_stack() if "/minipact/" in f.filename]
                at = [f"{f.filename.split('/')[-1]}:{f.lineno} {f.name}" for f in places[-2:]]
                self.lines[f"{kind}: {name} < {' < '.join(reversed(at))}"] += 1


COUNTS = Counts()


def is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def count(func: Any, args: Any) -> None:
    """Enter one operation; views and reservations of memory start no work."""
    name = func._schema.name.removeprefix("aten::")
    if func.is_view or name in ("detach", "alias", "lift_fresh"):
        return COUNTS.add("views", name)
    if name in ALLOCATIONS:
        return COUNTS.add("allocations", name)
    masked = name in INDEXED and any(map(is_mask, args[1]))
    if masked and name != "index" and args[2].numel() == 1:
        masked = False  # CUDA fills by the mask
    if name in WAITS or masked:
        COUNTS.add("waits", name)
    if name in FACTORISATIONS:
        COUNTS.add("factorisations", name)
    if name not in READS:
        COUNTS.add("operations", name)


# ---- The device ----------------------------------------------------------------------------------


class Simulated(Tensor):
    """A CPU tensor inside, another device outside."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Simulated:
        shape, strides, offset = inner.shape, inner.stride(), inner.storage_offset()
        made: Simulated = Tensor._make_wrapper_subclass(
            cls, shape, strides, offset, dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Simulated({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name in ("copy_", "_to_copy", "_copy_from"):
            return copied(func, name, args, kwargs)
        to = kwargs.get("device")
        if to is not None and torch.device(to).type != DEVICE.type:  # new_empty(..., device="cpu")
            return func(*unwrapped(args), **unwrapped(kwargs))
        refuse_other_devices(func, name, args, kwargs)
        count(func, args)
        given = {id(x.inner): x for x in leaves(args, kwargs) if isinstance(x, Simulated)}
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*unwrapped(args), **unwrapped(kwargs))
        for x in given.values():
            if x.inner.shape != x.shape:
                raise RuntimeError(f"{func} changes the shape of its argument, which sim cannot")
        return wrapped(found, given)


def leaves(args: Any, kwargs: Any) -> Iterator[Any]:
    """All arguments, those in lists too."""
    for x in (*args, *kwargs.values()):
        yield from x if isinstance(x, (list, tuple)) else (x,)


def unwrapped(x: Any) -> Any:
    """The CPU tensors inside."""
    if isinstance(x, (list, tuple)):
        return [unwrapped(y) for y in x]
    if isinstance(x, dict):
        return {key: unwrapped(y) for key, y in x.items()}
    return x.inner if isinstance(x, Simulated) else x


def wrapped(x: Any, given: Mapping[int, Tensor]) -> Any:
    """What an operation returned, on the device; an argument that it returned is the argument itself."""
    if isinstance(x, (list, tuple)):
        return type(x)(wrapped(y, given) for y in x)
    if not isinstance(x, Tensor):
        return x
    if x.layout != torch.strided:
        raise RuntimeError("sim has no sparse tensors")
    return given[id(x)] if id(x) in given else Simulated(x)


def refuse_other_devices(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """As PyTorch: a CPU tensor without dimensions may stand for a number in operations entry by entry, CPU
    indices may index; generators and all else are of the device."""
    for x in leaves(args, kwargs):
        if isinstance(x, torch.Generator) and x.device != DEVICE:
            raise RuntimeError(f"{name}: a generator of {x.device} for a tensor on {DEVICE}")
        if not isinstance(x, Tensor) or isinstance(x, Simulated):
            continue
        number = x.ndim == 0 and (torch.Tag.pointwise in func.tags or name in ("fill_", "fill"))
        index = name in INDEXED and any(x is y for y in args[1])
        if index:
            COUNTS.add("copies in", f"{name} with indices of the CPU")
        if not (number or index):
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on {x.device}, {tuple(x.shape)}")


def copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copies within the device, and to and from the host: these are counted by their direction."""
    if name == "_to_copy":
        to = kwargs.pop("device", None)
        goes = to is not None and torch.device(to).type != DEVICE.type
        COUNTS.add("copies out" if goes else "operations", name)
        if goes and torch.device(to).type == "meta":
            raise RuntimeError("a copy to meta of a tensor on sim")
        found = func(args[0].inner, **kwargs)
        return found if goes else Simulated(found)
    target, source = (args[1], args[0]) if name == "_copy_from" else args[:2]
    out, into = isinstance(source, Simulated), isinstance(target, Simulated)
    kind = "operations" if out and into else "copies out" if out else "copies in"
    COUNTS.add(kind, name)
    (target.inner if into else target).copy_(source.inner if out else source)
    return target


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return copied(None, "_copy_from", (source, target), {})


LIBRARY: list[Any] = []


def start() -> torch.device:
    """Register the device in this process; a second time changes nothing."""
    global DEVICE
    if DEVICE.type == "cpu":
        backend_registration._setup_privateuseone_for_python_backend("sim")
        DEVICE = torch.device("sim:0")
        library = torch.library.Library("aten", "IMPL")
        for factory in FACTORIES:
            library.impl(factory, made_by(factory), "PrivateUse1")
        library.impl("_copy_from", copy_from, "PrivateUse1")  # torch.tensor(..., device="sim:0")
        LIBRARY.append(library)
    return DEVICE


def made_by(factory: str) -> Any:
    name, _, overload = factory.partition(".")
    func = getattr(getattr(aten, name), overload or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        count(func, args)
        return Simulated(func(*args, device="cpu", **kwargs))

    return make


# ---- Counting a merge ----------------------------------------------------------------------------

KINDS = ("operations", "waits", "factorisations", "copies in", "copies out", "views")


def models(shape: tuple[int, ...], tasks: int, matrices: int) -> tuple[Any, Any]:
    """A base and fine-tuned models with so many matrices of one shape."""
    g = torch.Generator().manual_seed(0)
    base = {f"{i:02}.weight": torch.randn(shape, generator=g) for i in range(matrices)}
    tuned = [
        {name: x + 0.05 * torch.randn(shape, generator=g) for name, x in base.items()}
        for _ in range(tasks)
    ]
    return base, tuned


def counted(
    rule: str = "task_arithmetic",
    purify: str | list[str] = (),  # type: ignore[assignment]
    *,
    tasks: int = 8,
    shape: tuple[int, ...] = (48, 32),
    matrices: int = 12,
    **keywords: Any,
) -> dict[str, float]:
    """What one matrix of a merge costs the device, by kind; `COUNTS` then knows more."""
    import minipact as mp

    start()
    base, tuned = models(shape, tasks, matrices)
    COUNTS.clear()
    mp.merge(base, tuned, rule=rule, purify=purify, scale=1.0, device="sim:0", **keywords)
    return {kind: round(COUNTS.found[kind] / matrices, 2) for kind in KINDS}


CASES: Mapping[str, tuple[str, list[str], str]] = {
    "task arithmetic": ("task_arithmetic", [], ""),
    "TIES": ("ties", [], ""),
    "TSV-M": ("tsv_m", [], ""),
    "TSV-M randomized": ("tsv_m", [], "randomized"),
    "Iso-C": ("iso_c", [], ""),
    "Iso-CTS": ("iso_cts", [], ""),
    "WUDI": ("wudi", [], ""),
    "PACT + task arithmetic": ("task_arithmetic", ["pact"], ""),
    "PACT randomized + task arithmetic": ("task_arithmetic", ["pact"], "randomized"),
    "PACT + TIES": ("ties", ["pact"], ""),
    "PACT + TSV-M": ("tsv_m", ["pact"], ""),
    "PACT + TSV-M, both randomized": ("tsv_m", ["pact"], "randomized"),
    "PACT + Iso-C": ("iso_c", ["pact"], ""),
    "PACT + Iso-CTS": ("iso_cts", ["pact"], ""),
    "PACT + WUDI": ("wudi", ["pact"], ""),
    "SIFT + task arithmetic": ("task_arithmetic", ["sift"], ""),
    "Wiener + task arithmetic": ("task_arithmetic", ["wiener"], ""),
    "DARE + TIES": ("ties", ["dare"], ""),
}


def count_case(
    case: str, tasks: int, shape: tuple[int, ...], matrices: int = 12
) -> dict[str, float]:
    """Counts of a case by name."""
    import minipact as mp

    rule, purify, svd = CASES[case]
    able = [name for name in (rule, *purify) if svd and "svd" in mp.METHODS[name].options]
    options = {name: {"svd": svd} for name in able}
    return counted(rule, purify, tasks=tasks, shape=shape, matrices=matrices, options=options)


def main() -> None:
    parser = argparse.ArgumentParser(description="operations, waits and copies for each matrix")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--tasks", type=int, action="append")
    parser.add_argument("--shape", type=int, nargs=2, action="append")
    parser.add_argument("--matrices", type=int, default=12)
    parser.add_argument(
        "--top", type=int, nargs="?", const=15, default=0, help="the commonest operations"
    )
    parser.add_argument("--lines", action="store_true", help="the lines of minipact that wait")
    given = parser.parse_args()
    COUNTS.stacks = given.lines
    print(f"{'for each matrix':36}{'T':>3}{'shape':>9}", *(f"{kind:>14}" for kind in KINDS))
    for case in given.case or CASES:
        for shape in given.shape or [(48, 32)]:
            for tasks in given.tasks or [3, 8]:
                found = count_case(case, tasks, tuple(shape), given.matrices)
                values = (f"{found[kind]:>14g}" for kind in KINDS)
                print(f"{case:36}{tasks:>3}{f'{shape[0]}x{shape[1]}':>9}", *values, flush=True)
                for name, number in COUNTS.names.most_common(given.top):
                    print(f"    {number / given.matrices:9.2f}  {name}")
                for line, number in COUNTS.lines.most_common():
                    print(f"    {number / given.matrices:9.2f}  {line}")


if __name__ == "__main__":
    sys.exit(main())
