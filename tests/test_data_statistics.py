"""Statistics of data: Fisher information against closed forms and plain autograd, gradients, covariances."""

import pytest
import torch
from torch import Tensor, nn

import minipact as mp
from helpers import close, normal, rng


class Logistic(nn.Module):
    """Two classes with logits 0 and w x: logistic regression."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.w
        return torch.stack([torch.zeros_like(z), z], -1)


class Small(nn.Module):
    """Three classes, with dropout, batch norm and attention, which eval mode and vmap must handle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.BatchNorm1d(8)
        self.dropped = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.dropped(self.normed(mixed.mean(1))))


W, X = normal(4, seed=1), normal(50, 4, seed=2)
P = torch.sigmoid(X @ W)


def test_expected_is_the_closed_form_of_logistic_regression():
    found = mp.fisher(Logistic(W), [X[:20], X[20:]], labels="expected")
    assert list(found) == ["w"]
    assert found["w"].dtype == torch.float64
    assert close(found["w"], (P * (1 - P)) @ X.square() / 50)


def test_true_is_the_closed_form_on_average():
    many = X[:2].repeat(20_000, 1)
    found = mp.fisher(Logistic(W), [many], chunk=40_000, generator=rng())
    wanted = (P[:2] * (1 - P[:2])) @ X[:2].square() / 2
    assert torch.allclose(found["w"], wanted, rtol=0.03)


@pytest.mark.parametrize("labels", ["empirical", "argmax"])
def test_given_labels(labels):
    y = torch.arange(50) % 2
    found = mp.fisher(Logistic(W), [(X, y)], labels=labels)["w"]
    y = y if labels == "empirical" else (P > 0.5).long()
    assert close(found, (y - P).square() @ X.square() / 50)


def test_true_labels_are_the_generators():
    u = torch.rand(50, 1, generator=rng(5), dtype=torch.float64).squeeze()
    y = (u >= 1 - P).double()
    found = mp.fisher(Logistic(W), [X], generator=rng(5))["w"]
    assert close(found, (y - P).square() @ X.square() / 50)
    assert not close(found, mp.fisher(Logistic(W), [X], generator=rng(6))["w"])


def loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Squares of the gradients, sample by sample, by plain autograd in eval mode."""
    model = model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / len(x)
    return total


def test_an_explicit_loop_agrees_whatever_the_batches_and_chunks():
    x, y = normal(11, 5, 8), torch.arange(11) % 3
    wanted = loop(Small().double(), x, y)
    for batches, chunk in (([(x, y)], 4), ([(x[:2], y[:2]), (x[2:], y[2:])], 32)):
        found = mp.fisher(Small().double(), batches, labels="empirical", chunk=chunk)
        assert list(found) == list(wanted)
        assert all(close(found[name], wanted[name]) for name in wanted)


def test_expected_weighs_the_classes():
    x, model = normal(6, 5, 8), Small().double().eval()
    p = model(x).softmax(-1).detach()
    per_class = [[loop(model, x[[i]], torch.tensor([c])) for c in range(3)] for i in range(6)]
    found = mp.fisher(model, [x], labels="expected")
    for name in found:
        wanted = sum(p[i, c] * per_class[i][c][name] for i in range(6) for c in range(3)) / 6
        assert close(found[name], wanted)


def test_batch_mean_square_is_another_thing():
    y = torch.bernoulli(P, generator=rng(3)).long()
    g = (y - P).unsqueeze(1) * X
    batches = [(X[:20], y[:20]), (X[20:], y[20:])]
    found = mp.fisher(
        Logistic(W), batches, labels="empirical", estimate="batch_mean_square", chunk=7
    )["w"]
    wanted = (20 * g[:20].mean(0).square() + 30 * g[20:].mean(0).square()) / 50
    assert close(found, wanted)
    assert not torch.allclose(found, g.square().mean(0), rtol=0.1)
    # Opposite gradients in one batch: the batch mean sees nothing where the Fisher sees both.
    pair = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))]
    still = Logistic(torch.zeros(1))
    assert mp.fisher(still, pair, labels="empirical", estimate="batch_mean_square")["w"] == 0
    assert mp.fisher(still, pair, labels="empirical")["w"] == 0.25


def test_the_model_comes_back_as_found():
    model = Small().double()
    model.dropped.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    mp.fisher(model, [normal(4, 5, 8)])
    assert model.training
    assert not model.dropped.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(mp.MergeError):
        mp.fisher(model, [])
    assert model.training


def test_half_types_are_lifted():
    model = Logistic(W.half())
    found = mp.fisher(model, [X.half()], labels="expected")["w"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, ((P * (1 - P)) @ X.square() / 50).float(), rtol=0.01)
    assert model.w.dtype == torch.float16


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one sample"),
        ([X[:0]], {}, "empty"),
        ([X], {"labels": "empirical"}, "pairs"),
        ([(X, P)], {"labels": "empirical"}, "class numbers"),
        ([(X, torch.zeros(3).long())], {"labels": "empirical"}, "class numbers"),
        ([(X, torch.full((50,), 2))], {"labels": "empirical"}, "2..2"),
        ([(X, torch.full((50,), -1))], {"labels": "empirical"}, "-1..-1"),
        ([X], {"labels": "mc"}, "'mc' is unknown"),
        ([X], {"estimate": "mean"}, "'mean' is unknown"),
        ([X], {"labels": "expected", "estimate": "batch_mean_square"}, "zero everywhere"),
        ([X], {"chunk": 0}, "chunk=0"),
        ([X / 0], {"labels": "argmax"}, "'w' are not finite"),
    ],
)
def test_fisher_refuses(batches, options, message):
    with pytest.raises(mp.MergeError, match=message):
        mp.fisher(Logistic(W), batches, **options)


def test_fisher_refuses_models_without_classes_or_weights():
    with pytest.raises(mp.MergeError, match=r"\(1, 50\) for 50 inputs"):
        mp.fisher(
            nn.Sequential(nn.Linear(4, 1).double(), nn.Flatten(0), nn.Unflatten(0, (1, 50))), [X]
        )
    with pytest.raises(mp.MergeError, match="no parameters"):
        mp.fisher(nn.Identity(), [X])


# ---- Magnitudes of gradients ---------------------------------------------------------------------


def test_gradient_magnitudes_are_taken_for_every_sample():
    y = torch.arange(50) % 2
    found = mp.gradient_magnitudes(Logistic(W), [(X[:20], y[:20]), (X[20:], y[20:])])
    assert close(found["w"], ((y - P)[:, None] * X).abs().mean(0))
    half = mp.gradient_magnitudes(Logistic(W), [(X, y)], chunk=7)
    assert close(found["w"], half["w"])
    with pytest.raises(mp.MergeError, match="needs batches of pairs"):
        mp.gradient_magnitudes(Logistic(W), [X])
    with pytest.raises(mp.MergeError, match="at least one sample"):
        mp.gradient_magnitudes(Logistic(W), [])


# ---- Covariances of inputs -----------------------------------------------------------------------


class Tokens(nn.Module):
    """Linear layers on single inputs and on tokens, and attention to oneself and to others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = scale * self.first(x)
        x = x + self.own(x, x, x)[0]
        return self.layer(x + self.cross(x, key=x[:, :2], value=x[:, :2])[0])


