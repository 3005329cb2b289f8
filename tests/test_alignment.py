"""Tensors that belong together: what is not merged stops no merge, and what a model lacks is settled."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import close, normal
from minipact.__main__ import main
from minipact.alignment import View, is_buffer, twins
from minipact.tensors import equal

NAMES = ("layers.0.weight", "layers.1.weight", "norm.weight")


def model(seed: int, *, prefix: str = "", **others: Tensor) -> dict[str, Tensor]:
    """A small model; other tensors are given with two underscores for a dot."""
    shapes = {"norm.weight": (4,)}
    tensors = {
        f"{prefix}{name}": normal(*shapes.get(name, (4, 4)), seed=seed + i).float()
        for i, name in enumerate(NAMES)
    }
    return tensors | {name.replace("__", "."): x for name, x in others.items()}


BASE, ONE, TWO = model(0), model(10), model(20)
SUM = {"rule": "task_arithmetic", "scale": 1.0}


def merged(base: Mapping, tasks: Mapping, **keywords: object) -> dict[str, Tensor]:
    return mp.merge(base, tasks, **(SUM | keywords))


def added(base: Tensor, *tuned: Tensor) -> Tensor:
    """The plain sum of task vectors on their base."""
    return base + sum(x - base for x in tuned)


# ---- What is not merged --------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"exclude": "head.*"}, {"include": ["layers.*", "norm.*"]}])
@pytest.mark.parametrize("theirs", [torch.ones(5, 4), torch.ones(4, 4).long(), None])
def test_what_is_left_out_may_be_anything(how: dict, theirs: Tensor | None):
    base = model(0, head__weight=torch.zeros(3, 4))
    tasks = {"one": model(10) if theirs is None else model(10, head__weight=theirs), "two": TWO}
    found = merged(base, tasks, **how)
    assert torch.equal(found["head.weight"], base["head.weight"])
    for name in NAMES:
        assert close(found[name], added(BASE[name], ONE[name], TWO[name]))
    assert list(found) == list(base)


def test_what_is_left_out_may_be_missing_from_the_base():
    found = merged(BASE, {"one": model(10, head__weight=torch.ones(3))}, exclude="head.*")
    assert list(found) == list(BASE)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("embeddings.position_ids", torch.arange(77)[None]),
        ("embeddings.position_ids", torch.arange(77)[None].half()),
        ("rotary_emb.inv_freq", torch.ones(8)),
        ("bn.num_batches_tracked", torch.tensor(3)),
        ("h.0.attn.bias", torch.ones(1, 1, 4, 4).bool()),
        ("h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("layer._extra_state", torch.arange(5).byte()),
        ("steps", torch.tensor([7])),
        ("freqs_cis", torch.ones(3, dtype=torch.complex64)),
        ("phases", torch.ones(3, dtype=torch.complex64)),
    ],
)
def test_buffers_never_stop_a_merge(name: str, tensor: Tensor):
    other = torch.zeros(*tensor.shape, 2).to(torch.int32)
    for base, task in (
        (BASE | {name: tensor}, ONE),
        (BASE, ONE | {name: tensor}),
        (
            BASE | {name: tensor},
            ONE | {name: tensor + 1 if tensor.dtype != torch.bool else ~tensor},
        ),
        (BASE | {name: tensor}, ONE | {name: other}),
    ):
        found = merged(base, {"one": task})
        assert list(found) == list(base)
        assert name not in base or torch.equal(found[name], tensor)
        assert close(found["norm.weight"], ONE["norm.weight"])


def test_types_that_no_merge_touches_go_through_files(tmp_path: Path):
    odd = {
        "freqs_cis": torch.ones(3, dtype=torch.complex64),
        "ids": torch.arange(3).to(torch.uint16),
    }
    odd["scales"] = torch.ones(2).to(torch.float8_e8m0fnu)
    for name, state in (("base", BASE), ("one", ONE)):
        save_file(state | odd, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "out")]
    mp.merge_files(paths[0], [paths[1]], paths[2], mp.Recipe(exclude="scales"))
    found = load_file(paths[2])
    for name, x in odd.items():
        assert torch.equal(found[name].view(torch.uint8), x.view(torch.uint8)), name
    assert torch.allclose(found["norm.weight"], ONE["norm.weight"], atol=1e-6)


def test_true_biases_are_no_buffers():
    assert not is_buffer("attention.bias", torch.ones(4))
    assert is_buffer("h.0.attn.bias", torch.ones(1, 1, 4, 4))  # GPT-2's mask, in half precision
    assert not is_buffer("my_position_ids_proj.weight", torch.ones(4))
    assert is_buffer("position_ids", torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_that_differ_are_refused_by_name(dtype: torch.dtype):
    packed = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    base, same = BASE | {"l.qweight": packed}, ONE | {"l.qweight": packed.clone()}
    assert torch.equal(merged(base, {"one": same})["l.qweight"], packed)
    for other in (ONE | {"l.qweight": packed.flip(0)}, ONE | {"l.qweight": packed[:1]}):
        with pytest.raises(mp.MergeError, match=r"'l.qweight' of task 'two' .*unpack"):
            merged(base, {"one": same, "two": other})
        found = merged(base, {"one": same, "two": other}, exclude="*.qweight")
        assert torch.equal(found["l.qweight"], packed)


def test_a_scalar_is_a_scalar():
    base, task = BASE | {"scale": torch.tensor(1.0)}, ONE | {"scale": torch.tensor([3.0])}
    found = merged(base, {"one": task})["scale"]
    assert found.shape == ()
    assert float(found) == 3.0
    found = merged(task, {"one": base})["scale"]
    assert found.shape == (1,)
    assert float(found) == 1.0


# ---- What a model lacks --------------------------------------------------------------------------


def without(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if name not in names}


def test_a_missing_tensor_is_refused_with_the_way_on():
    with pytest.raises(mp.MergeError, match=r"'one' lacks 'norm.weight': --missing base") as error:
        merged(BASE, {"one": without(ONE, "norm.weight"), "two": TWO})
    assert "right base" not in str(error.value)
    assert "tuned from" not in str(error.value)
    with pytest.raises(mp.MergeError, match=r"'two' has 'head', unknown to the base: --missing"):
        merged(BASE, {"one": ONE, "two": TWO | {"head": torch.ones(3)}})
    with pytest.raises(mp.MergeError, match="lacks all .* is it tuned from this base"):
        merged(BASE, {"one": {"a": torch.ones(3)}})


def test_missing_base_counts_as_unchanged():
    tasks = {"one": without(ONE, "norm.weight"), "two": TWO | {"head": torch.ones(3)}}
    lazy = mp.Merged(BASE, tasks, missing="base", **SUM)
    assert list(lazy) == list(BASE)
    assert torch.allclose(lazy["norm.weight"], TWO["norm.weight"], atol=1e-6)
    assert close(lazy["layers.0.weight"], added(*(m["layers.0.weight"] for m in (BASE, ONE, TWO))))
    notes = " ".join(lazy.notes)
    assert "'one' lacks 'norm.weight'" in notes
    assert "'head' left out" in notes


def test_missing_present_counts_the_holders():
    tasks = {"one": without(ONE, "norm.weight"), "two": TWO}
    mean = {"options": {"task_arithmetic": {"reduce": "mean"}}, "missing": "present"}
    found = merged(BASE, tasks, **mean)
    assert close(found["norm.weight"], TWO["norm.weight"])
    name = "layers.0.weight"
    assert close(found[name], (ONE[name] + TWO[name]) / 2)
    spectral = mp.merge(BASE, tasks, rule="tsv_m", missing="present", vectors="rule", scale=1.0)
    alone = mp.merge(BASE, {"two": TWO}, rule="tsv_m", vectors="rule", scale=1.0)
    assert close(spectral["norm.weight"], alone["norm.weight"])
    weighed = merged(BASE, tasks, missing="present", weights={"one": 5.0, "two": 0.5})
    half = BASE["norm.weight"] + 0.5 * (TWO["norm.weight"] - BASE["norm.weight"])
    assert close(weighed["norm.weight"], half)


def test_missing_present_takes_over_what_all_holders_share():
    head = normal(3, 4, seed=9).float()
    tasks = {"one": ONE | {"head": head}, "two": TWO | {"head": head.clone()}, "three": model(30)}
    lazy = mp.Merged(BASE, tasks, missing="present", **SUM)
    assert list(lazy) == [*BASE, "head"]
    assert torch.equal(lazy["head"], head)
    assert "'head' taken over" in " ".join(lazy.notes)
    tasks["two"]["head"] = head + 1
    with pytest.raises(mp.MergeError, match="'head' of task 'two' and of task 'one' differ"):
        merged(BASE, tasks, missing="present")


def test_a_tensor_that_no_task_holds_is_the_bases():
    tasks = {"one": without(ONE, "norm.weight"), "two": without(TWO, "norm.weight")}
    lazy = mp.Merged(BASE, tasks, missing="present", **SUM)
    assert torch.equal(lazy["norm.weight"], BASE["norm.weight"])
    assert "'norm.weight' kept" in " ".join(lazy.notes)


def test_a_method_that_looks_at_all_tasks_refuses_a_part():
    seen = mp.Method(
        "looks", "rule", lambda D, level: D.sum(0), "test", acts_on="tensor", survey=survey
    )
    tasks = {"one": without(ONE, "norm.weight"), "two": TWO}
    with pytest.raises(mp.MergeError, match=r"looks at all tasks at once, .*'norm.weight'"):
        mp.merge(BASE, tasks, rule=seen, missing="present", scale=1.0)


def survey(tasks: int, entries: int):
    total = yield lambda D: D.abs().sum()
    return {"level": total}


@pytest.mark.parametrize(
    ("fused", "split"),
    [
        (
            "attn.qkv_proj.weight",
            ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"],
        ),
        ("attn.in_proj_weight", ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"]),
        ("mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
        ("attention.query_key_value.weight", ["attention.query.weight", "attention.key.weight"]),
        ("attn.to_kv.weight", ["attn.to_k.weight", "attn.to_v.weight"]),
        ("mlp.experts.down_proj", ["mlp.experts.0.down_proj.weight"]),
    ],
)
@pytest.mark.parametrize("missing", ["error", "base", "present"])
def test_fused_beside_split_is_refused_with_both_layouts(
    fused: str, split: list[str], missing: str
):
    whole = {fused: torch.ones(12, 4)}
    parts = {name: torch.ones(4, 4) for name in split}
    for base, task in ((BASE | whole, ONE | parts), (BASE | parts, ONE | whole)):
        with pytest.raises(mp.MergeError, match="different layouts") as error:
            merged(base, {"one": task}, missing=missing)
        assert f"'{fused}' in one piece and '{split[0]}' apart" in str(error.value)
        left_out = merged(base, {"one": task}, exclude=f"{fused.partition('.')[0]}*")
        assert close(left_out["norm.weight"], ONE["norm.weight"])


INTS = {"int32": torch.ones(2, 4).int(), "uint8": torch.ones(8, 1).to(torch.uint8)}
PACKED = {
    "GPTQ": {"l.q.qweight": INTS["int32"], "l.q.scales": torch.ones(1, 4), "l.q.g_idx": INTS["int32"]},
    "GPTQ or AWQ": {"l.q.qweight": INTS["int32"], "l.q.scales": torch.ones(1, 4)},
    "bitsandbytes": {"l.q.weight": INTS["uint8"], "l.q.weight.absmax": torch.ones(2)},
    "compressed-tensors": {"l.q.weight_packed": INTS["int32"], "l.q.weight_scale": torch.ones(4, 1)},
    "HQQ": {"l.q.W_q": INTS["uint8"], "l.q.scale": torch.ones(4, 1)},
    "quanto": {"l.q.weight._data": INTS["uint8"], "l.q.weight._scale": torch.ones(4, 1)},
    "MXFP4": {"l.q_blocks": INTS["uint8"], "l.q_scales": INTS["uint8"]},
}  # fmt: skip


@pytest.mark.parametrize("tool", PACKED)
@pytest.mark.parametrize("missing", ["error", "base", "present"])
def test_packed_beside_plain_is_refused_with_the_tool_that_unpacks(tool: str, missing: str):
    plain = {"l.q" if tool == "MXFP4" else "l.q.weight": torch.ones(4, 4)}
    kinds = [("plain", f"packed by {tool}"), (f"packed by {tool}", "plain")]
    pairs = [(BASE | plain, ONE | PACKED[tool]), (BASE | PACKED[tool], ONE | plain)]
    for (base, task), (ours, theirs) in zip(pairs, kinds, strict=True):
        with pytest.raises(mp.MergeError) as error:
            merged(base, {"one": task}, missing=missing)
        assert f"the weight of 'l.q' is {ours} in the base, {theirs} in the task" in str(
            error.value
        )
        assert "unpack it with" in str(error.value)
        left_out = merged(base, {"one": task}, missing=missing, exclude="l.*")
        assert close(left_out["norm.weight"], ONE["norm.weight"])


@pytest.mark.parametrize("tool", PACKED)
def test_packed_numbers_that_differ_name_the_tool(tool: str):
    base, task = BASE | PACKED[tool], ONE | PACKED[tool]
    assert close(merged(base, {"one": task})["norm.weight"], ONE["norm.weight"])
    (name, packed), *_ = PACKED[tool].items()
    with pytest.raises(mp.MergeError, match=f"'{name}' .* is packed by {tool}: unpack it with"):
        merged(base, {"one": task | {name: packed + 1}})


def test_whole_numbers_that_the_base_lacks_are_left_out_and_named():
    lazy = mp.Merged(BASE, {"one": ONE | {"codes": torch.arange(3)}}, **SUM)
    assert list(lazy) == list(BASE)
    assert "'codes' left out" in " ".join(lazy.notes)
    assert not mp.Merged(BASE, {"one": ONE | {"position_ids": torch.arange(3)}}, **SUM).notes


def test_another_base_takes_a_few_lines():
    base = {f"l.{i}.weight": torch.ones(4, 4) for i in range(30)}
    task = {f"l.{i}.weight": torch.ones(3, 3) for i in range(30)}
    with pytest.raises(mp.MergeError, match="22 more are unlike: is it tuned from this") as error:
        merged(base, {"one": task})
    assert len(str(error.value).splitlines()) == 9


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("one", [*FLOAT8, torch.uint16, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "other", [*FLOAT8, torch.uint16, torch.bool, torch.float64, torch.complex64]
)
def test_numbers_of_any_types_are_compared(one: torch.dtype, other: torch.dtype):
    x = torch.tensor([[0.0, 1.0]])
    assert equal(x.to(one), x.to(other))
    assert not equal(x.to(one), x.flip(1).to(other))
    assert not equal(x.to(one), x[0].to(other))
    same = x.to(other)
    assert equal(same, same)


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("missing", ["error", "present"])
def test_float8_beside_other_types(kind: torch.dtype, missing: str):
    task = {name: x.to(kind) for name, x in ONE.items()}
    wide = {name: x.float() for name, x in task.items()}
    found, wanted = (merged(BASE, {"one": x}, missing=missing) for x in (task, wide))
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    with pytest.raises(mp.MergeError, match="'one' equals the base"):
        merged(wide, {"one": task}, missing=missing)
    more = {"one": ONE | {"head": torch.rand(3)}, "two": TWO | {"head": torch.ones(3).to(kind)}}
    with pytest.raises(mp.MergeError, match="'head' of task 'two' and of task 'one' differ"):
        merged(BASE, more, missing="present")


# ---- Other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "a.b."])
def test_one_beginning_apart_is_found_and_said(prefix: str):
    plain = merged(BASE, {"one": ONE, "two": TWO})
    longer = mp.Merged(BASE, {"one": model(10, prefix=prefix), "two": TWO}, **SUM)
    assert all(torch.equal(longer[name], x) for name, x in plain.items())
    assert f"task 'one': '{prefix}' is taken off" in longer.notes[0]
    other = model(0, prefix=prefix)
    shorter = mp.Merged(other, {"one": ONE, "two": model(20, prefix=prefix)}, **SUM)
    assert all(torch.equal(shorter[prefix + name], x) for name, x in plain.items())
    assert f"'{prefix}' is put before" in shorter.notes[0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("layers.", "layers._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.w', '._checkpoint_wrapped_module.w')}",
        lambda name: f"_orig_mod.{name.replace('layers.', 'layers._orig_mod.')}",
    ],
)
def test_what_training_puts_around_modules_is_taken_off_anywhere(wrap):
    wrapped = {wrap(name): x for name, x in ONE.items()}
    lazy = mp.Merged(BASE, {"one": wrapped}, **SUM)
    assert list(lazy) == list(BASE)
    assert all(close(lazy[name], ONE[name]) for name in NAMES)
    assert any("wrappers, such as _orig_mod" in note for note in lazy.notes)
    prefixed = {f"net.{name}": x for name, x in wrapped.items()}
    assert all(close(merged(BASE, {"one": prefixed})[name], ONE[name]) for name in NAMES)
    base = {wrap(name): x for name, x in BASE.items()}
    lazy = mp.Merged(base, {"one": ONE}, **SUM)
    assert list(lazy) == list(base)
    assert all(close(lazy[wrap(name)], ONE[name]) for name in NAMES)


def test_wrappers_that_tell_two_tensors_apart_stay():
    both = {"w": torch.ones(4, 4), "_orig_mod.w": torch.zeros(4, 4)}
    found = merged(both, {"one": {name: x + 1 for name, x in both.items()}})
    assert all(torch.equal(found[name], x + 1) for name, x in both.items())
    with pytest.raises(mp.MergeError, match="'one' has '_orig_mod.w', unknown to the base"):
        merged({"w": torch.zeros(4, 4)}, {"one": both})


def test_a_head_beside_a_beginning_is_named():
    task = model(10, prefix="bert.", classifier=torch.ones(3))
    with pytest.raises(mp.MergeError, match="'one' has 'classifier', unknown to the base"):
        merged(BASE, {"one": task})
    assert torch.equal(
        merged(BASE, {"one": task}, exclude="classifier")["norm.weight"],
        merged(BASE, {"one": ONE})["norm.weight"],
    )


def test_two_beginnings_are_no_beginning():
    twice = model(10, prefix="student.") | model(20, prefix="teacher.")
    with pytest.raises(mp.MergeError, match=r"'student.layers.0.weight'"):
        merged(BASE, {"one": twice})
    lazy = mp.Merged(BASE, {"one": twice}, rename={"teacher.": ""}, missing="base", **SUM)
    assert torch.allclose(lazy["norm.weight"], TWO["norm.weight"], atol=1e-6)


def test_names_are_changed_as_asked():
    base = model(0, prefix="model.language_model.")
    task = model(10, prefix="language_model.model.")
    found = merged(base, {"one": task}, rename={"language_model.model.": "model.language_model."})
    assert torch.allclose(found["model.language_model.norm.weight"], ONE["norm.weight"], atol=1e-6)
    with pytest.raises(mp.MergeError, match=r"rename gives two tensors the name 'norm.weight'"):
        merged(BASE, {"one": ONE | {"x.norm.weight": torch.ones(4)}}, rename={"x.": ""})
    with pytest.raises(mp.MergeError, match="'x.' begins no name of any task"):
        merged(BASE, {"one": ONE}, rename={"x.": "y."})


def test_names_that_the_base_has_are_left_alone():
    tasks = {"one": ONE, "two": model(20, prefix="layers.inner.")}
    found = merged(BASE, tasks, rename={"layers.inner.": ""})
    assert close(found["layers.0.weight"], added(*(m["layers.0.weight"] for m in (BASE, ONE, TWO))))


# ---- Twins ---------------------------------------------------------------------------------------


def tied(seed: int, copies: bool = True) -> dict[str, Tensor]:
    table = normal(9, 4, seed=seed).float()
    head = {"lm_head.weight": table.clone()} if copies else {}
    return {
        "model.embed_tokens.weight": table,
        "model.l.weight": normal(4, 4, seed=seed + 1).float(),
    } | head


def test_twins_are_alike_in_every_model():
    twin = {"lm_head.weight": "model.embed_tokens.weight"}
    assert twins(tied(0), [tied(5), tied(9)]) == twin
    assert twins(tied(0), [tied(5), tied(9, copies=False)]) == twin
    untied = tied(5) | {"lm_head.weight": torch.ones(9, 4)}
    assert twins(tied(0), [untied]) == {}
    assert twins(untied, [tied(5)]) == {}
    assert twins(tied(0, copies=False), [tied(5)]) == {}
    assert twins(BASE, [ONE]) == {}


@pytest.mark.parametrize(("says", "alike"), [(True, True), (None, True), (False, False)])
def test_twins_are_merged_once_where_the_configuration_ties_them(
    tmp_path: Path, says: bool | None, alike: bool
):
    """TSV-M takes a table by its mean and a head by its directions, so two copies would part."""
    for name, seed in (("base", 0), ("one", 10), ("two", 20)):
        (tmp_path / name).mkdir()
        save_file(tied(seed), tmp_path / name / "model.safetensors")
        config = {"model_type": "mini"} | ({} if says is None else {"tie_word_embeddings": says})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = [tmp_path / name for name in ("base", "one", "two")]
    paths[0] = paths[0] / "model.safetensors"  # stands for its folder, with its configuration
    mp.merge_files(paths[0], paths[1:], tmp_path / "out", mp.Recipe("tsv_m", scale=1.0))
    found = load_file(tmp_path / "out" / "model.safetensors")
    table, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert torch.equal(table, head) == alike
    mean = sum(tied(seed)["lm_head.weight"] for seed in (10, 20)) / 2
    assert torch.allclose(table, mean, atol=1e-5)


def written(path: Path, state: Mapping[str, Tensor], **config: object) -> Path:
    path.mkdir()
    save_file({name: x.clone() for name, x in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_a_head_that_a_task_trained_apart_is_tied_no_more(
    tmp_path: Path, copies: bool, nested: bool
):
    """Loaders that follow the configuration would overwrite the head with the table."""
    says = (
        {"text_config": {"tie_word_embeddings": True}} if nested else {"tie_word_embeddings": True}
    )
    base = written(tmp_path / "base", tied(0, copies), **says)
    apart = tied(10) | {"lm_head.weight": torch.ones(9, 4)}
    task = written(tmp_path / "one", apart, tie_word_embeddings=False)
    recipe = mp.Recipe(missing="present")
    summary = mp.merge_files(base, [task], tmp_path / "out", recipe)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], x, atol=1e-6) for name, x in apart.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {"tie_word_embeddings": False})["tie_word_embeddings"] is False
    assert "'lm_head.weight' is no copy of the token table any more" in " ".join(summary["notes"])


def test_a_copy_of_the_table_that_the_base_does_not_store_is_left_out(tmp_path: Path):
    base = written(tmp_path / "base", tied(0, copies=False), tie_word_embeddings=True)
    task = written(tmp_path / "one", tied(10), tie_word_embeddings=True)
    summary = mp.merge_files(base, [task], tmp_path / "out", mp.Recipe(scale=0.5))
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert set(found) == set(tied(0, copies=False))
    assert torch.allclose(found[name], (tied(0)[name] + tied(10)[name]) / 2, atol=1e-6)
    assert "'lm_head.weight' left out, a copy that the base does not" in " ".join(summary["notes"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"tie_word_embeddings": True}


@pytest.mark.parametrize("shares", [True, False])
def test_copies_of_t5s_table_are_left_out(tmp_path: Path, shares: bool):
    """transformers stores the table once in safetensors, and three times in a .bin file."""
    once = {"shared.weight": normal(9, 4).float(), "l.weight": normal(4, 4).float()}
    base = written(tmp_path / "base", once, model_type="t5")
    more = [f"{part}.embed_tokens.weight" for part in ("decoder", "encoder")] + ["lm_head.weight"]
    table = normal(9, 4, seed=9).float()
    task = {name: table if shares else table.clone() for name in (*more, "shared.weight")}
    torch.save(task | {"l.weight": torch.ones(4, 4)}, tmp_path / "one.bin")
    for given in (base, base / "model.safetensors"):
        mp.merge_files(given, [tmp_path / "one.bin"], tmp_path / "out.safetensors", overwrite=True)
        found = load_file(tmp_path / "out.safetensors")
        assert set(found) == set(once)
        assert torch.allclose(found["shared.weight"], table, atol=1e-6)
        page = ["-o", str(tmp_path / "out.html"), "--overwrite", "--quiet"]
        assert main(["xray", str(given), str(tmp_path / "one.bin"), *page]) == 0


@pytest.mark.parametrize("theirs", ["copy", "none", "other"])
def test_second_names_in_a_pickle_and_their_forms_elsewhere(tmp_path: Path, theirs: str):
    """The base shares one tensor, as .bin files do; a task in safetensors may hold one name only."""
    state = tied(0)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "base.bin")
    task = tied(10, copies=theirs != "none")
    if theirs == "other":
        task["lm_head.weight"] = torch.ones(9, 4)
    save_file(task, tmp_path / "one.safetensors")
    out = tmp_path / "out.safetensors"
    mp.merge_files(tmp_path / "base.bin", [tmp_path / "one.safetensors"], out, mp.Recipe(scale=0.5))
    found = load_file(out)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    assert torch.allclose(found[table], (state[table] + task[table]) / 2, atol=1e-6)
    assert torch.allclose(found[head], (state[head] + task.get(head, task[table])) / 2, atol=1e-6)
    assert torch.equal(found[table], found[head]) == (theirs != "other")


def test_an_adapter_of_a_tied_table_is_told_to_reach_the_head(tmp_path: Path):
    base = written(tmp_path / "base", tied(0, copies=False), tie_word_embeddings=True)
    (tmp_path / "one").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))
    start = "base_model.model.model.embed_tokens.lora_embedding_"
    factors = {f"{start}A": torch.ones(2, 9), f"{start}B": torch.ones(4, 2)}
    save_file(factors, tmp_path / "one" / "adapter_model.safetensors")
    notes = mp.merge_files(base, [tmp_path / "one"], tmp_path / "out")["notes"]
    assert "'model.embed_tokens.weight' reaches the head that is tied to it" in " ".join(notes)


# ---- Views ---------------------------------------------------------------------------------------


class Knows(dict):
    """A model that knows its own difference."""

    def delta(self, name: str) -> Tensor:
        return self[name] - BASE[name]

    def meta(self, name: str) -> Tensor:
        return self[name].to("meta")


def test_a_view_passes_on_what_its_model_knows():
    view = View({"a": (Knows(ONE), "norm.weight"), "b": (ONE, "norm.weight")}, {"b": (2, 2)})
    assert view.meta("a").is_meta
    assert torch.equal(view.delta("a"), ONE["norm.weight"] - BASE["norm.weight"])
    assert view.delta("b") is None
    assert view["b"].shape == view.meta("b").shape == (2, 2)
    assert list(view) == ["a", "b"]
    assert len(view) == 2


def test_a_merge_in_a_view_is_no_delta_of_another_base():
    inner = mp.Merged(BASE, {"one": ONE}, **SUM)
    view = View({"a": (inner, "norm.weight")})
    assert view.delta("a") is None
    assert close(view["a"], ONE["norm.weight"])
