"""X-ray of fine-tuned checkpoints: measures of their weights alone, in numbers and as a page.

    report = xray(base, tasks)                     # measures, weight by weight; JSON-ready, keys below
    write_page(Path("r.html"), render(report))     # the same numbers as one HTML page, see xray_page.py
    minipact xray BASE TASK... -o report.html [--json]

It measures and gives no advice: nothing here has been shown to tell which merge is best.

Keys of the report. Shares lie in [0, 1]; lists follow the order of `tasks`; None stands for undefined.

    tasks, settings, warnings [text], skipped [{name, why}], counts {matrices, vectors, copied}
    summary {enrichment, cosine, sign_conflict, removed, filtered, shield} means over tasks or pairs
    per_task {name: {
        norm, norm_ratio     length of the task vector, and relative to the base's weights
        matrix_share         share of its squared length in the matrices measured
        intrusion            share of it in the pre-trained core; core_chance is K / n, enrichment their ratio
        removed              share that PACT would remove; shield_chance is the shield's width p / n
        filtered             share that `wiener` would remove; None unless it was asked for
        suffers, inflicts    mean hidden interference as victim and as interferer
        half                 median share of directions that hold half of its energy in a matrix
    }}
    pairs {cosine, sign_conflict, sign_conflict_large, wall_similarity, hidden_interference: {
        values [T][T], mean over pairs, chance}}; rows of hidden_interference interfere, columns suffer
    layers [{name, shape [m, n], core K, task [T] k_t, energy [T], intrusion [T], core_chance, enrichment,
        shield [T] p_t, shield_chance, removed [T], filtered [T], sti, sti_ratio to random directions,
        sign_conflict, core_half, task_half [T] counts of directions that hold half of the energy}]
    groups [{pattern, layers, enrichment, shield, removed, core_half, task_half}], one per kind of layer

The command line adds base, given and entry: the paths of base and tasks as they were given, and --entry.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from operator import mul
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipact.diagnostics import interferences, similarities, triples_interference
from minipact.errors import CheckpointError, MergeError, check_known
from minipact.merging import Merged, Progress
from minipact.methods import (
    RNG,
    Rank,
    Walls,
    direction_count,
    is_zero,
    leading_triples,
    named_generator,
    walls_between,
    wiener,
)
from minipact.recipe import Globs
from minipact.steps import Step, Tasks
from minipact.tensors import Device, State, task_matrices
from minipact.version import __version__

SKETCH = 1 / 8  # share of min(m, n) that a sketch spans at least, so that `half` can be told
HALF = (torch.float16, torch.bfloat16)
ROUNDED = "The base is stored in half precision: small updates may carry its rounding, which looks random."
Report = dict[str, Any]


@torch.no_grad()
def xray(
    base: State,
    tasks: Tasks,
    *,
    core: Rank = 0.05,
    task: Rank = 0.04,
    tol: float = 1e-3,
    svd: str = "exact",
    wiener: bool = False,
    include: Globs = None,
    exclude: Globs = None,
    device: Device = "cpu",
    seed: int = 0,
    progress: Progress = None,
) -> Report:
    """Measure fine-tuned models against their base, from the weights alone.

    Args:
        base, tasks, include, exclude, device, seed, progress: as in `merge`.
        core, task, tol, svd: as in `pact`; counts beyond a matrix' min(m, n) are cut to it.
        wiener: measure also what the purifier `wiener` would remove, at its defaults; less than 0 where
            an update gets longer. Takes exact decompositions of T matrices [m, m] and [n, n] a weight.

    Returns:
        Dictionaries, lists and numbers only, see the docstring of the module. Matrices are
        measured by subspace, vectors and stacks of matrices count in norms, cosines and signs. One weight
        is in memory at a time.

    Raises:
        MergeError: the inputs do not fit together, hold NaN, hold no matrix that a task changed, a task
            equals the base, or an option is out of range.
    """
    merged = Merged(base, tasks, include=include, exclude=exclude, device=device)
    kept = {name: list(getattr(merged.recipe, name)) for name in ("include", "exclude")}
    given = {"core": core, "task": task, "tol": tol, "svd": svd, "wiener": wiener, "seed": seed}
    settings = {**given, **kept}
    steps = {step.name: step for step in merged.steps.values() if step.kind != "copy"}
    _check(settings, steps.values())
    looks = []
    for found in merged.map(lambda name: _look(merged, steps[name], settings), steps):
        looks.append(found)
        if progress is not None:
            progress(len(looks), len(steps), found.name)
    if all(found.layer is None for found in looks):
        raise MergeError("no matrix to look into: see include and exclude")
    report: Report = _clean({
        "minipact": __version__,
        "tasks": list(merged.tasks),
        "settings": settings,
        "warnings": [ROUNDED] if any(step.dtype in HALF for step in steps.values()) else [],
        "skipped": [{"name": found.name, "why": found.why} for found in looks if found.why],
        "counts": {
            "matrices": sum(found.layer is not None for found in looks),
            "vectors": sum(not step.kind.startswith("matrix") for step in steps.values()),
            "copied": len(merged.steps) - len(steps),
        },
        **_summed_up(list(merged.tasks), looks),
    })  # fmt: skip
    return report


def _check(settings: Report, steps: Collection[Step]) -> None:
    """Raise MergeError for all that can be known before the long work."""
    sizes = [min(step.shape) for step in steps if step.kind.startswith("matrix")]
    if not sizes:
        raise MergeError("no matrix to look into: see include and exclude")
    check_known("svd", [settings["svd"]], ("exact", "randomized"))
    if not 0 <= settings["tol"] < 1:
        raise MergeError(f"tol={settings['tol']} must satisfy 0 <= tol < 1")
    for option in ("core", "task"):
        if settings[option] == 0:
            raise MergeError(f"{option}=0 leaves nothing to measure: give 1 or more")
        spectrum = torch.ones(max(sizes)) if settings["svd"] == "exact" else None
        direction_count(settings[option], max(sizes), spectrum)


# ---- One weight ----------------------------------------------------------------------------------


class _Look(NamedTuple):
    """What one tensor tells."""

    name: str
    pairs: Tensor  # [5, T, T] of `_pair_sums`
    base_energy: float  # sum of squares of the base's entries
    why: str = ""  # reason to leave it out of the layers
    layer: Report | None = None  # its entry in the report
    tables: dict[str, Tensor] | None = (
        None  # measures of pairs [T, T], and what chance gives for them
    )


def _look(merged: Merged, step: Step, settings: Report) -> _Look:
    name = step.name
    D = task_matrices(name, merged.base, merged.tasks, device=merged.device)
    W0 = merged.base[name].to(D)
    pairs, base_energy = _pair_sums(D), float(W0.double().square().sum())
    if not step.kind.startswith("matrix"):
        return _Look(name, pairs, base_energy)
    if is_zero(W0):
        return _Look(name, pairs, base_energy, "it is zero in the base, so it has no core")
    if is_zero(D):
        return _Look(name, pairs, base_energy, "no task changed it")
    if step.kind == "matrix_T":
        W0, D = W0.mT, D.mT
    layer, tables = _layer(name, W0, D, settings)
    layer["sign_conflict"] = _off_diagonal_mean(_conflicts(pairs[1:3]))
    return _Look(name, pairs, base_energy, "", layer, tables)


def _pair_sums(D: Tensor) -> Tensor:
    """[5, T, T] over all entries of D [T, ...]: inner products; signs that agree minus those that
    differ, and how many entries both tasks changed; these two again among each task's largest fifth."""
    flat = D.reshape(len(D), D[0].numel())  # scalars too
    if not flat.numel():
        return torch.zeros(5, len(D), len(D), dtype=torch.float64)
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


