"""Statistics of models from files to a file: open_clip, transformers, and the protocol for all others."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minipact as mp
import peers
from helpers import ROOT, normal
from minipact import measuring
from minipact.__main__ import main
from minipact.checkpoints import sha256

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 16},
}
BLOCK = "visual.transformer.resblocks.0"


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(
        found, expected.to(found), rtol=1e-3, atol=1e-6 * float(expected.abs().max())
    )


def measured(kind: str, model: Path, data: Path, **more) -> mp.StatisticsFile:
    output = model.parent / f"{kind}.safetensors"
    mp.measure_file(kind, model, data, output, overwrite=True, **more)
    return mp.open_statistics(output)


# ---- open_clip -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP as open_clip lays it out, its image tower alone, and images of two classes."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": CLIP, "preprocess_cfg": {}}
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder / 'model'}", load_weights=False)
    save_file(model.state_dict(), folder / "model" / "open_clip_model.safetensors")
    tower = {n: x for n, x in model.state_dict().items() if n.startswith("visual.")}
    save_file(tower, folder / "tower.safetensors")
    save_file({f"model.{n}": x for n, x in tower.items()}, folder / "encoder.safetensors")
    generator = np.random.default_rng(0)
    for name in ("red_fox", "wolf"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    return folder


def architecture(clip: Path) -> str:
    return f"local-dir:{clip / 'model'}"


def opened(clip: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, all images and their labels."""
    import open_clip
    from torchvision.datasets import ImageFolder

    model, _, transform = open_clip.create_model_and_transforms(architecture(clip))
    images, labels = zip(*ImageFolder(str(clip / "images"), transform), strict=True)
    return model.eval(), torch.stack(images), torch.tensor(labels)


def test_covariances_of_an_image_tower(clip: Path):
    found = measured("covariance", clip / "model", clip / "images", batch=4)
    model, images, _ = opened(clip)
    seen = {}
    blocks = model.visual.transformer.resblocks
    blocks[0].mlp.c_proj.register_forward_pre_hook(lambda m, x: seen.update(proj=x[0]))
    blocks[0].ln_1.register_forward_hook(lambda m, i, x: seen.update(attn=x))
    model.encode_image(images)
    for name, x in (("mlp.c_proj.weight", seen["proj"]), ("attn.in_proj_weight", seen["attn"])):
        rows = x.detach().flatten(0, 1).double()
        assert close(found[f"{BLOCK}.{name}"], rows.mT @ rows / len(rows))
    layers = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert set(found) == {f"{BLOCK}.{name}" for name in layers}
    assert (found.kind, found.samples) == ("covariance", 6)
    assert found.model == [sha256(clip / "model" / "open_clip_model.safetensors")]


@pytest.mark.parametrize("name", ["tower", "encoder"])
def test_a_tower_alone_has_the_names_of_its_file(clip: Path, name: str):
    file = clip / f"{name}.safetensors"
    found = measured("covariance", file, clip / "images", architecture=architecture(clip))
    assert set(found) < set(load_file(file))
    whole = measured("covariance", clip / "model", clip / "images")
    assert all(close(found[n], whole[n.removeprefix("model.")]) for n in found)


