"""The main job at full size: three fine-tuned image towers of open_clip's ViT-B-32, from files to a file."""

import zlib
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minipact as mp
from helpers import rng
from minipact.__main__ import main
from vit_b32 import make_checkpoints


@pytest.mark.slow
def test_pact_and_tsv_m_merge_three_image_towers(tmp_path: Path):
    base, tasks = make_checkpoints(tmp_path)
    out = tmp_path / "merged.safetensors"
    fast = ["--set", "pact.svd=randomized", "--set", "tsv_m.svd=randomized"]
    arguments = [str(base), *map(str, tasks), "-o", str(out), "--rule", "tsv_m", "--purify", "pact"]
    assert main(["merge", *arguments, *fast, "--quiet"]) == 0
    merged = load_file(out)
    tower = open_clip.create_model("ViT-B-32", pretrained=None).visual
    tower.load_state_dict({name.removeprefix("visual."): x for name, x in merged.items()})
    assert sum(x.numel() for x in merged.values()) > 87e6

    name = "visual.transformer.resblocks.5.attn.out_proj.weight"

    def generator() -> torch.Generator:
        """The one that a merge with seed 0 draws from for this tensor, whatever else it merges."""
        return rng(zlib.crc32(f"0/{name}".encode()))

    with safe_open(base, framework="pt") as file:
        W0 = file.get_tensor(name)
    D = torch.stack([safe_open(path, framework="pt").get_tensor(name) - W0 for path in tasks])
    purified = mp.pact(W0, D, svd="randomized", generator=generator())
    expected = mp.tsv_m(purified, svd="randomized", generator=generator())
    assert torch.allclose(merged[name] - W0, expected, atol=1e-6)
    shield = mp.shield_basis(W0, D, 0, svd="randomized", generator=generator())
    assert shield.shape == (768, 76)  # 2 K: (T - 2) K = 38 is below (T - 1) k = 60, no closed form
    assert (purified[0] @ shield).norm() < 1e-5 * D[0].norm()
