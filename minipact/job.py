"""A merge from files to files: what the command line does, Python can do.

from minipact import Recipe, merge_files
merge_files("base.safetensors", {"cars": "cars.safetensors"}, "out.safetensors", Recipe(rule="ties"))
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from minipact import distributed
from minipact.adapters import (
    Adapter,
    adapter_files,
    is_adapter,
    open_adapter,
    refuse_adapter_as_base,
    refuse_loose_lora,
)
from minipact.alignment import is_table, is_vocabulary_table, loosened, own_twins, twins
from minipact.card import CARD, Record, agreed, card_text, read_record
from minipact.checkpoints import Checkpoint, open_checkpoint, sha256
from minipact.errors import CheckpointError, MergeError, listing
from minipact.float8 import dequantized, forget_quantization
from minipact.layouts import read_json
from minipact.mergekit import ENDINGS, read_mergekit
from minipact.merging import Merged, Progress, Sweep, sweep
from minipact.methods import find_method
from minipact.output import (
    Output,
    Shelf,
    check_output,
    complete_folder,
    parse_size,
    save_checkpoint,
    untie,
)
from minipact.parallel import cores, memory
from minipact.recipe import Recipe, as_globs
from minipact.statistics_files import ByTask, check_recorded, matched, naming_files, open_statistics
from minipact.steps import Step
from minipact.tensors import State
from minipact.version import __version__
from minipact.vocabulary import Union, lost_tokens, union_of, united, write_union

PathLike = str | Path
Tasks = Sequence[PathLike] | Mapping[str, PathLike]
Digests = dict[str, list[str]]
BASE = "the base"  # its name among the inputs


def merge_files(
    base: PathLike,
    tasks: Tasks,
    output: PathLike,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    scales: Sequence[float] = (),
    score: Callable[[Path], float] | None = None,
    entry: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    statistics: Sequence[PathLike] = (),
    progress: Progress = None,
) -> dict[str, Any]:
    """Merge checkpoints into a checkpoint, which appears whole or not at all.

    Args:
        base: `.safetensors` file, folder of transformers, diffusers, sentence-transformers or open_clip, or
            `.pt`/`.bin` state dict.
        tasks: fine-tuned ones by name, or as a list, then named after their files or folders; a task may
            be the folder of a PEFT LoRA adapter.
        output: ends in .safetensors: one file; otherwise a folder with all that the base's holds but its
            weights, which keep their names, and a model card.
        recipe: what to do; None is the default recipe, task arithmetic.
        device: where to compute. Under torchrun the processes share the work; bytes are the same.
        threads: tensors in work at once on CPUs, one core each; None is one per core, as far as a quarter
            of the memory goes.
        max_shard_size: of a folder's files; open_clip folders hold one file.
        overwrite: replace an existing output. resume: go on with an interrupted run of the same recipe.
        scales, score: merge once, write a candidate for each scale, and keep that of the highest
            score(path of the candidate). Beside the output this takes room on the disk for the merged
            task vectors in float32 and for one candidate, until the end; one process, no resume.
        entry: key of the state dict in training checkpoints that hold several, such as "ema".
        statistics: files of `save_statistics` or minipact statistics, for methods that need data; they are
            matched to the tasks by the SHA-256 of the models, and the recipe records their own.
        base_model, license: of the card; None takes what the inputs' own cards agree on.
        progress: called with (done, in all, name) after each tensor, and after each scale.

    Returns:
        A summary that JSON can take, with the keys record (recipe, versions, kind of device, SHA-256 of
        inputs), base and tasks (with paths), tensors (what was done -> number), notes, scores, files, bytes,
        rounding (of the result over the norm of scale * task vector, for half types), processes,
        resumed_tensors and seconds.

    Raises:
        CheckpointError: an input or the output cannot be; the message says which and how to go on.
        MergeError: the models or the recipe do not fit, likewise; scales without a score, with resume or
            under torchrun.
        OSError: the disk is full or fails. In every case there is no output.
    """
    started = time.perf_counter()
    target = Target(Path(output), max_shard_size, overwrite, resume, base_model, license)
    files = [Path(file) for file in statistics]
    target.check(Path(base), [*named_paths(tasks).values(), *files])
    job = open_job(base, tasks, recipe, device, entry, files)
    target.check_parts(job)
    if resume:
        job.merged.recipe.to_json()  # only what can be compared can go on
    with distributed.processes(device):
        try:
            summary = _run(job, target, threads, scales, score, progress)
        except MergeError as error:
            raise job.with_paths(error) from error
    return summary | {"seconds": round(time.perf_counter() - started, 2)}


@dataclass(frozen=True)
class Target:
    """Where an output goes and how; fields as in `merge_files`."""

    path: Path
    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    resume: bool = False
    base_model: str | None = None
    license: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the output is one file."""
        return self.path.suffix == ".safetensors"

    def check(self, base: Path, tasks: Iterable[Path]) -> None:
        """Refuse what cannot be, before any input is read."""
        parse_size(self.max_shard_size)
        check_output(self.path, self.overwrite)
        inputs = [base, *tasks]
        _refuse_inputs_within(self.path, inputs)
        if self.is_file:
            _refuse_file_within(self.path, inputs)

    def check_parts(self, job: Job) -> None:
        """Refuse one file where the output is more than that."""
        if not self.is_file:
            return
        folders = [prefix.rstrip("/") for prefix in job.base.source.stems if prefix]
        if folders:
            what = f"{job.base.path} has weights in {listing(folders)} too"
            raise CheckpointError(f"{self.path}: {what}: give a folder as the output")
        if job.vocabulary is not None:
            what = "a united vocabulary needs its tokenizer beside the weights"
            raise CheckpointError(f"{self.path}: {what}: give a folder as the output")


