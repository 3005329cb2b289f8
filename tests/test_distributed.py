"""Several real processes on one merge: same bytes as one, and nothing when one of them ends early."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minipact as mp
from helpers import contents, single, wait_until, write_models
from minipact import distributed
from minipact.__main__ import main
from minipact.checkpoints import JOURNAL


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return write_models(tmp_path, tensors=40, width=150, biases=True)


# Below those that the system gives to outgoing connections, and others for each process of pytest-xdist.
PORTS = itertools.count(20_000 + 50 * (os.getpid() % 200))


def free_port() -> str:
    """A port of this machine that nobody uses, a new one at every call."""
    while True:
        port = next(PORTS)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return str(port)


def processes(arguments: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """What torchrun starts, so that each can be watched and killed by itself."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minipact", "merge", *arguments],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "recipe"),
    [
        ("out", ["--rule", "tsv_m", "--purify", "pact", "--max-shard-size", "1MB"]),
        ("out.safetensors", ["--rule", "ties", "--purify", "dare"]),
        ("out.safetensors", ["--rule", "knots", "--purify", "awd"]),
        ("out.safetensors", ["--rule", "consensus", "--purify", "tatr"]),
    ],
)
def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, models: list[str], output: str, recipe: list[str]
):
    arguments = [*models, "-o", str(tmp_path / output), *recipe]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run([*torchrun, "-m", "minipact", "merge", *arguments, "--json"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"processes": 2') == 1  # the first process alone reports
    two = contents(tmp_path / output)
    assert main(["merge", *arguments, "--overwrite", "--quiet"]) == 0
    assert contents(tmp_path / output) == two
    assert not (tmp_path / f"{output}.partial").exists()


def with_statistics(models: list[str], kind: str) -> list[str]:
    """Words that give a statistic of each task, of random numbers, as files."""
    base, *tasks = (Path(model) for model in models)
    floats = {n: x for n, x in load_file(base).items() if kind != "covariance" or x.ndim == 2}
    words = []
    for seed, task in enumerate(tasks):
        seen = {n: single(*x.shape, seed=seed + i) for i, (n, x) in enumerate(floats.items())}
        found = {n: x.mT @ x / len(x) if kind == "covariance" else x**2 for n, x in seen.items()}
        at = {"model": base, "task": task} if kind == "gradient" else {"model": task}
        file = task.with_name(f"{task.stem}_{kind}.safetensors")
        words += ["--statistics", str(mp.save_statistics(file, kind, found, samples=4, **at))]
    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("covariance", ["--rule", "regmean"]),
        ("covariance", ["--rule", "tsv_m", "--purify", "pave"]),
        ("fisher", ["--rule", "fisher_merge"]),
        ("gradient", ["--purify", "tatr"]),
    ],
)
def test_two_processes_read_statistics_as_one_does(
    tmp_path: Path, models: list[str], kind: str, recipe: list[str]
):
    arguments = [*models, "-o", str(tmp_path / "out"), *recipe, *with_statistics(models, kind)]
    run = processes([*arguments, "--max-shard-size", "1MB", "--json"])
    told, errors = zip(*(process.communicate(timeout=300) for process in run), strict=True)
    assert [process.returncode for process in run] == [0, 0], errors
    assert json.loads(told[0])["processes"] == 2
    two = contents(tmp_path / "out")
    assert len(two) > 3
    arguments += ["--max-shard-size", "1MB", "--overwrite", "--quiet"]
    assert main(["merge", *arguments]) == 0
    assert contents(tmp_path / "out") == two


@pytest.mark.slow
def test_statistics_that_do_not_fit_are_told_once_by_two_processes(
    tmp_path: Path, models: list[str]
):
    words = with_statistics(models, "fisher")[:2]
    run = processes([*models, "-o", str(tmp_path / "out"), "--rule", "fisher_merge", *words])
    errors = [process.communicate(timeout=300)[1] for process in run]
    assert [process.returncode for process in run] == [2, 2]
    assert "'b'" in errors[0]
    assert errors[1] == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_without_output(
    tmp_path: Path, models: list[str], victim: int
):
    out = tmp_path / "out"
    arguments = [*models, "-o", str(out), "--rule", "tsv_m", "--purify", "pact"]
    run = processes(arguments)
    journal = tmp_path / "out.partial" / JOURNAL
    wait_until(lambda: journal.exists() and '"done"' in journal.read_text(), run[0])
    run[victim].send_signal(signal.SIGKILL)
    run[victim].communicate(timeout=300)
    _, error = run[1 - victim].communicate(timeout=300)
    assert run[1 - victim].returncode == 1
    assert "another process of this run has ended early" in error
    assert "no output was written" in error
    assert "Traceback" not in error
    assert not out.exists()
    assert main(["merge", *arguments, "--resume", "--quiet"]) == 0
    resumed = contents(out)
    assert main(["merge", *arguments, "--overwrite", "--quiet"]) == 0
    assert contents(out) == resumed


@pytest.mark.slow
def test_a_fault_in_one_share_ends_all(tmp_path: Path, models: list[str]):
    state = load_file(models[2])
    state["7.w"][3, 4] = torch.nan
    save_file(state, models[2])
    run = processes([*models, "-o", str(tmp_path / "out"), "--rule", "tsv_m"])
    errors = [process.communicate(timeout=300)[1] for process in run]
    assert sorted(process.returncode for process in run) == [1, 2]
    assert sum("'7.w' of task 'b' holds NaN" in error for error in errors) == 1
    assert sum("another process of this run" in error for error in errors) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_all_see_is_said_once(tmp_path: Path, models: list[str]):
    run = processes([*models, "-o", str(tmp_path / "out"), "--rule", "best"])
    errors = [process.communicate(timeout=300)[1] for process in run]
    assert [process.returncode for process in run] == [2, 2]
    assert "rule 'best' is unknown" in errors[0]
    assert errors[1] == ""


def test_odd_variables_of_the_environment_mean_one_process(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "x")
    assert (distributed.rank(), distributed.size()) == (0, 1)


@pytest.mark.parametrize("names", [("RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE")])
def test_without_an_address_a_process_is_alone(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], models: list[str], tmp_path: Path
):
    for name in names:
        monkeypatch.setenv(name, "2")
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert main(["merge", *models, "-o", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.slow
def test_a_dry_run_is_told_once(tmp_path: Path, models: list[str]):
    run = processes([*models, "-o", str(tmp_path / "out"), "--dry-run", "--json"])
    told = [process.communicate(timeout=300)[0] for process in run]
    assert json.loads(told[0])["dry_run"]
    assert told[1] == ""


def test_shares_are_balanced_and_complete(monkeypatch: pytest.MonkeyPatch):
    costs = {f"{i}": float(i**3) for i in range(40)}
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(distributed.share(costs))
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) < 1.05 * min(loads)
