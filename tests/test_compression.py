"""Whole models stored with a model per known task: against plain.py, exactness, streams, files, refusals."""

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minipact as mp
from helpers import rng, same, single, small_model, tuned
from minipact import plain
from minipact.checkpoints import sha256
from minipact.compression import touched
from minipact.output import Shelf
from minipact.stored import packed, unpacked

RULES = ("emr", "tall", "tsv_compress")
SHAPES = {
    "mlp.c_fc.weight": (12, 8),
    "mlp.c_fc.bias": (12,),
    "visual.proj": (8, 6),
    "visual.conv1.weight": (4, 3, 2, 2),
    "text_projection": (5, 9),
    "bn.running_mean": (4,),
    "logit_scale": (),
    "empty": (0, 3),
    "wide.weight": (6, 9),
    "coarse.weight": (7, 6),
}
DTYPES = {"wide.weight": torch.float64, "coarse.weight": torch.bfloat16}


def model(seed: int, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """With all kinds of tensors, in three floating-point types, and integers."""
    state = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        x = single(*shape, seed=seed + i).to(DTYPES.get(name, torch.float32))
        state[name] = x if base is None else base[name] + 0.05 * x
    return state | {"position_ids": torch.arange(3), "steps": torch.tensor(7)}


BASE = model(0)
TASKS = {name: model(100 * t, BASE) for t, name in enumerate(("cars", "dtd", "signs"), 1)}
CASES = [
    ("emr", {}), ("emr", {"rescale": "tensor_mean"}), ("tall", {}), ("tall", {"lambdas": 0.2}),
    ("tall", {"lambdas": [0.2, 0.4, 0.6]}), ("tall", {"merged": "ties"}),
    ("tall", {"merged": "ties", "density": 0.5, "lambdas": 0.1}), ("tsv_compress", {}),
    ("tsv_compress", {"rank": 1}), ("tsv_compress", {"rank": 0.5}),
    ("tsv_compress", {"rank": "energy:0.8"}),
]  # fmt: skip


def served(rule: str, tasks=TASKS, base=BASE, **options) -> dict[str, dict[str, Tensor]]:
    """The model of each task, out of what is stored."""
    stored = mp.compress(base, tasks, rule=rule, options={rule: options} if options else None)
    return {task: dict(stored.model(task)) for task in stored.tasks}


# ---- The same as the equations -------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_whole_models_agree_with_plain(rule: str, options: dict):
    ours = served(rule, **options)
    equations = plain.serve(BASE, list(TASKS.values()), rule=rule, options={rule: options})
    for found, expected in zip(ours.values(), equations, strict=True):
        assert list(found) == list(expected)
        for name, x in expected.items():
            assert found[name].dtype == x.dtype
            if x.is_floating_point():  # bfloat16 rounds what is stored, too
                step = 4e-2 if x.dtype == torch.bfloat16 else 1e-5
                assert torch.allclose(found[name], x, rtol=step, atol=step / 10), name
            else:
                assert torch.equal(found[name], x), name


def test_lambdas_by_name():
    by_name = {"signs": 0.6, "cars": 0.2, "dtd": 0.4}
    ours, listed = served("tall", lambdas=by_name), served("tall", lambdas=[0.2, 0.4, 0.6])
    assert all(same(ours[task], listed[task]) for task in TASKS)
    with pytest.raises(mp.MergeError, match="tall.lambdas must give a value for each of 'cars'"):
        served("tall", lambdas={"cars": 0.2})


def test_two_tensors_by_hand():
    """The global ratio is over the whole model, that of means counts both tensors alike."""
    base = {"a": torch.zeros(1), "b": torch.zeros(4)}
    tasks = {
        "x": {"a": torch.tensor([2.0]), "b": torch.ones(4)},
        "y": {"a": torch.tensor([-1.0]), "b": 3 * torch.ones(4)},
    }
    for rescale, ratio in (("global", 6 / 14), ("tensor_mean", 3 / 5)):
        found = served("emr", tasks, base, rescale=rescale)["x"]
        assert found["a"].item() == pytest.approx(2 * ratio)
        assert found["b"].tolist() == pytest.approx([3 * ratio] * 4)


# ---- Exactness -----------------------------------------------------------------------------------


def dyadic(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model with entries that are multiples of 1/64, whose differences float32 holds."""
    return {n: (64 * x).round() / 64 if x.is_floating_point() else x for n, x in state.items()}


@pytest.mark.parametrize("rule", ["emr", "tall"])
def test_one_task_comes_back_to_the_bit(rule: str):
    base, task = dyadic(small_model(0)), dyadic(small_model(9))
    assert same(served(rule, {"only": task}, base)["only"], task)


@pytest.mark.parametrize("rule", RULES)
def test_one_task_comes_back_up_to_rounding(rule: str):
    found = served(rule, {"cars": TASKS["cars"]})["cars"]
    for name, x in TASKS["cars"].items():
        step = 1e-2 if x.dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(found[name], x, rtol=step, atol=step), name


def test_tsv_compress_is_exact_at_full_rank_and_keeps_vectors_to_the_bit():
    for rank in (99, "energy:1"):
        for task, found in served("tsv_compress", rank=rank).items():
            for name, x in TASKS[task].items():
                assert torch.allclose(found[name], x, rtol=1e-2, atol=1e-2), name
                if x.dtype in (torch.float32, torch.float64):
                    assert torch.allclose(found[name], x, rtol=1e-6, atol=1e-6), name
                if x.ndim != 2:
                    assert torch.equal(found[name], x), name


@pytest.mark.parametrize("rule", RULES)
def test_statistics_of_batch_normalisation_are_each_task_s_own(rule: str):
    name = "bn.running_mean"
    assert all(torch.equal(x[name], TASKS[task][name]) for task, x in served(rule).items())


def test_a_base_of_halves_keeps_halves():
    base = {n: x.half() for n, x in small_model(0).items() if x.is_floating_point()}
    task = {n: (x.float() * 1.01).half() for n, x in base.items()}
    for rule in ("emr", "tall"):
        stored = mp.compress(base, {"only": task}, rule=rule)
        assert same(dict(stored.model("only")), task), "differences of halves near by are halves"
        kinds = {x.dtype for name, x in stored.parts.items() if name != "rescalers"}
        assert kinds == {torch.float16, torch.uint8}


def test_parts_beside_a_base_of_eight_bits_have_two_bytes():
    base = {"w": single(8, 8).to(torch.float8_e4m3fn)}
    tasks = {
        t: {"w": (base["w"].float() + single(8, 8, seed=i)).to(torch.float8_e4m3fn)}
        for i, t in enumerate("ab", 1)
    }
    stored = mp.compress(base, tasks, rule="tall")
    assert stored.parts["merged/w"].dtype == torch.bfloat16
    assert stored.model("a")["w"].dtype == torch.float8_e4m3fn


# ---- A lazy mapping ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_model_is_a_mapping_like_a_merge(rule: str):
    before = {n: x.clone() for n, x in BASE.items()}
    stored = mp.compress(BASE, TASKS, rule=rule)
    found = stored.model("dtd")
    assert list(found) == list(BASE) == list(dict(found))
    assert len(found) == len(BASE)
    assert "logit_scale" in found
    assert "nothing" not in found
    with pytest.raises(KeyError):
        found["nothing"]
    for name, x in found.items():
        assert found.meta(name).device.type == "meta"
        assert (found.meta(name).shape, found.meta(name).dtype) == (x.shape, x.dtype)
        delta = found.delta(name)
        if name in ("position_ids", "steps", "empty"):
            assert delta is None
            assert torch.equal(x, BASE[name])
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            assert delta.dtype == wide
            assert torch.equal((BASE[name].to(wide) + delta).to(x), x)
        x.add_(1)  # it is the caller's
    assert same(BASE, before)
    assert torch.equal(found["logit_scale"], stored.model("dtd")["logit_scale"])


def test_what_is_stored_can_be_merged():
    stored = mp.compress(BASE, TASKS, rule="emr")
    lazy = {task: stored.model(task) for task in TASKS}
    whole = {task: dict(x) for task, x in lazy.items()}
    ours, expected = (mp.merge(BASE, tasks, rule="tsv_m") for tasks in (lazy, whole))
    for name, x in expected.items():
        assert torch.allclose(ours[name].double(), x.double(), atol=2e-2), name


def test_tasks_in_a_list_are_called_by_their_numbers():
    assert mp.compress(BASE, list(TASKS.values())).tasks == ("0", "1", "2")


@pytest.mark.parametrize("rule", RULES)
def test_bytes_are_those_of_the_tensors(rule: str, tmp_path: Path):
    stored = mp.compress(BASE, TASKS, rule=rule)
    stored.save(tmp_path / "all.safetensors")
    held = load_file(tmp_path / "all.safetensors")
    assert stored.bytes == sum(x.nbytes for x in held.values())
    assert stored.bytes_apart == 4 * sum(x.nbytes for x in BASE.values())


def test_masks_take_a_bit_for_an_entry():
    base = {"w": single(100, 101)}
    tasks = {t: tuned(base, i) for i, t in enumerate("abcdefgh")}
    for rule in ("emr", "tall"):
        stored = mp.compress(base, tasks, rule=rule)
        masks = [x for name, x in stored.parts.items() if name.startswith("masks/")]
        assert [x.shape for x in masks] == [(1263,)] * 8  # 10100 / 8, rounded up
        assert stored.bytes < 0.26 * stored.bytes_apart


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 7), (0,), (2, 0)])
def test_bits_come_back(shape: tuple[int, ...]):
    mask = torch.rand(shape, generator=rng(1)) > 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape), mask)
    assert packed(torch.tensor([True] + [False] * 8)).tolist() == [128, 0]


# ---- Streams, threads, orders --------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_threads_and_orders_do_not_change_a_bit(rule: str, options: dict):
    """Of the tasks, but for lambdas in a list, and of the tensors."""
    how = {"rule": rule, "options": {rule: options}, "threads": 1}
    expected = mp.compress(BASE, TASKS, **how)
    turned = {task: dict(reversed(TASKS[task].items())) for task in reversed(TASKS)}
    for other in (
        mp.compress(BASE, TASKS, **how | {"threads": 3}),
        mp.compress(dict(reversed(BASE.items())), turned, **how),
    ):
        assert same(other.parts, expected.parts)
        assert other.record == expected.record


def test_sketches_repeat_by_seed():
    def parts(seed: int) -> Mapping[str, Tensor]:
        options = {"tsv_compress": {"svd": "randomized", "rank": 2}}
        return mp.compress(BASE, TASKS, rule="tsv_compress", options=options, seed=seed).parts

    assert same(parts(1), parts(1))
    assert not same(parts(1), parts(2))


class Counted(Mapping[str, Tensor]):
    """A model that makes a tensor at every access, and counts how many are alive at once."""

    alive: ClassVar[list[weakref.ref]] = []
    most: ClassVar[int] = 0

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.names = seed, [f"{i}.w" for i in range(count)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def meta(self, name: str) -> Tensor:
        return torch.empty(20, 10, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        x = single(20, 10, seed=self.seed + 10 * self.names.index(name))
        Counted.alive = [ref for ref in Counted.alive if ref() is not None]
        Counted.alive.append(weakref.ref(x))
        Counted.most = max(Counted.most, len(Counted.alive))
        return x


@pytest.mark.parametrize("rule", RULES)
def test_models_stream(rule: str, tmp_path: Path):
    """Alive at once are a few tensors of each model, not all forty."""
    Counted.alive, Counted.most = [], 0
    tasks = {name: Counted(i, 40) for i, name in enumerate("abc", 1)}
    done = []
    stored = mp.compress(
        Counted(0, 40), tasks, rule=rule, shelf=lambda: Shelf(tmp_path),
        progress=lambda *told: done.append(told),
    )  # fmt: skip
    stored.save(tmp_path / "all.safetensors")
    assert Counted.most <= 12
    assert [number for number, _, _ in done] == list(range(1, 41))
    again = mp.open_stored(tmp_path / "all.safetensors")
    for task in tasks:
        assert same(dict(again.model(task)), dict(stored.model(task)))


# ---- Degenerate input ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_what_no_task_changes_takes_nothing(rule: str):
    tasks = {t: x | {"visual.proj": BASE["visual.proj"]} for t, x in TASKS.items()}
    stored = mp.compress(BASE, tasks, rule=rule)
    assert not [name for name in stored.parts if name.endswith("visual.proj")]
    assert stored.treatment("visual.proj") == "as in the base"
    for task in tasks:
        assert torch.equal(stored.model(task)["visual.proj"], BASE["visual.proj"])
        assert stored.model(task).delta("visual.proj") is None


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_equals_the_base_in_one_tensor_keeps_it(rule: str):
    tasks = TASKS | {"dtd": TASKS["dtd"] | {"mlp.c_fc.weight": BASE["mlp.c_fc.weight"]}}
    found = served(rule, tasks)
    assert torch.equal(found["dtd"]["mlp.c_fc.weight"], BASE["mlp.c_fc.weight"])
    assert not torch.equal(found["cars"]["mlp.c_fc.weight"], BASE["mlp.c_fc.weight"])


@pytest.mark.parametrize("rule", RULES)
def test_zero_matrices_of_base_and_task(rule: str):
    base = {"w": torch.zeros(6, 5), "b": torch.zeros(5)}
    tasks = {
        "a": {"w": single(6, 5), "b": single(5)},
        "b": {"w": torch.zeros(6, 5), "b": single(5, seed=3)},
    }
    found = served(rule, tasks, base)
    assert not found["b"]["w"].any()
    assert found["a"]["w"].any()
    assert served(rule, {"a": tasks["a"]}, base)["a"]["w"].any()


def test_excluded_tensors_and_those_a_task_lacks_stay_as_in_the_base():
    stored = mp.compress(BASE, TASKS, exclude="*.bias", rule="tall")
    assert torch.equal(stored.model("cars")["mlp.c_fc.bias"], BASE["mlp.c_fc.bias"])
    assert stored.record["recipe"]["exclude"] == ["*.bias"]
    part = {n: x for n, x in TASKS["cars"].items() if n != "visual.proj"}
    stored = mp.compress(BASE, TASKS | {"cars": part}, missing="base")
    assert torch.equal(stored.model("cars")["visual.proj"], BASE["visual.proj"])
    other = {f"net.{n}": x for n, x in TASKS["cars"].items()}
    stored = mp.compress(BASE, TASKS | {"cars": other})
    assert same(dict(stored.model("cars")), served("emr")["cars"])
    assert "'net.' is taken off" in stored.notes[0]


def test_buffers_stay_as_in_the_base():
    assert touched("attn.inv_freq", torch.ones(4)) == "copy"
    assert touched("bn.running_var", torch.ones(4)) == "vector"


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_files_hold_the_same_models(rule: str, options: dict, with_base: bool, tmp_path: Path):
    stored = mp.compress(BASE, TASKS, rule=rule, options={rule: options})
    file = tmp_path / "all.safetensors"
    assert stored.save(file, with_base=with_base) == [file]
    assert [x.name for x in tmp_path.iterdir()] == [file.name]
    found = mp.open_stored(file, None if with_base else BASE)
    assert (found.rule, found.tasks, found.record) == (rule, tuple(TASKS), stored.record)
    assert found.bytes == stored.bytes
    for task in TASKS:
        ours, expected = found.model(task), stored.model(task)
        assert same(dict(ours), dict(expected))
        assert all(ours.meta(name).dtype == x.dtype for name, x in BASE.items())
    before = sha256(file)
    stored.save(file, with_base=with_base, overwrite=True)
    assert sha256(file) == before, "the same bytes again"
    if with_base:
        mp.open_stored(file, BASE)


def test_a_file_without_its_base_takes_it_from_a_file(tmp_path: Path):
    save_file(BASE, tmp_path / "base.safetensors")
    stored = mp.compress(BASE, TASKS)
    stored.save(tmp_path / "all.safetensors", with_base=False)
    found = mp.open_stored(tmp_path / "all.safetensors", tmp_path / "base.safetensors")
    assert same(dict(found.model("signs")), dict(stored.model("signs")))
    sizes = [(tmp_path / f"{x}.safetensors").stat().st_size for x in ("all", "base")]
    stored.save(tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").stat().st_size > sizes[0]


def test_the_record_says_what_was_done():
    record = mp.compress(BASE, TASKS, options={"emr": {"rescale": "tensor_mean"}}).record
    assert record["recipe"]["rule"] == "emr"
    assert record["recipe"]["options"] == {"emr": {"rescale": "tensor_mean"}}
    assert record["tasks"] == ["cars", "dtd", "signs"]
    assert len(record["base"]) == 64
    assert record["versions"]["minipact"] == mp.__version__
    changed = BASE | {"logit_scale": BASE["logit_scale"] + 1}
    assert mp.compress(changed, TASKS).record["base"] != record["base"]


@pytest.mark.slow
def test_any_damaged_header_is_read_or_refused(tmp_path: Path):
    """A byte of the header changed, three hundred times: the models, or one of the package's errors."""
    file = tmp_path / "all.safetensors"
    base = {"w": single(4, 4), "b": single(3)}
    tasks = {t: tuned(base, i) for i, t in enumerate("ab", 1)}
    mp.compress(base, tasks).save(file)
    whole = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    places = torch.randint(8, length, (300,), generator=rng(3)).tolist()
    values = torch.randint(32, 127, (300,), generator=rng(4)).tolist()
    refused = 0
    for place, value in zip(places, values, strict=True):
        damaged = whole.copy()
        damaged[place] = value
        file.write_bytes(damaged)
        try:
            stored = mp.open_stored(file)
            assert all(len(dict(stored.model(task))) >= 1 for task in stored.tasks)
        except (mp.CheckpointError, mp.MergeError):
            refused += 1
    assert 100 < refused < 300


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "ties"}, "rule of compress 'ties' is unknown: use 'tsv_compress', 'tall', 'emr'"),
        ({"options": {"tall": {}}}, "options for 'tall' is unknown: use 'emr'"),
        ({"options": {"emr": {"scale": 1}}}, "emr option 'scale' is unknown: use 'rescale'"),
        ({"options": {"emr": {"rescale": "no"}}}, "emr rescale 'no' is unknown"),
        ({"rule": "tall", "options": {"tall": {"lambdas": -1}}}, "tall: lambdas=-1 do not fit"),
        ({"rule": "tall", "options": {"tall": {"lambdas": [1, 2]}}}, "each of the 3 tasks"),
        (
            {"rule": "tall", "options": {"tall": {"merged": "ties", "density": "x"}}},
            "tall.density='x' must be a number",
        ),
        ({"rule": "tsv_compress", "options": {"tsv_compress": {"rank": 1.5}}}, "rank 1.5 does not"),
        ({"missing": "present"}, "missing 'present' is unknown: use 'error', 'base'"),
        ({"include": "nothing"}, "include 'nothing' matches no tensor name"),
        ({"tasks": {"a/b": TASKS["cars"]}}, "a task cannot be called 'a/b', with a slash"),
        ({"tasks": {}}, "at least one"),
        ({"tasks": TASKS | {"same": BASE}}, "task 'same' equals the base"),
        (
            {"tasks": {"a": TASKS["cars"] | {"visual.proj": torch.ones(2, 2)}}},
            "task 'a': 'visual.proj'",
        ),
        (
            {"tasks": {"a": TASKS["cars"] | {"logit_scale": torch.tensor(torch.nan)}}},
            "'logit_scale' of task 'a' holds NaN",
        ),
        ({"tasks": {"a": TASKS["cars"] | {"steps": torch.tensor(8)}, "b": TASKS["dtd"]}}, None),
    ],
)
def test_bad_input_is_refused(change: dict, message: str | None):
    given = {"base": BASE, "tasks": TASKS, "rule": "emr"} | change
    if message is None:  # a counter is a known buffer
        assert mp.compress(**given).model("a")["steps"].item() == 7
        return
    with pytest.raises(mp.MergeError, match=message):
        mp.compress(**given)