def _refuse_inputs_within(output: Path, inputs: Iterable[Path]) -> None:
    """An output that is replaced must neither be an input nor hold one."""
    whole = output.resolve()
    for path in inputs:
        link = path.absolute().parent.resolve() / path.name
        for place in (link, path.resolve()):
            if whole == place or whole in place.parents:
                what = "is" if whole == place else "holds"
                raise CheckpointError(f"{output} {what} the input {path}: choose another output")


def _refuse_file_within(output: Path, inputs: Iterable[Path]) -> None:
    """Weights in the folder of an input would count as its own, or make it a model of two."""
    for path in inputs:
        if path.is_dir() and path.resolve() in output.resolve().parents:
            what = f"{output} lies in the input {path} and would count as its weights"
            raise CheckpointError(f"{what}: choose an output outside of this folder")


# ---- Inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Opened models and what is to become of them; no weight is read yet.

    Attributes:
        base, tasks: the checkpoints. aliases: second names, alias -> name, of tensors that the base and all
            tasks share between layers; they are merged once. merged: the merge, without second names.
        entry: key of the state dict in training checkpoints, if one was named.
        statistics: of data, by kind and task.
        vocabulary: the union of the models' tokenizers, if one was asked for.
        untied: heads that the base ties to its token table and that the output has for themselves.
        notes: what the models together have to say.
    """

    base: Checkpoint
    tasks: Mapping[str, Checkpoint | Adapter]
    aliases: Mapping[str, str]
    merged: Merged
    entry: str | None = None
    statistics: ByTask = field(default_factory=dict)
    vocabulary: Union | None = None
    untied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Checkpoint | Adapter]:
        """All models by name, the base first."""
        return {BASE: self.base, **self.tasks}

    @property
    def places(self) -> dict[str, list[str]]:
        """name -> all names under which the merged tensor is written."""
        places = {name: [name] for name in self.merged}
        for alias, name in self.aliases.items():
            places[name].append(alias)
        return places

    def metas(self) -> dict[str, Tensor]:
        """Name -> shape and type of every tensor of the output, in the base's order."""
        names = dict.fromkeys([*self.base, *self.merged])
        return {name: self.merged.meta(self.aliases.get(name, name)) for name in names}

    def complete(self, folder: Path) -> list[str]:
        """Add what else belongs to the model to an output's folder; returns what the user should know."""
        metas = self.metas()
        notes = complete_folder(folder, self.base.source, metas)
        if self.base.widened:
            forget_quantization(folder)
        if self.untied:
            untie(folder)
        if self.vocabulary is not None:
            tables = [len(x) for name, x in metas.items() if is_vocabulary_table(name)]
            write_union(self.vocabulary, folder, max([self.vocabulary.size, *tables]))
        return notes

    def record(self, sums: Digests | None = None) -> Record:
        """What the result depends on, without paths; SHA-256 of the inputs if known."""
        found: Record = {
            "recipe": _fields(self.merged.recipe),
            "versions": _versions(),
            "device": torch.device(self.merged.device).type,
        }
        if self.entry is not None:
            found["entry"] = self.entry
        if sums is not None:
            tasks = {name: sums[name] for name in self.tasks}
            found["inputs"] = {"base": sums[BASE], "tasks": tasks}
        return found

    def summary(self) -> dict[str, Any]:
        """What can be told before merging; see `merge_files`."""
        steps = self.merged.steps.values()
        return {
            "record": self.record(),
            "base": f"{self.base.path} ({self.base.layout})",
            "tasks": {name: f"{task.path} ({task.layout})" for name, task in self.tasks.items()},
            "tensors": dict(Counter(step.treatment for step in steps)),
            "base_bytes": sum(self.base.meta(name).nbytes for name in self.base),
            "output_bytes": sum(x.nbytes for x in self.metas().values()),
            "notes": [
                *self._own_notes(),
                *self.notes,
                *self.merged.notes,
                *_unrepeatable(self.merged.recipe),
            ],
        }

    def _own_notes(self) -> list[str]:
        """What single models have to say."""
        models = {BASE: self.base} | {f"task '{name}'": task for name, task in self.tasks.items()}
        return [f"{name}: {note}" for name, x in models.items() for note in getattr(x, "notes", ())]

    def with_paths(self, error: MergeError) -> MergeError:
        """The same error, with the paths of the models that it names."""
        error = naming_files(error, self.statistics)
        models = {BASE: self.base} | {f"task '{name}'": x for name, x in self.tasks.items()}
        paths = [f"{name} is {x.path}" for name, x in models.items() if f"{name} " in str(error)]
        return type(error)("\n".join([str(error), *paths]))


