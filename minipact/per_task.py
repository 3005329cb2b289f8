"""A model per known task out of one stored object: TSV-Compress, TALL masks and EMR, on tensors.

Each method turns the task matrices D [T, ...] of a tensor into parts that take less room, and has a function
that makes D of them again. `minipact.stored` does so for whole models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minipact.errors import MergeError, check_known
from minipact.methods import (
    RNG,
    Function,
    Method,
    Rank,
    SurveyPasses,
    check_stack,
    check_tensor,
    leading_triples,
    register,
    ties,
    ties_survey,
)

# ---- TSV-Compress --------------------------------------------------------------------------------


def tsv_compress(
    D: Tensor, *, rank: Rank | None = None, svd: str = "exact", generator: RNG = None
) -> tuple[Tensor, Tensor, Tensor]:
    """TSV-Compress: keep the leading singular triples of each task matrix.

    Args:
        D: [T, m, n] task matrices.
        rank: k, triples per task: count, share or energy as in `pact`; None is min(m, n) // T, at
            least 1, so that all tasks together take about the room of two matrices, whatever T.
        svd, generator: as in `pact`.

    Returns:
        U [T, m, k], S [T, k] descending, V [T, n, k] in D's dtype; where a task has fewer than k
        directions, the rest is zero. Source: Gargiulo et al. 2025, section 3.1 (arXiv 2412.00081).

    Raises:
        MergeError: D is not a finite stack of matrices, or an option is out of range.
    """
    check_stack(D)
    if rank is None:
        rank = max(1, min(D.shape[1:]) // len(D))
    triples = [leading_triples(d, rank, svd, generator) for d in D]
    width = max(len(s) for _, s, _ in triples)
    u, s, v = (
        torch.stack([_padded(x, width) for x in parts]).to(D.dtype)
        for parts in zip(*triples, strict=True)
    )
    return u, s, v


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def tsv_decompress(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Task matrices [T, m, n] out of `tsv_compress`' U [T, m, k], S [T, k], V [T, n, k].

    Source: Gargiulo et al. 2025, section 3.1 (arXiv 2412.00081).
    """
    return (U * S.unsqueeze(-2)) @ V.mT


# ---- TALL masks ----------------------------------------------------------------------------------


