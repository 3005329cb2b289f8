"""Command line of minipact: `minipact merge BASE TASK... -o OUT`, `minipact xray`, `minipact methods`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from minipact.version import __version__
from minipact.xray import add_parser as add_xray
from minipact.xray import run as run_xray

if TYPE_CHECKING:
    from torch import Tensor

    from minipact.adapters import Adapter
    from minipact.checkpoints import Checkpoint, Output
    from minipact.merging import MergeError, Plan, Step

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
NO_MEMORY = "out of memory|can't allocate memory|Cannot allocate memory|unable to mmap"
DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")


class UsageError(ValueError):
    """Wrong use of the command line; the message says what to write instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 2 user error, 1 failure, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    arguments.command = list(sys.argv[1:] if argv is None else argv)
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = int(arguments.run(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has gone, or a full disk, shows here and not at exit
        return code
    except ValueError as error:
        from minipact.checkpoints import CheckpointError
        from minipact.merging import MergeError

        if not isinstance(error, UsageError | CheckpointError | MergeError):
            raise
        return _fail(str(error), USER_ERROR)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        return _fail(f"{error}; {_left(arguments)}", FAILURE)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        reason = str(error).split("\n")[0]
        remedy = "use --threads 1, or --device cpu where a GPU's is too small"
        return _fail(f"out of memory ({reason}): {remedy}; {_left(arguments)}", FAILURE)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_left(arguments)}", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    """One message; of several processes, the others speak up only once they work on their own."""
    from minipact.distributed import rank

    number = rank()
    if number == 0 or _joined():
        print(
            f"minipact: error: {f'process {number}: ' if number else ''}{message}", file=sys.stderr
        )
    return code


def _joined() -> bool:
    from torch import distributed

    return distributed.is_initialized()


def _left(arguments: argparse.Namespace) -> str:
    """What a run that ended early leaves behind."""
    output = getattr(arguments, "output", None)
    if getattr(arguments, "written", False):
        return f"{output} is written and whole"
    if output is not None and output.with_name(f"{output.name}.partial").exists():
        kept = f"{output}.partial keeps what is done, --resume goes on from there"
        return f"no output was written; {kept}"
    return "no output was written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minipact",
        description="Merge fine-tuned models: task arithmetic, TIES, TSV, Iso, PACT.",
    )
    parser.add_argument("--version", action="version", version=f"minipact {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    merge = commands.add_parser(
        "merge",
        help="merge checkpoints",
        description="Merge fine-tuned checkpoints into their common base. A checkpoint is a "
        ".safetensors file, a Hugging Face or open_clip folder, or a .pt/.bin state dict; a TASK "
        "may also be the folder of a PEFT LoRA adapter. Under torchrun --nproc-per-node N -m minipact, "
        "N processes share the work.",
        epilog="example: minipact merge base.safetensors cars.safetensors dtd.safetensors "
        "-o merged.safetensors --rule tsv_m --purify pact",
    )
    merge.set_defaults(run=_merge)
    merge.add_argument("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    merge.add_argument(
        "tasks", metavar="TASK", nargs="+", help="fine-tuned checkpoint, or NAME=PATH"
    )
    merge.add_argument("-o", "--output", metavar="OUT", type=Path, required=True,
                       help="OUT.safetensors for one file, else a folder in Hugging Face layout")  # fmt: skip
    merge.add_argument("--rule", default="task_arithmetic", help="merging rule (%(default)s)")
    merge.add_argument("--purify", action="append", default=[], metavar="NAME[,NAME]",
                       help="purifiers to run first, in order")  # fmt: skip
    merge.add_argument("--set", action="append", default=[], metavar="METHOD.OPTION=VALUE",
                       help="option of a method, such as pact.core=38")  # fmt: skip
    merge.add_argument(
        "--scale", type=float, help="factor of the merged task vector (the rule's own)"
    )
    merge.add_argument("--weights", metavar="W,W,...", help="factor of each task vector (1 each)")
    merge.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    merge.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="of the output (%(default)s)"
    )
    merge.add_argument(
        "--include", action="append", metavar="GLOB", help="merge only these tensors"
    )
    merge.add_argument(
        "--exclude", action="append", metavar="GLOB", help="copy these from the base"
    )
    merge.add_argument("--max-shard-size", default="5GB",
                       help="of a folder's files (%(default)s); open_clip folders hold one file")  # fmt: skip
    merge.add_argument(
        "--seed", type=int, default=0, help="of random masks and sketches (%(default)s)"
    )
    merge.add_argument("--threads", type=int, metavar="N",
                       help="tensors in work at once on CPUs, one thread each; results do not depend on "
                       "it (all cores, as far as a quarter of the memory goes)")  # fmt: skip
    merge.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing output")
    merge.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    merge.add_argument("--json", action="store_true", help="summary as JSON on standard output")
    merge.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    add_xray(commands).set_defaults(run=_xray)
    methods = commands.add_parser("methods", help="list rules and purifiers with their options")
    methods.set_defaults(run=_methods)
    methods.add_argument("--json", action="store_true", help="as JSON")
    return parser


# ---- minipact merge ------------------------------------------------------------------------------


def _merge(arguments: argparse.Namespace) -> int:
    import torch

    from minipact import distributed
    from minipact.checkpoints import check_output, open_checkpoint, parse_size
    from minipact.merging import MergeError, plan

    started = time.perf_counter()
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads}: must be 1 or more")
    # Several threads on one small matrix mostly wait for each other; each tensor gets one instead.
    torch.set_num_threads(1)
    _reuse_memory()
    parse_size(arguments.max_shard_size)
    if not arguments.dry_run:
        check_output(arguments.output, arguments.overwrite)
    _refuse_output_among_inputs(arguments)
    base = open_checkpoint(arguments.base)
    tasks = {name: _open_task(path, base) for name, path in _named(arguments.tasks).items()}
    aliases = _common_aliases(base, tasks)
    for globs in (arguments.include or [], arguments.exclude or []):
        globs[:] = _of_aliases(globs, base, aliases)
    recipe = _recipe(arguments, list(tasks))
    checked = plan(
        base.without(aliases), {n: task.without(aliases) for n, task in tasks.items()}, **recipe
    )
    summary = _summary(arguments, base, tasks, checked)
    if arguments.dry_run:
        if distributed.rank() == 0:
            _show(arguments, summary | {"dry_run": True}, checked)
        return 0
    with distributed.processes(recipe["device"]):
        try:
            summary |= _write(arguments, base, tasks, checked, summary, aliases)
        except MergeError as error:
            raise _with_files(error, base, tasks) from error
    arguments.written = True
    summary |= {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_mb": _peak_memory_mb(),
    }
    if distributed.rank() == 0:
        _show(arguments, summary, checked)
    return 0


def _reuse_memory() -> None:
    """Have glibc keep freed memory for the next tensor, as clearing fresh pages costs more than adding.

    Blocks of 256 MB and more go back at once, so that what lies idle stays small beside a big model.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of its malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**28), (arena_max, 1)):
            mallopt(option, value)


