"""Accuracy of a merged CLIP on the data sets of the merging literature, beside the published numbers.

    python benchmarks/evaluate_clip.py merged.safetensors --text base.pt --model ViT-B-32-quickgelu \\
        --data DIR --suite 8 --family a --method tsv_m

MERGED is a full open_clip state dict or its image tower alone (names `visual.*`); the text tower then comes
from --text. Nothing is downloaded. A test set is looked for in this order:

    DIR/<task>/test/<class name>/*.png   one folder per class (the only way for RESISC45)
    DIR/<task>/**/*test*.parquet         a copy of a Hugging Face data set (needs the package pyarrow)
    DIR                                  as torchvision's class for the task lays it out

EuroSAT and SUN397 have no test split in torchvision: give folders or parquet files. OpenAI's weights, from
which all three families in published.json are fine-tuned, need a model name that ends in -quickgelu: the
plain name loads the same tensors and silently computes other features. The prompts in clip_tasks.json are
few and our own; --heads takes the heads that the weights were tuned against, where they are at hand.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "data"))

from minipact import CheckpointError, MergeError, open_checkpoint  # noqa: E402
from zoo_io import hits  # noqa: E402

# In the literature's order, whose first 8, 14 and 20 tasks are the suites: torchvision's class for the test
# split, a few prompts of our own, and class names in the order of the labels where the class has numbers.
TASKS: dict[str, dict[str, Any]] = json.loads((HERE / "clip_tasks.json").read_text())
PUBLISHED: dict[str, Any] = json.loads((HERE / "published.json").read_text())
SUITES = {count: list(TASKS)[:count] for count in (8, 14, 20)}
OTHER: dict[str, Any] = {"torchvision": None, "prompts": ["a photo of a {}."]}
SIZES = {(768, 32, 50): "ViT-B-32", (768, 16, 197): "ViT-B-16", (1024, 14, 257): "ViT-L-14"}


Row = dict[str, Any]
Transform = Callable[[Any], Tensor]


class HubTable(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Rows of a Hugging Face image data set in parquet files, whose headers say what the columns are."""

    def __init__(self, files: list[Path], transform: Transform) -> None:
        from pyarrow import parquet

        stored = parquet.read_schema(files[0]).metadata or {}
        features = json.loads(stored.get(b"huggingface", '{"info": {"features": {}}}'))["info"][
            "features"
        ]
        columns = {kind.get("_type"): name for name, kind in features.items()}
        if not {"Image", "ClassLabel"} <= columns.keys():
            raise ValueError(f"{files[0]} names no column of images or none of classes")
        image, label = columns["Image"], columns["ClassLabel"]
        tables = [parquet.read_table(file, columns=[image, label]) for file in files]
        self.images = [entry for table in tables for entry in table[image]]
        self.labels = [int(entry) for table in tables for entry in table[label].to_pylist()]
        self.classes, self.transform = features[label]["names"], transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.open(io.BytesIO(self.images[index].as_py()["bytes"]))
        return self.transform(picture), self.labels[index]


def load_test_set(task: str, data: Path, transform: Transform) -> tuple[Any, list[str]]:
    """Test images of a task with labels, and the class names in the order of the labels."""
    folder, entry = data / task, TASKS.get(task, OTHER)
    known, numbered = entry["torchvision"], entry.get("names", [])
    try:
        if (folder / "test").is_dir():
            found: Any = torchvision.datasets.ImageFolder(str(folder / "test"), transform)
        elif files := sorted(folder.glob("**/*test*.parquet")):
            found = HubTable(files, transform)
        elif known:
            make = getattr(torchvision.datasets, known[0])
            found = make(str(data), transform=transform, **known[1])
        else:
            raise FileNotFoundError("torchvision has no test split of it")
        if found[0][1] is None:
            raise ValueError("it has no labels, use the release that holds them")
        names = getattr(found, "classes", None) or numbered
        if numbered and all(name[0].isdigit() for name in names):
            # "00007" and "7 - seven" alike stand for label 7, whatever the order of the folders
            names = [numbered[int(re.split(r"\D", name)[0])] for name in names]
    except (OSError, RuntimeError, ValueError, ImportError, IndexError) as error:
        own = f", or what torchvision's {known[0]} reads under {data}" if known else ""
        raise MergeError(
            f"test set of {task}: {str(error).rstrip('.')}. Put one folder per class under "
            f"{folder / 'test'}, or parquet files of a Hugging Face data set under {folder}{own}"
        ) from error
    return found, [readable(name) for name in names]


