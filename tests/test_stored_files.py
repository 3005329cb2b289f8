"""`minipact compress` and `minipact extract`, end to end: the zoo's files, folders, messages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minipact as mp
from helpers import ROOT, contents, same, single, tuned
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint, read_metadata, sha256
from minipact.stored_commands import PER_TASK, by_task

ZOO = ROOT / "data" / "zoo"
TASKS = ("digits", "letters", "scenes")


def compress(output: Path, *arguments: str, tasks=TASKS) -> int:
    paths = [str(ZOO / f"{task}.safetensors") for task in tasks]
    return main(["compress", str(ZOO / "base.safetensors"), *paths, "-o", str(output), *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Error message of a command that ends with exit code 2."""
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minipact: error: ")
    assert "Traceback" not in error
    return error


# ---- The zoo -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "arguments", "options"), [
    ("emr", [], {}),
    ("tall", ["--set", "tall.lambdas=digits:0.2,letters:0.4,scenes:0.6"],
     {"lambdas": {"digits": 0.2, "letters": 0.4, "scenes": 0.6}}),
    ("tsv_compress", ["--set", "tsv_compress.rank=0.1"], {"rank": 0.1}),
])  # fmt: skip
def test_the_zoo_goes_into_one_file_and_out_again(
    rule: str, arguments: list[str], options: dict, tmp_path: Path, capsys
):
    file = tmp_path / "all.safetensors"
    assert compress(file, "--rule", rule, "--json", *arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    base = open_checkpoint(ZOO / "base.safetensors")
    tasks = {task: open_checkpoint(ZOO / f"{task}.safetensors") for task in TASKS}
    sizes = [file.stat().st_size, *(x.files[0].stat().st_size for x in (base, *tasks.values()))]
    assert summary["bytes"] == sizes[0] < sum(sizes[1:])
    assert sizes[0] < 0.6 * summary["bytes_apart"]
    assert summary["record"]["inputs"]["base"] == [sha256(ZOO / "base.safetensors")]
    assert summary["tensors"][rule] > 20
    stored = mp.compress(base, tasks, rule=rule, options={rule: options})
    assert json.loads(read_metadata(file)["per_task"]) == summary["record"]
    for task in TASKS:
        out = tmp_path / f"{task}.safetensors"
        assert main(["extract", str(file), task, "-o", str(out)]) == 0
        assert same(load_file(out), dict(stored.model(task)))
        assert json.loads(read_metadata(out)["extract"])["task"] == task
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'digits.safetensors'}: " in told


@pytest.mark.slow
def test_bytes_are_printed_beside_those_of_all_models(tmp_path: Path, capsys):
    file = tmp_path / "all.safetensors"
    assert compress(file, "--rule", "tsv_compress", tasks=TASKS[:2]) == 0
    told = capsys.readouterr().out
    apart = 3 * sum(x.nbytes for x in load_file(ZOO / "base.safetensors").values())
    size = file.stat().st_size
    assert f"wrote {file}: {size:,} bytes\n" in told
    assert f"that is {size / apart:.0%} of the {apart:,} bytes of the base and 2 whole mod" in told
    assert "26 tensors: tsv_compress" in told
    assert "54 tensors: in full" in told