def _fields(recipe: Recipe) -> dict[str, Any]:
    """A recipe for the record; where a part has no JSON, all the rest, and why."""
    try:
        return recipe.to_dict()
    except MergeError as error:
        found = {name: _as_json(value) for name, value in recipe.keywords().items()}
        return found | {"not repeatable": str(error)}


def _unrepeatable(recipe: Recipe) -> list[str]:
    """A note where a recipe cannot be repeated from its record."""
    why = _fields(recipe).get("not repeatable")
    return [f"the record cannot be repeated: {why}"] if why else []


def _as_json(value: object) -> Any:
    """What JSON can take; functions by their names."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(x) for x in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return f"own {getattr(value, '__name__', type(value).__name__)}"


def open_job(
    base: PathLike,
    tasks: Tasks,
    recipe: Recipe | None = None,
    device: str = "cpu",
    entry: str | None = None,
    statistics: Sequence[PathLike] = (),
) -> Job:
    """Open the models and check the merge by names, shapes and options. Arguments as in `merge_files`.

    Raises CheckpointError and MergeError, with every problem of names and shapes in one message.
    """
    recipe = recipe or Recipe()
    opened, models = open_models(base, tasks, recipe, entry)
    aliases = {
        alias: name
        for alias, name in opened.aliases.items()
        if all(alias not in t or t.aliases.get(alias) == name for t in models.values())
    }
    is_tied = ties_embeddings(home(opened))
    if is_tied:
        aliases |= twins(opened, models.values())
    recipe = _for_first_names(recipe, opened, aliases)
    once: Mapping[str, State] = {name: x.without(aliases) for name, x in models.items()}
    origin: State = opened.without(aliases)
    vocabulary, notes = None, list[str]()
    folders = {name: home(task) for name, task in models.items()}
    if recipe.vocabulary == "union":
        vocabulary = union_of(home(opened), folders)
        origin, once = united(vocabulary, origin, once)
    else:
        notes += lost_tokens(home(opened), folders)
    found = _matched_statistics(statistics, recipe, opened, models)
    keywords = {**recipe.keywords(), "statistics": found}
    try:
        merged = Merged(origin, once, **keywords, device=device)
    except MergeError as error:
        raise naming_files(error, found) from error
    _refuse_new_modules(merged, opened, models)
    untied = loosened(opened, merged, aliases) if is_tied else []
    notes += _changed_under_a_head(opened, models) if is_tied else []
    if untied:
        told = "a task trained it apart: a configuration must say tie_word_embeddings false"
        notes.append(f"{listing(untied)} is no copy of the token table any more, as {told}")
    return Job(
        opened, models, aliases, merged, entry, found, vocabulary, tuple(untied), tuple(notes)
    )


def _matched_statistics(
    paths: Sequence[PathLike],
    recipe: Recipe,
    base: Checkpoint,
    models: Mapping[str, Checkpoint | Adapter],
) -> ByTask:
    """Statistics in files, for the tasks that they are of, and none but those that the recipe names."""
    found: ByTask = {}
    if paths:
        files = [open_statistics(path) for path in paths]
        sums = {name: [sha256(file) for file in x.files] for name, x in models.items()}
        found = matched(files, [sha256(file) for file in base.files], sums, base)
    check_recorded(recipe.statistics, found)
    return found


def _changed_under_a_head(
    base: Checkpoint, models: Mapping[str, Checkpoint | Adapter]
) -> list[str]:
    """Notes on adapters of a token table that the base has for its head as well."""
    if any(is_vocabulary_table(name) and not is_table(name) for name in base):
        return []
    return [
        f"task '{label}': its change of {listing(found)} reaches the head that is tied to it, as in PEFT"
        for label, task in models.items()
        if isinstance(task, Adapter) and (found := [n for n in task.changed if is_table(n)])
    ]


def _without_twins(
    task: Checkpoint | Adapter, base: Checkpoint, is_tied: bool
) -> Checkpoint | Adapter:
    """A task without second copies of tensors that the base stores once.

    Those are what a file shares, and where a configuration ties them, equal tables of tokens.
    """
    if not isinstance(task, Checkpoint):
        return task
    copies = [x for x, name in task.aliases.items() if x not in base and name in base]
    copies += [x for x in (own_twins(task, base) if is_tied else []) if x not in copies]
    if not copies:
        return task
    return task.without(copies).noted(
        f"{listing(copies)} left out, a copy that the base does not store"
    )


def open_models(
    base: PathLike, tasks: Tasks, recipe: Recipe | None = None, entry: str | None = None
) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter]]:
    """The base and the tasks by name, sorted: adapters on their base, float8 weights with their scales.

    Second copies of tensors that the base stores once are left out.

    Raises CheckpointError where one cannot be read, or is no model.
    """
    opened = dequantized(open_checkpoint(base, entry))
    refuse_adapter_as_base(opened)
    paths = sorted(named_paths(tasks).items())
    found = {name: _open_task(path, opened, recipe or Recipe(), entry) for name, path in paths}
    is_tied = ties_embeddings(home(opened))
    return opened, {name: _without_twins(task, opened, is_tied) for name, task in found.items()}


def home(model: Checkpoint | Adapter) -> Path:
    """The folder whose other files belong to a model, or where it was opened."""
    source = getattr(model, "source", None)
    return model.path if source is None or source.folder is None else source.folder


def _refuse_new_modules(
    merged: Merged, base: Checkpoint, models: Mapping[str, Checkpoint | Adapter]
) -> None:
    """Tensors of a module that the base's folder lacks have no file in the output."""
    sources = [x.source.stems for x in models.values() if isinstance(x, Checkpoint)]
    new = {
        prefix
        for stems in sources
        for prefix in stems
        if prefix and prefix not in base.source.stems
    }
    if strange := [name for name in merged if name.startswith(tuple(new))]:
        hint = "exclude them, or give a base with this module"
        raise CheckpointError(
            f"{listing(strange)} belong to a module that {base.path} lacks: {hint}"
        )


