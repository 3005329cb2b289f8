"""plain.py: the same methods with the same options and results as the package, in one file to copy."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minipact as mp
from helpers import close, data_of, decaying, normal, problem, rng, single
from minipact import plain
from minipact.methods import is_built_in

OURS = {name: method for name, method in mp.METHODS.items() if is_built_in(method)}
NAMES = [name for name, method in OURS.items() if method.kind != "training"]
RULES = [name for name in NAMES if mp.METHODS[name].kind == "rule"]
PURIFIERS = [name for name in NAMES if mp.METHODS[name].kind == "purifier"]
COMPUTATIONAL = {
    "svd",
    "generator",
    "thresholds",
    "coefficients",
    "shares",
}  # how it is computed, not what


# ---- The same methods ----------------------------------------------------------------------------


def parameters(function) -> dict[str, tuple[object, object]]:
    """Names, defaults and kinds of all parameters but the computational ones."""
    found = inspect.signature(function).parameters.values()
    return {p.name: (p.default, p.kind) for p in found if p.name not in COMPUTATIONAL}


@pytest.mark.parametrize("name", [*NAMES, "tsv_decompress"])
def test_every_method_is_there_with_its_options(name: str):
    assert parameters(getattr(plain, name)) == parameters(getattr(mp, name))


def test_options_that_are_left_out_are_named():
    theirs = {option for name in NAMES for option in OURS[name].options}
    ours = {option for name in NAMES for option in parameters(getattr(plain, name))}
    assert theirs - ours == {"svd", "scope", "collapse", "rescale"} - ours
    assert all(word in plain.__doc__ for word in ("svd=", "scope"))


def test_merge_knows_all_purifiers_and_rules():
    assert set(plain.METHODS) == {*PURIFIERS, *RULES}
    assert set(plain.FLAT) == {x for x in plain.METHODS if mp.METHODS[x].acts_on != "matrix"}
    assert set(plain.BASED) == {x for x in plain.METHODS if "base" in mp.METHODS[x].needs}
    assert set(plain.SIDED) == {x for x in plain.METHODS if mp.METHODS[x].sided}


# ---- Tensor by tensor ----------------------------------------------------------------------------


def copies(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Two tasks that are the same, and their opposite."""
    W0, D = problem(m, n, tasks=2)
    return W0, torch.stack([D[0], D[0], -D[0]])


def low_ranks(m: int, n: int) -> tuple[Tensor, Tensor]:
    W0, _ = problem(m, n)
    return W0, torch.stack([normal(m, 2, seed=t) @ normal(2, n, seed=9 + t) for t in range(4)])


def with_zero_task(m: int, n: int) -> tuple[Tensor, Tensor]:
    W0, D = problem(m, n)
    D[1] = 0
    return W0, D


