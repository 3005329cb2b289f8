"""The command line end to end, on real files: results, summaries, user errors, layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import same, tuned
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint, sha256


def model(seed: int, base: dict[str, Tensor] | None = None, width: int = 32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (width, width), "fc.bias": (width,), "visual.proj": (width, width // 2)}
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if base is not None:
        state = {name: base[name] + 0.05 * x for name, x in state.items()}
    return state


@pytest.fixture
def files(tmp_path: Path) -> Path:
    base = model(0)
    for name, state in {
        "base": base,
        **{t: model(i, base) for i, t in enumerate("abc", 1)},
    }.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    tasks = [str(folder / f"{t}.safetensors") for t in "abc"]
    return main(["merge", str(folder / "base.safetensors"), *tasks, *arguments])


def merged_in_memory(folder: Path, **recipe) -> dict[str, Tensor]:
    tasks = {t: load_file(folder / f"{t}.safetensors") for t in "abc"}
    return mp.merge(load_file(folder / "base.safetensors"), tasks, **recipe)


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], {}),
        (["--rule", "ties", "--scale", "0.7", "--weights", "1,1,.5"],
         {"rule": "ties", "scale": 0.7, "weights": {"a": 1, "b": 1, "c": 0.5}}),
        (["--rule", "tsv_m", "--purify", "dare,pact", "--set", "pact.core=5",
          "--set", "dare.p=0.5", "--seed", "4"],
         {"rule": "tsv_m", "purify": ["dare", "pact"], "seed": 4,
          "options": {"pact": {"core": 5}, "dare": {"p": 0.5}}}),
        (["--rule", "wudi", "--set", "wudi.ridge=0.1", "--purify", "wiener",
          "--set", "wiener.claims=10"],
         {"rule": "wudi", "purify": "wiener",
          "options": {"wudi": {"ridge": 0.1}, "wiener": {"claims": 10}}}),
        (["--rule", "iso_c", "--purify", "sift", "--exclude", "*.bias", "--dtype", "bfloat16"],
         {"rule": "iso_c", "purify": "sift", "exclude": "*.bias", "dtype": torch.bfloat16}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_files_merge_as_in_memory(files: Path, arguments: list[str], recipe: dict, output: str):
    assert run(files, "-o", str(files / output), "--quiet", *arguments) == 0
    path = files / output if output.endswith("s") else files / output / "model.safetensors"
    assert same(load_file(path), merged_in_memory(files, **recipe))


def test_output_repeats_byte_for_byte(files: Path):
    for name in ("one", "two"):
        out = files / f"{name}.safetensors"
        assert run(files, "-o", str(out), "--rule", "tsv_m", "--purify", "pact", "--quiet") == 0
    assert sha256(files / "one.safetensors") == sha256(files / "two.safetensors")


def test_folder_with_card_shards_and_side_files(files: Path):
    folder = files / "basefolder"
    folder.mkdir()
    os.rename(files / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    tasks = [f"{t.upper()}={files / t}.safetensors" for t in "abc"]
    out = files / "out"
    done = main(
        ["merge", str(folder), *tasks, "-o", str(out), "--max-shard-size", "5KB", "--quiet"]
    )
    assert done == 0
    assert (out / "config.json").exists()
    card = (out / "README.md").read_text()
    assert sha256(files / "a.safetensors") in card
    assert "| A | safetensors file |" in card
    assert '"rule": "task_arithmetic"' in card
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2


def test_summary_and_json(files: Path, capsys: pytest.CaptureFixture[str]):
    out = files / "out.safetensors"
    assert run(files, "-o", str(out), "--rule", "tsv_m", "--purify", "pact") == 0
    text = capsys.readouterr().out
    assert "2 tensors: pact > tsv_m" in text
    assert "1 tensors: mean, unscaled" in text
    assert "no value is published behind pact" in text
    assert run(files, "-o", str(out), "--overwrite", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["record"]["recipe"]["scale"] == 0.3
    assert summary["bytes"] == out.stat().st_size
    assert summary["tasks"].keys() == set("abc")
    assert json.loads(open_checkpoint(out).metadata["merge"]) == summary["record"]


def test_dry_run_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(files.iterdir())
    plan = ["-o", str(files / "out"), "--purify", "pact", "--dry-run"]
    assert run(files, *plan, "--verbose") == 0
    assert "visual.proj  [32, 16]  matrix_T: pact > task_arithmetic" in capsys.readouterr().out
    assert run(files, *plan) == 0
    told = capsys.readouterr().out
    assert "visual.proj" not in told
    assert "2 tensors: pact > task_arithmetic" in told
    assert "the output would take 0.0 MB (the base has 0.0)" in told
    assert "up to about 0.1 MB of memory" in told
    assert sorted(files.iterdir()) == before


def test_methods(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert "arXiv 2606.18627" in told
    assert "statistics of data: covariance (minipact statistics)" in told
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(mp.METHODS)


def spoiled(files: Path, task: str, **changes) -> None:
    state = load_file(files / f"{task}.safetensors")
    for name, x in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if x is not None:
            state[name] = x
    save_file(state, files / f"{task}.safetensors")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda f: spoiled(f, "b", fc__bias=None), [], "task 'b' lacks 'fc.bias'"),
        (lambda f: spoiled(f, "b", more=torch.ones(1)), [], "task 'b' has 'more'"),
        (lambda f: spoiled(f, "c", fc__bias=torch.ones(3)), [], "task 'c': 'fc.bias'"),
        (
            lambda f: spoiled(f, "c", fc__bias=torch.full((32,), torch.nan)),
            [],
            "'fc.bias' of task 'c'",
        ),
        (
            lambda f: save_file(load_file(f / "base.safetensors"), f / "a.safetensors"),
            [],
            "equals the base",
        ),
        (
            lambda f: spoiled(f, "base", fc__weight=torch.zeros(32, 32)),
            ["--purify", "pact"],
            "exclude",
        ),
        (lambda f: (f / "a.safetensors").write_bytes(b"x" * 99), [], "a.safetensors is no whole"),
        (lambda f: (f / "a.safetensors").unlink(), [], "does not exist"),
        (None, ["--rule", "best"], "rule 'best' is unknown"),
        (None, ["--purify", "soap"], "purifier 'soap' is unknown"),
        (None, ["--purify", "pact", "--set", "pact.cor=3"], "option 'cor'"),
        (None, ["--purify", "pact", "--set", "pact.core=99"], "pact.core=99"),
        (
            None,
            ["--purify", "wiener", "--set", "wiener.ridge=0"],
            "wiener: ridge=0 must be above 0",
        ),
        (None, ["--set", "core=3"], "METHOD.OPTION=VALUE"),
        (
            None,
            ["--rule", "ties", "--set", "ties.density=abc"],
            "error: ties.density='abc' must be a number, such as 0.2\n",
        ),
        (
            None,
            [
                "--rule",
                "wudi",
                "--purify",
                "awd",
                "--set",
                "wudi.ridge=x,",
                "--set",
                "awd.alpha=none",
            ],
            "error: awd.alpha=None must be a number, such as 0.1; wudi.ridge='x,' must be a number",
        ),
        (None, ["--weights", "1,2"], "3 numbers"),
        (None, ["--weights", "1,x,2"], "numbers with commas"),
        (None, ["--device", "toaster"], "--device toaster"),
        (None, ["--device", "meta"], "--device meta cannot be used"),
        (None, ["--threads", "0"], "--threads"),
        (None, ["--max-shard-size", "big"], "size"),
        (None, ["--include", "*.nothing"], "matches no tensor"),
        (None, ["--scale", "nan"], "finite"),
    ],
)
def test_user_errors_are_one_message_and_leave_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], spoil, arguments: list[str], message: str
):
    if spoil:
        spoil(files)
    before = sorted(files.iterdir())
    for output in ("out", "out.safetensors"):
        assert run(files, "-o", str(files / output), *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("minipact: error: ")
        assert message in error
        assert "Traceback" not in error
    assert sorted(files.iterdir()) == before


def test_names_of_tasks_and_outputs(files: Path, capsys: pytest.CaptureFixture[str]):
    base, a = str(files / "base.safetensors"), str(files / "a.safetensors")
    assert main(["merge", base, a, a, "-o", str(files / "o.safetensors")]) == 2
    assert "NAME=PATH" in capsys.readouterr().err
    assert main(["merge", base, a, "-o", a, "--overwrite"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert main(["merge", base, f"={a}", "-o", str(files / "o.safetensors")]) == 2
    assert "lacks a name or a path" in capsys.readouterr().err
    assert main(["merge", base, a, "-o", str(files / "b.safetensors")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["merge", base])
    assert stop.value.code == 2


@pytest.mark.parametrize("linked", [False, True])
def test_overwriting_a_folder_does_not_take_the_inputs_along(
    files: Path, tmp_path_factory, capsys: pytest.CaptureFixture[str], linked: bool
):
    if linked:  # as in the cache of a model hub
        blob = tmp_path_factory.mktemp("blobs") / "0123"
        (files / "a.safetensors").rename(blob)
        (files / "a.safetensors").symlink_to(blob)
    before = sorted(files.iterdir())
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "base.safetensors"
    save_file(model(0), elsewhere)
    arguments = ["merge", str(elsewhere), str(files / "a.safetensors"), "--overwrite"]
    assert main([*arguments, "-o", str(files)]) == 2
    assert "holds the input" in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


def test_tasks_take_the_names_that_one_sees(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for task, folder in (("a", "tiny-2.5-math"), ("b", "tiny-2.5-code")):
        (files / folder).mkdir()
        (files / f"{task}.safetensors").rename(files / folder / "model.safetensors")
    (files / "signs.safetensors").symlink_to(files / "c.safetensors")
    monkeypatch.setenv("HOME", str(files))
    texts = [
        str(files / "tiny-2.5-math"),
        f"{files / 'tiny-2.5-code'}/",
        str(files / "signs.safetensors"),
    ]
    texts.append("cars=~/c.safetensors")
    out = ["-o", str(files / "out"), "--json"]
    assert main(["merge", str(files / "base.safetensors"), *texts, *out]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert set(tasks) == {"tiny-2.5-math", "tiny-2.5-code", "signs", "cars"}
    assert str(files / "c.safetensors") in tasks["cars"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_summary_that_cannot_be_told_does_not_deny_the_output(files: Path):
    inputs = [str(files / "base.safetensors"), str(files / "a.safetensors")]
    command = [sys.executable, "-m", "minipact", "merge", *inputs, "-o"]
    with open("/dev/full", "w") as full:
        told = subprocess.run([*command, str(files / "o.safetensors")], stdout=full,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert told.returncode == 1
    assert "o.safetensors is written and whole" in told.stderr
    assert "Exception" not in told.stderr
    merged = mp.merge(load_file(inputs[0]), {"a": load_file(inputs[1])})
    assert same(load_file(files / "o.safetensors"), merged)


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error_message():
    command = f"{sys.executable} -m minipact methods | true; exit ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (told.returncode in (0, 1), told.stderr) == (True, "")


# ---- Layouts of real checkpoints -----------------------------------------------------------------


TINY_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def test_open_clip_folders_load_in_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY_CLIP)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny", pretrained=None)
    state = {name: x.clone() for name, x in clip.state_dict().items()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "open_clip_model.safetensors")
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    models = {t: tuned(state, i) for i, t in enumerate("ab")}
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": x for n, x in models["a"].items()}},
               tmp_path / "a.pt")  # fmt: skip
    torch.save(models["b"], tmp_path / "b.pt")
    out = tmp_path / "out"
    arguments = [str(base), str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "-o", str(out)]
    options = ["--rule", "tsv_m", "--purify", "pact", "--max-shard-size", "1KB", "--quiet"]
    assert main(["merge", *arguments, *options]) == 0
    expected = mp.merge(state, models, rule="tsv_m", purify="pact")
    by_folder = open_clip.create_model_and_transforms(f"local-dir:{out}")[0]
    weights = str(out / "open_clip_model.safetensors")
    by_path = open_clip.create_model_and_transforms("tiny", pretrained=weights)[0]
    for model in (by_folder, by_path):
        assert same(dict(model.state_dict()), expected)
    image = torch.randn(1, 3, 32, 32)
    assert not torch.equal(by_path.encode_image(image), clip.encode_image(image))


def test_hugging_face_clip_names(tmp_path: Path):
    layer = "vision_model.encoder.layers.0"
    shapes = {f"{layer}.self_attn.{p}_proj.weight": (16, 16) for p in ("q", "k", "v", "out")}
    shapes |= {f"{layer}.mlp.fc1.weight": (32, 16), f"{layer}.mlp.fc1.bias": (32,),
               f"{layer}.layer_norm1.weight": (16,), "visual_projection.weight": (8, 16),
               "vision_model.embeddings.class_embedding": (16,),
               "vision_model.embeddings.patch_embedding.weight": (16, 3, 4, 4)}  # fmt: skip
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    for name, x in {"base": state, "a": tuned(state, 1), "b": tuned(state, 2)}.items():
        (tmp_path / name).mkdir()
        save_file(x, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "clip_vision_model"}')
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    paths = [str(tmp_path / name) for name in ("base", "a", "b")]
    out = tmp_path / "out"
    assert main(["merge", *paths, "-o", str(out), "--rule", "iso_c", "--quiet"]) == 0
    merged = load_file(out / "model.safetensors")
    tasks = {"a": tuned(state, 1), "b": tuned(state, 2)}
    assert same(merged, mp.merge(state, tasks, rule="iso_c"))
    assert merged["vision_model.embeddings.position_ids"].dtype == torch.int64
    assert {"config.json", "preprocessor_config.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }


def test_sharded_half_precision_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shapes = {"model.embed_tokens.weight": (64, 16), "model.layers.0.mlp.up_proj.weight": (32, 16),
              "model.norm.weight": (16,)}  # fmt: skip
    state = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    for name, x in {"base": state, "a": tuned(state, 1)}.items():
        mp.save_checkpoint(tmp_path / name, x, max_shard_size=2500)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "merges.txt"):
        (tmp_path / "base" / name).write_text("{}")
    out = tmp_path / "out"
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "a"), "-o", str(out)]
    options = ["--max-shard-size", "2500", "--scale", "1", "--json"]
    assert main([*arguments, *options]) == 0
    merged = mp.open_checkpoint(out)
    assert merged.layout == "2 shards"
    assert same(dict(merged), mp.merge(state, [tuned(state, 1)], scale=1))
    assert (out / "tokenizer.json").exists()
    summary = json.loads(capsys.readouterr().out)
    assert summary["rounding"] < 1e-6  # two half-precision models differ by what half types hold
    assert main([*arguments, "--scale", "0.3", "--overwrite"]) == 0
    assert "of the norm of scale * delta" in capsys.readouterr().out


def test_rounding_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, task = {"w": torch.full((8, 8), 1.0)}, {"w": torch.full((8, 8), 1.0 + 2**-7 + 2**-9)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(task, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "base.safetensors"), str(tmp_path / "a.safetensors")]
    out = ["-o", str(tmp_path / "out"), "--scale", "1", "--json", "--overwrite"]
    assert main(["merge", *arguments, *out, "--dtype", "bfloat16"]) == 0
    # bfloat16 keeps 7 bits: of 2^-7 + 2^-9 it drops 2^-9
    assert json.loads(capsys.readouterr().out)["rounding"] == pytest.approx(2**-9 / (2**-7 + 2**-9))
    assert main(["merge", *arguments, *out]) == 0
    assert json.loads(capsys.readouterr().out)["rounding"] is None


def test_second_names_of_tied_tensors_can_be_excluded(tmp_path: Path):
    for seed, name in enumerate(("base", "a")):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, generator=g)
        state = {"embed[0].weight": x, "fc": torch.randn(3, 3, generator=g), "head.weight": x}
        torch.save(state, tmp_path / f"{name}.pt")
    paths = [str(tmp_path / name) for name in ("base.pt", "a.pt")]
    out = tmp_path / "out.safetensors"
    options = ["-o", str(out), "--exclude", "head*", "--scale", "1", "--quiet"]
    assert main(["merge", *paths, *options]) == 0
    merged, base, tuned = load_file(out), torch.load(paths[0]), torch.load(paths[1])
    assert torch.equal(merged["head.weight"], base["head.weight"])
    assert torch.equal(merged["embed[0].weight"], base["head.weight"])
    assert torch.allclose(merged["fc"], tuned["fc"])
    assert main(["merge", *paths, "-o", str(out), "--overwrite", "--exclude", "tail*"]) == 2


def test_the_number_of_threads_is_not_in_the_model_card(files: Path):
    cards = []
    for threads in (["--threads", "1"], ["--threads=2"], []):
        assert run(files, "-o", str(files / "out"), "--overwrite", "--quiet", *threads) == 0
        cards.append((files / "out" / "README.md").read_text())
    assert cards[0] == cards[1] == cards[2]


def test_rounding_of_huge_numbers_is_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, x in (("base", 1e30), ("a", 1.1e30)):
        save_file({"w": torch.full((4,), x).bfloat16()}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "out")]
    assert main(["merge", *paths[:2], "-o", paths[2], "--scale", "0.3", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["rounding"] < 1


def test_a_lack_of_memory_is_told_and_keeps_what_is_done(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from minipact import merging

    update = merging.rounded_update

    def crowded(name: str, *arguments: object) -> tuple[Tensor, float, float]:
        if name == "visual.proj":
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return update(name, *arguments)

    monkeypatch.setattr(merging, "rounded_update", crowded)
    assert run(files, "-o", str(files / "out.safetensors"), "--threads", "1") == 1
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert "--resume goes on from there" in error
    monkeypatch.undo()
    assert run(files, "-o", str(files / "out.safetensors"), "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed_tensors"] >= 1


def test_tied_tensors_are_merged_once_and_written_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    states = {}
    for i, name in enumerate(("base", "a", "b")):
        shared, own = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(i))
        states[name] = {"embed": shared, "own": own, "head": shared}
        torch.save(states[name], tmp_path / f"{name}.pt")
    arguments = [str(tmp_path / f"{name}.pt") for name in states]
    out = ["-o", str(tmp_path / "out.safetensors"), "--rule", "ties", "--scale", "1"]
    assert main(["merge", *arguments, *out]) == 0
    assert "2 tensors: ties" in capsys.readouterr().out
    merged = load_file(tmp_path / "out.safetensors")
    once = {n: {k: x for k, x in state.items() if k != "head"} for n, state in states.items()}
    base = once.pop("base")
    expected = mp.merge(base, once, rule="ties", scale=1)
    assert same(merged, expected | {"head": expected["embed"]})
    torch.save({k: x.clone() for k, x in states["b"].items()}, tmp_path / "b.pt")  # untied there
    assert main(["merge", *arguments, *out, "--overwrite"]) == 0
    assert "3 tensors: ties" in capsys.readouterr().out


def test_pickled_image_encoders_merge(tmp_path: Path):
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))
    states = {}
    for i, name in enumerate(("zeroshot", "a", "b")):
        encoder.load_state_dict(tuned(encoder.state_dict(), i))
        states[name] = {k: x.clone() for k, x in encoder.state_dict().items()}
        torch.save(encoder, tmp_path / f"{name}.pt")
    arguments = [str(tmp_path / f"{name}.pt") for name in states]
    out = tmp_path / "out.safetensors"
    assert main(["merge", *arguments, "-o", str(out), "--quiet"]) == 0
    assert same(load_file(out), mp.merge(states.pop("zeroshot"), states))


def test_threads_do_not_change_the_bytes(files: Path):
    for threads in ("1", "3"):
        out = files / f"out{threads}.safetensors"
        assert run(files, "-o", str(out), "--rule", "tsv_m", "--threads", threads, "--quiet") == 0
    assert sha256(files / "out1.safetensors") == sha256(files / "out3.safetensors")