def test_fisher_of_an_image_tower_by_the_names_of_its_classes(clip: Path):
    import open_clip

    model, images, labels = opened(clip)
    tokens = open_clip.get_tokenizer(architecture(clip))(
        ["a photo of a red fox.", "a photo of a wolf."]
    )
    head = nn.functional.normalize(model.encode_text(tokens), dim=-1) * model.logit_scale.exp()
    found = measured("fisher", clip / "model", clip / "images", labels="empirical")
    assert set(found) == {n for n, _ in model.named_parameters() if n.startswith("visual.")}
    total = torch.zeros_like(model.visual.conv1.weight)
    for image, label in zip(images, labels, strict=True):
        unit = nn.functional.normalize(model.encode_image(image[None]), dim=-1)
        model.zero_grad()
        nn.functional.cross_entropy(unit @ head.detach().mT, label[None]).backward()
        total += model.visual.conv1.weight.grad.square()
    assert close(found["visual.conv1.weight"], total / 6)
    save_file({"weight": head.detach().contiguous()}, clip / "head.safetensors")
    stored = measured(
        "fisher", clip / "tower.safetensors", clip / "images", labels="empirical",
        architecture=architecture(clip), head=clip / "head.safetensors",
    )  # fmt: skip
    assert all(close(stored[name], found[name]) for name in found)
    text = measured(
        "fisher", clip / "tower.safetensors", clip / "images", labels="empirical",
        architecture=architecture(clip), text=clip / "model",
    )  # fmt: skip
    assert all(close(text[name], found[name]) for name in found)


def test_gradients_are_measured_at_the_base_for_a_task(clip: Path):
    found = measured(
        "gradient", clip / "model", clip / "images", task=clip / "tower.safetensors", samples=3, batch=2
    )  # fmt: skip
    assert (found.kind, found.samples) == ("gradient", 3)
    assert found.model == [sha256(clip / "model" / "open_clip_model.safetensors")]
    assert found.task == [sha256(clip / "tower.safetensors")]
    assert float(found["visual.proj"].min()) >= 0


def test_covariances_of_a_tower_reach_a_merge(clip: Path, capsys: pytest.CaptureFixture[str]):
    files = []
    base = load_file(clip / "tower.safetensors")
    for seed, name in enumerate(("cars", "signs")):
        torch.manual_seed(seed)
        state = {n: x + 0.05 * torch.randn_like(x) for n, x in base.items()}
        save_file(state, clip / f"{name}.safetensors")
        output = clip / f"{name}_covariance.safetensors"
        arguments = ["--data", clip / "images", "-o", output, "--architecture", architecture(clip)]
        command = ["statistics", "covariance", clip / f"{name}.safetensors", *arguments]
        assert main([str(x) for x in command]) == 0
        told = capsys.readouterr().out
        assert told.startswith("covariance of 4 tensors on 6 samples: wrote ")
        files += ["--statistics", output]
    models = [clip / f"{name}.safetensors" for name in ("tower", "cars", "signs")]
    command = ["merge", *models, "-o", clip / "out.safetensors", "--purify", "pave", *files]
    assert main([str(x) for x in command]) == 0
    told = capsys.readouterr().out
    assert "4 tensors: pave > task_arithmetic" in told
    assert "no covariance of 2 tensors, such as 'visual.positional_embedding': pave leaves" in told


# ---- transformers --------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
TEXTS = [("good film", 1), ("a bad film", 0), ("a good film", 1), ("bad", 0)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of transformers, and texts."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    transformers.BertModel(config).save_pretrained(folder / "encoder")
    for name in ("model", "encoder"):
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / name)
    (folder / "texts.txt").write_text("".join(f"{text}\n\n" for text, _ in TEXTS))
    lines = [json.dumps({"text": text, "label": label}) for text, label in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def classifier(bert: Path) -> tuple[nn.Module, list[Tensor]]:
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(bert / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert / "model")
    return model, [tokenizer(text, return_tensors="pt")["input_ids"] for text, _ in TEXTS]


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_covariances_of_a_text_model(bert: Path, name: str):
    found = measured("covariance", bert / "model", bert / name)
    model, texts = classifier(bert)
    seen = []
    layer = model.bert.encoder.layer[0]
    layer.attention.self.query.register_forward_pre_hook(lambda m, x: seen.append(x[0][0].detach()))
    for tokens in texts:
        model(tokens)
    rows = torch.cat(seen).double()
    for part in ("query", "key", "value"):
        weight = f"bert.encoder.layer.0.attention.self.{part}.weight"
        assert close(found[weight], rows.mT @ rows / len(rows))
    assert found.samples == 4
    assert set(found) < set(load_file(bert / "model" / "model.safetensors"))


def test_an_encoder_needs_no_head_for_covariances(bert: Path):
    found = measured("covariance", bert / "encoder", bert / "texts.txt", samples=2)
    assert "encoder.layer.0.output.dense.weight" in found
    assert found.samples == 2
    with pytest.raises(
        mp.MergeError, match="is a BertModel: Fisher information and gradients need"
    ):
        measured("fisher", bert / "encoder", bert / "texts.jsonl")


def test_gradients_of_a_text_model(bert: Path):
    found = measured("gradient", bert / "model", bert / "texts.jsonl", task=bert / "encoder")
    model, texts = classifier(bert)
    total = torch.zeros_like(model.classifier.weight)
    for tokens, (_, label) in zip(texts, TEXTS, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens).logits, torch.tensor([label])).backward()
        total += model.classifier.weight.grad.abs()
    assert close(found["classifier.weight"], total / 4)
    assert set(found) == set(load_file(bert / "model" / "model.safetensors"))
    with pytest.raises(mp.MergeError, match="needs batches of pairs"):
        measured("gradient", bert / "model", bert / "texts.txt", task=bert / "encoder")
    fisher = measured("fisher", bert / "model", bert / "texts.txt")  # labels are the model's own
    assert float(fisher["classifier.weight"].sum()) > 0


