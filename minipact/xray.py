"""X-ray of fine-tuned checkpoints: what their weights alone say about merging them, in numbers and as a page.

    report = xray(base, tasks)      # measures, weight by weight; JSON-ready, keys below
    page = render(report)           # one self-contained HTML page with the same numbers, see xray_page.py
    minipact xray BASE TASK... -o report.html [--json]

Keys of the report. Shares lie in [0, 1]; lists follow the order of `tasks`; None stands for undefined.

    tasks, settings, skipped [{name, why}], counts {matrices, vectors, copied}
    per_task {name: {
        norm, norm_ratio     length of the task vector, and relative to the base's weights
        matrix_share         share of its squared length in the matrices measured
        intrusion            share of it in the pre-trained core; core_chance is K / n, enrichment their ratio
        removed              share that PACT would remove; shield_chance is the shield's width p / n
        suffers, inflicts    mean hidden interference as victim and as interferer
        half                 median share of directions that hold half of its energy in a matrix
    }}
    pairs {cosine, sign_conflict, sign_conflict_large, wall_similarity, hidden_interference: {
        values [T][T], mean over pairs, chance}}; rows of hidden_interference interfere, columns suffer
    layers [{name, shape [m, n], core K, task [T] k_t, energy [T], intrusion [T], core_chance, enrichment,
        shield [T] p_t, shield_chance, removed [T], sti, sti_ratio to random directions, sign_conflict,
        core_half, task_half [T] counts of directions that hold half of the energy}]
    groups [{pattern, layers, enrichment, shield, removed, core_half, task_half, recommended}], one per kind
    advice {core, task suggested shares of min(m, n), scope patterns, warnings}
    summary {enrichment, cosine, sign_conflict, removed, shield} means over tasks or pairs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from minipact.checkpoints import CheckpointError, open_checkpoint
from minipact.merging import (
    Generator,
    MergeError,
    Rank,
    State,
    Step,
    Tasks,
    _check_known,
    _count,
    _delta_blocks,
    _generator,
    _leading_svd,
    _orth,
    plan,
)
from minipact.version import __version__
from minipact.xray_page import render, summary_line

WIDE, ENRICHED, ROOM = 0.8, 1.1, 1 / 8  # see `_advice`
Report = dict[str, Any]

# ---- Measure -------------------------------------------------------------------------------------


@torch.no_grad()
def xray(
    base: State,
    tasks: Tasks,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    svd: str = "exact",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Diagnose fine-tuned models against their base, from the weights alone.

    Args:
        base, tasks, include, exclude, device, seed, progress: as in `merge`.
        core, task, tol, svd: as in `pact`; counts beyond a matrix' min(m, n) are cut to it.

    Returns:
        Dictionaries, lists and numbers only, see the docstring of the module. Matrices are
        measured by subspace, vectors count in norms, cosines and signs. One weight is in memory at a time.

    Raises:
        MergeError: the inputs do not fit together, hold NaN, hold no matrix that a task changed, a task
            equals the base, or an option is out of range.
    """
    checked = plan(base, tasks, include=include, exclude=exclude, device=device)
    settings = {"core": core, "task": task, "tol": tol, "svd": svd, "seed": seed}
    steps = [step for step in checked.steps if step.kind != "copy"]
    _check(settings, base, checked.tasks, steps)
    layers: list[Report] = []
    skipped: list[Report] = []
    sums, base_energy = torch.zeros(5, len(checked.tasks), len(checked.tasks)).double(), 0.0
    for done, step in enumerate(steps, start=1):
        D = next(_delta_blocks(step.name, base, checked.tasks, None, device))
        W0 = base[step.name].to(D)
        pairs = _pair_sums(D)
        sums += pairs
        base_energy += float(W0.double().square().sum())
        if step.kind.startswith("matrix"):
            why = "" if D.any() else "no task changed it"
            why = why if W0.any() else "it is zero in the base, so it has no core"
            if why:
                skipped.append({"name": step.name, "why": why})
            else:
                flip = step.kind == "matrix_T"
                layer = _layer(step.name, W0.mT if flip else W0, D.mT if flip else D, settings)
                layers.append(layer | {"sign_conflict": _off_diagonal_mean(_conflicts(pairs[1:3]))})
        if progress is not None:
            progress(done, len(steps), step.name)
    if not layers:
        raise MergeError("no matrix to look into: see include and exclude")
    vectors = sum(step.kind == "vector" for step in steps)
    report: Report = {
        "minipact": __version__, "tasks": list(checked.tasks), "settings": settings, "skipped": skipped,
        "counts": {"matrices": len(layers), "vectors": vectors, "copied": len(checked.steps) - len(steps)},
        **_summed_up(list(checked.tasks), layers, sums, base_energy),
    }  # fmt: skip
    if any(step.dtype in (torch.float16, torch.bfloat16) for step in steps):
        report["advice"]["warnings"].append(
            "The base is stored in half precision: small updates may carry its rounding, which looks random."
        )
    return {key: _clean(value) for key, value in report.items()}


