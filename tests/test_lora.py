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
from helpers import close, contents, normal, rng, single
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


def test_ranks_are_no_larger_than_needed_and_small_layers_are_filled_up():
    base = model()
    rank_one = base[Q0] + torch.outer(single(8, seed=1), single(6, seed=2))
    lora = mp.extract_lora(base, base | {Q0: rank_one}, 6)
    assert lora.rank == 1
    lora = mp.extract_lora(base, changed(base, SMALL) | {Q0: rank_one}, 6)
    assert lora.rank == 2
    assert lora[f"{PREFIX}model.layers.0.q_proj.lora_A.weight"][1].count_nonzero() == 0
    lora = mp.extract_lora(base, changed(base, Q0, Q1, SMALL), 4)
    assert lora.rank == lora.config["r"] == lora.config["lora_alpha"] == 4
    shapes = {name: (x.shape, x.dtype) for name, x in lora.items()}
    assert shapes == {name: (lora.meta(name).shape, lora.meta(name).dtype) for name in lora}
    small = lora[f"{PREFIX}model.layers.1.small.lora_A.weight"]
    assert small.shape == (4, 6)
    assert small[:2].all()
    assert not small[2:].any()


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
    with pytest.raises(
        MergeError, match=rf"hold 1 of the changed .*--save-modules.*exclude them\n'{name}' \["
    ):
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
    base = {"q.weight": single(8, 6), "2_Dense/linear.weight": single(6, 6)}
    with pytest.raises(MergeError, match="'2_Dense/linear.weight' belongs to a module beside"):
        mp.extract_lora(base, changed(base, *base), 2, save_modules=True)


def test_factors_never_go_onto_the_output_of_a_multi_head_attention():
    base = {
        "attn.in_proj_weight": single(18, 6),
        "attn.out_proj.weight": single(6, 6),
        "attn.out_proj.bias": single(6),
        "fc.weight": single(5, 6),
    }
    task = changed(base, "attn.out_proj.weight", "attn.out_proj.bias", "fc.weight")
    with pytest.raises(MergeError, match="cannot hold 2 .*\n'attn.out_proj.weight'.*\n.*bias'"):
        mp.extract_lora(base, task, 2)
    lora = mp.extract_lora(base, task, 2, save_modules=True)
    assert lora.config["modules_to_save"] == ["attn"]
    assert set(lora.whole) == {*base} - {"fc.weight"}


def test_vectors_that_a_merge_leaves_alone_did_not_change():
    base = model()
    tasks = [changed(base, Q0, "model.norm.weight"), changed(base, Q1)]
    with pytest.raises(MergeError, match="'model.norm.weight'"):
        mp.to_lora(mp.Merged(base, tasks, rule="tsv_m"), 3)
    for vectors in ("copy", 0.0):
        lora = mp.to_lora(mp.Merged(base, tasks, rule="tsv_m", vectors=vectors), 3)
        assert lora.layers == (Q0, Q1)
    with pytest.raises(MergeError, match="no layer changed"):
        mp.to_lora(mp.Merged(base, tasks, scale=0.0), 3)


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


# ---- From files to a folder ----------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    base = model()
    states = {
        "base": base,
        "a": changed(base, Q0, Q1, seed=1),
        "b": changed(base, Q0, Q1, seed=9),
        "whole": changed(base, Q0, BIAS, "model.norm.weight"),
    }
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def run(command: str, folder: Path, *words: str) -> int:
    paths = [str(folder / f"{x}.safetensors") for x in ("base", *words[0].split())]
    return main([command, *paths, "-o", str(folder / "out"), *words[1:]])


def opened(folder: Path) -> dict[str, Tensor]:
    """The base under the adapter that was written."""
    return dict(open_adapter(folder / "out", open_checkpoint(folder / "base.safetensors")))


