"""Train the mini zoo: pre-train a small open_clip CLIP, fine-tune its image encoder on each task.

    python data/train_zoo.py --seed 0 --out data/zoo

An interrupted run goes on where it stopped: finished epochs and finished tasks are kept in OUT/.work.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from sums import write_sums
from tasks import TASKS, load, pretrain_world, to_tensor
from zoo_io import Judge, State, image_tower

MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 96, "heads": 4, "context_length": 16},
}
TRAINING: dict[str, float] = {
    "world_images": 90_000,
    "pretrain_epochs": 6,
    "pretrain_lr": 1e-3,
    "task_images": 10_000,
    "finetune_steps": 500,
    "finetune_lr": 5e-4,
    "batch": 128,
    "weight_decay": 0.05,
}
SCALES = [round(0.05 * i, 2) for i in range(1, 21)]


def build_clip(seed: int) -> CLIP:
    """open_clip's CLIP with our small towers, randomly initialised from the seed."""
    torch.manual_seed(seed)
    vision, text = CLIPVisionCfg(**MODEL["vision_cfg"]), CLIPTextCfg(**MODEL["text_cfg"])
    return CLIP(MODEL["embed_dim"], vision, text)


def tokenize(texts: list[str]) -> Tensor:
    """Token ids [N, context_length] by open_clip's tokenizer."""
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    return tokenizer(texts)


