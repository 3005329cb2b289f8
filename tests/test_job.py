"""Merges from files to files: records, repeating, sweeps, policies, own methods."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import contents, fails, same, small_model
from minipact import card, job
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint, sha256
from minipact.output import Shelf, save_checkpoint

TASKS = ("cars", "signs")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A base and two fine-tuned models in safetensors files."""
    base = small_model(0)
    save_file(base, tmp_path / "base.safetensors")
    for seed, task in enumerate(TASKS, 1):
        save_file(small_model(100 * seed, base), tmp_path / f"{task}.safetensors")
    return tmp_path


def inputs(folder: Path) -> list[str]:
    return [str(folder / f"{name}.safetensors") for name in ("base", *TASKS)]


def states(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base, *tasks = (load_file(path) for path in inputs(folder))
    return base, dict(zip(TASKS, tasks, strict=True))


def moved(files: Path, folder: Path) -> list[str]:
    """The inputs under other names and in another order."""
    folder.mkdir()
    places = [folder / name for name in ("start.safetensors", "y.safetensors", "x.safetensors")]
    for source, place in zip(inputs(files), places, strict=True):
        place.write_bytes(Path(source).read_bytes())
    return [str(places[0]), str(places[2]), str(places[1])]


# ---- Places for an output ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "merged.safetensors", "deep/x.safetensors"])
def test_no_file_goes_into_an_input_s_folder(
    files: Path, capsys: pytest.CaptureFixture[str], name: str
):
    base, cars, signs = inputs(files)
    folders = {path: files / f"{Path(path).stem}_folder" for path in (base, cars)}
    for path, folder in folders.items():
        save_checkpoint(folder, load_file(path), max_shard_size=2000)
        (folder / "deep").mkdir()
        before = sorted(folder.rglob("*"))
        arguments = [str(folder) if x == path else x for x in (base, cars, signs)]
        error = fails(capsys, 2, *arguments, "-o", str(folder / name))
        assert f"{folder / name} lies in the input {folder}" in error
        with pytest.raises(mp.CheckpointError, match="choose an output outside of this folder"):
            mp.merge_files(arguments[0], arguments[1:], folder / name, overwrite=True)
        assert sorted(folder.rglob("*")) == before
        beside = files / f"{folder.name}.safetensors"
        assert main(["merge", *arguments, "-o", str(beside), "--quiet"]) == 0


# ---- From Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_python_writes_the_bytes_of_the_command_line(files: Path, output: str):
    recipe = mp.Recipe(rule="ties", purify=("pact",), scale=0.7, exclude=("*.bias",), seed=3)
    paths = dict(zip(TASKS, inputs(files)[1:], strict=True))
    summary = mp.merge_files(inputs(files)[0], paths, files / output, recipe)
    told = contents(files / output)
    arguments = ["--rule", "ties", "--purify", "pact", "--scale", ".7", "--exclude", "*.bias"]
    out = ["-o", str(files / output), "--overwrite", "--quiet", "--seed", "3"]
    assert main(["merge", *inputs(files), *arguments, *out]) == 0
    assert contents(files / output) == told
    assert json.loads(json.dumps(summary)) == summary
    assert [Path(file).is_file() for file in summary["files"]] == [True] * len(summary["files"])


def test_tasks_as_a_list_are_named_after_their_files(files: Path):
    summary = mp.merge_files(inputs(files)[0], inputs(files)[1:], files / "out.safetensors")
    assert list(summary["tasks"]) == sorted(TASKS)
    with pytest.raises(mp.CheckpointError, match="two tasks are called 'cars'"):
        mp.merge_files(inputs(files)[0], [inputs(files)[1]] * 2, files / "other.safetensors")


def test_progress_of_every_tensor_is_told(files: Path):
    seen: list[tuple[int, int, str]] = []
    mp.merge_files(
        inputs(files)[0], inputs(files)[1:], files / "out", progress=lambda *x: seen.append(x)
    )
    assert [done for done, _, _ in seen] == list(range(1, 7))
    assert {name for _, _, name in seen} == set(states(files)[0])


# ---- The record ----------------------------------------------------------------------------------


def test_header_card_and_summary_hold_one_record(files: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--rule", "tsv_m", "--purify", "pact", "--set", "pact.core=3", "--vectors", "copy",
               "--weights", "1,.5", "--include", "visual*", "--exclude", "*.bias",
               "--policy", "*conv1*=copy", "--dtype", "bfloat16", "--seed", "5", "--json"]  # fmt: skip
    for output in ("out", "out.safetensors"):
        assert main(["merge", *inputs(files), "-o", str(files / output), *options]) == 0
    summaries = capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")
    records = [json.loads(text)["record"] for text in summaries]
    written = [open_checkpoint(files / out) for out in ("out", "out.safetensors")]
    records += [json.loads(checkpoint.metadata["merge"]) for checkpoint in written]
    records.append(card.read_record(files / "out"))
    assert all(record == records[0] for record in records)
    recipe = records[0]["recipe"]
    assert set(recipe) == set(mp.Recipe().keywords())
    assert recipe["options"]["pact"] == mp.METHODS["pact"].options | {"core": 3}
    assert recipe["options"]["tsv_m"] == mp.METHODS["tsv_m"].options
    told = [recipe[name] for name in ("include", "exclude", "policy", "vectors", "dtype", "seed")]
    assert told == [["visual*"], ["*.bias"], [["*conv1*", "copy"]], "copy", "bfloat16", 5]
    assert recipe["weights"] == {"cars": 1.0, "signs": 0.5}
    assert recipe["scale"] == 1.0
    assert records[0]["device"] == "cpu"
    assert records[0]["versions"] == {"minipact": mp.__version__, "torch": torch.__version__}
    sums = [[sha256(Path(path))] for path in inputs(files)]
    assert records[0]["inputs"] == {
        "base": sums[0],
        "tasks": dict(zip(TASKS, sums[1:], strict=True)),
    }
    assert str(files) not in (files / "out" / "README.md").read_text()
    assert str(files).encode() not in (files / "out.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [["--exclude", "*.bias"], ["--include", "*.bias"], ["--vectors", "copy"], ["--weights", "1,2"],
     ["--policy", "*proj*=copy"], ["--set", "task_arithmetic.reduce=mean", "--scale", ".3"]],
)  # fmt: skip
def test_other_merges_have_other_records(files: Path, options: list[str]):
    for name, given in (("one", []), ("two", options)):
        out = files / f"{name}.safetensors"
        assert main(["merge", *inputs(files), "-o", str(out), "--quiet", *given]) == 0
    one, two = (open_checkpoint(files / f"{name}.safetensors") for name in ("one", "two"))
    recipes = [mp.Recipe.from_dict(json.loads(x.metadata["merge"])["recipe"]) for x in (one, two)]
    assert recipes[0].digest != recipes[1].digest
    assert not same(one, two)


