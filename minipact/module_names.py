"""What an installed transformers calls the tensors of a model's file, in the module that it makes of them.

From version 5 on it calls some otherwise, ViT's layers and GPT-NeoX's head for two, and stacks Mixtral's
experts. PEFT looks for the layers of an adapter under the module's names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minipact.layouts import read_json
from minipact.tensors import State, meta_of

Rename = Callable[[str], tuple[str, bool]]  # other name, and whether the tensor changes too
_EXPERT = re.compile(r".*\.experts\.\d+\.(w[123]|(gate|up|down)_proj)\.weight")
_STACKED = re.compile(r".*\.experts\.(gate_up|down)_proj")


@dataclass(frozen=True)
class ModuleNames:
    """How a module's names differ from those of its file.

    Attributes:
        called: name in the file -> name in the module, of tensors that only change their names.
        stacked: likewise of experts that the module holds as one tensor, which PEFT itself takes care of.
        unlike: likewise of other tensors that loading joins, splits or turns.
        by: the library and its version; "" where both have the same names, as far as can be told.
    """

    called: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)
    by: str = ""


def module_names(folder: Path, base: State) -> ModuleNames:
    """How the module that transformers makes of a folder calls the tensors of the folder's file.

    All agree where the folder holds no model of transformers, where that is not installed or older than 5,
    or where it does not know the class.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "auto_map" in config or not config.get("architectures"):
        return ModuleNames()
    try:
        rename, inside, by = _loader(folder, str(config["architectures"][0]))
        found = {name: rename(name) for name in base}
    except Exception:  # whatever the library raises on a model that it cannot make: names stay
        return ModuleNames()
    return _sorted(found, base, inside, by)


def _loader(folder: Path, kind: str) -> tuple[Rename, Mapping[str, Tensor], str]:
    """From names in the file to the module's, the module's tensors on "meta", and who says so."""
    library = importlib.import_module("transformers")
    mapping = importlib.import_module("transformers.conversion_mapping")
    loading = importlib.import_module("transformers.core_model_loading")
    make = getattr(library, kind)
    with torch.device("meta"):
        net = make(make.config_class.from_pretrained(folder))
    inside = net.state_dict()
    changes = mapping.get_model_conversion_mapping(net)  # PEFT calls it too
    renamings = [x for x in changes if isinstance(x, loading.WeightRenaming)]
    converters = [x for x in changes if isinstance(x, loading.WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        prefix = net.base_model_prefix
        other, pattern = loading.rename_source_key(name, renamings, converters, prefix, inside)
        return other, pattern is not None

    return rename, inside, f"transformers {library.__version__}"


def _sorted(
    found: Mapping[str, tuple[str, bool]], base: State, inside: Mapping[str, Tensor], by: str
) -> ModuleNames:
    called, stacked, unlike = dict[str, str](), dict[str, str](), dict[str, str]()
    for name, (other, is_converted) in found.items():
        if is_converted and _EXPERT.fullmatch(name) and _STACKED.fullmatch(other):
            stacked[name] = other
        elif is_converted:
            unlike[name] = other
        elif other != name and _is_alike(inside.get(other), meta_of(base, name)):
            called[name] = other
    return ModuleNames(called, stacked, unlike, by if called or stacked or unlike else "")


def _is_alike(module: Tensor | None, file: Tensor) -> bool:
    """Whether the module has a tensor of the file's shape; of another it is none of this file."""
    return module is not None and module.shape == file.shape
