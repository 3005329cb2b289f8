"""Every decimal and every percentage in a chapter's prose is one that its notebook printed, or has a source.

numbers.yml names the others. A value that starts with "=" is made of numbers that the notebook printed, by
sums, differences, products and ratios; any other value says where the number comes from.
"""

import ast
import operator
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import pytest
import yaml

BOOK = Path(__file__).resolve().parents[1] / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
SOURCES = yaml.safe_load((Path(__file__).parent / "numbers.yml").read_text())
NO_PROSE = (
    r"\$\$[\s\S]*?\$\$",
    r"\$[^$\n]*\$",  # formulas
    r"\{[\w:-]+\}`[^`]*`",  # roles
    r"`[^`\n]*`",  # code
    r"\]\([^)]*\)",  # addresses
    r":label:.*|^:name:.*",
)
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*\.\d+|\d[\d,]*(?=\s?%))")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def prose(cells: Iterable[nbformat.NotebookNode]) -> str:
    """Text of the markdown cells without formulas, code and addresses."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for pattern in NO_PROSE:
        text = re.sub(pattern, " ", text, flags=re.MULTILINE)
    return text


def printed(cells: Iterable[nbformat.NotebookNode]) -> set[float]:
    """All numbers in the outputs."""
    texts = [o.get("text", "") for cell in cells for o in cell.get("outputs", [])]
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", "\n".join(texts))
    return {float(x.replace(",", "")) for x in found}


def shown(value: float, like: str) -> bool:
    """Whether a value, or its percentage, rounds to a number as it is written."""
    digits, wanted = len(like.partition(".")[2]), float(like.replace(",", ""))
    return any(abs(x - wanted) <= 0.5001 * 10**-digits for x in (value, 100 * value))


def worth(expression: str, known: set[float]) -> float:
    """Value of an expression in numbers that are known."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant), expression
        assert float(node.value) in known, f"{node.value} in {expression} was not printed"
        return float(node.value)

    return value(ast.parse(expression, mode="eval").body)


def unfounded(text: str, known: set[float], sources: dict[str, str]) -> Iterator[str]:
    """Numbers of a text that nobody printed and that no source explains, with what stands around."""
    for match in NUMBER.finditer(text):
        number = match.group()
        source = sources.get(number, "")
        if source.startswith("="):
            founded = shown(worth(source[1:].strip(), known), number)
        else:
            founded = bool(source) or any(shown(x, number) for x in known)
        if not founded:
            around = text[max(0, match.start() - 40) : match.end() + 20]
            yield f"{number} in: {' '.join(around.split())}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_in_prose_were_printed(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    sources = {str(number): text for number, text in SOURCES.get(path.stem, {}).items()}
    assert list(unfounded(prose(cells), printed(cells), sources)) == []
    numbers = {match.group() for match in NUMBER.finditer(prose(cells))}
    assert not sources.keys() - numbers, "explained, but not said"


def test_the_guard_sees_what_it_guards_against():
    known = {97.5, 78.1, 0.36}
    text = "From 97.5 to 78 %, that is 19.4 points; 36 % are kept, and `0.7` of $1.5$ is code."
    assert list(unfounded(prose_of(text), known, {"19.4": "= 97.5 - 78.1"})) == []
    assert len(list(unfounded(prose_of(text), known, {}))) == 1
    assert len(list(unfounded(prose_of(text), known, {"19.4": "= 97.5 - 78.1 - 0.36"}))) == 1
    with pytest.raises(AssertionError, match=r"78.2 in .* was not printed"):
        list(unfounded(prose_of(text), known, {"19.4": "= 97.5 - 78.2"}))
    assert len(list(unfounded(prose_of("It is 97.6."), known, {}))) == 1
    assert list(unfounded(prose_of("It is 76.5."), known, {"76.5": "a paper, table 1"})) == []


def prose_of(text: str) -> str:
    return prose([nbformat.v4.new_markdown_cell(text)])