def heads_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the output projections of the two attentions see, from the definition of attention."""

    def mixed(module: nn.MultiheadAttention, query: Tensor, keys: Tensor) -> Tensor:
        projections = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(s, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for s, w, b in zip((query, keys, keys), *projections, strict=True)
        )
        weights = (q @ k.mT / module.head_dim**0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    after = x + model.own(x, x, x)[0]
    return {
        "own.out_proj.weight": mixed(model.own, x, x),
        "cross.out_proj.weight": mixed(model.cross, after, after[:, :2]),
    }


def second_moment(x: Tensor) -> Tensor:
    x = x.double().flatten(0, -2)
    return x.mT @ x / len(x)


def test_covariances_are_second_moments_of_what_layers_see():
    model, x = Tokens().double(), normal(5, 4, 6)
    found = mp.input_covariances(model, [x[:2], (x[2:], "labels")])
    own = model.first(x)
    assert close(found["first.weight"], second_moment(x))
    assert close(found["own.in_proj_weight"], second_moment(own))
    mixed = own + model.own(own, own, own)[0]
    for name, inside in heads_of(model, own).items():
        assert close(found[name], second_moment(inside))
    inside = mixed + model.cross(mixed, mixed[:, :2], mixed[:, :2])[0]
    assert close(found["layer.self_attn.in_proj_weight"], second_moment(inside))
    assert set(found) == {
        "first.weight", "own.in_proj_weight", "own.out_proj.weight", "cross.out_proj.weight",
        "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight", "layer.linear1.weight",
        "layer.linear2.weight",
    }  # fmt: skip
    assert found["layer.linear2.weight"].shape == (12, 12)
    twice = mp.input_covariances(model, [{"x": x, "scale": 2.0}])
    assert close(twice["own.in_proj_weight"], 4 * found["own.in_proj_weight"])


def test_a_model_is_left_as_it_was_by_covariances():
    model = Small()
    model.normed.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    mp.input_covariances(model, [torch.zeros(3, 2, 8)])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_covariances_reach_regmean():
    base, first, second = (nn.Linear(5, 3) for _ in range(3))
    x = [normal(40, 5, seed=s).float() for s in (1, 2)]
    pairs = zip((first, second), x, strict=True)
    states = [mp.input_covariances(model, [seen]) for model, seen in pairs]
    recipe = {"rule": "regmean", "options": {"regmean": {"off_diagonal": 1.0}}}
    tasks = [model.state_dict() for model in (first, second)]
    merged = mp.merge(base.state_dict(), tasks, statistics={"covariance": states}, **recipe)
    X = torch.cat(x).double()
    Y = torch.cat([a @ t["weight"].mT for a, t in zip(x, tasks, strict=True)]).double()
    assert torch.allclose(
        merged["weight"].double(), torch.linalg.lstsq(X, Y).solution.mT, atol=1e-4
    )


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(2, 2), [], "no linear layer saw an input: give batches"),
        (nn.ReLU(), [torch.ones(2, 2)], "no linear layer saw an input"),
        (nn.Linear(2, 2), [torch.tensor([[1.0, torch.inf]])], "inputs of 'weight' are not finite"),
    ],
)
def test_covariances_that_cannot_be(model: nn.Module, batches: list[Tensor], message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.input_covariances(model, batches)
