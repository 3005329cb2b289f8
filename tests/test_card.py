"""Model cards: metadata from the inputs' own cards only, loading lines that work, records read back."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers import tuned
from minipact import card
from minipact.__main__ import main
from minipact.checkpoints import open_checkpoint

FRONT = "---\nbase_model: lab/base\nlicense: mit\n---\n# A model\n"


def folders(root: Path, cards: dict[str, str]) -> list[str]:
    """Model folders base, a and b, with these cards."""
    state = {"fc.weight": torch.randn(8, 6), "fc.bias": torch.randn(8)}
    for seed, name in enumerate(("base", "a", "b")):
        (root / name).mkdir()
        save_file(tuned(state, seed) if seed else state, root / name / "model.safetensors")
        if name in cards:
            (root / name / "README.md").write_text(cards[name])
    return [str(root / name) for name in ("base", "a", "b")]


def merged(root: Path, cards: dict[str, str], *options: str) -> dict:
    """Front matter of the card that a merge writes."""
    arguments = [*folders(root, cards), "-o", str(root / "out"), *options]
    assert main(["merge", *arguments]) == 0
    text = (root / "out" / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


def test_what_all_cards_say_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    front = merged(tmp_path, dict.fromkeys(("base", "a", "b"), FRONT))
    assert front == {
        "base_model": "lab/base",
        "base_model_relation": "merge",
        "license": "mit",
        "tags": ["merge", "model-merging"],
    }
    assert "leaves out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cards", "lacking", "why"),
    [
        ({}, {"base_model", "license"}, "base_model (no card of 'a', 'b' states one) and license (no"),
        ({"a": FRONT, "b": FRONT}, {"license"}, "license (no card of 'the base' states one)"),
        ({"base": FRONT, "a": FRONT, "b": FRONT.replace("mit", "cc-by-4.0")}, {"license"},
         "license (the inputs differ, the base: mit, a: mit, b: cc-by-4.0)"),
        ({"base": FRONT, "a": FRONT, "b": FRONT.replace("lab/base", "lab/other")}, {"base_model"},
         "base_model (the inputs differ, a: lab/base, b: lab/other)"),
        ({"base": FRONT, "a": FRONT, "b": "---\nlicense: [mit\n---\n"}, {"base_model", "license"},
         "no card of 'b'"),
        ({"base": FRONT, "a": FRONT, "b": "---\ndate: 2024-02-30\nlicense: mit\n---\n"},
         {"base_model", "license"}, "no card of 'b'"),
        (dict.fromkeys(("base", "a", "b"), FRONT.replace("mit", "other")), {"license"}, "license (no"),
        ({"base": FRONT, "a": FRONT, "b": "no front matter"}, {"base_model", "license"}, "no card of 'b'"),
        ({"base": FRONT, "a": FRONT, "b": "---\nlicense: [mit, gpl]\nbase_model: 3\n---\n"},
         {"base_model", "license"}, "no card of 'b'"),
    ],
)  # fmt: skip
def test_what_is_unknown_or_conflicting_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cards: dict, lacking: set, why: str
):
    front = merged(tmp_path, cards)
    assert {"base_model", "license"} - set(front) == lacking
    assert ("base_model_relation" in front) == ("base_model" in front)
    told = capsys.readouterr().out
    assert why in told
    assert "give --base-model, --license" in told


def test_options_overrule_cards(tmp_path: Path):
    options = ["--base-model", "lab/mine", "--license", "apache-2.0", "--quiet"]
    front = merged(tmp_path, dict.fromkeys(("base", "a", "b"), FRONT), *options)
    assert (front["base_model"], front["license"]) == ("lab/mine", "apache-2.0")


def test_a_list_of_one_counts_as_one(tmp_path: Path):
    listed = FRONT.replace("lab/base", "[lab/base]").replace("\n", "\r\n")
    front = merged(tmp_path, dict.fromkeys(("base", "a", "b"), listed), "--quiet")
    assert front["base_model"] == "lab/base"


def test_names_that_would_break_the_table(tmp_path: Path):
    base, a, _ = folders(tmp_path, {})
    assert main(["merge", base, f"x|y={a}", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert "| x\\|y | folder" in (tmp_path / "out" / "README.md").read_text()
    assert set(card.read_record(tmp_path / "out")["inputs"]["tasks"]) == {"x|y"}


# ---- Loading lines that work ---------------------------------------------------------------------


def run_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Names that the card's loading lines define, run in its folder."""
    text = (folder / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(snippet, found)
    return found


def library(folder: Path) -> str | None:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]).get("library_name")


def test_loading_plain_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    merged(tmp_path, {}, "--quiet")
    state = run_loading(tmp_path / "out", monkeypatch)["state"]
    assert all(torch.equal(x, state[n]) for n, x in open_checkpoint(tmp_path / "out").items())
    assert library(tmp_path / "out") is None


@pytest.mark.slow
def test_loading_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    for seed, name in ((1, "a"), (2, "b")):
        model.load_state_dict(tuned(model.state_dict(), seed))
        model.save_pretrained(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("base", "a", "b")]
    out = tmp_path / "out"
    assert main(["merge", *paths, "-o", str(out), "--rule", "tsv_m", "--quiet"]) == 0
    loaded = run_loading(out, monkeypatch)["model"]
    assert isinstance(loaded, transformers.BertForSequenceClassification)
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in open_checkpoint(out).items())
    assert library(out) == "transformers"


def test_loading_in_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import open_clip

    tiny = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", tiny)
    state = open_clip.create_model("tiny", pretrained=None).state_dict()
    for seed, name in enumerate(("base", "a")):
        (tmp_path / name).mkdir()
        save_file(tuned(dict(state), seed), tmp_path / name / "open_clip_model.safetensors")
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny}))
    paths = [str(tmp_path / name) for name in ("base", "a")]
    out = tmp_path / "out"
    assert main(["merge", *paths, "-o", str(out), "--quiet"]) == 0
    loaded = run_loading(out, monkeypatch)["model"].state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in open_checkpoint(out).items())
    assert library(out) == "open_clip"
