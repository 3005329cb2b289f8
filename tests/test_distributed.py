"""Several real processes on one merge: same bytes as one, and nothing when one of them ends early."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipact import distributed
from minipact.__main__ import main
from minipact.checkpoints import JOURNAL


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    g = torch.Generator().manual_seed(0)
    base = {f"{i}.w": torch.randn(150, 150, generator=g) for i in range(40)}
    base |= {f"{i}.b": torch.randn(150, generator=g).half() for i in range(40)}
    save_file(base, tmp_path / "base.safetensors")
    for task in "ab":
        tuned = {n: x + 0.01 * torch.randn(x.shape, generator=g) for n, x in base.items()}
        save_file(tuned, tmp_path / f"{task}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.iterdir()
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


def processes(arguments: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """What torchrun starts, so that each can be watched and killed by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
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


@pytest.mark.parametrize(
    ("output", "recipe"),
    [
        ("out", ["--rule", "tsv_m", "--purify", "pact", "--max-shard-size", "1MB"]),
        ("out.safetensors", ["--rule", "ties", "--purify", "dare"]),
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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_without_output(
    tmp_path: Path, models: list[str], victim: int
):
    out = tmp_path / "out"
    arguments = [*models, "-o", str(out), "--rule", "tsv_m", "--purify", "pact"]
    run = processes(arguments)
    journal = tmp_path / "out.partial" / JOURNAL
    deadline = time.monotonic() + 120
    while not (journal.exists() and '"done"' in journal.read_text()):
        assert time.monotonic() < deadline
        assert run[0].poll() is None, run[0].communicate()
        time.sleep(0.005)
    run[victim].send_signal(signal.SIGKILL)
    run[victim].communicate(timeout=60)
    _, error = run[1 - victim].communicate(timeout=60)
    assert run[1 - victim].returncode == 1
    assert "another process of this run has ended early" in error
    assert "no output was written" in error
    assert "Traceback" not in error
    assert not out.exists()
    assert main(["merge", *arguments, "--resume", "--quiet"]) == 0
    resumed = contents(out)
    assert main(["merge", *arguments, "--overwrite", "--quiet"]) == 0
    assert contents(out) == resumed


def test_a_fault_in_one_share_ends_all(tmp_path: Path, models: list[str]):
    state = load_file(models[2])
    state["7.w"][3, 4] = torch.nan
    save_file(state, models[2])
    run = processes([*models, "-o", str(tmp_path / "out"), "--rule", "tsv_m"])
    errors = [process.communicate(timeout=120)[1] for process in run]
    assert sorted(process.returncode for process in run) == [1, 2]
    assert sum("'7.w' of task 'b' holds NaN" in error for error in errors) == 1
    assert sum("another process of this run" in error for error in errors) == 1
    assert not (tmp_path / "out").exists()


def test_what_all_see_is_said_once(tmp_path: Path, models: list[str]):
    run = processes([*models, "-o", str(tmp_path / "out"), "--rule", "best"])
    errors = [process.communicate(timeout=120)[1] for process in run]
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


def test_a_dry_run_is_told_once(tmp_path: Path, models: list[str]):
    run = processes([*models, "-o", str(tmp_path / "out"), "--dry-run", "--json"])
    told = [process.communicate(timeout=120)[0] for process in run]
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
