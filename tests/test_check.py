"""The checker of the book's fill-in cells: right answers pass in any basis, wrong ones are told why."""

import numpy as np
import pytest
import torch

import check
from check import QUESTIONS, verdict
from helpers import normal
from minipact import plain


def core_and_update():
    V0 = torch.linalg.qr(normal(9, 3, seed=0).double()).Q
    V = torch.linalg.qr(normal(9, 2, seed=1).double()).Q
    return V0, V


def walls():
    return [plain.basis(normal(9, 2, seed=s).double(), 1e-3) for s in range(3)]


def basis_verdict(x: object) -> str:
    return verdict(x, QUESTIONS["shield"].reference(walls(), 0), basis=True)


def values_verdict(x: object) -> str:
    return verdict(x, QUESTIONS["reliance"].reference(*core_and_update()))


def test_right_values_pass_in_either_precision():
    V0, V = core_and_update()
    right = V0 - V @ V.mT @ V0
    assert values_verdict(right) == values_verdict(right.float()) == "right"
    assert values_verdict(right.numpy()) == values_verdict(right.tolist()) == "right"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: ..., "not filled in yet"),
        (lambda x: "V0", "this is a str"),
        (lambda x: None, "this is a NoneType"),
        (lambda x: x.mT, "[3, 9], and [9, 3] is wanted: transposed?"),
        (lambda x: x[:, :2], "[9, 2], and [9, 3] is wanted"),
        (torch.zeros_like, "all entries are zero"),
        (lambda x: x / 0, "not finite"),
        (torch.neg, "sign is the wrong way round"),
        (lambda x: 2 * x, "this is 2 times"),
        (lambda x: normal(9, 3, seed=8).double(), "the values differ, most at ["),
        (lambda x: core_and_update()[0], "the values differ"),
    ],
)
def test_wrong_values_are_told_why(spoil, said: str):
    V0, V = core_and_update()
    assert said in values_verdict(spoil(V0 - V @ V.mT @ V0))


def test_a_square_transpose_is_seen():
    x = normal(4, 4, seed=3).double()
    assert verdict(x.mT, x) == "this is the transpose"


def test_any_basis_of_the_right_space_passes():
    right = QUESTIONS["shield"].reference(walls(), 0)
    turned = right @ torch.linalg.qr(normal(4, 4, seed=5).double()).Q
    assert (
        basis_verdict(right) == basis_verdict(turned) == basis_verdict(-turned.float()) == "right"
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: ..., "not filled in yet"),
        (lambda x: x.mT, "transposed?"),
        (torch.zeros_like, "all entries are zero"),
        (lambda x: 2 * x, "do not have length one"),
        (lambda x: torch.cat([x[:, :1], x[:, :3]], 1), "are not at right angles"),
        (lambda x: x[:, :3], "[9, 3], and [9, 4] is wanted"),
        (lambda x: torch.linalg.qr(normal(9, 4, seed=8).double()).Q, "leaves the space by"),
        (lambda x: torch.cat(walls(), 1)[:, :4], "are not at right angles"),
    ],
)
def test_wrong_bases_are_told_why(spoil, said: str):
    assert said in basis_verdict(spoil(QUESTIONS["shield"].reference(walls(), 0)))


def test_the_references_by_hand():
    root = 2**-0.5
    V0, V = torch.tensor([[1.0], [0.0]]), torch.tensor([[root], [root]])
    assert torch.allclose(check.reliance(V0, V), torch.tensor([[0.5], [-0.5]]))
    one, two = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    assert torch.allclose(check.shield([one, two, two], 0).abs(), two.double())
    assert float(check.half_width(np.array([1.0, -1.0]))) == pytest.approx(1.96 * 2**0.5 / 2**0.5)
    A, w = torch.tensor([[[3.0]], [[1.0]]]), torch.tensor([[2.0], [0.0]])
    assert float(check.resting(A, w, 0.25, 1)) == pytest.approx(1.5)
    assert float(check.resting(A, w, 0.25, 999)) == pytest.approx(1.0)
    X, y = (
        torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]),
        torch.tensor([0, 1, 0]),
    )
    assert check.scores(X, y, 2).tolist() == [[2, 1, 4], [4, 0, 0]]


def single_weights():
    p = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).double()
    return {"p": p, "G": normal(2, 2, 3, seed=1).double()}


def ten_weights():
    f = torch.tensor([9.0, 0.0, 5.0, 9.5, 1.0, 5.0, 0.5, 5.0, 5.0, 5.0])
    return {"t": torch.tensor([0.1, -0.1, 0.2, 2.0, -2.0, 2.0, 3.0, -3.0, 3.0, 3.0]), "f": f}


def sketch():
    A = normal(5, 4, seed=3).double().numpy()
    return {"A": A, "Omega": normal(4, 2, seed=4).double().numpy()}


