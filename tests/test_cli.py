"""The command line end to end, on real files: results, summaries, faults, interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from minipact.__main__ import main
from minipact.checkpoints import sha256


def model(seed: int, base: dict[str, Tensor] | None = None, width: int = 32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (width, width), "fc.bias": (width,), "visual.proj": (width, width // 2)}
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if base is not None:
        state = {name: base[name] + 0.05 * x for name, x in state.items()}
    return state


@pytest.fixture
def files(tmp_path: Path) -> Path:
    base = model(0)
    for name, state in {
        "base": base,
        **{t: model(i, base) for i, t in enumerate("abc", 1)},
    }.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    tasks = [str(folder / f"{t}.safetensors") for t in "abc"]
    return main(["merge", str(folder / "base.safetensors"), *tasks, *arguments])


def merged_in_memory(folder: Path, **recipe) -> dict[str, Tensor]:
    tasks = {t: load_file(folder / f"{t}.safetensors") for t in "abc"}
    return mp.merge(load_file(folder / "base.safetensors"), tasks, **recipe)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], {}),
        (["--rule", "ties", "--scale", "0.7", "--weights", "1,1,.5"],
         {"rule": "ties", "scale": 0.7, "weights": {"a": 1, "b": 1, "c": 0.5}}),
        (["--rule", "tsv_m", "--purify", "dare,pact", "--set", "pact.core=5",
          "--set", "dare.p=0.5", "--seed", "4"],
         {"rule": "tsv_m", "purify": ["dare", "pact"], "seed": 4,
          "options": {"pact": {"core": 5}, "dare": {"p": 0.5}}}),
        (["--rule", "iso_c", "--purify", "sift", "--exclude", "*.bias", "--dtype", "bfloat16"],
         {"rule": "iso_c", "purify": "sift", "exclude": "*.bias", "dtype": torch.bfloat16}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_files_merge_as_in_memory(files: Path, arguments: list[str], recipe: dict, output: str):
    assert run(files, "-o", str(files / output), "--quiet", *arguments) == 0
    path = files / output if output.endswith("s") else files / output / "model.safetensors"
    assert same(load_file(path), merged_in_memory(files, **recipe))


def test_output_repeats_byte_for_byte(files: Path):
    for name in ("one", "two"):
        out = files / f"{name}.safetensors"
        assert run(files, "-o", str(out), "--rule", "tsv_m", "--purify", "pact", "--quiet") == 0
    assert sha256(files / "one.safetensors") == sha256(files / "two.safetensors")


def test_folder_with_card_shards_and_side_files(files: Path):
    folder = files / "basefolder"
    folder.mkdir()
    os.rename(files / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    tasks = [f"{t.upper()}={files / t}.safetensors" for t in "abc"]
    out = files / "out"
    done = main(
        ["merge", str(folder), *tasks, "-o", str(out), "--max-shard-size", "5KB", "--quiet"]
    )
    assert done == 0
    assert (out / "config.json").exists()
    card = (out / "README.md").read_text()
    assert sha256(files / "a.safetensors") in card
    assert "- A: " in card
    assert '"rule": "task_arithmetic"' in card
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2


def test_summary_and_json(files: Path, capsys: pytest.CaptureFixture[str]):
    out = files / "out.safetensors"
    assert run(files, "-o", str(out), "--rule", "tsv_m", "--purify", "pact") == 0
    text = capsys.readouterr().out
    assert "2 tensors: pact > tsv_m" in text
    assert "1 tensors: mean" in text
    assert "no value is published behind pact" in text
    assert run(files, "-o", str(out), "--overwrite", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["scale"] == 0.3
    assert summary["bytes"] == out.stat().st_size
    assert summary["tasks"].keys() == set("abc")
    with_header = mp.checkpoints.open_checkpoint(out).metadata
    assert json.loads(with_header["merge"])["rule"] == "task_arithmetic"


def test_dry_run_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(files.iterdir())
    assert run(files, "-o", str(files / "out"), "--purify", "pact", "--dry-run") == 0
    assert "visual.proj  [32, 16]  matrix_T: pact > task_arithmetic" in capsys.readouterr().out
    assert sorted(files.iterdir()) == before


def test_methods(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    assert "arXiv 2606.18627" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(mp.METHODS)


def spoiled(files: Path, task: str, **changes) -> None:
    state = load_file(files / f"{task}.safetensors")
    for name, x in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if x is not None:
            state[name] = x
    save_file(state, files / f"{task}.safetensors")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda f: spoiled(f, "b", fc__bias=None), [], "task 'b' lacks 'fc.bias'"),
        (lambda f: spoiled(f, "b", more=torch.ones(1)), [], "task 'b' has 'more'"),
        (lambda f: spoiled(f, "c", fc__bias=torch.ones(3)), [], "task 'c': 'fc.bias'"),
        (
            lambda f: spoiled(f, "c", fc__bias=torch.full((32,), torch.nan)),
            [],
            "'fc.bias' of task 'c'",
        ),
        (
            lambda f: save_file(load_file(f / "base.safetensors"), f / "a.safetensors"),
            [],
            "equals the base",
        ),
        (
            lambda f: spoiled(f, "base", fc__weight=torch.zeros(32, 32)),
            ["--purify", "pact"],
            "exclude",
        ),
        (lambda f: (f / "a.safetensors").write_bytes(b"x" * 99), [], "a.safetensors is no whole"),
        (lambda f: (f / "a.safetensors").unlink(), [], "does not exist"),
        (None, ["--rule", "best"], "rule 'best' is unknown"),
        (None, ["--purify", "soap"], "purifier 'soap' is unknown"),
        (None, ["--purify", "pact", "--set", "pact.cor=3"], "option 'cor'"),
        (None, ["--purify", "pact", "--set", "pact.core=99"], "pact.core=99"),
        (None, ["--set", "core=3"], "METHOD.OPTION=VALUE"),
        (None, ["--weights", "1,2"], "3 numbers"),
        (None, ["--weights", "1,x,2"], "numbers with commas"),
        (None, ["--device", "toaster"], "--device toaster"),
        (None, ["--threads", "0"], "--threads"),
        (None, ["--max-shard-size", "big"], "size"),
        (None, ["--include", "*.nothing"], "matches no tensor"),
        (None, ["--scale", "nan"], "finite"),
    ],
)
def test_user_errors_are_one_message_and_leave_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], spoil, arguments: list[str], message: str
):
    if spoil:
        spoil(files)
    before = sorted(files.iterdir())
    for output in ("out", "out.safetensors"):
        assert run(files, "-o", str(files / output), *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("minipact: error: ")
        assert message in error
        assert "Traceback" not in error
    assert sorted(files.iterdir()) == before


def test_names_of_tasks_and_outputs(files: Path, capsys: pytest.CaptureFixture[str]):
    base, a = str(files / "base.safetensors"), str(files / "a.safetensors")
    assert main(["merge", base, a, a, "-o", str(files / "o.safetensors")]) == 2
    assert "NAME=PATH" in capsys.readouterr().err
    assert main(["merge", base, a, "-o", a, "--overwrite"]) == 2
    assert "is an input too" in capsys.readouterr().err
    assert main(["merge", base, a, "-o", str(files / "b.safetensors")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["merge", base])
    assert stop.value.code == 2


def test_full_disk_is_a_failure_without_output(files: Path):
    """A real one: the process may write no file beyond 2 kB."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from minipact.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for output in ("out", "out.safetensors"):
        command = [str(files / f"{n}.safetensors") for n in ("base", "a", "b")]
        done = subprocess.run(
            [sys.executable, "-c", script, "merge", *command, "-o", str(files / output)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "no output was written" in done.stderr
        assert not list(files.glob("out*"))