def test_a_journal_of_another_recipe_is_refused(files: Path, capsys: pytest.CaptureFixture[str]):
    partial = files / "out.partial"
    opened = job.open_job(inputs(files)[0], inputs(files)[1:])
    output = job.Output(files / "out", opened.metas())
    output.start(job._journal(opened) | job._stamps(opened))
    output.write("visual.proj", opened.merged["visual.proj"])
    output.settle()
    output.close(keep=True)
    assert partial.exists()
    arguments = [*inputs(files), "-o", str(files / "out"), "--resume", "--exclude", "*.bias"]
    error = fails(capsys, 2, *arguments)
    assert "begun with exclude [], now it is ['*.bias']" in error


# ---- Repeating a merge ---------------------------------------------------------------------------

SPECTRAL = ["--rule", "iso_cts", "--purify", "dare,pact", "--set", "pact.task=2", "--set", "dare.p=.2",
            "--scale", "1.2", "--weights", "1,.7", "--exclude", "*.bias", "--seed", "9"]  # fmt: skip


def test_a_card_alone_repeats_a_merge_to_the_byte(files: Path, tmp_path_factory):
    assert main(["merge", *inputs(files), "-o", str(files / "out"), "--quiet", *SPECTRAL]) == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "card.md").write_text((files / "out" / "README.md").read_text())
    paths = moved(files, elsewhere / "inputs")
    arguments = ["-o", str(elsewhere / "again"), "--recipe", str(elsewhere / "card.md"), "--quiet"]
    assert main(["merge", *paths, *arguments]) == 0
    assert contents(elsewhere / "again") == contents(files / "out")