def ties_embeddings(folder: Path) -> bool:
    """Whether a model's configuration says that input and output embeddings are one; by default they are."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return False
    nested = config.get("text_config", {})
    found = [x.get("tie_word_embeddings") for x in (config, nested) if isinstance(x, dict)]
    return False not in found


def _open_task(
    path: Path, base: Checkpoint, recipe: Recipe, entry: str | None
) -> Checkpoint | Adapter:
    if not is_adapter(path):
        found = dequantized(open_checkpoint(path, entry))
        refuse_loose_lora(found, base)
        return found
    adapter = open_adapter(path, base)
    # a head that each adapter brings for itself alone is no reason to stop
    return adapter.without_heads(recipe.exclude) if recipe.missing == "error" else adapter


def named_paths(tasks: Tasks) -> dict[str, Path]:
    """Tasks by name: a folder's own name, or a file's without its ending, where none is given.

    Raises CheckpointError where two have one name, or one has a name that no card can hold.
    """
    if isinstance(tasks, str | Path):
        tasks = [tasks]
    if isinstance(tasks, Mapping):
        named = {str(name): Path(path) for name, path in tasks.items()}
    else:
        paths = [Path(path) for path in tasks]
        named = {name_of(path): path for path in paths}
        if len(named) < len(paths):
            names = [name_of(path) for path in paths]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(
                f"two tasks are called '{twice}': write NAME=PATH to tell them apart"
            )
    for name in named:
        if name == BASE or not name.isprintable():
            raise CheckpointError(
                f"a task cannot be called {name!r}: write NAME=PATH to call it otherwise"
            )
    return named


def name_of(path: Path) -> str:
    """A task's name after its file or folder; a link gives its own name, not its target's."""
    whole = path.absolute()
    is_model_file = whole.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    return whole.stem if is_model_file else whole.name


def _for_first_names(recipe: Recipe, base: Checkpoint, aliases: Mapping[str, str]) -> Recipe:
    """The recipe with all its globs meaning first names, as the merge knows no others."""

    def firsts(globs: Iterable[str]) -> tuple[str, ...]:
        return _of_first_names(globs, base, aliases)

    policy = recipe.policy
    if not callable(policy):
        policy = tuple((first, kind) for glob, kind in policy for first in firsts([glob]))
    options = {name: dict(given) for name, given in recipe.options.items()}
    for name in {find_method(purifier, "purifier").name for purifier in recipe.purify}:
        scope = options.get(name, {}).get("scope")
        if scope is not None:
            options[name]["scope"] = firsts(as_globs(scope, f"{name} scope"))
    return recipe.but(
        include=firsts(recipe.include), exclude=firsts(recipe.exclude), policy=policy, options=options
    )  # fmt: skip


def _of_first_names(
    globs: Iterable[str], base: Checkpoint, aliases: Mapping[str, str]
) -> tuple[str, ...]:
    """Globs for names without aliases: one that matches second names only means their first names."""
    found: list[str] = []
    for glob in globs:
        firsts = [name for alias, name in aliases.items() if fnmatchcase(alias, glob)]
        direct = any(fnmatchcase(name, glob) for name in base if name not in aliases)
        if direct or not firsts:
            found.append(glob)
        found += [re.sub(r"([*?[])", r"[\1]", name) for name in firsts]
    return tuple(found)


@dataclass(frozen=True)
class Recorded:
    """A merge to repeat: tasks by name, the recipe, and what may keep the bytes from being alike.

    entry: key of the state dict in training checkpoints, as `merge_files` takes it.
    """

    tasks: dict[str, Path]
    recipe: Recipe
    notes: list[str]
    entry: str | None = None


def recorded(
    record: PathLike,
    base: PathLike,
    tasks: Tasks,
    *,
    trust: Collection[str] = (),
    device: str = "cpu",
) -> Recorded:
    """What a record says, for `merge_files(base, found.tasks, output, found.recipe, entry=found.entry)`.

    Args:
        record: a model card or its folder, a merged .safetensors file, or JSON; a recipe alone will do.
            Or mergekit's YAML, for the methods that both have; its models are the tasks by name, or in order.
        base, tasks: the files, under any name and in any order; they are matched by their SHA-256. With a
            recipe alone the tasks keep their names.
        trust: "package.module:function" of those methods that may be imported. A record, which may come
            with a model from anywhere, has no other code run.
        device: where the merge is to be.

    Raises:
        CheckpointError: there is no record, or an input is not the one recorded, or is missing.
        MergeError: the recipe cannot be read or repeated, or names a method that is not trusted.
    """
    if Path(record).suffix in ENDINGS:
        foreign = read_mergekit(Path(record))
        return Recorded(foreign.matched(named_paths(tasks)), foreign.recipe, list(foreign.notes))
    found = read_record(Path(record))
    if "not repeatable" in found["recipe"]:
        raise MergeError(f"{record}: {found['recipe']['not repeatable']}")
    recipe = Recipe.from_dict(found["recipe"])
    for method, option in [*((p, "--purify") for p in recipe.purify), (recipe.rule, "--rule")]:
        if ":" in str(method) and method not in trust:
            raise MergeError(f"{record} runs {method}: if you trust it, add {option} {method}")
    entry = found.get("entry")
    if "inputs" not in found:
        return Recorded(named_paths(tasks), recipe, [], entry)
    paths = tasks.values() if isinstance(tasks, Mapping) else tasks
    matched = _matched(found["inputs"], Path(base), map(Path, paths), entry)
    return Recorded(matched, recipe, _differences(found, device), entry)


def _matched(
    inputs: Record, base: Path, tasks: Iterable[Path], entry: str | None
) -> dict[str, Path]:
    """The tasks of a record among these files and folders, by SHA-256: name -> path."""
    if _digests(base, entry) != inputs["base"]:
        raise CheckpointError(f"{base} is not the recorded base: its SHA-256 differs")
    missing = {name: list(sums) for name, sums in inputs["tasks"].items()}
    found: dict[str, Path] = {}
    for path in tasks:
        sums = _digests(path, entry)
        names = [name for name, theirs in missing.items() if theirs == sums]
        if not names and sums in inputs["tasks"].values():
            raise CheckpointError(f"{path} is given twice")
        if not names:
            raise CheckpointError(
                f"{path} is none of the recorded tasks: its SHA-256 differs from all"
            )
        found[names[0]] = path
        del missing[names[0]]
    if missing:
        raise CheckpointError(f"the record has tasks {listing(missing)} too: give their files")
    return found


def _differences(record: Record, device: str) -> list[str]:
    """What may keep the bytes from being the same again."""
    now = _versions() | {"device": torch.device(device).type}
    then = {**record.get("versions", {}), "device": record.get("device", now["device"])}
    return [
        f"recorded with {what} {then[what]}, this is {now[what]}: last bits may differ"
        for what in now
        if then.get(what, now[what]) != now[what]
    ]


def _versions() -> dict[str, str]:
    return {"minipact": __version__, "torch": str(torch.__version__)}


def _digests(path: Path, entry: str | None) -> list[str]:
    files = adapter_files(path) if is_adapter(path) else open_checkpoint(path, entry).files
    return [sha256(file) for file in files]


# ---- The work ------------------------------------------------------------------------------------


def _run(
    job: Job,
    target: Target,
    threads: int | None,
    scales: Sequence[float],
    score: Callable[[Path], float] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Choose the scale, if several are given, and write the merge."""
    stamps, scales = _stamps(job), list(scales)
    if (score is None) != (not scales):
        raise MergeError("scales need a score to choose by, and a score needs scales")
    if score is None:
        return _write(job, target, stamps, threads, progress, {})
    if target.resume or distributed.size() > 1:
        raise MergeError(
            "scales are tried by one process and in one run: leave resume and torchrun out"
        )
    with tempfile.TemporaryDirectory(
        dir=target.path.absolute().parent, prefix=".scales-"
    ) as scratch:
        found = _sweep(job, target, threads, Path(scratch), scales, score, progress)
        return _write(
            replace(job, merged=found.merged), target, stamps, threads, progress, found.scores
        )


