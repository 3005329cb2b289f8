"""Damage of every kind to every layout: the result of a naive reference, or a refusal; nothing else.

Each case damages the task in one way. A merge of one task by task arithmetic at scale 1 is that task, so a
result that differs from the undamaged task is a silent fault, whatever the damage.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import normal
from minipact.checkpoints import open_checkpoint

State = dict[str, Tensor]
SHAPES = {
    "layers.0.weight": (6, 4),
    "layers.0.bias": (6,),
    "layers.1.weight": (4, 6),
    "layers.1.bias": (4,),
    "norm.weight": (4,),
}


def model(seed: int) -> State:
    return {name: normal(*s, seed=seed + i).float() for i, (name, s) in enumerate(SHAPES.items())}


BASE, TASK = model(0), model(50)


# ---- Layouts -------------------------------------------------------------------------------------


def config(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps({"model_type": "mini", "torch_dtype": "float32", "hidden_size": 4})
    (folder / "config.json").write_text(text)


def one_file(state: State, path: Path) -> Path:
    save_file(state, path.with_suffix(".safetensors"), metadata={"format": "pt"})
    return path.with_suffix(".safetensors")


def hugging_face(state: State, path: Path, name: str = "model") -> Path:
    config(path)
    save_file(state, path / f"{name}.safetensors", metadata={"format": "pt"})
    return path


def diffusers(state: State, path: Path) -> Path:
    return hugging_face(state, path, "diffusion_pytorch_model")


def halves(state: State, stem: str, ending: str) -> dict[str, State]:
    names = list(state)
    parts = names[:3], names[3:]
    return {
        f"{stem}-{i + 1:05}-of-00002.{ending}": {n: state[n] for n in part}
        for i, part in enumerate(parts)
    }


def index(folder: Path, stem: str, ending: str, shards: dict[str, State]) -> None:
    weight_map = {name: shard for shard, state in shards.items() for name in state}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / f"{stem}.{ending}.index.json").write_text(text)


def sharded(state: State, path: Path) -> Path:
    config(path)
    shards = halves(state, "model", "safetensors")
    for name, part in shards.items():
        save_file(part, path / name, metadata={"format": "pt"})
    index(path, "model", "safetensors", shards)
    return path


def bin_shards(state: State, path: Path) -> Path:
    config(path)
    shards = halves(state, "pytorch_model", "bin")
    for name, part in shards.items():
        torch.save(part, path / name)
    index(path, "pytorch_model", "bin", shards)
    return path


def state_dict(state: State, path: Path) -> Path:
    torch.save(state, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def wrapper(state: State, path: Path) -> Path:
    whole = {"model_state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(whole, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def open_clip(state: State, path: Path) -> Path:
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 4}}))
    save_file(state, path / "open_clip_model.safetensors", metadata={"format": "pt"})
    return path


def sentence_transformers(state: State, path: Path) -> Path:
    hugging_face(state, path)
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return path


LAYOUTS: dict[str, Callable[[State, Path], Path]] = {
    "one file": one_file,
    "Hugging Face folder": hugging_face,
    "diffusers folder": diffusers,
    "open_clip folder": open_clip,
    "sentence-transformers folder": sentence_transformers,
    "shards": sharded,
    "bin shards": bin_shards,
    "state dict": state_dict,
    "wrapper": wrapper,
}


# ---- Damage --------------------------------------------------------------------------------------


def dropped(state: State, choose: random.Random) -> State:
    gone = choose.choice(list(state))
    return {name: x for name, x in state.items() if name != gone}


def renamed(state: State, choose: random.Random) -> State:
    old, new = choose.choice(list(state)), choose.choice(["x", "layers.9.weight", "norm", "é"])
    return {new if name == old else name: x for name, x in state.items()}


def retyped(state: State, choose: random.Random) -> State:
    name, dtype = choose.choice(list(state)), choose.choice([torch.int64, torch.bool, torch.uint8])
    return state | {name: state[name].to(dtype)}


def widened(state: State, choose: random.Random) -> State:
    return state | {name: state[name].double() for name in [choose.choice(list(state))]}


def reshaped(state: State, choose: random.Random) -> State:
    name = choose.choice(list(state))
    return state | {
        name: choose.choice([state[name].flatten()[:-1], state[name][None], state[name][:1]])
    }


def spoiled(state: State, choose: random.Random) -> State:
    name = choose.choice(list(state))
    x = state[name].clone()
    x.view(-1)[choose.randrange(x.numel())] = choose.choice([float("nan"), float("inf")])
    return state | {name: x}


def added(state: State, choose: random.Random) -> State:
    return state | {choose.choice(["head.weight", "norm.weight_scale", "x"]): torch.ones(3)}


TENSORS = [dropped, renamed, retyped, widened, reshaped, spoiled, added]


def cut_short(path: Path, choose: random.Random) -> None:
    file = choose.choice(sorted(p for p in files(path) if p.suffix != ".json"))
    data = file.read_bytes()
    file.write_bytes(data[: choose.randrange(len(data))])


def stray(path: Path, choose: random.Random) -> None:
    if path.is_dir():
        name = choose.choice(
            ["notes.txt", "optimizer.pt", "training_args.bin", "events.out", "x.json"]
        )
        (path / name).write_bytes(b"x" * 9)


def swapped(path: Path, choose: random.Random) -> None:
    shards = sorted(p for p in files(path) if "-of-" in p.name)
    if shards:
        first, second = (p.read_bytes() for p in shards)
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)


def lost(path: Path, choose: random.Random) -> None:
    choose.choice(files(path)).unlink()


def changed_json(path: Path, choose: random.Random) -> None:
    texts = [p for p in files(path) if p.suffix == ".json"]
    if not texts:
        return
    file = choose.choice(texts)
    found = json.loads(file.read_text())
    inner = found.get("weight_map", found)
    key = choose.choice(list(inner))
    value = inner.pop(key)
    choose.choice(
        [
            lambda: inner.update({key + "x": value}),
            lambda: inner.update({key: choose.choice([None, 7, "x", [], {}])}),
            lambda: None,
        ]
    )()
    file.write_text(choose.choice([json.dumps(found), json.dumps(found)[:-2], "[]"]))


FILES = [cut_short, stray, swapped, lost, changed_json]


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


# ---- The test ------------------------------------------------------------------------------------


def outcome(base: Path, task: Path, output: Path, wanted: State = TASK) -> str:
    """Either "refused", or "right" where the output is the task; anything else fails."""
    recipe = mp.Recipe(rule="task_arithmetic", scale=1.0)
    message = refusal(lambda: mp.merge_files(base, {"task": task}, output, recipe, threads=1))
    if message is not None:
        assert message.strip()
        assert not output.exists()
        return "refused"
    found = dict(open_checkpoint(output))
    assert found.keys() == BASE.keys()
    for name, x in wanted.items():
        assert torch.allclose(found[name], x, atol=1e-5), (
            f"{name} is not the task's, without a word"
        )
    return "right"


def refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except (mp.CheckpointError, mp.MergeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_undamaged_task_comes_out(layout: str, tmp_path: Path):
    base, task = (
        LAYOUTS[layout](state, tmp_path / n) for n, state in (("base", BASE), ("task", TASK))
    )
    assert outcome(base, task, tmp_path / "out.safetensors") == "right"
    assert outcome(base, task, tmp_path / "out") == "right"


@pytest.mark.slow
@pytest.mark.parametrize("damage", TENSORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_tensors(layout: str, damage: Callable, tmp_path: Path):
    base = LAYOUTS[layout](BASE, tmp_path / "base")
    seen = set()
    for seed in range(4):
        task = LAYOUTS[layout](damage(TASK, random.Random(seed)), tmp_path / f"task{seed}")
        seen.add(outcome(base, task, tmp_path / f"out{seed}.safetensors"))
    assert seen == {"right" if damage is widened else "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", FILES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["base", "task"])
def test_damaged_files(layout: str, damage: Callable, where: str, tmp_path: Path):
    seen = set()
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths = {n: LAYOUTS[layout](s, folder / n) for n, s in (("base", BASE), ("task", TASK))}
        damage(paths[where], random.Random(seed))
        seen.add(outcome(paths["base"], paths["task"], folder / "out"))
    if damage is stray:
        assert seen == {"right"}
    if damage is cut_short or (damage is lost and not paths["base"].is_dir()):
        assert seen == {"refused"}


FACTORS = {
    "base_model.model.layers.0.lora_A.weight": normal(2, 4, seed=70).float(),
    "base_model.model.layers.0.lora_B.weight": normal(6, 2, seed=71).float(),
    "base_model.model.layers.1.lora_A.weight": normal(2, 6, seed=72).float(),
    "base_model.model.layers.1.lora_B.weight": normal(4, 2, seed=73).float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*TENSORS, None], ids=lambda f: f.__name__ if f else "none")
def test_damaged_adapters(damage: Callable | None, tmp_path: Path):
    base, seen = hugging_face(BASE, tmp_path / "base"), set()
    wanted = dict(BASE)
    for layer in ("layers.0", "layers.1"):
        a, b = (FACTORS[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        wanted[f"{layer}.weight"] = BASE[f"{layer}.weight"] + 2 * b @ a
    for seed in range(8):
        adapter = tmp_path / f"adapter{seed}"
        adapter.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        factors = damage(FACTORS, random.Random(seed)) if damage else FACTORS
        save_file(factors, adapter / "adapter_model.safetensors")
        seen.add(outcome(base, adapter, tmp_path / f"out{seed}.safetensors", wanted))
    assert seen == {"right" if damage in (widened, None) else "refused"}


def test_damage_to_a_card_or_a_copy_does_not_reach_the_result(tmp_path: Path):
    base, task = (hugging_face(s, tmp_path / n) for n, s in (("base", BASE), ("task", TASK)))
    assert outcome(base, task, tmp_path / "first") == "right"
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    (tmp_path / "again" / "README.md").write_bytes(b"\xff\xfe---\n: [")
    assert outcome(base, tmp_path / "again", tmp_path / "second") == "right"
    assert load_file(tmp_path / "second" / "model.safetensors").keys() == BASE.keys()