def test_a_header_alone_repeats_a_merge_to_the_byte(files: Path, tmp_path_factory):
    first = files / "out.safetensors"
    assert main(["merge", *inputs(files), "-o", str(first), "--quiet", *SPECTRAL]) == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    paths, again = moved(files, elsewhere / "inputs"), elsewhere / "again.safetensors"
    assert main(["merge", *paths, "-o", str(again), "--recipe", str(first), "--quiet"]) == 0
    assert again.read_bytes() == first.read_bytes()


def test_the_order_of_a_policy_is_kept(files: Path):
    first = files / "out.safetensors"
    policy = ["--policy", "*proj*=copy", "--policy", "*c_proj*=matrix", "--policy", "*=vector"]
    assert main(["merge", *inputs(files), "-o", str(first), "--quiet", *policy]) == 0
    again = ["-o", str(files / "again.safetensors"), "--recipe", str(first), "--quiet"]
    assert main(["merge", *inputs(files), *again]) == 0
    assert (files / "again.safetensors").read_bytes() == first.read_bytes()
    assert torch.equal(load_file(first)["visual.proj"], states(files)[0]["visual.proj"])


def test_python_repeats_what_a_card_says(files: Path):
    assert main(["merge", *inputs(files), "-o", str(files / "out"), "--quiet", *SPECTRAL]) == 0
    base, *tasks = moved(files, files / "moved")
    found = mp.recorded(files / "out", base, tasks)
    assert set(found.tasks) == set(TASKS)
    assert found.notes == []
    mp.merge_files(base, found.tasks, files / "again", found.recipe)
    assert contents(files / "again") == contents(files / "out")


def test_files_of_one_name_are_told_apart_by_their_hash(files: Path):
    out = files / "out.safetensors"
    assert main(["merge", *inputs(files), "-o", str(out), "--quiet"]) == 0
    paths = [inputs(files)[0]]
    for task, source in zip(TASKS, inputs(files)[1:], strict=True):
        (files / task).mkdir()
        (files / task / "same.safetensors").write_bytes(Path(source).read_bytes())
        paths.append(str(files / task / "same.safetensors"))
    again = ["-o", str(files / "again.safetensors"), "--recipe", str(out), "--quiet"]
    assert main(["merge", *paths, *again]) == 0
    assert (files / "again.safetensors").read_bytes() == out.read_bytes()


def test_other_versions_and_devices_are_told(files: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", *inputs(files), "-o", str(files / "out"), "--quiet"]) == 0
    text = (files / "out" / "README.md").read_text()
    text = text.replace('"device": "cpu"', '"device": "cuda"').replace(torch.__version__, "1.0")
    (files / "card.md").write_text(text)
    again = ["-o", str(files / "again"), "--recipe", str(files / "card.md")]
    assert main(["merge", *inputs(files), *again]) == 0
    told = capsys.readouterr().out
    assert "recorded with torch 1.0, this is" in told
    assert "recorded with device cuda, this is cpu" in told


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda paths: paths[::-1], "is not the recorded base"),
        (lambda paths: [paths[0], paths[1]], "the record has tasks 'signs' too"),
        (lambda paths: [*paths, paths[0]], "base.safetensors is none of the recorded tasks"),
        (lambda paths: [*paths, "--scale", "2"], "--recipe says it all: leave out --scale"),
        (lambda paths: [*paths, "--set", "a.b=1"], "leave out --set"),
    ],
)
def test_other_inputs_than_recorded_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str], spoil, message: str
):
    out = files / "out.safetensors"
    assert main(["merge", *inputs(files), "-o", str(out), "--quiet"]) == 0
    arguments = ["-o", str(files / "again.safetensors"), "--recipe", str(out)]
    assert message in fails(capsys, 2, *arguments, *spoil(inputs(files)))
    assert not (files / "again.safetensors").exists()


