"""What the fair table judges methods on: zoos and the encoder behind one interface.

bench = open_bench("zoo0")
bench.hits(weights, "val")["digits"]   # which of the task's validation examples come out right
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from sums import sha256_of

State = Mapping[str, Tensor]
Hits = dict[str, np.ndarray]
HERE = Path(__file__).parent
UNSEEN_TASKS = ("speeches", "bugs", "industries", "scripts")


@dataclass(frozen=True)
class Bench:
    """A base, its fine-tuned models, and which examples some weights get right.

    Attributes:
        name: "zoo0", "encoder", ...
        kind: "zoo" or "encoder": settings for one kind are chosen on the other.
        digest: names the training: SHA-256 of the stored weights.
        base, tasks: name -> tensor, and task -> such a mapping.
        judge: (weights, split, tasks) -> task -> booleans [examples].
    """

    name: str
    kind: str
    digest: str
    base: State
    tasks: dict[str, State]
    judge: Callable[[State, str, Iterable[str]], Hits]

    def hits(self, weights: State, split: str, only: Iterable[str] | None = None) -> Hits:
        """Which examples of a split come out right with these weights, for each task."""
        return self.judge(weights, split, list(self.tasks if only is None else only))

    def only(self, tasks: Iterable[str], name: str) -> Bench:
        """The same models with some of the tasks."""
        return replace(self, name=name, tasks={task: self.tasks[task] for task in tasks})


def mean_accuracy(hits: Hits) -> float:
    """Mean over tasks of the share of right answers."""
    return float(np.mean([found.mean() for found in hits.values()]))


def digest_of(folder: Path) -> str:
    """SHA-256 of the checksums of a folder's weights, which names the training that they come from."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return sha256_of("\n".join(line for line in lines if ".safetensors" in line).encode())


def zoo_bench(name: str, folder: Path) -> Bench:
    """One mini zoo."""
    from zoo_io import Judge, load_zoo

    zoo = load_zoo(folder)
    judge = Judge(zoo.info["model"], zoo.heads)
    return Bench(name, "zoo", digest_of(folder), zoo.base, zoo.tasks, judge.right)


def encoder_bench(tasks: Mapping[str, State], digest: str) -> Bench:
    """The encoder with its fine-tuned layers."""
    from encoder_io import Encoder, head_of, labelled, right

    encoder = Encoder()
    base = encoder.trained()
    heads = {task: head_of(encoder, task) for task in tasks}
    kept = cache(labelled)

    def judge(weights: State, split: str, only: Iterable[str]) -> Hits:
        encoder.load(weights)
        return {task: right(encoder, heads[task], *kept(task, split)) for task in only}

    return Bench("encoder", "encoder", digest, base, dict(tasks), judge)


def open_bench(name: str) -> Bench:
    """A model of data/ by name: "zoo0" for the folder zoo, "zoo1", ..., "encoder" or "encoder_unseen".

    The last has the four tasks that the search for our own filter did not see.
    """
    if name.startswith("encoder"):
        from encoder_io import load_encoder

        found = load_encoder(HERE / "encoder")
        bench = encoder_bench(found.tasks, digest_of(HERE / "encoder"))
        return bench.only(UNSEEN_TASKS, name) if name == "encoder_unseen" else bench
    return zoo_bench(name, HERE / ("zoo" if name == "zoo0" else name))
