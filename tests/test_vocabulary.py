"""One vocabulary for models that append tokens: rows, files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import normal
from minipact.__main__ import main
from minipact.vocabulary import union_of, united, write_union

WORDS = ["[UNK]", "a", "b", "c"]


def entry(token: str, number: int, *, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}


def folder(
    path: Path, *appended: str, start: int = 5, seed: int = 0, rows: int | None = None
) -> Path:
    """A model folder: four words, one added token of the base, and appended ones from an id on."""
    path.mkdir()
    added = [entry("[PAD]", 4), *(entry(t, start + i) for i, t in enumerate(appended))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(WORDS)},
            "unk_token": "[UNK]",
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in added}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    }
    (path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"added_tokens_decoder": decoder})
    )
    rows = rows or start + len(appended)
    (path / "config.json").write_text(
        json.dumps({"vocab_size": rows, "tie_word_embeddings": False})
    )
    tensors = {
        "model.embed_tokens.weight": normal(rows, 3, seed=seed),
        "lm_head.weight": normal(rows, 3, seed=seed + 1),
        "model.norm.weight": normal(3, seed=seed + 2),
    }
    save_file({k: x.float() for k, x in tensors.items()}, path / "model.safetensors")
    return path


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "base": folder(tmp_path / "base"),
        "one": folder(tmp_path / "one", "<x>", "<y>", seed=10),
        "two": folder(tmp_path / "two", "<y>", "<z>", seed=20, rows=8),
    }


def tasks_of(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in folders.items() if name != "base"}


def test_the_union_has_every_token_once(folders: dict[str, Path]):
    found = union_of(folders["base"], tasks_of(folders))
    assert found.known == 5
    assert found.new == {"<x>": 5, "<y>": 6, "<z>": 7}
    assert found.own == {"one": {"<x>": 5, "<y>": 6}, "two": {"<y>": 5, "<z>": 6}}
    assert found.size == 8
    assert found.holders("<y>") == ["one", "two"]


def test_rows_of_appended_tokens_are_the_mean_of_their_holders(folders: dict[str, Path]):
    base, one, two = (weights(folders[name]) for name in ("base", "one", "two"))
    union = union_of(folders["base"], tasks_of(folders))
    whole, tasks = united(union, base, {"one": one, "two": two})
    for scale in (0.3, 1.0):
        merged = mp.merge(whole, tasks, rule="task_arithmetic", scale=scale)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            x, a, b = merged[name], one[name], two[name]
            assert x.shape == (8, 3)
            updates = a[:5] + b[:5] - 2 * base[name]
            assert torch.allclose(x[:5], base[name] + scale * updates, atol=1e-5)
            assert torch.allclose(x[5], a[5])
            assert torch.allclose(x[6], (a[6] + b[5]) / 2)
            assert torch.allclose(x[7], b[6])
    assert merged["model.norm.weight"].shape == (3,)


def test_padding_of_the_base_is_kept_and_used(tmp_path: Path):
    base = folder(tmp_path / "base", rows=16)
    one = folder(tmp_path / "one", "<x>", seed=10, rows=32)
    union = union_of(base, {"one": one})
    whole, tasks = united(union, weights(base), {"one": weights(one)})
    name = "model.embed_tokens.weight"
    merged = mp.merge(whole, tasks, scale=1.0)[name]
    assert merged.shape == (16, 3)
    assert torch.allclose(merged[5], weights(one)[name][5])
    assert torch.equal(merged[6:], weights(base)[name][6:])


def test_files_agree_and_load(folders: dict[str, Path], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    union = union_of(folders["base"], tasks_of(folders))
    out = tmp_path / "out"
    shutil.copytree(folders["base"], out)
    write_union(union, out, rows=8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == union.size == 8
    assert tokenizer("a <y> b <z>")["input_ids"] == [1, 6, 2, 7]
    assert tokenizer.decode([5, 3]) == "<x> c"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 8


def changed(path: Path, **changes: object) -> None:
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_other_tokenizers_are_refused(folders: dict[str, Path]):
    def refused(message: str) -> None:
        with pytest.raises((mp.MergeError, mp.CheckpointError), match=message):
            union_of(folders["base"], tasks_of(folders))

    good = (folders["one"] / "tokenizer.json").read_text()
    changed(folders["one"], normalizer={"type": "Lowercase"})
    refused("task 'one': 'normalizer' of its tokenizer.json differs from the base's")
    changed(folders["one"], normalizer=None, added_tokens=[entry("<x>", 5)])
    refused(r"task 'one': token '\[PAD\]' is not as in the base")
    changed(folders["one"], added_tokens=[entry("[PAD]", 4), entry("<x>", 3)])
    refused("token '<x>' takes an id of the base")
    changed(folders["one"], added_tokens=[entry("[PAD]", 4), entry("<y>", 5, special=False)])
    refused("task 'two': token '<y>' has other flags")
    (folders["one"] / "tokenizer.json").write_text("[]")
    refused("tokenizer.json cannot be read")
    (folders["one"] / "tokenizer.json").unlink()
    refused("tokenizer.json cannot be read .*model folders with tokenizer.json")
    (folders["one"] / "tokenizer.json").write_text(good)
    union = union_of(folders["base"], tasks_of(folders))
    few = {k: x[:5] if x.ndim == 2 else x for k, x in weights(folders["one"]).items()}
    with pytest.raises(mp.MergeError, match="'one': '.*.weight' has no row for some"):
        united(union, weights(folders["base"]), {"one": few, "two": weights(folders["two"])})


# ---- From folders to a folder --------------------------------------------------------------------


def test_folders_merge_into_one_that_loads(folders: dict[str, Path], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    words = ["merge", *map(str, folders.values()), "-o", str(out), "--vocabulary", "union"]
    assert main(words) == 0
    found = weights(out)
    assert found["lm_head.weight"].shape == (8, 3)
    expected = (
        weights(folders["one"])["lm_head.weight"][6] + weights(folders["two"])["lm_head.weight"][5]
    ) / 2
    assert torch.allclose(found["lm_head.weight"][6], expected, atol=1e-6)
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 8
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 8
    again = tmp_path / "again"
    words = ["merge", *map(str, folders.values()), "-o", str(again), "--recipe", str(out)]
    assert main(words) == 0
    for name, x in found.items():
        assert torch.equal(weights(again)[name], x)


@pytest.mark.parametrize(
    ("added", "vocabulary", "message"),
    [
        ([{"content": "<x>", "id": "5"}], {"a": 0}, "'5' is no id of a token"),
        ([{"content": "<x>", "id": None}], {"a": 0}, "None is no id"),
        ([{"content": "<x>", "id": -1}], {"a": 0}, "-1 is no id"),
        ([{"content": "<x>", "id": 5}, {"content": "<y>", "id": 5}], {"a": 0}, "two added tokens of one id"),
        ([{"content": "<x>"}], {"a": 0}, "'id'"),
        (3, {"a": 0}, "not iterable"),
        ([], {"a": "x"}, "'x' is no id"),
        ([], 3, "no len"),
    ],
)  # fmt: skip
def test_damaged_tokenizers_are_refused(folders, added: object, vocabulary: object, message: str):
    file = folders["one"] / "tokenizer.json"
    found = json.loads(file.read_text()) | {"added_tokens": added}
    found["model"]["vocab"] = vocabulary
    file.write_text(json.dumps(found))
    for base, task in (("base", "one"), ("one", "base")):
        with pytest.raises(mp.CheckpointError, match=f"{file} cannot be read.*{message}"):
            union_of(folders[base], {"task": folders[task]})


def test_tables_of_other_sizes_are_refused_with_the_way_on(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    words = ["merge", *map(str, folders.values()), "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--vocabulary union where a tokenizer only appends tokens" in capsys.readouterr().err
    words = ["merge", *map(str, folders.values()), "-o", str(tmp_path / "one.safetensors")]
    assert main([*words, "--vocabulary", "union"]) == 2
    assert "needs its tokenizer beside the weights: give a folder" in capsys.readouterr().err
    with pytest.raises(mp.MergeError, match="needs the models' tokenizers: give model folders"):
        mp.Merged(weights(folders["base"]), [weights(folders["base"])], vocabulary="union")


def test_tokens_that_get_lost_are_named(folders: dict[str, Path], tmp_path: Path):
    """Padded tables hide that tokenizers differ."""
    base, task = folder(tmp_path / "b", rows=8), folder(tmp_path / "t", "<x>", seed=9, rows=8)
    notes = " ".join(mp.merge_files(base, [task], tmp_path / "out")["notes"])
    assert "task 't': its tokenizer has '<x>', which the base's lacks" in notes
    assert "--vocabulary union" in notes
    united = mp.merge_files(base, [task], tmp_path / "all", mp.Recipe(vocabulary="union"))
    assert "its tokenizer has" not in " ".join(united["notes"])
    (task / "tokenizer.json").write_text("{")
    notes = mp.merge_files(base, [task], tmp_path / "odd")["notes"]
    assert "its tokenizer has" not in " ".join(notes)


def test_a_table_that_one_task_lacks_is_made_of_the_others(
    folders: dict[str, Path], tmp_path: Path
):
    def drop_head(name: str) -> None:
        kept = {k: x for k, x in weights(folders[name]).items() if k != "lm_head.weight"}
        save_file(kept, folders[name] / "model.safetensors")

    base, two = (weights(folders[name])["lm_head.weight"] for name in ("base", "two"))
    drop_head("one")
    words = ["merge", *map(str, folders.values()), "--vocabulary", "union", "--missing", "base"]
    del folders["one"]
    renamed = [*words, "-o", str(tmp_path / "out")]
    assert main(renamed) == 2, "no task holds a row for <x>, which is of the first alone"
    tasks = [str(folders["base"]), str(tmp_path / "three"), str(folders["two"])]
    folder(tmp_path / "three", "<y>", seed=30)
    folders["three"] = tmp_path / "three"
    drop_head("three")
    assert main(["merge", *tasks, *words[4:], "--scale", "1", "-o", str(tmp_path / "out")]) == 0
    found = weights(tmp_path / "out")["lm_head.weight"]
    assert torch.allclose(found[5:], two[5:7], atol=1e-6)
    assert torch.allclose(found[:5], base + two[:5] - base, atol=1e-5)
