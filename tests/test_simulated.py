"""Every method runs on a simulated accelerator as on the CPU, and what a matrix costs there stays bounded.

See simulated.py: the device refuses CPU tensors, so that a merge that runs there mixes no devices.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import minipact as mp
import simulated
from helpers import ROOT, single
from minipact.low_rank import Product
from minipact.methods import is_built_in

MADE_FOR = "2.15"
OURS = {name: method for name, method in mp.METHODS.items() if is_built_in(method)}
RULES = [name for name, method in OURS.items() if method.kind == "rule"]
PURIFIERS = [name for name, method in OURS.items() if method.kind == "purifier"]
STORAGE = [name for name, method in OURS.items() if method.kind == "per_task"]

# The most that one of twelve equal matrices may cost: case -> T -> (operations, waits, copies).
BOUNDS = {
    "task arithmetic": {3: (5, 1, 4), 8: (5, 1, 4)},
    "TIES": {3: (11, 2, 4), 8: (16, 3, 6)},
    "TSV-M": {3: (13, 1, 4), 8: (13, 1, 4)},
    "PACT + task arithmetic": {3: (18, 1, 4), 8: (18, 1, 4)},
    "PACT randomized + task arithmetic": {3: (25, 1, 5), 8: (25, 1, 5)},
    "PACT + TIES": {3: (22, 2, 4), 8: (26, 3, 5)},
    "PACT + TSV-M": {3: (27, 1, 4), 8: (27, 1, 4)},
    "PACT + TSV-M, both randomized": {3: (37, 1, 5), 8: (37, 1, 5)},
}
SHAPES = [(48, 32), (20, 36)]

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(MADE_FOR),
    reason=f"torch's backends in Python are an experiment: {MADE_FOR} is needed, not {torch.__version__}",
)

# ---- A process of its own ------------------------------------------------------------------------


def apart(function: str, *arguments: str) -> Any:
    """What a function of this file returns in a new process, which alone gets the device."""
    code = "import json, sys, test_simulated as t; print(json.dumps(getattr(t, sys.argv[1])(*sys.argv[2:])))"
    folders = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, function, *arguments],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- What runs there -----------------------------------------------------------------------------

SIZES = {  # matrices of two shapes, one of them twice; one stored for x @ W; experts; vectors
    "a.weight": (12, 8), "b.weight": (12, 8), "c.weight": (6, 12), "visual.proj": (8, 10),
    "mlp.experts.gate_up_proj": (3, 8, 6), "a.bias": (12,), "conv.weight": (4, 3, 2, 2),
}  # fmt: skip
TASKS = ("red", "green", "blue")


def models() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = {name: single(*size, seed=i) for i, (name, size) in enumerate(SIZES.items())}
    base["half.weight"], base["steps"] = single(8, 12, seed=50).bfloat16(), torch.tensor(7)
    tasks = {}
    for t, label in enumerate(TASKS):
        own = {
            n: 0.05 * single(*x.shape, seed=100 * t + i) for i, (n, x) in enumerate(base.items())
        }
        tasks[label] = {n: (x + own[n]).to(x.dtype) for n, x in base.items()}
        tasks[label]["steps"] = base["steps"]
    return base, tasks


def statistics(base: dict[str, Tensor], kinds: set[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Random statistics of data, as methods need them."""

    def covariance(name: str, seed: int) -> Tensor:
        *stack, m, n = base[name].shape
        seen = single(*stack, 30, m if name == "visual.proj" else n, seed=seed)
        return seen.mT @ seen / 30

    floats = [name for name, x in base.items() if x.is_floating_point()]
    matrices = [n for n in floats if n.endswith((".weight", "proj")) and n != "conv.weight"]
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for t, label in enumerate(TASKS):
        positive = {n: single(*base[n].shape, seed=t).square() for n in floats}
        made = {
            "covariance": {n: covariance(n, t) for n in matrices},
            "fisher": positive,
            "gradient": positive,
        }
        for kind in kinds:
            found.setdefault(kind, {})[label] = made[kind]
    return found