def _check(settings: Report, base: State, tasks: Mapping[str, State], steps: list[Step]) -> None:
    """All that can be known before the long work."""
    sizes = [min(step.shape) for step in steps if step.kind.startswith("matrix")]
    if not sizes:
        raise MergeError("no matrix to look into: see include and exclude")
    _check_known("svd", [settings["svd"]], ("exact", "randomized"))
    if not 0 <= settings["tol"] < 1:
        raise MergeError(f"tol={settings['tol']} must satisfy 0 <= tol < 1")
    for option in ("core", "task"):
        if settings[option] == 0:
            raise MergeError(f"{option}=0 leaves nothing to measure: give 1 or more")
        spectrum = torch.ones(max(sizes)) if settings["svd"] == "exact" else None
        _count(settings[option], max(sizes), spectrum)
    for label, task in tasks.items():
        if all(torch.equal(base[step.name], task[step.name]) for step in steps):
            raise MergeError(f"task '{label}' equals the base in every tensor: leave it out")


def _pair_sums(D: Tensor) -> Tensor:
    """[5, T, T] over all entries of D [T, ...]: inner products; signs that agree minus those that
    differ, and how many entries both tasks changed; these two again among each task's largest fifth."""
    flat = D.flatten(1)
    keep = max(1, flat.shape[1] // 5)
    floor = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
    total = torch.zeros(5, len(D), len(D)).to(flat.device, torch.float64)
    for part in torch.split(flat, 1 << 18, dim=1):  # short enough for exact counts in float32
        sign = part.sign().float()
        large = sign * (part.abs() >= floor)
        factors = (part.double(), sign, sign.abs(), large, large.abs())
        total += torch.stack([(a @ a.mT).double() for a in factors])
    return total.cpu()


def _conflicts(sums: Tensor) -> Tensor:
    """Share of the entries both tasks changed in which their signs differ, [T, T]; NaN where none."""
    shares: Tensor = (sums[1] - sums[0]) / 2 / sums[1]
    return shares


def _layer(name: str, W0: Tensor, D: Tensor, settings: Report) -> Report:
    """All measures of one weight, W0 [m, n] and D [T, m, n]."""
    generator, svd = _generator(settings["seed"], name), settings["svd"]
    m, n = W0.shape
    _, _, v0, core_half = _directions(W0, settings["core"], svd, generator)
    found = [_directions(d, settings["task"], svd, generator) for d in D]
    us, ss, vs, halves = zip(*found, strict=True)
    k, energy = v0.shape[1], [float(d.double().square().sum()) for d in D]
    frame = torch.linalg.qr(torch.cat([v0, *vs], dim=1)).Q  # all subspaces lie in its span
    c0, own = frame.mT @ v0, [frame.mT @ v for v in vs]
    walls = [_wall(c0, c, settings["tol"]) for c in own]
    others = [[w for i, w in enumerate(walls) if i != j] for j in range(len(D))]
    shields = [_orth(torch.cat(o, 1), settings["tol"]) if o else c0[:, :0] for o in others]
    parts = [d.double() @ frame for d in D]
    intrusion = [_share(x @ c0, e) for x, e in zip(parts, energy, strict=True)]
    draws = [torch.randn(n, vs[0].shape[1], generator=generator).double().to(v0) for _ in "ab"]
    a, b = (_wall(v0, torch.linalg.qr(x).Q, settings["tol"]) for x in draws)
    sti, sti_chance = _task_interference(us, ss, vs)
    chance = k / n
    return {
        "name": name, "shape": [m, n], "core": k, "task": [v.shape[1] for v in vs],
        "energy": energy, "intrusion": intrusion, "core_chance": chance,
        "enrichment": _mean(intrusion) / chance,
        "shield": [p.shape[1] for p in shields],
        "shield_chance": mean(p.shape[1] for p in shields) / n,
        "removed": [_share(x @ p, e) for x, p, e in zip(parts, shields, energy, strict=True)],
        "wall_similarity": [[_overlap(x, y, min(x.shape[1], y.shape[1])) for y in walls] for x in walls],
        "wall_chance": _overlap(a, b, min(a.shape[1], b.shape[1])),
        "hidden": [[_overlap(c, w, c.shape[1]) for w in walls] for c in own],
        "hidden_chance": mean(w.shape[1] for w in walls) / n,
        "sti": sti, "sti_ratio": sti / sti_chance if sti_chance else math.nan,
        "core_half": core_half, "task_half": list(halves),
    }  # fmt: skip


def _directions(
    x: Tensor, rank: Rank, svd: str, generator: Generator
) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Leading triples U, S, V as `rank` says, and how many directions hold half of the energy."""
    size = min(x.shape)
    rank = min(rank, size) if isinstance(rank, int) else rank
    sketch = size if svd == "exact" else max(_count(rank, size), int(ROOM * size), 1)
    u, s, v = _leading_svd(x, sketch, svd, generator)
    k = min(len(s), _count(rank, size, s))
    held = s.square().cumsum(0) >= x.double().square().sum() / 2
    half = int((~held).sum()) + 1 if held.any() else None
    return u[:, :k].clone(), s[:k].clone(), v[:, :k].clone(), half


def _wall(v0: Tensor, v: Tensor, tol: float) -> Tensor:
    """LBW subspace: basis of the core V_0 without the task's own directions V."""
    return _orth(v0 - v @ (v.mT @ v0), tol)


def _share(x: Tensor, energy: float) -> float:
    return float(x.square().sum()) / energy if energy else math.nan


def _overlap(a: Tensor, b: Tensor, size: int) -> float:
    return float((a.mT @ b).square().sum()) / size if size else math.nan


def _task_interference(
    us: Sequence[Tensor], ss: Sequence[Tensor], vs: Sequence[Tensor]
) -> tuple[float, float]:
    """Singular task interference of leading triples, and what random directions would give.

    The latter by the central limit: an inner product of random directions in m dimensions has
    variance 1 / m, and the mean magnitude of a Gaussian is sqrt(2 / pi) times its deviation.
    """
    u, s, v = torch.cat([*us], 1), torch.cat([*ss]), torch.cat([*vs], 1)
    eye = torch.eye(len(s)).to(s)
    value = float((((u.mT @ u - eye) * s) @ (v.mT @ v - eye)).abs().sum())
    energies = torch.stack([x.square().sum() for x in ss])
    counts = torch.tensor([len(x) for x in ss]).to(energies)
    rest = energies.sum() - energies[:, None] - energies + energies.diag()
    pairs = (counts[:, None] * counts * rest.clamp(min=0).sqrt()).sum()
    return value, float(pairs) * math.sqrt(2 / math.pi / u.shape[0] / v.shape[0])


# ---- Sum up --------------------------------------------------------------------------------------


def _summed_up(names: list[str], layers: list[Report], sums: Tensor, base_energy: float) -> Report:
    def table(key: str) -> Tensor:
        return torch.tensor([layer.pop(key) for layer in layers], dtype=torch.float64).nanmean(0)

    norms = sums[0].diag().sqrt()
    tables: dict[str, tuple[Tensor, float]] = {
        "cosine": (sums[0] / norms / norms[:, None], 0.0),
        "sign_conflict": (_conflicts(sums[1:3]), 0.5),
        "sign_conflict_large": (_conflicts(sums[3:5]), 0.5),
        "wall_similarity": (table("wall_similarity"), float(table("wall_chance"))),
        "hidden_interference": (table("hidden"), float(table("hidden_chance"))),
    }
    pairs: Report = {
        key: {"values": x.tolist(), "mean": _off_diagonal_mean(x), "chance": chance}
        for key, (x, chance) in tables.items()
    }
    hidden = tables["hidden_interference"][0]
    per_task: dict[str, Report] = {}
    for t, name in enumerate(names):
        rest = [i for i in range(len(names)) if i != t]
        per_task[name] = {
            "norm": float(norms[t]),
            "norm_ratio": float(norms[t]) / math.sqrt(base_energy) if base_energy else math.nan,
            "matrix_share": math.fsum(layer["energy"][t] for layer in layers)
            / float(sums[0, t, t]),
            **_weighted(layers, t),
            "suffers": _mean(hidden[rest, t].tolist()),
            "inflicts": _mean(hidden[t, rest].tolist()),
            "half": _median(_fraction(layer, layer["task_half"][t]) for layer in layers),
        }
    rows = per_task.values()
    summary = {key: _mean(row[key] for row in rows) for key in ("enrichment", "removed")}
    summary["shield"] = _mean(row["shield_chance"] for row in rows)
    summary |= {key: pairs[key]["mean"] for key in ("cosine", "sign_conflict")}
    groups = _groups(layers)
    advice = _advice(layers, groups, len(names), summary)
    return {"summary": summary, "per_task": per_task, "pairs": pairs, "layers": layers,
            "groups": groups, "advice": advice}  # fmt: skip


def _weighted(layers: list[Report], t: int) -> Report:
    """A task's intrusion and removal over all matrices, each weighted by its energy there."""
    rows = [layer for layer in layers if layer["energy"][t]]
    total = math.fsum(row["energy"][t] for row in rows) or math.nan

    def over(value: Callable[[Report], float]) -> float:
        return math.fsum(row["energy"][t] * value(row) for row in rows) / total

    inside, chance = over(lambda r: r["intrusion"][t]), over(lambda r: r["core_chance"])
    return {
        "intrusion": inside, "core_chance": chance, "enrichment": inside / chance,
        "removed": over(lambda r: r["removed"][t]),
        "shield_chance": over(lambda r: r["shield"][t] / r["shape"][1]),
    }  # fmt: skip


def _groups(layers: list[Report]) -> list[Report]:
    """Layers of one kind together: names that differ in their number only, written as a glob."""
    kinds: dict[str, list[Report]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", layer["name"]), []).append(layer)
    groups = []
    for pattern, rows in kinds.items():
        shield = max(max(row["shield"]) / row["shape"][1] for row in rows)
        enrichment = _mean(row["enrichment"] for row in rows)
        groups.append({
            "pattern": pattern, "layers": len(rows), "enrichment": enrichment, "shield": shield,
            "removed": _mean(x for row in rows for x in row["removed"]),
            "core_half": _median(_fraction(row, row["core_half"]) for row in rows),
            "task_half": _median(_fraction(row, x) for row in rows for x in row["task_half"]),
            "recommended": enrichment >= ENRICHED and shield <= WIDE,
        })  # fmt: skip
    return groups


def _advice(layers: list[Report], groups: list[Report], tasks: int, summary: Report) -> Report:
    """Suggested ranks and scope: a rule of thumb of ours from the weights alone, not from any paper.

    A shield spans at most K + (T - 1) k of n directions; the suggestion keeps that within ROOM of the
    width, one half for the core and one for the other tasks' updates, and takes neither beyond the median
    share of directions that hold half of the energy. A kind of layer is recommended where task vectors
    use the core ENRICHED times as much as chance, and no shield fills more than WIDE of the width.
    """
    core = _median(_fraction(row, row["core_half"]) for row in layers)
    task = _median(_fraction(row, x) for row in layers for x in row["task_half"])
    bare = sum((tasks - 1) * row["core"] >= row["shape"][1] for row in layers)
    wide = sum(max(row["shield"]) > WIDE * row["shape"][1] for row in layers)
    notes = {
        f"In {bare} of {len(layers)} matrices (T - 1) K reaches the width n: a shield built by plain QR, "
        "without a test of rank, would remove the whole task vector there.": bare,
        f"In {wide} of {len(layers)} matrices a shield fills more than {WIDE:.0%} of the width: PACT would "
        "remove nearly everything. Take smaller ranks, a larger tolerance, or a scope.": wide,
        "At the ranks measured, PACT would remove more than half of the task vectors' energy, their own "
        "knowledge included: try smaller ranks too.": summary["removed"] > 0.5,
        "Task vectors use the core hardly more than chance: try the plain rules first, PACT may change "
        "little.": summary["enrichment"] < ENRICHED,
    }
    return {
        "core": _floor(min(ROOM / 2, core)), "task": _floor(min(ROOM / 2 / max(1, tasks - 1), task)),
        "scope": [group["pattern"] for group in groups if group["recommended"]],
        "warnings": [text for text, holds in notes.items() if holds],
    }  # fmt: skip


def _fraction(layer: Report, count: int | None) -> float:
    """A count of directions as a share of min(m, n); infinite where a sketch ended before."""
    return math.inf if count is None else count / min(layer["shape"])


def _floor(share: float) -> float:
    return max(1, int(share * 1000 + 1e-9)) / 1000


def _off_diagonal_mean(x: Tensor) -> float:
    return _mean(x[~torch.eye(len(x), dtype=torch.bool)].tolist())


def _mean(values: Iterable[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return mean(known) if known else math.nan


def _median(values: Iterable[float]) -> float:
    return median(list(values))


def _clean(value: Any) -> Any:
    """NaN and infinity become None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _clean(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_clean(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Run -----------------------------------------------------------------------------------------


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Enter `minipact xray` into the command line; the caller sets what runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "xray",
        help="diagnose checkpoints before merging",
        description="Tell from the weights alone how fine-tuned checkpoints would collide: one HTML page.",
        epilog="example: minipact xray base.safetensors cars.safetensors dtd.safetensors -o report.html",
    )
    parser.add_argument("base", metavar="BASE", type=Path, help="pre-trained checkpoint")
    parser.add_argument("tasks", metavar="TASK", nargs="+", help="fine-tuned one, or NAME=PATH")
    parser.add_argument("-o", "--output", metavar="OUT.html", type=Path, help="page to write")
    parser.add_argument("--core", default="0.05", help="K: count, share, energy:X (%(default)s)")
    parser.add_argument("--task", default="0.04", help="k, likewise (%(default)s)")
    parser.add_argument("--tol", type=float, default=1e-3, help="of the bases (%(default)s)")
    parser.add_argument("--svd", choices=("exact", "randomized"), default="exact",
                        help="randomized is faster on large matrices (%(default)s)")  # fmt: skip
    parser.add_argument("--include", action="append", metavar="GLOB", help="only these tensors")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="leave these out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sketches (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    parser.add_argument("--json", action="store_true", help="the numbers on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """`minipact xray`, with `arguments.tasks` as {name: path} and a device that exists."""
    from tqdm import tqdm

    started = time.perf_counter()
    _check_page(arguments.output, arguments.overwrite, arguments.json)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise MergeError(f"--threads {arguments.threads}: must be 1 or more")
        torch.set_num_threads(arguments.threads)
    base = open_checkpoint(arguments.base)
    tasks = {name: open_checkpoint(path) for name, path in arguments.tasks.items()}
    quiet = arguments.quiet or not sys.stderr.isatty()
    with tqdm(unit="tensor", desc="looking", disable=quiet) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update()

        report = xray(
            base, tasks, core=_rank(arguments.core), task=_rank(arguments.task), tol=arguments.tol,
            svd=arguments.svd, include=arguments.include, exclude=arguments.exclude,
            device=arguments.device, seed=arguments.seed, progress=progress,
        )  # fmt: skip
    report["base"] = str(arguments.base)
    if arguments.output is not None:
        _write(arguments.output, render(report))
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    elif not arguments.quiet:
        print(summary_line(report))
        for text in report["advice"]["warnings"]:
            print(f"note: {text}")
        print(f"wrote {arguments.output} in {time.perf_counter() - started:.1f} s")
    return 0


def _rank(text: str) -> Rank:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _check_page(path: Path | None, overwrite: bool, numbers: bool) -> None:
    if path is None:
        if not numbers:
            raise CheckpointError("nothing to do: give -o report.html, --json, or both")
        return
    if path.suffix not in (".html", ".htm"):
        raise CheckpointError(f"{path}: the page is HTML, so end its name in .html")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist: create it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} exists: choose another output, or give --overwrite")


def _write(path: Path, text: str) -> None:
    """All or nothing: the page grows in PATH.partial and takes its name at the end."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