def optimizer_and_schedule(
    model: nn.Module, lr: float, steps: int, decay: float
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW, and its learning rate at a step: linear warm-up over 5 % of the steps, then a cosine."""
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return lr * min(1.0, (step + 1) / warmup) * cosine

    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay), rate


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of the batches of one epoch, shuffled by the seed; the incomplete last one is left out."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return iter(order[: count - count % size].split(size))


def save_atomically(state: object, path: Path) -> None:
    """torch.save to a temporary file that then takes the name."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def pretrain(seed: int, work: Path, device: torch.device, settings: dict[str, float]) -> CLIP:
    """Contrastive pre-training on the captioned world, resumed from the last whole epoch."""
    model = build_clip(seed).to(device)
    epochs, size = int(settings["pretrain_epochs"]), 2 * int(settings["batch"])
    count = int(settings["world_images"])
    steps = epochs * (count // size)
    optimizer, rate = optimizer_and_schedule(
        model, settings["pretrain_lr"], steps, settings["weight_decay"]
    )
    kept, start = work / "pretrain.pt", 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    if start < epochs:
        images, captions = pretrain_world(count, seed)
        pixels, tokens = to_tensor(images), tokenize(captions)
    loss_of = open_clip.ClipLoss()
    for epoch in range(start, epochs):
        bar = tqdm(
            batches(count, size, 1000 * seed + epoch),
            f"pre-training {epoch + 1}/{epochs}",
            total=count // size,
            disable=None,
        )
        for index, rows in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch * (count // size) + index)
            image, text, scale = model(pixels[rows].to(device), tokens[rows].to(device))
            loss = loss_of(image, text, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically(state | {"epoch": epoch + 1}, kept)
    return model


@torch.no_grad()
def class_embeddings(model: CLIP, task: str, device: torch.device) -> Tensor:
    """Unit embeddings [classes, embed_dim] of the class prompts, averaged over the templates."""
    prompts = [[t.format(c) for t in TASKS[task].templates] for c in TASKS[task].classes]
    embedded = [normalize(model.encode_text(tokenize(p).to(device)), dim=-1) for p in prompts]
    return normalize(torch.stack([e.mean(0) for e in embedded]), dim=-1).cpu()


def shifted(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Every image shifted by up to two pixels each way, wrapping around."""
    moves = rng.integers(-2, 3, (len(pixels), 2))
    return torch.stack(
        [x.roll((int(a), int(b)), (1, 2)) for x, (a, b) in zip(pixels, moves, strict=True)]
    )


def finetune(
    task: str,
    base: State,
    head: Tensor,
    logit_scale: float,
    seed: int,
    device: torch.device,
    settings: dict[str, float],
) -> State:
    """Image tower fine-tuned on one task against the frozen class embeddings."""
    tower = image_tower(MODEL, base).to(device).train()
    images, labels = load(
        task, "train", None if task == "digits" else int(settings["task_images"]), seed
    )
    pixels, targets = to_tensor(images), torch.from_numpy(labels)
    steps, size = int(settings["finetune_steps"]), int(settings["batch"])
    optimizer, rate = optimizer_and_schedule(
        tower, settings["finetune_lr"], steps, settings["weight_decay"]
    )
    rng, head = np.random.default_rng([seed, len(task)]), head.to(device)
    step, bar = 0, tqdm(total=steps, desc=f"fine-tuning on {task}", disable=None)
    while step < steps:
        for rows in batches(len(targets), size, 1000 * seed + step):
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            batch = pixels[rows] if task != "digits" else shifted(pixels[rows], rng)
            cosines = normalize(tower(batch.to(device)), dim=-1) @ head.mT
            loss = cross_entropy(logit_scale * cosines, targets[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.update()
    bar.close()
    return half({f"visual.{k}": v.cpu() for k, v in tower.state_dict().items()})


def half(state: State) -> State:
    return {k: v.detach().half().contiguous() for k, v in state.items()}


def kept_or_made(path: Path, make: Callable[[], State]) -> State:
    """The state dict stored at path, made and stored first if it is not there yet."""
    if not path.exists():
        save_atomically(make(), path)
    return torch.load(path, weights_only=True)


def combine(base: State, tasks: dict[str, State], scale: float) -> State:
    """Task arithmetic: base + scale * sum of the task vectors, written out plainly."""
    return {k: v + scale * sum(t[k] - v for t in tasks.values()) for k, v in base.items()}


def measure(
    base: State, tasks: dict[str, State], heads: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """Accuracies on the test split; the scale of task arithmetic is chosen on the validation split."""
    score = Judge(MODEL, heads, device).accuracies
    curve = {}
    for scale in tqdm([0.0, *SCALES], "task arithmetic on validation data", disable=None):
        merged = combine(base, tasks, scale)
        curve[scale] = float(np.mean(list(score(merged, "val").values())))
    best = max(curve, key=lambda scale: curve[scale])
    zero_shot, added = score(base), score(combine(base, tasks, best))
    own = {task: score(weights, only=[task])[task] for task, weights in tasks.items()}
    per_task = {
        t: {
            "classes": len(TASKS[t].classes),
            "chance": 1 / len(TASKS[t].classes),
            "zero_shot": zero_shot[t],
            "finetuned": own[t],
            "task_arithmetic": added[t],
        }
        for t in TASKS
    }
    return {"tasks": per_task, "scale": best, "validation_curve": curve, **geometry(base, tasks)}


def geometry(base: State, tasks: dict[str, State]) -> dict[str, Any]:
    """Norms of the task vectors against the base, in all and per tensor, and their cosines."""
    flat = {t: torch.cat([(w[k] - base[k]).flatten() for k in base]) for t, w in tasks.items()}
    whole = torch.cat([v.flatten() for v in base.values()]).norm()
    per_layer = {
        k: float(np.mean([((w[k] - v).norm() / v.norm()).item() for w in tasks.values()]))
        for k, v in base.items()
        if v.norm() > 0
    }
    unit = normalize(torch.stack(list(flat.values())), dim=-1)
    return {
        "norm_ratio": {t: round((v.norm() / whole).item(), 5) for t, v in flat.items()},
        "norm_ratio_per_layer": {k: round(v, 5) for k, v in per_layer.items()},
        "cosines": [[round(c, 4) for c in row] for row in (unit @ unit.mT).tolist()],
    }


def write_zoo(
    out: Path, base: State, tasks: dict[str, State], heads: dict[str, Tensor], info: dict[str, Any]
) -> None:
    """Write the zoo's files, the checksums last."""
    for name, weights in {"base": base, **tasks}.items():
        save_file(weights, out / f"{name}.safetensors", metadata={"format": "pt"})
    save_file(heads, out / "heads.safetensors", metadata={"format": "pt"})
    (out / "zoo.json").write_text(json.dumps(info, indent=1) + "\n")
    write_sums(out)


def append_csv(path: Path, info: dict[str, Any]) -> None:
    """Replace this seed's rows in a table of results."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    rows = [row for row in rows if row["seed"] != str(info["seed"])]
    columns = ["zero_shot", "finetuned", "task_arithmetic"]
    rows += [
        {"seed": str(info["seed"]), "task": t, **{c: f"{r[c]:.4f}" for c in columns}}
        for t, r in info["tasks"].items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seed", "task", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["seed"])))


def train(seed: int, out: Path, device: torch.device, settings: dict[str, float]) -> dict[str, Any]:
    """The whole zoo for one seed; returns what zoo.json says."""
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "recipe.json"
    wanted = json.dumps({"seed": seed, "model": MODEL, "training": settings})
    if recipe.exists() and recipe.read_text() != wanted:
        raise SystemExit(
            f"{work} holds another, unfinished run: remove it, or choose another --out"
        )
    recipe.write_text(wanted)
    clip = pretrain(seed, work, device, settings).eval()
    heads = {task: class_embeddings(clip, task, device) for task in TASKS}
    logit_scale = clip.logit_scale.exp().item()
    base = half({f"visual.{k}": v.cpu() for k, v in clip.visual.state_dict().items()})
    start = {k: v.float() for k, v in base.items()}
    tasks = {
        task: kept_or_made(
            work / f"{task}.pt",
            lambda task=task: finetune(
                task, start, heads[task], logit_scale, seed, device, settings
            ),
        )
        for task in TASKS
    }
    wide = {task: {k: v.float() for k, v in weights.items()} for task, weights in tasks.items()}
    info = {
        "seed": seed,
        "model": copy.deepcopy(MODEL),
        "training": settings,
        "logit_scale": logit_scale,
        "versions": {"torch": torch.__version__.split("+")[0], "open_clip": open_clip.__version__},
        "processor": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(),
        **measure(start, wide, heads, device),
    }
    write_zoo(out, base, tasks, heads, info)
    shutil.rmtree(work)
    return info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "zoo")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="CSV file that takes this seed's accuracies")
    arguments = parser.parse_args(argv)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if arguments.device == "auto" else arguments.device)
    info = train(arguments.seed, arguments.out, device, TRAINING)
    if arguments.table:
        append_csv(arguments.table, info)
    for task, row in info["tasks"].items():
        shown = "  ".join(
            f"{k} {row[k]:.3f}" for k in ("zero_shot", "finetuned", "task_arithmetic")
        )
        print(f"{task:10s} {shown}", file=sys.stdout)


if __name__ == "__main__":
    main()
