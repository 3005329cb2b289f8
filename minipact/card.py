"""Model cards: what the inputs' cards say, the card of a merged model, and the record that is in it.

A *record* is all that a merge depends on but paths: {"recipe", "versions", "device", "inputs"}, where inputs
are {"base": [SHA-256 of its files], "tasks": {name: [SHA-256, ...]}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from minipact.checkpoints import read_metadata
from minipact.errors import CheckpointError, listing
from minipact.layouts import OPEN_CLIP, find_layout, read_json

CARD = "README.md"
Record = dict[str, Any]


def stated(folder: Path, key: str) -> str | None:
    """What the card of a model folder says under a key of its front matter; None where it says nothing.

    A list with one entry counts as that entry, "other" and "unknown" as nothing.
    """
    card = folder / CARD
    if not card.is_file():
        return None
    match = re.match(
        r"---\r?\n(.*?)\r?\n---\s", card.read_text("utf-8-sig", errors="replace") + "\n", re.DOTALL
    )
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # dates that do not exist, and the like
        return None
    value = front.get(key) if isinstance(front, dict) else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or value in ("other", "unknown"):
        return None
    return value


def agreed(key: str, inputs: Mapping[str, Path]) -> tuple[str | None, str]:
    """What all inputs' cards say under a key, or None and why: some are silent, or they differ."""
    found = {name: stated(path, key) for name, path in inputs.items()}
    silent = [name for name, value in found.items() if value is None]
    if silent:
        return None, f"{key} (no card of {listing(silent)} states one)"
    if len(set(found.values())) > 1:
        differ = ", ".join(f"{name}: {value}" for name, value in found.items())
        return None, f"{key} (the inputs differ, {differ})"
    return found.popitem()[1], ""


