"""The page of `minipact xray`: a report of `minipact.xray.xray` as one self-contained HTML file.

Here the report becomes plain values: numbers as text, colours as levels of cividis, widths in percent. The
page with its words and its style is the template `xray.html.j2`, which escapes all that it is given.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

Report = dict[str, Any]
Cell = tuple[str, int | None]  # text, and its level of colour

LEVELS = 24  # of colour, from dark blue to yellow, as the template has them
PAIRS = {  # factor, digits
    "cosine": (1, 2),
    "sign_conflict": (100, 0),
    "sign_conflict_large": (100, 0),
    "wall_similarity": (100, 0),
    "hidden_interference": (100, 1),
}


def render(report: Report) -> str:
    """The report as one HTML page that needs no script and no other file."""
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["pieces"] = lambda text: re.split(r"(?<=[._])", text)  # between them it may break
    text = files("minipact").joinpath("xray.html.j2").read_text(encoding="utf-8")
    return page.from_string(text).render(_values(report))


def summary_line(report: Report) -> str:
    """The report in one line, for the terminal."""
    s = report["summary"]
    return (
        f"in the core: {number(s['enrichment'], 1, 1)} times chance; "
        f"mean cosine {number(s['cosine'], 2, 1)}; signs differ in {number(s['sign_conflict'], 0)} %; "
        f"PACT would remove {number(s['removed'], 0)} %"
    )


def merge_command(report: Report) -> str | None:
    """A plain merge of what was measured, for a shell; None where the report names no files."""
    if "given" not in report:
        return None
    inputs, settings = [report["base"], *report["given"]], report["settings"]
    chosen = [f"--{key}={glob}" for key in ("include", "exclude") for glob in settings[key]]
    entry = [f"--entry={report['entry']}"] if report["entry"] else []
    end = ["--"] if any(path.startswith("-") for path in inputs) else []
    return shlex.join(["minipact", "merge", "-o", "merged", *chosen, *entry, *end, *inputs])


def number(x: float | None, digits: int = 1, factor: float = 100) -> str:
    """A number as the page shows it, percent unless told otherwise."""
    text = "–" if x is None else f"{x * factor:.{digits}f}"
    return text.removeprefix("-") if text.strip("-0.") == "" else text.replace("-", "−")


class Scale(NamedTuple):
    """Colours from `low` over `span`, on which `chance` is marked."""

    low: float
    span: float
    chance: float

    def cell(self, x: float | None, text: str) -> Cell:
        """A value's text with its level; without a colour where there is no value."""
        return text, None if x is None else round((x - self.low) / self.span * LEVELS)

    def legend(self, show: Callable[[float], str]) -> dict[str, str]:
        """Its ends and chance as `show` writes them, and where the mark stands in percent."""
        place = f"{100 * (self.chance - self.low) / self.span:.1f}"
        ends = {"low": show(self.low), "high": show(self.low + self.span)}
        return ends | {"chance": show(self.chance), "place": place}


def scale_of(values: Iterable[float | None], chance: float, least: float) -> Scale:
    """From the lowest to the highest of some values, chance included, over `least` at least."""
    known = [x for x in values if x is not None] + [chance]
    return Scale(min(known), max(max(known) - min(known), least), chance)


# ---- Parts of the page ---------------------------------------------------------------------------


def _values(report: Report) -> Report:
    """All that the template asks for."""
    same = ("minipact", "tasks", "settings", "warnings", "skipped", "counts")
    summary = report["summary"]
    return {
        **{key: report[key] for key in same},
        "base": report.get("base"),
        "command": merge_command(report),
        "summary": {
            "enrichment": number(summary["enrichment"], 1, 1),
            "cosine": number(summary["cosine"], 2, 1),
            **{key: number(summary[key], 0) for key in ("removed", "shield", "sign_conflict")},
        },
        "per_task": [(name, _task(row)) for name, row in report["per_task"].items()],
        "pairs": {key: _pair(report["pairs"][key], *PAIRS[key]) for key in PAIRS},
        "depth": _depth(report["layers"]),
        "layers": _ranked(report["layers"]),
        "groups": [(group["pattern"], _group(group)) for group in report["groups"]],
    }


def _task(row: Report) -> list[str]:
    lengths = (number(row[key]) for key in ("norm_ratio", "matrix_share"))
    core = (number(row["intrusion"]), number(row["core_chance"]), number(row["enrichment"], 1, 1))
    rest = ("removed", "shield_chance", "filtered", "suffers", "inflicts", "half")
    return [*lengths, *core, *(number(row[key]) for key in rest)]


def _pair(pair: Report, factor: int, digits: int) -> Report:
    """A table of pairs: its mean, rows of cells, and legend."""

    def show(x: float | None) -> str:
        return number(x, digits, factor)

    rows = [
        [None if i == j else x for j, x in enumerate(row)] for i, row in enumerate(pair["values"])
    ]
    scale = scale_of((x for row in rows for x in row), pair["chance"], 0.05)
    cells = [[scale.cell(x, show(x)) for x in row] for row in rows]
    for i, row in enumerate(cells):
        row[i] = ("·", None)
    return {"mean": show(pair["mean"]), "rows": cells, "legend": scale.legend(show)}


def _depth(layers: Sequence[Report]) -> Report:
    """Shares in the core by matrix and task, coloured by multiples of chance."""
    doublings = [
        [_doublings(x, layer["core_chance"]) for x in layer["intrusion"]] for layer in layers
    ]
    scale = scale_of((x for row in doublings for x in row), 0.0, 1.0)
    rows = []
    for layer, levels in zip(layers, doublings, strict=True):
        texts = map(number, layer["intrusion"])
        cells: list[Cell | str] = [*map(scale.cell, levels, texts)]
        cells += [number(layer["core_chance"]), number(layer["enrichment"], 1, 1)]
        rows.append((layer["name"], cells))
    return {"rows": rows, "legend": scale.legend(lambda x: f"{number(2**x, 1, 1)} ×")}


def _doublings(x: float | None, chance: float) -> float | None:
    """Doublings from chance to x, so that one extreme matrix does not dim all others."""
    return None if x is None else math.log2(max(x / chance, 0.01))


def _ranked(layers: Sequence[Report]) -> Report:
    """Matrices by intrusion: width and text of a bar, and what else is known; `one` marks chance."""
    ordered = sorted(layers, key=lambda layer: -(layer["enrichment"] or 0))
    top = max(1.0, ordered[0]["enrichment"] or 0)
    rows = [
        {"name": layer["name"], "width": f"{100 * (layer['enrichment'] or 0) / top:.1f}",
         "times": number(layer["enrichment"], 1, 1), "cells": _matrix(layer)}
        for layer in ordered
    ]  # fmt: skip
    return {"rows": rows, "one": f"{100 / top:.1f}"}


def _matrix(layer: Report) -> list[str]:
    known = [x for x in layer["removed"] if x is not None]
    removed = sum(known) / len(known) if known else None
    return [
        "{} × {}".format(*layer["shape"]), str(layer["core"]), str(max(layer["task"])),
        number(layer["shield_chance"]), number(removed), number(layer["sti"], 2, 1),
        number(layer["sti_ratio"], 1, 1), number(layer["sign_conflict"]),
    ]  # fmt: skip


def _group(group: Report) -> list[str]:
    shares = (number(group[key]) for key in ("shield", "removed", "core_half", "task_half"))
    return [str(group["layers"]), number(group["enrichment"], 1, 1), *shares]