def test_a_recipe_alone_in_a_file(files: Path):
    (files / "recipe.json").write_text('{"rule": "ties", "scale": 0.5, "exclude": ["*.bias"]}')
    out = files / "out.safetensors"
    arguments = ["-o", str(out), "--recipe", str(files / "recipe.json"), "--quiet"]
    assert main(["merge", *inputs(files), *arguments]) == 0
    base, tasks = states(files)
    assert same(load_file(out), mp.merge(base, tasks, rule="ties", scale=0.5, exclude="*.bias"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no record of a merge"),
        ("[1]", "holds no record of a merge"),
        ('{"recipe": 3}', "holds no record of a merge"),
        ('{"recipe": {}, "inputs": {"tasks": []}}', "holds no record of a merge"),
        ('{"lambda": 3}', "recipe field 'lambda' is unknown"),
        ('{"scale": "big"}', "scale 'big' must be a number"),
        ('{"rule": "best"}', "rule 'best' is unknown"),
        ('{"rule": 3}', "rule 3 is neither a name nor a function"),
        ('{"weights": [1]}', "weights must be a mapping"),
        ('{"options": {"task_arithmetic": 3}}', "recipe cannot be read"),
    ],
)
def test_bad_recipes_in_files(
    files: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
):
    (files / "recipe.json").write_text(text)
    arguments = ["-o", str(files / "out"), "--recipe", str(files / "recipe.json")]
    assert message in fails(capsys, 2, *inputs(files), *arguments)


