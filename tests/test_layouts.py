"""Folders and files as the field's libraries leave them: what is read, and outputs that load there."""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import contents, fails, same, single, tuned, wait_until, write_models
from minipact import layouts
from minipact.__main__ import PURIFIERS, RULES, main
from minipact.checkpoints import open_checkpoint
from minipact.errors import CheckpointError
from minipact.layouts import find_layout
from minipact.merging import METHODS
from minipact.methods import is_built_in
from minipact.output import Output

State = dict[str, Tensor]


def model(seed: int = 0) -> State:
    return {"a.weight": single(6, 4, seed=seed), "b.weight": single(4, 4, seed=seed + 50)}


def write(folder: Path, files: Mapping[str, object]) -> Path:
    """A folder of files: tensors by name as safetensors or pickles, other things as JSON, text as it is."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(content, path)
        elif path.suffix in (".bin", ".pt", ".pth"):
            torch.save(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def sharded(stem: str, ending: str, state: State, variant: str = "") -> dict[str, object]:
    """Files of a model in two shards, one tensor in each, and their index."""
    dot = f".{variant}" if variant else ""
    shards = [f"{stem}{dot}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": dict(zip(state, shards, strict=True))}
    files: dict[str, object] = {f"{stem}.{ending}.index{dot}.json": index}
    return files | {shard: {name: state[name]} for name, shard in index["weight_map"].items()}


def merge(root: Path, *options: str, output: str = "out", tasks: str = "a") -> Path:
    """Merge the folders base and a below a root; the output."""
    inputs = [str(root / name) for name in ("base", *tasks.split())]
    assert main(["merge", *inputs, "-o", str(root / output), "--scale", "1", *options]) == 0
    return root / output


def refused(path: Path, *parts: str) -> None:
    """Opening a path fails with a message that holds all these parts."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    for part in parts:
        assert part in str(error.value)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---- Pickles of transformers ---------------------------------------------------------------------


