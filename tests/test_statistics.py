"""Statistics of data as inputs of a merge: checked by names and shapes, matched by task, streamed."""

import math

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import data_of, flat, same, small_model
from minipact.__main__ import main

BASE = small_model(0)
TASKS = [small_model(100 * t, BASE) for t in (1, 2, 3)]
NAMED = dict(zip("abc", TASKS, strict=True))
FC, PROJ, BIAS = "visual.mlp.c_fc.weight", "visual.proj", "visual.mlp.c_fc.bias"
COVARIANCES = data_of("regmean", BASE, 3)["statistics"]["covariance"]
FISHERS = data_of("fisher_merge", BASE, 3)["statistics"]["fisher"]


def differences(name: str) -> Tensor:
    return torch.stack([task[name] - BASE[name] for task in TASKS])


def stacked(states: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([state[name] for state in states])


def test_a_rule_gets_the_statistics_of_each_tensor():
    merged = mp.Merged(BASE, TASKS, rule="regmean", statistics={"covariance": COVARIANCES})
    assert (merged.scale, merged.recipe.vectors) == (1.0, "mean")
    expected = mp.regmean(differences(FC), stacked(COVARIANCES, FC))
    assert torch.equal(merged.delta(FC), expected)
    transposed = mp.regmean(differences(PROJ).mT, stacked(COVARIANCES, PROJ)).mT
    assert torch.equal(merged.delta(PROJ), transposed)
    assert torch.equal(merged.delta(BIAS), differences(BIAS).mean(0))
    weighted = mp.Merged(BASE, TASKS, rule="fisher_merge", statistics={"fisher": FISHERS})
    for name in (FC, PROJ, BIAS):
        expected = mp.fisher_merge(differences(name), stacked(FISHERS, name))
        assert torch.equal(weighted.delta(name), expected)


def test_tensors_without_a_statistic_get_the_mean_and_a_note():
    few = [{FC: state[FC]} for state in COVARIANCES]
    few[1] = few[1] | {PROJ: COVARIANCES[1][PROJ]}  # of one task alone
    merged = mp.Merged(BASE, TASKS, rule="regmean", statistics={"covariance": few})
    assert merged.steps[PROJ].treatment == "mean"
    assert torch.equal(merged.delta(PROJ), differences(PROJ).mean(0))
    note = "no covariance of 2 tensors, such as 'visual.mlp.c_proj.weight': regmean leaves them out"
    assert note in merged.notes


def test_statistics_go_by_the_names_of_the_tasks():
    named = dict(zip("abc", COVARIANCES, strict=True))
    first = mp.merge(BASE, NAMED, rule="regmean", statistics={"covariance": named})
    for order in ("cab", "bca"):
        tasks = {name: NAMED[name] for name in order}
        assert same(first, mp.merge(BASE, tasks, rule="regmean", statistics={"covariance": named}))
        listed = [named[name] for name in order]
        assert same(first, mp.merge(BASE, tasks, rule="regmean", statistics={"covariance": listed}))


@pytest.mark.parametrize("rule", ["regmean", "fisher_merge"])
@pytest.mark.parametrize("purify", [[], ["pact"], ["awd", "tatr"]])
def test_threads_and_scales_change_nothing(rule: str, purify: list[str]):
    recipe = {"rule": rule, "purify": purify, "scale": 0.7} | data_of(rule, BASE, 3)
    one = mp.merge(BASE, TASKS, **recipe)
    assert same(one, mp.merge(BASE, TASKS, **recipe, threads=3))
    assert same(one, mp.Merged(BASE, TASKS, **recipe | {"scale": 1.0}).at(0.7))


def test_tatr_takes_gradients_where_there_are_some():
    gradients = [{name: x.abs() for name, x in state.items()} for state in FISHERS]
    recipe = {"purify": "tatr", "scale": 1.0, "options": {"tatr": {"q": 0.6}}}
    merged = mp.Merged(BASE, TASKS, statistics={"gradient": gradients}, **recipe)
    D = torch.stack([flat(task) - flat(BASE) for task in TASKS])
    g = torch.stack([flat(state) for state in gradients])
    found = {name: merged.delta(name) for name in gradients[0]}
    assert torch.equal(flat(found), mp.tatr(D, 0.6, gradient=g).sum(0))
    assert not same(merged, mp.Merged(BASE, TASKS, **recipe))
    for part in (None, 2):
        assert same(
            merged,
            mp.merge(BASE, TASKS, statistics={"gradient": gradients}, threads=part, **recipe),
        )


def test_a_method_of_a_stranger_may_need_data():
    def largest(D: Tensor, fisher: Tensor, power: float = 1.0) -> Tensor:
        return D.gather(0, fisher.pow(power).argmax(0, keepdim=True))[0]

    method = mp.Method("largest", "rule", largest, acts_on="tensor", needs=("fisher",))
    merged = mp.Merged(BASE, TASKS, rule=method, statistics={"fisher": FISHERS}, scale=1.0)
    assert merged.recipe.options == {"largest": {"power": 1.0}}
    assert torch.equal(merged.delta(BIAS), largest(differences(BIAS), stacked(FISHERS, BIAS)))
    with pytest.raises(mp.MergeError, match="largest needs the fisher of each task: make it by"):
        mp.Merged(BASE, TASKS, rule=method)


def test_covariances_are_of_matrices():
    method = mp.Method(
        "any", "rule", lambda D, covariance: D[0], acts_on="tensor", needs=("covariance",)
    )
    states = [state | {BIAS: torch.eye(24)} for state in COVARIANCES]
    with pytest.raises(mp.MergeError, match=f"covariance of '{BIAS}', which is no matrix"):
        mp.Merged(BASE, TASKS, rule=method, statistics={"covariance": states})


def test_the_command_line_says_what_is_missing(tmp_path, capsys: pytest.CaptureFixture[str]):
    from safetensors.torch import save_file

    for name, state in {"base": BASE, **NAMED}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]
    assert main(["merge", *models, "-o", str(tmp_path / "out"), "--rule", "regmean"]) == 2
    error = capsys.readouterr().err
    assert "regmean needs the covariance of each task: make it by minipact statistics cov" in error
    assert "TASK --data DATA -o FILE, and give --statistics FILE for each; from Python st" in error
    assert "{task: minipact.input_covariances(fine_tuned_model, batches)}}" in error


