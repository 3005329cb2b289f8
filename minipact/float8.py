"""Weights in float8 with scales beside them: read as the numbers they stand for.

A weight `X` is X * scale. The scale is `X_scale` or `X_scale_inv`: one number, one a row, or one a block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minipact.alignment import is_buffer
from minipact.checkpoints import Checkpoint
from minipact.errors import CheckpointError, listing
from minipact.layouts import read_json

SETTING = "quantization_config"  # of a configuration; says nothing true of what is written
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_PACKING = re.compile("scale|zero|quant|absmax|amax")
_BLOCK = 128  # the usual side of a block
_REMEDY = "convert the model to bfloat16 with the tool that made it"


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with float8 weights times their scales, in bfloat16; scales are gone.

    A float8 tensor without a companion stays as it is.

    Raises:
        CheckpointError: a module holds a float8 weight and tensors that are not understood.
    """
    weights = [name for name in checkpoint if checkpoint.meta(name).dtype in _FLOAT8]
    readers: dict[str, Callable[[], Tensor]] = {}
    gone: set[str] = set()
    modules = _modules(checkpoint)
    for name in weights:
        module = name.rpartition(".")[0]
        beside = {other for other in modules[module] - {name} if _belongs(checkpoint, other, name)}
        scale = next((name + end for end in _SCALES if name + end in beside), None)
        if other := sorted(beside - {scale, f"{module}.input_scale"}):
            what = f"'{name}' is float8 beside {listing(other)}, not understood"
            raise CheckpointError(f"{checkpoint.path}: {what}: {_REMEDY}")
        if scale is not None:
            sides = _sides(checkpoint, name, scale)
            readers[name] = partial(_read, checkpoint, name, scale, sides)
            gone |= beside
    if not readers:
        return checkpoint
    note = f"{len(readers)} float8 weights are read with their scales, as bfloat16"
    return checkpoint.replaced(readers, torch.bfloat16, gone, note)


def forget_quantization(folder: Path) -> None:
    """Take out of a folder's configuration how weights were quantized that are not any more."""
    file = folder / "config.json"
    config = read_json(file)
    if isinstance(config, dict) and SETTING in config:
        told = {key: value for key, value in config.items() if key != SETTING}
        file.write_bytes((json.dumps(told, indent=2) + "\n").encode())


def _belongs(checkpoint: Checkpoint, other: str, name: str) -> bool:
    """Whether a tensor of the same module may say how a weight is packed: all but what is known not to."""
    own, meta = other.rpartition(".")[2], checkpoint.meta(other)
    if other.startswith(f"{name}_"):
        return True
    if own == "logit_scale" or meta.dtype in _FLOAT8 or is_buffer(other, meta):
        return False
    is_layers = bool(re.search("weight|bias", own))
    return bool(_PACKING.search(own)) or ("." in name and not is_layers)


def _modules(checkpoint: Checkpoint) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in checkpoint:
        found.setdefault(name.rpartition(".")[0], set()).add(name)
    return found


def _sides(checkpoint: Checkpoint, name: str, scale: str) -> tuple[int, int]:
    """Rows and columns of a weight that share a number of its scale."""
    weight, shape = checkpoint.meta(name), tuple(checkpoint.meta(scale).shape)
    rows, columns = (*weight.shape, 1, 1)[:2]
    if checkpoint.meta(scale).numel() == 1:
        return rows, columns
    if shape in ((rows,), (rows, 1)):
        return 1, columns
    for sides in ((_BLOCK, _BLOCK), _even(rows, columns, shape)):
        if weight.ndim == 2 and shape == tuple(
            -(-n // s) for n, s in zip((rows, columns), sides, strict=True)
        ):
            return sides
    what = f"'{scale}' {shape} fits neither rows nor blocks of '{name}' {tuple(weight.shape)}"
    raise CheckpointError(f"{checkpoint.path}: {what}: {_REMEDY}")


def _even(rows: int, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Sides of blocks that divide a weight evenly; of one entry where there are none."""
    if len(shape) != 2 or 0 in (*shape, rows, columns) or rows % shape[0] or columns % shape[1]:
        return 1, 1
    return rows // shape[0], columns // shape[1]


def _read(checkpoint: Checkpoint, name: str, scale: str, sides: tuple[int, int]) -> Tensor:
    weight, factors = checkpoint[name].float(), checkpoint[scale].float()
    if weight.ndim < 2 or factors.numel() == 1:
        return weight * factors.reshape(() if factors.numel() == 1 else -1)
    factors = factors.reshape(-(-weight.shape[0] // sides[0]), -1)
    whole = factors.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    return weight * whole[: weight.shape[0], : weight.shape[1]]
