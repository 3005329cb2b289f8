"""Methods of minipact beside fusion-bench's on the same tensors: how far apart, how long, how much memory.

    PYTHONPATH=data python benchmarks/peers.py      some minutes on 2 cores; needs benchmarks/peers.txt

One block of ViT-S and eight tasks, in memory; both take turns in one process, and their results are compared.
Memory is what a first run takes at its peak, beyond what the process has before (Linux alone tells). Seconds
are on the clock, and the ratio is of neighbours within a round. fusion-bench's own functions are called where
they take tensors; WUDI, which descends by Adam there, has one matrix of the block.
Writes benchmarks/results/peers_<machine>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minipact as mp
from full_scale import block_models
from peak_memory import peak

State = dict[str, Tensor]
Job = Callable[[], State]
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Models:
    """A base, its fine-tuned models and their task vectors; covariances and Fisher information are random."""

    base: State
    tasks: list[State]

    @property
    def vectors(self) -> list[State]:
        return [{name: task[name] - x for name, x in self.base.items()} for task in self.tasks]

    def only(self, name: str) -> Models:
        """One tensor of each model."""
        return Models({name: self.base[name]}, [{name: task[name]} for task in self.tasks])

    def covariances(self) -> list[State]:
        g = torch.Generator().manual_seed(1)

        def drawn(x: Tensor) -> Tensor:
            inputs = torch.randn(2 * x.shape[1], x.shape[1], generator=g)
            return inputs.mT @ inputs / len(inputs)

        return [{name: drawn(x) for name, x in self.base.items()} for _ in self.tasks]

    def fishers(self) -> list[State]:
        g = torch.Generator().manual_seed(2)
        return [
            {name: torch.rand(x.shape, generator=g) for name, x in self.base.items()}
            for _ in self.tasks
        ]


# ---- Pairs: the same work by both -----------------------------------------------------------------


def ours(models: Models, rule: str, **more: Any) -> Job:
    """Merged weights by minipact."""

    def job() -> State:
        torch.set_num_threads(1)
        merged: State = mp.merge(models.base, models.tasks, rule=rule, threads=WORKERS, **more)
        return merged

    return job


def from_vector(models: Models, scale: float, vector: Callable[[], State]) -> Job:
    """Merged weights from a merged task vector."""
    return lambda: {name: models.base[name] + scale * x.detach() for name, x in vector().items()}


def ties(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    sizes = [x.numel() for x in models.base.values()]

    def vector() -> State:
        rows = [torch.cat([x.flatten() for x in v.values()]) for v in models.vectors]
        merged = ties_merging(torch.stack(rows), reset_thresh=20, merge_func="dis-mean")
        parts = zip(models.base.items(), merged.split(sizes), strict=True)
        return {name: part.view_as(x) for (name, x), part in parts}

    return from_vector(models, 1.0, vector), ours(models, "ties", scale=1.0)


def tsv_m(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    svd = TSVM_utils.compute_and_sum_svd_mem_reduction
    theirs = from_vector(models, 1.0, lambda: svd(models.vectors, accelerator="cpu"))
    return theirs, ours(models, "tsv_m", scale=1.0)


def iso_c(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    theirs = from_vector(models, 1.0, lambda: iso_c(models.vectors, accelerator="cpu"))
    return theirs, ours(models, "iso_c", scale=1.0)


def regmean(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    given = models.covariances()
    by_module = [{name.removesuffix(".weight"): C for name, C in own.items()} for own in given]
    weights = {name: [task[name] for task in models.tasks] for name in models.base}
    theirs = lambda: merging_with_regmean_weights(weights, by_module, 0.9)  # noqa: E731
    return theirs, ours(models, "regmean", statistics={"covariance": given})


def fisher_merge(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    given, equal = models.fishers(), torch.ones(len(models.tasks))
    weights = {name: [task[name] for task in models.tasks] for name in models.base}

    def theirs() -> State:
        return merging_with_fisher_weights(
            weights, given, equal, normalize_fisher_weight=False, minimal_fisher_weight=0.0
        )

    return theirs, ours(models, "fisher_merge", statistics={"fisher": given})


def consensus(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    def vector() -> State:
        rows = {
            name: torch.stack([v[name].flatten() for v in models.vectors]) for name in models.base
        }
        merged = {}
        for name, D in rows.items():
            start = models.base[name].flatten()
            masks = generate_task_masks(D, start + D, start, tall_mask_lambda=0.4)
            merged[name] = (D.sum(0) * (masks.sum(0) >= 2)).view_as(models.base[name])
        return merged

    return from_vector(models, 0.3, vector), ours(models, "consensus", scale=0.3)


def emr(models: Models) -> tuple[Job, Job]:
    """The model of the first task; rescaled as fusion-bench does, by the tensors' means."""
    from fusion_bench.method.emr_merging.utils import emr_merge

    def theirs() -> State:
        unified, masks, rescalers = emr_merge(models.vectors)
        return {n: x + unified[n] * masks[n][0] * rescalers[0] for n, x in models.base.items()}

    def own() -> State:
        torch.set_num_threads(1)
        options = {"emr": {"rescale": "tensor_mean"}}
        named = {str(t): task for t, task in enumerate(models.tasks)}
        stored = mp.compress(models.base, named, rule="emr", options=options, threads=WORKERS)
        return dict(stored.model("0"))

    return theirs, own


