"""PEFT LoRA adapters as fine-tuned models: base + s * B @ A, tensor by tensor, when asked for.

A folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT's save_pretrained writes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipact.checkpoints import Checkpoint, open_checkpoint
from minipact.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Options of PEFT under which base + s * B @ A is not the fine-tuned model.
_UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "trainable_token_indices",
                "target_parameters", "megatron_config", "layer_replication", "arrow_config")  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)


@dataclass(frozen=True)
class _Factors:
    """Names of a low-rank update's factors, its scale, and whether B @ A is stored transposed."""

    a: str
    b: str
    scale: float
    transposed: bool


class Adapter(Mapping[str, Tensor]):
    """A LoRA adapter on its base, as a lazy mapping name -> tensor with the base's names.

    Tensors that the adapter leaves alone are the base's own. Others are base + s * B @ A in float32, or
    float64 where the base is, with s = alpha / r, or alpha / sqrt(r) with use_rslora. Tensors that were
    trained as a whole (modules_to_save, biases) come from the adapter's file.

    Attributes:
        path, files, layout, aliases: as in `Checkpoint`.
    """

    def __init__(
        self,
        base: Checkpoint,
        stored: Checkpoint,
        path: Path,
        factors: Mapping[str, _Factors],
        replaced: Mapping[str, str],
    ) -> None:
        self.path, self.files = path, [path / CONFIG, *stored.files]
        ranks = sorted({stored.meta(f.a).shape[0] for f in factors.values()})
        self.layout = f"LoRA adapter, rank {' '.join(map(str, ranks))}, on {len(factors)} tensors"
        changed = factors.keys() | replaced.keys()
        self.aliases = {a: n for a, n in base.aliases.items() if not changed & {a, n}}
        self._base, self._stored, self._factors, self._replaced = base, stored, factors, replaced

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the files."""
        holder, key = self._place(name)
        meta = holder.meta(key)
        if name in self._factors:
            return meta.to(_wide(meta.dtype))
        return meta

    def __getitem__(self, name: str) -> Tensor:
        holder, key = self._place(name)
        update = self._update(name)
        if update is None:
            return holder[key]
        return holder[key].to(update.dtype) + update

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        """Where a tensor's weight without its factors stands: a layer trained as a whole, or the base's."""
        if name in self._replaced:
            return self._stored, self._replaced[name]
        return self._base, name

    def delta(self, name: str) -> Tensor | None:
        """s * B @ A of a tensor, without the base's rounding; None where that is not all."""
        if name in self._replaced:
            return None
        return self._update(name)

    def _update(self, name: str) -> Tensor | None:
        if name not in self._factors:
            return None
        factors, meta = self._factors[name], self._base.meta(name)
        a, b = (
            self._stored[key].to(_wide(meta.dtype)).flatten(1) for key in (factors.a, factors.b)
        )
        update = b @ a
        if factors.transposed:
            update = a.mT @ b.mT
        return (factors.scale * update).reshape(meta.shape)

    def without(self, names: Any) -> Adapter:
        """The same adapter on a base without some of its tensors."""
        return Adapter(
            self._base.without(names), self._stored, self.path, self._factors, self._replaced
        )


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (path / CONFIG).is_file()


def adapter_files(path: Path) -> list[Path]:
    """Configuration and weights of an adapter's folder. Raises CheckpointError where the weights lack."""
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path} holds {CONFIG} but no {WEIGHTS[0]}: fetch it again")
    return [path / CONFIG, found[0]]


