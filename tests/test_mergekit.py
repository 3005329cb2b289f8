"""mergekit's YAML: the methods that both have come out as written there, the rest is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import close, normal
from minipact.__main__ import main
from minipact.mergekit import read_mergekit

BASE = {"a.weight": normal(6, 5), "b.bias": normal(5, seed=1)}
ONE, TWO = ({k: x + normal(*x.shape, seed=s) for k, x in BASE.items()} for s in (10, 20))


def written(folder: Path, text: str) -> Path:
    file = folder / "merge.yml"
    file.write_text(text)
    return file


def config(method: str, extra: str = "", weights: tuple[float, float] = (0.7, 0.4)) -> str:
    """Two models with weights, the base among the models as mergekit's users write it."""
    return f"""
merge_method: {method}
base_model: org/base
models:
  - model: org/base
  - model: here/one
    parameters: {{weight: {weights[0]}}}
  - model: two
    parameters: {{weight: {weights[1]}}}
parameters: {{{extra}}}
dtype: float32
"""


def merged(folder: Path, text: str) -> dict[str, Tensor]:
    found = read_mergekit(written(folder, text))
    assert (found.base, found.tasks) == ("org/base", {"one": "here/one", "two": "two"})
    return mp.merge(BASE, {"one": ONE, "two": TWO}, **found.recipe.but(dtype=None).keywords())


def reference(
    name: str, weights: list[float], density: float, normalize: bool, elect: bool
) -> Tensor:
    """mergekit's generalized task arithmetic, as its file describes it."""
    deltas = torch.stack([ONE[name] - BASE[name], TWO[name] - BASE[name]])
    kept = int(density * deltas[0].numel())
    floor = deltas.abs().flatten(1).sort(descending=True).values[:, kept - 1]
    shape = -1, *[1] * (deltas.ndim - 1)
    deltas = torch.where(deltas.abs() >= floor.view(shape), deltas, 0)
    w = torch.tensor(weights, dtype=torch.float64).view(shape)
    mask = torch.ones_like(deltas)
    if elect:
        mask = ((w * deltas).sign() == torch.where((w * deltas).sum(0) >= 0, 1.0, -1.0)).double()
    total, divisor = (w * deltas * mask).sum(0), (w * mask).sum(0)
    return BASE[name] + (total / torch.where(divisor == 0, 1, divisor) if normalize else total)


@pytest.mark.parametrize(
    ("method", "extra", "weights", "wanted"),
    [
        ("task_arithmetic", "", (0.7, 0.4), (1.0, False, False)),
        ("task_arithmetic", "normalize: true", (0.7, 0.4), (1.0, True, False)),
        ("ties", "density: 0.5", (0.7, 0.7), (0.5, True, True)),
        ("ties", "density: 0.5, normalize: false", (0.7, 0.4), (0.5, False, True)),
    ],
)
def test_merges_are_as_mergekit_describes_them(
    tmp_path: Path, method: str, extra: str, weights: tuple[float, float], wanted: tuple
):
    found = merged(tmp_path, config(method, extra, weights))
    for name, x in found.items():
        assert close(x, reference(name, list(weights), *wanted)), name


def test_lambda_is_the_scale(tmp_path: Path):
    half, whole = (merged(tmp_path, config("task_arithmetic", f"lambda: {x}")) for x in (0.5, 1))
    assert close(2 * (half["a.weight"] - BASE["a.weight"]), whole["a.weight"] - BASE["a.weight"])


@pytest.mark.parametrize(
    ("method", "rule"), [("dare_ties", "ties"), ("dare_linear", "task_arithmetic")]
)
def test_dare_drops_one_minus_density(tmp_path: Path, method: str, rule: str):
    found = read_mergekit(written(tmp_path, config(method, "density: 0.75")))
    assert found.recipe.rule == rule
    assert found.recipe.purify == ("dare",)
    assert found.recipe.options["dare"] == {"p": 0.25, "rescale": True}
    assert found.recipe.options.get("ties", {}).get("reduce", "sum") == "sum"
    assert any("random numbers" in note for note in found.notes)
    assert any("L1 norm of the whole, minipact divides it by the density" in x for x in found.notes)
    merged(tmp_path, config(method, "density: 0.75"))
    plain = read_mergekit(written(tmp_path, config(method, "density: 0.75, rescale: false")))
    assert not any("L1 norm" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (config("slerp"), "merge_method 'slerp' is not read here"),
        (config("task_arithmetic", "filter: 1"), "parameters: 'filter' is not read"),
        (
            config("task_arithmetic").replace("{weight: 0.7}", "{weight: 0.7, normalize: true}"),
            "one: 'normalize' is not read here",
        ),
        (config("ties"), r"weight \(normalize: true\) \[0.7, 0.4\] must be the same"),
        (config("task_arithmetic", "rescale: true"), "rescale: true with task_arithmetic"),
        (
            config("task_arithmetic").replace("0.7", "[0.1, 0.7]"),
            r"weight \[0.1, 0.7\] is not read",
        ),
        (config("task_arithmetic").replace("{weight: 0.7}", "{}"), "weight None is not read"),
        (
            config("task_arithmetic").replace("here/one", "one+lora"),
            "'one\\+lora' must be one name",
        ),
        (config("task_arithmetic").replace("here/one", "here/two"), "each by a name of its own"),
        (config("task_arithmetic") + "tokenizer_source: union", "must be 'base'"),
        (config("task_arithmetic") + "slices: []", "the file: 'slices' is not read here"),
        ("[1, 2]", "the file must be a mapping"),
        ("merge_method: [ties]", r"merge_method \['ties'\] is not read here"),
        (config("task_arithmetic").replace("0.7", "9" * 400), "too large"),
        (config("task_arithmetic", "normalize: maybe"), "normalize 'maybe' must be true or false"),
        ("a: b: c", "mapping values are not allowed"),
        ("merge_method: ties", "base_model must be a name or path"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(mp.CheckpointError, match=message):
        read_mergekit(written(tmp_path, text))


def test_the_command_line_reads_it(tmp_path: Path):
    files = {}
    for name, state in {"base": BASE, "one": ONE, "two": TWO}.items():
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_file({k: x.float() for k, x in state.items()}, files[name])
    text = written(tmp_path, config("task_arithmetic"))
    for number, tasks in enumerate(
        [["two", "one"], [f"a={files['one']}", f"b={files['two']}"]]
    ):  # by name, then in the file's order
        out = tmp_path / f"out{number}.safetensors"
        given = [files.get(task, task) for task in tasks]
        assert main(["merge", files["base"], *given, "-o", str(out), "--recipe", str(text)]) == 0
        for name, x in load_file(out).items():
            assert torch.allclose(
                x, reference(name, [0.7, 0.4], 1.0, False, False).float(), atol=1e-5
            )
    given = [files["base"], files["one"], "-o", str(tmp_path / "no"), "--recipe", str(text)]
    assert main(["merge", *given]) == 2