# ---- All others ----------------------------------------------------------------------------------


def linear(model: Path, data: Path) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A classifier of three classes, with two batches of four samples."""
    module = nn.Sequential(nn.Linear(5, 3))
    module.load_state_dict({n.removeprefix("net."): x for n, x in load_file(model).items()})
    x = load_file(data)["x"]
    return module, [(rows, torch.arange(4) % 3) for rows in x.split(4)]


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """A model and data in files that no library knows."""
    torch.manual_seed(0)
    state = {f"net.{n}": x for n, x in nn.Sequential(nn.Linear(5, 3)).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    save_file({"x": normal(8, 5).float()}, tmp_path / "data.safetensors")
    return tmp_path / "model.safetensors", tmp_path / "data.safetensors"


def test_a_function_opens_any_other_model(own: tuple[Path, Path]):
    found = measured("covariance", *own, loader=linear, samples=6)
    x = load_file(own[1])["x"][:6]
    assert close(found["net.0.weight"], x.mT @ x / 6)
    assert found.samples == 6
    by_name = measured("fisher", *own, loader="test_measuring:linear", labels="expected")
    module, batches = linear(*own)
    expected = mp.fisher(module, batches, labels="expected")
    assert close(by_name["net.0.weight"], expected["0.weight"])


def test_samples_and_labels_are_drawn_by_the_seed(clip: Path):
    first, again, other = (
        dict(measured("fisher", clip / "model", clip / "images", samples=4, seed=seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def yields_nothing(model: Path, data: Path) -> None:
    """A loader that forgot its return."""


def other_names(model: Path, data: Path) -> tuple[nn.Module, list[Tensor]]:
    return nn.Sequential(nn.Sequential(nn.Linear(5, 3))), [torch.ones(2, 5)]


def too_wide(model: Path, data: Path) -> tuple[nn.Module, list[Tensor]]:
    """Inputs that do not fit the module."""
    return linear(model, data)[0], [torch.ones(2, 6)]


def branching(model: Path, data: Path) -> tuple[nn.Module, list[Tensor]]:
    """A module that decides by numbers, which vmap cannot follow."""
    module, batches = linear(model, data)

    def decide(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].sum() > 0:
            layer.positive = True

    module[0].register_forward_pre_hook(decide)
    return module, batches


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gram", {}, "statistics 'gram' is unknown"),
        (
            "covariance",
            {},
            "does not say what model it is: give open_clip's name of its architecture",
        ),
        ("covariance", {"loader": "onnx"}, "loader 'onnx' is unknown: use 'open_clip', 'transform"),
        ("covariance", {"loader": "no_such:thing"}, "no_such:thing cannot be imported"),
        ("covariance", {"loader": yields_nothing}, r"a loader is a function \(model, data\) ->"),
        ("covariance", {"loader": linear, "labels": "true"}, "covariances take no labels"),
        ("covariance", {"loader": linear, "samples": 0}, "samples=0, batch=32: must be at least 1"),
        ("covariance", {"loader": linear, "head": "x"}, "'head': for open_clip models alone"),
        ("covariance", {"loader": linear, "task": "x"}, "covariance with task=x: gradients are"),
        (
            "covariance",
            {"loader": other_names},
            "no tensor of .* is called as a parameter of the mod",
        ),
        ("fisher", {"loader": branching}, "not sample by sample in torch.func.vmap"),
        ("gradient", {"loader": linear}, "gradient with task=None: gradients are the base's"),
        ("covariance", {"loader": "open_clip"}, "is a file: give open_clip's name of its arch"),
        ("covariance", {"architecture": "ViT-Z"}, "open_clip cannot make a model ViT-Z"),
    ],
)
def test_what_cannot_be_measured(own: tuple[Path, Path], kind: str, more: dict, message: str):
    with pytest.raises(mp.MergeError, match=message):
        measured(kind, *own, **more)
    assert not list(own[0].parent.glob(f"{kind}*"))


def test_data_that_do_not_fit(clip: Path, bert: Path, tmp_path: Path):
    broken = tmp_path / "broken.jsonl"
    cases = [
        (clip / "model", tmp_path, "holds no images by class .*: give a folder with a folder of"),
        (bert / "model", tmp_path / "none.txt", "cannot be read .*: give a text a line"),
        (bert / "model", broken, "text 1 of .* cannot be read"),
    ]
    broken.write_text('{"label": 1}\n')
    for model, data, message in cases:
        with pytest.raises(mp.MergeError, match=message):
            measured("covariance", model, data)
    broken.write_text('{"text": "a", "label": "good"}\n')
    with pytest.raises(mp.MergeError, match="text 1 of .* is .*: give a text a line"):
        measured("covariance", bert / "model", broken)
    broken.write_text("\n")
    with pytest.raises(mp.MergeError, match="holds no sample: give the task's training data"):
        measured("covariance", bert / "model", broken)
    with pytest.raises(mp.MergeError, match="lacks the text tower"):
        measured(
            "fisher", clip / "tower.safetensors", clip / "images", architecture=architecture(clip)
        )
    save_file({"weight": torch.ones(3, 8)}, tmp_path / "head.safetensors")
    with pytest.raises(mp.CheckpointError, match=r"no weight \[C, d\] for 2 classes"):
        measured("fisher", clip / "model", clip / "images", head=tmp_path / "head.safetensors")
    with pytest.raises(mp.MergeError, match="lacks 20 of 20 tensors"):
        measured(
            "covariance", tmp_path / "head.safetensors", clip / "images",
            architecture=architecture(clip),
        )  # fmt: skip


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_a_missing_library_is_one_message(
    clip: Path, bert: Path, library: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setitem(sys.modules, library, None)
    model, data = (clip / "model", clip / "images") if library == "open_clip" else (
        bert / "model", bert / "texts.txt",
    )  # fmt: skip
    command = ["statistics", "covariance", model, "--data", data, "-o", clip / "x.safetensors"]
    assert main([str(x) for x in command]) == 2
    error = capsys.readouterr().err
    assert f"minipact: error: {library} is missing" in error
    assert "pip install" in error
    assert measuring.ADAPTERS == ("open_clip", "transformers")


def test_the_readme_has_the_recorded_table_of_peers():
    recorded = json.loads((ROOT / "benchmarks/results/peers_x86_64_2cores.json").read_text())
    assert peers.markdown(recorded) in (ROOT / "README.md").read_text()
    assert set(recorded["methods"]) == set(peers.PAIRS)
