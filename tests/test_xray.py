"""X-ray: numbers against hand and against the public functions, the page, the command line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import minipact as mp
from helpers import ROOT, contents, normal
from minipact.__main__ import main
from minipact.xray import xray
from minipact.xray_page import merge_command, number, render, scale_of

HOSTILE = '<img src=x onerror="alert(1)">&\'name'
VOID = {"meta", "rect", "path", "wbr", "br", "img"}


def noise(seed: int, *shape: int) -> Tensor:
    return normal(*shape, seed=seed)


def models(tasks: int = 3, m: int = 24, n: int = 20) -> tuple[dict, dict]:
    base = {"a.0.w": noise(0, m, n), "a.1.w": noise(1, m, n), "visual.proj": noise(2, n, m),
            "bias": noise(3, m), "steps": torch.tensor(3)}  # fmt: skip
    tuned = {}
    for t in range(tasks):
        g = 10 * (t + 1)
        tuned[f"task{t}"] = {
            name: x + 0.1 * noise(g + i, *x.shape) if x.is_floating_point() else x
            for i, (name, x) in enumerate(base.items())
        }
    return base, tuned


def one(W0: Tensor, *deltas: Tensor, **settings) -> dict:
    """Report on a model of one matrix."""
    return xray({"w": W0}, {f"t{i}": {"w": W0 + d} for i, d in enumerate(deltas)}, **settings)


# ---- Numbers by hand -----------------------------------------------------------------------------


def unit(n: int, i: int, j: int) -> Tensor:
    x = torch.zeros(n, n, dtype=torch.float64)
    x[i, j] = 1
    return x


W0 = torch.diag(torch.tensor([8, 7, 1, 0.9, 0.8, 0.7], dtype=torch.float64))


def test_updates_inside_and_outside_of_the_core():
    """Core: inputs 0 and 1 of 6. The first update acts on input 0, the second one on input 4."""
    report = one(W0, unit(6, 3, 0), 2 * unit(6, 1, 4), core=2, task=1)
    layer = report["layers"][0]
    assert layer["intrusion"] == pytest.approx([1, 0], abs=1e-12)
    assert layer["core_chance"] == pytest.approx(2 / 6)
    assert layer["enrichment"] == pytest.approx(0.5 * 6 / 2)
    # Walls: input 1 for the first task, whose update is input 0; inputs 0 and 1 for the second.
    hidden = report["pairs"]["hidden_interference"]
    assert hidden["values"] == [pytest.approx([0, 1], abs=1e-12), pytest.approx([0, 0], abs=1e-12)]
    assert hidden["chance"] == pytest.approx((1 + 2) / 2 / 6)
    assert report["pairs"]["wall_similarity"]["values"][0][1] == pytest.approx(1)
    # The shield of each is the wall of the other: the first loses all, the second nothing.
    assert layer["shield"] == [2, 1]
    assert layer["removed"] == pytest.approx([1, 0], abs=1e-12)
    rows = report["per_task"]
    assert rows["t1"]["norm"] == pytest.approx(2)
    assert rows["t1"]["norm_ratio"] == pytest.approx(2 / W0.norm().item())
    assert (rows["t0"]["inflicts"], rows["t1"]["suffers"]) == pytest.approx((1, 1))
    assert rows["t0"]["shield_chance"] == pytest.approx(2 / 6)
    found = [(row["intrusion"], row["enrichment"], row["removed"]) for row in rows.values()]
    assert found == [pytest.approx((1, 3, 1)), pytest.approx((0, 0, 0), abs=1e-12)]
    # Squares 64, 49, ...: the first holds 64 of 115.9, more than half.
    assert (layer["core_half"], layer["task_half"]) == (1, [1, 1])


def test_what_the_filter_would_remove():
    """Both tasks sit at (0, 0): own need 2 + 1 and claims 2 on either side keep 1 / (1 + 30 (2/3)^2)."""
    corner = unit(2, 0, 0)
    found = one(torch.eye(2), corner, 3 * corner, core=1, task=1, wiener=True)
    wanted = 1 - (1 / (1 + 30 * 4 / 9)) ** 2
    assert found["layers"][0]["filtered"] == pytest.approx([wanted] * 2)
    assert found["per_task"]["t1"]["filtered"] == pytest.approx(wanted)
    assert f"{100 * wanted:.1f}" in render(found)
    unasked = one(torch.eye(2), corner, corner.T + unit(2, 1, 1), core=1, task=1)
    assert unasked["summary"]["filtered"] is None


def test_scalars_and_empty_tensors_count_for_what_they_are():
    """A logit scale without dimensions, as CLIP has it; its change is one more entry of the norm."""
    plain = {"w": normal(5, 4)}
    base = plain | {"logit_scale": torch.tensor(1.0), "none": torch.zeros(0, 4)}
    states = [
        {
            name: x + (i + 1 if x.ndim == 0 else 0.1 * normal(*x.shape, seed=i))
            for name, x in base.items()
        }
        for i in range(2)
    ]
    whole = xray(base, dict(enumerate_named(states)))
    matrix = xray(plain, {name: {"w": x["w"]} for name, x in enumerate_named(states)})
    for i, (name, _) in enumerate(enumerate_named(states)):
        found, alone = (report["per_task"][name]["norm"] for report in (whole, matrix))
        assert found**2 == pytest.approx(alone**2 + (i + 1) ** 2)


def enumerate_named(states: list) -> list:
    return [(f"t{i}", state) for i, state in enumerate(states)]


def test_half_of_the_energy():
    W = torch.diag(torch.tensor([3, 3, 3, 2, 2], dtype=torch.float64))  # squares 9, 18 of 35
    report = one(W, W, 2 * W.flip(0), core=1, task=1)
    assert report["layers"][0]["core_half"] == 2
    assert report["layers"][0]["task_half"] == [2, 2]
    assert report["groups"][0]["core_half"] == pytest.approx(0.4)


def test_signs_by_hand():
    a = torch.tensor([[1.0, -2, 3, 0], [0.1, 0.1, 0.1, 9]])
    b = torch.tensor([[1.0, 2, -3, 5], [0.1, 0.1, 0.1, 8]])
    report = one(torch.eye(2, 4), a, b, core=1, task=1)
    # Seven entries were changed by both, in two of them the signs differ; the largest fifth is 1 of 8.
    assert report["pairs"]["sign_conflict"]["values"][0][1] == pytest.approx(2 / 7)
    assert report["pairs"]["sign_conflict_large"]["values"][0][1] == 0
    assert report["pairs"]["sign_conflict"]["values"][0][0] == 0
    assert report["layers"][0]["sign_conflict"] == pytest.approx(2 / 7)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert report["pairs"]["cosine"]["mean"] == pytest.approx(float(cosine), rel=1e-5)


def test_report_agrees_with_the_public_functions():
    base, tasks = models()
    report = xray(base, tasks, core=4, task=3)
    assert report["tasks"] == list(tasks)
    assert report["counts"] == {"matrices": 3, "vectors": 1, "copied": 1}
    similarity, hidden = [], []
    for layer in report["layers"]:
        W = base[layer["name"]]
        D = torch.stack([task[layer["name"]] - W for task in tasks.values()])
        if layer["name"] == "visual.proj":  # stored for x @ W
            W, D = W.mT, D.mT
        assert layer["shape"] == list(W.shape)
        settings = {"core": 4, "task": 3}
        assert layer["intrusion"] == pytest.approx(mp.intrusion_energy(W, D, core=4).tolist())
        assert layer["sti"] == pytest.approx(mp.singular_task_interference(D, rank=3))
        similarity.append(mp.lbw_similarity(W, D, **settings))
        hidden.append(mp.hidden_interference(W, D, **settings))
        kept = mp.pact(W, D, **settings).square().sum((1, 2)) / D.square().sum((1, 2))
        assert layer["removed"] == pytest.approx((1 - kept).tolist())
        widths = [mp.shield_basis(W, D, j, **settings).shape[1] for j in range(3)]
        assert layer["shield"] == widths
    for key, parts in (("wall_similarity", similarity), ("hidden_interference", hidden)):
        expected = torch.stack(parts).mean(0)
        found = torch.tensor(report["pairs"][key]["values"], dtype=torch.float64)
        assert torch.allclose(found, expected, atol=1e-9)
    vectors = [mp.task_vector(base, task) for task in tasks.values()]
    assert report["per_task"]["task1"]["norm"] == pytest.approx(vectors[1].norm())
    assert report["pairs"]["cosine"]["values"][0][2] == pytest.approx(vectors[0].cosine(vectors[2]))
    share = sum(float(vectors[0][name].square().sum()) for name in base if name[0] in "av")
    assert report["per_task"]["task0"]["matrix_share"] == pytest.approx(
        share / vectors[0].norm() ** 2
    )


def test_random_updates_are_at_chance():
    report = one(noise(0, 96, 96), *(noise(i, 96, 96) for i in range(1, 5)), core=8, task=8)
    pairs, layer = report["pairs"], report["layers"][0]
    assert layer["enrichment"] == pytest.approx(1, abs=0.1)
    assert layer["sti_ratio"] == pytest.approx(1, abs=0.1)
    assert pairs["sign_conflict"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert pairs["wall_similarity"]["mean"] == pytest.approx(
        pairs["wall_similarity"]["chance"], abs=0.05
    )
    hidden = pairs["hidden_interference"]
    assert hidden["mean"] == pytest.approx(hidden["chance"], abs=0.03)
    assert layer["removed"] == pytest.approx([layer["shield_chance"]] * 4, abs=0.05)


def test_randomized_is_close_and_repeats():
    base, tasks = models(m=64, n=48)
    spectrum = torch.diag(1 / torch.arange(1, 49, dtype=torch.float64))
    base["a.0.w"] = noise(5, 64, 48) @ spectrum
    tasks = {t: x | {"a.0.w": base["a.0.w"] + noise(i, 64, 48) @ spectrum.flip(0)}
             for i, (t, x) in enumerate(tasks.items(), 50)}  # fmt: skip
    exact, fast, again = (
        xray(base, tasks, include="a.0.w", svd=svd) for svd in ("exact", "randomized", "randomized")
    )
    assert fast == again
    for key in ("intrusion", "removed"):
        assert fast["layers"][0][key] == pytest.approx(exact["layers"][0][key], abs=0.01)


def test_layers_of_one_kind_share_a_glob():
    base, tasks = models()
    groups = {g["pattern"]: g["layers"] for g in xray(base, tasks)["groups"]}
    assert groups == {"a.*.w": 2, "visual.proj": 1}


def test_undefined_numbers_are_none_and_odd_matrices_left_out():
    base, tasks = models()
    base["zero"] = torch.zeros(4, 4)
    base["same"] = noise(9, 4, 4)
    for i, task in enumerate(tasks.values()):
        task["zero"], task["same"] = torch.ones(4, 4), base["same"]
        if i == 0:
            task["a.0.w"] = base["a.0.w"]
    report = xray(base, tasks)
    json.dumps(report, allow_nan=False)
    assert report["layers"][0]["intrusion"][0] is None
    assert {row["name"]: row["why"] for row in report["skipped"]} == {
        "zero": "it is zero in the base, so it has no core",
        "same": "no task changed it",
    }
    assert "–" in render(report)


def test_half_precision_is_told():
    base, tasks = models()
    assert xray(base, tasks)["warnings"] == []
    base["a.0.w"] = base["a.0.w"].bfloat16()
    report = xray(base, tasks)
    assert [text.startswith("The base is stored in half") for text in report["warnings"]] == [True]
    assert report["warnings"][0] in render(report)


ADVICE = re.compile(r"advi[cs]e|recommend|suggest|\btry\b|should|--purify|--rule|--set")


def words_of(value: object) -> list[str]:
    """Keys and texts of a report."""
    if isinstance(value, dict):
        return [*value, *(word for x in value.values() for word in words_of(x))]
    if isinstance(value, list):
        return [word for x in value for word in words_of(x)]
    return [value] if isinstance(value, str) else []


def test_there_is_no_advice():
    crowded = [noise(0, 20, 20), *(noise(i, 20, 20) for i in range(1, 5))]
    core = [W0, unit(6, 3, 0), unit(6, 1, 0)]
    for matrices, rank in ((crowded, {"core": 6, "task": 5}), (core, {"core": 1, "task": 1})):
        report = one(*matrices, **rank) | {"base": "base", "given": ["a", "b"], "entry": None}
        told = [*words_of(report), render(report)]
        assert not [found for text in told for found in ADVICE.findall(text)]


def test_half_of_a_random_square_matrix_is_as_the_page_says():
    report = one(noise(0, 200, 200), noise(1, 200, 200), noise(2, 200, 200))
    assert report["groups"][0]["core_half"] == pytest.approx(0.18, abs=0.01)
    assert report["per_task"]["t0"]["half"] == pytest.approx(0.18, abs=0.01)
    assert "18 % in a random square matrix" in " ".join(render(report).split())


def test_one_task_alone():
    base, tasks = models(1)
    report = xray(base, tasks)
    assert report["pairs"]["cosine"]["mean"] is None
    assert report["layers"][0]["shield"] == [0]
    assert "nothing to collide with" in render(report)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda b, t: t["task0"].pop("bias"), {}, "task 'task0' lacks 'bias'"),
        (lambda b, t: t.update(task1=dict(b)), {}, "task 'task1' equals the base"),
        (lambda b, t: t["task2"].update(bias=b["bias"] * torch.nan), {}, "NaN or infinity"),
        (None, {"include": "bias"}, "no matrix to look into"),
        (None, {"include": "nothing"}, "matches no tensor name"),
        (None, {"core": 0}, "core=0"),
        (None, {"task": 1.5}, "1.5"),
        (None, {"core": 99}, "99"),
        (None, {"core": "energy:0.5", "svd": "randomized"}, "exact"),
        (None, {"svd": "quick"}, "svd 'quick' is unknown"),
        (None, {"tol": 1.0}, "tol=1.0"),
    ],
)
def test_bad_input(change, settings: dict, message: str):
    base, tasks = models()
    if change:
        change(base, tasks)
    with pytest.raises(mp.MergeError, match=message.replace("(", r"\(")):
        xray(base, tasks, **settings)


def test_inputs_stay_as_they_are():
    base, tasks = models()
    before = {name: x.clone() for name, x in base.items()}
    xray(base, tasks)
    assert all(torch.equal(base[name], x) for name, x in before.items())


# ---- The page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags close in order; collects tags, attributes, table cells by label, the command."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.label = self.command = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "div" and dict(attrs).get("role") == "region":
            self.label = dict(attrs)["aria-label"] or ""
            self.tables[self.label] = []
        if tag == "tr":
            self.tables[self.label].append([])
        if tag in ("td", "th"):
            self.tables[self.label][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[self.label][-1][-1] += data
        if "pre" in self.open:
            self.command += data


def test_page_is_whole_and_needs_nothing_else():
    text = render(xray(*models()))
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not {name for name, _ in page.attributes} & {"src", "href", "onclick", "srcset"}
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    assert ("lang", "en") in page.attributes
    assert page.tags >= {"title", "main", "h1", "h2", "figure", "svg", "caption", "th"}
    assert text.count("<svg") == text.count('role="img" aria-label=') + text.count(
        'aria-hidden="true"'
    )


def test_page_tells_the_numbers_of_the_report():
    report = xray(*models())
    tables = Page(render(report)).tables
    row = report["per_task"]["task1"]
    assert tables["Task by task"][2][:4] == [
        "task1", *(number(row[key]) for key in ("norm_ratio", "matrix_share", "intrusion"))
    ]  # fmt: skip
    cosine = report["pairs"]["cosine"]["values"]
    cells = tables["Do task vectors point the same way?"]
    assert [line[1:] for line in cells[1:]] == [
        ["·" if i == j else number(cosine[i][j], 2, 1) for j in range(3)] for i in range(3)
    ]
    hidden = report["pairs"]["hidden_interference"]["values"]
    cells = tables["Who runs over whose walls?"]
    assert [cells[1][2], cells[2][1]] == [number(hidden[0][1]), number(hidden[1][0])]
    assert cells[1][2] != cells[2][1]
    core = tables["Share in the core"][1:]
    assert [line[0] for line in core] == [layer["name"] for layer in report["layers"]]
    assert [line[1:4] for line in core] == [
        [number(x) for x in y["intrusion"]] for y in report["layers"]
    ]
    ranked = [float(line[1]) for line in tables["Matrices by intrusion"][1:]]
    assert ranked == sorted(ranked, reverse=True)


def test_colours_span_a_least_range_and_mark_chance():
    wide = scale_of([0.2, None, 0.8], 0.5, 0.05)
    assert [wide.cell(x, "t") for x in (0.2, 0.5, 0.8)] == [("t", 0), ("t", 12), ("t", 24)]
    assert wide.cell(None, "t") == ("t", None)
    ends = {"low": "20.0", "high": "80.0", "chance": "50.0", "place": "50.0"}
    assert wide.legend(number) == ends
    narrow = scale_of([0.5, 0.501], 0.5, 0.05)
    assert narrow.cell(0.501, "t") == ("t", 0)
    assert narrow.legend(number)["high"] == "55.0"


def test_cells_are_coloured_and_chance_is_marked():
    report = xray(*models())
    text = render(report)
    pair = report["pairs"]["hidden_interference"]
    others = [pair["values"][i][j] for i in range(3) for j in range(3) if i != j]
    scale = scale_of(others, pair["chance"], 0.05)
    shown, level = scale.cell(others[0], number(others[0]))
    assert f'<td class="h{level}">{shown}</td>' in text
    legend = scale.legend(number)
    told = "Colours from {low}, dark blue, to {high}, yellow; chance is {chance}".format(**legend)
    assert told in text
    assert f'd="M{legend["place"]} 9l' in text


def test_hostile_names_stay_text():
    base, tasks = models()
    base = {HOSTILE if name == "a.0.w" else name: x for name, x in base.items()}
    base["<i>zero</i>"] = torch.zeros(4, 4)
    tasks = {
        f"{t}{HOSTILE}": {HOSTILE if name == "a.0.w" else name: x for name, x in task.items()}
        | {"<i>zero</i>": torch.ones(4, 4)}
        for t, task in tasks.items()
    }
    report = xray(base, tasks, exclude=["visual.proj", "<i>*"], include=["*"])
    report |= {
        "base": f"{HOSTILE}.safetensors", "given": [f"{HOSTILE}{t}" for t in tasks],
        "entry": HOSTILE, "warnings": [HOSTILE],
    }  # fmt: skip
    text = render(report)
    page = Page(text)
    assert not page.tags & {"img", "i"}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.tables["Share in the core"][1][0] == HOSTILE
    assert page.tables["Task by task"][1][0] == f"task0{HOSTILE}"
    assert page.command == merge_command(report)
    assert "&lt;i&gt;*" in text
    skipped = render(xray(base, tasks))
    assert not Page(skipped).tags & {"img", "i"}
    assert "&lt;i&gt;zero&lt;/i&gt;</code>: it is zero in the base" in skipped


def test_numbers_as_text():
    assert [number(x) for x in (None, 0.1234, -0.5, -0.0001)] == ["–", "12.3", "−50.0", "0.0"]
    assert number(-0.004, 2, 1) == "0.00"


def luminance(color: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_ink_on_every_colour_can_be_read():
    form = r"\.h(\d+)\{background:#(\w{6});fill:#\2;color:#(\w{3})\}"
    rules = re.findall(form, render(xray(*models())))
    assert [int(level) for level, _, _ in rules] == list(range(25))
    lightness = [luminance(paper) for _, paper, _ in rules]
    assert lightness == sorted(lightness)
    for _, paper, ink in rules:
        low, high = sorted([luminance(paper), luminance(ink * 2)])
        assert (high + 0.05) / (low + 0.05) > 4.5, paper


@pytest.mark.slow
def test_the_template_is_in_a_wheel(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "minipact", source / "minipact", ignore=shutil.ignore_patterns("__py*"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    look = "from importlib.resources import files; print(files('minipact') / 'xray.html.j2')"
    done = subprocess.run(
        [sys.executable, "-c", look], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    found = Path(done.stdout.strip())
    assert found.is_relative_to(site), done.stderr
    assert found.read_bytes() == (ROOT / "minipact" / "xray.html.j2").read_bytes()


# ---- The command line ----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    base, tasks = models()
    for name, state in {"base": base, **tasks}.items():
        save_file(
            {key: x.contiguous() for key, x in state.items()}, tmp_path / f"{name}.safetensors"
        )
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    tasks = [str(folder / f"task{t}.safetensors") for t in range(3)]
    return main(["xray", str(folder / "base.safetensors"), *tasks, *arguments])


def test_page_and_json_hold_the_same_numbers(files: Path, capsys: pytest.CaptureFixture[str]):
    out = files / "report.html"
    assert run(files, "-o", str(out), "--json", "--core", "4", "--task", "0.1") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["core"] == 4
    assert report["settings"]["task"] == 0.1
    assert out.read_text(encoding="utf-8") == render(report)
    direct = xray(*models(), core=4, task=0.1)
    assert report["layers"] == json.loads(json.dumps(direct["layers"]))
    assert run(files, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["core"] == 0.05
    assert sorted(p.name for p in files.glob("report*")) == ["report.html"]


def test_the_command_on_the_page_merges(files: Path, monkeypatch: pytest.MonkeyPatch):
    odd = files / "a & 'b' <c> \"d\""
    odd.mkdir()
    for name in ("base", "task0", "task1", "task2"):
        (files / f"{name}.safetensors").rename(odd / f"{name}.safetensors")
    os.rename(odd / "task2.safetensors", files / "-x=2.safetensors")
    monkeypatch.chdir(files)
    given = [f"{odd.name}/task0.safetensors", f"my task={odd.name}/task1.safetensors"]
    options = ["-o", "report.html", "--exclude", "visual.*"]
    base = f"{odd.name}/base.safetensors"
    assert main(["xray", *options, "--", base, *given, "-x=2.safetensors"]) == 0
    words = shlex.split(Page(Path("report.html").read_text(encoding="utf-8")).command)
    assert words[:2] == ["minipact", "merge"]
    assert words[-4:] == [base, *given, "-x=2.safetensors"]
    assert main(words[1:]) == 0
    plain = [
        "merge",
        "--exclude",
        "visual.*",
        "-o",
        "again",
        "--",
        base,
        *given,
        "-x=2.safetensors",
    ]
    assert main(plain) == 0
    model = "model.safetensors"
    assert contents(files / "merged")[model] == contents(files / "again")[model]


def test_the_command_names_the_entry(files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    _, tasks = models()
    torch.save({"model": tasks["task0"], "ema": tasks["task1"]}, "a.pt")
    assert main(["xray", "base.safetensors", "a.pt", "-o", "x.html", "--entry", "ema"]) == 0
    words = shlex.split(Page(Path("x.html").read_text(encoding="utf-8")).command)
    assert words[1:] == ["merge", "-o", "merged", "--entry=ema", "base.safetensors", "a.pt"]
    assert main(words[1:]) == 0


def test_a_report_without_files_shows_no_command():
    report = xray(*models())
    assert merge_command(report) is None
    assert "<pre>" not in render(report)


def test_summary_quiet_and_overwrite(files: Path, capsys: pytest.CaptureFixture[str]):
    out = files / "report.html"
    out.write_text("old")
    assert run(files, "-o", str(out), "--overwrite", "--threads", str(torch.get_num_threads())) == 0
    text = capsys.readouterr().out
    assert "times chance" in text
    assert f"wrote {out}" in text
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run(files, "-o", str(out), "--overwrite", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-o report.html"),
        (["-o", "{}/old.html"], "--overwrite"),
        (["-o", "{}/report.txt"], ".html"),
        (["-o", "{}/none/report.html"], "folder does not exist"),
        (["-o", "{}/report.html", "--device", "toaster"], "--device toaster"),
        (["-o", "{}/report.html", "--threads", "0"], "--threads 0"),
        (["-o", "{}/report.html", "--core", "many"], "'many'"),
        (["-o", "{}/report.html", "--core", "30"], "30"),
        (["-o", "{}/report.html", "--exclude", "*w", "--exclude", "*proj"], "no matrix"),
        (["-o", "{}/report.html", "--include", "*.nothing"], "matches no tensor"),
    ],
)
def test_user_errors(files: Path, capsys: pytest.CaptureFixture[str], arguments, message: str):
    (files / "old.html").write_text("old")
    before = sorted(files.rglob("*"))
    assert run(files, *(text.format(files) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("minipact: error: ")
    assert message in error
    assert sorted(files.rglob("*")) == before
    assert (files / "old.html").read_text() == "old"


def test_missing_and_mismatched_files(files: Path, capsys: pytest.CaptureFixture[str]):
    os.remove(files / "task1.safetensors")
    assert run(files, "-o", str(files / "report.html")) == 2
    assert "does not exist" in capsys.readouterr().err
    save_file({"other": torch.ones(2, 2)}, files / "task1.safetensors")
    assert run(files, "-o", str(files / "report.html")) == 2
    assert "task 'task1' lacks" in capsys.readouterr().err
    assert not list(files.glob("report*"))


def test_a_failed_write_leaves_the_old_page(files: Path, monkeypatch, capsys):
    out = files / "report.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    assert run(files, "-o", str(out), "--overwrite") == 1
    assert "no output was written" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert not list(files.glob("*.partial"))