def readable(name: str) -> str:
    """Class name as a prompt says it: AnnualCrop and annual_crop alike become two words."""
    words = name if " " in name else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[_/\s]+", " ", words).strip()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by open_clip's names; the `model.` of the literature's image encoders is taken off."""
    weights: dict[str, Tensor] = dict(open_checkpoint(path))
    if all(name.startswith("model.") for name in weights):
        weights = {name.removeprefix("model."): x for name, x in weights.items()}
    return weights


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path, *, image: bool) -> None:
    """Load the image tower, or everything else, after comparing all names and shapes."""

    def belongs(name: str) -> bool:
        return name.startswith("visual.") == image and name not in ("logit_scale", "logit_bias")

    wanted = {name: x for name, x in model.state_dict().items() if belongs(name)}
    if missing := [name for name in wanted if name not in weights]:
        advice = "give a full open_clip checkpoint as --text, the base model for one, or --heads"
        if image:
            advice = "are its names open_clip's, `visual.*`, and is --model its architecture?"
        raise MergeError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors, '{missing[0]}' first: {advice}"
        )
    for name in filter(belongs, weights if image else wanted):
        here = tuple(weights[name].shape)
        there = tuple(wanted[name].shape) if name in wanted else "none"
        if here != there:
            raise MergeError(
                f"{path}: tensor '{name}' is {here}, --model has {there}: name the architecture "
                "that the weights were trained with"
            )
    model.load_state_dict({name: weights[name].float() for name in wanted}, strict=False)


def stored_head(folder: Path, task: str, classes: int) -> Tensor:
    """Head [classes, embed_dim] from a file such as head_Cars.pt, for weights tuned against it."""
    files = [p for stem in (f"head_{task}", f"head_{task}Val") for p in folder.glob(f"{stem}.*")]
    if not files:
        raise MergeError(f"{folder} holds no head_{task}.pt or .safetensors")
    head = open_checkpoint(files[0])
    weight = head["weight"].float()
    if len(weight) != classes or ("bias" in head and head["bias"].any()):
        raise MergeError(f"{files[0]} is no head of {classes} classes without a bias")
    return nn.functional.normalize(weight, dim=-1)


def accuracy(model: Any, head: Tensor, images: Any, options: argparse.Namespace) -> float:
    """Share of images whose class has the largest cosine with them; head [classes, embed_dim]."""
    right = 0
    loader = DataLoader(images, options.batch, num_workers=options.workers)
    for pixels, labels in tqdm(loader, leave=False, disable=None):
        if int(labels.max()) >= len(head):
            raise MergeError(f"a label is {int(labels.max())}, and {len(head)} classes have names")
        right += hits(model.encode_image, head, pixels.to(head.device), labels, len(pixels))
    return right / len(images)


def averages(merged: Mapping[str, float], tuned: Mapping[str, float]) -> tuple[float, float | None]:
    """Mean accuracy, and the mean of the ratios merged / fine-tuned where all of those are known."""
    absolute = sum(merged.values()) / len(merged)
    if merged.keys() - tuned.keys():
        return absolute, None
    return absolute, sum(merged[t] / tuned[t] for t in merged) / len(merged)


def architecture(model: nn.Module) -> str:
    """Name of the image tower in published.json, told by width, patch and number of tokens."""
    state = model.state_dict()
    names = ("visual.conv1.weight", "visual.positional_embedding")
    conv, places = (tuple(state[name].shape) if name in state else (0,) for name in names)
    return SIZES.get((conv[0], conv[-1], places[0]), "another architecture")