def test_extract_lora_on_the_command_line(files: Path, capsys: pytest.CaptureFixture[str]):
    assert run("extract-lora", files, "a", "--rank", "6") == 0
    told = capsys.readouterr().out
    assert "relative error at rank       1       2       4       6" in told
    assert re.search(r"model.layers.\*.q_proj( +0\.\d{4}){3}  0.0000", told)
    assert "rank 6 on 2 layers" in told
    assert re.search(r"relative error of what is added to these layers: [\d.]+e-0\d", told)
    task = load_file(files / "a.safetensors")
    found = opened(files)
    assert all(torch.allclose(found[name], task[name], atol=1e-5) for name in task)
    assert {x.name for x in (files / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    before = contents(files / "out")
    assert run("extract-lora", files, "a", "--rank", "6", "--overwrite", "--json") == 0
    assert contents(files / "out") == before
    summary = json.loads(capsys.readouterr().out)
    assert summary["record"]["lora"]["rank"] == summary["rank"] == 6
    lora = mp.extract_lora(load_file(files / "base.safetensors"), task, 6)
    assert {int(r): x for r, x in summary["errors"]["all"].items()} == lora.errors["all"]
    stored = load_file(files / "out" / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], lora[name]) for name in {*stored, *lora})


def test_the_adapter_of_an_adapter_has_a_smaller_rank(files: Path):
    assert run("extract-lora", files, "a", "--rank", "6") == 0
    arguments = [str(files / "base.safetensors"), str(files / "out"), "-o", str(files / "small")]
    assert main(["extract-lora", *arguments, "--rank", "2", "--quiet"]) == 0
    small = load_file(files / "small" / "adapter_model.safetensors")
    base, task = (load_file(files / f"{x}.safetensors") for x in ("base", "a"))
    direct = mp.extract_lora(base, task, 2)
    for module in ("model.layers.0.q_proj", "model.layers.1.q_proj"):
        b, a = (small[f"{PREFIX}{module}.lora_{side}.weight"] for side in "BA")
        assert torch.allclose(b @ a, applied(direct, module), atol=1e-4)


def test_a_merge_on_the_command_line_becomes_an_adapter(files: Path, capsys):
    words = ["--rule", "tsv_m", "--scale", "0.8", "--lora-rank", "6"]
    assert run("merge", files, "a b", *words) == 0
    assert "relative error of what is added" in capsys.readouterr().out
    states = {x: load_file(files / f"{x}.safetensors") for x in ("base", "a", "b")}
    expected = mp.merge(states.pop("base"), states, rule="tsv_m", scale=0.8)
    found = opened(files)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    before = contents(files / "out")
    again = ["--recipe", str(files / "out" / "README.md"), "--lora-rank", "6", "--quiet"]
    assert run("merge", files, "b a", *again, "--overwrite") == 0
    assert contents(files / "out") == before


def test_adapters_add_up_to_an_adapter_without_loss(tmp_path: Path):
    base = model()
    save_file(base, tmp_path / "base.safetensors")
    parts = [(2, Q0), (3, Q0), (1, Q1)]
    for number, (rank, name) in enumerate(parts):
        b, a = single(8, rank, seed=number), single(rank, 6, seed=9 + number)
        task = base | {name: base[name] + b @ a}
        mp.extract_lora(base, task, rank).save(tmp_path / f"{number}")
    tasks = [tmp_path / f"{number}" for number in range(3)]
    opened = open_checkpoint(tmp_path / "base.safetensors")
    updates = [open_adapter(path, opened) for path in tasks]
    expected = 0.3 * sum(x.delta(Q0).double() for x in updates[:2])
    for rank in (5, 6):
        summary = mp.merge_to_lora(
            tmp_path / "base.safetensors", tasks, tmp_path / "out", rank, overwrite=True
        )
        assert summary["rank"] == 5  # 2 + 3
        assert summary["error"] < 1e-7
        sum_of_all = open_adapter(tmp_path / "out", opened)
        assert torch.allclose(sum_of_all.delta(Q0).double(), expected, rtol=0, atol=1e-6)
        found = open_adapter(tmp_path / "out", opened).delta(Q1).double()
        assert torch.allclose(found, 0.3 * updates[2].delta(Q1).double(), rtol=0, atol=1e-6)
    summary = mp.merge_to_lora(tmp_path / "base.safetensors", tasks, tmp_path / "small", 2)
    s = torch.linalg.svdvals(expected)
    total = s.square().sum() + (0.3 * updates[2].delta(Q1).double()).square().sum()
    assert math.isclose(
        summary["error"], float((s[2:].square().sum() / total).sqrt()), rel_tol=1e-5
    )