def test_a_missing_recipe_is_named(files: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["-o", str(files / "out"), "--recipe", str(files / "none.json")]
    assert "none.json holds no record" in fails(capsys, 2, *inputs(files), *arguments)


# ---- Methods of strangers ------------------------------------------------------------------------

OWN = """
from minipact import Method, register

def largest(D, *, share=1.0):
    return share * D.amax(0)

halves = Method("halves", "purifier", lambda D: D / 2, acts_on="tensor")
print("imported")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with methods of its own."""
    (tmp_path / "strange_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strange_methods", raising=False)
    return "strange_methods"


def test_methods_from_elsewhere(files: Path, own: str):
    out = files / "out.safetensors"
    methods = ["--rule", f"{own}:largest", "--purify", f"{own}:halves", "--set", "largest.share=.5"]
    assert main(["merge", *inputs(files), "-o", str(out), "--quiet", *methods, "--scale", "1"]) == 0
    base, tasks = states(files)
    name = "visual.mlp.c_fc.weight"
    D = torch.stack([task[name] - base[name] for task in tasks.values()])
    assert torch.allclose(load_file(out)[name], base[name] + D.amax(0) / 4, atol=1e-6)
    again = ["-o", str(files / "again.safetensors"), "--recipe", str(out), "--quiet", *methods[:4]]
    assert main(["merge", *inputs(files), *again]) == 0
    assert (files / "again.safetensors").read_bytes() == out.read_bytes()


def test_a_record_does_not_run_code_that_nobody_named(
    files: Path, own: str, capsys: pytest.CaptureFixture[str]
):
    (files / "recipe.json").write_text(json.dumps({"rule": f"{own}:largest"}))
    arguments = ["-o", str(files / "out"), "--recipe", str(files / "recipe.json")]
    error = fails(capsys, 2, *inputs(files), *arguments)
    assert f"runs {own}:largest: if you trust it, add --rule {own}:largest" in error
    assert own not in sys.modules


@pytest.mark.parametrize("place", ["no_such_module:f", "math:no_such_name", ":f", "math:"])
def test_places_without_a_function(files: Path, capsys: pytest.CaptureFixture[str], place: str):
    error = fails(capsys, 2, *inputs(files), "-o", str(files / "out"), "--rule", place)
    assert f"{place} cannot be imported" in error


def test_own_functions_have_no_record_to_repeat(files: Path, capsys: pytest.CaptureFixture[str]):
    def rule(D: Tensor) -> Tensor:
        return D.sum(0)

    base, *tasks = inputs(files)
    out = files / "out.safetensors"
    summary = mp.merge_files(base, tasks, out, mp.Recipe(rule=rule, scale=1.0))
    assert "rule rule is a function of your own" in summary["record"]["recipe"]["not repeatable"]
    error = fails(capsys, 2, *inputs(files), "-o", str(files / "again"), "--recipe", str(out))
    assert "register it" in error
    with pytest.raises(mp.MergeError, match="no JSON"):
        mp.merge_files(base, tasks, files / "two", mp.Recipe(rule=rule), resume=True)


# ---- Scales --------------------------------------------------------------------------------------

JUDGE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
path = Path(sys.argv[1])
x = load_file(path if path.is_file() else path / "model.safetensors")["visual.mlp.c_fc.weight"]
print("looking at", path.name)
print(-abs(float(x[0, 0]) - float(sys.argv[2])))
"""


def judge(files: Path, target: float) -> str:
    (files / "judge.py").write_text(JUDGE)
    return f"{sys.executable} {files / 'judge.py'} {{}} {target!r}"


@pytest.mark.slow
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_the_best_scale_is_kept(files: Path, capsys: pytest.CaptureFixture[str], output: str):
    base, tasks = states(files)
    aim = mp.merge(base, tasks, rule="tsv_m", purify="pact", scale=0.8)
    command = judge(files, float(aim["visual.mlp.c_fc.weight"][0, 0]))
    arguments = ["--rule", "tsv_m", "--purify", "pact", "--scales", "0.2:1.4:5", "--score", command]
    before = {path.name for path in files.iterdir()}
    out = ["-o", str(files / output), "--json"]
    assert main(["merge", *inputs(files), *arguments, *out]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["record"]["recipe"]["scale"] == pytest.approx(0.8)
    assert [round(float(x), 6) for x in summary["scores"]] == [0.2, 0.5, 0.8, 1.1, 1.4]
    assert max(summary["scores"].values()) == pytest.approx(0.0, abs=1e-6)
    assert {path.name for path in files.iterdir()} - before == {output}
    scale = summary["record"]["recipe"]["scale"]
    expected = mp.merge(base, tasks, rule="tsv_m", purify="pact", scale=scale)
    assert same(open_checkpoint(files / output), expected)
    if output == "out":
        text = (files / "out" / "README.md").read_text()
        assert "## Scales tried" in text
        assert all(f"| {x} |" in text for x in ("0.2", "0.5", "0.8", "1.1", "1.4"))


def test_a_sweep_computes_task_vectors_once(files: Path):
    calls: list[Tensor] = []

    def rule(D: Tensor) -> Tensor:
        calls.append(D)
        return D.sum(0)

    base, *tasks = inputs(files)
    summary = mp.merge_files(
        base, tasks, files / "out", mp.Recipe(rule=rule),
        scales=[0.1, 0.2, 0.3, -0.4], score=lambda path: float(open_checkpoint(path)["visual.proj"].sum()),
    )  # fmt: skip
    assert len(calls) == 3 * 2  # three matrices; a negative scale treats vectors otherwise
    assert list(summary["scores"]) == [0.1, 0.2, 0.3, -0.4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "0:1:3"], "go together"),
        (["--score", "true {}"], "go together"),
        (["--scales", "0:1", "--score", "true {}"], "write FIRST:LAST:COUNT"),
        (["--scales", "0:1:0", "--score", "true {}"], "write FIRST:LAST:COUNT"),
        (["--scales", "a,b", "--score", "true {}"], "write FIRST:LAST:COUNT"),
        (["--scales", "1", "--scale", "1", "--score", "true {}"], "exclude each other"),
        (["--scales", "1", "--score", "true"], "must hold {}"),
        (["--scales", "1", "--score", "false {}"], "failed"),
        (["--scales", "1", "--score", "no-such-program {}"], "failed"),
        (["--scales", "1", "--score", "echo {}"], "must print a number last"),
        (["--scales", "1", "--score", "true {}"], "must print a number last"),
        (["--scales", "1", "--score", "printf nan {}"], "nan must be a number, finite"),
        (["--scales", "1,inf", "--score", "printf 1 {}"], "scale inf must be a number, finite"),
        (["--scales", "1", "--score", "printf 1 {}", "--resume"], "leave resume and torchrun out"),
    ],
)
def test_scales_and_scores_that_do_not_go(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    before = sorted(files.iterdir())
    assert message in fails(capsys, 2, *inputs(files), "-o", str(files / "out"), *arguments)
    assert sorted(files.iterdir()) == before


def test_a_shelf_keeps_tensors_and_nothing(tmp_path: Path):
    shelf = Shelf(tmp_path)
    x = torch.randn(3, 4).mT
    shelf["x"], shelf["none"] = x, None
    assert torch.equal(shelf["x"], x)
    assert shelf["none"] is None
    assert list(shelf) == ["x", "none"]
    del shelf["x"]
    assert len(shelf) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- The way in ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["merge", "--help"], ["xray", "--help"]]
)
def test_help_does_not_wait_for_torch(words: list[str]):
    script = (
        "import sys\nfrom minipact.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "minipact" in done.stdout


@pytest.mark.parametrize("vectors", ["rule", "mean", "copy", "0.25", "auto"])
def test_vectors_on_the_command_line(files: Path, vectors: str):
    out = files / "out.safetensors"
    options = ["--rule", "iso_c", "--vectors", vectors, "--scale", "2", "--quiet"]
    assert main(["merge", *inputs(files), "-o", str(out), *options]) == 0
    base, tasks = states(files)
    bias = "visual.mlp.c_fc.bias"
    D = torch.stack([task[bias] - base[bias] for task in tasks.values()])
    factor = {"rule": 2 / 2, "mean": 1 / 2, "auto": 1 / 2, "copy": 0, "0.25": 0.25}[vectors]
    assert torch.allclose(load_file(out)[bias], base[bias] + factor * D.sum(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vectors", "median"], "vectors 'median' is unknown"),
        (["--vectors", "nan"], "vectors nan must be a number, finite"),
        (["--policy", "*.nothing=copy"], "policy '*.nothing' matches no tensor"),
        (["--policy", "*proj*=round"], "policy 'round' is unknown"),
        (["--policy", "*bias=matrix"], "cannot be a matrix"),
        (["--policy", "bias"], "write GLOB=KIND"),
    ],
)
def test_bad_treatments(
    files: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    assert message in fails(capsys, 2, *inputs(files), "-o", str(files / "out"), *options)


# ---- What an attack found ------------------------------------------------------------------------


def test_an_input_that_changes_while_scales_are_tried_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    base, *tasks = inputs(files)

    def replacing(candidate: Path) -> float:
        save_file(small_model(7), tasks[0])
        return 1.0

    with pytest.raises(mp.CheckpointError, match=r"cars.safetensors changed while it was read"):
        mp.merge_files(base, tasks, files / "out", scales=[0.1, 0.2], score=replacing)
    assert not (files / "out").exists()


@pytest.mark.parametrize("name", ["the base", "a\nb", "x\udcff"])
def test_names_that_no_card_can_hold(files: Path, name: str):
    base, task, _ = inputs(files)
    with pytest.raises(mp.CheckpointError, match="a task cannot be called"):
        mp.merge_files(base, {name: task}, files / "out")


@pytest.mark.parametrize(
    "changes",
    [{"weights": {"cars": 2.0, "signs": 1.0}}, {"include": ("visual.proj",)}, {"vectors": "copy"},
     {"options": {"rule": {"power": 2}}}],
)  # fmt: skip
def test_merges_by_an_own_function_have_records_of_their_own(files: Path, changes: dict):
    def rule(D: Tensor, *, power: int = 1) -> Tensor:
        return D.sum(0) ** power

    base, *tasks = inputs(files)
    first = mp.merge_files(base, tasks, files / "one", mp.Recipe(rule=rule, scale=1.0))
    other = mp.merge_files(base, tasks, files / "two", mp.Recipe(rule=rule, scale=1.0, **changes))
    assert first["record"] != other["record"]
    assert "the record cannot be repeated: rule rule" in " ".join(other["notes"])
    assert "It cannot be repeated from this card" in (files / "two" / "README.md").read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('boom')", "cannot be imported (RuntimeError('boom'))"),
        ("import sys; sys.exit(5)", "cannot be imported (SystemExit(5))"),
        ("def f(D", "cannot be imported (SyntaxError"),
        ("def f(D, needed): return D[0]", "f failed: TypeError"),
        ("def f(D): raise RuntimeError('boom')", "f failed: RuntimeError('boom')"),
        ("def f(D): return D[0] * float('nan')", "f: it returned NaN or infinity"),
        ("def f(D): return (D[0] > 0)", "f: it returned torch.bool, not a dense tensor"),
        ("f = 3", "is neither a name nor a function"),
    ],
)
def test_code_of_others_that_fails(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    message: str,
):
    (files / "failing_methods.py").write_text(body)
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.delitem(sys.modules, "failing_methods", raising=False)
    rule = ["--rule", "failing_methods:f", "--scale", "1"]
    assert message in fails(capsys, 2, *inputs(files), "-o", str(files / "out"), *rule)
    assert not list(files.glob("out*"))


@pytest.mark.parametrize("options", [["--rule", "ties"], ["--purify", "dare"], ["--rule", "own:f"]])
def test_methods_that_a_recipe_does_not_hold_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    out = files / "out.safetensors"
    assert main(["merge", *inputs(files), "-o", str(out), "--quiet"]) == 0
    again = ["-o", str(files / "again"), "--recipe", str(out), *options]
    assert "--recipe says it all: leave out" in fails(capsys, 2, *inputs(files), *again)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -c 'print(1) {}", "cannot be read: No closing quotation"),
        ("printf '1\\n\\377' {}", "must print a number last"),
        ("printf inf {}", "at scale 0.5: the score inf must be a number, finite"),
    ],
)
def test_odd_scores(files: Path, capsys: pytest.CaptureFixture[str], command: str, message: str):
    options = ["--scales", "0.5", "--score", command]
    assert message in fails(capsys, 2, *inputs(files), "-o", str(files / "out"), *options)


def test_second_names_of_tied_tensors_may_stand_in_policies_and_scopes(tmp_path: Path):
    for seed, name in enumerate(("base", "a", "b")):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        torch.save({"embed": x, "head": x, "own": x[:4].clone()}, tmp_path / f"{name}.pt")
    base, *tasks = (tmp_path / f"{name}.pt" for name in ("base", "a", "b"))
    recipe = mp.Recipe(
        rule="iso_c", purify="pact", policy={"head": "copy"}, options={"pact": {"scope": ["o*"]}}
    )
    mp.merge_files(base, tasks, tmp_path / "out.safetensors", recipe)
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged["head"], torch.load(base)["embed"])
    scoped = mp.Recipe(purify="sift", options={"sift": {"scope": "head"}}, scale=1.0)
    summary = mp.merge_files(base, tasks, tmp_path / "two.safetensors", scoped)
    assert summary["tensors"]["sift > task_arithmetic"] == 1


def test_arrays_and_single_paths_are_taken(files: Path):
    import numpy as np

    base, task, other = inputs(files)
    summary = mp.merge_files(base, task, files / "one.safetensors")
    assert list(summary["tasks"]) == ["cars"]
    scores = iter([1.0, 3.0, 2.0])
    summary = mp.merge_files(
        base, [task, other], files / "two", scales=np.linspace(0.1, 0.3, 3), score=lambda _: next(scores)
    )  # fmt: skip
    assert summary["record"]["recipe"]["scale"] == pytest.approx(0.2)
