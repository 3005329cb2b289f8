"""Which files of a model's folder hold its weights, who reads them there, and what else belongs to it.

Goes by names and small JSON files, as the libraries do that load the folders. Knows nothing of tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from minipact.errors import CheckpointError, listing

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
JOURNAL = "journal.jsonl"  # of an unfinished output
INDEX = "model.safetensors.index.json"
OPEN_CLIP = "open_clip_config.json"
ADAPTER = "adapter_config.json"  # of PEFT
READERS = {  # name of the weights -> the library that reads them, and their name in an output
    "model.safetensors": ("transformers", "model"),
    "pytorch_model.bin": ("transformers", "model"),
    "diffusion_pytorch_model.safetensors": ("diffusers", "diffusion_pytorch_model"),
    "diffusion_pytorch_model.bin": ("diffusers", "diffusion_pytorch_model"),
    "open_clip_model.safetensors": ("open_clip", "open_clip_model"),
    "open_clip_pytorch_model.bin": ("open_clip", "open_clip_model"),
}
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})(\.[^.]+)?")


_RANK = re.compile(r"(consolidated\.|mp_rank_)\d\d(\.pth|_model_states\.pt)")  # of parallel parts


@dataclass(frozen=True)
class Stem:
    """How the weights of one part of a model are called in its folder.

    Attributes:
        name: "model" of model.safetensors. variant: "fp16" of model.fp16.safetensors. folder: where in the
            model's folder they are, "2_Dense" for one.
    """

    name: str = "model"
    variant: str = ""
    folder: str = ""

    def file(self, number: int = 1, total: int = 1) -> PurePosixPath:
        """The file's path in the model's folder; one shard of several."""
        shard = f"-{number:05d}-of-{total:05d}" if total > 1 else ""
        variant = f".{self.variant}" if self.variant else ""
        return PurePosixPath(self.folder, f"{self.name}{variant}{shard}.safetensors")

    @property
    def index(self) -> PurePosixPath:
        """Path of the index of shards."""
        variant = f".{self.variant}" if self.variant else ""
        return PurePosixPath(self.folder, f"{self.name}.safetensors.index{variant}.json")


@dataclass(frozen=True)
class Part:
    """Weights that are read as a whole.

    Attributes:
        files: those that hold them. index: the file that says which tensor is in which, of shards only.
        stem: their names in an output. prefix: put before the names of their tensors, to tell modules apart.
        reader: the library that knows them by their name, if one does.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    stem: Stem = Stem()
    prefix: str = ""
    reader: str = ""


@dataclass(frozen=True)
class Layout:
    """What stands at a path: the parts of a model, and the folder whose other files belong to it, if any."""

    parts: tuple[Part, ...]
    folder: Path | None = None

    @property
    def stems(self) -> dict[str, Stem]:
        """Prefix of a part's names -> the names of its files in an output."""
        return {part.prefix: part.stem for part in self.parts}

    @property
    def in_one_file(self) -> bool:
        """Whether the library that reads the folder knows no shards."""
        return self.folder is not None and _is_open_clip(self.folder, self.parts[0].reader)


def by_prefix(names: Iterable[str], prefixes: Collection[str]) -> dict[str, list[str]]:
    """Names of tensors by the part that they belong to, whose prefix is the longest that fits."""
    found: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in names:
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        if not fitting:
            raise CheckpointError(f"tensor '{name}' belongs to no module of the base: exclude it")
        found[max(fitting, key=len)].append(name)
    return found


# ---- Weights -------------------------------------------------------------------------------------


