"""Fine-tune all-MiniLM-L6-v2 on the eight text tasks and store what changed.

    python data/train_encoder.py --out data/encoder

An interrupted run goes on where it stopped: finished tasks are kept in OUT/.work, in full precision.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import packed
import texts
from encoder_io import MODEL_SHA256, TRAINED, Encoder, State, example_rows, head_of, labelled, right
from sums import write_sums

SEED = 0
STEPS, BATCH, RATE, DECAY, WARMUP = 250, 32, 2e-4, 0.01, 0.1
SHARPNESS = 20.0  # cosines are multiplied by it, as in the encoder's own training


def rows(count: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after another, each epoch shuffled anew."""
    random = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(random.permutation(count))
        yield from order[: count - count % BATCH].split(BATCH)


def rate(step: int) -> float:
    """Learning rate at a step: linear warm-up, then a cosine."""
    return RATE * min(1, (step + 1) / (WARMUP * STEPS)) * (1 + math.cos(math.pi * step / STEPS)) / 2


def finetune(task: str) -> State:
    """The encoder's layers after fine-tuning on one task against its frozen head."""
    encoder = Encoder()
    head = head_of(encoder, task)
    tokens, labels = labelled(task, "train")
    torch.manual_seed(SEED)
    for name, parameter in encoder.bert.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    tuned = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=RATE, weight_decay=DECAY)
    encoder.train()
    batches = rows(len(labels), SEED)
    for step in tqdm(range(STEPS), f"fine-tuning on {task}", disable=None):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        found = encoder(pad_sequence([tokens[i] for i in batch], batch_first=True))
        loss = cross_entropy(SHARPNESS * found @ head.mT, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.trained()


def kept_or_made(task: str, work: Path) -> State:
    """The tuned layers of a task from the folder of work, made first where they are missing."""
    path = work / f"{task}.pt"
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(finetune(task), part)
        os.replace(part, path)
    return torch.load(path, weights_only=True)


def accuracy(encoder: Encoder, weights: State, task: str, head: Tensor) -> float:
    """Share of right answers on a task's test texts."""
    encoder.load(weights)
    return round(float(right(encoder, head, *labelled(task, "test")).mean()), 4)


def row_of(task: str, base: State, full: State, stored: State) -> dict[str, Any]:
    """What encoder.json says of a task: its texts, and accuracies of stored and full weights."""
    encoder, source = Encoder(), texts.TASKS[task]
    head, counts = head_of(encoder, task), labelled(task, "test")[1].bincount()
    training = texts.split(task)["train"]
    return {
        "source": source.source,
        "licence": source.licence,
        "classes": len(source.classes),
        "largest_class": round(float(counts.max() / counts.sum()), 4),
        "training_texts": len(training),
        "training_sha256": texts.digest("".join(row.hash for row in training)),
        "zero_shot": accuracy(encoder, base, task, head),
        "finetuned": accuracy(encoder, stored, task, head),
        "finetuned_unpacked": accuracy(encoder, full, task, head),
    }


def describe(full: dict[str, State], stored: dict[str, State], step: float) -> dict[str, Any]:
    """What encoder.json says."""
    base = Encoder().trained()
    tasks = {task: row_of(task, base, full[task], stored[task]) for task in full}
    return {
        "model": "all-MiniLM-L6-v2",
        "model_sha256": MODEL_SHA256,
        "training": {"seed": SEED, "steps": STEPS, "batch": BATCH, "rate": RATE, "decay": DECAY},
        "step": step,
        "versions": {"torch": torch.__version__.split("+")[0]},
        "tasks": tasks,
    }


def store(out: Path, full: dict[str, State], step: float) -> None:
    """Write data/encoder: packed updates, keys and hashes of the texts, accuracies, checksums."""
    base = Encoder().trained()
    for task, weights in full.items():
        (out / f"{task}.safetensors.gz").write_bytes(packed.pack(base, weights, step))
    stored = {task: packed.read(base, out / f"{task}.safetensors.gz") for task in full}
    listed = io.StringIO()
    writer = csv.DictWriter(
        listed, ["task", "split", "key", "label", "sha256"], lineterminator="\n"
    )
    writer.writeheader()
    for task in full:
        writer.writerows(example_rows(task))
    packed_list = gzip.compress(listed.getvalue().encode(), mtime=0)
    (out / "examples.csv.gz").write_bytes(packed_list)
    info = describe(full, stored, step)
    (out / "encoder.json").write_text(json.dumps(info, indent=1) + "\n")
    write_sums(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoder")
    parser.add_argument("--work", type=Path, help="folder of the full updates (OUT/.work)")
    parser.add_argument("--step", type=float, default=0.7, help="of packed.pack (%(default)s)")
    arguments = parser.parse_args()
    work = arguments.work or arguments.out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    store(arguments.out, {task: kept_or_made(task, work) for task in texts.TASKS}, arguments.step)


if __name__ == "__main__":
    main()
