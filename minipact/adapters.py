"""PEFT LoRA adapters as fine-tuned models: base + s * B @ A, tensor by tensor, when asked for.

A folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT's save_pretrained writes it.
What the configuration or the file holds beyond that is known here to be harmless, or is refused by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipact.alignment import is_vocabulary_table, unwrapped
from minipact.checkpoints import Checkpoint, open_checkpoint
from minipact.errors import CheckpointError, listing
from minipact.layouts import ADAPTER as CONFIG
from minipact.layouts import PICKLES, read_json
from minipact.low_rank import Product
from minipact.module_names import module_names
from minipact.peft_settings import MERGE_INSTEAD, Settings, read_settings
from minipact.quantized import packings

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
Place = tuple[Checkpoint, str]  # where a tensor stands: a file, and its key there
Renames = tuple[tuple[str, str], ...]  # (old, new) beginnings of names
_SAVE_AGAIN = "save it again where it was trained, or give what merge_and_unload() returns there"


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
    trained as a whole (modules_to_save, biases) come from the adapter's files, those too that the base lacks.

    Attributes:
        path, files, layout, aliases: as in `Checkpoint`.
        heads: names of the heads that were trained with it and that the base lacks.
        changed: names of the tensors that it changes.
        notes: what the user should know.
    """

    def __init__(
        self,
        base: Checkpoint,
        stored: Checkpoint,
        path: Path,
        factors: Mapping[str, _Factors],
        replaced: Mapping[str, Place],
        heads: Collection[str] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path, self.files, self.heads, self.notes = path, adapter_files(path), heads, notes
        ranks = sorted({stored.meta(f.a).shape[0] for f in factors.values()})
        self.layout = f"LoRA adapter, rank {' '.join(map(str, ranks))}, on {len(factors)} tensors"
        changed = factors.keys() | replaced.keys()
        self.aliases = {a: n for a, n in base.aliases.items() if not changed & {a, n}}
        self._base, self._stored, self._factors, self._replaced = base, stored, factors, replaced
        self._names = dict.fromkeys([*base, *replaced])
        self.changed = frozenset(changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

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

    def _place(self, name: str) -> Place:
        """Where a tensor's weight without its factors stands: a layer trained as a whole, or the base's."""
        return self._replaced.get(name, (self._base, name))

    def delta(self, name: str) -> Tensor | None:
        """s * B @ A of a tensor, without the base's rounding; None where that is not all."""
        if name in self._replaced:
            return None
        return self._update(name)

    def factors(self, name: str) -> Product | None:
        """`delta` of a matrix as a product of factors, of rank 0 where it stays; None of other tensors."""
        holder, key = self._place(name)
        meta = holder.meta(key)
        if name in self._replaced or meta.ndim != 2 or not meta.is_floating_point():
            return None
        wide = _wide(meta.dtype)
        if name not in self._factors:
            m, n = meta.shape
            return Product(torch.zeros(m, 0, dtype=wide), torch.zeros(0, n, dtype=wide))
        factors = self._factors[name]
        a, b = (self._stored[key].to(wide).flatten(1) for key in (factors.a, factors.b))
        product = Product(factors.scale * b, a)
        return product.mT if factors.transposed else product

    def _update(self, name: str) -> Tensor | None:
        if name not in self._factors:
            return None
        holder, key = self._place(name)
        factors, meta = self._factors[name], holder.meta(key)
        a, b = (
            self._stored[key].to(_wide(meta.dtype)).flatten(1) for key in (factors.a, factors.b)
        )
        update = b @ a
        if factors.transposed:
            update = a.mT @ b.mT
        return (factors.scale * update).reshape(meta.shape)

    def without(self, names: Collection[str]) -> Adapter:
        """The same adapter on a base without some of its tensors."""
        return self._changed(names, self.notes)

    def without_heads(self, excluded: Iterable[str] = ()) -> Adapter:
        """The same adapter without its heads that the base lacks, but for those that a merge excludes.

        Args:
            excluded: globs of tensor names; what they match stays, so that they are not idle.
        """
        globs = tuple(excluded)
        left = [name for name in self.heads if not any(fnmatchcase(name, g) for g in globs)]
        if not left:
            return self
        note = f"its own {listing(left)} left out, as the base has no such head"
        return self._changed(left, (*self.notes, f"{note}; --missing present takes it over"))

    def _changed(self, gone: Collection[str], notes: tuple[str, ...]) -> Adapter:
        replaced = {name: place for name, place in self._replaced.items() if name not in gone}
        heads = [name for name in self.heads if name not in gone]
        base = self._base.without(gone)
        return Adapter(base, self._stored, self.path, self._factors, replaced, heads, notes)


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (path / CONFIG).is_file()


def adapter_files(path: Path) -> list[Path]:
    """Configuration, weights, and the files with more tensors of an adapter's folder.

    Raises CheckpointError where the weights lack.
    """
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        what = f"{path} holds {CONFIG} but no {WEIGHTS[0]}"
        if any(file.suffix in (".safetensors", *PICKLES) for file in path.iterdir()):
            what += f": if its weights are a merged model, move {CONFIG} elsewhere, else"
            raise CheckpointError(f"{what} fetch the adapter again")
        raise CheckpointError(f"{what}: fetch it again")
    return [path / CONFIG, found[0], *_beside(path)]


def open_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Open the folder of a PEFT LoRA adapter on its base model.

    Raises:
        CheckpointError: damaged, of an unsupported kind, ambiguous, or made for another base.
    """
    config = read_settings(path / CONFIG)
    _, weights, *beside = adapter_files(path)
    stored = open_checkpoint(weights)
    pairs, whole, called = _in_the_file(*_sorted_tensors(stored, weights), base)
    _refuse_packed(pairs, base, path)
    layers, renames = _layers_of(pairs, stored, base, path)
    replaced: dict[str, Place] = {}
    for name, key in whole.items():
        name = _read_as(name, renames, base)
        if name in replaced:
            raise _twice(name, weights)
        replaced[name] = (stored, key)
    for file in beside:
        replaced |= _more_tensors(file, {*layers.values(), *replaced}, renames, base)
    weights_of = {m: replaced.get(name, (base, name)) for m, name in layers.items()}
    turned = _turned(pairs, weights_of, layers, stored, base, config, path)
    factors = {
        layers[module]: _Factors(
            pair.a,
            pair.b,
            _scale(called.get(module, module), pair, config, stored, path),
            turned[module],
        )
        for module, pair in pairs.items()
    }
    if not factors and not replaced:
        raise CheckpointError(f"{path} holds no tensors: fetch the adapter again")
    _check_trained(config, layers, replaced, base, path)
    heads = _heads(replaced, config, base, path)
    notes = tuple(_note(old, new) for old, new in renames)
    return Adapter(base, stored, path, factors, replaced, heads, notes)


# ---- The tensors of the file ---------------------------------------------------------------------

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
_WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")


@dataclass(frozen=True)
class _Pair:
    """Keys of two factors, and whether they are an embedding's."""

    a: str
    b: str
    embedding: bool


def _sorted_tensors(stored: Checkpoint, weights: Path) -> tuple[dict[str, _Pair], dict[str, str]]:
    """Factors by their layer, and keys of tensors trained as a whole by their name.

    Raises CheckpointError for factors without partner, and for tensors of another kind of adapter.
    """
    pairs: dict[str, _Pair] = {}
    whole: dict[str, str] = {}
    for key in stored:
        name = _without_wrappers(key)
        match = _FACTOR.fullmatch(name)
        if match and ".base_layer." in name:  # PEFT 0.21 adds the update of its out_proj twice
            raise CheckpointError(
                f"{weights}: '{key}' is of an nn.MultiheadAttention, which PEFT merges in a way of its own: "
                f"{MERGE_INSTEAD}"
            )
        if match and match["side"] == "A":
            module = match["module"]
            if module in pairs:
                raise _twice(module, weights)
            pairs[module] = _Pair(key, _partner(key), bool(match["embedding"]))
        elif not match and ("lora_" in name or "trainable_tokens" in name):
            raise CheckpointError(
                f"{weights}: '{key}' belongs to no plain LoRA (to DoRA, for one, or to one adapter of "
                f"several): {MERGE_INSTEAD}"
            )
        elif not match and ".original_module." not in name:  # PEFT's copy of the base's own
            name = _WHOLE.sub(".", name)
            if name in whole and not _is_same(stored, key, whole[name]):
                raise _twice(name, weights)
            whole[name] = key
    _check_partners(pairs, stored, weights)
    return pairs, whole


def _in_the_file(
    pairs: dict[str, _Pair], whole: dict[str, str], base: Checkpoint
) -> tuple[dict[str, _Pair], dict[str, str], dict[str, str]]:
    """Both under the names of the base's file, and what the adapter calls such layers otherwise.

    An installed transformers calls some layers otherwise than a file does, and an adapter made on its module
    has those names.
    """
    if all(f"{module}.weight" in base for module in pairs):
        return pairs, whole, {}
    ours = {other: name for name, other in module_names(base.path, base).called.items()}
    layers = {
        other.removesuffix(".weight"): name.removesuffix(".weight")
        for other, name in ours.items()
        if other.endswith(".weight") and other not in base
    }
    renamed = {layers.get(module, module): pair for module, pair in pairs.items()}
    if len(renamed) < len(pairs):
        return pairs, whole, {}
    whole = {name if name in base else ours.get(name, name): key for name, key in whole.items()}
    return renamed, whole, {layers[module]: module for module in pairs if module in layers}


def _without_wrappers(key: str) -> str:
    return unwrapped(key).removeprefix("base_model.model.")


def _twice(name: str, file: Path) -> CheckpointError:
    return CheckpointError(f"{file} holds two tensors for '{name}': {MERGE_INSTEAD}")


def _is_same(stored: Checkpoint, one: str, other: str) -> bool:
    """Whether two keys hold the same numbers: with bias="all" PEFT writes a saved head's bias twice."""
    x, y = stored.meta(one), stored.meta(other)
    return (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(stored[one], stored[other])


def _partner(key: str) -> str:
    """Key of the factor B of that of A."""
    head, side, tail = key.rpartition("A")
    return f"{head}B{tail}" if side else key


def _check_partners(pairs: Mapping[str, _Pair], stored: Checkpoint, weights: Path) -> None:
    for pair in pairs.values():
        if pair.b not in stored:
            raise CheckpointError(
                f"{weights}: '{pair.a}' has no partner '{pair.b}': fetch it again"
            )
    used = {key for pair in pairs.values() for key in (pair.a, pair.b)}
    for key in sorted(used):
        dtype = stored.meta(key).dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{weights}: '{key}' is of {dtype}, so it is packed or damaged: {MERGE_INSTEAD}"
            )
    factors = [key for key in stored if _FACTOR.fullmatch(_without_wrappers(key))]
    if idle := [key for key in factors if key not in used]:
        raise CheckpointError(f"{weights}: '{idle[0]}' has no partner: fetch the adapter again")


def _scale(module: str, pair: _Pair, config: Settings, stored: Checkpoint, path: Path) -> float:
    """s of a layer's factors; patterns match module names as PEFT matches them."""
    shape = stored.meta(pair.a).shape
    rank = int(shape[0]) if shape else 0
    expected = _by_pattern(config.ranks, module, config.rank)
    if rank == 0 or rank != expected:
        raise CheckpointError(
            f"{path}: '{pair.a}' has rank {rank}, {CONFIG} says {expected:g}: fetch both files again"
        )
    alpha = _by_pattern(config.alphas, module, config.alpha)
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    found = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(found, default)


# ---- Which layers of the base they change --------------------------------------------------------

_NEUTRAL = {"", "model", "base_model", "module", "transformer"}
Fits = Callable[[str, str], bool]


def _layers_of(
    pairs: Mapping[str, _Pair], stored: Checkpoint, base: Checkpoint, path: Path
) -> tuple[dict[str, str], Renames]:
    """Layer of the adapter -> the base's tensor; and the beginnings of names that were read otherwise.

    Raises CheckpointError where the base has no such layer, or several.
    """
    known = {name.removesuffix(".weight"): name for name in base if name.endswith(".weight")}
    strange = [module for module in pairs if module not in known]
    if not strange:
        return {module: known[module] for module in pairs}, ()

    def fits(module: str, other: str) -> bool:
        return bool(_readings(pairs[module], stored, base.meta(known[other])))

    # where other names are the base's own, those that are not mean other layers
    strict = len(strange) < len(pairs)
    beginnings = _beginnings(strange, known, fits, strict)
    if lost := [module for module, found in beginnings.items() if not found]:
        raise _stranger(path, lost, pairs, known, base)
    chosen = {module: _only(module, found, path) for module, found in beginnings.items()}
    other = {m: new + m[len(old) :] for m, (old, new) in chosen.items()}
    taken = [other.get(module, module) for module in pairs]
    name, times = Counter(taken).most_common(1)[0]
    if times > 1:
        both = [module for module, other in zip(pairs, taken, strict=True) if other == name]
        raise CheckpointError(
            f"{path}: {listing(both)} read as one '{name}' of the base: {MERGE_INSTEAD}"
        )
    layers = {module: known[name] for module, name in zip(pairs, taken, strict=True)}
    return layers, tuple(sorted(set(chosen.values()), reverse=True))


def _refuse_packed(modules: Iterable[str], base: Checkpoint, path: Path) -> None:
    """Raise CheckpointError where the base holds a layer of the adapter in packed numbers."""
    packed = {_end(module): packing for module, packing in packings(base).items()}
    for module in modules:
        if packing := packed.get(_end(module)):
            what = f"{path} acts on '{module}', which the base {base.path} holds packed by {packing.tool}"
            raise CheckpointError(
                f"{what}: {packing.way}, or give the model that it was packed from"
            )


def _beginnings(
    strange: list[str], known: Mapping[str, str], fits: Fits, strict: bool
) -> dict[str, set[tuple[str, str]]]:
    """For layers that the base lacks, beginnings (old, new) that lead to layers of the base.

    One counts only where it leads from every such layer that begins so to one that fits, and where its
    words, up to neutral ones, are the same, or but for some more on one side: a decoder is no encoder.
    """
    alike = defaultdict(list)
    for other in known:
        alike[_end(other)].append(other)

    @cache
    def leads(old: str, new: str, step: str) -> bool:
        begun = [(m, new + m[len(old) :]) for m in strange if f"{m}.".startswith(f"{old}{step}.")]
        return all(other in known and fits(m, other) for m, other in begun)

    def is_kin(old: str, new: str) -> bool:
        one, other = _words(old), _words(new)
        return one == other or (not strict and (one < other or other < one))

    found = {}
    for module in strange:
        pairs = {_differing(module, other) for other in alike[_end(module)]}
        kin = [
            (old, new, module[len(old) :].partition(".")[0])
            for old, new in pairs
            if is_kin(old, new)
        ]
        found[module] = {(old, new) for old, new, step in kin if leads(old, new, step)}
    return found


def _end(module: str) -> tuple[str, ...]:
    """A layer's own name and all its numbers: what no other beginning may change."""
    *parents, own = module.split(".")
    return (own, *(part for part in parents if part.isdigit()))


def _differing(module: str, other: str) -> tuple[str, str]:
    """What stands in two names before their longest common ending."""
    old, new = module.split("."), other.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()
    return "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)


def _words(beginning: str) -> set[str]:
    return {*beginning.split(".")} - _NEUTRAL


def _only(module: str, found: Collection[tuple[str, str]], path: Path) -> tuple[str, str]:
    """The one beginning that is meant; of several the one with the same words."""
    same = [(old, new) for old, new in found if _words(old) == _words(new)]
    if len(found) > 1 and len(same) != 1:
        names = sorted(new + module[len(old) :] for old, new in found)
        raise CheckpointError(
            f"{path}: its layer '{module}' may be {listing(names)} of the base: {MERGE_INSTEAD}"
        )
    (chosen,) = same if len(found) > 1 else found
    return chosen


def _stranger(
    path: Path,
    lost: list[str],
    pairs: Mapping[str, _Pair],
    known: Mapping[str, str],
    base: Checkpoint,
) -> CheckpointError:
    """The error for layers that the base lacks."""
    if all(is_vocabulary_table(f"{module}.weight") for module in lost):
        return CheckpointError(
            f"{path} acts on {listing(lost)}, which the base lacks, as it ties it to its token table: save "
            "the base with tie_word_embeddings=False and a copy of the table in its place, and give that"
        )
    named = f"{path} acts on {listing(f'{module}.weight' for module in lost)}, which the base lacks"
    if 2 * len(lost) <= len(pairs):
        return CheckpointError(f"{named}, though it has the others: {MERGE_INSTEAD}")
    similar = [known[other] for other in known if _end(other) == _end(lost[0])]
    has = listing(similar or base)
    return CheckpointError(
        f"{named}: it has {has}; is it the right base? If it is, {MERGE_INSTEAD}"
    )


def _note(old: str, new: str) -> str:
    if not old:
        return f"its layers are those that begin with '{new}' in the base"
    return f"its layers' names begin with '{old}', which is read as '{new}'"


# ---- Which way round B @ A is stored -------------------------------------------------------------

# Layers of transformers' Conv1D, [in, out], in these architectures; all their others are nn.Linear.
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_WITH_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}


def _turned(
    pairs: Mapping[str, _Pair],
    weights: Mapping[str, Place],
    layers: Mapping[str, str],
    stored: Checkpoint,
    base: Checkpoint,
    config: Settings,
    path: Path,
) -> dict[str, bool]:
    """Layer -> whether its weight takes B @ A transposed: by its shape, else by the architecture.

    Raises CheckpointError where neither reading fits, or where both do and none is known to be right.
    """
    readings = {m: _readings(pair, stored, _meta(weights[m])) for m, pair in pairs.items()}
    for module, found in readings.items():
        if not found:
            raise _misfit(path, pairs[module], stored, layers[module], _meta(weights[module]))
    kinds = _architecture(base.path)
    # one layer that takes the transpose alone shows that the setting does not speak for all
    proven = any(found == (True,) and not pairs[m].embedding for m, found in readings.items())
    turned = {}
    for module, found in readings.items():
        own = layers[module].split(".")[-2]
        if len(found) == 1:
            turned[module] = found[0]
        elif kinds & _WITH_CONV1D:
            turned[module] = own in _CONV1D
        elif config.fan_in_fan_out or proven or (not kinds and own in _CONV1D):
            raise _two_readings(path, layers[module], _meta(weights[module]), config, kinds)
        else:
            turned[module] = False
    return turned


def _meta(place: Place) -> Tensor:
    holder, key = place
    return holder.meta(key)


def _readings(pair: _Pair, stored: Checkpoint, weight: Tensor) -> tuple[bool, ...]:
    """Whether B @ A fits a weight as it is (False), transposed (True), or both."""
    possible = (True,) if pair.embedding else (False, True) if weight.ndim == 2 else (False,)
    a, b = stored.meta(pair.a), stored.meta(pair.b)
    return tuple(turned for turned in possible if _fits(a, b, weight, turned))


def _fits(a: Tensor, b: Tensor, weight: Tensor, transposed: bool) -> bool:
    """Whether B @ A, or its transpose, is of the weight's shape; kernels count as columns."""
    sizes = [x.shape[1:].numel() for x in (a, b, weight)]
    if a.ndim < 2 or b.ndim < 2 or weight.ndim < 2 or sizes[1] != a.shape[0]:
        return False
    shape = [b.shape[0], sizes[0]]
    if transposed:
        shape.reverse()
    return shape == [weight.shape[0], sizes[2]]


def _misfit(
    path: Path, pair: _Pair, stored: Checkpoint, name: str, weight: Tensor
) -> CheckpointError:
    a, b = (tuple(stored.meta(key).shape) for key in (pair.a, pair.b))
    return CheckpointError(
        f"{path}: B {b} times A {a} of '{pair.a}' does not fit '{name}' {tuple(weight.shape)} of the "
        f"base: is it the right base? If it is, {MERGE_INSTEAD}"
    )


def _two_readings(
    path: Path, name: str, weight: Tensor, config: Settings, kinds: Collection[str]
) -> CheckpointError:
    told = str(config.fan_in_fan_out).lower()
    file = "" if kinds else "give the base as a folder with its config.json, or "
    return CheckpointError(
        f"{path}: '{name}' {tuple(weight.shape)} is square, so it may take B @ A, as an nn.Linear, or its "
        f"transpose, as a Conv1D; fan_in_fan_out={told} of {CONFIG} is that of the last layer only: "
        f"{file}{MERGE_INSTEAD}"
    )


def is_conv1d(module: str, base: Path) -> bool | None:
    """Whether a layer of a base is transformers' Conv1D, [in, out]; None where no config.json tells."""
    kinds = _architecture(base)
    if not kinds:
        return None
    return bool(kinds & _WITH_CONV1D) and module.rpartition(".")[2] in _CONV1D


def _architecture(base: Path) -> set[str]:
    """The model_types in the base's config.json; none where there is no such file."""
    named = base.name in ("model.safetensors", "pytorch_model.bin")
    folder = base if base.is_dir() else base.parent if named else None
    if folder is None:
        return set()
    return set(_model_types(read_json(folder / "config.json")))


def _model_types(config: Any) -> Iterator[str]:
    if not isinstance(config, dict):
        return
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        yield from _model_types(part)


# ---- Tensors trained as a whole ------------------------------------------------------------------

_STATE = re.compile(
    r"(optimizer|(lr_)?scheduler|(grad_)?scaler|rng_states?|random_states|training_args|sampler|dl_state)"
    r"([._-].*)?"
)
_CLASSIFIERS = {"classifier", "score", "qa_outputs"}
_TOKEN_TABLES = ("lm_head", "embed_out", "embed_tokens", "word_embeddings", "wte", "embeddings")


def _read_as(name: str, renames: Renames, base: Checkpoint) -> str:
    """The base's name for a tensor, where it has one."""
    if name in base:
        return name
    others = (new + name[len(old) :] for old, new in renames if name.startswith(old))
    return next((other for other in others if other in base), name)


def _beside(path: Path) -> list[Path]:
    """Files with tensors in an adapter's folder, but its weights and the state of its training."""
    suffixes = (".safetensors", *PICKLES)
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    return [file for file in files if file.name not in WEIGHTS and not _STATE.fullmatch(file.name)]


def _more_tensors(
    file: Path, changed: Collection[str], renames: Renames, base: Checkpoint
) -> dict[str, Place]:
    """Tensors of a file beside the adapter, such as LLaVA's non_lora_trainables.bin, by the base's names.

    Raises CheckpointError where the base lacks one, or the adapter changes it already.
    """
    way = "move it elsewhere if it is no part of this model, else merge all with its own loader and give that"
    try:
        found = open_checkpoint(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file} lies beside the adapter: {way} ({error})") from error
    names = {key: _WHOLE.sub(".", _without_wrappers(key)) for key in found}
    places = {_read_as(name, renames, base): (found, key) for key, name in names.items()}
    if strange := [name for name in places if name not in base]:
        raise CheckpointError(f"{file} holds {listing(strange)}, which the base lacks: {way}")
    if twice := [name for name in places if name in changed]:
        raise CheckpointError(
            f"{file} holds {listing(twice)}, which the adapter changes too: {way}"
        )
    return places


def _check_trained(
    config: Settings,
    layers: Mapping[str, str],
    replaced: Mapping[str, Place],
    base: Checkpoint,
    path: Path,
) -> None:
    """Biases and modules that were trained as a whole must be there, where the base has such."""
    biases = [f"{name.removesuffix('.weight')}.bias" for name in layers.values()]
    trained = [name for name in biases if name in base] if config.bias != "none" else []
    if trained and not any(name.endswith("bias") for name in replaced):
        raise CheckpointError(
            f"{path}: bias={config.bias} of {CONFIG} says that {listing(trained)} was trained, and the file "
            f"lacks it, as older versions of PEFT lost it: {_SAVE_AGAIN}"
        )
    for module in config.whole:
        lost = [name for name in base if _is_within(name, module)]
        held = any(_is_within(name, module) for name in (*replaced, *layers.values()))
        if lost and not held:
            raise CheckpointError(
                f"{path}: modules_to_save of {CONFIG} says that {listing(lost)} was trained, and the file "
                f"lacks it: {_SAVE_AGAIN}"
            )


def _is_within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _heads(
    replaced: Mapping[str, Place], config: Settings, base: Checkpoint, path: Path
) -> list[str]:
    """Names of classification heads that the base lacks.

    Raises CheckpointError for a tensor that is neither the base's nor of a module trained as a whole.
    """
    declared = {*config.whole, *(_CLASSIFIERS if config.is_classifier else ())}
    heads = []
    for name, (_, key) in replaced.items():
        if name in base:
            continue
        modules = [m for m in declared if _is_within(name, m)]
        if not modules and not name.endswith((".weight", ".bias")):
            raise CheckpointError(
                f"{path}: '{key}' is neither of the base nor of a LoRA: {MERGE_INSTEAD}"
            )
        if any(_is_head(module, config) for module in modules):
            heads.append(name)
    return heads


def _is_head(module: str, config: Settings) -> bool:
    own = module.rpartition(".")[2]
    return own in _CLASSIFIERS or (config.is_classifier and own not in _TOKEN_TABLES)


# ---- LoRA without PEFT's folder ------------------------------------------------------------------

_FUSE = (
    "load it with diffusers, pipe.load_lora_weights(file), then pipe.fuse_lora() and "
    "pipe.save_pretrained(folder), and give the part that it changes, folder/unet for one"
)
# Kinds by their tensors' names, in the order to look for them: (names, what it is, the way on).
_LOOSE = (
    (r".*\.(hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_(blocks|diag)|lokr_t2|hada_t\d|on_input|[wb]_norm)|"
     r"lora_\w+\.(diff(_b)?|[ab][12]\.weight)",
     "a LyCORIS network", "merge it into its base with LyCORIS' tools/merge.py and give the result"),
    (r"lora_(unet|te\d?|transformer|prior|text_encoder)\w*\.(lora_(down|up)(\.weight)?|alpha|dora_scale)",
     "a LoRA in Kohya's format", _FUSE),
    (r"(.+[._])?(lora_(down|up)|lora\d?\.(down|up)|lora_linear_layer\.(down|up))(\.weight)?",
     "a LoRA in diffusers' or Kohya's format", _FUSE),
    (r"(unet|text_encoder(_\d)?|transformer(_\d)?|prior|diffusion_model)\.(?!h\.\d).*\.lora_[AB](\..*)?",
     "a LoRA in diffusers' format", _FUSE),
    (r".*\.lora_(embedding_)?[AB](\..*)?|.*\.lora_magnitude_vector(\..*)?",
     "the tensors of a PEFT adapter", ""),
    (r".*\.lora_[ab]", "an MLX adapter", "fuse it with mlx_lm.fuse and give the result"),
    (r".*\.lora_[ab]\.weight", "an adapter of torchtune", "give the adapter that it saves for PEFT"),
)  # fmt: skip


def refuse_loose_lora(task: Checkpoint, base: Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint is a LoRA without PEFT's folder, naming its kind."""
    names = [name for name in task if name not in base]
    for pattern, what, way in _LOOSE:
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise CheckpointError(
                f"{task.path} holds {what}, as '{found}' shows, and no model: {way or _whole(task)}"
            )


def refuse_adapter_as_base(base: Checkpoint) -> None:
    """Raise CheckpointError where a base is nothing but the adapter of some base."""
    if {file.name for file in base.files} <= {*WEIGHTS}:
        raise CheckpointError(
            f"{base.path} is an adapter, and no base: give the model that it was trained on, and this "
            "as a task"
        )


def _whole(task: Checkpoint) -> str:
    """What to do with PEFT's tensors alone, or within a model."""
    if any(".base_layer." in name for name in task):
        return (
            "it holds the base's weights too; save what merge_and_unload() returns, and give that"
        )
    folder = task.path if task.path.is_dir() else task.path.parent
    if (folder / CONFIG).is_file():
        return f"give the folder {folder}"
    return f"give the adapter's folder, with {CONFIG}, which says how to scale them"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