def open_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Open the folder of a PEFT LoRA adapter on its base model.

    Raises:
        CheckpointError: damaged, of an unsupported kind, or made for another base.
    """
    config = _config(path / CONFIG)
    weights = adapter_files(path)[1]
    stored = open_checkpoint(weights)
    factors, replaced = {}, {}
    for key in stored:
        module = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(module):
            if match["side"] == "A":
                side = len(key) - len(module) + match.start("side")
                partner = f"{key[:side]}B{key[side + 1 :]}"
                scale = _scale(key, match["module"], config, stored, path)
                transposed = bool(match["embedding"] or config.get("fan_in_fan_out"))
                name = f"{match['module']}.weight"
                factors[name] = _Factors(key, partner, scale, transposed)
                _check_fit(name, factors[name], stored, base, path)
        elif "lora_" in module:
            raise CheckpointError(
                f"{weights}: '{key}' belongs to no plain LoRA (DoRA, for one): merge it into its base "
                "with PEFT's merge_and_unload() and give the result"
            )
        elif ".original_module." not in module:  # PEFT's copy of the base's own
            replaced[module.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
    _check_complete(factors, replaced, stored, base, path)
    return Adapter(base, stored, path, factors, replaced)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise CheckpointError(f"{file}: {kind!r} adapters are not supported, only 'LORA' is")
        for key in ("rank_pattern", "alpha_pattern"):
            config[key] = dict(config.get(key) or {})
            for pattern, value in config[key].items():
                re.compile(pattern)
                config[key][pattern] = float(value)
        config["r"], config["lora_alpha"] = (
            float(config.get("r", 8)),
            float(config.get("lora_alpha", 8)),
        )
    except (OSError, ValueError, TypeError, RecursionError, re.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} is no adapter configuration ({error}): fetch it again"
        ) from error
    init = str(config.get("init_lora_weights", True)).lower()
    unsupported = [f"{key}={config[key]}" for key in _UNSUPPORTED if config.get(key)]
    unsupported += [f"init_lora_weights={init}"] * init.startswith(_CHANGES_BASE)
    if unsupported:
        raise CheckpointError(
            f"{file}: {unsupported[0]} is not supported, as base + s * B @ A is not this model: merge "
            "it into its base with PEFT's merge_and_unload() and give the result"
        )
    return config


def _scale(key: str, module: str, config: dict[str, Any], stored: Checkpoint, path: Path) -> float:
    """s of the factor A at a key; patterns match module names as PEFT matches them."""
    rank = int(stored.meta(key).shape[0]) if stored.meta(key).ndim else 0
    expected = _by_pattern(config["rank_pattern"], module, config["r"])
    if rank == 0 or rank != expected:
        raise CheckpointError(
            f"{path}: '{key}' has rank {rank}, {CONFIG} says {expected:g}: fetch both files again"
        )
    alpha = _by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    found = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(found, default)


def _check_fit(
    name: str, factors: _Factors, stored: Checkpoint, base: Checkpoint, path: Path
) -> None:
    if factors.b not in stored:
        raise CheckpointError(f"{path}: '{factors.a}' has no partner '{factors.b}': fetch it again")
    if name not in base:
        raise CheckpointError(
            f"{path} acts on '{name}', which the base lacks: is it the right base?"
        )
    a, b, weight = stored.meta(factors.a), stored.meta(factors.b), base.meta(name)
    if not _fits(a, b, weight, factors.transposed):
        raise CheckpointError(
            f"{path}: B {tuple(b.shape)} times A {tuple(a.shape)} of '{factors.a}' does not fit "
            f"'{name}' {tuple(weight.shape)} of the base: is it the right base?"
        )


def _fits(a: Tensor, b: Tensor, weight: Tensor, transposed: bool) -> bool:
    """Whether B @ A, or its transpose, is of the weight's shape; kernels count as columns."""
    if a.ndim < 2 or b.ndim < 2 or weight.ndim < 2 or b[0].numel() != a.shape[0]:
        return False
    shape = [b.shape[0], a[0].numel()]
    if transposed:
        shape.reverse()
    return shape == [weight.shape[0], weight[0].numel()]


def _check_complete(
    factors: Mapping[str, _Factors],
    replaced: Mapping[str, str],
    stored: Checkpoint,
    base: Checkpoint,
    path: Path,
) -> None:
    used = {key for f in factors.values() for key in (f.a, f.b)} | set(replaced.values())
    if idle := [key for key in stored if "lora_" in key and key not in used]:
        raise CheckpointError(f"{path}: '{idle[0]}' has no partner: fetch the adapter again")
    if not used:
        raise CheckpointError(f"{path} holds no tensors: fetch the adapter again")
    for name, key in replaced.items():
        shape = tuple(stored.meta(key).shape)
        if name not in base or tuple(base.meta(name).shape) != shape:
            what = (
                f"{tuple(base.meta(name).shape)} in the base" if name in base else "not in the base"
            )
            raise CheckpointError(
                f"{path}: '{key}' {shape} was trained as a whole and is {what}: is it the right base?"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
