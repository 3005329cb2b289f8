"""Checkpoints written as a whole or not at all: safetensors, tensor by tensor, in any order.

Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipact.checkpoints import DTYPES
from minipact.errors import CheckpointError
from minipact.layouts import JOURNAL, PICKLES, Layout, Stem, by_prefix, read_json, side_files

_CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


_BETWEEN_FLUSHES = 0.1  # seconds; each takes some milliseconds, however small the tensors are
# Endings of files, where a folder of that name would surprise.
_OTHERS = (".safetensors", ".gguf", ".onnx", ".h5", ".json", ".npz")


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, or that safetensors cannot take.

    Raises:
        CheckpointError: it exists and overwrite is off, is a folder of something else, or lies in no folder.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise CheckpointError(f"{path} names no new file or folder: give the output a name")
    if path.name in ("lock", JOURNAL):
        raise CheckpointError(
            f"{path} is called as a file kept while it grows: choose another output"
        )
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path}: pickles are not written; end it in .safetensors or in no suffix"
        )
    if path.suffix != ".safetensors" and path.suffix.lower() in _OTHERS:
        raise CheckpointError(
            f"{path}: {path.suffix} is not written; end it in .safetensors or in no suffix"
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
    if path.is_dir() and any(path.iterdir()) and not _holds_model(path):
        raise CheckpointError(
            f"{path} is a folder without weights and is not overwritten: choose another"
        )
    if path.is_dir() and os.path.lexists(_aside(path)):
        raise CheckpointError(
            f"{_aside(path)} is in the way, as an old output waits there while the new one takes its "
            "place: move it away"
        )


def _holds_model(folder: Path) -> bool:
    """Whether a folder looks like an output, so that another may take its place."""
    inner = folder.glob("*/*.safetensors") if (folder / "modules.json").is_file() else ()
    return any(folder.glob("*.safetensors")) or any(inner)


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
        stems: names of a folder's files; of a model with several parts for each of them, by the prefix of its
            tensors' names, which its files leave out.
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
        stems: Mapping[str, Stem] | None = None,
        overwrite: bool = False,
    ) -> None:
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        check_output(path, overwrite)
        self.path, self.metadata = Path(path), {"format": "pt", **(metadata or {})}
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.single = self.path.suffix == ".safetensors"
        growing = self.partial / self.path.name
        if self.single:
            self.shards = [_Shard(growing, dict(metas), self.metadata)]
        else:
            self.shards = _shards(growing, metas, stems or {"": Stem()}, limit, self.metadata)
        self.places = {name: shard for shard in self.shards for name in shard.metas}
        self.done: set[str] = set()
        self._handles: dict[Path, FileIO] = {}
        self._lock: BaseFileLock | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-disk")
        self._fresh: list[str] = []
        self._syncing: Future[None] | None = None
        self._next_sync = 0.0

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
            for shard in self.shards:
                shard.file.parent.mkdir(parents=True, exist_ok=True)
                _reserve(shard.file, shard.size)
            (partial / JOURNAL).write_bytes((json.dumps({"recipe": record}) + "\n").encode())
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
        if time.monotonic() >= self._next_sync and (self._syncing is None or self._syncing.done()):
            self._sync()
            self._next_sync = time.monotonic() + _BETWEEN_FLUSHES

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
        finish: Callable[[Path], object] | None = None,
    ) -> list[Path]:
        """Add the headers, flush all to the disk, and give the output its name.

        Args:
            metadata: final values of some strings of the header, as long as the first ones.
            finish: called with the unfinished folder, to add files to it.

        Returns:
            The files of the output.

        Raises:
            CheckpointError: a tensor is missing. OSError: the disk is full or fails.
        """
        self.settle()
        if missing := [name for name in self.places if name not in self.done]:
            raise CheckpointError(f"{self.path}: tensor '{missing[0]}' was never written")
        for shard in self.shards:
            told = self.metadata | dict(metadata or {})
            header = _header(shard.stored, told, len(shard.header))[0]
            if len(header) != len(shard.header):
                raise CheckpointError(
                    f"{self.path}: the metadata has outgrown the place kept for it"
                )
            _write_at(self._handle(shard.file), 0, memoryview(header))
            os.fsync(self._handle(shard.file).fileno())
        growing = self.partial / self.path.name
        if not self.single:
            _write_indexes(growing, self.shards)
            if finish is not None:
                finish(growing)
            _flush(*growing.rglob("*"), growing)
        self._close_files()
        _replace(growing, self.path)
        self.close(keep=False)
        return sorted(file for file in (self.path, *self.path.rglob("*")) if file.is_file())

    def close(self, *, keep: bool) -> None:
        """Let go of the files; what is unfinished is removed, unless it is to be kept for resuming."""
        self._pool.shutdown()
        self._close_files()
        if self._lock is not None:
            journal = self.partial / JOURNAL
            if not (keep and journal.is_file() and b'"done"' in journal.read_bytes()):
                if os.name == "nt":  # no file goes there while it is open
                    self._unlock()
                _remove(self.partial)
            self._unlock()

    def _close_files(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None


def save_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    finish: Callable[[Path], object] | None = None,
    **settings: Any,
) -> list[Path]:
    """Write a mapping name -> tensor to a `.safetensors` file or a folder, all or nothing.

    Args:
        path: ends in .safetensors: one file; otherwise a folder in Hugging Face layout.
        state: a state dict or a lazy checkpoint; tensors are taken one by one.
        finish: called with the unfinished folder at the end, to add files to it.
        settings: max_shard_size, metadata, stems, overwrite as `Output` takes them.

    Returns:
        The files written.

    Raises:
        CheckpointError: the output exists or cannot be. OSError: the disk is full or fails.
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


