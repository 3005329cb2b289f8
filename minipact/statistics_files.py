"""Statistics of data as files: one task's each, written whole or not at all, read lazily, known by hashes.

save_statistics("cars_cov.safetensors", "covariance", state, model="cars.safetensors", samples=1024)
merge_files("base.safetensors", tasks, "out.safetensors", recipe, statistics=["cars_cov.safetensors", ...])

A file is safetensors in float32. Its header holds, as JSON under "statistics", the kind, the SHA-256 of the
files of the model it was measured at and of the task's model it is for, and the number of samples.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minipact.adapters import adapter_files, is_adapter
from minipact.checkpoints import Checkpoint, open_checkpoint, sha256
from minipact.errors import CheckpointError, MergeError, check_known, listing
from minipact.layouts import find_layout
from minipact.methods import COMMANDS, STATISTICS, is_finite
from minipact.output import check_output, save_checkpoint
from minipact.tensors import State, meta_of
from minipact.version import __version__

PathLike = str | Path
Sums = list[str]  # SHA-256 of a model's files


class StatisticsFile(Mapping[str, Tensor]):
    """A statistic of one task by names of tensors, each read from its file when asked for.

    Attributes:
        path: the file. kind: "covariance", "fisher" or "gradient".
        model: SHA-256 of the files of the model it was measured at.
        task: SHA-256 of the files of the fine-tuned model that it is for.
        samples: images, texts or whatever it was measured on.
        names: name here -> name in the file.
    """

    def __init__(
        self, stored: Checkpoint, kind: str, samples: int, model: Sums, task: Sums
    ) -> None:
        self.path, self.kind, self.model, self.task = stored.path, kind, model, task
        self.samples, self._stored = samples, stored
        self.names = {name: name for name in stored}

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def meta(self, name: str) -> Tensor:
        """Tensor of the same shape and dtype on the "meta" device, without reading the file."""
        return self._stored.meta(self.names[name])

    @cached_property
    def sha256(self) -> str:
        """Of the file itself, in hexadecimal; it is read once."""
        return sha256(self.path)

    def under(self, names: Collection[str]) -> StatisticsFile:
        """The same under a model's names, where these differ by one beginning only."""
        other = copy(self)
        other.names = {new: self.names[old] for old, new in names_under(self, names).items()}
        return other