def find_layout(path: Path) -> Layout:
    """The weights at a path.

    Raises:
        CheckpointError: nothing there, a part of a model only, several models, or an index that is none.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a file or folder on this machine")
    if path.suffix not in (".safetensors", *PICKLES):
        raise CheckpointError(
            f"{path} has an unknown ending: use .safetensors, a folder, or one of {' '.join(PICKLES)}"
        )
    return _of_file(path)


def _of_file(path: Path) -> Layout:
    """A file alone; one that a library knows by its name, beside its configuration, stands for the folder."""
    if total := _shards(path):
        raise CheckpointError(
            f"{path} is one of {total} shards, a part of a model only: give {path.parent}, the folder "
            "with all of them and their index"
        )
    if siblings := _parallel(path):
        raise CheckpointError(
            f"{path} is one of {len(siblings)} parts of a model, {listing(siblings)}: join them with their "
            "tool"
        )
    known = _known(path)
    modules = (path.parent / "modules.json").is_file()
    if known is None or modules or not _is_read_there(path.parent, known.reader):
        return Layout((Part((path,)),))
    return Layout((known.part(),), path.parent)


def _of_folder(folder: Path) -> Layout:
    if folder.suffix == ".partial" and (folder / JOURNAL).exists():
        raise CheckpointError(f"{folder} is an unfinished output: repeat its command with --resume")
    if (folder / "model_index.json").is_file() and (inner := _components(folder)):
        raise CheckpointError(
            f"{folder} is a pipeline of several models: give the folder of one, {listing(inner)}"
        )
    modules = _modules(folder)
    found = {module: part for module in modules if (part := _part(folder / module)) is not None}
    if found and "" not in modules and (loose := _all_known(folder)):
        raise CheckpointError(
            f"{folder} holds weights, {loose[0].path.name}, that modules.json does not name, beside those in "
            f"{listing(found)}: remove what is out of date, or give one of its folders"
        )
    first = folder / modules[0]
    if found and modules[0] not in found and _has_weights(first):
        raise CheckpointError(_nothing(first))
    if not found and (part := _part(folder)) is not None:
        found, modules = {"": part}, [""]
    if not found:
        raise CheckpointError(_nothing(folder))
    parts = [_placed(part, module, modules[0]) for module, part in found.items()]
    return Layout(tuple(parts), folder)


def _placed(part: Part, module: str, first: str) -> Part:
    """A part under the name of its module; the first module's tensors keep their own names."""
    stem = Stem(part.stem.name, part.stem.variant, module)
    prefix = "" if module == first else f"{module}/"
    return Part(part.files, part.index, stem, prefix, part.reader)


@dataclass(frozen=True)
class _Known:
    """A file under a name that a library looks for: weights, or the index of their shards."""

    path: Path
    reader: str
    stem: Stem
    ending: str
    is_index: bool

    def part(self) -> Part:
        if not self.is_index:
            return Part((self.path,), None, self.stem, reader=self.reader)
        return Part(_indexed(self.path), self.path, self.stem, reader=self.reader)


def _known(path: Path) -> _Known | None:
    """What a file is by its name: model.fp16.safetensors, or model.safetensors.index.fp16.json."""
    for name, (reader, output) in READERS.items():
        stem, ending = name.split(".")
        single = re.fullmatch(rf"{stem}(?:\.([^.]+))?\.{ending}", path.name)
        index = re.fullmatch(rf"{stem}\.{ending}\.index(?:\.([^.]+))?\.json", path.name)
        if match := single or index:
            return _Known(path, reader, Stem(output, match[1] or ""), ending, bool(index))
    return None


