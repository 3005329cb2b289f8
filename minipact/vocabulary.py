"""Models whose tokenizers share a base part and appended tokens of their own: one vocabulary for all.

Every token of every model gets a row. Rows of the base's tokens are merged as any tensor; the row of an
appended token is the plain mean of the tasks that have it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipact.alignment import View, is_vocabulary_table
from minipact.errors import CheckpointError, MergeError, listing
from minipact.tensors import State, meta_of

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_REMEDY = "give all models one tokenizer, and train or initialise their new rows, before merging"


@dataclass(frozen=True)
class Union:
    """The vocabulary of all models together.

    Attributes:
        known: number of ids that the base's tokenizer gives out.
        new: appended token -> its id in the union, from `known` on.
        entries: appended token -> its entry in the list added_tokens of tokenizer.json.
        own: task name -> {appended token: id in this task}.
    """

    known: int
    new: Mapping[str, int]
    entries: Mapping[str, Mapping[str, Any]]
    own: Mapping[str, Mapping[str, int]]

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.known + len(self.new)

    def holders(self, token: str) -> list[str]:
        """Tasks that have an appended token."""
        return [label for label, ids in self.own.items() if token in ids]


def union_of(base: Path, tasks: Mapping[str, Path]) -> Union:
    """The union of the tokenizers in model folders.

    Raises:
        CheckpointError: a folder has no tokenizer.json, or one that cannot be read.
        MergeError: a task's tokenizer differs from the base's by more than appended tokens.
    """
    first = _tokenizer(base)
    known = _added(first, base)
    size = 1 + max([*_plain_ids(first), *(entry["id"] for entry in known.values())], default=-1)
    entries: dict[str, Mapping[str, Any]] = {}
    own = {}
    for label, folder in sorted(tasks.items()):
        found = _tokenizer(folder)
        _check_base_part(label, first, found)
        appended = _appended(label, known, _added(found, folder), size)
        for token, entry in appended.items():
            if _flags(entries.setdefault(token, entry)) != _flags(entry):
                raise MergeError(
                    f"task '{label}': token {token!r} has other flags than elsewhere: {_REMEDY}"
                )
        own[label] = {token: int(entry["id"]) for token, entry in appended.items()}
    new = {token: size + number for number, token in enumerate(entries)}
    return Union(size, new, entries, own)


def lost_tokens(base: Path, tasks: Mapping[str, Path]) -> list[str]:
    """Notes on tokens that tasks append to their tokenizers and that an output with the base's will lack."""
    notes = []
    for label, folder in sorted(tasks.items()):
        with contextlib.suppress(CheckpointError, OSError):
            if (base / TOKENIZER).read_bytes() == (folder / TOKENIZER).read_bytes():
                continue
            known = _added(_tokenizer(base), base)
            if new := [x for x in _added(_tokenizer(folder), folder) if x not in known]:
                what = f"task '{label}': its tokenizer has {listing(new)}, which the base's lacks"
                notes.append(f"{what}, and so the output's: --vocabulary union takes it over")
    return notes


def _tokenizer(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
            raise ValueError("no tokenizer")
        added = [entry["id"] for entry in found.get("added_tokens") or []]
        if len(set(added)) < len(added):
            raise ValueError("two added tokens of one id")
        for number in (*_plain_ids(found), *added):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"{number!r} is no id of a token")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        hint = "a vocabulary can be united for model folders with tokenizer.json"
        raise CheckpointError(f"{file} cannot be read ({error}): {hint}") from error
    return found


def _plain_ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """Ids of the tokens that are not added ones: a mapping token -> id, or a list in the order of ids."""
    vocabulary = tokenizer["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    else:
        yield from range(len(vocabulary))


def _added(tokenizer: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return {str(entry["content"]): dict(entry) for entry in tokenizer.get("added_tokens") or []}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder / TOKENIZER}: added_tokens cannot be read ({error!r})"
        ) from error


