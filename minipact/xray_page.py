"""The page of `minipact xray`: a report of `minipact.xray.xray` as one self-contained HTML file.

Tables and inline figures only: no script, nothing loaded from elsewhere, light and dark, colours of cividis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

Report = dict[str, Any]

_CIVIDIS = (
    "00224e",
    "1a386f",
    "434e6c",
    "61656f",
    "7d7c78",
    "9b9476",
    "bcae6c",
    "dec958",
    "fee838",
)
_LEVELS = 24
_STYLE = """
:root{color-scheme:light dark;--bg:#f4f3ee;--card:#fff;--ink:#1b2230;--soft:#565f6e;--line:#dedbd2;
--accent:#2f5d9b;--mark:#b3500b;--note:#fdf3dc}
@media(prefers-color-scheme:dark){:root{--bg:#11151c;--card:#1a2029;--ink:#e9ebef;--soft:#a9b1be;
--line:#343d4b;--accent:#8db6ee;--mark:#f2a65a;--note:#2b2517}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.3rem;margin:2.6rem 0 .4rem}
h3{font-size:1.05rem;margin:0}
p{margin:.4rem 0 .8rem;max-width:52rem}
.soft,caption,.legend{color:var(--soft);font-size:.9rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
.tiles{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,14rem),1fr));
margin:1.4rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:1rem 1.1rem;margin:0;min-width:0}
.tile b{display:block;font-size:2rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile p{margin:.3rem 0 0;font-size:.92rem;color:var(--soft)}
.tile span{font-weight:600}
.note{background:var(--note);border-left:4px solid var(--mark);border-radius:.3rem;
padding:.6rem .9rem;margin:.6rem 0}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;caption-side:bottom;padding-top:.4rem}
th,td{padding:.28rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{vertical-align:bottom;font-weight:600;white-space:normal;min-width:3.2rem}
th[scope=row],thead th:first-child{position:sticky;left:0;background:var(--card);text-align:left;
font-weight:500;white-space:normal;font-size:.84rem;min-width:6rem;max-width:24rem;overflow-wrap:anywhere}
.heat td{border:1px solid var(--card);border-radius:4px;text-align:center;
padding:.3rem .2rem;min-width:2.6rem}
.heat thead th:not(:first-child){writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;
white-space:normal;overflow-wrap:anywhere;max-height:10rem;min-width:0;padding:.3rem;border:0;font-weight:500}
.legend{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center}
.legend svg{width:10rem;height:1.1rem;overflow:visible}
.mark{fill:var(--mark);color:var(--mark)}
.bar{text-align:left}.bar svg{width:7rem;height:.7rem;margin-right:.5rem;vertical-align:middle}
.bar rect{fill:var(--accent)}.bar path{stroke:var(--mark);stroke-width:2;vector-effect:non-scaling-stroke}
.layers th[scope=row]{min-width:15rem}
code,pre{font:.88rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--bg);border:1px solid var(--line);
border-radius:.4rem;padding:.7rem .9rem;margin:.6rem 0}
li{margin:.2rem 0;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:36rem){th[scope=row],thead th:first-child{max-width:9rem;font-size:.8rem}
.layers th[scope=row]{min-width:9rem}
h1{font-size:1.5rem}.card{padding:.8rem}}
@media print{.scroll{overflow:visible}}
"""
_PAIRS = (  # key, question, factor, digits, what it is, what to do with it
    ("cosine", "Do task vectors point the same way?", 1, 2,
     "Cosine of the angle between two task vectors, over all entries. Random directions: 0.",
     "Well above 0: the tasks want similar changes, and their sum overshoots, so take a smaller scale. "
     "Near 0: collisions, if any, sit in few directions, which the figures below look at."),
    ("sign_conflict", "Do they pull the same entries apart?", 100, 0,
     "Percent of the entries that both tasks changed whose signs differ. A coin gives 50.",
     "Compare with the next figure: small entries are close to a coin even for related tasks."),
    ("sign_conflict_large", "Do their largest entries pull apart?", 100, 0,
     "The same among entries that belong to the largest fifth of each tensor in both tasks: those "
     "TIES keeps.",
     "Near or above 50: electing signs (TIES) has work to do. Well below: trimming alone may be enough."),
    ("wall_similarity", "Do they lean on the same walls?", 100, 0,
     "A task's load-bearing walls are the part of the pre-trained core that its own update leaves alone. "
     "Percent of overlap of two tasks' walls. All lie near one core, "
     "so chance, from random updates, is high.",
     "Well below chance: the updates act in the core themselves and each leaves another part of it alone, "
     "so that a static filter (SIFT) and the task-aware one (PACT) guard different things."),
    ("hidden_interference", "Who runs over whose walls?", 100, 1,
     "Percent of the row task's leading update directions that lie in the column task's walls. "
     "Random directions: the walls' share of the width, r / n.",
     "Well above chance: PACT and SIFT have something to guard. A bright row is an intruder, a bright "
     "column a task at risk: look at their accuracies first after a merge."),
)  # fmt: skip


def render(report: Report) -> str:
    """The report as one HTML page that needs no script and no other file."""
    title = f"X-ray of {len(report['tasks'])} fine-tuned models"
    parts = (_tiles, _next_steps, _tasks, _pairs, _depth, _ranking, _kinds, _method)
    body = "\n".join(part(report) for part in parts)
    counts = report["counts"]
    origin = f" Base: <code>{escape(report['base'])}</code>." if "base" in report else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}{_ramp()}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">What the weights alone say before you merge: {counts["matrices"]} matrices measured,
{counts["vectors"]} vectors counted in norms, cosines and signs.{origin}</p>
{body}
</main>
</body>
</html>
"""


def summary_line(report: Report) -> str:
    """The report in one line, for the terminal."""
    s = report["summary"]
    return (
        f"in the core: {_n(s['enrichment'], 1, 1)} times chance; mean cosine {_n(s['cosine'], 2, 1)}; "
        f"signs differ in {_n(s['sign_conflict'], 0)} %; PACT would remove {_n(s['removed'], 0)} %"
    )


def _ramp() -> str:
    """CSS classes h0 ... h24 along cividis, each with the ink that stands out more."""
    stops = [[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in _CIVIDIS]
    lines = []
    for level in range(_LEVELS + 1):
        i, part = divmod(level * (len(stops) - 1) / _LEVELS, 1)
        a, b = stops[int(i)], stops[min(int(i) + 1, len(stops) - 1)]
        color = "".join(f"{round(x + part * (y - x)):02x}" for x, y in zip(a, b, strict=True))
        ink = "fff" if _luminance(color) < 0.179 else "000"
        lines.append(f".h{level}{{background:#{color};fill:#{color};color:#{ink}}}")
    return "\n".join(lines)


def _luminance(color: str) -> float:
    """Relative luminance as WCAG defines it; black and white text contrast equally at 0.179."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _n(x: float | None, digits: int = 1, factor: float = 100) -> str:
    """A number as the page shows it, percent unless told otherwise."""
    text = "–" if x is None else f"{x * factor:.{digits}f}"
    return text.removeprefix("-") if text.strip("-0.") == "" else text.replace("-", "−")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _name(text: str) -> str:
    """A name, escaped, that may break behind dots and underscores."""
    return escape(text).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _table(
    label: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    kind: str = "",
) -> str:
    """Table that scrolls inside its frame; cells are HTML, the first of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(x if x.startswith("<td") else f"<td>{x}</td>" for x in rest) + "</tr>"
        for first, *rest in rows
    )  # fmt: skip
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{kind}"><caption>{caption}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


class _Scale:
    """Colours from the lowest to the highest of some values, chance included, over `least` at least.

    `show` writes a value.
    """

    def __init__(
        self,
        values: Iterable[float | None],
        chance: float,
        least: float,
        show: Callable[[float], str],
    ) -> None:
        known = [x for x in values if x is not None] + [chance]
        self.low, self.chance, self.show = min(known), chance, show
        self.span = max(max(known) - self.low, least)

    def cell(self, x: float | None, text: str) -> str:
        if x is None:
            return f"<td>{text}</td>"
        return f'<td class="h{round((x - self.low) / self.span * _LEVELS)}">{text}</td>'

    def legend(self) -> str:
        low, high, chance = (self.show(x) for x in (self.low, self.low + self.span, self.chance))
        x = 100 * (self.chance - self.low) / self.span
        bars = "".join(
            f'<rect class="h{i}" x="{4 * i}" width="4.2" height="9"/>' for i in range(_LEVELS + 1)
        )
        return (
            f'<div class="legend"><span>{low}</span><svg viewBox="0 0 100 14" '
            f'preserveAspectRatio="none" role="img" aria-label="Colours from {low}, dark blue, '
            f'to {high}, yellow; chance is {chance}">{bars}<path class="mark" '
            f'd="M{x:.1f} 9l-3 5h6z"/></svg><span>{high}</span>'
            f'<span class="mark">▲ chance {chance}</span></div>'
        )


def _tiles(report: Report) -> str:
    s, pairs = report["summary"], report["pairs"]
    hidden = pairs["hidden_interference"]
    tiles = [
        (f"{_n(s['enrichment'], 1, 1)} ×", "as much in the core as by chance",
         "How much more task vectors act on the pre-trained core than random updates would."),
        (f"{_n(hidden['mean'])} %", "hidden interference",
         f"Of one task's leading directions in another's load-bearing walls; "
         f"chance {_n(hidden['chance'])} %."),
        (f"{_n(s['removed'], 0)} %", "would be removed by PACT",
         f"Of a task vector's energy in matrices; shields fill {_n(s['shield'], 0)} % of the width."),
        (_n(s["cosine"], 2, 1), "mean cosine of task vectors",
         f"Signs differ in {_n(s['sign_conflict'], 0)} % of entries, in "
         f"{_n(pairs['sign_conflict_large']['mean'], 0)} % of large ones; a coin gives 50 %."),
    ]  # fmt: skip
    cards = (
        f'<div class="card tile"><b>{number}</b><span>{label}</span><p>{text}</p></div>'
        for number, label, text in tiles
    )
    return '<div class="tiles">' + "\n".join(cards) + "</div>"


def _next_steps(report: Report) -> str:
    advice, s = report["advice"], report["settings"]
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in advice["warnings"])
    scope = "".join(f"<li><code>{_name(pattern)}</code></li>" for pattern in advice["scope"])
    if len(advice["scope"]) == len(report["groups"]):
        where = "<p>all kinds of matrices measured, so no scope is needed.</p>"
    elif scope:
        where = f"<ul>{scope}</ul><p>Give these as PACT's option scope.</p>"
    else:
        where = "<p>nowhere at the ranks measured: try the plain rules first.</p>"
    pact = f" --purify pact \\\n  --set pact.core={advice['core']} --set pact.task={advice['task']}"
    return f"""<section class="card"><h2 style="margin-top:0">What to try</h2>{notes}
<pre>minipact merge BASE TASK... -o merged --rule tsv_m{pact if scope else ""}</pre>
<p>Ranks of {advice["core"]} for the core and {advice["task"]} for the tasks are a rule of thumb of ours: a
shield then fills about an eighth of the width, half of it for the core and half for the other tasks' updates,
and neither goes beyond the directions that hold half of the energy. Larger ranks protect and remove more. The
figures below use core = {escape(str(s["core"]))} and task = {escape(str(s["task"]))}.</p>
<p>Where PACT may help, since the core is used more than by chance and the shields leave room:</p>
{where}
<p><strong>Only validation data decides.</strong> Merge with and without the purifier, at several scales, and
measure every task. Weights cannot tell whether a direction matters for accuracy.</p></section>"""


