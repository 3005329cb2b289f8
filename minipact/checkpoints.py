"""Real checkpoint files: read lazily, written as a whole or not at all.

Reads a `.safetensors` file, a Hugging Face or open_clip folder (one file, or shards with an index), and
`.pt`, `.pth`, `.bin`, `.ckpt` state dicts. Writes safetensors only, tensor by tensor.
Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE_FILES = ("model.safetensors", "open_clip_model.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
JOURNAL = "journal.jsonl"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


class CheckpointError(ValueError):
    """A file that cannot be read or written as asked; the message names it and the remedy."""


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


_DTYPES = {
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
    if view.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"tensor '{name}' is of the unsupported type {view.get_dtype()}: convert it first"
        )
    return torch.empty(view.get_shape(), dtype=_DTYPES[view.get_dtype()], device="meta")


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


# ---- Writing -------------------------------------------------------------------------------------

_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as 5GB, 500MB or a plain number, in powers of ten as Hugging Face counts.

    Raises:
        CheckpointError: not a size, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(text).strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size <= 0:
        raise CheckpointError(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return size


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, or that safetensors cannot take.

    Raises:
        CheckpointError: it exists and overwrite is off, is a folder of something else, or lies in no folder.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise CheckpointError(f"{path} names no new file or folder: give the output a name")
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path}: pickles are not written; end it in .safetensors or in no suffix"
        )
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist: create it first")
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists: choose another output, or give --overwrite")
    if path.is_dir() == (path.suffix == ".safetensors"):
        raise CheckpointError(
            f"{path} exists as another kind (file or folder): choose another output"
        )
    if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} is a folder without weights and is not overwritten: choose another"
        )
    if path.is_dir() and os.path.lexists(_aside(path)):
        raise CheckpointError(
            f"{_aside(path)} is in the way, as an old output waits there while the new one takes its "
            "place: move it away"
        )


class Output:
    """A `.safetensors` file, or a folder in Hugging Face layout, written tensor by tensor.

    Names, shapes and types are known beforehand, so every tensor has its place in its file from the
    start and goes there in any order, from any process. All grows in `PATH.partial` beside the output:
    the files without their headers (nothing can take them for finished), a journal of the tensors that
    have reached the disk, and a lock. `commit` adds the headers and gives the output its name.

    Args:
        path: ends in .safetensors: one file; otherwise a folder with `model.safetensors`, or shards
            `model-00001-of-0000N.safetensors` and their index.
        metas: name -> tensor of the right shape and dtype, on the "meta" device for instance.
        max_shard_size: bytes of a shard in a folder, as `parse_size` reads them; None: all in one file.
        metadata: strings for the header of each file beside {"format": "pt"}.
        stem: "model" in the names of a folder's files.
        overwrite: replace an existing output.

    Raises:
        CheckpointError: the output exists or cannot be.
    """

    def __init__(
        self,
        path: str | Path,
        metas: Mapping[str, Tensor],
        *,
        max_shard_size: str | int | None = "5GB",
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
        overwrite: bool = False,
    ) -> None:
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        check_output(path, overwrite)
        self.path, self.metadata = Path(path), {"format": "pt", **(metadata or {})}
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.single = self.path.suffix == ".safetensors"
        growing = self.partial / self.path.name
        groups = {"": dict(metas)} if self.single else _groups(metas, limit, stem)
        self.shards = [_Shard(growing / n, held, self.metadata) for n, held in groups.items()]
        self.places = {name: shard for shard in self.shards for name in shard.metas}
        self.done: set[str] = set()
        self._handles: dict[Path, FileIO] = {}
        self._lock: int | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-disk")
        self._fresh: list[str] = []
        self._syncing: Future[None] | None = None

    def start(self, recipe: Mapping[str, Any] | None = None, resume: bool = False) -> set[str]:
        """Lock and lay out the unfinished output; by one process only, before anyone writes.

        Args:
            recipe: what the tensors' values depend on, as JSON takes it; kept in the journal.
            resume: keep the tensors of an interrupted run of the same recipe and layout.

        Returns:
            Names of the tensors that are kept, also as `done`.

        Raises:
            CheckpointError: another run writes here, or the recipes differ. OSError: the disk is full.
        """
        partial, names = self.partial, {"lock", JOURNAL, self.path.name}
        if partial.exists() and not (partial.is_dir() and names >= set(os.listdir(partial))):
            raise CheckpointError(f"{partial} is no unfinished output of minipact: move it away")
        partial.mkdir(exist_ok=True)
        self._lock = _locked(partial / "lock", self.path)
        layout = hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()
        record = json.loads(json.dumps({**(recipe or {}), "output layout": layout}))
        if resume and (partial / JOURNAL).exists():
            try:
                self.done = _recorded(partial / JOURNAL, record) & self.places.keys()
            except CheckpointError:
                self._unlock()  # what is there stays
                raise
        if not (self.done and all(shard.is_laid_out() for shard in self.shards)):
            self.done = set()
            _remove(partial / JOURNAL)
            _remove(partial / self.path.name)
            if not self.single:
                (partial / self.path.name).mkdir()
            for shard in self.shards:
                _reserve(shard.file, shard.size)
            (partial / JOURNAL).write_text(json.dumps({"recipe": record}) + "\n")
        return self.done

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place. What has reached the disk is noted in the journal meanwhile."""
        shard = self.places[name]
        expected = shard.metas[name]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(
                f"tensor '{name}' is {tensor.dtype} {tuple(tensor.shape)} and not as announced, "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        _write_at(self._handle(shard.file), shard.starts[name], flat.view(torch.uint8).numpy().data)
        self._fresh.append(name)
        if self._syncing is None or self._syncing.done():
            self._sync()

    def settle(self) -> None:
        """Wait until everything written by this process is on the disk and in the journal."""
        self._sync().result()

    def _sync(self) -> Future[None]:
        """Wait for the flush under way, and have the tensors written since flushed in the background."""
        if self._syncing is not None:
            self._syncing.result()
        names, self._fresh = self._fresh, []
        self._syncing = self._pool.submit(self._flushed, names)
        return self._syncing

    def _flushed(self, names: list[str]) -> None:
        for file in {self.places[name].file for name in names}:
            os.fsync(self._handles[file].fileno())
        lines = "".join(json.dumps({"done": name}) + "\n" for name in names)
        with (self.partial / JOURNAL).open("ab", buffering=0) as journal:
            journal.write(lines.encode())  # one call, as several processes may write lines
        self.done.update(names)

    def _handle(self, file: Path) -> FileIO:
        if file not in self._handles:
            self._handles[file] = FileIO(file, "r+")
        return self._handles[file]

    def commit(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        finish: Callable[[Path], None] | None = None,
    ) -> list[Path]:
        """Add the headers, flush all to the disk, and give the output its name.

        Args:
            metadata: final values of some strings of the header, as long as the first ones.
            finish: called with the unfinished folder, to add files to it.

        Returns:
            The files of the output.

        Raises:
            CheckpointError: a tensor is missing. OSError: the disk is full, and the like.
        """
        self.settle()
        if missing := [name for name in self.places if name not in self.done]:
            raise CheckpointError(f"{self.path}: tensor '{missing[0]}' was never written")
        for shard in self.shards:
            header = _header(shard.metas, self.metadata | dict(metadata or {}), len(shard.header))[
                0
            ]
            if len(header) != len(shard.header):
                raise CheckpointError(
                    f"{self.path}: the metadata has outgrown the place kept for it"
                )
            _write_at(self._handle(shard.file), 0, memoryview(header))
            os.fsync(self._handle(shard.file).fileno())
        growing = self.partial / self.path.name
        if not self.single:
            _write_index(growing, self.shards)
            if finish is not None:
                finish(growing)
            _flush(*growing.iterdir(), growing)
        self._close_files()
        _replace(growing, self.path)
        self.close(keep=False)
        return sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]

    def close(self, *, keep: bool) -> None:
        """Let go of the files; what is unfinished is removed, unless it is to be kept for resuming."""
        self._pool.shutdown()
        self._close_files()
        if self._lock is not None:
            journal = self.partial / JOURNAL
            if not (keep and journal.is_file() and '"done"' in journal.read_text()):
                _remove(self.partial)
            self._unlock()

    def _close_files(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def save_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    finish: Callable[[Path], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Write a mapping name -> tensor to a `.safetensors` file or a folder, all or nothing.

    Args:
        path: ends in .safetensors: one file; otherwise a folder in Hugging Face layout.
        state: a state dict or a lazy checkpoint; tensors are taken one by one.
        finish: called with the unfinished folder at the end, to add files to it.
        settings: max_shard_size, metadata, stem, overwrite as `Output` takes them.

    Returns:
        The files written.

    Raises:
        CheckpointError: the output exists or cannot be. OSError: the disk is full, and the like.
    """
    meta = getattr(state, "meta", state.__getitem__)
    output = Output(path, {name: meta(name) for name in state}, **settings)
    try:
        output.start()
        for name in state:
            output.write(name, state[name])
        return output.commit(finish=finish)
    finally:
        output.close(keep=False)


class _Shard:
    """One file of an output: its tensors, where each starts, its provisional header and its size."""

    def __init__(
        self, file: Path, metas: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.file, self.metas = file, metas
        self.header, starts = _header(metas, metadata)
        self.starts = {name: len(self.header) + start for name, start in starts.items()}
        self.size = len(self.header) + sum(x.nbytes for x in metas.values())

    def is_laid_out(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.size


def _groups(
    metas: Mapping[str, Tensor], limit: int | None, stem: str
) -> dict[str, dict[str, Tensor]]:
    """Tensors by file name: one file after the other is filled, in the order of the names given."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in metas.items():
        if limit is not None and groups[-1] and size + x.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = x
        size += x.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _header(
    metas: Mapping[str, Tensor], metadata: Mapping[str, str], length: int = 0
) -> tuple[bytes, dict[str, int]]:
    """Header of a safetensors file, and where each tensor starts behind it.

    Wide types come first, so that every tensor is aligned; the rest goes by name, as safetensors'
    own writer orders it. Equal input gives equal bytes. Padded to 8 bytes, or to a length given.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    starts, end = {}, 0
    for name in sorted(metas, key=lambda name: (-metas[name].itemsize, name)):
        x = metas[name]
        if name in entries:
            raise CheckpointError(f"a tensor called '{name}' cannot be written: rename it")
        if x.dtype not in _CODES:
            raise CheckpointError(
                f"tensor '{name}' of {x.dtype} cannot be written: convert it first"
            )
        starts[name], end = end, end + x.nbytes
        entries[name] = {
            "dtype": _CODES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(max(length - 8, len(text) + -len(text) % 8))  # spaces
    return len(padded).to_bytes(8, "little") + padded, starts


def _write_index(folder: Path, shards: list[_Shard]) -> None:
    if len(shards) > 1:
        weight_map = {name: shard.file.name for shard in shards for name in shard.metas}
        size = sum(x.nbytes for shard in shards for x in shard.metas.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_at(file: FileIO, start: int, data: memoryview) -> None:
    file.seek(start)
    while data:
        data = data[file.write(data) :]


def _reserve(file: Path, size: int) -> None:
    """A file of this size, its room on the disk taken, so that a full disk shows at once."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(opened.fileno(), 0, size)
            except OSError as error:
                raise OSError(
                    error.errno, f"no room for {size} bytes: {error.strerror}", str(file)
                ) from error
        else:
            opened.truncate(size)


def _locked(file: Path, output: Path) -> int:
    """Handle of a lock file; the system lets go of the lock when the process ends, however it does."""
    import fcntl

    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError(
            f"{output} is being written by another run: wait for it, or choose another output"
        ) from error
    return handle


def _recorded(journal: Path, record: Mapping[str, Any]) -> set[str]:
    """Tensors that an interrupted run has finished; refuses one with another recipe."""
    lines = []
    for line in journal.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line torn by a power cut does not count
            lines.append(json.loads(line))
    old: dict[str, Any] = next((line["recipe"] for line in lines if "recipe" in line), {})
    for key in [*record, *old]:
        if old.get(key) != record.get(key):
            raise CheckpointError(
                f"--resume: {journal.parent} was begun with {key} {old.get(key)!r}, now it is "
                f"{record.get(key)!r}: repeat the first command, or leave --resume out to begin anew"
            )
    return {line["done"] for line in lines if "done" in line}


def _flush(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(partial: Path, path: Path) -> None:
    """Give the finished output its name; an old folder stays whole until the new one is in place."""
    aside = _aside(path)
    moved = path.is_dir()
    if moved:
        os.rename(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        if moved:
            os.rename(aside, path)
        raise
    if moved:
        _remove(aside)
    with contextlib.suppress(OSError):
        _flush(path.absolute().parent)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy configuration and tokenizer files of a model folder; returns their names."""
    if not source.is_dir():
        return []
    found = sorted({path for glob in SIDE_FILES for path in source.glob(glob) if path.is_file()})
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]
