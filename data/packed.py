"""Fine-tuned weights as small files: the base, and what changed in few bits.

A matrix is stored as whole numbers of a unit per row, `step` times the root mean square of the row's
changes, other tensors as changes in bfloat16. The file is a safetensors file in a gzip file, with Huffman
codes only, which suit such numbers.
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
    """The file of a fine-tuned model. The larger the step, the fewer bits and the more noise.

    Rounding adds noise of about step^2 / 12 of a matrix' energy, and an entry takes about
    2 - log2(step) bits.
    """
    stored: State = {}
    for name, origin in base.items():
        change = tuned[name].float() - origin.float()
        if change.ndim == 2:
            unit = (step * change.square().mean(1, keepdim=True).sqrt()).bfloat16()
            whole = change / unit.float().clamp_min(1e-30)
            stored[name] = whole.round().clamp(-127, 127).to(torch.int8)
            stored[name + UNIT] = unit
        else:
            stored[name] = change.bfloat16()
    codes = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return codes.compress(save(stored)) + codes.flush()


def unpack(base: Mapping[str, Tensor], packed: bytes) -> State:
    """The fine-tuned model in float32, as near as `pack` left it."""
    stored = load(zlib.decompress(packed, 31))
    return {
        name: origin.float() + stored[name].float() * stored.get(name + UNIT, torch.ones(1)).float()
        for name, origin in base.items()
    }


def read(base: Mapping[str, Tensor], path: Path) -> State:
    """`unpack` of a file."""
    return unpack(base, path.read_bytes())
