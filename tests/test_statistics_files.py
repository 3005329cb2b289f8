"""Statistics of data as files: written whole, matched to tasks by hashes, recorded, repeated, refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import contents, data_of, fails, same, small_model
from minipact import job
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint, sha256
from minipact.statistics_files import digests, names_under

TASKS = ("cars", "signs")
BASE = small_model(0)
TUNED = {name: small_model(100 * seed, BASE) for seed, name in enumerate(TASKS, 1)}
COVARIANCES = dict(zip(TASKS, data_of("regmean", BASE, 2)["statistics"]["covariance"], strict=True))
FISHERS = dict(zip(TASKS, data_of("fisher_merge", BASE, 2)["statistics"]["fisher"], strict=True))
FC = "visual.mlp.c_fc.weight"


def stored(folder: Path, kind: str, states: dict[str, dict[str, Tensor]]) -> list[Path]:
    """The statistics of the tasks in files."""
    return [
        mp.save_statistics(
            folder / f"{name}_{kind}.safetensors",
            kind,
            state,
            model=folder / f"{name}.safetensors",
            samples=32,
        )
        for name, state in states.items()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, two fine-tuned models, and the covariances of their inputs."""
    for name, state in {"base": BASE, **TUNED}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    stored(tmp_path, "covariance", COVARIANCES)
    return tmp_path


def models(folder: Path) -> list[str]:
    return [str(folder / f"{name}.safetensors") for name in ("base", *TASKS)]


def files(folder: Path, kind: str = "covariance") -> list[Path]:
    return [folder / f"{name}_{kind}.safetensors" for name in TASKS]


def merged(folder: Path, output: str, recipe: mp.Recipe, **more) -> dict:
    base, *tasks = models(folder)
    return mp.merge_files(base, tasks, folder / output, recipe, **more)


# ---- Files ---------------------------------------------------------------------------------------


def test_a_file_says_what_it_holds(folder: Path):
    path = files(folder)[0]
    found = mp.open_statistics(path)
    sums = [sha256(folder / "cars.safetensors")]
    assert (found.kind, found.model, found.task, found.samples) == ("covariance", sums, sums, 32)
    assert found.sha256 == sha256(path)
    assert same(found, COVARIANCES["cars"])
    assert found.meta(FC).device.type == "meta"
    assert "cars" not in str(open_checkpoint(path).metadata), "no paths"


def test_statistics_are_kept_in_float32(folder: Path):
    wide = {name: x.double() for name, x in COVARIANCES["cars"].items()}
    path = mp.save_statistics(
        folder / "wide.safetensors", "covariance", wide, model=folder / "cars.safetensors", samples=1
    )  # fmt: skip
    assert same(mp.open_statistics(path), COVARIANCES["cars"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gram"}, "statistics 'gram' is unknown: use 'covariance', 'fisher'"),
        ({"samples": 0}, "samples=0: a statistic needs at least one sample"),
        ({"state": {}}, "no covariance of any tensor"),
        ({"state": {FC: torch.ones(2, 3)}}, r"covariance of '.*' is \[2, 3\]: give \[n, n\]"),
        ({"state": {FC: torch.full((2, 2), math.nan)}}, "holds NaN or what float32 cannot hold"),
        (
            {"state": {FC: torch.full((2, 2), 1e300, dtype=torch.float64)}},
            "what float32 cannot hold",
        ),
        ({"model": "none.safetensors"}, "none.safetensors does not exist"),
        ({"path": "out.pt"}, "statistics go into one file: end it in .safetensors"),
        ({"path": "cars_covariance.safetensors"}, "exists: choose another output"),
    ],
)
def test_what_is_no_statistic_is_not_written(folder: Path, change: dict, message: str):
    given = {"path": "new.safetensors", "kind": "covariance", "state": COVARIANCES["cars"]}
    given |= {"model": "cars.safetensors", "samples": 3} | change
    given |= {name: folder / given[name] for name in ("path", "model")}
    before = contents(folder)
    with pytest.raises((mp.MergeError, mp.CheckpointError), match=message):
        mp.save_statistics(**given)
    assert contents(folder) == before


