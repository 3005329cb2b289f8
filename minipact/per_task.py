"""One stored object, a model per known task. TSV-Compress keeps the leading singular triples of each task."""

from __future__ import annotations

import torch
from torch import Tensor

from minipact.methods import RNG, Method, Rank, check_stack, leading_triples, register


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


register(Method("tsv_compress", "per_task", tsv_compress, "Gargiulo et al. 2025, arXiv 2412.00081"))
