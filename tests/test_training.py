"""Training for merging: aTLAS, TaLoS and ATM against known optima, plain autograd and gradient steps."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import minipact as mp
from helpers import State, close, fails, normal, rng, same, tuned, write_models
from minipact.__main__ import main
from minipact.training import Coefficients


class Slope(nn.Module):
    """Two classes with logits 0 and w x: logistic regression with one weight."""

    def __init__(self, w: float = 0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), self.w * x], -1)


class Small(nn.Module):
    """Every kind of layer that TaLoS scores, what it does not score, and buffers; x [N, 2, 4, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 2, stride=2)
        self.place = nn.Parameter(torch.randn(4, 4))
        self.normed = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.seen = nn.BatchNorm1d(4)
        self.dropped = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT + self.place
        x = self.normed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropped(self.seen(x.mean(1))))


X, Y = normal(12, 2, 4, 4, seed=3), torch.arange(12) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]


def small() -> tuple[Small, State, dict[str, State]]:
    """A model, its state as the base, and two tasks."""
    model = Small().double()
    base = {name: x.clone() for name, x in model.state_dict().items()}
    return model, base, {"a": tuned(base, 1, 0.1), "b": tuned(base, 2, 0.1)}


def loss_of(model: nn.Module, state: State) -> float:
    logits = torch.func.functional_call(copy.deepcopy(model).eval(), dict(state), (X,))
    return float(nn.functional.cross_entropy(logits, Y))


# ---- aTLAS ---------------------------------------------------------------------------------------


def slopes(*w: float) -> list[State]:
    return [Slope(x).state_dict() for x in w]


# sigmoid(theta) = 3/4 is best where three of four answers are 1
THREE_OF_FOUR = [(torch.ones(4).double(), torch.tensor([1, 1, 0, 1]))]


