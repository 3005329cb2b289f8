"""Real checkpoint files, read lazily.

A `.safetensors` file, a folder of transformers, diffusers, sentence-transformers or open_clip (one file, or
shards with an index), and `.pt`, `.pth`, `.bin`, `.ckpt` state dicts. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipact.contents import strange_content
from minipact.errors import CheckpointError
from minipact.layouts import INDEX as INDEX
from minipact.layouts import JOURNAL as JOURNAL
from minipact.layouts import PICKLES as PICKLES
from minipact.layouts import Layout, Part, find_layout, read_index
from minipact.pickles import read_pickle, without_wrappers

# ---- Reading -------------------------------------------------------------------------------------


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name, each read from its file when asked for.

    Attributes:
        path: what was opened. files: the files that hold the tensors. layout: a word on the format.
        source: where in a model's folder they stand. metadata: strings stored in the file.
        aliases: second names of tensors, alias -> name, where a model shares one tensor between two layers.
        notes: what was done to read it that the user should know.
        widened: whether some tensors are told as of another type than the one stored, see `replaced`.
    """

    widened = False

    def __init__(
        self,
        path: Path,
        files: list[Path],
        layout: str,
        readers: Mapping[str, Callable[[], Tensor]],
        metas: dict[str, Tensor],
        metadata: dict[str, str],
        aliases: Mapping[str, str] | None = None,
        places: Mapping[str, tuple[Path, int, int]] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.path, self.files, self.layout, self.metadata = path, files, layout, metadata
        self.aliases: dict[str, str] = dict(aliases or {})
        self.notes, self.source = notes or [], Layout((Part(tuple(files)),))
        self._readers, self._metas, self._places = readers, metas, places or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._readers

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the file."""
        return self._metas[name]

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor's bytes into its cache, in the background."""
        file, start, length = self._places.get(name, (self.path, 0, 0))
        if length >= _WORTH_A_CALL:
            _READ_AHEAD.submit(_read_ahead, file, start, length)

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same checkpoint without some of its tensors."""
        other = copy(self)
        other._readers = {name: read for name, read in self._readers.items() if name not in names}
        other.aliases = {alias: name for alias, name in self.aliases.items() if alias not in names}
        return other

    def noted(self, note: str) -> Checkpoint:
        """The same checkpoint with one more note."""
        other = copy(self)
        other.notes = [*self.notes, note]
        return other

    def replaced(
        self,
        readers: Mapping[str, Callable[[], Tensor]],
        dtype: torch.dtype,
        gone: Collection[str],
        note: str,
    ) -> Checkpoint:
        """The same checkpoint with some tensors read otherwise, told as of a type, and others gone."""
        other = self.without(gone)
        other._readers = {name: readers.get(name, read) for name, read in other._readers.items()}
        other._metas = self._metas | {name: self._metas[name].to(dtype) for name in readers}
        other.notes, other.widened = [*self.notes, note], True
        return other


_WORTH_A_CALL = 1 << 18  # bytes; what is smaller comes with its neighbours
_READ_AHEAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")


def _read_ahead(file: Path, start: int, length: int) -> None:
    """Only a hint: the bytes go to the page cache, no memory of this process is used."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def open_checkpoint(path: str | Path, entry: str | None = None) -> Checkpoint:
    """Open a checkpoint file or folder for lazy reading.

    Args:
        path: as in the head of this module.
        entry: key of the state dict in a training checkpoint that holds several, such as "ema".

    Raises:
        CheckpointError: nothing there, damaged, incomplete, ambiguous, or of an unsafe format.
    """
    path = Path(path)
    source = find_layout(path)
    parts = [_open_part(path, part, entry) for part in source.parts]
    found = parts[0]
    if len(parts) > 1 or source.parts[0].prefix:
        found = _joined(path, source, parts)
    found.source = source
    return found


def _joined(path: Path, source: Layout, parts: list[Checkpoint]) -> Checkpoint:
    """Parts of one model, each one's tensors under names that begin with its prefix."""
    readers: dict[str, Callable[[], Tensor]] = {}
    metas: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, tuple[Path, int, int]] = {}
    for prefix, part in zip(source.stems, parts, strict=True):
        readers |= {f"{prefix}{name}": read for name, read in part._readers.items()}
        metas |= {f"{prefix}{name}": x for name, x in part._metas.items()}
        aliases |= {f"{prefix}{alias}": f"{prefix}{name}" for alias, name in part.aliases.items()}
        places |= {f"{prefix}{name}": place for name, place in part._places.items()}
    folders = [prefix.rstrip("/") for prefix in source.stems if prefix]
    layout = f"{parts[0].layout}, with {' '.join(folders)}"
    files = [file for part in parts for file in part.files]
    metadata = {key: text for part in parts for key, text in part.metadata.items()}
    notes = [note for part in parts for note in part.notes]
    return Checkpoint(path, files, layout, readers, metas, metadata, aliases, places, notes)


def _open_part(path: Path, part: Part, entry: str | None) -> Checkpoint:
    """The tensors of files that are read as a whole; an index must say the same as its shards."""
    files, ending = list(part.files), part.files[0].suffix
    if any(file.suffix != ending for file in files):
        raise CheckpointError(f"{part.index} names files of several formats: fetch it again")
    for file in files:
        if what := strange_content(file):
            raise CheckpointError(f"{file} {what}")
    if ending == ".safetensors":
        layout = "safetensors file" if path.is_file() else "folder with one safetensors file"
        if part.index is not None and len(files) > 1:
            layout = f"{len(files)} shards"
        checkpoint, held = _open_files(path, files, layout)
    else:
        layout = f"{ending} state dict" if path.is_file() else f"folder with {files[0].name}"
        if part.index is not None:
            layout = f"{len(files)} {ending} shards"
        checkpoint, held = _open_pickles(path, files, layout, entry)
    if part.index is not None:
        _check_index(part.index, held)
    return checkpoint