def test_pytorch_model_alone_is_read_and_written_as_safetensors(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        files = {
            "pytorch_model.bin": model(seed),
            "config.json": {},
            "training_args.bin": {"lr": 1},
        }
        write(tmp_path / name, {**files, "optimizer.pt": {}, "scheduler.pt": {}})
    read = open_checkpoint(tmp_path / "base")
    assert same(read, model())
    assert read.layout == "folder with pytorch_model.bin"
    out = merge(tmp_path)
    assert files_in(out) == ["README.md", "config.json", "model.safetensors"]
    assert same(load_file(out / "model.safetensors"), mp.merge(model(), [model(1)], scale=1))


def test_sharded_pickles(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        files = sharded("pytorch_model", "bin", model(seed))
        write(tmp_path / name, {**files, "config.json": {}})
    assert same(open_checkpoint(tmp_path / "base"), model())
    assert open_checkpoint(tmp_path / "base").layout == "2 .bin shards"
    out = merge(tmp_path)
    assert files_in(out) == ["README.md", "config.json", "model.safetensors"]
    assert same(load_file(out / "model.safetensors"), mp.merge(model(), [model(1)], scale=1))


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines.update(ghost=lines["a.weight"]),
            "tensor 'ghost' is in no shard and in",
        ),
        (lambda lines: lines.pop("a.weight"), "names 1 of 2 shards"),
        (lambda lines: lines.update({"a.weight": lines["b.weight"]}), "names 1 of 2 shards"),
        (lambda lines: lines.update(zip(lines, reversed([*lines.values()]), strict=True)), "is in"),
        (lambda lines: lines.update({"a.weight": "x.bin"}), "names x.bin, which is not there"),
        (lambda lines: lines.update({"a.weight": "../x.bin"}), "outside of its folder"),
        (lambda lines: lines.clear(), "is no index of shards"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, ending: str, change: Callable[[dict], object], message: str
):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = sharded(stem, ending, model())
    index = f"{stem}.{ending}.index.json"
    change(files[index]["weight_map"])  # type: ignore[index]
    refused(write(tmp_path, files), index, message)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_one_shard_is_no_model(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, sharded(stem, ending, model(seed)))
    first = f"{stem}-00001-of-00002.{ending}"
    paths = [str(tmp_path / name / first) for name in ("base", "a")]
    error = fails(capsys, 2, *paths, "-o", str(tmp_path / "out"))
    assert f"{first} is one of 2 shards, a part of a model only: give {tmp_path / 'base'}" in error
    for name in ("base", "a"):
        (tmp_path / name / f"{stem}.{ending}.index.json").unlink()
    for rest in range(2):  # both shards, and one alone
        error = fails(
            capsys, 2, *[str(tmp_path / x) for x in ("base", "a")], "-o", str(tmp_path / "out")
        )
        assert (
            f"{first} for one, without their index: fetch {stem}.{ending}.index.json too" in error
        )
        assert "name the file" not in error
        if not rest:
            (tmp_path / "base" / f"{stem}-00002-of-00002.{ending}").unlink()


def test_the_index_of_a_variant_is_named(tmp_path: Path):
    files = sharded("diffusion_pytorch_model", "safetensors", model(), "fp16")
    (write(tmp_path, files) / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    refused(tmp_path, "fetch diffusion_pytorch_model.safetensors.index.fp16.json too")


def test_safetensors_go_before_pickles_and_what_was_not_fetched(tmp_path: Path):
    pickled = sharded("pytorch_model", "bin", model(1))
    files = {name: x for name, x in pickled.items() if name.endswith(".json")}
    assert same(open_checkpoint(write(tmp_path, {**files, "model.safetensors": model()})), model())
    write(tmp_path, {"pytorch_model.bin": model(1)})
    assert same(open_checkpoint(tmp_path), model())


def test_a_file_beside_the_shards_of_another_is_refused(tmp_path: Path):
    files = sharded("model", "safetensors", model())
    write(tmp_path / "x", {**files, "model.safetensors": model(1)})
    refused(tmp_path / "x", "both model.safetensors and the shards of model.safetensors.index.json")
    index = {"weight_map": dict.fromkeys(model(), "model.safetensors")}
    write(tmp_path / "y", {"model.safetensors": model(), "model.safetensors.index.json": index})
    assert same(open_checkpoint(tmp_path / "y"), model())


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["a.pt", "b.pt"], ["name the file, if each is a whole model", "'a.pt', 'b.pt'"]),
        (["a.pt", "optimizer.pt", "training_args.bin"], ["name the file, a.pt"]),
        (["optimizer.pt"], ["is it the right folder?"]),
        (["checkpoint-5/pytorch_model.bin"], ["give a folder in it, 'checkpoint-5'"]),
        (["a.safetensors", "b.safetensors"], ["several", "if each is a whole model"]),
        (["a.safetensors.index.json", "b.safetensors.index.json"], ["several indexes of shards"]),
    ],
)
def test_folders_without_a_model_say_what_to_give(
    tmp_path: Path, files: list[str], parts: list[str]
):
    refused(write(tmp_path, {name: {} if ".json" in name else model() for name in files}), *parts)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tf_model.h5", "config.json"], "but 'tf_model.h5', which is not read here: save the"),
        (["flax_model.msgpack"], "but 'flax_model.msgpack', which is not read"),
        (["weights.npz"], "but 'weights.npz', which is not read here"),
        (["fsdp_0/__0_0.distcp"], "a distributed checkpoint, fsdp_0: .*dcp_to_torch"),
        (["__0_0.distcp", ".metadata"], "a distributed checkpoint, x: .*dcp_to_torch"),
        (["zero_to_fp32.py", "latest", "global_step9/mp_rank_00_model_states.pt"], "run its zero_to_fp32"),
        (["snapshots/abc/model.safetensors"], "an entry of a cache: give a folder in it, 'snapshots/abc'"),
        (["consolidated.00.pth", "consolidated.01.pth"], "holds parts of a model, 'consolidated.00.pth', 'c"),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "holds parts of a model"),
        (["consolidated.00.pth", "params.json"], "name the file, consolidated.00.pth"),
    ],
)  # fmt: skip
def test_folders_of_other_tools_say_what_to_do(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x")


def test_one_part_of_a_parallel_model_is_no_model(tmp_path: Path):
    """Merging the first of two would give half a model."""
    first = tmp_path / "consolidated.00.pth"
    torch.save(model(), first)
    assert same(open_checkpoint(first), model())
    torch.save({"c.weight": single(2, 2)}, tmp_path / "consolidated.01.pth")
    refused(first, "one of 2 parts of a model, 'consolidated.00.pth', 'consolidated.01.pth': join")


def test_other_names_are_kept(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, {"vae-ft.1.safetensors": model(seed)})
    assert files_in(merge(tmp_path)) == ["README.md", "vae-ft.1.safetensors"]
    state = {name: x.clone() for name, x in model().items()}
    write(tmp_path / "shards", sharded("vae-ft.1", "safetensors", state))
    assert same(open_checkpoint(tmp_path / "shards"), model())
    for name in ("base", "a"):
        (tmp_path / name / "vae-ft.1.safetensors").rename(
            tmp_path / name / "m-00001-of-00001.safetensors"
        )
    assert "m.safetensors" in files_in(merge(tmp_path, output="two"))


# ---- diffusers -----------------------------------------------------------------------------------

DIFFUSION = "diffusion_pytorch_model"


@pytest.mark.parametrize("variant", ["", "fp16", "non_ema"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_names_of_diffusers_are_kept(tmp_path: Path, variant: str, in_shards: bool):
    dot = f".{variant}" if variant else ""
    for seed, name in enumerate(("base", "a")):
        files = {f"{DIFFUSION}{dot}.safetensors": model(seed)}
        if in_shards:
            files = sharded(DIFFUSION, "safetensors", model(seed), variant)
        write(tmp_path / name, {**files, "config.json": {"_class_name": "UNet2DModel"}})
    assert same(open_checkpoint(tmp_path / "base"), model())
    out = merge(tmp_path, "--max-shard-size", "100B" if in_shards else "1GB")
    assert files_in(out) == sorted([*files_in(tmp_path / "base"), "README.md"])
    assert same(open_checkpoint(out), mp.merge(model(), [model(1)], scale=1))
    loading = f'.from_pretrained(".", variant="{variant}")' if variant else '.from_pretrained(".")'
    assert f"diffusers.UNet2DModel{loading}" in (out / "README.md").read_text()


def test_what_has_no_variant_goes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = [f"{DIFFUSION}{dot}.safetensors" for dot in ("", ".fp16", ".non_ema")]
    for seed, name in enumerate(("base", "a")):
        states = {file: model(seed + 2 * i) for i, file in enumerate(names)}
        write(tmp_path / name, states | {"config.json": {"_class_name": "X"}})
    out = merge(tmp_path)
    assert same(open_checkpoint(out), mp.merge(model(), [model(1)], scale=1))
    assert (
        f"not in the output, as it is not merged: '{names[1]}', '{names[2]}'"
        in capsys.readouterr().out
    )
    for name in ("base", "a"):
        (tmp_path / name / names[0]).unlink()
    refused(tmp_path / "base", "holds variants", names[1], names[2], "name the file to read")
    inputs = [str(tmp_path / x / names[2]) for x in ("base", "a")]
    assert (
        main(["merge", inputs[0], f"a={inputs[1]}", "-o", str(tmp_path / "two"), "--scale", "1"])
        == 0
    )
    assert files_in(tmp_path / "two") == ["README.md", "config.json", names[2]]


def test_a_pipeline_is_refused_by_the_names_of_its_models(tmp_path: Path):
    files = {f"{part}/{DIFFUSION}.safetensors": model() for part in ("unet", "vae")}
    write(tmp_path, {**files, "model_index.json": {}, "scheduler/scheduler_config.json": {}})
    refused(tmp_path, "is a pipeline of several models", "'unet', 'vae'")
    write(tmp_path, {"v1-5.safetensors": model()})
    refused(tmp_path, "'unet', 'vae'")
    assert same(open_checkpoint(tmp_path / "v1-5.safetensors"), model())


def test_pickles_of_diffusers(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        write(
            tmp_path / name,
            {f"{DIFFUSION}.bin": model(seed), f"{DIFFUSION}.fp16.safetensors": model(9)},
        )
    assert same(open_checkpoint(tmp_path / "base"), model())  # as diffusers itself chooses
    assert files_in(merge(tmp_path)) == ["README.md", f"{DIFFUSION}.safetensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_components_load_in_diffusers(tmp_path: Path, variant: str | None):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=2,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a")):
        vae.load_state_dict(tuned(vae.state_dict(), seed))
        vae.save_pretrained(tmp_path / name, variant=variant, max_shard_size="20KB")
    out = merge(tmp_path, "--max-shard-size", "20KB", "--quiet")
    assert len(list(out.glob("*.safetensors"))) > 1
    loaded = diffusers.AutoencoderTiny.from_pretrained(out, variant=variant)
    assert same(loaded.state_dict(), open_checkpoint(out))


# ---- open_clip -----------------------------------------------------------------------------------

BOTH = {"open_clip_model.safetensors": model(), "model.safetensors": model(2)}


def test_weights_of_two_libraries_are_refused_by_name_and_each_file_gives_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for seed, name in enumerate(("base", "a")):
        states = {file: tuned(state, seed) if seed else state for file, state in BOTH.items()}
        configs = {
            "open_clip_config.json": {"model_cfg": {}},
            "config.json": {"model_type": "clip"},
        }
        write(tmp_path / name, states | configs | {"tokenizer.json": {}})
    error = fails(
        capsys, 2, *[str(tmp_path / x) for x in ("base", "a")], "-o", str(tmp_path / "out")
    )
    ways = [str(tmp_path / "base" / file) for file in BOTH]
    assert f"name the file in all inputs, {ways[0]} or {ways[1]} here" in error or (
        f"{ways[1]} or {ways[0]}" in error
    )
    assert (
        "open_clip_model.safetensors for open_clip and model.safetensors for transformers" in error
    )
    for file, lacking in (
        ("open_clip_model.safetensors", "model.safetensors"),
        ("model.safetensors", "open_clip_config.json', 'open_clip_model.safetensors"),
    ):
        inputs = [str(tmp_path / x / file) for x in ("base", "a")]
        out = tmp_path / f"out-{file.split('.')[0]}"
        assert main(["merge", inputs[0], f"a={inputs[1]}", "-o", str(out)]) == 0
        assert f"not in the output, as it is not merged: '{lacking}'" in capsys.readouterr().out
        kept = {"README.md", "tokenizer.json", "config.json", file}
        kept |= {"open_clip_config.json"} if file.startswith("open_clip") else set()
        assert files_in(out) == sorted(kept)
        assert open_checkpoint(out).files == [out / file]
        library = "open_clip" if file.startswith("open_clip") else "transformers"
        assert f"library_name: {library}" in (out / "README.md").read_text()


def test_the_configuration_that_is_there_decides(tmp_path: Path):
    write(tmp_path / "base", {**BOTH, "open_clip_config.json": {}})
    assert same(open_checkpoint(tmp_path / "base"), BOTH["open_clip_model.safetensors"])
    write(tmp_path / "two", {**BOTH, "config.json": {}})
    assert same(open_checkpoint(tmp_path / "two"), BOTH["model.safetensors"])
    refused(write(tmp_path / "three", BOTH), "weights of several libraries")
    diffusion = {f"{DIFFUSION}.safetensors": model(4), "model.safetensors": model(5)}
    write(tmp_path / "four", {**diffusion, "config.json": {"_class_name": "UNet2DModel"}})
    assert same(open_checkpoint(tmp_path / "four"), model(4))
    write(tmp_path / "five", {**diffusion, "config.json": {"model_type": "bert"}})
    assert same(open_checkpoint(tmp_path / "five"), model(5))


def test_older_names_of_open_clip(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        files = {"open_clip_pytorch_model.bin": model(seed), "open_clip_config.json": {}}
        write(tmp_path / name, files)
    out = merge(tmp_path, "--max-shard-size", "100B")  # open_clip knows no shards
    assert files_in(out) == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]


TINY_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_files_of_a_clip_folder_load_where_they_belong(tmp_path: Path):
    import open_clip
    import transformers

    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config)
    ours = open_clip.CLIP(
        **{k: v for k, v in TINY_CLIP.items() if k != "quick_gelu"}, quick_gelu=True
    )
    for seed, name in enumerate(("base", "a")):
        theirs.load_state_dict(tuned(theirs.state_dict(), seed))
        theirs.save_pretrained(tmp_path / name)
        state = {"open_clip_model.safetensors": tuned(ours.state_dict(), seed)}
        write(tmp_path / name, {**state, "open_clip_config.json": {"model_cfg": TINY_CLIP}})
    for file in BOTH:
        inputs = [str(tmp_path / x / file) for x in ("base", "a")]
        out = tmp_path / file.split(".")[0]
        options = ["--dtype", "bfloat16", "--quiet"]
        assert main(["merge", inputs[0], f"a={inputs[1]}", "-o", str(out), *options]) == 0
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip_model'}")
    stored = open_checkpoint(tmp_path / "open_clip_model")
    assert all(torch.equal(x, stored[name].float()) for name, x in loaded.state_dict().items())
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    stored = open_checkpoint(tmp_path / "model")
    assert all(
        torch.equal(x, stored[name]) for name, x in loaded.state_dict().items() if name in stored
    )


# ---- sentence-transformers -----------------------------------------------------------------------

DENSE = {"linear.weight": single(3, 4, seed=8), "linear.bias": single(3, seed=9)}


def modules(*paths: str) -> list[dict[str, str]]:
    return [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(paths)]


def sentence_model(
    folder: Path, seed: int = 0, first: str = "", dense: str = "model.safetensors"
) -> Path:
    head = tuned(DENSE, seed) if seed else DENSE
    at = f"{first}/" if first else ""
    return write(folder, {
        "modules.json": modules(first, "1_Pooling", "2_Dense"), "README.md": "theirs",
        f"{at}model.safetensors": model(seed), f"{at}config.json": {"torch_dtype": "float32"},
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        f"2_Dense/{dense}": head, "2_Dense/config.json": {"in_features": 4},
    })  # fmt: skip


@pytest.mark.parametrize("first", ["", "0_Transformer"])
@pytest.mark.parametrize("dense", ["model.safetensors", "pytorch_model.bin"])
def test_all_modules_of_sentence_transformers_are_merged(tmp_path: Path, first: str, dense: str):
    sentence_model(tmp_path / "base", first=first, dense=dense)
    sentence_model(tmp_path / "a", 1, dense=dense)
    read = open_checkpoint(tmp_path / "base")
    assert set(read) == {*model(), "2_Dense/linear.weight", "2_Dense/linear.bias"}
    assert read.layout == "folder with one safetensors file, with 2_Dense"
    out = merge(tmp_path, "--dtype", "bfloat16")
    at = f"{first}/" if first else ""
    assert files_in(out) == sorted([
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "README.md",
        f"{at}config.json", f"{at}model.safetensors", "modules.json",
    ])  # fmt: skip
    expected = mp.merge(DENSE, [tuned(DENSE, 1)], scale=1, dtype=torch.bfloat16)
    assert same(load_file(out / "2_Dense" / "model.safetensors"), expected)
    expected = mp.merge(model(), [model(1)], scale=1, dtype=torch.bfloat16)
    assert same(load_file(out / f"{at}model.safetensors"), expected)
    assert json.loads((out / f"{at}config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert 'sentence_transformers.SentenceTransformer(".")' in (out / "README.md").read_text()
    assert same(
        open_checkpoint(out), open_checkpoint(merge(tmp_path, "--overwrite", "--dtype", "bfloat16"))
    )


def test_modules_resume_and_shard_each_for_itself(tmp_path: Path):
    sentence_model(tmp_path / "base")
    state = dict(open_checkpoint(tmp_path / "base"))
    stems = find_layout(tmp_path / "base").stems
    for names in (list(state)[:2], list(state)[2:]):
        output = Output(tmp_path / "out", state, stems=stems, max_shard_size="50B")
        output.start({}, resume=True)
        for name in names:
            output.write(name, state[name])
        output.settle()
        if names[0] != next(iter(state)):
            output.commit()
        output.close(keep=True)
    assert "2_Dense/model.safetensors" in files_in(tmp_path / "out")
    assert "model-00002-of-00002.safetensors" in files_in(tmp_path / "out")
    write(tmp_path / "out", {"modules.json": modules("", "2_Dense")})
    assert same(open_checkpoint(tmp_path / "out"), state)


def test_a_module_that_a_task_lacks_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sentence_model(tmp_path / "base")
    write(tmp_path / "a", {"model.safetensors": model(1)})
    inputs = [str(tmp_path / x) for x in ("base", "a")]
    error = fails(capsys, 2, *inputs, "-o", str(tmp_path / "out"))
    assert "task 'a' lacks '2_Dense/linear.bias', '2_Dense/linear.weight'" in error


@pytest.mark.parametrize(
    "rule", [r for r in RULES if not {"covariance", "fisher"} & {*METHODS[r].needs}]
)
def test_a_module_that_no_task_changed_stays_as_it_is(tmp_path: Path, rule: str):
    for seed, name in enumerate(("base", "a", "b")):
        sentence_model(tmp_path / name, seed)
        write(tmp_path / name, {"2_Dense/model.safetensors": DENSE})
    options = ["--rule", rule, "--purify", "pact", "--set", "pact.core=2", "--set", "pact.task=2"]
    out = merge(tmp_path, *options, tasks="a b")
    assert same(load_file(out / "2_Dense" / "model.safetensors"), DENSE)


def test_a_file_of_a_model_with_modules_stands_for_itself(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        sentence_model(tmp_path / name, seed)
    inputs = [str(tmp_path / name / "model.safetensors") for name in ("base", "a")]
    assert main(["merge", inputs[0], f"a={inputs[1]}", "-o", str(tmp_path / "out")]) == 0
    assert files_in(tmp_path / "out") == ["README.md", "model.safetensors"]


def test_one_file_cannot_hold_several_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inputs = [str(sentence_model(tmp_path / name, seed)) for seed, name in enumerate(("base", "a"))]
    error = fails(capsys, 2, *inputs, "-o", str(tmp_path / "out.safetensors"))
    assert "has weights in '2_Dense' too: give a folder as the output" in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        (modules("", "../2_Dense"), ["names '../2_Dense' outside"]),
        (modules("", "/etc"), ["names '/etc' outside"]),
        (modules("0_Transformer", "2_Dense"), ["model.safetensors", "does not name", "'2_Dense'"]),
    ],
)
def test_odd_lists_of_modules(tmp_path: Path, listed: object, parts: list[str]):
    sentence_model(tmp_path)
    write(tmp_path, {"modules.json": listed})
    refused(tmp_path, *parts)


@pytest.mark.parametrize("text", ["{}", "not JSON"])
def test_modules_are_found_by_their_numbers_where_the_list_is_none(tmp_path: Path, text: str):
    sentence_model(tmp_path)
    write(tmp_path, {"modules.json": text})
    assert set(open_checkpoint(tmp_path)) == {*model(), *(f"2_Dense/{name}" for name in DENSE)}


def test_a_first_module_that_cannot_be_read_is_not_left_out(tmp_path: Path):
    sentence_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.h5")
    refused(tmp_path, f"{tmp_path} holds no safetensors file")


def test_modules_behind_a_router(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, {
            "modules.json": modules(""),
            "router_config.json": {"types": {"query_0_Static": "x", "document_0_Static": "y"}},
            "query_0_Static/model.safetensors": model(seed),
            "document_0_Static/model.safetensors": model(seed + 5),
        })  # fmt: skip
    out = merge(tmp_path)
    expected = mp.merge(model(5), [model(6)], scale=1)
    assert same(load_file(out / "document_0_Static" / "model.safetensors"), expected)
    assert (out / "router_config.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_outputs_load_in_sentence_transformers(tmp_path: Path):
    st = pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import models

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cars", "are", "fast"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    ))  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    model = st.SentenceTransformer(
        modules=[models.Transformer(str(tmp_path / "bert")), models.Pooling(16, pooling_mode="cls"),
                 models.Dense(16, 6)], device="cpu",
    )  # fmt: skip
    for seed, name in enumerate(("base", "a")):
        model.load_state_dict(tuned(model.state_dict(), seed, 0.1))
        model.save_pretrained(str(tmp_path / name))
    out = merge(tmp_path, "--quiet")
    loaded = st.SentenceTransformer(str(out), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense"]
    assert loaded[1].get_config_dict() == model[1].get_config_dict()
    for name, x in model.state_dict().items():  # the merge of one task is that task
        assert torch.allclose(loaded.state_dict()[name], x, atol=1e-5), name
    assert abs(loaded.encode("cars are fast") - model.encode("cars are fast")).max() < 1e-5


# ---- Training checkpoints ------------------------------------------------------------------------

RNG = {"rng_state": torch.get_rng_state(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
NAMED = {"state": {"a": {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}
ADAM = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}, "param_groups": [{}]}


@pytest.mark.parametrize(
    "key", ["model", "module", "model_state_dict", "state_dict", "ema", "params"]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_one_state_dict_of_a_training_checkpoint_is_read(
    tmp_path: Path, key: str, protocol: int
):
    content = {key: model(), "optimizer": ADAM, "lr_scheduler": {"last": torch.ones(3)}, **RNG}
    torch.save(
        content | {"best": {"acc": torch.tensor(0.5)}, "named": NAMED},
        tmp_path / "x.pt",
        pickle_protocol=protocol,
    )
    for entry in (None, key):
        read = open_checkpoint(tmp_path / "x.pt", entry)
        assert same(read, model())
        assert read.layout == f".pt state dict under '{key}'"
        assert read.notes == [f"of x.pt what stands under '{key}' is read"]


def test_nested_state_dicts_and_modules(tmp_path: Path):
    torch.save(
        {"ema": {"decay": 0.9, "num": torch.tensor(3), "module": model()}}, tmp_path / "x.pt"
    )
    assert open_checkpoint(tmp_path / "x.pt").layout == ".pt state dict under 'ema/module'"
    linear = torch.nn.Linear(2, 3)
    torch.save({"model": linear, "epoch": 1}, tmp_path / "y.pt")
    assert same(open_checkpoint(tmp_path / "y.pt"), linear.state_dict())


def test_two_state_dicts_are_listed_and_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file(model(), tmp_path / "base.safetensors")
    torch.save({"model": model(1), "ema": model(2), "epoch": 3}, tmp_path / "a.pt")
    inputs = [str(tmp_path / "base.safetensors"), str(tmp_path / "a.pt")]
    out = ["-o", str(tmp_path / "out.safetensors")]
    error = fails(capsys, 2, *inputs, *out)
    assert (
        f"{inputs[1]} holds several state dicts: choose one of 'model', 'ema' by --entry" in error
    )
    error = fails(capsys, 2, *inputs, *out, "--entry", "teacher")
    assert "has no state dict under 'teacher': give --entry one of 'model', 'ema'" in error
    assert main(["merge", *inputs, *out, "--entry", "ema", "--scale", "1"]) == 0
    assert "note: task 'a': of a.pt what stands under 'ema' is read" in capsys.readouterr().out
    assert same(load_file(tmp_path / "out.safetensors"), mp.merge(model(), [model(2)], scale=1))
    again = tmp_path / "again.safetensors"  # the record says which
    recipe = ["--recipe", str(tmp_path / "out.safetensors")]
    assert main(["merge", *inputs, "-o", str(again), *recipe]) == 0
    assert again.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    error = fails(capsys, 2, *inputs, *out, "--overwrite", *recipe, "--entry", "model")
    assert "--recipe says --entry ema: leave yours out" in error
    summary = mp.merge_files(inputs[0], inputs[1:], again, entry="ema", overwrite=True)
    assert summary["record"]["entry"] == "ema"
    capsys.readouterr()
    page = ["-o", str(tmp_path / "x.html"), "--core", "2", "--task", "2", "--threads", "1"]
    assert main(["xray", *inputs, *page, "--entry", "ema"]) == 0
    assert "note: a: of a.pt what stands under 'ema' is read" in capsys.readouterr().out


def test_what_cannot_be_meant_does_not_make_a_state_dict_ambiguous(tmp_path: Path):
    torch.save({"state_dict": model(), "scaler": {"mean": torch.ones(3)}}, tmp_path / "x.pt")
    assert same(open_checkpoint(tmp_path / "x.pt"), model())
    averaged = {f"module.{name}": x for name, x in model(1).items()}
    torch.save({"state_dict": model(), "averaged": averaged}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "choose one of 'state_dict', 'averaged'")
    assert same(open_checkpoint(tmp_path / "x.pt", "averaged"), model(1))


def test_another_entry_does_not_go_on_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from minipact import job

    save_file(model(), tmp_path / "base.safetensors")
    torch.save({"model": model(1), "ema": model(2)}, tmp_path / "a.pt")
    inputs = [str(tmp_path / "base.safetensors"), str(tmp_path / "a.pt")]
    opened = job.open_job(inputs[0], inputs[1:], entry="ema")
    output = Output(tmp_path / "out.safetensors", opened.metas())
    output.start(job._journal(opened) | job._stamps(opened))
    output.write("a.weight", opened.merged["a.weight"])
    output.settle()
    output.close(keep=True)
    resume = ["-o", str(tmp_path / "out.safetensors"), "--resume", "--entry", "model"]
    assert "begun with entry 'ema', now it is 'model'" in fails(capsys, 2, *inputs, *resume)


@pytest.mark.parametrize(
    "before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_what_training_puts_before_all_names_is_taken_off_and_said(tmp_path: Path, before: str):
    state = {f"{before}{name}": x for name, x in model().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pt")
    read = open_checkpoint(tmp_path / "x.pt")
    assert same(read, model())
    assert read.notes[1] == f"'{before}' is taken off the names of all tensors"
    torch.save({**state, "other": torch.ones(1)}, tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt")) == {*state, "other"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({**model(), "lr": 0.1}, ["its entry 'lr' is of type float", "save its tensors alone"]),
        ({**model(), "extra": {"mean": torch.ones(3)}}, ["its entry 'extra' is of type dict"]),
        ({"model": {**model(), "version": None}}, ["its entry 'version' is of type NoneType"]),
        ({"model": {**model(), "x": argparse.Namespace()}}, ["entry 'x' is an object of a class"]),
        ({"optimizer": ADAM, "epoch": 3}, ["its entry 'optimizer' is of type dict"]),
        ([torch.ones(3)], ["is no state dict of tensors but of type list: save a dict"]),
        ({"w": torch.ones(2).to_sparse()}, ["'w' is"]),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_what_is_no_tensor_is_named(
    tmp_path: Path, content: object, parts: list[str], protocol: int
):
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    refused(tmp_path / "x.pt", "x.pt", *parts)


def test_weights_beside_a_state_dict_of_a_usual_name_do_not_hide_it(tmp_path: Path):
    torch.save({"state_dict": model(), "losses": torch.ones(9)}, tmp_path / "x.pt")
    assert same(open_checkpoint(tmp_path / "x.pt"), model())
    torch.save({"teacher": model(), "losses": torch.ones(9)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "entry 'teacher' is of type dict")
    assert same(open_checkpoint(tmp_path / "x.pt", "teacher"), model())


# ---- Pickles and their protocols -----------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_protocols_are_read(tmp_path: Path, protocol: int, zipped: bool):
    shared = single(4, 3)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    state = OrderedDict(module.state_dict(keep_vars=True))  # parameters, and an attribute _metadata
    state |= {
        "a": shared,
        "b": shared,
        "part": shared[1:, ::2],
        "none": torch.zeros(0, 3),
        "ä": torch.ones(()),
    }
    if zipped:  # torch itself cannot read it otherwise
        state["float8"] = torch.ones(3, 2).to(torch.float8_e4m3fn)
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(state, tmp_path / "x.pt", **options)
    read = open_checkpoint(tmp_path / "x.pt")
    assert same(read, {name: x.detach() for name, x in state.items()})
    assert read.aliases == {"b": "a"}
    assert not any(x.requires_grad for x in read.values())
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pt", **options)
    assert list(open_checkpoint(tmp_path / "x.pt")) == list(state)


class Evil:
    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [eval, exec, os.system, pickle.loads, Path.touch, torch.load])
def test_no_code_runs(tmp_path: Path, function, protocol: int, zipped: bool):
    flag = tmp_path / "exploded"
    argument = f"open({str(flag)!r}, 'w')"
    if function in (os.system, Path.touch):
        argument = f"touch {flag}" if function is os.system else flag
    for content in ({**model(), "w": Evil(function, argument)}, Evil(function, argument)):
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(content, tmp_path / "x.pt", **options)
        refused(tmp_path / "x.pt", "x.pt")
    torch.save({"model": model(), "w": Evil(function, argument)}, tmp_path / "x.pt", **options)
    with contextlib.suppress(CheckpointError):
        assert same(open_checkpoint(tmp_path / "x.pt"), model())
    assert not flag.exists()


def test_a_pickle_cannot_change_what_makes_tensors(tmp_path: Path):
    make, dtype = torch._utils._rebuild_tensor_v2, torch.float32
    before = make.__defaults__, make.__dict__.copy()
    for state in ({"__wrapped__": 1}, (None, {"__defaults__": (1,)})):

        class Changed:
            def __reduce__(self, state=state):
                return make, (), state  # refused before, as the call lacks its arguments

        for content in ({"w": Changed()}, [make, dtype]):
            torch.save(content, tmp_path / "x.pt", pickle_protocol=4)
            refused(tmp_path / "x.pt", "x.pt")
    # BUILD on the function itself, which pickle would write for no object
    text = (
        pickle.dumps(make, protocol=4)[:-1]
        + pickle.dumps((None, {"__defaults__": (1,)}), 4)[11:-1]
        + b"b."
    )
    rewrite(tmp_path / "x.pt", text)
    refused(tmp_path / "x.pt", "x.pt")
    assert (make.__defaults__, make.__dict__) == before


def test_the_source_in_a_pickle_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch.load compares it with that of the class, and writes the difference where the class says so."""
    module = torch.nn.Linear(2, 2)
    options = {"pickle_protocol": 4, "_use_new_zipfile_serialization": False}
    torch.save(module, tmp_path / "x.pt", **options)
    seen: list[object] = []
    monkeypatch.setattr(torch.serialization, "get_source_lines_and_file", seen.append)
    assert same(open_checkpoint(tmp_path / "x.pt"), module.state_dict())
    assert not seen


def test_tar_files_are_refused(tmp_path: Path):
    import tarfile

    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(__file__, "storages")
    refused(tmp_path / "x.pt", "is a tar file, as torch wrote it before version 0.1.10")


def rewrite(path: Path, content: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    import zipfile

    torch.save(model(), path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in held.items():
            archive.writestr(name, content if name.endswith("data.pkl") else text)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_holds_itself_ends(tmp_path: Path, protocol: int):
    content: dict = {"model": model()}
    content["self"] = content
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    refused(tmp_path / "x.pt", "holds several state dicts")
    assert same(open_checkpoint(tmp_path / "x.pt", "model"), model())


def follow(path: Path) -> Path:
    """Run the lines that a refusal names, beside the file; what they write."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    before = set(path.parent.iterdir())
    lines = textwrap.dedent("\n".join(str(error.value).splitlines()[1:]))
    subprocess.run([sys.executable, "-c", lines], cwd=path.parent, check=True)
    return (set(path.parent.iterdir()) - before).pop()


def with_alias(state: State) -> State:
    return {**state, "tied": state["a.weight"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "legacy"),
    [
        ({"model": OrderedDict(with_alias(model())), "args": argparse.Namespace(), "adam": ADAM}, True),
        ({**with_alias(model()), "args": argparse.Namespace(lr=1)}, True),
        (OrderedDict({**with_alias(model()), "args": argparse.Namespace(lr=1)}), True),
        ({**with_alias(model()), "epoch": 3}, False),
        ({"ema": {"module": {**with_alias(model()), "epoch": 3}}}, False),
    ],
)  # fmt: skip
def test_the_lines_that_save_it_again_work(tmp_path: Path, content: object, legacy: bool):
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "x.pt")
    assert "state_dict()" not in str(error.value)  # a dict has none
    assert same(open_checkpoint(follow(tmp_path / "x.pt")), with_alias(model()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_lines_that_save_a_module_again_work(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    torch.save(module, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert same(open_checkpoint(follow(tmp_path / "x.pt")), module.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_older_protocols_are_refused_as_such(tmp_path: Path, legacy: bool, kind: type):
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save(kind(model()), tmp_path / "x.pt", pickle_protocol=0, **options)
    refused(
        tmp_path / "x.pt", "protocol 0, which torch writes and cannot read: save it again where"
    )
    torch.save(kind(model()), tmp_path / "x.pt", pickle_protocol=1, **options)
    refused(tmp_path / "x.pt", "is in pickle's protocol 1, which is not read here")
    assert same(open_checkpoint(follow(tmp_path / "x.pt")), model())


@pytest.mark.slow
def test_pickles_that_torch_did_not_write_are_refused_as_such(tmp_path: Path):
    for content in (model(), {name: x.numpy() for name, x in model().items()}):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content))
        refused(tmp_path / "x.pt", "is a pickle, but none of torch.save")
        written = follow(tmp_path / "x.pt")
        assert same(open_checkpoint(written), model())
        written.unlink()


# ---- Files of another kind than their names say --------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a pointer of Git LFS",
        ),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, message: str, ending: str):
    (tmp_path / f"model.{ending}").write_bytes(content)
    refused(tmp_path / f"model.{ending}", f"model.{ending} {message}")


@pytest.mark.parametrize("zipped", [True, False])
def test_wrong_endings_are_named(tmp_path: Path, zipped: bool):
    torch.save(model(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "x.pt").rename(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is a file of torch.save by its content")
    save_file(model(), tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").rename(tmp_path / "y.bin")
    refused(tmp_path / "y.bin", "is a safetensors file by its content: end its name")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])  # 80 02 to 80 05, as pickles begin
def test_headers_of_any_length_are_headers(tmp_path: Path, length: int):
    for pad in range(1500):
        save_file(model(), tmp_path / "x.safetensors", metadata={"pad": "x" * pad})
        if int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") == length:
            break
    assert same(open_checkpoint(tmp_path / "x.safetensors"), model())


def test_archives_and_other_files_are_no_state_dicts(tmp_path: Path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a.npy", b"x")
    refused(tmp_path / "x.pt", "is a zip archive, but none of torch.save")
    (tmp_path / "x.pt").write_bytes(b"\xff\xfe something else")
    refused(tmp_path / "x.pt", "is no file of torch.save: fetch it again")
    (tmp_path / "x.pt").write_bytes(b"")
    refused(tmp_path / "x.pt", "is empty: copy or download it again")


# ---- What else belongs to a model ----------------------------------------------------------------


def side(tmp_path: Path, files: Mapping[str, object]) -> layouts.SideFiles:
    write(tmp_path / "base", {"model.safetensors": model(), **files})
    return layouts.side_files(find_layout(tmp_path / "base"))


def test_all_but_weights_and_training_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept = ["LICENSE", "config.json", "modeling_own.py", "tokenizer.model", "spiece.model", "vocab.txt",
            "chat_template.jinja", "1_Pooling/config.json", "own/deep/layers.py", "mel_filters.npz",
            "scheduler_config.json"]  # fmt: skip
    left = ["tf_model.h5", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json",
            "rng_state_0.pth", "events.out.tfevents.1", "model.onnx", "x.gguf"]  # fmt: skip
    others = ["onnx/model.onnx", "onnx/config.json", "unet/model.safetensors"]
    silent = [".git/config", "__pycache__/a.pyc", "checkpoint-5/config.json", "checkpoints/x.json",
              ".cache/x", "runs/events.out.tfevents.2", "old.partial/journal.jsonl", "README.md"]  # fmt: skip
    marker = "import pathlib; pathlib.Path('ran').touch()"
    texts = {
        name: marker for name in [*kept, *left, *silent, "onnx/model.onnx", "onnx/config.json"]
    }
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, {"model.safetensors": model(seed), others[2]: model()})
        for file, text in texts.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
    out = merge(tmp_path)
    assert files_in(out) == sorted([*kept, "README.md", "model.safetensors"])
    assert all((out / name).read_text() == marker for name in kept)
    told = capsys.readouterr().out
    note = re.search(r"not in the output, as it is not merged: (.*)", told)[1]
    assert "and 3 more" in note
    found = layouts.side_files(find_layout(tmp_path / "base"))
    assert sorted(found.unmerged) == sorted([*left, "onnx/", "unet/"])
    assert not list(tmp_path.rglob("ran"))


def test_an_adapter_beside_the_weights_is_not_taken_along(tmp_path: Path):
    """transformers loads the adapter of a folder that holds its configuration."""
    found = side(tmp_path, {"adapter_config.json": {}, "adapter_model.safetensors": model(2)})
    assert found.files == []
    assert found.unmerged == ["adapter_config.json", "adapter_model.safetensors"]


def test_large_files_stay_out_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layouts, "FILE_LIMIT", 1000)
    monkeypatch.setattr(layouts, "ALL_LIMIT", 1500)
    found = side(
        tmp_path, {"a.txt": "x" * 1001, "b.txt": "x" * 1000, "c.txt": "x" * 501, "d.txt": "x" * 500}
    )
    assert [str(name) for name in found.files] == ["b.txt", "d.txt"]
    assert found.too_large == ["a.txt", "c.txt"]
    assert "copy what is needed: 'a.txt', 'c.txt'" in found.notes[0]
    monkeypatch.setattr(layouts, "COUNT_LIMIT", 1)
    found = side(tmp_path, {})
    assert found.too_large == ["a.txt", "c.txt", "d.txt and what follows"]


def test_links_are_copied_as_what_they_point_to(tmp_path: Path):
    write(tmp_path / "blobs", {"0123": "{}", "pool/config.json": "[]"})
    found = side(tmp_path, {"x/y.json": "1"})
    base = tmp_path / "base"
    (base / "config.json").symlink_to(tmp_path / "blobs" / "0123")
    (base / "1_Pooling").symlink_to(tmp_path / "blobs" / "pool")
    (base / "dangling.json").symlink_to(tmp_path / "nowhere")
    (base / "x" / "circle").symlink_to(base / "x")
    (base / "x" / "self").symlink_to(base / "x" / "self")
    found = layouts.side_files(find_layout(base))
    names = ["1_Pooling/config.json", "config.json", "x/y.json"]
    assert sorted(name.as_posix() for name in found.files) == names
    write(tmp_path / "a", {"model.safetensors": model(1)})
    out = merge(tmp_path)
    assert files_in(out) == sorted([*names, "README.md", "model.safetensors"])
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, _: path.name not in ("a.json", "b"))
    found = side(tmp_path, {"a.json": "{}", "b/c.json": "{}", "d.json": "{}"})
    assert sorted(found.unreadable) == ["a.json", "b/"]
    assert [str(name) for name in found.files] == ["d.json"]
    assert found.notes == ["not in the output, as it cannot be read: 'a.json', 'b/'"]


def test_an_output_in_the_folder_of_its_base_does_not_take_itself_along(tmp_path: Path):
    write(tmp_path / "base", {"model.safetensors": model(), "config.json": {}})
    write(tmp_path / "a", {"model.safetensors": model(1)})
    for _ in range(2):
        merge(tmp_path, "--overwrite", output="base/out")
    assert files_in(tmp_path / "base" / "out") == ["README.md", "config.json", "model.safetensors"]


def test_a_file_of_an_unknown_name_does_not_stand_for_its_folder(tmp_path: Path):
    write(
        tmp_path,
        {"base.safetensors": model(), "a.safetensors": model(1), "config.json": {}, "x.txt": ""},
    )
    inputs = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a")]
    assert main(["merge", *inputs, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert files_in(tmp_path / "out") == ["README.md", "model.safetensors"]


def test_candidates_of_a_sweep_are_whole_folders(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        sentence_model(tmp_path / name, seed)
    seen = []

    def score(candidate: Path) -> float:
        config = json.loads((candidate / "config.json").read_text())
        seen.append((files_in(candidate), config["torch_dtype"]))
        return 1.0

    recipe = mp.Recipe(dtype="bfloat16")
    mp.merge_files(
        tmp_path / "base", tmp_path / "a", tmp_path / "out", recipe, scales=[0.5], score=score
    )
    files = [name for name in files_in(tmp_path / "out") if name != "README.md"]
    assert seen == [(files, "bfloat16")]
    assert "2_Dense/model.safetensors" in files


# ---- Types in configurations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "torch.float32"}, "float16", {"dtype": "torch.float16"}),
        ({"dtype": "float16"}, "keep", {"dtype": "float32"}),
        ({"dtype": None, "torch_dtype": "auto"}, "bfloat16", {"dtype": None, "torch_dtype": "auto"}),
        ({"text_config": {"dtype": "float32", "x": {"dtype": "float32"}}}, "bfloat16",
         {"text_config": {"dtype": "bfloat16", "x": {"dtype": "float32"}}}),
        ({"a_config": {"b_config": {"torch_dtype": "float32"}}}, "float16",
         {"a_config": {"b_config": {"torch_dtype": "float16"}}}),
        ({"quantization_config": {"dtype": "float32"}}, "float16",
         {"quantization_config": {"dtype": "float32"}}),
        ({"dtype": "int8", "eps": 1e-12, "big": 12345678901234567890, "ä": ["ü", None]}, "float16",
         {"dtype": "int8", "eps": 1e-12, "big": 12345678901234567890, "ä": ["ü", None]}),
        ([1], "bfloat16", [1]),
    ],
)  # fmt: skip
def test_configurations_name_the_type_that_is_written(
    tmp_path: Path, config: object, dtype: str, expected: object
):
    text = json.dumps(config, ensure_ascii=False)
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, {"model.safetensors": model(seed), "config.json": text})
    out = merge(tmp_path, "--dtype", dtype)
    assert json.loads((out / "config.json").read_text()) == expected
    if config == expected:
        assert (out / "config.json").read_text() == text


def test_a_type_that_part_of_the_weights_has_stays(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        state = {"a": single(9, 9, seed=seed).bfloat16(), "norm": single(9, seed=seed + 5)}
        write(tmp_path / name, {"model.safetensors": state, "config.json": {"dtype": "float32"}})
    assert json.loads((merge(tmp_path) / "config.json").read_text()) == {"dtype": "float32"}
    for name in ("base", "a"):
        write(tmp_path / name, {"config.json": {"dtype": "float16"}})
    out = merge(tmp_path, "--overwrite")
    assert json.loads((out / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_a_configuration_that_is_no_json_is_copied(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / name, {"model.safetensors": model(seed), "config.json": "{"})
    assert (merge(tmp_path, "--dtype", "bfloat16") / "config.json").read_text() == "{"


def test_code_of_a_model_is_told_to_its_loader(tmp_path: Path):
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": code}
    for seed, name in enumerate(("base", "a")):
        write(
            tmp_path / name,
            {"model.safetensors": model(seed), "config.json": own, "own.py": "1 / 0"},
        )
    card = (merge(tmp_path) / "README.md").read_text()
    assert 'transformers.AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
    write(
        tmp_path / "base", {"config.json": {"model_type": "x", "architectures": ["A(); 1 / 0; B"]}}
    )
    card = (merge(tmp_path, "--overwrite") / "README.md").read_text()
    assert 'transformers.AutoModel.from_pretrained(".")' in card


# ---- The command line ----------------------------------------------------------------------------


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("usage: minipact", "merge checkpoints", "xray", "methods"))


def test_help_lists_the_methods(capsys: pytest.CaptureFixture[str]):
    for kind, listed in (("rule", RULES), ("purifier", PURIFIERS)):
        ours = {name: method for name, method in mp.METHODS.items() if is_built_in(method)}
        held = {name for name, method in ours.items() if method.kind == kind}
        assert set(listed) == held, "RULES and PURIFIERS of __main__.py are what help lists"
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"merging rule: {', '.join(RULES)}" in told
    assert f"in order: {', '.join(PURIFIERS)}" in told


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        (["--weights", "-1,0.5"], {"weights": {"a": -1.0, "b": 0.5}}),
        (["--weights", "-.5,-1"], {"weights": {"a": -0.5, "b": -1.0}}),
        (["--scale", "-1e-1"], {"scale": -0.1}),
        (["--vectors", "-0.5"], {"vectors": -0.5}),
    ],
)
def test_negative_numbers_need_no_equals_sign(
    tmp_path: Path, words: list[str], recipe: dict, capsys: pytest.CaptureFixture[str]
):
    inputs = write_models(tmp_path, tensors=2, width=4, biases=True)
    for given in (words, ["=".join(words)]):
        out = ["-o", str(tmp_path / "out.safetensors"), "--overwrite", "--json"]
        assert main(["merge", *inputs, *out, *given]) == 0
        told = json.loads(capsys.readouterr().out)["record"]["recipe"]
        assert {name: told[name] for name in recipe} == recipe
    assert "must be a number, finite" in fails(capsys, 2, *inputs, *out, "--scale", "-inf")


def test_negative_scales_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inputs = write_models(tmp_path, tensors=1, width=4)
    tried = ["--scales", "-1:1:3", "--score", "echo 1 {} 1", "--json"]
    score = f"{sys.executable} -c print(1) {{}}"
    tried[3] = score
    assert main(["merge", *inputs, "-o", str(tmp_path / "out"), *tried]) == 0
    assert list(json.loads(capsys.readouterr().out)["scores"]) == ["-1.0", "0.0", "1.0"]


def test_a_plan_in_json_has_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inputs = write_models(tmp_path, tensors=2, width=4)
    options = [
        "-o",
        str(tmp_path / "out"),
        "--dry-run",
        "--json",
        "--dtype",
        "float16",
        "--threads",
        "1",
    ]
    assert main(["merge", *inputs, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["base_bytes"], told["output_bytes"]) == (2 * 16 * 4, 2 * 16 * 2)
    assert told["memory_bytes"] == 2 * 16 * 4 * (2 * 2 + 4)


# ---- Other systems -------------------------------------------------------------------------------

BARE = """
import ctypes, os, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # as on Windows
for name in ("sysconf", "posix_fadvise", "posix_fallocate", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
library = ctypes.CDLL
class CDLL(library):
    def __init__(self, name, *more, **options):
        if name is None:
            raise TypeError("argument must be a path")
        super().__init__(name, *more, **options)
ctypes.CDLL = CDLL
from minipact.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_systems_that_lack_what_linux_has(tmp_path: Path):
    (tmp_path / "bare.py").write_text(BARE)
    inputs = write_models(tmp_path, tensors=20, width=300)
    root = str(Path(mp.__file__).resolve().parents[1])
    command = [sys.executable, str(tmp_path / "bare.py")]
    environment = {**os.environ, "PYTHONPATH": root}
    merging = ["merge", *inputs, "-o", str(tmp_path / "out"), "--rule", "tsv_m", "--threads", "1"]

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *merging], env=environment, stderr=subprocess.PIPE, text=True
        )

    def run(*words: str) -> str:
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    process, journal = started(), tmp_path / "out.partial" / "journal.jsonl"
    wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 3, process)
    process.kill()
    process.communicate(timeout=300)
    told = run(*merging, "--resume")
    assert "tensors were there from the interrupted run" in told
    assert "peak memory" not in told
    resumed = contents(tmp_path / "out")
    assert json.loads(run(*merging, "--overwrite", "--json"))["peak_memory_mb"] is None
    assert contents(tmp_path / "out") == resumed
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("out")} == {"out"}
    run("xray", *inputs, "-o", str(tmp_path / "x.html"), "--core", "4", "--task", "4")


def test_pairs_of_prefixes_and_names():
    names = ["a", "x/a", "x/y/a"]
    for prefixes in itertools.permutations(["", "x/", "x/y/"]):
        found = layouts.by_prefix(names, prefixes)
        assert found == {"": ["a"], "x/": ["x/a"], "x/y/": ["x/y/a"]}
    with pytest.raises(CheckpointError, match="'a' belongs to no module"):
        layouts.by_prefix(names, ["x/"])