def card_text(
    record: Record,
    folder: Path,
    *,
    inputs: Mapping[str, str],
    treatments: Mapping[str, int],
    scores: Mapping[float, float] | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Markdown of the card of the merged model in a folder, with Hugging Face's metadata.

    Args:
        record: what was merged how.
        folder: the output, with its configuration files.
        inputs: name of each input -> a word on its format.
        treatments: what was done -> number of tensors.
        scores: scale -> score, where scales were tried.
        base_model, license: for the metadata; left out if None.
    """
    library, loading = _loading(folder)
    front = {
        "base_model": base_model,
        "base_model_relation": "merge" if base_model else None,
        "library_name": library,
        "license": license,
        "tags": ["merge", "model-merging"],
    }
    known = {key: value for key, value in front.items() if value is not None}
    versions, sums = record["versions"], record["inputs"]
    digests = {"the base": sums["base"], **sums["tasks"]}
    rows = [f"| {_cell(n)} | {what} | {_codes(digests[n])} |" for n, what in inputs.items()]
    sections = [
        f"---\n{yaml.safe_dump(known, sort_keys=False)}---",
        "# Merged model",
        f"Merged without training by minipact {versions['minipact']} with torch {versions['torch']}.",
        "\n".join(["| input | format | SHA-256 of its files |", "|---|---|---|", *rows]),
        "\n".join(f"- {count} tensors: {what}" for what, count in treatments.items()),
        f"## Loading\n\nIn this folder:\n\n```python\n{loading}```",
    ]
    if scores:
        chosen = record["recipe"].get("scale")
        lines = [f"| {scale:g} | {score:g} |" for scale, score in scores.items()]
        table = "\n".join(["| scale | score |", "|---|---|", *lines])
        sections.append(f"## Scales tried\n\n{table}\n\nTaken: {chosen:g}.")
    sections.append(f"## The merge\n\n{_repeating(record['recipe'])}")
    sections.append(f"```json\n{json.dumps(record, indent=2, sort_keys=True)}\n```")
    return "\n\n".join(sections) + "\n"


def extracted_card(record: Record, task: str, folder: Path) -> str:
    """Markdown of the card of one task's model in a folder, out of a file of minipact compress.

    Args:
        record: of the file. task: name of the task. folder: the output, with its configuration files.
    """
    library, loading = _loading(folder)
    front = {"library_name": library, "tags": ["model-merging"]}
    known = {key: value for key, value in front.items() if value is not None}
    rule, tasks, versions = record["recipe"]["rule"], record["tasks"], record["versions"]
    sections = [
        f"---\n{yaml.safe_dump(known, sort_keys=False)}---",
        f"# The model of {_cell(task)}",
        f"Taken out of a file in which minipact {versions['minipact']} had stored a base and {len(tasks)} "
        f"fine-tuned models by `{rule}`: as near to the fine-tuned model of this task as that comes.",
        _sources(record),
        f"## Loading\n\nIn this folder:\n\n```python\n{loading}```",
        f"## Record\n\n```json\n{json.dumps(record, indent=2, sort_keys=True)}\n```",
    ]
    return "\n\n".join(x for x in sections if x) + "\n"


def _sources(record: Record) -> str:
    """A table of what a compressed file was made from; "" where no files are known."""
    if "inputs" not in record:
        return ""
    sums = record["inputs"]
    digests = {"the base": sums["base"], **sums["tasks"]}
    rows = [f"| {_cell(name)} | {_codes(found)} |" for name, found in digests.items()]
    return "\n".join(["| input | SHA-256 of its files |", "|---|---|", *rows])


def _repeating(recipe: Mapping[str, Any]) -> str:
    """How to merge the same again; code of one's own must be named once more."""
    if "not repeatable" in recipe:
        return f"It cannot be repeated from this card: {recipe['not repeatable']}."
    named = [("--purify", name) for name in recipe["purify"]] + [("--rule", recipe["rule"])]
    code = "".join(f" {option} {name}" for option, name in named if ":" in name)
    for sums in recipe.get("statistics", {}).values():
        code += " --statistics FILE" * len(sums)
    command = f"minipact merge BASE TASK... -o OUT --recipe {CARD}{code}"
    return f"The same again, from the same files wherever they are:\n\n```\n{command}\n```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _codes(digests: Iterable[str]) -> str:
    return "<br>".join(f"`{digest}`" for digest in digests)


def _loading(folder: Path) -> tuple[str | None, str]:
    """The library that a model folder is for, and lines that load it there."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        config = {}
    if (folder / OPEN_CLIP).is_file():
        call = 'open_clip.create_model_and_transforms("local-dir:.")'
        return "open_clip", f"import open_clip\n\nmodel, _, preprocess = {call}\n"
    if (folder / "modules.json").is_file():
        call = 'sentence_transformers.SentenceTransformer(".")'
        return "sentence-transformers", f"import sentence_transformers\n\nmodel = {call}\n"
    variant = find_layout(folder).parts[0].stem.variant
    given = f', variant="{variant}"' if variant else ""
    if "_class_name" in config:
        name = _class(config["_class_name"], "ModelMixin")
        call = f'diffusers.{name}.from_pretrained("."{given})'
        return "diffusers", f"import diffusers\n\nmodel = {call}\n"
    if "model_type" in config:
        name, more = _transformers_class(config)
        call = f'transformers.{name}.from_pretrained("."{given}{more})'
        return "transformers", f"import transformers\n\nmodel = {call}\n"
    call = 'state = dict(minipact.open_checkpoint("."))  # name -> tensor'
    return None, f"import minipact\n\n{call}\n"


def _transformers_class(config: Mapping[str, Any]) -> tuple[str, str]:
    """The class that loads a model, and what it needs to be told: that code beside the model is to run."""
    names = config.get("architectures")
    name = _class(names[0] if isinstance(names, list) and names else None, "AutoModel")
    own = config.get("auto_map")
    if not isinstance(own, dict):
        return name, ""
    loading = [auto for auto, place in own.items() if str(place).endswith(f".{name}")]
    return _class(loading[0] if loading else None, "AutoModel"), ", trust_remote_code=True"


def _class(name: object, default: str) -> str:
    """A name from a configuration, which anyone may have written, if it can be one of a class."""
    return name if isinstance(name, str) and name.isidentifier() else default


def read_record(path: Path) -> Record:
    """The record in a model card, in a merged file's header, or in a JSON file; or a recipe alone.

    Returns {"recipe": fields, ...}; a file that holds only the fields of a recipe becomes that.

    Raises:
        CheckpointError: nothing there, or it holds no record.
    """
    if path.is_dir():
        path = path / CARD
    try:
        if path.suffix == ".safetensors":
            found = json.loads(read_metadata(path)["merge"])
        else:
            text = path.read_text("utf-8")
            blocks = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
            found = json.loads(blocks[-1] if blocks else text)
    except (OSError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} holds no record of a merge ({error!r})") from error
    if isinstance(found, dict) and "recipe" not in found:
        found = {"recipe": found}
    if not _is_record(found):
        raise CheckpointError(f"{path} holds no record of a merge, but other JSON")
    record: Record = found
    return record


def _is_record(found: object) -> bool:
    """Whether the parts that are there are of the right shape."""
    if not isinstance(found, dict) or not isinstance(found["recipe"], dict) or not found["recipe"]:
        return False
    if not isinstance(found.get("versions", {}), dict) or not isinstance(
        found.get("device", ""), str
    ):
        return False
    if "inputs" not in found:
        return True
    inputs = found["inputs"]
    if not isinstance(inputs, dict) or not isinstance(inputs.get("tasks"), dict):
        return False
    return all(isinstance(sums, list) for sums in (inputs.get("base"), *inputs["tasks"].values()))