def distance(found: Any, expected: Any, base: dict[str, Tensor]) -> float:
    """The largest difference of a tensor from the CPU's, as a share of its change from the base."""
    assert list(found) == list(expected)
    worst = 0.0
    for name, x in expected.items():
        y = found[name]
        assert y.device.type == "cpu", name
        assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        change = (x.double() - base.get(name, torch.zeros_like(x)).double()).norm()
        worst = max(worst, float((y.double() - x.double()).norm() / change.clamp(min=1e-12)))
    return worst


def merges(*purify: str) -> dict[str, float]:
    """Every rule behind some purifiers, exact and randomized, on the device: its distance from the CPU's."""
    found = {}
    base, tasks = models()
    for rule in RULES:
        uses = [mp.METHODS[name] for name in (rule, *purify)]
        able = [use.name for use in uses if "svd" in use.options]
        kinds = {need for use in uses for need in use.needs} & {"covariance", "fisher", "gradient"}
        for svd in ("exact", "randomized") if able else ("exact",):
            recipe: Any = {"rule": rule, "purify": list(purify), "scale": 0.7, "vectors": "rule"}
            recipe |= {"options": {name: {"svd": svd} for name in able}}
            if kinds:
                recipe["statistics"] = statistics(base, kinds)
            expected = mp.merge(base, tasks, **recipe)
            simulated.start()
            simulated.COUNTS.clear()
            got = mp.merge(base, tasks, **recipe, device="sim:0")
            assert simulated.COUNTS.found["operations"] >= len(SIZES), "nothing ran on the device"
            found[f"{' + '.join((*purify, rule))}, {svd}"] = distance(got, expected, base)
    return found


class Adapted(dict[str, Tensor]):
    """A model that knows some of its differences from the base as factors."""

    def __init__(self, base: dict[str, Tensor], seed: int) -> None:
        self.base, self.rank = base, {"a.weight": 3, "b.weight": 2, "c.weight": 3, "visual.proj": 2}
        self.seed = seed
        super().__init__({**base, **{n: base[n] + self.factors(n).dense() for n in self.rank}})

    def factors(self, name: str) -> Product | None:
        if name not in self.rank:
            return None
        m, n = self.base[name].shape
        r = self.rank[name]
        return Product(single(m, r, seed=self.seed), 0.1 * single(r, n, seed=self.seed + 1))


def others() -> dict[str, float]:
    """Rules on factors of adapters, models per task, adapters of a merge, and a sweep's scales."""
    simulated.start()
    base, tasks = models()
    adapters = {label: Adapted(base, seed) for seed, label in enumerate(TASKS)}
    found = {}
    for rule in ("task_arithmetic", "tsv_m", "knots"):
        pair = [mp.merge(base, adapters, rule=rule, scale=1.0, device=d) for d in ("sim:0", "cpu")]
        found[f"{rule} of factors"] = distance(*pair, base)
    for rule in STORAGE:
        sim, cpu = (mp.compress(base, tasks, rule=rule, device=d) for d in ("sim:0", "cpu"))
        for label in TASKS:
            found[f"{rule}, {label}"] = distance(
                dict(sim.model(label)), dict(cpu.model(label)), base
            )
    for svd in ("exact", "randomized"):
        linear = {"include": ["?.weight", "half.weight"]}
        sim, cpu = (
            mp.Merged(base, tasks, purify="pact", device=d, **linear) for d in ("sim:0", "cpu")
        )
        loras = [mp.to_lora(merged, 4, svd=svd) for merged in (sim, cpu)]
        products = [
            {n: x[n.replace("lora_A", "lora_B")] @ x[n] for n in x if "lora_A" in n} for x in loras
        ]
        found[f"to_lora, {svd}"] = distance(*products, {})
    sweeps = [mp.Merged(base, tasks, rule="ties", device=d).at(0.5) for d in ("sim:0", "cpu")]
    found["at another scale"] = distance(*map(dict, sweeps), base)
    lacking = {label: {n: x for n, x in task.items() if (label, n) != ("red", "a.weight")}
               for label, task in tasks.items()}  # fmt: skip
    recipe: Any = {"rule": "tsv_m", "purify": "pact", "missing": "present", "scale": 1.0}
    pair = [mp.merge(base, lacking, **recipe, device=d, threads=2) for d in ("sim:0", "cpu")]
    found["what some tasks lack, in threads"] = distance(*pair, base)
    return found


