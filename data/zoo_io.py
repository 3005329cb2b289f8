"""Reading the mini zoo: verified weights, the image tower they belong to, and its accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from tasks import load, to_tensor

State = dict[str, Tensor]
Pictures = tuple[np.ndarray, np.ndarray]
Encoder = Callable[[Tensor], Tensor]


class ZooError(ValueError):
    """A file of the zoo is missing or damaged."""


@dataclass(frozen=True)
class Zoo:
    """The pre-trained image tower, one fine-tuned tower per task, and the tasks' class embeddings.

    Attributes:
        info: zoo.json. base: name -> float32 tensor. tasks: task -> state dict with the same names.
        heads: task -> [classes, embed_dim], rows of unit length, in the order of the tasks.
    """

    info: dict[str, Any]
    base: State
    tasks: dict[str, State]
    heads: dict[str, Tensor]


def load_zoo(folder: Path) -> Zoo:
    """Load the zoo after checking every file against SHA256SUMS.

    Raises:
        ZooError: a file is missing or differs from its checksum; the message names it.
    """
    verify(folder)
    info = json.loads((folder / "zoo.json").read_text())
    stored = load_file(folder / "heads.safetensors")
    heads = {task: stored[task] for task in info["tasks"]}
    tasks = {task: _tower(folder, task) for task in info["tasks"]}
    return Zoo(info, _tower(folder, "base"), tasks, heads)


def verify(folder: Path) -> None:
    """Raise ZooError unless all files of SHA256SUMS are there and whole."""
    remedy = "restore data/zoo from the repository, or retrain it with `make zoo`"
    sums = Path(folder, "SHA256SUMS")
    if not sums.is_file():
        raise ZooError(f"{sums} is missing: {remedy}")
    for line in sums.read_text().splitlines():
        digest, name = line.split("  ")
        path = Path(folder, name)
        if not path.is_file():
            raise ZooError(f"{path} is missing: {remedy}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ZooError(f"{path} is damaged (its SHA-256 differs): {remedy}")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS for all other files of the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    Path(folder, "SHA256SUMS").write_text("".join(lines))


def _tower(folder: Path, name: str) -> State:
    return {k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}


def image_tower(config: dict[str, Any], weights: State | None = None) -> nn.Module:
    """open_clip's vision transformer for zoo.json's "model" entry: [N, 3, 32, 32] -> [N, embed_dim]."""
    vision = CLIPVisionCfg(**config["vision_cfg"])
    tower: nn.Module = _build_vision_tower(config["embed_dim"], vision)
    if weights is not None:
        tower.load_state_dict({k.removeprefix("visual."): v for k, v in weights.items()})
    return tower.eval()


# ---- Accuracy ------------------------------------------------------------------------------------


@torch.no_grad()
def logits(tower: Encoder, head: Tensor, pixels: Tensor, batch: int = 100) -> Tensor:
    """Cosines [N, classes] between image embeddings and class embeddings."""
    return torch.cat([normalize(tower(x), dim=-1) @ head.mT for x in pixels.split(batch)])


def hits(tower: Encoder, head: Tensor, pixels: Tensor, labels: Tensor, batch: int = 100) -> int:
    """How many images [N, 3, height, width] are nearest to the class embedding of their label [N]."""
    found = logits(tower, head, pixels, batch).argmax(-1).cpu()
    return int((found == labels).sum())


def accuracy(tower: nn.Module, head: Tensor, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [N, 32, 32, 3] whose nearest class embedding is the right one."""
    device = next(tower.parameters()).device
    pixels = to_tensor(images).to(device)
    return hits(tower, head.to(device), pixels, torch.from_numpy(labels)) / len(labels)


class Judge:
    """Accuracies of many weights on the tasks of a zoo; pictures are drawn once and kept on the device.

    Args:
        config: of the image tower, as in zoo.json.
        heads: task -> class embeddings.
        device: where the tower works.
        pictures: (task, split) -> images [N, 32, 32, 3] and labels [N].
    """

    def __init__(
        self,
        config: dict[str, Any],
        heads: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        pictures: Callable[[str, str], Pictures] = load,
    ) -> None:
        self.tower = image_tower(config).to(device)
        self.heads = {task: head.to(device) for task, head in heads.items()}
        self.device, self.pictures = device, pictures
        self._kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def accuracies(
        self, weights: Mapping[str, Tensor], split: str = "test", only: Iterable[str] | None = None
    ) -> dict[str, float]:
        """Share of right answers in 0..1 on every task, or on some, with these weights in the tower."""
        self.tower.load_state_dict({k.removeprefix("visual."): x for k, x in weights.items()})
        found = {}
        for task in self.heads if only is None else only:
            pixels, labels = self._drawn(task, split)
            found[task] = hits(self.tower, self.heads[task], pixels, labels) / len(labels)
        return found

    def _drawn(self, task: str, split: str) -> tuple[Tensor, Tensor]:
        if (task, split) not in self._kept:
            images, labels = self.pictures(task, split)
            pixels = to_tensor(images).to(self.device)
            self._kept[task, split] = pixels, torch.from_numpy(labels)
        return self._kept[task, split]