def _tasks(report: Report) -> str:
    head = ["task", "length / base %", "in matrices %", "in the core %", "chance %", "× chance",
            "PACT removes %", "shield's width %", "suffers %", "inflicts %", "half in %"]  # fmt: skip
    keys = ("norm_ratio", "matrix_share", "intrusion", "core_chance", "enrichment",
            "removed", "shield_chance", "suffers", "inflicts", "half")  # fmt: skip
    rows = [
        [_name(t), *(_n(row[key], 1, 1 if key == "enrichment" else 100) for key in keys)]
        for t, row in report["per_task"].items()
    ]
    caption = "Suffers and inflicts: mean hidden interference as victim and as interferer."
    return f"""<h2>Task by task</h2>
<p>Length of each task vector against the base's weights; how much of its energy (squared length) lies in the
pre-trained core, that is acts on the leading K input directions of the base, and how much PACT would remove.
A random update has K / n in the core and loses the shield's share of the width. "Half in": the share of a
matrix's directions that hold half of the update, low for low-rank updates.</p>
<p>A task far longer than the others dominates a sum: give it a smaller weight.</p>
<div class="card">{_table("Task by task", head, rows, caption)}</div>"""


def _pairs(report: Report) -> str:
    names = report["tasks"]
    if len(names) < 2:
        return "<h2>Task against task</h2><p>One task alone has nothing to collide with.</p>"
    figures = "\n".join(_pair_figure(names, report["pairs"][f[0]], f) for f in _PAIRS)
    return f"""<h2>Task against task</h2><div class="grid">{figures}
<div class="card"><h3>How to read these</h3><p>Colours run from the lowest to the highest value of each table
and take in chance (▲), so small differences look large: read the mean and chance first.</p>
<p>A measure far from chance says that there is structure to use, not that a method will use it well.
A measure at chance says that for these weights the method built on it has little to hold on to.</p>
</div></div>"""