def _check_base_part(label: str, base: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    if other := [part for part in parts if base.get(part) != task.get(part)]:
        what = f"task '{label}': {listing(other)} of its {TOKENIZER} differs from the base's"
        raise MergeError(f"{what}: {_REMEDY}")


def _appended(
    label: str, known: Mapping[str, Any], added: Mapping[str, Any], size: int
) -> dict[str, dict[str, Any]]:
    """Tokens of a task that the base has not, in the order of their ids."""
    for token, entry in known.items():
        if token not in added or added[token] != entry:
            raise MergeError(f"task '{label}': token {token!r} is not as in the base: {_REMEDY}")
    new = {token: dict(entry) for token, entry in added.items() if token not in known}
    if early := [token for token, entry in new.items() if entry["id"] < size]:
        raise MergeError(f"task '{label}': token {early[0]!r} takes an id of the base: {_REMEDY}")
    return dict(sorted(new.items(), key=lambda item: int(item[1]["id"])))


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "id"}


# ---- Tables with a row for every token -----------------------------------------------------------


class _Tables(Mapping[str, Tensor]):
    """Token tables of one model, with the rows of the union; `label` None is the base."""

    def __init__(self, union: Union, base: State, tasks: Mapping[str, State], label: str | None):
        self._union, self._base, self._tasks, self._label = union, base, tasks, label

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._base if is_vocabulary_table(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def meta(self, name: str) -> Tensor:
        """Shape and type of a table."""
        x = meta_of(self._base, name)
        rows = max(len(x), self._union.size)
        return torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        union, origin = self._union, self._base[name]
        table = origin.new_empty(self.meta(name).shape)
        table[: len(origin)] = origin
        if self._label is not None:
            table[: union.known] = self._tasks[self._label][name][: union.known]
        tables = {
            label: task[name]
            for label, task in self._tasks.items()
            if union.own[label] and name in task
        }
        for token, row in union.new.items():
            own = [label for label in union.holders(token) if label in tables]
            if not own:
                raise MergeError(
                    f"'{name}': no task that has the token {token!r} holds it: {_REMEDY}"
                )
            held = [tables[label][union.own[label][token]] for label in own]
            table[row] = torch.stack(held).double().mean(0).to(table)
        return table


class United(View):
    """A base with a row for every token of a union, its `vocabulary`."""

    def __init__(self, places: Mapping[str, tuple[State, str]], vocabulary: Union) -> None:
        super().__init__(places)
        self.vocabulary = vocabulary


def united(union: Union, base: State, tasks: Mapping[str, State]) -> tuple[United, dict[str, View]]:
    """The models with token tables of the union's rows.

    Raises MergeError where a model's table lacks rows for its own tokens.
    """
    _check_rows("the base", base, union.known)
    for label, task in tasks.items():
        _check_rows(f"task '{label}'", task, 1 + max([union.known - 1, *union.own[label].values()]))

    def places(state: State, label: str | None) -> dict[str, tuple[State, str]]:
        tables = _Tables(union, base, tasks, label)
        return {n: (tables if is_vocabulary_table(n) and n in base else state, n) for n in state}

    seen = {label: View(places(task, label)) for label, task in tasks.items()}
    return United(places(base, None), union), seen


def _check_rows(label: str, state: State, size: int) -> None:
    for name in filter(is_vocabulary_table, state):
        if len(meta_of(state, name)) < size:
            raise MergeError(
                f"{label}: '{name}' has no row for some of its {size} tokens: {_REMEDY}"
            )


# ---- Files ---------------------------------------------------------------------------------------


def write_union(union: Union, folder: Path, rows: int) -> None:
    """Make the tokenizer and configuration files of a folder, copied from the base, those of the union.

    Args:
        rows: of the token tables.
    """
    added = [{**union.entries[token], "id": number} for token, number in union.new.items()]
    _change(folder / TOKENIZER, lambda found: found.setdefault("added_tokens", []).extend(added))
    _change(folder / ADDED, lambda found: found.update(union.new))

    def decode(found: dict[str, Any]) -> None:
        if "added_tokens_decoder" in found:
            found["added_tokens_decoder"] |= {str(e["id"]): _flags(e) for e in added}

    def resize(found: dict[str, Any]) -> None:
        for part in (found, found.get("text_config")):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = rows

    _change(folder / SETTINGS, decode)
    _change(folder / "config.json", resize)


def _change(file: Path, change: Any) -> None:
    """Change a JSON file, if it is there."""
    if not file.is_file():
        return
    found = json.loads(file.read_text("utf-8"))
    change(found)
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