def test_a_model_of_several_files_is_known_by_all(tmp_path: Path):
    mp.save_checkpoint(tmp_path / "model", TUNED["cars"], max_shard_size=2000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert digests(tmp_path / "model") == [sha256(file) for file in shards]
    assert len(shards) > 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.w", "b.w"], ["a.w", "b.w"]),
        (["m.a.w", "m.b.w", "other"], ["m.a.w", "m.b.w"]),
        (["w"], ["a.w", "b.w"]),  # which of the two would be a guess
        (["x", "y"], ["a.w", "b.w"]),
    ],
)
def test_names_may_have_a_beginning_more_or_less(names: list[str], expected: list[str]):
    assert list(names_under(["a.w", "b.w"], names).values()) == expected
    if expected[0].startswith("m."):
        assert list(names_under(expected, ["a.w", "b.w"]).values()) == ["a.w", "b.w"]


# ---- Merges --------------------------------------------------------------------------------------


def test_files_give_the_merge_of_mappings(folder: Path):
    recipe = mp.Recipe(rule="regmean", scale=0.9)
    summary = merged(folder, "out.safetensors", recipe, statistics=files(folder)[::-1])
    expected = mp.merge(
        BASE, TUNED, rule="regmean", scale=0.9, statistics={"covariance": COVARIANCES}
    )
    assert same(load_file(folder / "out.safetensors"), expected)
    sums = {name: sha256(file) for name, file in zip(TASKS, files(folder), strict=True)}
    assert summary["record"]["recipe"]["statistics"] == {"covariance": sums}
    opened = {
        name: mp.open_statistics(file) for name, file in zip(TASKS, files(folder), strict=True)
    }
    lazy = mp.Merged(BASE, TUNED, rule="regmean", scale=0.9, statistics={"covariance": opened})
    assert same(dict(lazy), expected)
    assert lazy.recipe.statistics == {"covariance": sums}
    assert mp.Recipe.from_json(lazy.recipe.to_json()) == lazy.recipe


def test_statistics_of_models_with_a_longer_name(folder: Path):
    longer = {
        name: {f"model.{tensor}": x for tensor, x in state.items()} for name, state in TUNED.items()
    }
    for name, state in longer.items():
        save_file(state, folder / f"{name}.safetensors")
    named = {
        name: {f"model.{tensor}": x for tensor, x in state.items()}
        for name, state in COVARIANCES.items()
    }
    for file in files(folder):
        file.unlink()
    recipe = mp.Recipe(rule="regmean")
    merged(folder, "out.safetensors", recipe, statistics=stored(folder, "covariance", named))
    expected = mp.merge(BASE, TUNED, rule="regmean", statistics={"covariance": COVARIANCES})
    assert same(load_file(folder / "out.safetensors"), expected)