def _all_known(folder: Path) -> list[_Known]:
    """Weights in a folder under names that libraries look for, in the order in which these look."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not _shards(file))
    found = [known for file in files if (known := _known(file)) is not None]
    return sorted(
        found, key=lambda x: (bool(x.stem.variant), x.ending != "safetensors", x.is_index)
    )


def _part(folder: Path) -> Part | None:
    """The weights in a folder itself, if there are some.

    Raises CheckpointError where several are, of which none goes before the others.
    """
    if not folder.is_dir():
        return None
    known = _all_known(folder)
    if not known:
        return _unknown(folder)
    reader = _reader(folder, known)
    ours = [found for found in known if found.reader == reader]
    best = ours[0]
    if best.stem.variant and any(found.stem != best.stem for found in ours):
        raise CheckpointError(
            f"{folder} holds variants, {listing(found.path.name for found in ours)}: name the file to read"
        )
    twins = [x for x in ours if (x.stem, x.ending) == (best.stem, best.ending) and x.is_index]
    if not best.is_index and twins:
        part = twins[0].part()
        if best.path in part.files:
            return part
        raise CheckpointError(
            f"{folder} holds both {best.path.name} and the shards of {twins[0].path.name}: remove what is "
            "out of date"
        )
    return best.part()


def _reader(folder: Path, known: list[_Known]) -> str:
    """The library whose weights are meant where several have some: the one whose configuration is there."""
    first = {found.reader: found.path for found in reversed(known)}
    told = [reader for reader in first if _is_read_there(folder, reader)]
    if len(first) == 1:
        return known[0].reader
    if len(told) == 1:
        return told[0]
    held = " and ".join(f"{path.name} for {reader}" for reader, path in sorted(first.items()))
    ways = " or ".join(str(path) for _, path in sorted(first.items()))
    raise CheckpointError(
        f"{folder} holds weights of several libraries, {held}, and a merge writes one of them: name the "
        f"file in all inputs, {ways} here; what else its library needs comes along"
    )


def _is_read_there(folder: Path, reader: str) -> bool:
    """Whether a library's configuration is in a folder."""
    if reader == "open_clip":
        return (folder / OPEN_CLIP).is_file()
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    is_diffusers = isinstance(config, dict) and "_class_name" in config
    return is_diffusers == (reader == "diffusers")


def _unknown(folder: Path) -> Part | None:
    """The one safetensors file or index of shards in a folder, whatever it is called."""
    suffix = ".safetensors.index.json"
    indexes = sorted(folder.glob(f"*{suffix}"))
    if len(indexes) > 1:
        names = listing(index.name for index in indexes)
        raise CheckpointError(f"{folder} holds several indexes of shards, {names}: leave one there")
    if indexes:
        return Part(_indexed(indexes[0]), indexes[0], Stem(indexes[0].name.removesuffix(suffix)))
    files = tuple(sorted(folder.glob("[!.]*.safetensors")))
    if shards := [file for file in files if _shards(file)]:
        raise CheckpointError(_without_index(shards[0]))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds several safetensors files and no {Stem().index}: name the file to read, if "
            f"each is a whole model: {listing(file.name for file in files)}"
        )
    if not files:
        return None
    match = _match(files[0])
    return Part(files, None, Stem(match["stem"] if match else files[0].stem))


def _match(file: Path) -> re.Match[str] | None:
    """Parts of the name of a shard."""
    return _SHARD.fullmatch(file.stem)


def _shards(file: Path) -> int:
    """Number of shards that a file says to be one of; 0 where it is a whole."""
    match = _match(file)
    total = int(match["total"]) if match else 1
    return total if total > 1 else 0


def _parallel(file: Path) -> list[str]:
    """Names of the parts that model-parallel training wrote beside a file, and its own; none for a whole."""
    match = _RANK.fullmatch(file.name)
    if match is None:
        return []
    names = sorted(other.name for other in file.parent.glob(f"{match[1]}*{match[2]}"))
    found = [name for name in names if _RANK.fullmatch(name)]
    return found if len(found) > 1 else []


def _without_index(shard: Path) -> str:
    match = _match(shard)
    assert match is not None
    known = _known(shard.with_name(f"{match['stem']}{shard.suffix}"))
    variant = f".{known.stem.variant}" if known and known.stem.variant else ""
    index = f"{match['stem'].removesuffix(variant)}{shard.suffix}.index{variant}.json"
    held = f"{shard.parent} holds shards, {shard.name} for one"
    return f"{held}, without their index: fetch {index} too"


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names: all that there are, by what they say themselves."""
    files = tuple(sorted(set(read_index(index).values())))
    said = Counter((match["stem"], int(match["total"])) for match in map(_match, files) if match)
    for (_, total), named in said.items():
        if named != total:
            raise CheckpointError(f"{index} names {named} of {total} shards: fetch it again")
    return files


def read_index(index: Path) -> dict[str, Path]:
    """Name of each tensor -> the shard that an index says it is in.

    Raises:
        CheckpointError: no index, or it names files outside of its folder or such that are not there.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({error!r}): fetch it again"
        ) from error
    if not shards:
        raise CheckpointError(f"{index} is no index of shards, as it is empty: fetch it again")
    for shard in shards.values():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names '{shard}' outside of its folder: refused")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is not there: fetch it again")
    return {name: index.parent / shard for name, shard in shards.items()}


