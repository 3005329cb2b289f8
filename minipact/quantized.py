"""Weights that other tools have packed into whole numbers: told by the names of their tensors.

A merge cannot change them, so each kind is refused with the tool that unpacks it. Float8 weights with scales
are numbers still, see `minipact.float8`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from minipact.tensors import State, meta_of


@dataclass(frozen=True)
class Packing:
    """How weights are packed: what packed them, and the way to unpack them."""

    tool: str
    way: str


_GPTQMODEL = (
    "unpack it with GPTQModel, gptqmodel.utils.model_dequant.dequantize_model(folder, new_folder)"
)
_CONFIGURED = (
    "unpack it with transformers, from_pretrained(folder, quantization_config={}(dequantize=True))"
)
# Names of the tensors that a packing brings along, in the order to look for them: the module comes first.
_KINDS = (
    (r"(.+)\.(SCB|weight_format|weight\.(absmax|quant_map|nested_\w+|quant_state\..+))",
     Packing("bitsandbytes", "unpack it with transformers, from_pretrained(folder).dequantize()")),
    (r"(.+)\.g_idx", Packing("GPTQ", _GPTQMODEL)),
    (r"(.+)\.(qweight|qzeros)", Packing("GPTQ or AWQ", _GPTQMODEL)),
    (r"(.+)\.weight_(packed|shape)",
     Packing("compressed-tensors", _CONFIGURED.format("CompressedTensorsConfig"))),
    (r"(.+)\.W_q", Packing("HQQ", "unpack it with dequantize() of its HQQ layers")),
    (r"(.+)\.weight\._(data|scale)", Packing("quanto", "unpack it with dequantize() of its weights")),
)  # fmt: skip
_ANY = re.compile("|".join(pattern.replace("(.+)", ".+", 1) for pattern, _ in _KINDS))
_BLOCKS = re.compile(r"(.+)_(blocks|scales)")  # of whole numbers only
_MXFP4 = Packing("MXFP4", _CONFIGURED.format("Mxfp4Config"))


def packings(state: State) -> dict[str, Packing]:
    """Modules whose weights a tool has packed, and how."""
    found: dict[str, Packing] = {}
    marked = [name for name in state if _ANY.fullmatch(name)]
    for pattern, packing in _KINDS:
        for match in filter(None, (re.fullmatch(pattern, name) for name in marked)):
            found.setdefault(match[1], packing)
    for match in filter(None, map(_BLOCKS.fullmatch, state)):
        if meta_of(state, match[0]).dtype == torch.uint8:
            found.setdefault(match[1], _MXFP4)
    return found


def packing_of(state: State, name: str) -> Packing | None:
    """How the module of a tensor is packed, if it is."""
    found = packings(state)
    return next((found[module] for module in modules_of(name) if module in found), None)


def modules_of(name: str) -> list[str]:
    """Modules that a tensor may belong to: by what a packing brings along, by its own name, or itself."""
    marks = [*(pattern for pattern, _ in _KINDS), _BLOCKS.pattern]
    matches = (re.fullmatch(pattern, name) for pattern in marks)
    return [*(match[1] for match in matches if match), name.rpartition(".")[0], name]


def packed_apart(ours: State, theirs: State, names: Iterable[str]) -> tuple[str, str, str]:
    """The first module of some tensors that two models hold packed in different ways.

    Returns its name, how each holds it, and the way on; all empty where there is none.
    """
    here, there = packings(ours), packings(theirs)
    if not here and not there:
        return "", "", ""
    for module in dict.fromkeys(module for name in names for module in modules_of(name)):
        one, other = here.get(module), there.get(module)
        packing = other or one
        if one != other and packing is not None:
            kinds = [f"packed by {kind.tool}" if kind else "plain" for kind in (one, other)]
            return module, f"{kinds[0]} in the base, {kinds[1]} in the task", packing.way
    return "", "", ""
