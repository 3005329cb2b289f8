"""Arguments that several commands share, said once."""

from __future__ import annotations

from collections.abc import Callable

Add = Callable[..., object]  # add_argument of a parser


def add_selection(add: Add, whose: str, entry: str) -> None:
    """Which tensors take part, and under which names; `entry` is the help of --entry."""
    add("--include", action="append", metavar="GLOB", help="only these tensors")
    add("--exclude", action="append", metavar="GLOB", help="leave these as in the base")
    add("--missing", choices=("error", "base"), default="error",
        help="tensors that a model lacks: refused, or as in the base (%(default)s)")  # fmt: skip
    add("--rename", action="append", metavar="OLD=NEW", help=f"beginning of names in {whose}")
    add("--entry", metavar="KEY", help=entry)


def add_work(add: Add) -> None:
    """Where and how the work is done."""
    add("--seed", type=int, default=0, help="of sketches (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (%(default)s)")
    add("--threads", type=int, metavar="N", help="tensors in work at once on CPUs (all cores)")


def add_report(add: Add) -> None:
    """What becomes of an output that exists, and what is printed."""
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--json", action="store_true", help="summary as JSON on standard output")
    add("--quiet", action="store_true", help="no progress bar, no summary")
