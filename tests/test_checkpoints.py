"""Reading and writing of checkpoint files: round trips, layouts, damage, interruption."""

import contextlib
import errno
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipact import checkpoints
from minipact.checkpoints import (
    CheckpointError,
    check_output,
    copy_side_files,
    open_checkpoint,
    parse_size,
    save_checkpoint,
    sha256,
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(20, 10, generator=g),
        "b.weight": torch.randn(30, 10, generator=g).bfloat16(),
        "c.bias": torch.randn(7, generator=g).half(),
        "steps": torch.tensor(5),
    }


def same(found, expected: dict[str, Tensor]) -> bool:
    return list(sorted(found)) == sorted(expected) and all(
        found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in expected.items()
    )


# ---- Round trips ---------------------------------------------------------------------------------


def test_single_file(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "x.safetensors"
    assert save_checkpoint(path, state.items(), metadata={"note": "hello"}) == [path]
    read = open_checkpoint(path)
    assert same(read, state)
    assert same(load_file(path), state)
    assert read.metadata == {"format": "pt", "note": "hello"}
    assert read.files == [path]
    assert len(read) == 4
    meta = read.meta("b.weight")
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", (30, 10), torch.bfloat16)


def test_folder_with_one_shard(tmp_path: Path, state: dict[str, Tensor]):
    files = save_checkpoint(tmp_path / "out", state.items())
    assert [file.name for file in files] == ["model.safetensors"]
    assert same(open_checkpoint(tmp_path / "out"), state)


def test_shards_and_their_index(tmp_path: Path, state: dict[str, Tensor]):
    out = tmp_path / "out"
    files = save_checkpoint(out, state.items(), max_shard_size=1000)
    assert [file.name for file in files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(out / shard)[name], state[name])
    assert same(open_checkpoint(out), state)
    assert "2 shards" in open_checkpoint(out).layout


def test_open_clip_folder(tmp_path: Path, state: dict[str, Tensor]):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    assert same(open_checkpoint(tmp_path), state)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(tmp_path: Path, state: dict[str, Tensor], suffix: str, zipped: bool):
    path = tmp_path / f"x{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(open_checkpoint(path), state)
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    read = open_checkpoint(path)
    assert same(read, state)
    assert read.meta("a.weight").shape == (20, 10)


def test_module_prefix_stays_unless_all_have_it(tmp_path: Path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt")) == {"module.a", "b"}


def test_same_tensors_same_bytes(tmp_path: Path, state: dict[str, Tensor]):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_checkpoint(one, state.items())
    save_checkpoint(two, ((name, x.clone()) for name, x in state.items()))
    assert sha256(one) == sha256(two)


def test_views_and_many_metadata(tmp_path: Path):
    views = {"t": torch.arange(6.0).view(2, 3).mT}
    texts = {f"key {i}": "ä" * i for i in range(9)}
    digests = set()
    for i in range(4):
        save_checkpoint(tmp_path / f"{i}.safetensors", views.items(), metadata=texts)
        digests.add(sha256(tmp_path / f"{i}.safetensors"))
    assert len(digests) == 1
    read = open_checkpoint(tmp_path / "0.safetensors")
    assert read.metadata == {"format": "pt", **texts}
    assert torch.equal(read["t"], views["t"])


def test_side_files(tmp_path: Path):
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "secret.py",
        "a.safetensors",
    ):
        (source / name).write_text("{}")
    assert copy_side_files(source, out) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert copy_side_files(source / "config.json", out) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), (7, 7), ("9", 9)]
)
def test_sizes(text, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 apples", "1e9"])
def test_bad_sizes(text: str):
    with pytest.raises(CheckpointError, match="size"):
        parse_size(text)


# ---- Damaged and dangerous files -----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], share: float):
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no whole safetensors"):
        open_checkpoint(path)


def test_truncated_state_dict(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "x.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        open_checkpoint(path)


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    for zipped in (True, False):
        torch.save({"w": Bomb()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="trust"):
            open_checkpoint(tmp_path / "x.pt")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"y\.bin"):
        open_checkpoint(tmp_path / "y.bin")
    assert not (tmp_path / "exploded").exists()


def test_whole_pickled_modules_come_with_a_recipe(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "encoder.pt")
    with pytest.raises(CheckpointError, match=r"(?s)convert it elsewhere.*save_file"):
        open_checkpoint(tmp_path / "encoder.pt")


def test_no_state_dict(tmp_path: Path):
    torch.save({"w": torch.zeros(1), "lr": 0.1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        open_checkpoint(tmp_path / "x.pt")


def sharded(tmp_path: Path, state: dict[str, Tensor]) -> tuple[Path, dict]:
    out = tmp_path / "model"
    save_checkpoint(out, state.items(), max_shard_size=1000)
    return out, json.loads((out / checkpoints.INDEX).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({"a.weight": "model-9.safetensors"}), "not there"),
        (
            lambda i: i["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}),
            "'ghost'",
        ),
        (lambda i: i["weight_map"].pop("steps"), "'steps'"),
        (lambda i: i["weight_map"].update({"steps": "../x.safetensors"}), "outside"),
        (lambda i: i.pop("weight_map"), "no index"),
        (lambda i: i.update(weight_map=[1]), "no index"),
    ],
)
def test_wrong_index(tmp_path: Path, state: dict[str, Tensor], change, message: str):
    out, index = sharded(tmp_path, state)
    change(index)
    (out / checkpoints.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(out)


def test_tensor_in_two_shards(tmp_path: Path, state: dict[str, Tensor]):
    out, _ = sharded(tmp_path, state)
    save_file(state, out / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="two shards"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no safetensors file"),
        (["a.bin"], "name the file, a.bin"),
        (["a.safetensors", "b.safetensors"], "several"),
    ],
)
def test_odd_folders(tmp_path: Path, names: list[str], message: str):
    for name in names:
        save_file({"w": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_odd_paths(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(CheckpointError, match="unknown ending"):
        open_checkpoint(tmp_path / "x.onnx")


@settings(max_examples=150, deadline=None)
@given(
    header=st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.text(max_size=5),
            st.fixed_dictionaries(
                {},
                optional={
                    "dtype": st.sampled_from(["F32", "BF16", "X", "F4", "C64"]) | st.integers(),
                    "shape": st.lists(st.integers(-1, 9), max_size=3),
                    "data_offsets": st.lists(st.integers(-1, 99), max_size=3),
                },
            ),
            max_size=3,
        ).map(lambda d: json.dumps(d).encode()),
    ),
    length=st.none() | st.integers(0, 2**64 - 1),
    body=st.binary(max_size=100),
)
def test_any_header_is_read_or_refused(tmp_path_factory, header: bytes, length, body: bytes):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    with contextlib.suppress(CheckpointError):
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            assert checkpoint[name].shape == checkpoint.meta(name).shape


# ---- All or nothing ------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, output: str, error):
    def tensors():
        yield "a", torch.zeros(1000)
        yield "b", torch.zeros(1000)
        raise error

    with pytest.raises(error):
        save_checkpoint(tmp_path / output, tensors(), max_shard_size=4000)
    assert left(tmp_path) == []


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, output: str, call: str, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / output, [("a", torch.zeros(10))])
    assert left(tmp_path) == []


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_existing_output(tmp_path: Path, state: dict[str, Tensor], output: str):
    path = tmp_path / output
    save_checkpoint(path, state.items())
    with pytest.raises(CheckpointError, match="--overwrite"):
        save_checkpoint(path, [("z", torch.zeros(1))])
    assert same(open_checkpoint(path), state)
    save_checkpoint(path, [("z", torch.zeros(1))], overwrite=True)
    assert list(open_checkpoint(path)) == ["z"]
    assert left(tmp_path) == [output]


def test_failed_overwriting_keeps_the_old(tmp_path: Path, state: dict[str, Tensor], monkeypatch):
    for output in ("out", "out.safetensors"):
        save_checkpoint(tmp_path / output, state.items())

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "replace", fail)
    for output in ("out", "out.safetensors"):
        with pytest.raises(OSError, match="broken disk"):
            save_checkpoint(tmp_path / output, [("z", torch.zeros(1))], overwrite=True)
        assert same(open_checkpoint(tmp_path / output), state)
    assert left(tmp_path) == ["out", "out.safetensors"]


def test_remains_of_a_killed_run_are_no_checkpoint_and_are_replaced(tmp_path: Path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    save_file({"w": torch.zeros(1)}, partial / "shard-0")
    with pytest.raises(CheckpointError):
        open_checkpoint(partial)
    save_checkpoint(tmp_path / "out", [("w", torch.ones(1))])
    assert left(tmp_path) == ["out"]


def test_outputs_that_cannot_be(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for path, message in (
        (tmp_path / "x.pt", "pickles"),
        (tmp_path / "no" / "x.safetensors", "does not exist"),
        (tmp_path / "photos", "without weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_output(path, overwrite=True)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="another kind"):
        check_output(tmp_path / "d.safetensors", overwrite=True)
