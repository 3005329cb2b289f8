"""Small tensors are merged in groups: as each for itself, whatever is asked for first, in the same bytes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import close, data_of, normal, problem, same, single, tuned
from minipact import groups, job, merging, methods

BATCHED = [name for name, method in mp.METHODS.items() if method.batched]
RANDOMIZED = [name for name in BATCHED if "svd" in mp.METHODS[name].options]
RULES = [name for name, method in mp.METHODS.items() if method.kind == "rule"]


def model(seed: int = 0, layers: int = 5) -> dict[str, Tensor]:
    """Layers of one shape, one of a lower rank, two that are used the other way round, and vectors."""
    state = {f"{i}.weight": single(12, 8, seed=seed + i) for i in range(layers)}
    state |= {f"{i}.bias": single(12, seed=seed + 100 + i) for i in range(layers)}
    state |= {f"{part}.visual.proj": single(6, 9, seed=seed + 200) for part in "ab"}
    state["norm"] = single(8, seed=seed + 300)
    return state


def models(tasks: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = model()
    found = [tuned(base, seed + 1) for seed in range(tasks)]
    for state in found:  # ranks differ within a group, so that some are padded
        change = state["1.weight"] - base["1.weight"]
        state["1.weight"] = base["1.weight"] + change[:, :1] * change[:1]
    found[0]["2.weight"] = base["2.weight"].clone()  # one task of several is zero
    return base, found


# ---- What belongs together -----------------------------------------------------------------------


def test_groups_hold_what_is_alike_in_the_order_of_the_model():
    merged = mp.Merged(*models(), rule="tsv_m")
    assert merged.together("3.weight") == tuple(f"{i}.weight" for i in range(5))
    assert merged.together("b.visual.proj") == ("a.visual.proj", "b.visual.proj")
    assert merged.together("norm") == (
        *(f"{i}.bias" for i in range(5)),
        "norm",
    )  # entries alone count


def test_a_group_ends_where_its_room_does(monkeypatch):
    monkeypatch.setattr(groups, "GROUP", 2 * 4 * 12 * 8)  # two layers of base and three tasks
    monkeypatch.setattr(groups, "SMALL", 0)
    merged = mp.Merged(*models(), rule="tsv_m")
    found = [merged.together(f"{i}.weight") for i in range(5)]
    assert found[0] == found[1] == ("0.weight", "1.weight")
    assert found[2] == found[3] == ("2.weight", "3.weight")
    assert found[4] == ("4.weight",)


def test_a_group_of_small_tensors_has_more_room(monkeypatch):
    size = 4 * 12 * 8  # entries of a layer in the base and three tasks
    monkeypatch.setattr(groups, "GROUP", size)
    monkeypatch.setattr(groups, "SMALL", size + 1)
    merged = mp.Merged(*models(), rule="tsv_m")
    assert merged.together("0.weight") == tuple(f"{i}.weight" for i in range(4))
    monkeypatch.setattr(groups, "SMALL", size)
    merged = mp.Merged(*models(), rule="tsv_m")
    assert merged.together("0.weight") == ("0.weight",)


def test_what_is_treated_otherwise_is_in_no_group_with_others():
    base, tasks = models()
    base["0.weight"] = base["0.weight"].double()
    options = {"pact": {"scope": "1.*"}}
    merged = mp.Merged(base, tasks, purify="pact", options=options, exclude="4.weight")
    assert merged.together("0.weight") == ("0.weight",)  # of another type
    assert merged.together("1.weight") == ("1.weight",)  # purified
    assert "4.weight" not in merged.together("3.weight")


# ---- The same as each for itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "svd"),
    [*((name, "exact") for name in BATCHED), *((name, "randomized") for name in RANDOMIZED)],
)
def test_a_batch_is_what_each_weight_gives(name: str, svd: str):
    method = mp.METHODS[name]
    pairs = [problem(12, 9, tasks=3, seed=seed) for seed in (0, 10, 20)]
    pairs[1][1][1] = 0  # a task of zeros
    pairs[2][1][0] = pairs[2][1][0][:, :1] * normal(1, 9)  # one of rank 1
    W0, D = (torch.stack(x) for x in zip(*pairs, strict=True))
    options = {"svd": svd} if svd != "exact" else {}

    def result(*inputs: Tensor, generators) -> Tensor:
        given = inputs if "base" in method.needs else inputs[1:]
        random = {"generator": generators} if "generator" in method.needs else {}
        return method.function(*given, **random, **options)

    seeds = [methods.named_generator(0, str(i)) for i in range(3)]
    together = result(W0, D, generators=seeds)
    for i in range(3):
        alone = result(W0[i], D[i], generators=methods.named_generator(0, str(i)))
        assert close(together[i], alone)


@pytest.mark.parametrize("purify", [(), ("pact",), ("wiener",), ("dare", "pact"), ("tatr", "sift")])
@pytest.mark.parametrize("rule", RULES)
def test_groups_change_rounding_alone(rule: str, purify: tuple[str, ...], monkeypatch):
    base, tasks = models()
    recipe = {"rule": rule, "purify": purify, **data_of(rule, base, len(tasks))}
    together = mp.merge(base, tasks, **recipe)
    monkeypatch.setattr(groups, "GROUP", 0)
    alone = mp.merge(base, tasks, **recipe)
    assert all(close(together[name], alone[name]) for name in base)


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv_m", "knots"])
def test_bytes_do_not_depend_on_what_is_asked_for_first(rule: str, monkeypatch):
    base, tasks = models()
    recipe = {"rule": rule, "purify": "pact"}
    whole = mp.merge(base, tasks, **recipe)
    backwards = mp.Merged(base, tasks, **recipe)
    assert same({name: backwards[name] for name in reversed(list(base))}, whole)
    assert torch.equal(backwards["3.weight"], whole["3.weight"])  # a second time
    assert torch.equal(mp.Merged(base, tasks, **recipe)["1.weight"], whole["1.weight"])
    assert same(mp.merge(base, tasks, **recipe, threads=3), whole)
    assert same(backwards.at(backwards.scale), whole)
    monkeypatch.setattr(
        groups, "WAITING", 0
    )  # results that are not asked for at once are made again
    assert same(mp.merge(base, tasks, **recipe), whole)


# ---- Zeros, and what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_that_no_task_changes_stays_to_the_bit(rule: str):
    base, tasks = models()
    base["3.weight"] = base["3.weight"].clone()
    base["3.weight"][0, 0] = -0.0
    for state in tasks:
        state["3.weight"], state["1.bias"] = base["3.weight"].clone(), base["1.bias"].clone()
    merged = mp.merge(base, tasks, rule=rule, purify="pact", **data_of(rule, base, len(tasks)))
    for name in ("3.weight", "1.bias"):
        assert torch.equal(merged[name].view(torch.int32), base[name].view(torch.int32))


def test_a_base_of_zeros_needs_no_core_where_nothing_changes():
    base, tasks = models()
    for state in (base, *tasks):
        state["3.weight"] = torch.zeros(12, 8)
    assert not mp.merge(base, tasks, purify="pact")["3.weight"].any()


@pytest.mark.parametrize("name", ["3.weight", "norm"])
def test_nan_names_its_tensor_and_model(name: str):
    base, tasks = models()
    tasks[1][name].view(-1)[3] = torch.nan
    with pytest.raises(mp.MergeError, match=f"'{name}' of task '1' holds NaN or infinity"):
        mp.merge(base, tasks, rule="tsv_m")


def test_an_error_of_a_method_names_its_tensor():
    base, tasks = models()
    base["3.weight"] = torch.zeros(12, 8)
    with pytest.raises(
        mp.MergeError, match=r"tensor '3\.weight', pact: the pre-trained weight is zero"
    ):
        mp.merge(base, tasks, purify="pact")


# ---- Memory --------------------------------------------------------------------------------------


def counting(calls: list[tuple[int, ...]]):
    """A purifier of matrices that halves them, and counts."""

    def halving(W0: Tensor, D: Tensor) -> Tensor:
        calls.append(tuple(D.shape))
        return D / 2

    return halving


@pytest.mark.parametrize(("room", "times"), [(merging.KEPT, 1), (0, 3)])
def test_a_purifier_runs_once_where_its_results_fit(room: int, times: int, monkeypatch):
    base, tasks = models()
    matrices = [name for name, x in base.items() if x.ndim == 2]
    halved = [{**task, **{n: (task[n] + base[n]) / 2 for n in matrices}} for task in tasks]
    expected = mp.merge(base, halved, rule="ties", vectors="mean")
    monkeypatch.setattr(merging, "KEPT", room)
    calls: list[tuple[int, ...]] = []
    merged = mp.Merged(base, tasks, rule="ties", purify=counting(calls), vectors="mean")
    calls.clear()  # those of the first try of options
    found = dict(merged)
    assert len(calls) == times * len(matrices)
    assert all(close(found[name], expected[name]) for name in base)
    assert any("halving runs once for each pass of ties" in note for note in merged.notes) == (
        times > 1
    )


def test_a_group_that_is_too_large_for_the_device_comes_in_halves(monkeypatch):
    base, tasks = models()
    whole = mp.merge(base, tasks, rule="tsv_m", purify="pact")
    sizes = []

    def scarce(names, *arguments):
        sizes.append(len(names))
        if len(names) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return groups.group_matrices(names, *arguments)

    monkeypatch.setattr(merging, "group_matrices", scarce)
    found = mp.merge(base, tasks, rule="tsv_m", purify="pact")
    assert max(sizes) > 2
    assert all(close(found[name], whole[name]) for name in base)


def test_what_is_too_large_for_the_device_goes_to_the_cpu_and_is_said_once(monkeypatch):
    base, tasks = models()
    whole = mp.merge(base, tasks, rule="tsv_m")
    merged = mp.Merged(base, tasks, rule="tsv_m")
    blocks = merging.task_blocks

    def full(name, base, tasks, weights, device, **how):
        if device == "full":
            raise torch.OutOfMemoryError("out of memory")
        return blocks(name, base, tasks, weights, device, **how)

    monkeypatch.setattr(merging, "task_blocks", full)
    monkeypatch.setattr(merging, "group_matrices", lambda *given: full("", *given[1:], whole=True))
    monkeypatch.setattr(torch, "device", lambda name: SimpleNamespace(type=name))
    merged.device = "full"
    merged._calls = replace(merged._calls, device="full")
    merged.prepare()
    found = {step.name: merged._results((step,), merged._passes[merged.recipe.vectors].answers)[0]
             for step in merged.steps.values()}  # fmt: skip
    assert all(close(base[name] + found[name], whole[name]) for name in base)
    assert sum("has no memory" in note for note in merged.notes) == 1


def test_large_matrices_are_factorised_one_by_one(monkeypatch):
    W0, D = (x.float() for x in problem(12, 9, tasks=4))
    together = [mp.pact(W0, D), mp.tsv_m(D), mp.iso_cts(D), mp.wiener(D)]
    seen = []
    widened = methods.widened
    monkeypatch.setattr(methods, "widened", lambda x: seen.append(x.shape) or widened(x))
    monkeypatch.setattr(methods, "PIECE", 12 * 9)
    alone = [mp.pact(W0, D), mp.tsv_m(D), mp.iso_cts(D), mp.wiener(D)]
    assert all(close(x, y) for x, y in zip(together, alone, strict=True))
    assert seen.count((1, 12, 9)) == 3 * 4  # PACT's updates and filter, and TSV-M, task by task


# ---- Processes -----------------------------------------------------------------------------------


def test_processes_share_whole_groups(monkeypatch):
    merged = mp.Merged(*models(), rule="tsv_m")
    monkeypatch.setattr(job.distributed, "size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(job.distributed, "rank", lambda rank=rank: rank)
        shares.append(job._share_of(merged, merged))
    assert shares[0] | shares[1] == set(merged)
    assert not shares[0] & shares[1]
    assert all({*merged.together(name)} <= share for share in shares for name in share)


def test_zero_parts_are_found_by_their_sizes():
    x = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.0, 2.0])
    assert groups.zero_parts(x, [2, 1, 2, 1]) == [True, False, True, False]