class Shelf(MutableMapping[str, Tensor | None]):
    """Tensors by name, or None, kept in files below a folder and read by mapping them into memory.

    Several threads may use it. The files stay until the folder goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._files: dict[str, Path | None] = {}
        self._numbers = itertools.count()

    def __getitem__(self, name: str) -> Tensor | None:
        file = self._files[name]
        return None if file is None else load_file(file)["x"]

    def __setitem__(self, name: str, x: Tensor | None) -> None:
        if x is None:
            self._files[name] = None
            return
        file = self._folder / f"{next(self._numbers)}.safetensors"
        save_file({"x": x.contiguous()}, file)
        self._files[name] = file

    def __delitem__(self, name: str) -> None:
        file = self._files.pop(name)
        if file is not None:
            file.unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Shard:
    """One file of an output: its tensors, where each starts, its provisional header and its size.

    The file's own names of its tensors, `stored`, lack the prefix of the part that it belongs to.
    """

    def __init__(
        self,
        file: Path,
        metas: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        prefix: str = "",
        stem: Stem | None = None,
    ) -> None:
        self.file, self.metas, self.stem = file, metas, stem
        self.stored = {name.removeprefix(prefix): x for name, x in metas.items()}
        self.header, starts = _header(self.stored, metadata)
        self.starts = {f"{prefix}{name}": len(self.header) + x for name, x in starts.items()}
        self.size = len(self.header) + sum(x.nbytes for x in metas.values())

    def is_laid_out(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.size


def _shards(
    folder: Path,
    metas: Mapping[str, Tensor],
    stems: Mapping[str, Stem],
    limit: int | None,
    metadata: Mapping[str, str],
) -> list[_Shard]:
    """The files of a folder, those of each part of a model under its own stem."""
    shards = []
    for prefix, names in by_prefix(metas, stems).items():
        # what loads a module beside the first knows no shards
        groups = _groups({name: metas[name] for name in names}, None if prefix else limit)
        for number, held in enumerate(groups, start=1):
            file = folder / stems[prefix].file(number, len(groups))
            shards.append(_Shard(file, held, metadata, prefix, stems[prefix]))
    return shards


def _groups(metas: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """Tensors by file: one file after the other is filled, in the order of the names given."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in metas.items():
        if limit is not None and groups[-1] and size + x.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = x
        size += x.nbytes
    return groups


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


