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
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipact.checkpoints import DTYPES, INDEX, JOURNAL, PICKLES
from minipact.errors import CheckpointError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
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
    if path.name in ("lock", JOURNAL):
        raise CheckpointError(
            f"{path} is called as a file kept while it grows: choose another output"
        )
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
    finish: Callable[[Path], object] | None = None,
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