def _check_index(index: Path, held: Mapping[str, Path]) -> None:
    """Refuse an index that does not name the same tensors in the same files as hold them."""
    weight_map = read_index(index)
    for name in [*weight_map, *held]:
        if held.get(name) != weight_map.get(name):
            place = held[name].name if name in held else "no shard"
            line = weight_map[name].name if name in weight_map else "no line"
            raise CheckpointError(
                f"tensor '{name}' is in {place} and in {line} of {index}: fetch index and shards again"
            )


def _open_files(path: Path, files: list[Path], layout: str) -> tuple[Checkpoint, dict[str, Path]]:
    """Tensors of safetensors files, and in which file each is."""
    held: dict[str, Path] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    metas: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    places: dict[str, tuple[Path, int, int]] = {}
    for file in files:
        try:
            handle: Any = safe_open(file, framework="pt")  # checks the header and the size
            metadata.update(handle.metadata() or {})
            header, start = _header(file)
            entries = {name: _meta(name, header[name]) for name in handle.keys()}  # noqa: SIM118
            whole = _mapped(file)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{file} is no whole safetensors file ({error}): copy or download it again"
            ) from error
        double = [name for name in entries if name in metas]
        if double:
            raise CheckpointError(f"tensor '{double[0]}' stands in two shards, {file} and another")
        metas |= entries
        held |= dict.fromkeys(entries, file)
        for name, meta in entries.items():
            first, end = header[name]["data_offsets"]
            places[name] = file, start + first, end - first
            readers[name] = partial(_read, whole, start + first, meta)
    # safetensors' own convention for shared tensors, see its save_model: metadata alias -> name
    # ("format" is a word of its own there, whatever the tensors are called)
    second = {a: name for a, name in metadata.items() if a != "format" and a not in readers}
    aliases = {a: name for a, name in second.items() if name in readers}
    readers |= {alias: readers[name] for alias, name in aliases.items()}
    metas |= {alias: metas[name] for alias, name in aliases.items()}
    return Checkpoint(path, files, layout, readers, metas, metadata, aliases, places), held


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a file that safetensors has checked, and where the bytes of its tensors begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# Types that only newer releases of torch have.
_NEWER = {"U16": "uint16", "U32": "uint32", "U64": "uint64", "F8_E8M0": "float8_e8m0fnu"}
DTYPES |= {code: getattr(torch, name) for code, name in _NEWER.items() if hasattr(torch, name)}


def _meta(name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' is of the unsupported type {entry['dtype']}: convert it first"
        )
    return _empty(DTYPES[entry["dtype"]], tuple(entry["shape"]))


@cache
def _empty(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Shape and type without numbers; the layers of a model share a few of them."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _mapped(file: Path) -> Any:
    """The bytes of a file as an array, whose pages the system reads when they are looked at."""
    size = file.stat().st_size
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()


def _read(whole: Any, start: int, meta: Tensor) -> Tensor:
    """A tensor from the bytes of its file; much faster for small ones than safetensors' own reader."""
    if not meta.numel():
        return torch.empty(meta.shape, dtype=meta.dtype)
    return torch.frombuffer(whole, dtype=meta.dtype, count=meta.numel(), offset=start).view(
        meta.shape
    )


def _open_pickles(
    path: Path, files: list[Path], layout: str, entry: str | None
) -> tuple[Checkpoint, dict[str, Path]]:
    """Tensors of state dicts, and in which file each is, under the names that the files give them."""
    tensors: dict[str, Tensor] = {}
    held: dict[str, Path] = {}
    entries: dict[str, str] = {}
    for file in files:
        found = read_pickle(file, entry)
        if double := [name for name in found.tensors if name in tensors]:
            raise CheckpointError(f"tensor '{double[0]}' stands in two shards, {file} and another")
        tensors |= found.tensors
        held |= dict.fromkeys(found.tensors, file)
        if found.entry is not None:
            entries[file.name] = found.entry
    notes = [f"of {name} what stands under '{key}' is read" for name, key in entries.items()]
    layout += "".join(f" under '{key}'" for key in dict.fromkeys(entries.values()))
    tensors, stripped = without_wrappers(tensors)
    if stripped:
        notes.append(f"'{stripped}' is taken off the names of all tensors")
    readers = {name: partial(_same, x) for name, x in tensors.items()}
    metas = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    aliases = _shared(tensors)
    return Checkpoint(path, files, layout, readers, metas, {}, aliases, notes=notes), held


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share the storage of an earlier name, alias -> name."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, x in tensors.items():
        place = (x.data_ptr(), x.dtype, x.shape, x.stride())
        if x.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


def _same(tensor: Tensor) -> Tensor:
    return tensor


def read_metadata(file: Path) -> dict[str, str]:
    """Strings in the header of a safetensors file, or of one of several shards.

    Raises:
        CheckpointError: it is no whole file.
    """
    return _open_files(file, [file], "safetensors file")[0].metadata


def sha256(path: Path, stop: Event | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; cut short when `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(1 << 20)) and not (stop and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()
