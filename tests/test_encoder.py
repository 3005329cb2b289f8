"""The real encoder: texts and splits, packed updates, damage, and that recorded accuracies are its own."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

import encoder_io
import fair_table
import packed
import texts
import verdicts
from benches import open_bench
from helpers import ROOT, normal
from rows import path_of
from sums import DataError

pytestmark = pytest.mark.slow
FOLDER = ROOT / "data" / "encoder"
INFO = json.loads((FOLDER / "encoder.json").read_text())


# ---- Texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", texts.TASKS)
def test_splits_share_neither_texts_nor_groups(task: str):
    found = texts.split(task)
    assert [len(found[split]) for split in ("test", "val")] == [500, 150]
    assert len(found["train"]) > 500
    for split, others in (("test", ("val", "train")), ("val", ("train",))):
        rest = [row for other in others for row in found[other]]
        assert not {x.text.casefold() for x in found[split]} & {x.text.casefold() for x in rest}
        assert not {x.group for x in found[split]} & {x.group for x in rest}
    for split, rows in found.items():
        labels = [row.label for row in rows]
        assert set(labels) <= texts.TASKS[task].classes.keys()
        room = texts.CROWDED * texts.SIZES[split] / len(texts.TASKS[task].classes)
        assert max(map(labels.count, set(labels))) < room + 1


def test_texts_with_two_labels_are_left_out():
    rows = [
        texts.Example("1", "a", "One", "x"),
        texts.Example("2", "b", "one", "x"),
        texts.Example("3", "c", "Two", "x"),
        texts.Example("4", "d", "two", "y"),
    ]
    assert texts.unambiguous(rows) == rows[:1]


def test_sentences_are_cut_at_their_ends_and_kept_by_length():
    long = "word " * 40 + "end."
    kept = "This sentence has forty characters at least."
    assert texts.sentences(f"Short. {kept}  {long} {kept}") == [kept, kept]


def test_no_text_is_in_git():
    listed = gzip.decompress((FOLDER / "examples.csv.gz").read_bytes()).decode()
    sentences = [
        row.text for task in ("verses", "speeches", "bugs") for row in texts.split(task)["test"]
    ]
    assert not any(text in listed for text in sentences)


# ---- Packed updates ------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "noise"), [(0.5, 0.0208), (1.0, 0.083)])
def test_packing_adds_the_noise_of_rounding(step: float, noise: float):
    base = {"w": normal(60, 80).float(), "b": normal(60, seed=1).float()}
    change = {"w": 0.01 * normal(60, 80, seed=2).float(), "b": 0.01 * normal(60, seed=3).float()}
    tuned = {name: x + change[name] for name, x in base.items()}
    file = packed.pack(base, tuned, step)
    found = packed.unpack(base, file)
    error = (found["w"] - tuned["w"]).square().sum() / change["w"].square().sum()
    assert float(error) == pytest.approx(noise, rel=0.1)
    assert torch.allclose(found["b"] - base["b"], change["b"], rtol=0.01)
    assert len(file) < 60 * 80 * (2.6 - torch.tensor(step).log2()) / 8 + 1200


def test_a_row_with_a_large_entry_gets_a_larger_unit():
    """Whole numbers end at 127; with the usual unit an entry of fifteen times the mean would be cut."""
    weights = {"w": normal(4, 400).float()}
    weights["w"][2, 7] = 200.0
    found = packed.unpack_alone(packed.pack_alone(weights, 0.03))["w"]
    assert torch.allclose(found[2, 7], weights["w"][2, 7], rtol=0.01)
    others = [0, 1, 3]
    assert (found[others] - weights["w"][others]).abs().max() < 0.02 * weights["w"][others].std()


def test_an_unchanged_tensor_stays_as_it_is():
    base = {"w": normal(5, 4).float(), "b": normal(5).float()}
    found = packed.unpack(base, packed.pack(base, base, 1.0))
    assert all(torch.equal(found[name], base[name]) for name in base)


# ---- The encoder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned() -> encoder_io.TunedEncoder:
    return encoder_io.load_encoder(FOLDER)


def test_recorded_accuracies_are_the_models_own(tuned: encoder_io.TunedEncoder):
    encoder = encoder_io.Encoder()
    for task in ("feelings", "industries"):
        head = encoder_io.head_of(encoder, task)
        for weights, name in ((tuned.base, "zero_shot"), (tuned.tasks[task], "finetuned")):
            encoder.load(weights)
            right = encoder_io.right(encoder, head, *encoder_io.labelled(task, "test"))
            assert right.mean() == pytest.approx(INFO["tasks"][task][name], abs=0.005)
            encoder.load(tuned.base)


def test_tasks_differ_and_gain(tuned: encoder_io.TunedEncoder):
    rows = INFO["tasks"].values()
    gains = [row["finetuned"] - row["zero_shot"] for row in rows]
    assert sum(gains) / len(gains) > 0.08
    assert max(row["zero_shot"] for row in rows) - min(row["zero_shot"] for row in rows) > 0.3
    flat = torch.stack(
        [
            torch.cat([(w[k] - x).flatten() for k, x in tuned.base.items()])
            for w in tuned.tasks.values()
        ]
    )
    cosines = torch.corrcoef(flat)
    assert (cosines - torch.eye(len(cosines))).abs().max() < 0.5


def test_embeddings_are_those_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(encoder_io.model_folder()), device="cpu")
    sentences = ["A short one.", "In the beginning God created the heaven and the earth."]
    wanted = torch.tensor(reference.encode(sentences))
    found = encoder_io.embed(encoder_io.Encoder(), encoder_io.tokenize(sentences))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_batches_and_padding_change_nothing():
    encoder = encoder_io.Encoder()
    tokens = encoder_io.tokenize(["one", "a much longer sentence about nothing", "two words"])
    together, alone = (encoder_io.embed(encoder, tokens, batch) for batch in (3, 1))
    assert torch.allclose(together, alone, atol=1e-5)


# ---- Damage --------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "encoder", ignore=lambda *_: [".work"]))


def test_damaged_files_are_named(copy: Path):
    path = copy / "bugs.safetensors.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"bugs.safetensors.gz is damaged.*train_encoder"):
        encoder_io.load_encoder(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"bugs.safetensors.gz is missing"):
        encoder_io.load_encoder(copy)


@pytest.mark.parametrize(
    "change", [lambda x: x[:-1], lambda x: [*x[:2], x[2][:-3] + "abc", *x[3:]]]
)
def test_other_texts_are_noticed(tmp_path: Path, change):
    lines = gzip.decompress((FOLDER / "examples.csv.gz").read_bytes()).decode().splitlines()
    few = [line for line in lines if line.startswith(("task,", "industries,"))]
    table = tmp_path / "examples.csv.gz"
    table.write_bytes(gzip.compress("\n".join(few).encode()))
    encoder_io.check_examples(table)
    table.write_bytes(gzip.compress("\n".join(change(few)).encode()))
    with pytest.raises(DataError, match=r"industries, example .*naics.*pins"):
        encoder_io.check_examples(table)


def test_another_model_in_the_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    encoder_io.checked_weights.cache_clear()
    monkeypatch.setattr(encoder_io, "MODEL_SHA256", "0" * 64)
    with pytest.raises(DataError, match="not all-MiniLM-L6-v2 as known here"):
        encoder_io.Encoder()


def test_a_row_of_the_fair_table_comes_out_again():
    """The sum of the four unseen tasks, on test data; another processor may turn a few answers."""
    bench = open_bench("encoder_unseen")
    wanted = fair_table.key(fair_table.alone("task_arithmetic", "mean"))
    rows = fair_table.read(path_of("encoder_unseen"))
    row = next(row for row in rows if fair_table.row_key(row) == wanted)
    assert row["digest"] == bench.digest[:16]
    again = verdicts.hits(fair_table.tested(bench, bench.tasks, row))
    for task, hits in verdicts.hits(row).items():
        assert (hits != again[task]).mean() < 0.01