def tsv_compress(models: Models) -> tuple[Job, Job]:
    """The model of the first task."""
    from fusion_bench.method.task_singular_vector.utils.TSVC_utils import compress_tv

    @dataclass
    class Vector:
        vector: State

    def theirs() -> State:
        named = {str(t): Vector(v) for t, v in enumerate(models.vectors)}
        parts = compress_tv(named, 1 / len(named))["0"]
        return {
            n: x + parts[n]["u"] * parts[n]["s"] @ parts[n]["v"] for n, x in models.base.items()
        }

    def own() -> State:
        torch.set_num_threads(1)
        named = {str(t): task for t, task in enumerate(models.tasks)}
        stored = mp.compress(models.base, named, rule="tsv_compress", threads=WORKERS)
        return dict(stored.model("0"))

    return theirs, own


def wudi(models: Models) -> tuple[Job, Job]:
    from fusion_bench.method.wudi.wudi import wudi_merging

    theirs = from_vector(models, 1.0, lambda: wudi_merging(models.vectors, accelerator="cpu"))
    return theirs, ours(models, "wudi", scale=1.0)


PAIRS = {
    "ties": ties, "tsv_m": tsv_m, "iso_c": iso_c, "regmean": regmean, "fisher_merge": fisher_merge,
    "consensus": consensus, "emr": emr, "tsv_compress": tsv_compress, "wudi": wudi,
}  # fmt: skip


# ---- Comparison -----------------------------------------------------------------------------------


def seconds(job: Job) -> float:
    torch.set_num_threads(WORKERS)
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def wudi_loss(vectors: list[State], merged: State, base: State) -> float:
    """sum_i ||(M - D_i) D_i^T||^2 / ||D_i||^2, which WUDI makes small."""
    pairs = [(merged[n] - base[n] - v[n], v[n]) for v in vectors for n in base]
    return float(sum((X @ D.mT).square().sum() / D.square().sum() for X, D in pairs))


def compared(what: str, models: Models, rounds: int) -> dict[str, Any]:
    """Distance of the results, over the length of the merged update; seconds, ratio and memory of both."""
    theirs, own = PAIRS[what](models)
    memory, results = {}, {}
    for name, job in (("fusion-bench", theirs), ("minipact", own)):
        memory[name] = round(peak(lambda n=name, j=job: results.update({n: j()})))
    base = models.base
    error = sum(
        float((results["minipact"][n] - results["fusion-bench"][n]).norm()) ** 2 for n in base
    )
    length = sum(float((results["fusion-bench"][n] - base[n]).norm()) ** 2 for n in base)
    row: dict[str, Any] = {"distance": float(f"{(error / length) ** 0.5:.2g}"), "megabytes": memory}
    if what == "wudi":
        losses = {name: wudi_loss(models.vectors, x, base) for name, x in results.items()}
        row["loss"] = {name: float(f"{x:.3g}") for name, x in losses.items()}
    times = [(seconds(theirs), seconds(own)) for _ in range(rounds)]
    row["seconds"] = {
        name: [float(f"{x:.3g}") for x in column]
        for name, column in zip(("fusion-bench", "minipact"), zip(*times, strict=True), strict=True)
    }
    ratios = [float(f"{slow / fast:.3g}") for slow, fast in times]
    row["times_faster"] = {"median": statistics.median(ratios), "all": ratios}
    return row


def markdown(results: dict[str, Any]) -> str:
    """The table of README.md."""
    lines = [
        "| method | distance | fusion-bench | minipact | times as fast | memory |",
        "|---|---|---|---|---|---|",
    ]
    for what, row in results["methods"].items():
        slow, fast = (
            f"{statistics.median(row['seconds'][who]):.2f} s"
            for who in ("fusion-bench", "minipact")
        )
        ratios = row["times_faster"]["all"]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        memory = f"{row['megabytes']['fusion-bench']} / {row['megabytes']['minipact']} MB"
        lines.append(
            f"| `{what}` | {row['distance']:.0e} | {slow} | {fast} | {spread} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PAIRS, action="append")
    parser.add_argument(
        "--table", action="store_true", help="print what is recorded, for README.md"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / f"peers_{options.machine}.json"
    results = json.loads(out.read_text()) if out.exists() else {"methods": {}}
    if options.table:
        print(markdown(results))
        return
    results |= {
        "machine": options.machine,
        "torch": torch.__version__.split("+")[0],
        "fusion-bench": version("fusion-bench"),
    }
    block = Models(*block_models(8, width=384))
    for what in options.only or PAIRS:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            models = block.only("blocks.0.out_proj.weight") if what == "wudi" else block
            row = compared(what, models, options.rounds)
        results["methods"][what] = row
        print(what, json.dumps(row), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
