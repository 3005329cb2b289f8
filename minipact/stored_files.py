"""What is stored for a model per known task, from files to file, and out of the file again.

compress_files("base.safetensors", {"cars": "cars.safetensors"}, "all.safetensors", rule="emr")
extract_file("all.safetensors", "cars", "cars_again.safetensors")
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minipact import distributed
from minipact.card import CARD, extracted_card
from minipact.checkpoints import open_checkpoint, sha256
from minipact.compression import compressed, touched
from minipact.errors import CheckpointError, MergeError, listing
from minipact.float8 import dequantized, forget_quantization
from minipact.job import BASE, Job, PathLike, Target, Tasks, named_paths, open_job
from minipact.merging import Progress
from minipact.methods import Options
from minipact.output import Shelf, complete_folder, save_checkpoint, untie
from minipact.parallel import cores
from minipact.recipe import Globs, Recipe, Table, as_globs, as_table
from minipact.stored import Record, Served, check_file, open_stored
from minipact.version import __version__


def compress_files(
    base: PathLike,
    tasks: Tasks,
    output: PathLike,
    *,
    rule: str = "emr",
    options: Mapping[str, Options] | None = None,
    with_base: bool = True,
    include: Globs = None,
    exclude: Globs = None,
    missing: str = "error",
    rename: Mapping[str, str] | Table = (),
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    entry: str | None = None,
    progress: Progress = None,
) -> dict[str, Any]:
    """Store checkpoints in one file that holds a model for each task; it appears whole or not at all.

    Tensors come one by one. Beside the output this takes room on the disk for what is kept, until the end.

    Args:
        base, tasks, entry: as in `merge_files`. output: ends in .safetensors.
        rule, options, include, exclude, missing, rename, seed, device: as in `compress`.
        with_base: whether the file holds the base; else `open_stored` and `extract_file` need it again.
        threads: tensors in work at once; None is one per core, as far as a quarter of the memory goes.
        overwrite: replace an existing output.

    Returns:
        A summary that JSON can take, with record (and in it the SHA-256 of inputs), base and tasks (with
        paths), tensors (what was done -> number), notes, files, bytes, bytes_apart (the base and a whole
        model for each task beside it) and seconds.

    Raises:
        CheckpointError, MergeError, OSError: as `merge_files`. In every case there is no output.
    """
    started, path = time.perf_counter(), Path(output)
    if distributed.size() > 1:
        raise MergeError("models are compressed by one process: leave torchrun out")
    check_file(path)
    Target(path, overwrite=overwrite).check(Path(base), named_paths(tasks).values())
    recipe = Recipe(
        scale=1.0, vectors="rule", policy=touched, include=as_globs(include, "include"),
        exclude=as_globs(exclude, "exclude"), missing=missing, rename=as_table(rename, "rename"),
        seed=seed,
    )  # fmt: skip
    job = open_job(base, tasks, recipe, device, entry)
    workers = cores() if threads is None else threads
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".compress-") as scratch:
        try:
            stored = compressed(
                job.merged, rule, options or {}, threads=workers, progress=progress,
                shelf=lambda: Shelf(Path(scratch)),
            )  # fmt: skip
        except MergeError as error:
            raise job.with_paths(error) from error
        stored = replace(stored, record=stored.record | _origin(job))
        files = stored.save(path, with_base=with_base, overwrite=overwrite)
        treatments = Counter(map(stored.treatment, stored.base))
        apart = stored.bytes_apart
    return {
        "record": stored.record,
        "base": f"{job.base.path} ({job.base.layout})",
        "tasks": {name: f"{task.path} ({task.layout})" for name, task in job.tasks.items()},
        "tensors": dict(treatments),
        "notes": _notes(job),
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "bytes_apart": apart,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _notes(job: Job) -> list[str]:
    """What there is to say of the inputs."""
    own = [f"{name}: {note}" for name, x in job.inputs.items() for note in x.notes]
    return [*own, *job.notes, *job.merged.notes]


def _origin(job: Job) -> Record:
    """What the record says of the inputs' files."""
    sums = {name: [sha256(file) for file in x.files] for name, x in job.inputs.items()}
    found: Record = {
        "aliases": dict(job.aliases),
        "inputs": {"base": sums.pop(BASE), "tasks": sums},
        "modules": [prefix for prefix in job.base.source.stems if prefix],
        "untied": list(job.untied),
    }
    return found if job.entry is None else found | {"entry": job.entry}


def extract_file(
    path: PathLike,
    task: str,
    output: PathLike,
    *,
    base: PathLike | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model of one task out of a file of `compress_files`, whole or not at all.

    Args:
        path: the file. task: name of the task.
        output: ends in .safetensors: one file; otherwise a folder.
        base: the model that the file was made from, known by its SHA-256. Needed where the file holds
            no base; where it is a folder, a folder as output has all that it holds but weights and card. A
            folder has a card of its own, with recipe and sources; a file has both in its header.
        max_shard_size, overwrite: as in `merge_files`.

    Returns:
        A summary that JSON can take, with task, notes, files and bytes.

    Raises:
        MergeError: no such task; the message lists them. CheckpointError: an input or the output cannot be.
        OSError: the disk is full or fails. In every case there is no output.
    """
    target = Target(Path(output), max_shard_size, overwrite)
    target.check(Path(path), [] if base is None else [Path(base)])
    stored = open_stored(path, base)
    model = stored.model(task)
    if stored.record.get("modules") and (base is None or target.is_file):
        what = f"{path} holds modules, {listing(stored.record['modules'])}"
        raise CheckpointError(
            f"{what}: give the folder of its base (--base), and a folder as output"
        )
    header = {"task": task, "record": stored.record}
    metadata = {"minipact": __version__, "extract": json.dumps(header, sort_keys=True)}
    untied = bool(stored.record.get("untied"))
    text = partial(extracted_card, stored.record, task)
    files, notes = _write(model, target, metadata, base, untied, text)
    size = sum(file.stat().st_size for file in files)
    return {"task": task, "notes": notes, "files": [str(file) for file in files], "bytes": size}


def _write(
    model: Served,
    target: Target,
    metadata: Mapping[str, str],
    base: PathLike | None,
    untied: bool,
    text: Callable[[Path], str],
) -> tuple[list[Path], list[str]]:
    """The files of a model, a card beside those of a folder; and what the user should know."""
    settings: dict[str, Any] = {"metadata": metadata, "overwrite": target.overwrite}
    if target.is_file:
        return save_checkpoint(target.path, model, max_shard_size=None, **settings), []
    home = None if base is None else dequantized(open_checkpoint(base))
    notes = (
        [] if home else ["the folder holds weights only: give --base for the model's other files"]
    )

    def finish(folder: Path) -> None:
        if home is not None:
            metas = {name: model.meta(name) for name in model}
            notes.extend(complete_folder(folder, home.source, metas))
            if home.widened:
                forget_quantization(folder)
        if untied:
            untie(folder)
        (folder / CARD).write_bytes(text(folder).encode())

    in_one = home is not None and home.source.in_one_file
    settings["max_shard_size"] = None if in_one else target.max_shard_size
    if home is not None:
        settings["stems"] = home.source.stems
    return save_checkpoint(target.path, model, finish=finish, **settings), notes