def _layer(name: str, W0: Tensor, D: Tensor, settings: Report) -> tuple[Report, dict[str, Tensor]]:
    """All measures of one weight, W0 [m, n] and D [T, m, n]: of tasks, and of pairs of tasks."""
    generator = named_generator(settings["seed"], name)
    svd, tol, n = settings["svd"], settings["tol"], W0.shape[1]
    core = _directions(W0, settings["core"], svd, generator)
    tasks = [_directions(d, settings["task"], svd, generator) for d in D]
    walls = walls_between(core.v, [task.v for task in tasks], tol)
    shares = _shares(D, walls)
    sti, by_chance = _task_interference(tasks)
    chance = core.v.shape[1] / n
    layer = {
        "name": name,
        "shape": list(W0.shape),
        "core": core.v.shape[1],
        "task": [task.v.shape[1] for task in tasks],
        **shares,
        "filtered": _filtered(D) if settings["wiener"] else [math.nan] * len(D),
        "core_chance": chance,
        "enrichment": _mean(shares["intrusion"]) / chance,
        "shield_chance": mean(shares["shield"]) / n,
        "sti": sti,
        "sti_ratio": _ratio(sti, by_chance),
        "core_half": core.half,
        "task_half": [task.half for task in tasks],
    }
    tables = {
        "wall_similarity": similarities(walls),
        "wall_chance": _similarity_by_chance(core.v, tasks[0].v.shape[1], tol, generator),
        "hidden_interference": interferences(walls),
        "hidden_chance": torch.tensor(mean(b.shape[1] for b in walls.bases) / n).double(),
    }
    return layer, tables