# ---- Folders of several models -------------------------------------------------------------------


def _components(folder: Path) -> list[str]:
    """Subfolders with weights of their own."""
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path.name for path in inner if _has_weights(path))


def _has_weights(folder: Path) -> bool:
    try:
        return any(_is_weights(path.name) for path in folder.iterdir() if path.is_file())
    except PermissionError:
        return False


def _modules(folder: Path) -> list[str]:
    """Folders of a sentence-transformers model's modules in their order, "" for its own; of others [""]."""
    if not (folder / "modules.json").is_file():
        return [""]
    listed = read_json(folder / "modules.json")
    if isinstance(listed, list):
        paths = [str(entry.get("path", "")) for entry in listed if isinstance(entry, dict)]
    else:
        numbered = (path.name for path in folder.iterdir() if path.is_dir())
        paths = ["", *sorted(name for name in numbered if re.match(r"\d+_", name))]
    whole = [inner for path in paths for inner in [path, *_routes(folder, path)]]
    if outside := [path for path in whole if not _is_within(path)]:
        raise CheckpointError(
            f"{folder / 'modules.json'} names '{outside[0]}' outside of its folder: refused"
        )
    found = (PurePosixPath(path).as_posix() for path in whole)
    return list(dict.fromkeys("" if path == "." else path for path in found)) or [""]


def _is_within(path: str) -> bool:
    pure = PurePosixPath(path)
    return not (pure.is_absolute() or Path(path).is_absolute() or ".." in pure.parts)


def _routes(folder: Path, path: str) -> list[str]:
    """Folders of the modules that a module chooses between."""
    for name in ("router_config.json", "config.json") if _is_within(path) else ():
        config = read_json(folder / path / name)
        if isinstance(config, dict) and isinstance(config.get("types"), dict):
            return [str(PurePosixPath(path, str(inner))) for inner in config["types"]]
    return []


def read_json(file: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _nothing(folder: Path) -> str:
    """Why a folder holds no weights that can be read, and what to give instead."""
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())
    if (folder / "zero_to_fp32.py").is_file():
        return f"{folder} is a checkpoint of DeepSpeed: run its zero_to_fp32.py and give what it writes"
    if found := [*folder.glob("*.distcp"), *folder.glob("*/*.distcp")]:
        tool = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        return f"{folder} holds a distributed checkpoint, {found[0].parent.name}: convert it with {tool}"
    if (folder / "snapshots").is_dir():
        inner = sorted(f"snapshots/{p.name}" for p in (folder / "snapshots").iterdir())
        return f"{folder} is an entry of a cache: give a folder in it, {listing(inner)}"
    if pickles and (parts := _parallel(pickles[0])):
        return f"{folder} holds parts of a model, {listing(parts)}: join them with their tool"
    if shards := [file for file in pickles if _shards(file)]:
        return _without_index(shards[0])
    models = [file.name for file in pickles if not _TRAINING.fullmatch(file.name)]
    if len(models) == 1:
        return f"{folder} holds no safetensors file: name the file, {models[0]}"
    if models:
        return (
            f"{folder} holds no safetensors file but {listing(models)}: name the file, if each "
            "is a whole model"
        )
    if inner := _components(folder):
        return f"{folder} holds no safetensors file: give a folder in it, {listing(inner)}"
    weights = [p for p in folder.iterdir() if _is_weights(p.name) or p.suffix == ".npz"]
    if foreign := sorted(p.name for p in weights if p not in pickles):
        return (
            f"{folder} holds no safetensors file but {listing(foreign)}, which is not read here: save the "
            "model with PyTorch and give that"
        )
    return f"{folder} holds no safetensors file: is it the right folder?"


# ---- What else belongs to a model ----------------------------------------------------------------

_ENDINGS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".ggml",
            ".tflite", ".pb", ".mlmodel", ".pkl", ".pickle")  # fmt: skip
