"""Guards: nbval checks what is stored, these check that what is stored is all there."""

import base64
import copy
import io
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

from stamps import FIRST_CELL

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
# To look things up, with no claim of their own and no exercises.
PAGES = {"which_method", "mistakes"}
CHAPTERS = [path for path in NOTEBOOKS if path.stem not in PAGES]
TAGS = {"nbval-ignore-output", "hide-input", "hide-output"}
Notebook = nbformat.NotebookNode


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_picture(cell: Notebook) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def has_slider(cell: Notebook) -> bool:
    pages = [str(output.get("data", {}).get("text/html", "")) for output in cell.outputs]
    return any('class="slider"' in page for page in pages)


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
        allowed = TAGS | {"remove-cell"} if cell.get("id") == FIRST_CELL else TAGS
        if tags - allowed:
            found.append(f"tags {tags - allowed}: {start}")
        if any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs):
            found.append(f"error or warning stored: {start}")
        ignored = "nbval-ignore-output" in tags
        drawn = has_picture(cell) or has_slider(cell)
        if ignored and not (drawn or "perf_counter" in cell.source):
            found.append(f"ignored, but shows no picture and no time: {start}")
        if drawn:  # the frames of a slider have their own alternative texts
            shown = cell.metadata.get("mystnb", {})
            if not ignored or not (has_slider(cell) or shown.get("image", {}).get("alt")):
                found.append(f"picture without alt text or tag: {start}")
            if not shown.get("figure", {}).get("caption"):
                found.append(f"picture without caption: {start}")
        if "print(" in cell.source and "def " not in cell.source and not text_of(cell):
            found.append(f"prints, but no output is stored: {start}")
        if re.search(r"plt\.show\(\)|lab\.slider\(", cell.source) and not drawn:
            found.append(f"draws, but no picture is stored: {start}")
        if re.search(r"https?://|/home/|/tmp/|/root/|0x[0-9a-f]{6}|it/s|\d%\|", text_of(cell)):
            found.append(f"path, address or progress bar in the output: {start}")
    return found + given_away(notebook)


def given_away(notebook: Notebook) -> list[str]:
    """Results that stand open between a prediction and its answer, one line each."""
    found, is_asked = [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            _, asks, after = cell.source.partition("**Predict")
            if asks:  # one that is answered in the same breath is folded there
                is_asked = "dropdown" not in after
            elif "dropdown" in cell.source or re.search(r"^#", cell.source, re.M):
                is_asked = False
            continue
        is_open = cell.outputs and "hide-output" not in cell.metadata.get("tags", [])
        finds_out = re.search(r"lab\.(check|slider)\(", cell.source)  # the reader's own doing
        if is_asked and is_open and not finds_out:
            found.append(f"predicted, but not folded: {cell.source[:40]}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_whole(path: Path):
    assert problems(read(path)) == []
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_light_and_in_twice_the_dots(path: Path):
    outputs = [output for cell in code_cells(read(path)) for output in cell.outputs]
    for output in (output for output in outputs if "image/png" in output.get("data", {})):
        png = base64.b64decode(output.data["image/png"])
        assert len(png) <= 40_000
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.mode == "P"
            assert picture.info["dpi"][0] > 150


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_its_parts(path: Path):
    text = "\n".join(cell.source for cell in read(path).cells)
    for part in (
        "**Claim.**",
        "Before you start",
        "| symbol |",
        "## What we learned",
        "## Exercises",
    ):
        assert part in text, part
    assert "## Further reading" in text
    assert text.count("{exercise-start}") == text.count("{solution-start}") >= 4
    assert {"*Warm-up.*", "*Standard.*", "*Research.*"} <= set(
        re.findall(r"^\*[A-Z][a-z-]+\.\*", text, re.M)
    )
    assert text.count("lab.check(") >= 2
    assert "**Predict" in text
    quiz = text[text.index("## Quiz") : text.index("## Further reading")]
    assert re.findall(r"^(\d)\. \*", quiz, re.M)[:5] == list("12345")
    assert "class: dropdown" in text
    assert not re.search(r"TODO|_VERDICT\b", text)


def test_contents_name_every_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    named = {toc["root"], *chapters}
    pages = {f"book/{p.stem}" for p in (ROOT / "book").iterdir() if p.suffix in (".md", ".ipynb")}
    assert named == pages
    mapped = re.findall(r"^\| \{doc\}`[^<]+<(\w+)>`", (ROOT / "book/intro.md").read_text(), re.M)
    notebooks = [Path(chapter).name for chapter in chapters if (ROOT / f"{chapter}.ipynb").exists()]
    assert mapped == notebooks


def small() -> Notebook:
    """A notebook without fault: one printing cell, one picture, one prediction."""
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
    asking = nbformat.v4.new_markdown_cell("**Predict first:** what is printed?")
    answer = nbformat.v4.new_code_cell("print(1)", execution_count=3, outputs=printing.outputs)
    answer.metadata["tags"] = ["hide-output"]
    notebook = nbformat.v4.new_notebook(cells=[printing, drawing, asking, answer])
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
        lambda n: n.cells[3].metadata.update(tags=[]),
        lambda n: n.cells[0].update(source=" "),
        lambda n: n.metadata.pop("kernelspec"),
    ],
)
def test_the_guards_see_what_they_guard_against(spoil):
    assert problems(small()) == []
    broken = copy.deepcopy(small())
    spoil(broken)
    assert problems(broken) != []