def names_under(own: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Name -> the same among other names, where all of them have one beginning more or less.

    Where some are there as they are, and where no beginning fits most of them, they stay as they are.
    """
    own = list(own)
    more_less: Counter[tuple[str, str]] = Counter()
    if not any(name in names for name in own):
        for name, other in itertools.product(own, names):
            if other.endswith(f".{name}"):
                more_less[other.removesuffix(name), ""] += 1
            if name.endswith(f".{other}"):
                more_less["", name.removesuffix(other)] += 1
    ranked = more_less.most_common(2)
    if not ranked or len({count for _, count in ranked}) < len(ranked):
        return {name: name for name in own}
    (more, less), _ = ranked[0]
    return {name: f"{more}{name.removeprefix(less)}" for name in own}


# ---- Writing -------------------------------------------------------------------------------------


def save_statistics(
    path: PathLike,
    kind: str,
    state: State,
    *,
    model: PathLike,
    samples: int,
    task: PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a statistic of one task's data to a file, for `merge_files`; it appears whole or not at all.

    Args:
        path: ends in .safetensors.
        kind: "covariance", [n, n] of each matrix's n inputs, [E, n, n] of a stack's, "fisher" or "gradient",
            of the weights' shapes.
        state: name -> tensor, taken one by one; names are those of the model's file.
        model: checkpoint at which it was measured, known again by the SHA-256 of its files.
        samples: how many it was measured on.
        task: checkpoint of the task, where it was measured at another model: gradients are the base's.
        overwrite: replace an existing file.

    Returns the path. Raises MergeError where the kind is unknown, or a tensor has no such shape or is not
    finite in float32; CheckpointError where a model or the output cannot be.
    """
    path = Path(path)
    check_target(path, overwrite)
    check_known("statistics", [kind], STATISTICS)
    if not isinstance(samples, int) or samples < 1:
        raise MergeError(f"samples={samples!r}: a statistic needs at least one sample")
    if not state:
        raise MergeError(f"there is no {kind} of any tensor: nothing to write")
    measured = digests(Path(model))
    found = {"kind": kind, "model": measured, "samples": samples}
    found["task"] = measured if task is None else digests(Path(task))
    metadata = {"minipact": __version__, "statistics": json.dumps(found, sort_keys=True)}
    save_checkpoint(path, _Single(state, kind), metadata=metadata, overwrite=overwrite)
    return path


def check_target(path: Path, overwrite: bool = False) -> None:
    """Raise CheckpointError where statistics cannot be written."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: statistics go into one file: end it in .safetensors")
    check_output(path, overwrite)


def digests(path: Path) -> Sums:
    """SHA-256 of the files of a checkpoint or adapter. Raises CheckpointError where there are none."""
    if is_adapter(path):
        return [sha256(file) for file in adapter_files(path)]
    return [sha256(file) for part in find_layout(path).parts for file in part.files]


class _Single(Mapping[str, Tensor]):
    """A statistic in float32, each tensor checked when it is taken."""

    def __init__(self, state: State, kind: str) -> None:
        self._state, self._kind = state, kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def meta(self, name: str) -> Tensor:
        shape = meta_of(self._state, name).shape
        if self._kind == "covariance" and (len(shape) < 2 or shape[-2] != shape[-1]):
            raise MergeError(f"covariance of '{name}' is {[*shape]}: give [n, n] of its n inputs")
        return torch.empty(shape, dtype=torch.float32, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        x = self._state[name].detach().float()
        if not is_finite(x):
            raise MergeError(f"{self._kind} of '{name}' holds NaN or what float32 cannot hold")
        return x


# ---- Reading -------------------------------------------------------------------------------------


def open_statistics(path: PathLike) -> StatisticsFile:
    """Open a file of `save_statistics` for lazy reading; it may stand in the `statistics` of `merge`.

    Raises CheckpointError where it is damaged, holds no statistics, or those of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: statistics are files, give one")
    stored = open_checkpoint(path)
    try:
        found = json.loads(stored.metadata["statistics"])
        kind, samples = str(found["kind"]), int(found["samples"])
        model, task = ([str(x) for x in found[key]] for key in ("model", "task"))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        hint = "make one by minipact statistics, or minipact.save_statistics"
        raise CheckpointError(f"{path} says of no statistics in its header: {hint}") from error
    if kind not in STATISTICS:
        hint = f"known are {listing(STATISTICS)}; another release of minipact may know it"
        raise CheckpointError(f"{path} holds statistics of the unknown kind '{kind}': {hint}")
    return StatisticsFile(stored, kind, samples, model, task)


ByTask = dict[str, dict[str, StatisticsFile]]  # by kind and task


def matched(
    files: Iterable[StatisticsFile], base: Sums, tasks: Mapping[str, Sums], names: Collection[str]
) -> ByTask:
    """Statistics by kind and task, matched by the SHA-256 of models.

    Args:
        files: in any order.
        base, tasks: SHA-256 of the models' files. names: of the base's tensors.

    Raises CheckpointError where one is of another model, is there twice, or is missing for some task.
    """
    found: ByTask = {}
    for file in files:
        labels = [name for name, sums in tasks.items() if sums == file.task]
        if not labels:
            raise CheckpointError(
                f"{file.path} is the {file.kind} of another model, of SHA-256 {_short(file.task)}, than any "
                f"task here: leave it out, or make it anew by {COMMANDS[file.kind]}"
            )
        _check_place(file, base, labels[0])
        for label in labels:
            first = found.setdefault(file.kind, {}).setdefault(label, file.under(names))
            if first.path != file.path:
                both = f"{first.path} and {file.path} are both the {file.kind} of task '{label}'"
                raise CheckpointError(f"{both}: leave one out")
    for kind, states in found.items():
        if lacking := [name for name in tasks if name not in states]:
            how = f"make it by {COMMANDS[kind]}, and give it too"
            raise CheckpointError(f"there is no {kind} of task {listing(lacking)}: {how}")
    return found


def _check_place(file: StatisticsFile, base: Sums, label: str) -> None:
    """Gradients are the base's on a task's data, all else is of the task's own model."""
    at_base = file.kind == "gradient"
    if file.model != (base if at_base else file.task):
        place = "the base" if at_base else f"task '{label}'"
        what = f"{file.path} was measured at the model of SHA-256 {_short(file.model)}"
        raise CheckpointError(f"{what}, not at {place}: make it anew by {COMMANDS[file.kind]}")


def _short(sums: Sums) -> str:
    return " ".join(x[:12] for x in sums[:3]) or "(none)"


def check_recorded(
    recorded: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, StatisticsFile]]
) -> None:
    """Raise MergeError unless the statistics are those that a recipe names by SHA-256, if it names any."""
    if not recorded:
        return
    for kind, sums in recorded.items():
        states = found.get(kind, {})
        if missing := [name for name in sums if name not in states]:
            hint = "give its file again, --statistics FILE for each"
            raise MergeError(f"the recipe takes the {kind} of task {listing(missing)}: {hint}")
        for name, digest in sums.items():
            if states[name].sha256 != digest:
                what = (
                    f"{states[name].path} is not the {kind} of task '{name}' that the recipe names"
                )
                raise MergeError(f"{what}: its SHA-256 differs, give the file of that time")
    if idle := found.keys() - recorded.keys():
        raise MergeError(f"the recipe takes no {listing(sorted(idle))}: leave those files out")


def naming_files(
    error: MergeError, statistics: Mapping[str, Mapping[str, StatisticsFile]]
) -> MergeError:
    """The same error, with the files of the statistics that it names."""
    text = str(error)
    lines = [
        f"the {kind} of task '{name}' is {file.path}"
        for kind, states in statistics.items()
        for name, file in states.items()
        if f"{kind} of '" in text and f"task '{name}'" in text
    ]
    return type(error)("\n".join([text, *lines])) if lines else error
