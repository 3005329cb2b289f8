"""What adapter_config.json of PEFT says: read, known to be harmless, or refused by name.

An unknown setting with a value may change what the weights mean, so it is refused like one that does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipact.errors import CheckpointError, listing

MERGE_INSTEAD = (
    "merge it into the model it was trained on with PEFT's merge_and_unload() and give the result"
)

# Settings of PEFT 0.1 to 0.21 that say how the adapter was trained, or only what its tensors show.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "merge_weights", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "velora_config",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "modules_to_save", "r",
    "rank_pattern", "task_type", "use_rslora",
}  # fmt: skip
# Those under which base + s * B @ A is not the fine-tuned model.
_CHANGING = {
    "enable_lora", "ensure_weight_tying", "kasa_config", "layer_replication", "loftq_config", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora",
}  # fmt: skip
_NEVER_MERGED = {"alora_invocation_tokens", "arrow_config"}
# PEFT takes these with all their defaults where they are {}.
_ON_WHEN_EMPTY = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora"}
# Beginnings that leave the base's weights as they were. MiCA's B is fixed, its A starts from zero.
_BASE_KEPT = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class Settings:
    """What a configuration says of the adapter's tensors.

    Attributes:
        ranks, alphas: pattern of layer names -> value. rank, alpha: of all others.
        fan_in_fan_out: as stored: PEFT keeps that of the layer it made last.
        whole: modules that were trained as a whole. is_classifier: whether the task has a head of its own.
    """

    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    bias: str
    whole: tuple[str, ...]
    is_classifier: bool


def read_settings(file: Path) -> Settings:
    """The settings in a file.

    Raises CheckpointError where it is none, or holds what minipact does not know to be harmless; by name.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_config(file, error) from error
    _refuse_other_kinds(file, found)
    _refuse_settings(file, found)
    try:
        return _read_config(found)
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise _no_config(file, error) from error


def _no_config(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is no adapter configuration ({error}): fetch it again")


def _refuse_other_kinds(file: Path, found: Any) -> None:
    if isinstance(found, dict) and found.get("peft_type") == "LORA":
        return
    if isinstance(found, dict) and "lora_parameters" in found and "peft_type" not in found:
        raise CheckpointError(
            f"{file} is of an MLX adapter, not of PEFT: fuse it with mlx_lm.fuse and give the result"
        )
    kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
    raise CheckpointError(
        f"{file}: {kind!r} adapters are not supported, only 'LORA' is: where PEFT can merge it, "
        f"{MERGE_INSTEAD}"
    )


def _refuse_settings(file: Path, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError for settings that change the model otherwise, and for unknown ones."""
    for key, value in found.items():
        text = f"{file}: {key}={str(value)[:80]}"
        if key == "init_lora_weights" and str(value).lower() not in _BASE_KEPT:
            raise CheckpointError(
                f"{text} is not supported, as training began by changing the base's weights, or may have: "
                "save it as a plain LoRA with PEFT's path_initial_model_for_weight_conversion where it was "
                "trained, or give what merge_and_unload() returns there"
            )
        if key == "bias" and value not in (None, *_BIASES):
            raise CheckpointError(
                f"{text} is unknown: it is one of {listing(_BIASES)}, or {MERGE_INSTEAD}"
            )
        if key in _HARMLESS or key in _READ or _is_off(key, value):
            continue
        if key in _NEVER_MERGED:
            raise CheckpointError(
                f"{text} is not supported: it acts otherwise on some tokens than on others, as no "
                "merged weights can; leave this adapter out"
            )
        if key in _CHANGING:
            raise CheckpointError(
                f"{text} is not supported, as base + s * B @ A is not this model: {MERGE_INSTEAD}"
            )
        raise CheckpointError(
            f"{text} is an unknown setting, which may change what the weights mean: {MERGE_INSTEAD}; or, "
            "if it is not of the weights, remove it from this file"
        )


def _is_off(key: str, value: object) -> bool:
    if value is None or value is False:
        return True
    is_empty = isinstance(value, str | list | dict) and not value
    return is_empty and key not in _ON_WHEN_EMPTY


def _read_config(found: Mapping[str, Any]) -> Settings:
    """Raises ValueError, TypeError, AttributeError, OverflowError or re.error where a value is none."""
    whole = found.get("modules_to_save") or []
    task = str(found.get("task_type")).rpartition(".")[2]
    return Settings(
        rank=_number(found.get("r", 8)),
        alpha=_number(found.get("lora_alpha", 8)),
        ranks=_patterns(found.get("rank_pattern")),
        alphas=_patterns(found.get("alpha_pattern")),
        rslora=_switch(found, "use_rslora"),
        fan_in_fan_out=_switch(found, "fan_in_fan_out"),
        bias=found.get("bias") or "none",
        whole=tuple(map(str, [whole] if isinstance(whole, str) else whole)),
        is_classifier=task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"),
    )


def _number(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is no number")
    return float(value)


def _patterns(value: Any) -> dict[str, float]:
    patterns = {str(pattern): _number(x) for pattern, x in dict(value or {}).items()}
    for pattern in patterns:
        re.compile(pattern)
    return patterns


def _switch(found: Mapping[str, Any], key: str) -> bool:
    value = found.get(key) or False
    if not isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not true or false")
    return value