def _write_indexes(folder: Path, shards: list[_Shard]) -> None:
    for stem in {shard.stem for shard in shards if shard.stem is not None}:
        ours = [shard for shard in shards if shard.stem == stem]
        if len(ours) > 1:
            weight_map = {name: shard.file.name for shard in ours for name in shard.stored}
            size = sum(x.nbytes for shard in ours for x in shard.metas.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / stem.index).write_bytes((json.dumps(index, indent=2) + "\n").encode())


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


def _locked(file: Path, output: Path) -> BaseFileLock:
    """A lock file, held; the system lets go of it when the process ends, however it does."""
    lock = FileLock(file)
    try:
        _acquire(lock, file)
    except Timeout as error:
        raise CheckpointError(
            f"{output} is being written by another run: wait for it, or choose another output"
        ) from error
    return lock


def _acquire(lock: BaseFileLock, file: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except TypeError:  # its holder is dead, but the system lacks the call to take a lock over
        file.unlink(missing_ok=True)
        lock.acquire(timeout=0)


def _recorded(journal: Path, record: Mapping[str, Any]) -> set[str]:
    """Tensors that an interrupted run has finished; refuses one with another recipe."""
    lines = []
    for line in journal.read_text("utf-8", errors="replace").splitlines():
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
    windows = os.name == "nt"  # it flushes what is open for writing, and no folders
    for path in (path for path in paths if not (windows and path.is_dir())):
        handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
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


def complete_folder(folder: Path, layout: Layout, metas: Mapping[str, Tensor]) -> list[str]:
    """Add to an output's folder what else belongs to the model; returns what the user should know.

    All of the model's own folder is copied but weights, states of training and what is very large. Its
    configurations tell the types of the weights that are written, in `metas`. No code in it is run.
    """
    found = side_files(layout)
    for name in found.files:
        assert layout.folder is not None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.folder / name, folder / name)
    for prefix, names in by_prefix(metas, layout.stems).items():
        config = folder / layout.stems[prefix].folder / "config.json"
        _tell_types(config, [metas[name] for name in names])
    return found.notes


def untie(folder: Path) -> None:
    """Have the configuration in a folder say that input and output embeddings are two tensors."""
    file, key = folder / "config.json", "tie_word_embeddings"
    config = read_json(file)
    if isinstance(config, dict):
        nested = config.get("text_config")
        if isinstance(nested, dict) and key in nested:
            config = config | {"text_config": nested | {key: False}}
        file.write_bytes((json.dumps(config | {key: False}, indent=2) + "\n").encode())


def _tell_types(file: Path, written: Iterable[Tensor]) -> None:
    """Have a configuration say of what type the weights are, where it says something else."""
    sizes: Counter[str] = Counter()
    for x in written:
        if x.dtype in FLOATS.values():  # of float8 a configuration tells how it computes
            sizes[str(x.dtype).removeprefix("torch.")] += x.numel()
    config = read_json(file)
    if not sizes or not isinstance(config, dict):
        return
    told = _with_types(config, sizes, max(sizes, key=lambda kind: sizes[kind]))
    if told != config:
        file.write_bytes((json.dumps(told, indent=2) + "\n").encode())


def _with_types(config: Mapping[str, Any], written: Collection[str], main: str) -> dict[str, Any]:
    """A configuration with main for the type of its weights, where it names one that is not written.

    Those of towers within count too, but not those of quantized weights, which tell how these compute.
    """
    found = dict(config)
    for key, value in config.items():
        if key in ("torch_dtype", "dtype") and isinstance(value, str):
            kind = value.removeprefix("torch.")
            if kind in FLOATS and kind not in written:
                found[key] = value.replace(kind, main)
        elif isinstance(value, dict) and _TOWER.fullmatch(key):
            found[key] = _with_types(value, written, main)
    return found


_TOWER = re.compile(r"(?!quantization|compression).+_config(_dict)?")
