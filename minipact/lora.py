"""Adapters made: what a merge, or one fine-tuned model, adds to its base, as the factors of a PEFT LoRA.

For each weight D [m, n] = U S V^T, the rank r keeps B = U_r S_r^(1/2) [m, r] and A = S_r^(1/2) V_r^T [r, n]:
no other B A of this rank is nearer to D (Eckart and Young 1936). lora_alpha = r, so PEFT adds B A as it is
(Hu et al. 2021, arXiv 2106.09685). Adapters are read by `minipact.adapters`.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipact.alignment import is_table
from minipact.errors import CheckpointError, MergeError, check_known
from minipact.layouts import ADAPTER, Stem
from minipact.low_rank import Product
from minipact.merging import Kept, Merged, Progress
from minipact.methods import leading_triples, named_generator, thin_triples
from minipact.output import save_checkpoint
from minipact.recipe import Globs, Policy
from minipact.steps import Step
from minipact.tensors import Device, State

PREFIX = "base_model.model."  # of PEFT, before the names of the base's modules
STEM = Stem("adapter_model")
ALL = "all"  # layers, in the table of errors
Turned = Callable[[Step], bool]
# Modules whose weight is a table to look up, though it has the shape of a matrix; heads are none.
_TABLES = re.compile(
    r"wte|wpe|shared|relative_attention_bias|(\w*_)?emb(ed(ding)?)?s?|embed_(?!out$|proj)\w+"
)
_WAY = (
    "save_modules (--save-modules) stores their modules whole beside the factors; or exclude them"
)
_LINES = 8  # of one kind in a message


def is_conv1d(step: Step) -> bool:
    """Whether a weight is stored [inputs, outputs], as far as its name tells; PEFT's B A is then D^T."""
    return step.kind == "matrix_T"


