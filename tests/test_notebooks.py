"""Guards: nbval checks what is stored, these check that what is stored is all there."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
TAGS = {"nbval-ignore-output", "hide-input"}
Notebook = nbformat.NotebookNode


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_picture(cell: Notebook) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def text_of(cell: Notebook) -> str:
    texts = [output.get("text", "") for output in cell.outputs]
    return "".join([*texts, *(str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs)])


def problems(notebook: Notebook) -> list[str]:
    """What is wrong with an executed notebook, one line each."""
    found = []
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not executed from top to bottom")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    for cell in cells:
        tags, start = set(cell.metadata.get("tags", [])), cell.source[:40]
        if not cell.source.strip():
            found.append("empty cell")
        if tags - TAGS:
            found.append(f"tags {tags - TAGS}: {start}")
        if any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs):
            found.append(f"error or warning stored: {start}")
        ignored = "nbval-ignore-output" in tags
        if ignored and not (has_picture(cell) or "perf_counter" in cell.source):
            found.append(f"ignored, but shows no picture and no time: {start}")
        if has_picture(cell):
            shown = cell.metadata.get("mystnb", {})
            if not ignored or not shown.get("image", {}).get("alt"):
                found.append(f"picture without alt text or tag: {start}")
            if not shown.get("figure", {}).get("caption"):
                found.append(f"picture without caption: {start}")
        if "print(" in cell.source and "def " not in cell.source and not text_of(cell):
            found.append(f"prints, but no output is stored: {start}")
        if "plt.show()" in cell.source and not has_picture(cell):
            found.append(f"draws, but no picture is stored: {start}")
        if re.search(r"https?://|/home/|/tmp/|/root/|0x[0-9a-f]{6}|it/s|\d%\|", text_of(cell)):
            found.append(f"path, address or progress bar in the output: {start}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_whole(path: Path):
    assert problems(read(path)) == []
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_has_its_parts(path: Path):
    text = "\n".join(cell.source for cell in read(path).cells)
    for part in ("**Claim.**", "Before you start", "## What we learned", "## Exercises"):
        assert part in text, part
    assert "## Further reading" in text
    assert text.count("{exercise-start}") == text.count("{solution-start}") >= 2
    assert "class: dropdown" in text
    assert not re.search(r"TODO|_VERDICT\b", text)


def test_contents_name_every_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    named = {toc["root"], *(chapter["file"] for chapter in toc["chapters"])}
    pages = {f"book/{p.stem}" for p in (ROOT / "book").iterdir() if p.suffix in (".md", ".ipynb")}
    assert named == pages


def small() -> Notebook:
    """A notebook without fault: one printing cell, one picture."""
    printing = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    printing.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    drawing = nbformat.v4.new_code_cell("plt.show()", execution_count=2)
    drawing.outputs = [nbformat.v4.new_output("display_data", data={"image/png": "aGk="})]
    drawing.metadata = nbformat.from_dict(
        {
            "tags": ["nbval-ignore-output"],
            "mystnb": {"image": {"alt": "a"}, "figure": {"caption": "c"}},
        }
    )
    notebook = nbformat.v4.new_notebook(cells=[printing, drawing])
    notebook.metadata["kernelspec"] = {"name": "python3"}
    return notebook


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n.cells[0].update(execution_count=None),
        lambda n: n.cells[1].update(execution_count=3),
        lambda n: n.cells[0].update(outputs=[]),
        lambda n: n.cells[1].update(outputs=[]),
        lambda n: n.cells[0].outputs[0].update(name="stderr"),
        lambda n: n.cells[0].outputs[0].update(text="see /tmp/x"),
        lambda n: n.cells[0].outputs[0].update(text="100%|####"),
        lambda n: n.cells[0].metadata.update(tags=["skip-execution"]),
        lambda n: n.cells[0].metadata.update(tags=["nbval-ignore-output"]),
        lambda n: n.cells[1].metadata.update(tags=[]),
        lambda n: n.cells[1].metadata["mystnb"].pop("image"),
        lambda n: n.cells[1].metadata["mystnb"].pop("figure"),
        lambda n: n.cells[0].update(source=" "),
        lambda n: n.metadata.pop("kernelspec"),
    ],
)
def test_the_guards_see_what_they_guard_against(spoil):
    assert problems(small()) == []
    broken = copy.deepcopy(small())
    spoil(broken)
    assert problems(broken) != []
