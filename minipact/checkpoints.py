"""Real checkpoint files: read lazily, written as a whole or not at all.

Reads a `.safetensors` file, a Hugging Face or open_clip folder (one file, or shards with an index), and
`.pt`, `.pth`, `.bin`, `.ckpt` state dicts. Writes safetensors only. Knows nothing of merging.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE_FILES = ("model.safetensors", "open_clip_model.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
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
        metadata: strings stored in the file.
    """

    def __init__(
        self,
        path: Path,
        files: list[Path],
        layout: str,
        readers: Mapping[str, Callable[[], Tensor]],
        metas: dict[str, Tensor],
        metadata: dict[str, str],
    ) -> None:
        self.path, self.files, self.layout, self.metadata = path, files, layout, metadata
        self._readers, self._metas = readers, metas

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the file."""
        return self._metas[name]


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
    for file in files:
        try:
            handle: Any = safe_open(file, framework="pt")
            metadata.update(handle.metadata() or {})
            entries = {name: _meta(handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{file} is no whole safetensors file ({error}): copy or download it again"
            ) from error
        double = [name for name in entries if name in metas]
        if double:
            raise CheckpointError(f"tensor '{double[0]}' stands in two shards, {file} and another")
        metas |= entries
        readers |= {name: _reader(handle, file, name) for name in entries}
    return Checkpoint(path, files, layout, readers, metas, metadata)


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


def _meta(view: Any) -> Tensor:
    if view.get_dtype() not in _DTYPES:
        raise ValueError(f"it holds the unsupported type {view.get_dtype()}")
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
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is not opened, as that would run code in it. If you "
            "trust it, convert it elsewhere:\n"
            f"  model = torch.load({path.name!r}, weights_only=False)\n"
            "  safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    except Exception as error:  # torch.load raises many kinds on damaged files
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
    readers = {name: partial(_same, x) for name, x in tensors.items()}
    metas = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    return Checkpoint(path, [path], f"{path.suffix} state dict", readers, metas, {})


def _same(tensor: Tensor) -> Tensor:
    return tensor


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- Writing -------------------------------------------------------------------------------------


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


def save_checkpoint(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write tensors to a `.safetensors` file or to a folder in Hugging Face layout, all or nothing.

    Everything grows in `PATH.partial` beside the output and takes its name at the end, flushed to the
    disk; whatever interrupts the writing leaves no output. One shard of tensors is held in memory.

    Args:
        path: ends in .safetensors: one file; otherwise a folder with `model.safetensors`, or shards
            `model-00001-of-0000N.safetensors` and their index.
        tensors: (name, tensor) pairs, taken one by one.
        max_shard_size: bytes of a shard in a folder, as `parse_size` reads them.
        metadata: strings for the file's header beside {"format": "pt"}.
        overwrite: replace an existing output.
        finish: called with the unfinished folder at the end, to add files to it.

    Returns:
        The files written.

    Raises:
        CheckpointError: the output exists or cannot be. OSError: the disk is full, and the like.
    """
    path = Path(path)
    limit = parse_size(max_shard_size)
    check_output(path, overwrite)
    header = {"format": "pt", **(metadata or {})}
    growing = path.with_name(path.name + ".partial")
    _remove(growing)
    try:
        if path.suffix == ".safetensors":
            _save_file(dict(tensors), growing, header)
        else:
            growing.mkdir()
            _write_shards(growing, tensors, limit, header)
            if finish is not None:
                finish(growing)
            _flush(*growing.iterdir(), growing)
        _replace(growing, path)
    except BaseException:
        _remove(growing)
        raise
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int, header: dict[str, str]
) -> None:
    """Fill one shard after the other; name them once their number is known."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        _save_file(pending, folder / f"shard-{len(shards)}", header)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > limit:
            close()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        final = "model.safetensors" if len(shards) == 1 else final
        os.rename(folder / f"shard-{number}", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save_file(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """safetensors' own writer, then a flush to the disk; a full disk becomes an OSError."""
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    with path.open("r+b") as file:
        _sort_metadata(file)
        file.flush()
        os.fsync(file.fileno())


def _sort_metadata(file: BinaryIO) -> None:
    """Put the header's strings in order: the library leaves it to chance, and equal runs give equal bytes."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    if len(text) == length:
        file.seek(8)
        file.write(text)


def _flush(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(partial: Path, path: Path) -> None:
    """Give the finished output its name; an old folder stays whole until the new one is in place."""
    aside = path.with_name(path.name + ".old")
    if path.is_dir():
        _remove(aside)
        os.rename(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        if aside.exists():
            os.rename(aside, path)
        raise
    _remove(aside)
    with contextlib.suppress(OSError):
        _flush(path.absolute().parent)


def _remove(path: Path) -> None:
    if path.is_dir():
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