def refusals() -> dict[str, str]:
    """What the device says to tensors of the CPU."""
    simulated.start()
    x, y = torch.ones(2, 2, device="sim:0"), torch.ones(2, 2)
    wrong = {
        "add": lambda: x + y, "matmul": lambda: y @ x, "where": lambda: torch.where(x > 0, x, y),
        "stack": lambda: torch.stack([x, y]), "number in a product": lambda: torch.dot(x[0], y[0]),
        "out": lambda: torch.add(x, x, out=y), "numpy": lambda: x.numpy(),
        "generator": lambda: torch.rand(2, device="sim:0", generator=torch.Generator()),
    }  # fmt: skip
    found = {}
    for name, attempt in wrong.items():
        try:
            attempt()
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    assert float((x * torch.tensor(3.0)).sum()) == 12.0  # as PyTorch: a number of the CPU may join
    assert torch.equal(x[torch.tensor([0, 1])].cpu(), y)
    return found


def counts() -> dict[str, list[float]]:
    """Operations, waits and copies of the bounded cases."""
    found = {}
    for case, by_tasks in BOUNDS.items():
        for tasks in by_tasks:
            for shape in SHAPES:
                own = simulated.count_case(case, tasks, shape)
                copies = own["copies in"] + own["copies out"]
                found[f"{case}, T = {tasks}, {shape}"] = [own["operations"], own["waits"], copies]
    return found


def manners() -> dict[str, dict[str, Any]]:
    return {"refused": refusals(), "waits": waits()}


def waits() -> dict[str, int]:
    """How often the host waits for one operation of each kind."""
    device = simulated.start()
    x = torch.ones(4, 4, device=device)
    mask = x > 0
    asked = {
        "item": x.sum().item, "bool": lambda: bool(mask.all()), "nonzero": mask.nonzero,
        "equal": lambda: x.equal(x), "masked_select": lambda: x.masked_select(mask),
        "index": lambda: x[mask], "float": lambda: float(x[0, 0]), "product": lambda: x @ x,
        "where": lambda: torch.where(mask, x, 0), "cpu": x.cpu, "view": lambda: x.mT,
    }  # fmt: skip
    found = {}
    for name, ask in asked.items():
        simulated.COUNTS.clear()
        ask()
        found[name] = simulated.COUNTS.found["waits"]
    return found


# Single precision; an inverse of nearly dependent rows, as WUDI takes, lets it grow on some processors.
ROUNDING = 1e-4


# ---- Tests ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("purify", ["", *PURIFIERS])
def test_every_rule_runs_on_a_device_as_on_the_cpu(purify: str):
    found = apart("merges", *filter(None, [purify]))
    assert len(found) >= len(RULES)
    assert {case: x for case, x in found.items() if not x < ROUNDING} == {}


@pytest.mark.slow
def test_what_else_takes_a_device_runs_there_as_on_the_cpu():
    assert {case: x for case, x in apart("others").items() if not x < ROUNDING} == {}


@pytest.mark.slow
def test_the_device_refuses_tensors_of_the_cpu_and_counts_waits():
    found = apart("manners")
    refused, waits = found["refused"], found["waits"]
    assert len(refused) == 8, refused
    assert "generator" in refused["generator"]
    assert "on sim:0 and on cpu" in refused["matmul"]
    assert {name for name, number in waits.items() if number} == {
        "item", "bool", "nonzero", "equal", "masked_select", "index", "float",
    }  # fmt: skip


@pytest.mark.slow
def test_a_matrix_costs_no_more_than_it_may():
    over = {}
    for case, found in apart("counts").items():
        name, tasks = case.split(", T = ")
        allowed = BOUNDS[name][int(tasks.split(",")[0])]
        if any(x > most for x, most in zip(found, allowed, strict=True)):
            over[case] = {"found": found, "allowed": allowed}
    assert over == {}, "operations, waits and copies for each matrix"
