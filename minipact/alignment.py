"""Which tensors of several models belong together, decided by names, shapes and types.

What a merge does not touch never stops it. `aligned` finds names that differ by a prefix, looks only at
tensors that are to be merged, and settles what becomes of those that a model lacks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minipact.errors import MergeError, listing
from minipact.low_rank import Product
from minipact.quantized import packed_apart, packing_of
from minipact.tensors import State, States, equal, meta_of

Touches = Callable[[str, Tensor], bool]
Pairs = Iterable[tuple[str, str]]
# Tables and counters that a model can make anew, and which no merge touches.
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|num_batches_tracked|relative_position_index|relative_coords_table"
    r"|(original_)?inv_freq|(cos|sin)_cached|freqs_(cis|cos|sin)|rope\.freqs|embed_positions\.(weights|_float_tensor)"
    r"|masked_bias|(attn|causal)_mask|_extra_state)$"
)
_CAUSAL = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT's masks; in other models a true bias
# What training puts around modules, and so into names.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LINES = 8  # of one kind in a message
# Tensors with a row, or an entry, for every token.
_TABLES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|token_embedding)\.weight$"
)
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|output_projection)\.weight$")
_BIASES = re.compile(r"(^|\.)(lm_head|predictions|predictions\.decoder)\.bias$")
# A fused layer, and one of the layers that it holds side by side.
_FUSED = (
    (
        ("qkv_proj", "Wqkv", "query_key_value", "in_proj", "qkv", "c_attn", "to_qkv"),
        ("q_proj", "query", "to_q", "q"),
    ),
    (("kv_proj", "key_value", "kv", "to_kv"), ("k_proj", "key", "to_k", "k")),
    (("gate_up_proj",), ("gate_proj",)),
)
_STACKED = (re.compile(r"(.*\.)?experts\.(?!\d+\.).+"), re.compile(r"(.*\.)?experts\.\d+\..+"))


def is_buffer(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a known index or position table, a mask, or a counter."""
    counter = tensor.numel() == 1 and not tensor.is_floating_point()
    mask = _CAUSAL.search(name) and (not tensor.is_floating_point() or tensor.ndim == 4)
    return bool(counter or mask or _BUFFERS.search(name))