class _Directions(NamedTuple):
    """Leading singular triples, and how many directions hold half of the energy."""

    u: Tensor
    s: Tensor
    v: Tensor
    half: int | None


def _directions(x: Tensor, rank: Rank, svd: str, generator: RNG) -> _Directions:
    """Those of x [m, n] as `rank` says; `half` is None where a sketch ended before."""
    size = min(x.shape)
    if isinstance(rank, int):
        rank = min(rank, size)
    wanted = size
    if svd == "randomized":
        wanted = max(direction_count(rank, size), int(SKETCH * size), 1)
    u, s, v = leading_triples(x, wanted, svd, generator)
    k = min(len(s), direction_count(rank, size, s))
    below = s.square().cumsum(0) < x.double().square().sum() / 2
    half = None if below.all() else int(below.sum()) + 1
    return _Directions(u[:, :k].clone(), s[:k].clone(), v[:, :k].clone(), half)


def _shares(D: Tensor, walls: Walls) -> dict[str, list[float]]:
    """Energy of each task, its shares in the core and in what PACT would remove, width of its shield."""
    found: dict[str, list[float]] = {"energy": [], "intrusion": [], "removed": [], "shield": []}
    for j, d in enumerate(D.double()):
        energy, part, shield = float(d.square().sum()), d @ walls.frame, walls.union(j)
        found["energy"].append(energy)
        found["intrusion"].append(_ratio(float((part @ walls.core).square().sum()), energy))
        found["removed"].append(_ratio(float((part @ shield).square().sum()), energy))
        found["shield"].append(shield.shape[1])
    return found


def _filtered(D: Tensor) -> list[float]:
    """Share of each task's energy that `wiener` would remove; NaN where there is none."""
    before, after = (x.double().square().sum((1, 2)) for x in (D, wiener(D)))
    return (1 - after / before).tolist()


def _similarity_by_chance(v0: Tensor, rank: int, tol: float, generator: RNG) -> Tensor:
    """Similarity of the walls of two tasks whose updates are random."""
    draws = [torch.randn(v0.shape[0], rank, generator=generator) for _ in range(2)]
    updates = [torch.linalg.qr(x.to(v0)).Q for x in draws]
    return similarities(walls_between(v0, updates, tol))[0, 1]


def _task_interference(tasks: Sequence[_Directions]) -> tuple[float, float]:
    """Singular task interference of leading triples, and what random directions would give.

    The latter by the central limit: an inner product of random directions in m dimensions has
    variance 1 / m, and the mean magnitude of a Gaussian is sqrt(2 / pi) times its deviation.
    """
    u, v = torch.cat([t.u for t in tasks], 1), torch.cat([t.v for t in tasks], 1)
    value = triples_interference(u, torch.cat([t.s for t in tasks]), v).abs().sum()
    energies = torch.stack([t.s.square().sum() for t in tasks])
    counts = torch.tensor([len(t.s) for t in tasks]).to(energies)
    rest = energies.sum() - energies[:, None] - energies + energies.diag()
    pairs = (counts[:, None] * counts * rest.clamp(min=0).sqrt()).sum()
    return float(value), float(pairs) * math.sqrt(2 / math.pi / u.shape[0] / v.shape[0])


# ---- All weights ---------------------------------------------------------------------------------


def _summed_up(names: Sequence[str], looks: Sequence[_Look]) -> Report:
    """What all tensors together say, as the parts of the report."""
    layers = [found.layer for found in looks if found.layer is not None]
    sums = torch.stack([found.pairs for found in looks]).sum(0)
    pairs = _pairs(sums, [found.tables for found in looks if found.tables is not None])
    base_norm = math.sqrt(math.fsum(found.base_energy for found in looks))
    per_task = {
        name: _task(t, layers, sums[0, t, t].item(), base_norm, pairs["hidden_interference"])
        for t, name in enumerate(names)
    }
    summary = {
        "enrichment": _mean(row["enrichment"] for row in per_task.values()),
        "removed": _mean(row["removed"] for row in per_task.values()),
        "filtered": _mean(row["filtered"] for row in per_task.values()),
        "shield": _mean(row["shield_chance"] for row in per_task.values()),
        "cosine": pairs["cosine"]["mean"],
        "sign_conflict": pairs["sign_conflict"]["mean"],
    }
    parts = {"summary": summary, "per_task": per_task, "pairs": pairs, "layers": layers}
    return parts | {"groups": _groups(layers)}


