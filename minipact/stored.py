"""One stored object, a model per known task: whole models by the methods of `minipact.per_task`.

stored = compress(base, {"cars": cars, "signs": signs}, rule="emr")   # of minipact.compression
stored.save("all.safetensors")
open_stored("all.safetensors").model("cars")   # a lazy mapping, name -> tensor

The file is a safetensors file. What a method keeps of a tensor NAME is called PART/NAME, or PART/TASK/NAME
where it is of one task; full/TASK/NAME is a task's own tensor, base/NAME the base's. Masks are packed, eight
to a byte, the last byte filled up with zeros; how many count is told by the shape of what they mask.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipact.alignment import View
from minipact.checkpoints import open_checkpoint
from minipact.errors import CheckpointError, check_known, listing
from minipact.float8 import dequantized
from minipact.methods import parameters_of, widened
from minipact.output import save_checkpoint
from minipact.per_task import STORAGE
from minipact.tensors import State, add_update, meta_of
from minipact.version import __version__

Record = dict[str, Any]
KEY = "per_task"  # of the record in a file's header
RESCALERS = "rescalers"  # the part that is of a whole model, one for each task


# ---- What is stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A base and what is kept of several tasks; `model(task)` is the model of one of them.

    Attributes:
        base: name -> tensor.
        parts: what is kept, under the names that the file gives it.
        record: what the parts depend on: recipe, tasks by name, versions, device, SHA-256 of the base's
            tensors, and of the inputs' files where there are some.
        notes: what the user should know.
    """

    base: State
    parts: State
    record: Record
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """Name of the method."""
        return str(self.record["recipe"]["rule"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(self.record["tasks"])

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of the base's tensors, alias -> name."""
        found: dict[str, str] = self.record["aliases"]
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, the base's too."""
        return _size(self.base) + _size(self.parts)

    @property
    def bytes_apart(self) -> int:
        """Bytes of the base and of a whole model for each task beside it, in the base's types."""
        return _size(self.base) * (1 + len(self.tasks))

    def treatment(self, name: str) -> str:
        """What became of a tensor: the name of the method, "in full", or "as in the base"."""
        task = self.tasks[0]
        if key_of("full", task, name) in self.parts:
            return "in full"
        kept = key_of(STORAGE[self.rule].own[0], task, name) in self.parts
        return self.rule if kept else "as in the base"

    def model(self, task: str) -> Served:
        """The model of one task, lazily. Raises MergeError, listing the tasks, for another name."""
        check_known("task", [task], self.tasks)
        return Served(self, task)

    def save(
        self, path: str | Path, *, with_base: bool = True, overwrite: bool = False
    ) -> list[Path]:
        """Write all to one `.safetensors` file, all or nothing; returns its path.

        with_base=False leaves the base out; it is then given to `open_stored`, and known by its SHA-256.

        Raises CheckpointError where the output exists or cannot be, OSError where the disk is full or fails.
        """
        check_file(path)
        places = {name: (self.parts, name) for name in self.parts}
        if with_base:
            places |= {f"base/{name}": (self.base, name) for name in self.base}
        header = {"minipact": __version__, KEY: json.dumps(self.record, sort_keys=True)}
        return save_checkpoint(path, _Unread(places), metadata=header, overwrite=overwrite)


def check_file(path: str | Path) -> None:
    """Raise CheckpointError unless a path ends as the file of a stored object does."""
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path}: what is stored goes into one file: end it in .safetensors")


class _Unread(View):
    """A view whose tensors' shapes and types are told without holding their numbers."""

    def meta(self, name: str) -> Tensor:
        return super().meta(name).to("meta")


def _size(state: State) -> int:
    return sum(meta_of(state, name).nbytes for name in state)


class Served(Mapping[str, Tensor]):
    """The model of one task, made of what is stored: a lazy mapping, name -> tensor.

    Tensors are new, on the CPU and of the base's types, one for every name of the base. Every access reads
    and computes.

    Attributes:
        base, task: the base, and the name of the task.
    """

    def __init__(self, stored: Stored, task: str) -> None:
        self.base, self.task, self._stored = stored.base, task, stored

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from self._stored.aliases

    def __len__(self) -> int:
        return len(self.base) + len(self._stored.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self._stored.aliases

    def __getitem__(self, name: str) -> Tensor:
        name = self._first(name)
        if (full := key_of("full", self.task, name)) in self._stored.parts:
            return self._stored.parts[full].clone()
        return add_update(name, self.base[name], self._computed(name), 1.0).cpu()

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the file."""
        return meta_of(self.base, self._first(name)).to("meta")

    def delta(self, name: str) -> Tensor | None:
        """What the task adds to the base's tensor, in float32 or float64; None for the base's own."""
        name = self._first(name)
        if (full := key_of("full", self.task, name)) in self._stored.parts:
            return widened(self._stored.parts[full]) - widened(self.base[name])
        return self._computed(name)

    def _first(self, name: str) -> str:
        return self._stored.aliases.get(name, name)

    def _computed(self, name: str) -> Tensor | None:
        """What the method makes of the parts of a tensor; None where there are none."""
        stored, shape = self._stored, meta_of(self.base, name).shape
        raw = _pieces(stored, self.task, name, stored.parts.__getitem__)
        if not raw:
            return None
        found = {part: _read(x, shape)[None] for part, x in raw.items()}
        found |= {part: found[part][0] for part in STORAGE[stored.rule].common}
        if RESCALERS in stored.parts:
            place = stored.tasks.index(self.task)
            found[RESCALERS] = stored.parts[RESCALERS][place, None]
        return _decompressed(stored.rule, found)


def _pieces(
    stored: Stored, task: str, name: str, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The parts of one task's tensor by their names; none where nothing is kept of it."""
    storage = STORAGE[stored.rule]
    keys = {part: key_of(part, name) for part in storage.common}
    keys |= {part: key_of(part, task, name) for part in storage.own}
    if not any(key in stored.parts for key in keys.values()):
        return {}
    return {part: read(key) for part, key in keys.items()}


def _read(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A part as the method takes it."""
    return unpacked(x, shape) if x.dtype == torch.uint8 else widened(x)


def _decompressed(rule: str, parts: Mapping[str, Tensor]) -> Tensor:
    """One task's D [...] out of its parts, own ones with an axis of one task in front."""
    found: Tensor = STORAGE[rule].decompress(**parts)[0]
    return found


def key_of(part: str, *names: str) -> str:
    return "/".join([part, *names])


def packed(mask: Tensor) -> Tensor:
    """Booleans of any shape as bits, eight to a byte, uint8 [ceil(d / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Booleans of a shape out of `packed` bits."""
    found = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(found).bool().view(tuple(shape))


# ---- Files ---------------------------------------------------------------------------------------


def digest_of(base: State) -> str:
    """SHA-256 of a model's names, types, shapes and numbers, in whatever files they stand."""
    digest = hashlib.sha256()
    for name in sorted(base):
        x = base[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_stored(path: str | Path, base: str | Path | State | None = None) -> Stored:
    """Open a file that `Stored.save` or `minipact compress` wrote; tensors are read when asked for.

    Args:
        path: the file.
        base: where the file holds none: the model it was made from, as a path or a mapping. It is read
            once, to compare its SHA-256. With a file that holds its base, only compared.

    Raises:
        CheckpointError: it is no such file, damaged, or lacks a base; or the base is another one.
    """
    file = open_checkpoint(path)
    record = _told(Path(path), file.metadata)
    within = {name.removeprefix("base/"): (file, name) for name in file if name.startswith("base/")}
    parts = View({name: (file, name) for name in file if not name.startswith("base/")})
    if not within and base is None:
        raise CheckpointError(f"{path} holds no base: give the one that it was made from (--base)")
    found: State = View(within)
    if base is not None:
        given = _given(base, record)
        if digest_of(given) != record["base"]:
            named = base if isinstance(base, str | Path) else "the base given"
            what = f"{named} is not the base that {path} was made from, as its SHA-256 differs"
            raise CheckpointError(f"{what}: give that one")
        found = found if within else given
    stored = Stored(found, parts, record)
    _check_parts(Path(path), stored)
    return stored


def _given(base: str | Path | State, record: Record) -> State:
    """A base under the names that the record knows."""
    if not isinstance(base, Mapping):
        base = dequantized(open_checkpoint(base, record.get("entry")))
    return View({name: (base, name) for name in base if name not in record["aliases"]})


def _told(path: Path, metadata: Mapping[str, str]) -> Record:
    """The record in a file's header."""
    if KEY not in metadata:
        hint = "give one that minipact compress wrote; open_checkpoint opens other models"
        raise CheckpointError(f"{path} holds no models by task: {hint}")
    try:
        record: Record = json.loads(metadata[KEY])
        rule = record["recipe"]["rule"]
        names = [rule, record["base"], *record["tasks"], *record["aliases"].values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its record cannot be read ({error!r})") from error
    if not record["tasks"] or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: its record is not one of minipact compress: make it anew")
    if rule not in STORAGE:
        known = f"this minipact {__version__} knows {listing(STORAGE)}"
        raise CheckpointError(f"{path} is stored by '{rule}', and {known}: take a newer one")
    return record


def _check_parts(path: Path, stored: Stored) -> None:
    """Raise CheckpointError where a part is missing, strange, or of a shape that cannot be."""
    left = set(stored.parts) - {RESCALERS}
    rescalers = stored.parts.get(RESCALERS, torch.empty(len(stored.tasks)))
    if rescalers.shape != (len(stored.tasks),):
        raise CheckpointError(f"{path}: '{RESCALERS}' must be one a task: make it anew")
    if lost := [name for name in stored.aliases.values() if name not in stored.base]:
        raise CheckpointError(f"{path}: its base lacks {listing(lost)}: make it anew")
    for name in stored.base:
        full = [key_of("full", task, name) for task in stored.tasks]
        if left.intersection(full):
            _refuse_unlike(path, stored, name, full)
            left.difference_update(full)
            continue
        for task in stored.tasks:
            left.difference_update(_checked_keys(path, stored, task, name))
    if left:
        raise CheckpointError(f"{path}: {listing(sorted(left))} belong to no tensor of the base")


def _refuse_unlike(path: Path, stored: Stored, name: str, full: Sequence[str]) -> None:
    """Tensors kept in full are there for each task, and like the base's."""
    expected = meta_of(stored.base, name)
    for key in full:
        if key not in stored.parts:
            raise CheckpointError(f"{path} lacks '{key}': copy it again or make it anew")
        found = meta_of(stored.parts, key)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(f"{path}: '{key}' is not like the base's '{name}': make it anew")


def _checked_keys(path: Path, stored: Stored, task: str, name: str) -> list[str]:
    """The names of the parts of one task's tensor; a dry run shows that their shapes fit."""
    keys: list[str] = []
    shape = meta_of(stored.base, name).shape

    def meta(key: str) -> Tensor:
        if key not in stored.parts:
            raise CheckpointError(f"{path} lacks '{key}': copy it again or make it anew")
        keys.append(key)
        x = meta_of(stored.parts, key).to("meta")
        is_mask = x.dtype == torch.uint8 and x.shape == (-(-shape.numel() // 8),)
        return x.new_empty(shape, dtype=torch.bool) if is_mask else x

    raw = _pieces(stored, task, name, meta)
    if not raw:
        return []
    common = STORAGE[stored.rule].common
    found = {part: x if part in common else x[None] for part, x in raw.items()}
    if RESCALERS in parameters_of(STORAGE[stored.rule].decompress):
        found[RESCALERS] = torch.empty(1, device="meta")
        if RESCALERS not in stored.parts:
            raise CheckpointError(f"{path} lacks '{RESCALERS}': copy it again or make it anew")
    try:
        fits = _decompressed(stored.rule, found).shape == shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{path}: {listing(keys)} do not fit the base's '{name}': make it anew"
        )
    return keys
