"""PEFT LoRA adapters as tasks: values by hand, against PEFT itself, and bad ones."""

import contextlib
import json
import math
import re
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
        ({}, {"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga is not supported"),
        ({}, {"init_lora_weights": "olora"}, "training began by changing the base's weights"),
        ({}, {"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "=loftq"),
        ({}, {"init_lora_weights": "of next year"}, "init_lora_weights=of next year"),
        ({}, {"loftq_config": {"loftq_bits": 4}}, "loftq_config={'loftq_bits': 4} is not supp"),
        ({}, {"kasa_config": {}}, r"kasa_config=\{\} is not supported"),
        ({}, {"trainable_token_indices": [3]}, "trainable_token_indices=.* merge_and_unload"),
        ({}, {"target_parameters": ["w"]}, "target_parameters"),
        ({}, {"layer_replication": [[0, 2]]}, "layer_replication"),
        ({}, {"alora_invocation_tokens": [5, 6]}, "on some tokens .* leave this adapter out"),
        ({}, {"arrow_config": {}}, "leave this adapter out"),
        ({}, {"enable_lora": [True, False]}, "enable_lora"),
        ({}, {"of_next_year": 0}, "of_next_year=0 is an unknown setting, .* remove it"),
        ({}, {"of_next_year": {"rho": 2}}, "of_next_year={'rho': 2} is an unknown setting"),
        ({}, {"bias": "some"}, "bias=some is unknown: .*'lora_only'"),
        ({}, {"bias": "lora_only"}, f"bias=lora_only .*'{Q}.bias' was trained"),
        ({}, {"modules_to_save": ["head"]}, "modules_to_save .*'head.weight' was trained"),
        ({}, {"use_rslora": "false"}, "no adapter configuration"),
        ({}, {"lora_alpha": math.nan}, "no adapter configuration"),
        ({}, {"peft_type": "IA3"}, "'IA3' adapters .* merge_and_unload"),
        ({}, {"r": "many"}, "no adapter configuration"),
        ({}, {"rank_pattern": {"(": 3}}, "no adapter configuration"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(6)}, {}, "no plain LoRA"),
        ({f"{Q}.lora_B.bias": torch.ones(6)}, {}, "no plain LoRA"),
        (pair("attn.base_layer.out_proj", 4, 4), {}, "of an nn.MultiheadAttention, .*: merge"),
        (
            {"head.lora_A.weight": torch.ones(2, 6)},
            {},
            "has no partner 'base_model.model.head.lora_B",
        ),
        ({"head.lora_B.weight": torch.ones(3, 2)}, {}, "no partner"),
        ({f"{Q}.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}, {}, "no plain LoRA"),
        ({f"{Q}.lora_A.default.weight": torch.ones(2, 4)}, {}, f"two tensors for '{Q}'"),
        ({"head.weight": torch.ones(3, 6), "head.modules_to_save.weight": torch.zeros(3, 6)}, {},
         "two tensors for 'head.weight'"),
        ({"vera_lambda_b": torch.ones(2)}, {}, "'base_model.model.vera_lambda_b' is neither"),
        (pair("other", 3, 3), {}, "acts on 'other.weight', .* though it has the others: merge"),
        (pair("head", 3, 5), {}, r"does not fit 'head.weight' \(3, 6\)"),
    ],
)  # fmt: skip
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
    assert "no adapter_model.safetensors: fetch it again" in fails(capsys, 2, *arguments)
    save_file({"model.weight": torch.ones(2)}, folder / "model.safetensors")
    error = fails(capsys, 2, *arguments)
    assert "are a merged model, move adapter_config.json elsewhere, else fetch" in error


def test_empty_factors_fit_nothing(base: Path, tmp_path: Path):
    for a, b in (((2, 0), (6, 2)), ((2, 4), (0, 2)), ((0, 4), (6, 0))):
        factors = {f"{Q}.lora_A.weight": torch.ones(a), f"{Q}.lora_B.weight": torch.ones(b)}
        with pytest.raises(CheckpointError, match="does not fit|has rank 0"):
            open_adapter(write(tmp_path / "x", factors), open_checkpoint(base))


def test_settings_that_do_not_change_the_model_pass(base: Path, tmp_path: Path):
    harmless = {
        "target_modules": ["q_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "merge_weights": True,
        "megatron_core": "megatron.core", "qalora_group_size": 16, "eva_config": {"rho": 2.0},
        "velora_config": {"scale": 1.0}, "layers_to_transform": [0], "peft_version": "0.21.2",
        "of_next_year": None, "another": False, "third": [], "fourth": {}, "fifth": "",
    }  # fmt: skip
    expected = adapted(base, write(tmp_path / "x", pair(Q, 6, 4)))
    for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        harmless["init_lora_weights"] = init
        found = adapted(base, write(tmp_path / "x", pair(Q, 6, 4), **harmless))
        assert torch.equal(found[f"{Q}.weight"], expected[f"{Q}.weight"])


# ---- Which way round -----------------------------------------------------------------------------

SQUARE = ("h.0.attn.c_proj", "h.0.attn.c_attn", "score")


def square_adapter(tmp_path: Path, *, model_type: str | None, told: bool) -> tuple[Path, Path]:
    """A base of square c_proj and score and a wide c_attn, [in, out] as Conv1D holds it; its adapter."""
    folder = tmp_path / "model"
    folder.mkdir()
    shapes = {"h.0.attn.c_proj": (4, 4), "h.0.attn.c_attn": (4, 12), "score": (4, 4)}
    state = {f"{m}.weight": single(*shape, seed=i) for i, (m, shape) in enumerate(shapes.items())}
    save_file(state, folder / "model.safetensors")
    if model_type:
        config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": model_type}}
        (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: x for m, (i, o) in shapes.items() for key, x in pair(m, o, i).items()}
    return folder, write(tmp_path / "x", tensors, fan_in_fan_out=told)


@pytest.mark.parametrize("told", [False, True])
def test_square_layers_go_by_the_architecture(tmp_path: Path, told: bool):
    base, folder = square_adapter(tmp_path, model_type="gpt2", told=told)
    for path in (base, base / "model.safetensors"):
        found = adapted(path, folder)
        a, b = pair("score", 4, 4).values()
        assert close(found["score.weight"], 1.5 * b @ a)
        assert close(found["h.0.attn.c_proj.weight"], 1.5 * (b @ a).T)
        a, b = pair("c", 12, 4).values()
        assert close(found["h.0.attn.c_attn.weight"], 1.5 * (b @ a).T)


@pytest.mark.parametrize("model_type", [None, "llama"])
@pytest.mark.parametrize("told", [False, True])
def test_square_layers_of_unknown_architectures_are_refused(
    tmp_path: Path, model_type: str | None, told: bool
):
    base, folder = square_adapter(tmp_path, model_type=model_type, told=told)
    with pytest.raises(
        CheckpointError, match=r"c_proj.weight' \(4, 4\) is square.*transpose"
    ) as error:
        open_adapter(folder, open_checkpoint(base))
    assert "merge_and_unload()" in str(error.value)
    assert ("with its config.json" in str(error.value)) == (model_type is None)


@pytest.mark.parametrize("module", ["layer.dense", "h.0.mlp.c_fc"])
def test_a_square_layer_alone(tmp_path: Path, module: str):
    base = tmp_path / "base.safetensors"
    save_file({f"{module}.weight": single(4, 4)}, base)
    plain = write(tmp_path / "x", pair(module, 4, 4))
    a, b = pair(module, 4, 4).values()
    if module == "layer.dense":
        assert close(adapted(base, plain)[f"{module}.weight"], 1.5 * b @ a)
    else:
        with pytest.raises(CheckpointError, match="fan_in_fan_out=false .* last layer only"):
            adapted(base, plain)
    with pytest.raises(CheckpointError, match="fan_in_fan_out=true .* last layer only"):
        adapted(base, write(tmp_path / "x", pair(module, 4, 4), fan_in_fan_out=True))


# ---- Names ---------------------------------------------------------------------------------------


def named_base(tmp_path: Path, names: dict[str, tuple[int, int]]) -> Path:
    path = tmp_path / "named.safetensors"
    save_file({f"{n}.weight": single(*s, seed=i) for i, (n, s) in enumerate(names.items())}, path)
    return path


def opened_on(tmp_path: Path, names: list[str], modules: list[str]) -> set[str]:
    """Layers of a base of these layers that an adapter of these modules changes."""
    base = named_base(tmp_path, dict.fromkeys(names, (6, 4)))
    tensors = {
        key: x for i, m in enumerate(modules) for key, x in pair(m, 6, 4, seed=9 * i).items()
    }
    return {name.removesuffix(".weight") for name in adapted(base, write(tmp_path / "x", tensors))}


@pytest.mark.parametrize(
    ("modules", "names", "changed"),
    [
        (["language_model.model.layers.0.q", "language_model.model.layers.1.q"],
         [f"model.{tower}.layers.{i}.q" for tower in ("language_model", "vision_tower") for i in range(2)],
         ["model.language_model.layers.0.q", "model.language_model.layers.1.q"]),
        (["model.language_model.layers.0.q", "lm_head"],
         ["language_model.model.layers.0.q", "language_model.lm_head", "vision_tower.layers.0.q"],
         ["language_model.model.layers.0.q", "language_model.lm_head"]),
        (["bert.layer.0.q"], ["layer.0.q", "layer.1.q"], ["layer.0.q"]),
        (["layers.0.q"], ["model.layers.0.q", "model.layers.0.k"], ["model.layers.0.q"]),
        (["_orig_mod.a.q"], ["a.q"], ["a.q"]),
    ],
)  # fmt: skip
def test_layers_under_other_names(tmp_path: Path, modules, names, changed):
    assert opened_on(tmp_path, names, modules) == set(changed)


def test_what_is_read_otherwise_is_said(tmp_path: Path):
    base = open_checkpoint(named_base(tmp_path, {"layer.0.q": (6, 4), "pooler.dense": (4, 4)}))
    tensors = pair("bert.layer.0.q", 6, 4) | {"bert.pooler.dense.weight": single(4, 4, seed=3)}
    adapter = open_adapter(write(tmp_path / "x", tensors), base)
    assert adapter.notes == ("its layers' names begin with 'bert.', which is read as ''",)
    assert torch.equal(adapter["pooler.dense.weight"], single(4, 4, seed=3))
    adapter = open_adapter(write(tmp_path / "x", pair("q", 6, 4)), named(tmp_path, "model.q"))
    assert adapter.notes == ("its layers are those that begin with 'model.' in the base",)


def named(tmp_path: Path, *names: str):
    return open_checkpoint(named_base(tmp_path, dict.fromkeys(names, (6, 4))))


@pytest.mark.parametrize(
    ("modules", "names", "message"),
    [
        (["model.layers.0.q"], ["text.layers.0.q", "image.layers.0.q"],
         r"may be 'image.layers.0.q', 'text.layers.0.q' of the base: merge"),
        (["text.layers.0.q", "image.layers.0.q"], ["layers.0.q"],
         r"'image.layers.0.q', 'text.layers.0.q' read as one 'layers.0.q' of the base"),
        (["decoder.layers.0.q"], ["encoder.layers.0.q"],
         r"acts on 'decoder.layers.0.q.weight', .*has 'encoder.layers.0.q.weight'; is it the right base"),
        (["layers.7.q"], ["model.layers.0.q"], r"the base lacks: it has 'model.layers.0.q.weight'; is it"),
        (["a.q", "b.q", "tower.c.k"], ["a.q", "b.q", "c.k"], r"though it has the others: merge it"),
        (["a.layers.0.q", "a.layers.1.q"], ["b.layers.0.q"], r"is it the right base\?"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_told_are_refused(tmp_path: Path, modules, names, message):
    with pytest.raises(CheckpointError, match=message):
        opened_on(tmp_path, names, modules)


def test_shapes_tell_towers_apart(tmp_path: Path):
    base = named_base(tmp_path, {"text.layers.0.q": (6, 4), "image.layers.0.q": (6, 5)})
    for tower, inputs in (("text", 4), ("image", 5)):
        found = adapted(base, write(tmp_path / "x", pair("layers.0.q", 6, inputs)))
        assert list(found) == [f"{tower}.layers.0.q.weight"]


@settings(max_examples=60, deadline=None)
@given(
    theirs=st.permutations(["model", "text", "tower"]).map(lambda x: x[:2]),
    ours=st.permutations(["model", "text", "tower"]).map(lambda x: x[:2]),
    rest=st.sets(st.sampled_from(["layers.0.q", "layers.1.q", "layers.1.k"]), min_size=1),
    seed=st.integers(0, 9),
)
def test_another_prefix_changes_no_number(tmp_path_factory, theirs, ours, rest, seed):
    folder = tmp_path_factory.mktemp("prefix")
    shapes = {"layers.0.q": (6, 4), "layers.1.q": (6, 4), "layers.1.k": (3, 4)}
    base = named_base(folder, {".".join([*ours, m]): shape for m, shape in shapes.items()})

    def task(prefix: list[str]):
        tensors = {}
        for i, m in enumerate(sorted(rest)):
            tensors |= pair(".".join([*prefix, m]), shapes[m][0], 4, seed=seed + 2 * i)
        return open_adapter(write(folder / "x", tensors), open_checkpoint(base))

    expected = dict(task(ours))
    with contextlib.suppress(CheckpointError):  # "text" and "tower" are not one
        found = dict(task(theirs))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {*theirs} - {"model"} <= {*ours} or {*ours} - {"model"} <= {*theirs}


# ---- Heads ---------------------------------------------------------------------------------------


def classifier(base: Path, folder: Path, classes: int = 3, **config) -> Path:
    tensors = pair(Q, 6, 4) | {"score.weight": single(classes, 6, seed=classes)}
    return write(folder, tensors, **config)


def run(*words: object) -> int:
    return main(["merge", *map(str, words), "--quiet"])


@pytest.mark.parametrize("config", [{"modules_to_save": ["score"]}, {"task_type": "SEQ_CLS"}])
def test_a_head_that_the_base_lacks(base: Path, tmp_path: Path, capsys, config: dict):
    folder, out = classifier(base, tmp_path / "x", **config), tmp_path / "out.safetensors"
    other, more = classifier(base, tmp_path / "y", 5, **config), ["--overwrite"]
    changed = adapted(base, write(tmp_path / "z", pair(Q, 6, 4)))[f"{Q}.weight"]
    state = load_file(base)

    assert main(["merge", str(base), str(folder), "-o", str(out), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    said = "task 'x': its own 'score.weight' left out, as the base has no such head"
    assert f"{said}; --missing present takes it over" in notes
    assert load_file(out).keys() == state.keys()
    assert close(load_file(out)[f"{Q}.weight"] - state[f"{Q}.weight"], changed)

    assert run(base, folder, "-o", out, "--exclude", "score.*", *more) == 0
    assert load_file(out).keys() == state.keys()
    assert run(base, folder, "-o", out, "--missing", "present", *more) == 0
    assert torch.equal(load_file(out)["score.weight"], single(3, 6, seed=3))
    assert close(load_file(out)[f"{Q}.weight"] - state[f"{Q}.weight"], changed)
    assert run(base, folder, other, "-o", out, *more) == 0
    assert load_file(out).keys() == state.keys()


def test_tensors_beyond_the_base_are_told_with_a_way_on(base: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "out.safetensors")
    whole = {"lm_head.weight": single(9, 4, seed=1)}
    for config in ({"modules_to_save": ["lm_head"]}, {}, {"task_type": "CAUSAL_LM"}):
        folder = str(write(tmp_path / "x", pair(Q, 6, 4) | whole, **config))
        assert "'lm_head.weight', unknown to the base" in fails(
            capsys, 2, str(base), folder, "-o", out
        )
    assert run(base, folder, "-o", out, "--exclude", "lm_head.weight") == 0


def test_a_head_of_another_shape_is_excluded(base: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.safetensors"
    tensors = pair(Q, 6, 4) | {"head.weight": single(2, 6, seed=1)}
    folder = write(tmp_path / "x", tensors, modules_to_save=["head"])
    assert "(2, 6), in the base" in fails(capsys, 2, str(base), str(folder), "-o", str(out))
    assert run(base, folder, "-o", out, "--exclude", "head.*") == 0
    assert torch.equal(load_file(out)["head.weight"], load_file(base)["head.weight"])


def test_a_resized_table_with_factors_is_refused_or_excluded(base: Path, tmp_path: Path, capsys):
    tensors = pair(Q, 6, 4) | {
        "model.embed.lora_embedding_A": single(2, 10, seed=1),
        "model.embed.lora_embedding_B": single(4, 2, seed=2),
        "model.embed.base_layer.weight": single(10, 4, seed=3),
    }
    folder, out = write(tmp_path / "x", tensors), tmp_path / "out.safetensors"
    assert "'model.embed.weight'" in fails(capsys, 2, str(base), str(folder), "-o", str(out))
    assert run(base, folder, "-o", out, "--exclude", "model.embed.*") == 0


# ---- More files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "more.safetensors", "extra.pt"])
def test_tensors_beside_the_adapter_are_merged(base: Path, tmp_path: Path, name: str):
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    state = {f"{PREFIX}head.weight": single(3, 6, seed=4)}
    (save_file if name.endswith("tensors") else torch.save)(state, folder / name)
    for junk in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / junk).write_bytes(b"no tensors")
    assert close(adapted(base, folder)["head.weight"] + load_file(base)["head.weight"],
                 single(3, 6, seed=4))  # fmt: skip
    out = tmp_path / "out.safetensors"
    assert run(base, folder, "-o", out) == 0
    assert close(load_file(out)["head.weight"], single(3, 6, seed=4))
    record = json.loads(open_checkpoint(out).metadata["merge"])
    assert sha256(folder / name) in record["inputs"]["tasks"]["x"]
    assert run(base, folder, "-o", tmp_path / "again.safetensors", "--recipe", out) == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"new.weight": torch.ones(2)},
            "holds 'new.weight', which the base lacks: move it elsewhere",
        ),
        ({f"{Q}.weight": torch.ones(6, 4)}, f"holds '{Q}.weight', which the adapter changes too"),
        ({"head.lora_A.weight": torch.ones(2, 6)}, "which the base lacks"),
    ],
)
def test_tensors_beside_the_adapter_that_belong_nowhere(base: Path, tmp_path: Path, state, message):
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        open_adapter(folder, open_checkpoint(base))
    assert str(folder / "model.safetensors") in str(error.value)
    (folder / "model.safetensors").unlink()
    (folder / "unknown.bin").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="unknown.bin lies beside the adapter: .*move it"):
        open_adapter(folder, open_checkpoint(base))


LOOSE = {
    "lora_unet_down_blocks_0_attn_to_q.lora_down.weight": "a LoRA in Kohya's format.*load_lora_weights",
    "lora_te1_text_model_layers_0_q_proj.alpha": "a LoRA in Kohya's format",
    "lora_unet_mid_block_q.hada_w1_a": "a LyCORIS network.*tools/merge.py",
    "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": "diffusers.*fuse_lora",
    "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight": "diffusers.*fuse_lora",
    "unet.down_blocks.0.attn1.to_q.lora_A.weight": "in diffusers' format.*folder/unet",
    "transformer.single_blocks.0.q.lora_B.default.weight": "in diffusers' format",
    f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight": "PEFT adapter.*give the adapter's folder, with ada",
    "transformer.h.0.attn.c_attn.lora_A.weight": "PEFT adapter.*how to scale",
    "model.layers.0.self_attn.q_proj.lora_a": "an MLX adapter.*mlx_lm.fuse",
    "layers.0.attn.q_proj.lora_a.weight": "an adapter of torchtune.*for PEFT",
    "lora_unet_down_blocks_0_conv.diff": "a LyCORIS network",
    "lora_unet_down_blocks_0_conv.diff_b": "a LyCORIS network",
    "lora_unet_mid_block_q.b2.weight": "a LyCORIS network",
    "lora_te_text_model_norm.w_norm": "a LyCORIS network",
    "double_blocks.0.processor.qkv_lora1.down.weight": "diffusers' or Kohya's.*fuse_lora",
}


@pytest.mark.parametrize("name", LOOSE)
def test_lora_files_of_other_kinds_are_named(base: Path, tmp_path: Path, capsys, name: str):
    task = tmp_path / "task.safetensors"
    save_file({name: torch.ones(2, 6)}, task)
    error = fails(capsys, 2, str(base), str(task), "-o", str(tmp_path / "out.safetensors"))
    assert re.search(rf"{task} holds .*{LOOSE[name]}", error)


def test_weights_of_an_adapter_without_its_folder(base: Path, tmp_path: Path, capsys):
    folder, out = write(tmp_path / "x", pair(Q, 6, 4)), ["-o", str(tmp_path / "out.safetensors")]
    weights = folder / "adapter_model.safetensors"
    assert f"give the folder {folder}" in fails(capsys, 2, str(base), str(weights), *out)
    (folder / "adapter_config.json").unlink()
    assert "with adapter_config.json" in fails(capsys, 2, str(base), str(folder), *out)
    wrapped = {f"{PREFIX}{Q}.base_layer.weight": single(6, 4)} | pair(f"{PREFIX}{Q}", 6, 4)
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    error = fails(capsys, 2, str(base), str(tmp_path / "wrapped.safetensors"), *out)
    assert "save what merge_and_unload() returns" in error


def test_an_adapter_is_no_base(base: Path, tmp_path: Path, capsys):
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    out = ["-o", str(tmp_path / "out.safetensors")]
    for path in (folder, folder / "adapter_model.safetensors"):
        error = fails(capsys, 2, str(path), str(base), *out)
        assert f"{path} is an adapter, and no base: give the model that it was trained on" in error


@pytest.mark.parametrize(
    ("packed", "tool"),
    [
        ({f"{Q}.qweight": torch.ones(2, 6).int(), f"{Q}.g_idx": torch.ones(4).int()}, "GPTQ: .* GPTQModel"),
        ({f"{Q}.qweight": torch.ones(2, 6).int()}, "GPTQ or AWQ: .* GPTQModel"),
        ({f"{Q}.weight": torch.ones(12, 1).to(torch.uint8), f"{Q}.weight.absmax": torch.ones(2)},
         r"bitsandbytes: .* transformers, from_pretrained\(folder\).dequantize\(\)"),
        ({f"{Q}.weight": torch.ones(6, 4).to(torch.int8), f"{Q}.SCB": torch.ones(6)}, "bitsandbytes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", ["", "model."])
def test_a_packed_base_is_refused_with_the_tool_that_unpacks_it(
    tmp_path: Path, packed: dict[str, Tensor], tool: str, start: str
):
    save_file({f"{start}{name}": x for name, x in packed.items()}, tmp_path / "base.safetensors")
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    with pytest.raises(CheckpointError, match=f"acts on '{Q}', which .* packed by {tool}"):
        open_adapter(folder, open_checkpoint(tmp_path / "base.safetensors"))


def test_a_head_that_the_base_ties_to_its_table_is_refused(tmp_path: Path):
    """PEFT merges it into the table too, so its merge_and_unload() is no way on."""
    save_file({"model.embed_tokens.weight": torch.ones(9, 4)}, tmp_path / "base.safetensors")
    folder = write(tmp_path / "x", pair("lm_head", 9, 4))
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False") as error:
        open_adapter(folder, open_checkpoint(tmp_path / "base.safetensors"))
    assert "merge_and_unload" not in str(error.value)


def test_an_mlx_adapter_is_named(base: Path, tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text('{"lora_parameters": {"rank": 8}}')
    with pytest.raises(CheckpointError, match="an MLX adapter.* mlx_lm.fuse"):
        open_adapter(tmp_path / "x", open_checkpoint(base))


# ---- One task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv_m"])
def test_one_task_goes_in_whole(base: Path, tmp_path: Path, rule: str):
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    opened = open_checkpoint(base)
    alone = mp.Merged(opened, [open_adapter(folder, opened)], rule=rule)
    assert alone.scale == 1
    assert alone.notes == ("scale 1.0: one task goes in whole; recommended scales are for several",)
    assert mp.Merged(opened, [open_adapter(folder, opened)], rule=rule, scale=0.3).scale == 0.3
    other = open_adapter(write(tmp_path / "y", pair(Q, 6, 4, seed=3)), opened)
    two = mp.Merged(opened, [open_adapter(folder, opened), other], rule=rule)
    assert two.notes[0].startswith(f"scale {two.scale}, recommended for {rule}")


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
        for name in task:
            assert task[name].shape == task.meta(name).shape


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore::FutureWarning")
@pytest.mark.parametrize("last", ["score", "c_proj"])
def test_against_peft_on_layers_of_both_kinds(tmp_path: Path, last: str):
    import peft
    import transformers

    torch.manual_seed(0)
    small = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, num_labels=8
    )
    whole = transformers.GPT2ForSequenceClassification(small)
    whole.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc", "score"])
    model = peft.get_peft_model(whole, config)
    for x in model.parameters():
        x.data += 0.1 * torch.randn_like(x) * x.requires_grad
    model.save_pretrained(tmp_path / "x")
    expected = model.merge_and_unload().state_dict()
    stored = tmp_path / "x" / "adapter_config.json"
    told = json.loads(stored.read_text())
    stored.write_text(json.dumps(told | {"fan_in_fan_out": last == "c_proj"}))
    task = open_adapter(tmp_path / "x", open_checkpoint(tmp_path / "base"))
    for name in task:
        assert torch.allclose(task[name], expected[name], atol=1e-6), name
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is square"):
        open_adapter(tmp_path / "x", open_checkpoint(tmp_path / "base"))


@pytest.mark.slow
def test_against_peft_on_patterns(tmp_path: Path):
    import peft

    torch.manual_seed(0)
    net = torch.nn.ModuleDict({
        "attn": torch.nn.ModuleDict({"q": torch.nn.Linear(8, 6), "kq": torch.nn.Linear(8, 6)}),
        "q": torch.nn.Linear(8, 6),
    })  # fmt: skip
    save_file({n: x.clone() for n, x in net.state_dict().items()}, tmp_path / "base.safetensors")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "kq"], rank_pattern={"attn.q": 2, "k.": 3},
        alpha_pattern={"^q": 5, "attn.q|kq": 9, "q": 7}, bias="lora_only",
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    for x in model.parameters():
        x.data += 0.1 * torch.randn_like(x) * x.requires_grad
    model.save_pretrained(tmp_path / "x")
    expected = model.merge_and_unload().state_dict()
    task = open_adapter(tmp_path / "x", open_checkpoint(tmp_path / "base.safetensors"))
    assert task.layout == "LoRA adapter, rank 2 3 4, on 3 tensors"
    for name in task:
        assert torch.allclose(task[name], expected[name], atol=1e-6), name


@pytest.mark.slow
def test_every_setting_of_peft_is_known(base: Path, tmp_path: Path):
    import peft

    fields = peft.LoraConfig().to_dict()
    folder = write(tmp_path / "x", pair(Q, 6, 4))
    stored = json.loads((folder / "adapter_config.json").read_text())
    for field in fields.keys() - {"peft_type"}:
        (folder / "adapter_config.json").write_text(json.dumps(stored | {field: {"some": 1}}))
        with contextlib.suppress(CheckpointError):
            open_adapter(folder, open_checkpoint(base))
            continue
        with pytest.raises(CheckpointError) as error:
            open_adapter(folder, open_checkpoint(base))
        assert "unknown setting" not in str(error.value), field