_WEIGHTS = re.compile(r".+\.(safetensors|bin)\.index(\..+)?\.json|.+\.ckpt\.(index|meta|data-.+)")
_TRAINING = re.compile(  # states of training, among pickles
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|dataloader|sampler).*"
)
_LOGS = re.compile(r"trainer_state\.json|events\.out\.tfevents.*")
_NO_PART = re.compile(r"\..+|__pycache__|checkpoints?(-.*)?|global_step\d+|runs|wandb")  # folders
FILE_LIMIT, ALL_LIMIT, COUNT_LIMIT = 100_000_000, 500_000_000, 2000


@dataclass
class SideFiles:
    """Files that a copy of a model needs beside its weights.

    Attributes:
        files: relative to the model's folder. unmerged: weights and states of training, which stay out.
        too_large, unreadable: what stays out for its size, or as it cannot be read.
    """

    files: list[Path] = field(default_factory=list)
    unmerged: list[str] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        large, all_ = FILE_LIMIT // 10**6, ALL_LIMIT // 10**6
        limits = f"larger than {large} MB, or beyond {all_} MB or {COUNT_LIMIT} files in all"
        told = {
            "as it is not merged": self.unmerged,
            f"as it is {limits}; copy what is needed": self.too_large,
            "as it cannot be read": self.unreadable,
        }
        return [f"not in the output, {why}: {listing(x)}" for why, x in told.items() if x]


def side_files(layout: Layout) -> SideFiles:
    """All in a model's folder but weights, states of training, and what is no part of the model.

    Links count as what they point to. A subfolder with weights that are not merged is another model.
    """
    found, size = SideFiles(), 0
    if layout.folder is None:
        return found
    merged = {file for part in layout.parts for file in (*part.files, part.index)}
    parts = {layout.folder / part.stem.folder for part in layout.parts}
    for name in _walk(layout.folder, Path(), parts, found, set()):
        file = layout.folder / name
        if file in merged or str(name) == "README.md":  # the output has a card of its own
            continue
        if _is_weights(file.name) or _LOGS.fullmatch(file.name) or _is_others(name, layout):
            found.unmerged.append(name.as_posix())
            continue
        length = file.stat().st_size
        if length > FILE_LIMIT or size + length > ALL_LIMIT:
            found.too_large.append(name.as_posix())
        elif not os.access(file, os.R_OK):
            found.unreadable.append(name.as_posix())
        elif len(found.files) == COUNT_LIMIT:
            found.too_large.append(f"{name.as_posix()} and what follows")
            break
        else:
            size += length
            found.files.append(name)
    return found


def _walk(
    root: Path, folder: Path, parts: Collection[Path], found: SideFiles, above: Collection[Path]
) -> Iterator[Path]:
    """Files in a folder below a root, then in its subfolders; links are followed, but into no circle."""
    inside = sorted((root / folder).iterdir())
    yield from (folder / path.name for path in inside if path.is_file())
    within = {*above, (root / folder).resolve()}
    for path in inside:
        name = folder / path.name
        if not path.is_dir() or _NO_PART.fullmatch(path.name) or path.resolve() in within:
            continue
        if not os.access(path, os.R_OK | os.X_OK):
            found.unreadable.append(f"{name.as_posix()}/")
        elif path not in parts and _has_weights(path):
            found.unmerged.append(f"{name.as_posix()}/")
        elif not (path / JOURNAL).exists():  # an output that grows here
            yield from _walk(root, name, parts, found, within)


def _is_weights(name: str) -> bool:
    return name.endswith(_ENDINGS) or bool(_WEIGHTS.fullmatch(name))


def _is_others(name: Path, layout: Layout) -> bool:
    """Whether a file is the configuration of weights that were there and are not merged."""
    reader = layout.parts[0].reader
    if str(name) == ADAPTER:  # transformers would look for the adapter
        return True
    if str(name) != OPEN_CLIP or layout.folder is None:
        return False
    return not _is_open_clip(layout.folder, reader)


def _is_open_clip(folder: Path, reader: str) -> bool:
    """Whether open_clip reads what is merged; without weights under its own names it takes others."""
    if not (folder / OPEN_CLIP).is_file():
        return False
    return reader == "open_clip" or all(found.reader != "open_clip" for found in _all_known(folder))