def test_no_epochs_give_the_base_to_the_bit():
    model, base, tasks = small()
    found = mp.atlas(model, base, tasks, BATCHES, epochs=0)
    assert found.losses == ()
    assert found.values.shape == (2, len(found.names))
    assert not found.values.any()
    assert same(dict(found.apply(base, tasks)), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_constant_coefficients_are_task_arithmetic(dtype: torch.dtype):
    _, base, tasks = small()
    base, *tuned_ones = (
        {n: x.to(dtype) if x.is_floating_point() else x for n, x in s.items()}
        for s in (base, *tasks.values())
    )
    names = mp.atlas(Small().to(dtype), base, tuned_ones, BATCHES, epochs=0).names
    assert not any("running" in name for name in names)
    constant = Coefficients(("0", "1"), names, torch.full((2, len(names)), 0.3).double())
    merged = constant.apply(base, tuned_ones)
    expected = mp.merge(base, tuned_ones, scale=0.3, vectors="rule")
    assert list(merged) == list(base)
    assert len(merged) == len(base)
    for name, x in expected.items():
        assert merged.meta(name).shape == merged[name].shape
        assert merged[name].dtype == x.dtype
        assert torch.allclose(merged[name], x, rtol=1e-3 if dtype == torch.float16 else 1e-6)


def test_the_known_optimum_is_found():
    (base, a, b) = slopes(0.5, 1.5, 0.5)
    options = {"epochs": 300, "weight_decay": 0.0}
    found = mp.atlas(Slope(), base, {"a": a, "b": b}, THREE_OF_FOUR, **options)
    assert found.tasks == ("a", "b")
    assert found.names == ("w",)
    assert found.values[0, 0] == pytest.approx(math.log(3) - 0.5, abs=1e-4)
    assert found.values[1, 0] == 0  # a task like the base has nothing to give
    assert found.apply(base, {"a": a, "b": b})["w"] == pytest.approx(math.log(3), abs=1e-4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.losses[-1] == pytest.approx(entropy, abs=1e-6)
    assert found.losses[0] > found.losses[-1]


def test_weight_decay_pulls_to_the_base():
    (base, a) = slopes(0.0, 1.0)
    learn = partial(mp.atlas, Slope(), base, [a], THREE_OF_FOUR, epochs=300)
    assert 0.1 < learn(weight_decay=1.0).values < learn(weight_decay=0.0).values


def test_a_first_step_of_adam_has_the_length_of_the_rate():
    (base, a) = slopes(0.0, 1.0)
    found = mp.atlas(Slope(), base, [a], THREE_OF_FOUR, epochs=1, lr=0.02)
    assert found.values.item() == pytest.approx(0.02, abs=1e-6)
    assert found.losses == pytest.approx([math.log(2)])


def test_losses_fall_and_the_model_is_what_apply_gives():
    model, base, tasks = small()
    found = mp.atlas(model, base, tasks, BATCHES, epochs=10, lr=0.3)
    assert found.losses[0] > found.losses[-1]
    assert loss_of(model, found.apply(base, tasks)) < loss_of(model, base) - 0.01


def test_entropy_takes_no_labels_and_falls():
    model, base, tasks = small()
    found = mp.atlas(model, base, tasks, [X], objective="entropy", epochs=10, lr=0.3)
    logits = torch.func.functional_call(copy.deepcopy(model).eval(), base, (X,))
    first = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert found.losses[0] == pytest.approx(float(first))
    assert found.losses[-1] < found.losses[0] - 0.01
    labelled = mp.atlas(model, base, tasks, [(X, Y)], objective="entropy", epochs=10, lr=0.3)
    assert torch.equal(found.values, labelled.values)


def test_targets_with_heads_add_up():
    """Two targets of opposite signs: one head sees w x, the other -w x, and 3 of 4 against 1 of 2 win."""
    (base, a) = slopes(0.0, 1.0)
    ones = torch.ones(2).double()
    batches = {"up": THREE_OF_FOUR, "down": [(ones, torch.tensor([1, 0]))]}
    heads = {"up": nn.Identity(), "down": lambda logits: -logits}
    found = mp.atlas(Slope(), base, {"a": a}, batches, heads=heads, epochs=300, weight_decay=0.0)
    # d/dw of both losses: (p - 3/4) + (p - 1/2) = 0
    assert found.values.item() == pytest.approx(math.log(0.625 / 0.375), abs=1e-4)
    first = mp.atlas(Slope(), base, {"a": a}, batches, heads=heads, epochs=1)
    assert first.losses == pytest.approx([2 * math.log(2)])


def test_a_shorter_target_rests_when_it_has_run_out():
    (base, a) = slopes(0.0, 1.0)
    batches = {"long": THREE_OF_FOUR * 3, "short": THREE_OF_FOUR}
    found = mp.atlas(Slope(), base, [a], batches, epochs=1, lr=1e-9)
    assert found.losses == pytest.approx([4 * math.log(2) / 3])


def test_heads_that_are_modules_get_no_gradients_and_what_the_base_lacks_is_the_models():
    model, base, tasks = small()
    head = nn.Linear(3, 3).double()
    part = {n: x for n, x in base.items() if not n.startswith("head")}
    parts = {t: {n: s[n] for n in part} for t, s in tasks.items()}
    heads = {"one": head}
    found = mp.atlas(model, part, parts, {"one": BATCHES}, heads=heads, epochs=2)
    assert not any(name.startswith("head") for name in found.names)
    assert all(p.grad is None for p in [*head.parameters(), *model.parameters()])


def test_one_seed_one_result_whatever_the_order_of_tasks():
    model, base, tasks = small()
    learn = partial(mp.atlas, model, base, batches=BATCHES, epochs=3)
    first = learn(tasks, generator=rng(1))
    again = learn(dict(reversed(tasks.items())), generator=rng(1))
    assert first.tasks == again.tasks
    assert torch.equal(first.values, again.values)
    assert first.losses == again.losses
    others = [learn(tasks, generator=rng(seed)).values for seed in (2, 3, 4)]
    assert not all(torch.equal(first.values, other) for other in others)


def test_nothing_that_is_given_changes():
    model, base, tasks = small()
    model.dropped.eval()
    before = copy.deepcopy((base, tasks, model.state_dict()))
    model.zero_grad()
    with torch.no_grad():
        mp.atlas(model, base, tasks, BATCHES, epochs=2)
    mp.talos_mask(model, BATCHES, rounds=1)
    assert same(base, before[0])
    assert all(same(tasks[t], before[1][t]) for t in tasks)
    assert same(model.state_dict(), before[2])
    assert model.training
    assert not model.dropped.training
    assert all(p.grad is None for p in model.parameters())


def test_half_types_learn_in_float32():
    (base, a) = ({"w": x["w"].half()} for x in slopes(0.0, 1.0))
    batches = [(x.half(), y) for x, y in THREE_OF_FOUR]
    model = Slope().half()
    found = mp.atlas(model, base, [a], batches, epochs=100, weight_decay=0.0)
    assert found.values.dtype == torch.float32
    assert found.values.item() == pytest.approx(math.log(3), abs=1e-2)
    assert found.apply(base, [a])["w"].dtype == torch.float16
    assert model.w.dtype == torch.float16


def spoilt(state: State, name: str = "head.weight", x: Tensor | None = None) -> State:
    changed = dict(state)
    changed.pop(name)
    return changed if x is None else changed | {name: x}


_, BASE, TASKS = small()
HOLES = {**TASKS, "b": spoilt(TASKS["b"], x=torch.full((3, 4), torch.nan).double())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a": spoilt(TASKS["a"])}}, "lacks.*'head.weight'"),
        ({"tasks": {"a": spoilt(TASKS["a"], x=torch.ones(2))}}, "head.weight"),
        ({"tasks": HOLES}, "'head.weight' of task 'b' holds NaN"),
        ({"tasks": {}}, "at least one"),
        ({"base": {}}, "the base must be a mapping"),
        ({"model": nn.Linear(4, 3)}, "the model lacks 'place', 'conv.weight'"),
        ({"model": Slope()}, "the model lacks"),
        ({"batches": []}, "^no batches: training needs at least one"),
        ({"batches": {}}, "^no batches: training needs at least one"),
        ({"batches": {"x": BATCHES, "y": []}}, "no batches for 'y'"),
        ({"batches": [(X[:0], Y[:0])]}, "is empty"),
        ({"batches": [X]}, "needs batches of pairs"),
        ({"batches": [(X, Y + 1)]}, r"labels 1..3: use 0..2"),
        ({"batches": [(X, Y[:3])]}, "need 12 class numbers"),
        ({"batches": [(X / 0, Y)]}, "the loss is nan at step 0"),
        ({"heads": {"x": nn.Identity()}}, "heads are for 'x', batches for ''"),
        ({"batches": {"x": BATCHES}, "heads": {"x": torch.sum}}, r"logits are \(\) for 5 inputs"),
        ({"objective": "accuracy"}, "objective 'accuracy' is unknown"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"epochs": -1}, "epochs=-1"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_atlas_refuses(changes: dict, message: str):
    given = {"model": Small().double(), "base": BASE, "tasks": TASKS, "batches": BATCHES}
    with pytest.raises(mp.MergeError, match=message):
        mp.atlas(**given | changes)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (
            Coefficients(("a", "c"), ("head.bias",), torch.zeros(2, 1)),
            "tasks 'a', 'c', not 'a', 'b'",
        ),
        (Coefficients(("a", "b"), ("head.bias",), torch.zeros(2, 2)), r"of shape \(2, 1\)"),
        (Coefficients(("a", "b"), ("w",), torch.zeros(2, 1)), "the base lacks 'w'"),
        (Coefficients(("a", "b"), ("head.bias",), torch.tensor([[1], [torch.inf]])), "finite"),
    ],
)
def test_coefficients_that_do_not_fit(coefficients: Coefficients, message: str):
    with pytest.raises(mp.MergeError, match=message):
        coefficients.apply(BASE, TASKS)


def test_tensors_without_a_factor_are_the_bases():
    some = Coefficients(("a", "b"), ("head.bias",), torch.tensor([[1.0], [0.0]]))
    merged = some.apply(BASE, TASKS)
    assert close(merged["head.bias"], TASKS["a"]["head.bias"])
    assert same({n: merged[n] for n in merged if n != "head.bias"}, spoilt(BASE, "head.bias"))
    assert merged["conv.weight"].data_ptr() != BASE["conv.weight"].data_ptr()


# ---- TaLoS ---------------------------------------------------------------------------------------


def test_a_mask_by_hand():
    """Logits W x with answers beyond doubt: class c's derivative for W[c, i] is x_i, others have none."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[500.0, 0.0], [0.0, 500.0]])
    x = torch.tensor([[1.0, 0.0], [3.0, 0.1], [0.0, 2.0]])  # classes 0, 0, 1
    # scores: [[1 + 9, 0.01], [0, 4]]
    for share, wanted in ((0.75, [0, 0, 1, 0]), (0.5, [0, 1, 1, 0]), (0.25, [0, 1, 1, 1])):
        for rounds in (1, 2, 4):
            found = mp.talos_mask(model, [x[:2], x[2:]], sparsity=share, rounds=rounds)
            assert found["weight"].tolist() == torch.tensor(wanted).bool().view(2, 2).tolist()
    assert mp.talos_mask(model, [x], sparsity=0.0)["weight"].all()


def test_scores_that_tie_still_give_exact_shares():
    model = nn.Linear(5, 2)
    nn.init.zeros_(model.weight)
    found = mp.talos_mask(model, [torch.zeros(3, 5)], sparsity=0.5, rounds=2)
    assert sum(int(m.sum()) for m in found.values()) == 6


def test_shares_are_exact_and_nested_at_every_round():
    """q of 4 rounds to 1 - s are the q rounds to (1 - s)^(q / 4)."""
    model, total = Small().double(), 0
    before = None
    for q in range(1, 5):
        sparsity = 1 - 0.1 ** (q / 4)
        found = mp.talos_mask(model, BATCHES, sparsity=sparsity, rounds=q, generator=rng(1))
        total = sum(m.numel() for m in found.values())
        flat = torch.cat([m.flatten() for m in found.values()])
        assert int(flat.sum()) == round(total * 0.1 ** (q / 4))
        if before is not None:
            assert not (flat & ~before).any()
        before = flat
    final = mp.talos_mask(model, BATCHES, generator=rng(1))
    assert torch.equal(torch.cat([m.flatten() for m in final.values()]), before)
    assert total == sum(p.numel() for p in model.parameters()) - 16 - 8  # place and batch norm


def reference(model: nn.Module, names: list[str], rounds: int, logprob: bool) -> dict[str, Tensor]:
    """TaLoS sample by sample, with plain autograd on a model whose weights are damped."""
    model, draw = copy.deepcopy(model).eval(), rng(7)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = {n: torch.ones_like(start[n]) for n in names}
    for q in range(1, rounds + 1):
        for n, p in model.named_parameters():
            p.data = start[n] * torch.where(mask[n] == 1, 1, 0.1) if n in mask else start[n]
        p = model(X).softmax(-1).detach()
        y = (p.cumsum(-1) < torch.rand(12, 1, generator=draw, dtype=torch.float64)).sum(-1)
        scores = {n: torch.zeros_like(m) for n, m in mask.items()}
        for i in range(12):
            model.zero_grad()
            out = model(X[i : i + 1])
            (out.log_softmax(-1) if logprob else out)[0, y[i]].backward()
            for n in scores:
                scores[n] += model.get_parameter(n).grad.square()
        flat = torch.cat([scores[n].where(mask[n] == 1, torch.inf).flatten() for n in names])
        floor = flat.sort().values[round(len(flat) * 0.1 ** (q / rounds)) - 1]
        mask = {n: ((scores[n] <= floor) & (mask[n] == 1)).double() for n in names}
    return {n: m.bool() for n, m in mask.items()}


@pytest.mark.parametrize("score", ["logit", "logprob"])
def test_masks_are_those_of_a_plain_loop(score: str):
    model = Small().double()
    for chunk, batches in ((5, [X]), (32, BATCHES)):
        options = {"score": score, "rounds": 3, "chunk": chunk}
        found = mp.talos_mask(model, batches, generator=rng(7), **options)
        wanted = reference(model, list(found), 3, score == "logprob")
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_what_is_scored():
    model = Small().double()
    model.head.requires_grad_(False)
    found = mp.talos_mask(model, [X], rounds=1)
    assert {n.split(".")[0] for n in found} == {"conv", "normed", "attention"}
    assert "attention.in_proj_bias" in found
    assert "attention.out_proj.weight" in found


def test_a_head_stands_for_the_last_layer():
    whole = Small().double()
    whole.head.requires_grad_(False)
    body = copy.deepcopy(whole)
    body.head = nn.Identity()
    apart = mp.talos_mask(body, [X], head=whole.head, generator=rng(2))
    assert same(apart, mp.talos_mask(whole, [X], generator=rng(2)))


def test_masks_of_one_seed_are_one():
    model = Small().double()
    first, again, other = (mp.talos_mask(model, [X], generator=rng(s)) for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (Small().double(), [], {}, "no batches"),
        (Small().double(), [X[:0]], {}, "is empty"),
        (Small().double(), [X], {"sparsity": 1.0}, "sparsity=1.0"),
        (Small().double(), [X], {"sparsity": -0.1}, "sparsity=-0.1"),
        (Small().double(), [X], {"sparsity": math.nan}, "sparsity=nan"),
        (Small().double(), [X], {"sparsity": 0.9999}, "leaves none of 139 entries"),
        (Small().double(), [X], {"rounds": 0}, "rounds=0"),
        (Small().double(), [X], {"chunk": 0}, "chunk=0"),
        (Small().double(), [X], {"score": "loss"}, "score 'loss' is unknown"),
        (Small().double(), [X / 0], {}, "are not finite"),
        (nn.BatchNorm1d(3), [torch.ones(2, 3)], {}, "no parameters to score"),
        (nn.Linear(3, 3).requires_grad_(False), [torch.ones(2, 3)], {}, "no parameters to score"),
        (nn.Linear(3, 3), [torch.ones(2, 4, 3)], {}, r"logits are \(2, 4, 3\) for 2 inputs"),
    ],
)
def test_talos_refuses(model: nn.Module, batches: list, options: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.talos_mask(model, batches, **options)


# ---- Masked steps --------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, weight_decay=0.3, amsgrad=True),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.3, nesterov=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 25) -> None:
    torch.manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_entries_keep_their_bits(kind: str):
    model = Small().double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)  # momentum of all entries, which must not move them any more
    mask = mp.talos_mask(model, [X], generator=rng())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with mp.masked(model, optimizer, mask):
        train(model, optimizer)
    for name, p in model.named_parameters():
        free = mask.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~free], start[name][~free]), name
        assert (p[free] != start[name][free]).all(), name
        for x in optimizer.state[p].values():
            if isinstance(x, Tensor) and x.shape == p.shape:
                assert not x[~free].any()
                assert x[free].all()
    train(model, optimizer, 1)
    assert not torch.equal(model.place, start["place"]), "outside the block all entries move again"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_full_mask_changes_nothing(kind: str):
    plain, guarded = Small().double(), Small().double()
    train(plain, OPTIMIZERS[kind](plain.parameters()))
    optimizer = OPTIMIZERS[kind](guarded.parameters())
    everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in guarded.named_parameters()}
    with mp.masked(guarded, optimizer, everything):
        train(guarded, optimizer)
    assert same(guarded.state_dict(), plain.state_dict())


def test_clipping_does_not_count_frozen_gradients():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.weight.detach().clone()
    with mp.masked(model, optimizer, {"weight": torch.tensor([[True, False]])}):
        model(torch.tensor([[3.0, 400.0]])).sum().backward()
        assert model.weight.grad.tolist() == [[3.0, 0.0]]
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 3
        optimizer.step()
    assert torch.allclose(before - model.weight, torch.tensor([[0.5, 0.0]]), atol=1e-5)


@pytest.mark.parametrize("problem", ["unknown", "shape", "numbers", "strange"])
def test_masks_that_do_not_fit(problem: str):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    mask, message = {
        "unknown": ({"w": torch.ones(2, 2).bool()}, "the model lacks 'w' of the mask"),
        "shape": ({"weight": torch.ones(2).bool()}, "'weight' have other shapes"),
        "numbers": ({"weight": torch.ones(2, 2)}, "'weight' must be booleans"),
        "strange": ({}, "2 parameters of the optimizer are not the model's"),
    }[problem]
    owner = other if problem == "strange" else model
    optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
    with pytest.raises(mp.MergeError, match=message), mp.masked(model, optimizer, mask):
        raise AssertionError("must not be reached")


# ---- ATM -----------------------------------------------------------------------------------------


def step_of(x: Tensor, y: Tensor, lr: float, steps: int = 1):
    """A task: full-batch SGD on its squared error."""

    def finetune(theta: State) -> State:
        w = theta["w"].requires_grad_()
        optimizer = torch.optim.SGD([w], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (x @ w - y).square().mean().backward()
            optimizer.step()
        return {**theta, "w": w.detach()}

    return finetune


def test_one_step_a_round_is_a_gradient_step_on_the_mean_loss():
    data = [(normal(6, 3, seed=s), normal(6, seed=s + 10)) for s in (1, 2, 3)]
    theta = {"w": normal(3), "steps": torch.tensor(4)}
    kept = theta["w"].clone()
    for alpha in (1.0, 0.5):
        found = mp.atm_step(theta, [step_of(x, y, 0.1) for x, y in data], alpha)
        w = kept.clone().requires_grad_()
        sum((x @ w - y).square().mean() for x, y in data).div(3).backward()
        assert close(found["w"], kept - alpha * 0.1 * w.grad)
        assert found["steps"] == 4
    assert torch.equal(theta["w"], kept)
    drifted = mp.atm_step(theta, [step_of(x, y, 0.1, steps=5) for x, y in data])
    together = step_of(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]), 0.1, 5)
    assert not close(drifted["w"], together({"w": kept.clone()})["w"])


def test_tasks_run_by_name_and_may_spoil_their_copy():
    seen = []

    def spoil(label: str, theta: State) -> State:
        seen.append((label, theta["w"].clone()))
        theta["w"].fill_(3.0 if label == "a" else 5.0)
        return theta

    theta = {"w": torch.ones(2, dtype=torch.float16)}
    found = mp.atm_step(theta, {label: partial(spoil, label) for label in "ba"})
    assert [label for label, _ in seen] == ["a", "b"]
    assert all((w == 1).all() for _, w in seen)
    assert found["w"].tolist() == [4.0, 4.0]
    assert found["w"].dtype == torch.float16
    assert same(mp.atm_step(theta, [lambda theta: theta]), theta)


@pytest.mark.parametrize(
    ("functions", "alpha", "message"),
    [
        ([], 1.0, "no functions to fine-tune with"),
        ({}, 1.0, "no functions to fine-tune with"),
        ([dict], math.inf, "alpha=inf"),
        ([lambda theta: None], 1.0, "state dicts"),
        ([lambda theta: {}], 1.0, "'0'.*'w'"),
        ([lambda theta: {"w": torch.ones(3)}], 1.0, "'w'"),
        ({"cars": lambda theta: {"w": theta["w"] / 0}}, 1.0, "'w' of task 'cars' holds NaN"),
    ],
)
def test_atm_refuses(functions, alpha: float, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.atm_step({"w": torch.ones(2)}, functions, alpha)


# ---- The registry --------------------------------------------------------------------------------

HOMES = {"atlas": "atlas", "talos": "talos_mask", "atm": "atm_step"}


@pytest.mark.parametrize("name", HOMES)
def test_training_methods_are_listed_and_point_to_their_room(name: str, tmp_path, capsys):
    home = f"minipact.training.{HOMES[name]}"
    message = f"{name} is no rule but a training method: see {home}"
    for rule in (name, getattr(mp, HOMES[name])):
        with pytest.raises(mp.MergeError, match=message):
            mp.merge(BASE, TASKS, rule=rule)
    files = write_models(tmp_path, tensors=1, width=4)
    error = fails(capsys, 2, *files, "-o", str(tmp_path / "out.safetensors"), "--rule", name)
    assert message in error
    assert main(["methods"]) == 0
    assert f"{name} (training, on all tensors)" in capsys.readouterr().out
