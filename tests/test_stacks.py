"""Packed experts: a stack [E, m, n] is merged like its matrices, by every method."""

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import data_of, same, single
from minipact import plain
from minipact.methods import is_built_in

OURS = {name: method for name, method in mp.METHODS.items() if is_built_in(method)}
RULES = [name for name, method in OURS.items() if method.kind == "rule"]
PURIFIERS = [name for name, method in OURS.items() if method.kind == "purifier"]
HOME = "layers.0.mlp.experts."
# As most models have them, for x @ W^T, and as some do, for x @ W.
SHAPES = {
    "stack": {"gate_up_proj": (3, 8, 6), "down_proj": (3, 6, 4)},
    "stack_T": {"gate_up_proj": (3, 6, 8), "down_proj": (3, 4, 6)},
}


def packed(kind: str, seed: int, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A mixture of three experts with a router and a bias; a fine-tuned one with a base."""
    shapes = {f"{HOME}{part}": shape for part, shape in SHAPES[kind].items()}
    shapes |= {"layers.0.mlp.gate.weight": (3, 6), f"{HOME}gate_up_proj_bias": (3, 8)}
    state = {name: single(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return state if base is None else {name: base[name] + 0.1 * x for name, x in state.items()}


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a name for each expert, as other models have them."""
    found = {}
    for name, x in state.items():
        if x.ndim == 3:
            part = name.removeprefix(HOME)
            found |= {f"{HOME}{e}.{part}.weight": y.clone() for e, y in enumerate(x)}
        else:
            found[name] = x
    return found


def models(kind: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = packed(kind, 0)
    return base, {name: packed(kind, 50 * (t + 1), base) for t, name in enumerate("abc")}


def both(kind: str, method: str, **recipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The merge of the packed models with experts apart, and that of models with experts apart."""
    base, tasks = models(kind)
    given = data_of(method, base, len(tasks))
    split = {
        "statistics": {kind: [apart(x) for x in states] for kind, states in given["statistics"].items()}
    } if given else {}  # fmt: skip
    if kind == "stack_T":
        split["policy"] = {f"{HOME}*.weight": "matrix_T"}
    whole = mp.merge(base, tasks, **recipe, **given)
    assert {name: x.shape for name, x in whole.items()} == {n: x.shape for n, x in base.items()}
    single_ones = {name: apart(task) for name, task in tasks.items()}
    return apart(whole), mp.merge(apart(base), single_ones, **recipe, **split)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_sees_the_experts_of_a_stack(kind: str, rule: str):
    found, expected = both(kind, rule, rule=rule, scale=0.7)
    assert set(found) == set(expected)
    assert all(torch.allclose(found[n], x, atol=1e-5) for n, x in expected.items())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("purifier", [name for name in PURIFIERS if name != "dare"])
def test_every_purifier_sees_the_experts_of_a_stack(kind: str, purifier: str):
    more = {"pave": {"rho": 0.6, "collapse": True}, "awd": {"lr": 1e-3}}
    options = {purifier: more.get(purifier, {})}
    found, expected = both(kind, purifier, purify=purifier, options=options, scale=0.7)
    assert all(torch.allclose(found[n], x, atol=1e-5) for n, x in expected.items())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("rule", "purify"), [
    ("tsv_m", ["pact"]), ("regmean", ["wiener"]), ("wudi", ["pave"]), ("knots", []), ("ties", ["sift"]),
])  # fmt: skip
def test_plain_equations_merge_stacks_too(kind: str, rule: str, purify: list[str]):
    base, tasks = models(kind)
    data = next((x for x in (data_of(name, base, 3) for name in (*purify, rule)) if x), {})
    recipe = {"rule": rule, "purify": purify, "scale": 0.7} | data
    merged = mp.merge(base, tasks, **recipe)
    expected = plain.merge(base, list(tasks.values()), **recipe)
    assert set(merged) == set(expected)
    assert all(torch.allclose(merged[n], x, atol=1e-4) for n, x in expected.items())


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_tell_how_experts_are_stored(kind: str):
    base, tasks = models(kind)
    merged = mp.Merged(base, tasks, rule="tsv_m", purify="pact")
    step = merged.steps[f"{HOME}down_proj"]
    assert (step.kind, step.treatment, step.spectral) == (kind, "pact > tsv_m", True)
    assert merged.steps[f"{HOME}gate_up_proj_bias"].treatment == "mean, unscaled"
    said = mp.Merged(
        base, tasks, rule="tsv_m", policy={"*down_proj": "stack", "*gate_up_proj": "vector"}
    )
    assert said.steps[f"{HOME}down_proj"].kind == "stack"
    assert said.steps[f"{HOME}gate_up_proj"].treatment == "mean, unscaled"


@pytest.mark.parametrize("purify", ["dare", "pact"])
def test_threads_do_not_change_stacks(purify: str):
    base, tasks = models("stack")
    recipe = {"rule": "tsv_m", "purify": purify, "options": {"tsv_m": {"svd": "randomized"}}}
    one = mp.merge(base, tasks, **recipe)
    assert same(one, mp.merge(base, tasks, threads=2, **recipe))


def test_an_expert_that_no_task_changed_stays():
    base, tasks = models("stack")
    name = f"{HOME}down_proj"
    base[name][1] = 0  # without a core, too
    for task in tasks.values():
        task[name][1] = 0
    merged = mp.merge(base, tasks, rule="tsv_m", purify=["pact", "pave"][:1])
    assert torch.equal(merged[name][1], base[name][1])
    assert not torch.equal(merged[name][0], base[name][0])


def test_stacks_have_three_dimensions_and_counts_fit_their_matrices():
    base, tasks = models("stack")
    with pytest.raises(
        mp.MergeError, match=r"'layers.0.mlp.gate.weight' of shape .* cannot be a stack"
    ):
        mp.Merged(base, tasks, policy={"*.gate.weight": "stack"})
    with pytest.raises(mp.MergeError, match=r"down_proj' of shape .* cannot be a matrix_T"):
        mp.Merged(base, tasks, policy={"*down_proj": "matrix_T"})
    with pytest.raises(mp.MergeError, match=r"pact.core=7 is above the largest rank, 6"):
        mp.Merged(base, tasks, purify="pact", options={"pact": {"core": 7}})
    states = [{f"{HOME}down_proj": torch.eye(4)}] * 3
    with pytest.raises(mp.MergeError, match=r"is \(4, 4\), not \(3, 4, 4\)"):
        mp.Merged(base, tasks, rule="regmean", statistics={"covariance": states})
