"""TSV-Compress, TALL masks and EMR on tensors: by hand, entry by entry, and against plain.py."""

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import close, normal, problem, single
from minipact import plain
from minipact.methods import run_survey
from minipact.per_task import emr_survey, tall_survey

# ---- Worked by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("emr", [mp.emr, plain.emr])
def test_emr_by_hand(emr):
    """Entry 2 is a tie of nothing, entry 3 one of 3 and -3: elected negative, as in the authors' code."""
    D = torch.tensor([[4.0, -1.0, 0.0, 3.0, 2.0], [1.0, -3.0, 0.0, -3.0, -1.0]])
    unified, masks = emr(D)
    assert unified.tolist() == [4.0, -3.0, 0.0, -3.0, 2.0]
    assert masks.int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 0, 1, 0]]
    rescalers = torch.tensor([10 / 9, 8 / 10])
    served = mp.emr_decompress(unified, masks, rescalers)
    assert torch.allclose(served[1], torch.tensor([3.2, -2.4, 0.0, -2.4, 0.0]))
    assert torch.allclose(served.abs().sum(1), D.abs().sum(1)), "of the tasks' own lengths"
    assert torch.equal(served, plain.emr_decompress(unified, masks, rescalers))


@pytest.mark.parametrize("tall", [mp.tall, plain.tall])
def test_tall_by_hand(tall):
    D = torch.tensor([[4.0, 1.0, -2.0, 0.0], [1.0, 4.0, 2.0, 0.0]])
    merged, masks = tall(D)
    assert merged.tolist() == [5.0, 5.0, 0.0, 0.0]
    assert masks.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]], "untouched entries serve nobody"
    _, masks = tall(D, [0.2, 0.4])
    assert masks.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 0]]
    served = mp.tall_decompress(merged, masks)
    assert served.tolist() == [[5.0, 5.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]]
    assert torch.equal(served, plain.tall_decompress(merged, masks))


@pytest.mark.parametrize("tall", [mp.tall, plain.tall])
def test_tall_on_a_sum_by_ties_by_hand(tall):
    D = torch.tensor([[4.0, -1.0, 3.0, 0.5, 2.0], [-2.0, -3.0, 5.0, 1.0, -2.0]])
    merged, masks = tall(D, 0.5, merged="ties", density=0.6)
    assert merged.tolist() == [4.0, -3.0, 8.0, 0.0, 0.0]
    # |D| of the tasks against half of [0, 2, 5, 0.5, 2] and of [6, 0, 3, 1, 2]
    assert masks.int().tolist() == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("rescale", ["global", "tensor_mean"])
def test_rescalers_by_hand(rescale: str):
    """In the second tensor task 0 gets 3 for each of its 1; in the first, task 1 gets nothing."""
    D = {"a": torch.tensor([[2.0], [-1.0]]), "b": torch.tensor([[1.0] * 4, [3.0] * 4])}
    expected = {"global": [6 / 14, 13 / 12], "tensor_mean": [3 / 5, 4 / 3]}[rescale]
    assert rescalers(D, rescale).tolist() == pytest.approx(expected)
    assert plain.emr_rescalers(D, rescale).tolist() == pytest.approx(expected)


def rescalers(D: dict[str, Tensor], rescale: str = "global") -> Tensor:
    """What EMR's survey finds on these tensors."""
    tasks = len(next(iter(D.values())))
    talk = emr_survey(tasks=tasks, entries=0, rescale=rescale)
    found = run_survey(talk, lambda measure: sum(measure(d) for d in D.values()))
    return found["rescalers"]


# ---- Entry by entry ------------------------------------------------------------------------------


def emr_by_entry(D: Tensor) -> tuple[list[float], list[list[bool]]]:
    """EMR as its paper says it, in loops over entries."""
    unified, masks = [], [[] for _ in D]
    for entries in D.mT.tolist():
        sign = 1 if sum(entries) > 0 else -1
        unified.append(sign * max((abs(x) for x in entries if x * sign > 0), default=0.0))
        for mask, x in zip(masks, entries, strict=True):
            mask.append(x * unified[-1] > 0)
    return unified, masks