def _open_task(path: Path, base: Checkpoint) -> Checkpoint | Adapter:
    from minipact.adapters import is_adapter, open_adapter
    from minipact.checkpoints import open_checkpoint

    return open_adapter(path, base) if is_adapter(path) else open_checkpoint(path)


def _common_aliases(base: Checkpoint, tasks: Mapping[str, Checkpoint | Adapter]) -> dict[str, str]:
    """Second names, alias -> name, of tensors that the base and all tasks share between layers."""
    return {
        alias: name
        for alias, name in base.aliases.items()
        if all(task.aliases.get(alias) == name for task in tasks.values())
    }


def _of_aliases(globs: list[str], base: Checkpoint, aliases: Mapping[str, str]) -> list[str]:
    """Globs for names without aliases: one that matches second names only means their first names."""
    found: list[str] = []
    for glob in globs:
        firsts = [name for alias, name in aliases.items() if fnmatchcase(alias, glob)]
        direct = any(fnmatchcase(name, glob) for name in base if name not in aliases)
        found += [glob] if direct or not firsts else []
        found += [re.sub(r"([*?[])", r"[\1]", name) for name in firsts]
    return found


def _with_files(
    error: MergeError, base: Checkpoint, tasks: Mapping[str, Checkpoint | Adapter]
) -> MergeError:
    """The same error, with the paths of the models that it names."""
    models = {"the base": base, **{f"task '{name}'": task for name, task in tasks.items()}}
    paths = [f"{m} is {x.path}" for m, x in models.items() if f"{m} " in str(error)]
    return type(error)("\n".join([str(error), *paths]))