def _pairs(sums: Tensor, tables: Sequence[dict[str, Tensor]]) -> Report:
    """Measures of pairs of tasks: over all entries, or as the mean of all matrices."""
    average = {key: torch.stack([t[key] for t in tables]).nanmean(0) for key in tables[0]}
    norms = sums[0].diag().sqrt()
    found = {
        "cosine": (sums[0] / norms / norms[:, None], 0.0),
        "sign_conflict": (_conflicts(sums[1:3]), 0.5),
        "sign_conflict_large": (_conflicts(sums[3:5]), 0.5),
        "wall_similarity": (average["wall_similarity"], float(average["wall_chance"])),
        "hidden_interference": (average["hidden_interference"], float(average["hidden_chance"])),
    }
    return {
        key: {"values": x.tolist(), "mean": _off_diagonal_mean(x), "chance": chance}
        for key, (x, chance) in found.items()
    }


def _task(
    t: int, layers: Sequence[Report], energy: float, base_norm: float, hidden: Report
) -> Report:
    """A task's row: its matrices together, each weighted by its energy there."""
    rows = [layer for layer in layers if layer["energy"][t]]
    weights = [row["energy"][t] for row in rows]

    def average(values: Iterable[float]) -> float:
        return _ratio(math.fsum(map(mul, weights, values)), math.fsum(weights))

    intrusion = average(row["intrusion"][t] for row in rows)
    chance = average(row["core_chance"] for row in rows)
    others = [i for i in range(len(hidden["values"])) if i != t]
    return {
        "norm": math.sqrt(energy),
        "norm_ratio": _ratio(math.sqrt(energy), base_norm),
        "matrix_share": math.fsum(weights) / energy,
        "intrusion": intrusion,
        "core_chance": chance,
        "enrichment": intrusion / chance,
        "removed": average(row["removed"][t] for row in rows),
        "filtered": average(row["filtered"][t] for row in rows),
        "shield_chance": average(row["shield"][t] / row["shape"][1] for row in rows),
        "suffers": _mean(hidden["values"][i][t] for i in others),
        "inflicts": _mean(hidden["values"][t][i] for i in others),
        "half": median(_fraction(layer, layer["task_half"][t]) for layer in layers),
    }


def _groups(layers: Sequence[Report]) -> list[Report]:
    """Layers of one kind together: names that differ in their number only, written as a glob."""
    kinds: dict[str, list[Report]] = {}
    for layer in layers:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer["name"])
        kinds.setdefault(pattern, []).append(layer)
    return [_group(pattern, rows) for pattern, rows in kinds.items()]


def _group(pattern: str, rows: Sequence[Report]) -> Report:
    return {
        "pattern": pattern,
        "layers": len(rows),
        "enrichment": _mean(row["enrichment"] for row in rows),
        "shield": max(max(row["shield"]) / row["shape"][1] for row in rows),
        "removed": _mean(x for row in rows for x in row["removed"]),
        "core_half": median(_fraction(row, row["core_half"]) for row in rows),
        "task_half": median(_fraction(row, x) for row in rows for x in row["task_half"]),
    }


# ---- Numbers -------------------------------------------------------------------------------------


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _fraction(layer: Report, count: int | None) -> float:
    """A count of directions as a share of min(m, n); infinite where a sketch ended before."""
    return math.inf if count is None else count / min(layer["shape"])


def _off_diagonal_mean(x: Tensor) -> float:
    return _mean(x[~torch.eye(len(x), dtype=torch.bool)].tolist())


def _mean(values: Iterable[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return mean(known) if known else math.nan


def _clean(value: Any) -> Any:
    """NaN and infinity become None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _clean(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_clean(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- The page as a file --------------------------------------------------------------------------


def check_page(path: Path, overwrite: bool = False) -> None:
    """Raise CheckpointError unless a page can be written there."""
    if path.suffix not in (".html", ".htm"):
        raise CheckpointError(f"{path}: the page is HTML, so end its name in .html")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist: create it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} exists: choose another output, or give --overwrite")


def write_page(path: Path, text: str) -> None:
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
