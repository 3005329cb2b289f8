"""Command line of minipact: `minipact merge BASE TASK... -o OUT` and `minipact methods`."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipact.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from minipact.checkpoints import Checkpoint
    from minipact.merging import Plan

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")


class UsageError(ValueError):
    """Wrong use of the command line; the message says what to write instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 2 user error, 1 failure, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        from minipact.checkpoints import CheckpointError
        from minipact.merging import MergeError

        if not isinstance(error, UsageError | CheckpointError | MergeError):
            raise
        return _fail(str(error), USER_ERROR)
    except OSError as error:
        return _fail(f"{error}; no output was written", FAILURE)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _fail(f"{error}; use --device cpu", FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted; no output was written", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"minipact: error: {message}", file=sys.stderr)
    return code


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
        ".safetensors file, a Hugging Face or open_clip folder, or a .pt/.bin state dict.",
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
    merge.add_argument("--max-shard-size", default="5GB", help="of a folder's files (%(default)s)")
    merge.add_argument(
        "--seed", type=int, default=0, help="of random masks and sketches (%(default)s)"
    )
    merge.add_argument("--threads", type=int, help="CPU threads")
    merge.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing output")
    merge.add_argument("--json", action="store_true", help="summary as JSON on standard output")
    merge.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    methods = commands.add_parser("methods", help="list rules and purifiers with their options")
    methods.set_defaults(run=_methods)
    methods.add_argument("--json", action="store_true", help="as JSON")
    return parser


# ---- minipact merge ------------------------------------------------------------------------------


def _merge(arguments: argparse.Namespace) -> int:
    import torch

    from minipact.checkpoints import (
        check_output,
        copy_side_files,
        open_checkpoint,
        parse_size,
        save_checkpoint,
    )
    from minipact.merging import plan

    started = time.perf_counter()
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: must be 1 or more")
        torch.set_num_threads(arguments.threads)
    parse_size(arguments.max_shard_size)
    if not arguments.dry_run:
        check_output(arguments.output, arguments.overwrite)
    _refuse_output_among_inputs(arguments)
    base = open_checkpoint(arguments.base)
    tasks = {name: open_checkpoint(path) for name, path in _named(arguments.tasks).items()}
    recipe = _recipe(arguments, list(tasks))
    checked = plan(base, tasks, **recipe)
    summary = _summary(arguments, base, tasks, checked)
    if arguments.dry_run:
        _show(arguments, summary | {"dry_run": True}, checked)
        return 0
    inputs = [file for checkpoint in (base, *tasks.values()) for file in checkpoint.files]
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests = {str(file): pool.submit(_digest, file) for file in inputs}
        try:
            card = _card_writer(arguments, summary, digests, copy_side_files)
            tensors = _merged(arguments, base, tasks, recipe, len(checked.steps))
            single = arguments.output.suffix == ".safetensors"
            metadata = _provenance(summary) if single else {}
            files = save_checkpoint(
                arguments.output, tensors, max_shard_size=arguments.max_shard_size,
                metadata=metadata, overwrite=arguments.overwrite, finish=card,
            )  # fmt: skip
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    summary |= {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_mb": _peak_memory_mb(),
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }
    _show(arguments, summary, checked)
    return 0


def _named(texts: Iterable[str]) -> dict[str, Path]:
    """Tasks by name: NAME=PATH, else the file's or folder's own name."""
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            path, name = text, Path(text).resolve().name.removesuffix(Path(text).suffix)
        if not name or name in named:
            raise UsageError(f"two tasks are called '{name}': write NAME=PATH to tell them apart")
        named[name] = Path(path)
    return named


def _refuse_output_among_inputs(arguments: argparse.Namespace) -> None:
    paths = [arguments.base, *_named(arguments.tasks).values()]
    if arguments.output.resolve() in [path.resolve() for path in paths]:
        raise UsageError(f"{arguments.output} is an input too: choose another output")


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
    """{"pact": {"core": 38}} from pact.core=38; values are read as JSON where they can be."""
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

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used ({reason}): try auto or cpu") from error
    return name


def _merged(
    arguments: argparse.Namespace,
    base: Checkpoint,
    tasks: dict[str, Checkpoint],
    recipe: dict[str, Any],
    count: int,
) -> Iterator[tuple[str, Tensor]]:
    import torch
    from tqdm import tqdm

    from minipact.merging import merge_iter

    dtype = None if arguments.dtype == "keep" else getattr(torch, arguments.dtype)
    quiet = arguments.quiet or not sys.stderr.isatty()
    with tqdm(total=count, unit="tensor", desc="merging", disable=quiet) as bar:
        yield from merge_iter(
            base, tasks, dtype=dtype, progress=lambda done, total, name: bar.update(), **recipe
        )


def _digest(file: Path) -> str:
    from minipact.checkpoints import sha256

    return sha256(file)


# ---- What is told afterwards ---------------------------------------------------------------------


def _summary(
    arguments: argparse.Namespace, base: Checkpoint, tasks: dict[str, Checkpoint], checked: Plan
) -> dict[str, Any]:
    treatments = Counter(" > ".join([*step.purify, step.rule]) for step in checked.steps)
    size = sum(base.meta(name).nbytes for name in base)
    return {
        "base": f"{arguments.base} ({base.layout})",
        "tasks": {name: f"{task.path} ({task.layout})" for name, task in tasks.items()},
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
    print(
        f"wrote {arguments.output} ({summary['bytes'] / 1e6:.1f} MB) in {summary['seconds']:.1f} s, "
        f"peak memory {summary['peak_memory_mb']} MB"
    )


def _peak_memory_mb() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


def _provenance(summary: dict[str, Any]) -> dict[str, str]:
    """Strings for the header of a single file; no times or versions of others, so that bytes repeat."""
    kept = ("rule", "purify", "options", "scale", "weights", "seed")
    record = {key: summary[key] for key in kept}
    return {"minipact": __version__, "merge": json.dumps(record, sort_keys=True)}


def _card_writer(
    arguments: argparse.Namespace,
    summary: dict[str, Any],
    digests: dict[str, Future[str]],
    copy_side_files: Any,
) -> Any:
    def finish(folder: Path) -> None:
        copy_side_files(arguments.base, folder)
        (folder / "README.md").write_text(_card(summary, digests))

    return finish


def _card(summary: dict[str, Any], digests: dict[str, Future[str]]) -> str:
    """Model card: what was merged from what, and how."""
    import torch

    tasks = "\n".join(
        f"- {name}: `{path}`, weight {summary['weights'][name]}"
        for name, path in summary["tasks"].items()
    )
    sums = "\n".join(
        f"- `{Path(file).name}`: `{digest.result()}`" for file, digest in digests.items()
    )
    recipe = json.dumps(
        {key: summary[key] for key in ("rule", "purify", "options", "scale", "seed", "dtype")},
        indent=2,
    )
    command = shlex.join(["minipact", *sys.argv[1:]])
    return f"""---
library_name: minipact
tags: [merge, model-merging]
---
# Merged model

Merged without training by minipact {__version__} with torch {torch.__version__}.

Base: `{summary["base"]}`

Tasks:
{tasks}

Recipe:
```json
{recipe}
```

SHA-256 of the inputs:
{sums}

Command:
```
{command}
```
"""


# ---- minipact methods ----------------------------------------------------------------------------


def _methods(arguments: argparse.Namespace) -> int:
    from minipact.merging import METHODS

    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "kind": method.kind,
            "summary": method.summary,
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