BAD = [{**state, FC: state[FC][:3]} for state in COVARIANCES]
NOT_FINITE = [{**state, FC: state[FC] * math.nan} for state in COVARIANCES]


@pytest.mark.parametrize(
    ("rule", "statistics", "message"),
    [
        ("regmean", None, "regmean needs the covariance of each task: make it by minipact stat"),
        ("regmean", {"fisher": FISHERS}, "statistics 'fisher' are used by no method|needs the cov"),
        ("ties", {"fisher": FISHERS}, "statistics 'fisher' are used by no method of this merge"),
        ("regmean", {"gram": COVARIANCES}, "statistics 'gram' is unknown: use 'covariance'"),
        ("regmean", {"covariance": COVARIANCES[:2]}, "covariance must be there once for each of"),
        ("regmean", {"covariance": dict(zip("abx", COVARIANCES, strict=True))}, "for each of 'a'"),
        (
            "regmean",
            {"covariance": BAD},
            r"covariance of '.*c_fc.weight', task 'a': is \(3, 16\), not \(16, 16\)",
        ),
        (
            "regmean",
            {"covariance": NOT_FINITE},
            "covariance of '.*c_fc.weight', task 'a', holds NaN",
        ),
        ("regmean", {"covariance": dict.fromkeys("abc", "0" * 64)}, "'a', 'b', 'c' is no mapping"),
        (
            "regmean",
            {"covariance": [{"x": torch.eye(2)}] * 3},
            "statistics are of 'x', of no tensor",
        ),
        ("regmean", {"covariance": [{}] * 3}, "statistics are of nothing, of no tensor"),
        (
            "fisher_merge",
            {"fisher": [{BIAS: -FISHERS[0][BIAS]}] * 3},
            "fisher holds NaN, infinity or negative",
        ),
    ],
)
def test_statistics_are_checked(rule: str, statistics, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.merge(BASE, NAMED, rule=rule, statistics=statistics, scale=1.0)