def test_norms_go_into_the_adapter_when_asked(files: Path, capsys):
    before = sorted(files.iterdir())
    assert run("extract-lora", files, "whole", "--rank", "6") == 2
    error = capsys.readouterr().err
    assert "factors cannot hold 2 of the changed tensors" in error
    assert f"'{BIAS}' [8]\n'model.norm.weight' [6]" in error
    assert sorted(files.iterdir()) == before
    assert run("extract-lora", files, "whole", "--rank", "6", "--save-modules") == 0
    assert "rank 6 on 1 layers, 2 tensors stored whole" in capsys.readouterr().out
    task, found = load_file(files / "whole.safetensors"), opened(files)
    assert all(torch.allclose(found[name], task[name], atol=1e-5) for name in task)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("extract-lora", ["a", "--rank", "0"], "rank 0 of an adapter"),
        ("extract-lora", ["a", "--rank", "7"], "rank 7 is above the largest rank of a layer, 6"),
        ("extract-lora", ["a", "--rank", "2", "--include", "x*"], "matches no tensor"),
        ("extract-lora", ["missing", "--rank", "2"], "does not exist"),
        ("merge", ["a b", "--lora-rank", "2", "--resume"], "--lora-rank does not go with --resume"),
        ("merge", ["a b", "--lora-rank", "2", "--dry-run"], "does not go with --dry-run"),
        ("merge", ["a b", "--save-modules"], "--save-modules is for adapters: give --lora-rank"),
        ("merge", ["a whole", "--lora-rank", "6"], "factors cannot hold 2 of the changed tensors"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    files: Path, capsys, command: str, words: list[str], message: str
):
    before = sorted(files.iterdir())
    assert run(command, files, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("minipact: error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(files.iterdir()) == before


def test_outputs_and_bases_that_cannot_be(files: Path, capsys):
    assert run("extract-lora", files, "a", "--rank", "2", "--quiet") == 0
    adapter, a = str(files / "out"), str(files / "a.safetensors")
    for words, message in [
        ([adapter, a, "-o", str(files / "x"), "--rank", "2"], "is an adapter, and no base"),
        ([str(files / "base.safetensors"), a, "-o", adapter, "--rank", "2"], "--overwrite"),
        ([str(files / "base.safetensors"), a, "-o", f"{adapter}.safetensors", "--rank", "2"],
         "an adapter is a folder"),
    ]:  # fmt: skip
        assert main(["extract-lora", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_table_that_is_tied_to_the_head_is_refused(tmp_path: Path):
    folder = tmp_path / "base"
    folder.mkdir()
    base = model()
    save_file(base, folder / "model.safetensors")
    save_file(changed(base, Q0, "model.embed_tokens.weight"), tmp_path / "a.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    job = [folder, [tmp_path / "a.safetensors"], tmp_path / "out", 2]
    with pytest.raises(MergeError, match="'model.embed_tokens.weight' is tied to another layer"):
        mp.merge_to_lora(*job, save_modules=True)
    for other in ({"architectures": ["LlamaModel"]}, {"tie_word_embeddings": False}):
        (folder / "config.json").write_text(json.dumps(config | other))
        summary = mp.merge_to_lora(*job, save_modules=True, overwrite=True)
        assert summary["whole"] == ["model.embed_tokens.weight"]


def test_the_table_that_an_encoder_shares_is_refused(tmp_path: Path):
    base = {"shared.weight": single(11, 6), "encoder.q.weight": single(6, 6)}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    save_file(changed(base, *base), tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match="'shared.weight' is tied to another layer"):
        mp.merge_to_lora(
            folder, [tmp_path / "a.safetensors"], tmp_path / "out", 2, save_modules=True
        )


def test_two_copies_of_one_tensor_are_refused(tmp_path: Path):
    base = model()
    shared = base | {"model.other.weight": base[Q0]}
    task = changed(base, Q0, Q1)
    torch.save(shared, tmp_path / "base.pt")
    torch.save(task | {"model.other.weight": task[Q0]}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match=f"'{Q0}' is one tensor with 'model.other.weight'"):
        mp.merge_to_lora(tmp_path / "base.pt", [tmp_path / "a.pt"], tmp_path / "out", 2)


# ---- PEFT itself ---------------------------------------------------------------------------------

IDS = torch.tensor([[1, 5, 3, 9, 2]])


def llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=13, max_position_embeddings=16, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=13, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def train(net: torch.nn.Module, glob: str, seed: int = 0) -> None:
    """Change the parameters whose names match."""
    for i, (name, x) in enumerate(net.named_parameters()):
        if re.search(glob, name):
            x.data += 0.05 * torch.randn(x.shape, generator=rng(1000 * seed + i))


def loaded(base: Path, adapter: Path):
    """Logits of the base under an adapter, as PEFT loads them, and its weights merged by PEFT."""
    import peft
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(base)
    under = peft.PeftModel.from_pretrained(net, adapter).eval()
    # as the card has it
    count = sum("lora_A" in name for name, _ in under.named_parameters())
    assert f"named_parameters()) == {count}\n" in (adapter / "README.md").read_text()
    logits = under(IDS).logits.detach()
    return logits, under.merge_and_unload().state_dict()


def alone(base: Path) -> Tensor:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits.detach()


MATRICES = r"proj\.weight|c_attn\.weight|c_fc\.weight"
MADE = pytest.mark.parametrize(
    ("make", "glob", "words"),
    [
        (llama, MATRICES, []),
        (llama, r"(q|o)_proj\.weight|lm_head", []),
        (llama, r"proj\.|norm|embed_tokens|lm_head", ["--save-modules"]),
        (gpt2, MATRICES, []),
        (gpt2, r"mlp|c_attn|ln_|wpe", ["--save-modules"]),
    ],
)
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")


def truncated(base: Path, task: Path, rank: int) -> dict[str, Tensor]:
    """The base with the update of a fine-tuned model, truncated where it is a layer's, by hand."""
    before, after = (dict(open_checkpoint(x)) for x in (base, task))
    found = {}
    for name, x in before.items():
        update = (after[name] - x).double()
        if re.search(r"proj\.weight|c_\w+\.weight|lm_head", name):
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
            update = u[:, :rank] * s[:rank] @ vh[:rank]
        found[name] = (x + update).to(x)
    return found


def assert_peft_has(state: dict[str, Tensor], make, base: Path, adapter: Path) -> None:
    """PEFT's base under an adapter has these weights, and the logits of a model with them."""
    net = make()
    net.load_state_dict(state, strict=False)  # a tied head is in no file
    logits, found = loaded(base, adapter)
    assert torch.allclose(logits, net.eval()(IDS).logits, atol=1e-5)
    assert not torch.allclose(logits, alone(base), atol=1e-3)
    assert all(torch.allclose(found[name], x, atol=1e-5) for name, x in state.items())


@pytest.mark.slow
@QUIET
@MADE
def test_peft_loads_what_extract_lora_writes(tmp_path: Path, make, glob: str, words: list[str]):
    net, (base, task, out) = make(), (tmp_path / x for x in ("base", "tuned", "out"))
    net.save_pretrained(base, max_shard_size="4KB")
    assert (base / "model.safetensors.index.json").is_file()
    train(net, glob)
    net.save_pretrained(task)
    for rank in ("3", "8"):
        arguments = [str(base), str(task), "-o", str(out), "--rank", rank, "--overwrite", "--quiet"]
        assert main(["extract-lora", *arguments, *words]) == 0
        expected = truncated(base, task, int(rank))
        assert_peft_has(expected, make, base, out)
        again = open_adapter(out, open_checkpoint(base))
        assert all(torch.allclose(again[name], x, atol=1e-5) for name, x in expected.items())


@pytest.mark.slow
@QUIET
@MADE
def test_peft_loads_what_a_merge_writes(tmp_path: Path, make, glob: str, words: list[str]):
    base, out, full = tmp_path / "base", tmp_path / "out", tmp_path / "full"
    make().save_pretrained(base, max_shard_size="4KB")
    tasks = []
    for seed, name in enumerate("ab"):
        net = make()
        train(net, glob, seed)
        net.save_pretrained(tmp_path / name)
        tasks.append(str(tmp_path / name))
    arguments = ["merge", str(base), *tasks, "--rule", "ties", "--scale", "1", "--quiet"]
    assert main([*arguments, "-o", str(full)]) == 0
    assert main([*arguments, "-o", str(out), "--lora-rank", "8", *words]) == 0
    rank = json.loads((out / "adapter_config.json").read_text())["r"]
    assert_peft_has(truncated(base, full, rank), make, base, out)


# ---- Modules that are called otherwise than the file's tensors -----------------------------------

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def vit():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def gpt_neox():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, vocab_size=13, max_position_embeddings=16)
    return transformers.GPTNeoXForCausalLM(config)


def mixtral():
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=1, vocab_size=13, num_local_experts=2
    )
    return transformers.MixtralForCausalLM(config)


def base_and_tuned(folder: Path, make, glob: str) -> tuple[Path, Path]:
    net = make()
    net.save_pretrained(folder / "base")
    train(net, glob)
    net.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.slow
@QUIET
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("make", "glob", "words", "other"),
    [
        (vit, r"layers.*(proj|fc\d)\.weight|classifier\.weight", [], "layers.0.attention.q_proj"),
        (vit, r"layers|classifier|layernorm", ["--save-modules"], "vit.layers.0.layernorm_before"),
        (gpt_neox, r"(dense|query|lm_head).*weight", [], "lm_head"),
        (mixtral, r"proj|gate|lm_head", [], "mlp.gate"),
        (mixtral, r"self_attn", [], None),
    ],
)
def test_peft_finds_layers_that_the_module_calls_otherwise(
    tmp_path: Path, capsys, make, glob: str, words: list[str], other: str | None
):
    import peft

    base, tuned = base_and_tuned(tmp_path, make, glob)
    out = tmp_path / "out"
    assert (
        main(["extract-lora", str(base), str(tuned), "-o", str(out), "--rank", "16", *words]) == 0
    )
    assert ("have the names of transformers 5" in capsys.readouterr().out) == bool(other)
    assert other is None or any(
        other in name for name in load_file(out / "adapter_model.safetensors")
    )
    under = peft.PeftModel.from_pretrained(type(make()).from_pretrained(base), out)
    count = sum("lora_A" in name for name, _ in under.named_parameters())
    assert f"named_parameters()) == {count}\n" in (out / "README.md").read_text()
    found = under.merge_and_unload().state_dict()
    module = type(make()).from_pretrained(tuned).state_dict()
    assert all(torch.allclose(found[name], x, atol=1e-5) for name, x in module.items())
    again, expected = open_adapter(out, open_checkpoint(base)), open_checkpoint(tuned)
    assert all(torch.allclose(again[name], x, atol=1e-5) for name, x in expected.items())


@pytest.mark.slow
@QUIET
def test_an_adapter_of_the_module_is_read_on_the_file(tmp_path: Path):
    base, tuned = base_and_tuned(tmp_path, vit, r"(q|k)_proj\.weight")
    mp.merge_to_lora(base, [tuned], tmp_path / "out", 16, mp.Recipe(scale=1.0))
    config = tmp_path / "out" / "adapter_config.json"
    settings = json.loads(config.read_text())
    assert settings["target_modules"] == ["k_proj", "q_proj"]
    config.write_text(json.dumps(settings | {"alpha_pattern": {"q_proj": 2 * settings["r"]}}))
    found, opened_base = (
        open_adapter(tmp_path / "out", open_checkpoint(base)),
        open_checkpoint(base),
    )
    task = open_checkpoint(tuned)
    for part, factor in (("query", 2), ("key", 1)):
        name = f"vit.encoder.layer.1.attention.attention.{part}.weight"
        expected = factor * (task[name] - opened_base[name])
        assert torch.allclose(found[name] - opened_base[name], expected, atol=1e-5)


@pytest.mark.slow
@QUIET
def test_experts_that_a_module_stacks_have_factors_all_or_none(tmp_path: Path):
    base, tuned = base_and_tuned(tmp_path, mixtral, "nothing")
    state = load_file(tuned / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    save_file(changed(state, name), tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MergeError, match=r"'.*layers.1.*experts.1.w2.weight' did not change, and other"
    ):
        mp.merge_to_lora(base, [tuned], tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@QUIET
def test_without_transformers_names_are_those_of_the_file(tmp_path: Path, monkeypatch):
    base, tuned = base_and_tuned(tmp_path, gpt_neox, "lm_head")

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr("minipact.module_names.importlib.import_module", missing)
    summary = mp.merge_to_lora(base, [tuned], tmp_path / "out", 4)
    assert not any("names of" in note for note in summary["notes"])
    assert "names" not in summary["record"]["lora"]
    assert any(
        "embed_out" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors")
    )


def test_tensors_that_a_module_joins_otherwise_are_refused(tmp_path: Path, monkeypatch):
    folder = tmp_path / "base"
    folder.mkdir()
    base = {
        "a.weight": single(6, 6),
        "b.weight": single(6, 6, seed=1),
        "c.weight": single(6, 6, seed=2),
    }
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Net"]}))
    save_file(changed(base, "a.weight", "c.weight"), tmp_path / "task.safetensors")
    inside = {"ab.weight": single(12, 6), "d.weight": single(6, 6)}
    names = {"a.weight": ("ab.weight", True), "b.weight": ("ab.weight", True)}
    names |= {"c.weight": ("d.weight", False)}
    monkeypatch.setattr(
        "minipact.module_names._loader", lambda *_: (names.__getitem__, inside, "a library")
    )
    job = [folder, [tmp_path / "task.safetensors"], tmp_path / "out", 2]
    with pytest.raises(
        MergeError, match="'a.weight' goes into 'ab.weight' in the module of a library"
    ):
        mp.merge_to_lora(*job)
    summary = mp.merge_to_lora(*job, mp.Recipe(exclude="a.*"))
    assert summary["record"]["lora"]["names"] == "a library"
    assert [*load_file(tmp_path / "out" / "adapter_model.safetensors")] == [
        f"{PREFIX}d.lora_A.weight", f"{PREFIX}d.lora_B.weight",
    ]  # fmt: skip


@pytest.mark.slow
def test_peft_loads_a_multi_head_attention_stored_whole(tmp_path: Path):
    import peft

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(6, 2, batch_first=True)
            self.fc, self.norm = torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(self.attn(x, x, x)[0]))

    torch.manual_seed(0)
    net = Net().eval()
    base = {name: x.clone() for name, x in net.state_dict().items()}
    train(net, "")
    mp.extract_lora(base, net.state_dict(), 5, save_modules=True).save(tmp_path / "adapter")
    x = single(2, 3, 6)
    expected = net(x).detach()
    net.load_state_dict(base)
    assert not torch.allclose(net(x), expected, atol=1e-2)
    under = peft.PeftModel.from_pretrained(net, tmp_path / "adapter").eval()
    assert torch.allclose(under(x), expected, atol=1e-5)
