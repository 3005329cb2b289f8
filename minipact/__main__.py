"""Command line of minipact: `minipact merge BASE TASK... -o OUT`, `compress`, `statistics`, `xray` and more.

Turns arguments into a Recipe and paths, and exceptions into one message and an exit code; the work is done
in `minipact.job` and `minipact.xray`, which load when they are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipact.errors import CheckpointError, MergeError
from minipact.launched import rank
from minipact.lora_commands import add_extract_lora, add_save_modules, show_lora
from minipact.measuring_commands import add_statistics, show_statistics
from minipact.stored_commands import add_compress, add_extract, by_task, show
from minipact.version import __version__

if TYPE_CHECKING:
    from minipact.job import Job, Tasks
    from minipact.merging import Progress
    from minipact.recipe import Recipe

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
NO_MEMORY = "out of memory|can't allocate memory|Cannot allocate memory|unable to mmap"
ENDINGS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")
# What METHODS holds by the end; it takes torch to load, for which help does not wait.
PURIFIERS = ("awd", "dare", "pact", "pave", "sift", "tatr", "wiener")
RULES = (
    "ace", "consensus", "fisher_merge", "iso_c", "iso_cts", "knots", "regmean", "swudi", "task_arithmetic",
    "ties", "tsv_m", "wudi",
)  # fmt: skip


class UsageError(ValueError):
    """Wrong use of the command line; the message says what to write instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 2 user error, 1 failure, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(_with_negatives(sys.argv[1:] if argv is None else argv))
    if arguments.run is None:
        parser.print_help()
        return 0
    handlers = {number: signal.signal(number, _interrupt) for number in _heard(ENDINGS)}
    try:
        _load_rooms()
        code = int(arguments.run(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has gone, or a full disk, shows here and not at exit
        return code
    except (UsageError, CheckpointError, MergeError) as error:
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
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _with_negatives(words: Iterable[str]) -> list[str]:
    """The words with `--weights -1,0.5` as one, as argparse takes what begins with - for an option."""
    found: list[str] = []
    for word in words:
        is_number = re.match(r"-(\.?\d|inf|nan)", word, re.IGNORECASE)
        if is_number and found and re.fullmatch(r"--[a-z-]+", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _heard(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those signals that are not ignored, as nohup has it of one and a shell in the background of another."""
    return [x for x in numbers if signal.getsignal(x) not in (signal.SIG_IGN, None)]


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _load_rooms() -> None:
    """Import torch and what works with it; a signal to end waits for that, but for a second one.

    What is half loaded may swallow it, and torch cannot be loaded again.
    """
    came: list[int] = []

    def wait(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    numbers = _heard((signal.SIGINT, *ENDINGS))
    handlers = {number: signal.signal(number, wait) for number in numbers}
    try:
        import minipact.job  # noqa: F401
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    """One message; of several processes, the others speak up only once they work on their own."""
    number = rank()
    distributed = sys.modules.get("minipact.distributed")  # torch loads once, even if interrupted
    if number == 0 or (distributed is not None and distributed.has_joined()):
        who = f"process {number}: " if number else ""
        print(f"minipact: error: {who}{message}", file=sys.stderr)
    return code


def _left(arguments: argparse.Namespace) -> str:
    """What a run that ended early leaves behind."""
    output = getattr(arguments, "output", None)
    if getattr(arguments, "written", False):
        return f"{output} is written and whole"
    if output is not None and os.path.exists(f"{output}.partial"):
        kept = f"{output}.partial keeps what is done, --resume goes on from there"
        return f"no output was written; {kept}"
    return "no output was written"


# ---- Arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minipact",
        description="Merge fine-tuned models: task arithmetic, TIES, TSV, Iso, PACT.",
    )
    parser.add_argument("--version", action="version", version=f"minipact {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_merge(commands)
    add_compress(commands, _compress, ENTRY)
    add_extract(commands, _extract)
    add_extract_lora(commands, _extract_lora, ENTRY)
    add_statistics(commands, _statistics)
    _add_xray(commands)
    methods = commands.add_parser("methods", help="list rules and purifiers with their options")
    methods.set_defaults(run=_methods)
    methods.add_argument("--json", action="store_true", help="as JSON")
    return parser


ENTRY = "which state dict of training checkpoints that hold several, such as ema"


def _add_merge(commands: Any) -> None:
    merge: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="merge checkpoints",
        description="Merge fine-tuned checkpoints into their common base. A checkpoint is a "
        ".safetensors file, a folder of transformers, diffusers, sentence-transformers or open_clip, or a "
        ".pt/.bin state dict; a TASK may also be the folder of a PEFT LoRA adapter. Under "
        "torchrun --nproc-per-node N -m minipact, N processes share the work.",
        epilog="example: minipact merge base.safetensors cars.safetensors dtd.safetensors "
        "-o merged.safetensors --purify pact --scales 0.2:1:5 --score 'python eval.py {}'",
    )
    merge.set_defaults(run=_merge)
    add = merge.add_argument
    add("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    add("tasks", metavar="TASK", nargs="+", help="fine-tuned checkpoint, or NAME=PATH")
    add("-o", "--output", metavar="OUT", type=Path, required=True,
        help="OUT.safetensors for one file, else a folder in Hugging Face layout")  # fmt: skip
    add("--rule", metavar="NAME",
        help=f"merging rule: {', '.join(RULES)}, or package.module:function (task_arithmetic)")  # fmt: skip
    add("--purify", action="append", metavar="NAME[,NAME]",
        help=f"to run first, in order: {', '.join(PURIFIERS)}, or package.module:function")  # fmt: skip
    add("--set", action="append", metavar="METHOD.OPTION=VALUE",
        help="option of a method, such as pact.core=38")  # fmt: skip
    add(
        "--scale",
        type=float,
        help="factor of the merged task vector (the rule's own; 1 for one task)",
    )
    add("--vectors", metavar="HOW",
        help="biases, norms and all that is no matrix: rule (as published), mean (plain, unscaled), copy, or "
        "a factor of their sum (mean where a method acts on matrices, else rule)")  # fmt: skip
    add("--weights", metavar="W,W,...", help="factor of each task vector (1 each)")
    add("--statistics", action="append", metavar="FILE", type=Path,
        help="of a task's data, from minipact statistics, for methods that need one; matched to its task by "
        "SHA-256, with --recipe too")  # fmt: skip
    add("--include", action="append", metavar="GLOB", help="merge only these tensors")
    add("--exclude", action="append", metavar="GLOB", help="copy these from the base")
    add("--policy", action="append", metavar="GLOB=KIND",
        help="treat tensors as matrix, matrix_T (stored for x @ W), stack or stack_T (of those, [E, m, n]), "
        "vector or copy")  # fmt: skip
    add("--missing", choices=("error", "base", "present"),
        help="tensors that a model lacks: refused; as in the base; or merged from the models that hold them "
        "(error)")  # fmt: skip
    add("--rename", action="append", metavar="OLD=NEW",
        help="beginning of names in the tasks; one that all names share is found alone")  # fmt: skip
    add("--entry", metavar="KEY", help=ENTRY)
    add("--vocabulary", choices=("same", "union"),
        help="union: a row for every token, where tokenizers only append some (same)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of the output (keep)")
    add("--seed", type=int, help="of random masks and sketches (0)")
    add("--recipe", metavar="FILE", type=Path,
        help="repeat a merge: its model card, its .safetensors file, or JSON; inputs are matched by "
        "their SHA-256. Or mergekit's .yml, for the methods that both have")  # fmt: skip
    add("--scales", metavar="A:B:N", help="try N scales from A to B, or A,B,...; needs --score")
    add("--score", metavar="COMMAND",
        help="rates a candidate, its path in place of {}, by the number it prints last; higher is "
        "better")  # fmt: skip
    add("--lora-rank", type=int, metavar="R",
        help="write what is added to the base as a LoRA adapter of this rank, for PEFT; what is lost "
        "is printed")  # fmt: skip
    add_save_modules(add)
    add("--base-model", metavar="ID", help="for the model card (what the inputs' cards agree on)")
    add("--license", metavar="ID", help="likewise")
    add("--max-shard-size", default="5GB",
        help="of a folder's files (%(default)s); open_clip folders hold one file")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    add("--threads", type=int, metavar="N",
        help="tensors in work at once on CPUs, one thread each; results do not depend on "
        "it (all cores, as far as a quarter of the memory goes)")  # fmt: skip
    add("--dry-run", action="store_true", help="show the plan, write nothing")
    add("--verbose", action="store_true", help="with --dry-run, every tensor")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--json", action="store_true", help="summary as JSON on standard output")
    add("--quiet", action="store_true", help="no progress bar, no summary")


def _add_xray(commands: Any) -> None:
    xray: argparse.ArgumentParser = commands.add_parser(
        "xray",
        help="diagnose checkpoints before merging",
        description="Tell from the weights alone how fine-tuned checkpoints would collide: one HTML page.",
        epilog="example: minipact xray base.safetensors cars.safetensors dtd.safetensors -o report.html",
    )
    xray.set_defaults(run=_xray)
    add = xray.add_argument
    add("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    add("tasks", metavar="TASK", nargs="+", help="fine-tuned one, or NAME=PATH")
    add("-o", "--output", metavar="OUT.html", type=Path, help="page to write")
    add("--core", default="0.05", help="K: count, share, energy:X (%(default)s)")
    add("--task", default="0.04", help="k, likewise (%(default)s)")
    add("--tol", type=float, default=1e-3, help="of the bases (%(default)s)")
    add("--svd", choices=("exact", "randomized"), default="exact",
        help="randomized is faster on large matrices (%(default)s)")  # fmt: skip
    add("--wiener", action="store_true", help="also what the purifier wiener would remove; slow")
    add("--include", action="append", metavar="GLOB", help="only these tensors")
    add("--exclude", action="append", metavar="GLOB", help="leave these out")
    add("--entry", metavar="KEY", help=ENTRY)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    add("--seed", type=int, default=0, help="of sketches (%(default)s)")
    add("--threads", type=int, help="CPU threads")
    add("--overwrite", action="store_true", help="replace an existing page")
    add("--json", action="store_true", help="the numbers on standard output")
    add("--quiet", action="store_true", help="no progress bar, no summary")


def _named(texts: Iterable[str]) -> dict[str, Path]:
    """Tasks by name: NAME=PATH, else the folder's own name, or the file's without its ending."""
    from minipact.job import name_of

    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = name_of(Path(text)), text
        if not name or not path:
            raise UsageError(f"'{text}' lacks a name or a path: write NAME=PATH")
        if name in named:
            raise UsageError(f"two tasks are called '{name}': write NAME=PATH to tell them apart")
        named[name] = Path(os.path.expanduser(path))  # some shells leave the ~ of NAME=~/PATH
    return named


def _value(text: str) -> Any:
    """true, false, none, a number, else the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
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


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: must be 1 or more")


# ---- minipact merge ------------------------------------------------------------------------------

RECIPE = (
    "rule",
    "purify",
    "set",
    "scale",
    "vectors",
    "weights",
    "include",
    "exclude",
    "policy",
    "missing",
    "rename",
    "vocabulary",
    "dtype",
    "seed",
)


def _merge(arguments: argparse.Namespace) -> int:
    import torch

    from minipact import distributed
    from minipact.job import command_score, merge_files, open_job
    from minipact.output import parse_size

    _check_threads(arguments.threads)
    # Several threads on one small matrix mostly wait for each other; each tensor gets one instead.
    torch.set_num_threads(1)
    _reuse_memory()
    parse_size(arguments.max_shard_size)
    device, scales = _device(arguments.device), _scales(arguments)
    tasks, recipe, notes, entry = _tasks_and_recipe(arguments, device)
    statistics = arguments.statistics or []
    if arguments.lora_rank is not None or arguments.save_modules:
        return _to_lora(arguments, tasks, recipe, notes, entry, device)
    if arguments.dry_run:
        job = open_job(arguments.base, tasks, recipe, device, entry, statistics)
        if distributed.rank() == 0:
            _show_plan(arguments, job, notes)
        return 0
    with _progress(arguments) as progress:
        summary = merge_files(
            arguments.base,
            tasks,
            arguments.output,
            recipe,
            device=device,
            threads=arguments.threads,
            max_shard_size=arguments.max_shard_size,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            scales=scales,
            score=command_score(arguments.score) if scales else None,
            entry=entry,
            base_model=arguments.base_model,
            license=arguments.license,
            statistics=statistics,
            progress=progress,
        )
    arguments.written = True
    summary["notes"] += notes
    summary["peak_memory_mb"] = _peak_memory_mb()
    if distributed.rank() == 0:
        _show(arguments, summary)
    return 0


def _reuse_memory() -> None:
    """Have glibc keep freed memory for the next tensor, as clearing fresh pages costs more than adding.

    Blocks of 256 MB and more go back at once, so that what lies idle stays small beside a big model.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of its malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**28), (arena_max, 1)):
            mallopt(option, value)


@contextlib.contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[Progress]:
    """A bar on standard error where that is a terminal, of the first process."""
    from tqdm import tqdm

    from minipact import distributed

    terminal = sys.stderr is not None and sys.stderr.isatty()
    quiet = arguments.quiet or distributed.rank() > 0 or not terminal
    with tqdm(disable=quiet) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)

        yield progress


def _tasks_and_recipe(
    arguments: argparse.Namespace, device: str
) -> tuple[dict[str, Path], Recipe, list[str], str | None]:
    """Tasks by name, the recipe, what there is to say about it, and the entry of training checkpoints."""
    if arguments.recipe is not None:
        return _recorded(arguments, device)
    tasks = _named(arguments.tasks)
    return tasks, _recipe(arguments, list(tasks)), [], arguments.entry


def _recipe(arguments: argparse.Namespace, names: list[str]) -> Recipe:
    from minipact.recipe import Recipe

    given = {
        "rule": arguments.rule,
        "purify": _purifiers(arguments),
        "options": _options(arguments.set or []),
        "scale": arguments.scale,
        "vectors": _vectors(arguments.vectors),
        "weights": _weights(arguments.weights, names),
        "include": arguments.include,
        "exclude": arguments.exclude,
        "policy": _policy(arguments.policy or []),
        "missing": arguments.missing,
        "rename": _rename(arguments.rename or []),
        "vocabulary": arguments.vocabulary,
        "dtype": None if arguments.dtype == "keep" else arguments.dtype,
        "seed": arguments.seed,
    }
    return Recipe(**{name: x for name, x in given.items() if x is not None})


def _purifiers(arguments: argparse.Namespace) -> list[str]:
    return [name for text in arguments.purify or [] for name in text.split(",") if name]


def _vectors(text: str | None) -> str | float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


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


def _options(texts: Iterable[str]) -> dict[str, dict[str, object]]:
    """{"pact": {"core": 38}} from pact.core=38; values are true, false, none, numbers, else text."""
    options: dict[str, dict[str, object]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        method, dot, option = key.partition(".")
        if not (equals and dot and method and option):
            raise UsageError(f"--set {text}: write METHOD.OPTION=VALUE, such as pact.core=38")
        options.setdefault(method, {})[option] = _value(value)
    return options


def _policy(texts: Iterable[str]) -> dict[str, str]:
    """{"*.pos_embed": "vector"} from *.pos_embed=vector."""
    policy = {}
    for text in texts:
        glob, equals, kind = text.rpartition("=")
        if not (glob and equals and kind):
            raise UsageError(f"--policy {text}: write GLOB=KIND, such as *.pos_embed=vector")
        policy[glob] = kind
    return policy


def _rename(texts: list[str]) -> list[tuple[str, str]]:
    """[("model.", "")] from model.=; the first beginning that fits counts."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [
        text for text, (old, equals, _) in zip(texts, pairs, strict=True) if not (old and equals)
    ]:
        raise UsageError(
            f"--rename {wrong[0]}: write OLD=NEW, such as model.language_model.=model."
        )
    return [(old, new) for old, _, new in pairs]


def _scales(arguments: argparse.Namespace) -> list[float]:
    """The scales to try: A:B:N, evenly from A to B, or numbers with commas between."""
    text = arguments.scales
    if (text is None) != (arguments.score is None):
        raise UsageError("--scales and --score go together: what to try, and how to rate it")
    if text is None:
        return []
    if arguments.scale is not None:
        raise UsageError("--scale and --scales exclude each other: give one")
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, count = text.split(":")
        steps = max(1, int(count) - 1)
        if not 1 <= int(count) <= 1000:
            raise ValueError(count)
        return [float(first) + (float(last) - float(first)) * i / steps for i in range(int(count))]
    except ValueError as error:
        raise UsageError(f"--scales {text}: write FIRST:LAST:COUNT, 0.2:2:8, or 0.3,0.5") from error


def _recorded(
    arguments: argparse.Namespace, device: str
) -> tuple[dict[str, Path], Recipe, list[str], str | None]:
    """What a record says, with the files given matched to it; other options would contradict it."""
    from minipact.job import recorded

    code = [name for name in (arguments.rule, *_purifiers(arguments)) if name and ":" in name]
    methods = {"rule", "purify"} if code else set()
    given = [name for name in RECIPE if getattr(arguments, name) is not None]
    if clash := [f"--{name}" for name in given if name not in methods]:
        raise UsageError(f"--recipe says it all: leave out {' '.join(clash)}")
    try:
        tasks: Tasks = _named(arguments.tasks)
    except UsageError:  # names do not matter where inputs are matched by hash
        tasks = [path for text in arguments.tasks for path in _named([text]).values()]
    found = recorded(arguments.recipe, arguments.base, tasks, trust=code, device=device)
    held = {found.recipe.rule, *found.recipe.purify}
    if idle := {arguments.rule, *_purifiers(arguments)} - held - {None}:
        raise UsageError(f"--recipe says it all: leave out {' '.join(map(str, idle))}")
    if None not in (found.entry, arguments.entry) and found.entry != arguments.entry:
        raise UsageError(f"--recipe says --entry {found.entry}: leave yours out")
    return found.tasks, found.recipe, found.notes, found.entry or arguments.entry


def _peak_memory_mb() -> int | None:
    """Most memory taken so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


def _show_plan(arguments: argparse.Namespace, job: Job, notes: list[str]) -> None:
    """What a merge would do."""
    from minipact.job import memory_needed

    summary = job.summary()
    summary["notes"] += notes
    summary["memory_bytes"] = memory_needed(job, arguments.threads)
    if arguments.json:
        print(json.dumps(summary | {"dry_run": True}, indent=2))
        return
    if arguments.quiet:
        return
    if arguments.verbose:
        for step in job.merged.steps.values():
            print(f"{step.name}  {list(step.shape)}  {step.kind}: {step.treatment}")
    _show_treatments(summary)
    output, base, memory = (summary[f"{x}_bytes"] / 1e6 for x in ("output", "base", "memory"))
    print(
        f"dry run, nothing was written; the output would take {output:.1f} MB (the base has {base:.1f}), "
        f"and the tensors in work up to about {memory:.1f} MB of memory beside torch's own"
    )


def _show_treatments(summary: Mapping[str, Any]) -> None:
    for treatment, count in summary["tensors"].items():
        print(f"{count:5d} tensors: {treatment}")
    for note in summary["notes"]:
        print(f"note: {note}")


def _show(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    """What a merge did."""
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    if arguments.quiet:
        return
    _show_treatments(summary)
    for scale, score in summary["scores"].items():
        print(f"scale {scale:g}: score {score:g}")
    if summary["scores"]:
        print(f"taken: scale {summary['record']['recipe']['scale']:g}")
    if summary["resumed_tensors"]:
        print(f"{summary['resumed_tensors']} tensors were there from the interrupted run")
    if summary["rounding"] is not None:
        print(f"rounding of the result: {summary['rounding']:.1%} of the norm of scale * delta")
    peak = summary["peak_memory_mb"]
    memory = "" if peak is None else f", peak memory {peak} MB with mapped input files"
    size, seconds = summary["bytes"] / 1e6, summary["seconds"]
    print(f"wrote {arguments.output} ({size:.1f} MB) in {seconds:.1f} s{memory}")


# ---- minipact merge --lora-rank, minipact extract-lora --------------------------------------------


def _to_lora(
    arguments: argparse.Namespace,
    tasks: Tasks,
    recipe: Recipe,
    notes: list[str],
    entry: str | None,
    device: str,
) -> int:
    """A merge written as an adapter."""
    from minipact.lora_files import merge_to_lora

    if arguments.lora_rank is None:
        raise UsageError("--save-modules is for adapters: give --lora-rank too")
    if clash := [name for name in ("resume", "dry_run", "scales") if getattr(arguments, name)]:
        names = " ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise UsageError(f"--lora-rank does not go with {names}: leave it out")
    with _progress(arguments) as progress:
        summary = merge_to_lora(
            arguments.base, tasks, arguments.output, arguments.lora_rank, recipe,
            save_modules=arguments.save_modules, device=device, threads=arguments.threads,
            overwrite=arguments.overwrite, entry=entry, base_model=arguments.base_model,
            license=arguments.license, statistics=arguments.statistics or [], progress=progress,
        )  # fmt: skip
    arguments.written = True
    summary["notes"] += notes
    show_lora(arguments, summary)
    return 0


def _extract_lora(arguments: argparse.Namespace) -> int:
    import torch

    from minipact.lora_files import merge_to_lora
    from minipact.recipe import Recipe

    _check_threads(arguments.threads)
    torch.set_num_threads(1)  # each tensor gets one, as in a merge
    recipe = Recipe(
        scale=1.0, vectors="rule", include=tuple(arguments.include or ()),
        exclude=tuple(arguments.exclude or ()), missing=arguments.missing,
        rename=tuple(_rename(arguments.rename or [])), dtype=arguments.dtype, seed=arguments.seed,
    )  # fmt: skip
    with _progress(arguments) as progress:
        summary = merge_to_lora(
            arguments.base, _named([arguments.tuned]), arguments.output, arguments.rank, recipe,
            save_modules=arguments.save_modules, svd=arguments.svd,
            device=_device(arguments.device), threads=arguments.threads,
            overwrite=arguments.overwrite, entry=arguments.entry,
            base_model=arguments.base_model, license=arguments.license, progress=progress,
        )  # fmt: skip
    arguments.written = True
    show_lora(arguments, summary)
    return 0


# ---- minipact compress, minipact extract ---------------------------------------------------------


def _compress(arguments: argparse.Namespace) -> int:
    import torch

    from minipact.stored_files import compress_files

    _check_threads(arguments.threads)
    torch.set_num_threads(1)  # each tensor gets one, as in a merge
    options = {
        method: {option: by_task(value) for option, value in given.items()}
        for method, given in _options(arguments.set or []).items()
    }
    with _progress(arguments) as progress:
        summary = compress_files(
            arguments.base, _named(arguments.tasks), arguments.output, rule=arguments.rule,
            options=options, with_base=not arguments.without_base, include=arguments.include,
            exclude=arguments.exclude, missing=arguments.missing,
            rename=tuple(_rename(arguments.rename or [])), seed=arguments.seed,
            device=_device(arguments.device), threads=arguments.threads,
            overwrite=arguments.overwrite, entry=arguments.entry, progress=progress,
        )  # fmt: skip
    arguments.written = True
    show(arguments, summary)
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from minipact.stored_files import extract_file

    summary = extract_file(
        arguments.file, arguments.task, arguments.output, base=arguments.base,
        max_shard_size=arguments.max_shard_size, overwrite=arguments.overwrite,
    )  # fmt: skip
    arguments.written = True
    show(arguments, summary)
    return 0


# ---- minipact statistics -------------------------------------------------------------------------


def _statistics(arguments: argparse.Namespace) -> int:
    from minipact.measuring import measure_file

    summary = measure_file(
        arguments.kind, arguments.model, arguments.data, arguments.output, loader=arguments.loader,
        architecture=arguments.architecture, head=arguments.head, text=arguments.text,
        task=arguments.task, labels=arguments.labels, samples=arguments.samples,
        batch=arguments.batch, seed=arguments.seed, device=_device(arguments.device),
        overwrite=arguments.overwrite,
    )  # fmt: skip
    arguments.written = True
    show_statistics(arguments, summary)
    return 0


# ---- minipact xray -------------------------------------------------------------------------------


def _xray(arguments: argparse.Namespace) -> int:
    import time

    import torch

    from minipact.job import open_models
    from minipact.xray import check_page, write_page, xray
    from minipact.xray_page import render, summary_line

    started = time.perf_counter()
    if arguments.output is None and not arguments.json:
        raise UsageError("nothing to do: give -o report.html, --json, or both")
    if arguments.output is not None:
        check_page(arguments.output, arguments.overwrite)
    _check_threads(arguments.threads)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device, paths = _device(arguments.device), _named(arguments.tasks)
    base, tasks = open_models(arguments.base, paths, entry=arguments.entry)
    with _progress(arguments) as progress:
        report = xray(
            base, tasks, core=_value(arguments.core), task=_value(arguments.task), tol=arguments.tol,
            svd=arguments.svd, wiener=arguments.wiener, include=arguments.include,
            exclude=arguments.exclude, device=device, seed=arguments.seed, progress=progress,
        )  # fmt: skip
    report |= {"base": str(arguments.base), "given": arguments.tasks, "entry": arguments.entry}
    if arguments.output is not None:
        write_page(arguments.output, render(report))
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    elif not arguments.quiet:
        print(summary_line(report))
        models = {"the base": base, **tasks}
        notes = [f"{name}: {note}" for name, x in models.items() for note in x.notes]
        for text in [*notes, *report["warnings"]]:
            print(f"note: {text}")
        print(f"wrote {arguments.output} in {time.perf_counter() - started:.1f} s")
    return 0


# ---- minipact methods ----------------------------------------------------------------------------

SCOPES = {"matrix": "matrices", "tensor": "all tensors", "entries": "all tensors, entry by entry"}


def _methods(arguments: argparse.Namespace) -> int:
    from minipact.merging import METHODS
    from minipact.methods import STATISTICS

    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "kind": method.kind,
            "summary": (inspect.getdoc(method.function) or "").split("\n")[0],
            "source": method.source,
            "acts_on": SCOPES[method.acts_on],
            "options": method.options,
            "statistics": [need for need in method.needs if need in STATISTICS],
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
        if row["statistics"]:
            print(f"  statistics of data: {', '.join(row['statistics'])} (minipact statistics)")
        if row["scale"]:
            print(f"  recommended scale: {_scales_in_words(row['scale'])}")
    return 0


def _scales_in_words(scales: Mapping[str, float]) -> str:
    from minipact.merging import METHODS

    def words(what: str, scale: float) -> str:
        if what == "any":
            return f"{scale}"
        return f"{scale} (before {what})" if what in METHODS else f"{scale} (reduce={what})"

    return ", ".join(words(what, scale) for what, scale in scales.items())


if __name__ == "__main__":
    sys.exit(main())