def flat_blocks(size: int) -> tuple[Tensor, Tensor]:
    """Singular values that are equal in pairs, in threes for the tasks: 2, 2, 1, 1, 1/2 ..."""
    u, v = (torch.linalg.qr(normal(size, size, seed=s)).Q for s in (1, 2))
    W0 = u * 0.5 ** (torch.arange(size) // 2).double() @ v.mT
    tasks = [torch.linalg.qr(normal(size, 3, seed=t)).Q for t in range(3, 9)]
    D = torch.stack([a @ b.mT for a, b in zip(tasks[::2], tasks[1::2], strict=True)])
    return W0, D


def uneven(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Tasks of very different sizes."""
    W0, D = problem(m, n)
    return W0, D * torch.tensor([0.01, 0.1, 3.0, 100.0]).double()[:, None, None]


STACKS = {
    "square": problem(24, 24),
    "tall": problem(40, 18),
    "wide": problem(18, 40),
    "one task": problem(20, 16, tasks=1),
    "two tasks": problem(20, 16, tasks=2),
    "more tasks than ranks": problem(5, 6, tasks=9),
    "low ranks": low_ranks(24, 20),
    "zero task": with_zero_task(20, 16),
    "nothing but zero": (decaying(8, 6), torch.zeros(3, 8, 6).double()),
    "copies": copies(20, 16),
    "one row": problem(1, 12),
    "uneven": uneven(20, 16),
}
CASES = [
    *(("pact", options) for options in (
        {}, {"core": 4, "task": 3}, {"core": "energy:0.9", "task": "energy:0.5"},
        {"tol": 0.3, "core": 0.5}, {"strength": 0.5}, {"core": 0}, {"task": 0},
    )),
    *(("sift", options) for options in ({}, {"core": 0.3}, {"core": "energy:0.8"})),
    *(("dare", options) for options in ({}, {"p": 0.5}, {"rescale": False})),
    *(("task_arithmetic", {"reduce": reduce}) for reduce in ("sum", "mean")),
    *(("ties", {"density": density}) for density in (0.2, 0.5, 1.0)),
    *(("ties", {"reduce": reduce}) for reduce in ("sum", "max")),
    *(("tsv_m", options) for options in ({}, {"rank": 2}, {"rank": 0.4}, {"rank": "energy:0.7"})),
    *(("iso_c", {"mean_over": over}) for over in ("all", "range")),
    *(("iso_cts", {"common": common}) for common in (0.3, 0.8, 1.0)),
    ("iso_cts", {"mean_over": "range"}),
    *(("wudi", {"ridge": ridge}) for ridge in (1e-3, 0.1, 0)),
    *(("ace", {"epsilon": epsilon}) for epsilon in (1e-2, 1.0)),
    *(("wiener", options) for options in (
        {}, {"claims": 0.0}, {"side": "input", "claims": 5.0}, {"side": "output", "ridge": 0.1},
    )),
    *(("awd", {"lr": 1e-8, "alpha": alpha}) for alpha in (0.1, 0.0)),
    *(("tatr", {"q": q}) for q in (0.99, 0.5, 1.0)),
    *(("pave", options) for options in ({}, {"rho": 0.6}, {"rho": 1.0}, {"ridge": 1.0, "rho": 0.1})),
    *(("consensus", options) for options in ({}, {"keep": 1}, {"lambdas": 0.2, "keep": 3})),
    *(("swudi", options) for options in ({}, {"time": 3.0}, {"rank": 0.4}, {"rank": "energy:0.9"})),
    *(("regmean", options) for options in ({}, {"off_diagonal": 0.0}, {"off_diagonal": 1.0})),
    ("fisher_merge", {}),
    *(("knots", options) for options in (
        {}, {"density": 0.6, "reduce": "sum"}, {"reduce": "max"}, {"merge": "linear"},
    )),
]  # fmt: skip


def results(name: str, W0: Tensor, D: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Of the package and of plain.py; counts are cut to the matrix, as in whole models."""
    options = {
        option: min(x, *D.shape[1:]) if type(x) is int else x for option, x in options.items()
    }
    inputs = (W0, D) if "base" in mp.METHODS[name].needs else (D,)
    if name == "regmean":
        seen = normal(len(D), 2 * D.shape[2], D.shape[2])
        inputs = (D, (seen.mT @ seen).to(D))
    if name == "pave":
        seen = normal(len(D), 2 * D.shape[2], D.shape[2])
        inputs = (D, W0 + D, (seen.mT @ seen).to(D))
    if name == "fisher_merge":
        inputs = (D, normal(*D.shape).relu().to(D))
    found = []
    for function in (mp.METHODS[name].function, plain.METHODS[name]):
        random = {"generator": rng()} if name == "dare" else {}
        found.append(function(*inputs, **options, **random))
    return found[0], found[1]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_results_agree(name: str, options: dict, stack: str):
    W0, D = (x.clone() for x in STACKS[stack])
    ours, equations = results(name, W0, D, options)
    assert ours.dtype == equations.dtype == torch.float64
    assert torch.allclose(ours, equations, rtol=1e-9, atol=1e-9)
    assert torch.equal(D, STACKS[stack][1]), "inputs are never changed"
    ours, equations = results(name, W0.float(), D.float(), options)
    assert ours.dtype == equations.dtype == torch.float32
    assert torch.allclose(ours, equations, rtol=1e-4, atol=1e-4 * float(D.abs().max()))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("rank", [None, 2, 0.5, "energy:0.8"])
def test_compressed_tasks_agree(stack: str, rank):
    """Signs of singular vectors are free: their products, and the values, are compared."""
    D = STACKS[stack][1]
    rank = min(rank, *D.shape[1:]) if type(rank) is int else rank
    ours, equations = mp.tsv_compress(D, rank=rank), plain.tsv_compress(D, rank=rank)
    assert [x.shape for x in ours] == [x.shape for x in equations]
    assert close(ours[1], equations[1])
    assert close(mp.tsv_decompress(*ours), plain.tsv_decompress(*equations))


@pytest.mark.parametrize(("name", "options"), [
    ("pact", {"core": 4, "task": 3}), ("sift", {"core": 6}), ("tsv_m", {"rank": 3}),
    ("iso_c", {}), ("iso_cts", {"common": 1.0}),
])  # fmt: skip
def test_cuts_between_equal_singular_values_agree(name: str, options: dict):
    ours, equations = results(name, *flat_blocks(12), options)
    assert close(ours, equations)


def test_cuts_within_equal_singular_values_agree_in_what_is_unique():
    """Which of the equal directions stay is free; how many, and with which singular values, is not."""
    W0, D = flat_blocks(12)
    for core in (3, 5):
        ours, equations = results("sift", W0, D, {"core": core})
        spectra = [torch.linalg.svdvals(W0 - x) for x in plain_projections(W0, core)]
        assert close(*spectra)
        for x in (ours, equations):
            assert torch.linalg.matrix_rank(torch.cat(list(D - x))) == core
    ours, equations = mp.tsv_compress(D, rank=2), plain.tsv_compress(D, rank=2)
    assert close(ours[1], equations[1])
    for u, _, v in (ours, equations):
        assert close(u.mT @ u, torch.eye(2).double().expand(3, 2, 2))
        assert close((u.mT @ D @ v).diagonal(dim1=1, dim2=2), ours[1])


def plain_projections(W0: Tensor, core: int) -> list[Tensor]:
    """W0 on its own core, which both SIFTs leave of W0 minus what they leave of it."""
    return [W0 - sift(W0, W0[None], core=core)[0] for sift in (mp.sift, plain.sift)]


# ---- Worked by hand, since both files could share a misreading -----------------------------------


def test_pact_by_hand():
    """The core is axes 0 and 1. Task 0 changes axis 0 most, so its wall is axis 1; task 1 neither."""
    W0 = torch.diag(torch.tensor([4.0, 3.0, 1.0]).double())
    D = torch.tensor([[[9.0, 1, 0], [0, 0, 0], [0, 0, 0]], [[0, 2, 0], [5, 0, 0], [0, 0, 7.0]]])
    D[0, 0, 1] = 0  # so that the leading direction is exactly an axis
    D[0, 1, 1] = 1
    filtered = plain.pact(W0, D.double(), core=2, task=1)
    # Task 1 leads on axis 2, so both core axes are its wall, and task 0 must leave them.
    assert torch.allclose(filtered[0], torch.zeros(3, 3).double(), atol=1e-12)
    expected = torch.tensor([[0.0, 0, 0], [5, 0, 0], [0, 0, 7]]).double()  # without axis 1
    assert torch.allclose(filtered[1], expected, atol=1e-12)
    half = plain.pact(W0, D.double(), core=2, task=1, strength=0.5)
    assert torch.allclose(half[1], (expected + D[1]) / 2, atol=1e-12)


def test_sift_by_hand():
    W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    D = torch.arange(9.0).view(1, 3, 3)
    assert torch.allclose(plain.sift(W0, D, core=1)[0, :, 0], torch.zeros(3), atol=1e-6)
    assert torch.allclose(plain.sift(W0, D, core=1)[0, :, 1:], D[0, :, 1:], atol=1e-6)


def test_dare_by_hand():
    D = torch.ones(2, 100, 100)
    kept = plain.dare(D, 0.75, generator=rng())
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)
    assert plain.dare(D, 0.75, rescale=False).max() == 1.0


def test_flat_rules_by_hand():
    D = torch.tensor([[4.0, -1.0, 3.0, 0.5, 2.0], [-2.0, -3.0, 5.0, 1.0, -2.0]])
    assert plain.task_arithmetic(D).tolist() == [2.0, -4.0, 8.0, 1.5, 0.0]
    assert plain.task_arithmetic(D, "mean").tolist() == [1.0, -2.0, 4.0, 0.75, 0.0]
    # trimmed to 3 of 5: [4, 0, 3, 0, 2], [-2, -3, 5, 0, -2]
    assert plain.ties(D, 0.6).tolist() == [4.0, -3.0, 4.0, 0.0, 0.0]
    assert plain.ties(D, 0.6, "sum").tolist() == [4.0, -3.0, 8.0, 0.0, 0.0]
    assert plain.ties(D, 0.6, "max").tolist() == [4.0, -3.0, 5.0, 0.0, 0.0]


def test_spectral_rules_by_hand():
    D = torch.zeros(2, 3, 3)
    D[0, 0, 1], D[1, 2, 0] = 5.0, -7.0
    assert torch.allclose(plain.tsv_m(D), D.sum(0), atol=1e-6)
    assert torch.allclose(plain.tsv_m(torch.stack([D[0], D[0]])), D[0], atol=1e-6)
    signs = torch.tensor([[0.0, 1, 0], [0, 0, 0], [-1, 0, 0]])
    assert torch.allclose(plain.iso_c(D), 4 * signs, atol=1e-6)  # (5 + 7 + 0) / 3
    assert torch.allclose(plain.iso_c(D, mean_over="range"), 6 * signs, atol=1e-6)
    assert torch.allclose(plain.iso_cts(D, 1.0), plain.iso_c(D), atol=1e-6)


def test_iso_cts_by_hand():
    """Two directions are common, and each task has one of its own."""
    D = torch.zeros(2, 4, 4)
    D[:, 0, 0], D[:, 1, 1] = 4.0, 3.0  # together 8 and 6
    D[0, 2, 2], D[1, 3, 3] = 1.0, 1.0
    merged = plain.iso_cts(D, common=0.5)
    assert torch.allclose(merged, (8 + 6 + 1 + 1) / 4 * torch.eye(4), atol=1e-6)


def test_an_unknown_mean_over_is_no_other_one():
    for function in (plain.iso_c, plain.iso_cts):
        with pytest.raises(KeyError, match="junk"):
            function(problem(6, 5)[1], mean_over="junk")


def test_compression_by_hand():
    D = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    u, s, v = plain.tsv_compress(D, rank=2)
    assert torch.allclose(s, torch.tensor([[3.0, 2.0]]))
    kept = plain.tsv_decompress(u, s, v)
    assert torch.allclose(kept[0], torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-6)


def test_ranks_by_hand():
    S = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [plain.count(f"energy:{e}", 3, S) for e in (0.6, 0.65, 0.9, 0.95)] == [1, 2, 2, 3]
    assert [plain.count(share, 100, S) for share in (0.05, 0.001, 0.29)] == [5, 1, 29]
    assert plain.count(7, 100, S) == 7


# ---- Whole models --------------------------------------------------------------------------------


SHAPES = {
    "mlp.c_fc.weight": (12, 8),
    "mlp.c_fc.bias": (12,),
    "visual.proj": (8, 6),
    "visual.conv1.weight": (4, 3, 2, 2),
    "token_embedding.weight": (5, 4),
    "bn.running_mean": (4,),
    "logit_scale": (),
    "attn.weight": (6, 6),
    "mlp.wide.weight": (5, 9),
}
DTYPES = {"attn.weight": torch.float64, "mlp.wide.weight": torch.bfloat16}


def model(seed: int, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """With all kinds of tensors, in three floating-point types, and integers."""
    state = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        x = single(*shape, seed=seed + i).to(DTYPES.get(name, torch.float32))
        state[name] = x if base is None else base[name] + 0.05 * x
    return state | {"position_ids": torch.arange(seed, seed + 3)}


BASE = model(0)
TASKS = [model(100 * t, BASE) for t in (1, 2, 3)]


def agree(ours: dict[str, Tensor], equations: dict[str, Tensor], slack: int = 1) -> None:
    """Same names and types, and numbers up to rounding in their type, or `slack` times as much."""
    assert list(ours) == list(equations)
    for name, x in ours.items():
        assert x.dtype == equations[name].dtype, name
        if x.is_floating_point():
            step = slack * (4 * torch.finfo(x.dtype).eps if x.dtype != torch.float64 else 1e-9)
            assert torch.allclose(x, equations[name], rtol=step, atol=step), name
        else:
            assert torch.equal(x, equations[name]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "purify",
    [
        (),
        ("pact",),
        ("sift",),
        ("dare",),
        ("dare", "pact"),
        ("wiener",),
        ("awd",),
        ("wiener", "tatr"),
    ],
)
@pytest.mark.parametrize("vectors", ["auto", "rule", "mean", "copy", 0.3])
def test_whole_merges_agree(rule: str, purify: tuple[str, ...], vectors: str | float):
    options = {"dare": {"p": 0.0}} if "dare" in purify else {}  # masks differ, so none is drawn
    recipe = {"rule": rule, "purify": purify, "vectors": vectors, "options": options}
    # they divide by what a filter cleared
    slack = 16 if rule in ("wudi", "swudi") and purify else 1
    for tasks in (TASKS[:1], TASKS):
        recipe |= data_of(rule, BASE, len(tasks))
        for scale in (0.0, -0.7, 1.3):
            ours = mp.merge(BASE, tasks, scale=scale, **recipe)
            agree(ours, plain.merge(BASE, tasks, scale=scale, **recipe), slack)


def test_options_reach_the_methods():
    options = {"pact": {"core": 3, "task": 2}, "tsv_m": {"rank": 1}}
    recipe = {"rule": "tsv_m", "purify": ["pact"], "scale": 0.8, "options": options}
    found = plain.merge(BASE, TASKS, **recipe)
    agree(mp.merge(BASE, TASKS, **recipe), found)
    default = plain.merge(BASE, TASKS, rule="tsv_m", purify=["pact"], scale=0.8)
    assert not torch.allclose(found["attn.weight"], default["attn.weight"], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_one_type_agree(dtype: torch.dtype):
    cast = [
        {n: x.to(dtype) if x.is_floating_point() else x for n, x in state.items()}
        for state in (BASE, *TASKS)
    ]
    for rule in RULES:
        recipe = {"rule": rule, "purify": ["pact"], "scale": 1.0} | data_of(rule, cast[0], 3)
        agree(mp.merge(cast[0], cast[1:], **recipe), plain.merge(cast[0], cast[1:], **recipe))


@pytest.mark.parametrize("rule", RULES)
def test_models_without_matrices_and_empty_tensors_agree(rule: str):
    shapes = {"scale": (), "none": (0,), "bias": (3,)}
    base, *tasks = ({n: single(*shape, seed=s) for n, shape in shapes.items()} for s in range(4))
    for vectors in ("rule", "mean"):
        recipe = {"rule": rule, "vectors": vectors, "scale": 1.0} | data_of(rule, base, 3)
        agree(mp.merge(base, tasks, **recipe), plain.merge(base, tasks, **recipe))


def test_inputs_of_a_merge_stay_and_results_are_new():
    before = {name: x.clone() for name, x in BASE.items()}
    for scale in (0.0, 1.0):
        merged = plain.merge(BASE, TASKS, rule="ties", scale=scale)
        assert all(torch.equal(before[name], BASE[name]) for name in BASE)
        assert all(merged[name].data_ptr() != BASE[name].data_ptr() for name in BASE)


def test_kinds_agree():
    names = [
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.positional_embedding",
        "visual.proj",
        "model.visual.proj",
        "proj",
        "visual.proj.weight",
        "attn.proj",
        "c_proj",
        "transformer.h.0.attn.c_attn.weight",
        "h.11.mlp.c_proj.weight",
        "h.11.mlp.c_fc.weight",
        "xh.1.mlp.c_fc.weight",
        "h.x.mlp.c_fc.weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "text_projection",
        "text_projection.weight",
        "token_embedding.weight",
        "model.embed_tokens.weight",
        "embeddings.word_embeddings.weight",
        "wte.weight",
        "transformer.wte.weight",
        "lm_head.weight",
        "bn.running_mean",
        "bn.running_var",
        "bn.weight",
        "0.weight",
        "",
    ]
    for name in names:
        for shape in ((), (4,), (4, 4), (2, 2, 2), (0, 3)):
            x = torch.empty(shape)
            assert plain.kind(name, x) == mp.default_policy(name, x), (name, shape)
    assert plain.kind("weight", torch.ones(2, 2, dtype=torch.int32)) == "copy"


# ---- One file to copy ----------------------------------------------------------------------------


def test_it_imports_torch_and_re_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(plain.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported == {"torch", "re"}


@pytest.mark.slow
def test_it_works_alone(tmp_path: Path):
    shutil.copy(Path(plain.__file__), tmp_path / "plain.py")
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'safetensors', 'minipact']))\n"
        "import torch, plain\n"
        "base = {'w': torch.eye(8)}\n"
        "tasks = [{'w': torch.eye(8) + torch.randn(8, 8)} for _ in range(3)]\n"
        "print(plain.merge(base, tasks, rule='tsv_m', purify=['pact'], scale=1.0)['w'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.Size([8, 8])", done.stderr