class Lora(Mapping[str, Tensor]):
    """A PEFT adapter as a lazy mapping, name in its file -> tensor.

    Attributes:
        config: what adapter_config.json says.
        rank: of all layers; where one takes less, the rest of its factors is zero.
        layers: names of the base's tensors that have factors. whole: of those that are stored whole.
        error: ||D - B A|| / ||D|| over all layers with factors, of the factors as they are stored.
        errors: kind of layer, its name with * for numbers, or "all" -> {rank: relative error}, had the rank
            been 1, 2, 4 .. `rank`.
    """

    def __init__(
        self,
        merged: Merged,
        found: Mapping[str, _Factored],
        kept: Kept,
        whole: Mapping[str, str],
        own: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> None:
        self.config, self._merged, self._kept, self._whole = dict(config), merged, kept, dict(whole)
        self.layers, self.whole = tuple(found), tuple(dict.fromkeys(whole.values()))
        self.rank = int(self.config["r"])
        self._found = found
        self._places = {
            f"{PREFIX}{_module(own[name])}.lora_{side}.weight": (name, side)
            for name in found
            for side in "AB"
        }
        self.errors = _by_kind(found, self.rank)
        self.error = self.errors[ALL][self.rank]

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._whole

    def __len__(self) -> int:
        return len(self._places) + len(self._whole)

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without computing anything."""
        if name in self._whole:
            return self._merged.meta(self._whole[name])
        layer, side = self._places[name]
        found = self._found[layer]
        m, n = found.shape
        shape = (self.rank, n) if side == "A" else (m, self.rank)
        return torch.empty(shape, dtype=found.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            return self._merged[self._whole[name]]
        meta, factor = self.meta(name), self._kept["/".join(self._places[name])]
        assert factor is not None
        padded = torch.zeros(meta.shape, dtype=meta.dtype)  # beyond a layer's own rank
        padded[: factor.shape[0], : factor.shape[1]] = factor
        return padded

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        finish: Callable[[Path], object] | None = None,
    ) -> list[Path]:
        """Write the adapter's folder, which appears whole or not at all; returns its files.

        Args:
            path: names a new folder.
            overwrite: replace an existing one.
            metadata: strings for the header of the weights.
            finish: called with the unfinished folder, to add files to it.

        Raises:
            CheckpointError: the output exists or cannot be. OSError: the disk is full or fails.
        """
        check_folder(Path(path))

        def complete(folder: Path) -> None:
            text = json.dumps(self.config, indent=2, sort_keys=True)
            (folder / ADAPTER).write_bytes(f"{text}\n".encode())
            if finish is not None:
                finish(folder)

        return save_checkpoint(
            path, self, finish=complete, max_shard_size=None, stems={"": STEM},
            metadata=metadata, overwrite=overwrite,
        )  # fmt: skip


def check_folder(path: Path) -> None:
    """Raise CheckpointError where an output is called as a file, as PEFT reads folders."""
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: an adapter is a folder: leave the ending out")


def extract_lora(
    base: State,
    tuned: State,
    rank: int,
    *,
    include: Globs = None,
    exclude: Globs = None,
    policy: Mapping[str, str] | Policy | None = None,
    save_modules: bool = False,
    svd: str = "exact",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: Device = "cpu",
) -> Lora:
    """A PEFT adapter of one fine-tuned model: what it adds to its base, as factors of a rank.

    Args:
        base, tuned: models, name -> tensor, with the names of the module that PEFT is to load it on.
        include, exclude: globs of names to take, and of names not to; all others stay as in the base.
        rank, policy, save_modules, svd, dtype, seed, device: as in `to_lora` and `merge`.

    Raises MergeError as `to_lora` and `merge` do.
    """
    merged = Merged(
        base, [tuned], scale=1.0, vectors="rule", include=include, exclude=exclude, policy=policy,
        dtype=dtype, seed=seed, device=device,
    )  # fmt: skip
    return to_lora(merged, rank, save_modules=save_modules, svd=svd)


def to_lora(
    merged: Merged,
    rank: int,
    *,
    save_modules: bool = False,
    svd: str = "exact",
    turned: Turned | None = None,
    never: Mapping[str, str] | None = None,
    called: Mapping[str, str] | None = None,
    base_model: str | None = None,
    threads: int | None = None,
    room: float = math.inf,
    shelf: Callable[[], Kept] = dict,
    progress: Progress = None,
) -> Lora:
    """What a merge adds to its base as a PEFT adapter: scale * task vector of each layer as factors.

    The layers are 2-D tensors called "module.weight", but for embeddings, which are told by their names.
    Factors are in float32, in float64 where the base is, or in the dtype of the merge. Task arithmetic on
    adapters keeps their factors, so that nothing is lost with a rank as large as the sum of theirs.

    Args:
        merged: the merge.
        rank: of the factors at most, from 1 to the largest rank of a layer; the adapter's is less where no
            change takes so much.
        save_modules: whether what factors cannot hold goes into the adapter as well: norms, embeddings and
            convolutions with their whole module, as modules_to_save, and biases of layers with factors, as
            bias="lora_only". Else no such tensor may change.
        svd: "exact", or "randomized", faster on large matrices; seeded by the recipe and the name.
        turned: whether a weight is stored [inputs, outputs], as Conv1D is; None goes by its name.
        never: names that an adapter cannot change, and why.
        called: name -> what the module that PEFT loads the adapter on calls it, where that differs.
        base_model: what the configuration calls the base.
        threads, room: as in `Merged.map`.
        shelf: makes the mapping in which factors wait.
        progress: called with (done, in all, name) after each layer.

    Raises MergeError where the rank does not fit, no layer changed, or tensors did that it cannot hold.
    """
    check_known("svd", [svd], ("exact", "randomized"))
    never, is_turned = never or {}, turned or is_conv1d
    merging = [step for step in merged.steps.values() if step.rule != "copy"]
    layers = {step.name: step for step in merging if is_layer(step, merged)}
    _check_rank(rank, layers.values())
    spread = partial(merged.map, threads=threads, room=room)

    doubtful = [x.name for x in merging if x.name not in layers or x.name in never or "/" in x.name]
    changes = spread(partial(_changes, merged), doubtful)
    changed = [name for name, is_new in zip(doubtful, changes, strict=True) if is_new]
    _refuse(changed, merged, save_modules, never)

    kept, found = shelf(), dict[str, _Factored]()
    work = spread(lambda name: _factored(merged, name, rank, svd, is_turned, kept), layers)
    for done, (name, factors) in enumerate(zip(layers, work, strict=True), start=1):
        if factors is not None:
            found[name] = factors
        if progress is not None:
            progress(done, len(layers), name)
    own = {name: (called or {}).get(name, name) for name in merged}
    plan = _planned(own, found, changed)
    found = {name: found[name] for name in plan.layers}
    if not found:
        raise MergeError("no layer changed that factors could hold, so there is no adapter to make")
    is_any_turned = any(is_turned(layers[name]) for name in found)
    config = _config(own, found, plan, is_any_turned, base_model)
    return Lora(merged, found, kept, plan.whole, own, config)


def is_layer(step: Step, names: Collection[str]) -> bool:
    """Whether factors can hold a change of a tensor: the weight of a Linear or Conv1D, as names tell.

    `names` are those of the model. The output projection of an nn.MultiheadAttention is none, as that never
    calls it, and so would pass its factors by.
    """
    own = _module(step.name).rpartition(".")[2]
    is_lookup = is_table(step.name) or _TABLES.fullmatch(own) or _attention(step.name, names)
    return len(step.shape) == 2 and step.name.endswith(".weight") and not is_lookup


def _attention(name: str, names: Collection[str]) -> str:
    """The nn.MultiheadAttention in which a tensor's module stands; "" where there is none."""
    parent = _module(_module(name))
    inputs = (f"{parent}.in_proj_weight", f"{parent}.q_proj_weight")
    return parent if any(x in names for x in inputs) else ""


def _changes(merged: Merged, name: str) -> bool:
    delta, factor = merged.update(name)
    return delta is not None and factor != 0


def _module(name: str) -> str:
    """The module that a tensor belongs to; "" at the top."""
    return name.rpartition(".")[0]


# ---- What cannot be --------------------------------------------------------------------------------


def _check_rank(rank: int, layers: Iterable[Step]) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MergeError(f"rank {rank!r} of an adapter must be a count, 1 or more")
    most = max((min(step.shape) for step in layers), default=0)
    if most == 0:
        raise MergeError("there is no layer to put factors on: see include and exclude")
    if rank > most:
        raise MergeError(f"rank {rank} is above the largest rank of a layer, {most}")


def _refuse(
    changed: Iterable[str], merged: Merged, save_modules: bool, never: Mapping[str, str]
) -> None:
    """Raise MergeError with all that changed and that the adapter cannot hold."""
    why = {name: never.get(name) or _no_module(name, merged) for name in changed}
    whole = [name for name, reason in why.items() if not reason]
    lines = [
        f"'{name}' {text}: exclude it to keep the base's" for name, text in why.items() if text
    ]
    lines = _first(lines)
    if whole and not save_modules:
        lines.append(f"factors cannot hold {len(whole)} of the changed tensors: {_WAY}")
        lines += _first([f"'{name}' {list(merged.meta(name).shape)}" for name in whole])
    if lines:
        raise MergeError("\n".join(lines))


def _first(lines: list[str]) -> list[str]:
    """Eight lines at most, and how many more."""
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"and {more} more"]