def test_the_command_line_repeats_a_merge_with_its_statistics(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    given = [x for file in files(folder) for x in ("--statistics", str(file))]
    out, again = folder / "out", folder / "again"
    assert main(["merge", *models(folder), "-o", str(out), "--rule", "regmean", *given]) == 0
    card = (out / "README.md").read_text()
    assert "--recipe README.md --statistics FILE --statistics FILE\n" in card
    repeat = ["merge", *models(folder), "-o", str(again), "--recipe", str(out)]
    error = fails(capsys, 2, *repeat[1:])
    assert "the recipe takes the covariance of task 'cars', 'signs': give its file again" in error
    assert main([*repeat, *given]) == 0
    assert contents(out) == contents(again)


def test_a_record_takes_no_other_statistics(folder: Path, capsys: pytest.CaptureFixture[str]):
    summary = merged(folder, "out.safetensors", mp.Recipe(rule="regmean"), statistics=files(folder))
    recipe = mp.Recipe.from_dict(summary["record"]["recipe"])
    (folder / "signs_covariance.safetensors").unlink()
    other = {"signs": {name: 2 * x for name, x in COVARIANCES["signs"].items()}}
    stored(folder, "covariance", other)
    with pytest.raises(mp.MergeError, match="signs_cov.* is not the covariance of task 'signs'"):
        merged(folder, "again.safetensors", recipe, statistics=files(folder))
    stored(folder, "fisher", FISHERS)
    plain = recipe.but(statistics={})
    with pytest.raises(mp.MergeError, match="statistics 'fisher' are used by no method"):
        merged(folder, "a", plain, statistics=[*files(folder), *files(folder, "fisher")])


def test_gradients_are_the_base_s_for_a_task(folder: Path):
    paths = [folder / f"{name}_gradient.safetensors" for name in TASKS]
    for name, path in zip(TASKS, paths, strict=True):
        mp.save_statistics(
            path, "gradient", FISHERS[name], model=folder / "base.safetensors", samples=4,
            task=folder / f"{name}.safetensors",
        )  # fmt: skip
    recipe = mp.Recipe(purify="tatr", scale=1.0, options={"tatr": {"q": 0.6}})
    merged(folder, "out.safetensors", recipe, statistics=paths)
    expected = mp.merge(
        BASE, TUNED, purify="tatr", scale=1.0, options={"tatr": {"q": 0.6}},
        statistics={"gradient": FISHERS},
    )  # fmt: skip
    assert same(load_file(folder / "out.safetensors"), expected)
    paths[0].unlink()
    mp.save_statistics(
        paths[0], "gradient", FISHERS["cars"], model=folder / "cars.safetensors", samples=4
    )
    with pytest.raises(mp.CheckpointError, match="cars_grad.* was measured at .*, not at the base"):
        merged(folder, "again.safetensors", recipe, statistics=paths)


def no_header(path: Path, text: str | None) -> None:
    state = load_file(path)
    save_file(state, path, {} if text is None else {"statistics": text})


def renamed_kind(path: Path) -> None:
    header = json.loads(open_checkpoint(path).metadata["statistics"])
    no_header(path, json.dumps(header | {"kind": "gram"}))


def other_shape(path: Path) -> None:
    header = open_checkpoint(path).metadata["statistics"]
    state = load_file(path)
    save_file(state | {FC: torch.eye(3)}, path, {"statistics": header})


def of_another(path: Path) -> None:
    path.unlink()
    mp.save_statistics(
        path, "covariance", COVARIANCES["cars"], model=path.with_name("base.safetensors"), samples=1
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: no_header(f, None), "says of no statistics in its header: make one by minipact"),
        (lambda f: no_header(f, "[]"), "says of no statistics in its header"),
        (lambda f: no_header(f, '{"kind": "covariance"}'), "says of no statistics in its header"),
        (renamed_kind, "holds statistics of the unknown kind 'gram': known are 'covariance'"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "is no whole safetensors file"),
        (other_shape, r"covariance of '.*c_fc.*', task 'cars': is \(3, 3\), not \(16, 16\)"),
        (of_another, "is the covariance of another model, of SHA-256 .{12}, than any task here"),
        (lambda f: f.unlink(), "does not exist"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(folder: Path, spoil, message: str):
    path = files(folder)[0]
    spoil(path)
    with pytest.raises((mp.CheckpointError, mp.MergeError), match=message) as caught:
        merged(folder, "out.safetensors", mp.Recipe(rule="regmean"), statistics=files(folder))
    assert str(path) in str(caught.value)
    assert not (folder / "out.safetensors").exists()


def test_a_merge_goes_on_only_with_the_same_statistics(folder: Path):
    recipe = mp.Recipe(rule="regmean")
    opened = job.open_job(models(folder)[0], models(folder)[1:], recipe, statistics=files(folder))
    output = job.Output(folder / "out.safetensors", opened.metas())
    output.start(job._journal(opened) | job._stamps(opened))
    output.write("visual.proj", opened.merged["visual.proj"])
    output.settle()
    output.close(keep=True)
    (folder / "signs_covariance.safetensors").unlink()
    stored(folder, "covariance", {"signs": COVARIANCES["cars"]})
    with pytest.raises(mp.CheckpointError, match="was begun with statistics {'covariance'"):
        merged(folder, "out.safetensors", recipe, statistics=files(folder), resume=True)


def test_a_file_for_each_task_once(folder: Path):
    recipe, (first, second) = mp.Recipe(rule="regmean"), files(folder)
    with pytest.raises(mp.CheckpointError, match="there is no covariance of task 'signs': make it"):
        merged(folder, "out", recipe, statistics=[first])
    copy = folder / "copy.safetensors"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(mp.CheckpointError, match="are both the covariance of task 'cars': leave"):
        merged(folder, "out", recipe, statistics=[first, second, copy])
    with pytest.raises(
        mp.MergeError, match="regmean needs the covariance .* minipact statistics c"
    ):
        merged(folder, "out", recipe)
    with pytest.raises(mp.CheckpointError, match="is the input"):
        merged(folder, first.name, recipe, statistics=[first, second], overwrite=True)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"gram": {}}, "statistics 'gram' is unknown"),
        (
            {"fisher": {"a": "no hash"}},
            "statistics: fisher of 'a' must be a SHA-256, not 'no hash'",
        ),
        ({"fisher": 3}, "statistics: fisher must be a mapping"),
    ],
)
def test_recipes_name_statistics_by_hash(field: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.Recipe(statistics=field)
