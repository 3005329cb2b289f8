"""Adapters made of merges and of fine-tuned models: values by hand, properties, PEFT itself, and refusals."""

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
from helpers import close, contents, normal, rng, single, tuned
from minipact.__main__ import main
from minipact.adapters import open_adapter
from minipact.checkpoints import open_checkpoint
from minipact.errors import CheckpointError, MergeError

PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.q_proj.weight": (8, 6),
    "model.layers.0.q_proj.bias": (8,),
    "model.layers.1.q_proj.weight": (8, 6),
    "model.layers.1.small.weight": (2, 6),
    "model.norm.weight": (6,),
    "logit_scale": (1,),
}
Q0, Q1, SMALL = (f"model.layers.{x}.weight" for x in ("0.q_proj", "1.q_proj", "1.small"))
BIAS = "model.layers.0.q_proj.bias"


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())
    }


def changed(state: dict[str, Tensor], *names: str, seed: int = 50) -> dict[str, Tensor]:
    """The model after a random change of some tensors."""
    changes = {
        name: 0.1 * normal(*state[name].shape, seed=seed + i).to(state[name])
        for i, name in enumerate(names)
    }
    return state | {name: state[name] + x for name, x in changes.items()}


def applied(lora: mp.Lora, module: str) -> Tensor:
    """B A of a layer."""
    a, b = (lora[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    return b @ a


# ---- Known answers and properties ----------------------------------------------------------------


def test_an_update_of_rank_one_comes_back_as_it_is():
    base = model(torch.float64)
    column, row = normal(8, seed=1), normal(6, seed=2)
    update = torch.outer(column, row)
    lora = mp.extract_lora(base, base | {Q0: base[Q0] + update}, 1)
    assert list(lora) == [f"{PREFIX}model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
    assert close(applied(lora, "model.layers.0.q_proj"), update)
    a, b = lora.values()
    assert (a.shape, b.shape) == ((1, 6), (8, 1))
    assert math.isclose(float(a.norm()), float(b.norm()))  # the singular value is shared evenly
    assert math.isclose(float(a.norm()) ** 2, float(column.norm() * row.norm()))
    assert lora.error < 1e-12
    assert lora.config["lora_alpha"] == lora.config["r"] == 1
    assert lora.config["target_modules"] == [
        "model.layers.0.q_proj"
    ]  # the other one did not change


def test_the_error_is_the_tail_of_the_singular_values():
    base = model(torch.float64)
    task = changed(base, Q0, Q1)
    lora = mp.extract_lora(base, task, 5)
    assert lora.config["target_modules"] == ["q_proj"]
    s = torch.stack([torch.linalg.svdvals(task[name] - base[name]) for name in (Q0, Q1)])
    assert list(lora.errors) == ["all", "model.layers.*.q_proj"]
    assert list(lora.errors["all"]) == [1, 2, 4, 5]
    for rank, error in lora.errors["all"].items():
        expected = (s[:, rank:].square().sum() / s.square().sum()).sqrt()
        assert math.isclose(error, float(expected), rel_tol=1e-6)
        alone = mp.extract_lora(base, task, rank)
        assert math.isclose(alone.error, error, rel_tol=1e-6)
    lost = [(task[n] - base[n] - applied(lora, n[:-7])).square().sum() for n in (Q0, Q1)]
    assert math.isclose(lora.error, float((sum(lost) / s.square().sum()).sqrt()), rel_tol=1e-9)
    assert mp.extract_lora(base, task, 6).error < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(0, 999),
    svd=st.sampled_from(["exact", "randomized"]),
)
def test_the_error_falls_with_the_rank_and_ends_at_zero(m: int, n: int, seed: int, svd: str):
    base = {"x.weight": normal(m, n, seed=seed)}
    task = {"x.weight": base["x.weight"] + normal(m, n, seed=seed + 1)}
    lora = mp.extract_lora(base, task, min(m, n), svd=svd)
    errors = list(lora.errors["x"].values())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7
    assert close(applied(lora, "x"), task["x.weight"] - base["x.weight"])


def test_ranks_are_no_larger_than_needed_and_small_layers_have_their_own():
    base = model()
    rank_one = base[Q0] + torch.outer(single(8, seed=1), single(6, seed=2))
    lora = mp.extract_lora(base, base | {Q0: rank_one}, 6)
    assert lora.rank == 1
    lora = mp.extract_lora(base, changed(base, SMALL) | {Q0: rank_one}, 6)
    assert lora.rank == 2
    assert lora[f"{PREFIX}model.layers.0.q_proj.lora_A.weight"][1].count_nonzero() == 0
    lora = mp.extract_lora(base, changed(base, Q0, Q1, SMALL), 4)
    assert lora.config["rank_pattern"] == {r"^model\.layers\.1\.small": 2}
    assert lora.config["alpha_pattern"] == lora.config["rank_pattern"]
    shapes = {name: (x.shape, x.dtype) for name, x in lora.items()}
    assert shapes == {name: (lora.meta(name).shape, lora.meta(name).dtype) for name in lora}
    assert lora[f"{PREFIX}model.layers.1.small.lora_A.weight"].shape == (2, 6)


def test_types_of_factors_and_the_error_of_their_rounding():
    half = model(torch.bfloat16)
    task = changed(half, Q0, "model.norm.weight")
    lora = mp.extract_lora(half, task, 6, save_modules=True)
    assert {x.dtype for name, x in lora.items() if "lora_" in name} == {torch.float32}
    assert lora[f"{PREFIX}model.norm.weight"].dtype == torch.bfloat16
    assert lora.error < 1e-6
    rounded = mp.extract_lora(half, task, 6, save_modules=True, dtype="bfloat16")
    assert {x.dtype for x in rounded.values()} == {torch.bfloat16}
    update = (task[Q0].float() - half[Q0].float()).double()
    stored = [rounded[f"{PREFIX}model.layers.0.q_proj.lora_{x}.weight"].double() for x in "BA"]
    error = (update - stored[0] @ stored[1]).norm() / update.norm()
    assert math.isclose(rounded.error, float(error), rel_tol=1e-9)
    assert 1e-4 < rounded.error < 1e-2


def test_a_merge_becomes_an_adapter_of_what_it_adds():
    base = model(torch.float64)
    tasks = {"a": changed(base, Q0, Q1, seed=1), "b": changed(base, Q0, Q1, seed=9)}
    merged = mp.Merged(base, tasks, rule="tsv_m", purify="pact", scale=0.7)
    lora = mp.to_lora(merged, 6)
    for name in (Q0, Q1):
        assert close(applied(lora, name[:-7]), merged[name] - base[name])


def test_conv1d_is_stored_the_other_way_round():
    base = {"h.0.attn.c_attn.weight": normal(4, 12), "h.0.mlp.c_proj.weight": normal(5, 5, seed=1)}
    task = changed(base, *base)
    lora = mp.extract_lora(base, task, 4)
    assert lora.config["fan_in_fan_out"] is True
    for name, rank in (("h.0.attn.c_attn", 4), ("h.0.mlp.c_proj", 5)):
        update = (task[f"{name}.weight"] - base[f"{name}.weight"]).mT
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        rank = min(rank, 4)
        assert close(applied(lora, name), u[:, :rank] * s[:rank] @ vh[:rank])


# ---- What factors cannot hold --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", BIAS, "model.norm.weight"])
def test_what_factors_cannot_hold_is_refused_by_name_or_stored_whole(tmp_path: Path, name: str):
    base = model()
    task = changed(base, Q0, Q1, name)
    with pytest.raises(MergeError, match=rf"1 tensors .*--save-modules.*exclude them\n'{name}' \["):
        mp.extract_lora(base, task, 6)
    without = mp.extract_lora(base, task, 6, exclude=name)
    assert without.whole == ()
    lora = mp.extract_lora(base, task, 6, save_modules=True)
    assert lora.whole == (name,)
    key = name.replace("bias", "base_layer.bias")
    assert torch.equal(lora[PREFIX + key], task[name])
    assert (lora.config["bias"] == "lora_only") == (name == BIAS)
    assert (lora.config["modules_to_save"] is None) == (name == BIAS)
    assert_reads_back(base, task, lora, tmp_path)


def assert_reads_back(base, task, lora: mp.Lora, folder: Path) -> None:
    """The adapter, written and opened on the base, is the fine-tuned model."""
    save_file(base, folder / "base.safetensors")
    files = lora.save(folder / "adapter")
    assert {x.name for x in files} == {"adapter_config.json", "adapter_model.safetensors"}
    opened = open_adapter(folder / "adapter", open_checkpoint(folder / "base.safetensors"))
    assert all(torch.allclose(opened[name], task[name], atol=1e-5) for name in base)


def test_a_bias_of_a_layer_without_factors_is_stored_with_its_layer(tmp_path: Path):
    base = model()
    task = changed(base, Q1, BIAS)
    lora = mp.extract_lora(base, task, 6, save_modules=True)
    assert lora.config["modules_to_save"] == ["model.layers.0.q_proj"]
    assert lora.config["target_modules"] == ["model.layers.1.q_proj"]
    assert set(lora.whole) == {Q0, BIAS}
    assert_reads_back(base, task, lora, tmp_path)


def test_modules_whose_names_end_alike_are_stored_too_as_peft_would_miss_them():
    base = {"norm.weight": single(6), "q_norm.weight": single(6, seed=1), "q.weight": single(8, 6)}
    lora = mp.extract_lora(base, changed(base, "norm.weight", "q.weight"), 2, save_modules=True)
    assert lora.config["modules_to_save"] == ["norm"]
    assert set(lora.whole) == {"norm.weight", "q_norm.weight"}


def test_what_no_module_can_hold_is_refused_even_so():
    base = model()
    task = changed(base, Q0, "logit_scale")
    with pytest.raises(MergeError, match="'logit_scale' stands in no module of its own: exclude"):
        mp.extract_lora(base, task, 2, save_modules=True)
    base |= {"model.layers.cls": single(6)}
    with pytest.raises(
        MergeError, match="'model.layers.cls' stands in 'model.layers' beside whole"
    ):
        mp.extract_lora(base, changed(base, Q0, "model.layers.cls"), 2, save_modules=True)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 0 of an adapter must be a count, 1 or more"),
        (-1, "must be a count"),
        (0.5, "must be a count"),
        (True, "must be a count"),
        (7, "rank 7 is above the largest rank of a layer, 6"),
    ],
)
def test_ranks_out_of_range(rank, message: str):
    base = model()
    with pytest.raises(MergeError, match=message):
        mp.extract_lora(base, changed(base, Q0), rank)


def test_models_that_do_not_fit():
    base = model()
    with pytest.raises(MergeError, match="equals the base"):
        mp.extract_lora(base, base, 2)
    with pytest.raises(MergeError, match=f"'{Q0}'.* in the base"):
        mp.extract_lora(base, base | {Q0: single(9, 6)}, 2)
    with pytest.raises(MergeError, match="no layer changed"):
        mp.extract_lora(base, changed(base, "model.norm.weight"), 2, save_modules=True)
    with pytest.raises(MergeError, match="no layer to put factors on"):
        mp.extract_lora(base, changed(base, "model.norm.weight"), 2, include="*norm*")
    with pytest.raises(MergeError, match="svd 'fast' is unknown"):
        mp.extract_lora(base, changed(base, Q0), 2, svd="fast")
    with pytest.raises(CheckpointError, match="an adapter is a folder"):
        mp.extract_lora(base, changed(base, Q0), 2).save("out.safetensors")
