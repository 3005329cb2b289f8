"""A hundred thousand damaged headers and adapter configurations: read rightly or refused, never a crash.

MINIPACT_FUZZ=10 runs ten times as many.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from helpers import normal
from minipact.adapters import open_adapter
from minipact.checkpoints import open_checkpoint
from minipact.errors import CheckpointError

FACTOR = int(os.environ.get("MINIPACT_FUZZ", "1"))
CHUNKS, SIZE = 10, 5000
STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4).half(),
    "c": torch.ones(2).int(),
}
WORDS = ["F32", "BF16", "I64", "F4", "C64", "data_offsets", "dtype", "shape", "a", "__metadata__"]
VALUES = [None, True, False, 0, 1, -1, 2.5, 1e300, "", "x", "lora", [], [1], {}, {"q": 2}, {"(": 1}]


def damaged_header(choose: random.Random) -> bytes:
    """A file of three tensors with some bytes of its header changed, or some of its values."""
    whole = save(STATE)
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    if choose.random() < 0.5:
        text = bytearray(header)
        for _ in range(choose.randint(1, 4)):
            text[choose.randrange(len(text))] = choose.choice(b'0123456789{}[]",:abF- \x00\xff')
        header = bytes(text)
    else:
        found = json.loads(header)
        entry = found.get(choose.choice(list(STATE)), {})
        key = choose.choice(["dtype", "shape", "data_offsets", "x"])
        entry[key] = choose.choice(
            [*WORDS, [0, choose.randint(-9, 99)], [choose.randint(0, 9)] * 2, 7]
        )
        header = json.dumps(found).encode()
    if choose.random() < 0.2:
        data = data[: choose.randrange(len(data) + 1)]
    wrong = choose.random() < 0.1
    return (choose.getrandbits(64) if wrong else len(header)).to_bytes(8, "little") + header + data


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_headers(chunk: int, tmp_path: Path):
    choose, file = random.Random(chunk), tmp_path / "x.safetensors"
    read = refused = 0
    for _ in range(SIZE * FACTOR):
        file.write_bytes(damaged_header(choose))
        try:
            found = open_checkpoint(file)
            tensors = {name: found[name] for name in found}
        except CheckpointError:
            refused += 1
            continue
        read += 1
        assert all(x.shape == found.meta(name).shape for name, x in tensors.items())
        assert all(x.dtype == found.meta(name).dtype for name, x in tensors.items())
    assert read > 0
    assert refused > 0


def damaged_config(choose: random.Random) -> str:
    """An adapter's configuration with one to three settings changed, dropped or added."""
    config: dict = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    config |= {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
    }
    known = [
        *config,
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "lora_bias",
        "new",
    ]
    for _ in range(choose.randint(1, 3)):
        key = choose.choice(known)
        if choose.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = choose.choice(VALUES)
    text = json.dumps(config)
    return text[: choose.randrange(len(text))] if choose.random() < 0.05 else text


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_adapter_configurations(chunk: int, tmp_path: Path):
    choose = random.Random(1000 + chunk)
    a, b = normal(2, 3).float(), normal(4, 2, seed=1).float()
    save_file({"q.weight": normal(4, 3, seed=2).float()}, tmp_path / "base.safetensors")
    base = open_checkpoint(tmp_path / "base.safetensors")
    prefix = "base_model.model.q.lora_"
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors")
    scales = set()
    for _ in range(SIZE * FACTOR):
        (folder / "adapter_config.json").write_text(damaged_config(choose))
        try:
            update = open_adapter(folder, base).delta("q.weight")
        except CheckpointError:
            continue
        assert update is not None
        ratio = update / (b @ a)
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)
        scales.add(round(float(ratio.mean()), 3))
    assert 2.0 in scales
