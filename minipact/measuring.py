"""Statistics of models on data, from files to a file: what `minipact statistics` does, Python can do.

measure_file("covariance", "cars.safetensors", "images/cars", "cov.safetensors", architecture="ViT-B-32")

Two adapters open a model with its data: an open_clip image tower with a folder of images for each class, and
a transformers model with lines of text. For all others there is a protocol of one function, `measure_file`.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from minipact.checkpoints import Checkpoint, open_checkpoint
from minipact.data_statistics import fisher, gradient_magnitudes, input_covariances
from minipact.errors import CheckpointError, MergeError, check_known, listing
from minipact.layouts import OPEN_CLIP, read_json
from minipact.methods import STATISTICS
from minipact.statistics_files import check_target, names_under, save_statistics

PathLike = str | Path
Opened = tuple[nn.Module, Iterable[Any]]
Loader = Callable[[Path, Path], Opened]
ADAPTERS = ("open_clip", "transformers")
Head = tuple[Tensor | None, Tensor | None]  # weight [C, d], bias [C]
SAMPLES = {"covariance": 1024, "fisher": 1024, "gradient": 128}  # the last as published for TATR
LABELS = {"fisher": "true", "gradient": "empirical"}
SCALARS = ("logit_scale", "logit_bias")  # of open_clip, which image towers in files may lack


def measure_file(
    kind: str,
    model: PathLike,
    data: PathLike,
    output: PathLike,
    *,
    loader: str | Loader | None = None,
    architecture: str | None = None,
    head: PathLike | None = None,
    text: PathLike | None = None,
    task: PathLike | None = None,
    labels: str | None = None,
    samples: int | None = None,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure a statistic of a model on data and write it to a file, whole or not at all.

    Args:
        kind: "covariance" of the inputs of linear layers, "fisher", or "gradient", mean magnitudes, which
            TATR wants at the base, on a task's data.
        model: checkpoint; a file of an open_clip model or image tower, a folder of open_clip or transformers.
        data: for open_clip a folder with a folder of images for each class; for transformers a file with a
            text a line, or in a .jsonl of objects {"text": ..., "label": class number}.
        output: ends in .safetensors.
        loader: "open_clip" or "transformers"; None tells them apart by the model. Or the protocol for all
            others: a function (model, data) -> (module, batches), or its place "package.module:function". The
            module's parameters have the names of the model's file, up to one beginning of all. Batches are
            inputs, pairs (inputs, labels), or for covariances keywords as a mapping; for Fisher information
            and gradients the module maps inputs [N, ...] to logits [N, C].
        architecture: open_clip's name of the architecture, where the model is a file.
        head: of an image tower, for Fisher information and gradients: a file with weight [C, d], and perhaps
            bias, classes in the order of their folders' names, as used on embeddings of length 1. None makes
            one of those names, "a photo of a NAME.", by the text tower.
        text: open_clip checkpoint with the text tower for that, where the model has an image tower alone.
        task: checkpoint of the task that it is for, where model is the base: for gradients.
        labels: of Fisher information and gradients, as in `fisher`; None is "true" for the former and
            "empirical", the data's, for the latter.
        samples: images or texts, drawn by seed; None is 1024, or 128 for gradients. What a function
            yields is taken in its order.
        batch: samples at once. seed: of the choice, and of labels drawn. device: where to compute.
        overwrite: replace an existing output.

    Returns:
        A summary that JSON can take, with kind, samples, tensors (their number), file, bytes and seconds.

    Raises:
        CheckpointError: model, task or output cannot be.
        MergeError: the data or an option does not fit, or open_clip or transformers is not installed.
    """
    started, output = time.perf_counter(), Path(output)
    check_known("statistics", [kind], STATISTICS)
    check_target(output, overwrite)
    if (kind == "gradient") != (task is not None):
        hint = "gradients are the base's on a task's data, and take both; all else takes the task's model"
        raise MergeError(f"{kind} with task={task}: {hint}")
    count = SAMPLES[kind] if samples is None else samples
    if count < 1 or batch < 1:
        raise MergeError(f"samples={count}, batch={batch}: must be at least 1")
    stored = open_checkpoint(model)
    source = _Source(
        Path(model), Path(data), stored, kind, count, batch, seed, architecture, head, text
    )
    module, batches = _opened(source, loader)
    module.to(device)
    taken = _Taken(batches, count, device)
    found = _measured(kind, module, taken, labels, seed)
    names = names_under(found, stored)
    _check_names(names, stored)
    state = {names[name]: x for name, x in found.items()}
    save_statistics(
        output, kind, state, model=model, samples=taken.samples, task=task, overwrite=overwrite
    )
    return {
        "kind": kind,
        "samples": taken.samples,
        "tensors": len(found),
        "file": str(output),
        "bytes": output.stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
    }