def tall(
    D: Tensor,
    lambdas: float | Sequence[float] = 0.4,
    *,
    merged: str = "sum",
    density: float = 0.2,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """TALL masks: one merged task vector, and for each task a mask of the entries that serve it.

    m_t = 1[abs(D_t) > lambda_t abs(M - D_t)] with the merged vector M; a task gets m_t M. Source: Wang
    et al. 2024 (arXiv 2405.07813).

    Args:
        D: [T, ...] task matrices or vectors.
        lambdas: lambda, or one for each task, 0 or more: the larger, the fewer entries serve it. Published
            ones, 0.2 to 0.6, are chosen for each task on validation data; 0.4 for all, which takes none, is
            ours. In `compress`, also task name -> lambda.
        merged: M is the "sum" of the tasks, or what "ties" with reduce="sum" makes of them.
        density, thresholds: of TIES, see there.

    Returns:
        M [...] in D's dtype, and masks [T, ...] of booleans. One task alone comes back whole by its sum.

    Raises:
        MergeError: an option is out of range, or lambdas are not one number or T.
    """
    check_tensor("D", D)
    check_known("tall merged", [merged], ("sum", "ties"))
    floors = _one_each(lambdas, len(D))
    total = D.sum(0) if merged == "sum" else ties(D, density, "sum", thresholds=thresholds)
    masks = torch.empty(D.shape, dtype=torch.bool, device=D.device)
    for d, floor, mask in zip(D, floors, masks, strict=True):  # one by one takes the least memory
        torch.gt(d.abs(), floor * (total - d).abs(), out=mask)
    return total, masks


def _one_each(lambdas: float | Sequence[float], tasks: int) -> Sequence[float]:
    """A lambda for each task."""
    found = [lambdas] * tasks if isinstance(lambdas, int | float) else lambdas
    is_list = isinstance(found, list | tuple) and len(found) == tasks
    if not is_list or not all(isinstance(x, int | float) and 0 <= x < math.inf for x in found):
        hint = f"give one number, 0 or more, or one for each of the {tasks} tasks"
        raise MergeError(f"lambdas={lambdas!r} do not fit: {hint}")
    return found


def tall_decompress(merged: Tensor, masks: Tensor) -> Tensor:
    """What each task gets, [T, ...], out of `tall`'s merged vector [...] and masks [T, ...]."""
    return merged * masks


def tall_survey(
    *, tasks: int, entries: int, merged: str = "sum", density: float = 0.2
) -> SurveyPasses:
    """Survey of TALL masks on a sum by TIES, which trims over the whole model; none on the plain sum."""
    if merged != "ties":
        return {}
    found = yield from ties_survey(tasks=tasks, entries=entries, density=density, reduce="sum")
    return found


# ---- EMR -----------------------------------------------------------------------------------------


def emr(D: Tensor) -> tuple[Tensor, Tensor]:
    """EMR-Merging: elect one vector for all tasks, and mask it for each.

    The sign of an entry is that of the tasks' mean, negative where that is zero, as in the released code;
    its size is the largest among the tasks with this sign. A task's mask holds where it has this sign too.

    D is [T, ...], task matrices or vectors. Returns the unified vector [...] in D's dtype, and masks
    [T, ...] of booleans. A task's rescaler, which brings what its mask leaves to its own length, is of the
    whole model, see `emr_survey`. Source: Huang et al. 2024 (arXiv 2405.17461).
    """
    check_tensor("D", D)
    sign = torch.where(D.mean(0) > 0, 1, -1).to(D.dtype)
    unified = torch.zeros_like(D[0])
    for d in D:
        unified = torch.maximum(unified, sign * d)
    unified = unified * sign
    masks = torch.empty(D.shape, dtype=torch.bool, device=D.device)
    for d, mask in zip(D, masks, strict=True):
        torch.gt(d * unified, 0, out=mask)
    return unified, masks


def emr_decompress(unified: Tensor, masks: Tensor, rescalers: Tensor) -> Tensor:
    """What each task gets, [T, ...], out of `emr`'s vector [...], masks [T, ...] and rescalers [T]."""
    return unified * masks * rescalers.to(unified).view(-1, *[1] * unified.ndim)


def emr_survey(*, tasks: int, entries: int, rescale: str = "global") -> SurveyPasses:
    """Survey of EMR: {"rescalers": [T] in float64}, what brings each task's masked vector to its length.

    rescale="global" is the ratio of the sums of magnitudes over the whole model, as in the paper and in the
    released script for 30 models; "tensor_mean" that of the sums of each tensor's mean, as in the released
    code for CLIP, where small tensors count as much as large ones. 1 where nothing is left of a task.
    """
    check_known("emr rescale", [rescale], ("global", "tensor_mean"))
    lengths = yield partial(_lengths, mean=rescale == "tensor_mean")
    own, left = lengths.view(2, tasks)
    return {"rescalers": torch.where(left > 0, own / left, 1.0)}


def _lengths(D: Tensor, mean: bool) -> Tensor:
    """Sums, or means, of |D| and of what EMR's masks leave of the unified vector: [2 T] in float64."""
    unified, masks = emr(D)
    size = unified.abs()
    own = [d.abs().sum(dtype=torch.float64) for d in D]
    left = [(size * mask).sum(dtype=torch.float64) for mask in masks]
    found = torch.stack([*own, *left])
    return found / max(1, size.numel()) if mean else found


# ---- How parts are stored ------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """What a method's function returns, and the way back.

    Attributes:
        common: names of the tensors it returns first, which all tasks have in common.
        own: names of those after, with an axis of tasks in front.
        decompress: takes all of them by name, and of what the method's survey found those for which it has
            a parameter; returns D [T, ...].
    """

    common: tuple[str, ...]
    own: tuple[str, ...]
    decompress: Function


STORAGE = {
    "tsv_compress": Storage((), ("U", "S", "V"), tsv_decompress),
    "tall": Storage(("merged",), ("masks",), tall_decompress),
    "emr": Storage(("unified",), ("masks",), emr_decompress),
}

_TSV, _TALL, _EMR = (
    "Gargiulo et al. 2025, arXiv 2412.00081",
    "Wang et al. 2024, arXiv 2405.07813",
    "Huang et al. 2024, arXiv 2405.17461",
)
register(Method("tsv_compress", "per_task", tsv_compress, _TSV, needs=("generator",)))
register(
    Method("tall", "per_task", tall, _TALL, "entries", needs=("thresholds",), survey=tall_survey)
)
register(Method("emr", "per_task", emr, _EMR, "entries", needs=("rescalers",), survey=emr_survey))