def _named(texts: Iterable[str]) -> dict[str, Path]:
    """Tasks by name: NAME=PATH, else the folder's own name, or the file's without its ending."""
    from minipact.checkpoints import PICKLES

    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            # A link gives its own name, not its target's.
            path, whole = text, Path(os.path.abspath(text))
            name = whole.stem if whole.suffix in (".safetensors", *PICKLES) else whole.name
        if not name or not path:
            raise UsageError(f"'{text}' lacks a name or a path: write NAME=PATH")
        if name in named:
            raise UsageError(f"two tasks are called '{name}': write NAME=PATH to tell them apart")
        named[name] = Path(os.path.expanduser(path))  # some shells leave the ~ of NAME=~/PATH
    return named


def _refuse_output_among_inputs(arguments: argparse.Namespace) -> None:
    """An output that is replaced must neither be an input nor hold one."""
    output = arguments.output.resolve()
    for path in (arguments.base, *_named(arguments.tasks).values()):
        link = path.absolute().parent.resolve() / path.name
        for place in (link, path.resolve()):
            if output == place or output in place.parents:
                what = "is" if output == place else "holds"
                raise UsageError(
                    f"{arguments.output} {what} the input {path}: choose another output"
                )


def _recipe(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    return {
        "rule": arguments.rule,
        "purify": [name for text in arguments.purify for name in text.split(",") if name],
        "scale": arguments.scale,
        "weights": _weights(arguments.weights, names),
        "options": _options(arguments.set),
        "include": arguments.include,
        "exclude": arguments.exclude,
        "device": _device(arguments.device),
        "seed": arguments.seed,
    }


def _weights(text: str | None, names: list[str]) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights {text}: write numbers with commas between, 1,1,.5") from error
    if len(numbers) != len(names):
        raise UsageError(f"--weights {text}: {len(names)} numbers are needed, one per task")
    return dict(zip(names, numbers, strict=True))


def _options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{"pact": {"core": 38}} from pact.core=38; values are true, false, none, numbers, else text."""
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        method, dot, option = key.partition(".")
        if not (equals and dot and method and option):
            raise UsageError(f"--set {text}: write METHOD.OPTION=VALUE, such as pact.core=38")
        options.setdefault(method, {})[option] = _value(value)
    return options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _device(name: str) -> str:
    import torch

    from minipact import distributed

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and distributed.size() > 1:
        return distributed.local_device()
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used ({reason}): try auto or cpu") from error
    return name


# ---- Writing the output --------------------------------------------------------------------------


def _write(
    arguments: argparse.Namespace,
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint | Adapter],
    checked: Plan,
    summary: dict[str, Any],
    aliases: Mapping[str, str],
) -> dict[str, Any]:
    """Merge this process' share into the output; the first process lays it out and completes it."""
    from minipact import distributed
    from minipact.checkpoints import Output, copy_side_files

    inputs = {"the base": base, **tasks}
    stamps = _stamps(inputs.values())
    blank = {model: {file.name: "0" * 64 for file in x.files} for model, x in inputs.items()}
    as_file = arguments.output.suffix == ".safetensors"
    open_clip = (arguments.base / "open_clip_config.json").is_file()
    output = Output(
        arguments.output,
        {name: _announced(base.meta(name), arguments.dtype) for name in base},
        max_shard_size=None if open_clip else arguments.max_shard_size,
        metadata=_provenance(summary, blank) if as_file else {},
        stem="open_clip_model" if open_clip else "model",
        overwrite=arguments.overwrite,
    )
    first, keep, stop = distributed.rank() == 0, False, Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            if first:
                output.start(_record(arguments, summary) | stamps, arguments.resume)
                digests = {
                    model: {file.name: pool.submit(_digest, file, stop) for file in x.files}
                    for model, x in inputs.items()
                }
            output.done = distributed.from_first(output.done)
            kept = len(output.done)
            noise, signal = _merge_share(arguments, checked, output, aliases)
            output.settle()
            results = distributed.from_all((output.done, noise, signal))
            output.done = {name for done, _, _ in results for name in done}
            if first:
                sums = {
                    m: {n: d.result() for n, d in files.items()} for m, files in digests.items()
                }
                _refuse_changed(stamps, _stamps(inputs.values()))

                def finish(folder: Path) -> None:
                    copy_side_files(arguments.base, folder)
                    (folder / "README.md").write_text(_card(arguments, summary, sums))

                metadata = _provenance(summary, sums) if as_file else {}
                files = output.commit(metadata=metadata, finish=finish)
            else:
                files = []
            files = distributed.from_first(files)
        except (OSError, KeyboardInterrupt, RuntimeError, MemoryError):
            keep = True
            raise
        finally:
            stop.set()
            output.close(keep=keep)
    noise, signal = (sum(result[i] for result in results) for i in (1, 2))
    return {
        "processes": distributed.size(),
        "resumed_tensors": kept,
        "rounding": (noise / signal) ** 0.5 if signal else None,
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }


def _merge_share(
    arguments: argparse.Namespace, checked: Plan, output: Output, aliases: Mapping[str, str]
) -> tuple[float, float]:
    """Merge and write this process' tensors; squared norms of what rounding adds, and of scale * delta.

    Both are taken where the output is of a half type.
    """
    import torch
    from tqdm import tqdm

    from minipact import distributed
    from minipact.merging import _add

    dtype = None if arguments.dtype == "keep" else getattr(torch, arguments.dtype)
    names = {step.name: [step.name] for step in checked.steps}
    for alias, name in aliases.items():
        names[name].append(alias)
    left = {s.name: s for s in checked.steps if not output.done.issuperset(names[s.name])}
    # A statistic of the whole model needs all tensors again, also those that are written already.
    steps = checked.steps if "thresholds" in checked.rule.needs else left.values()
    mine = distributed.share({step.name: _cost(step) for step in steps})
    combine = distributed.add_up if distributed.size() > 1 else None

    def finish(
        step: Step, base: Tensor, delta: Tensor | None
    ) -> tuple[str, Tensor | None, tuple[float, float]]:
        if step.name not in left:
            return step.name, None, (0.0, 0.0)
        merged = _add(step.name, base, delta, checked.scale, dtype)
        return step.name, merged.cpu(), _rounding(base, delta, merged, checked.scale)

    noise = signal = 0.0
    terminal = sys.stderr is not None and sys.stderr.isatty()
    quiet = arguments.quiet or distributed.rank() > 0 or not terminal
    with tqdm(total=len(mine), unit="tensor", desc="merging", disable=quiet) as bar:
        for name, merged, norms in checked.deltas(
            finish, names=mine, combine=combine, mapper=_mapper(arguments, checked)
        ):
            noise, signal = noise + norms[0], signal + norms[1]
            for place in names[name] if merged is not None else ():
                output.write(place, merged)
            bar.update()
            del merged  # not beside the next one
    return noise, signal


def _rounding(
    base: Tensor, delta: Tensor | None, merged: Tensor, scale: float
) -> tuple[float, float]:
    """Squared norms of what rounding to a half type adds, and of scale * delta."""
    import torch

    from minipact.merging import _pieces

    if delta is None or not merged.is_floating_point() or merged.itemsize >= 4:
        return 0.0, 0.0
    noise, signal, norm = 0.0, 0.0, torch.linalg.vector_norm
    for x, d, y in zip(*(_pieces(z, delta.device) for z in (base, delta, merged)), strict=True):
        error = torch.add(x.to(d), d, alpha=scale).sub_(y.to(d))
        noise += float(norm(error, dtype=torch.float64)) ** 2
        signal += float(norm(d, dtype=torch.float64)) ** 2 * scale**2
    return noise, signal


def _cost(step: Step) -> float:
    """Work on a tensor, up to a factor: singular vectors of [m, n] take m * n * min(m, n)."""
    from minipact.merging import METHODS

    size = math.prod(step.shape)
    flat = {"copy", "mean", *(m.name for m in METHODS.values() if m.scope == "tensor")}
    return size if flat.issuperset({*step.purify, step.rule}) else size * min(step.shape)


def _mapper(arguments: argparse.Namespace, checked: Plan) -> Any:
    """Tensors in work at once: as asked for, else one per core, as far as memory goes."""
    from minipact import distributed
    from minipact.parallel import threads

    if arguments.threads is not None or str(checked.device) != "cpu":
        return threads(arguments.threads or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    spectral = any(method.scope == "matrix" for method in (*checked.purifiers, checked.rule))
    held = 4 * (2 * len(checked.tasks) + (16 if spectral else 4))  # bytes for an entry of a tensor
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4 / held
    return threads(max(1, (cores or 1) // distributed.size()), room / distributed.size())


def _announced(meta: Tensor, dtype: str) -> Tensor:
    import torch

    return (
        meta if dtype == "keep" or not meta.is_floating_point() else meta.to(getattr(torch, dtype))
    )


def _stamps(inputs: Iterable[Checkpoint | Adapter]) -> dict[str, list[int]]:
    """Size in bytes and time of change of each input file."""
    files = {file.resolve(): file.stat() for x in inputs for file in x.files}
    return {f"size and time of {f}": [s.st_size, s.st_mtime_ns] for f, s in files.items()}


def _refuse_changed(before: Mapping[str, list[int]], after: Mapping[str, list[int]]) -> None:
    for what, stamp in before.items():
        if after[what] != stamp:
            raise UsageError(f"{what} changed while it was read: merge again when it is whole")


def _record(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the output's bytes depend on besides the inputs: kept for --resume."""
    kept = ("rule", "purify", "options", "scale", "weights", "seed", "dtype", "versions")
    return {key: summary[key] for key in kept} | {
        "include": arguments.include,
        "exclude": arguments.exclude,
        "device": summary["device"].split(":")[0],
    }


def _digest(file: Path, stop: Event) -> str:
    from minipact.checkpoints import sha256

    return sha256(file, stop)


# ---- What is told afterwards ---------------------------------------------------------------------


def _summary(
    arguments: argparse.Namespace,
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint | Adapter],
    checked: Plan,
) -> dict[str, Any]:
    import torch

    treatments = Counter(" > ".join([*step.purify, step.rule]) for step in checked.steps)
    size = sum(base.meta(name).nbytes for name in base)
    return {
        "base": f"{arguments.base} ({base.layout})",
        "tasks": {name: f"{task.path} ({task.layout})" for name, task in tasks.items()},
        "versions": {"minipact": __version__, "torch": torch.__version__},
        "weights": dict(checked.weights),
        "rule": checked.rule.name,
        "purify": [method.name for method in checked.purifiers],
        "options": _options(arguments.set),
        "scale": checked.scale,
        "seed": arguments.seed,
        "device": str(checked.device),
        "dtype": arguments.dtype,
        "tensors": dict(treatments),
        "base_bytes": size,
        "notes": list(checked.notes),
    }


def _show(arguments: argparse.Namespace, summary: dict[str, Any], checked: Plan) -> None:
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    if arguments.quiet:
        return
    if arguments.dry_run:
        for step in checked.steps:
            how = " > ".join([*step.purify, step.rule])
            print(f"{step.name}  {list(step.shape)}  {step.kind}: {how}")
    for treatment, count in summary["tensors"].items():
        print(f"{count:5d} tensors: {treatment}")
    for note in summary["notes"]:
        print(f"note: {note}")
    if arguments.dry_run:
        print(f"dry run, nothing was written; the base has {summary['base_bytes'] / 1e6:.1f} MB")
        return
    if summary["resumed_tensors"]:
        print(f"{summary['resumed_tensors']} tensors were there from the interrupted run")
    if summary["rounding"] is not None:
        print(f"rounding of the result: {summary['rounding']:.1%} of the norm of scale * delta")
    print(
        f"wrote {arguments.output} ({summary['bytes'] / 1e6:.1f} MB) in {summary['seconds']:.1f} s, "
        f"peak memory {summary['peak_memory_mb']} MB with mapped input files"
    )


def _peak_memory_mb() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


def _provenance(
    summary: Mapping[str, Any], sums: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Strings for the header of a single file; no times or paths, so that bytes repeat."""
    kept = ("rule", "purify", "options", "scale", "weights", "seed", "dtype", "versions")
    record = {key: summary[key] for key in kept} | {"sha256": sums}
    return {"minipact": __version__, "merge": json.dumps(record, sort_keys=True)}


def _card(
    arguments: argparse.Namespace, summary: Mapping[str, Any], sums: Mapping[str, Mapping[str, str]]
) -> str:
    """Model card: what was merged from what, and how."""
    tasks = "\n".join(
        f"- {name}: `{path}`, weight {summary['weights'][name]}"
        for name, path in summary["tasks"].items()
    )
    digests = "\n".join(
        f"- {model}, `{file}`: `{digest}`"
        for model, files in sums.items()
        for file, digest in files.items()
    )
    recipe = json.dumps(
        {key: summary[key] for key in ("rule", "purify", "options", "scale", "seed", "dtype")},
        indent=2,
    )
    # options of one run, without effect on the bytes
    passing = ("--resume", "--overwrite", "--quiet", "--json")
    command = re.sub(r"\0--threads[=\0]\d+", "", "\0".join(["", *arguments.command]))
    words = [word for word in command.split("\0")[1:] if word not in passing]
    versions = summary["versions"]
    return f"""---
library_name: minipact
tags: [merge, model-merging]
---
# Merged model

Merged without training by minipact {versions["minipact"]} with torch {versions["torch"]}.

Base: `{summary["base"]}`

Tasks:
{tasks}

Recipe:
```json
{recipe}
```

SHA-256 of the inputs:
{digests}

Command:
```
{shlex.join(["minipact", *words])}
```
"""


# ---- minipact xray -------------------------------------------------------------------------------


def _xray(arguments: argparse.Namespace) -> int:
    arguments.tasks, arguments.device = _named(arguments.tasks), _device(arguments.device)
    return run_xray(arguments)


# ---- minipact methods ----------------------------------------------------------------------------


def _methods(arguments: argparse.Namespace) -> int:
    from minipact.merging import METHODS

    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "kind": method.kind,
            "summary": (inspect.getdoc(method.function) or "").split("\n")[0],
            "source": method.source,
            "acts_on": "matrices" if method.scope == "matrix" else "all floating-point tensors",
            "options": method.options,
            "scale": dict(method.scale),
        }
        for method in sorted(METHODS.values(), key=lambda method: method.kind)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items()) or "none"
        print(f"{row['name']} ({row['kind']}, on {row['acts_on']})\n  {row['summary']}")
        print(f"  options: {options}\n  source: {row['source']}")
        if row["scale"]:
            scales = ", ".join(
                str(v) if k == "any" else f"{v} (reduce={k})" for k, v in row["scale"].items()
            )
            print(f"  recommended scale: {scales}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