def tall_by_entry(D: Tensor, lambdas: list[float]) -> tuple[list[float], list[list[bool]]]:
    merged, masks = [], [[] for _ in D]
    for entries in D.mT.tolist():
        merged.append(sum(entries))
        for mask, x, floor in zip(masks, entries, lambdas, strict=True):
            mask.append(abs(x) > floor * abs(merged[-1] - x))
    return merged, masks


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_masks_agree_entry_by_entry(tasks: int):
    D = normal(tasks, 60)
    D[:, ::7] = 0
    D[0, 1] = 0
    lambdas = [0.2 + 0.1 * t for t in range(tasks)]
    for found, expected in (
        (mp.emr(D), emr_by_entry(D)),
        (mp.tall(D, lambdas), tall_by_entry(D, lambdas)),
    ):
        assert torch.allclose(found[0], torch.tensor(expected[0]).double(), atol=1e-12)
        assert found[1].tolist() == expected[1]


@pytest.mark.parametrize("shape", [(3, 24, 16), (4, 7), (2,), (3, 2, 3, 2, 2), (3, 0), (1, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {}, {"lambdas": 0.6}, {"merged": "ties"}, {"merged": "ties", "density": 0.5}, {"lambdas": 0},
])  # fmt: skip
def test_plain_agrees(shape: tuple[int, ...], dtype: torch.dtype, options: dict):
    D = normal(*shape, dtype=dtype)
    if options.get("merged") == "ties" and not D.numel():
        return  # plain.py asks for an entry to trim at
    before = D.clone()
    pairs = [(mp.tall(D, **options), plain.tall(D, **options)), (mp.emr(D), plain.emr(D))]
    for ours, equations in pairs:
        assert [x.dtype for x in ours] == [dtype, torch.bool] == [x.dtype for x in equations]
        assert close(ours[0], equations[0])
        assert torch.equal(ours[1], equations[1])
    tensors = {"one": D, "two": 3 * normal(len(D), 5, 2, seed=1, dtype=dtype)}
    for rescale in ("global", "tensor_mean"):
        ours = rescalers(tensors, rescale)
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, plain.emr_rescalers(tensors, rescale))
    assert torch.equal(D, before), "inputs are never changed"


# ---- Properties ----------------------------------------------------------------------------------


def test_one_task_comes_back_whole():
    D = normal(1, 30, 20)
    unified, masks = mp.emr(D)
    ratio = rescalers({"": D})
    assert ratio.tolist() == [1.0]
    assert torch.equal(mp.emr_decompress(unified, masks, ratio), D)
    assert torch.equal(mp.tall_decompress(*mp.tall(D)), D)
    assert close(mp.tsv_decompress(*mp.tsv_compress(D)), D)


def test_every_task_comes_back_at_full_rank():
    _, D = problem(24, 18, tasks=5)
    assert close(mp.tsv_decompress(*mp.tsv_compress(D, rank=18)), D)