def _pair_figure(names: list[str], pair: Report, figure: tuple[Any, ...]) -> str:
    _, question, factor, digits, what, advice = figure
    values, span = pair["values"], range(len(names))

    def show(x: float | None) -> str:
        return _n(x, digits, factor)

    others = (values[i][j] for i in span for j in span if i != j)
    scale = _Scale(others, pair["chance"], 0.05, show)
    rows = [
        [_name(names[i]), *("·" if i == j else scale.cell(values[i][j], show(values[i][j])) for j in span)]
        for i in span
    ]  # fmt: skip
    table = _table(question, ["", *map(_name, names)], rows, kind="heat")
    return (
        f'<figure class="card"><h3>{question}</h3><p>{what}</p>{table}{scale.legend()}'
        f"<p><strong>Mean {show(pair['mean'])}.</strong> {advice}</p></figure>"
    )


def _depth(report: Report) -> str:
    layers = report["layers"]

    def times(x: float | None, chance: float) -> float | None:
        """Multiples of chance, by doublings so that one extreme matrix does not dim all others."""
        return None if x is None else math.log2(max(x / chance, 0.01))

    every = [times(x, layer["core_chance"]) for layer in layers for x in layer["intrusion"]]
    scale = _Scale(every, 0.0, 1.0, lambda x: f"{_n(2**x, 1, 1)} ×")
    rows = [
        [_name(layer["name"]),
         *(scale.cell(times(x, layer["core_chance"]), _n(x)) for x in layer["intrusion"]),
         _n(layer["core_chance"]), _n(layer["enrichment"], 1, 1)]
        for layer in layers
    ]  # fmt: skip
    head = ["matrix", *map(_name, report["tasks"]), "chance", "× chance"]
    return f"""<h2>How much of each task vector lies in the core</h2>
<p>Percent of each task matrix's energy on the pre-trained core, in the model's order. Chance is K / n;
colours show multiples of it, so that matrices of different widths compare. Bright rows are where merging
meets the base: protect them first, and look there when a merge fails.</p>
<div class="card">{_table("Share in the core", head, rows, kind="heat layers")}{scale.legend()}</div>"""


