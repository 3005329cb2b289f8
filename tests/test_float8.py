"""Float8 weights with scales: read as what they stand for, whole or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import normal
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint
from minipact.float8 import dequantized

SHAPE = (256, 130)
FLOAT8 = torch.float8_e4m3fn


def scales(kind: str, seed: int) -> Tensor:
    shape = {"number": (), "one": (1,), "rows": (256,), "column": (256, 1), "blocks": (2, 2)}[kind]
    return 0.01 + normal(*shape, seed=seed).float().abs()


def spread(scale: Tensor) -> Tensor:
    """A scale as large as the weight, by hand."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(SHAPE)
    if scale.numel() == 256:
        return scale.reshape(-1, 1).expand(SHAPE)
    whole = torch.empty(SHAPE)
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            whole[i, j] = scale[i // 128, j // 128]
    return whole


def folder(path: Path, kind: str, seed: int, end: str = "_scale_inv") -> tuple[Path, Tensor]:
    """A model folder, and the weight that its float8 numbers stand for."""
    path.mkdir()
    packed, scale = normal(*SHAPE, seed=seed).float().to(FLOAT8), scales(kind, seed + 1)
    state = {
        "q.weight": packed,
        f"q.weight{end}": scale,
        "norm.weight": normal(4, seed=seed).bfloat16(),
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(config))
    return path, packed.float() * spread(scale)


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("kind", ["number", "one", "rows", "column", "blocks"])
def test_a_merge_of_one_task_is_what_its_numbers_stand_for(tmp_path: Path, kind: str, end: str):
    base, _ = folder(tmp_path / "base", kind, 0, end)
    task, wanted = folder(tmp_path / "task", kind, 10, end)
    assert main(["merge", str(base), str(task), "-o", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"q.weight", "norm.weight"}
    assert found["q.weight"].dtype == torch.bfloat16
    assert torch.allclose(found["q.weight"].float(), wanted, rtol=0.01, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16"}


def test_the_type_can_be_chosen_and_plain_models_may_stand_beside(tmp_path: Path):
    base, origin = folder(tmp_path / "base", "blocks", 0)
    task = {"q.weight": origin + normal(*SHAPE, seed=9).float(), "norm.weight": torch.ones(4)}
    save_file(task, tmp_path / "task.safetensors")
    words = ["merge", str(base), str(tmp_path / "task.safetensors"), "-o", str(tmp_path / "out")]
    assert main([*words, "--dtype", "float32"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, task["q.weight"], atol=1e-5)


def test_float8_alone_stays_float8(tmp_path: Path):
    save_file(
        {"w": normal(4, 4).float().to(FLOAT8), "w2": torch.ones(2)}, tmp_path / "x.safetensors"
    )
    read = open_checkpoint(tmp_path / "x.safetensors")
    assert dequantized(read) is read


def test_a_float8_weight_with_a_scale_that_is_not_its_own_is_refused(tmp_path: Path):
    state = {"q.weight": normal(4, 4).float().to(FLOAT8), "q.k_scale": torch.ones(1)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        mp.CheckpointError, match="'q.weight' is float8 beside 'q.k_scale', not under"
    ):
        dequantized(open_checkpoint(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"q.weight_zero_point": torch.ones(1)},
            "'q.weight' is float8 beside 'q.weight_zero_point', not",
        ),
        (
            {"q.weight_scale": torch.ones(3)},
            r"'q.weight_scale' \(3,\) fits neither rows nor blocks of 'q.w",
        ),
        ({"q.weight_scale": torch.ones(5, 7)}, "fits neither rows nor blocks"),
        (
            {"q.weight": torch.zeros(0, 6).to(FLOAT8), "q.weight_scale": torch.ones(2, 3)},
            "fits neither rows nor blocks",
        ),
        ({"q.odd": torch.ones(1)}, "'q.weight' is float8 beside 'q.odd', not understood"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, more: dict, message: str):
    state = {"q.weight": normal(*SHAPE).float().to(FLOAT8), "q.bias": torch.ones(256)}
    for name, tensors in (("base", state), ("task", state | more)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(mp.CheckpointError, match=message):
        mp.merge_files(
            tmp_path / "base.safetensors", [tmp_path / "task.safetensors"], tmp_path / "out"
        )


def test_what_is_cast_to_float8_as_a_whole_stays_float8(tmp_path: Path):
    """No tool has packed it, so what stands beside a weight says nothing of it."""
    state = {
        "text_projection": normal(4, 4),
        "class_embedding": normal(4),
        "q.weight": normal(4, 4),
    }
    cast = {name: x.float().to(FLOAT8) for name, x in state.items()}
    cast |= {
        "logit_scale": torch.ones(()),
        "q.bias": torch.ones(4),
        "q.weight_ih_l0": torch.ones(4),
    }
    cast |= {"position_ids": torch.arange(3), "q.position_ids": torch.arange(3)}
    save_file(cast, tmp_path / "x.safetensors")
    read = open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(mp.CheckpointError, match="'q.weight' is float8 beside 'q.weight_ih_l0'"):
        dequantized(read)
    assert dequantized(read.without(["q.weight_ih_l0"])).keys() == cast.keys() - {"q.weight_ih_l0"}


def test_the_command_line_merges_float8_and_other_types(tmp_path: Path):
    """Case: torch compares no float8 with another type, which was a traceback."""
    kinds = (FLOAT8, torch.bfloat16, torch.float8_e5m2)
    states = [{"w": normal(6, 4, seed=i).float().to(kind)} for i, kind in enumerate(kinds)]
    files = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    for i, j in ((0, 1), (1, 0), (0, 2)):
        out = tmp_path / f"{i}{j}.safetensors"
        assert main(["merge", files[i], files[j], "-o", str(out), "--dtype", "float32"]) == 0
        assert torch.allclose(load_file(out)["w"], states[j]["w"].float(), atol=1e-6)
        page = tmp_path / f"{i}{j}.html"
        assert main(["xray", files[i], files[j], "-o", str(page), "--quiet"]) == 0


def test_tensors_are_of_the_type_that_the_merge_announces(tmp_path: Path):
    base, task = (
        dequantized(open_checkpoint(folder(tmp_path / n, "rows", i)[0])) for i, n in enumerate("ab")
    )
    merged = mp.Merged(base, [task])
    assert {merged[name].dtype for name in merged} == {torch.bfloat16}
    assert all(merged[name].dtype == merged.meta(name).dtype for name in merged)


def test_a_scale_of_inputs_goes_too(tmp_path: Path):
    state = {"q.weight": normal(*SHAPE).float().to(FLOAT8), "q.weight_scale": torch.ones(()) / 4}
    save_file(state | {"q.input_scale": torch.ones(())}, tmp_path / "x.safetensors")
    read = dequantized(open_checkpoint(tmp_path / "x.safetensors"))
    assert list(read) == ["q.weight"]
    assert torch.equal(read["q.weight"], state["q.weight"].float() / 4)
    assert read.meta("q.weight").dtype == torch.bfloat16
    assert "1 float8 weights are read with their scales" in read.notes[0]
