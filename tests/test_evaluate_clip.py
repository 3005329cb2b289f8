"""The evaluation of merged CLIPs, on a tiny open_clip model and pictures whose right answers are known."""

import argparse
import inspect
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.datasets
from PIL import Image
from safetensors.torch import save_file

import evaluate_clip as ec

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 16},
}
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), COLOURS[colour])


def save_folder(folder: Path, pictures: dict[str, list[str]]) -> None:
    """One folder per class, with pictures of these colours."""
    for name, colours in pictures.items():
        (folder / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            picture(colour).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """Name and weights of a CLIP whose prompt for a colour has the embedding of a picture of the colour."""
    folder = tmp_path_factory.mktemp("model")
    config = {"model_cfg": CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", load_weights=False
    )
    clip.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {c}." for c in COLOURS])
    with torch.no_grad():
        images = clip.encode_image(torch.stack([transform(picture(c)) for c in COLOURS]))
        clip.text_projection.copy_(torch.eye(16))
        clip.text_projection.copy_(torch.linalg.pinv(clip.encode_text(tokens)) @ images)
    return f"local-dir:{folder}", {k: x.clone() for k, x in clip.state_dict().items()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets: three of four answers right, and one of two."""
    folder = tmp_path / "data"
    save_folder(folder / "A" / "test", {"blue": ["blue", "red"], "red": ["red", "red"]})
    save_folder(folder / "B" / "test", {"blue": ["blue"], "red": ["blue"]})
    return folder


def run(model: str, merged: Path, data: Path, *more: str) -> tuple[int, dict]:
    out = merged.with_name("found.json")
    arguments = [str(merged), "--model", model, "--data", str(data), "--json", str(out), *more]
    code = ec.main([*arguments, "--workers", "0", "--device", "cpu", "--batch", "3"])
    return code, json.loads(out.read_text()) if code == 0 else {}


def visual(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in weights.items() if name.startswith("visual.")}


def test_full_state_dict_image_tower_and_older_names_give_the_known_answer(model, data, tmp_path):
    name, weights = model
    save_file(weights, tmp_path / "full.safetensors")
    save_file({k: x.double() for k, x in visual(weights).items()}, tmp_path / "tower.safetensors")
    torch.save({f"model.{k}": x for k, x in weights.items()}, tmp_path / "older.pt")
    text = ["--text", str(tmp_path / "full.safetensors")]
    for file, more in (("full.safetensors", []), ("tower.safetensors", text), ("older.pt", [])):
        code, found = run(name, tmp_path / file, data, "--tasks", "A,B", *more)
        assert code == 0
        assert found["merged"] == {"A": 0.75, "B": 0.5}, file
        assert found["images"] == {"A": 4, "B": 2}
        assert (found["absolute"], found["normalised"]) == (0.625, None)


def test_normalised_average_with_a_checkpoint_and_with_a_number(model, data, tmp_path, capsys):
    name, weights = model
    save_file(weights, tmp_path / "full.safetensors")
    save_file(visual(weights), tmp_path / "tuned.safetensors")
    tuned = ["--finetuned", f"A={tmp_path / 'tuned.safetensors'}", "B=100"]
    _, found = run(name, tmp_path / "full.safetensors", data, "--tasks", "A,B", *tuned)
    assert found["finetuned"] == {"A": 0.75, "B": 1.0}
    assert found["normalised"] == (0.75 / 0.75 + 0.5 / 1) / 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["A", "75.00", "75.00"] in rows
    assert ["B", "50.00", "100.00"] in rows
    assert ["merged", "62.50", "75.00"] in rows


def test_averages_by_hand():
    assert ec.averages({"A": 0.5, "B": 0.9}, {}) == (0.7, None)
    assert ec.averages({"A": 0.5, "B": 0.9}, {"A": 0.5})[1] is None
    # the mean of the ratios 1/2 and 1, not the ratio of the means 1.1/1.4
    absolute, normalised = ec.averages({"A": 0.3, "B": 0.8}, {"A": 0.6, "B": 0.8})
    assert absolute == pytest.approx(0.55)
    assert normalised == pytest.approx(0.75)


def test_stored_heads_take_the_place_of_prompts(model, data, tmp_path, capsys):
    name, weights = model
    save_file(visual(weights), tmp_path / "tower.safetensors")
    clip, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    clip.load_state_dict(weights)
    with torch.no_grad():
        right = clip.eval().encode_image(torch.stack([transform(picture(c)) for c in COLOURS]))
    # classes in the order red, blue against folders in the order blue, red: every answer is turned round
    torch.save({"weight": 100 * right, "bias": torch.zeros(2)}, tmp_path / "head_AVal.pt")
    more = ["--tasks", "A", "--heads", str(tmp_path)]
    assert run(name, tmp_path / "tower.safetensors", data, *more)[1]["merged"] == {"A": 0.25}
    torch.save({"weight": torch.ones(3, 16)}, tmp_path / "head_AVal.pt")
    assert run(name, tmp_path / "tower.safetensors", data, *more)[0] == 2
    assert "no head of 2 classes" in capsys.readouterr().err


def test_every_missing_data_set_is_named_at_once(model, tmp_path, capsys):
    name, weights = model
    save_file(weights, tmp_path / "full.safetensors")
    assert run(name, tmp_path / "full.safetensors", tmp_path, "--suite", "20")[0] == 2
    message = capsys.readouterr().err
    for task in ec.TASKS:
        assert f"test set of {task}:" in message
        assert str(tmp_path / task / "test") in message
    assert "torchvision's StanfordCars" in message


def test_wrong_weights_are_refused(model, data, tmp_path, capsys):
    name, weights = model
    wide = weights | {"visual.conv1.weight": torch.zeros(16, 3, 4, 4)}
    deep = weights | {"visual.transformer.resblocks.1.ln_1.bias": torch.zeros(16)}
    hub = {"vision_model.embeddings.class_embedding": torch.zeros(16)}
    cases = [
        (wide, "'visual.conv1.weight' is (16, 3, 4, 4), --model has (16, 3, 8, 8)"),
        (deep, "'visual.transformer.resblocks.1.ln_1.bias' is (16,), --model has none"),
        (hub, "open_clip's"),
        (visual(weights), "--text"),
    ]
    for number, (case, message) in enumerate(cases):
        save_file(case, tmp_path / f"{number}.safetensors")
        assert run(name, tmp_path / f"{number}.safetensors", data, "--tasks", "A")[0] == 2
        assert message in capsys.readouterr().err
    assert run("ViT-X", tmp_path / "3.safetensors", data)[0] == 2
    assert run(name, tmp_path / "none.safetensors", data, "--tasks", "A")[0] == 2
    more = ["--tasks", "A", "--finetuned", "C=90"]
    assert run(name, tmp_path / "3.safetensors", data, *more)[0] == 2
    assert "--finetuned C" in capsys.readouterr().err


def save_idx(folder: Path, stem: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Files of the MNIST family: the type 8, the number of dimensions, big-endian sizes, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, x in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, x.ndim]) + b"".join(n.to_bytes(4, "big") for n in x.shape)
        (folder / f"{stem}-{kind}-ubyte").write_bytes(head + x.astype(np.uint8).tobytes())


def test_torchvision_layouts(tmp_path):
    images, labels = np.zeros((3, 28, 28)), np.array([7, 0, 9])
    for split in ("train", "t10k"):
        save_idx(tmp_path / "MNIST" / "raw", split, images, labels)
    save_idx(tmp_path / "EMNIST" / "raw", "emnist-digits-train", images, labels)
    save_idx(tmp_path / "EMNIST" / "raw", "emnist-digits-test", images, labels)
    signs = tmp_path / "gtsrb"
    (signs / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    picture("red").save(signs / "GTSRB" / "Final_Test" / "Images" / "00000.ppm")
    (signs / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;14\n")
    textures = tmp_path / "dtd" / "dtd"
    (textures / "labels").mkdir(parents=True)
    (textures / "images" / "polka_dotted").mkdir(parents=True)
    picture("red").save(textures / "images" / "polka_dotted" / "1.jpg")
    (textures / "labels" / "test1.txt").write_text("polka_dotted/1.jpg\n")
    for task, answer in (
        ("MNIST", "7"),
        ("EMNIST", "7"),
        ("GTSRB", "stop"),
        ("DTD", "polka dotted"),
    ):
        found, names = ec.load_test_set(task, tmp_path, lambda image: image)
        assert names[found[0][1]] == answer


def test_torchvision_takes_the_arguments_of_every_task():
    for entry in ec.TASKS.values():
        if entry["torchvision"]:
            name, settings = entry["torchvision"]
            made = inspect.signature(getattr(torchvision.datasets, name))
            made.bind("root", transform=None, **settings)


def test_numbered_folders_keep_their_numbers(tmp_path):
    save_folder(tmp_path / "GTSRB" / "test", {"14": ["red"], "2": ["red"]})
    save_folder(tmp_path / "EuroSAT" / "test", {"AnnualCrop": ["red"], "SeaLake": ["red"]})
    assert ec.load_test_set("GTSRB", tmp_path, None)[1] == ["stop", "speed limit 50"]
    assert ec.load_test_set("EuroSAT", tmp_path, None)[1] == ["Annual Crop", "Sea Lake"]
    save_folder(tmp_path / "SVHN" / "test", {"10": ["red"]})
    with pytest.raises(ec.MergeError, match="test set of SVHN"):
        ec.load_test_set("SVHN", tmp_path, None)


def test_parquet_files_of_the_hub(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "EuroSAT" / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pictures = []
    for colour in COLOURS:
        picture(colour).save(tmp_path / "picture.png")
        pictures.append({"bytes": (tmp_path / "picture.png").read_bytes(), "path": None})
    table = pyarrow.table({"image": pictures, "label": [1, 0]})
    kinds = {
        "image": {"_type": "Image"},
        "label": {"names": ["sea_lake", "forest"], "_type": "ClassLabel"},
    }
    header = {"huggingface": json.dumps({"info": {"features": kinds}})}
    parquet.write_table(table.replace_schema_metadata(header), file)
    found, names = ec.load_test_set("EuroSAT", tmp_path, lambda image: image.getpixel((0, 0)))
    assert names == ["sea lake", "forest"]
    assert [found[i] for i in range(len(found))] == [(COLOURS["red"], 1), (COLOURS["blue"], 0)]
    parquet.write_table(table.replace_schema_metadata({}), file)
    with pytest.raises(ec.MergeError, match="no column of images"):
        ec.load_test_set("EuroSAT", tmp_path, None)


def test_published_rows_stand_beside_ours():
    tasks = ec.SUITES[8]
    rows = ec.published("a", "ViT-B-32", tasks[::-1], "tsv_m")
    assert [(row["absolute"], row["normalised"]) for row in rows] == [(85.86, 92.31)]
    found = {"merged": dict.fromkeys(tasks, 0.85), "finetuned": {}, "absolute": 0.85}
    found |= {"normalised": None, "published": rows, "remarks": ["two points"]}
    text = ec.report(found | {"architecture": "ViT-B-32"}, "a", "tsv_m")
    assert ["published:", "TSV-M", "85.86", "92.31", "-0.86"] in map(str.split, text.splitlines())
    assert f"Source of TSV-M: {rows[0]['source']}" in text
    assert "Note: two points" in text
    assert ec.published("a", "ViT-B-32", tasks[1:], None) == []
    assert ec.published("a", "ViT-B-32", [*tasks[1:], "STL10"], None) == []
    nothing = found | {
        "architecture": "ViT-B-32",
        "published": ec.published("a", "ViT-B-32", tasks, "pact"),
    }
    assert "No published number is known for pact" in ec.report(nothing, "a", "pact")


def test_architectures_are_told_by_their_sizes():
    with torch.device("meta"):
        for name in ec.SIZES.values():
            plain, quick = (open_clip.get_model_config(n) for n in (name, f"{name}-quickgelu"))
            assert plain["vision_cfg"] == quick["vision_cfg"]
            sizes = open_clip.CLIPVisionCfg(**plain["vision_cfg"])
            conv = torch.nn.Conv2d(3, sizes.width, sizes.patch_size, sizes.patch_size, bias=False)
            tower = torch.nn.ModuleDict({"visual": torch.nn.ModuleDict({"conv1": conv})})
            tokens = (sizes.image_size // sizes.patch_size) ** 2 + 1
            places = torch.nn.Parameter(torch.zeros(tokens, sizes.width))
            tower["visual"].register_parameter("positional_embedding", places)
            assert ec.architecture(tower) == name
    assert ec.architecture(torch.nn.Linear(1, 1)) == "another architecture"


def test_notes_explain_the_activation_and_the_budget():
    options = argparse.Namespace(model="ViT-B-32", heads=None, family="a")
    text = "\n".join(ec.notes(options))
    assert "ViT-B-32-quickgelu" in text
    assert "2 points" in text
    assert "prompts are our own" in text
    options = argparse.Namespace(model="ViT-B-32-quickgelu", heads=Path("x"), family=None)
    assert ec.notes(options) == []


def test_published_numbers_are_whole():
    rows, families = ec.PUBLISHED["rows"], ec.PUBLISHED["families"]
    keys = [tuple(row[k] for k in ("family", "model", "tasks", "method", "source")) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["family"] for row in rows} == set(families) == {"a", "b", "c"}
    tuned = {k[:3]: r["absolute"] for k, r in zip(keys, rows, strict=True) if k[3] == "finetuned"}
    for key, row in zip(keys, rows, strict=True):
        assert row["source"]
        assert row["label"]
        assert row["model"] in ec.SIZES.values()
        assert row["tasks"] in ec.SUITES
        assert row["method"] not in families[row["family"]]["not_found"]
        if not row["task_id"] and key[:3] in tuned:
            assert row["absolute"] <= tuned[key[:3]]
        if (
            row["normalised"] is not None
        ):  # near absolute / fine-tuned, which differs from it a little
            ratio = 100 * row["absolute"] / tuned[key[:3]]
            assert row["normalised"] == pytest.approx(ratio, abs=2.5), key
    everything = [row for row in rows if row["family"] == "a"]
    assert len(everything) == 11 * 3 * 3


def test_the_tasks_are_those_of_the_suites():
    assert [len(tasks) for tasks in ec.SUITES.values()] == [8, 14, 20]
    assert {"Cars", "SUN397", "RESISC45"} < set(ec.SUITES[8])
    assert len(ec.TASKS["GTSRB"]["names"]) == 43
    assert ec.TASKS["GTSRB"]["names"][14] == "stop"
    for task, entry in ec.TASKS.items():
        assert all(prompt.count("{}") == 1 for prompt in entry["prompts"]), task