def is_packed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers that are no known buffer, as quantized weights are."""
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and not is_buffer(name, tensor)


def other_numbers(name: str, label: str, base: State) -> MergeError:
    """The error for whole numbers that differ between base and task."""
    what = (
        f"'{name}' of task '{label}' holds other {meta_of(base, name).dtype} numbers than the base"
    )
    packing = packing_of(base, name)
    if packing is None:
        remedy = "if they are quantized weights, unpack them first with the tool that packed them"
    else:
        remedy = f"it is packed by {packing.tool}: {packing.way}"
    return MergeError(
        f"{what}, and whole numbers cannot be merged: {remedy}; or exclude it to keep the base's"
    )


def refuse_disagreement(name: str, holders: States) -> None:
    """Raise MergeError unless all holders of a tensor that the base lacks agree bit for bit."""
    (first, model), *others = holders.items()
    for label, task in others:
        if not equal(model[name], task[name]):
            both = f"'{name}' of task '{label}' and of task '{first}' differ"
            raise MergeError(f"{both}, and the base lacks it: exclude it, or take missing='base'")


def is_vocabulary_table(name: str) -> bool:
    """Whether a tensor has a row, or an entry, for every token of the vocabulary."""
    return any(known.search(name) for known in (_TABLES, _HEADS, _BIASES))


def is_table(name: str) -> bool:
    """Whether a tensor is a table of tokens at the input, to which a head may be tied."""
    return bool(_TABLES.search(name))


def twins(base: State, tasks: Iterable[State]) -> dict[str, str]:
    """Second copies of a token table, alias -> table: bit-equal in the base, and in tasks that hold both.

    For models whose configuration ties input and output embeddings; the copies are read.
    """
    tables = [name for name in base if _TABLES.search(name)]
    heads = [name for name in base if _HEADS.search(name)]
    models = [base, *tasks]
    return {
        name: tables[0]
        for name in [*tables[1:], *heads]
        if tables and all(_agree(x, name, tables[0]) for x in models)
    }


def loosened(base: State, written: Iterable[str], aliases: Mapping[str, str]) -> list[str]:
    """Heads that a base ties to its token table, and that an output has for themselves.

    Args:
        base: of a model whose configuration ties input and output embeddings.
        written: names in the output. aliases: second copies that are still one with their table.
    """
    copies = [name for name in twins(base, []) if name not in aliases]
    has_table = any(_TABLES.search(name) for name in base)
    new = [name for name in written if name not in base and _HEADS.search(name)]
    return [*copies, *(new if has_table else [])]


def own_twins(task: State, base: State) -> list[str]:
    """Second copies of a token table that a task stores, and the base does not."""
    tables = [name for name in task if name in base and is_table(name)]
    new = [n for n in task if n not in base and (is_table(n) or _HEADS.search(n))]
    return [name for name in new if tables and _agree(task, name, tables[0])]


def _agree(state: State, one: str, other: str) -> bool:
    """Whether two names stand for one tensor, as far as a model holds both."""
    if one not in state or other not in state:
        return one not in state
    same = meta_of(state, one).shape == meta_of(state, other).shape
    return same and equal(state[one], state[other])


class View(Mapping[str, Tensor]):
    """Tensors of other mappings under names of its own.

    Args:
        places: name -> (mapping, name there).
        shapes: those of tensors that are to look otherwise, such as [] for [1].
    """

    def __init__(
        self,
        places: Mapping[str, tuple[State, str]],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._places, self._shapes = places, shapes or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        state, key = self._places[name]
        return self._shaped(name, state[key])

    def meta(self, name: str) -> Tensor:
        """Shape and type of a tensor, unread where its mapping knows them."""
        state, key = self._places[name]
        return self._shaped(name, meta_of(state, key))

    def prefetch(self, name: str) -> None:
        """Have the mapping read ahead, if it can."""
        state, key = self._places[name]
        if hasattr(state, "prefetch"):
            state.prefetch(key)

    def delta(self, name: str) -> Tensor | None:
        """A mapping's own difference from the base, where it has one; None else."""
        state, key = self._places[name]
        known: Any = getattr(state, "delta", None)
        if known is None or hasattr(state, "base"):  # a merge knows it for its own base only
            return None
        found = known(key)
        return None if found is None else self._shaped(name, found)

    def factors(self, name: str) -> Product | None:
        """A mapping's own difference from the base as factors, where it has one; None else."""
        state, key = self._places[name]
        known: Any = getattr(state, "factors", None)
        return None if known is None or name in self._shapes else known(key)

    def _shaped(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(self._shapes[name]) if name in self._shapes else tensor


@dataclass(frozen=True)
class Aligned:
    """Models whose tensors of one name belong together.

    Attributes:
        base, tasks: as given, or as views with the base's names.
        taken: names that the base lacks, taken over from the tasks that hold them.
        copied: those, and names that no task holds.
        holders: for names that some task lacks, the tasks that hold them.
        notes: what the user should know.
    """

    base: State
    tasks: dict[str, State]
    taken: frozenset[str]
    copied: frozenset[str]
    holders: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def aligned(
    base: State, tasks: States, touches: Touches, missing: str = "error", rename: Pairs = ()
) -> Aligned:
    """The models with the base's names, and what becomes of tensors that some of them lack.

    Args:
        base, tasks: models by name.
        touches: (name, shape and type) -> whether the merge changes such a tensor.
        missing: "error"; "base", a task's missing tensor counts as unchanged, and what the base lacks is
            left out; "present", a tensor is merged from the tasks that hold it, and what the base lacks is
            taken over.
        rename: (old, new) beginnings of names in the tasks.

    Raises:
        MergeError: one message with all that keeps the models from being compared.
    """
    if not isinstance(base, Mapping) or not base:
        raise MergeError(
            "the base must be a mapping name -> tensor with entries: pass model.state_dict()"
        )
    notes: list[str] = []
    rename = tuple(rename)
    for old, _ in rename:
        if not any(n.startswith(old) and n not in base for task in tasks.values() for n in task):
            raise MergeError(f"rename: '{old}' begins no name of any task that the base lacks")
    named = {label: _renamed(task, rename, base) for label, task in tasks.items()}
    for label in named:
        for step in (_without_prefix, _without_wrappers, _without_prefix):
            named[label], note = step(label, named[label], base)
            notes += note
    found = _compared(base, named, touches)
    problems = [
        text
        for label, task in named.items()
        for text in _problems(label, task, base, found, missing == "error")
    ]
    if problems:
        raise MergeError("\n".join(problems))
    notes += _beyond(base, named)
    if missing == "present":
        return _by_holders(base, named, found, notes)
    filled = {label: _filled(label, task, base, found, notes) for label, task in named.items()}
    return Aligned(base, filled, frozenset(), frozenset(), {}, tuple(notes))


@dataclass(frozen=True)
class _Compared:
    """Names of tensors to merge: those of the base, and for each task those it lacks and those beyond."""

    wanted: list[str]
    lacking: dict[str, list[str]]
    extra: dict[str, list[str]]


def _compared(base: State, tasks: States, touches: Touches) -> _Compared:
    wanted = [name for name in base if touches(name, meta_of(base, name))]
    lacking = {label: [n for n in wanted if n not in task] for label, task in tasks.items()}
    extra = {
        label: [n for n in task if n not in base and touches(n, meta_of(task, n))]
        for label, task in tasks.items()
    }
    return _Compared(wanted, lacking, extra)


# ---- Names ---------------------------------------------------------------------------------------


def _renamed(task: State, rename: tuple[tuple[str, str], ...], base: State) -> State:
    """A task under other names; the first beginning that fits counts, and names of the base stay."""

    def new(name: str) -> str:
        if name in base:
            return name
        fitting = (f"{to}{name[len(old) :]}" for old, to in rename if name.startswith(old))
        return next(fitting, name)

    if not rename:
        return task
    places = {new(name): (task, name) for name in task}
    if len(places) < len(task):
        counts = Counter(map(new, task))
        raise MergeError(
            f"rename gives two tensors the name {listing(counts.most_common(1)[0][:1])}"
        )
    return View(places)


def unwrapped(name: str) -> str:
    """A name without what FSDP, checkpointing and torch.compile put into it."""
    return _WRAPPERS.sub("", name)


def _without_wrappers(label: str, task: State, base: State) -> tuple[State, list[str]]:
    """A task whose names differ from the base's by wrappers around modules, under the base's names."""
    plain = {unwrapped(name): name for name in base}

    def new(name: str) -> str:
        return name if name in base else plain.get(unwrapped(name), unwrapped(name))

    places = {new(name): (task, name) for name in task}
    if len(places) < len(task) or places.keys() == task.keys():
        return task, []
    how = "wrappers, such as _orig_mod, in its tensors' names are as the base has them"
    return View(places), [f"task '{label}': {how}"]


def _without_prefix(label: str, task: State, base: State) -> tuple[State, list[str]]:
    """A task whose names all differ from the base's by one beginning, under the base's names."""
    if 2 * sum(name in base for name in task) >= min(len(task), len(base)):
        return task, []
    beginnings = Counter(
        beginning
        for long, short in ((task, base), (base, task))
        for beginning in _beginnings(long, short)
    )
    ranked = beginnings.most_common(2)
    enough = ranked and 10 * ranked[0][1] >= 9 * min(len(task), len(base))
    alone = len(ranked) < 2 or 2 * ranked[1][1] < ranked[0][1]
    if not enough or not alone:
        return task, []
    prefix = ranked[0][0]
    longer = sum(name.startswith(prefix) for name in task) > sum(
        name.startswith(prefix) for name in base
    )
    if longer:
        places = {name.removeprefix(prefix): (task, name) for name in task}
        how = f"'{prefix}' is taken off"
    else:
        places = {
            f"{prefix}{name}" if f"{prefix}{name}" in base else name: (task, name) for name in task
        }
        how = f"'{prefix}' is put before"
    return View(places), [f"task '{label}': {how} its tensors' names, as the base has them"]


def _beginnings(long: State, short: State) -> Iterator[str]:
    """What stands before the names of one model in the other, up to a dot."""
    for name in long:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in short:
                yield ".".join(parts[:cut]) + "."
                break


# ---- What does not fit ---------------------------------------------------------------------------


def _problems(label: str, task: State, base: State, found: _Compared, is_whole: bool) -> list[str]:
    """What keeps a task from being compared with the base, and the way on; is_whole: it may lack nothing."""
    lacking, extra = found.lacking[label], found.extra[label]
    module, kinds, way = packed_apart(base, task, [*found.wanted, *extra])
    if module:
        packed = f"task '{label}': the weight of '{module}' is {kinds}"
        return [f"{packed}: {way}, or exclude such weights to keep the base's"]
    if layouts := _fused_and_split(lacking, extra):
        what = f"task '{label}' and the base hold the same layers in different layouts, {layouts}"
        return [f"{what}: save both with the same version of their library, and merge those"]
    return _unlike(label, task, base, found) + (_lacks(label, task, found) if is_whole else [])


def _unlike(label: str, task: State, base: State, found: _Compared) -> list[str]:
    """Tensors to merge of another shape or kind than the base's, one line each; eight of them at most."""
    problems = []
    for name in found.wanted:
        if name not in task:
            continue
        x, y = meta_of(base, name), meta_of(task, name)
        if _alike(x, y):
            continue
        given = f"{y.dtype} {tuple(y.shape)}, in the base {x.dtype} {tuple(x.shape)}"
        remedy = "crop, resize or convert it, or exclude it to keep the base's"
        if is_vocabulary_table(name):
            remedy += "; --vocabulary union where a tokenizer only appends tokens"
        problems.append(f"task '{label}': '{name}' is {given}: {remedy}")
    if len(problems) > _LINES:
        doubt = ": is it tuned from this base?" if 2 * len(problems) > len(found.wanted) else ""
        problems[_LINES:] = [f"task '{label}': {len(problems) - _LINES} more are unlike{doubt}"]
    return problems


def _alike(x: Tensor, y: Tensor) -> bool:
    scalars = x.numel() == y.numel() == 1 and max(x.ndim, y.ndim) <= 1
    return (x.shape == y.shape or scalars) and x.is_floating_point() == y.is_floating_point()


def _lacks(label: str, task: State, found: _Compared) -> list[str]:
    """What a task lacks, or has beyond the base, and the way on."""
    lacking, extra, wanted = found.lacking[label], found.extra[label], found.wanted
    if lacking and len(lacking) == len(wanted):
        has = listing(extra or task) or "no tensor"
        names = f"it has {has}, the base {listing(wanted)}"
        return [
            f"task '{label}' lacks all that is to be merged, {names}: is it tuned from this base?"
        ]
    problems = []
    if lacking:
        doubt = ", if it is tuned from this base" if 2 * len(lacking) > len(wanted) else ""
        remedy = f"--missing base counts them as unchanged{doubt}; or exclude them"
        problems.append(f"task '{label}' lacks {listing(lacking)}: {remedy}")
    if extra:
        remedy = "--missing base leaves it out, --missing present takes it over; or exclude it"
        problems.append(f"task '{label}' has {listing(extra)}, unknown to the base: {remedy}")
    return problems


def _fused_and_split(lacking: list[str], extra: list[str]) -> str:
    """Two names, where one side has a layer in one piece that the other side has in several."""
    for one, other in ((lacking, extra), (extra, lacking)):
        for fused, split in _FUSED:
            whole = [name for name in one if _holds(name, fused)]
            parts = [name for name in other if _holds(name, split)]
            if whole and parts:
                return f"'{whole[0]}' in one piece and '{parts[0]}' apart"
        stacks, experts = (
            [n for n in side if pattern.fullmatch(n)]
            for side, pattern in zip((one, other), _STACKED, strict=True)
        )
        if stacks and experts:
            return f"'{stacks[0]}' in one piece and '{experts[0]}' apart"
    return ""


def _holds(name: str, layers: Iterable[str]) -> bool:
    """Whether a part of a name is one of these layers; weights of fused ones may carry it in theirs."""
    parts = [part.removesuffix("_weight").removesuffix("_bias") for part in name.split(".")]
    return any(layer in parts for layer in layers)


# ---- What becomes of tensors that a model lacks --------------------------------------------------


def _beyond(base: State, tasks: States) -> list[str]:
    """Notes on whole numbers that the base lacks, which no merge touches."""
    notes = []
    for label, task in tasks.items():
        if new := [n for n in task if n not in base and is_packed(n, meta_of(task, n))]:
            why = "as the base lacks it and whole numbers are not merged"
            notes.append(f"task '{label}': {listing(new)} left out, {why}")
    return notes


def _filled(label: str, task: State, base: State, found: _Compared, notes: list[str]) -> State:
    """A task with the base's tensors where it lacks some."""
    lacking, extra = found.lacking[label], found.extra[label]
    if extra:
        notes.append(f"task '{label}': {listing(extra)} left out, as the base lacks it")
    if lacking:
        notes.append(f"task '{label}' lacks {listing(lacking)}: counted as unchanged")
        own: dict[str, tuple[State, str]] = {name: (task, name) for name in task}
        task = View(own | {name: (base, name) for name in lacking})
    return _fitted(task, base, found)


def _fitted(task: State, base: State, found: _Compared) -> State:
    """A task whose scalars are shaped as the base's."""
    shapes = {
        name: tuple(meta_of(base, name).shape)
        for name in found.wanted
        if name in task and meta_of(task, name).shape != meta_of(base, name).shape
    }
    return View({name: (task, name) for name in task}, shapes) if shapes else task


def _by_holders(base: State, tasks: States, found: _Compared, notes: list[str]) -> Aligned:
    new = {n: label for label, names in reversed(found.extra.items()) for n in names}
    partly = [*(name for names in found.lacking.values() for name in names), *new]
    holders = {
        name: tuple(label for label, task in tasks.items() if name in task)
        for name in dict.fromkeys(partly)
    }
    if new:
        notes.append(f"{listing(new)} taken over, as the base lacks it")
    if alone := [name for name, labels in holders.items() if not labels]:
        notes.append(f"{listing(alone)} kept, as no task holds it")
    own: dict[str, tuple[State, str]] = {name: (base, name) for name in base}
    whole = View(own | {name: (tasks[label], name) for name, label in new.items()})
    fitted = {label: _fitted(task, base, found) for label, task in tasks.items()}
    copied = frozenset([*new, *alone])
    return Aligned(whole if new else base, fitted, frozenset(new), copied, holders, tuple(notes))
