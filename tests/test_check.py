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


def test_it_prints_one_line(capsys: pytest.CaptureFixture[str]):
    V0, V = core_and_update()
    check.check("reliance", ..., V0=V0, V=V)
    check.check("half_width", 0.5, d=np.array([1.0, -1.0]))
    said = "reliance: not filled in yet\nhalf_width: the value differs\n"
    assert capsys.readouterr().out == said
