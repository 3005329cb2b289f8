"""Merges on a GPU: where the time goes, how often it waits, TF32, two processes, little memory.

    make bench-gpu                                  all parts, as long as --minutes allows
    python benchmarks/gpu.py --only vit_b32         one part, see PARTS
    python benchmarks/gpu.py --device cpu --tiny    without a GPU, to see whether it runs

Weights are random, of the real shapes. Results go to benchmarks/results/gpu_<device>.json after every
measurement, so that an interrupted run keeps what it has; what the time did not allow is named there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minipact as mp
from minipact.tensors import moved

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
RULES = (
    "task_arithmetic",
    "tsv_m",
    "ties",
    "iso_c",
    "wudi",
    "iso_cts",
    "swudi",
    "ace",
    "consensus",
    "knots",
)
PURIFIERS = ("", "PACT exact", "PACT randomized")
BOTH_SKETCHED = {"pact": {"svd": "randomized"}, "tsv_m": {"svd": "randomized"}}
PACT_TSV: dict[str, Any] = {"rule": "tsv_m", "purify": "pact", "scale": 1.0}

# ---- Weights of real shapes ----------------------------------------------------------------------


def vit(width: int, layers: int, patch: int, tokens: int, embed: int) -> Shapes:
    """The image tower of a CLIP model, by open_clip's names."""
    pair = ("weight", "bias")
    shapes: Shapes = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, embed),
        "conv1.weight": (width, 3, patch, patch),
    }
    shapes |= {f"{norm}.{x}": (width,) for norm in ("ln_pre", "ln_post") for x in pair}
    for i in range(layers):
        at = f"transformer.resblocks.{i}"
        shapes |= {f"{at}.{norm}.{x}": (width,) for norm in ("ln_1", "ln_2") for x in pair}
        shapes |= {
            f"{at}.attn.in_proj_weight": (3 * width, width),
            f"{at}.attn.in_proj_bias": (3 * width,),
        }
        for name, m, n in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{at}.{name}.weight": (m, n), f"{at}.{name}.bias": (m,)}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def llama(width: int, hidden: int) -> Shapes:
    """One transformer block of a Llama."""
    at = "model.layers.0"
    shapes: Shapes = {f"{at}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
    shapes |= {f"{at}.mlp.{p}_proj.weight": (hidden, width) for p in ("gate", "up")}
    shapes[f"{at}.mlp.down_proj.weight"] = (width, hidden)
    norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {f"{at}.{norm}.weight": (width,) for norm in norms}


def decaying(shape: tuple[int, ...], norm: float, g: torch.Generator) -> Tensor:
    """Random numbers; a matrix has singular values that fall like those of trained weights."""
    x = torch.randn(shape, generator=g, device=g.device)
    if len(shape) == 2:
        order = torch.randperm(shape[1], generator=g, device=g.device)
        x *= torch.arange(1, shape[1] + 1, device=g.device).float().rsqrt()[order]
    return x * (norm / x.norm())


def models(
    shapes: Shapes, tasks: int, dtype: torch.dtype, device: str
) -> tuple[State, list[State]]:
    """A base and fine-tuned models on the CPU; drawn on the device, which is quick."""
    g = torch.Generator(device).manual_seed(0)
    base = {name: decaying(shape, 30.0, g) for name, shape in shapes.items()}
    tuned = [
        {name: (x + decaying(tuple(x.shape), 1.0, g)).to(dtype).cpu() for name, x in base.items()}
        for _ in range(tasks)
    ]
    return {name: x.to(dtype).cpu() for name, x in base.items()}, tuned


# ---- Measuring -----------------------------------------------------------------------------------


class Bench:
    """The device, the time that is left, and the results, which are written whenever something is added."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.tiny, self.repeats = given.device, given.tiny, given.repeats
        self.blocks, self.scratch, self.ends = (
            given.blocks,
            given.scratch,
            time.time() + 60 * given.minutes,
        )
        self.is_cuda = torch.device(self.device).type == "cuda"
        name = torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"
        self.out = (
            given.out
            or Path(__file__).parent / "results" / f"gpu_{re.sub('[^A-Za-z0-9]+', '_', name)}.json"
        )
        self.results: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {}
        self.results |= {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
        self.results |= {"minipact": mp.__version__, "tiny": self.tiny, "cores": os.cpu_count()}

    def has_time(self) -> bool:
        return time.time() < self.ends

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def done(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int | None = None) -> dict[str, Any]:
        """Wall seconds of some runs; one that takes over ten seconds is not repeated."""
        found: list[float] = []
        while len(found) < (repeats or self.repeats) and (not found or found[0] < 10):
            self.done()
            started = time.perf_counter()
            work()
            self.done()
            found.append(time.perf_counter() - started)
        return {"median": short(statistics.median(found)), "runs": [short(x) for x in found]}


def short(x: float) -> float:
    return float(f"{x:.3g}")


def on_the_device(work: Callable[[], Any]) -> dict[str, Any]:
    """What a GPU did in a run, by torch's profiler, which slows the host but not the kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return split(
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def split(spans: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """Seconds of kernels and of copies from their names and microseconds of begin and end."""
    spent = {"kernels_s": 0.0, "to_device_s": 0.0, "from_device_s": 0.0, "busy_s": 0.0}
    launches, last = 0, -math.inf
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        kind = "kernels_s"
        if name.startswith("Memcpy") and "HtoD" in name:
            kind = "to_device_s"
        elif name.startswith("Memcpy") and "DtoH" in name:
            kind = "from_device_s"
        launches += kind == "kernels_s"
        spent[kind] += (end - start) / 1e6
        spent["busy_s"] += (
            max(0.0, end - max(start, last)) / 1e6
        )  # less where copies hide behind kernels
        last = max(last, end)
    return {kind: short(x) for kind, x in spent.items()} | {"launches": launches}


def times_it_waits(work: Callable[[], Any]) -> dict[str, Any]:
    """How often the host waited for the GPU, and in which lines, by torch's own check."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    return {"waits": lines.total(), "lines": dict(lines.most_common(12))}


def farthest(found: State, expected: State, base: State) -> float:
    """The largest distance of a tensor from another's, as a share of its change from the base."""
    worst = 0.0
    for name, x in expected.items():
        change = (x.double() - base[name].double()).norm().clamp(min=1e-12)
        worst = max(worst, float((found[name].double() - x.double()).norm() / change))
    return short(worst)


# ---- Layouts -------------------------------------------------------------------------------------


def recipes(rules: tuple[str, ...] = RULES) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each rule alone and behind PACT, those first that most depend on."""
    for rule in rules:
        for purify in PURIFIERS:
            svd = purify.split()[-1] if purify else "exact"
            sketches = [rule] if "svd" in mp.METHODS[rule].options else []
            options = {name: {"svd": svd} for name in [*sketches, *(["pact"] if purify else [])]}
            yield (
                f"{purify} + {rule}" if purify else rule,
                {
                    "rule": rule,
                    "purify": ["pact"] if purify else [],
                    "scale": 0.3,
                    "options": options,
                },
            )


def layout(
    bench: Bench, name: str, shapes: Shapes, tasks: int, dtype: torch.dtype, **said: Any
) -> None:
    """Stages of a merge of one layout: alone, and what the device does in each recipe."""
    base, tuned = models(shapes, tasks, dtype, bench.device)
    size = sum(x.nbytes for x in base.values())
    found: dict[str, Any] = {
        **said,
        "tasks": tasks,
        "parameters": sum(x.numel() for x in base.values()),
    }
    found |= {"bytes_of_one_model": size, "dtype": str(dtype).removeprefix("torch.")}
    bench.results[name] = found

    def move(pinned: bool) -> None:
        for state in (base, *tuned):
            for x in state.values():
                moved(x, bench.device) if pinned else x.to(bench.device)
        bench.done()

    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        paths = [Path(folder) / f"model{i}.safetensors" for i in range(tasks + 1)]
        for path, state in zip(paths, (base, *tuned), strict=True):
            mp.save_checkpoint(path, state)
        target = Path(folder) / "out.safetensors"
        found["read_s"] = bench.seconds(lambda: [dict(mp.open_checkpoint(path)) for path in paths])
        for way, pinned in (("transfer", False), ("transfer_pinned", True)):
            took = found[f"{way}_s"] = bench.seconds(partial(move, pinned))
            rate = size * (tasks + 1) / max(took["median"], 1e-9) / 1e9
            found[f"{way}_gb_per_s"] = short(rate)
        found["write_s"] = bench.seconds(lambda: mp.save_checkpoint(target, base, overwrite=True))
        found["merges"], found["not_measured"] = {}, []
        for label, recipe in recipes():
            if bench.has_time():
                found["merges"][label] = merged(bench, base, tuned, recipe)
                if recipe["rule"] in RULES[:2] and bench.has_time():
                    files = {"recipe": mp.Recipe(**{**recipe, "purify": tuple(recipe["purify"])})}
                    found["merges"][label]["from_files_to_a_file_s"] = bench.seconds(
                        lambda files=files: mp.merge_files(
                            paths[0],
                            paths[1:],
                            target,
                            **files,
                            device=bench.device,
                            overwrite=True,
                        )
                    )
                print(f"  {name}, {label}: {found['merges'][label]}", flush=True)
            else:
                found["not_measured"].append(label)
            bench.save()


def merged(bench: Bench, base: State, tuned: list[State], recipe: dict[str, Any]) -> dict[str, Any]:
    """Wall seconds from and to the CPU's memory, and the split on the device."""

    def work() -> State:
        return mp.merge(base, tuned, **recipe, device=bench.device)

    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"from_memory_to_memory_s": bench.seconds(work)}
    if bench.is_cuda:
        found["peak_device_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        found |= on_the_device(work)
    return found


def vit_b32(bench: Bench) -> None:
    size = (16, 2, 4, 5, 8) if bench.tiny else (768, bench.blocks or 12, 32, 50, 512)
    layout(bench, "vit_b32", vit(*size), 8, torch.float32, transformer_blocks=size[1], of=12)


def vit_l14(bench: Bench) -> None:
    size = (24, 2, 2, 5, 8) if bench.tiny else (1024, bench.blocks or 24, 14, 257, 768)
    layout(bench, "vit_l14", vit(*size), 8, torch.float32, transformer_blocks=size[1], of=24)


def llama_7b(bench: Bench) -> None:
    shapes = llama(16, 40) if bench.tiny else llama(4096, 11_008)
    what = "one of the 32 transformer blocks of a 7-billion-parameter layout"
    layout(bench, "llama", shapes, 2, torch.bfloat16, what=what, transformer_blocks=1, of=32)


# ---- Single questions ----------------------------------------------------------------------------


def one_block(bench: Bench, tasks: int = 8) -> tuple[State, list[State]]:
    """One transformer block of ViT-B/32."""
    size = (16, 1, 4, 5, 8) if bench.tiny else (768, 1, 32, 50, 512)
    return models(vit(*size), tasks, torch.float32, bench.device)


def rates(bench: Bench) -> None:
    """What the device does at best: copies, products, and factorisations alone and eight at once."""
    n = 64 if bench.tiny else 768
    one, eight = (torch.randn(*lead, n, n, device=bench.device) for lead in ((), (8,)))
    wide = [(x @ x.mT).double() for x in (one, eight)]
    host = torch.empty(1 << (16 if bench.tiny else 28))  # 1 GB
    held = host.pin_memory() if bench.is_cuda else host
    jobs: dict[str, Callable[[], Any]] = {
        "copy 1 GB to the device": lambda: host.to(bench.device, copy=True),
        "the same from pinned memory": lambda: held.to(bench.device, copy=True),
        f"eigh [{n}, {n}] float64": lambda: torch.linalg.eigh(wide[0]),
        f"eigh [8, {n}, {n}] float64": lambda: torch.linalg.eigh(wide[1]),
        f"svd [{n}, {n}] float32": lambda: torch.linalg.svd(one),
        f"svd [8, {n}, {n}] float32": lambda: torch.linalg.svd(eight),
        f"qr [8, {n}, {n}] float32": lambda: torch.linalg.qr(eight),
        f"product [8, {n}, {n}] float32": lambda: eight @ eight,
        f"product [8, {n}, {n}] float64": lambda: wide[1] @ wide[1],
    }
    found = {}
    for name, job in jobs.items():
        job()
        found[name] = bench.seconds(job)
    bench.results["rates_s"] = found


def tf32(bench: Bench) -> None:
    """Randomized singular vectors with products in TF32: what it saves, and what it errs."""
    base, tuned = one_block(bench)

    def run(options: dict[str, Any]) -> State:
        return mp.merge(base, tuned, **PACT_TSV, options=options, device=bench.device)

    exact, plain = run({}), run(BOTH_SKETCHED)
    found = {"float32_s": bench.seconds(lambda: run(BOTH_SKETCHED))}
    try:
        torch.set_float32_matmul_precision("high")
        quick = run(BOTH_SKETCHED)
        found["tf32_s"] = bench.seconds(lambda: run(BOTH_SKETCHED))
    finally:
        torch.set_float32_matmul_precision("highest")
    bench.results["tf32"] = found | {
        "what": "PACT + TSV-M, both randomized, one transformer block of ViT-B/32, 8 tasks",
        "tf32_from_float32": farthest(quick, plain, base),
        "float32_from_exact": farthest(plain, exact, base),
        "tf32_from_exact": farthest(quick, exact, base),
    }


def waits(bench: Bench) -> None:
    """How often a merge waits for the device, for each matrix of one block."""
    base, tuned = one_block(bench)
    matrices = sum(x.ndim == 2 for x in base.values())
    found: dict[str, Any] = {"matrices": matrices}
    if not bench.is_cuda:
        bench.results["waits"] = found | {"not_measured": "torch counts waits on CUDA only"}
        return
    for label, recipe in recipes(RULES[:3]):
        own = times_it_waits(
            lambda recipe=recipe: mp.merge(base, tuned, **recipe, device=bench.device)
        )
        found[label] = own | {"waits_for_each_matrix": short(own["waits"] / matrices)}
    bench.results["waits"] = found


def ranks(bench: Bench) -> None:
    """Two processes on one device, against one there and one on the CPU."""
    base, tuned = one_block(bench, 3)
    alone = [sys.executable, "-m", "minipact", "merge"]
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pair += ["-m", "minipact", "merge"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # of several devices one
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    with tempfile.TemporaryDirectory(dir=bench.scratch) as name:
        folder = Path(name)
        paths = [folder / f"model{i}.safetensors" for i in range(4)]
        for path, state in zip(paths, (base, *tuned), strict=True):
            mp.save_checkpoint(path, state)
        states, contents = {}, {}
        for job, (start, device) in {
            "two": (pair, bench.device), "one": (alone, bench.device), "cpu": (alone, "cpu"),
        }.items():  # fmt: skip
            out = folder / f"{job}.safetensors"
            rest = [
                "-o",
                str(out),
                "--rule",
                "tsv_m",
                "--purify",
                "pact",
                "--scale",
                "1",
                "--quiet",
            ]
            subprocess.run(
                [*start, *map(str, paths), *rest, "--device", device], check=True, env=environment
            )
            states[job], contents[job] = dict(mp.open_checkpoint(out)), out.read_bytes()
    bench.results["ranks"] = {
        "what": "PACT + TSV-M, one transformer block of ViT-B/32, 3 tasks, two processes on one device",
        "two_from_cpu": farthest(states["two"], states["cpu"], base),
        "one_from_cpu": farthest(states["one"], states["cpu"], base),
        "two_has_the_bytes_of_one": contents["two"] == contents["one"],
    }


def memory(bench: Bench, shares: tuple[float, ...] = (0.5, 0.1, 0.02, 0.005, 0.001)) -> None:
    """The same merge in less and less of the device's memory: whether it ends, and as before."""
    base, tuned = one_block(bench)
    expected = mp.merge(base, tuned, **PACT_TSV, device=bench.device)
    if not bench.is_cuda:
        bench.results["memory"] = {"not_measured": "only a GPU's memory can be limited"}
        return
    total, found = torch.cuda.get_device_properties(bench.device).total_memory, {}
    for share in shares:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        one: dict[str, Any] = {"limit_mb": round(share * total / 1e6)}
        try:
            model = mp.Merged(base, tuned, **PACT_TSV, device=bench.device)
            one["from_unlimited"] = farthest(dict(model), expected, base)
            one["notes"] = list(model.notes)
        except (RuntimeError, mp.MergeError) as error:
            one["error"] = str(error)[:300]
        found[str(share)] = one
    torch.cuda.set_per_process_memory_fraction(1.0)
    bench.results["memory"] = found


PARTS: dict[str, Callable[[Bench], None]] = {
    "rates": rates, "waits": waits, "ranks": ranks, "tf32": tf32, "memory": memory,
    "vit_b32": vit_b32, "llama": llama_7b, "vit_l14": vit_l14,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see whether all runs")
    parser.add_argument("--blocks", type=int, help="transformer blocks of the ViTs; all without")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="nothing new begins after so many"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path.cwd(), help="folder for up to 14 GB of files"
    )
    parser.add_argument(
        "--out", type=Path, help="results; benchmarks/results/gpu_<device>.json without"
    )
    parsed = parser.parse_args(arguments)
    if torch.device(parsed.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device is here, so there is nothing to measure: run this where one is;"
            " --device cpu --tiny shows whether the benchmark itself runs"
        )
    bench = Bench(parsed)
    base, tuned = models(vit(16, 1, 4, 5, 8), 2, torch.float32, bench.device)
    mp.merge(base, tuned, **PACT_TSV, device=bench.device)  # so that no part pays for the start
    for name in parsed.only or PARTS:
        if bench.has_time():
            started = time.perf_counter()
            PARTS[name](bench)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        else:
            bench.results.setdefault(name, {"not_measured": "out of time"})
        bench.save()
    print(f"wrote {bench.out}")


if __name__ == "__main__":
    main()
