"""The benchmark for GPUs runs as a whole where none is, and reads a profile rightly."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import gpu


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here"):
        gpu.main([])


def test_layouts_have_the_sizes_of_the_models():
    def entries(shapes: gpu.Shapes) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    assert entries(gpu.vit(768, 12, 32, 50, 512)) == 87_849_216
    assert entries(gpu.vit(1024, 24, 14, 257, 768)) == 303_966_208
    assert entries(gpu.llama(4096, 11_008)) == 202_383_360


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "RULES", ("task_arithmetic", "tsv_m", "ties"))
    monkeypatch.setattr(gpu.recipes, "__defaults__", (gpu.RULES,))
    out = tmp_path / "found.json"
    at = [
        "--device",
        "cpu",
        "--tiny",
        "--repeats",
        "1",
        "--scratch",
        str(tmp_path),
        "--out",
        str(out),
    ]
    gpu.main(at)
    found = json.loads(out.read_text())
    assert {"rates_s", "waits", "ranks", "tf32", "memory", "vit_b32", "vit_l14", "llama"} <= set(
        found
    )
    assert found["ranks"]["two_has_the_bytes_of_one"]
    assert found["ranks"]["two_from_cpu"] == 0
    assert found["tf32"]["tf32_from_float32"] == 0
    assert len(found["vit_b32"]["merges"]) == 9
    assert found["vit_b32"]["not_measured"] == []
    assert "32 transformer blocks" in found["llama"]["what"]


def test_what_the_time_did_not_allow_is_named(tmp_path: Path):
    out = tmp_path / "found.json"
    gpu.main(
        ["--device", "cpu", "--tiny", "--minutes", "0", "--only", "vit_b32", "--out", str(out)]
    )
    assert json.loads(out.read_text())["vit_b32"] == {"not_measured": "out of time"}


def test_a_profile_is_split_into_kernels_and_copies():
    spans = [
        ("Memcpy HtoD (Pinned -> Device)", 0.0, 4e6),
        ("gemm", 3e6, 6e6),
        ("Memcpy DtoD (Device -> Device)", 5e6, 6e6),
        ("Memcpy DtoH (Device -> Pageable)", 8e6, 9e6),
    ]
    expected = {
        "kernels_s": 4.0,
        "to_device_s": 4.0,
        "from_device_s": 1.0,
        "busy_s": 7.0,
        "launches": 2,
    }
    assert gpu.split(spans) == expected
    assert gpu.split([]) == dict.fromkeys(expected, 0)


def test_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    line = f"{Path(__file__).name}:{work.__code__.co_firstlineno + 2}"
    assert gpu.times_it_waits(work) == {"waits": 3, "lines": {line: 3}}
    assert modes == ["warn", "default"]