def _ranking(report: Report) -> str:
    layers = sorted(report["layers"], key=lambda layer: -(layer["enrichment"] or 0))
    top = max(1.0, layers[0]["enrichment"] or 0)
    head = ["matrix", "in the core, × chance", "m × n", "K", "k", "shield p / n %", "PACT removes %",
            "interference", "× random", "signs differ %"]  # fmt: skip
    rows = []
    for x in layers:
        width = 100 * (x["enrichment"] or 0) / top
        bar = (
            f'<td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{width:.1f}" y="2" height="6"/><path d="M{100 / top:.1f} 0v10"/></svg>'
            f"{_n(x['enrichment'], 1, 1)}</td>"
        )
        rows.append([
            _name(x["name"]), bar, "{} × {}".format(*x["shape"]), str(x["core"]), str(max(x["task"])),
            _n(x["shield_chance"]), _n(_mean(x["removed"])),
            _n(x["sti"], 2, 1), _n(x["sti_ratio"], 1, 1), _n(x["sign_conflict"]),
        ])  # fmt: skip
    return f"""<h2>Matrices, sorted by intrusion</h2>
<p>The same as multiples of chance (the line marks 1), with what else is known of each matrix. Interference is
singular task interference (STI) of the k leading directions per task, in units of singular values; beside it
how many times as much as random directions would give. High values: TSV-M, which decorrelates them, has work
to do. PACT's shield has p directions of n inputs; above 80 % little is left of any task.</p>
<div class="card">{_table("Matrices by intrusion", head, rows, kind="layers")}</div>"""


