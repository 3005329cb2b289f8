"""A merge, or one fine-tuned model, from files to the folder of a PEFT adapter.

merge_to_lora("base", {"cars": "cars", "dtd": "dtd"}, "adapter", 16, Recipe(rule="tsv_m"))
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from minipact import distributed
from minipact.adapters import is_conv1d
from minipact.alignment import is_table
from minipact.card import CARD, Record, agreed
from minipact.checkpoints import sha256
from minipact.errors import CheckpointError, MergeError, listing
from minipact.job import (
    BASE,
    Job,
    PathLike,
    Target,
    Tasks,
    at_once,
    home,
    named_paths,
    open_job,
    ties_embeddings,
)
from minipact.layouts import read_json
from minipact.lora import ALL, Lora, check_folder, to_lora
from minipact.lora import is_conv1d as named_conv1d
from minipact.merging import Progress
from minipact.module_names import ModuleNames, module_names
from minipact.output import Shelf
from minipact.recipe import Recipe
from minipact.steps import Step
from minipact.version import __version__

_SHARED = re.compile(r"(^|\.)shared\.weight$")  # of encoder and decoder, in T5 for one
_WITH_HEAD = re.compile("LMHead|CausalLM|MaskedLM|Seq2SeqLM|ConditionalGeneration|PreTraining")


def merge_to_lora(
    base: PathLike,
    tasks: Tasks,
    output: PathLike,
    rank: int,
    recipe: Recipe | None = None,
    *,
    save_modules: bool = False,
    svd: str = "exact",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    entry: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    statistics: Sequence[PathLike] = (),
    progress: Progress = None,
) -> dict[str, Any]:
    """Merge checkpoints, and write what is added to the base as a PEFT adapter, whole or not at all.

    Of one fine-tuned model with `Recipe(scale=1.0, vectors="rule")` it is this model's own adapter, which
    `minipact extract-lora` writes. Beside the output this takes room on the disk for the factors, until the
    end. Where an installed transformers calls a model's layers otherwise than its files do, as version 5 does
    with ViT, the adapter has the module's names, and a note says so: PEFT would pass the others by. The
    card's lines for loading tell.

    Args:
        base, tasks, recipe, device, threads, entry, base_model, license, statistics, progress: as in
            `merge_files`.
        output: names a new folder.
        rank, save_modules, svd: as in `to_lora`.
        overwrite: replace an existing output.

    Returns:
        A summary that JSON can take, with record (and in it the SHA-256 of inputs), base and tasks (with
        paths), tensors (what was done -> number), notes, rank, layers (their number), whole, error and errors
        as in `Lora`, files, bytes and seconds.

    Raises:
        CheckpointError, MergeError, OSError: as `merge_files` and `to_lora`, and where a table of tokens
            changed that the model ties to its head, or tensors that transformers joins or splits. In every
            case there is no output.
    """
    started, path = time.perf_counter(), Path(output)
    if distributed.size() > 1:
        raise MergeError("an adapter is written by one process: leave torchrun out")
    check_folder(path)
    files = [Path(file) for file in statistics]
    Target(path, overwrite=overwrite).check(Path(base), [*named_paths(tasks).values(), *files])
    job = open_job(base, tasks, recipe, device, entry, files)
    _refuse_beyond_base(job)
    names = module_names(home(job.base), job.base)
    workers, room = at_once(job.merged, threads)
    told, notes = _stated(job, {"base_model": base_model, "license": license})
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".lora-") as scratch:
        try:
            lora = to_lora(
                job.merged, rank, save_modules=save_modules, svd=svd, base_model=told["base_model"],
                turned=lambda step: _is_turned(step, job), never=_never(job) | _unlike(names),
                called=names.called, threads=workers, room=room,
                shelf=lambda: Shelf(Path(scratch)), progress=progress,
            )  # fmt: skip
        except MergeError as error:
            raise job.with_paths(error) from error
        _check_stacks(lora, names)
        record = _record(job, lora, names, save_modules, svd)

        def finish(folder: Path) -> None:
            card = _card(lora, record, told["license"], names)
            (folder / CARD).write_bytes(card.encode())

        metadata = {"minipact": __version__, "merge": json.dumps(record, sort_keys=True)}
        written = lora.save(path, overwrite=overwrite, metadata=metadata, finish=finish)
    summary = job.summary()
    return {
        "record": record,
        **{key: summary[key] for key in ("base", "tasks", "tensors")},
        "notes": [*summary["notes"], *notes, *_named(lora, names)],
        "rank": lora.rank,
        "layers": len(lora.layers),
        "whole": list(lora.whole),
        "error": lora.error,
        "errors": lora.errors,
        "files": [str(file) for file in written],
        "bytes": sum(file.stat().st_size for file in written),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _refuse_beyond_base(job: Job) -> None:
    """Raise CheckpointError where the merge has tensors that the base's file lacks."""
    if new := [name for name in job.merged if name not in job.base]:
        what = f"{listing(new)} would be taken over, and the base lacks it"
        raise CheckpointError(f"{what}: take --missing base, or exclude it")
    if job.vocabulary is not None:
        raise CheckpointError(
            "a united vocabulary changes the shapes of the base's tables, which no adapter does: leave "
            "--vocabulary out"
        )


def _is_turned(step: Step, job: Job) -> bool:
    """Whether a weight is stored [inputs, outputs]: by the architecture, else by its name."""
    told = is_conv1d(step.name.removesuffix(".weight"), job.base.path)
    return named_conv1d(step) if told is None else told


