"""State dicts in files of torch.save, read without running any code that they may hold.

torch's restricted unpickler reads them; a few layouts that it cannot read go through an unpickler that makes
tensors and plain containers only. Whatever else a file names becomes an inert stand-in.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from minipact.errors import CheckpointError, listing

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before all names
USUAL = ("state_dict", "model_state_dict", "model", "module", "ema")  # keys of nothing else
DEEPEST = 4  # of state dicts in a training checkpoint; a pickle may hold itself


@dataclass(frozen=True)
class Pickled:
    """Tensors of a file by name, and the key of a training checkpoint under which they stood, if any."""

    tensors: dict[str, Tensor]
    entry: str | None


def read_pickle(path: Path, entry: str | None = None) -> Pickled:
    """The state dict in a file, or the one in a training checkpoint around it.

    Args:
        path: a file of torch.save.
        entry: key of the state dict in a training checkpoint, "ema", or "ema/module" for one further in; a
            file that is a state dict itself has no need of it.

    Raises:
        CheckpointError: damaged, of an unsafe format, without a state dict, or with several and no entry.
    """
    content = _content(path)
    try:
        found = _states(content)
    except (RecursionError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no whole state dict ({error}): fetch it again") from error
    if not found or (_holds_weights(content) and not found.keys() & {entry, *USUAL}):
        return Pickled(_tensors(path, content), None)
    if entry is None and "state_dict" in found:
        found = _alike(found, "state_dict")
    if entry is None and len(found) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts: choose one of {listing(found)} by --entry {next(iter(found))}"
        )
    if entry is not None and entry not in found:
        raise CheckpointError(
            f"{path} has no state dict under '{entry}': give --entry one of {listing(found)}"
        )
    key = next(iter(found)) if entry is None else entry
    return Pickled(_tensors(path, found[key]), key)


def without_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors without what training put before all their names, and what that was."""
    stripped = ""
    while found := [w for w in WRAPPERS if tensors and all(name.startswith(w) for name in tensors)]:
        stripped += found[0]
        tensors = {name.removeprefix(found[0]): x for name, x in tensors.items()}
    return dict(tensors), stripped


# ---- Training checkpoints ------------------------------------------------------------------------


def _states(content: object, place: str = "") -> dict[str, Mapping[Any, Any]]:
    """State dicts within a training checkpoint by their keys, one further in with a / between."""
    found: dict[str, Mapping[Any, Any]] = {}
    if not isinstance(content, dict) or "param_groups" in content or place.count("/") == DEEPEST:
        return found  # an optimizer has groups
    for key, value in content.items():
        if not isinstance(key, str) or re.search("optimi[sz]er|sched|^optim$", key):
            continue
        if isinstance(value, _StandIn) and "_modules" in value.__dict__:
            value = dict(_module_tensors(value, ""))
        if _holds_weights(value) or (key in USUAL and _is_plain(value)):
            found[f"{place}{key}"] = value
        else:
            found |= _states(value, f"{place}{key}/")
    return found


def _alike(found: Mapping[str, Mapping[Any, Any]], key: str) -> dict[str, Mapping[Any, Any]]:
    """The state dict under a key, and those that could be meant in its place: they share names with it."""

    def names(state: Mapping[Any, Any]) -> set[str]:
        return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in state}

    ours = names(found[key])
    return {other: state for other, state in found.items() if ours & names(state)}


def _holds_weights(content: object) -> bool:
    """Whether weights stand in a mapping itself, and not only counters, scores or states of generators."""
    if not isinstance(content, dict):
        return False
    tensors = [x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)]
    return any(x.ndim and x.dtype not in _COUNTS for x in tensors)


_COUNTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def _is_plain(content: object) -> bool:
    """Whether a mapping holds tensors and nothing else."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(x, Tensor) for x in content.values())
    )


def _tensors(path: Path, state: object) -> dict[str, Tensor]:
    """The tensors of a state dict, which holds nothing else and holds them as plain numbers."""
    if not isinstance(state, Mapping):
        kind = _kind(state)
        raise CheckpointError(
            f"{path} is no state dict of tensors but {kind}: save a dict name -> tensor"
        )
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise CheckpointError(
                f"{path} is no state dict of tensors, as its entry '{name}' is {_kind(x)}. If you trust it, "
                f"save its tensors alone:\n{_saving_tensors(path)}"
            )
        if x.layout != torch.strided or x.is_quantized or x.is_meta:
            kind = "without data" if x.is_meta else "quantized" if x.is_quantized else "sparse"
            raise CheckpointError(f"{path}: tensor '{name}' is {kind}: save a plain dense tensor")
    return {str(name): x.detach() for name, x in state.items()}


def _kind(x: object) -> str:
    return "an object of a class" if isinstance(x, _StandIn) else f"of type {type(x).__name__}"


# ---- Unpickling ----------------------------------------------------------------------------------


def _content(path: Path) -> Any:
    if tarfile.is_tarfile(path):  # which versions of torch before 2.6 unpack with all that is in it
        raise CheckpointError(
            f"{path} is a tar file, as torch wrote it before version 0.1.10: load and save it again elsewhere"
        )
    try:
        return _load(path)
    except pickle.UnpicklingError as error:
        if told := _otherwise_saved(path):
            raise CheckpointError(told) from error
        raise CheckpointError(
            f"{path} holds more than tensors and is not opened, as that would run code in it. If you "
            f"trust it, convert it elsewhere:\n{_converting(path)}"
        ) from error
    except Exception as error:  # torch.load raises many kinds on damaged files
        if told := _otherwise_saved(path):
            raise CheckpointError(told) from error
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, as OpenAI's CLIP files are, and is not opened. If you "
                f"trust it, save torch.jit.load({path.name!r}).state_dict() as safetensors elsewhere"
            ) from error
        raise CheckpointError(f"{path} is no whole state dict ({error}): fetch it again") from error


def _otherwise_saved(path: Path) -> str:
    """Why a file is none of torch.save, or of an old protocol, and the lines that save it again, if so."""
    kind = _kind_of_pickle(path)
    if kind == "zip":
        return f"{path} is a zip archive, but none of torch.save: fetch it again, or convert it with its tool"
    if kind == "none":
        return f"{path} is no file of torch.save: fetch it again"
    if kind == "plain":
        return (
            f"{path} is a pickle, but none of torch.save, and is not opened, as that would run code in it. "
            "If you trust it, and it holds a dict of tensors or arrays, save it again elsewhere:\n"
            "  import pickle, torch\n"
            f"  state = pickle.load(open({path.name!r}, 'rb'))\n"
            "  torch.save({k: torch.as_tensor(v) for k, v in state.items()}, 'tensors.pt')"
        )
    words = _words(path)
    if not words or "PROTO" in words:  # which protocols have from 2 on
        return ""
    if "PERSID" in words:
        return (
            f"{path} is in pickle's protocol 0, which torch writes and cannot read: save it again where it "
            "was made, without pickle_protocol"
        )
    return (
        f"{path} is in pickle's protocol 1, which is not read here. If you trust it, save it again "
        f"elsewhere:\n{_converting(path)}"
    )


def _converting(path: Path) -> str:
    """Lines that turn what is refused into what is read: the tensors of a dict, or of a module."""
    if _is_dict(path):
        return _saving_tensors(path)
    return (
        "  import torch, safetensors.torch\n"
        f"  model = torch.load({path.name!r}, weights_only=False)\n"
        "  state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}\n"
        "  safetensors.torch.save_file(state, 'model.safetensors')"
    )


def _saving_tensors(path: Path) -> str:
    """Lines that save what is a tensor in a dict, and in dicts within."""
    return (
        "  import torch\n"
        "  def tensors(x):\n"
        "      kept = {k: v for k, v in x.items() if isinstance(v, (dict, torch.Tensor))}\n"
        "      return {k: tensors(v) if isinstance(v, dict) else v for k, v in kept.items()}\n"
        f"  torch.save(tensors(torch.load({path.name!r}, weights_only=False)), 'tensors.pt')"
    )


def _load(path: Path) -> Any:
    """Contents of a torch.save file by torch's restricted unpickler, as far as that goes.

    A whole pickled module, as the older checkpoints of the field are, names classes that the unpickler
    refuses. Each of them is replaced by an inert stand-in, so that no code of theirs runs, and the
    tensors are then picked from the stand-ins as nn.Module.state_dict() picks them.
    """
    load = partial(torch.load, path, map_location="cpu", mmap=_is_zip(path))
    unsafe = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on protocols beyond 2, which are dealt with here
        try:
            return load(weights_only=True)
        except pickle.UnpicklingError:
            newer = _protocol(path) > 2
            if not newer and (unsafe is None or not _is_zip(path)):
                raise
        if newer:
            content = _load_newer(path, load)
        else:
            assert unsafe is not None
            stand_ins: list[Any] = [
                (type("StandIn", (_StandIn,), {}), name) for name in unsafe(path)
            ]
            with torch.serialization.safe_globals(stand_ins):
                content = load(weights_only=True)
    if not isinstance(content, _StandIn):
        return content
    if "_modules" not in content.__dict__:
        raise pickle.UnpicklingError("neither tensors nor a module")
    return dict(_module_tensors(content, ""))


def _load_newer(path: Path, load: Callable[..., Any]) -> Any:
    """Contents of a file in pickle's later protocols, some of whose words torch's own unpickler lacks."""
    module = SimpleNamespace(__name__="inert", Unpickler=_Inert, load=_load_inert)
    try:
        return load(weights_only=False, pickle_module=module)
    except (AttributeError, TypeError) as error:  # of stand-ins that were to act as lists, for one
        raise pickle.UnpicklingError(str(error)) from error


class _Inert(pickle.Unpickler):
    """Knows what makes tensors and plain containers; all other names get stand-ins that do nothing.

    pickle calls only what find_class returns, so no function can run that is not among the makers.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":  # which torch.load sets
            value = partial(_persistent, value)
        super().__setattr__(name, value)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _MAKERS:
            return _Maker(getattr(torch._utils, name))
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return SimpleNamespace(dtype=torch.uint8)  # all that torch.load asks it for
        if module == "torch" and name == "Size":
            return _Maker(torch.Size)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return type("StandIn", (_StandIn,), {})