def _kinds(report: Report) -> str:
    head = ["kind (glob for a scope)", "matrices", "× chance", "widest shield %", "PACT removes %",
            "half of base in %", "half of update in %", "try PACT"]  # fmt: skip
    rows = [
        [f"<code>{_name(g['pattern'])}</code>", str(g["layers"]), _n(g["enrichment"], 1, 1),
         *(_n(g[key]) for key in ("shield", "removed", "core_half", "task_half")),
         "yes" if g["recommended"] else "no"]
        for g in report["groups"]
    ]  # fmt: skip
    return f"""<h2>Kinds of matrices and ranks</h2>
<p>Matrices whose names differ in a number only. "Half in": the share of directions, of min(m, n), that hold
half of the squared spectrum; it is what the suggested ranks start from. If half of the update sits in few
directions, small k and TSV-M lose little; a base with a flat spectrum has no sharp core, whatever K.</p>
<div class="card">{_table("Kinds of matrices", head, rows, kind="layers")}</div>"""


def _method(report: Report) -> str:
    s = report["settings"]
    skipped = "".join(
        f"<li><code>{_name(x['name'])}</code>: {x['why']}</li>" for x in report["skipped"]
    )
    left_out = f"<p>Matrices left out:</p><ul>{skipped}</ul>" if skipped else ""
    return f"""<h2>How this was measured</h2>
<p>For each matrix W0 [m, n] with task matrices D_t: core V_0, the leading K right singular vectors of W0
(core = {escape(str(s["core"]))}); V_t, the leading k of D_t (task = {escape(str(s["task"]))}); walls of a
task, the span of V_0 − V_t V_tᵀ V_0; shield of a task, the union of all other tasks' walls, at tolerance
{s["tol"]}. Decomposition: {s["svd"]}. Task rows weigh matrices by energy; pair tables average them evenly.
Measures after Shi et al. 2026 (arXiv 2606.18627), Gargiulo et al. 2025 (arXiv 2412.00081) and Yadav et al.
2023 (arXiv 2306.01708); baselines of chance, suggested ranks and scopes are ours.</p>{left_out}
<p class="soft">Written by minipact {report["minipact"]}. This page loads nothing from elsewhere.</p>"""