def biases():
    return {"b0": torch.tensor([1.0, 1.0]), "b": torch.tensor([[3.0, 1.0], [1.0, 3.0], [1.0, 1.0]])}


def rows():
    """Three texts and two descriptions, of which the first is long."""
    return {
        "X": torch.tensor([[1.0, 0.0], [0.2, 1.0], [1.0, 2.0]]),
        "H": torch.tensor([[9.0, 0], [0, 1]]),
    }


def test_chapters_7_8_and_16_by_hand():
    A = np.outer([2.0, 1.0, 2.0], [1.0, 2.0, 2.0])
    Q = check.range_finder(A, np.array([[1.0], [0.0], [3.0]]))
    assert torch.allclose(Q * Q[0].sign(), torch.tensor([[2.0], [1.0], [2.0]]).double() / 3)
    assert float(check.captured(np.diag([3.0, 3.0, 1.0]), np.eye(3)[:, 1:2])) == pytest.approx(1)
    assert float(check.captured(np.diag([3.0, 3.0, 1.0]), np.eye(3)[:, 2:])) == pytest.approx(1 / 9)
    assert check.bias(torch.ones(2), torch.tensor([[3.0, 1.0], [1.0, 3.0]])).tolist() == [2, 2]
    assert int(check.most_bytes(2, [(2, 2), (3,)])) == 8 * 4 * 4
    assert check.nearest(**rows()).tolist() == [0, 1, 1]
    assert torch.allclose(check.margins(**rows())[:1], torch.ones(1).double())


