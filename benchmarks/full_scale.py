"""Whole merges at real sizes: minipact, its methods as bare equations (minipact/plain.py), other packages.

    python benchmarks/full_scale.py                 all parts but llm, a quarter of an hour on 2 cores
    python benchmarks/full_scale.py --only disk     one part: blocks, stages, growth, whole, disk, llm

The part llm takes half an hour and up to 62 GB of disk.

Everything is compared on the same files or tensors, in one run, taking turns; medians and ratios go to
benchmarks/results/full_scale_<machine>.json. mergekit takes part where it is installed; fusion-bench has a
benchmark of its own, peers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minipact as mp
from minipact import plain
from vit_b32 import FLOOR, measure, run

BLOCK = {"in_proj": (2304, 768), "out_proj": (768, 768), "c_fc": (3072, 768), "c_proj": (768, 3072)}
RANKS = {"core": 38, "task": 32}
SVDS = ("exact", "randomized")
State = dict[str, Tensor]


# ---- Weights of real shapes ----------------------------------------------------------------------


def decaying(shape: tuple[int, int], norm: float, g: torch.Generator) -> Tensor:
    """Random matrix whose singular values fall like those of trained weights, with a given norm."""
    m, n = shape
    columns = torch.arange(1, n + 1).float().rsqrt()
    x = torch.randn(m, n, generator=g) * columns[torch.randperm(n, generator=g)]
    return x * (norm / x.norm())


def block_shapes(width: int, layers: int) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices of some transformer blocks, by name."""
    return {
        f"blocks.{i}.{name}.weight": (m * width // 768, n * width // 768)
        for i in range(layers)
        for name, (m, n) in BLOCK.items()
    }


def block_models(tasks: int, width: int = 768, layers: int = 1) -> tuple[State, list[State]]:
    """Base and fine-tuned models with the matrices of some transformer blocks, float32."""
    g = torch.Generator().manual_seed(0)
    base = {name: decaying(x, 30.0, g) for name, x in block_shapes(width, layers).items()}
    tuned = [
        {name: x + decaying(tuple(x.shape), 1.0, g) for name, x in base.items()}
        for _ in range(tasks)
    ]
    return base, tuned


# ---- PACT + TSV-M over a model -------------------------------------------------------------------


def plain_merge(base: State, tasks: list[State]) -> State:
    """By the equations, with full SVDs."""
    merged: State = plain.merge(
        base, tasks, rule="tsv_m", purify=["pact"], scale=1.0, options={"pact": RANKS}
    )
    return merged


def repeating_merge(base: State, tasks: list[State]) -> State:
    """The same in the structure of the released code, which factorises W0 again for every task."""
    for W0 in base.values():
        for _ in tasks[1:]:
            plain.svd(W0, plain.roundoff(W0), RANKS["core"])
    return plain_merge(base, tasks)


def our_merge(base: State, tasks: list[State], svd: str, workers: int) -> State:
    """By minipact, one tensor a thread."""
    options: dict[str, dict[str, Any]] = {"pact": {**RANKS, "svd": svd}, "tsv_m": {"svd": svd}}
    torch.set_num_threads(1)
    return mp.merge(
        base, tasks, rule="tsv_m", purify="pact", options=options, scale=1.0, threads=workers
    )


# ---- Timing --------------------------------------------------------------------------------------


def take_turns(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run all jobs in turn, `rounds` times; seconds of each, and their median."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            torch.set_num_threads(os.cpu_count() or 1)
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                job()
            seconds[name].append(time.perf_counter() - started)
            print(f"  {name}: {seconds[name][-1]:.2f} s", flush=True)
    return {
        name: {"seconds": [round(x, 3) for x in xs], "median": round(statistics.median(xs), 3)}
        for name, xs in seconds.items()
    }


def against(results: dict[str, dict[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Add to every job how many times longer the reference took."""
    slow = results[reference]["median"]
    return {
        name: row | {"times_faster": round(slow / row["median"], 2)}
        for name, row in results.items()
    }


# ---- Parts ---------------------------------------------------------------------------------------


def blocks(rounds: int) -> dict[str, Any]:
    """PACT + TSV-M on the four matrices of one ViT-B block, eight tasks."""
    base, tasks = block_models(8)
    workers = os.cpu_count() or 1
    exact, expected = our_merge(base, tasks, "exact", workers), plain_merge(base, tasks)
    change = {name: (expected[name] - base[name]).norm() for name in base}
    distance = max(float((exact[n] - expected[n]).norm() / change[n]) for n in base)
    jobs: dict[str, Callable[[], Any]] = {
        "plain, full SVDs": lambda: plain_merge(base, tasks),
        "plain, W0 again for every task": lambda: repeating_merge(base, tasks),
        "minipact exact": lambda: our_merge(base, tasks, "exact", workers),
        "minipact randomized": lambda: our_merge(base, tasks, "randomized", workers),
    }
    found = against(take_turns(jobs, rounds), "plain, full SVDs")
    return {"jobs": found, "largest_relative_distance_exact_to_plain": round(distance, 6)}


class Clock(TorchDispatchMode):
    """CPU seconds and number of factorisations, and CPU seconds of everything else."""

    FACTORISATIONS = ("linalg_eigh", "linalg_svd", "linalg_qr")
    PRODUCTS = ("mm", "addmm", "bmm")

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.seconds = {"factorisations": 0.0, "products": 0.0, "the rest": 0.0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        spent = time.process_time() - started
        name = func.__name__.split(".")[0].removeprefix("_")
        if name in self.FACTORISATIONS:
            self.count[name] = self.count.get(name, 0) + 1
            self.seconds["factorisations"] += spent
        else:
            self.seconds["products" if name in self.PRODUCTS else "the rest"] += spent
        return result


def factorisations(m: int, n: int, repeats: int) -> dict[str, float]:
    """CPU seconds for the singular vectors of an [m, n] matrix, m >= n; the least of some repeats."""
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    wide = A.double()
    routes: dict[str, Callable[[], Any]] = {
        "SVD, float32": lambda: torch.linalg.svd(A, full_matrices=False),
        "SVD, float64": lambda: torch.linalg.svd(wide, full_matrices=False),
        "Gram matrix, float64": lambda: torch.linalg.eigh(wide.mT @ wide),
    }
    found = {}
    for name, route in routes.items():
        seconds = []
        for _ in range(repeats):
            started = time.process_time()
            route()
            seconds.append(time.process_time() - started)
        found[name] = float(f"{min(seconds):.3g}")
    return found


def stages(rounds: int, tasks: int = 8) -> dict[str, Any]:
    """One square matrix of ViT-B on one thread: CPU seconds of each stage, and what they are spent on."""
    g = torch.Generator().manual_seed(0)
    W0 = decaying((768, 768), 30.0, g)
    tuned = [W0 + decaying((768, 768), 1.0, g) for _ in range(tasks)]
    D = torch.stack([W - W0 for W in tuned])
    filtered = {svd: mp.pact(W0, D, **RANKS, svd=svd, generator=g) for svd in SVDS}
    merged = mp.tsv_m(D)
    jobs: dict[str, Callable[[], Tensor]] = {
        "subtract": lambda: torch.stack([W - W0 for W in tuned])
    }
    for s in SVDS:
        jobs[f"PACT, {s}"] = lambda s=s: mp.pact(W0, D, **RANKS, svd=s, generator=g)
        jobs[f"TSV-M, {s}"] = lambda s=s: mp.tsv_m(filtered[s], svd=s, generator=g)
    jobs["add"] = lambda: torch.add(W0, merged, alpha=1.0)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        clocks = []
        for _ in range(max(2, rounds)):
            with Clock() as clock:
                job()
            clocks.append(clock)
        best = min(clocks, key=lambda c: sum(c.seconds.values()))
        spent = {what: float(f"{x:.3g}") for what, x in best.seconds.items()}
        found[name] = {"cpu_seconds": spent, "factorisations": best.count}
        print(f"  {name}: {found[name]}", flush=True)
    shapes = {name: (max(mn), min(mn)) for name, mn in BLOCK.items() if name != "c_proj"}
    alone = {f"{m} x {n}": factorisations(m, n, max(2, rounds)) for m, n in shapes.values()}
    return {"shape": [768, 768], "tasks": tasks, "jobs": found, "one_matrix": alone}


def growth(rounds: int) -> dict[str, Any]:
    """How the time of PACT + TSV-M grows with tasks, width and depth."""
    workers = os.cpu_count() or 1
    grid = {"tasks": [2, 4, 8, 14, 20], "width": [384, 768, 1024], "layers": [1, 2, 4]}
    found: dict[str, Any] = {}
    for axis, values in grid.items():
        for value in values:
            setting = {"tasks": 8, "width": 384, "layers": 1} | {axis: value}
            base, tasks = block_models(**setting)
            for svd in SVDS:
                jobs = {svd: lambda b=base, t=tasks, s=svd: our_merge(b, t, s, workers)}
                row = take_turns(jobs, min(rounds, 2))[svd]
                found.setdefault(axis, []).append(
                    {axis: value, "svd": svd, "seconds": row["median"]}
                )
    return found


def llama_folder(folder: Path, layers: int, change: int, width: int = 2048) -> None:
    """Hugging Face folder in the layout of a Llama model, bfloat16, weights made on the spot."""
    folder.mkdir()
    hidden, vocabulary = 4 * width, 32_000
    g = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(change)
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (hidden, width) for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{at}.{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g) * 0.02
        x += torch.randn(shape, generator=noise) * 0.001 if change else 0
        weights[name] = x.bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": vocabulary, "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


FLUSH = """
import os
with open(output, "rb+") as copy:
    os.fsync(copy.fileno())
"""

READ = """
import sys
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        while file.read(1 << 22):
            pass
"""

UNHASHED = """
import sys
from minipact import job
from minipact.__main__ import main
job.sha256 = lambda *_: "0" * 64
sys.exit(main())
"""

MERGEKIT = """merge_method: task_arithmetic
base_model: {base}
models:
{models}
dtype: bfloat16
parameters:
  normalize: false
"""


def disk(rounds: int, layers: int = 6) -> dict[str, Any]:
    """Task arithmetic of three language models from disk to disk, against copying the bytes, and mergekit."""
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        paths = [folder / f"model{i}" for i in range(4)]
        for i, path in enumerate(paths):
            llama_folder(path, layers, change=i)
        inputs, out, copy = [str(path) for path in paths], str(folder / "out"), str(folder / "copy")
        weights = [f"{path}/model.safetensors" for path in inputs]
        merge = ["merge", *inputs, "-o", out, "--scale", "0.3", "--overwrite", "--quiet"]
        jobs = {
            "read the inputs, write one": [sys.executable, "-c", FLOOR, *weights, copy],
            "the same, flushed to the disk": [sys.executable, "-c", FLOOR + FLUSH, *weights, copy],
            "import torch and minipact": [sys.executable, "-c", "import torch, minipact.job"],
            "minipact without checksums": [sys.executable, "-c", UNHASHED, *merge],
            "minipact": [sys.executable, "-m", "minipact", *merge],
        }
        mergekit = Path(sys.executable).with_name("mergekit-yaml")
        if mergekit.exists():
            models = "\n".join(
                f"  - model: {p}\n    parameters: {{weight: 0.3}}" for p in inputs[1:]
            )
            (folder / "m.yml").write_text(MERGEKIT.format(base=inputs[0], models=models))
            plain = [str(folder / "m.yml"), str(folder / "kit"), "--no-copy-tokenizer"]
            jobs["import mergekit"] = [sys.executable, "-c", "import mergekit.scripts.run_yaml"]
            jobs["mergekit"] = [str(mergekit), *plain]
        for _ in range(rounds):
            # All jobs find the inputs in the page cache.
            run([sys.executable, "-c", READ, *weights])
            for job, command in jobs.items():
                shutil.rmtree(folder / "kit", ignore_errors=True)
                if hasattr(
                    os, "sync"
                ):  # what earlier jobs left to be written is not this one's work
                    os.sync()
                found.setdefault(job, []).append(run(command))
                print(f"  {job}: {found[job][-1]}", flush=True)
        size = (paths[0] / "model.safetensors").stat().st_size
    rows = {
        job: {
            "seconds": [round(r["seconds"], 2) for r in runs],
            "median": round(statistics.median(r["seconds"] for r in runs), 2),
            "anonymous_mb": round(max(r["anonymous_mb"] for r in runs)),
        }
        for job, runs in found.items()
    }
    floor = rows["read the inputs, write one"]["median"]
    for row in rows.values():
        row["over_floor"] = round(row["median"] / floor, 2)
    return {"bytes_of_one_model": size, "tasks": 3, "jobs": rows}


class Llama7B(Mapping[str, Tensor]):
    """A model of Llama 2's 7-billion layout in bfloat16, made tensor by tensor; task 0 is the base.

    Layers hold the same numbers, each moved on by a row, since making seven billion takes too long.
    """

    def __init__(self, layers: int, task: int, width: int = 4096, hidden: int = 11_008) -> None:
        block = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"}
        block |= {f"mlp.{p}_proj": (hidden, width) for p in ("gate", "up")}
        block |= {"mlp.down_proj": (width, hidden)}
        norms = ("input_layernorm", "post_attention_layernorm")
        ends = {"model.embed_tokens": (32_000, width), "lm_head": (32_000, width)}
        self.shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (width,)}
        self.shapes |= {f"{name}.weight": shape for name, shape in ends.items()}
        for i in range(layers):
            at = f"model.layers.{i}"
            self.shapes |= {f"{at}.{name}.weight": shape for name, shape in block.items()}
            self.shapes |= {f"{at}.{name}.weight": (width,) for name in norms}
        self.drawn = {shape: self.draw(shape, task) for shape in set(self.shapes.values())}

    def draw(self, shape: tuple[int, ...], task: int) -> Tensor:
        seed = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(shape, generator=seed).mul_(0.02)
        if task:
            x += torch.randn(shape, generator=seed.manual_seed(task)).mul_(0.001)
        return x.bfloat16()

    def meta(self, name: str) -> Tensor:
        return self.drawn[self.shapes[name]].to("meta")

    def __getitem__(self, name: str) -> Tensor:
        return self.drawn[self.shapes[name]].roll(zlib.crc32(name.encode()) % 100, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def llm(_rounds: int) -> dict[str, Any]:
    """Two fine-tuned models of a 7-billion layout merged from shards to shards, once, in bounded memory."""
    here = Path.cwd()
    layers = min(32, int((shutil.disk_usage(here).free - 8e9) / 4 / 405e6))  # bytes of a layer
    if layers < 1:
        raise SystemExit("the part llm needs at least 10 GB of disk, and 62 GB for all layers")
    sketch = ["--purify", "pact", "--set", "pact.svd=randomized"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=here) as name:
        folder = Path(name)
        paths = [folder / f"model{task}" for task in range(3)]
        for task, path in enumerate(paths):
            mp.save_checkpoint(path, Llama7B(layers, task), max_shard_size="2GB")
        inputs, out = [str(path) for path in paths], str(folder / "out")
        merge = ["-m", "minipact", "merge", *inputs, "-o", out, "--scale", "0.3"]
        merge += ["--overwrite", "--quiet"]
        shards = [str(file) for path in paths for file in sorted(path.glob("*.safetensors"))]
        numbers = sum(
            math.prod(mp.open_checkpoint(paths[0]).meta(n).shape) for n in Llama7B(layers, 0)
        )
        jobs = {
            "read the inputs": ["-c", READ, *shards],
            "task arithmetic": merge,
            "PACT randomized + task arithmetic": [*merge, *sketch],
        }
        for job, arguments in jobs.items():
            shutil.rmtree(out, ignore_errors=True)
            found[job] = {k: round(x, 1) for k, x in run([sys.executable, *arguments]).items()}
            print(f"  {job}: {found[job]}", flush=True)
        size = sum(Path(shard).stat().st_size for shard in shards) // 3
    return {"layers": layers, "parameters": numbers, "bytes_of_one_model": size, "tasks": 2,
            "largest_tensor": [32_000, 4096], "jobs": found}  # fmt: skip


def whole(rounds: int) -> dict[str, Any]:
    """A whole ViT-B/32 image tower from files to file."""
    return measure(rounds)


PARTS = {
    "blocks": blocks,
    "stages": stages,
    "growth": growth,
    "whole": whole,
    "disk": disk,
    "llm": llm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--machine", default=f"{platform.machine()}_{os.cpu_count()}cores")
    arguments = parser.parse_args()
    out = Path(__file__).parent / "results" / f"full_scale_{arguments.machine}.json"
    out.parent.mkdir(exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    results |= {"machine": arguments.machine, "torch": torch.__version__.split("+")[0]}
    for name in arguments.only or [part for part in PARTS if part != "llm"]:
        print(name, flush=True)
        results[name] = PARTS[name](arguments.rounds)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