def published(family: str, model: str, tasks: list[str], method: str | None) -> list[Row]:
    """Rows of published.json for this family, architecture and suite, of one method or of all."""
    if set(tasks) != set(SUITES.get(len(tasks), [])):
        return []
    wanted = {"family": family, "model": model, "tasks": len(tasks)}
    wanted |= {"method": method} if method else {}
    rows = PUBLISHED["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def notes(options: argparse.Namespace) -> list[str]:
    """What the reader of the table must know."""
    found, plain = [], options.model
    if f"{plain}-quickgelu" in open_clip.list_models():
        found.append(f"OpenAI's weights need {plain}-quickgelu: {plain} computes other features")
    if not options.heads:
        found.append("prompts are our own, weights tuned against other heads may lose (--heads)")
    if options.family:
        family = PUBLISHED["families"][options.family]
        found += [f"family {options.family}: {family['weights']}", *family["remarks"]]
        found += PUBLISHED["remarks"]
    return found


def make_heads(model: Any, options: argparse.Namespace, names: Mapping[str, list[str]]) -> Row:
    """Heads [classes, embed_dim] of all tasks, from files or from open_clip's text tower and prompts."""
    if options.heads:
        return {task: stored_head(options.heads, task, len(found)) for task, found in names.items()}
    path = options.text or options.merged
    fill(model, read_weights(path), path, image=False)
    heads, tokenizer = {}, open_clip.get_tokenizer(options.model)
    for task, found in names.items():
        prompts = TASKS.get(task, OTHER)["prompts"]
        heads[task] = open_clip.build_zero_shot_classifier(model, tokenizer, found, prompts).mT
    return heads


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """All accuracies, the averages, and the published rows to compare with."""
    name, tasks = options.model, options.tasks or SUITES[options.suite]
    if name not in open_clip.list_models() and not name.startswith("local-dir:"):
        raise MergeError(f"--model {name}: give a name that open_clip knows, or local-dir:FOLDER")
    if unknown := options.finetuned.keys() - set(tasks):
        raise MergeError(f"--finetuned {min(unknown)}: not among the tasks evaluated")
    model, _, transform = open_clip.create_model_and_transforms(
        name, load_weights=False, pretrained_text=False
    )
    model.eval()
    sets, problems = {}, []
    for task in tasks:
        try:
            sets[task] = load_test_set(task, options.data, transform)
        except MergeError as error:
            problems.append(str(error))
    if problems:
        raise MergeError("\n".join(problems))
    fill(model, read_weights(options.merged), options.merged, image=True)
    heads = make_heads(model, options, {task: names for task, (_, names) in sets.items()})
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    model.to(device)

    def measure(task: str) -> float:
        return accuracy(model, heads[task].to(device), sets[task][0], options)

    merged, tuned = {task: measure(task) for task in tasks}, {}
    for task, given in options.finetuned.items():
        if isinstance(given, Path):
            fill(model, read_weights(given), given, image=True)
        tuned[task] = measure(task) if isinstance(given, Path) else given
    absolute, normalised = averages(merged, tuned)
    size = architecture(model)
    return {
        "model": name,
        "architecture": size,
        "images": {task: len(images) for task, (images, _) in sets.items()},
        "merged": merged,
        "finetuned": tuned,
        "absolute": absolute,
        "normalised": normalised,
        "published": published(options.family, size, tasks, options.method),
        "remarks": notes(options),
    }


def report(found: Mapping[str, Any], family: str | None, method: str | None) -> str:
    """The table as text: tasks, averages, published rows less our average, sources and remarks."""

    def line(label: str, *cells: float | str | None) -> str:
        shown = [x if isinstance(x, str) else "-" if x is None else f"{x:.2f}" for x in cells]
        return f"{label:40s}" + "".join(f"{x:>12s}" for x in shown)

    def percent(share: float | None) -> float | None:
        return None if share is None else 100 * share

    absolute, count = 100 * found["absolute"], len(found["merged"])
    lines = [line("accuracy in per cent", "merged", "fine-tuned")]
    for task, share in found["merged"].items():
        lines.append(line(task, 100 * share, percent(found["finetuned"].get(task))))
    lines += ["", line(f"average of {count} tasks", "absolute", "normalised", "difference")]
    lines.append(line("merged", absolute, percent(found["normalised"])))
    for row in sorted(found["published"], key=lambda row: row["absolute"], reverse=True):
        label = f"published: {row['label']}{' (task id)' if row['task_id'] else ''}"
        lines.append(line(label, row["absolute"], row["normalised"], absolute - row["absolute"]))
    lines.append("")
    if family and not found["published"]:
        lines.append(
            f"No published number is known for {method or 'any method'}, {found['architecture']}, these "
            f"{count} tasks, family {family}; suites are the first 8, 14 or 20 tasks."
        )
    sources: dict[str, list[str]] = {}
    for row in found["published"]:
        sources.setdefault(row["source"], []).append(row["label"])
    lines += [f"Source of {', '.join(labels)}: {source}" for source, labels in sources.items()]
    return "\n".join([*lines, *(f"Note: {remark}" for remark in found["remarks"])])


def finetuned(text: str) -> tuple[str, Path | float]:
    """TASK=PATH of a checkpoint, or TASK=ACCURACY in per cent."""
    task, _, given = text.partition("=")
    try:
        return task, float(given) / 100
    except ValueError:
        return task, Path(given)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("merged", type=Path, help="merged weights: a file, or a folder")
    add("--model", required=True, help="open_clip's name of the architecture, or local-dir:FOLDER")
    add("--data", type=Path, required=True, help="folder of the data sets")
    add("--suite", type=int, choices=(8, 14, 20), default=8, help="default: %(default)s")
    add("--tasks", type=lambda text: text.split(","), help="in place of a suite: SUN397,Cars,...")
    add("--text", type=Path, help="full checkpoint whose text tower makes the heads")
    add("--heads", type=Path, help="folder of files head_<task>.pt, in place of prompts")
    tuned = "checkpoints, or accuracies in per cent, for the normalised average"
    add("--finetuned", type=finetuned, nargs="+", default=[], metavar="TASK=PATH", help=tuned)
    add("--family", choices=("a", "b", "c"), help="family of the checkpoints, see published.json")
    add("--method", help="show this method only: tsv_m, iso_c, ...")
    add("--device", default="auto")
    add("--batch", type=int, default=256)
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read images",
    )
    add("--json", type=Path, help="write everything to this file too")
    options = parser.parse_args(argv)
    options.finetuned = dict(options.finetuned)
    try:
        found = evaluate(options)
    except (MergeError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(found, options.family, options.method))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # open_clip warns that no pre-trained weights are loaded yet
    sys.exit(main())
