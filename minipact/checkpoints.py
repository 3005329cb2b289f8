"""Real checkpoint files, read lazily.

A `.safetensors` file, a Hugging Face or open_clip folder (one file, or shards with an index), and `.pt`,
`.pth`, `.bin`, `.ckpt` state dicts. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipact.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE_FILES = ("model.safetensors", "open_clip_model.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
JOURNAL = "journal.jsonl"
# ---- Reading -------------------------------------------------------------------------------------


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name, each read from its file when asked for.

    Attributes:
        path: what was opened. files: the files that hold the tensors. layout: a word on the format.
        metadata: strings stored in the file. aliases: second names of tensors, alias -> name, where a
            model shares one tensor between two layers.
    """

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
    ) -> None:
        self.path, self.files, self.layout, self.metadata = path, files, layout, metadata
        self.aliases: dict[str, str] = dict(aliases or {})
        self._readers, self._metas, self._places = readers, metas, places or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the file."""
        return self._metas[name]

    def prefetch(self, name: str) -> None:
        """Have the system read a tensor's bytes into its cache, in the background."""
        if name in self._places:
            _READ_AHEAD.submit(_read_ahead, *self._places[name])

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same checkpoint without some of its tensors."""
        readers = {name: read for name, read in self._readers.items() if name not in names}
        aliases = {alias: name for alias, name in self.aliases.items() if alias not in names}
        return Checkpoint(self.path, self.files, self.layout, readers, self._metas, self.metadata,
                          aliases, self._places)  # fmt: skip


_READ_AHEAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")


def _read_ahead(file: Path, start: int, length: int) -> None:
    """Only a hint: the bytes go to the page cache, no memory of this process is used."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint file or folder for lazy reading.

    Raises:
        CheckpointError: nothing there, damaged, incomplete, ambiguous, or of an unsafe format.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a file or folder on this machine")
    if path.suffix == ".safetensors":
        return _open_files(path, [path], "safetensors file")
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise CheckpointError(
        f"{path} has an unknown ending: use .safetensors, a folder, or one of {' '.join(PICKLES)}"
    )


def _open_folder(folder: Path) -> Checkpoint:
    if folder.suffix == ".partial" and (folder / JOURNAL).exists():
        raise CheckpointError(f"{folder} is an unfinished output: repeat its command with --resume")
    if (folder / INDEX).exists():
        return _open_sharded(folder)
    single = [folder / name for name in SINGLE_FILES if (folder / name).exists()]
    files = single or sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _open_files(folder, files, "folder with one safetensors file")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds several safetensors files and no {INDEX}: name the file to read"
        )
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    hint = f"name the file, {pickles[0].name} for one" if pickles else "is it the right folder?"
    raise CheckpointError(f"{folder} holds no safetensors file: {hint}")


