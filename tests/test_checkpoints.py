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
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from helpers import same, single
from minipact import checkpoints
from minipact.checkpoints import open_checkpoint, sha256
from minipact.errors import CheckpointError
from minipact.output import Output, check_output, parse_size, save_checkpoint


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {
        "a.weight": single(20, 10),
        "b.weight": single(30, 10, seed=1).bfloat16(),
        "c.bias": single(7, seed=2).half(),
        "steps": torch.tensor(5),
    }


# ---- Round trips ---------------------------------------------------------------------------------


def test_single_file(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "x.safetensors"
    assert save_checkpoint(path, state, metadata={"note": "hello"}) == [path]
    read = open_checkpoint(path)
    assert same(read, state)
    assert same(load_file(path), state)
    assert read.metadata == {"format": "pt", "note": "hello"}
    assert read.files == [path]
    assert len(read) == 4
    meta = read.meta("b.weight")
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", (30, 10), torch.bfloat16)


def test_folder_with_one_shard(tmp_path: Path, state: dict[str, Tensor]):
    files = save_checkpoint(tmp_path / "out", state)
    assert [file.name for file in files] == ["model.safetensors"]
    assert same(open_checkpoint(tmp_path / "out"), state)


def test_shards_and_their_index(tmp_path: Path, state: dict[str, Tensor]):
    out = tmp_path / "out"
    files = save_checkpoint(out, state, max_shard_size=1000)
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
    save_checkpoint(one, state)
    save_checkpoint(two, open_checkpoint(one))
    assert sha256(one) == sha256(two)


def test_views_and_many_metadata(tmp_path: Path):
    views = {"t": torch.arange(6.0).view(2, 3).mT}
    texts = {f"key {i}": "ä" * i for i in range(9)}
    digests = set()
    for i in range(4):
        save_checkpoint(tmp_path / f"{i}.safetensors", views, metadata=texts)
        digests.add(sha256(tmp_path / f"{i}.safetensors"))
    assert len(digests) == 1
    read = open_checkpoint(tmp_path / "0.safetensors")
    assert read.metadata == {"format": "pt", **texts}
    assert torch.equal(read["t"], views["t"])


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


def test_tensors_may_lie_at_any_byte_of_a_file(tmp_path: Path):
    x, y = torch.arange(6.0).view(2, 3), torch.arange(5, dtype=torch.float64)
    places = {"odd": ("U8", [1], 0, 1), "x": ("F32", [2, 3], 1, 25), "y": ("F64", [5], 25, 65)}
    header = json.dumps(
        {
            name: {"dtype": d, "shape": s, "data_offsets": [i, j]}
            for name, (d, s, i, j) in places.items()
        }
    ).encode()
    header += b" " * (1 - len(header) % 2)
    path = tmp_path / "odd.safetensors"
    numbers = b"\x07" + x.numpy().tobytes() + y.numpy().tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    found = open_checkpoint(path)
    assert found["odd"].tolist() == [7]
    assert torch.equal(found["x"], x)
    assert torch.equal(found["y"] + 1, y + 1)


def test_a_file_that_is_replaced_while_open_still_reads_as_it_was(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(4)}, path)
    found = open_checkpoint(path)
    save_file({"w": torch.zeros(9)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert found["w"].tolist() == [1, 1, 1, 1]


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


class Encoder(torch.nn.Module):
    """As the field's older checkpoints hold it: a whole module, with functions and options."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.model.again = self.model[0]
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.options, self.act, self.names = Path("x"), torch.nn.functional.gelu, {"a", "b"}


def test_whole_pickled_modules_are_read_without_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder = Encoder()
    torch.save(encoder, tmp_path / "encoder.pt")
    expected = encoder.state_dict()

    def explode(*_: object) -> None:
        raise AssertionError("its code ran")

    for name in ("__init__", "__setstate__"):
        monkeypatch.setattr(Encoder, name, explode)
    read = open_checkpoint(tmp_path / "encoder.pt")
    assert list(read) == list(expected)
    assert same(read, expected)
    assert read.aliases == {
        "model.again.weight": "model.0.weight",
        "model.again.bias": "model.0.bias",
    }


def test_modules_in_the_old_format_come_with_a_recipe(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "encoder.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"(?s)convert it elsewhere.*save_file"):
        open_checkpoint(tmp_path / "encoder.pt")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_comes_with_a_recipe(tmp_path: Path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript program.*torch\.jit\.load"):
        open_checkpoint(tmp_path / "ViT-B-32.pt")


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, os.system, pickle.loads])
def test_no_function_of_a_pickled_module_is_called(tmp_path: Path, function):
    flag = tmp_path / "exploded"
    arguments = {getattr: (os, "system"), __import__: ("antigravity",)}.get(
        function, (f"open({str(flag)!r}, 'w')",)
    )
    module = torch.nn.Linear(2, 2)
    module.evil = Evil(function, *arguments)
    module.odd = Evil(torch.nn.Module)
    if function is getattr:
        module.evil = Evil(function, "text", "upper")
    torch.save(module, tmp_path / "x.pt")
    with contextlib.suppress(CheckpointError):
        assert list(open_checkpoint(tmp_path / "x.pt")) == ["weight", "bias"]
    assert not flag.exists()


def test_shared_tensors_have_aliases(tmp_path: Path):
    x = torch.randn(4, 2)
    state = {"embed": x, "head": x, "part": x[:2], "turned": x.mT, "copy": x.clone()}
    torch.save(state, tmp_path / "x.pt")
    read = open_checkpoint(tmp_path / "x.pt")
    assert read.aliases == {"head": "embed"}
    assert same(read, state)
    assert list(read.without({"head"})) == ["embed", "part", "turned", "copy"]
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    model["b"] = model["a"]
    save_model(model, str(tmp_path / "m.safetensors"))
    read = open_checkpoint(tmp_path / "m.safetensors")
    assert same(read, model.state_dict())
    assert set(read.aliases) == {"b.weight", "b.bias"}


def test_sparse_tensors_are_refused(tmp_path: Path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'w' is sparse"):
        open_checkpoint(tmp_path / "x.pt")


def test_no_state_dict(tmp_path: Path):
    torch.save({"w": torch.zeros(1), "lr": 0.1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        open_checkpoint(tmp_path / "x.pt")


def sharded(tmp_path: Path, state: dict[str, Tensor]) -> tuple[Path, dict]:
    out = tmp_path / "model"
    save_checkpoint(out, state, max_shard_size=1000)
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


def test_odd_tensors_are_named(tmp_path: Path):
    header = json.dumps({"q": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    length = len(header).to_bytes(8, "little")
    (tmp_path / "x.safetensors").write_bytes(length + header + b"\0")
    with pytest.raises(CheckpointError, match="tensor 'q' is of the unsupported type F4: convert"):
        open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="'__metadata__' cannot be written"):
        save_checkpoint(tmp_path / "out", {"__metadata__": torch.ones(1)})
    assert left(tmp_path) == ["x.safetensors"]
    save_file({"pt": torch.ones(2)}, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert list(open_checkpoint(tmp_path / "y.safetensors")) == ["pt"]


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
    class Failing(dict):
        def meta(self, name: str) -> Tensor:
            return super().__getitem__(name)

        def __getitem__(self, name: str) -> Tensor:
            if name == "c":
                raise error
            return super().__getitem__(name)

    state = Failing({name: torch.zeros(1000) for name in "abc"})
    with pytest.raises(error):
        save_checkpoint(tmp_path / output, state, max_shard_size=4000)
    assert left(tmp_path) == []


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, output: str, call: str, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / output, {"a": torch.zeros(10)})
    assert left(tmp_path) == []


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_existing_output(tmp_path: Path, state: dict[str, Tensor], output: str):
    path = tmp_path / output
    save_checkpoint(path, state)
    with pytest.raises(CheckpointError, match="--overwrite"):
        save_checkpoint(path, {"z": torch.zeros(1)})
    assert same(open_checkpoint(path), state)
    save_checkpoint(path, {"z": torch.zeros(1)}, overwrite=True)
    assert list(open_checkpoint(path)) == ["z"]
    assert left(tmp_path) == [output]


def test_failed_overwriting_keeps_the_old(tmp_path: Path, state: dict[str, Tensor], monkeypatch):
    for output in ("out", "out.safetensors"):
        save_checkpoint(tmp_path / output, state)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "replace", fail)
    for output in ("out", "out.safetensors"):
        with pytest.raises(OSError, match="broken disk"):
            save_checkpoint(tmp_path / output, {"z": torch.zeros(1)}, overwrite=True)
        assert same(open_checkpoint(tmp_path / output), state)
    assert left(tmp_path) == ["out", "out.safetensors"]


def test_remains_of_a_killed_run_are_no_checkpoint_and_are_replaced(tmp_path: Path):
    partial = tmp_path / "out.partial"
    unfinished = Output(tmp_path / "out", {"w": torch.ones(1), "v": torch.ones(1)})
    unfinished.start()
    unfinished.write("w", torch.ones(1))
    unfinished.settle()
    unfinished.close(keep=True)
    with pytest.raises(CheckpointError, match="--resume"):
        open_checkpoint(partial)
    with pytest.raises(CheckpointError, match="no whole safetensors"):
        open_checkpoint(partial / "out")
    save_checkpoint(tmp_path / "out", {"w": torch.ones(1)})
    assert left(tmp_path) == ["out"]


def test_outputs_that_cannot_be(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for path, message in (
        (tmp_path / "x.pt", "pickles"),
        (tmp_path / "no" / "x.safetensors", "does not exist"),
        (tmp_path / "photos", "without weights"),
        (Path(), "a name"),
        (Path(".."), "a name"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_output(path, overwrite=True)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="another kind"):
        check_output(tmp_path / "d.safetensors", overwrite=True)


def test_a_folder_of_someone_else_is_not_cleared_away(tmp_path: Path, state: dict[str, Tensor]):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="move it away"):
        save_checkpoint(tmp_path / "out", {"w": torch.ones(1)})
    assert left(tmp_path / "out.partial") == ["thesis.tex"]
    save_checkpoint(tmp_path / "model", state)
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"model\.old is in the way"):
        save_checkpoint(tmp_path / "model", {"w": torch.ones(1)}, overwrite=True)
    assert left(tmp_path / "model.old") == ["thesis.tex"]
    assert same(open_checkpoint(tmp_path / "model"), state)


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_overwriting_a_link_leaves_its_target(
    tmp_path: Path, state: dict[str, Tensor], output: str
):
    path, target = tmp_path / output, tmp_path / f"target-{output}"
    save_checkpoint(target, state)
    path.symlink_to(target)
    save_checkpoint(path, {"w": torch.ones(1)}, overwrite=True)
    assert list(open_checkpoint(path)) == ["w"]
    assert same(open_checkpoint(target), state)
    assert left(tmp_path) == [output, target.name]


# ---- Tensor by tensor ----------------------------------------------------------------------------


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path, state: dict[str, Tensor]):
    state |= {'ä "quoted"': torch.arange(3), "none": torch.zeros(0, 4), "odd": torch.ones(3).bool()}
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    save_checkpoint(tmp_path / "ours.safetensors", state)
    assert sha256(tmp_path / "ours.safetensors") == sha256(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_any_order_and_a_pause_give_the_same_bytes(
    tmp_path: Path, state: dict[str, Tensor], output: str
):
    save_checkpoint(tmp_path / f"whole{output}", state, max_shard_size=1000)
    names = list(reversed(state))
    for part in (names[:2], names[2:]):
        unfinished = Output(tmp_path / output, state, max_shard_size=1000)
        kept = unfinished.start({"seed": 1}, resume=True)
        assert kept == set(names) - set(part) - set(names[2:])
        for name in part:
            unfinished.write(name, state[name])
        unfinished.settle()
        if part == names[2:]:
            unfinished.commit()
        unfinished.close(keep=True)
    assert left(tmp_path) == sorted([output, f"whole{output}"])
    for file in (tmp_path / output).iterdir() if output == "out" else [tmp_path / output]:
        other = tmp_path / f"whole{output}"
        assert sha256(file) == sha256(other / file.name if output == "out" else other)


def test_resuming_needs_the_same_recipe_and_layout(tmp_path: Path, state: dict[str, Tensor]):
    def begin(recipe: dict, resume: bool, **settings) -> set[str]:
        output = Output(tmp_path / "out", state, **settings)
        try:
            output.start(recipe, resume)
            output.write("steps", state["steps"])
            output.settle()
            return output.done
        finally:
            output.close(keep=True)

    assert begin({"rule": "ties", "files": [1, 2]}, resume=True) == {"steps"}
    for recipe, message in (
        ({"rule": "pact", "files": [1, 2]}, "rule 'ties', now it is 'pact'"),
        ({"rule": "ties", "files": [1, 3]}, r"files \[1, 2\]"),
        ({"rule": "ties"}, "files"),
    ):
        with pytest.raises(CheckpointError, match=message):
            begin(recipe, resume=True)
    with pytest.raises(CheckpointError, match="layout"):
        begin({"rule": "ties", "files": [1, 2]}, resume=True, max_shard_size=1000)
    journal = tmp_path / "out.partial" / checkpoints.JOURNAL
    with journal.open("a") as file:
        file.write('{"done": "a.wei')  # a torn line
    unfinished = Output(tmp_path / "out", state)
    assert unfinished.start({"rule": "ties", "files": [1, 2]}, resume=True) == {"steps"}
    unfinished.close(keep=True)
    unfinished = Output(tmp_path / "out", state)
    assert unfinished.start({"rule": "ties", "files": [1, 2]}) == set()
    unfinished.close(keep=False)
    assert left(tmp_path) == []


def test_two_runs_into_one_output(tmp_path: Path, state: dict[str, Tensor]):
    first = Output(tmp_path / "out", state)
    first.start()
    for resume in (True, False):
        second = Output(tmp_path / "out", state)
        with pytest.raises(CheckpointError, match="another run"):
            second.start(resume=resume)
        second.close(keep=False)
    for name, x in state.items():
        first.write(name, x)
    first.commit()
    assert same(open_checkpoint(tmp_path / "out"), state)


def test_what_was_not_announced_is_refused(tmp_path: Path):
    output = Output(tmp_path / "out.safetensors", {"w": torch.zeros(3)})
    output.start()
    for wrong in (torch.zeros(4), torch.zeros(3).half()):
        with pytest.raises(CheckpointError, match="'w' is"):
            output.write("w", wrong)
    with pytest.raises(CheckpointError, match="'w' was never written"):
        output.commit()
    output.close(keep=False)
    with pytest.raises(CheckpointError, match="'w' of torch.complex128"):
        Output(tmp_path / "out", {"w": torch.zeros(3, dtype=torch.complex128)})
    assert left(tmp_path) == []


def test_reading_ahead_is_a_hint(tmp_path: Path, state: dict[str, Tensor]):
    save_checkpoint(tmp_path / "out", state, max_shard_size=1000)
    read = open_checkpoint(tmp_path / "out")
    for name, (file, start, length) in read._places.items():
        assert length == state[name].nbytes
        flat = state[name].reshape(-1).view(torch.uint8)
        assert file.read_bytes()[start : start + length] == bytes(flat.tolist())
        read.prefetch(name)
    read.prefetch("nothing")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.eye(3).to_sparse(), "sparse"), (torch.empty(3, device="meta"), "without data")],
)
def test_tensors_without_plain_numbers_are_refused(tmp_path: Path, tensor: Tensor, kind: str):
    torch.save({"w": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"'w' is {kind}"):
        open_checkpoint(tmp_path / "x.pt")