@dataclass(frozen=True)
class _Source:
    """A model, its data, and how much of it is wanted; see `measure_file`."""

    model: Path
    data: Path
    stored: Checkpoint
    kind: str
    samples: int
    batch: int
    seed: int
    architecture: str | None
    head: PathLike | None
    text: PathLike | None

    @property
    def classifies(self) -> bool:
        """Whether logits are needed, not only what layers see."""
        return self.kind != "covariance"

    def chosen(self, available: int) -> list[int]:
        """Numbers of the samples, drawn by the seed."""
        if available == 0:
            raise MergeError(f"{self.data} holds no sample: give the task's training data")
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        return [int(i) for i in order[: self.samples]]


class _Taken:
    """Batches on a device, until there are enough samples, which are counted."""

    def __init__(self, batches: Iterable[Any], samples: int, device: str) -> None:
        self._batches, self._most, self._device, self.samples = batches, samples, device, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            left = self._most - self.samples
            if left <= 0:
                return
            batch = _cut(batch, left, self._device)
            self.samples += _length(batch)
            yield batch


def _cut(batch: Any, count: int, device: str) -> Any:
    """The first entries of all tensors of a batch, on a device."""
    if isinstance(batch, Tensor):
        return batch[:count].to(device)
    if isinstance(batch, Mapping):
        return {name: _cut(x, count, device) for name, x in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_cut(x, count, device) for x in batch)
    return batch