def _never(job: Job) -> dict[str, str]:
    """Tensors that stand in several places of the model, of which an adapter would change one."""
    found = {}
    for alias, name in job.aliases.items():
        found[name] = f"is one tensor with '{alias}', and an adapter changes each layer for itself"
    folder = home(job.base)
    if ties_embeddings(folder):
        tied = [x for x in job.merged if is_table(x) and (_has_head(folder) or _SHARED.search(x))]
        found |= dict.fromkeys(tied, "is tied to another layer, which an adapter leaves as it is")
    return found | dict.fromkeys(
        job.untied, "is tied to the token table in the base's configuration"
    )


def _unlike(names: ModuleNames) -> dict[str, str]:
    """Tensors that PEFT would not find in the module that transformers makes of the base."""
    there = f"in the module of {names.by}, where PEFT finds no layer for its factors"
    return {name: f"goes into '{other}' {there}" for name, other in names.unlike.items()}


def _check_stacks(lora: Lora, names: ModuleNames) -> None:
    """Raise MergeError where of experts that a module stacks only some have factors, as PEFT needs all."""
    stacks: dict[str, list[str]] = {}
    for name, other in names.stacked.items():
        stacks.setdefault(other, []).append(name)
    for other, parts in stacks.items():
        lost = [name for name in parts if name not in lora.layers]
        if 0 < len(lost) < len(parts):
            what = f"{listing(lost)} did not change, and other parts of '{other}' did"
            raise MergeError(
                f"{what}, which {names.by} holds as one: exclude all its parts, or none"
            )


def _named(lora: Lora, names: ModuleNames) -> list[str]:
    """What the user should know of the names of layers."""
    held = [*lora.layers, *lora.whole]
    if not (other := [name for name in held if name in names.called]):
        return []
    what = f"{len(other)} tensors have the names of {names.by}'s module, not of the base's file"
    return [f"{what}, such as '{names.called[other[0]]}' for '{other[0]}'"]


def _has_head(folder: Path) -> bool:
    """Whether a configuration is of a model with a head over its tokens."""
    config = read_json(folder / "config.json")
    names = config.get("architectures") if isinstance(config, dict) else None
    return any(_WITH_HEAD.search(str(name)) for name in names or ())


def _stated(job: Job, given: dict[str, str | None]) -> tuple[dict[str, str | None], list[str]]:
    """What the adapter says of its base and its licence, and what the user should know."""
    tasks = {name: task.path for name, task in job.tasks.items()}
    paths = {"base_model": tasks, "license": {BASE: home(job.base), **tasks}}
    found, silent = dict(given), []
    for key, inputs in paths.items():
        if found[key] is None:
            found[key], why = agreed(key, inputs)
            silent += [why] if why else []
    hint = "give --base-model, --license"
    return found, [f"the adapter leaves out {' and '.join(silent)}: {hint}"] if silent else []


def _record(job: Job, lora: Lora, names: ModuleNames, save_modules: bool, svd: str) -> Record:
    """What the result depends on, and how near it comes."""
    sums = {name: [sha256(file) for file in x.files] for name, x in job.inputs.items()}
    own = {"rank": lora.rank, "save_modules": save_modules, "svd": svd, "error": lora.error}
    if _named(lora, names):
        own["names"] = names.by
    return job.record(sums) | {"lora": own}


def _card(lora: Lora, record: Record, license: str | None, names: ModuleNames) -> str:
    """Markdown of the adapter's card; the record is its last block."""
    name = lora.config["base_model_name_or_path"]
    front = {
        "base_model": name,
        "base_model_relation": "adapter" if name else None,
        "library_name": "peft",
        "license": license,
        "tags": ["lora", "model-merging"],
    }
    known = {key: value for key, value in front.items() if value is not None}
    sums = record["inputs"]
    digests = {BASE: sums["base"], **sums["tasks"]}
    rows = [
        f"| {x} | {'<br>'.join(f'`{digest}`' for digest in found)} |".replace("\n", " ")
        for x, found in digests.items()
    ]
    whole = f", and {len(lora.whole)} tensors stored whole" if lora.whole else ""
    sections = [
        f"---\n{yaml.safe_dump(known, sort_keys=False)}---",
        "# LoRA adapter",
        f"Made without training by minipact {__version__}: rank {lora.rank} on {len(lora.layers)} "
        f"layers{whole}.",
        "\n".join(["| input | SHA-256 of its files |", "|---|---|", *rows]),
        "## Error\n\nRelative to the norm of what is added to the layers, by rank:",
        table(lora),
        f"## Loading\n\nOn the base, in this folder:\n\n```python\n{_loading(lora, names)}```",
        f"## Record\n\n```json\n{json.dumps(record, indent=2, sort_keys=True)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _loading(lora: Lora, names: ModuleNames) -> str:
    """Lines that load the adapter, and tell where a library calls its modules otherwise than its files."""
    count = len({names.stacked.get(name, name) for name in lora.layers})
    return (
        'import peft\n\nmodel = peft.PeftModel.from_pretrained(base, ".")\n'
        f'assert sum("lora_A" in x for x, _ in model.named_parameters()) == {count}\n'
    )


def table(lora: Lora) -> str:
    """Relative errors by kind of layer and rank, in Markdown."""
    ranks = list(lora.errors[ALL])
    head = ["| layers |" + "".join(f" {rank} |" for rank in ranks), "|---|" + "---|" * len(ranks)]
    rows = [
        f"| `{kind}` |" + "".join(f" {error:.4f} |" for error in errors.values())
        for kind, errors in lora.errors.items()
    ]
    return "\n".join([*head, *rows])