def _open_sharded(folder: Path) -> Checkpoint:
    """Hugging Face shards; the index and the shards must name the same tensors in the same files."""
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({error!r}): fetch it again"
        ) from error
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names '{outside[0]}' outside of its folder: refused")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not there: fetch it again")
    checkpoint = _open_files(folder, [folder / s for s in shards], f"{len(shards)} shards")
    held = {name: file.name for file in checkpoint.files for name in _names(file)}
    for name in [*weight_map, *held]:
        if held.get(name) != weight_map.get(name):
            raise CheckpointError(
                f"tensor '{name}' is in {held.get(name, 'no shard')} and in "
                f"{weight_map.get(name, 'no line')} of {index}: fetch index and shards again"
            )
    return checkpoint


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def _open_files(path: Path, files: list[Path], layout: str) -> Checkpoint:
    readers: dict[str, Callable[[], Tensor]] = {}
    metas: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    places: dict[str, tuple[Path, int, int]] = {}
    for file in files:
        try:
            handle: Any = safe_open(file, framework="pt")
            metadata.update(handle.metadata() or {})
            entries = {name: _meta(name, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118
            places |= _places(file)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{file} is no whole safetensors file ({error}): copy or download it again"
            ) from error
        double = [name for name in entries if name in metas]
        if double:
            raise CheckpointError(f"tensor '{double[0]}' stands in two shards, {file} and another")
        metas |= entries
        readers |= {name: _reader(handle, file, name) for name in entries}
    # safetensors' own convention for shared tensors, see its save_model: metadata alias -> name
    # ("format" is a word of its own there, whatever the tensors are called)
    second = {a: name for a, name in metadata.items() if a != "format" and a not in readers}
    aliases = {a: name for a, name in second.items() if name in readers}
    readers |= {alias: readers[name] for alias, name in aliases.items()}
    metas |= {alias: metas[name] for alias, name in aliases.items()}
    return Checkpoint(path, files, layout, readers, metas, metadata, aliases, places)


def _places(file: Path) -> dict[str, tuple[Path, int, int]]:
    """Where each tensor's bytes stand in a file that safetensors has checked: file, start, length."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (file, 8 + length + start, end - start) for name, (start, end) in spans.items()}


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
}


def _meta(name: str, view: Any) -> Tensor:
    if view.get_dtype() not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' is of the unsupported type {view.get_dtype()}: convert it first"
        )
    return torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")


def _reader(handle: Any, file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor '{name}' cannot be read ({error})") from error
        return tensor

    return read


def _open_pickle(path: Path) -> Checkpoint:
    """State dict written by torch.save, read without running any code that it may hold."""
    try:
        content = _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is not opened, as that would run code in it. If you "
            "trust it, convert it elsewhere:\n"
            f"  model = torch.load({path.name!r}, weights_only=False)\n"
            "  safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    except Exception as error:  # torch.load raises many kinds on damaged files
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, as OpenAI's CLIP files are, and is not opened. If you "
                f"trust it, save torch.jit.load({path.name!r}).state_dict() as safetensors elsewhere"
            ) from error
        raise CheckpointError(f"{path} is no whole state dict ({error}): fetch it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise CheckpointError(
            f"{path} is no state dict of tensors: save model.state_dict() instead"
        )
    if content and all(str(name).startswith("module.") for name in content):
        content = {str(name).removeprefix("module."): x for name, x in content.items()}
    tensors = {str(name): x.detach() for name, x in content.items()}
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_quantized or x.is_meta:
            kind = "without data" if x.is_meta else "quantized" if x.is_quantized else "sparse"
            raise CheckpointError(f"{path}: tensor '{name}' is {kind}: save a plain dense tensor")
    readers = {name: partial(_same, x) for name, x in tensors.items()}
    metas = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    layout = f"{path.suffix} state dict"
    return Checkpoint(path, [path], layout, readers, metas, {}, _shared(tensors))


def _load_pickle(path: Path) -> Any:
    """Contents of a torch.save file by torch's restricted unpickler.

    A whole pickled module, as the older checkpoints of the field are, names classes that the unpickler
    refuses. Each of them is replaced by an inert stand-in, so that no code of theirs runs, and the
    tensors are then picked from the stand-ins as nn.Module.state_dict() picks them.
    """
    load = partial(torch.load, path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    unsafe = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    try:
        return load()
    except pickle.UnpicklingError:
        if unsafe is None or not _is_zip(path):
            raise
    stand_ins: list[Any] = [(type("StandIn", (_StandIn,), {}), name) for name in unsafe(path)]
    with torch.serialization.safe_globals(stand_ins):
        content = load()
    if not isinstance(content, _StandIn):
        return content
    if "_modules" not in content.__dict__:
        raise pickle.UnpicklingError("neither tensors nor a module")
    return dict(_module_tensors(content, ""))


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)


class _StandIn:
    """Takes the place of a pickled object: keeps its attributes and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _module_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a stand-in for an nn.Module, as its state_dict() would hold them."""
    fields = module.__dict__
    passing = fields.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, x in fields.get(kind, {}).items():
            if x is not None and not (kind == "_buffers" and name in passing):
                yield f"{prefix}{name}", x
    for name, child in fields.get("_modules", {}).items():
        if isinstance(child, _StandIn):
            yield from _module_tensors(child, f"{prefix}{name}.")


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


def sha256(path: Path, stop: Event | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; cut short when `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(1 << 20)) and not (stop and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()