def _no_module(name: str, merged: Merged) -> str:
    """Why a tensor cannot be stored with the whole of its module; "" where it can."""
    module = _module(name)
    if "/" in name:
        return "belongs to a module beside the main one"
    if not module:
        return "stands in no module of its own"
    if name.endswith(".bias"):
        return ""
    beneath = (x for x in merged if x.startswith(f"{module}."))
    within = [x for x in beneath if is_layer(merged.steps[x], merged)]
    return f"stands in '{module}' beside whole layers, such as '{within[0]}'" if within else ""


# ---- Factors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factored:
    """What is known of a layer's factors.

    Attributes:
        shape: [m, n] of B A. dtype: of the factors. rank: the directions that are kept.
        total: ||D||^2. held: [rank], ||D||^2 - ||D - B A||^2 with the first 1, 2 .. of them.
        lost: ||D - B A||^2 of the factors as they are stored.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    total: float
    held: Tensor = field(compare=False)
    lost: float

    def lost_at(self, rank: int) -> float:
        """||D - B A||^2 with so many directions; at its own rank that of the stored factors."""
        if rank >= self.rank:
            return self.lost
        return max(0.0, self.total - float(self.held[rank - 1]))


def _factored(
    merged: Merged, name: str, rank: int, svd: str, turned: Turned, kept: Kept
) -> _Factored | None:
    """Put a layer's factors aside; None where it does not change."""
    step = merged.steps[name]
    delta, scale = merged.update(name)
    if delta is None or scale == 0:
        return None
    D = (delta.mT if turned(step) else delta) * scale
    b, a = low_rank(D, rank, svd, named_generator(merged.recipe.seed, name))
    held = (
        a.square().sum(1).square().cumsum(0)
    )  # of A = S^(1/2) V^T each row has the squared norm s
    if len(held) == 0:
        return None
    dtype = merged.dtype or (torch.float64 if step.dtype == torch.float64 else torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    for side, x in (("A", a), ("B", b)):
        kept[f"{name}/{side}"] = x.cpu()
    shape = (D.shape[0], D.shape[1])
    lost = _square(_less(D, Product(b, a)))
    return _Factored(shape, dtype, len(held), _square(D), held.cpu(), lost)


def low_rank(
    D: Tensor | Product, rank: int, svd: str = "exact", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """B [m, k] and A [k, n] in float64 with B A nearest to D [m, n], k = min(rank, m, n) at most.

    k is less where D's numerical rank is. The singular values are shared evenly between both factors.
    svd="randomized" comes near it only. Raises MergeError where D holds NaN or infinity.
    """
    rank = min(rank, *D.shape)
    if isinstance(D, Product):
        u, s, v = thin_triples(D, 1e-12, rank)
    else:
        u, s, v = leading_triples(D, rank, svd, generator)
    root = s.sqrt()
    return u * root, root[:, None] * v.mT


def _less(D: Tensor | Product, other: Product) -> Tensor | Product:
    """D - other in float64."""
    b, a = other.b.double(), other.a.double()
    if isinstance(D, Product):
        return Product(torch.cat([D.b.double(), -b], dim=1), torch.cat([D.a.double(), a]))
    return D.double() - b @ a


def _square(D: Tensor | Product) -> float:
    """||D||^2."""
    return D.square() if isinstance(D, Product) else float(D.double().square().sum())


def _by_kind(found: Mapping[str, _Factored], rank: int) -> dict[str, dict[int, float]]:
    """Relative errors by kind of layer and rank, for all layers first."""
    kinds: dict[str, list[_Factored]] = defaultdict(list)
    for name, x in found.items():
        kinds[re.sub(r"(?<![^.])\d+(?![^.])", "*", _module(name))].append(x)
    ranks = sorted({rank, *(1 << i for i in range(rank.bit_length()))})
    table = {ALL: list(found.values()), **kinds}
    return {
        kind: {
            r: math.sqrt(sum(x.lost_at(r) for x in held) / sum(x.total for x in held))
            for r in ranks
        }
        for kind, held in table.items()
    }


# ---- PEFT's names and configuration ------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Where changes go.

    Attributes:
        layers: names of weights with factors. modules: those that are stored whole.
        whole: name in the adapter -> name in the base, of tensors stored whole, biases too.
        biases: whether layers with factors have biases of their own.
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    whole: Mapping[str, str]
    biases: bool


def _planned(own: Mapping[str, str], found: Collection[str], changed: Collection[str]) -> _Plan:
    """Biases of layers with factors go for themselves, what else changed with its whole module.

    `own` is what the module calls each tensor of the base.
    """
    names = set(own.values())
    layers = {_module(own[name]) for name in found}
    biases = [x for x in changed if own[x].endswith(".bias") and _module(own[x]) in layers]
    others = [own[name] for name in changed if name not in biases]
    modules = {_attention(x, names) or _module(x) for x in others}
    modules = {x for x in modules if not any(x.startswith(f"{other}.") for other in modules)}
    matched = _matched_by_peft(modules, names)
    left = [name for name in found if not _is_within(own[name], matched)]
    biases = [name for name in biases if not _is_within(own[name], matched)]
    whole = {f"{PREFIX}{x}": name for name, x in own.items() if _is_within(x, matched)}
    whole |= {f"{PREFIX}{_module(own[name])}.base_layer.bias": name for name in biases}
    return _Plan(tuple(left), tuple(sorted(modules)), whole, bool(biases))


def _is_within(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _matched_by_peft(modules: Collection[str], names: Iterable[str]) -> set[str]:
    """Modules of the model whose names end like one of these, in the middle of a word too."""
    return {module for module in _all_modules(names) if module.endswith(tuple(modules))}


def _all_modules(names: Iterable[str]) -> set[str]:
    """Modules that tensors stand in, at any depth."""
    return {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}


def _config(
    own: Mapping[str, str],
    found: Mapping[str, _Factored],
    plan: _Plan,
    turned: bool,
    base_model: str | None,
) -> dict[str, Any]:
    """adapter_config.json: alpha = r, so that PEFT adds B A as it is.

    There is one rank for all, as PEFT finds no pattern of names again where it calls layers otherwise.
    """
    rank = max(x.rank for x in found.values())
    return {
        "base_model_name_or_path": base_model,
        "bias": "lora_only" if plan.biases else "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(plan.modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _targets([own[name] for name in found], own.values()),
        "task_type": None,
        "use_rslora": False,
    }


def _targets(found: Collection[str], names: Iterable[str]) -> list[str]:
    """Modules with factors by their own name where all of that name have them, else by their whole name."""
    layers = {_module(name) for name in found}
    others = _all_modules(names) - layers
    shared = {module.rpartition(".")[2] for module in others}
    own = {module: module.rpartition(".")[2] for module in layers}
    return sorted({module if short in shared else short for module, short in own.items()})
