"""Real faults on real files: damage, full and read-only disks, kills, two runs at once, any header."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import contents, fails, wait_until, write_models
from minipact import __main__ as command_line
from minipact import job
from minipact.__main__ import main
from minipact.checkpoints import INDEX, JOURNAL, open_checkpoint, sha256
from minipact.errors import CheckpointError
from minipact.output import save_checkpoint

SPECTRAL = ["--rule", "tsv_m", "--purify", "pact", "--threads", "1"]
LONG = {"tensors": 20, "width": 400}  # work enough for a merge to be caught at it


# ---- Damaged inputs ------------------------------------------------------------------------------


def sharded(folder: Path, source: str) -> Path:
    save_checkpoint(folder / "shards", load_file(source), max_shard_size=10_000)
    return folder / "shards"


def test_truncated_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, a, b = write_models(tmp_path)
    shard = sharded(tmp_path, b) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    error = fails(capsys, 2, base, a, str(shard.parent), "-o", str(tmp_path / "out"))
    assert f"{shard} is no whole safetensors file" in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "shard", "message"),
    [
        ("3.w", "model-00009-of-00002.safetensors", "names model-00009-of-00002.safetensors"),
        ("ghost.w", "model-00001-of-00002.safetensors", "tensor 'ghost.w'"),
    ],
)
def test_index_that_names_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, shard: str, message: str
):
    base, a, b = write_models(tmp_path)
    index = sharded(tmp_path, b) / INDEX
    content = json.loads(index.read_text())
    content["weight_map"][name] = shard
    index.write_text(json.dumps(content))
    error = fails(capsys, 2, base, a, str(index.parent), "-o", str(tmp_path / "out"))
    assert str(index) in error
    assert message in error


def test_other_shape_in_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, a, b = write_models(tmp_path)
    save_file(load_file(b) | {"2.w": torch.zeros(32, 31)}, b)
    error = fails(capsys, 2, base, a, b, "-o", str(tmp_path / "out"))
    assert "task 'b': '2.w' is torch.float32 (32, 31), in the base torch.float32 (32, 32)" in error


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float):
    base, a, b = write_models(tmp_path, tensors=9)
    state = load_file(b)
    state["5.w"][17, 3] = value
    save_file(state, b)
    for output in ("out", "out.safetensors"):
        error = fails(capsys, 2, base, a, b, "-o", str(tmp_path / output))
        assert "'5.w' of task 'b' holds NaN or infinity" in error
        assert f"task 'b' is {b}" in error
    assert not list(tmp_path.glob("out*"))


def test_input_that_changes_while_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base, a, b = write_models(tmp_path)

    def touching(file: Path, stop: Event) -> str:
        os.utime(b, ns=(1, 1))
        return sha256(file, stop)

    monkeypatch.setattr(job, "sha256", touching)
    error = fails(capsys, 2, base, a, b, "-o", str(tmp_path / "out"))
    assert f"{Path(b).resolve()} changed while it was read" in error
    assert not list(tmp_path.glob("out*"))


# ---- Outputs that cannot be written --------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A file system in memory, where this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_no_space_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str):
    models = write_models(tmp_path, tensors=8, width=128)
    disk = tmp_path / "disk"
    with small_disk(disk, "size=256k"):
        error = fails(capsys, 1, *models, "-o", str(disk / output))
        assert "no room for" in error
        assert "No space left" in error
        assert "no output was written" in error
        assert not list(disk.iterdir())


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_read_only_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str):
    models = write_models(tmp_path)
    disk = tmp_path / "disk"
    with small_disk(disk, "ro"):
        error = fails(capsys, 1, *models, "-o", str(disk / output))
        assert f"{output}.partial" in error
        assert "no output was written" in error


@pytest.mark.slow
def test_limit_on_file_sizes_is_a_failure_without_output(tmp_path: Path):
    models = write_models(tmp_path)
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from minipact.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for output in ("out", "out.safetensors"):
        done = subprocess.run(
            [sys.executable, "-c", script, "merge", *models, "-o", str(tmp_path / output)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "no output was written" in done.stderr
        assert not list(tmp_path.glob("out*"))


# ---- Interruption and resuming -------------------------------------------------------------------


def started(arguments: list[str], unfinished: Path) -> subprocess.Popen[str]:
    """A merge in a process of its own, some of whose tensors are finished."""
    command = [sys.executable, "-m", "minipact", "merge", *arguments]
    # A shell that runs the tests in the background has them ignore SIGINT, which a child would inherit.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    journal = unfinished / JOURNAL
    wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 3, process)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("SIGTERM", "out"),
        ("SIGINT", "out.safetensors"),
        ("SIGKILL", "out"),
        ("SIGKILL", "out.safetensors"),
    ],
)
def test_an_interrupted_run_looks_unfinished_and_resumes_to_the_same_bytes(
    tmp_path: Path, name: str, output: str, capsys: pytest.CaptureFixture[str]
):
    models = write_models(tmp_path, **LONG)
    out, partial = tmp_path / output, tmp_path / f"{output}.partial"
    arguments = [*models, "-o", str(out), *SPECTRAL, "--max-shard-size", "1MB"]
    process = started(arguments, partial)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert not out.exists()
    if name != "SIGKILL":
        assert process.returncode == 130
        assert f"interrupted; no output was written; {out}.partial keeps" in error
    for path in (partial, *partial.rglob("*")):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    error = fails(capsys, 2, *arguments, "--resume", "--scale", "0.5")
    assert "--resume: " in error
    assert "begun with scale 1.0, now it is 0.5" in error
    assert main(["merge", *arguments, "--resume", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 3 <= summary["resumed_tensors"] < LONG["tensors"]
    assert not partial.exists()
    resumed = contents(out)
    assert main(["merge", *arguments, "--overwrite", "--quiet"]) == 0
    assert contents(out) == resumed


SIGNALLED = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path, target=None):
        if name in {places}:
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Sender())
from minipact.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("places", [["torch.nn"], ["torch.nn", "torch.optim"]])
def test_a_signal_while_torch_loads_is_one_message(tmp_path: Path, name: str, places: list[str]):
    """A second one interrupts the import itself, after which torch cannot be loaded again."""
    script = SIGNALLED.format(places=places, name=name)
    arguments = ["merge", *write_models(tmp_path), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    told = "minipact: error: interrupted; no output was written\n"
    assert (done.returncode, done.stderr) == (130, told)
    assert not list(tmp_path.glob("out*"))


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch):
    """As under nohup."""
    found = []
    monkeypatch.setattr(
        command_line, "_methods", lambda _: found.append(signal.getsignal(signal.SIGHUP)) or 0
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["methods"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]


@pytest.mark.slow
def test_resuming_refuses_changed_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = write_models(tmp_path, **LONG)
    arguments = [*models, "-o", str(tmp_path / "out"), *SPECTRAL]
    process = started(arguments, tmp_path / "out.partial")
    process.kill()
    process.communicate(timeout=300)
    os.utime(models[1])
    error = fails(capsys, 2, *arguments, "--resume")
    assert re.search(r"begun with size and time of \S+a.safetensors", error)
    assert main(["merge", *arguments, "--quiet"]) == 0  # anew


@pytest.mark.slow
def test_resuming_a_rule_with_a_threshold_over_the_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    models = write_models(tmp_path, tensors=80, width=300)
    arguments = [*models, "-o", str(tmp_path / "out"), "--rule", "ties", "--purify", "sift",
                 "--threads", "1"]  # fmt: skip
    process = started(arguments, tmp_path / "out.partial")
    process.kill()
    process.communicate(timeout=300)
    assert main(["merge", *arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_tensors"] >= 3
    resumed = contents(tmp_path / "out")
    assert main(["merge", *arguments, "--overwrite", "--quiet"]) == 0
    assert contents(tmp_path / "out") == resumed


@pytest.mark.slow
def test_two_runs_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = write_models(tmp_path, **LONG)
    arguments = [*models, "-o", str(tmp_path / "out"), *SPECTRAL]
    process = started(arguments, tmp_path / "out.partial")
    for more in ([], ["--resume"], ["--overwrite"]):
        error = fails(capsys, 2, *arguments, *more)
        assert f"{tmp_path / 'out'} is being written by another run" in error
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert len(open_checkpoint(tmp_path / "out")) == LONG["tensors"]
    assert not (tmp_path / "out.partial").exists()


# ---- Any bytes are read or refused ---------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_is_read_or_refused(tmp_path_factory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("fuzz")
    state: dict[str, Tensor] = {"a": torch.ones(4, 3), "b": torch.arange(5)}
    kind = data.draw(st.sampled_from(["x.safetensors", "x.pt", "old.pt"]))
    if kind == "x.safetensors":
        save_file(state, folder / kind)
    else:
        torch.save(state, folder / kind, _use_new_zipfile_serialization=kind == "x.pt")
    content = bytearray((folder / kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    (folder / kind).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read = open_checkpoint(folder / kind)
        for name in read:
            assert read[name].shape == read.meta(name).shape
