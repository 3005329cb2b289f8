"""Weights as small files: what changed from a base, or from nothing, in few bits.

A matrix is stored as whole numbers of a unit per row, `step` times the root mean square of the row's
changes, other tensors as changes in bfloat16, or in float16 where there is no base. The file is a safetensors
file in a gzip file, with Huffman codes only, which suit such numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

State = dict[str, Tensor]
UNIT = "/unit"  # names the units of a matrix's rows


def pack(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], step: float) -> bytes:
    """The file of a model next to its base. The larger the step, the fewer bits and the more noise.

    Rounding adds noise of about step^2 / 12 of a matrix' energy, and an entry takes about
    2 - log2(step) bits. Whole numbers end at 127; a row with larger ones gets a larger unit.
    """
    changes = {name: tuned[name].float() - origin.float() for name, origin in base.items()}
    return _file(changes, step, torch.bfloat16)


def pack_alone(weights: Mapping[str, Tensor], step: float) -> bytes:
    """The file of a model without a base, see `pack`."""
    return _file({name: x.float() for name, x in weights.items()}, step, torch.float16)


def _file(changes: State, step: float, rest: torch.dtype) -> bytes:
    stored: State = {}
    for name, change in changes.items():
        if change.ndim == 2:
            usual = step * change.square().mean(1, keepdim=True).sqrt()
            unit = usual.maximum(change.abs().amax(1, keepdim=True) / 126).bfloat16()
            whole = change / unit.float().clamp_min(1e-30)
            stored[name] = whole.round().to(torch.int8)
            stored[name + UNIT] = unit
        else:
            stored[name] = change.to(rest)
    codes = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return codes.compress(save(stored)) + codes.flush()


def unpack(base: Mapping[str, Tensor], packed: bytes) -> State:
    """The model in float32, as near as `pack` left it."""
    changes = unpack_alone(packed)
    return {name: origin.float() + changes[name] for name, origin in base.items()}


def unpack_alone(packed: bytes) -> State:
    """The model of `pack_alone` in float32, or the changes of `pack`."""
    stored = load(zlib.decompress(packed, 31))
    return {
        name: x.float() * stored.get(name + UNIT, torch.ones(1)).float()
        for name, x in stored.items()
        if not name.endswith(UNIT)
    }


def read(base: Mapping[str, Tensor], path: Path) -> State:
    """`unpack` of a file."""
    return unpack(base, path.read_bytes())