def test_the_default_rank_of_tsv_compress_takes_the_room_of_two_matrices():
    """k = int(r / T): so many triples of each task, that all together have about one matrix' ranks."""
    for tasks in (2, 3, 8):
        u, s, v = mp.tsv_compress(normal(tasks, 24, 24))
        assert s.shape == (tasks, 24 // tasks)
        assert u.numel() + v.numel() <= 2 * 24 * 24


def test_tasks_that_do_not_meet_come_back_whole():
    """Where each entry belongs to one task, masks tell whose it is."""
    D = torch.zeros(3, 30).double()
    for t, d in enumerate(D):
        d[t::3] = normal(10, seed=t)
    for served in (mp.tall_decompress(*mp.tall(D)), _emr_served(D)):
        assert close(served, D)


def _emr_served(D: Tensor) -> Tensor:
    return mp.emr_decompress(*mp.emr(D), rescalers({"": D}))


def test_emr_scales_with_its_tasks_and_keeps_their_lengths():
    D = normal(4, 50)
    assert close(_emr_served(8 * D), 8 * _emr_served(D))
    assert close(_emr_served(D).abs().sum(1), D.abs().sum(1))
    unified, masks = mp.emr(D)
    assert bool((masks.sum(0) > 0).all()), "an elected sign has a task that agrees"
    assert torch.equal(unified.abs(), (D.abs() * masks).amax(0))


def test_larger_lambdas_serve_fewer_entries():
    D = normal(4, 500)
    counts = [int(mp.tall(D, x)[1].sum()) for x in (0, 0.2, 0.4, 0.6, 2.0, 100.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == D.numel()


def test_masks_do_not_depend_on_the_order_of_tasks():
    D = normal(5, 200)
    order = [3, 0, 4, 1, 2]
    lambdas = [0.2, 0.3, 0.4, 0.5, 0.6]
    ours, turned = mp.tall(D, lambdas), mp.tall(D[order], [lambdas[t] for t in order])
    assert torch.equal(ours[1][order], turned[1])
    assert torch.equal(mp.emr(D)[1][order], mp.emr(D[order])[1])
    assert torch.allclose(rescalers({"": D})[order], rescalers({"": D[order]}))


# ---- Degenerate and bad input --------------------------------------------------------------------


def test_zero_updates_and_zero_tasks():
    D = single(3, 6, 5)
    D[1] = 0
    for served in (
        mp.tall_decompress(*mp.tall(D)),
        _emr_served(D),
        mp.tsv_decompress(*mp.tsv_compress(D)),
    ):
        assert not served[1].any()
        assert served[0].any()
    nothing = torch.zeros(3, 6, 5)
    assert rescalers({"": nothing}).tolist() == [1.0, 1.0, 1.0], "no ratio of nothing to nothing"
    assert not _emr_served(nothing).any()
    assert not mp.tall(nothing)[1].any()


def test_a_task_that_is_outvoted_everywhere_gets_nothing():
    D = torch.tensor([[1.0, 1.0], [-3.0, -3.0]])
    assert rescalers({"": D}).tolist() == [1.0, 1.0]
    assert _emr_served(D).tolist() == [[0.0, 0.0], [-3.0, -3.0]]


def test_trimming_over_a_whole_model_takes_one_threshold_a_task():
    D = torch.tensor([[5.0, 4.0, 1.0, 1.0], [1.0, 1.0, 6.0, 2.0]])
    halves = {"a": D[:, :2], "b": D[:, 2:]}
    talk = tall_survey(tasks=2, entries=4, merged="ties", density=0.5)
    found = run_survey(talk, lambda measure: sum(measure(d).to_dense() for d in halves.values()))
    whole = mp.tall(D, merged="ties", density=0.5)[0]
    parts = [mp.tall(d, merged="ties", density=0.5, **found)[0] for d in halves.values()]
    assert torch.equal(torch.cat(parts), whole)
    assert run_survey(tall_survey(tasks=2, entries=4), lambda measure: measure(D)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambdas": -0.1}, "lambdas=-0.1 do not fit: give one number, 0 or more, or one for each"),
        ({"lambdas": float("nan")}, "lambdas=nan do not fit"),
        ({"lambdas": [0.4]}, "one for each of the 3 tasks"),
        ({"lambdas": [0.4, 0.4, "x"]}, "one for each of the 3 tasks"),
        ({"lambdas": "0.4"}, "lambdas='0.4' do not fit"),
        ({"merged": "mean"}, "tall merged 'mean' is unknown: use 'sum', 'ties'"),
        ({"merged": "ties", "density": 0}, "density=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        mp.tall(normal(3, 4, 4), **options)


def test_rescalers_of_an_unknown_kind_are_refused():
    with pytest.raises(mp.MergeError, match="emr rescale 'none' is unknown: use 'global'"):
        rescalers({"": normal(2, 3)}, "none")