def test_chapters_4_and_5_by_hand():
    p, inputs = torch.full((2, 2), 0.5), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    G = torch.stack([-0.5 * inputs, 0.5 * inputs], dim=1)
    assert check.fisher(p, G).tolist() == [1.25, 0.5]
    assert check.crucial(**ten_weights()).nonzero().flatten().tolist() == [0]
    core = check.core(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), 2)
    assert torch.allclose(core @ core.mT, torch.tensor([[2.0, 0, 0], [0, 1, 1], [0, 1, 1]]) / 2)
    V0, V = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.8], [0.6]])
    wall = check.wall(V0, V)
    assert torch.allclose(wall * wall[0].sign(), torch.tensor([[0.6], [-0.8]]).double())
    assert float(check.hidden(torch.tensor([[0.0], [1.0]]), wall.float())) == pytest.approx(0.64)
    d = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 4.0]])
    assert torch.allclose(check.profile(d, torch.eye(3)[:, :2]) * 25, torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize(
    ("name", "inputs", "spoil", "said"),
    [
        ("fisher", single_weights(), lambda x, p, G: (p[..., None] * G).sum(1).mean(0) ** 2, "differ"),
        ("fisher", single_weights(), lambda x, p, G: 2 * x, "this is 2 times"),
        ("fisher", single_weights(), lambda x, p, G: G.square().mean(0), "[2, 3], and [3] is wanted"),
        ("fisher", single_weights(), lambda x, p, G: torch.zeros(3), "all entries are zero"),
        ("crucial", ten_weights(), lambda x, t, f: t.abs() < 0.3, "the values differ, most at [1]"),
        ("crucial", ten_weights(), lambda x, t, f: f > 8, "the values differ, most at [3]"),
        ("crucial", ten_weights(), lambda x, t, f: x & False, "all entries are zero"),
        ("crucial", ten_weights(), lambda x, t, f: x.nonzero(), "[1, 1], and [10] is wanted"),
        ("core", {"W0": normal(4, 6, seed=2), "K": 2}, lambda x, W0, K: x.mT, "transposed?"),
        ("core", {"W0": normal(6, 6, seed=2), "K": 2},
         lambda x, W0, K: torch.linalg.svd(W0).U[:, :2], "leaves the space by"),
        ("core", {"W0": normal(4, 6, seed=2), "K": 2}, lambda x, W0, K: 3 * x, "length one"),
        ("wall", {"V0": torch.eye(4)[:, :2], "V": torch.eye(4)[:, 1:3]},
         lambda x, V0, V: torch.linalg.qr(V0 - V @ V.mT @ V0).Q, "[4, 2], and [4, 1] is wanted"),
        ("wall", {"V0": torch.eye(4)[:, :2], "V": torch.eye(4)[:, 1:3]},
         lambda x, V0, V: V0[:, 1:], "leaves the space by 90 degrees"),
        ("cleared", {"d": normal(4, 4, seed=2), "P": torch.eye(4).double()[:, :2]},
         lambda x, d, P: d - P @ P.mT @ d, "the values differ"),
        ("cleared", {"d": normal(4, 4, seed=2), "P": torch.eye(4).double()[:, :2]},
         lambda x, d, P: d, "the values differ"),
        ("hidden", {"V_s": torch.eye(4)[:, :2], "L_t": torch.eye(4)[:, 1:]},
         lambda x, V_s, L_t: 2 * x, "the value differs"),
        ("hidden", {"V_s": torch.eye(4)[:, :2], "L_t": torch.eye(4)[:, 1:]},
         lambda x, V_s, L_t: V_s.mT @ L_t, "[2, 3], and [] is wanted"),
        ("profile", {"d": normal(4, 6, seed=2), "v0": torch.eye(6).double()[:, :2]},
         lambda x, d, v0: (d @ v0).square().sum(0), "times what is wanted"),
        ("profile", {"d": normal(4, 6, seed=2), "v0": torch.eye(6).double()[:, :2]},
         lambda x, d, v0: x.sum(), "[], and [2] is wanted"),
        ("range_finder", sketch(), lambda x, A, Omega: (A @ Omega), "length one"),
        ("range_finder", sketch(), lambda x, A, Omega: np.linalg.qr(Omega)[0], "[4, 2], and [5, 2]"),
        ("range_finder", sketch(), lambda x, A, Omega: np.linalg.svd(A)[0][:, :2], "leaves the space"),
        ("range_finder", sketch(), lambda x, A, Omega: torch.zeros(5, 2), "all entries are zero"),
        ("captured", {"A": sketch()["A"], "V_hat": np.eye(4)[:, :2]},
         lambda x, A, V_hat: (A @ V_hat)[0, 0] ** 2, "the value differs"),
        ("captured", {"A": sketch()["A"], "V_hat": np.eye(4)[:, :2]},
         lambda x, A, V_hat: A @ V_hat, "[5, 2], and [] is wanted"),
        ("bias", biases(), lambda x, b0, b: (b - b0).mean(0), "times what is wanted"),
        ("bias", biases(), lambda x, b0, b: b, "[3, 2], and [2] is wanted"),
        ("bias", biases(), lambda x, b0, b: 0 * b0, "all entries are zero"),
        ("bytes", {"T": 2, "shapes": [(3, 4), (5,)]}, lambda x, T, shapes: x / 4, "the value differs"),
        ("bytes", {"T": 2, "shapes": [(3, 4), (5,)]}, lambda x, T, shapes: "8 GB", "this is a str"),
        ("nearest", rows(), lambda x, X, H: (X @ H.mT).argmax(1), "all entries are zero"),
        ("nearest", rows(), lambda x, X, H: X @ H.mT, "[3, 2], and [3] is wanted"),
        ("margins", rows(), lambda x, X, H: (X @ H.mT)[:, 0], "the values differ"),
        ("margins", rows(), lambda x, X, H: -x, "the sign is the wrong way round"),
    ],
)  # fmt: skip
def test_wrong_answers_are_told_what_is_wrong(name, inputs, spoil, said: str):
    question = QUESTIONS[name]
    right = question.reference(**inputs)
    assert verdict(right, right, question.basis) == "right"
    assert said in verdict(spoil(right, **inputs), right, question.basis)


def test_it_prints_one_line(capsys: pytest.CaptureFixture[str]):
    V0, V = core_and_update()
    check.check("reliance", ..., V0=V0, V=V)
    check.check("half_width", 0.5, d=np.array([1.0, -1.0]))
    said = "reliance: not filled in yet\nhalf_width: the value differs\n"
    assert capsys.readouterr().out == said


def test_chapter_14_by_hand():
    merged, own = np.array([0.9, 0.3]), np.array([1.0, 0.6])
    assert float(check.normalised(merged, own)) == pytest.approx(0.7)
    assert verdict(merged.mean() / own.mean(), check.normalised(merged, own)) == "the value differs"
    d = np.array([1.0, -1.0] * 4)
    width = 2.365 * (8 / 7) ** 0.5 / 8**0.5
    assert float(check.task_width(d)) == pytest.approx(width)
    assert verdict(1.96 * width / 2.365, check.task_width(d)) == "the value differs"


def copies():
    W0 = normal(4, 3, seed=0).double()
    return {"W0": W0, "W": W0 + 0.1 * normal(5, 4, 3, seed=1).double(), "alpha": 0.2}


def test_chapters_1_to_3_by_hand():
    W0, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[[4.0, 2.0]], [[1.0, 6.0]], [[2.0, 3.0]]])
    assert check.merged(W0, W, 1.0).tolist() == [[5, 7]]
    cosines = check.cosines(torch.tensor([[4.0, 3.0], [0.0, 2.0]]))
    assert torch.allclose(cosines, torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    Y = torch.tensor([[4.0, -3.0, 0, 2.0, 0], [2.0, 5.0, 0, -2.0, 0], [-1.0, 4.0, 0, 0, 3.0]])
    assert check.agreeing_mean(Y).tolist() == [3, 4.5, 0, 0, 3]
    assert check.dare_variance(torch.tensor([3.0, 1.0]), 0.5).tolist() == [9, 1]
    tiny = torch.tensor([[2.4, -0.6], [1.8, 0.8]], dtype=torch.float64)
    kept = torch.tensor([[2.4, 0.0], [1.8, 0.0]], dtype=torch.float64)
    assert torch.allclose(check.low_rank(tiny, 1), kept)
    narrow = torch.tensor([[0.8, 0.6], [0.6, 0.8]]).double()
    assert torch.allclose(check.whitened(narrow), torch.eye(2).double())


@pytest.mark.parametrize(
    ("name", "inputs", "spoil", "said"),
    [
        ("merged", copies(), lambda x, W0, W, alpha: W0 + alpha * W.sum(0), "the values differ"),
        ("merged", copies(), lambda x, W0, W, alpha: W0 + alpha * (W - W0).mean(0), "differ"),
        ("merged", copies(), lambda x, W0, W, alpha: W0 + alpha * (W - W0), "[5, 4, 3], and [4, 3]"),
        ("merged", copies(), lambda x, W0, W, alpha: x.mT, "transposed?"),
        ("cosines", {"X": normal(3, 9, seed=2)}, lambda x, X: X @ X.mT, "the values differ"),
        ("cosines", {"X": normal(3, 9, seed=2)}, lambda x, X: torch.zeros(3, 3), "are zero"),
        ("cosines", {"X": normal(3, 9, seed=2)}, lambda x, X: check.cosines(X.mT), "[9, 9], and [3, 3]"),
        ("agreeing_mean", {"X": normal(3, 9, seed=2)}, lambda x, X: X.mean(0), "the values differ"),
        ("agreeing_mean", {"X": normal(3, 9, seed=2)},
         lambda x, X: torch.where(X.sign() == X.sum(0).sign(), X, 0).mean(0), "the values differ"),
        ("agreeing_mean", {"X": normal(3, 9, seed=2)}, lambda x, X: -x, "the wrong way round"),
        ("dare_variance", {"tau": normal(4, seed=2), "p": 0.9}, lambda x, tau, p: tau**2 / (1 - p),
         "this is 1.11 times what is wanted"),
        ("dare_variance", {"tau": normal(4, seed=2), "p": 0.9}, lambda x, tau, p: x.sqrt(), "differ"),
        ("low_rank", {"delta": normal(5, 4, seed=2), "k": 2}, lambda x, delta, k: delta, "differ"),
        ("low_rank", {"delta": normal(5, 4, seed=2), "k": 2}, lambda x, delta, k: x.mT, "transposed?"),
        ("low_rank", {"delta": normal(5, 4, seed=2), "k": 2},
         lambda x, delta, k: torch.linalg.svd(delta).U[:, :k], "[5, 2], and [5, 4] is wanted"),
        ("whitened", {"X": normal(6, 3, seed=2)}, lambda x, X: torch.linalg.qr(X).Q, "differ"),
        ("whitened", {"X": normal(6, 3, seed=2)}, lambda x, X: X / X.norm(dim=0), "differ"),
        ("whitened", {"X": normal(6, 3, seed=2)}, lambda x, X: x @ torch.eye(3).double()[[1, 2, 0]],
         "the values differ"),
        ("whitened", {"X": normal(6, 3, seed=2)}, lambda x, X: x / 3**0.5, "this is 0.577 times"),
    ],
)  # fmt: skip
def test_wrong_answers_of_chapters_1_to_3(name, inputs, spoil, said: str):
    right = QUESTIONS[name].reference(**inputs)
    assert verdict(right, right) == verdict(right.float(), right) == "right"
    assert verdict(normal(*right.shape, seed=9), right) != "right"
    assert said in verdict(spoil(right, **inputs), right)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x, e, f, claims: 1 / (1 + claims * torch.outer(f, e)), "transposed?"),
        (lambda x, e, f, claims: 1 / (1 + claims * f), "[3], and [2, 3] is wanted"),
        (lambda x, e, f, claims: 1 / (1 + claims * (e[:, None] + f)), "the values differ"),
        (lambda x, e, f, claims: 1 - x, "the values differ"),
        (lambda x, e, f, claims: torch.zeros(2, 3), "all entries are zero"),
        (lambda x, e, f, claims: normal(2, 3, seed=9), "the values differ"),
    ],
)
def test_chapter_9_by_hand(spoil, said: str):
    claimed = {"e": torch.tensor([3.0, 0.0]), "f": torch.tensor([2.0, 0.5, 0.0]), "claims": 2.0}
    right = check.share(**claimed)
    assert torch.allclose(right, torch.tensor([[1 / 13, 1 / 4, 1], [1, 1, 1]]))
    assert verdict(right, right) == verdict(right.double(), right) == "right"
    assert said in verdict(spoil(right, **claimed), right)