def _sweep(
    job: Job,
    target: Target,
    threads: int | None,
    scratch: Path,
    scales: Sequence[float],
    score: Callable[[Path], float],
    progress: Progress,
) -> Sweep:
    """Score a candidate in the output's layout for each scale; merged task vectors wait on the disk."""
    candidate = scratch / target.path.name
    workers, room = at_once(job.merged, threads)

    def scored(merged: Merged) -> float:
        # All are computed at once, so that saving finds them on the shelf.
        for _ in merged.each(lambda name: merged.parts(name) and None, threads=workers, room=room):
            pass
        save_checkpoint(
            candidate,
            _Written(replace(job, merged=merged)),
            finish=job.complete,
            overwrite=True,
            **_layout(job, target),
        )
        return score(candidate)

    return sweep(job.merged, scored, scales, progress=progress, shelf=lambda: Shelf(scratch))


class _Written(Mapping[str, Tensor]):
    """The merged model under all names of the base."""

    def __init__(self, job: Job) -> None:
        self._job, self._metas = job, job.metas()

    def __iter__(self) -> Iterator[str]:
        return iter(self._metas)

    def __len__(self) -> int:
        return len(self._metas)

    def meta(self, name: str) -> Tensor:
        return self._metas[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._job.merged[self._job.aliases.get(name, name)]


def command_score(command: str) -> Callable[[Path], float]:
    """A score from a command, "python eval.py {}": {} is the candidate, its last line the number.

    Raises MergeError where the command lacks {}, fails, or ends in no number.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MergeError(f"--score {command!r} cannot be read: {error}") from error
    if not any("{}" in word for word in words):
        hint = "in whose place the candidate's path comes"
        raise MergeError(f"--score {command!r} must hold {{}}, {hint}")

    def score(candidate: Path) -> float:
        filled = [word.replace("{}", str(candidate)) for word in words]
        try:
            done = subprocess.run(filled, stdout=subprocess.PIPE, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MergeError(f"--score {command!r} failed: {error}") from error
        told = done.stdout.decode(errors="replace").strip()
        try:
            return float(told.splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise MergeError(
                f"--score {command!r} must print a number last, not {told[-200:]!r}"
            ) from error

    return score


def _layout(job: Job, target: Target) -> dict[str, Any]:
    """Names and sizes of the output's files."""
    source = job.base.source
    size = None if source.in_one_file else target.max_shard_size
    return {"max_shard_size": size, "stems": source.stems}


def _write(
    job: Job,
    target: Target,
    stamps: Mapping[str, list[int]],
    threads: int | None,
    progress: Progress,
    scores: Mapping[float, float],
) -> dict[str, Any]:
    """Merge this process's share into the output; the first process lays it out and completes it."""
    summary = job.summary()
    blank = {name: ["0" * 64] * len(x.files) for name, x in job.inputs.items()}
    metadata = _header(job.record(blank))
    output = Output(
        target.path, job.metas(), metadata=metadata, overwrite=target.overwrite, **_layout(job, target)
    )  # fmt: skip
    keep, stop = False, Event()
    sums, files = blank, list[Path]()
    with ThreadPoolExecutor(max_workers=threads or cores()) as pool:
        try:
            hashing = {}
            if distributed.rank() == 0:
                output.start({**_journal(job), **stamps}, target.resume)
                hashing = _hashing(job, pool, stop)
            output.done = distributed.from_first(output.done)
            resumed = len(output.done)
            share = _merge_share(job, output, threads, progress)
            output.settle()
            shares = distributed.from_all((output.done, *share))
            output.done = {name for done, _, _ in shares for name in done}
            if distributed.rank() == 0:
                sums = {name: [x.result() for x in found] for name, found in hashing.items()}
                _refuse_changed(stamps, _stamps(job))
                files, notes = _commit(job, output, target, job.record(sums), scores)
                summary["notes"] += notes
            sums, files = distributed.from_first((sums, files))
        except (OSError, KeyboardInterrupt, RuntimeError, MemoryError):
            keep = True
            raise
        finally:
            stop.set()
            output.close(keep=keep)
    noise, signal = (sum(result[i] for result in shares) for i in (1, 2))
    return summary | {
        "record": job.record(sums),
        "scores": dict(scores),
        "processes": distributed.size(),
        "resumed_tensors": resumed,
        "rounding": (noise / signal) ** 0.5 if signal else None,
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }


def _hashing(job: Job, pool: Executor, stop: Event) -> dict[str, list[Future[str]]]:
    """SHA-256 of every input's files, under way beside the merge."""
    return {
        name: [pool.submit(sha256, file, stop) for file in x.files]
        for name, x in job.inputs.items()
    }


def _commit(
    job: Job, output: Output, target: Target, record: Record, scores: Mapping[float, float]
) -> tuple[list[Path], list[str]]:
    """Complete the output; its files, and what the user should know."""
    notes: list[str] = []

    def finish(folder: Path) -> None:
        notes.extend(_complete(folder, job, target, record, scores))

    return output.commit(metadata=_header(record), finish=finish), notes


def _complete(
    folder: Path, job: Job, target: Target, record: Record, scores: Mapping[float, float]
) -> list[str]:
    """Add the base's other files and the card to an output folder; returns what the user should know."""
    notes = job.complete(folder)
    paths = {BASE: home(job.base)} | {name: task.path for name, task in job.tasks.items()}
    tasks = {name: task.path for name, task in job.tasks.items()}
    given = {"base_model": target.base_model, "license": target.license}
    silent = []
    for key, inputs in (("base_model", tasks), ("license", paths)):
        if given[key] is None:
            given[key], why = agreed(key, inputs)
            silent += [why] if why else []
    card = card_text(
        record,
        folder,
        inputs={name: x.layout for name, x in job.inputs.items()},
        treatments=Counter(step.treatment for step in job.merged.steps.values()),
        scores=scores,
        **given,
    )
    (folder / CARD).write_bytes(card.encode())
    if silent:
        notes.append(f"the card leaves out {' and '.join(silent)}: give --base-model, --license")
    return notes


def _merge_share(
    job: Job, output: Output, threads: int | None, progress: Progress
) -> tuple[float, float]:
    """Merge and write this process's tensors; squared norms of what rounding adds, and of the update.

    Both are taken where the output is of a half type.
    """
    merged, places = job.merged, job.places
    workers, room = at_once(merged, threads)
    merged.prepare(
        _share_of(merged, merged), gather=distributed.from_all, threads=workers, room=room
    )
    mine = _share_of(merged, {x for x in merged if not output.done.issuperset(places[x])})

    def work(name: str) -> tuple[Tensor, list[float]]:
        tensor, *norms = merged.rounded(name)
        return tensor, norms

    noise = signal = 0.0
    tensors = merged.each(work, mine, threads=workers, room=room)
    done = itertools.count(1)  # enumerate would hold a tensor while the next one is made
    for name, (tensor, norms) in tensors:
        noise, signal = noise + norms[0], signal + norms[1]
        for place in places[name]:
            output.write(place, tensor)
        if progress is not None:
            progress(next(done), len(mine), name)
        del tensor  # not beside the next one
    return noise, signal


def _share_of(merged: Merged, names: Collection[str]) -> set[str]:
    """Those of some tensors that are this process'; what is computed in one go stays together."""
    parts = [[name for name in group if name in names] for group in merged.groups]
    costs = {part[0]: sum(_cost(merged.steps[name]) for name in part) for part in parts if part}
    mine = distributed.share(costs)
    return {name for part in parts if part and part[0] in mine for name in part}


def _cost(step: Step) -> float:
    """Work on a tensor, up to a factor: singular vectors of [m, n] take m * n * min(m, n)."""
    return step.entries * (min(step.shape[-2:]) if step.spectral else 1)


def at_once(merged: Merged, threads: int | None) -> tuple[int, float]:
    """Tensors in work at once: as asked for, else one per core, as far as memory goes, and their room."""
    if threads is not None or torch.device(merged.device).type != "cpu":
        return threads or 1, float("inf")
    share = distributed.size()
    return max(1, cores() // share), memory() / 4 / _held(merged) / share


def _held(merged: Merged) -> int:
    """Bytes for an entry of a tensor in work."""
    spectral = any(step.spectral for step in merged.steps.values())
    return 4 * (2 * len(merged.tasks) + (16 if spectral else 4))


def memory_needed(job: Job, threads: int | None) -> int:
    """Bytes that the tensors in work will take together at most, about, beside what torch itself takes."""
    workers, room = at_once(job.merged, threads)
    steps, groups = job.merged.steps, job.merged.groups
    sizes = sorted((sum(steps[name].entries for name in group) for group in groups), reverse=True)
    largest = sizes[0] if sizes else 0
    return round(_held(job.merged) * max(largest, min(room, sum(sizes[: 4 * workers]))))


def _header(record: Record) -> dict[str, str]:
    """Strings for the header of the output; no times or paths, so that bytes repeat."""
    return {"minipact": __version__, "merge": json.dumps(record, sort_keys=True)}


def _journal(job: Job) -> dict[str, Any]:
    """What the output's bytes depend on besides the inputs: kept for resuming."""
    record = job.record()
    return {**record.pop("recipe"), **record}


def _stamps(job: Job) -> dict[str, list[int]]:
    """Size in bytes and time of change of each input file."""
    inputs = [file for x in job.inputs.values() for file in x.files]
    inputs += [x.path for states in job.statistics.values() for x in states.values()]
    files = {file.resolve(): file.stat() for file in inputs}
    return {f"size and time of {f}": [s.st_size, s.st_mtime_ns] for f, s in files.items()}


def _refuse_changed(before: Mapping[str, list[int]], after: Mapping[str, list[int]]) -> None:
    for what, stamp in before.items():
        if after[what] != stamp:
            raise CheckpointError(f"{what} changed while it was read: merge again when it is whole")