def test_what_overflows_the_base_s_type_is_refused():
    base = {"w": torch.zeros(2, 2).half(), "b": torch.ones(2)}
    tasks = {
        t: {"w": torch.full((2, 2), 5e4).half(), "b": single(2, seed=i)} for i, t in enumerate("ab")
    }
    with pytest.raises(mp.MergeError, match="'merged/w' overflows torch.float16: convert the base"):
        mp.compress(base, tasks, rule="tall")


def test_an_unknown_task_is_told_the_known_ones():
    stored = mp.compress(BASE, TASKS)
    with pytest.raises(mp.MergeError, match="task 'car' is unknown: use 'cars', 'dtd', 'signs'"):
        stored.model("car")


def rewritten(file: Path, change) -> None:
    """The file with other tensors or another header, as `change(tensors, metadata)` leaves them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def told(**changes):
    """A change of the record in the header."""

    def change(_: dict, metadata: dict) -> None:
        metadata["per_task"] = json.dumps(json.loads(metadata["per_task"]) | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, m: m.pop("per_task"),
            "holds no models by task: give one that minipact compress",
        ),
        (lambda t, m: m.update(per_task="{"), "its record cannot be read"),
        (lambda t, m: m.update(per_task="[]"), "its record cannot be read"),
        (told(tasks=[]), "its record is not one of minipact compress"),
        (told(tasks=[1]), "its record is not one of minipact compress"),
        (told(recipe={"rule": ["emr"]}), "its record is not one of minipact compress"),
        (told(aliases={"tied": 3}), "its record is not one of minipact compress"),
        (told(aliases={"tied": "gone"}), "its base lacks 'gone'"),
        (told(aliases=7), "its record cannot be read"),
        (
            told(recipe={"rule": "later"}),
            "stored by 'later', and this minipact .* take a newer one",
        ),
        (
            lambda t, m: t.pop("masks/dtd/visual.proj"),
            "lacks 'masks/dtd/visual.proj': copy it again",
        ),
        (lambda t, m: t.pop("unified/visual.proj"), "lacks 'unified/visual.proj'"),
        (lambda t, m: t.pop("full/dtd/bn.running_mean"), "lacks 'full/dtd/bn.running_mean'"),
        (lambda t, m: t.pop("rescalers"), "lacks 'rescalers'"),
        (lambda t, m: t.update(rescalers=torch.ones(2)), "'rescalers' must be one a task"),
        (
            lambda t, m: t.pop("base/visual.proj"),
            "'unified/visual.proj' belong to no tensor of the",
        ),
        (lambda t, m: t.update({"masks/dtd/visual.proj": torch.ones(5).byte()}), "do not fit the"),
        (lambda t, m: t.update({"unified/visual.proj": torch.ones(3, 3)}), "do not fit the base's"),
        (
            lambda t, m: t.update({"full/dtd/bn.running_mean": torch.ones(3)}),
            "'full/dtd/bn.running_mean' is not like the base's",
        ),
        (
            lambda t, m: [t.pop(n) for n in list(t) if n.startswith("base/")],
            "holds no base: give the",
        ),
    ],
)
def test_damaged_files_are_refused(change, message: str, tmp_path: Path):
    file = tmp_path / "all.safetensors"
    mp.compress(BASE, TASKS).save(file)
    rewritten(file, change)
    with pytest.raises(mp.CheckpointError, match=message) as caught:
        mp.open_stored(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("part", ["U", "S", "V"])
def test_damaged_factors_are_refused(part: str, tmp_path: Path):
    file = tmp_path / "all.safetensors"
    mp.compress(BASE, TASKS, rule="tsv_compress").save(file)
    rewritten(file, lambda t, m: t.update({f"{part}/dtd/visual.proj": torch.ones(7, 3)}))
    with pytest.raises(mp.CheckpointError, match="do not fit the base's 'visual.proj'"):
        mp.open_stored(file)


def test_cut_files_are_refused(tmp_path: Path):
    file = tmp_path / "all.safetensors"
    mp.compress(BASE, TASKS).save(file)
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(mp.CheckpointError, match="all.safetensors is no whole|all.safetensors"):
            mp.open_stored(file)


def test_another_base_is_refused(tmp_path: Path):
    file = tmp_path / "all.safetensors"
    other = tmp_path / "other.safetensors"
    save_file(TASKS["cars"], other)
    for with_base in (True, False):
        mp.compress(BASE, TASKS).save(file, with_base=with_base, overwrite=True)
        with pytest.raises(mp.CheckpointError, match=f"{other} is not the base that {file}"):
            mp.open_stored(file, other)
        with pytest.raises(mp.CheckpointError, match=f"the base given is not the base that {file}"):
            mp.open_stored(file, TASKS["cars"])


def test_outputs_that_cannot_be_are_refused(tmp_path: Path):
    stored = mp.compress(BASE, TASKS)
    with pytest.raises(mp.CheckpointError, match="folder: .*end it in .safetensors"):
        stored.save(tmp_path / "folder")
    (tmp_path / "there.safetensors").write_bytes(b"x")
    with pytest.raises(mp.CheckpointError, match=r"there.safetensors exists: .*--overwrite"):
        stored.save(tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == b"x"
