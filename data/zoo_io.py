"""Reading the mini zoo: verified weights, the image tower they belong to, and its accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

import packed
from sums import verify
from tasks import load, to_tensor

State = dict[str, Tensor]
Pictures = tuple[np.ndarray, np.ndarray]
Encoder = Callable[[Tensor], Tensor]


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
        DataError: a file is missing or differs from its checksum; the message names it.
    """
    verify(folder, "restore it from the repository, or retrain it with `make zoo`")
    info = json.loads((folder / "zoo.json").read_text())
    stored = load_file(folder / "heads.safetensors")
    heads = {task: stored[task] for task in info["tasks"]}
    base = _tower(folder, "base")
    return Zoo(info, base, {task: _tower(folder, task, base) for task in info["tasks"]}, heads)


def _tower(folder: Path, name: str, base: State | None = None) -> State:
    whole, small = folder / f"{name}.safetensors", folder / f"{name}.safetensors.gz"
    if whole.exists():
        return {k: v.float() for k, v in load_file(whole).items()}
    found = small.read_bytes()
    return packed.unpack(base, found) if base else packed.unpack_alone(found)


def image_tower(config: dict[str, Any], weights: State | None = None) -> nn.Module:
    """open_clip's vision transformer for zoo.json's "model" entry: [N, 3, 32, 32] -> [N, embed_dim]."""
    # Here, as it takes 250 MB of memory: to read the weights takes none of it.
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

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


def right(tower: Encoder, head: Tensor, pixels: Tensor, labels: Tensor, batch: int = 100) -> Tensor:
    """Which images [N, 3, height, width] are nearest to the class embedding of their label: booleans [N]."""
    return logits(tower, head, pixels, batch).argmax(-1).cpu() == labels


def hits(tower: Encoder, head: Tensor, pixels: Tensor, labels: Tensor, batch: int = 100) -> int:
    """How many images [N, 3, height, width] are nearest to the class embedding of their label [N]."""
    return int(right(tower, head, pixels, labels, batch).sum())


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
        found = self.right(weights, split, only)
        return {task: int(answers.sum()) / len(answers) for task, answers in found.items()}

    def right(
        self, weights: Mapping[str, Tensor], split: str = "test", only: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Which pictures come out right on every task, or on some, with these weights: booleans [N]."""
        self.tower.load_state_dict({k.removeprefix("visual."): x for k, x in weights.items()})
        found = {}
        for task in self.heads if only is None else only:
            pixels, labels = self._drawn(task, split)
            found[task] = right(self.tower, self.heads[task], pixels, labels).numpy()
        return found

    def _drawn(self, task: str, split: str) -> tuple[Tensor, Tensor]:
        if (task, split) not in self._kept:
            images, labels = self.pictures(task, split)
            pixels = to_tensor(images).to(self.device)
            self._kept[task, split] = pixels, torch.from_numpy(labels)
        return self._kept[task, split]
