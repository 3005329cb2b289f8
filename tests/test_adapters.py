"""PEFT LoRA adapters as tasks: values by hand, against PEFT itself, and bad ones."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import close, fails, single
from minipact.__main__ import main
from minipact.adapters import open_adapter
from minipact.checkpoints import open_checkpoint, sha256
from minipact.errors import CheckpointError

SHAPES = {
    "model.layers.0.q_proj.weight": (6, 4),
    "model.layers.0.q_proj.bias": (6,),
    "model.layers.1.q_proj.weight": (6, 4),
    "model.conv.weight": (5, 2, 3, 3),
    "model.embed.weight": (9, 4),
    "head.weight": (3, 6),
}
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    state = {name: single(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    save_file(state, path)
    return path


def write(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(
        {PREFIX + name: x for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def pair(module: str, out: int, inputs: int, rank: int = 2, seed: int = 7) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": single(rank, inputs, seed=seed),
        f"{module}.lora_B.weight": single(out, rank, seed=seed + 1),
    }


def adapted(base: Path, folder: Path) -> dict[str, Tensor]:
    """Difference to the base of every tensor that the adapter changes."""
    state = open_checkpoint(base)
    task = open_adapter(folder, state)
    assert list(task) == list(state)
    for name in task:
        meta = task.meta(name)
        assert (meta.shape, meta.dtype) == (task[name].shape, task[name].dtype)
    return {n: task[n] - state[n] for n in task if not torch.equal(task[n], state[n])}


@pytest.mark.parametrize("rslora", [False, True])
def test_update_is_scaled_b_times_a(base: Path, tmp_path: Path, rslora: bool):
    tensors = pair("model.layers.0.q_proj", 6, 4)
    found = adapted(base, write(tmp_path / "x", tensors, use_rslora=rslora))
    a, b = tensors.values()
    assert list(found) == ["model.layers.0.q_proj.weight"]
    scale = 3 / (math.sqrt(2) if rslora else 2)
    assert close(found["model.layers.0.q_proj.weight"], scale * b @ a)


def test_ranks_and_alphas_by_pattern(base: Path, tmp_path: Path):
    one, two = pair("model.layers.0.q_proj", 6, 4), pair("model.layers.1.q_proj", 6, 4, rank=4)
    patterns = {
        "rank_pattern": {"layers.1.q_proj": 4},
        "alpha_pattern": {r"model.layers.\d+.q_proj": 8, "nothing": 1},
    }
    found = adapted(base, write(tmp_path / "x", one | two, **patterns))
    for layer, tensors in enumerate((one, two)):
        a, b = tensors.values()
        assert close(found[f"model.layers.{layer}.q_proj.weight"], 8 / len(a) * b @ a)
    with pytest.raises(CheckpointError, match="has rank 4, adapter_config.json says 2"):
        adapted(base, write(tmp_path / "x", one | two))


def test_transposed_embeddings_and_convolutions(base: Path, tmp_path: Path):
    a, b = pair("head", 6, 3).values()
    stored = {"head.lora_A.weight": a, "head.lora_B.weight": b}
    found = adapted(base, write(tmp_path / "x", stored, fan_in_fan_out=True))
    assert close(found["head.weight"], 1.5 * (b @ a).T)
    a, b = single(2, 9, seed=1), single(4, 2, seed=2)
    stored = {"model.embed.lora_embedding_A": a, "model.embed.lora_embedding_B": b}
    found = adapted(base, write(tmp_path / "x", stored))
    assert close(found["model.embed.weight"], 1.5 * (b @ a).T)
    a, b = single(2, 2, 3, 3, seed=1), single(5, 2, 1, 1, seed=2)
    stored = {"model.conv.lora_A.weight": a, "model.conv.lora_B.weight": b}
    found = adapted(base, write(tmp_path / "x", stored))
    image = single(1, 2, 7, 7, seed=3)
    two_steps = torch.conv2d(torch.conv2d(image, a), b)
    assert close(torch.conv2d(image, found["model.conv.weight"]), 1.5 * two_steps)


def test_tensors_trained_as_a_whole(base: Path, tmp_path: Path):
    whole = {
        "head.weight": single(3, 6, seed=5),
        "model.layers.0.q_proj.base_layer.bias": single(6, seed=6),
    }
    tensors = pair("model.layers.0.q_proj", 6, 4) | whole
    folder = write(tmp_path / "x", tensors, modules_to_save=["head"], bias="lora_only")
    task = open_adapter(folder, open_checkpoint(base))
    assert torch.equal(task["head.weight"], whole["head.weight"])
    assert torch.equal(task["model.layers.0.q_proj.bias"], single(6, seed=6))


def test_half_precision_base_keeps_small_updates(base: Path, tmp_path: Path):
    half = tmp_path / "half.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(base).items()}, half)
    tensors = pair("model.layers.0.q_proj", 6, 4)
    folder = write(tmp_path / "x", {name: 1e-3 * x for name, x in tensors.items()})
    found = adapted(half, folder)["model.layers.0.q_proj.weight"]
    assert found.dtype == torch.float32
    a, b = tensors.values()
    assert torch.allclose(found, 1.5e-6 * b @ a, atol=3e-7)


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv_m", "iso_c"])
def test_adapters_merge_as_the_models_they_make(base: Path, tmp_path: Path, rule: str):
    state = load_file(base)
    folders, models = {}, {}
    for seed, rank in ((20, 2), (30, 3)):  # mixed ranks
        tensors = pair("model.layers.0.q_proj", 6, 4, rank, seed) | pair("head", 3, 6, rank, seed)
        name = f"rank{rank}"
        folders[name] = write(tmp_path / name, tensors, r=rank)
        models[name] = dict(open_adapter(folders[name], open_checkpoint(base)))
    out = tmp_path / "out.safetensors"
    arguments = [str(base), *map(str, folders.values()), "-o", str(out), "--rule", rule, "--quiet"]
    assert main(["merge", *arguments, "--purify", "pact"]) == 0
    expected = mp.merge(state, models, rule=rule, purify="pact")
    merged = load_file(out)
    assert all(close(merged[name], expected[name]) for name in state)
    assert not torch.equal(merged["head.weight"], state["head.weight"])
    record = json.loads(open_checkpoint(out).metadata["merge"])
    sums = {sha256(file) for file in folders["rank2"].iterdir()}
    assert len(sums) == 2
    assert set(record["inputs"]["tasks"]["rank2"]) == sums


def test_small_updates_keep_their_rank_as_the_base_is_not_added_and_taken_off(
    base: Path, tmp_path: Path
):
    tensors = {key: 1e-4 * x for key, x in pair("model.layers.0.q_proj", 6, 4, 2, 0).items()}
    opened = open_checkpoint(base)
    adapter = open_adapter(write(tmp_path / "x", tensors, r=2), opened)
    a, b = tensors.values()
    merged = mp.Merged(opened, [adapter], scale=1.0)
    deltas = {name: merged.delta(name) for name in merged}
    found = deltas.pop("model.layers.0.q_proj.weight")
    scale = CONFIG["lora_alpha"] / 2
    assert torch.allclose(found, scale * b @ a, rtol=1e-5, atol=0)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 2
    assert set(deltas.values()) == {None}


def test_a_saved_base_layer_counts_beside_its_factors(base: Path, tmp_path: Path):
    stored = single(9, 4, seed=90)
    tensors = {
        "model.embed.lora_embedding_A": single(2, 9, seed=91),
        "model.embed.lora_embedding_B": single(4, 2, seed=92),
        "model.embed.base_layer.weight": stored,
    }
    adapter = open_adapter(write(tmp_path / "x", tensors, r=2), open_checkpoint(base))
    a, b = list(tensors.values())[:2]
    expected = stored + 1.5 * (b @ a).mT
    assert close(adapter["model.embed.weight"], expected)
    merged = mp.merge(open_checkpoint(base), [adapter], scale=1.0)["model.embed.weight"]
    assert close(merged, expected)


Q = "model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"use_dora": True}, "use_dora=True is not supported"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa"),
        ({}, {"lora_bias": True}, "lora_bias"),
        ({}, {"peft_type": "IA3"}, "'IA3' adapters"),
        ({}, {"r": "many"}, "no adapter configuration"),
        ({}, {"rank_pattern": {"(": 3}}, "no adapter configuration"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(6)}, {}, "no plain LoRA"),
        ({f"{Q}.lora_B.bias": torch.ones(6)}, {}, "no plain LoRA"),
        (
            {"head.lora_A.weight": torch.ones(2, 6)},
            {},
            "has no partner 'base_model.model.head.lora_B",
        ),
        ({"head.lora_B.weight": torch.ones(3, 2)}, {}, "no partner"),
        (pair("other", 3, 3), {}, "acts on 'other.weight', which the base lacks"),
        (pair("head", 3, 5), {}, r"does not fit 'head.weight' \(3, 6\)"),
        (pair(f"{Q}", 6, 4) | {"head.weight": torch.ones(2, 6)}, {}, "trained as a whole and is"),
        ({"lm_head.weight": torch.ones(2, 6)}, {}, "not in the base"),
    ],
)
def test_what_is_not_supported_is_said(base: Path, tmp_path: Path, tensors, config, message):
    folder = write(tmp_path / "x", pair(Q, 6, 4) | tensors, **config)
    with pytest.raises(CheckpointError, match=message) as error:
        open_adapter(folder, open_checkpoint(base))
    assert str(folder) in str(error.value)


def test_damaged_folders(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    arguments = [str(base), str(folder), "-o", str(tmp_path / "out")]
    for text in ("", "[]", "{", '{"peft_type": "LORA", "rank_pattern": 3}', "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        assert "adapter" in fails(capsys, 2, *arguments)
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert f"{weights} is no whole" in fails(capsys, 2, *arguments)
    weights.unlink()
    assert "no adapter_model.safetensors" in fails(capsys, 2, *arguments)


words = st.sampled_from(
    ["", ".", "base_model.model.", "head", "lora_A", "lora_B", "weight", "(", "ä"]
)
keys = st.lists(words, max_size=6).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3) | st.floats(),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(keys, x, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    config=st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
                         "fan_in_fan_out", "init_lora_weights", "bias"]),
        values,
    ),
    tensors=st.dictionaries(keys, st.lists(st.integers(0, 6), max_size=3), max_size=3),
)  # fmt: skip
def test_any_adapter_is_read_or_refused(tmp_path_factory, config: dict, tensors: dict):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"head.weight": torch.ones(3, 6)}, folder / "base.safetensors")
    state = pair("head", 3, 6) | {name: torch.zeros(shape) for name, shape in tensors.items()}
    with contextlib.suppress(CheckpointError):
        task = open_adapter(
            write(folder / "x", state, **config), open_checkpoint(folder / "base.safetensors")
        )
        assert task["head.weight"].shape == (3, 6)


@pytest.mark.slow
def test_against_peft(tmp_path: Path):
    import peft

    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)
            self.conv = torch.nn.Conv2d(1, 4, 3)
            self.first, self.second = torch.nn.Linear(8, 6), torch.nn.Linear(6, 5)
            self.head = torch.nn.Linear(5, 3)

    net = Net()
    save_file({n: x.clone() for n, x in net.state_dict().items()}, tmp_path / "base.safetensors")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["embed", "conv", "first", "second"], use_rslora=True,
        rank_pattern={"second": 2}, alpha_pattern={"first": 5}, modules_to_save=["head"], bias="all",
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    for x in model.parameters():
        x.data += 0.1 * torch.randn_like(x) * x.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    task = open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base.safetensors"))
    assert list(task) == list(load_file(tmp_path / "base.safetensors"))
    for name in task:
        assert torch.allclose(task[name], expected[name], atol=1e-6), name
    merged = mp.merge(open_checkpoint(tmp_path / "base.safetensors"), [task], scale=1.0)
    for name in task:
        assert close(merged[name], expected[name]), name