# ---- Small files ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """base.safetensors and two tuned models, a and b."""
    base = {f"{i}.w": single(12, 10, seed=i) for i in range(4)} | {"b": single(7, seed=9)}
    for name, state in {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def small(folder: Path, output: str = "all.safetensors", *arguments: str) -> list[str]:
    """Words of a command on these files."""
    models = [str(folder / f"{name}.safetensors") for name in ("base", "a", "b")]
    return ["compress", *models, "-o", str(folder / output), *arguments]


@pytest.mark.parametrize("rule", PER_TASK)
def test_threads_do_not_change_the_bytes(files: Path, rule: str):
    for threads in ("1", "3"):
        name = f"{threads}.safetensors"
        assert main(small(files, name, "--rule", rule, "--threads", threads, "--quiet")) == 0
    assert sha256(files / "1.safetensors") == sha256(files / "3.safetensors")
    left = {path.name for path in files.iterdir()}
    assert left == {f"{x}.safetensors" for x in ("base", "a", "b", "1", "3")}, "no scratch stays"


@pytest.mark.parametrize("rule", PER_TASK)
def test_a_file_without_the_base(files: Path, rule: str, capsys):
    whole, bare = files / "whole.safetensors", files / "bare.safetensors"
    assert main(small(files, "whole.safetensors", "--rule", rule)) == 0
    assert main(small(files, "bare.safetensors", "--rule", rule, "--without-base")) == 0
    spared = whole.stat().st_size - bare.stat().st_size
    assert spared > sum(x.nbytes for x in load_file(files / "base.safetensors").values())
    out, base = str(files / "out.safetensors"), str(files / "base.safetensors")
    assert "holds no base: give the one" in refusal(capsys, "extract", str(bare), "a", "-o", out)
    other = str(files / "a.safetensors")
    error = refusal(capsys, "extract", str(bare), "a", "-o", out, "--base", other)
    assert f"{other} is not the base that {bare} was made from" in error
    assert not Path(out).exists()
    assert main(["extract", str(bare), "a", "-o", out, "--base", base, "--quiet"]) == 0
    assert same(load_file(out), dict(mp.open_stored(whole).model("a")))


def test_python_does_what_the_command_does(files: Path):
    paths = {name: files / f"{name}.safetensors" for name in "ab"}
    done = mp.compress_files(files / "base.safetensors", paths, files / "all.safetensors")
    assert done["record"]["recipe"]["rule"] == "emr"
    assert main(small(files, "again.safetensors", "--quiet")) == 0
    assert contents(files / "all.safetensors") == contents(files / "again.safetensors")
    done = mp.extract_file(files / "all.safetensors", "b", files / "out.safetensors")
    assert done["files"] == [str(files / "out.safetensors")]
    stored = mp.open_stored(files / "all.safetensors")
    assert same(load_file(files / "out.safetensors"), dict(stored.model("b")))


def test_a_folder_comes_out_with_all_that_the_base_s_holds(files: Path, capsys):
    folder, out = files / "model", files / "out"
    folder.mkdir()
    shutil.move(files / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "README.md").write_text("of the base")
    paths = {name: files / f"{name}.safetensors" for name in "ab"}
    mp.compress_files(folder, paths, files / "all.safetensors", with_base=False)
    given = ["extract", str(files / "all.safetensors"), "a", "-o", str(out)]
    assert main([*given, "--base", str(folder)]) == 0
    assert {x.name for x in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    expected = mp.compress(load_file(folder / "model.safetensors"), {
        name: load_file(path) for name, path in paths.items()
    })  # fmt: skip
    assert same(load_file(out / "model.safetensors"), dict(expected.model("a")))
    assert same(dict(open_checkpoint(out)), dict(expected.model("a")))
    mp.compress_files(folder, paths, files / "all.safetensors", overwrite=True)
    assert main([*given, "--overwrite"]) == 0
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "README.md"}
    assert "note: the folder holds weights only: give --base" in capsys.readouterr().out
    sharded = ["--max-shard-size", "1KB", "--base", str(folder), "--overwrite", "--quiet"]
    assert main([*given, *sharded]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert same(dict(open_checkpoint(out)), dict(expected.model("a")))


@pytest.mark.parametrize("with_base", [False, True])
def test_a_folder_has_a_card_that_tells_recipe_and_sources(files: Path, with_base: bool):
    folder = files / "model"
    folder.mkdir()
    shutil.copy(files / "base.safetensors", folder / "model.safetensors")
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    paths = {name: files / f"{name}.safetensors" for name in "ab"}
    done = mp.compress_files(folder, paths, files / "all.safetensors", rule="tall")
    out, base = files / "out", folder if with_base else None
    mp.extract_file(files / "all.safetensors", "b", out, base=base)
    card = (out / "README.md").read_text()
    assert "# The model of b\n" in card
    assert "2 fine-tuned models by `tall`" in card
    for name, path in {"the base": folder / "model.safetensors", **paths}.items():
        assert f"| {name} | `{sha256(path)}` |" in card
    assert ("transformers.BertModel.from_pretrained(" in card) == with_base
    record = json.loads(card.split("```json\n")[1].split("```")[0])
    assert record == done["record"]
    assert json.loads(read_metadata(out / "model.safetensors")["extract"])["record"] == record
    first = contents(out)
    mp.extract_file(files / "all.safetensors", "b", out, base=base, overwrite=True)
    assert contents(out) == first


def test_what_python_stored_has_a_card_without_sources(files: Path):
    models = {name: load_file(files / f"{name}.safetensors") for name in ("base", "a", "b")}
    mp.compress(models.pop("base"), models).save(files / "all.safetensors")
    mp.extract_file(files / "all.safetensors", "a", files / "out")
    card = (files / "out" / "README.md").read_text()
    assert "by `emr`" in card
    assert "SHA-256 of its files" not in card


def test_second_names_come_out_too(files: Path):
    """A tensor under two names is stored once, and each model has both."""
    base = load_file(files / "base.safetensors")
    for name in ("base", "a", "b"):
        state = load_file(files / f"{name}.safetensors")
        torch.save(state | {"tied": state["0.w"]}, files / f"{name}.pt")
    done = mp.compress_files(
        files / "base.pt", [files / "a.pt", files / "b.pt"], files / "all.safetensors"
    )
    assert done["record"]["aliases"] == {"tied": "0.w"}
    model = mp.open_stored(files / "all.safetensors").model("a")
    assert set(model) == {*base, "tied"}
    assert torch.equal(model["tied"], model["0.w"])
    mp.extract_file(
        files / "all.safetensors", "a", files / "out.safetensors", base=files / "base.pt"
    )
    assert same(load_file(files / "out.safetensors"), dict(model))


def test_modules_need_a_folder(files: Path, capsys):
    folder = files / "sentences"
    (folder / "2_Dense").mkdir(parents=True)
    shutil.copy(files / "base.safetensors", folder / "model.safetensors")
    save_file({"linear.weight": single(3, 3)}, folder / "2_Dense" / "model.safetensors")
    for place in (folder, folder / "2_Dense"):
        (place / "config.json").write_text("{}")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": "x"}
        for i, path in enumerate(("", "2_Dense"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    task = {n: x + 0.1 for n, x in dict(open_checkpoint(folder)).items()}
    save_file(task, files / "task.safetensors")
    file, out = files / "all.safetensors", files / "out"
    mp.compress_files(folder, [files / "task.safetensors"], file, rule="tall")
    error = refusal(capsys, "extract", str(file), "task", "-o", str(out))
    assert "holds modules, '2_Dense/': give the folder of its base (--base)" in error
    mp.extract_file(file, "task", out, base=folder)
    assert {x.relative_to(out).as_posix() for x in out.rglob("*.safetensors")} == {
        "model.safetensors", "2_Dense/model.safetensors",
    }  # fmt: skip
    found = dict(open_checkpoint(out))
    assert all(torch.allclose(found[n], x) for n, x in task.items())


def test_adapters_are_tasks(files: Path):
    """An adapter's update has two directions, which TSV-Compress keeps."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    for i, name in enumerate(("x", "y")):
        (files / name).mkdir()
        (files / name / "adapter_config.json").write_text(json.dumps(config))
        factors = {"A": single(2, 10, seed=i), "B": single(12, 2, seed=i + 5)}
        tensors = {f"base_model.model.1.lora_{key}.weight": x for key, x in factors.items()}
        save_file(tensors, files / name / "adapter_model.safetensors")
    base = {f"{i}.weight": single(12, 10, seed=i) for i in range(3)}
    save_file(base, files / "base.safetensors")
    paths = {name: files / name for name in "xy"}
    done = mp.compress_files(
        files / "base.safetensors", paths, files / "all.safetensors", rule="tsv_compress"
    )
    assert done["tensors"] == {"as in the base": 2, "tsv_compress": 1}
    model = mp.open_stored(files / "all.safetensors").model("y")
    a, b = single(2, 10, seed=1), single(12, 2, seed=6)
    assert torch.allclose(model["1.weight"], base["1.weight"] + 2 * b @ a, atol=1e-5)
    assert torch.equal(model["2.weight"], base["2.weight"])


@pytest.mark.slow
def test_a_transformers_model_loads_where_its_base_did(tmp_path: Path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20,
        max_position_embeddings=8,
    )  # fmt: skip
    for seed, name in enumerate(("base", "cars", "dtd")):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(tmp_path / name)
    file = tmp_path / "all.safetensors"
    mp.compress_files(tmp_path / "base", [tmp_path / "cars", tmp_path / "dtd"], file, rule="emr")
    mp.extract_file(file, "cars", tmp_path / "out", base=tmp_path / "base")
    found = BertModel.from_pretrained(tmp_path / "out").state_dict()
    expected = mp.open_stored(file).model("cars")
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert len(expected) > 20


# ---- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "best"], "rule of compress 'best' is unknown: use"),
        (["--rule", "tsv_m"], "rule of compress 'tsv_m' is unknown: use"),
        (["--set", "emr.scale=1"], "emr option 'scale' is unknown"),
        (["--set", "tall.lambdas=1"], "options for 'tall' is unknown: use 'emr'"),
        (["--set", "lambdas=1"], "METHOD.OPTION=VALUE"),
        (
            ["--rule", "tall", "--set", "tall.lambdas=a:1"],
            "tall.lambdas must give a value for each",
        ),
        (["--rule", "tall", "--set", "tall.lambdas=-1"], "lambdas=-1 do not fit"),
        (["--include", "*.nothing"], "matches no tensor"),
        (["--threads", "0"], "--threads"),
        (["--device", "toaster"], "--device toaster"),
        (["--rename", "x"], "--rename x: write OLD=NEW"),
    ],
)
def test_wrong_options_are_one_message_and_leave_nothing(
    files: Path, capsys, arguments: list[str], message: str
):
    before = sorted(files.iterdir())
    assert message in refusal(capsys, *small(files, "all.safetensors", *arguments))
    assert sorted(files.iterdir()) == before


def test_wrong_outputs_are_refused(files: Path, capsys):
    assert "end it in .safetensors" in refusal(capsys, *small(files, "folder"))
    assert "exists: choose another" in refusal(capsys, *small(files, "a.safetensors"))
    own = small(files, "base.safetensors", "--overwrite")
    assert "is the input" in refusal(capsys, *own)
    assert main(small(files, "all.safetensors", "--quiet")) == 0
    file = str(files / "all.safetensors")
    assert "exists: choose another" in refusal(capsys, "extract", file, "a", "-o", own[1])
    error = refusal(capsys, "extract", file, "a", "-o", file, "--overwrite")
    assert "is the input" in error


def test_no_file_goes_into_the_base_s_folder(files: Path, capsys):
    folder = files / "folder"
    mp.save_checkpoint(folder, load_file(files / "base.safetensors"))
    inside = str(folder / "all.safetensors")
    tasks = [str(files / f"{t}.safetensors") for t in "ab"]
    assert "lies in the input" in refusal(capsys, "compress", str(folder), *tasks, "-o", inside)
    file = str(files / "all.safetensors")
    assert main(["compress", str(folder), *tasks, "-o", file, "--quiet"]) == 0
    error = refusal(capsys, "extract", file, "a", "--base", str(folder), "-o", inside)
    assert "lies in the input" in error


def test_several_processes_are_refused(files: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert "by one process: leave torchrun out" in refusal(capsys, *small(files))


def test_inputs_that_do_not_fit_are_named(files: Path, capsys):
    save_file({"0.w": single(3, 3)}, files / "b.safetensors")
    error = refusal(capsys, *small(files))
    assert "task 'b'" in error
    save_file(load_file(files / "base.safetensors"), files / "b.safetensors")
    error = refusal(capsys, *small(files))
    assert f"task 'b' is {files / 'b.safetensors'}" in error
    assert "equals the base" in error
    assert not list(files.glob("all*"))


def test_files_that_hold_no_models_by_task_are_refused(files: Path, capsys):
    out = str(files / "out.safetensors")
    plain, gone = str(files / "a.safetensors"), str(files / "gone.safetensors")
    error = refusal(capsys, "extract", plain, "a", "-o", out)
    assert f"{plain} holds no models by task: give one that minipact compress wrote" in error
    assert f"{gone} does not exist" in refusal(capsys, "extract", gone, "a", "-o", out)
    assert main(small(files, "all.safetensors", "--quiet")) == 0
    file = files / "all.safetensors"
    assert "task 'c' is unknown: use 'a', 'b'" in refusal(
        capsys, "extract", str(file), "c", "-o", out
    )
    file.write_bytes(file.read_bytes()[:-1])
    error = refusal(capsys, "extract", str(file), "a", "-o", out)
    assert f"{file} is no whole safetensors file" in error or str(file) in error
    assert not Path(out).exists()


@pytest.mark.parametrize("rule", PER_TASK)
def test_a_merge_points_to_compress(files: Path, rule: str, capsys):
    words = ["merge", *small(files, "out.safetensors")[1:], "--rule", rule]
    error = refusal(capsys, *words)
    assert f"{rule} is no rule but a per_task method: see minipact.per_task.{rule}, and" in error
    assert "minipact compress" in error


def test_help_and_methods_name_them_all(capsys):
    known = {name for name, method in mp.METHODS.items() if method.kind == "per_task"}
    assert known == set(PER_TASK), "PER_TASK of stored_commands.py is what help lists"
    for command in ("compress", "extract"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    assert "emr, tall, tsv_compress" in capsys.readouterr().out
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert "emr (per_task, on all tensors, entry by entry)" in told
    assert "options: lambdas=0.4, merged=sum, density=0.2" in told
    assert "options: rescale=global" in told


def test_values_by_task():
    assert by_task("cars:0.4,my:dtd:0.2") == {"cars": 0.4, "my:dtd": 0.2}
    for value in ("energy:0.85", "exact", "a:b", "0.2,0.4", 0.4, None, True):
        assert by_task(value) is value
