"""What several test files need: random matrices and models, comparisons, the command line."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, Tensor]

# ---- Random matrices -----------------------------------------------------------------------------


def rng(seed: int = 0) -> torch.Generator:
    """CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def single(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float32, as models hold them."""
    return normal(*shape, seed=seed, dtype=torch.float32)


def decaying(m: int, n: int, seed: int = 0, power: float = 1.0) -> Tensor:
    """Random matrix with singular values i^-power, in float64."""
    r = min(m, n)
    u: Tensor = torch.linalg.qr(normal(m, r, seed=seed)).Q
    v: Tensor = torch.linalg.qr(normal(n, r, seed=seed + 1000)).Q
    return u * torch.arange(1, r + 1).double().pow(-power) @ v.mT


def problem(m: int = 40, n: int = 30, tasks: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Base matrix [m, n] and task matrices [tasks, m, n] with decaying spectra."""
    W0 = decaying(m, n, seed)
    D = [0.1 * decaying(m, n, seed + task + 1) for task in range(tasks)]
    return W0, torch.stack(D)


# ---- Models --------------------------------------------------------------------------------------


def small_model(seed: int, base: State | None = None) -> State:
    """Small state dict with matrices, a transposed one, vectors, a convolution and an integer."""
    shapes = {
        "visual.mlp.c_fc.weight": (24, 16),
        "visual.mlp.c_fc.bias": (24,),
        "visual.mlp.c_proj.weight": (16, 24),
        "visual.proj": (16, 12),
        "visual.conv1.weight": (8, 3, 2, 2),
    }
    state = {name: single(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    if base is not None:
        state = {name: base[name] + 0.05 * x for name, x in state.items()}
    return state | {"visual.steps": torch.tensor(7)}


def tuned(state: State, seed: int, size: float = 0.02) -> State:
    """The model after a random change of its floating-point tensors."""
    generator = rng(seed)
    found = {}
    for name, x in state.items():
        if x.is_floating_point():
            change = size * torch.randn(x.shape, generator=generator)
            found[name] = x + change.to(x)
        else:
            found[name] = x
    return found


def write_models(
    folder: Path, tensors: int = 4, width: int = 32, biases: bool = False
) -> list[str]:
    """A base and two fine-tuned models of square matrices in files; their paths."""
    base = {f"{i}.w": single(width, width, seed=i) for i in range(tensors)}
    if biases:
        base |= {f"{i}.b": single(width, seed=1000 + i).half() for i in range(tensors)}
    models = {"base": base, "a": tuned(base, 1, 0.01), "b": tuned(base, 2, 0.01)}
    for name, state in models.items():
        save_file(state, folder / f"{name}.safetensors")
    return [str(folder / f"{name}.safetensors") for name in models]


def data_of(method: str, base: State, tasks: int) -> dict[str, dict[str, list[State]]]:
    """The statistics that a method needs, random, as a keyword of a merge; none where it needs none."""
    import minipact as mp
    from minipact.steps import holds_matrices, kinds_of

    def covariance(name: str, x: Tensor, seed: int) -> Tensor:
        inputs = x.shape[-2 if kinds[name].endswith("_T") else -1]
        seen = single(*x.shape[:-2], 2 * inputs, inputs, seed=seed)
        return seen.mT @ seen / (2 * inputs)

    kinds = kinds_of(mp.Recipe(), base)
    found = {}
    for kind in {"covariance", "fisher"}.intersection(mp.METHODS[method].needs):
        floats = {name: x for name, x in base.items() if x.is_floating_point()}
        if kind == "covariance":
            floats = {n: x for n, x in floats.items() if holds_matrices(kinds[n])}
            states = [{n: covariance(n, x, t) for n, x in floats.items()} for t in range(tasks)]
        else:
            states = [
                {n: single(*x.shape, seed=t).square() for n, x in floats.items()}
                for t in range(tasks)
            ]
        found[kind] = states
    return {"statistics": found} if found else {}


# ---- Comparisons ---------------------------------------------------------------------------------


def flat(state: Mapping[str, Tensor]) -> Tensor:
    """All floating-point numbers of a model in one vector."""
    return torch.cat([x.flatten() for x in state.values() if x.is_floating_point()])


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same names, types and numbers, to the bit."""
    if set(found) != set(expected):
        return False
    pairs = [(found[name], expected[name]) for name in expected]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def close(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of numbers about 1 agree up to rounding in their type."""
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-5
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance)


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder by its name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ---- The command line ----------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Error message of a `minipact merge` that ends with this exit code."""
    from minipact.__main__ import main

    found = main(["merge", *arguments])
    assert found == code, f"exit code {found}, not {code}"
    error = capsys.readouterr().err
    assert error.startswith("minipact: error: ")
    assert "Traceback" not in error
    return error


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return when a condition holds; fail if the process ends before, or after five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