def _persistent(load: Callable[[Any], Any], saved: Any) -> Any:
    """What a file holds beside its pickle; of a class its source, which torch compares and may write down."""
    return saved[1] if saved[0] == "module" else load(saved)


def _load_inert(file: IO[bytes], **settings: Any) -> Any:
    return _Inert(file, **settings).load()


_MAKERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")


class _Maker:
    """A function that a pickle may call and nothing else: it could set a function's attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("functions have no state")


class _StandIn:
    """Takes the place of a pickled object: keeps its attributes and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _module_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a stand-in for an nn.Module, as its state_dict() would hold them."""
    fields = module.__dict__
    passing = fields.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, x in fields.get(kind, {}).items():
            if x is not None and not (kind == "_buffers" and name in passing):
                yield f"{prefix}{name}", x
    for name, child in fields.get("_modules", {}).items():
        if isinstance(child, _StandIn):
            yield from _module_tensors(child, f"{prefix}{name}.")


# ---- A look at a pickle without reading it -------------------------------------------------------


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)


@contextlib.contextmanager
def _pickle(path: Path) -> Iterator[IO[bytes]]:
    """The pickle in a file of torch.save; in its old format, the first of several."""
    if not _is_zip(path):
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if os.path.basename(name) == "data.pkl"]
        with archive.open(names[0]) as file:
            yield file


def _protocol(path: Path) -> int:
    """Version of pickle's format; 0 where nothing tells."""
    with contextlib.suppress(IndexError, OSError, zipfile.BadZipFile), _pickle(path) as file:
        start = file.read(2)
        return start[1] if start[0] == pickle.PROTO[0] else 0
    return 0


_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in torch.save's old format


def _kind_of_pickle(path: Path) -> str:
    """Whether a file is of torch.save, "torch", another pickle, "plain", another "zip", or "none"."""
    if _is_zip(path):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            held = {os.path.basename(name) for name in archive.namelist()}
            return "torch" if held & {"data.pkl", "constants.pkl"} else "zip"
        return "none"
    with contextlib.suppress(Exception), _pickle(path) as file:  # pickletools raises many kinds
        return "torch" if _MAGIC in (x for _, x, _ in pickletools.genops(file)) else "plain"
    return "none"


def _words(path: Path) -> set[str]:
    """The words of pickle's language in a file of torch.save, as far as it is whole."""
    found: set[str] = set()
    with contextlib.suppress(Exception), _pickle(path) as file:  # pickletools raises many kinds
        for _ in range(1 if _is_zip(path) else 4):  # the old format has three small pickles first
            found.update(word.name for word, _, _ in pickletools.genops(file))
    return found


def _is_dict(path: Path) -> bool:
    """Whether a file holds a dict, by the first words of its pickle; otherwise it is taken for a module."""
    with contextlib.suppress(Exception), _pickle(path) as file:  # pickletools raises many kinds
        for _ in range(0 if _is_zip(path) else 3):  # the old format has three small pickles first
            for _word in pickletools.genops(file):
                pass
        for word, argument, _ in pickletools.genops(file):
            if word.name not in ("PROTO", "FRAME", "MARK"):
                return word.name in ("EMPTY_DICT", "DICT") or str(argument).startswith(
                    "collections"
                )
    return False