def _length(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    first = batch if isinstance(batch, Tensor) else next(iter(values))
    return len(first)


def _measured(
    kind: str, module: nn.Module, batches: Iterable[Any], labels: str | None, seed: int
) -> dict[str, Tensor]:
    if kind == "covariance" and labels is not None:
        raise MergeError("covariances take no labels: leave them out")
    generator = torch.Generator().manual_seed(seed)
    measure = {"fisher": fisher, "gradient": gradient_magnitudes}
    try:
        if kind == "covariance":
            return input_covariances(module, batches)
        return measure[kind](module, batches, labels=labels or LABELS[kind], generator=generator)
    except MergeError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if "memory" in str(error):
            raise
        why = f"{type(error).__name__}: {str(error)[:300]}"
        raise MergeError(
            f"the model cannot run on these data, or not sample by sample in torch.func.vmap ({why}): give a "
            "loader whose module and batches can"
        ) from error


def _check_names(names: Mapping[str, str], stored: Checkpoint) -> None:
    """A statistic of which the model's file has no tensor would be of no use to any merge."""
    if not any(name in stored for name in names.values()):
        first = next(iter(names.values()))
        raise MergeError(
            f"no tensor of {stored.path} is called as a parameter of the module, '{first}' for one: let the "
            "loader's module have the names of the file"
        )


# ---- Opening a model with its data ---------------------------------------------------------------


def _opened(source: _Source, loader: str | Loader | None) -> Opened:
    how = _guessed(source) if loader is None else loader
    if how == "open_clip":
        return _open_clip(source)
    given = {name: getattr(source, name) for name in ("architecture", "head", "text")}
    if idle := [name for name, x in given.items() if x is not None]:
        raise MergeError(f"{listing(idle)}: for open_clip models alone, leave it out")
    return _transformers(source) if how == "transformers" else _by_function(source, how)


def _guessed(source: _Source) -> str:
    if source.architecture is not None or (source.model / OPEN_CLIP).is_file():
        return "open_clip"
    config = read_json(source.model / "config.json")
    if isinstance(config, dict) and "model_type" in config:
        return "transformers"
    raise MergeError(
        f"{source.model} does not say what model it is: give open_clip's name of its architecture, or a "
        "loader, package.module:function"
    )


def _by_function(source: _Source, loader: str | Loader) -> Opened:
    """What a function of the user yields."""
    if isinstance(loader, str):
        if ":" not in loader:
            check_known("loader", [loader], [*ADAPTERS, "package.module:function"])
        place, _, name = loader.partition(":")
        try:
            loader = getattr(importlib.import_module(place), name)
        except (Exception, SystemExit) as error:  # whatever its module does when it is imported
            hint = "write package.module:function, with its folder on PYTHONPATH"
            raise MergeError(f"{place}:{name} cannot be imported ({error!r}): {hint}") from error
    opened: Any = loader(source.model, source.data) if callable(loader) else None
    is_pair = isinstance(opened, tuple) and len(opened) == 2
    if not is_pair or not isinstance(opened[0], nn.Module):
        raise MergeError("a loader is a function (model, data) -> (torch module, batches)")
    module, batches = opened
    return module, batches


def _library(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MergeError(
            f"{name} is missing ({error}): pip install {package}, or give a loader, package.module:function"
        ) from error


# ---- open_clip -----------------------------------------------------------------------------------


class _Tower(nn.Module):
    """An image tower under its name in open_clip's files, with a head [C, d] where there is one."""

    head: Tensor | None
    bias: Tensor | None

    def __init__(self, visual: nn.Module, head: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.visual(images)
        if self.head is None:
            return found
        return nn.functional.linear(nn.functional.normalize(found, dim=-1), self.head, self.bias)


def _open_clip(source: _Source) -> Opened:
    """An open_clip image tower, and images by class."""
    open_clip = _library("open_clip", "open_clip_torch")
    folders = _library("torchvision.datasets", "torchvision")
    name = source.architecture
    if name is None and source.model.is_dir():
        name = f"local-dir:{source.model}"
    if name is None:
        raise MergeError(f"{source.model} is a file: give open_clip's name of its architecture too")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, load_weights=False, pretrained_text=False
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise MergeError(f"open_clip cannot make a model {name}: {error}") from error
    model.float().eval()
    _fill(model.visual, source.stored, "visual.")
    try:
        images = folders.ImageFolder(str(source.data), transform)
    except (OSError, RuntimeError) as error:
        hint = "give a folder with a folder of images for each class"
        raise MergeError(f"{source.data} holds no images by class ({error}): {hint}") from error
    head: Head = (None, None)
    if source.classifies and source.head is not None:
        head = _stored_head(Path(source.head), images.classes)
    elif source.classifies:
        head = _head_of_names(source, model, open_clip.get_tokenizer(name), images.classes), None
    chosen = torch.utils.data.Subset(images, source.chosen(len(images)))
    return _Tower(model.visual, *head), torch.utils.data.DataLoader(chosen, source.batch)


def _fill(module: nn.Module, stored: Checkpoint, beginning: str) -> None:
    """Load a part of a model out of a file, whose names may have a beginning more."""
    wanted = {f"{beginning}{name}": x for name, x in module.state_dict().items()}
    places = names_under(wanted, stored)
    if missing := [name for name, place in places.items() if place not in stored]:
        hint = "is it of this architecture?"
        raise MergeError(
            f"{stored.path} lacks {len(missing)} of {len(wanted)} tensors, '{missing[0]}' first: {hint}"
        )
    for name, place in places.items():
        here, there = stored.meta(place).shape, wanted[name].shape
        if here != there:
            raise MergeError(
                f"'{place}' of {stored.path} is {[*here]}, the architecture has {[*there]}: name another"
            )
    module.load_state_dict(
        {name.removeprefix(beginning): stored[place].float() for name, place in places.items()}
    )


def _stored_head(file: Path, classes: Sequence[str]) -> Head:
    """Weight [C, d] and bias of a head in a file."""
    stored = open_checkpoint(file)
    weight = stored["weight"].float() if "weight" in stored else torch.empty(0)
    if weight.ndim != 2 or len(weight) != len(classes):
        what = f"no weight [C, d] for {len(classes)} classes"
        raise CheckpointError(f"{file} holds {what}: give the head of this task")
    return weight, stored["bias"].float() if "bias" in stored else None


def _head_of_names(source: _Source, model: Any, tokenizer: Any, classes: Sequence[str]) -> Tensor:
    """Head [C, d] of the names of the classes, by the text tower, times the scale of its logits."""
    open_clip = _library("open_clip", "open_clip_torch")
    words = source.stored if source.text is None else open_checkpoint(source.text)
    parts = {n: x for n, x in model.state_dict().items() if not n.startswith("visual.")}
    places = names_under(parts, words)
    found = {name: place for name, place in places.items() if place in words}
    if missing := [name for name in parts if name not in found and name not in SCALARS]:
        raise MergeError(
            f"{words.path} lacks the text tower, '{missing[0]}' for one, which makes a head of the classes' "
            "names: name a full open_clip checkpoint for it (text), or a head"
        )
    model.load_state_dict(
        {name: words[x].to(parts[name]) for name, x in found.items()}, strict=False
    )
    said = [name.replace("_", " ") for name in classes]
    weight: Tensor = open_clip.build_zero_shot_classifier(
        model, tokenizer, said, ["a photo of a {}."]
    ).mT
    scale = float(model.logit_scale.detach().exp())
    return weight.detach() * scale


# ---- transformers --------------------------------------------------------------------------------


class _Classifier(nn.Module):
    """Token numbers [N, L] -> logits [N, C] of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def _transformers(source: _Source) -> Opened:
    """A transformers text model, and texts of one length in each batch, so that nothing is padded."""
    transformers = _library("transformers", "transformers")
    config = read_json(source.model / "config.json")
    named = config.get("architectures") if isinstance(config, dict) else None
    name = named[0] if isinstance(named, list) and named else "AutoModel"
    if source.classifies and not str(name).endswith("ForSequenceClassification"):
        hint = "Fisher information and gradients need a classifier, or a loader of your own"
        raise MergeError(f"{source.model} is a {name}: {hint}")
    kind = getattr(transformers, str(name), None) or transformers.AutoModel
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.model)
        model = kind.from_pretrained(source.model, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, ImportError) as error:
        raise MergeError(f"transformers cannot open {source.model}: {error}") from error
    model.eval()
    texts, labels = _lines(source.data)
    chosen = source.chosen(len(texts))
    rows = [tokenizer(texts[i], truncation=True)["input_ids"] for i in chosen]
    batches = _by_length(rows, [labels[i] for i in chosen], source.batch)
    return (_Classifier(model) if source.classifies else model), batches


def _by_length(
    rows: Sequence[list[int]], labels: Sequence[int | None], batch: int
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Batches of token numbers [N, L], with labels [N] where all have one."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for _, group in groupby(order, key=lambda i: len(rows[i])):
        alike = list(group)
        for start in range(0, len(alike), batch):
            part = alike[start : start + batch]
            tokens = torch.tensor([rows[i] for i in part])
            known = [x for i in part if (x := labels[i]) is not None]
            yield (tokens, torch.tensor(known)) if len(known) == len(part) else tokens


def _lines(file: Path) -> tuple[list[str], list[int | None]]:
    """Texts of a file, and their labels in a .jsonl."""
    hint = 'give a text a line, or in a .jsonl {"text": "...", "label": 0}, with class numbers as labels'
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{file} cannot be read ({error}): {hint}") from error
    if file.suffix != ".jsonl":
        return lines, [None] * len(lines)
    texts: list[str] = []
    labels: list[int | None] = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            text, label = found["text"], found.get("label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MergeError(
                f"text {number} of {file} cannot be read ({error!r}): {hint}"
            ) from error
        if not isinstance(text, str) or not isinstance(label, int | None):
            raise MergeError(f"text {number} of {file} is {found}: {hint}")
        texts.append(text)
        labels.append(label)
    return texts, labels
